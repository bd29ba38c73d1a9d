"""Several proxies: mean, smallest, largest, and the one that a row names."""

from dataclasses import replace

import numpy as np
import pytest
from runs import config, run_here, write_data

from reflux.trainer.calibration.likelihood_ratio import LikelihoodRatio
from reflux.trainer.calibration.rewards import build_reward
from reflux.trainer.calibration.several_proxies import UNSCORED, SeveralProxies
from reflux.trainer.config.sections import CalibrationSection, FrozenSection
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.phase import TextScore

ASKED = [{"role": "user", "content": "Why?"}]


class Fixed:
    """A reward that pays `values` by the prompt's index; None: unaligned."""

    def __init__(self, *values):
        self.values, self.seen = values, []

    def score(self, rollouts, behaviour, reference, metric_sums):
        self.seen = [r.prompt.index for r in rollouts]
        assert len(behaviour) == len(rollouts)
        found = [self.values[i] for i in self.seen]
        return [
            UNSCORED if v is None else replace(UNSCORED, value=v, raw=2 * v, scored=True)
            for v in found
        ]


class Cfg:
    proxy = FrozenSection("models/a")

    def __init__(self, **options):
        self.calibration = CalibrationSection(proxies=("models/b",), **options)


def rollouts(*who):
    return [
        Rollout(
            Prompt(i, ({"role": "user", "content": "x"},), extra={"who": name}),
            (1,), (2,), (0.0,), 0.0, "", True,
        )
        for i, name in enumerate(who)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "how, want",
    [("mean", [2.0, None, 0.5]), ("min", [1.0, None, -1.0]), ("max", [3.0, None, 2.0])],
)
def test_the_rewards_of_all_proxies_become_one(how, want):
    first, second = Fixed(1.0, 5.0, 2.0), Fixed(3.0, None, -1.0)
    reward = SeveralProxies(Cfg(proxy_aggregate=how), [first, second])
    texts = rollouts("a", "b", "a")
    got = reward.score(texts, [TextScore(np.zeros(1), 0.0)] * 3, None, MetricSums())
    assert [s.value if s.scored else None for s in got] == want
    assert all(s.raw == 2 * s.value for s in got)


def test_a_row_names_its_proxy_and_no_other_one_reads_it():
    first, second = Fixed(1.0, 5.0, 2.0), Fixed(3.0, 4.0, -1.0)
    reward = SeveralProxies(Cfg(proxy_aggregate="row", proxy_route="who"), [first, second])
    got = reward.score(rollouts("a", "b", 1), [TextScore(np.zeros(1), 0.0)] * 3, None, MetricSums())
    assert [s.value for s in got] == [1.0, 4.0, -1.0]
    assert first.seen == [0] and second.seen == [1, 2]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_stands_before_a_token_is_worth_the_mean_too(order):
    """credit = "prefix": left out of the mean is what the text before is worth to the mean."""
    before = [np.array([0.0, 1.0, 2.0]), np.array([0.0, -3.0, 4.0])]
    scores = [replace(UNSCORED, value=1.0, scored=True, before=before[i]) for i in order]
    reward = SeveralProxies(Cfg(proxy_aggregate="mean"), [])
    np.testing.assert_array_equal(reward._aggregate(scores).before, [0.0, -1.0, 3.0])
    unknown = [scores[0], replace(scores[1], before=None)]
    assert reward._aggregate(unknown).before is None


@pytest.mark.usefixtures("titan_process")
def test_several_proxies_render_by_their_own_templates(talkers, tmp_path, monkeypatch):
    """One that is for one of them is not asked of the others."""
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}{{ mark }}")
    own = {"template": str(template), "template_arguments": {"mark": "!"}}
    found = []
    monkeypatch.setattr(LikelihoodRatio, "__init__", lambda _, cfg, *__: found.append(cfg.proxy))
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        proxy={"path": str(talkers / "proxy"), **own},
        calibration={"mode": "distillable", "proxies": [str(talkers / "teacher")]},
    )
    build_reward(cfg, None, None)
    texts = [Chat.of(m).decode(Chat.of(m).prompt_ids(ASKED)) for m in found]
    assert texts[0] == "Why?!"
    plain = Chat(str(talkers / "teacher"))
    assert Chat.of(found[1]).prompt_ids(ASKED) == plain.prompt_ids(ASKED)


@pytest.mark.usefixtures("titan_process")
def test_the_same_proxy_twice_is_the_proxy_once(talkers, tmp_path):
    def run(name, **calibration):
        calibration = {"mode": "distillable", "max_unaligned": 1.0} | calibration
        cfg = config(talkers, tmp_path / name, "calibrate", calibration=calibration)
        return [(s["loss"], s["grad_norm"], s["cal/raw_nats"]) for s in run_here(cfg).steps]

    write_data(tmp_path)
    once = run("once")
    for how in ("mean", "min"):
        twice = run(how, proxies=[str(talkers / "proxy")], proxy_aggregate=how)
        np.testing.assert_allclose(twice, once, rtol=1e-6)
    other = run("other", proxies=[str(talkers / "teacher")])
    assert not np.allclose(other, once, rtol=1e-3)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="want both, 'row' and a column"):
        CalibrationSection(proxy_aggregate="row")
    with pytest.raises(ValueError, match="want both, 'row' and a column"):
        CalibrationSection(proxy_route="who")
    with pytest.raises(ValueError, match="into different spans|different spans"):
        CalibrationSection(proxies=("p",), credit="span")
