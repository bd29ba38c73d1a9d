"""What to do about a run folder that exists: nothing is ever deleted or silently mixed, and one
process at a time writes there.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reflux.trainer.config.loader import as_table, load, to_toml
from reflux.trainer.config.origins import with_origins
from reflux.trainer.config.phases import spec_of
from reflux.trainer.config.schema import Config

from . import commands, first_rank
from .files import write_whole
from .lock import InUse, RunLock, hold, refuse_if_held

# tables and keys that change no number of a run that has ended
NO_RESULT = (
    "on_existing_run",
    "on_changed_input",
    "take_over_lock",
    "log",
    "checkpoint",
    "profiler",
    "comm",
    "metrics",
    "compile",
    "folder",
    # where texts come from, not what they are
    "rollout.servers",
    "rollout.server_timeout_s",
    "rollout.server_retries",
    "rollout.gpu_memory_fraction",
    "rollout.max_running",
    "teacher.servers",
)
# those in which a resumed run may differ; training.seq_len may also grow. Of [eval], when it is
# asked and what is reported beside it: a guard compares with the accuracy of the start, on the
# questions of the start, and reports compare all evaluations of a run
MAY_CHANGE = (
    *NO_RESULT,
    "steps",
    "eval.every",
    "eval.at_start",
    "eval.pass_at",
    "eval.against",
    "eval.harness",
    "guard",
    "export",
    "data.too_long",
)
# of what MAY_CHANGE lets pass: not where a phase counts the rows that fit
ROWS_THAT_FIT = ("data.too_long", "training.seq_len")
# a table whose order counts: the rows of its parts are numbered one part behind the other, and the
# numbers seed what is drawn and sampled
IN_ORDER = "parts"
LETTERS = 60  # of a value in a message
OTHER_QUESTIONS = (
    ". Other questions are for a run of their own, with phase = 'evaluate', on its export"
)
SEQ_LEN = 2048  # torchtitan's default
CHECKPOINTS_REMOVED = (
    "checkpoints-removed"  # a file of a done run; matrix: keep_checkpoints = false
)


class Refused(ValueError):
    """The first rank has refused the start, in words of its own."""


def _say_nothing(error: Exception) -> None:
    pass


@contextlib.contextmanager
def claimed(
    cfg: Config, tell: Callable[[Exception], None] = _say_nothing
) -> Iterator[tuple[Config, RunLock | None]]:
    """`claim` by the first rank; the others take what it decides. tell: says on the first rank why
    it refuses, before the others hear of it and end. Errors as of `claim`; Refused on the others.
    """
    if not first_rank.is_first():
        folder = first_rank.wait_for_decision()
        if folder is None:
            raise Refused("the first rank has refused the start")
        yield replace(cfg, folder=folder), None
        return
    with contextlib.ExitStack() as stack:
        try:
            with with_origins(cfg):
                settled = stack.enter_context(claim(cfg))
        except (OSError, ValueError) as error:
            try:
                tell(error)
            finally:  # after the message: the launcher ends all ranks when the others end
                first_rank.decide(None)
            raise
        first_rank.decide(settled[0].folder)
        yield settled


@contextlib.contextmanager
def claim(cfg: Config) -> Iterator[tuple[Config, RunLock]]:
    """Owns the folder of a run inside: yields the configuration as `settle` returns it, and the
    lock. Nothing is written before the lock. Called by one rank.

    ValueError as from `settle`, where another process owns the folder, and where nobody may write.
    """
    with contextlib.ExitStack() as stack:
        try:
            settled, lock = _settle_and_hold(cfg, stack)
        except InUse as error:
            raise _with_command(error) from None
        yield settled, lock


def _settle_and_hold(cfg: Config, stack: contextlib.ExitStack) -> tuple[Config, RunLock]:
    base = Path(cfg.folder)
    if cfg.on_existing_run != "new":  # before any question about the run that is there
        refuse_if_held(base, take_over=cfg.take_over_lock)
    while True:
        settled = settle(cfg)
        fresh = not _holds_run(Path(settled.folder))
        with contextlib.ExitStack() as attempt:
            try:
                lock = attempt.enter_context(hold(settled.folder, take_over=cfg.take_over_lock))
            except InUse:
                if cfg.on_existing_run != "new":
                    raise
                cfg = replace(cfg, folder=str(_free(base)))
                continue
            if fresh and _holds_run(Path(settled.folder)):  # one that began and ended just now
                continue
            stack.enter_context(attempt.pop_all())
            return settled, lock


def _with_command(error: InUse) -> InUse:
    """With the command that takes the folder over, where that may be right."""
    if error.state != "unknown":
        return error
    return InUse(f"{error}:\n  {commands.resume(take_over=True)}", error.state)


def settle(cfg: Config) -> Config:
    """The configuration with the folder that the run will use. Every rank decides the same before
    anything is written.

    ValueError if the folder holds a run and on_existing_run does not say what to do, or if the
    resumed run would not be the same experiment.
    """
    folder = Path(cfg.folder)
    if not _holds_run(folder):
        return cfg
    asks = cfg.on_existing_run == "ask"
    choice = _ask(folder) if asks else cfg.on_existing_run
    if choice == "fail":
        ended = " that has ended" if (folder / "summary.json").exists() else ""
        raise ValueError(
            f"{folder} holds a run already{ended}. Set on_existing_run = 'resume' to continue it, "
            "'new' for a fresh folder beside it, or another folder. To continue it:\n"
            f"  {commands.resume()}"
        )
    if choice == "new":
        return replace(cfg, folder=str(_free(folder)))
    _refuse_another_experiment(cfg, folder)
    if (folder / CHECKPOINTS_REMOVED).exists() and not (folder / "checkpoint").exists():
        raise ValueError(
            f"{folder} holds a run that has ended, and its matrix (keep_checkpoints = false) has "
            "removed the checkpoints: a resumed run would start over, and overwrite the export. "
            "Set on_existing_run = 'new' for a fresh folder beside it, or move this one away"
        )
    return cfg


def save_config(cfg: Config) -> None:
    """Writes the resolved configuration: `--config <folder>/config.toml` repeats the run."""
    Path(cfg.folder).mkdir(parents=True, exist_ok=True)
    once = replace(cfg, take_over_lock=False)  # a decision about this start only
    write_whole(Path(cfg.folder) / "config.toml", to_toml(once))


def _holds_run(folder: Path) -> bool:
    return (folder / "run.jsonl").exists() or (folder / "checkpoint").exists()


def _ask(folder: Path) -> str:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not sys.stdin.isatty():
        return "fail"  # nobody there to answer, or several ranks would ask at once
    while True:
        line = input(f"{folder} holds a run already: [r]esume it, [n]ew folder, [q]uit? ")
        answer = line.strip().lower()[:1]
        if answer in ("r", "n", "q"):
            return {"r": "resume", "n": "new", "q": "fail"}[answer]


def _free(folder: Path) -> Path:
    """The first of folder-2, folder-3, ... that does not exist."""
    names = (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(2))
    return next(path for path in names if not path.exists())


def _refuse_another_experiment(cfg: Config, folder: Path) -> None:
    saved = folder / "config.toml"
    if not saved.exists():
        return
    try:
        before, now = as_table(load(saved)), as_table(cfg)
    except ValueError as error:
        raise ValueError(
            f"{error}. The run was started with this configuration, which an earlier version may "
            f"have taken, without effect: change it in {saved}, too, then resume"
        ) from error
    may_change = set(MAY_CHANGE)
    if seq_len(now) > seq_len(before):
        may_change.add("training.seq_len")
    if spec_of(cfg.phase).counts_rows:
        may_change -= set(ROWS_THAT_FIT)
    changed = differing(before, now, may_change)
    if changed:
        asks = any(name.startswith("eval.") for name in changed) and cfg.trains
        raise ValueError(
            f"{folder} was started with other values of {values(changed, before, now)}. A resumed "
            "run has to be the same experiment: change them back, or set on_existing_run = 'new'"
            f"{OTHER_QUESTIONS if asks else ''}"
        )


def differing(
    before: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str]
) -> list[str]:
    """`differences` but in these tables and keys."""
    names = differences(before, now)
    return [name for name in names if not {name, name.split(".")[0]} & set(may_change)]


def values(names: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Each name with its value in both; of parts in another order, their names."""

    def value(table: Any, name: str) -> str:
        for key in name.split("."):
            table = table.get(key) if isinstance(table, Mapping) else None
        ordered = name.split(".")[-1] == IN_ORDER and isinstance(table, Mapping)
        text = " before ".join(table) if ordered else repr(table)
        return text if len(text) <= LETTERS else f"{text[:LETTERS]}..."

    return ", ".join(f"{n} ({value(before, n)} then, {value(now, n)} now)" for n in names)


def seq_len(table: Mapping[str, Any]) -> int:
    """training.seq_len of a configuration as a table."""
    return table.get("training", {}).get("seq_len", SEQ_LEN)


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the keys whose values differ, tables key by key; a missing one is None. A table
    IN_ORDER differs as a whole where its common keys stand in another order.
    """
    out = []
    for key in sorted(set(a) | set(b)):
        x, y = ({} if table.get(key) is None else table[key] for table in (a, b))
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            if key == IN_ORDER and [k for k in x if k in y] != [k for k in y if k in x]:
                out.append(prefix + key)
            out += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            out.append(prefix + key)
    return out
