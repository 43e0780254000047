"""Links in the folder of a model, an adapter or a run lead to no other file; those of the hub's cache work."""

from __future__ import annotations

import os
import shutil

import pytest
from watch import only_inside

from qhybrid.disk import write_atomically
from qhybrid.training.events import EventLog


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_links_that_lead_out_of_a_model_are_refused(project, command, capsys, name):
    model, elsewhere = project / "model", project / "elsewhere"
    elsewhere.mkdir()
    shutil.move(model / name, elsewhere / name)
    (model / name).symlink_to(elsewhere / name)
    with only_inside(project / "model", project / "run", project / "recipe.yaml", project / "train.jsonl"):
        assert command("sft", project / "recipe.yaml") == 2
    assert "leads out of its folder" in capsys.readouterr().err
    assert command("eval", project / "eval.jsonl", "--model", model, "--no-generation") == 2


def test_a_template_that_is_a_link_is_not_published(trained, project, command, capsys):
    """It would get into the adapter folder, which is made to be given away."""
    private = project / "private-key"
    private.write_text("-----BEGIN PRIVATE KEY-----")
    templates = project / "model" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").symlink_to(private)
    assert command("sft", project / "recipe.yaml") == 2
    (templates / "tool.jinja").unlink()
    templates.rmdir()
    templates.symlink_to(project)
    assert command("sft", project / "recipe.yaml") == 2
    adapter = project / "adapter"
    shutil.copytree(trained[1].run.adapter, adapter)
    (adapter / "layout.json").unlink()
    (adapter / "layout.json").symlink_to(private)
    capsys.readouterr()
    assert command("eval", project / "eval.jsonl", "--adapter", adapter, "--no-generation") == 2
    said = capsys.readouterr().err
    assert "leads out of its folder" in said and "BEGIN" not in said


def test_the_links_of_the_hub_cache_work(project, command):
    """snapshots/COMMIT holds links to blobs; a link inside the folder, and a link to the folder, are fine, too."""
    repo = project / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted((project / "model").iterdir())):
        blob = repo / "blobs" / f"{number:040x}"
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (snapshot / "again.json").symlink_to("config.json")
    (project / "model").rmdir()
    (project / "model").symlink_to(snapshot)
    assert command("eval", project / "eval.jsonl", "--model", project / "model", "--no-generation") == 0
    assert command("plan", project / "recipe.yaml", "--device", "cpu") == 0


def test_links_in_a_run_folder_are_not_written_through(tmp_path):
    """A run folder that came from elsewhere cannot make a run write to another file when it goes on."""
    root, victim = tmp_path / "run", tmp_path / "outside"
    root.mkdir()
    victim.write_text("victim")
    for name in (".run.json.tmp", "run.json", "events.jsonl"):
        (root / name).symlink_to(victim)
    write_atomically(root / "run.json", "{}")
    with pytest.raises(OSError):
        EventLog(root / "events.jsonl")
    assert victim.read_text() == "victim" and not (root / "run.json").is_symlink()
