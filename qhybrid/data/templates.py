"""Chat templates: the built-in ones, and which one a run uses."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from qhybrid.data.readers import find_file, missing_file_error
from qhybrid.errors import DataError
from qhybrid.recipe.schema import Recipe

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The shape of Stanford Alpaca without its preamble: a preamble is what a system message is for.
ALPACA = """\
{%- for message in messages %}
    {%- if not loop.first %}
        {{- '\\n\\n' }}
    {%- endif %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] }}
    {%- elif message['role'] == 'user' %}
        {{- '### Instruction:\\n' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '### Response:\\n' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('the alpaca template has no turn for the role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\n### Response:\\n' }}
{%- endif %}
"""

BUILT_IN = {"chatml": CHATML, "alpaca": ALPACA}
_TEMPLATE_ENDINGS = (".jinja", ".j2")


def resolve_chat_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, base_folder: Path) -> str | None:
    """The jinja text of the run's chat template, or None where there is none.

    Raises:
        DataError: as `chat_template_text`.
    """
    return chat_template_text(
        recipe.data.chat_template, recipe.training.chat_template_path, tokenizer, base_folder
    )


def chat_template_text(
    name: str | None, path: str | None, tokenizer: PreTrainedTokenizerBase, base_folder: Path
) -> str | None:
    """The template that `name` (built in, or a .jinja file) says, else the one at `path`, else the tokenizer's.

    Raises:
        DataError: an unknown name, a missing file, a folder without a template, or a template that is not
            valid jinja.
    """
    if name is not None:
        named = name
        text = _by_name(named, tokenizer, base_folder)
    elif path is not None:
        named = path
        text = _by_path(named, base_folder)
    else:
        named = "the tokenizer"
        text = _own_template(tokenizer)
    if text is not None:
        _check_syntax(text, tokenizer, named)
    return text


def _by_name(name: str, tokenizer: PreTrainedTokenizerBase, base_folder: Path) -> str:
    if name in BUILT_IN:
        # Where the tokenizer opens a text with BOS, a rendered conversation must open with it too: it is
        # tokenised without special tokens.
        ids = tokenizer("a")["input_ids"]
        opens_with_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        return ("{{- bos_token }}\n" if opens_with_bos else "") + BUILT_IN[name]
    if name.endswith(_TEMPLATE_ENDINGS):
        return _by_path(name, base_folder)
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    raise DataError(
        f"data.chat_template: there is no built-in template {name!r}",
        hint=(f"did you mean {near[0]}? " if near else "")
        + f"built in are {' and '.join(BUILT_IN)}; for your own give a .jinja file",
    )


def _by_path(name: str, base_folder: Path) -> str:
    path = find_file(name, base_folder)
    if path is None:
        raise missing_file_error(name, base_folder, "this chat template")
    try:
        if path.is_file():
            if not name.endswith(_TEMPLATE_ENDINGS):
                raise DataError(
                    "this is neither a .jinja file nor a tokenizer folder",
                    where=name,
                    hint="give the folder that holds tokenizer_config.json, or a .jinja or .j2 file",
                )
            return path.read_text(encoding="utf-8")
        text = _from_tokenizer_folder(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the chat template cannot be read: {getattr(error, 'strerror', None) or error}",
            where=name,
            hint="it must be UTF-8 text; tokenizer_config.json must be valid JSON",
        ) from None
    if text is None:
        raise DataError(
            "this folder has no chat template",
            where=name,
            hint="it must hold chat_template.jinja, or tokenizer_config.json with a chat_template",
        )
    return text


def _from_tokenizer_folder(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    if isinstance(template, list):  # several templates by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # none, or several without a default
        return None


def _check_syntax(text: str, tokenizer: PreTrainedTokenizerBase, named: str) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=text, tokenize=False)
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid jinja: {error.message}",
            where=f"{named}:{error.lineno}",
            hint=f"mend it, or use a built-in one: {' or '.join(BUILT_IN)}",
        ) from None
    except Exception:
        pass  # it may refuse this one message and take the rows; each row is tried and reported
