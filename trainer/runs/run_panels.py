"""Which curves the page of a run shows, and, where a run has not measured one, why.

A panel is one entry of PANELS: fields of the log on one axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .charts import Chart, Series, line_chart
from .run_log import Line, series

Table = Mapping[str, Any]  # the resolved configuration, as in the head of the log
Why = Callable[[Table], str]
START = "start"  # the word at the line of the first evaluation


@dataclass(frozen=True)
class PanelSpec:
    """fields: of the log -> its label in the legend. why: what to say where none was logged."""

    title: str
    unit: str
    fields: Mapping[str, str]
    why: Why


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    chart: Chart | None
    missing: str = ""  # why there is no chart
    parts: list[str] = field(default_factory=list)  # what else the panel says


def _no_step(cfg: Table) -> str:
    return "no step is finished yet"


def _task(cfg: Table) -> str:
    if not _value(cfg, "task", "name"):
        return "no task is named (task.name), so nothing is graded"
    if cfg.get("phase") == "distill" and not _value(cfg, "distill", "on_policy"):
        return "distill.on_policy = 0: only the student's own texts are graded while it learns"
    return _no_step(cfg)


def _cal(cfg: Table) -> str:
    if cfg.get("phase") != "calibrate":
        return f"phase = '{cfg.get('phase')}' has no calibration reward"
    if _value(cfg, "calibration", "mode") == "off":
        return "calibration.mode = 'off': eta is 0 and no proxy is loaded"
    return "no text of a step could be scored under the proxy yet"


def _kl(cfg: Table) -> str:
    if cfg.get("phase") == "calibrate":
        return "reference.beta = 0: no reference model is loaded"
    objective = _value(cfg, "distill", "objective")
    return f"distill.objective = '{objective}' compares no distributions"


def _entropy(cfg: Table) -> str:
    return "entropy is measured where the phase calibrates; distillation does not compute it"


def _groups(cfg: Table) -> str:
    if cfg.get("phase") != "calibrate":
        return "groups are graded where the phase calibrates"
    return _no_step(cfg)


PANELS: tuple[PanelSpec, ...] = (
    PanelSpec(
        "Task reward",
        "mean of the graded texts",
        {"reward/task": "reward", "accuracy": "correct"},
        _task,
    ),
    PanelSpec(
        "Calibration reward", "r_cal, mean of the scored texts", {"reward/cal": "r_cal"}, _cal
    ),
    PanelSpec(
        "KL",
        "nats per token",
        {
            "reference_kl": "to the reference model",
            "kl": "to the teacher",
            "span_gap": "gap of span likelihoods",
        },
        _kl,
    ),
    PanelSpec("Loss", "as optimised", {"loss": "loss", "nll": "negative log-likelihood"}, _no_step),
    PanelSpec("Entropy", "nats per token", {"entropy": "policy"}, _entropy),
    PanelSpec("Length", "tokens, mean", {"length": "texts"}, _no_step),
    PanelSpec(
        "Truncated",
        "fraction of the texts",
        {"truncated": "cut at rollout.max_tokens", "cal/unaligned": "unaligned"},
        _no_step,
    ),
    PanelSpec(
        "Groups",
        "fraction of the groups",
        {"groups/all_correct": "all correct", "groups/all_wrong": "all wrong"},
        _groups,
    ),
    PanelSpec("Gradient norm", "before clipping", {"grad_norm": "norm"}, _no_step),
    PanelSpec("Learning rate", "", {"lr": "rate"}, _no_step),
    PanelSpec("Throughput", "trained tokens per second", {"tokens_per_s": "tokens/s"}, _no_step),
    PanelSpec(
        "Seconds",
        "of each step",
        {"sample_s": "sampling", "score_s": "scoring", "step_s": "update"},
        _no_step,
    ),
    PanelSpec("Memory", "GiB, peak of the first rank", {"memory_gib": "memory"}, _no_step),
)


def training_panels(
    cfg: Table, steps: Sequence[Line], total: int, marks: Sequence[tuple[int, str]]
) -> list[Panel]:
    """One panel for each of PANELS. marks: (step, words) of alarms and guards."""
    return [_panel(spec, cfg, steps, total, marks) for spec in PANELS]


def _panel(
    spec: PanelSpec,
    cfg: Table,
    steps: Sequence[Line],
    total: int,
    marks: Sequence[tuple[int, str]],
) -> Panel:
    found = [Series(label, list(series(list(steps), key))) for key, label in spec.fields.items()]
    found = _merged([s for s in found if s.points])
    chart = line_chart(found, last_step=total, marks=marks) if found else None
    if chart is not None:
        return Panel(spec.title, spec.unit, chart)
    why = _no_step(cfg) if not steps else spec.why(cfg)
    if found:
        why = "every value is NaN or infinite"
    return Panel(spec.title, spec.unit, None, why)


def _merged(found: Sequence[Series]) -> list[Series]:
    """Fields of equal values are one line, so that none hides another."""
    labels: dict[tuple[tuple[float, float], ...], str] = {}
    for s in found:
        key = tuple(s.points)
        labels[key] = f"{labels[key]} = {s.label}" if key in labels else s.label
    return [Series(label, points) for points, label in labels.items()]


def evaluation_names(events: Sequence[Line]) -> list[str]:
    """Metrics that have an interval in the log: fields "eval/NAME" beside "eval/NAME_low"."""
    fields = dict.fromkeys(key for line in events for key in line if key.startswith("eval/"))
    return [
        name.removeprefix("eval/")
        for name in fields
        if f"{name}_low" in fields and not name.endswith(("_difference", "_change"))
    ]


def evaluation_panels(events: Sequence[Line], total: int) -> list[Panel]:
    """One panel for each metric with an interval, where there were at least two evaluations; the
    dashed line is the first one's value.
    """
    panels = []
    for name in evaluation_names(events):
        points = list(series(list(events), f"eval/{name}"))
        if len(points) < 2:
            continue
        low, high = (_column(events, f"eval/{name}", f"eval/{name}_{e}") for e in ("low", "high"))
        chart = line_chart(
            [Series(name, points, low, high)], last_step=total, rules=[(points[0][1], START)]
        )
        panels.append(Panel(name, "mean, 95 % interval over prompts", chart, "no finite value"))
    return panels


def _column(events: Sequence[Line], of: str, name: str) -> list[float]:
    """Of the lines that have the number `of`; NaN where `name` is missing."""
    with_it = [line for line in events if list(series([line], of))]
    return [next((v for _, v in series([line], name)), float("nan")) for line in with_it]


def _value(cfg: Table, section: str, key: str) -> Any:
    table = cfg.get(section)
    return table.get(key) if isinstance(table, Mapping) else None
