"""The diagnoses of a matrix folder side by side, before and after distillation: one column a
teacher-student pair, estimates over seeds. A pair that the matrix names and no seed has finished,
such as the control (eta = 0), stays a column: not run. Where a cell names its control (label
`control`: the control's pair), a second table has the differences to it, paired by seed: only these
are attributed to calibration.

    python -m reflux.trainer.studies.diagnosis_table FOLDER

for a matrix whose diagnoses carry a label `pair`, like configs/diagnoses.toml.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from reflux.trainer.runs.files import read_object, to_json, write_json
from reflux.trainer.runs.markdown_table import (
    interval,
    mean_and_std,
    render_template,
    with_interval,
)
from reflux.trainer.runs.stats import Estimate, over_seeds

from .labels import refuse_shared_places
from .report_command import print_report
from .run_warnings import as_markdown, run_warnings

TEMPLATE = Path(__file__).with_name("diagnoses.md.jinja")
NOT_RUN = "not run"
Diagnosis = Mapping[str, Any]  # a diagnosis.json
Number = Callable[[Diagnosis], float | None]
# title of a row -> the keys that lead to its number in a diagnosis.json
MEASURES = {
    "forward KL, teacher's prefixes, nats/token": "grid forward teacher per_token mean",
    "reverse KL, student's prefixes, nats/token": "grid reverse student per_token mean",
    "KL on student / on teacher prefixes, forward": "off_policy prefix_ratio forward mean",
    "KL on student / on teacher prefixes, reverse": "off_policy prefix_ratio reverse mean",
    "wrong-trace preference": "gap wrong_trace pair mean",
    "pull towards wrong texts, nats/byte": "gap wrong_trace pull mean",
    "reverse KL on wrong / on correct texts": "gap degraded_prefix",
    "teacher mass in the student's top K": "gap teachable mean",
    "wrong with confidence >= 0.9": "symptoms confidence confident_wrong",
    "wrong with >= 0.9 of the votes": "symptoms vote_confidence confident_wrong",
    "recovery after an inserted error": "symptoms correction recovery",
    "correct after half of an own wrong text": "symptoms own_error correct_after mean",
    "repeated 4-grams": "symptoms repeated_4grams",
    "finished texts without an answer": "symptoms format_breaks",
}


@dataclass(frozen=True)
class DiagnosisRow:
    """One measure of all pairs, over the seeds that have it."""

    measure: str
    pairs: Mapping[str, Estimate]
    # pair -> seeds in which the trap was detected; empty where the measure decides no trap
    detected: Mapping[str, int] = field(default_factory=dict)
    undecided: Mapping[str, int] = field(default_factory=dict)  # seeds without an interval
    # pair -> seeds that were diagnosed, whether they have the number or not
    seeds: Mapping[str, int] = field(default_factory=dict)

    def cell(self, pair: str) -> str:
        """The interval is over seeds; (k of n): detected in k of n by each seed's own interval,
        which some may lack.
        """
        diagnosed = self.seeds.get(pair, 0)
        if not diagnosed:
            return NOT_RUN
        e = self.pairs.get(pair)
        if e is None or not e.n:
            return f"no number (of {diagnosed})"
        count, lacking = "", self.undecided.get(pair, 0)
        if pair in self.detected:
            without = f", {lacking} undecided" if lacking else ""
            count = f" ({self.detected[pair]} of {e.n}{without})"
        return f"{mean_and_std(e, diagnosed)} {interval(e)}".rstrip() + count


@dataclass(frozen=True)
class ControlRow:
    """One measure of all pairs that have a control: pair - control, over the seeds with both."""

    measure: str
    differences: Mapping[str, Estimate]

    def cell(self, pair: str) -> str:
        e = self.differences[pair]
        return f"{with_interval(e, '{:+.3f}')} (n {e.n})" if e.n else "no number"


@dataclass(frozen=True)
class Pair:
    """The finished diagnoses of a teacher-student pair."""

    by_seed: Mapping[str, Diagnosis]
    control: str  # the pair it is compared with; "" where the matrix names none


def load_pairs(folder: Path) -> dict[str, Pair]:
    """Name of a pair -> its diagnoses; without any for a pair that no seed has finished. ValueError
    where one seed has two.
    """
    pairs: dict[str, Pair] = {}
    cells = json.loads((folder / "matrix.json").read_text())["cells"]
    diagnosed = [c for c in cells if "pair" in c["labels"]]
    of_pair = [{k: c["labels"][k] for k in ("pair", "seed")} for c in diagnosed]
    refuse_shared_places(folder, zip([c["folder"] for c in diagnosed], of_pair))
    for cell in diagnosed:
        labels = cell["labels"]
        pair = pairs.get(labels["pair"], Pair({}, labels.get("control", "")))
        path = folder / cell["folder"] / "diagnosis.json"
        done = path.exists() and read_object(path.parent / "summary.json") is not None
        found = {labels["seed"]: json.loads(path.read_text())} if done else {}
        pairs[labels["pair"]] = replace(pair, by_seed={**pair.by_seed, **found})
    return pairs


def load_diagnoses(folder: Path) -> dict[str, list[Diagnosis]]:
    """pair -> the finished diagnoses of its seeds; empty for a pair that none has finished."""
    return {name: list(pair.by_seed.values()) for name, pair in load_pairs(folder).items()}


def diagnosis_rows(pairs: Mapping[str, Sequence[Diagnosis]]) -> list[DiagnosisRow]:
    """The traps first, then MEASURES."""
    verdicts = [t for seeds in pairs.values() for d in seeds for t in _measured(d)]
    traps = list(dict.fromkeys(t["trap"] for t in verdicts))
    in_order = sorted(verdicts, key=lambda t: traps.index(t["trap"]))
    rows = [_trap_row(title, pairs) for title in dict.fromkeys(map(_title, in_order))]
    for title, keys in MEASURES.items():
        estimates = {pair: _estimate([_number(d, keys) for d in ds]) for pair, ds in pairs.items()}
        rows.append(DiagnosisRow(title, estimates))
    return [replace(row, seeds={pair: len(ds) for pair, ds in pairs.items()}) for row in rows]


def control_rows(pairs: Mapping[str, Pair]) -> list[ControlRow]:
    """Differences to the control, the traps first; empty where no pair has one."""
    compared = {
        name: (pair, pairs[pair.control])
        for name, pair in pairs.items()
        if pair.control in pairs and pair.control != name
    }
    verdicts = [t for p in pairs.values() for d in p.by_seed.values() for t in _measured(d)]
    numbers: dict[str, Number] = {
        _title(t): partial(_verdict_number, title=_title(t)) for t in reversed(verdicts)
    }
    numbers = dict(reversed(numbers.items()))
    numbers |= {title: partial(_number, keys=keys) for title, keys in MEASURES.items()}
    return [
        ControlRow(title, {name: _difference(*both, number) for name, both in compared.items()})
        for title, number in numbers.items()
        if compared
    ]


def _difference(pair: Pair, control: Pair, number: Number) -> Estimate:
    """Over the seeds in which both have a finite number."""
    both = [
        (number(d), number(control.by_seed[seed]))
        for seed, d in pair.by_seed.items()
        if seed in control.by_seed
    ]
    return _estimate([a - b for a, b in both if a is not None and b is not None])


def _title(verdict: Mapping[str, Any]) -> str:
    """Of a trap's row, by the measure that decides it."""
    return f"{verdict['trap']}: {verdict['measure'].split(',')[0].split('(')[0].strip()}"


def _verdict_number(diagnosis: Diagnosis, title: str) -> float | None:
    """None where the trap was decided by another measure there: no difference to it means
    anything.
    """
    return next((t["mean"] for t in _measured(diagnosis) if _title(t) == title), None)


def _measured(diagnosis: Diagnosis) -> list[Mapping[str, Any]]:
    """The verdicts that have a number."""
    return [t for t in diagnosis["verdict"] if "missing" not in t]


def _trap_row(title: str, pairs: Mapping[str, Sequence[Diagnosis]]) -> DiagnosisRow:
    """Of the measure that decides the trap: where another one did, as where the first cannot be
    had, the row is another. Pairs without that verdict are left out.
    """
    verdicts = {
        pair: [t for d in diagnoses for t in _measured(d) if _title(t) == title]
        for pair, diagnoses in pairs.items()
    }
    verdicts = {pair: of_pair for pair, of_pair in verdicts.items() if of_pair}
    present = {p: [t["present"] for t in ts if _finite(t["mean"])] for p, ts in verdicts.items()}
    return DiagnosisRow(
        measure=title,
        pairs={pair: _estimate([t["mean"] for t in ts]) for pair, ts in verdicts.items()},
        detected={pair: found.count(True) for pair, found in present.items()},
        undecided={pair: found.count(None) for pair, found in present.items()},
    )


def _number(diagnosis: Diagnosis, keys: str) -> float | None:
    """None where this diagnosis has no such number: no task, or no prompt with correct and wrong
    texts.
    """
    value: Any = diagnosis
    for key in keys.split():
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _estimate(values: Sequence[float | None]) -> Estimate:
    return over_seeds([v for v in values if _finite(v)])


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def render(
    rows: Sequence[DiagnosisRow], pairs: Sequence[str], against: Sequence[ControlRow] = ()
) -> str:
    compared = list(against[0].differences) if against else []
    return render_template(TEMPLATE, rows=rows, pairs=pairs, against=against, compared=compared)


def write_diagnoses(folder: Path) -> str:
    """diagnoses.md and diagnoses.json in the matrix folder; returns the page. ValueError without a
    label pair.
    """
    folder = Path(folder)
    loaded = load_pairs(folder)
    pairs = load_diagnoses(folder)
    if not any(pairs.values()):
        raise ValueError(
            f"{folder}: no finished diagnosis carries a label pair; want the folder of a matrix "
            "like configs/diagnoses.toml"
        )
    rows, against = diagnosis_rows(pairs), control_rows(loaded)
    text = render(rows, list(pairs), against) + as_markdown(run_warnings(folder))
    found = {row.measure: _json(row) for row in rows}
    for difference in against:
        row = found.setdefault(difference.measure, {})
        row["minus control"] = to_json(difference.differences)
    write_json(folder / "diagnoses.json", found)
    (folder / "diagnoses.md").write_text(text)
    return text


def _json(row: DiagnosisRow) -> dict[str, Any]:
    """pair -> its estimate, with the seeds in which a trap was detected beside it."""
    counts = {pair: {"detected": n} for pair, n in row.detected.items()}
    return {pair: to_json(e) | counts.get(pair, {}) for pair, e in row.pairs.items()}


if __name__ == "__main__":
    sys.exit(print_report("diagnosis_table", write_diagnoses))
