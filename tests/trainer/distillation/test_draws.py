"""Where tokens are drawn from a teacher: keyed by the text, the seed and the step."""

import numpy as np

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.distillation.draws import draw_noise


def rollout(index=0, ids=(4, 5, 2), repeat=0) -> Rollout:
    prompt = Prompt(index, ({"role": "user", "content": "a"},), repeat=repeat)
    return Rollout(prompt, (1,), ids, (0.0,) * len(ids), 0.0, "", True)


def test_the_same_text_draws_the_same_and_any_other_other_ones():
    base = draw_noise(rollout(), 7, seed=3, step=5)
    assert base.shape == (3, 7) and base.dtype == np.float64
    assert (0 <= base).all() and (base < 1).all()
    np.testing.assert_array_equal(base, draw_noise(rollout(), 7, seed=3, step=5))
    others = [
        draw_noise(rollout(index=1), 7, seed=3, step=5),
        draw_noise(rollout(repeat=1), 7, seed=3, step=5),
        draw_noise(rollout(ids=(4, 6, 2)), 7, seed=3, step=5),
        draw_noise(rollout(), 7, seed=4, step=5),
        draw_noise(rollout(), 7, seed=3, step=6),
    ]
    assert all((base != x).all() for x in others)


def test_the_numbers_are_uniform():
    many = draw_noise(rollout(ids=tuple(range(3, 500))), 64, seed=0, step=1)
    assert abs(many.mean() - 0.5) < 5 * (1 / 12 / many.size) ** 0.5
    assert abs(many.var() - 1 / 12) < 0.002
