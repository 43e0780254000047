"""Recipes and overrides made to hurt: each is one quick error that names its place, with exit code 2."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import GOOD_RECIPE as GOOD
from helpers import TINY, record_figure

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.spec import spec_from_config
from qhybrid.cli.main import main
from qhybrid.errors import LayoutError, QhybridError, RecipeError
from qhybrid.recipe.load import load_recipe, parse_recipe
from qhybrid.recipe.yaml_source import MAX_BYTES

MAX_SECONDS = 0.5
# Of a message: what a terminal shows at once. A value of the recipe's size must not fill it.
MAX_CHARACTERS = 4000

HEAD = "model: {path: x}\ndata: {sources: a}\noutput_dir: o\n"
BANDS = "adapters: [{}]\n"

_LEVELS = "abcdefgh"
BOMB = f"{_LEVELS[0]}: &{_LEVELS[0]} [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{outer}: &{outer} [{', '.join([f'*{inner}'] * 10)}]\n" for inner, outer in pairwise(_LEVELS)
)
MERGE_BOMB = (
    f"a: &a {{{', '.join(f'k{i}: 1' for i in range(300))}}}\n"
    + "".join(f"m{i}: {{<<: *a, own: 1}}\n" for i in range(60))
)  # fmt: skip
ALIAS_LADDER = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 130))
CANARY = "a: !!python/object/apply:os.system ['touch canary']\n"

# name: (text, line or None where the whole file is meant, words of the message)
HOSTILE: dict[str, tuple[str, int | None, str]] = {
    "alias bomb": (BOMB, 4, "aliases count"),
    "aliases that nest": (ALIAS_LADDER, 32, "nested deeper"),
    "merge bomb": (MERGE_BOMB, 17, "aliases count"),
    "merge of itself": ("a: &a\n  b: 1\n  <<: *a\n", 3, "no anchor before it"),
    "merge keys in a loop": ("a: &a {<<: *b}\nb: &b {<<: *a}\n", 1, "no anchor before it"),
    "merge of a list": ("a: &a {b: 1}\nc: {<<: [*a, *a]}\n", 2, "must name a mapping"),
    "merge given twice": ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n", 4, "given twice"),
    "an alias of what is open": ("a: &a [*a]\n", 1, "no anchor before it"),
    "lists 5,000 deep": ("a: " + "[" * 5000 + "]" * 5000, 1, "nested deeper"),
    "mappings 5,000 deep": ("a: " + "{a: " * 5000 + "}" * 5000, 1, "nested deeper"),
    "blocks 5,000 deep": ("a:\n" + "- " * 5000 + "x", 2, "nested deeper"),
    "keys 5,000 deep": ("? " * 5000 + "x", 1, "a key must be a word"),
    "80,000 empty lists": (HEAD + "adapters: [" + "[]," * 80_000 + "]", 4, "more than 10,000 values"),
    "80,000 empty bands": (HEAD + "adapters: [" + "{}," * 80_000 + "]", 4, "more than 10,000 values"),
    "3,000 bands of one name": (HEAD + "adapters: [" + "{rank: 1}," * 3000 + "]", 4, "two bands"),
    "4,000 unknown keys": (
        HEAD + BANDS + "training:\n" + "".join(f"  learnin_rate{i}: 1\n" for i in range(4000)),
        6,
        "and 3,980 more problems",
    ),
    "4,000 unknown sections": (
        HEAD + BANDS + "".join(f"trainin{i}: 1\n" for i in range(4000)),
        5,
        "and 3,980 more problems",
    ),
    "duplicate keys": (GOOD + "output_dir: elsewhere\n", 16, "'output_dir' is given twice"),
    "duplicate keys inside": (GOOD.replace("rank: 8", "rank: 8\n    rank: 9", 1), 7, "'rank' is given twice"),
    "one key as text and number": ("1: a\n'1': b\n", 2, "given twice"),
    "python tag": (CANARY, 1, "tags"),
    "python tag on a key": ("!!python/name:os.system x: 1\n", 1, "tags"),
    "tag by a directive": ("%TAG !p! tag:yaml.org,2002:python/\n---\na: !p!object:os.system 1\n", 3, "tags"),
    "tag of our own kind": ("a: 1\nb: !band 2\n", 2, "tags"),
    "rank .nan": (HEAD + "adapters:\n  - rank: .nan\n", 5, "rank: .nan is not a finite number"),
    "rank .inf": (HEAD + "adapters:\n  - rank: .inf\n", 5, "not a finite number"),
    "rank 1e999": (HEAD + "adapters:\n  - rank: 1e999\n", 5, "not a finite number"),
    "alpha -.inf": (HEAD + "adapters:\n  - alpha: -.inf\n", 5, "not a finite number"),
    "learning rate .NaN": (GOOD.replace("2e-4", ".NaN"), 14, "not a finite number"),
    "weight .inf": (GOOD.replace("rows.jsonl", "[{path: a, weight: .inf}]"), 12, "not a finite number"),
    ".nan where anything goes": (
        HEAD + BANDS + "training:\n  lr_scheduler_kwargs: {num_cycles: .nan}\n", 6, "not a finite number",
    ),
    "a number of 200,000 digits": (HEAD + "adapters:\n  - rank: " + "9" * 200_000, 5, "not a finite number"),
    "the same in quotes": (HEAD + f"adapters:\n  - rank: '{'9' * 200_000}'", 5, "valid integer"),
    "the same as memory": (HEAD + BANDS + f"memory: {{vram: '{'9' * 400}GiB'}}", 5, "not an amount of memory"),
    "negative rank": (HEAD + "adapters:\n  - layers: all\n    rank: -8\n", 6, "equal to 1, not -8"),
    "rank 0": (HEAD + "adapters: [{rank: 0}]\n", 4, "greater than or equal to 1"),
    "no bands": (HEAD + "adapters: []\n", 4, "at least 1 item"),
    "bands that are nothing": (HEAD + "adapters:\n", 4, "adapters: is missing"),
    "a band of no layers": (HEAD + "adapters:\n  - layers: ''\n", 5, "at least 1 character"),
    "a layer of 5,000 digits": (HEAD + f"adapters:\n  - layers: '{'9' * 5000}'", 5, "at most 1000 characters"),
    "a band of no modules": (HEAD + "adapters:\n  - target_modules: []\n", 5, "at least one module"),
    "bands that are numbers": (HEAD + "adapters: [1, 2]\n", 4, "must be a mapping of keys, not 1"),
    "a list where a word belongs": (GOOD.replace("rows.jsonl", "[{path: a, format: [x]}]"), 12, "is not one of"),
    "a mapping where a word belongs": (GOOD.replace("kind: lora+", "kind: {a: {b: {c: {d: e}}}}"), 5, "..."),
    "a quoted bracket as a number": (GOOD.replace("rank: 8", 'rank: "["', 1), 6, "valid integer, not '['"),
    "empty": ("", None, "mapping of sections"),
    "comments alone": ("# nothing\n# here\n", None, "mapping of sections"),
    "a list": ("- model\n- adapters\n", None, "mapping of sections"),
    "a word": ("recipe", None, "mapping of sections"),
    "two documents": ("a: 1\n---\nb: 2\n", 2, "second document"),
    "YAML of the future": ("%YAML 9.9\n---\na: 1\n", 1, "not valid YAML"),
    "NUL byte": (GOOD.replace("out", "o\0t"), 15, "'\\x00'"),
    "NUL as an escape": (GOOD.replace(" out", ' "o\\0t"'), 15, "NUL character"),
    "NUL in the model": (GOOD.replace("org/model", '"a\\0"'), 2, "NUL character"),
    "escape character": (GOOD + "\x1b[2J: 1\n", 16, "'\\x1b'"),
    "escape character as an escape": (GOOD + '"\\e[2J": 1\n', 16, "'\\x1b[2J': unknown key"),
    "surrogate as an escape": (GOOD + 'x: "\\ud800"\n', 16, "Unicode"),
    "a long key": (GOOD + "? " + "k" * 200_000 + "\n: 1\n", 16, "unknown key"),
    "a long key like ours": (GOOD + "? " + "learning_rate" * 15_000 + "\n: 1\n", 16, "unknown key"),
    "a long value": (GOOD.replace("lora+", "lora" * 50_000), 5, "is not one of"),
    "a long number": (GOOD.replace("rank: 8", "rank: " + "x" * 200_000, 1), 6, "valid integer"),
    "a long anchor": (f"a: *{'z' * 200_000}\n", 1, "no anchor before it"),
    "a long tag": (f"a: !{'z' * 200_000} 1\n", 1, "tags"),
    "200,000 quotes": ('"' * 200_000, 1, "not valid YAML"),
    "200,000 commas": ("[" + "," * 200_000, 1, "not valid YAML"),
    "a pattern that repeats too often": (
        HEAD + "adapters:\n  - target_modules: 're:a{99999999999}'", 5, "not a regular expression",
    ),
    "a pattern of open brackets": (
        HEAD + f"adapters:\n  - target_modules: 're:{'(' * 200}'", 5, "not a regular expression",
    ),
    "a pattern of 200,000 characters": (
        HEAD + f"adapters:\n  - target_modules: 're:{'(a|b)*' * 33_000}'", 5, "longer than 300",
    ),
    "larger than 256 KiB": ("# " + "x" * MAX_BYTES, None, "larger than 256 KiB"),
    # read up to a limit that may lie inside a character
    "5 MB of umlauts": ("a: 1 # x" + "ä" * 2_500_000, None, "larger than 256 KiB"),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def figures():
    """What all refusals of this file took, once all are through."""
    yield
    if _seconds:
        figure = f"{len(_seconds)} refused with their place, the slowest in {max(_seconds):.2f} s (0.5 s allowed)"
        record_figure(10, "hostile recipes and overrides", figure)


def seconds_of(call: Any) -> float:
    """The best of three, because other programs run too."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        with contextlib.suppress(QhybridError):
            call()
        best = min(best, time.perf_counter() - began)
        if best < MAX_SECONDS / 10:  # nothing to learn from two more
            break
    return best


_seconds: list[float] = []  # the seconds of each refusal


def refusal(name: str, overrides: Sequence[str] = ()) -> str:
    """The message with which loading `name` is refused, after a look at its time and its form."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    seconds = seconds_of(lambda: load_recipe(name, overrides))
    assert seconds < MAX_SECONDS
    _seconds.append(seconds)
    message = str(caught.value)
    assert len(message) < MAX_CHARACTERS
    assert message.replace("\n", "").isprintable(), "a message must not steer the terminal"
    return message


def exits_with_2(capsys: pytest.CaptureFixture[str], name: str, overrides: Sequence[str] = ()) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["recipes", "show", name, *overrides])
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.out == "" and shown.err.startswith("error: ")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_one_quick_error_that_names_its_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, line, words = HOSTILE[name]
    Path("bad.yaml").write_bytes(text.encode())
    message = refusal("bad.yaml")
    assert words in message
    assert message.startswith("bad.yaml: " if line is None else f"bad.yaml:{line}: "), message[:200]
    exits_with_2(capsys, "bad.yaml")
    assert os.listdir() == ["bad.yaml"], "no tag was obeyed"


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (bytes(range(256)) * 40, "bad.yaml:2: the file is not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "bad.yaml:1: the file is not UTF-8 text"),
        (b"a: 1\nb: \xff\xfe", "bad.yaml:2: the file is not UTF-8 text"),
        (GOOD.encode("utf-16"), "bad.yaml:1: the file is not UTF-8 text"),
        (GOOD.encode("utf-16-le"), "bad.yaml:1: not valid YAML: the character '\\x00'"),
        (bytes(5_000_000), "bad.yaml: larger than 256 KiB"),
        (b"\xff" * 5_000_000, "bad.yaml: larger than 256 KiB"),
    ],
    ids=["every byte", "an image", "latin-1", "UTF-16", "UTF-16 without a mark", "5 MB of NUL", "5 MB of 255"],
)
def test_a_file_that_is_no_text(content, start, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(content)
    assert refusal("bad.yaml").startswith(start)
    exits_with_2(capsys, "bad.yaml")


def test_what_is_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    os.mkfifo("pipe.yaml")  # which nobody writes to: reading it would wait for ever
    Path("loop.yaml").symlink_to("loop.yaml")
    for name, words in (
        ("folder.yaml", "is a folder"),
        ("pipe.yaml", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        ("loop.yaml", "there is no file"),
        ("", "there is no file"),
        ("a\0b.yaml", "there is no file"),
        ("x" * 5000 + ".yaml", "there is no file"),
        ("a/" * 5000 + ".yaml", "there is no file"),
    ):
        assert words in refusal(name)
        exits_with_2(capsys, name)


def test_a_file_that_may_not_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(GOOD)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # permissions do not stop an administrator, who may run the tests
    assert refusal("r.yaml") == "r.yaml: the file cannot be read: Permission denied"
    exits_with_2(capsys, "r.yaml")


OVERRIDES: dict[str, tuple[str, str]] = {
    "alias bomb": (
        "training=[&a [1,1,1,1,1,1,1,1,1,1], "
        + ", ".join(f"&{b} [{','.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True))
        + "]",
        "aliases count",
    ),
    "lists 5,000 deep": ("training.max_steps=" + "[" * 5000, "nested deeper"),
    "keys 5,000 deep": ("model.dtype" + ".a" * 5000 + "=1", "is not an override"),
    "keys 60,000 deep": ("training.lr_scheduler_kwargs" + ".a" * 60_000 + "=1", "is not an override"),
    "5 MB": ("output_dir=" + "x" * 5_000_000, "larger than 256 KiB"),
    "5 MB of key": ("x" * 5_000_000 + "=1", "larger than 256 KiB"),
    "5 MB without a value": ("x" * 5_000_000, "larger than 256 KiB"),
    "a long key": ("x" * 200_000 + "=1", "unknown key"),
    "duplicate keys": ("model={path: a, path: b}", "given twice"),
    "python tag": ("output_dir=!!python/object/apply:os.system ['touch canary']", "tags"),
    ".nan": ("training.learning_rate=.nan", "not a finite number"),
    ".inf": ("adapters.mid.rank=.inf", "not a finite number"),
    "negative rank": ("adapters.mid.rank=-3", "greater than or equal to 1, not -3"),
    "merge of itself": ("model=&a {<<: *a}", "no anchor before it"),
    "two documents": ("output_dir=a\n---\nb", "second document"),
    "NUL": ("output_dir=a\0b", "'\\x00'"),
    "NUL as an escape": ('output_dir="a\\0b"', "NUL character"),
    "bytes that are not UTF-8": ("output_dir=a\udcffb", "'\\udcff'"),
    "a key of such bytes": ("output\udcff=b", "is not an override"),
    "a key that clears the screen": ("\x1b[2J=b", "is not an override"),
    "an empty key": ("=1", "is not an override"),
    "a dot": (".=1", "is not an override"),
    "a dot too much": ("model.=1", "is not an override"),
    "a number that int() does not know": ("adapters.².rank=1", "there is no '²'"),
    "a number that int() refuses": (f"adapters.{'9' * 5000}.rank=1", "in the list"),
    "a negative number": ("adapters.-1.rank=1", "there is no '-1'"),
    "no bands": ("adapters=[]", "at least 1 item"),
    "a section that is a word": ("model=x", "must be a mapping of keys, not 'x'"),
    "bands that are a word": ("adapters=x", "valid list"),
    "below a word": ("output_dir.a.b=x", "is a single value"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_hostile_override_is_one_quick_error(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    override, words = OVERRIDES[name]
    Path("good.yaml").write_text(GOOD)
    message = refusal("good.yaml", [override])
    assert words in message and message.startswith("command line"), message[:200]
    if "\0" not in override:  # which no command line can hold
        exits_with_2(capsys, "good.yaml", [override])
    assert os.listdir() == ["good.yaml"]


def test_thousands_of_overrides(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    wrong = [f"adapter{i}=1" for i in range(2000)]
    assert "and 1,980 more problems" in refusal(str(tmp_path / "good.yaml"), wrong)
    same = [f"training.max_steps={i}" for i in range(2000)]
    assert seconds_of(lambda: parse_recipe(GOOD, "r", same)) < MAX_SECONDS


@pytest.mark.parametrize(
    ("bands", "words"),
    [
        ("[{band: a, layers: 0-3}, {band: b, layers: 3-5}]", "bands 'a' and 'b' both claim model.layers.3."),
        ("[{band: a, layers: bottom}, {band: b, layers: all}]", "bands 'a' and 'b' both claim"),
        ("[{band: a, target_modules: mlp}, {band: b, target_modules: [up_proj]}]", "bands 'a' and 'b' both claim"),
        ("[{band: a, layers: 40%-41%}]", "band 'a': '40%-41%' of 6 layers is no layer at all"),
        ("[{band: a, layers: 4-2}]", "band 'a': '4-2' runs backwards"),
        ("[{band: a, layers: '1,1'}]", "band 'a': '1,1' names a layer twice"),
        ("[{band: a, layers: 0-9}]", "band 'a': layer 9 is out of range"),
        (f"[{{band: a, layers: '{'9' * 900}'}}]", "band 'a'"),
        ("[{band: a, target_modules: nothing}]", "band 'a': target_modules 'nothing' matches no linear module"),
        ("[{band: a, target_modules: 're:x'}]", "band 'a': target_modules 're:x' matches no linear module"),
    ],
)
def test_overlapping_and_empty_bands_are_named(bands, words):
    recipe, _ = parse_recipe(HEAD + f"adapters: {bands}\n", "r.yaml")
    spec = spec_from_config(TINY)
    with pytest.raises(LayoutError) as caught:
        build_layout(recipe, spec)
    assert words in str(caught.value) and caught.value.exit_code == 2

    def build() -> None:
        build_layout(recipe, spec)

    assert seconds_of(build) < MAX_SECONDS


@pytest.mark.parametrize("written", ["2e-4", "2E-4", "+2e-4", "0.2e-3", "2.e-4", "20e-5"])
def test_2e_4_is_a_number(written):
    assert parse_recipe(GOOD.replace("2e-4", written), "r")[0].training.learning_rate == 0.0002
    assert parse_recipe(GOOD, "r", [f"training.learning_rate={written}"])[0].training.learning_rate == 0.0002
