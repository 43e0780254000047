"""Loads the frozen base model, one tensor at a time: never a 16-bit copy of a model that is stored in NF4.

The module tree, the configuration and the values are those that transformers' own `from_pretrained` gives,
bit for bit; only the way there differs. tests/integration/test_base_load.py holds that for every family.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.monkey_patching import patch_output_recorders
from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.utils.loading_report import LoadStateDictInfo

from qhybrid.architecture.spec import SUPPORTED_MODEL_TYPES
from qhybrid.base.locate import model_folder, weight_files
from qhybrid.base.nf4 import fill_linear4bit
from qhybrid.base.principal import Parts, mark_without, require_weights_of, stored_quantized
from qhybrid.base.safetensors_reader import SafetensorsReader
from qhybrid.errors import ModelError
from qhybrid.recipe.schema import ModelSection, QuantizationSection
from qhybrid.redaction import redacted

_NAMES_SHOWN = 4  # tensors listed per fault


def load_base(
    model: ModelSection,
    quantization: QuantizationSection,
    *,
    device: torch.device | str | None = None,
    without: Parts | None = None,
) -> PreTrainedModel:
    """Load the base model of a recipe: in eval mode, frozen, on one device.

    Quantised or not, the result is an ordinary transformers model (`hf_quantizer`, `is_loaded_in_4bit` and
    the rest included), so peft and the Trainers treat it as one that `from_pretrained` made. Peak memory is
    the finished model and the largest single tensor. A checkpoint that is already stored in bitsandbytes NF4
    is handed to `from_pretrained`.

    Args:
        model: where the model is, and the dtype of the weights that are not quantised.
        quantization: "nf4", or "none" for weights in `model.dtype`.
        device: where to put it; the current CUDA device when there is one, else the CPU.
        without: PiSSA's principal parts, by the names of their modules. Each is taken out of its weight after the
            cast and before the quantisation, and noted on the layer (`base.principal.part_missing_in`).

    Raises:
        ModelError: the model cannot be found, is of a family that is not supported, needs code of its own,
            is stored in another quantised form, or its tensors are not exactly those that its configuration
            asks for; or the parts to take out are of other weights than it has. Nothing is ever initialised in the
            place of a missing tensor.
    """
    device = resolve_device(device)
    folder = model_folder(model)
    config = read_model_config(folder, model)
    without = without or {}
    if getattr(config, "quantization_config", None) is not None:
        if without:
            raise stored_quantized(model.path)
        return _load_stored_nf4(folder, config, model, quantization, device)

    shell, quantizer = build_shell(config, model, quantization, device)
    require_weights_of(shell, without)
    with ExitStack() as stack:
        readers = [stack.enter_context(SafetensorsReader(path)) for path in weight_files(folder)]
        targets, missing = match_tensors(shell, readers, folder)
        _stream(shell, readers, targets, device, without)
    _finish(shell, quantizer, missing, folder, device)
    return shell


def keep_exact_on_cpu(model: torch.nn.Module) -> None:
    """Keep the 4-bit layers of `model` exact and trainable on CPUs with AVX512-BF16.

    On such a CPU the first forward in eval mode makes bitsandbytes' Linear4bit re-pack its weight in place
    for a fast kernel. That rounds the block scales to bfloat16, and the kernel has no backward, so a single
    evaluation changes the base model and silently cuts the gradients of all training that follows. Call this
    before the first forward. It has no effect on a GPU.

    Raises:
        ModelError: a layer was re-packed already, which cannot be undone exactly.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    for name, layer in layers:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ModelError(
                f"the 4-bit weight of {name} was already re-packed for inference on this CPU; load it again",
                hint="call keep_exact_on_cpu right after load_base, before any forward in eval mode",
            )
    for _, layer in layers:
        layer.support_avx512bf16_for_cpu = False


def resolve_device(device: torch.device | str | None) -> torch.device:
    """`device`; or, when it is None, the current CUDA device if there is one, else the CPU."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def read_model_config(folder: Path, model: ModelSection) -> PreTrainedConfig:
    """The configuration of a supported family, with the recipe's dtype and attention.

    Raises:
        ModelError: config.json cannot be read, or is of a family that is not supported.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model_type = raw.get("model_type")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read as a model's configuration: {error}") from error
    _check_family(model_type, path, has_own_code=bool(raw.get("auto_map")))
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each configuration class checks its own values, and raises what it likes
        raise ModelError(f"{path} is not a valid {model_type} configuration: {_first_sentence(error)}") from error
    _check_family(config.model_type, path)  # transformers may choose a relative of what the file says
    config.dtype = getattr(torch, model.dtype)
    config.name_or_path = redacted(model.path)  # trackers and save_pretrained write it
    config._attn_implementation = model.attn_implementation
    return config


def _check_family(model_type: Any, path: Path, *, has_own_code: bool = False) -> None:
    if model_type in SUPPORTED_MODEL_TYPES:
        return
    if has_own_code:
        raise ModelError(
            f"{path} asks for Python code that comes with the model (auto_map)",
            hint="code from a model folder is never run; use a model of a family that transformers knows",
        )
    raise ModelError(
        f"{path} is of the type {model_type!r}, which is not supported",
        hint=f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}",
    )


def _nf4_config(model: ModelSection, quantization: QuantizationSection) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
    )


def build_shell(
    config: PreTrainedConfig, model: ModelSection, quantization: QuantizationSection, device: torch.device
) -> tuple[PreTrainedModel, HfQuantizer | None]:
    """The model on the meta device, its linear layers replaced by Linear4bit where they will be quantised."""
    quantizer = None
    if quantization.method == "nf4":
        config.quantization_config = _nf4_config(model, quantization)
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=False)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with ExitStack() as stack:
            for context in model_class.get_init_context(config.dtype, quantizer is not None, False, None):
                stack.enter_context(context)
            shell = model_class(config)
            patch_output_recorders(shell)
            if quantizer is not None:
                quantizer.validate_environment(device_map={"": device})
                quantizer.preprocess_model(model=shell, dtype=config.dtype, device_map={"": device})
    except (ImportError, ValueError) as error:  # an attention that is not installed, or not for this family
        raise ModelError(
            f"transformers cannot build the model of {model.path}: {_first_sentence(error)}",
            hint="with model.attn_implementation: eager every family works, and no other package is needed",
        ) from error
    except Exception as error:
        raise ModelError(
            f"transformers cannot build the model of {model.path}: {_first_sentence(error)}"
        ) from error
    return shell, quantizer


def match_tensors(
    shell: PreTrainedModel, readers: list[SafetensorsReader], folder: Path
) -> tuple[dict[str, str], set[str]]:
    """Pair every tensor of the files with its place in the model, before any of them is read.

    Returns:
        Name in the files to name in the model; and the model's names that no file has, all of which are tied
        to one that a file has. Tensors that the model class ignores are in neither.

    Raises:
        ModelError: a tensor is missing, unknown, given twice, or of another shape or kind.
    """
    expected = shell.state_dict()
    targets: dict[str, str] = {}
    unexpected: dict[str, Path] = {}
    faults: list[str] = []
    for reader in readers:
        for entry in reader:
            # Checkpoints of the bare decoder leave the prefix out.
            prefixed = f"{shell.base_model_prefix}.{entry.name}"
            target = entry.name if entry.name in expected else prefixed
            if target not in expected:
                unexpected[entry.name] = reader.path
                continue
            if target in targets.values():
                faults.append(f"{reader.path} has {entry.name}, which was already given")
            if entry.shape != tuple(expected[target].shape):
                faults.append(
                    f"{reader.path} has {entry.name} with the shape {list(entry.shape)} "
                    f"instead of {list(expected[target].shape)}"
                )
            if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
                faults.append(f"{reader.path} has {entry.name} as {entry.dtype}")
            targets[entry.name] = target

    missing = expected.keys() - set(targets.values())
    given = expected.keys() - missing
    ties = shell.all_tied_weights_keys.items()
    tied = {name for name, source in ties if source in given} | {source for name, source in ties if name in given}
    lacking = sorted(missing - tied)
    if lacking:
        faults.append(f"{folder} lacks {_some(lacking)}")
    ignored = LoadStateDictInfo(set(), set(unexpected), set(), [], {}, set())
    shell._adjust_missing_and_unexpected_keys(ignored)  # leaves out, say, the inv_freq of old checkpoints
    unknown = sorted(ignored.unexpected_keys)
    if unknown:
        faults.append(f"{unexpected[unknown[0]]} has {_some(unknown)}, which the model does not have")
    if faults:
        shown = "; ".join(faults[:_NAMES_SHOWN])
        raise ModelError(
            f"the weights do not fit {type(shell).__name__} with this config.json: {shown}",
            hint="download or copy the model again, and check that all its files belong together",
        )
    return targets, missing


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown


def _first_sentence(error: Exception) -> str:
    """What a library says happened, without the advice that it gives to its own callers."""
    return str(error).partition("\n")[0].partition(". ")[0]


def _stream(
    shell: PreTrainedModel,
    readers: list[SafetensorsReader],
    targets: dict[str, str],
    device: torch.device,
    without: Parts,
) -> None:
    """Read, cast, quantise and place one tensor after the other, in the order of the files."""
    places = {}
    for name, target in targets.items():
        module_name, _, parameter_name = target.rpartition(".")
        places[name] = (shell.get_submodule(module_name), parameter_name)
    quantized = {
        name for name, (module, leaf) in places.items() if isinstance(module, Linear4bit) and leaf == "weight"
    }
    # 16-bit weights pass through one piece of memory: fresh memory for each costs as much as reading it.
    sizes = [entry.end - entry.begin for reader in readers for entry in reader if entry.name in quantized]
    buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8)

    for reader in readers:
        for entry in reader:
            if entry.name not in places:
                continue
            module, leaf = places[entry.name]
            value = reader.read(entry.name, buffer=buffer if entry.name in quantized else None)
            # Cast first, quantise second: the order in transformers, and NF4 of the cast weight differs.
            value = value.to(device=device, dtype=shell.config.dtype)
            part = without.get(targets[entry.name].removesuffix(".weight"))
            if part is not None:
                part.take_out_of(value)
                mark_without(module, part)
            if entry.name in quantized:
                fill_linear4bit(module, value)
            else:
                _place(module, leaf, value)
            getattr(module, leaf)._is_hf_initialized = True  # else transformers would initialise it anew


def _place(module: torch.nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)


def _finish(
    shell: PreTrainedModel,
    quantizer: HfQuantizer | None,
    missing: set[str],
    folder: Path,
    device: torch.device,
) -> None:
    """What transformers does once the weights are in: rotary buffers, tied weights, generation settings."""
    device_map = {"": device}
    shell._finalize_model_loading(
        shell,
        LoadStateDictConfig(device_map=device_map, dtype=shell.config.dtype, hf_quantizer=quantizer),
        LoadStateDictInfo(missing, set(), set(), [], {}, set()),
    )
    left = [name for name, tensor in (*shell.named_parameters(), *shell.named_buffers()) if tensor.is_meta]
    assert not left, f"still without values: {left}"
    shell.eval()
    shell.requires_grad_(False)
    try:
        shell.adjust_generation_fn(
            None,
            True,
            None,
            str(folder),
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision=None,
            subfolder="",
            trust_remote_code=False,
        )
    except Exception as error:
        raise ModelError(f"{folder / 'generation_config.json'} cannot be used: {error}") from error
    if quantizer is not None:
        shell.hf_quantizer = quantizer
        quantizer.postprocess_model(shell)


def _load_stored_nf4(
    folder: Path,
    config: PreTrainedConfig,
    model: ModelSection,
    quantization: QuantizationSection,
    device: torch.device,
) -> PreTrainedModel:
    """Load a checkpoint that holds NF4 weights, through transformers, with the same checks on its tensors."""
    stored = config.quantization_config
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if not stored.get("load_in_4bit"):
        raise ModelError(
            f"{model.path} is stored quantised as {stored.get('quant_method')!r}",
            hint="use the original 16-bit model; quantization.method nf4 quantises it while loading",
        )
    form = (stored.get("bnb_4bit_quant_type"), bool(stored.get("bnb_4bit_use_double_quant")))
    wanted = (quantization.method, quantization.double_quant)
    if form != wanted:
        raise ModelError(
            f"{model.path} is stored as 4-bit {form[0]} with double_quant {form[1]}, "
            f"but the recipe asks for {wanted[0]} with double_quant {wanted[1]}",
            hint="set quantization to what the model is stored in, or use the original 16-bit model",
        )
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{model.path} holds an adapter beside the model", hint="move the adapter elsewhere")
    if getattr(config, "transformers_weights", None) is not None:
        raise ModelError(
            f"{folder / 'config.json'} names its weights itself, as {config.transformers_weights!r}",
            hint="remove transformers_weights from it: the files are found by their own names",
        )
    for path in weight_files(folder):
        SafetensorsReader(path).close()  # finds a truncated or malformed file, and names it
    config.quantization_config = {**stored, "bnb_4bit_compute_dtype": model.dtype}
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=config.dtype,
            device_map={"": device},
            attn_implementation=model.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"transformers cannot load {model.path}: {_first_sentence(error)}") from error
    faults = [f"{kind.replace('_', ' ')}: {_some(sorted(map(str, keys)))}" for kind, keys in info.items() if keys]
    if faults:
        raise ModelError(f"the weights in {folder} do not fit its config.json: {'; '.join(faults)}")
    loaded.config.name_or_path = redacted(model.path)
    return loaded.requires_grad_(False)
