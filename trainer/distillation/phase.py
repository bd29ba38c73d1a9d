"""Phase 2: a student learns from given texts (SFT) or from frozen teachers (sequence KD, KD, GKD,
across tokenizers).

    objective   nll    likelihood of given or teacher-sampled texts: SFT, sequence KD
                kl     token KL to the teacher at the same positions: KD off-policy, GKD with
                       on_policy > 0
                byte   distributions over the next byte and the end: another tokenizer
                policy_gradient   the teacher's log-probability of the student's own texts as a
                       reward, credited by bytes: another tokenizer
                span   likelihoods of aligned byte spans: another tokenizer
                class  distributions over the classes of a vocabulary partition, at the positions
                       before which both models have read the same bytes: another tokenizer

Off-policy texts come from the data set or a teacher, on-policy ones from the student itself
(texts.py); what the teachers say of them is in targets.py. The losses of several teachers are
averaged by weight, and each off-policy text is sampled by one of them, drawn by weight.

Shapes: T tokens of a batch.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from reflux.trainer.config.parts import tasks
from reflux.trainer.config.roles import MAX_UNALIGNED
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Batch, Sample
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.failed_grades import FailedGradesBudgets, count_by_part
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.task_routing import build_grader, task_names
from reflux.trainer.data.truncated_grades import beside_their_group
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.evaluation.evaluator import Evaluator
from reflux.trainer.losses import (
    HeadInputs,
    Loss,
    nll,
    nll_metrics,
    policy_gradient,
    span_kl,
    token_logprob_of,
)
from reflux.trainer.phase import Engine, Grader, Teacher

from .correct_texts import check_right_and_wrong
from .targets import Targets
from .teachers import has_biased_fixed_point, load_teachers
from .texts import Text, TextSource

BIASED = (
    " Biased baseline (`distill.allow_biased`): across these tokenizers a student as good as the "
    "teacher is trained away from it (docs/tokenalign.md, 'Fixed points')."
)


class DistillPhase:
    """The phase: sample, score, loss."""

    exit_code = 0

    def __init__(self, cfg: Config, engine: Engine):
        self.cfg, self.engine, self.spec = cfg, engine, cfg.distill
        self.chat = Chat.of(cfg.model)
        engine.vocab_size = min(engine.vocab_size, self.chat.vocab_size)
        self.task: Grader | None = None
        if task_names(cfg):
            self.task = build_grader(cfg, engine.once_per_row)
        self.evaluator = Evaluator(cfg, engine, self.chat, self.task)
        self.teachers: Sequence[Teacher] = []
        if cfg.needs_teacher:
            self.teachers = load_teachers(cfg, engine, self.chat)
        self.biased = has_biased_fixed_point(self.spec, self.chat, self.teachers)
        self.source = TextSource(cfg, engine, self.chat, self.teachers, self.task)
        self.data_fields = self.source.prompts.fit.fields
        self.targets = Targets(self.spec, self.chat, self.teachers)
        self.metric_sums = MetricSums()
        self.failed_grades = FailedGradesBudgets(tasks(cfg))
        self._graded_parts = {part for part, task in tasks(cfg).items() if task.name}
        self._step = 0
        self._grades: dict[int, Grade] = {}  # of the last texts, by place, where they were graded

    def sample(self, step: int) -> list[list[Text]]:
        """[P][G] texts of this rank's part of the step's prompts."""
        self._step = step
        return self.source.sample(step)

    def score(self, texts_PG: Sequence[Sequence[Text]]) -> list[Sample]:
        """The teachers' targets; one sample per text that can be learned from."""
        self.metric_sums = MetricSums()
        texts = list(chain.from_iterable(texts_PG))
        self._report(texts)
        if self.spec.correct_only:
            texts = self._correct_only(texts)
        samples = self.targets.samples(texts, self.metric_sums, self._step)
        self._check_room(len(texts))
        return self._that_fit(samples)

    def loss(self, out: HeadInputs, batch: Batch) -> Loss:
        """The objective plus nll_weight times the likelihood of off-policy texts, summed over the
        batch's tokens.

        The class objective has two parts: divergences at the aligned positions, and inner_weight
        times the likelihood of the off-policy tokens elsewhere, without which a student would
        forget how words go on.
        """
        if self.spec.objective == "nll":
            total, logp_T = nll(out, batch.target_T, batch.off_policy_T)
            return total, nll_metrics(logp_T, batch.off_policy_T)
        if self.spec.objective == "span":
            return self._span_loss(out, batch)
        if self.spec.objective == "policy_gradient":
            logp_T = token_logprob_of(out, batch.target_T).logp
            return policy_gradient(
                logp_T, batch.old_logp_T, batch.advantage_T, self.cfg.policy.clip
            )
        total, metrics = self._likelihood_terms(out, batch)
        divergence, more = self._divergence(out, batch)
        return total + divergence, metrics | more

    def close_step(self, step: int, stats: Mapping[str, float]) -> dict[str, Any]:
        return self.evaluator.due(step)

    def evaluate(self, step: int) -> dict[str, Any]:
        return self.evaluator.results(step)

    def log_fields(self, stats: Mapping[str, float]) -> dict[str, Any]:
        """The likelihood of off-policy tokens per such token, whatever share they have of all; no
        number in a step without them.
        """
        fields = dict(stats)
        for name in [name for name in fields if name.rpartition("/")[2] == "nll"]:
            share = fields.get(name.removesuffix("nll") + "off_policy", 0.0)
            total = fields.pop(name)
            if share:
                fields[name] = total / share
        return fields

    def sample_fields(self, text: Text, index: int) -> dict[str, Any]:
        """Who wrote one of the last texts, and its grade where it was graded."""
        fields: dict[str, Any] = {"sampled_by": text.sampled_by}
        if (grade := self._grades.get(index)) is not None and not grade.failed:
            fields |= {"reward": grade.reward, "correct": grade.correct}
        return fields

    def card(self) -> tuple[str, str]:
        cfg, d = self.cfg, self.spec
        if not self.teachers:
            return (
                "Fine-tuned model",
                f"Supervised fine-tuning of `{cfg.model.path}` on `{cfg.data.name}`.",
            )
        how = {
            "nll": "likelihood of the teacher's texts",
            "byte": f"{d.divergence} KL of exact next-byte distributions",
            "policy_gradient": "policy gradient on the teacher's log-probability of its own texts",
            "span": "likelihoods of aligned byte spans",
            "kl": f"{d.divergence} KL, tail {d.tail}",
            "class": f"{d.divergence} KL over a partition of both vocabularies ({d.partition})",
        }[d.objective]
        return "Distilled student", (
            f"Distilled from `{cfg.teacher.path}` into `{cfg.model.path}`: {how}, "
            f"{d.on_policy:.0%} on-policy." + (BIASED if self.biased else "")
        )

    # parts of the loss
    def _span_loss(self, out: HeadInputs, batch: Batch) -> Loss:
        logp_T = token_logprob_of(out, batch.target_T).logp
        likelihood = -(logp_T * batch.off_policy_T).sum()
        divergence, more = span_kl(
            logp_T,
            batch.span_T,
            batch.teacher_span_logp_S,
            temperature=self.spec.span_temperature,
        )
        metrics = nll_metrics(logp_T, batch.off_policy_T)
        return self.spec.nll_weight * likelihood + divergence, metrics | more

    def _likelihood_terms(self, out: HeadInputs, batch: Batch) -> Loss:
        """nll_weight times the likelihood of off-policy texts, plus, for the class objective,
        inner_weight times that of their tokens at which no distributions are compared.
        """
        inner = self.spec.inner_weight if self.spec.objective == "class" else 0.0
        if not (self.spec.nll_weight or inner):
            return torch.zeros((), device=out.hidden_TD.device), {}
        inner_T = self._not_compared(batch)
        weight_T = self.spec.nll_weight * batch.off_policy_T + inner * inner_T
        total, logp_T = nll(out, batch.target_T, weight_T)
        metrics = nll_metrics(logp_T, batch.off_policy_T)
        return total, metrics | ({"inner_nll": -(logp_T * inner_T).sum()} if inner else {})

    def _not_compared(self, batch: Batch) -> Tensor:
        """[T] the fraction of teachers, by weight, that do not compare this off-policy token."""
        weight_T = torch.zeros_like(batch.off_policy_T)
        for i, teacher in enumerate(self.teachers):
            aligned_P = batch.aligned_positions(i)
            if aligned_P is not None:
                weight_T += teacher.weight * batch.off_policy_T.index_fill(0, aligned_P, 0.0)
        return weight_T

    def _divergence(self, out: HeadInputs, batch: Batch) -> Loss:
        """The teachers' weighted sum of token KLs, of byte KLs, or of class divergences at aligned
        positions.
        """
        total, sums = out.hidden_TD.new_zeros(()), dict[str, Tensor]()
        for i, teacher in enumerate(self.teachers):
            loss, metrics = teacher.divergence(out, batch, i)
            total = total + teacher.weight * loss
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + teacher.weight * value
        return total, sums

    def _that_fit(self, samples: list[Sample]) -> list[Sample]:
        """Without those that are longer than a row of the student. A teacher's text of
        rollout.max_tokens tokens can have more in other tokens: that ends no run, and is logged.
        """
        if all(t.shares_ids for t in self.teachers):
            return samples
        room = self.engine.seq_len + 1
        fits = [len(s.rollout.prompt_ids) + len(s.rollout.ids) <= room for s in samples]
        self.metric_sums.add("too_long", [float(not fit) for fit in fits])
        return [s for s, fit in zip(samples, fits) if fit]

    def _check_room(self, count: int) -> None:
        """ValueError where a teacher has no positions for more of the step's texts, of all ranks,
        than may be unaligned. Collective.
        """
        if self.spec.objective in ("nll", "kl"):  # known before the first step (fitted_prompts.py)
            return
        texts = max(self.engine.sum(float(count)), 1.0)
        for i, teacher in enumerate(self.teachers):
            fraction = self.engine.sum(float(self.targets.too_long[i])) / texts
            if fraction > MAX_UNALIGNED:
                raise ValueError(
                    f"{fraction:.0%} of the texts are, in the teacher's tokens, longer than the "
                    f"{teacher.chat.positions} positions of {teacher.chat.path}, prompt included; "
                    f"want at most {MAX_UNALIGNED:.0%}. Lower rollout.max_tokens, or take a "
                    "teacher with a longer context"
                )

    # the line of the log
    def _correct_only(self, texts: Sequence[Text]) -> list[Text]:
        """The student's own texts, and of the others those that the grader accepts. Collective;
        ValueError where more grades failed than task.max_failed allows.
        """
        assert self.task is not None
        grades = self.task.grade([t.rollout for t in texts])
        pairs = [(t.rollout.prompt.part, g) for t, g in zip(texts, grades) if g.graded]
        mine = count_by_part((part, g.error) for part, g in pairs)
        self.failed_grades.add(self.engine.gather([mine]))
        off_policy = [g for t, g in zip(texts, grades) if t.off_policy]
        check_right_and_wrong(off_policy, self.engine, task_names(self.cfg))
        passed = [not t.off_policy or bool(g.correct) for t, g in zip(texts, grades)]
        self.metric_sums.add("passed_filter", map(float, passed))
        return [t for t, ok in zip(texts, passed) if ok]

    def _report(self, texts: Sequence[Text]) -> None:
        add = self.metric_sums.add
        add("length", [len(t.rollout.ids) for t in texts])
        add("truncated", [float(not t.rollout.ended) for t in texts])
        if self.source.student is not None and self.cfg.rollout.overlap:
            add("staleness", [self.source.student.staleness])
        add("on_policy", [float(not t.off_policy) for t in texts])
        if self.task is not None and self.spec.on_policy > 0:
            own = [(i, t.rollout) for i, t in enumerate(texts) if not t.off_policy]
            graded = [(i, r) for i, r in own if r.prompt.part in self._graded_parts]
            mine, rollouts = [i for i, _ in graded], [r for _, r in graded]
            grades = beside_their_group(self.task.grade(rollouts), rollouts)
            self._grades = dict(zip(mine, grades))
            add("reward/task", [g.reward for g in grades if not g.failed])
            add("grader_error", [float(g.failed) for g in grades])
