"""Tokenising: a normal row becomes input_ids and labels, with -100 on every token that is not trained."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from qhybrid.data.rows import NO_TRAINED_TOKEN, ConversationRow, PromptCompletionRow, Row, RowFault, TextRow
from qhybrid.data.templates import BUILT_IN
from qhybrid.data.turns import ChatRenderer, RenderedConversation, common_prefix_length
from qhybrid.errors import DataError
from qhybrid.recipe.training_fields import TrainingSection

IGNORED_LABEL = -100  # cross entropy's ignore_index, in torch and in trl


@dataclass(frozen=True)
class EncodedRow:
    """One row for the trainer: int32 [num_tokens] ids and labels, and how many tokens truncation cut."""

    input_ids: np.ndarray
    labels: np.ndarray
    num_cut_tokens: int = 0
    number: int = 0  # of the row in its file
    source: str = ""


def has_trained_token(labels: Sequence[int] | np.ndarray) -> bool:
    """Whether a sequence with these labels has a loss. The first label counts for nothing: nothing predicts it."""
    return bool(np.any(np.asarray(labels)[1:] != IGNORED_LABEL))


class RowEncoder:
    """Tokenises rows with one tokenizer, one chat template and the recipe's training settings.

    Text and prompt/completion rows get the tokenizer's own special tokens and an end token, as in trl 1.16
    (`SFTTrainer._prepare_dataset`). Conversations get what the chat template writes and nothing else.

    Attributes:
        warnings: what the user should know about the encoded rows.
        num_conversations: conversations seen.
        num_system_prompts: conversations that were given the recipe's system prompt.
        num_lost_thinking: conversations of which the chat template left out some thinking.

    Raises:
        DataError: `training.eos_token` is not in the vocabulary.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        training: TrainingSection,
        *,
        chat_template: str | None,
        system_prompt: str | None = None,
        date: str | None = None,
    ) -> None:
        if training.eos_token is not None and training.eos_token not in tokenizer.get_vocab():
            raise DataError(
                f"training.eos_token {training.eos_token!r} is not in the tokenizer's vocabulary",
                hint=f"the tokenizer's own is {tokenizer.eos_token!r}; leave the key out to use it",
            )
        self._tokenizer = tokenizer
        self._training = training
        self._eos_token = training.eos_token or tokenizer.eos_token
        self._system_prompt = system_prompt
        self._renderer = ChatRenderer(tokenizer, chat_template, self._eos_token, date) if chat_template else None
        self._packing_splits = training.packing and training.packing_strategy in ("bfd_split", "wrapped")
        self._turn_end_checked = False
        self.warnings: list[str] = []
        self.num_conversations = 0
        self.num_system_prompts = 0
        self.num_lost_thinking = 0

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow | RowFault]:
        """Each of `rows` encoded and truncated, or why it cannot be used, in their order.

        Raises:
            DataError: conversations without a chat template, other rows without an end token, or a tokenizer
                that cannot tell where in the text its tokens are.
        """
        results: list[EncodedRow | RowFault] = [RowFault(NO_TRAINED_TOKEN)] * len(rows)
        methods = {
            TextRow: self._encode_texts,
            PromptCompletionRow: self._encode_completions,
            ConversationRow: self._encode_conversations,
        }
        for kind, method in methods.items():
            places = [index for index, row in enumerate(rows) if isinstance(row, kind)]
            if places:
                for index, result in zip(places, method([rows[index] for index in places]), strict=True):
                    results[index] = result if isinstance(result, RowFault) else self._truncate(result)
        return results

    def _encode_texts(self, rows: Sequence[TextRow]) -> Iterable[EncodedRow]:
        for ids in self._ids(self._ended(row.text) for row in rows):
            yield _encoded(ids, [(0, len(ids))])

    def _encode_completions(self, rows: Sequence[PromptCompletionRow]) -> Iterable[EncodedRow]:
        prompts = self._ids(row.prompt for row in rows)
        wholes = self._ids(row.prompt + self._ended(row.completion) for row in rows)
        train_all = self._training.completion_only_loss is False
        for prompt, whole in zip(prompts, wholes, strict=True):
            # Tokens may merge across the boundary; training starts where the two sequences part, as in trl.
            start = 0 if train_all else common_prefix_length(prompt, whole)
            yield _encoded(whole, [(start, len(whole))])

    def _encode_conversations(self, rows: Sequence[ConversationRow]) -> Iterable[EncodedRow | RowFault]:
        rendered = [self._render(row) for row in rows]
        texts = [item.text for item in rendered if isinstance(item, RenderedConversation)]
        if not texts:
            return rendered
        # Special tokens are the template's business, so none are added.
        batch = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = iter(zip(batch["input_ids"], batch["offset_mapping"], strict=True))
        results: list[EncodedRow | RowFault] = []
        for item in rendered:
            if isinstance(item, RowFault):
                results.append(item)
                continue
            ids, offsets = next(tokens)
            # A token belongs to the span that it starts in; offsets rise, so two searches find a span's tokens.
            spans = [(bisect_left(offsets, (start,)), bisect_left(offsets, (end,))) for start, end in item.spans]
            results.append(_encoded(ids, spans))
            self.num_lost_thinking += item.lost_thinking
            self._check_turn_end(results[-1])
        return results

    def _render(self, row: ConversationRow) -> RenderedConversation | RowFault:
        if self._renderer is None:
            raise DataError(
                "the data holds conversations, and the tokenizer has no chat template",
                hint=f"set data.chat_template to {' or '.join(BUILT_IN)}, or to a .jinja file",
            )
        if not self._tokenizer.is_fast:
            raise DataError(
                f"{type(self._tokenizer).__name__} cannot tell where in a text its tokens are",
                hint="use a tokenizer with a tokenizer.json file (model.tokenizer), or prompt_completion rows",
            )
        self.num_conversations += 1
        if self._system_prompt is not None and row.messages[0][0] != "system":
            messages = (("system", self._system_prompt), *row.messages)
            self.num_system_prompts += 1
            row = replace(row, messages=messages, num_prompt_messages=row.num_prompt_messages + 1)
        train_all = self._training.completion_only_loss is False
        only_assistant = self._training.assistant_only_loss
        try:
            return self._renderer.render(
                row, whole=train_all and not only_assistant, prompt_turns=train_all and only_assistant
            )
        except RowFault as fault:
            return fault

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        return self._tokenizer(list(texts), verbose=False)["input_ids"]

    def _ended(self, text: str) -> str:
        if self._eos_token is None:
            raise DataError(
                "the tokenizer has no end token, so the model cannot learn to stop",
                hint="set training.eos_token to the token that ends a text",
            )
        return text if text.endswith(self._eos_token) else text + self._eos_token

    def _check_turn_end(self, row: EncodedRow) -> None:
        """Warn once where the template closes a turn with something that generation does not stop at."""
        if self._turn_end_checked or self._eos_token is None:
            return
        self._turn_end_checked = True
        trained = row.labels[row.labels != IGNORED_LABEL]
        if self._tokenizer.convert_tokens_to_ids(self._eos_token) not in trained[-4:]:
            closing = self._tokenizer.decode(trained[-4:].tolist())
            self.warnings.append(
                f"the chat template ends a turn with {closing!r}, which does not have the end token "
                f"{self._eos_token!r}: the model may not learn to stop. Set training.eos_token to the "
                "template's end-of-turn token, or use a template that writes the end token"
            )

    def _truncate(self, row: EncodedRow) -> EncodedRow | RowFault:
        limit = self._training.max_length
        if self._packing_splits and IGNORED_LABEL not in row.labels:
            limit = None  # trl splits it between packs; a row with a prompt could leave one without labels
        num_cut = 0 if limit is None else max(0, len(row.input_ids) - limit)
        if num_cut:
            kept = slice(None, limit) if self._training.truncation_mode == "keep_start" else slice(num_cut, None)
            row = EncodedRow(row.input_ids[kept].copy(), row.labels[kept].copy(), num_cut)
        if has_trained_token(row.labels):
            return row
        return RowFault(
            f"{NO_TRAINED_TOKEN} left after truncation to {limit} tokens" if num_cut else NO_TRAINED_TOKEN
        )


def _encoded(ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> EncodedRow:
    input_ids = np.asarray(ids, dtype=np.int32)
    labels = np.full_like(input_ids, IGNORED_LABEL)
    for start, end in spans:
        labels[start:end] = input_ids[start:end]
    return EncodedRow(input_ids, labels)
