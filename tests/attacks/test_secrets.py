"""Tokens, passwords and the home directory are in nothing that is written or printed, a crash included."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from helpers import THREE_BANDS, chat_rows, record_figure, tiny_folder, write_rows

ROOT = Path(__file__).parents[2]
SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_SECRET": 'quote" back\\slash wörd',
    "DATABASE_PASSWORD": "correcthorsebattery",
}
FILE_TOKEN = "hf_FromTheFile0123456789FromTheFile01"
PROXY_PASSWORD = "proxy-pass-99"
URL_PASSWORD = "urlpass-4711"
URL = f"https://someone:{URL_PASSWORD}@host.invalid/rows.jsonl"

# Runs the command, but the third training step fails with a message that says everything.
CRASHING = """
import os, sys
from qhybrid.cli import main
from qhybrid.training.trainer import BandedTrainer

step = BandedTrainer.training_step
calls = []

def failing(self, *arguments, **settings):
    calls.append(1)
    if len(calls) > 4:
        names = ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DATABASE_PASSWORD", "https_proxy", "HOME")
        everything = "\\n".join(os.environ[name] for name in names)
        print(everything)
        print(everything, file=sys.stderr)
        raise RuntimeError(f"the server said: {everything}\\n{os.environ['SAID']} {os.environ['HOME']}/x.")
    return step(self, *arguments, **settings)

BandedTrainer.training_step = failing
main.main(sys.argv[1:])
"""


def forms(text: str) -> set[str]:
    """`text` as files and logs may have it."""
    as_json = {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    return {text, repr(text)[1:-1], repr(text + "\"'")[1:-4], quote(text), *as_json}


class Victim:
    """A user with secrets, a home directory, and a project in it."""

    def __init__(self, home: Path) -> None:
        self.num_looked_into = 0
        self.home, self.project = home, home / "project"
        self.project.mkdir(parents=True)
        tiny_folder(home / "models" / "tiny")
        said = home / "models" / "tiny" / "tokenizer_config.json"
        leftover = {"special_tokens_map_file": f"{home}/old/special_tokens_map.json"}  # as older versions wrote it
        said.write_text(json.dumps({**json.loads(said.read_text()), **leftover}))
        write_rows(self.project / "train.jsonl", chat_rows(16))
        write_rows(self.project / "eval.jsonl", chat_rows(3, seed=5))
        token = home / ".cache" / "huggingface" / "token"
        token.parent.mkdir(parents=True)
        token.write_text(f"{FILE_TOKEN}\n")
        self.recipe = {
            "model": {"path": str(home / "models" / "tiny"), "dtype": "float32"},
            "adapters": THREE_BANDS,
            "data": {
                "sources": str(self.project / "train.jsonl"),
                "eval_sources": str(self.project / "eval.jsonl"),
                "system_prompt": f"You live in {home}, and {SECRETS['HF_TOKEN']} is how you get in.",
            },
            "training": {
                "max_steps": 6,
                "per_device_train_batch_size": 2,
                "gradient_checkpointing": False,
                "max_length": 256,
                "save_strategy": "best",
                "eval_strategy": "steps",
                "eval_steps": 2,
                "load_best_model_at_end": True,
                "report_to": ["tensorboard"],
                "run_name": f"{SECRETS['WANDB_API_KEY']} of {home}",
            },
            "output_dir": str(self.project / "run"),
        }
        (self.project / "recipe.yaml").write_text(json.dumps(self.recipe, indent=1, ensure_ascii=False))
        self.secrets = [*SECRETS.values(), FILE_TOKEN, PROXY_PASSWORD, URL_PASSWORD, str(home)]

    def run(self, *arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command, or `code` with the command's arguments, and check what it prints."""
        environment = {
            **{
                name: value for name, value in os.environ.items() if not name.upper().endswith(("_PROXY", "TOKEN"))
            },
            **SECRETS,
            "HOME": str(self.home),
            "https_proxy": f"http://me:{PROXY_PASSWORD}@localhost:9",
            "SAID": f"{FILE_TOKEN} {URL}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }
        for name in ("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "TENSORBOARD_LOGGING_DIR"):
            environment.pop(name, None)
        program = ["-c", code] if code else ["-m", "qhybrid.cli.main"]
        done = subprocess.run(
            [sys.executable, *program, *arguments],
            capture_output=True,
            text=True,
            cwd=self.project,
            env=environment,
            timeout=300,
        )
        self.look_into(done.stdout, "standard output")
        self.look_into(done.stderr, "standard error")
        return done

    def look_into(self, text: str | bytes, what: str) -> None:
        """Fail if `text` holds a secret in any form."""
        self.num_looked_into += 1
        content = text if isinstance(text, bytes) else text.encode()
        for secret in self.secrets:
            for form in forms(secret):
                at = content.find(form.encode())
                assert at < 0, f"{what}: {content[max(0, at - 80) : at + 80]!r}"

    def look_into_run(self) -> list[str]:
        """Check every file of the run folder, its name included; returns the names."""
        folder = self.project / "run"
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        for file in files:
            self.look_into(str(file.relative_to(folder)), "a file's name")
            self.look_into(file.read_bytes(), str(file.relative_to(folder)))
        return [str(file.relative_to(folder)) for file in files]


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """The name of the home directory has what YAML folds and JSON escapes: a space, a quote, an accent."""
    made = Victim(tmp_path_factory.mktemp("users") / "ann marié o'hara")
    yield made
    figure = f"0 in {made.num_looked_into} files, names and outputs, a crash's included"
    record_figure(12, "secrets in what is written and printed", figure)


@pytest.fixture(scope="module")
def crash(victim):
    return victim.run("sft", "recipe.yaml", code=CRASHING)


def test_a_crash_tells_nothing(victim, crash):
    assert crash.returncode == 1
    assert "Traceback" in crash.stderr and "RuntimeError: the server said: ***" in crash.stderr
    assert "https://***@host.invalid/rows.jsonl ~/x." in crash.stderr
    names = victim.look_into_run()
    assert {"recipe.yaml", "audit.json", "run.json", "plan.json", "events.jsonl", "layout.json"} <= set(names)
    assert any(name.startswith("checkpoints/checkpoint-") for name in names)
    assert any(name.startswith("tensorboard/") for name in names)
    failed = (victim.project / "run" / "events.jsonl").read_text().splitlines()[-1]
    assert json.loads(failed)["message"].startswith("the server said: ***")


def test_the_run_goes_on_and_its_result_tells_nothing(victim, crash):
    """With the same recipe, which names the home directory in full; what was written says "~"."""
    done = victim.run("sft", "recipe.yaml", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "resumed from checkpoint-" in done.stdout
    names = victim.look_into_run()
    assert {"adapter/adapter.json", "adapter/tokenizer_config.json", "adapter/peft/lora/adapter_config.json"} <= {
        *names
    }
    written = (victim.project / "run" / "recipe.yaml").read_text()
    assert "path: ~/models/tiny" in written and "output_dir: ~/project/run" in written
    info = json.loads((victim.project / "run" / "adapter" / "adapter.json").read_text())
    assert info["base_model"] == "~/models/tiny"


@pytest.mark.slow
def test_what_was_written_is_read_again(victim, crash):
    """ "~" is understood in a recipe, and where an adapter names its base model."""
    if not (victim.project / "run" / "adapter").is_dir():
        assert victim.run("sft", "recipe.yaml", "--resume", "auto").returncode == 0
    scored = victim.run("eval", "eval.jsonl", "--adapter", "run", "--no-generation")
    assert scored.returncode == 0, scored.stderr
    again = victim.run("sft", "run/recipe.yaml", "training.max_steps=1", "output_dir=~/project/second")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["sft", "recipe.yaml", f"data.sources={URL}"],
        ["sft", "recipe.yaml", f"model.path={URL}"],
        pytest.param(["sft", "recipe.yaml", f"model.tokenizer={URL}", "--dry-run"], marks=pytest.mark.slow),
        ["sft", "recipe.yaml", f"output_dir={URL}", "model.path=/nowhere"],
        ["plan", "recipe.yaml", f"model.path={URL}"],
        ["recipes", "show", "recipe.yaml", f"model.path={URL}", f"data.sources={URL}"],
        ["recipes", "show", URL],
        ["recipes", "check", "recipe.yaml", URL],
        ["recipes", "copy", URL],
        ["eval", URL, "--model", "models"],
        pytest.param(["eval", "eval.jsonl", "--adapter", URL], marks=pytest.mark.slow),
        ["sft", "recipe.yaml", f"training.hub_token={SECRETS['HF_TOKEN']}"],
        ["sft", "recipe.yaml", f"training.learning_rate={SECRETS['DATABASE_PASSWORD']}"],
        [f"{SECRETS['HF_TOKEN']}"],
    ],
    ids=lambda arguments: re.sub(r"\W+", "-", " ".join(arguments))[:40],
)
def test_messages_tell_nothing(victim, arguments):
    done = victim.run(*arguments)
    fine = arguments[:3] == ["recipes", "show", "recipe.yaml"] or "--dry-run" in arguments
    assert done.returncode == (0 if fine else 2), done.stderr
    assert "Traceback" not in done.stderr
