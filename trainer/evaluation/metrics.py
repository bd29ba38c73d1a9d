"""Rows of answers -> numbers: accuracy, pass@k, failures by kind, lengths, positions, and what
differs from another run.

Everything is computed prompt by prompt first: values {prompt: mean over its answers}. Intervals are
95 %, bootstrapped over prompts, because the answers of one prompt are not independent.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reflux.trainer.config.evaluation import PASS_AT
from reflux.trainer.runs.stats import Estimate, bootstrap_ratio, sign_flip_p

from .predictions import OUTCOMES

Values = dict[int, float]  # by prompt


class Difference(NamedTuple):
    """What a metric became against another run, on the same prompts."""

    ours: Estimate
    theirs: Estimate
    difference: Estimate  # mean of ours - theirs, paired by prompt
    # sum of differences / sum of theirs; NaN unless that is above 0 (rewards can be below)
    change: Estimate
    p: float  # two-sided, of the prompts' differences under random signs


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the share of k-subsets of n answers, c of them right, with a right
    one (arXiv:2107.03374, eq. 1).
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: n = {n}, c = {c}, k = {k}; want 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def metric_values(rows: Sequence[Mapping], metric: str) -> Values:
    """{prompt: value} of sampled, greedy, pass@K, likelihood_sum or likelihood_per_byte; empty if
    nothing was answered that way.

    The value is the share of right answers, or, where right and wrong do not exist (reward models),
    the mean reward.
    """
    k = PASS_AT.fullmatch(metric)
    groups = _by_prompt(r for r in rows if r["mode"] == ("sampled" if k else metric))
    if not k:
        graded = all(r["correct"] is not None for group in groups.values() for r in group)
        return {
            p: _mean([float(r["correct"]) if graded else r["reward"] for r in group])
            for p, group in groups.items()
        }
    if any(
        len(group) < int(k[1]) or r["correct"] is None for group in groups.values() for r in group
    ):
        raise ValueError(
            f"{metric}: want at least {k[1]} sampled answers of every prompt, each right or wrong"
        )
    return {
        p: pass_at_k(len(group), sum(bool(r["correct"]) for r in group), int(k[1]))
        for p, group in groups.items()
    }


def estimate(values: Values) -> Estimate:
    """Mean over prompts."""
    return bootstrap_ratio(values, dict.fromkeys(values, 1.0))


def compare(ours: Values, theirs: Values) -> Difference:
    """Both over the same prompts."""
    gap = {p: ours[p] - theirs[p] for p in ours}
    change = bootstrap_ratio(
        gap, theirs if sum(theirs.values()) > 0 else dict.fromkeys(theirs, 0.0)
    )
    return Difference(
        estimate(ours), estimate(theirs), estimate(gap), change, sign_flip_p(list(gap.values()))
    )


def check_same(
    ours: Sequence[Mapping], theirs: Sequence[Mapping], folder: str, modes: Sequence[str] = ()
) -> None:
    """ValueError unless both runs answered the same prompts, as often, in these modes (none given:
    in all of ours).
    """
    for mode in modes or dict.fromkeys(r["mode"] for r in ours):
        a, b = (
            {(r["prompt"], r["sample"]): r for r in rows if r["mode"] == mode}
            for rows in (ours, theirs)
        )
        if a.keys() != b.keys():
            count = lambda rows: f"{len(rows)} answers to {len({p for p, _ in rows})} prompts"
            raise ValueError(
                f"{folder}: {mode} has {count(b)}, this run {count(a)}; a paired difference wants "
                "the same prompts and samples. Evaluate both with the same eval.source, "
                "eval.split, eval.limit and eval.samples"
            )
        other = next((k for k in a if not _same_question(a[k], b[k])), None)
        if other is not None:
            raise ValueError(
                f"{folder}: prompt {other[0]} is another question there (answer "
                f"{b[other]['answer']!r}, here {a[other]['answer']!r}). Evaluate both with the "
                "same eval.source"
            )


def _same_question(a: Mapping, b: Mapping) -> bool:
    # rows of an older run have no id
    return a["id"] == b["id"] if "id" in a and "id" in b else a["answer"] == b["answer"]


def measure(rows: Sequence[Mapping], metrics: Sequence[str]) -> dict[str, Estimate]:
    """name -> estimate, for everything that this run's own rows say."""
    found = {m: estimate(metric_values(rows, m)) for m in metrics}
    for mode in dict.fromkeys(r["mode"] for r in rows):
        mine = [r for r in rows if r["mode"] == mode]
        found |= {
            f"{mode}_{name}": e
            for name, e in (_likelihood(mine) if "logp" in mine[0] else _texts(mine)).items()
        }
        found |= {
            f"{mode}_at_{at + 1}": estimate(metric_values(part, mode))
            for at, part in _by_position(mine).items()
        }
    return found


def positions(rows: Sequence[Mapping], mode: str) -> list[dict]:
    """By place of the right option among those shown: how often it is found, and how often that
    place is chosen at all.

    A model that does not look at places chooses each about as often as the right option stands
    there.
    """
    mine = [r for r in rows if r["mode"] == mode]
    places = _by_position(mine)
    return [
        {
            "position": at + 1,
            "prompts": len({r["prompt"] for r in part}),
            "right": estimate(metric_values(part, mode)),
            "chosen": _mean([float(r.get("choice_at") == at) for r in mine]),
        }
        for at, part in places.items()
    ]


def _texts(rows: Sequence[Mapping]) -> dict[str, Estimate]:
    """Kinds of failure (they and the share of right ones add up to 1), failed gradings, lengths in
    tokens.
    """
    graded = all(r["outcome"] is not None for r in rows)
    kinds = OUTCOMES[1:] if graded else ()
    out = {kind: _share(rows, lambda r, kind=kind: r["outcome"] == kind) for kind in kinds}
    if not graded:
        out["truncated"] = _share(rows, lambda r: not r["ended"])
    if any(r["error"] is not None for r in rows):
        out["grader_error"] = _share(rows, lambda r: r["error"] is not None)
    return out | {"length": _share(rows, lambda r: r["tokens"])}


def _likelihood(rows: Sequence[Mapping]) -> dict[str, Estimate]:
    """Log-probability of the right option, nats, in the unit of the mode."""
    per_byte = rows[0]["mode"] == "likelihood_per_byte"
    return {
        "logp": _share(
            rows,
            lambda r: r["logp"][r["position"]] / (r["bytes"][r["position"]] if per_byte else 1),
        )
    }


def _share(rows: Sequence[Mapping], value: Any) -> Estimate:
    return estimate(
        {p: _mean([float(value(r)) for r in group]) for p, group in _by_prompt(rows).items()}
    )


def _by_prompt(rows: Any) -> dict[int, list[Mapping]]:
    groups = defaultdict(list)
    for r in rows:
        groups[r["prompt"]].append(r)
    return dict(groups)


def _by_position(rows: Sequence[Mapping]) -> dict[int, list[Mapping]]:
    groups = defaultdict(list)
    for r in rows:
        if r.get("position") is not None:
            groups[r["position"]].append(r)
    return dict(sorted(groups.items()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
