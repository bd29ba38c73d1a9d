"""What the teachers say of a step's texts: from Texts to Samples.

    nll    the text itself
    kl     the teacher's own rendering of the prompt, or its rows of a cache; ids are shared
    byte   the text in every teacher's tokens, where both spell its bytes
    policy_gradient   the teacher's log-probability of the student's texts and of their prefixes
    class  the text in every teacher's tokens, and the aligned positions
    span   the teacher's log-probability of every span that both tokenizations share

Shapes: n tokens of one response, S spans.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reflux.tokenalign.scores import span_logprobs
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.batch import Rollout, Sample, TeacherView
from reflux.trainer.data.byte_texts import byte_view
from reflux.trainer.data.chat import Chat
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.phase import Teacher
from reflux.trainer.rollouts.scoring import Aligned, align_texts

from .text_rewards import less_the_others, rewards_to_go, text_reward
from .texts import Text


class Targets:
    """Builds the samples of an objective."""

    def __init__(self, spec: DistillSection, chat: Chat, teachers: Sequence[Teacher]):
        self.spec, self.chat, self.teachers = spec, chat, teachers
        self.too_long = Counter[int]()  # texts of the last step that teacher i has no positions for

    def samples(
        self, texts: Sequence[Text], metric_sums: MetricSums, step: int = 0
    ) -> list[Sample]:
        """One sample per text that can be learned from. step: what draws from a teacher are keyed
        by. Collective.
        """
        self.too_long.clear()
        if self.spec.objective == "span":
            samples = self._span_samples(texts)
            metric_sums.add("unaligned", [float(s is None) for s in samples])
            return [s for s in samples if s is not None]
        if self.spec.objective == "policy_gradient":
            return self._rewarded_samples(texts, metric_sums)
        if self.spec.objective == "byte" and self.teachers:
            return self._byte_samples(texts, metric_sums)
        if self.spec.objective == "class" and self.teachers:
            return self._class_samples(texts, metric_sums)
        samples_N = [Sample(self.for_student(t), off_policy=t.off_policy) for t in texts]
        if self.spec.objective == "nll" or not self.teachers:
            return samples_N
        rollouts = [s.rollout for s in samples_N]
        by_sample = zip(*(t.views(rollouts, step) for t in self.teachers))
        return [replace(s, teacher_views=views) for s, views in zip(samples_N, by_sample)]

    def for_student(self, text: Text) -> Rollout:
        """The text behind the student's own prompt, in its ids: as sampled where they are shared,
        but for a stop at which the student does not stop; else re-encoded, up to its last whole
        character.
        """
        rollout = text.rollout
        if text.sampled_by != "teacher":
            return rollout
        rollout = replace(rollout, prompt_ids=self.chat.prompt_ids(rollout.prompt.messages))
        teacher = self.teachers[text.teacher]
        if teacher.shares_ids:
            return self._with_own_stop(rollout)
        words = teacher.chat.whole_text(rollout.content_ids, rollout.text)
        ids = self.chat.encode(words) + ((self.chat.stop_id,) if rollout.ended else ())
        return replace(rollout, ids=ids, logp=(0.0,) * len(ids), text=words)

    def _with_own_stop(self, rollout: Rollout) -> Rollout:
        if not rollout.ended or rollout.ids[-1] in self.chat.stop_ids:
            return rollout
        ids = (*rollout.content_ids, self.chat.stop_id)
        return replace(rollout, ids=ids, logp=(*rollout.logp[:-1], rollout.stop_logp))

    # byte
    def _byte_samples(self, texts: Sequence[Text], metric_sums: MetricSums) -> list[Sample]:
        """Each text in the student's tokens and in every teacher's."""
        samples = []
        for text in texts:
            rollout = self.for_student(text)
            views = [self._byte_view(text, rollout, i) for i in range(len(self.teachers))]
            found = tuple(v for v in views if v is not None)
            # teachers that did not write the text have read the space that the student put in front
            alike = len({v.student_space for v in found}) == 1
            if len(found) == len(views) and alike:
                samples.append(Sample(rollout, off_policy=text.off_policy, teacher_views=found))
        lost = len(texts) - len(samples)
        metric_sums.add("unaligned", [0.0] * len(samples) + [1.0] * lost)
        return samples

    # policy_gradient
    def _rewarded_samples(self, texts: Sequence[Text], metric_sums: MetricSums) -> list[Sample]:
        """The student's own texts with an advantage per token. Collective."""
        teacher, found = self.teachers[0], []
        for text in texts:
            view = self._byte_view(text, text.rollout, 0)
            if view is not None and view.ids is not None:
                content = view.ids[: len(view.ids) - text.rollout.ended]
                found.append((text.rollout, (view.prompt_ids, content), view.space))
        scores = teacher.score_texts([job for _, job, _ in found], [space for *_, space in found])
        rollouts = [rollout for rollout, *_ in found]
        to_go = [rewards_to_go(self.chat, r, s) for r, s in zip(rollouts, scores)]
        metric_sums.add("log_ratio", [text_reward(r, s) for r, s in zip(rollouts, scores)])
        metric_sums.add("unaligned", [0.0] * len(found) + [1.0] * (len(texts) - len(found)))
        advantages = less_the_others(to_go, [r.prompt.index for r in rollouts])
        return [
            Sample(r, advantage, np.asarray(r.logp)) for r, advantage in zip(rollouts, advantages)
        ]

    def _byte_view(self, text: Text, rollout: Rollout, index: int) -> TeacherView | None:
        """The text as teacher `index` reads it, with its rows where they are kept."""
        teacher = self.teachers[index]
        own = text.sampled_by == "teacher" and text.teacher == index
        read = text.rollout.content_ids if own else None
        if teacher.shares_ids:
            read = rollout.content_ids
        view = byte_view(self.chat, teacher.chat, rollout, read)
        if view is None or view.ids is None:
            return None
        scored = self.spec.objective == "policy_gradient" and not rollout.ended  # the stop, too
        if not self._has_room(index, len(view.prompt_ids) + len(view.ids) + scored):
            return None
        kept = teacher.kept_rows(replace(rollout, ids=view.ids))
        return view if kept is None else replace(view, rows=kept)

    def _has_room(self, index: int, tokens: int) -> bool:
        """Whether teacher `index` has positions for a row of so many tokens; counts those that it
        has none for.
        """
        fits = self.teachers[index].chat.has_room(tokens)
        self.too_long[index] += not fits
        return fits

    # class
    def _class_samples(self, texts: Sequence[Text], metric_sums: MetricSums) -> list[Sample]:
        """Each text in the student's tokens, and in every teacher's, with the aligned positions."""
        rollouts = [self.for_student(t) for t in texts]
        aligned = [
            align_texts(self.chat, t.chat, rollouts, same=t.shares_ids) for t in self.teachers
        ]
        by_text = list(zip(*aligned))
        usable = [i for i, row in enumerate(by_text) if self._is_read(rollouts[i], row)]
        unaligned = np.ones(len(texts))
        unaligned[usable] = 0.0
        metric_sums.add("unaligned", unaligned)
        metric_sums.add("compared", [len(column[i].starts.a) for column in aligned for i in usable])
        return [
            Sample(
                rollouts[i],
                off_policy=texts[i].off_policy,
                teacher_views=tuple(
                    _class_view(teacher, rollouts[i], a)
                    for teacher, a in zip(self.teachers, by_text[i])
                ),
            )
            for i in usable
        ]

    def _is_read(self, rollout: Rollout, aligned: Sequence[Aligned]) -> bool:
        """Whether every teacher has spans of the text, and positions for it."""
        if any(a.spans is None for a in aligned):
            return False
        views = [_class_view(t, rollout, a) for t, a in zip(self.teachers, aligned)]
        rows = [len(v.prompt_ids) + len(v.ids or ()) for v in views]
        return all([self._has_room(i, tokens) for i, tokens in enumerate(rows)])

    # span
    def _span_samples(self, texts: Sequence[Text]) -> list[Sample | None]:
        """Teacher texts first; None where the tokenizers share no spelling of the text."""
        by_teacher = [t for t in texts if t.sampled_by == "teacher"]
        others = [t for t in texts if t.sampled_by != "teacher"]
        return self._spans_sampled_by_teacher(by_teacher) + self._spans_scored_by_teacher(others)

    def _spans_sampled_by_teacher(self, texts: Sequence[Text]) -> list[Sample | None]:
        """The teacher's own sampled ids and log-probabilities, re-tokenized by the student."""
        teacher, rollouts = self.teachers[0], [t.rollout for t in texts]
        aligned = align_texts(teacher.chat, self.chat, rollouts, same=teacher.shares_ids)
        samples: list[Sample | None] = []
        for rollout, a in zip(rollouts, aligned):
            if a.spans is None:
                samples.append(None)
                continue
            logp_n = np.asarray(rollout.logp[: len(rollout.content_ids)])
            teacher_S = span_logprobs(logp_n, a.sampler_span, a.spans)
            stop = (self.chat.stop_id,) if rollout.ended else ()
            own = replace(
                rollout,
                prompt_ids=self.chat.prompt_ids(rollout.prompt.messages),
                ids=tuple(a.scorer_ids) + stop,
            )
            samples.append(_span_sample(own, a.scorer_span, teacher_S, rollout.stop_logp, True))
        return samples

    def _spans_scored_by_teacher(self, texts: Sequence[Text]) -> list[Sample | None]:
        """Texts of the student or the data set: the teacher scores them with its own template and
        tokenizer. Collective.
        """
        teacher, rollouts = self.teachers[0], [t.rollout for t in texts]
        aligned = align_texts(self.chat, teacher.chat, rollouts, same=teacher.shares_ids)
        jobs = {
            i: (teacher.chat.prompt_ids(r.prompt.messages), tuple(a.scorer_ids))
            for i, (r, a) in enumerate(zip(rollouts, aligned))
            if a.spans is not None
        }
        # the stop behind the text is scored, too
        usable = [i for i, ids in jobs.items() if self._has_room(0, sum(map(len, ids)) + 1)]
        scores = dict(zip(usable, teacher.score_texts([jobs[i] for i in usable])))
        samples: list[Sample | None] = []
        for i, (text, a) in enumerate(zip(texts, aligned)):
            if i not in scores:
                samples.append(None)
                continue
            assert a.spans is not None
            teacher_S = span_logprobs(scores[i].logp, a.scorer_span, a.spans)
            sample = _span_sample(
                text.rollout, a.sampler_span, teacher_S, scores[i].stop, text.off_policy
            )
            samples.append(sample)
        return samples


def _class_view(teacher: Teacher, rollout: Rollout, aligned: Aligned) -> TeacherView:
    ids = tuple(aligned.scorer_ids) + ((teacher.chat.stop_id,) if rollout.ended else ())
    return TeacherView(
        teacher.chat.prompt_ids(rollout.prompt.messages), ids, aligned.starts.a, aligned.starts.b
    )


def _span_sample(
    rollout: Rollout, span_n: np.ndarray, teacher_S: np.ndarray, stop: float, off_policy: bool
) -> Sample:
    """The stop is a span of its own."""
    if rollout.ended:
        span_n, teacher_S = np.append(span_n, len(teacher_S)), np.append(teacher_S, stop)
    return Sample(rollout, off_policy=off_policy, span=span_n, teacher_span_logp=teacher_S)
