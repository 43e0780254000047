"""Adapter folders for other programs: peft's, and vLLM's."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import torch
from torch import Tensor

from qhybrid.adapters.peft_folder import write_peft_folder
from qhybrid.adapters.plain import PlainAdapter, PlainModule, require_untouched_base
from qhybrid.disk import write_bytes
from qhybrid.errors import AdapterError
from qhybrid.export.names import is_hub_id, public_name

# What `vllm serve --max-lora-rank` takes (vllm/config/lora.py).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SERVE_SCRIPT = "serve.sh"


def write_peft(adapter: PlainAdapter, folder: Path) -> tuple[Path, ...]:
    """Write an ordinary peft folder; for an adapter with both LoRA and DoRA modules one folder of each below it.

    Returns:
        The folders; peft loads and activates all of them.

    Raises:
        AdapterError: as `require_untouched_base`.
    """
    require_untouched_base(adapter)
    parts = {"lora": adapter.lora, "dora": adapter.dora}
    given = {name: modules for name, modules in parts.items() if modules}
    folders = {name: folder if len(given) == 1 else folder / name for name in given}
    for name, modules in given.items():
        write_peft_folder(modules, public_name(adapter.info.base_model), folders[name])
    return tuple(folders.values())


def write_vllm(adapter: PlainAdapter, folder: Path, name: str, *, has_template: bool) -> int:
    """Write a LoRA folder that vLLM and peft read alike, and `serve.sh` with the command for it.

    vLLM takes one scaling for all modules, lora_alpha / r, and reads no rank_pattern and no alpha_pattern
    (vllm/lora/peft_helper.py). So s is folded into each B, and r and lora_alpha are the largest rank.

    Args:
        name: what requests call the model.
        has_template: whether chat_template.jinja comes to lie beside it, for vLLM to use.

    Returns:
        The `--max-lora-rank` that vLLM needs.

    Raises:
        AdapterError: DoRA modules, which vLLM refuses; a rank above all that it takes; or as
            `require_untouched_base`.
    """
    require_untouched_base(adapter)
    require_lora(adapter, "vLLM")
    modules = [fold_scaling(module) for module in adapter]
    rank = max(module.rank for module in modules)
    limit = next((limit for limit in _VLLM_RANKS if rank <= limit), None)
    if limit is None:
        raise AdapterError(
            f"the largest rank is {rank}, and vLLM takes at most {_VLLM_RANKS[-1]}",
            hint="qhybrid compress lowers it, or merge it into the model (--to merged)",
        )
    write_peft_folder(modules, public_name(adapter.info.base_model), folder)
    write_bytes(folder / SERVE_SCRIPT, _serve_script(adapter, name, limit, has_template).encode())
    (folder / SERVE_SCRIPT).chmod(0o755)
    return limit


def require_lora(adapter: PlainAdapter, reader: str) -> None:
    """Refuse DoRA modules for a program that knows LoRA alone.

    Raises:
        AdapterError: with the two ways out.
    """
    if adapter.dora:
        raise AdapterError(
            f"{reader} reads no DoRA, and {len(adapter.dora)} of {len(adapter.modules)} modules are "
            f"({adapter.dora[0].module}, for example)",
            hint="merge the adapter into the model (--to merged; for a GGUF file --to gguf --onto 16bit), or make "
            "LoRA of it with an error that is printed (--dora-to-lora RANK)",
        )


def fold_scaling(module: PlainModule) -> PlainModule:
    """The same LoRA module with scaling 1. B keeps its dtype where that loses nothing, else it becomes fp32."""
    scaled = module.b.float() * module.scaling
    return dataclasses.replace(module, b=_narrow(scaled, module.b.dtype), scaling=1.0)


def _narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = values.to(dtype)
    return narrow if torch.equal(narrow.float(), values) else values


def _serve_script(adapter: PlainAdapter, name: str, limit: int, has_template: bool) -> str:
    base = public_name(adapter.info.base_model)
    if is_hub_id(base):
        choose = f'base="${{1:-{base}}}"'
    else:
        choose = f"""\
if [ $# -eq 0 ]; then
  echo "usage: serve.sh BASE: the folder or hub id of the base model, which was {base}" >&2
  exit 2
fi
base="$1\""""
    trained = ""
    if adapter.info.quantization == "nf4":
        trained = "# Trained on the base in 4-bit NF4: adding --quantization bitsandbytes serves it on that.\n"
    template = '--chat-template "$here/chat_template.jinja" ' if has_template else ""
    modules = max(module.rank for module in adapter)
    return f"""\
#!/usr/bin/env bash
# Serves the base model and this adapter with vLLM. The largest rank is {modules}.
{trained}set -euo pipefail
{choose}
here="$(cd "$(dirname "$0")" && pwd)"
exec vllm serve "$base" --enable-lora --max-lora-rank {limit} {template}\\
  --lora-modules {shlex.quote(name)}="$here" "${{@:2}}"
"""
