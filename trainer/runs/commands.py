"""Commands that messages print. Each works as printed, in the folder that `directory()` names: what
was started is started again, with the same interpreter, launcher and arguments.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MAIN = Path(__file__).parents[1] / "main.py"
# the last part of a word of their command
LAUNCHERS = ("torchrun", "torch.distributed.run", "reflux", "reflux.trainer.cli")

_command: list[str] | None = None  # None: the words of this process's command line
_folder: str | None = None
_subcommand: int | None = None  # where `run` stands in _command, if that is one of `reflux`


def remember(
    arguments: Sequence[str] | None,
    *,
    name: str = "",
    run_folder: str = "",
    typed: Sequence[str] = (),
) -> None:
    """What a program was called with; None: the words of the command line. name: of a module;
    default: trainer/main.py. run_folder: where the run is, if the same words would settle on
    another one. typed: the words behind `reflux`, where that was the command.
    """
    global _command, _folder, _subcommand
    start = [_python(), "-m", name] if name else [_python(), _short(MAIN)]
    _command = None if arguments is None else [*start, *arguments]
    _subcommand = None
    if typed:
        _command = [*_console(), *typed]
        _subcommand = len(_command) - len(typed)
    _folder = run_folder or None


def remember_run(folder: str | os.PathLike, ranks: int) -> None:
    """A run that no command line has started: it goes on from what its folder holds."""
    global _command, _folder, _subcommand
    _command, _folder, _subcommand = _saved_run(folder, ranks), None, None


def forget() -> None:
    """What was remembered."""
    global _command, _folder, _subcommand
    _command = _folder = _subcommand = None


def directory() -> str:
    """Where the commands work: relative names in them are relative to it."""
    return os.getcwd()


def resume(*, take_over: bool = False, changed_inputs: bool = False) -> str:
    """Goes on with this run. take_over: from an owner of its folder that is known to have ended.
    changed_inputs: with the files as they are now.
    """
    sets = {"on_existing_run": "resume"}
    sets |= {"folder": _folder} if _folder else {}
    sets |= {"take_over_lock": "true"} if take_over else {}
    sets |= {"on_changed_input": "accept"} if changed_inputs else {}
    return shlex.join(_with_sets(_drop_set(_started(), "take_over_lock"), sets))


def again(*more: str) -> str:
    """What was started, with more arguments."""
    return shlex.join([*_started(), *more])


def check() -> str:
    """Tries what was started: `reflux check`, or the flag."""
    return _instead("check", "--check")


def plan() -> str:
    """Shapes and memory of what was started: `reflux plan`, or the flag."""
    return _instead("plan", "--dry-run")


def _instead(subcommand: str, flag: str) -> str:
    words = [word for word in _started() if word not in ("--check", "--dry-run")]
    if _subcommand is None:
        return shlex.join([*words, flag])
    return shlex.join([*words[:_subcommand], subcommand, *words[_subcommand + 1 :]])


def finish(folder: str | os.PathLike, ranks: int) -> str:
    """Goes on with a run that another process has begun, with as many ranks, from its saved
    configuration.
    """
    sets = {"on_existing_run": "resume", "folder": os.fspath(folder)}
    return shlex.join(_with_sets(_saved_run(folder, ranks), sets))


def _saved_run(folder: str | os.PathLike, ranks: int) -> list[str]:
    start = [_python(), "-m", LAUNCHERS[1], "--nproc-per-node", str(ranks)] if ranks > 1 else []
    saved = os.path.join(folder, "config.toml")
    return [*(start or [_python()]), _short(MAIN), "--config", saved]


def module(name: str, *arguments: str) -> str:
    """`python -m name arguments`, with this interpreter."""
    return shlex.join([_python(), "-m", name, *arguments])


def script(*arguments: str) -> str:
    """trainer/main.py with these arguments, with this interpreter."""
    return shlex.join([_python(), _short(MAIN), *arguments])


def _started() -> list[str]:
    return _command or _launcher() or list(sys.orig_argv)


def _launcher() -> list[str] | None:
    """The command of the torchrun that is this process's parent; None without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        line = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        line = b""
    words = [os.fsdecode(word) for word in line.split(b"\0")[:-1]]
    if any(os.path.basename(word) in LAUNCHERS for word in words):
        return words
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return [_python(), "-m", LAUNCHERS[1], "--nproc-per-node", ranks, *sys.argv]


def _with_sets(words: list[str], sets: Mapping[str, str]) -> list[str]:
    for key in sets:
        words = _drop_set(words, key)
    return [*words, *(word for key, value in sets.items() for word in ("--set", f"{key}={value}"))]


def _drop_set(words: Sequence[str], key: str) -> list[str]:
    """Without `--set key=...` and `--set=key=...`."""
    out: list[str] = []
    for word in words:
        if out and out[-1] == "--set" and word.startswith(f"{key}="):
            out.pop()
        elif not word.startswith(f"--set={key}="):
            out.append(word)
    return out


def _python() -> str:
    found = shutil.which("python")
    same = found is not None and os.path.abspath(found) == sys.executable
    return "python" if same else _short(Path(sys.executable))


def _console() -> list[str]:
    """The console command `reflux`, where the shell finds the one of this interpreter."""
    found = shutil.which("reflux")
    same = found is not None and os.path.dirname(found) == os.path.dirname(sys.executable)
    return ["reflux"] if same else [_python(), "-m", "reflux.trainer.cli"]


def _short(path: Path) -> str:
    """Relative to the working directory where it lies inside."""
    return str(path.relative_to(directory()) if path.is_relative_to(directory()) else path)
