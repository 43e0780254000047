"""The `qhybrid` command: finds the subcommand, and turns errors into one message and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from qhybrid import __version__
from qhybrid.errors import QhybridError
from qhybrid.redaction import redacted_output, redacted_traceback

# name: (module, one line for the help). Modules are imported only when their command runs.
_COMMANDS = {
    "sft": ("qhybrid.cli.sft", "Fine-tune a model as a recipe says."),
    "plan": ("qhybrid.cli.plan", "What a recipe needs, and whether it fits, before anything is downloaded."),
    "ranks": ("qhybrid.cli.ranks", "Which ranks, where, of which kind: sweeps with controls."),
    "eval": ("qhybrid.cli.evaluate", "Loss, perplexity and exact match of a model or an adapter."),
    "generate": ("qhybrid.cli.generate", "Let a model or an adapter answer."),
    "serve": ("qhybrid.cli.serve", "Serve a model and many adapters by the OpenAI protocol."),
    "inspect": ("qhybrid.cli.inspect", "Ranks, norms and spectra of an adapter."),
    "report": ("qhybrid.cli.report", "A run or a sweep as one HTML file, with pictures."),
    "merge": ("qhybrid.cli.merge", "Several adapters into one."),
    "compress": ("qhybrid.cli.compress", "An adapter at lower rank, with the error."),
    "export": ("qhybrid.cli.export", "An adapter for peft, vLLM or llama.cpp, in INT8, or merged into the model."),
    "recipes": ("qhybrid.cli.recipes", "List, show, copy and check recipes."),
    "doctor": ("qhybrid.cli.doctor", "Show versions, GPU and 4-bit readiness, and what to do."),
}
# What other tools call them.
_MEANT = {
    "estimate": "plan",
    "memory": "plan",
    "train": "sft",
    "finetune": "sft",
    "fine-tune": "sft",
    "evaluate": "eval",
    "test": "eval",
    "chat": "generate",
    "infer": "generate",
    "combine": "merge",
    "bake": "export",
    "convert": "export",
    "quantize": "export",
    "prune": "compress",
    "svd": "compress",
    "sweep": "ranks sweep",
    "show": "inspect",
    "plot": "report",
    "html": "report",
}


class _LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return importlib.import_module(_COMMANDS[cmd_name][0]).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            import difflib

            nearest = [_MEANT.get(args[0], ""), *difflib.get_close_matches(args[0], _COMMANDS, n=1)]
            hint = f" Did you mean {next(filter(None, nearest))!r}?" if any(nearest) else ""
            raise click.UsageError(f"There is no command {args[0]!r}.{hint}", ctx) from None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="qhybrid")
def cli() -> None:
    """Fine-tune 4-bit LLaMA-class models with layer-banded LoRA, rsLoRA, DoRA and AdaLoRA adapters.

    Start with: qhybrid recipes list
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 0: done; 1: a run failed; 2: the input was wrong; 128 + n: signal n."""
    with redacted_output():
        _main(arguments)


def _main(arguments: list[str] | None) -> None:
    try:
        cli.main(args=arguments, prog_name="qhybrid", standalone_mode=False)
    except QhybridError as error:
        if not error.told_elsewhere:
            print_error(str(error))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__ or error  # click puts its Abort in the place of the signal
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # of several processes one says it
            print_error("interrupted")
        sys.exit(getattr(cause, "exit_code", 130))
    except BrokenPipeError:
        # The reader went away (`| head`): say nothing, and keep the interpreter from saying it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a folder without permission, a name that is too long
        place = f"{error.filename}: " if error.filename else ""
        print_error(f"{place}{error.strerror or error}")
        sys.exit(1)
    except Exception as error:
        if _is_out_of_memory(error):
            print_error("out of memory\nhint: a smaller batch, shorter rows or a smaller model needs less")
        else:  # a fault of ours; not left to Python, which would print what is in it as it is
            click.echo(redacted_traceback(error), err=True, nl=False)
        sys.exit(1)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on the CPU or torch on the GPU could not get memory; torch is not imported to ask."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def print_error(text: str) -> None:
    """Write "error: …" to standard error, in colour on a terminal."""
    click.echo(click.style("error: ", fg="red", bold=True) + text, err=True)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars, notices and warnings out of our output."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where installed, warns that it guessed
    warnings.filterwarnings("ignore")
    for name in (
        "bitsandbytes", "DeepSpeed", "deepspeed", "peft", "trl", "accelerate", "datasets", "torchao",
        "huggingface_hub", "urllib3", "httpx",
    ):  # fmt: skip
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    main()
