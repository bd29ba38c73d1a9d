"""The log of a run as a reader meets it: still written, torn, or damaged. What cannot be read is
counted and left out; load_run (logger.py) is the strict reader of finished runs.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .logger import LOG, NOT_FINITE

SAMPLES = "samples.jsonl"
KEPT_SAMPLES = 24  # of the last lines
TEXTS = frozenset(("text", "prompt", "answer", "extracted"))  # a text "NaN" is no number

Line = Mapping[str, Any]


@dataclass
class LogTail:
    """The lines of one growing JSONL file. `read` parses what came since the last call; a file that
    was replaced or cut, as a resume does, is read anew.
    """

    path: Path
    lines: list[Line] = field(default_factory=list)
    damaged: int = 0  # whole lines that hold no JSON object

    _offset: int = field(default=0, init=False)
    _inode: int = field(default=0, init=False)

    def read(self) -> bool:
        """Whether there is anything new. A last line without its end waits for the next call."""
        try:
            state = os.stat(self.path)
        except FileNotFoundError:
            return False
        if state.st_ino != self._inode or state.st_size < self._offset:
            self.lines, self.damaged, self._offset = [], 0, 0
            self._inode = state.st_ino
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for text in whole.splitlines():
            self._add(text)
        return bool(whole)

    def _add(self, text: bytes) -> None:
        line = parsed(text)
        if line is None:
            self.damaged += bool(text.strip())
        else:
            self.lines.append(line)


@dataclass
class RunLog:
    """A run folder, read leniently: `refresh`, then the rest. Steps are in order; events and steps
    hold their `step`.
    """

    folder: Path

    def __post_init__(self) -> None:
        self._log, self._samples = LogTail(self.folder / LOG), LogTail(self.folder / SAMPLES)

    def refresh(self) -> bool:
        """Reads on. Whether there is anything new, the summary included."""
        before = self.summary
        news = [self._log.read(), self._samples.read()]
        del self._samples.lines[:-KEPT_SAMPLES]
        self.summary = _object(self.folder / "summary.json")
        return any(news) or self.summary != before

    summary: Line | None = field(default=None, init=False)

    @property
    def head(self) -> Line:
        """Of the last process of the run; empty where its line is damaged."""
        heads = (line.get("head", line) for line in self._log.lines)
        found = [h for h in heads if isinstance(h, Mapping) and "schema" in h]
        return found[-1] if found else {}

    @property
    def steps(self) -> list[Line]:
        return [x for x in self._log.lines if "event" not in x and isinstance(x.get("step"), int)]

    @property
    def events(self) -> list[Line]:
        return [x for x in self._log.lines if "event" in x]

    @property
    def samples(self) -> list[Line]:
        """Of the last steps that have any, the newest first, each step in its own order."""
        return sorted(self._samples.lines, key=lambda line: -_int(line.get("step")))

    @property
    def damaged(self) -> int:
        return self._log.damaged + self._samples.damaged

    @property
    def written(self) -> float | None:
        """When the log was last written, seconds since 1970."""
        try:
            return (self.folder / LOG).stat().st_mtime
        except OSError:
            return None


def series(lines: list[Line], name: str) -> Iterator[tuple[int, float]]:
    """(step, value) of a numeric field, NaN and infinities included, where a line has it."""
    for line in lines:
        value = line.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield _int(line.get("step")), float(value)


def _int(x: Any) -> int:
    return x if isinstance(x, int) else 0


def parsed(text: bytes) -> Line | None:
    """A line as an object; None where it is none."""
    try:
        line = json.loads(text, parse_constant=_constant)
    except ValueError:
        return None
    if not isinstance(line, dict):
        return None
    return {
        k: NOT_FINITE.get(v, v) if isinstance(v, str) and k not in TEXTS else v
        for k, v in line.items()
    }


def sources_of(cfg: Mapping[str, Any], table: str) -> str:
    """What a configuration in a log names as sources of [data] or [eval], those of parts too."""
    section = cfg.get(table) or {}
    parts = (section.get("parts") or {}).values()
    given = [source for s in (parts or [section]) if (source := s.get("source"))]
    return ", ".join(x if isinstance(x, str) else ", ".join(x) for x in given)


def _constant(name: str) -> float:
    return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}[name]


def _object(path: Path) -> Line | None:
    """A JSON file that holds one object; None while it is not there or not whole."""
    try:
        return parsed(path.read_bytes())
    except OSError:
        return None
