"""The code and commands with which others load a result, for its model card."""

from __future__ import annotations

from collections.abc import Sequence

from qhybrid.adapters.info import AdapterInfo
from qhybrid.export.names import is_hub_id, public_name


def peft_code(info: AdapterInfo, folders: Sequence[str]) -> str:
    """How peft loads `folders`, with the base as it was in training."""
    quantized = info.quantization == "nf4"
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer"
        + (", BitsAndBytesConfig" if quantized else ""),
        "",
    ]
    options = f'dtype="{info.dtype}"'
    if quantized:
        lines += [
            f'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f'bnb_4bit_use_double_quant={info.double_quant}, bnb_4bit_compute_dtype="{info.dtype}")',
        ]
        options += ", quantization_config=nf4"
    lines += [
        _base(info),
        f"model = AutoModelForCausalLM.from_pretrained(base, {options})",
        f'model = PeftModel.from_pretrained(model, "{folders[0]}", adapter_name="adapter0")',
    ]
    lines += [
        f'model.load_adapter("{folder}", adapter_name="adapter{number}")'
        for number, folder in enumerate(folders[1:], 1)
    ]
    if len(folders) > 1:
        lines.append(f"model.base_model.set_adapter({[f'adapter{number}' for number in range(len(folders))]})")
    lines += ["model.eval()", 'tokenizer = AutoTokenizer.from_pretrained(".")']
    return "\n".join(lines)


def model_code(dtype: str) -> str:
    """How transformers loads a whole model."""
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained(".", dtype="{dtype}")',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
        ]
    )


def _base(info: AdapterInfo) -> str:
    name = public_name(info.base_model)
    if is_hub_id(name):
        return f'base = "{name}"'
    converted = " (qhybrid keeps it converted in ~/.cache/qhybrid/gguf)" if name.endswith(".gguf") else ""
    return f'base = "BASE"  # the folder of {name}{converted}'


def vllm_command(info: AdapterInfo, script: str) -> str:
    """How the script that serves a vLLM folder is called."""
    if is_hub_id(public_name(info.base_model)):
        return f"./{script}    # or ./{script} BASE, for another place of the base model"
    return f"./{script} BASE    # BASE is the folder or the hub id of the base model"
