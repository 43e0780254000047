"""llama.cpp as the tests ask it: a server in this process, on a port of this machine, in plain fp32."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """A model, and an adapter on it, in llama.cpp.

    Keys and values are kept in fp32 and attention is the plain one, so that what differs from transformers in fp32
    is the order of additions.
    """

    def __init__(self, model: Path, adapter: Path | None = None, *, num_ctx: int = 512) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        if adapter is not None:
            info = xllamacpp.CommonAdapterLoraInfo()
            info.path, info.scale = str(adapter), 1.0
            params.lora_adapters = [info]
        params.n_ctx = num_ctx
        # One thread: several would wait for each other in loops, on cores that other tests use.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.fit_params = params.warmup = False
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def _ask(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """The ids of `text`; special tokens in it count as such."""
        return self._ask("/tokenize", content=text, add_special=add_special, parse_special=True)["tokens"]

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt of a conversation, from the chat template in the file."""
        return self._ask("/apply-template", messages=list(messages))["prompt"]

    def greedy(self, prompt: Sequence[int] | str, num_tokens: int) -> list[int]:
        """The ids that follow `prompt`; the end token, where it comes, is the last."""
        reply = self._ask("/completion", prompt=prompt, n_predict=num_tokens, temperature=0, return_tokens=True)
        return reply["tokens"]

    def logprobs(self, prompt: Sequence[int], count: int, *, forced: int) -> dict[int, float]:
        """The natural logarithms of the `count` likeliest next tokens' probabilities.

        Args:
            forced: a token of plain letters, which is made to follow: for a part of a character or an end token
                the server tells no probabilities. Those that it tells are from before.
        """
        reply = self._ask(
            "/completion",
            prompt=list(prompt),
            n_predict=1,
            temperature=0,
            n_probs=count,
            logit_bias=[[forced, 1e6]],
        )
        return {item["id"]: item["logprob"] for item in reply["completion_probabilities"][0]["top_logprobs"]}
