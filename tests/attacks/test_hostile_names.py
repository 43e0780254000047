"""Names of bands, shards, outputs, recipes, revisions and tensors never lead to a file outside their folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import build_tokenizer, make_recipe, record_figure, tiny_layout, tiny_model
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from watch import only_inside

from qhybrid.adapters.attach import attach
from qhybrid.adapters.folder import WEIGHTS, load_weights, save_weights
from qhybrid.base.facts import model_facts
from qhybrid.base.locate import hub_name, weight_files
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.errors import AdapterError, ModelError, QhybridError
from qhybrid.recipe.schema import ModelSection
from qhybrid.training.checkpoint import is_whole, newest_sealed
from qhybrid.training.claim import claim

PIECES = [
    "..", ".", "/", "//", "\\", "..\\", "\0", "\n", " ", "~", "~root", "$HOME", "${HOME}", "%2e%2e%2f", "%00", "*",
    "C:", "C:\\Windows\\", "\\\\host\\share\\", "con", "NUL", "aux.txt", "COM1", ":stream", "a", "a" * 300, "-rf",
    "--help", "．．", "∕", "⁄", "‥", "․․", "＼", "\u202e", "\u200b", "é", "e\u0301", "ﬁ", "checkpoint-",
    "checkpoint-../../x", "/etc/passwd", "../../../../../../etc/passwd", "outside", "../outside",
    "file:///etc/passwd", "https://host/x", ".git", "<", ">", "|", ";", "`id`", "$(id)", "{0}", "%s", "@",
    "#", "?",
]  # fmt: skip
_examples: list[int] = []  # of each test
NAMES = st.one_of(
    st.sampled_from(PIECES),
    st.lists(st.sampled_from(PIECES), min_size=2, max_size=6).map("".join),
    st.lists(st.sampled_from(PIECES), min_size=2, max_size=6).map("/".join),
    st.text(max_size=30),
)


def examples(number: int):
    """Always the same `number` of examples."""
    _examples.append(number)
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with files around it that nothing may touch."""
    folder = tmp_path / "a" / "root"
    folder.mkdir(parents=True)
    for place in (tmp_path, tmp_path / "a"):
        for name in ("outside", "outside.safetensors", "tokenizer.4.0.0.json", "vocab.json", "config.json"):
            (place / name).write_text("{}")
    return folder


@pytest.fixture(autouse=True, scope="module")
def figures():
    """How many names were tried, once all are through."""
    yield
    tried = sum(_examples)
    if tried:
        record_figure(
            11, "generated names of shards, bands, outputs, tensors and others", f"{tried} tried, 0 got out"
        )


def written(name: str, root: Path) -> list[str]:
    """`name` as it is, and as a way to what lies outside."""
    return [name, f"{name}.safetensors", f"../{name}", f"{root.parent}/{name}", f"x/../../{name}"]


def test_the_watch_sees(tmp_path):
    """Otherwise its silence would say nothing."""
    (tmp_path / "in").mkdir()
    for touch in (
        lambda: open(tmp_path / "in" / ".." / "x", "w").close(),
        lambda: (tmp_path / "x").read_bytes(),
        lambda: (tmp_path / "y").mkdir(),
        lambda: (tmp_path / "y").rename(tmp_path / "z"),
        lambda: Path("/etc/passwd").read_text(),
    ):
        with pytest.raises(AssertionError, match=r"/(x|y|passwd)"), only_inside(tmp_path / "in"):
            touch()


@examples(100)
@given(name=NAMES)
@example(name="../outside.safetensors")
@example(name="outside")
def test_shards(root, name):
    """Five ways to write each of 100 names."""
    index = root / "model.safetensors.index.json"
    for way in written(name, root):
        index.write_text(json.dumps({"weight_map": {"w": way}}))
        with only_inside(root), contextlib.suppress(ModelError):
            for file in weight_files(root):
                assert file.parent == root and file.resolve().parent == root


@examples(700)
@given(name=NAMES)
@example(name=".")
@example(name="..")
@example(name="..x")
def test_bands(root, name):
    """What is accepted is one name of a file, and none that is hidden."""
    with only_inside(root):
        try:
            recipe = make_recipe(adapters=[{"band": name, "rank": 2}])
        except QhybridError:
            return
    assert recipe.adapters[0].band == name
    assert (root / name).resolve().parent == root and not name.startswith(".") and len(name) <= 64


@examples(200)
@given(name=NAMES.filter(lambda name: "\0" not in name))
def test_outputs(root, name):
    """A run makes the folder that the recipe names, and nothing anywhere else."""
    shutil.rmtree(root)
    root.mkdir()
    given = f"{root}/{name.lstrip('/')}"
    if not os.path.realpath(given).startswith(f"{root.parent}/"):
        return  # it is as the user says; but a test keeps to its own folder
    own = [Path(given), *(parent for parent in Path(given).parents if not os.path.exists(parent))]
    try:
        recipe = make_recipe(output_dir=given)
        with only_inside(*own), claim(recipe, resume=False, overwrite=False) as run:
            (run.folder / "run.json").write_text("{}")
    except QhybridError:
        return
    except OSError as error:
        assert error.errno in (36, 20, 22), error  # a name that is too long, or below a file
        return
    except UnicodeEncodeError:
        assert not name.isprintable()  # half a surrogate pair is no text
        return
    assert os.path.realpath(run.folder) == os.path.realpath(given)


@examples(200)
@given(name=NAMES)
@example(name="../recipes/demo")
@example(name="demo/../demo")
def test_shipped_recipes(root, command, monkeypatch, name):
    """Only names of the list are found, with any path in front or behind they are not."""
    from qhybrid.recipe.shipped import find_shipped, shipped_folder, shipped_names

    monkeypatch.chdir(root)
    with only_inside(root, shipped_folder()):
        assert command("recipes", "copy", "--", name, root / "copy.yaml") == 2
        for known in ("demo", "demo.yaml"):
            for way in (f"{name}/{known}", f"{known}/{name}", f"{shipped_folder()}/{known}"):
                assert find_shipped(way) is None or way.removesuffix(".yaml") in shipped_names()
    assert list(root.iterdir()) == []


@examples(200)
@given(name=NAMES)
@example(name="../../outside")
@example(name="..")
@example(name="/etc")
def test_revisions(root, monkeypatch, name):
    """They name files in the cache of the hub, here and in huggingface_hub."""
    cache = root / "cache"
    (cache / "models--org--name" / "refs").mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    for path, revision in (("org/name", name), (f"org/name@{name}", None), ("org/name", f"../{name}")):
        with only_inside(cache):
            with contextlib.suppress(ModelError):
                found = hub_name(path, revision)[1] or ""
                assert (cache / "x" / found).resolve().is_relative_to(cache / "x")
            with contextlib.suppress(ModelError, ValidationError):
                model_facts(ModelSection(path=path if revision else "org/name", revision=revision))


@examples(250)
@given(name=NAMES)
@example(name="../outside")
@example(name="/etc/passwd")
def test_files_of_checkpoints(root, name):
    """A manifest that lists files elsewhere makes a checkpoint that is not whole; they are not even read."""
    checkpoint = root / "checkpoint-1"
    checkpoint.mkdir(exist_ok=True)
    for way in written(name, root):
        content = {
            "files": {
                way: {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
            }
        }
        (checkpoint / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")
        with only_inside(checkpoint):
            assert not is_whole(checkpoint)


NOT_CHECKPOINTS = [
    "checkpoint-²", "checkpoint-٣", "checkpoint-01", "checkpoint--1", "checkpoint-1 ", "checkpoint-..",
    "checkpoint-1\n", "checkpoint-9e9", "xcheckpoint-5", "checkpoint-",
]  # fmt: skip


def test_names_of_checkpoints(root):
    """Only checkpoint-NUMBER is one, and the folder is not a link to another place."""
    for name in NOT_CHECKPOINTS:
        (root / name).mkdir()
    (root / "checkpoint-7").symlink_to(root.parent)
    (root / "checkpoint-8").symlink_to("/etc")
    with only_inside(root):
        assert newest_sealed(root) is None


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A model with adapters, their layout and the folder that they were saved in."""
    layout = tiny_layout()
    model = attach(tiny_model(), layout, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("adapter")
    save_weights(model, layout, folder)
    return model, layout, folder


@examples(200)
@given(name=NAMES)
@example(name="../outside")
def test_tensors_of_adapters(root, adapter, name):
    """A name more, or one in the place of another, refuses the file."""
    model, layout, folder = adapter
    tensors = load_file(folder / WEIGHTS)
    taken = min(tensors)
    for changed in ({**tensors, name: torch.zeros(1)}, {**tensors, name: tensors[taken]}):
        if changed is not tensors and "__metadata__" not in changed:
            changed.pop(taken)
            save_file(changed, root / WEIGHTS)
            with only_inside(root), pytest.raises(AdapterError):
                load_weights(model, layout, root)


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


@examples(60)
@given(name=NAMES)
@example(name="tokenizer.4.0.0.json")
def test_files_of_tokenizers(root, tokenizer_files, name):
    """Neither in the list of versions, nor as vocabulary."""
    shutil.copytree(tokenizer_files, root, dirs_exist_ok=True)
    file = root / "tokenizer_config.json"
    config = json.loads((tokenizer_files / "tokenizer_config.json").read_text())
    for entry in (
        {"fast_tokenizer_files": [f"../{name}", f"{root.parent}/tokenizer.4.0.0.json"]},
        {"vocab": f"{root.parent}/vocab.json", "merges": f"{root.parent}/{name}"},
        {"vocab_file": f"{root.parent}/vocab.json"},
    ):
        file.write_text(json.dumps({**config, **entry}))
        with only_inside(root), pytest.raises(ModelError, match="not one of its folder"):
            load_tokenizer(ModelSection(path="x", tokenizer=str(root)))
    file.write_text(json.dumps({**config, "tokenizer_file": f"{root.parent}/tokenizer.4.0.0.json"}))
    with only_inside(root):
        load_tokenizer(ModelSection(path="x", tokenizer=str(root)))


@examples(100)
@given(name=NAMES)
@example(name="../outside")
def test_files_of_packages(root, monkeypatch, name):
    (root / "holds_a_model").mkdir(exist_ok=True)
    (root / "holds_a_model" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(root)
    for way in (f"package:holds_a_model/{name}", f"package:{name}/x", f"package:holds_a_model/x/../../{name}"):
        with only_inside(root), contextlib.suppress(ModelError, ValidationError):
            model_facts(ModelSection(path=way))


GGUF_NAMES = [
    "..gguf",
    "....gguf",
    "-rf.gguf",
    "a b.gguf",
    "~.gguf",
    "CON.gguf",
    "é\u202e.GGUF",
    "a" * 250 + ".gguf",
]


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_names_of_gguf_files(root, monkeypatch, name):
    """They name a folder in the cache of conversions; what cannot be converted leaves nothing there."""
    from qhybrid.base.gguf import gguf_to_folder

    cache = root / "cache"
    monkeypatch.setenv("QHYBRID_CACHE", str(cache))
    (root / name).write_bytes(b"GGUF" + b"\0" * 64)
    with only_inside(root), pytest.raises(ModelError):
        gguf_to_folder(root / name)
    assert not cache.exists() or list(cache.iterdir()) == []


STRANGE = ["a" * 64, "CON", "-rf", "a..b", "checkpoint-1", "adapter", "run.json", "_"]


@pytest.mark.parametrize(
    "name", ["\0", "/etc/\0passwd", "package:..\\x/y", "a" * 5000, "org/name@../../x", "~nobody/x"]
)
def test_base_models_of_adapters(trained, tmp_path, command, capsys, name):
    """What an adapter from elsewhere names as its base is refused with a message."""
    adapter = tmp_path / "adapter"
    shutil.copytree(trained[1].run.adapter, adapter)
    info = json.loads((adapter / "adapter.json").read_text())
    (adapter / "adapter.json").write_text(json.dumps({**info, "base_model": name}))
    rows = trained[0].folder / "eval.jsonl"
    assert command("eval", rows, "--adapter", adapter, "--no-generation") == 2
    (adapter / "adapter.json").write_text(json.dumps({**info, "base_model": "org/name", "base_revision": name}))
    assert command("eval", rows, "--adapter", adapter, "--no-generation") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_of_strange_bands_writes_only_into_its_folder(project, command):
    recipe = json.loads((project / "recipe.yaml").read_text())
    recipe["adapters"] = [
        {"band": name, "layers": str(layer), "kind": "adalora" if layer == 5 else "lora", "rank": 2}
        for layer, name in enumerate(STRANGE[:6])
    ]
    recipe["training"] |= {"save_strategy": "steps", "save_steps": 2}
    (project / "recipe.yaml").write_text(json.dumps(recipe))
    before = {file for file in project.rglob("*") if "run" not in file.relative_to(project).parts}
    assert command("sft", project / "recipe.yaml") == 0
    after = {file for file in project.rglob("*") if "run" not in file.relative_to(project).parts}
    assert before == after
    assert command("eval", project / "eval.jsonl", "--adapter", project / "run", "--no-generation") == 0
