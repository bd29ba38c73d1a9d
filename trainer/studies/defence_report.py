"""What else a report holds on a protected teacher: other defences beside it, whether the collapse
is more than broken form, and how much the result depends on the proxy.

A defence is a run with a label `defence`: its teacher as served (role `defence`) and the students
of that. Two of the attacks are also what a provider could serve: text at a lower temperature, and
answers without the reasoning.
"""

import math
from collections.abc import Mapping, Sequence

from reflux.trainer.runs.markdown_table import with_interval
from reflux.trainer.runs.stats import Estimate, over_seeds

from .finished_runs import (
    FinishedRun,
    accuracy_by_prompt,
    accuracy_change,
    before_attack,
    gain_ratio,
    gap_by_seed,
    labelled,
    mean_accuracy,
    with_role,
)
from .labels import ATTACK
from .results import CalibratedByProxy, DefenceResult, ProxyResult
from .rules import at_most, enough_seeds

ATTACKS_AS_DEFENCE = {
    "seq_kd_cold": "temperature 0.5",
    "answers_only": "answers only, reasoning withheld",
}
# by construction as correct as the teacher's own text: nothing to measure
PRESERVES_ANSWERS = "answers_only"
MIN_DROP = -0.5  # A5: the relative drop that has to survive a repair of the form
PROXY_ATTACKS = ("seq_kd", "gkd_reverse")  # that the teachers of other proxies are tried with
CALIBRATED = ("distillable", "undistillable")


# --- other defences


def defence_results(runs: Sequence[FinishedRun]) -> dict[str, DefenceResult]:
    """defence -> result; "none" is the undefended original, "task_only" the control (eta = 0),
    "undistillable" the calibrated teacher. By students of sampled text; of a defence that was tried
    by other attacks, too, one result more for each, named "DEFENCE, by ATTACK".
    """
    undefended = [r for r in runs if "defence" not in r.labels]
    defences = _defences(runs, undefended)
    results = {
        name: _defence_result(served, students, undefended)
        for name, (served, students) in defences.items()
        if students
    }
    for name, attack in _by_other_attacks(runs):
        served, students = defences[name][0], labelled(runs, role="student", defence=name)
        mine = labelled(students, attack=attack)
        results[f"{name}, by {attack}"] = _defence_result(served, mine, undefended, attack)
    return results


def _by_other_attacks(runs: Sequence[FinishedRun]) -> list[tuple[str, str]]:
    """(defence, attack) of students that were not made by sampled text."""
    students = [r for r in with_role(runs, "student") if "defence" in r.labels]
    pairs = dict.fromkeys((r.labels["defence"], _attack(r)) for r in students)
    return [(name, attack) for name, attack in pairs if attack != ATTACK]


def _attack(run: FinishedRun) -> str:
    return run.labels.get("attack", ATTACK)


def _defence_result(
    served: Sequence[FinishedRun],
    students: Sequence[FinishedRun],
    undefended: Sequence[FinishedRun],
    attack: str = ATTACK,
) -> DefenceResult:
    base = _students(undefended, "original", attack)
    originals = labelled(undefended, role="teacher", teacher="original")
    start = accuracy_by_prompt(labelled(undefended, role="start", student="student"))
    before = start if attack == ATTACK else before_attack(students, undefended)
    return DefenceResult(
        served=mean_accuracy(served),
        student=mean_accuracy(students),
        change=accuracy_change(students, base).sampled,
        score=gain_ratio(students, base, before),
        price=over_seeds([-gap for gap in gap_by_seed(served, originals)]),
        undefended=mean_accuracy(base),
    )


def _defences(
    runs: Sequence[FinishedRun], undefended: Sequence[FinishedRun]
) -> dict[str, tuple[list[FinishedRun], list[FinishedRun]]]:
    """defence -> (runs of what is served, students of that)."""
    served = labelled(undefended, role="teacher", teacher="original")
    rows = {"none": (served, _students(undefended, "original", ATTACK))}
    for teacher in ("task_only", "undistillable"):
        rows[teacher] = (
            labelled(undefended, role="teacher", teacher=teacher),
            _students(undefended, teacher, ATTACK),
        )
    for attack, name in ATTACKS_AS_DEFENCE.items():
        measured = labelled(runs, role="defence", defence=name)
        rows[name] = (
            served if attack == PRESERVES_ANSWERS else measured,
            _students(undefended, "original", attack),
        )
    for name in dict.fromkeys(r.labels["defence"] for r in runs if "defence" in r.labels):
        mine = labelled(runs, defence=name)
        students = [r for r in with_role(mine, "student") if _attack(r) == ATTACK]
        rows.setdefault(name, (with_role(mine, "defence"), students))
    return rows


def _students(runs: Sequence[FinishedRun], teacher: str, attack: str) -> list[FinishedRun]:
    return labelled(runs, role="student", teacher=teacher, attack=attack)


# --- is it more than the form?


def check_lines(runs: Sequence[FinishedRun]) -> list[str]:
    """A5 beyond the fraction of answers found: a repair of the form, and the likelihood of
    options. Each line only where its runs are there.
    """
    return [*_repair_lines(runs), *_likelihood_lines(runs)]


def _repair_lines(runs: Sequence[FinishedRun]) -> list[str]:
    original = labelled(runs, role="repair", teacher="original")
    undistillable = labelled(runs, role="repair", teacher="undistillable")
    if not original or not undistillable:
        return []
    change = accuracy_change(undistillable, original).sampled
    examples = undistillable[0].run.head["config"]["data"]["limit"]
    compared = f"{with_interval(change, '{:+.0%}')}, n = {change.n} seeds"
    result = "inconclusive: whether the drop survives"
    if not change.n:
        compared = "not compared: no seed has both, or the original's have no correct answer"
        result = "not known whether the drop survives"
    elif (rule := at_most(change, MIN_DROP)) != "inconclusive":
        result = "the drop survives" if rule == "holds" else "the drop does not survive"
    return [
        f"after {examples} worked examples to repair the form, the student of the undistillable "
        f"teacher has {mean_accuracy(undistillable).mean:.3f}, that of the original "
        f"{mean_accuracy(original).mean:.3f} ({compared}): {result}"
    ]


def _likelihood_lines(runs: Sequence[FinishedRun]) -> list[str]:
    chosen = {
        teacher: rows
        for teacher in ("original", "task_only", *CALIBRATED)
        if (rows := labelled(runs, role="choices", teacher=teacher))
    }
    if not {"original", "undistillable"} <= chosen.keys():
        return []
    gap = over_seeds(gap_by_seed(chosen["undistillable"], chosen["original"], "likelihood_sum"))
    if not gap.n:
        result = "not compared: no seed has both"
    elif enough_seeds(gap) and gap.high < 0:
        result = "lower, too"
    elif enough_seeds(gap) and gap.low >= 0:
        result = "not lower: generation and likelihood disagree"
    else:
        result = f"{'lower' if gap.mean < 0 else 'not lower'} in the mean, inconclusive over seeds"
    means = {t: mean_accuracy(rows, "likelihood_sum").mean for t, rows in chosen.items()}
    return [
        "by the likelihood of options, without generating: "
        + ", ".join(f"student of {t} {mean:.3f}" for t, mean in means.items())
        + f" (chance {_chance(chosen['original'][0])})"
        + f"; the undistillable teacher's is {result}"
        + (f" (difference {with_interval(gap, '{:+.3f}')}, n = {gap.n} seeds)" if gap.n else "")
    ]


def _chance(run: FinishedRun) -> str:
    """Accuracy of a blind choice among a prompt's options."""
    chances = [1 / len(p["logp"]) for p in run.predictions() if "logp" in p]
    return f"{sum(chances) / len(chances):.2f}" if chances else "unknown"


# --- how much does it depend on the proxy?


def proxy_results(runs: Sequence[FinishedRun]) -> dict[str, ProxyResult]:
    """proxy -> result. `default` is the proxy of the main teachers; the others are named by the
    label `proxy`, and their teachers by the same name as `ablation`. A proxy without students is
    left out.
    """
    runs = [r for r in runs if not {"eta", "defence"} & set(r.labels)]
    others = (r.labels["proxy"] for r in with_role(runs, "proxy") if "proxy" in r.labels)
    results = {}
    for name in ("default", *dict.fromkeys(others)):
        modes = {
            mode: _calibrated_by(runs, name, mode)
            for mode in CALIBRATED
            if _calibrated(runs, name, role="student", teacher=mode)
        }
        own = [r for r in with_role(runs, "proxy") if r.labels.get("proxy", "default") == name]
        if modes:
            results[name] = ProxyResult(mean_accuracy(own), modes)
    return results


def _calibrated_by(runs: Sequence[FinishedRun], proxy: str, mode: str) -> CalibratedByProxy:
    originals = [r for r in runs if "ablation" not in r.labels]
    scores: dict[str, Estimate] = {}
    for attack in PROXY_ATTACKS:
        rows = _calibrated(runs, proxy, role="student", teacher=mode, attack=attack)
        if not rows:
            continue
        base = _students(originals, "original", attack)
        score = gain_ratio(rows, base, before_attack(rows, runs))
        if score is not None:
            scores[attack] = score
    teachers = _calibrated(runs, proxy, role="teacher", teacher=mode)
    return CalibratedByProxy(mean_accuracy(teachers), scores)


def _calibrated(runs: Sequence[FinishedRun], proxy: str, **labels: str) -> list[FinishedRun]:
    return [r for r in labelled(runs, **labels) if r.labels.get("ablation", "default") == proxy]


def proxy_lines(proxies: Mapping[str, ProxyResult]) -> list[str]:
    """The range of distillability over the proxies, one line for each mode and attack."""
    lines = []
    for mode in CALIBRATED if len(proxies) > 1 else ():
        for attack in PROXY_ATTACKS:
            means = {
                name: p.modes[mode].scores[attack].mean
                for name, p in proxies.items()
                if mode in p.modes and attack in p.modes[mode].scores
            }
            means = {name: mean for name, mean in means.items() if not math.isnan(mean)}
            if len(means) > 1:
                low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
                lines.append(
                    f"sensitivity to the proxy, {mode} by {attack}: distillability from "
                    f"{means[low]:.2f} ({low}) to {means[high]:.2f} ({high}), a range of means of "
                    f"{means[high] - means[low]:.2f} over {len(means)} proxies"
                )
    return lines
