"""Predictions -> numbers: accuracy, pass@k, failures by kind, lengths, positions of options, and
differences to another run. A failed grade is in none of them.

Everything is computed prompt by prompt first: values {prompt: mean over its answers}. Intervals are
95 %, bootstrapped over prompts, because the answers of one prompt are not independent.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from reflux.trainer.config.evaluation import PASS_AT
from reflux.trainer.runs.stats import Estimate, bootstrap_ratio, mean_over_prompts, sign_flip_p

from .predictions import OUTCOMES, Prediction, Question

Values = Mapping[int, float]  # by prompt
Q = TypeVar("Q", bound=Question)


@dataclass(frozen=True)
class Difference:
    """A metric against another run, on the same prompts."""

    ours: Estimate
    theirs: Estimate
    difference: Estimate  # mean of ours - theirs, paired by prompt
    # sum of differences / sum of theirs; NaN unless that is above 0 (rewards can be below)
    change: Estimate
    p: float  # two-sided, of the prompts' differences under random signs


@dataclass(frozen=True)
class PositionStats:
    """The prompts whose correct option is shown at one position."""

    position: int  # from 1
    prompts: int
    accuracy: Estimate
    chosen: float  # fraction of all answers that choose this position


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the fraction of k-subsets of n answers, c of them correct, that hold
    a correct one (arXiv:2107.03374, eq. 1). ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: n = {n}, c = {c}, k = {k}; want 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def metric_values(predictions: Sequence[Prediction], metric: str) -> Values:
    """{prompt: value} of sampled, greedy, pass@K, likelihood_sum or likelihood_per_byte; empty if
    nothing was answered that way.

    The value is the fraction of correct answers, or, where the grader knows no correct ones (reward
    models), the mean reward, that of a truncated text that no grader saw being at most the least
    of all others. A prompt whose grades all failed has no value; with pass@K, one with fewer than K
    grades. ValueError if pass@K has fewer than K answers of a prompt.
    """
    k = PASS_AT.fullmatch(metric)
    answers = of_mode(predictions, "sampled" if k else metric)
    if k:
        return _pass_at(metric, int(k[1]), answers)
    groups = _by_prompt(p for p in answers if not p.failed)
    graded = all(p.correct is not None for group in groups.values() for p in group)
    least = min([0.0, *(p.reward for group in groups.values() for p in group if _seen(p))])

    def value(p: Prediction) -> float:
        if graded:
            return float(p.correct or False)
        return p.reward if _seen(p) else least

    return {prompt: _mean([value(p) for p in group]) for prompt, group in groups.items()}


def _seen(p: Prediction) -> bool:
    """Whether a grader saw the answer."""
    return p.generation is None or p.generation.graded


def _pass_at(metric: str, k: int, answers: Sequence[Prediction]) -> Values:
    values = {}
    for prompt, group in _by_prompt(answers).items():
        if len(group) < k or any(p.correct is None for p in group):
            raise ValueError(
                f"{metric}: want at least {k} sampled answers of every prompt, each correct or "
                "wrong"
            )
        graded = [bool(p.correct) for p in group if not p.failed]
        if len(graded) >= k:
            values[prompt] = pass_at_k(len(graded), sum(graded), k)
    return values


def compare(ours: Values, theirs: Values) -> Difference:
    """Over the prompts that have a value in both."""
    both = ours.keys() & theirs.keys()
    ours, theirs = ({p: v for p, v in x.items() if p in both} for x in (ours, theirs))
    gap = {p: ours[p] - theirs[p] for p in ours}
    base = theirs if sum(theirs.values()) > 0 else dict.fromkeys(theirs, 0.0)
    return Difference(
        ours=mean_over_prompts(ours),
        theirs=mean_over_prompts(theirs),
        difference=mean_over_prompts(gap),
        change=bootstrap_ratio(gap, base),
        p=sign_flip_p(list(gap.values())),
    )


def check_same(
    ours: Sequence[Question], theirs: Sequence[Question], folder: str, modes: Sequence[str] = ()
) -> None:
    """ValueError unless both runs have the same questions, as often, in these modes (none given: in
    all of ours). folder: of theirs.
    """
    for mode in modes or dict.fromkeys(q.mode for q in ours):
        a, b = (
            {(q.prompt, q.sample): q for q in questions if q.mode == mode}
            for questions in (ours, theirs)
        )
        if a.keys() != b.keys():
            raise ValueError(
                f"{folder}: {mode} has {_count(b)}, this run {_count(a)}; a paired difference "
                "wants the same prompts and samples. Evaluate both with the same eval.source, "
                "eval.split, eval.limit and eval.samples"
            )
        other = next((key for key in a if not _same_question(a[key], b[key])), None)
        if other is not None:
            raise ValueError(
                f"{folder}: prompt {other[0]} is another question there (answer "
                f"{b[other].answer!r}, here {a[other].answer!r}). Evaluate both with the same "
                "eval.source"
            )


def _count(questions: Mapping[tuple[int, int], Question]) -> str:
    return f"{len(questions)} answers to {len({prompt for prompt, _ in questions})} prompts"


def _same_question(a: Question, b: Question) -> bool:
    return a.answer == b.answer if a.id is None or b.id is None else a.id == b.id


def measure(predictions: Sequence[Prediction], metrics: Sequence[str]) -> dict[str, Estimate]:
    """name -> estimate, for everything that this run's own predictions hold."""
    estimates = {m: mean_over_prompts(metric_values(predictions, m)) for m in metrics}
    for mode in dict.fromkeys(p.mode for p in predictions):
        mine = of_mode(predictions, mode)
        parts = _option_stats(mine, mode) if mine[0].options else _text_stats(mine)
        estimates |= {f"{mode}_{name}": e for name, e in parts.items()}
        estimates |= {
            f"{mode}_at_{at + 1}": mean_over_prompts(metric_values(part, mode))
            for at, part in _by_position(mine).items()
        }
    return estimates


def position_stats(predictions: Sequence[Prediction], mode: str) -> list[PositionStats]:
    """By position of the correct option among those shown. A model that ignores positions chooses
    each about as often as the correct option stands there.
    """
    mine = of_mode(predictions, mode)
    return [
        PositionStats(
            position=at + 1,
            prompts=len({p.prompt for p in part}),
            accuracy=mean_over_prompts(metric_values(part, mode)),
            chosen=_mean([float(p.choice_at == at) for p in mine]),
        )
        for at, part in _by_position(mine).items()
    ]


def of_part(questions: Sequence[Q], part: str) -> Sequence[Q]:
    """Of one part of [eval.parts]; of an empty name, all."""
    return [q for q in questions if q.part == part] if part else questions


def of_mode(questions: Iterable[Q], mode: str) -> list[Q]:
    return [q for q in questions if q.mode == mode]


def _text_stats(predictions: Sequence[Prediction]) -> dict[str, Estimate]:
    """Of the texts that have a grade, kinds of failure (they and the fraction of correct ones add
    up to 1); of all texts, failed grades and lengths in tokens.
    """
    texts = [p.generation for p in predictions if p.generation]
    graded = [p for p in predictions if not p.failed]
    outcomes = [p.generation.outcome for p in graded if p.generation]
    stats: dict[str, Sequence[float]] = {}
    kinds: dict[str, Estimate] = {}
    if None not in outcomes:
        for kind in OUTCOMES[1:]:
            kinds[kind] = _mean_of(graded, [o == kind for o in outcomes])
    else:
        stats["truncated"] = [not g.ended for g in texts]
    if len(graded) < len(predictions):
        stats["grader_error"] = [p.failed for p in predictions]
    stats["length"] = [g.tokens for g in texts]
    return kinds | {name: _mean_of(predictions, values) for name, values in stats.items()}


def _option_stats(predictions: Sequence[Prediction], mode: str) -> dict[str, Estimate]:
    """Log-probability of the correct option, nats, in the unit of the mode."""
    logp = []
    for p in predictions:
        assert p.options and p.position is not None
        size = p.options.n_bytes[p.position] if mode == "likelihood_per_byte" else 1
        logp.append(p.options.logp[p.position] / size)
    return {"logp": _mean_of(predictions, logp)}


def _mean_of(predictions: Sequence[Prediction], values: Sequence[float]) -> Estimate:
    groups = defaultdict(list)
    for p, value in zip(predictions, values, strict=True):
        groups[p.prompt].append(float(value))
    return mean_over_prompts({prompt: _mean(group) for prompt, group in groups.items()})


def _by_prompt(predictions: Iterable[Prediction]) -> dict[int, list[Prediction]]:
    groups = defaultdict(list)
    for p in predictions:
        groups[p.prompt].append(p)
    return dict(groups)


def _by_position(predictions: Iterable[Prediction]) -> dict[int, list[Prediction]]:
    groups = defaultdict(list)
    for p in predictions:
        if p.position is not None:
            groups[p.position].append(p)
    return dict(sorted(groups.items()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
