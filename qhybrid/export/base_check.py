"""Whether the base model at hand is the one that an adapter was trained on."""

from __future__ import annotations

from pathlib import Path

from qhybrid.adapters.info import AdapterInfo
from qhybrid.base.fingerprint import config_hash, fingerprint
from qhybrid.base.locate import weight_files
from qhybrid.errors import AdapterError


def require_own_base(info: AdapterInfo, base: Path) -> bool:
    """Refuse another base model than the adapter's, by its config.json and the hashes of its weight files.

    Args:
        base: the model's folder.

    Returns:
        Whether the adapter knows these hashes. Adapters of other tools do not.

    Raises:
        AdapterError: it is another model, or the same one in other files.
        ModelError: a file cannot be read, or is not what the hub said it was.
    """
    if info.base_config_sha256 is None or info.base_sha256 is None:
        return False
    hint = "--base names the right one; if you know that it is the same model, --other-base takes it as it is"
    if config_hash(base) != info.base_config_sha256:
        raise AdapterError(
            f"the model in {base} is not the adapter's base: its config.json says something else", hint=hint
        )
    now = {facts["sha256"] for facts in fingerprint(weight_files(base)).values()}
    if now != set(info.base_sha256.values()):
        raise AdapterError(f"the model in {base} is not the adapter's base: its weights differ", hint=hint)
    return True
