"""What each form of the calibration reward does to the length of texts, in a world small enough for
a table: python -m bench.lengths [--record]

A policy is one logit for each of 16 texts: two styles, one to eight words of four bytes. The proxy
is worse than the original by 0.7 nats a word and by 2 more for a text in the hard style. Groups of
8 are sampled, and the program's own calibration_part and advantages (task rewards all 1, equation
(4)) with an exact KL of the table move the logits: 150 steps, beta 0.2, eta +-0.5 as in the
miniature. It is no language model: it shows the reward, without a network that generalises.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from reflux.trainer.calibration.advantages import Groups, advantages, calibration_part
from reflux.trainer.config.sections import CalibrationSection
from reflux.trainer.phase import CalibrationScore
from reflux.trainer.runs.files import to_json
from reflux.trainer.runs.markdown_table import table, with_interval
from reflux.trainer.runs.stats import over_seeds

from .records import write

FORMS = ("length_free", "sum", "per_byte")
MODES = ("distillable", "undistillable")
SEEDS = (0, 1, 2, 3, 4)
STEPS, PROMPTS, GROUP, LR, BETA = 150, 8, 8, 0.3, 0.2
WORDS_N = np.tile(np.arange(1.0, 9.0), 2)  # N texts; the first half is in the easy style
EASY_N = np.repeat((1.0, 0.0), 8)
BYTES = 4  # of a word
WORSE_N = -0.7 * WORDS_N - 2.0 * (1 - EASY_N)  # log C - log T0


def original() -> np.ndarray:
    """log T0: a third of the texts is in the easy style, lengths around 4.5 words."""
    logits = -((WORDS_N - 4.5) ** 2) / 8 + np.log(np.where(EASY_N, 1 / 3, 2 / 3))
    return _normalised(logits)


def calibrate(mode: str, form: str, seed: int) -> dict[str, float]:
    """Trains one policy; mean words, fraction of the easy style and KL to the original, exactly,
    at its end, against the original's.
    """
    cal = CalibrationSection(mode=mode, score_norm=form)  # type: ignore[arg-type]
    rng, log_t0 = np.random.default_rng(seed), original()
    log_pi = log_t0.copy()
    for _ in range(STEPS):
        pi = np.exp(log_pi)
        drawn = rng.choice(len(pi), size=(PROMPTS, GROUP), p=pi / pi.sum())
        advantage = _advantages(drawn, log_t0 + WORSE_N - log_pi, cal)
        policy = np.bincount(drawn.ravel(), advantage.ravel(), len(pi)) - advantage.sum() * pi
        ratio = log_pi - log_t0
        reference = pi * (ratio - pi @ ratio)
        log_pi = _normalised(log_pi + LR * (policy / drawn.size - BETA * reference))
    pi, t0 = np.exp(log_pi), np.exp(log_t0)
    return {
        "words": float(pi @ WORDS_N - t0 @ WORDS_N),
        "easy": float(pi @ EASY_N - t0 @ EASY_N),
        "kl": float(pi @ (log_pi - log_t0)),
    }


def _advantages(drawn: np.ndarray, reward_N: np.ndarray, cal: CalibrationSection) -> np.ndarray:
    scores_N = [_score(r, int(BYTES * n), cal.score_norm) for r, n in zip(reward_N, WORDS_N)]
    ones = np.ones(drawn.shape)
    scores = [[scores_N[i] for i in row] for row in drawn]
    groups = Groups(ones, ones > 0, np.ones(drawn.shape, int), ones > 0, scores)
    token = advantages(groups, calibration_part(groups, cal), cal, cal.eta)
    return np.array([[a[0] for a in row] for row in token])


def _score(nats: float, n_bytes: int, form: str) -> CalibrationScore:
    value = float(nats) / (n_bytes if form == "per_byte" else 1)
    return CalibrationScore(
        value, float(nats), np.zeros(0), np.zeros(0, np.int64), 0.0, n_bytes, 0.0, True
    )


def _normalised(log_p: np.ndarray) -> np.ndarray:
    return log_p - np.log(np.exp(log_p - log_p.max()).sum()) - log_p.max()


def measure(seeds: Sequence[int] = SEEDS) -> dict[str, dict[str, dict[str, Any]]]:
    """mode -> form -> measure -> estimate over seeds, and each seed's number."""
    return {mode: {form: _over(mode, form, seeds) for form in FORMS} for mode in MODES}


def _over(mode: str, form: str, seeds: Sequence[int]) -> dict[str, Any]:
    runs = [calibrate(mode, form, seed) for seed in seeds]
    return {
        name: {"estimate": over_seeds([r[name] for r in runs]), "seeds": [r[name] for r in runs]}
        for name in runs[0]
    }


def page(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = [
        (
            f"`{form}`, {mode}",
            *(with_interval(of[name]["estimate"], "{:+.2f}") for name in ("words", "easy", "kl")),
        )
        for mode, forms in measured.items()
        for form, of in forms.items()
    ]
    return table(("form", "words", "easy style", "KL, nats a text"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.lengths", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--record", action="store_true", help="write bench/records/DATE_lengths")
    args = parser.parse_args(arguments)
    measured = measure()
    print(page(measured))
    if args.record:
        content = {"seeds": list(SEEDS), "steps": STEPS, "measured": to_json(measured)}
        print(write("lengths", content, command="python -m bench.lengths"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
