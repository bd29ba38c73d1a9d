"""Every picture of docs/figures, drawn from the records alone: python -m bench.figures [NAME...]

`--check` says which are stale, exit code 1. A PNG carries the record it was drawn from, by name and
SHA-256, and a hash of what it shows; the SVG files of docs/tokenalign.md are examples, not
measurements, and come from docs/figures/tokenalign_figures.py.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from statistics import mean, stdev
from typing import Any

from PIL import Image

from reflux.trainer.file_hash import file_sha256
from reflux.trainer.runs.plotting import ReferenceLine, save_figure
from reflux.trainer.studies.eta_sweep import Column, sweep_figure
from reflux.trainer.studies.figures import Bar, bars_figure, styles_figure
from reflux.trainer.studies.results import TEACHERS

from .language_figures import calibrations, student_losses
from .records import FOLDER as RECORDS
from .records import ROOT
from .report_record import estimate_of

FOLDER = ROOT / "docs" / "figures"
REPORT = "2026-11-29_report_cpu.json"
EXAMPLES = FOLDER / "tokenalign_figures.py"
QUICKSTART = (  # attacks of README's figure, the ones that make quickstart runs
    "seq_kd",
    "seq_kd_filtered",
    "kd_forward",
    "gkd_reverse",
    "gkd_on_policy",
    "cross_tokenizer",
    "deeper_student",
)
LANGUAGE = "2026-11-30_language_past_five_seeds.json"
STUDENT_RUNS = "2026-11-30_language_past_float32_students.json"
CALIBRATIONS = "2026-11-30_language_past_teachers_by_seed.json"
LANGUAGE_ATTACKS = ("seq_kd", "kd_forward", "gkd_on_policy")  # all of one student's start
ETA_COLUMNS = {  # title of a panel -> key of a point in the record
    "teacher accuracy": "teacher",
    "KL to original, nats/token": "anchor_kl",
    "calibration reward, nats": "reward",
    "student accuracy": "student",
}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """record: its file in bench/records. draw: record -> matplotlib figure."""

    record: str
    draw: Callable[[Record], Any]


def students(record: Record, attacks: Sequence[str] = ()) -> Any:
    """Bars over attacks; attacks: which, in this order; all by default."""
    report = record["report"]
    chosen = attacks or tuple(report["students"])
    cells = {a: {t: _bar(record, a, t) for t in TEACHERS} for a in chosen}
    teacher = report["teachers"]["original"]["sampled"]["mean"]
    lines = [ReferenceLine(teacher, "original teacher"), *_start(record)]
    return bars_figure(cells, lines)


def eta_sweep(record: Record) -> Any:
    """The record has means and deviations over seeds of the sweep, not the seeds."""
    points = record["knob"]["points"]
    columns = {
        title: Column(
            [estimate_of(p[key]) for p in points], is_accuracy=key in ("teacher", "student")
        )
        for title, key in ETA_COLUMNS.items()
    }
    return sweep_figure([p["eta"] for p in points], columns, _start(record))


def styles(record: Record) -> Any:
    teachers = record["report"]["teachers"]
    parts = {t: {s: x["share"] for s, x in teachers[t]["styles"].items()} for t in TEACHERS}
    return styles_figure(parts)


def _bar(record: Record, attack: str, teacher: str) -> Bar | None:
    wanted = {"role": "student", "attack": attack, "teacher": teacher}
    rows = [r for r in record["report"]["runs"] if wanted.items() <= r.items()]
    seeds = [r["sampled"] for r in rows if "defence" not in r]
    if not seeds:
        return None
    return Bar(mean(seeds), stdev(seeds) if len(seeds) > 1 else None, seeds)


def _start(record: Record) -> list[ReferenceLine]:
    """The student of sampled text before an attack, the mean over seeds; and no chance: answers of
    this task are free.
    """
    runs = record["report"]["runs"]
    begun = [r["sampled"] for r in runs if (r["role"], r.get("student")) == ("start", "student")]
    begun = begun or [r["at_start"] for r in runs if r.get("attack") == "seq_kd"]
    chance = ReferenceLine(None, "chance: not measured,\nanswers are free text")
    return [ReferenceLine(sum(begun) / len(begun), "students at the start", ":"), chance]


PICTURES: dict[str, Picture] = {
    "students.png": Picture(REPORT, lambda record: students(record, QUICKSTART)),
    "students_all.png": Picture(REPORT, students),
    "eta_sweep.png": Picture(REPORT, eta_sweep),
    "styles.png": Picture(REPORT, styles),
    "language_students.png": Picture(LANGUAGE, lambda record: students(record, LANGUAGE_ATTACKS)),
    "language_calibrations.png": Picture(CALIBRATIONS, calibrations),
    "language_student_losses.png": Picture(STUDENT_RUNS, student_losses),
}


def draw(name: str, folder: Path = FOLDER) -> Path:
    """The same record gives the same file with the same matplotlib."""
    picture = PICTURES[name]
    record = json.loads((RECORDS / picture.record).read_text())
    save_figure(picture.draw(record), folder / name, {"Source": source(name)})
    return folder / name


def source(name: str) -> str:
    """What a PNG says of where it comes from."""
    record = PICTURES[name].record
    digest = file_sha256(RECORDS / record)[:16]
    return f"bench/records/{record} sha256 {digest}, by python -m bench.figures"


def texts(path: Path) -> dict[str, str]:
    """What a PNG says of itself."""
    with Image.open(path) as image:
        return dict(image.text)


def stale() -> list[str]:
    """Pictures that are missing, of another record than today's, or drawn by nothing."""
    drawn = [n for n in PICTURES if not (FOLDER / n).exists()]
    drawn += [
        n
        for n in PICTURES
        if (FOLDER / n).exists() and texts(FOLDER / n).get("Source") != source(n)
    ]
    there = {p.name for p in FOLDER.glob("*.*") if p.suffix in (".png", ".svg")}
    return drawn + sorted(there - set(PICTURES) - set(examples()))


def examples() -> Mapping[str, str]:
    """File -> SVG, of the script that draws the examples; it is in no package."""
    return run_path(str(EXAMPLES))["figures"]()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help=f"{', '.join(PICTURES)}; default: all, and SVGs")
    parser.add_argument("--check", action="store_true", help="draw nothing; exit code 1 if stale")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - set(PICTURES):
        parser.error(f"no picture {', '.join(sorted(unknown))}; want {', '.join(PICTURES)}")
    if args.check:
        found = stale()
        print("\n".join(f"{name}: stale" for name in found) or "all up to date")
        return int(bool(found))
    for name in args.names or PICTURES:
        print(draw(name))
    for name, svg in ({} if args.names else examples()).items():
        (FOLDER / name).write_text(svg, encoding="utf-8")
        print(FOLDER / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
