"""Code that comes with a model, a tokenizer, an adapter, a template or a data set is never run, nor on request."""

from __future__ import annotations

import json
import shutil

import pytest
from canaries import write_code

CANARIES = (9, "canaries of remote code")
COMMANDS = {
    "sft": ["sft", "recipe.yaml"],
    "sft --dry-run": ["sft", "recipe.yaml", "--dry-run"],
    "eval": ["eval", "eval.jsonl", "--model", "model", "--max-new-tokens", "2"],
    "plan": ["plan", "recipe.yaml", "--device", "cpu"],
    "plan --simulate": ["plan", "recipe.yaml", "--device", "cpu", "--simulate"],
    "doctor": ["doctor"],
    "recipes show": ["recipes", "show", "recipe.yaml", "--layout"],
    "recipes check": ["recipes", "check", "recipe.yaml"],
}
HOSTILE_TEMPLATE = "{{% for m in messages %}}{{{{ m['content'] }}}}{{% endfor %}}{{{{ {expression} }}}}"


def test_the_canaries_sing(project, tmp_path, monkeypatch):
    """Otherwise their silence would say nothing."""
    from transformers import AutoConfig, AutoTokenizer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    file = tmp_path / "canary-ran"
    write_code(project / "model", file)
    config = json.loads((project / "model" / "config.json").read_text())
    (project / "model" / "config.json").write_text(json.dumps({**config, "model_type": "mine"}))
    for number, loader in enumerate((AutoTokenizer, AutoConfig)):
        folder = project / f"model{number}"  # modules of the same folder are loaded once
        shutil.copytree(project / "model", folder)
        with pytest.raises(Exception):  # noqa: B017 - the classes are empty
            loader.from_pretrained(folder, trust_remote_code=True)
        assert file.exists(), loader
        file.unlink()


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
@pytest.mark.parametrize("model_type", ["llama", "mine"])
def test_code_in_a_model_folder_is_not_run(project, ran, command, monkeypatch, arguments, model_type):
    """A family that transformers knows is loaded without it, another one is refused."""
    monkeypatch.chdir(project)
    write_code(project / "model", ran)
    config = json.loads((project / "model" / "config.json").read_text())
    (project / "model" / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    needs_the_model = arguments != ["doctor"]
    assert command(*arguments) == (2 if model_type == "mine" and needs_the_model else 0)


def test_code_in_an_adapter_folder_is_not_run(trained, project, ran, command):
    adapter = project / "adapter"
    shutil.copytree(trained[1].run.adapter, adapter)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(project / "model" / name, adapter)
    write_code(adapter, ran)
    scored = command("eval", project / "eval.jsonl", "--adapter", adapter, "--max-new-tokens", "2")
    assert scored in (0, 2)  # transformers may refuse such a tokenizer


@pytest.mark.parametrize("section", ["training", "model", None])
@pytest.mark.parametrize("on_command_line", [True, False])
def test_asking_for_remote_code_is_refused(project, ran, command, capsys, section, on_command_line):
    write_code(project / "model", ran)
    key = f"{section}.trust_remote_code" if section else "trust_remote_code"
    arguments = [f"{key}=true"]
    if not on_command_line:
        recipe = json.loads((project / "recipe.yaml").read_text())
        (recipe[section] if section else recipe)["trust_remote_code"] = True
        (project / "recipe.yaml").write_text(json.dumps(recipe, indent=1))
        arguments = []
    assert command("sft", project / "recipe.yaml", *arguments) == 2
    said = capsys.readouterr().err
    assert "code from a model repository is never run" in said and "hint: leave it out" in said


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code", "custom_generate"])
def test_a_model_cannot_ask_for_its_own_code(project, ran, command, key):
    """Whatever files of the model say that their code may run."""
    write_code(project / "model", ran)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = project / "model" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), key: True}))
    assert command("eval", project / "eval.jsonl", "--model", project / "model", "--max-new-tokens", "2") in (0, 2)


def test_a_package_that_holds_a_model_is_not_imported(project, ran, command, monkeypatch):
    package = project / "holds_a_model"
    shutil.move(project / "model", package / "model")
    (package / "__init__.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.syspath_prepend(project)
    place = "package:holds_a_model/model"
    assert command("plan", project / "recipe.yaml", f"model.path={place}", "--device", "cpu") == 0
    assert command("eval", project / "eval.jsonl", "--model", place, "--no-generation") == 0


@pytest.mark.parametrize(
    "expression",
    [
        "cycler.__init__.__globals__.os.system('touch {ran}')",
        "''.__class__.__mro__[1].__subclasses__()",
        "namespace.__init__.__globals__['__builtins__'].open('{ran}', 'w')",
        "raise_exception.__globals__['__builtins__']['open']('{ran}', 'w')",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(project, ran, command, expression):
    template = HOSTILE_TEMPLATE.format(expression=expression.format(ran=ran))
    (project / "model" / "chat_template.jinja").write_text(template)
    assert command("sft", project / "recipe.yaml") == 2


def test_a_loading_script_of_a_data_set_is_not_run(project, ran, command, monkeypatch):
    monkeypatch.chdir(project)
    for folder in (project / "rows", project / "org" / "rows"):
        folder.mkdir(parents=True)
        for name in ("rows.py", "__init__.py"):
            (folder / name).write_text(f"open({str(ran)!r}, 'w')\n")
    for name in ("rows", "org/rows", "rows/rows.py", "missing/rows"):
        assert command("sft", "recipe.yaml", f"data.sources={name}") == 2
