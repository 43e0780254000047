"""ModelSpec: what a model is, without its weights, read from its config.json."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qhybrid.errors import ModelError


@dataclass(frozen=True)
class Linear:
    """A linear module of a decoder layer: its place below the layer and its shape."""

    name: str  # below the layer: "self_attn.q_proj"
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def target(self) -> str:
        """The last part of the name, by which recipes address it: "q_proj"."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Family:
    """How a family's decoder layer differs from LLaMA's, as far as memory is concerned."""

    norm: Literal["llama", "wide"] = "llama"  # "wide": the norm's weight is applied in fp32, before the cast
    pre_norm: bool = True  # a norm before attention and before the MLP
    post_norm: bool = False  # a norm after attention and after the MLP
    qk_norm: Literal["none", "head", "full"] = "none"  # norms of queries and keys: by head, or over all heads
    residual_scale: bool = False  # what joins the residual stream is multiplied by a number first
    embedding_scale: bool = False  # the embeddings are multiplied by a number outside of their module
    rotates_by_parts: bool = False  # rotated and unrotated parts of a head are concatenated
    softcaps_attention: bool = False  # attention scores go through tanh
    alternates_windows: bool = False  # layers with and without a sliding window, and a mask for either


_LLAMA = Family()
_FAMILIES: dict[str, Family] = {
    "qwen3": Family(qk_norm="head"),
    "phi3": Family(rotates_by_parts=True),
    "gemma": Family(norm="wide"),
    "gemma2": Family(norm="wide", post_norm=True, softcaps_attention=True, alternates_windows=True),
    "granite": Family(residual_scale=True, embedding_scale=True),
    "olmo2": Family(norm="wide", pre_norm=False, post_norm=True, qk_norm="full"),
}


@dataclass(frozen=True)
class ModelSpec:
    """The facts about a decoder-only model that bands, plans and exports need. All sizes are counts."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    linears: tuple[Linear, ...]  # of one layer; every layer has the same
    max_position_embeddings: int | None = None
    sliding_window: int | None = None  # tokens that attention looks back, where it is limited

    @property
    def family(self) -> Family:
        """How the decoder layer differs from LLaMA's."""
        return _FAMILIES.get(self.model_type, _LLAMA)

    @property
    def num_norm_parameters(self) -> int:
        """Weights of all RMSNorms: of the layers, and the last one."""
        family, h = self.family, self.hidden_size
        layer = 2 * h * (family.pre_norm + family.post_norm)
        if family.qk_norm == "head":
            layer += 2 * self.head_dim
        elif family.qk_norm == "full":
            layer += (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        return self.num_layers * layer + h

    @property
    def num_bias_parameters(self) -> int:
        """Biases of all decoder linears."""
        return self.num_layers * sum(linear.out_features for linear in self.linears if linear.bias)

    @property
    def num_embedding_parameters(self) -> int:
        """The embedding, and lm_head where it is not the same."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        small = self.num_norm_parameters + self.num_bias_parameters
        return self.num_linear_parameters + self.num_embedding_parameters + small

    def module_name(self, layer: int, linear: Linear) -> str:
        """The full module name in the Hugging Face model: "model.layers.3.self_attn.q_proj"."""
        return f"model.layers.{layer}.{linear.name}"

    @property
    def num_linear_parameters(self) -> int:
        """Parameters of all decoder linears: what NF4 quantises."""
        return self.num_layers * sum(lin.in_features * lin.out_features for lin in self.linears)


# Families with separate q, k, v, gate and up projections, and whether attention and MLP carry biases.
# "config" means that the config says it; True and False are fixed in the family's code.
_SEPARATE: dict[str, tuple[tuple[str | bool, str | bool], str | bool]] = {
    # model_type: ((bias of q k v, bias of o), bias of the MLP)
    "llama": (("attention_bias", "attention_bias"), "mlp_bias"),
    "mistral": ((False, False), False),
    "qwen2": ((True, False), False),
    "qwen3": (("attention_bias", "attention_bias"), False),
    "gemma": (("attention_bias", "attention_bias"), False),
    "gemma2": (("attention_bias", "attention_bias"), False),
    "granite": (("attention_bias", "attention_bias"), "mlp_bias"),
    "olmo2": (("attention_bias", "attention_bias"), False),
    "smollm3": (("attention_bias", "attention_bias"), "mlp_bias"),
}
_FUSED = ("phi3",)
# What all of them share: plain linear layers, nothing kept in fp32, and checkpoints with the model's own tensor
# names. tests/integration/test_base_load.py holds each one's NF4 load bit-equal to transformers'.
SUPPORTED_MODEL_TYPES = tuple(sorted([*_SEPARATE, *_FUSED]))
_TIED_BY_DEFAULT = ("gemma", "gemma2", "smollm3")
_DEFAULT_HEAD_DIM = {"gemma": 256, "gemma2": 256, "qwen3": 128}


def read_spec(path: str | Path) -> ModelSpec:
    """Read a config.json, or the one in a folder.

    Raises:
        ModelError: no such file, not JSON, or not a config of a supported family.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    return spec_from_config(read_config(file), str(file))


def read_config(file: Path) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        ModelError: no such file, or not a JSON object.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"there is no {file}", hint="name a config.json or a model folder") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"cannot be read as JSON: {error}", where=str(file)) from None
    if not isinstance(config, dict):
        raise ModelError("a config is a JSON object", where=str(file))
    return config


def spec_from_config(config: dict[str, Any], where: str = "config.json") -> ModelSpec:
    """Build the ModelSpec of a Hugging Face config.

    Raises:
        ModelError: a family that is not supported, or a field that is missing or absurd.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        nearest = difflib.get_close_matches(str(model_type), SUPPORTED_MODEL_TYPES, n=1)
        raise ModelError(
            f"model_type {model_type!r} is not a supported architecture",
            where=where,
            hint=(f"did you mean {nearest[0]!r}? " if nearest else "")
            + f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}",
        )

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{key} is missing", where=where)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 10**8:
            raise ModelError(f"{key} is {value!r}, not a usable size", where=where)
        return value

    def optional(key: str) -> int | None:
        return None if config.get(key) is None else size(key)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"{heads} attention heads cannot share {kv_heads} key/value heads", where=where)
    head_dim = size("head_dim", _DEFAULT_HEAD_DIM.get(model_type, hidden // heads))
    ffn = size("intermediate_size")
    q, kv = heads * head_dim, kv_heads * head_dim
    if model_type in _FUSED:
        linears = (
            Linear("self_attn.qkv_proj", hidden, q + 2 * kv),
            Linear("self_attn.o_proj", q, hidden),
            Linear("mlp.gate_up_proj", hidden, 2 * ffn),
            Linear("mlp.down_proj", ffn, hidden),
        )
    else:
        (qkv_rule, o_rule), mlp_rule = _SEPARATE[model_type]
        qkv_bias, o_bias, mlp_bias = (
            bool(config.get(rule, False)) if isinstance(rule, str) else rule
            for rule in (qkv_rule, o_rule, mlp_rule)
        )
        linears = (
            Linear("self_attn.q_proj", hidden, q, qkv_bias),
            Linear("self_attn.k_proj", hidden, kv, qkv_bias),
            Linear("self_attn.v_proj", hidden, kv, qkv_bias),
            Linear("self_attn.o_proj", q, hidden, o_bias),
            Linear("mlp.gate_proj", hidden, ffn, mlp_bias),
            Linear("mlp.up_proj", hidden, ffn, mlp_bias),
            Linear("mlp.down_proj", ffn, hidden, mlp_bias),
        )
    return ModelSpec(
        model_type=model_type,
        num_layers=size("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=size("vocab_size"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
        linears=linears,
        max_position_embeddings=optional("max_position_embeddings"),
        sliding_window=optional("sliding_window") if _uses_window(config) else None,
    )


def _uses_window(config: dict[str, Any]) -> bool:
    """Whether the family or the config puts a sliding window to use."""
    if config["model_type"] in ("qwen2", "qwen3", "smollm3"):
        return bool(config.get("use_sliding_window"))
    return True
