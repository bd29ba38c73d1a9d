"""The diagnoses of a matrix folder side by side, before and after distillation: one column a
teacher-student pair, estimates over seeds. A pair that the matrix names and no seed has finished,
such as the control (eta = 0), stays a column: not run.

    python -m reflux.trainer.studies.diagnosis_table FOLDER

for a matrix whose diagnoses carry a label `pair`, like configs/diagnoses.toml.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reflux.trainer.runs.files import to_json, write_json
from reflux.trainer.runs.markdown_table import interval, mean_and_std, render_template
from reflux.trainer.runs.stats import Estimate, over_seeds

from .run_warnings import as_markdown, run_warnings

TEMPLATE = Path(__file__).with_name("diagnoses.md.jinja")
NOT_RUN = "not run"
Diagnosis = Mapping[str, Any]  # a diagnosis.json
# title of a row -> the keys that lead to its number in a diagnosis.json
MEASURES = {
    "forward KL, teacher's prefixes, nats/token": "grid forward teacher per_token mean",
    "reverse KL, student's prefixes, nats/token": "grid reverse student per_token mean",
    "wrong-trace preference": "gap wrong_trace pair mean",
    "pull towards wrong texts, nats/byte": "gap wrong_trace pull mean",
    "reverse KL on wrong / on correct texts": "gap degraded_prefix",
    "teacher mass in the student's top K": "gap teachable mean",
    "wrong with confidence >= 0.9": "symptoms confidence confident_wrong",
    "recovery after an inserted error": "symptoms correction recovery",
    "repeated 4-grams": "symptoms repeated_4grams",
}


@dataclass(frozen=True)
class DiagnosisRow:
    """One measure of all pairs, over the seeds that have it."""

    measure: str
    pairs: Mapping[str, Estimate]
    # pair -> seeds in which the trap was detected; empty where the measure decides no trap
    detected: Mapping[str, int] = field(default_factory=dict)

    # pair -> seeds that were diagnosed, whether they have the number or not
    seeds: Mapping[str, int] = field(default_factory=dict)

    def cell(self, pair: str) -> str:
        """The interval is over seeds; (k of n): detected in k of n by each seed's own interval."""
        diagnosed = self.seeds.get(pair, 0)
        if not diagnosed:
            return NOT_RUN
        e = self.pairs.get(pair)
        if e is None or not e.n:
            return f"no number (of {diagnosed})"
        count = f" ({self.detected[pair]} of {e.n})" if pair in self.detected else ""
        return f"{mean_and_std(e, diagnosed)} {interval(e)}".rstrip() + count


def load_diagnoses(folder: Path) -> dict[str, list[Diagnosis]]:
    """pair -> the finished diagnoses of its seeds; empty for a pair that none has finished."""
    pairs: dict[str, list[Diagnosis]] = {}
    for cell in json.loads((folder / "matrix.json").read_text())["cells"]:
        if "pair" not in cell["labels"]:
            continue
        found = pairs.setdefault(cell["labels"]["pair"], [])
        path = folder / cell["folder"] / "diagnosis.json"
        if path.exists() and (path.parent / "summary.json").exists():
            found.append(json.loads(path.read_text()))
    return pairs


def diagnosis_rows(pairs: Mapping[str, Sequence[Diagnosis]]) -> list[DiagnosisRow]:
    """The traps first, then MEASURES."""
    verdicts = [t for seeds in pairs.values() for d in seeds for t in d["verdict"]]
    traps = dict.fromkeys(t["trap"] for t in verdicts)
    rows = [_trap_row(trap, pairs) for trap in traps]
    for title, keys in MEASURES.items():
        estimates = {pair: _estimate([_number(d, keys) for d in ds]) for pair, ds in pairs.items()}
        rows.append(DiagnosisRow(title, estimates))
    return [replace(row, seeds={pair: len(ds) for pair, ds in pairs.items()}) for row in rows]


def _trap_row(trap: str, pairs: Mapping[str, Sequence[Diagnosis]]) -> DiagnosisRow:
    """Titled by the measure that decides the trap. Pairs without that verdict are left out."""
    verdicts = {
        pair: [t for d in diagnoses for t in d["verdict"] if t["trap"] == trap]
        for pair, diagnoses in pairs.items()
    }
    verdicts = {pair: of_pair for pair, of_pair in verdicts.items() if of_pair}
    measure = next(iter(verdicts.values()))[0]["measure"]
    return DiagnosisRow(
        measure=f"{trap}: {measure.split(',')[0].split('(')[0].strip()}",
        pairs={pair: _estimate([t["mean"] for t in ts]) for pair, ts in verdicts.items()},
        detected={pair: sum(t["present"] is True for t in ts) for pair, ts in verdicts.items()},
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
    return over_seeds([v for v in values if v is not None and math.isfinite(v)])


def render(rows: Sequence[DiagnosisRow], pairs: Sequence[str]) -> str:
    return render_template(TEMPLATE, rows=rows, pairs=pairs)


def write_diagnoses(folder: Path) -> str:
    """diagnoses.md and diagnoses.json in the matrix folder; returns the page. ValueError without a
    label pair.
    """
    folder = Path(folder)
    pairs = load_diagnoses(folder)
    if not any(pairs.values()):
        raise ValueError(
            f"{folder}: no finished diagnosis carries a label pair; want the folder of a matrix "
            "like configs/diagnoses.toml"
        )
    rows = diagnosis_rows(pairs)
    text = render(rows, list(pairs)) + as_markdown(run_warnings(folder))
    write_json(folder / "diagnoses.json", {row.measure: _json(row) for row in rows})
    (folder / "diagnoses.md").write_text(text)
    return text


def _json(row: DiagnosisRow) -> dict[str, Any]:
    """pair -> its estimate, with the seeds in which a trap was detected beside it."""
    counts = {pair: {"detected": n} for pair, n in row.detected.items()}
    return {pair: to_json(e) | counts.get(pair, {}) for pair, e in row.pairs.items()}


if __name__ == "__main__":
    print(write_diagnoses(Path(sys.argv[1])))
