"""Whether adapters belong to one base model, as far as they tell, and whether the one at hand is it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from qhybrid.adapters.plain import PlainAdapter
from qhybrid.base.fingerprint import config_hash, fingerprint
from qhybrid.base.locate import weight_files
from qhybrid.errors import AdapterError

_SAME_BASE = "if you know that they are of one base model, --same-base takes them"
_OTHER_BASE = "--base names the right one; if you know that it is the same model, --other-base takes it as it is"


def require_one_base(
    adapters: Sequence[PlainAdapter], *, same_base: bool = False, by_name: bool = True, hint: str = _SAME_BASE
) -> list[str]:
    """Refuse adapters of different base models.

    Two adapters are compared by the hashes of the base's configuration and of its weight files where both know
    them, and else by its name and revision. Shapes are compared where modules are put together.

    Args:
        same_base: the user knows that they are of one base; what speaks against it is returned.
        by_name: whether names count where hashes are not known.
        hint: what to do, for the message.

    Returns:
        What was not as it should be, one line each; only with `same_base`.

    Raises:
        AdapterError: two that differ, or of which nothing can be compared.
    """
    pairs = combinations(adapters, 2)
    faults = list(dict.fromkeys(fault for pair in pairs if (fault := _fault(*pair, by_name=by_name))))
    if faults and not same_base:
        raise AdapterError(faults[0], hint=hint)
    return faults


def require_own_base(adapters: Sequence[PlainAdapter], base: Path) -> bool:
    """Refuse a base model that an adapter was not trained on, by its config.json and its files' hashes.

    The files are read once, and only where an adapter knows their hashes. Adapters of other tools do not.

    Args:
        base: the model's folder.

    Returns:
        Whether all adapters know the hashes.

    Raises:
        AdapterError: it is another model, or the same one in other files.
        ModelError: a file cannot be read, or is not what the hub said it was.
    """
    config, weights = config_hash(base), None
    for adapter in adapters:
        info, place = adapter.info, str(adapter.source)
        if info.base_config_sha256 not in (None, config):
            message = f"the model in {base} is not the adapter's base: its config.json says something else"
            raise AdapterError(message, where=place, hint=_OTHER_BASE)
        if info.base_sha256 is None:
            continue
        if weights is None:
            weights = {facts["sha256"] for facts in fingerprint(weight_files(base)).values()}
        if set(info.base_sha256.values()) != weights:
            message = f"the model in {base} is not the adapter's base: its weights differ"
            raise AdapterError(message, where=place, hint=_OTHER_BASE)
    return all(adapter.info.base_sha256 is not None for adapter in adapters)


def _fault(one: PlainAdapter, other: PlainAdapter, *, by_name: bool) -> str | None:
    both = f"{one.source} and {other.source}"
    a, b = one.info, other.info
    if a.base_config_sha256 and b.base_config_sha256 and a.base_config_sha256 != b.base_config_sha256:
        return f"{both} have different base models: their configurations differ ({_name(one)} and {_name(other)})"
    if a.base_sha256 and b.base_sha256:
        if set(a.base_sha256.values()) != set(b.base_sha256.values()):
            return f"{both} have different base models: the weights differ ({_name(one)} and {_name(other)})"
        return None
    if not by_name:
        return None
    silent = next((adapter for adapter in (one, other) if not adapter.info.base_model), None)
    if silent is not None:
        return f"{silent.source} does not say what its base model is"
    if a.base_model.rstrip("/") != b.base_model.rstrip("/"):
        return f"{both} name different base models: {_name(one)} and {_name(other)}"
    if a.base_revision and b.base_revision and a.base_revision != b.base_revision:
        return f"{both} name different revisions of their base model: {_name(one)} and {_name(other)}"
    return None


def _name(adapter: PlainAdapter) -> str:
    info = adapter.info
    return f"{info.base_model}@{info.base_revision}" if info.base_revision else info.base_model or "not named"
