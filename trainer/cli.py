"""The console command: reflux SUB-COMMAND ...

A sub-command is one line of COMMANDS: the function that it calls, as function(words behind the
sub-command, its name in messages) -> exit code, and what the shell completes. The function's module
is imported when it is called, so that `reflux --help` loads neither torch nor transformers.
"""

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .config.fit import nearest
from .runs import output

HANDLE_PIPES = ("run", "matrix", "check", "plan")  # these see to a closed pipe themselves
PACKAGES = ("torch", "triton", "transformers", "torchtitan")


@dataclass(frozen=True)
class SubCommand:
    """target: "module:function". takes: what its first word is; options: for completion."""

    target: str
    purpose: str
    takes: Literal["recipe", "folder", "file", "shell"]
    options: tuple[str, ...] = ()


SET = "--set"
COMMANDS: dict[str, SubCommand] = {
    "run": SubCommand(
        "reflux.trainer.subcommands:run",
        "run a configuration: calibrate, distil, diagnose, evaluate, cache",
        "recipe",
        (SET, "--ranks", "--print-config"),
    ),
    "matrix": SubCommand(
        "reflux.trainer.subcommands:matrix",
        "run a table of runs, cell by cell, and report",
        "recipe",
        (SET, "--dry-run", "--take-over-lock"),
    ),
    "check": SubCommand(
        "reflux.trainer.subcommands:check",
        "try models, tokenizers, data and grader of a configuration; writes nothing",
        "recipe",
        (SET, "--ranks"),
    ),
    "plan": SubCommand(
        "reflux.trainer.subcommands:plan",
        "shapes and memory per rank of a configuration, without weights",
        "recipe",
        (SET, "--ranks"),
    ),
    "report": SubCommand(
        "reflux.trainer.subcommands:report",
        "what a run has done, with a page; or the reports of a matrix once more",
        "folder",
    ),
    "watch": SubCommand(
        "reflux.trainer.runs.watch:main",
        "a page on a run or a matrix, report.html; written anew while it goes on",
        "folder",
        ("--follow", "--every"),
    ),
    "align": SubCommand(
        "reflux.trainer.subcommands:align",
        "two tokenizers on one text, or on a body of text",
        "folder",
        ("--text", "--file", "--scores", "--corpus", "--html", "--json", "--color", "--width"),
    ),
    "bench": SubCommand(
        "reflux.trainer.subcommands:bench",
        "time kernels and training against their peers; in a checkout",
        "file",
    ),
    "verify": SubCommand("reflux.trainer.verify:main", "which checkpoints are whole", "folder"),
    "prepare": SubCommand(
        "reflux.trainer.data.prepare:main",
        "a public data set as rows of ours, held-out questions apart",
        "file",
        ("--out", "--source", "--test-split", "--held-out", "--where", "--limit", "--seed"),
    ),
    "merge": SubCommand(
        "reflux.trainer.merge:main", "a LoRA adapter and its base as one model", "folder"
    ),
    "init": SubCommand(
        "reflux.trainer.recipe_files:init",
        "list recipes to start from, or write one as a file of your own",
        "recipe",
        ("--out", "--all", "--names", "--force"),
    ),
    "completion": SubCommand(
        "reflux.trainer.completion:main", "completion for bash, zsh or fish", "shell"
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs what was typed behind `reflux`. Returns the exit code: 0, 2 for a mistake, or that of
    the sub-command.
    """
    name, *rest = list(sys.argv[1:] if words is None else words) or ["--help"]
    if name not in HANDLE_PIPES and sys.stdout is sys.__stdout__:  # nobody captures it
        output.survive_lost_reader()
    if name in ("--help", "-h"):
        print(_help())
        return 0
    if name in ("--version", "-V"):
        print(_version())
        return 0
    if name not in COMMANDS:
        guess = nearest(name, (*COMMANDS, "--help", "--version"))
        print(
            f"reflux: error: unknown command {name!r}{guess} Known: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    module, _, function = COMMANDS[name].target.partition(":")
    return getattr(importlib.import_module(module), function)(rest, f"reflux {name}") or 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {c.purpose}" for name, c in COMMANDS.items()]
    return "\n".join(
        [
            "usage: reflux COMMAND ...",
            "",
            "Set how well a language model can be distilled: calibrate the teacher, distil",
            "students, measure both.",
            "",
            *rows,
            "",
            "reflux COMMAND --help: what a command takes. reflux --version: what is installed.",
            "A configuration is a .toml or .yaml file, or the name of a recipe (reflux init).",
            "Exit codes: 0 done, 2 a mistake in what was asked for; more in reflux run --help.",
        ]
    )


def _version() -> str:
    """One line each: ours, what it stands on, and the device that a run would use."""
    versions = [f"{p} {_installed(p)}" for p in PACKAGES]
    ours = f"reflux-llm {_installed('reflux-llm')}"
    return "\n".join([ours, f"python {platform.python_version()}", *versions, _device()])


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"device {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"device cpu, {os.cpu_count()} x {platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())
