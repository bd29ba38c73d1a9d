"""The diagnoses of a matrix folder side by side: one column a teacher-student pair, estimates over
seeds.

    python -m reflux.trainer.studies.diagnosis_table FOLDER       # of a matrix whose diagnoses
        carry a label `pair`, like configs/diagnoses.toml
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.runs.markdown_table import mean_and_spread, table, write_json
from reflux.trainer.runs.stats import over_seeds

Found = Mapping[str, Any]
# how a row reads -> where a diagnosis.json has it
MEASURES: dict[str, Callable[[Found], float | None]] = {
    "forward KL, teacher's prefixes, nats/token": lambda f: f["grid"]["forward"]["teacher"][
        "per_token"
    ]["mean"],
    "reverse KL, student's prefixes, nats/token": lambda f: f["grid"]["reverse"]["student"][
        "per_token"
    ]["mean"],
    "wrong-trace preference": lambda f: f["gap"]["wrong_trace"]["pair"]["mean"],
    "pull towards wrong texts, nats/byte": lambda f: f["gap"]["wrong_trace"]["pull"]["mean"],
    "reverse KL on wrong / on right texts": lambda f: f["gap"]["degraded_prefix"],
    "teacher mass in the student's top K": lambda f: f["gap"]["teachable"]["mean"],
    "wrong with confidence >= 0.9": lambda f: f["symptoms"]["confidence"]["confident_wrong"],
    "recovery after an inserted error": lambda f: f["symptoms"]["correction"]["recovery"],
    "repeated 4-grams": lambda f: f["symptoms"]["repeated_4grams"],
}


def diagnosis_columns(folder: Path) -> dict[str, list[Found]]:
    """pair -> the finished diagnoses of its seeds."""
    cells = json.loads((folder / "matrix.json").read_text())["cells"]
    found: dict[str, list[Found]] = {}
    for cell in cells:
        path = folder / cell["folder"] / "diagnosis.json"
        if "pair" in cell["labels"] and path.exists() and (path.parent / "summary.json").exists():
            found.setdefault(cell["labels"]["pair"], []).append(json.loads(path.read_text()))
    return found


def diagnosis_rows(columns: Mapping[str, Sequence[Found]]) -> dict[str, dict[str, Any]]:
    """measure -> pair -> estimate over the seeds that have it; the three traps first, with how many
    seeds caught them.
    """
    traps = list(
        dict.fromkeys(t["trap"] for seeds in columns.values() for f in seeds for t in f["verdict"])
    )
    rows: dict[str, dict[str, Any]] = {}
    for trap in traps:
        name = next(
            t["measure"]
            for seeds in columns.values()
            for f in seeds
            for t in f["verdict"]
            if t["trap"] == trap
        )
        rows[f"{trap}: {name.split(',')[0].split('(')[0].strip()}"] = {
            pair: _estimate([t["mean"] for t in said])
            | {"caught": sum(t["present"] is True for t in said)}
            for pair, seeds in columns.items()
            if (said := [t for f in seeds for t in f["verdict"] if t["trap"] == trap])
        }
    for name, read in MEASURES.items():
        rows[name] = {
            pair: _estimate([_read(read, f) for f in seeds]) for pair, seeds in columns.items()
        }
    return rows


def _read(read: Callable[[Found], float | None], found: Found) -> float | None:
    """None where this diagnosis has no such number: no task, or no prompt with right and wrong
    texts.
    """
    try:
        return read(found)
    except KeyError:
        return None


def _estimate(values: Sequence[float | None]) -> dict[str, float]:
    return over_seeds([v for v in values if v is not None and math.isfinite(v)])._asdict()


def render(rows: Mapping[str, Mapping[str, Any]], pairs: Sequence[str]) -> str:
    lines = [
        "# Diagnoses",
        "",
        "Mean +- standard deviation over seeds; in brackets in how many of them the trap was "
        "caught (docs/method.md, "
        '"Diagnose").',
        "",
        table(
            ("", *pairs),
            [(name, *(_cell(row.get(pair)) for pair in pairs)) for name, row in rows.items()],
        ),
    ]
    return "\n".join(lines) + "\n"


def _cell(e: Mapping[str, float] | None) -> str:
    if not e or not e["n"]:
        return ""
    return mean_and_spread(e) + (f" ({e['caught']} of {e['n']})" if "caught" in e else "")


def write_diagnoses(folder: Path) -> str:
    """diagnoses.md and diagnoses.json in the matrix folder; returns the table. ValueError without a
    label pair.
    """
    folder = Path(folder)
    columns = diagnosis_columns(folder)
    if not columns:
        raise ValueError(
            f"{folder}: no finished diagnosis carries a label pair; want the folder of a matrix "
            "like configs/diagnoses.toml"
        )
    rows = diagnosis_rows(columns)
    write_json(folder / "diagnoses.json", rows)
    text = render(rows, list(columns))
    (folder / "diagnoses.md").write_text(text)
    return text


if __name__ == "__main__":
    print(write_diagnoses(Path(sys.argv[1])))
