"""Phase 1 on tiny models that answer: plain GRPO when it is off, one flipped term when the mode
flips, frozen models frozen.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import calibration_cases
import numpy as np
import pytest
import torch
from runs import config, numbers, reward_vowels, run_here
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from reflux.trainer.calibration.advantages import Groups, calibration_part
from reflux.trainer.calibration.likelihood_ratio import LikelihoodRatio
from reflux.trainer.calibration.phase import CalibratePhase
from reflux.trainer.config.sections import CalibrationSection
from reflux.trainer.data.chat import Chat
from reflux.trainer.engine import engine as titan
from reflux.trainer.engine.metrics import MetricSums

pytestmark = pytest.mark.usefixtures("titan_process")
ON = {"calibration": {"mode": "distillable"}}


@dataclass
class Watch:
    """What went through the phase, step by step."""

    phase: Any = None
    rollouts: list = field(default_factory=list)  # [steps][P][G]
    samples: list = field(default_factory=list)  # [steps][N]
    scores: list = field(default_factory=list)  # [steps][N] CalibrationScore
    frozen: list = field(default_factory=list)  # paths, in the order they were loaded
    at_close: Callable = lambda phase: None
    closed: list = field(default_factory=list)  # what at_close returned after each step


@pytest.fixture
def watch(monkeypatch) -> Watch:
    seen = Watch()

    def keep(owner, name, where):
        real = getattr(owner, name)

        def wrapped(self, *args, **kwargs):
            found = real(self, *args, **kwargs)
            seen.phase = self if owner is CalibratePhase else seen.phase
            where(found, self, *args)
            return found

        monkeypatch.setattr(owner, name, wrapped)

    keep(CalibratePhase, "sample", lambda found, *_: seen.rollouts.append(found))
    keep(CalibratePhase, "score", lambda found, *_: seen.samples.append(found))
    keep(LikelihoodRatio, "score", lambda found, *_: seen.scores.append(found))
    keep(
        CalibratePhase, "close_step", lambda _, phase, *__: seen.closed.append(seen.at_close(phase))
    )
    keep(titan.Engine, "frozen", lambda _, engine, role, **__: seen.frozen.append(role.path))
    return seen


def test_a_reward_alone_has_no_accuracy_and_no_text_gains_by_running_on(talkers, tmp_path, watch):
    """-1 or 1: a text that was cut had 0, more than a wrong answer, and all of them were `correct`
    in the log.
    """
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        task={"name": "small_tasks:praise_or_blame"},
        steps=1,
        rollout={"prompts": 6, "group": 4, "max_tokens": 9},
    )
    (step,) = run_here(cfg).steps
    assert "accuracy" not in step and "reward/task" in step
    grades, mixed = iter(watch.phase._grades), 0
    for group in watch.rollouts[0]:
        pairs = [(r.ended, next(grades)) for r in group]
        least = min([0.0, *(g.reward for ended, g in pairs if ended)])
        cut = [g for ended, g in pairs if not ended]
        assert all(g.reward == least and g.correct is None for g in cut)
        mixed += bool(cut) and least < 0
    assert mixed


def flat(rollouts_PG) -> list:
    return [r for group in rollouts_PG for r in group]


def test_off_is_plain_grpo_as_ten_lines_of_pytorch_compute_it(talkers, tmp_path, watch):
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        steps=3,
        rollout={"prompts": 3, "group": 4},
        reference={"beta": 0.1},
    )
    run = run_here(cfg)
    model = AutoModelForCausalLM.from_pretrained(talkers / "policy")
    original, optimizer = (
        deepcopy(model),
        torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
    )

    def log_probs(m, r):
        logits = m(torch.tensor([r.prompt_ids + r.ids])).logits[0, len(r.prompt_ids) - 1 : -1]
        return logits.log_softmax(-1)

    for step, rollouts_PG in zip(run.steps, watch.rollouts, strict=True):
        loss, kl, tokens = 0.0, 0.0, sum(len(r.ids) for r in flat(rollouts_PG))
        for group in rollouts_PG:
            rewards = np.array([reward_vowels(r.prompt, r.text) if r.ended else 0.0 for r in group])
            for r, reward in zip(group, rewards):
                advantage = (reward - rewards.mean()) / max(rewards.std(ddof=1), 1e-6)
                new_nV, ids = log_probs(model, r), torch.tensor(r.ids)
                ratio_n = (new_nV.gather(1, ids[:, None])[:, 0] - torch.tensor(r.logp)).exp()
                loss = (
                    loss
                    - torch.min(ratio_n * advantage, ratio_n.clamp(0.8, 1.2) * advantage).sum()
                    / tokens
                )
                kl = kl + (new_nV.exp() * (new_nV - log_probs(original, r).detach())).sum() / tokens
        total = loss + 0.1 * kl
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert step["loss"] == pytest.approx(total.item(), rel=1e-4, abs=1e-6)
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert step["reference_kl"] == pytest.approx(kl.item(), rel=1e-3, abs=1e-6)
    assert run.steps[2]["reference_kl"] > 1e-3, "nothing was learned: the comparison is blind"


def test_off_does_not_know_that_a_proxy_is_configured(talkers, tmp_path, watch):
    """T21: to the last digit, and nothing of the proxy is loaded."""
    configured = run_here(
        config(talkers, tmp_path / "a", "calibrate", calibration={"mode": "off", "strength": 9.0})
    )
    assert set(watch.frozen) == {str(talkers / "policy")}
    without = run_here(config(talkers, tmp_path / "b", "calibrate", proxy={"path": ""}))
    zero = run_here(
        config(
            talkers,
            tmp_path / "c",
            "calibrate",
            calibration={"mode": "distillable", "strength": 0.0},
        )
    )

    def key(run):
        return [{k: v for k, v in numbers(s).items() if k != "eta"} for s in run.steps]

    assert key(configured) == key(without) == key(zero)


def test_flipping_the_mode_flips_the_calibration_term_and_nothing_else(talkers, tmp_path, watch):
    for mode in ("off", "distillable", "undistillable"):
        run_here(
            config(
                talkers,
                tmp_path / mode,
                "calibrate",
                steps=1,
                calibration={"mode": mode, "cal_gate": "none", "margin_guard": False},
            )
        )
    off, plus, minus = ([s.advantage for s in samples] for samples in watch.samples)
    for task, up, down in zip(off, plus, minus, strict=True):
        np.testing.assert_allclose(up - task, task - down, atol=1e-12)
    assert max(np.abs(up - task).max() for up, task in zip(plus, off)) > 0.1
    assert [[r.ids for r in flat(x)] for x in watch.rollouts[:2]] == [
        [r.ids for r in flat(x)] for x in watch.rollouts[1:]
    ]


def test_the_reward_is_the_proxys_own_reading_of_the_same_bytes(talkers, tmp_path, watch):
    """Equation (2) by hand: the proxy (another architecture and tokenizer) renders and encodes for
    itself.
    """
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "calibrate",
            steps=1,
            calibration={"mode": "distillable", "span_clip": 0.0},
        )
    )
    chat, proxy = (
        Chat(str(talkers / "proxy")),
        AutoModelForCausalLM.from_pretrained(talkers / "proxy"),
    )
    checked = 0
    for r, score in zip(flat(watch.rollouts[0]), watch.scores[0], strict=True):
        if not score.scored:
            continue
        prompt, ids = chat.prompt_ids(r.prompt.messages), chat.encode(r.text)
        with torch.no_grad():
            logp_nV = (
                proxy(torch.tensor([prompt + ids]))
                .logits[0, len(prompt) - 1 :]
                .double()
                .log_softmax(-1)
            )
        text = logp_nV[:-1].gather(1, torch.tensor(ids)[:, None]).sum().item()
        stop = logp_nV[-1, list(chat.stop_ids)].logsumexp(0).item()
        assert score.value == pytest.approx(text + stop - sum(r.logp[:-1]) - r.stop_logp, abs=1e-3)
        assert score.n_bytes == len(r.text.encode())
        checked += 1
    assert checked >= 4


@pytest.mark.parametrize("estimator", ["exact", "k2_loss", "k3_is", "k3_loss", "k1_reward"])
def test_the_anchor_is_exactly_zero_at_the_start_and_then_grows(talkers, tmp_path, estimator):
    anchored = {"estimator": estimator, "beta": 0.5}
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "calibrate",
            reference=anchored,
            steps=3,
            rollout={"old_logp": "trainer"},
        )
    )
    free = run_here(
        config(
            talkers,
            tmp_path / "free",
            "calibrate",
            reference={"beta": 0.0},
            rollout={"old_logp": "trainer"},
        )
    )
    assert run.steps[0]["reference_kl"] == 0.0 and run.steps[2]["reference_kl"] > 1e-3
    assert run.steps[0]["grad_norm"] == pytest.approx(free.steps[0]["grad_norm"], rel=1e-5)
    assert "reference_kl" not in free.steps[0]
    # all three estimate the same gradient; here at one update's distance
    if estimator in ("exact", "k2_loss", "k3_is"):
        assert run.steps[1]["grad_norm"] != pytest.approx(free.steps[1]["grad_norm"], rel=1e-3)


def test_frozen_models_stay_as_they_were_and_reach_neither_optimizer_nor_checkpoint(
    talkers, tmp_path, watch
):
    """T22."""
    watch.at_close = lambda phase: (
        phase.reference.weights_hash(),
        phase.reward.proxy.weights_hash(),
        {
            id(p)
            for o in phase.engine._trainer.optimizers.optimizers
            for g in o.param_groups
            for p in g["params"]
        }
        & {id(p) for m in (phase.reference, phase.reward.proxy) for p in m.model.parameters()},
    )
    run_here(config(talkers, tmp_path / "run", "calibrate", steps=3, **ON))
    start, *_, end = watch.closed
    assert start == end and start[2] == set() and len(watch.frozen) == 2
    assert not watch.phase.reward.proxy.model.training and not watch.phase.reference.model.training
    watch.at_close = lambda phase: None
    run_here(config(talkers, tmp_path / "plain", "calibrate", steps=3, reference={"beta": 0.0}))
    kept = [
        set(
            FileSystemReader(tmp_path / name / "checkpoint" / "step-3")
            .read_metadata()
            .state_dict_metadata
        )
        for name in ("run", "plain")
    ]
    assert kept[0] == kept[1]


def test_the_trainer_reads_what_the_sampler_drew(talkers, tmp_path):
    sampler = run_here(
        config(talkers, tmp_path / "s", "calibrate", **ON, rollout={"temperature": 0.8})
    )
    trainer = run_here(
        config(
            talkers,
            tmp_path / "t",
            "calibrate",
            **ON,
            rollout={"temperature": 0.8, "old_logp": "trainer"},
        )
    )
    assert max(s["max/mismatch"] for s in sampler.steps) < 1e-4
    assert max(s["max/mismatch"] for s in trainer.steps) < 2e-6
    for a, b in zip(sampler.steps, trainer.steps):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )


def test_the_reference_denominator_is_the_policy_until_the_first_update(talkers, tmp_path, watch):
    for name in ("policy", "reference"):
        run_here(
            config(
                talkers,
                tmp_path / name,
                "calibrate",
                steps=2,
                calibration={"mode": "distillable", "denominator": name},
            )
        )
    raw = [[s.raw for s in step if s.scored] for step in watch.scores]
    assert raw[0] == pytest.approx(raw[2], abs=1e-4) and raw[1] != pytest.approx(raw[3], abs=1e-2)


@pytest.mark.parametrize("rule", ["mask_cal", "drop", "score_prefix"])
def test_what_was_cut_counts_as_the_rule_says(talkers, tmp_path, watch, rule):
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "calibrate",
            steps=1,
            rollout={"max_tokens": 10, "prompts": 4},
            calibration={"mode": "distillable", "truncated": rule, "cal_gate": "none"},
        )
    )
    run_here(
        config(
            talkers,
            tmp_path / "off",
            "calibrate",
            steps=1,
            rollout={"max_tokens": 10, "prompts": 4},
        )
    )
    rollouts, scores = flat(watch.rollouts[0]), watch.scores[0]
    task = {(s.rollout.prompt.index, s.rollout.ids): s.advantage for s in watch.samples[1]}
    cut = [not r.ended for r in rollouts]
    assert 0 < sum(cut) < len(cut), "the test needs both"
    if rule == "score_prefix":
        assert any(s.scored for s, c in zip(scores, cut) if c) and all(
            s.stop == 0 for s, c in zip(scores, cut) if c
        )
        return
    assert not any(s.scored for s, c in zip(scores, cut) if c)
    kept = [s for s in watch.samples[0] if not s.rollout.ended]
    assert len(kept) == (0 if rule == "drop" else sum(cut))
    for s in kept:
        np.testing.assert_array_equal(s.advantage, task[s.rollout.prompt.index, s.rollout.ids])
    assert run.steps[0]["tokens"] == sum(
        len(r.ids) for r, c in zip(rollouts, cut) if rule != "drop" or not c
    )


@pytest.mark.parametrize("credit", ["sequence", "span"])
@pytest.mark.parametrize("max_tokens, rows", [(1, 96), (3, 96), (24, None)])
def test_texts_of_one_token_and_rows_filled_to_the_last_position(
    talkers, tmp_path, max_tokens, rows, credit
):
    """T13. rows None: the longest prompt and the longest response fill training.seq_len + 1
    exactly.
    """
    longest = (
        0
        if rows
        else max(
            len(Chat(str(talkers / "policy")).prompt_ids(({"role": "user", "content": text},)))
            for text in [
                f"What is {a}+{b}?" + " Think." * (a % 3) for a in range(5) for b in range(5)
            ]
        )
    )
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "calibrate",
            training={"seq_len": rows or longest + max_tokens - 1},
            calibration={
                "mode": "undistillable",
                "denominator": "reference",
                "credit": credit,
                "score_norm": "sum" if credit == "span" else "length_free",
                "allow_biased": True,  # the proxy has another tokenizer
                "truncated": "score_prefix",
            },
            rollout={
                "max_tokens": max_tokens,
                "old_logp": "trainer",
                "prompts": 6,
                "temperature": 3.0,
            },
        )
    )
    assert all(math.isfinite(v) for s in run.steps for v in s.values() if isinstance(v, float))
    assert run.steps[0]["truncated"] > 0


@pytest.mark.parametrize("parts", [(4,), (2, 2), (1, 3), (1, 1, 2)])
def test_metrics_of_groups_do_not_depend_on_the_ranks(parts):
    """Ranks with different numbers of groups, one of them without a calibration term."""
    values = np.random.default_rng(0).normal(size=(4, 4)) * [[4.0], [1.0], [0.5], [9.0]]
    correct = np.array([[1, 0, 1, 0], [0] * 4, [1, 1, 0, 0], [1] * 4], bool)
    cal = CalibrationSection(mode="distillable", score_norm="sum")
    sums, terms = [], []
    for end, size in zip(np.cumsum(parts), parts):
        at = slice(end - size, end)
        scores = [[calibration_cases.score(v) for v in row] for row in values[at]]
        groups = Groups(
            correct[at].astype(float),
            correct[at],
            np.full((size, 4), 5),
            correct[at] | True,
            scores,
        )
        part = calibration_part(groups, cal)
        engine = SimpleNamespace(sum=lambda x: terms.append(x) or x, notes={})
        rank = SimpleNamespace(cfg=SimpleNamespace(calibration=cal), engine=engine)
        rank.metric_sums = MetricSums()
        CalibratePhase._report_calibration(rank, part, 0.5)
        CalibratePhase._note_std(rank, groups, part, 0.5)
        sums.append(rank.metric_sums.sums)
    mean = {name: np.divide(*np.sum([s[name] for s in sums], 0)) for name in sums[0]}
    used = correct.any(1)
    assert mean["cal/std"] == pytest.approx(values[used].std(1, ddof=1).mean())
    assert mean["cal/groups"] == used.mean() and mean["eta"] == 0.5
    assert sum(terms[::2]) / sum(terms[1::2]) == pytest.approx(mean["cal/std"])
    assert all(s.keys() == sums[0].keys() for s in sums)


@pytest.mark.parametrize("gate", ["none", "skip_degenerate"])
def test_groups_without_right_and_wrong_are_not_all_correct(talkers, tmp_path, gate):
    """A user's function that returns numbers: its groups are calibrated unless they are equal."""
    over = {"calibration": {"mode": "distillable", "cal_gate": gate}}
    run = run_here(config(talkers, tmp_path / "run", "calibrate", steps=1, **over))
    (step,) = run.steps
    assert 0 < step["reward/task"] < 1 and step["cal/groups"] == 1.0 and step["cal/std"] > 0
    assert not step.keys() & {"groups/all_correct", "groups/all_wrong"}


def test_every_epoch_is_in_the_log(talkers, tmp_path):
    """In the first update the policy is the behaviour policy; after it, no longer."""
    over = {"policy": {"epochs": 3}, "rollout": {"old_logp": "trainer"}, "optim": {"lr": 1e-2}}
    for step in run_here(config(talkers, tmp_path / "run", "calibrate", **over)).steps:
        assert abs(step["ratio"] - 1) < 1e-5 and abs(step["approx_kl"]) < 1e-6
        assert step["clipped"] == 0
        for epoch in ("epoch2/", "epoch3/"):
            assert step[f"{epoch}approx_kl"] > 1e-4 and step[f"{epoch}clipped"] > 0
            assert step[f"{epoch}ratio"] != step["ratio"]
            assert step[f"{epoch}loss"] != step["loss"] and step[f"{epoch}grad_norm"] > 0
        assert "epoch1/loss" not in step and "epoch4/loss" not in step


def test_options_that_only_move_work_about_change_no_number(talkers, tmp_path):
    """T10: rows decoded together, micro-batches, packing."""
    results = []
    for k, over in enumerate(
        [{}, {"batch": {"tokens": 1}}, {"batch": {"tokens": 97}}, {"batch": {"pack": True}}]
    ):
        results.append(run_here(config(talkers, tmp_path / str(k), "calibrate", **ON, **over)))
    rows = run_here(config(talkers, tmp_path / "rows", "calibrate", **ON, rollout={"rows": 3}))
    for run in [*results[1:], rows]:
        for a, b in zip(results[0].steps, run.steps):
            for key in (
                "loss",
                "grad_norm",
                "reward/task",
                "reward/cal",
                "reference_kl",
                "entropy",
                "length",
            ):
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=2e-7), key


def test_texts_that_the_proxy_cannot_read_are_an_error_above_the_limit(talkers, tmp_path):
    over = {"rollout": {"temperature": 2.0, "prompts": 6}}
    over["calibration"] = {"mode": "distillable", "max_unaligned": 0.0}
    cfg = config(talkers, tmp_path / "run", "calibrate", steps=3, **over)
    says = r"do not round-trip.*at most 0% \(calibration.max_unaligned\)"
    with pytest.raises(ValueError, match=says):
        run_here(cfg)
