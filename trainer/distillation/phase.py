"""Phase 2: a student learns from given texts (SFT) or from a frozen teacher (seq-KD, KD, GKD,
across tokenizers).

    objective   nll    likelihood of given or teacher-written texts: SFT, seq-KD
                kl     token KL to the teacher at the same positions: KD off-policy, GKD with
                       on_policy > 0
                span   likelihoods of aligned byte spans: teacher and student of different
                       tokenizers
                class  distributions over classes of both vocabularies, where both have read the
                       same bytes
    off-policy texts come from the data set or a teacher, on-policy ones from the student itself.
    Several teachers: the losses are averaged by weight, and each off-policy text is written by one
        of them, drawn by weight.

Shapes: n tokens of one response, S spans, T tokens of a batch.
"""

from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from torch import Tensor

from reflux.tokenalign.scores import span_logprobs
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Batch, Prompt, Rollout, Sample, TeacherView
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_function, load_prompts, places, shard
from reflux.trainer.data.tasks import build_task
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.evaluation.phase import Evaluator
from reflux.trainer.losses import (
    HeadInputs,
    Loss,
    at_places,
    distill_kl,
    nll,
    span_kl,
    token_logprob_of,
)
from reflux.trainer.phase import Sampling
from reflux.trainer.rollouts.defences import DefendedDecoding
from reflux.trainer.rollouts.generate import generate, given_rollout
from reflux.trainer.rollouts.scoring import Aligned, align_texts, score_ids

from .teachers import Teacher, load_teachers

TEACHER_STREAM = (1 << 63) + 1
# keeps the on-policy coin apart from the rollouts' random numbers, which are keyed by (prompt,
# member)
COIN_STREAM = 1 << 63


@dataclass(frozen=True)
class Text:
    """A rollout and who wrote it: "student", "teacher" (and which) or "dataset"."""

    rollout: Rollout
    writer: str
    teacher: int = 0


class Distill:
    """The phase: sample, score, loss. `tally` holds what the last score wants in the log line."""

    def __init__(self, cfg: Config, engine):
        self.cfg, self.engine, self.spec = cfg, engine, cfg.distill
        self.chat = Chat(cfg.model.path)
        engine.vocab_size = min(engine.vocab_size, self.chat.vocab_size)
        self.prompts = load_prompts(
            cfg.data.source, split=cfg.data.split, columns=cfg.data.columns, limit=cfg.data.limit
        )
        self.task = build_task(cfg.task.name, cfg.task.options) if cfg.task.name else None
        self.evaluator = Evaluator(cfg, engine, self.chat, self.task)
        self.teachers = load_teachers(cfg, engine, self.chat) if cfg.needs_teacher else []
        self.defence = DefendedDecoding(cfg, engine, [t.chat for t in self.teachers])
        self.rewrite = load_function(self.spec.rewrite) if self.spec.rewrite else None
        self.metric_sums = MetricSums()
        self.pool = (
            self._buy(self.spec.query_budget)
            if self.spec.query_budget and self.spec.source == "teacher"
            else []
        )

    def sample(self, step: int) -> list[list[Text]]:
        """[P][G] texts of this rank's part of the step's prompts."""
        r, seed = self.cfg.rollout, self.cfg.seed
        batch = self.prompts.batch(step - 1, r.prompts, seed=seed, shuffle=self.cfg.data.shuffle)
        slots = shard(list(enumerate(batch)), self.engine.rank, self.engine.world)
        on_policy = self._on_policy_slots(step)
        mine = [p for slot, p in slots if slot in on_policy]
        others = [(slot, p) for slot, p in slots if slot not in on_policy]
        groups: list[list[Text]] = []
        if self.spec.on_policy > 0:
            with self.engine.gathered_weights() as decode:
                groups += [
                    [Text(x, "student") for x in g]
                    for g in generate(decode, self.chat, mine, r.group, self._draw(step))
                ]
        if self.spec.on_policy < 1:
            groups += self._off_policy(step, others)
        return groups

    def score(self, texts_PG: list[list[Text]]) -> list[Sample]:
        """Targets of every text; one sample per text that can be learned from."""
        self.metric_sums = MetricSums()
        texts = list(chain.from_iterable(texts_PG))
        self._report(texts)
        if self.spec.correct_only:
            texts = self._keep_right(texts)
        if self.spec.objective == "span":
            return self._span_samples(texts)
        samples = [Sample(self._own(t), off_policy=t.writer != "student") for t in texts]
        if not self.teachers or self.spec.objective == "nll":
            return samples
        if self.spec.objective == "class":
            return self._class_samples(texts)
        return [
            replace(s, teacher_views=tuple(self._same_ids(t, s.rollout) for t in self.teachers))
            for s in samples
        ]

    def loss(self, out: HeadInputs, batch: Batch) -> Loss:
        """The objective plus nll_weight times the likelihood of off-policy texts, summed over the
        batch's tokens.

        Of `class` the objective has two parts: divergences at the places where both models have
        read the same bytes, and inner_weight times the likelihood of the off-policy tokens
        elsewhere, without which a student would forget how words go on.
        """
        spec, metrics = self.spec, {}
        total = 0.0 * out.hidden_TD.float().sum()
        inner = spec.inner_weight if spec.objective == "class" else 0.0
        if spec.objective in ("nll", "span") or spec.nll_weight or inner:
            logp_T = token_logprob_of(out, batch.target_T).logp
            likelihood, metrics = nll(logp_T, batch.off_policy_T)
            total = total + (1.0 if spec.objective == "nll" else spec.nll_weight) * likelihood
        if inner:
            likelihood, more = nll(logp_T, self._not_compared(batch))
            total, metrics = total + inner * likelihood, metrics | {"inner_nll": more["nll"]}
        if spec.objective in ("kl", "class"):
            divergence, more = self._divergence(out, batch)
            return total + divergence, metrics | more
        if spec.objective == "span":
            likeness, more = span_kl(
                logp_T, batch.span_T, batch.teacher_span_logp_S, temperature=spec.span_temperature
            )
            return total + likeness, metrics | more
        return total, metrics

    def close_step(self, step: int, stats: dict[str, float]) -> dict[str, float]:
        return self.evaluator.due(step)

    def _not_compared(self, batch: Batch) -> Tensor:
        """[T] the share of teachers, by weight, that do not compare this off-policy token."""
        return sum(
            t.weight * batch.off_policy_T.index_fill(0, batch.places(i), 0.0)
            for i, t in enumerate(self.teachers)
        )

    def _divergence(self, out: HeadInputs, batch: Batch) -> Loss:
        """The teachers' weighted sum of token KLs, or of class divergences at the places both
        models share.
        """
        total, sums = 0.0, {}
        for i, teacher in enumerate(self.teachers):
            with self.engine.forward_no_grad(
                teacher.model, batch.for_teacher(i), teacher.vocab_size(out)
            ) as theirs:
                if self.spec.objective == "kl":
                    loss, metrics = distill_kl(out, theirs, self.spec)
                else:
                    loss, metrics = teacher.classes(at_places(out, batch.places(i)), theirs)
            total = total + teacher.weight * loss
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + teacher.weight * value
        return total, sums

    # where texts come from
    def _off_policy(self, step: int, slots: list[tuple[int, Prompt]]) -> list[list[Text]]:
        r = self.cfg.rollout
        if self.spec.source == "dataset":
            return [[Text(given_rollout(self.chat, p, r.max_tokens), "dataset")] for _, p in slots]
        if self.spec.query_budget:
            rows = places(len(self.pool), step - 1, r.prompts, seed=self.cfg.seed)
            return [self.pool[rows[slot]] for slot, _ in slots]
        return self._written_by_teachers(
            [p for _, p in slots], self._teacher_of_slots(step, [slot for slot, _ in slots]), step
        )

    def _written_by_teachers(
        self, prompts: list[Prompt], teacher_of: list[int], step: int
    ) -> list[list[Text]]:
        """One group of texts per prompt, in order; every rank asks every teacher, for that is
        collective.
        """
        groups: list[list[Text]] = [[] for _ in prompts]
        for i, teacher in enumerate(self.teachers):
            mine = [k for k, t in enumerate(teacher_of) if t == i]
            with self.defence.apply(self.engine.gathered_frozen_weights(teacher.model)) as decode:
                found = generate(
                    decode,
                    teacher.chat,
                    [prompts[k] for k in mine],
                    self.cfg.rollout.group,
                    self._draw(step),
                )
            for k, group in zip(mine, found):
                groups[k] = [
                    Text(x, "teacher", i) for x in self._as_the_student_gets_it(teacher, group)
                ]
        return groups

    def _as_the_student_gets_it(self, teacher: Teacher, group: list[Rollout]) -> list[Rollout]:
        """Without repeated texts of a prompt (`dedup`), and as `rewrite` leaves them; None from it
        drops a text.
        """
        if self.spec.dedup:
            group = list({x.text: x for x in group}.values())
        if self.rewrite is None:
            return group
        texts = [(x, self.rewrite(x.prompt, x.text)) for x in group]
        return [
            _rewritten(teacher.chat, x, text, self.cfg.rollout.max_tokens)
            for x, text in texts
            if text is not None
        ]

    def _teacher_of_slots(self, step: int, slots: list[int]) -> list[int]:
        """Which teacher answers each slot of the step's batch: drawn by weight, the same on every
        rank.
        """
        if len(self.teachers) == 1:
            return [0] * len(slots)
        draws = self._coins(step, TEACHER_STREAM, max(slots, default=0) + 1)
        return np.searchsorted(
            np.cumsum([t.weight for t in self.teachers])[:-1], draws[slots], side="right"
        ).tolist()

    def _buy(self, count: int) -> list[list[Text]]:
        """The teachers' answers to the first `count` prompts of the shuffled data; every rank holds
        all of them.
        """
        world = self.engine.world
        prompts = [self.prompts[i] for i in places(len(self.prompts), 0, count, seed=self.cfg.seed)]
        unique = list({p.index: p for p in prompts}.values())
        asked = self._teacher_of_slots(0, list(range(len(unique))))
        mine = self._written_by_teachers(
            unique[self.engine.rank :: world], asked[self.engine.rank :: world], 0
        )
        # a rewrite may have dropped all of a prompt's texts
        bought = [group for group in self.engine.gather(mine) if group]
        if not bought:
            raise ValueError(
                f"distill.rewrite = {self.spec.rewrite!r} dropped all of the teacher's {count} "
                "answers; want a function that keeps some of them, or raise distill.query_budget"
            )
        pool = sorted(bought, key=lambda group: group[0].rollout.prompt.index)
        if self.spec.correct_only:
            pool = [
                [x for x, g in zip(group, self.task.grade([t.rollout for t in group])) if g.correct]
                for group in pool
            ]
            pool = [group for group in pool if group]
            if not pool:
                raise ValueError(
                    f"distill.correct_only: none of the teacher's {count} answers is right; check "
                    f"task.name = {self.cfg.task.name!r} and task.options against the texts, or "
                    "raise distill.query_budget"
                )
        return pool

    def _draw(self, step: int) -> Sampling:
        r = self.cfg.rollout
        return Sampling(r.max_tokens, self.cfg.seed, step, r.temperature, r.top_p, r.top_k, r.rows)

    def _on_policy_slots(self, step: int) -> set[int]:
        """The places of the step's batch that the student answers: on_policy x P of them, drawn
        anew every step, a fraction of one rounded up or down at random. The same on every rank.
        """
        count = self.cfg.rollout.prompts
        draws = self._coins(step, COIN_STREAM, count + 1)
        chosen = int(self.spec.on_policy * count + draws[-1])
        return set(np.argsort(draws[:-1], kind="stable")[:chosen].tolist())

    def _coins(self, step: int, stream: int, count: int) -> np.ndarray:
        key = np.array([self.cfg.seed << 32 ^ step, stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).random(count)

    def _own(self, text: Text) -> Rollout:
        """The text behind the student's own prompt, in its ids: as sampled where they are shared,
        else re-encoded.
        """
        if text.writer != "teacher":
            return text.rollout
        x = replace(text.rollout, prompt_ids=self.chat.prompt_ids(text.rollout.prompt.messages))
        if self.teachers[text.teacher].same:
            return x
        ids = self.chat.encode(x.text) + ((self.chat.stop_id,) if x.ended else ())
        return replace(x, ids=ids, logp=(0.0,) * len(ids))

    def _same_ids(self, teacher: Teacher, rollout: Rollout) -> TeacherView | None:
        ids = teacher.chat.prompt_ids(rollout.prompt.messages)
        return None if ids == rollout.prompt_ids else TeacherView(ids)

    def _keep_right(self, texts: list[Text]) -> list[Text]:
        grades = self.task.grade([t.rollout for t in texts])
        kept = [t for t, g in zip(texts, grades) if t.writer == "student" or g.correct]
        self.metric_sums.add("kept", [float(t in kept) for t in texts])
        return kept

    # across tokenizers
    def _class_samples(self, texts: list[Text]) -> list[Sample]:
        """Each text in the student's tokens, and in every teacher's, with the places where both
        have read the same bytes.
        """
        own = [self._own(t) for t in texts]
        aligned = [align_texts(self.chat, t.chat, own, same=t.same) for t in self.teachers]
        usable = [all(column[k].spans is not None for column in aligned) for k in range(len(own))]
        self.metric_sums.add("unaligned", [float(not u) for u in usable])
        compared = [
            len(column[k].starts.a) for column in aligned for k in range(len(own)) if usable[k]
        ]
        self.metric_sums.add("compared", compared)
        return [
            Sample(
                own[k],
                off_policy=texts[k].writer != "student",
                teacher_views=tuple(
                    _class_view(t, own[k], column[k]) for t, column in zip(self.teachers, aligned)
                ),
            )
            for k in range(len(own))
            if usable[k]
        ]

    def _span_samples(self, texts: list[Text]) -> list[Sample]:
        """Teacher likelihoods of the spans that both tokenizations share; the stop is a span of its
        own.
        """
        by_teacher = [t.rollout for t in texts if t.writer == "teacher"]
        others = [t for t in texts if t.writer != "teacher"]
        samples = self._from_teacher(by_teacher) + self._from_student(others)
        self.metric_sums.add("unaligned", [float(s is None) for s in samples])
        return [s for s in samples if s is not None]

    def _from_teacher(self, rollouts: list[Rollout]) -> list[Sample | None]:
        """The teacher wrote: its own sampled ids and log-probabilities, re-tokenized by the
        student.
        """
        teacher = self.teachers[0]
        aligned = align_texts(teacher.chat, self.chat, rollouts, same=teacher.same)
        out: list[Sample | None] = []
        for x, a in zip(rollouts, aligned):
            if a.spans is None:
                out.append(None)
                continue
            teacher_S = span_logprobs(
                np.asarray(x.logp[: len(x.content_ids)]), a.sampler_span, a.spans
            )
            own = replace(
                x,
                prompt_ids=self.chat.prompt_ids(x.prompt.messages),
                ids=tuple(a.scorer_ids) + ((self.chat.stop_id,) if x.ended else ()),
            )
            out.append(_span_sample(own, a.scorer_span, teacher_S, x.stop_logp, True))
        return out

    def _from_student(self, texts: list[Text]) -> list[Sample | None]:
        """The student wrote, or the data set: the teacher reads the text with its own template and
        tokenizer. Collective.
        """
        rollouts = [t.rollout for t in texts]
        teacher = self.teachers[0]
        aligned = align_texts(self.chat, teacher.chat, rollouts, same=teacher.same)
        usable = [k for k, a in enumerate(aligned) if a.spans is not None]
        jobs = [
            (teacher.chat.prompt_ids(rollouts[k].prompt.messages), tuple(aligned[k].scorer_ids))
            for k in usable
        ]
        read = dict(
            zip(
                usable,
                score_ids(
                    teacher.model, self.engine, jobs, teacher.chat, tokens=self.cfg.batch.tokens
                ),
            )
        )
        out: list[Sample | None] = []
        for k, (text, a) in enumerate(zip(texts, aligned)):
            if k not in read:
                out.append(None)
                continue
            teacher_S = span_logprobs(read[k].logp, a.scorer_span, a.spans)
            out.append(
                _span_sample(
                    text.rollout, a.sampler_span, teacher_S, read[k].stop, text.writer != "student"
                )
            )
        return out

    def _report(self, texts: list[Text]) -> None:
        t, own = self.metric_sums, [x.rollout for x in texts if x.writer == "student"]
        t.add("length", [len(x.rollout.ids) for x in texts])
        t.add("truncated", [float(not x.rollout.ended) for x in texts])
        t.add("on_policy", [float(x.writer == "student") for x in texts])
        if self.task is not None and self.spec.on_policy > 0:
            grades = self.task.grade(own)
            t.add("reward/task", [g.reward for g in grades])


def _rewritten(chat: Chat, rollout: Rollout, text: str, max_tokens: int) -> Rollout:
    """The same rollout with another text, in the writer's tokens; it has no log-probabilities of
    its own.
    """
    ids = (*chat.encode(text), *((chat.stop_id,) if rollout.ended else ()))
    if text == rollout.text:
        return rollout
    if len(ids) > max_tokens:
        raise ValueError(
            f"distill.rewrite made {len(ids)} tokens of prompt {rollout.prompt.index}'s text; want "
            f"at most rollout.max_tokens = {max_tokens}. Shorten what it returns, or return None "
            "to drop the text"
        )
    return replace(rollout, ids=ids, logp=(0.0,) * len(ids), text=text)


def _class_view(teacher: Teacher, rollout: Rollout, aligned: Aligned) -> TeacherView:
    ids = tuple(aligned.scorer_ids) + ((teacher.chat.stop_id,) if rollout.ended else ())
    return TeacherView(
        teacher.chat.prompt_ids(rollout.prompt.messages), ids, aligned.starts.a, aligned.starts.b
    )


def _span_sample(
    rollout: Rollout, span: np.ndarray, teacher_S: np.ndarray, stop: float, off_policy: bool
) -> Sample:
    if rollout.ended:
        span, teacher_S = np.append(span, len(teacher_S)), np.append(teacher_S, stop)
    return Sample(rollout, off_policy=off_policy, span=span, teacher_span_logp=teacher_S)
