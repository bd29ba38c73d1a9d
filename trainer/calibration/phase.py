"""Phase 1: reinforcement fine-tuning of the teacher (docs/method.md, "Algorithm").

    sample   the policy answers every prompt G times
    score    r_task by the grader, r_cal by the calibration reward; each normalised in its group by
             itself, then A = norm(r_task) + eta * norm(r_cal)
    loss     clipped policy gradient + beta * KL(policy || reference model)

With calibration.mode = "off" no proxy is loaded: plain GRPO, bit for bit.
Shapes: P prompts of this rank, G rollouts each, n tokens of one response, T tokens of a batch.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch

from reflux.trainer.config.parts import tasks, used_tasks
from reflux.trainer.config.roles import calibrate_roles
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Batch, Rollout, Sample
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.failed_grades import FailedGradesBudgets, count_by_part
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.judge import JudgedGrade
from reflux.trainer.data.prompts import shard
from reflux.trainer.data.task_routing import (
    GraderNames,
    asks_a_judge,
    build_grader,
    task_names,
)
from reflux.trainer.data.training_prompts import load_training_prompts
from reflux.trainer.data.truncated_grades import beside_their_group
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.evaluation.evaluator import Evaluator
from reflux.trainer.losses import (
    HeadInputs,
    Loss,
    exact_reference_kl,
    policy_gradient,
    reference_kl,
    token_logprob_of,
)
from reflux.trainer.phase import (
    CalibrationReward,
    CalibrationScore,
    Engine,
    FrozenModel,
    ReadableModel,
    Sampling,
    TextScore,
)
from reflux.trainer.rollouts.overlap import StepJob, StepSampler
from reflux.trainer.rollouts.scoring import score_ids

from .advantages import (
    CalibrationPart,
    Groups,
    advantages,
    all_correct,
    calibration_part,
    margin_strength,
    none_correct,
    std_nats,
)
from .guards import Guards
from .importance import are_truncated, importance_weights
from .rewards import build_reward
from .sample_fields import sample_fields
from .spellings import canonical_share

STD_CAL_DECAY = 0.9  # of the moving average behind the margin guard


class CalibratePhase:
    """The phase: sample, score, loss."""

    exit_code = 0

    def __init__(self, cfg: Config, engine: Engine):
        self.cfg, self.engine = cfg, engine
        self.chat = Chat.of(cfg.model)
        _ = self.chat.table  # verified now: rewards, and the log of spellings, need its bytes
        engine.vocab_size = min(engine.vocab_size, self.chat.vocab_size)
        self.prompts = load_training_prompts(cfg, self.chat, engine)
        self.data_fields = self.prompts.fit.fields
        self.task = build_grader(cfg, engine.once_per_row)
        self.judged = any(map(asks_a_judge, used_tasks(cfg, "data")))
        self.failed_grades = FailedGradesBudgets(tasks(cfg))
        self.grader_names = GraderNames(cfg)
        self.evaluator = Evaluator(cfg, engine, self.chat, self.task)
        self.guards = Guards(cfg, engine)
        self.sampler = StepSampler(cfg, engine, self.chat)
        self.reference: FrozenModel | None = None
        self.reward: CalibrationReward | None = None
        for role in calibrate_roles(cfg):
            if role.name == "reference":
                self.reference = (
                    engine.base()
                    if role.shared
                    else engine.frozen(role.model, longest=engine.seq_len)
                )
        if cfg.calibration.eta:
            self.reward = build_reward(cfg, engine, self.chat)
        self.metric_sums = MetricSums()
        # of the last `score`, for sample_fields
        self._grades: Sequence[Grade] = ()
        self._scores: Sequence[CalibrationScore] | None = None

    def sample(self, step: int) -> list[list[Rollout]]:
        """[P][G] rollouts of this rank's part of the step's prompts."""
        return self.sampler.sample(step, self._job)

    def _job(self, step: int) -> StepJob:
        r, seed = self.cfg.rollout, self.cfg.seed
        batch = self.prompts.batch(step - 1, r.prompts, seed=seed, shuffle=self.cfg.data.shuffle)
        sampling = Sampling(r.max_tokens, seed, step, r.temperature, rows=r.rows)
        mine = shard(batch, self.engine.rank, self.engine.world)
        return StepJob(mine, r.group, sampling)

    def score(self, rollouts_PG: Sequence[Sequence[Rollout]]) -> list[Sample]:
        """Grades, calibration rewards and advantages; one sample per rollout that may teach
        something.
        """
        self.metric_sums = MetricSums()
        flat = list(chain.from_iterable(rollouts_PG))
        grades = beside_their_group(self.task.grade(flat), flat)
        self._count_failed(flat, grades)
        behaviour, reference = self._behaviour(flat), self._reference(flat)
        scores = None
        if self.reward is not None:
            scores = self.reward.score(flat, behaviour, reference, self.metric_sums)
        self._grades, self._scores = grades, scores
        groups = self._groups(flat, grades, scores)
        part = calibration_part(groups, self.cfg.calibration)
        eta = self._eta_in_use(groups, part)
        token_advantages = advantages(groups, part, self.cfg.calibration, eta)
        self._report(flat, grades, groups, scores)
        if part is not None:
            self._report_calibration(part, eta)
        advantage = list(chain.from_iterable(token_advantages))
        graded = [not g.failed for g in grades]
        return self._samples(flat, graded, advantage, behaviour, reference)

    def loss(self, out: HeadInputs, batch: Batch) -> Loss:
        """Equation (5), summed over the batch's tokens."""
        temperature = self.cfg.rollout.temperature
        policy = token_logprob_of(out, batch.target_T, temperature=temperature, entropy=True)
        total, metrics = policy_gradient(
            policy.logp, batch.old_logp_T, batch.advantage_T, self.cfg.policy.clip
        )
        assert policy.entropy is not None
        metrics["entropy"] = policy.entropy.detach().sum()
        if self.reference is None:
            return total, metrics
        spec = self.cfg.reference
        in_reward = spec.estimator == "k1_reward"  # then it is logged here, and learned from there
        with self.engine.forward_no_grad(self.reference, batch, out.vocab_size) as reference:
            if in_reward or spec.estimator == "exact":
                with torch.no_grad() if in_reward else nullcontext():
                    kl, more = exact_reference_kl(out, reference, temperature=temperature)
            else:
                with torch.no_grad():
                    reference_T = token_logprob_of(
                        reference, batch.target_T, temperature=temperature
                    ).logp
                kl, more = reference_kl(policy.logp, batch.old_logp_T, reference_T, spec.estimator)
        return total if in_reward else total + spec.beta * kl, metrics | more

    def close_step(self, step: int, stats: Mapping[str, float]) -> dict[str, Any]:
        """Evaluation when it is due, then the guards; raises Stop."""
        results = self.evaluator.due(step)
        self.guards.check(step, stats, results)
        return results

    def evaluate(self, step: int) -> dict[str, Any]:
        return self.evaluator.results(step)

    def log_fields(self, stats: Mapping[str, float]) -> dict[str, Any]:
        """eta as a word and its strength in use."""
        strength = abs(stats.get("eta", 0.0))
        return {**stats, "eta": f"{self.cfg.calibration.mode} {strength:.3g}"}

    def sample_fields(self, rollout: Rollout, index: int) -> dict[str, Any]:
        """The grade of one of the last scored texts, and r_cal of each span."""
        score = None if self._scores is None else self._scores[index]
        return sample_fields(rollout, self._grades[index], score, self.chat)

    def card(self) -> tuple[str, str]:
        cfg, cal = self.cfg, self.cfg.calibration
        off = cal.mode == "off"
        eta = "task reward only (eta = 0)" if off else f"{cal.mode}, strength {cal.strength:g}"
        proxy = "" if off else f", against the frozen proxy `{cfg.proxy.path}`"
        return f"Calibrated teacher: {eta}", (
            f"Reinforcement fine-tuned from `{cfg.model.path}`{proxy}, on the task "
            f"`{task_names(cfg)}`, with beta {cfg.reference.beta:g} on the KL to the original."
        )

    # from rollouts to samples
    def _groups(
        self,
        flat: Sequence[Rollout],
        grades: Sequence[Grade],
        scores: list[CalibrationScore] | None,
    ) -> Groups:
        G = self.cfg.rollout.group
        return Groups(
            np.array([g.reward for g in grades]).reshape(-1, G),
            np.array([is_correct(g) for g in grades]).reshape(-1, G),
            np.array([len(r.ids) for r in flat]).reshape(-1, G),
            np.array([not g.failed for g in grades]).reshape(-1, G),
            None if scores is None else [scores[i : i + G] for i in range(0, len(flat), G)],
            numeric_P=np.any(np.array([_is_numeric(g) for g in grades]).reshape(-1, G), axis=1),
        )

    def _samples(
        self,
        flat: Sequence[Rollout],
        graded: Sequence[bool],
        advantage: Sequence[np.ndarray],
        behaviour: Sequence[TextScore],
        reference: Sequence[TextScore] | None,
    ) -> list[Sample]:
        drop = self.cfg.calibration.truncated == "drop"
        samples = []
        for name in ("is/weight", "is/truncated", "is/gap") if self.cfg.policy.max_is else ():
            self.metric_sums.add(name, [])  # the same names on a rank without samples
        for i, rollout in enumerate(flat):
            if not graded[i] or (drop and not rollout.ended):
                continue
            advantage_n = advantage[i]
            if self.cfg.reference.estimator == "k1_reward" and reference is not None:
                log_ratio_n = behaviour[i].logp - reference[i].logp
                to_go_n = np.cumsum(log_ratio_n[::-1])[::-1]
                advantage_n = advantage_n - self.cfg.reference.beta * to_go_n
            if self.cfg.policy.max_is:
                advantage_n = advantage_n * self._weights(rollout, behaviour[i].logp)
            samples.append(Sample(rollout, advantage_n, behaviour[i].logp))
        return samples

    def _weights(self, rollout: Rollout, trainer_logp_n: np.ndarray) -> np.ndarray:
        """Truncated importance weights of the tokens, and their part of the log's line."""
        limit, sampler_logp_n = self.cfg.policy.max_is, np.asarray(rollout.logp)
        weight_n = importance_weights(trainer_logp_n, sampler_logp_n, limit)
        self.metric_sums.add("is/weight", weight_n)
        truncated_n = are_truncated(trainer_logp_n, sampler_logp_n, limit)
        self.metric_sums.add("is/truncated", truncated_n.astype(float))
        self.metric_sums.add("is/gap", np.abs(trainer_logp_n - sampler_logp_n))
        return weight_n

    def _count_failed(self, flat: Sequence[Rollout], grades: Sequence[Grade]) -> None:
        """ValueError on every rank where more grades failed than task.max_failed allows."""
        pairs = [(r, g) for r, g in zip(flat, grades) if g.graded]
        mine = count_by_part((r.prompt.part, g.error) for r, g in pairs)
        self.failed_grades.add(self.engine.gather([mine]))

    # eta
    def _eta_in_use(self, groups: Groups, part: CalibrationPart | None) -> float:
        """eta, lowered by the margin guard where it applies (docs/method.md, "Guards"), by the
        moving average of the group stds before this step.
        """
        cal, notes = self.cfg.calibration, self.engine.notes
        if part is None:
            return cal.eta
        if "std_cal_nats" not in notes:  # the guard holds from the first step on
            self._note_std(groups, part, cal.eta)
        eta = cal.eta
        if cal.margin_guarded and (std := notes.get("std_cal_nats")) is not None:
            eta = -margin_strength(cal.strength, self.cfg.reference.beta, std)
        self._note_std(groups, part, eta)
        return eta

    def _note_std(self, groups: Groups, part: CalibrationPart, eta: float) -> None:
        """Moving average of std_nats, in which a rank counts by how many of its groups had a
        calibration term.
        """
        used = float(part.used_P.sum()) if eta else 0.0
        nats = std_nats(groups, part, self.cfg.calibration, eta) if eta else 0.0
        mean = self.engine.sum(nats * used) / max(self.engine.sum(used), 1.0)
        if mean > 0:
            before = self.engine.notes.get("std_cal_nats", mean)
            self.engine.notes["std_cal_nats"] = STD_CAL_DECAY * before + (1 - STD_CAL_DECAY) * mean

    # log-probabilities of the sampled ids
    def _behaviour(self, flat: Sequence[Rollout]) -> list[TextScore]:
        if self.cfg.rollout.old_logp == "sampler":
            return [TextScore(np.asarray(r.logp), r.stop_logp) for r in flat]
        return self._scores_under(self.engine, flat)

    def _reference(self, flat: Sequence[Rollout]) -> list[TextScore] | None:
        cal = self.cfg.calibration
        needed = self.cfg.reference.estimator == "k1_reward" or (
            cal.eta and cal.denominator == "reference"
        )
        if self.reference is None or not needed:
            return None
        return self._scores_under(self.reference, flat)

    def _scores_under(self, model: ReadableModel, flat: Sequence[Rollout]) -> list[TextScore]:
        """What a model says of sampled ids; the stop set is scored in the stop token's place."""
        return score_ids(
            model,
            self.engine,
            [(r.prompt_ids, r.ids) for r in flat],
            self.chat,
            tokens=self.cfg.batch.tokens,
            temperature=self.cfg.rollout.temperature,
            stop=False,
        )

    # the line of the log
    def _report(
        self,
        flat: Sequence[Rollout],
        grades: Sequence[Grade],
        groups: Groups,
        scores: Sequence[CalibrationScore] | None,
    ) -> None:
        add = self.metric_sums.add
        graded = [g for g in grades if not g.failed]
        add("reward/task", [g.reward for g in graded])
        add("accuracy", _right_or_wrong(graded))
        add("no_answer", self._without_answer(flat, grades))
        add("grader_error", [float(g.failed) for g in grades])
        if self.judged:
            judged = [g for g in grades if isinstance(g, JudgedGrade)]
            add("judge/tokens", [float(g.tokens) for g in judged])
            add("judge/cached", [float(not g.tokens) for g in judged if not g.failed])
        add("length", [len(r.ids) for r in flat])
        add("truncated", [float(not r.ended) for r in flat])
        add("canonical", canonical_share(self.chat, flat))
        known_P = ~groups.numeric
        add("groups/all_correct", all_correct(groups.correct_PG, groups.graded_PG)[known_P])
        add("groups/all_wrong", none_correct(groups.correct_PG, groups.graded_PG)[known_P])
        self._report_parts(flat, grades, scores)
        if self.cfg.rollout.overlap:
            add("staleness", [self.sampler.staleness] * len(flat))
        if scores is not None:
            scored = [s for s in scores if s.scored]
            add("reward/cal", [s.value for s in scored])
            add("cal/raw_nats", [s.raw for s in scored])
            add("cal/clipped", [s.clipped for s in scored])

    def _without_answer(self, flat: Sequence[Rollout], grades: Sequence[Grade]) -> list[float]:
        """1 or 0 of the texts whose grader names the answers that it finds. Collective."""
        graded = [
            (r.prompt, g.extracted)
            for r, g in zip(flat, grades)
            if not g.failed and g.correct is not None
        ]
        names = self.grader_names
        naming = set().union(*self.engine.gather([names.with_answers(graded)]))
        return [float(answer is None) for p, answer in graded if names.of(p) in naming]

    def _report_parts(
        self,
        flat: Sequence[Rollout],
        grades: Sequence[Grade],
        scores: Sequence[CalibrationScore] | None,
    ) -> None:
        """Of each part of a mixture by itself; every rank adds under the same names."""
        add = self.metric_sums.add
        for part in self.cfg.data.parts:
            mine = [i for i, r in enumerate(flat) if r.prompt.part == part]
            graded = [grades[i] for i in mine if not grades[i].failed]
            add(f"accuracy/{part}", _right_or_wrong(graded))
            add(f"reward/task/{part}", [g.reward for g in graded])
            add(f"length/{part}", [len(flat[i].ids) for i in mine])
            if scores is not None:
                scored = [scores[i] for i in mine if scores[i].scored]
                add(f"cal/raw_nats/{part}", [s.raw for s in scored])

    def _report_calibration(self, part: CalibrationPart, eta: float) -> None:
        used_P = part.used_P & bool(eta)
        self.metric_sums.add("cal/groups", used_P.astype(float))
        self.metric_sums.add("cal/std", part.std_P[used_P])
        self.metric_sums.add("cal/length_r2", part.length_r2_P[part.used_P].tolist())
        self.metric_sums.add("eta", eta)


def is_correct(grade: Grade) -> bool:
    """Graded tasks say so; a reward model does not, and then every graded answer counts as
    usable.
    """
    return grade.graded if grade.correct is None else bool(grade.correct)


def _right_or_wrong(grades: Sequence[Grade]) -> list[float]:
    """1 or 0 of those that say so: rewards alone have no accuracy."""
    return [float(g.correct) for g in grades if g.correct is not None]


def _is_numeric(grade: Grade) -> bool:
    """A reward without right and wrong."""
    return not grade.failed and grade.correct is None
