"""The finished runs of a matrix folder, and what is compared between them."""
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .record import Run, load_run
from .stats import Estimate, bootstrap, over_seeds, paired_difference

MODES = ("sampled", "greedy")


@dataclass(frozen=True)
class Entry:
    """One finished run of the matrix: its labels, log, and last predictions."""

    labels: Mapping[str, str]
    run: Run
    folder: Path

    def evals(self) -> list[dict]:
        return [e for e in self.run.events if e["event"] == "eval"]

    def score(self, mode: str) -> float:
        return self.evals()[-1][f"eval/{mode}"]

    def predictions(self) -> list[dict]:
        step = self.evals()[-1]["step"]
        lines = (self.folder / "predictions" / f"step-{step}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def finished_entries(folder: Path) -> list[Entry]:
    """The runs of a matrix folder that have ended, were evaluated, and have a role."""
    cells = json.loads((folder / "matrix.json").read_text())["cells"]
    entries = [Entry(c["labels"], load_run(folder / c["folder"]), folder / c["folder"]) for c in cells
               if (folder / c["folder"] / "run.jsonl").exists() and (folder / c["folder"] / "summary.json").exists()]
    return [e for e in entries if e.evals() and "role" in e.labels]


def with_role(entries: Iterable[Entry], role: str) -> list[Entry]:
    return [e for e in entries if e.labels["role"] == role]


def labelled(entries: Iterable[Entry], **labels: str) -> list[Entry]:
    return [e for e in entries if all(e.labels.get(k) == v for k, v in labels.items())]


def grouped(entries: Iterable[Entry], label: str) -> dict[str, list[Entry]]:
    groups = defaultdict(list)
    for e in entries:
        groups[e.labels[label]].append(e)
    return dict(groups)


def paired(pairs: list[tuple[Entry, Entry]], mode: str) -> Estimate:
    """Accuracy difference to the original on the same prompts, items of all seeds pooled."""
    after, before = [], []
    for entry, base in pairs:
        mine = {(p["prompt"], p["sample"]): p["correct"] for p in entry.predictions() if p["mode"] == mode}
        theirs = {(p["prompt"], p["sample"]): p["correct"] for p in base.predictions() if p["mode"] == mode}
        after += [float(mine[k]) for k in sorted(mine) if k in theirs]
        before += [float(theirs[k]) for k in sorted(mine) if k in theirs]
    return paired_difference(after, before)


def change(after: list[Entry], before: list[Entry]) -> dict:
    """Relative change against the same attack on the original teacher: the mean difference over seeds, pairwise, divided by the
    original's mean (a mean of per-seed ratios would be ruled by whichever seed's baseline is lowest)."""
    base = {e.labels["seed"]: e for e in before}
    pairs = [(e, base[e.labels["seed"]]) for e in after if e.labels["seed"] in base]
    out = {}
    for mode in MODES:
        difference = over_seeds([e.score(mode) - b.score(mode) for e, b in pairs])
        mean = sum(b.score(mode) for _, b in pairs) / max(len(pairs), 1)
        scaled = [x / mean if mean else math.nan for x in difference[:4]]
        out[mode] = Estimate(*scaled, difference.n if mean else 0)._asdict()
    return out


def score(entries: list[Entry], attack: str, teacher: str) -> dict | None:
    """Distillability of a teacher under an attack; see gain_ratio."""
    rows, originals = (labelled(entries, role="student", attack=attack, teacher=name) for name in (teacher, "original"))
    return gain_ratio(rows, originals, labelled(entries, role="start", student=rows[0].labels.get("start", "")))


def gain_ratio(rows: list[Entry], originals: list[Entry], starts: list[Entry]) -> dict | None:
    """What students gained from a teacher / what they gained from the original by the same attack at the same budget, sampled
    answers, 95 % interval over (seed, prompt) pairs. None without a start to measure gains from, or where the gain from the
    original is less than three of its standard errors."""
    if not starts or not originals or not rows:
        return None
    after, base, before = (items(x) for x in (rows, originals, starts))
    keys = sorted(after.keys() & base.keys() & before.keys())
    gain = paired_difference([base[k] for k in keys], [before[k] for k in keys])
    if len(keys) < 2 or not gain.mean > 3 * gain.std / math.sqrt(len(keys)):
        return None

    def ratio(drawn: Sequence) -> float:
        start = sum(before[k] for k in drawn)
        gained = sum(base[k] for k in drawn) - start
        return (sum(after[k] for k in drawn) - start) / gained if gained else math.nan

    return bootstrap(ratio, keys)._asdict()


def cost(entry: Entry) -> dict[str, float]:
    """What a student's run asked of its teacher: texts written by it, texts it read to give log-probabilities; and seconds."""
    c = entry.run.head["config"]
    d, r = c.get("distill", {}), c.get("rollout", {})
    texts = c.get("steps", 0) * r.get("prompts", 0) * r.get("group", 0)
    fresh = round(texts * (1 - d.get("on_policy", 0)))
    written = 0 if d.get("source") != "teacher" else min(d["queries"] * r["group"], fresh) if d.get("queries") else fresh
    reads = d.get("objective") in ("kl", "class") or d.get("objective") == "span" and d.get("source") != "teacher"
    return {"written": written, "read": texts if reads else 0, "seconds": entry.run.summary["wall_s"]}


def items(rows: list[Entry]) -> dict[tuple[str, int], float]:
    """(seed, prompt) -> share of its sampled answers that are right."""
    found: dict[tuple[str, int], list[bool]] = {}
    for e in rows:
        for p in e.predictions():
            if p["mode"] == "sampled":
                found.setdefault((e.labels["seed"], p["prompt"]), []).append(p["correct"])
    return {k: sum(v) / len(v) for k, v in found.items()}
