"""The finished runs of a matrix folder, and what is compared between them."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflux.trainer.runs.logger import Run, load_run
from reflux.trainer.runs.stats import Estimate, bootstrap_ratio, over_seeds, paired_difference

MODES = ("sampled", "greedy")


@dataclass(frozen=True)
class FinishedRun:
    """One finished run of the matrix: its labels, log, and last predictions."""

    labels: Mapping[str, str]
    run: Run
    folder: Path

    def evals(self) -> list[dict]:
        return [e for e in self.run.events if e["event"] == "eval"]

    def score(self, mode: str) -> float:
        return self.evals()[-1][f"eval/{mode}"]

    def best(self) -> float:
        """Sampled accuracy of the best checkpoint that was evaluated after the start: an attacker
        who stops early keeps that one.
        """
        return max(
            (e["eval/sampled"] for e in self.evals() if e["step"]), default=self.score("sampled")
        )

    def predictions(self, step: int | None = None) -> list[dict]:
        """Those of the last evaluation, or of the one at `step`; empty where there are none of that
        step.
        """
        file = (
            self.folder
            / "predictions"
            / f"step-{self.evals()[-1]['step'] if step is None else step}.jsonl"
        )
        return (
            [json.loads(line) for line in file.read_text().splitlines()]
            if step is None or file.exists()
            else []
        )


READINGS = {
    "sampled": lambda e: e.score("sampled"),
    "greedy": lambda e: e.score("greedy"),
    "best": FinishedRun.best,
}


def load_finished_runs(folder: Path) -> list[FinishedRun]:
    """The runs of a matrix folder that have ended, were evaluated, and have a role."""
    cells = json.loads((folder / "matrix.json").read_text())["cells"]
    entries = [
        FinishedRun(c["labels"], load_run(folder / c["folder"]), folder / c["folder"])
        for c in cells
        if (folder / c["folder"] / "run.jsonl").exists()
        and (folder / c["folder"] / "summary.json").exists()
    ]
    return [e for e in entries if e.evals() and "role" in e.labels]


def with_role(entries: Iterable[FinishedRun], role: str) -> list[FinishedRun]:
    return [e for e in entries if e.labels["role"] == role]


def labelled(entries: Iterable[FinishedRun], **labels: str) -> list[FinishedRun]:
    return [e for e in entries if all(e.labels.get(k) == v for k, v in labels.items())]


def grouped(entries: Iterable[FinishedRun], label: str) -> dict[str, list[FinishedRun]]:
    groups = defaultdict(list)
    for e in entries:
        groups[e.labels[label]].append(e)
    return dict(groups)


def paired(pairs: list[tuple[FinishedRun, FinishedRun]], mode: str) -> Estimate:
    """Accuracy difference to the original on the same prompts, items of all seeds pooled."""
    after, before = [], []
    for entry, base in pairs:
        mine = {
            (p["prompt"], p["sample"]): p["correct"]
            for p in entry.predictions()
            if p["mode"] == mode
        }
        theirs = {
            (p["prompt"], p["sample"]): p["correct"]
            for p in base.predictions()
            if p["mode"] == mode
        }
        after += [float(mine[k]) for k in sorted(mine) if k in theirs]
        before += [float(theirs[k]) for k in sorted(mine) if k in theirs]
    return paired_difference(after, before)


def change(after: list[FinishedRun], before: list[FinishedRun]) -> dict:
    """Relative change against the same attack on the original teacher: the mean difference over
    seeds, pairwise, divided by the original's mean (a mean of per-seed ratios would be ruled by
    whichever seed's baseline is lowest). `best`: of each run's best checkpoint, sampled.
    """
    base = {e.labels["seed"]: e for e in before}
    pairs = [(e, base[e.labels["seed"]]) for e in after if e.labels["seed"] in base]
    return {
        name: _relative([(read(e), read(b)) for e, b in pairs]) for name, read in READINGS.items()
    }


def _relative(pairs: Sequence[tuple[float, float]]) -> dict:
    difference = over_seeds([a - b for a, b in pairs])
    mean = sum(b for _, b in pairs) / max(len(pairs), 1)
    return Estimate(
        *(x / mean if mean else math.nan for x in difference[:4]), difference.n if mean else 0
    )._asdict()


def score(entries: list[FinishedRun], attack: str, teacher: str) -> dict | None:
    """Distillability of a teacher under an attack; see gain_ratio."""
    rows, originals = (
        labelled(entries, role="student", attack=attack, teacher=name)
        for name in (teacher, "original")
    )
    return gain_ratio(rows, originals, before_attack(rows, entries))


def before_attack(
    rows: Sequence[FinishedRun], entries: Sequence[FinishedRun]
) -> dict[tuple[str, int], float]:
    """items() of the students before the attack: of the run that the label `start` names, else 0
    for random weights (which answer nothing), else of their own evaluation at step 0. Empty where
    none of these is there.
    """
    if start := rows[0].labels.get("start"):
        return items(labelled(entries, role="start", student=start))
    if rows[0].run.head["config"].get("model", {}).get("from_scratch"):
        return dict.fromkeys(items(rows), 0.0)
    return items(rows, step=0)


def gain_ratio(
    rows: list[FinishedRun], originals: list[FinishedRun], before: Mapping[tuple[str, int], float]
) -> dict | None:
    """What students gained from a teacher / what they gained from the original by the same attack
    at the same budget, sampled answers, 95 % interval over (seed, prompt) pairs. `before`: items()
    at the start. None without it, or where the gain from the original is less than three of its
    standard errors.
    """
    if not before or not originals or not rows:
        return None
    after, base = items(rows), items(originals)
    keys = sorted(after.keys() & base.keys() & before.keys())
    gain = paired_difference([base[k] for k in keys], [before[k] for k in keys])
    if len(keys) < 2 or not gain.mean > 3 * gain.std / math.sqrt(len(keys)):
        return None
    return bootstrap_ratio(
        {k: after[k] - before[k] for k in keys}, {k: base[k] - before[k] for k in keys}
    )._asdict()


def cost(entry: FinishedRun) -> dict[str, float]:
    """What a student's run asked of its teacher: texts written by it, texts it read to give
    log-probabilities, about how many tokens all of them have (by the mean length of the run's
    texts); and seconds.
    """
    c = entry.run.head["config"]
    d, r = c.get("distill", {}), c.get("rollout", {})
    texts = c.get("steps", 0) * r.get("prompts", 0) * r.get("group", 0)
    own = round(texts * d.get("on_policy", 0))
    written = (
        0
        if d.get("source") != "teacher"
        else d["query_budget"] * r["group"]
        if d.get("query_budget")
        else texts - own
    )
    read = {
        "kl": texts,
        "class": texts,
        "span": own if d.get("source") == "teacher" else texts,
    }.get(d.get("objective"), 0)
    lengths = [s["length"] for s in entry.run.steps if "length" in s]
    return {
        "written": written,
        "read": read,
        "tokens": round((written + read) * sum(lengths) / max(len(lengths), 1)),
        "seconds": entry.run.summary["wall_s"],
    }


def late_spike(entry: FinishedRun) -> float:
    """Largest gradient norm of the second half of a run / their median there (the first half holds
    the warm-up); inf where a loss or norm of the run is not finite, NaN without steps.
    """
    rows = [(s["loss"], s["grad_norm"]) for s in entry.run.steps if "grad_norm" in s]
    if not all(math.isfinite(x) for row in rows for x in row):
        return math.inf
    norms = [norm for _, norm in rows[len(rows) // 2 :]]
    middle = statistics.median(norms) if norms else 0.0
    return max(norms) / middle if middle else math.nan


def items(rows: Sequence[FinishedRun], step: int | None = None) -> dict[tuple[str, int], float]:
    """(seed, prompt) -> share of its sampled answers that are right, at the last evaluation or that
    of a step.
    """
    found: dict[tuple[str, int], list[bool]] = {}
    for e in rows:
        for p in e.predictions(step):
            if p["mode"] == "sampled":
                found.setdefault((e.labels["seed"], p["prompt"]), []).append(p["correct"])
    return {k: sum(v) / len(v) for k, v in found.items()}
