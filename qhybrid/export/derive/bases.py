"""Whether several adapters belong to one base model, as far as they tell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from qhybrid.adapters.plain import PlainAdapter
from qhybrid.errors import AdapterError

_HINT = "if you know that they are of one base model, --same-base takes them"


def require_one_base(adapters: Sequence[PlainAdapter], *, same_base: bool = False) -> list[str]:
    """Refuse adapters of different base models.

    Two adapters are compared by the hashes of the base's configuration and of its weight files where both know
    them, and else by its name and revision. Shapes are compared where modules are put together.

    Args:
        same_base: the user knows that they are of one base; what speaks against it is returned.

    Returns:
        What was not as it should be, one line each; only with `same_base`.

    Raises:
        AdapterError: two that differ, or of which nothing can be compared.
    """
    faults = list(dict.fromkeys(fault for pair in combinations(adapters, 2) if (fault := _fault(*pair))))
    if faults and not same_base:
        raise AdapterError(faults[0], hint=_HINT)
    return faults


def _fault(one: PlainAdapter, other: PlainAdapter) -> str | None:
    both = f"{one.source} and {other.source}"
    a, b = one.info, other.info
    if a.base_config_sha256 and b.base_config_sha256 and a.base_config_sha256 != b.base_config_sha256:
        return f"{both} have different base models: their configurations differ ({_name(one)} and {_name(other)})"
    if a.base_sha256 and b.base_sha256:
        if set(a.base_sha256.values()) != set(b.base_sha256.values()):
            return f"{both} have different base models: the weights differ ({_name(one)} and {_name(other)})"
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
