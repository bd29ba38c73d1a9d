"""report.html of a run folder: one standalone page, no script, nothing from elsewhere. What a run
of any phase was, how it went and how it ended; run_page.html.jinja lays it out.
"""

import base64
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.trainer.config.schema import Config

from .charts import number
from .evaluation_bars import evaluation_bars
from .files import write_whole
from .logger import RESERVED
from .progress import duration, moment
from .run_log import Line, RunLog, parsed, series, sources_of
from .run_panels import evaluation_panels, training_panels

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT = "report.html"
PARTIAL = f".{os.getpid()}.partial"  # a follower and the run itself may write at once
TEMPLATE = "run_page.html.jinja"
REFRESH_S = 15  # of a page on a run that goes on, written by a follower
SHOWN_ANSWERS = 4  # of an evaluation, correct and wrong ones each
MOST_ANSWERS_READ = 400
FULL_COLOUR = 0.5  # opacity
MOST_TEXT = 6000  # characters of a prompt or text; the middle of a longer one is left out
MOST_IMAGE = 600_000  # bytes of a picture that goes into the page
IMAGES = {
    "tail.png": "How the token KL builds up over the classes",
    "types.png": "Which tokens carry the KL",
    "positions.png": "KL along the texts",
}
FILES = {  # beside the page -> what it is
    "report.md": "the report as text",
    "heatmap.html": "texts, token by token",
    "evaluation.json": "every number of the evaluation",
    "diagnosis.json": "every number of the diagnosis",
    "run.jsonl": "the log",
    "samples.jsonl": "sampled texts",
    "questions.jsonl": "questions of the evaluation, the first 400",
    "config.toml": "the resolved configuration",
    "code.diff": "uncommitted changes of the code",
    "console.log": "what the process printed",
}
PHASES = {
    "calibrate": "Calibration",
    "distill": "Distillation",
    "evaluate": "Evaluation",
    "diagnose": "Diagnosis",
    "cache": "Cache of teacher rows",
}
EXIT_WORDS = {
    0: "ended as planned",
    3: "ended; an acceptance rule does not hold",
    4: "ended by a guard",
}
PRESENT = {True: "detected", False: "not detected", None: "inconclusive"}
TOLD = ("alarm", "stopped", "failed", "interrupted", "log_incomplete", "checkpoint", "data")
HIDDEN = ("head", "directory", "event", "step", "wall_s", "message", "alarm", "reason", "error")


@dataclass(frozen=True)
class Status:
    word: str  # running | done | stopped | interrupted | failed
    reason: str


@dataclass(frozen=True)
class Told:
    """An alarm, a guard's action or another event, in words."""

    kind: str
    step: int
    after: str
    words: str


@dataclass(frozen=True)
class SpanCell:
    text: str
    sign: str  # plus | minus | none
    opacity: str
    numbers: str


@dataclass(frozen=True)
class SampleView:
    head: str
    prompt: str
    text: str  # empty where there are spans
    spans: list[SpanCell]
    answer: str
    notes: list[str]


def write_run_page(log: RunLog, *, refresh: bool = False) -> Path:
    """Writes report.html into the folder of the log, which has been read (RunLog.refresh). Whole or
    not at all. refresh: while the run goes on a browser reads the page anew.
    """
    path = log.folder / REPORT
    write_whole(path, render_run_page(log, refresh=refresh), partial=PARTIAL)
    return path


def render_run_page(log: RunLog, *, refresh: bool = False) -> str:
    """HTML."""
    head, steps, events = log.head, log.steps, log.events
    cfg = head.get("config")
    cfg = cfg if isinstance(cfg, Mapping) else {}
    state, total = status(log), _total(log)
    told = [_told(e) for e in events if e["event"] in TOLD]
    marks = [(t.step, t.words) for t in told if t.kind in ("alarm", "stopped")]
    evaluations = [e for e in events if e["event"] == "eval"]
    trains = bool(steps) or cfg.get("phase") in ("calibrate", "distill")
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            title=f"{PHASES.get(str(cfg.get('phase')), 'Run')}: {log.folder.resolve().name}",
            what=_what(cfg),
            state=state,
            facts=_facts(log, total),
            told=told,
            panels=training_panels(cfg, steps, total, marks) if trains else [],
            eval_panels=evaluation_panels(evaluations, total),
            bars=evaluation_bars(cfg, evaluations),
            evaluates=cfg.get("phase") not in ("diagnose", "cache"),
            eval_missing=_no_evaluation(cfg, evaluations),
            eval_numbers=_numbers(evaluations[-1:]),
            accept=_accept(events),
            verdict=verdict_rows(log.folder),
            pictures=pictures(log.folder, IMAGES) if cfg.get("phase") == "diagnose" else [],
            samples=_samples(log.samples or _answers(log.folder)),
            several_proxies=bool((cfg.get("calibration") or {}).get("proxies")),
            samples_missing=_no_samples(cfg, trains),
            step_numbers=_numbers(steps),
            config=_config(cfg),
            provenance=_provenance(head),
            inputs=_inputs(head.get("inputs")),
            files={n: w for n, w in FILES.items() if (log.folder / n).is_file()},
            damaged=log.damaged,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            refresh=REFRESH_S if refresh and state.word == "running" else 0,
        )
    )


@cache
def environment() -> "Environment":
    """Of the page templates; everything that a run wrote is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


# --- how it went


def status(log: RunLog) -> Status:
    """How the run stands or ended, in words. A run without a summary may have been killed."""
    ends = [e for e in log.events if e["event"] in ("interrupted", "failed", "resume", "stopped")]
    last = ends[-1] if ends else {}
    if log.summary is not None:
        code = log.summary.get("exit_code", 0)
        words = EXIT_WORDS.get(code, f"ended with exit code {code}")
        stopped = log.summary.get("stopped")
        word = "stopped" if code in (3, 4) else "done"
        return Status(word, f"{words}: {stopped}" if stopped else words)
    if last.get("event") == "interrupted":
        return Status("interrupted", "a signal stopped it; its last step is saved")
    if last.get("event") == "failed":
        return Status("failed", str(last.get("error", "")))
    return Status("running", _silence(log.written))


def _silence(written: float | None) -> str:
    if written is None:
        return "no log yet"
    return (
        f"no end is recorded; the last line of the log is {duration(max(time.time() - written, 0))}"
        " older than this page. A killed process leaves no more than that"
    )


def _told(e: Line) -> Told:
    words = e.get("message") or e.get("reason") or e.get("error") or ""
    if e["event"] == "stopped":
        back = e.get("restored_step")
        words += "." + (
            f" The weights went back to those of step {back}, which are the export"
            if back is not None
            else " The weights of this step are kept"
        )
    more = [f"{k} {_word(v)}" for k, v in e.items() if k not in HIDDEN and k != "restored_step"]
    step = e["step"] if isinstance(e.get("step"), int) else 0
    return Told(str(e["event"]), step, _after(e), "; ".join(x for x in (str(words), *more) if x))


def _after(line: Line) -> str:
    wall = line.get("wall_s")
    return duration(wall) if isinstance(wall, int | float) and math.isfinite(wall) else ""


def _total(log: RunLog) -> int:
    cfg = log.head.get("config")
    total = cfg.get("steps", 0) if isinstance(cfg, Mapping) else 0
    return total if isinstance(total, int) and log.steps else 0


def _what(cfg: Mapping[str, Any]) -> str:
    """One sentence on what was run."""

    def path(section: str) -> str:
        return str((cfg.get(section) or {}).get("path", ""))

    model, teacher, phase = path("model"), path("teacher"), cfg.get("phase")
    calibration, data = cfg.get("calibration") or {}, sources_of(cfg, "data")
    if phase == "calibrate":
        mode = calibration.get("mode", "off")
        how = "task reward only" if mode == "off" else f"{mode}, against the proxy {path('proxy')}"
        return f"The teacher {model}, trained by reinforcement on {data}: {how}."
    if phase == "distill":
        source = f"the teacher {teacher}" if teacher else "given texts"
        return f"The student {model} learns from {source}, on {data}."
    if phase == "diagnose":
        return f"The student {model} and the teacher {teacher}, compared on {data}."
    if phase == "evaluate":
        return f"The model {model}, on {sources_of(cfg, 'eval')}."
    return f"The model {model}."


def _facts(log: RunLog, total: int) -> list[tuple[str, str]]:
    head, steps = log.head, log.steps
    last = (log.summary or (steps or log.events or [{}])[-1]).get("wall_s", 0.0)
    done = f"{steps[-1]['step']} of {total}" if steps else "none"
    rows = [
        ("started", moment(head.get("started"))),
        ("running time", duration(last) if isinstance(last, int | float) else "unknown"),
        *((("steps", done),) if total else ()),
        ("device", f"{head.get('device', 'unknown')}, {head.get('ranks', '?')} rank(s)"),
    ]
    return rows


# --- evaluation and verdicts


def _float(x: Any) -> float:
    return float(x) if isinstance(x, int | float) else math.nan


def _no_evaluation(cfg: Mapping[str, Any], evaluations: Sequence[Line]) -> str:
    if evaluations:
        return ""
    if not sources_of(cfg, "eval"):
        return "eval.source is empty, so nothing is held out"
    return "no evaluation has been due yet (eval.every, eval.at_start)"


def _accept(events: Sequence[Line]) -> list[tuple[str, str]]:
    verdicts = [e for e in events if e["event"] == "accept"]
    return [
        (key.removeprefix("accept/"), str(words))
        for key, words in (verdicts[-1] if verdicts else {}).items()
        if key.startswith("accept/")
    ]


def verdict_rows(folder: Path) -> list[tuple[str, str, str, str]]:
    """(trap, found or not, what was measured, what to do) of a diagnosis."""
    try:
        traps = json.loads((folder / "diagnosis.json").read_text())["verdict"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [
        (str(t["trap"]), _present(t), _measured(t), str(t["advice"])) for t in traps if "trap" in t
    ]


def _present(trap: Mapping[str, Any]) -> str:
    return "not measured" if trap.get("mean") is None else PRESENT[trap.get("present")]


def _measured(trap: Mapping[str, Any]) -> str:
    mean, low, high = (_float(trap.get(key)) for key in ("mean", "low", "high"))
    if math.isnan(mean):
        return str(trap.get("measure", ""))
    interval = f" [{low:.3f}, {high:.3f}]" if math.isfinite(low + high) else " (no interval)"
    return f"{trap.get('measure')}: {mean:.3f}{interval}; healthy {trap.get('reference')}"


def pictures(folder: Path, images: Mapping[str, str]) -> list[tuple[str, str]]:
    """Of `images`, file -> title, those that are there: (title, the PNG as a data address), so that
    the page stays whole when it is moved.
    """
    found = []
    for name, title in images.items():
        try:
            data = (folder / name).read_bytes()
        except OSError:
            continue
        if len(data) <= MOST_IMAGE:
            found.append((title, f"data:image/png;base64,{base64.b64encode(data).decode()}"))
    return found


# --- samples


def _samples(lines: Sequence[Line]) -> list[SampleView]:
    sizes = sorted(abs(v) for line in lines for _, v in _spans(line) if v is not None)
    top = sizes[math.ceil(0.99 * (len(sizes) - 1))] if sizes else 0.0
    return [_sample(line, top or 1.0) for line in lines]


def _answers(folder: Path) -> list[Line]:
    """Some generated answers of the last evaluation, with their questions where those are kept."""
    files = sorted((folder / "predictions").glob("step-*.jsonl"), key=lambda p: p.stat().st_mtime)
    if not files:
        return []
    lines = (parsed(text) for text in islice(files[-1].open("rb"), MOST_ANSWERS_READ))
    found = [line for line in lines if line and "text" in line]
    by_grade = {
        correct: [x for x in found if x.get("correct") is correct] for correct in (True, False)
    }
    chosen = by_grade[True][:SHOWN_ANSWERS] + by_grade[False][:SHOWN_ANSWERS]
    asked = _questions(folder / "questions.jsonl")

    def question(number: Any) -> str:
        return asked.get(number, f"number {number} of eval.source")

    return [
        {**x, "prompt": question(x.get("prompt")), "step": x.get("mode")}
        for x in chosen or found[:SHOWN_ANSWERS]
    ]


def _questions(file: Path) -> dict[Any, str]:
    """Number of a prompt -> its text; empty in folders of older versions."""
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return {x.get("prompt"): str(x.get("text")) for x in map(parsed, lines) if x}


def _spans(line: Line) -> Iterator[tuple[str, float | None]]:
    spans = line.get("spans")
    for entry in spans if isinstance(spans, list) else ():
        if isinstance(entry, list) and len(entry) == 2:
            value = _float(entry[1])
            yield str(entry[0]), value if math.isfinite(value) else None


def _sample(line: Line, top: float) -> SampleView:
    spans = [_cell(text, value, top) for text, value in _spans(line)]
    correct = line.get("correct")
    grade = ("correct" if correct else "wrong") if isinstance(correct, bool) else ""
    step = line.get("step", "?")
    parts = [f"step {step}" if isinstance(step, int) else str(step), grade]
    if "reward" in line:
        parts.append(f"task reward {_word(line['reward'])}")
    if "r_cal" in line:
        parts.append(f"r_cal {_word(line['r_cal'])}")
    parts.append(str(line.get("sampled_by", "")) and f"by the {line['sampled_by']}")
    notes = ["cut at the length limit"] if line.get("ended") is False else []
    if line.get("spans_left_out"):
        notes.append(f"{line['spans_left_out']} more spans are not in the log")
    if line.get("not_scored"):
        notes.append(f"no r_cal: {line['not_scored']}")
    if line.get("grader_error"):
        notes.append(f"the grader failed: {line['grader_error']}")
    if "extracted" in line:
        notes.append(f"the grader took {line['extracted']!r} for the answer")
    return SampleView(
        head=", ".join(p for p in parts if p),
        prompt=_shortened(line.get("prompt")),
        text="" if spans else _shortened(line.get("text")),
        spans=spans,
        answer=_shortened(line.get("answer")),
        notes=notes,
    )


def _cell(text: str, value: float | None, top: float) -> SpanCell:
    if value is None:
        return SpanCell(text, "none", "0", f"{text!r}: no r_cal")
    opacity = FULL_COLOUR * min(abs(value) / top, 1.0)
    words = f"{text!r}: {value:+.3f} nats"
    return SpanCell(text, "plus" if value > 0 else "minus", f"{opacity:.3f}", words)


def _shortened(text: Any) -> str:
    text = "" if text is None else str(text)
    if len(text) <= MOST_TEXT:
        return text
    half = MOST_TEXT // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


def _no_samples(cfg: Mapping[str, Any], trains: bool) -> str:
    if not trains:
        return "the phase trains nothing; the answers are in predictions/ or tokens.jsonl"
    every = (cfg.get("log") or {}).get("samples_every", 0)
    return (
        f"log.samples_every = {every}: none is due yet" if every else "log.samples_every = 0: never"
    )


# --- tables


def _numbers(lines: Sequence[Line]) -> list[tuple[str, str, str, str, str]]:
    """(field, first, last, smallest, largest) of every number that was logged."""
    names = dict.fromkeys(key for line in lines for key in line if key not in RESERVED)
    rows = []
    for name in sorted(names):
        values = [v for _, v in series(list(lines), name)]
        if values:
            finite = [v for v in values if math.isfinite(v)] or [math.nan]
            first, last = number(values[0]), number(values[-1])
            rows.append((name, first, last, number(min(finite)), number(max(finite))))
    return rows


def _config(cfg: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(key, value, differs from the default) of every option, those that differ first."""
    default = dict(_flat(_defaults()))
    rows = [(key, _word(v), key not in default or default[key] != v) for key, v in _flat(cfg)]
    return sorted(rows, key=lambda row: not row[2])


@cache
def _defaults() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(Config):
        if is_dataclass(f.default) and not isinstance(f.default, type):
            found[f.name] = json.loads(json.dumps(asdict(f.default), default=str))
        elif isinstance(f.default, str | int | float):
            found[f.name] = f.default
    return found


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _provenance(head: Line) -> list[tuple[str, str]]:
    code = head.get("code") or {}
    commit = str(code.get("commit") or "not from a checkout")
    if code.get("dirty"):
        commit += " with uncommitted changes (code.diff)"
    rows = [("command", " ".join(map(str, head.get("command", [])))), ("commit", commit)]
    seeds = head.get("seeds") or {}
    named = [f"{k} {v}" for k, v in seeds.items()] if isinstance(seeds, Mapping) else [_word(seeds)]
    rows += [("seeds", ", ".join(named))]
    versions = head.get("versions") or {}
    return rows + [(name, str(v or "not installed")) for name, v in versions.items()]


def _inputs(inputs: Any) -> list[tuple[str, str, str, str]]:
    """(role, path, file, SHA-256)."""
    rows = []
    for role, entry in (inputs if isinstance(inputs, Mapping) else {}).items():
        files = entry.get("files") if isinstance(entry, Mapping) else None
        path = str(entry.get("path", "")) if isinstance(entry, Mapping) else ""
        for name, digest in (files or {"": ""}).items():
            rows.append((str(role), path, str(name), str(digest)))
    return rows


def _word(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
