"""One base model in memory, and any number of adapters on it by name; one batch may mix them all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qhybrid.adapters.dora import hold_norms
from qhybrid.errors import DataError
from qhybrid.serving.decode import Batch, Completion
from qhybrid.serving.prompts import Prompter
from qhybrid.serving.sampling import Sampler, Sampling
from qhybrid.serving.text import TextStream

BASE = "__base__"  # peft's name, among `adapter_names`, of no adapter


class TooLongError(DataError):
    """A prompt and its answer have no room in the context."""


@dataclass(frozen=True)
class ServedModel:
    """An adapter on its base model, or the base model by itself, under the name that it is asked for by.

    Attributes:
        adapter: the engine's internal name.
        ends: tokens that end an answer.
    """

    name: str
    adapter: str
    prompter: Prompter
    ends: frozenset[int]
    max_context: int
    vocabulary: int
    device: torch.device

    def completion(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop: Sequence[str] = (),
    ) -> Completion:
        """An answer to a prompt, ready for a batch.

        Args:
            max_tokens: None for as many as the context has room for.

        Raises:
            TooLongError: the prompt and the answer are longer than the context.
            DataError: there is no prompt, or a token is none of the model's.
        """
        room = self.max_context - len(ids)
        if room < max(1, max_tokens or 1):
            wanted = f" and an answer of {max_tokens}" if max_tokens else ""
            raise TooLongError(f"the prompt of {len(ids)} tokens{wanted} is longer than {self.max_context} tokens")
        if not ids or min(ids) < 0 or max(ids) >= self.vocabulary:
            raise DataError(f"the prompt's tokens are not all between 0 and {self.vocabulary - 1}")
        return Completion(
            self.adapter,
            list(ids),
            max_tokens or room,
            self.ends,
            TextStream(self.prompter.tokenizer, stop),
            Sampler(sampling, self.device) if not sampling.is_greedy else None,
        )


class Engine:
    """The model, and what it serves by name; the base model is the last of them.

    Attributes:
        models: by name.
        base: the base model's name.
        max_context: the most tokens of a prompt and its answer.
        notes: what the user should know about the adapters.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, models: Sequence[ServedModel], notes: Sequence[str] = ()
    ) -> None:
        self.models = {served.name: served for served in models}
        self.base = models[-1].name
        self.max_context = models[-1].max_context
        self.notes = tuple(notes)
        self._model = model.eval()
        self._pad = models[-1].prompter.tokenizer.pad_token_id
        self._active: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * width * self._model.dtype.itemsize

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Hold what does not change between forward passes. For the thread that decodes."""
        with torch.no_grad(), hold_norms(self._model):
            yield

    def new_batch(self) -> Batch:
        """An empty batch for rows of any of the models."""
        return Batch(self.forward, self._pad, self.device)

    def forward(self, adapters: Sequence[str], ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """The logits (rows, vocabulary) of the last column in fp32, each row by its own adapter.

        Args:
            adapters: internal names, one for each row.
            ids: (rows, new). mask: (rows, columns), the new columns included; 0 for padding.
            cache: of the columns before; the new ones are added.
        """
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        if isinstance(self._model, PeftModel) and not self._activate(adapters):
            inputs["adapter_names"] = list(adapters)
        return self._model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    def _activate(self, adapters: Sequence[str]) -> bool:
        """Whether one adapter answers all rows, which then is peft's active one: faster than mixing."""
        if len(set(adapters)) > 1 or adapters[0] == BASE:
            return False
        if adapters[0] != self._active:
            self._active = adapters[0]
            self._model.set_adapter(self._active, inference_mode=True)
        return True
