"""Phase 1: reinforcement fine-tuning of the teacher (algorithm of docs/method.md, "Algorithm").

    sample   the trainable teacher answers every prompt G times
    score    r_task by the verifier; r_cal = the frozen proxy's score of the same bytes minus the
             teacher's own; each normalised in its group by itself, then A = norm(r_task) + eta *
             norm(r_cal)
    loss     clipped policy gradient + beta * KL(pi || original)

With mode = off nothing of the proxy is loaded or computed: plain GRPO, bit for bit.
Shapes: P prompts of this rank, G rollouts each, n tokens of one response, T tokens of a batch.
"""

from contextlib import nullcontext
from itertools import chain

import numpy as np
import torch

from reflux.tokenalign.scores import compare_spans, span_logprobs
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import FrozenSection
from reflux.trainer.data.batch import Batch, Rollout, Sample
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_prompts, shard
from reflux.trainer.data.tasks import build_task
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.evaluation.phase import Evaluator
from reflux.trainer.losses import (
    HeadInputs,
    Loss,
    exact_reference_kl,
    policy_gradient,
    reference_kl,
    token_logprob_of,
)
from reflux.trainer.phase import Sampling
from reflux.trainer.rollouts.generate import generate
from reflux.trainer.rollouts.scoring import TextScore, align_texts, score_ids

from .guards import Guards
from .rewards import UNALIGNED, CalScore, advantages, calibration_score, margin_strength

STD_CAL_DECAY = 0.9  # of the moving average behind the margin guard


class Calibrate:
    """The phase: sample, score, loss. `tally` holds what the last score wants in the log line."""

    def __init__(self, cfg: Config, engine):
        self.cfg, self.engine = cfg, engine
        self.chat = Chat(cfg.model.path)
        engine.vocab_size = min(engine.vocab_size, self.chat.vocab_size)
        self.prompts = load_prompts(
            cfg.data.source, split=cfg.data.split, columns=cfg.data.columns, limit=cfg.data.limit
        )
        self.task = build_task(cfg.task.name, cfg.task.options)
        self.evaluator = Evaluator(cfg, engine, self.chat, self.task)
        self.guards = Guards(cfg, engine)
        self.original = self.proxy = None
        if cfg.reference.beta or (
            cfg.calibration.eta and cfg.calibration.denominator == "reference"
        ):
            m, a = cfg.model, cfg.reference
            self.original = engine.frozen(
                FrozenSection(m.path, m.backend, m.attention, a.dtype, a.offload),
                longest=engine.seq_len,
            )
        if cfg.calibration.eta:
            self.proxy, self.proxy_chat = engine.frozen(cfg.proxy), Chat(cfg.proxy.path)
            self.same = self.chat.table.fingerprint() == self.proxy_chat.table.fingerprint()
            self._check_proxy()
        self.metric_sums = MetricSums()

    def sample(self, step: int) -> list[list[Rollout]]:
        """[P][G] rollouts of this rank's part of the step's prompts."""
        r = self.cfg.rollout
        batch = self.prompts.batch(
            step - 1, r.prompts, seed=self.cfg.seed, shuffle=self.cfg.data.shuffle
        )
        sampling = Sampling(r.max_tokens, self.cfg.seed, step, r.temperature, rows=r.rows)
        with self.engine.gathered_weights() as decode:
            return generate(
                decode,
                self.chat,
                shard(batch, self.engine.rank, self.engine.world),
                r.group,
                sampling,
            )

    def score(self, rollouts_PG: list[list[Rollout]]) -> list[Sample]:
        """Grades, calibration scores and advantages; one sample per rollout that may teach
        something.
        """
        self.metric_sums = MetricSums()
        flat = list(chain.from_iterable(rollouts_PG))
        grades = self.task.grade(flat)
        old = self._old_logp(flat)
        shape = (len(rollouts_PG), self.cfg.rollout.group)
        task_PG = np.array([g.reward for g in grades]).reshape(shape)
        correct_PG = np.array([_is_right(g) for g in grades]).reshape(shape)
        original = self._original_logp(flat)
        scores = self._calibration_scores(flat, old, original) if self.proxy is not None else None
        scores_PG = (
            None
            if scores is None
            else [scores[i : i + shape[1]] for i in range(0, len(flat), shape[1])]
        )
        lengths_PG = np.array([len(r.ids) for r in flat]).reshape(shape)
        cal = self.cfg.calibration
        # the margin guard holds from the first step on
        if scores_PG is not None and "std_cal_nats" not in self.engine.notes:
            first = advantages(task_PG, correct_PG, lengths_PG, scores_PG, cal, cal.eta)
            self._note_spread(first.std_cal_nats, first.cal_share)
        eta = self._eta_in_use()
        adv = advantages(task_PG, correct_PG, lengths_PG, scores_PG, cal, eta)
        self._note_spread(adv.std_cal_nats, adv.cal_share)
        self._report(flat, grades, correct_PG, scores, adv, eta)
        samples = []
        for rollout, a, logp, base in zip(
            flat, chain.from_iterable(adv.token), old, original or [None] * len(flat)
        ):
            if cal.truncated == "drop" and not rollout.ended:
                continue
            if self.cfg.reference.estimator == "k1_reward" and base is not None:
                # reward-to-go of the log-ratio
                a = a - self.cfg.reference.beta * np.cumsum((logp - base)[::-1])[::-1]
            samples.append(Sample(rollout, a, logp))
        return samples

    def loss(self, out: HeadInputs, batch: Batch) -> Loss:
        """Equation (5), summed over the batch's tokens."""
        temperature = self.cfg.rollout.temperature
        lp = token_logprob_of(out, batch.target_T, temperature=temperature, entropy=True)
        total, metrics = policy_gradient(
            lp.logp, batch.old_logp_T, batch.advantage_T, self.cfg.policy.clip
        )
        metrics["entropy"] = lp.entropy.detach().sum()
        reference = self.cfg.reference
        if self.original is None:
            return total, metrics
        with self.engine.forward_no_grad(self.original, batch, out.vocab_size) as original:
            if reference.estimator in ("exact", "k1_reward"):
                with torch.no_grad() if reference.estimator == "k1_reward" else nullcontext():
                    extra, more = exact_reference_kl(out, original, temperature=temperature)
            else:
                with torch.no_grad():
                    base_T = token_logprob_of(
                        original, batch.target_T, temperature=temperature
                    ).logp
                extra, more = reference_kl(lp.logp, batch.old_logp_T, base_T, reference.estimator)
        total = total if reference.estimator == "k1_reward" else total + reference.beta * extra
        return total, metrics | more

    def close_step(self, step: int, stats: dict[str, float]) -> dict[str, float]:
        """Evaluation when it is due, then the guards; raises guards.Stop."""
        found = self.evaluator.due(step)
        self.guards.check(step, stats, found)
        return found

    # the calibration reward
    def _calibration_scores(
        self, flat: list[Rollout], old: list[np.ndarray], original: list[np.ndarray] | None
    ) -> list[CalScore]:
        cal = self.cfg.calibration
        aligned = align_texts(self.chat, self.proxy_chat, flat, same=self.same)
        usable = [
            k
            for k, (r, a) in enumerate(zip(flat, aligned))
            if a.spans is not None and (r.ended or cal.truncated == "score_prefix")
        ]
        jobs = [
            (self.proxy_chat.prompt_ids(flat[k].prompt.messages), aligned[k].scorer_ids)
            for k in usable
        ]
        read = score_ids(
            self.proxy, self.engine, jobs, self.proxy_chat, tokens=self.cfg.batch.tokens
        )
        own = original if cal.denominator == "reference" else old
        found = dict(zip(usable, read))
        failed = sum(a.spans is None for a in aligned)
        self.metric_sums.add("cal/unaligned", [float(a.spans is None) for a in aligned])
        self._refuse_unscored(failed, len(flat))
        return [
            self._score_one(flat[k], aligned[k], found[k], own[k]) if k in found else UNALIGNED
            for k in range(len(flat))
        ]

    def _score_one(self, rollout: Rollout, aligned, read: TextScore, own: np.ndarray) -> CalScore:
        cal = self.cfg.calibration
        proxy_S = span_logprobs(read.logp, aligned.scorer_span, aligned.spans)
        own_S = span_logprobs(own[: len(rollout.content_ids)], aligned.sampler_span, aligned.spans)
        stops = (read.stop, rollout.stop_logp) if cal.score_stop and rollout.ended else (None, None)
        scores = compare_spans(
            proxy_S,
            own_S,
            num_bytes=aligned.n_bytes,
            tokens=(len(aligned.scorer_ids), len(rollout.content_ids)),
            stop_a=stops[0],
            stop_b=stops[1],
            clip=cal.span_clip,
        )
        return calibration_score(scores, aligned.sampler_span, cal)

    def _refuse_unscored(self, failed: int, total: int) -> None:
        share = self.engine.sum(float(failed)) / max(self.engine.sum(float(total)), 1.0)
        if share > self.cfg.calibration.max_unaligned:
            raise ValueError(
                f"{share:.0%} of the rollouts do not round-trip through the proxy's tokenizer; "
                f"want at most {self.cfg.calibration.max_unaligned:.0%} (calibration.max_unaligned). "
                "Run --check for examples"
            )

    def _eta_in_use(self) -> float:
        """eta, lowered by the margin guard where it applies (docs/method.md, "Guards")."""
        cal = self.cfg.calibration
        spread = self.engine.notes.get("std_cal_nats")
        if (
            cal.mode != "undistillable"
            or cal.denominator != "policy"
            or not cal.margin_guard
            or spread is None
        ):
            return cal.eta
        return -margin_strength(cal.strength, self.cfg.reference.beta, spread)

    def _note_spread(self, std_cal_nats: float, share: float) -> None:
        """Mean over all ranks' groups: a rank counts by how many of its groups had a calibration
        term.
        """
        spread = self.engine.sum(std_cal_nats * share) / max(self.engine.sum(share), 1e-12)
        if spread > 0:
            before = self.engine.notes.get("std_cal_nats", spread)
            self.engine.notes["std_cal_nats"] = (
                STD_CAL_DECAY * before + (1 - STD_CAL_DECAY) * spread
            )

    # log-probabilities of the sampled ids
    def _old_logp(self, flat: list[Rollout]) -> list[np.ndarray]:
        if self.cfg.rollout.old_logp == "sampler":
            return [np.asarray(r.logp) for r in flat]
        return self._read_own(self.engine, flat)

    def _original_logp(self, flat: list[Rollout]) -> list[np.ndarray] | None:
        cal = self.cfg.calibration
        wanted = self.cfg.reference.estimator == "k1_reward" or (
            cal.eta and cal.denominator == "reference"
        )
        return self._read_own(self.original, flat) if wanted and self.original is not None else None

    def _read_own(self, reader, flat: list[Rollout]) -> list[np.ndarray]:
        """Per-token log-probabilities of the sampled ids, the stop token included."""
        jobs = [(r.prompt_ids, r.ids) for r in flat]
        read = score_ids(
            reader,
            self.engine,
            jobs,
            self.chat,
            tokens=self.cfg.batch.tokens,
            temperature=self.cfg.rollout.temperature,
            stop=False,
        )
        return [s.logp for s in read]

    def _report(self, flat, grades, correct_PG, scores, adv, eta) -> None:
        t = self.metric_sums
        t.add("reward/task", [g.reward for g in grades])
        t.add("accuracy", [float(_is_right(g)) for g in grades])
        t.add("no_answer", [float(g.extracted is None and g.correct is not None) for g in grades])
        t.add("grader_error", [float(g.error is not None) for g in grades])
        t.add("length", [len(r.ids) for r in flat])
        t.add("truncated", [float(not r.ended) for r in flat])
        t.add("groups/all_right", correct_PG.all(1).astype(float))
        t.add("groups/all_wrong", (~correct_PG.any(1)).astype(float))
        if scores is not None:
            kept = [s for s in scores if s.scored]
            t.add("reward/cal", [s.value for s in kept])
            t.add("cal/raw_nats", [s.raw for s in kept])
            t.add("cal/clipped", [s.clipped for s in kept])
            t.add("cal/groups", adv.cal_share)
            t.add("cal/std", adv.std_cal)
            t.add("eta", eta)

    def _check_proxy(self) -> None:
        if self.cfg.calibration.score_norm == "per_token" and not self.same:
            import warnings

            warnings.warn(
                "calibration.score_norm = 'per_token' is not fair across tokenizers: the two sides "
                "count different tokens. Use 'sum' or 'per_byte'",
                stacklevel=2,
            )


def _is_right(grade) -> bool:
    """Graded tasks say so; a reward model does not, and then every answer counts as usable."""
    return True if grade.correct is None else bool(grade.correct)
