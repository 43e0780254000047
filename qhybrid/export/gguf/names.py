"""What llama.cpp calls a model's tensors, and how it orders their rows, by family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gguf
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from qhybrid.errors import ExportError, ModelError

CONVERTER = "llama.cpp's convert_hf_to_gguf.py converts the folder that --to merged writes"
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class GgufFamily:
    """A family as llama.cpp knows it.

    Attributes:
        architecture: its name there; LLaMA's serves several families.
        interleaves: rotary embedding turns rows 2i and 2i+1 of a head together, where transformers turns i and
            i + d/2, so the rows of queries and keys are laid otherwise.
        norm_offset: what is added to the weights of norms: Gemma's are stored less one in transformers.
        activation: of the MLP; llama.cpp has it fixed.
    """

    architecture: gguf.MODEL_ARCH
    interleaves: bool = False
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"

    @property
    def name(self) -> str:
        """As `general.architecture` has it."""
        return gguf.MODEL_ARCH_NAMES[self.architecture]


# Every one of them is held against transformers in tests/integration/test_gguf_export.py. phi3 is not among them:
# its windows and its long rotary factors are computed otherwise in llama.cpp.
FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(gguf.MODEL_ARCH.LLAMA, interleaves=True),
    "mistral": GgufFamily(gguf.MODEL_ARCH.LLAMA, interleaves=True),
    "smollm3": GgufFamily(gguf.MODEL_ARCH.SMOLLM3, interleaves=True),
    "granite": GgufFamily(gguf.MODEL_ARCH.GRANITE, interleaves=True),
    "qwen2": GgufFamily(gguf.MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(gguf.MODEL_ARCH.QWEN3),
    "olmo2": GgufFamily(gguf.MODEL_ARCH.OLMO2),
    "gemma": GgufFamily(gguf.MODEL_ARCH.GEMMA, norm_offset=1.0, activation="gelu_pytorch_tanh"),
    "gemma2": GgufFamily(gguf.MODEL_ARCH.GEMMA2, norm_offset=1.0, activation="gelu_pytorch_tanh"),
}


class GgufNames:
    """The names and the row order of one model.

    Attributes:
        config: of the model, with transformers' defaults filled in.
        family: as llama.cpp knows it.

    Raises:
        ExportError: a family that is not proven to compute the same in llama.cpp.
        ModelError: not a valid config.json.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise ExportError(
                f"{model_type!r} models are not proven to compute the same in llama.cpp",
                hint=f"proven are {', '.join(sorted(FAMILIES))}; {CONVERTER}",
            )
        try:
            self.config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(dict(config))
            self._map = gguf.get_tensor_name_map(FAMILIES[model_type].architecture, self.config.num_hidden_layers)
        except Exception as error:  # each configuration class checks its own values, and raises what it likes
            reason = str(error).partition("\n")[0]
            raise ModelError(f"config.json is not a valid {model_type} configuration: {reason}") from None
        self.family = FAMILIES[model_type]

    @property
    def head_dim(self) -> int:
        """Of queries and keys."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def of(self, name: str) -> str | None:
        """llama.cpp's name of the tensor `name`: "blk.3.attn_q.weight"; None where it has none."""
        return self._map.get_name(name, try_suffixes=_SUFFIXES)

    def reordered(self, name: str, value: Tensor) -> Tensor:
        """`value`, whose first dimension is the outputs of the tensor `name`, with its rows as llama.cpp has them.

        Args:
            value: (out, ...): a weight, a bias or an adapter's B.
        """
        module = name.removesuffix(".weight").removesuffix(".bias")
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(module.rpartition(".")[2])
        if count is None or not self.family.interleaves:
            return value
        halves = value.reshape(count, 2, value.shape[0] // count // 2, *value.shape[1:])
        return halves.transpose(1, 2).reshape(value.shape)
