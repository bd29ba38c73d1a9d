"""The acceptance rules A1 to A5 of docs/method.md, and what they add up to, in sentences.

Every verdict is that of a whole 95 % interval over seeds: a rule holds if all of the interval
satisfies it, is violated if none of it does, and is inconclusive between, or with fewer than three
seeds (rules.py). A verdict on an attack is from the attacker's side. On the undistillable teacher
it has failed if the student ends at half of what the same attack takes from the original teacher,
or less, both at its last and at its best checkpoint; it has succeeded if the student keeps more
than half at either.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from reflux.trainer.runs.markdown_table import points_with_interval, with_interval
from reflux.trainer.runs.stats import Estimate, holm, may_be_zero, relative_change

from .defence_report import ATTACKS_AS_DEFENCE
from .results import (
    Change,
    Checkpoint,
    DefenceResult,
    Results,
    Rule,
    StudentResult,
    TeacherResult,
    Verdict,
)
from .rules import (
    MeanOverAttacks,
    at_least,
    at_most,
    enough_seeds,
    has_bounds,
    mean_over_attacks,
    worst,
)

MAX_ACCURACY_CHANGE = 0.02  # A1: of a teacher, sampled and greedy
MIN_GAIN, MIN_LOSS = 0.15, -0.50  # A2, A3: relative change of the student's accuracy
MIN_ANSWERED = 0.9  # A5: fraction of answers found, relative to the original's student
MIN_FOUND = 0.05  # A5: of texts with an answer; with fewer, accuracy among them says nothing
MAX_SPIKE = 10.0  # A5: a gradient norm late in a run / the median there
FAMILY = 0.05  # Holm's error rate over all attacks
CHECKPOINTS: tuple[Checkpoint, ...] = ("last", "best")
EXTREMES = {"undistillable": ("largest", max), "distillable": ("smallest", min)}  # is its worst
A1_WORDS = {"holds": "yes", "violated": "no", "inconclusive": "inconclusive"}
PRESERVED = {"holds": "preserved", "violated": "NOT preserved", "inconclusive": "INCONCLUSIVE"}
SHARED = (
    "the attacks share teachers, student starts and prompts, so they are no independent "
    "confirmations of each other"
)

NOT_MEASURED = "not measured"

Students = Mapping[str, Mapping[str, StudentResult]]  # attack -> teacher


# --- the rules


def within_a1(gap: Estimate) -> Rule:
    """A1 of a teacher's accuracy minus the original's: the whole interval lies inside +-2 points,
    or none of it does.
    """
    limit = MAX_ACCURACY_CHANGE + 1e-9
    return worst(at_least(gap, -limit), at_most(gap, limit))


def accuracy_preserved(teacher: TeacherResult) -> Rule:
    """A1, sampled and greedy."""
    d = teacher.difference
    return worst(within_a1(d.sampled), within_a1(d.greedy))


@dataclass(frozen=True)
class RuleCheck:
    """A2 or A3 on one teacher, attack by attack."""

    changes: Mapping[str, Estimate]  # attack -> relative change of its student
    rules: Mapping[str, Rule]  # attack -> by the whole interval of that

    def of(self, rule: Rule) -> list[str]:
        return [a for a, r in self.rules.items() if r == rule]


def check_rule(students: Students, teacher: str, checkpoint: Checkpoint = "last") -> RuleCheck:
    """A2 for the distillable teacher, A3 for any other."""
    changes = {
        attack: change.at(checkpoint)
        for attack, row in students.items()
        if teacher in row and (change := row[teacher].change) is not None
    }
    changes = {attack: c for attack, c in changes.items() if c.n}
    up = teacher == "distillable"
    rules = {a: at_least(c, MIN_GAIN) if up else at_most(c, MIN_LOSS) for a, c in changes.items()}
    return RuleCheck(changes, rules)


@dataclass(frozen=True)
class AttackOutcome:
    attack: str
    verdict: Verdict
    checkpoint: Checkpoint = "last"  # the one that decided
    # of "its students keep just half", the larger of both checkpoints', then over all attacks; NaN
    # with too few seeds for a verdict
    p: float = field(default=math.nan, compare=False)
    p_family: float = field(default=math.nan, compare=False)


def attack_outcomes(students: Students) -> list[AttackOutcome]:
    """Of the attacks on the undistillable teacher; those that the best checkpoint decided last."""
    rows = ((a, row["undistillable"]) for a, row in students.items() if "undistillable" in row)
    changes = {a: s.change for a, s in rows if s.change is not None and s.change.sampled.n}
    outcomes = adjust_for_family([_judge_change(a, change) for a, change in changes.items()])
    return sorted(outcomes, key=lambda o: o.checkpoint == "best")


def _judge_change(attack: str, change: Change) -> AttackOutcome:
    at = {c: change.at(c) for c in CHECKPOINTS}
    return judge_attack(attack, at, {c: change.p(c, MIN_LOSS) for c in CHECKPOINTS})


def judge_attack(
    attack: str, changes: Mapping[Checkpoint, Estimate], ps: Mapping[Checkpoint, float]
) -> AttackOutcome:
    """By what it changes at both checkpoints. ps: of "its students keep just half"."""
    rules = {c: at_most(e, MIN_LOSS) for c, e in changes.items() if e.n}
    rule = worst(*rules.values())
    verdicts: dict[Rule, Verdict] = {"holds": "failed", "violated": "succeeded"}
    decided: Checkpoint = "best" if rules["last"] != rule else "last"
    known = [p if enough_seeds(changes[c]) else math.nan for c, p in ps.items()]
    p = max(known, key=lambda x: (math.isnan(x), x))
    return AttackOutcome(attack, verdicts.get(rule, "inconclusive"), decided, p)


def adjust_for_family(outcomes: Sequence[AttackOutcome]) -> list[AttackOutcome]:
    """By Holm, over these attacks."""
    family = holm([o.p for o in outcomes])
    return [replace(o, p_family=p) for o, p in zip(outcomes, family)]


# --- one line for each rule


def verdict_lines(results: Results) -> list[str]:
    """A1 to A3, distillability, and divergence; the other lines of A5 are collapse_lines."""
    students = results.students
    return [
        *_teacher_lines(results.teachers),
        *headline_lines(students),
        *_student_lines(students, "distillable"),
        *_control_lines(students),
        *_student_lines(students, "undistillable"),
        *_student_lines(students, "undistillable", "best"),
        *_family_lines(students),
        *_divergence_lines(students),
    ]


def _teacher_lines(teachers: Mapping[str, TeacherResult]) -> list[str]:
    limit = f"{MAX_ACCURACY_CHANGE * 100:.0f} points"
    lines = []
    for name, t in teachers.items():
        if name != "original":
            d, word = t.difference, PRESERVED[accuracy_preserved(t)]
            gaps = f"sampled {points_with_interval(d.sampled) or NOT_MEASURED}, greedy "
            gaps += f"{points_with_interval(d.greedy) or NOT_MEASURED}; n = {d.sampled.n} seeds"
            lines.append(f"teacher {name}: accuracy {word} within {limit} ({gaps})")
    if teachers and "task_only" not in teachers:
        lines.append("teacher task_only (eta = 0, the control): not run")
    return lines


def change_words(change: Estimate) -> str:
    """-85% [-100%, -27%]"""
    return with_interval(change, "{:+.0%}")


def _student_lines(students: Students, teacher: str, checkpoint: Checkpoint = "last") -> list[str]:
    check = check_rule(students, teacher, checkpoint)
    if not check.changes:
        return []
    best = checkpoint == "best"
    whose = ", each run's best checkpoint (the attacker stops early)" if best else ""
    limit = f">= {MIN_GAIN:+.0%}" if teacher == "distillable" else f"<= {MIN_LOSS:+.0%}"
    n = max(c.n for c in check.changes.values())
    lines = [
        f"students of the {teacher} teacher{whose}, whole interval over n = {n} seeds {limit} of "
        f"the original's: {len(check.of('holds'))} of {len(check.changes)} attacks"
        + _listed(check, "holds")
    ]
    violated = "not reached" if teacher == "distillable" else "attack succeeded"
    early = " early" if best else ""
    words: dict[Rule, str] = {"violated": violated, "inconclusive": "inconclusive"}
    for rule, word in words.items():
        if named := _listed(check, rule):
            lines.append(f"{word}{early}:{named}")
    return lines


def _listed(check: RuleCheck, rule: Rule) -> str:
    changes = [f"{a} {change_words(check.changes[a])}" for a in check.of(rule)]
    return f" {', '.join(changes)}" if changes else ""


def _control_lines(students: Students) -> list[str]:
    """A2's second half: better than a teacher that was merely trained on the task."""
    rows = {a: row["distillable"] for a, row in students.items() if "distillable" in row}
    gaps = {a: s.over_control for a, s in rows.items() if s.over_control is not None}
    if not rows:
        return []
    above = [a for a, gap in gaps.items() if enough_seeds(gap) and gap.low > 0]
    below = [a for a, gap in gaps.items() if enough_seeds(gap) and gap.high <= 0]
    return [
        f"above the student of the task-only teacher (eta = 0), whole interval: {len(above)} of "
        f"{len(gaps)} attacks, {len(gaps) - len(above) - len(below)} inconclusive; the control was "
        f"not run for {len(rows) - len(gaps)}"
    ]


@dataclass(frozen=True)
class Headline:
    """Distillability of a teacher over all attacks, at its worst and in the mean."""

    teacher: str
    word: str  # largest (undistillable), smallest (distillable)
    attack: str  # whose students gained so much
    score: Estimate
    mean: MeanOverAttacks
    attacks: int


def headline(teacher: str, scores: Mapping[str, Estimate]) -> Headline | None:
    """scores: attack -> distillability of the teacher; None without any."""
    if not scores:
        return None
    word, pick = EXTREMES[teacher]
    attack = pick(scores, key=lambda a: scores[a].mean)
    mean = mean_over_attacks(scores)
    return Headline(teacher, word, attack, scores[attack], mean, len(scores))


def headline_lines(students: Students) -> list[str]:
    """Distillability at its worst, beside its mean."""
    lines = []
    for teacher in EXTREMES:
        rows = ((a, row[teacher].score) for a, row in students.items() if teacher in row)
        if h := headline(teacher, {a: s for a, s in rows if s is not None}):
            bounds = "" if has_bounds(h.score) else ", no bounded interval"
            lines.append(
                f"headline: {h.word} distillability of the {teacher} teacher over {h.attacks} "
                f"attacks (1 = what the original gives): {with_interval(h.score, '{:.2f}')} "
                f"({h.attack}; n = {h.score.n} seeds{bounds}), {_mean_words(h.mean)}"
            )
    return lines


def _mean_words(mean: MeanOverAttacks) -> str:
    bounds = f", {mean.say_bounds()}" if mean.unbounded else ""
    return f"mean over {mean.attacks} attacks {mean.value:.2f}{bounds}"


def _family_lines(students: Students) -> list[str]:
    outcomes = attack_outcomes(students)
    if len(outcomes) < 2:
        return []
    both: tuple[Verdict, ...] = ("failed", "succeeded")
    kept = "; ".join(_of_family(outcomes, verdict) for verdict in both)
    return [
        f"with a family-wise error of {FAMILY:.0%} over the {len(outcomes)} attacks (Holm): "
        f"{kept}; {SHARED}"
    ]


def _of_family(outcomes: Sequence[AttackOutcome], verdict: Verdict) -> str:
    """How many of this verdict Holm's correction leaves, which, and its smallest adjusted p."""
    ps = {o.attack: o.p_family for o in outcomes if o.verdict == verdict}
    holding = [attack for attack, p in ps.items() if p <= FAMILY]
    text = f"{len(holding)} of {len(ps)} {verdict}"
    if holding:
        text += f" ({', '.join(holding)})"
    return text + (f", smallest adjusted p {min(ps.values()):.3f}" if ps else "")


def _divergence_lines(students: Students) -> list[str]:
    """A5: a student whose training diverged says nothing about its teacher. Only of students that
    collapsed: near its optimum a successful run has no gradient left to compare with.
    """
    collapsed = [
        a for a, c in check_rule(students, "undistillable").changes.items() if c.mean <= MIN_LOSS
    ]
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
    if not (original.sampled.n and student.sampled.n):
        return f"{attack}: answers found {NOT_MEASURED}, without sampled answers (eval.samples)"
    if math.isnan(original.answered) or math.isnan(student.answered):
        return f"{attack}: answers found {NOT_MEASURED}, for the grader gives rewards"
    answered = student.answered / max(original.answered, 1e-9)
    drop = relative_change(student.correct_if_answered, original.correct_if_answered)
    if not original.answered or not original.correct_if_answered:
        kind = "nothing to lose, for the original's student has no correct answer"
    elif student.answered < MIN_FOUND and answered < MIN_ANSWERED:
        kind = f"mostly a format failure, with answers in fewer than {MIN_FOUND:.0%} of the texts"
    elif drop <= MIN_LOSS:
        kind = "wrong answers, not missing ones"
    elif answered >= MIN_ANSWERED or answered * (1 + drop) >= 1:  # the latter: no less correct
        kind = "no collapse"
    else:
        kind = "mostly a format failure"
    mine, theirs = (
        f"{r.correct_if_answered:.0%}" if r.answered else "none" for r in (student, original)
    )
    return (
        f"{attack}: answers found {student.answered:.0%} (original {original.answered:.0%}), "
        f"correct among them {mine} ({theirs}): {kind}"
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
        sentences.append(_distillable_sentence(distillable))
    for line in headline_lines(results.students):
        sentences.append(line[0].upper() + line[1:] + ".")
    sentences += _defence_sentences(results.defences)
    defences = {name: d.change for name, d in _other_defences(results.defences).items()}
    changes = (undistillable, distillable.changes, defences)
    return " ".join([*sentences, *_too_few_seeds([c for c in changes if c])])


def _too_few_seeds(changes: Sequence[Mapping[str, Estimate]]) -> list[str]:
    """A4: which attacks and defences have no verdict whatever their numbers. changes: of each
    teacher, by attack; by defence.
    """
    few = {a: c for rows in changes for a, c in rows.items() if not enough_seeds(c)}
    if not few:
        return []
    which = "" if all(a in few for rows in changes for a in rows) else f": {', '.join(few)}"
    return [f"Fewer than three seeds give no verdict (A4){which}."]


def _distillable_sentence(check: RuleCheck) -> str:
    sentence = (
        f"The distillable teacher gave at least {MIN_GAIN:.0%} more than the original, by the "
        f"whole interval, under {len(check.of('holds'))} of {len(check.changes)} attacks"
    )
    if violated := check.of("violated"):
        sentence += f"; not under {', '.join(violated)}"
    if open_ := check.of("inconclusive"):
        sentence += f"; inconclusive under {', '.join(open_)}"
    return sentence + "."


def _undistillable_sentences(results: Results) -> list[str]:
    outcomes = attack_outcomes(results.students)
    teacher = results.teachers.get("undistillable")
    prices = {
        "holds": "preserved its accuracy",
        "violated": "lost accuracy itself",
        "inconclusive": "may have lost accuracy itself (inconclusive)",
    }
    price = "was not evaluated" if teacher is None else prices[accuracy_preserved(teacher)]
    of = {v: [o for o in outcomes if o.verdict == v] for v in ("failed", "succeeded")}
    inconclusive = [o for o in outcomes if o.verdict == "inconclusive"]
    sentences = [
        f"The undistillable teacher {price}. Of {len(outcomes)} attacks on it {len(of['failed'])} "
        f"failed, {len(of['succeeded'])} succeeded and {len(inconclusive)} are inconclusive, by "
        "whether the whole interval over seeds lies at half of what the same attack takes from the "
        "original, or less, at the last and at the best checkpoint.",
    ]
    for word, rows in (("Succeeded", of["succeeded"]), ("Inconclusive", inconclusive)):
        if rows:
            sentences.append(f"{word}: {_accuracies(results.students, rows)}.")
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
    return [_defence_sentence(name, d) for name, d in _other_defences(defences).items()]


def _other_defences(defences: Mapping[str, DefenceResult]) -> dict[str, DefenceResult]:
    """Those that are served in place of a calibrated teacher, beside the undefended original."""
    if "none" not in defences:
        return {}
    calibrated = ("none", "task_only", "undistillable")
    return {name: d for name, d in defences.items() if name not in calibrated and d.change.n}


def _defence_sentence(name: str, defence: DefenceResult) -> str:
    """What a defence does to its students, and what it costs."""
    if not enough_seeds(defence.change):
        effect = f"gives no verdict, with n = {defence.change.n}, on"
    elif may_be_zero(defence.change):
        effect = "does not measurably change"
    elif at_most(defence.change, MIN_LOSS) == "holds":
        effect = "halves (or more)"
    else:
        effect = "lowers" if defence.change.mean < 0 else "raises"
    kind = " (an attacker's own move, too)" if name in ATTACKS_AS_DEFENCE.values() else ""
    return (
        f'Serving "{name}"{kind} {effect} what students take ({defence.undefended.mean:.3f} to '
        f"{defence.student.mean:.3f}, {change_words(defence.change)}), {_price(defence.price)}."
    )


def _price(price: Estimate) -> str:
    """Of accuracy that whoever is served loses."""
    if not price.n:
        return "at a price not measured"
    words = f"{points_with_interval(price)} points"
    rule = within_a1(price)
    if rule == "holds":
        return f"at the same served accuracy within 2 points (lost: {words})"
    if rule == "violated" and price.mean < 0:
        return f"at {points_with_interval(_negated(price))} points more of served accuracy"
    if rule == "violated":
        return f"at {words} of served accuracy"
    return f"at {words} of served accuracy, inconclusive"


def _negated(e: Estimate) -> Estimate:
    return e._replace(mean=-e.mean, low=-e.high, high=-e.low)
