"""What a run leaves behind, and what it prints.

  run.jsonl      a head line {"schema", "config", "command", "code", "versions", "inputs", ...},
                 then one line a step {"step", "wall_s", metrics...} and one an event {"event",
                 "step", "wall_s", ...}, appended and flushed
  samples.jsonl  rollouts of every samples_every-th step
  report.html    a page of all that, with log.report (watch.py)
  code.diff      uncommitted changes of the code, if there were any
  summary.json   exists iff the run ended cleanly
JSON has no NaN: the strings "NaN", "Infinity" and "-Infinity" stand for them, and load_run reads
them back.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .console import LOG, event_lines, plain, shorten_sample, step_line
from .files import named, read_object, write_whole
from .lock import LockLost
from .progress import stdout_console, time_left

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

SCHEMA = 1
PAGE_EVENTS = ("eval", "accept", "alarm", "stopped")
RESERVED = ("step", "wall_s", "event", "schema")
PACKAGES = ("reflux-llm", "torch", "transformers", "triton", "torchtitan", "datasets", "numpy")
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Run:
    """A run folder, read. Steps are in order; events and steps hold their `step` and `wall_s`."""

    head: dict[str, Any]
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any] | None  # None: still running, or it did not end cleanly


def load_run(folder: str | Path) -> Run:
    """A run folder. A torn last line, of a process that was killed or still writes, is left out;
    ValueError for any other.
    """
    path = Path(folder) / LOG
    if not path.is_file():
        raise ValueError(f"{folder}: no run.jsonl; want the folder of a run")
    lines = list(_read_lines(path))
    if not lines or "schema" not in lines[0]:
        raise ValueError(f"{path}: the first line is no head; want the log of a run")
    return Run(
        head=lines[0],
        steps=[line for line in lines[1:] if "event" not in line],
        events=[line for line in lines if "event" in line],
        summary=read_object(Path(folder) / "summary.json"),
    )


@dataclass(kw_only=True)
class Record:
    """`with Record(folder=..., ...) as record: record(step, metrics, samples)`, on every rank; only
    the main one writes.

    resumed_step: of the checkpoint this process starts from, 0 for none. Lines of later steps,
    which no checkpoint has, are cut, so that the log has one line a step.
    samples_every: steps between saved samples; 0: never. inputs: hashes of what the run reads.
    on_numbers: called with (step, numbers) of each step and evaluation on the main rank, for an
    experiment tracker; an exception of it is only logged. write_page: called after PAGE_EVENTS and
    at the end, and never raises.
    """

    folder: str | Path
    config: Mapping[str, Any]
    command: Sequence[str]
    total_steps: int
    samples_every: int
    resumed_step: int = 0
    is_main: bool = True
    quiet: bool = False
    inputs: Mapping[str, Any] = field(default_factory=dict)
    on_numbers: Callable[[int, Mapping[str, Any]], None] | None = None
    write_page: Callable[[], None] | None = None

    # set where a run is interrupted: then there is no summary.json
    to_be_continued: bool = field(default=False, init=False)
    exit_code: int = field(default=0, init=False)  # of the process, and a guard's reason to end the
    stopped: str | None = field(default=None, init=False)  # run: both for summary.json
    # of the last step, and every alarm by its message: also those of an earlier process of this run
    last_metrics: dict[str, Any] = field(default_factory=dict, init=False)
    alarms: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    last_evaluation: dict[str, Any] = field(default_factory=dict, init=False)  # and its step

    _step: int = field(default=0, init=False)
    _events: Counter[str] = field(default_factory=Counter, init=False)
    # seconds of each of the last steps
    _last_s: deque[float] = field(default_factory=lambda: deque(maxlen=20), init=False)
    _console: "Console | None" = field(default=None, init=False)

    def __enter__(self) -> "Record":
        self._step = self.resumed_step
        self._started = self._stepped = time.monotonic()
        if self.is_main:
            self._open(Path(self.folder))
        return self

    def __call__(
        self,
        step: int,
        metrics: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Logs one step. Metrics are numbers or text; zero-dimensional tensors and arrays are read
        (a device sync). ValueError for a step out of order and for a metric named like a field of
        the log.
        """
        if step <= self._step:
            raise ValueError(
                f"record: step {step} after step {self._step}; want one line a step, in order"
            )
        if clash := set(metrics) & set(RESERVED):
            raise ValueError(
                f"record: metrics named {', '.join(sorted(clash))}; these names belong to the log"
            )
        self._step = step
        if not self.is_main:
            return
        now = time.monotonic()
        self._last_s.append(now - self._stepped)
        self._stepped = now
        metrics = {name: plain(value) for name, value in metrics.items()}
        self._write(self._log, {"step": step, "wall_s": self._wall_s(), **metrics})
        self.last_metrics = metrics
        left = time_left(self._last_s, self.total_steps - step)
        self._print(step_line(step, self.total_steps, metrics, left))
        self._forward(step, metrics)
        if samples and self.samples_every and step % self.samples_every == 0:
            for sample in samples:
                self._write(self._samples, {"step": step, **sample})
            for sample in samples[:2]:
                self._print(shorten_sample(sample))

    def event(self, name: str, **fields: Any) -> None:
        """Logs a guard, an evaluation, an export, ...; of the last step unless `step` is given."""
        if not self.is_main:
            return
        self._events[name] += 1
        at = {"step": self._step, "wall_s": self._wall_s()}
        if name == "alarm":
            self.alarms[fields["message"]] = at | fields
        if name == "eval":
            self.last_evaluation = at | fields
            numbers = {k: plain(v) for k, v in fields.items() if k not in RESERVED}
            self._forward(self.last_evaluation["step"], numbers)
        self._write(self._log, {"event": name, **at, **fields})
        phase = self.config.get("phase", "")
        self._print("\n".join(event_lines(name, at["step"], fields, phase, str(self.folder))))
        if self.write_page and name in PAGE_EVENTS:
            self.write_page()

    def metrics_at(self, step: int) -> Mapping[str, Any]:
        """Of the line of this step; empty for step 0 and on other ranks than the main one."""
        if step == self._step or not self.is_main:
            return self.last_metrics
        lines = (line for line in load_run(self.folder).steps if line["step"] == step)
        return {k: v for line in lines for k, v in line.items() if k not in RESERVED}

    @property
    def console(self) -> "Console | None":
        """Where lines are printed; None on other ranks and in quiet runs."""
        return self._console

    def __exit__(self, kind, error, _) -> None:
        if not self.is_main:
            return
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._close(kind, error)
        if kind is None and not self.to_be_continued:
            summary = {
                "schema": SCHEMA,
                "step": self._step,
                "total_steps": self.total_steps,
                "wall_s": self._wall_s(),
                "ended": _now(),
                "exit_code": self.exit_code,
                "stopped": self.stopped,
                "events": dict(self._events),
                "last": self.last_metrics,
            }
            write_whole(Path(self.folder) / "summary.json", _dump(summary))
        if self.write_page and not (kind and issubclass(kind, LockLost)):
            self.write_page()

    def _close(self, kind: type[BaseException] | None, error: BaseException | None) -> None:
        """May raise OSError on a full disk; the files are closed all the same."""
        with self._log, self._samples:
            if kind is not None and not issubclass(kind, LockLost):  # then the log is another run's
                self.event("failed", error=f"{kind.__name__}: {error}"[:1000])

    def _open(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)  # of an earlier end of this run
        if not self.quiet:
            self._console = stdout_console()
        before, cut = _cut(folder / LOG, self.resumed_step)
        _cut(folder / "samples.jsonl", self.resumed_step)
        self._log = open(folder / LOG, "ab")
        self._samples = open(folder / "samples.jsonl", "ab")
        self._take_over(before)
        self._before_s = max((line.get("wall_s", 0.0) for line in before), default=0.0)
        self._events.update(line["event"] for line in before if "event" in line)
        head = _head(self.config, self.command, folder) | {"inputs": self.inputs}
        if not before:
            self._write(self._log, head)
        if before or self.resumed_step:
            self.event("resume", lines_cut=cut, **({"head": head} if before else {}))
        if gaps := _missing_steps(before, self.resumed_step):
            self.event("log_incomplete", message=_lost_lines(folder / LOG, gaps, self.resumed_step))

    def _take_over(self, before: Sequence[Mapping[str, Any]]) -> None:
        """What the end of the run says of steps that an earlier process made."""
        for line in before:
            if line.get("event") == "alarm":
                self.alarms[line["message"]] = dict(line)
            elif line.get("event") == "eval":
                self.last_evaluation = dict(line)
            elif not {"event", "schema"} & line.keys():
                self.last_metrics = {k: v for k, v in line.items() if k not in RESERVED}

    def _wall_s(self) -> float:
        return self._before_s + time.monotonic() - self._started

    def _write(self, file: BinaryIO, line: Mapping[str, Any]) -> None:
        with named(file.name):
            file.write(_dump(line).encode() + b"\n")
            file.flush()  # the system has the whole line, should this process be killed

    def _forward(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self.on_numbers:
            numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
            try:
                self.on_numbers(step, numbers)
            except Exception as error:  # a tracker that is down must not end the run
                kind = type(error).__name__
                log.warning("on_numbers failed at step %d: %s: %s", step, kind, error)

    def _print(self, text: str) -> None:
        if self._console:
            self._console.print(text)


# --- the head


def _head(config: Mapping[str, Any], command: Sequence[str], folder: Path) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"cpu {platform.machine()}"
    code, diff = _code_state()
    if diff:
        write_whole(folder / "code.diff", diff)
    return {
        "schema": SCHEMA,
        "started": _now(),
        "command": list(command),
        "code": code,
        "versions": _versions() | {"torch": str(torch.__version__)},  # with its build: +cpu, +cu130
        "device": device,
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "seeds": {"config": config.get("seed"), "torch": torch.initial_seed()},
        "config": config,
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _code_state() -> tuple[dict[str, Any] | None, str]:
    """The commit this file was run from and its uncommitted changes; None where it is no tracked
    file.
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *words],
            check=True,
            capture_output=True,
            timeout=20,
            text=True,
            errors="replace",
        ).stdout

    try:
        # site-packages may lie inside somebody's checkout
        git("ls-files", "--error-unmatch", here.name)
        diff = git("diff", "HEAD")
        commit = git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.SubprocessError):
        return None, ""
    return {
        "commit": commit,
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
    }, diff


# --- lines and files


def _cut(path: Path, last_step: int) -> tuple[list[dict], int]:
    """Cuts lines after `last_step` and a torn end, in one rename. Returns the lines that stay, and
    how many were cut.
    """
    if not path.exists():
        return [], 0
    lines = list(_read_lines(path))
    if lines and path.name == LOG and "schema" not in lines[0]:
        raise ValueError(
            f"{path}: the first line is no head, so this is not the log of a run. Nothing was "
            "changed. Put the file back, or move it away: the run then starts a new log"
        )
    stay = [line for line in lines if line.get("step", 0) <= last_step]
    write_whole(path, "".join(_dump(line) + "\n" for line in stay))
    return stay, len(lines) - len(stay)


def _missing_steps(lines: Sequence[Mapping[str, Any]], last: int) -> list[tuple[int, int]]:
    """Ranges of steps 1 ... last that have no line."""
    there = {line["step"] for line in lines if not {"event", "schema"} & line.keys()}
    gaps: list[tuple[int, int]] = []
    for step in (n for n in range(1, last + 1) if n not in there):
        if gaps and gaps[-1][1] == step - 1:
            gaps[-1] = gaps[-1][0], step
        else:
            gaps.append((step, step))
    return gaps


def _lost_lines(path: Path, gaps: Sequence[tuple[int, int]], last: int) -> str:
    words = [str(a) if a == b else f"{a} to {b}" for a, b in gaps[:5]]
    count = sum(b - a + 1 for a, b in gaps)
    more = f" and {len(gaps) - 5} more ranges" if len(gaps) > 5 else ""
    return (
        f"{path} has no line of step {', '.join(words)}{more}, though the run goes on from the "
        f"checkpoint of step {last}: {count} of {last} lines were lost, by an edit or a cut file. "
        "The weights are not touched by that; reports on this run lack these steps. To have them, "
        "put the whole file back and resume"
    )


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    # what follows the last newline is torn, or nothing
    for number, line in enumerate(lines[:-1], 1):
        try:
            yield {
                key: NOT_FINITE.get(value, value) if isinstance(value, str) else value
                for key, value in json.loads(line).items()
            }
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: {line[:60]!r} is no JSON object ({error}); "
                "delete the line to go on without it"
            ) from None


def _dump(line: Mapping[str, Any]) -> str:
    return json.dumps(_finite(line), ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    value = plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    # UTF-8 has no half surrogates
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
