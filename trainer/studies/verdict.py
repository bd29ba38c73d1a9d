"""The acceptance rules A1 to A5 of docs/method.md, and what they add up to, in sentences.

A verdict on an attack is from the attacker's side. On the undistillable teacher it has failed if
the student ends at half of what the same attack takes from the original teacher, or less, both at
its last and at its best checkpoint, and the 95 % interval over seeds excludes no change. It is
inconclusive if only the interval is too wide for that, else it has succeeded.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from reflux.trainer.runs.stats import Estimate, may_be_zero, relative_change

from .defence_report import ATTACKS_AS_DEFENCE
from .results import Checkpoint, DefenceResult, Results, StudentResult, TeacherResult, Verdict

MAX_ACCURACY_CHANGE = 0.02  # A1: of a teacher, sampled and greedy
MIN_GAIN, MIN_LOSS = 0.15, -0.50  # A2, A3: relative change of the student's accuracy
MIN_ANSWERED = 0.9  # A5: fraction of answers found, relative to the original's student
MAX_SPIKE = 10.0  # A5: a gradient norm late in a run / the median there

Students = Mapping[str, Mapping[str, StudentResult]]  # attack -> teacher


# --- the rules


def within_a1(gaps: Sequence[float]) -> bool:
    """A1 by every seed. gaps: sampled accuracy minus the original teacher's. False without any."""
    return bool(gaps) and all(abs(gap) <= MAX_ACCURACY_CHANGE + 1e-9 for gap in gaps)


def accuracy_preserved(teacher: TeacherResult) -> bool:
    """A1."""
    gaps = (teacher.difference.sampled, teacher.difference.greedy)
    return all(abs(gap.mean) <= MAX_ACCURACY_CHANGE for gap in gaps)


@dataclass(frozen=True)
class RuleCheck:
    """A2 or A3 on one teacher, attack by attack."""

    changes: Mapping[str, Estimate]  # attack -> relative change of its student
    holds: tuple[str, ...]  # attacks under which the rule holds

    @property
    def violated(self) -> list[str]:
        return [a for a in self.changes if a not in self.holds]


def check_rule(students: Students, teacher: str, checkpoint: Checkpoint = "last") -> RuleCheck:
    """A2 for the distillable teacher, A3 for any other. An interval that holds 0 violates both."""
    changes = {
        attack: change.at(checkpoint)
        for attack, row in students.items()
        if teacher in row and (change := row[teacher].change) is not None
    }
    changes = {attack: c for attack, c in changes.items() if c.n}

    def accepted(c: Estimate) -> bool:
        enough = c.mean >= MIN_GAIN if teacher == "distillable" else c.mean <= MIN_LOSS
        return enough and not may_be_zero(c)

    return RuleCheck(changes, tuple(a for a, c in changes.items() if accepted(c)))


@dataclass(frozen=True)
class AttackOutcome:
    attack: str
    verdict: Verdict
    checkpoint: Checkpoint = "last"  # the one that decided


def attack_outcomes(students: Students) -> list[AttackOutcome]:
    """Of the attacks on the undistillable teacher; those that the best checkpoint decided last."""
    last = check_rule(students, "undistillable")
    best = check_rule(students, "undistillable", "best")
    outcomes = []
    for attack in last.changes:
        if attack in last.violated:
            outcomes.append(_not_failed(attack, "last", last.changes[attack]))
        elif attack in best.violated:
            outcomes.append(_not_failed(attack, "best", best.changes[attack]))
        else:
            outcomes.append(AttackOutcome(attack, "failed"))
    return sorted(outcomes, key=lambda o: o.checkpoint == "best")


def _not_failed(attack: str, checkpoint: Checkpoint, change: Estimate) -> AttackOutcome:
    verdict: Verdict = "inconclusive" if change.mean <= MIN_LOSS else "succeeded"
    return AttackOutcome(attack, verdict, checkpoint)


# --- one line for each rule


def verdict_lines(results: Results) -> list[str]:
    """A1 to A3, distillability, and divergence; the other lines of A5 are collapse_lines."""
    students = results.students
    return [
        *_teacher_lines(results.teachers),
        *_student_lines(students, "distillable"),
        *_task_only_lines(students),
        *_student_lines(students, "undistillable"),
        *_student_lines(students, "undistillable", "best"),
        *_score_lines(students),
        *_divergence_lines(students),
    ]


def _teacher_lines(teachers: Mapping[str, TeacherResult]) -> list[str]:
    limit = f"{MAX_ACCURACY_CHANGE * 100:.0f} points"
    return [
        f"teacher {name}: accuracy {'preserved' if accuracy_preserved(t) else 'NOT preserved'} "
        f"within {limit} (sampled {t.difference.sampled.mean * 100:+.1f}, "
        f"greedy {t.difference.greedy.mean * 100:+.1f})"
        for name, t in teachers.items()
        if name != "original"
    ]


def _student_lines(students: Students, teacher: str, checkpoint: Checkpoint = "last") -> list[str]:
    rule = check_rule(students, teacher, checkpoint)
    if not rule.changes:
        return []
    best = checkpoint == "best"
    whose = ", each run's best checkpoint (the attacker stops early)" if best else ""
    limit = f">= {MIN_GAIN:+.0%}" if teacher == "distillable" else f"<= {MIN_LOSS:+.0%}"
    count = f"{len(rule.holds)} of {len(rule.changes)} attacks"
    changes = [f"{a} {rule.changes[a].mean:+.0%}" for a in rule.holds]
    line = f"students of the {teacher} teacher{whose}, {limit} of the original's: {count}"
    lines = [line + (f" ({', '.join(changes)})" if changes else "")]
    if rule.violated:
        word = "not reached" if teacher == "distillable" else "succeeded or inconclusive"
        word += " early" if best else ""
        lines.append(f"{word}: {', '.join(_violation(a, rule.changes[a]) for a in rule.violated)}")
    return lines


def _violation(attack: str, change: Estimate) -> str:
    return f"{attack} {change.mean:+.0%}" + (
        " (its interval holds 0)" if may_be_zero(change) else ""
    )


def _task_only_lines(students: Students) -> list[str]:
    """A2's second half: better than a teacher that was merely trained on the task."""
    rows = [row for row in students.values() if "distillable" in row and "task_only" in row]
    if not rows:
        return []
    above = [r for r in rows if r["distillable"].sampled.mean > r["task_only"].sampled.mean]
    return [
        f"above the student of the task-only teacher (eta = 0): {len(above)} of {len(rows)} attacks"
    ]


def _score_lines(students: Students) -> list[str]:
    """Distillability at its worst: of the undistillable teacher by the attack that gained most, of
    the distillable one by the attack that gained least.
    """
    lines = []
    for teacher, pick, word in (("undistillable", max, "most"), ("distillable", min, "least")):
        scores = {
            attack: s
            for attack, row in students.items()
            if teacher in row and (s := row[teacher].score) is not None
        }
        if scores:
            attack = pick(scores, key=lambda a: scores[a].mean)
            s = scores[attack]
            lines.append(
                f"distillability of the {teacher} teacher, the attack that gained {word}: "
                f"{attack}, {s.mean:.2f} [{s.low:.2f}, {s.high:.2f}] of what the original gives "
                f"(1 = no change; {len(scores)} attacks scored)"
            )
    return lines


def _divergence_lines(students: Students) -> list[str]:
    """A5: a student whose training diverged says nothing about its teacher. Only of students that
    collapsed: near its optimum a successful run has no gradient left to compare with.
    """
    collapsed = check_rule(students, "undistillable").holds
    spikes = {a: students[a]["undistillable"].late_spike for a in collapsed}
    spikes = {a: s for a, s in spikes.items() if not math.isnan(s)}
    if not spikes:
        return []
    diverged = [a for a, s in spikes.items() if s > MAX_SPIKE]
    what = f"diverged under {', '.join(diverged)}" if diverged else "none diverged"
    return [
        f"training of the undistillable teacher's students that collapsed: {what} (largest "
        f"gradient norm in the second half of a run {max(spikes.values()):.1f} times its median "
        f"there; limit {MAX_SPIKE:.0f})"
    ]


def collapse_lines(students: Students) -> list[str]:
    """A5: is the undistillable student wrong, or does it merely fail to answer?"""
    return [
        _collapse_line(attack, row["original"], row["undistillable"])
        for attack, row in students.items()
        if "original" in row and "undistillable" in row
    ]


def _collapse_line(attack: str, original: StudentResult, student: StudentResult) -> str:
    answered = student.answered / max(original.answered, 1e-9)
    drop = relative_change(student.correct_if_answered, original.correct_if_answered)
    if drop <= MIN_LOSS:
        kind = "wrong answers, not missing ones"
    elif answered >= MIN_ANSWERED and drop > MIN_LOSS:
        kind = "no collapse"
    else:
        kind = "mostly a format failure"
    return (
        f"{attack}: answers found {student.answered:.0%} (original {original.answered:.0%}), "
        f"correct among them {student.correct_if_answered:.0%} "
        f"({original.correct_if_answered:.0%}): {kind}"
    )


# --- what it adds up to


def conclusion(results: Results) -> str:
    """For a reader who knows none of the rules: which attacks failed, which succeeded, which are
    inconclusive, and what the alternatives are.
    """
    undistillable = check_rule(results.students, "undistillable").changes
    distillable = check_rule(results.students, "distillable")
    sentences = _undistillable_sentences(results) if undistillable else []
    if distillable.changes:
        others = f"; not under {', '.join(distillable.violated)}" if distillable.violated else ""
        sentences.append(
            f"The distillable teacher gave at least {MIN_GAIN:.0%} more than the original under "
            f"{len(distillable.holds)} of {len(distillable.changes)} attacks{others}."
        )
    sentences += _defence_sentences(results.defences)
    changes = [*undistillable.values(), *distillable.changes.values()]
    if max((c.n for c in changes), default=0) == 1:
        sentences.append("One seed: no number here has a standard deviation over seeds yet.")
    return " ".join(sentences)


def _undistillable_sentences(results: Results) -> list[str]:
    outcomes = attack_outcomes(results.students)
    teacher = results.teachers.get("undistillable")
    if teacher is None:
        price = "was not evaluated"
    else:
        price = "preserved its accuracy" if accuracy_preserved(teacher) else "lost accuracy itself"
    failed = [o for o in outcomes if o.verdict == "failed"]
    succeeded = [o for o in outcomes if o.verdict == "succeeded"]
    inconclusive = [o for o in outcomes if o.verdict == "inconclusive"]
    sentences = [
        f"The undistillable teacher {price}. Of {len(outcomes)} attacks on it {len(failed)} "
        "failed: their students end at half of what the same attack takes from the original, or "
        "less, at their last and at their best checkpoint.",
        f"Succeeded: {_accuracies(results.students, succeeded)}."
        if succeeded
        else "None succeeded.",
    ]
    if inconclusive:
        sentences.append(
            "Inconclusive (less than half in the mean, but the interval of the change holds 0): "
            f"{_accuracies(results.students, inconclusive)}."
        )
    return sentences


def _accuracies(students: Students, outcomes: Iterable[AttackOutcome]) -> str:
    return ", ".join(_accuracy(students[o.attack], o) for o in outcomes)


def _accuracy(row: Mapping[str, StudentResult], outcome: AttackOutcome) -> str:
    best = outcome.checkpoint == "best"
    student, original = row["undistillable"], row["original"]
    mine, theirs = (r.best.mean if best else r.sampled.mean for r in (student, original))
    how = ", with its best checkpoint" if best else ""
    return f"{outcome.attack} ({mine:.3f} against {theirs:.3f} from the original{how})"


def _defence_sentences(defences: Mapping[str, DefenceResult]) -> list[str]:
    if "none" not in defences:
        return []
    return [
        _defence_sentence(name, d, defences["none"])
        for name, d in defences.items()
        if name not in ("none", "undistillable") and d.change.n
    ]


def _defence_sentence(name: str, defence: DefenceResult, none: DefenceResult) -> str:
    """What a defence does to students of sampled text, and what it costs."""
    score = defence.score
    if may_be_zero(defence.change) or (score is not None and score.low <= 1 <= score.high):
        effect = "does not measurably change"
    elif defence.change.mean <= MIN_LOSS:
        effect = "halves (or more)"
    else:
        effect = "lowers" if defence.change.mean < 0 else "raises"
    kind = " (an attacker's own move, too)" if name in ATTACKS_AS_DEFENCE.values() else ""
    return (
        f'Serving "{name}"{kind} {effect} what students take ({none.student.mean:.3f} to '
        f"{defence.student.mean:.3f}), {_price(defence.served, none.served)}."
    )


def _price(served: Estimate, undefended: Estimate) -> str:
    if not served.n:
        return "at a price not measured"
    points = 100 * (undefended.mean - served.mean)
    if math.isnan(points):
        return "at a price not measured"
    if points > 100 * MAX_ACCURACY_CHANGE:
        return f"at {points:.1f} points of served accuracy"
    return "at the same served accuracy"
