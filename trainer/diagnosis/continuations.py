"""Answers that are cut short and continued by the student: does it recover from an error?

A continued text has what the cut left of rollout.max_tokens, so that it is never longer than any
other answer. A cut that leaves a model no room is left out and counted: its text, spelled anew or
with a correction behind it, may have more tokens than it was sampled with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import Engine, FrozenModel, Grader, ReadableModel, Sampling
from reflux.trainer.rollouts.samplers import build_sampler
from reflux.trainer.rollouts.scoring import score_ids
from reflux.trainer.runs.progress import Stage

from .measure import TokenStats, correct_of
from .symptoms import CutOutcome, insert_error, revises

STREAM = {"clean": (1 << 29) + 2, "error": (1 << 29) + 3, "own": (1 << 29) + 4, "cut": 1 << 28}
CUTS = (0.25, 0.5, 0.75)  # of a correct text's tokens
Job = tuple[tuple[int, ...], tuple[int, ...]]  # prompt and content ids


@dataclass(frozen=True)
class Cut:
    """The beginning of a correct text, as it is and with one error at its end."""

    rollout: Rollout
    clean: str
    wrong: str


@dataclass(frozen=True)
class Continuations:
    """What the student makes of answers that are begun. Collective."""

    cfg: Config
    engine: Engine
    teacher: FrozenModel
    chats: tuple[Chat, Chat]  # student's and teacher's
    grader: Grader

    def correction(self, stage: Stage, stats: Sequence[TokenStats]) -> list[CutOutcome | None]:
        """Correct texts cut short, with and without an error at the cut: is the student still
        correct? None for a cut without room; one on which the grader failed is left out.
        """
        draw = np.random.default_rng(self.cfg.seed << 8 ^ STREAM["cut"] ^ self.engine.rank)
        correct = [s for s in stats if s.correct and s.rollout.ended]
        drawn = list(_cuts(self.chats[0], correct, draw))
        cuts = [c for c in drawn if min(self._left(c.clean), self._left(c.wrong)) > 0]
        clean = self._continued(stage, [(c.rollout.prompt, c.clean) for c in cuts], "clean")
        wrong = self._continued(stage, [(c.rollout.prompt, c.wrong) for c in cuts], "error")
        outcomes: list[CutOutcome | None] = [None] * (len(drawn) - len(cuts))
        for (after_clean, _), (after_error, text), gains in zip(clean, wrong, self._gains(cuts)):
            if after_clean is not None and after_error is not None:
                outcomes.append(CutOutcome(after_clean, after_error, revises(text), gains))
        return outcomes

    def own_errors(self, stage: Stage, students: Sequence[TokenStats]) -> list[tuple[int, bool]]:
        """(prompt, correct after all?) of the student's own wrong texts, one a prompt, cut in the
        middle and continued.
        """
        wrong = [s for s in students if s.correct is False and s.rollout.ended]
        halves = [
            (r.prompt, half)
            for r in _first_of_prompts(wrong)
            if (half := _beginning(self.chats[0], r, 0.5)) and self._left(half) > 0
        ]
        outcomes = self._continued(stage, halves, "own")
        return [
            (p.index, correct)
            for (p, _), (correct, _) in zip(halves, outcomes)
            if correct is not None
        ]

    def _left(self, prefix: str) -> int:
        """Tokens that an answer may have behind its beginning."""
        return self.cfg.rollout.max_tokens - len(self.chats[0].encode(prefix))

    def _continued(
        self, stage: Stage, prefixes: Sequence[tuple[Prompt, str]], stream: str
    ) -> list[tuple[bool | None, str]]:
        """(is the whole text correct?, the continuation) of each prefix of an answer."""
        prompts = [
            replace(p, messages=(*p.messages, {"role": "assistant", "content": prefix}))
            for p, prefix in prefixes
        ]
        sampler = build_sampler(self.cfg, self.engine, ContinuedChat(self.chats[0]))
        r = self.cfg.rollout
        spent = tuple(r.max_tokens - self._left(prefix) for _, prefix in prefixes)
        sampling = Sampling(r.max_tokens, self.cfg.seed, STREAM[stream], rows=r.rows, spent=spent)
        with stage(f"continued texts, {stream}", len(prompts)) as advance:
            groups = sampler.sample(prompts, 1, sampling, advance)
        continued = [g[0] for g in groups]
        whole = [
            replace(r, prompt=p, text=prefix + r.text)
            for r, (p, prefix) in zip(continued, prefixes)
        ]
        grades = self.grader.grade(whole)
        return [(correct_of(g), r.text) for g, r in zip(grades, continued)]

    def _gains(self, cuts: Sequence[Cut]) -> list[tuple[float, float] | None]:
        """log p(correction | error) - log p(the text goes on as if nothing had happened | error),
        nats, of student and teacher, each in its own tokens behind its own template; None where one
        of them has no room. Collective.
        """
        jobs = [[job for c in cuts for job in self._gain_jobs(chat, c)] for chat in self.chats]
        lengths = [[len(prompt) + len(ids) for prompt, ids in own] for own in jobs]
        fits = [
            max(student) <= self.engine.seq_len + 1 and self.chats[1].has_room(max(teacher))
            for student, teacher in zip(*(zip(own[::2], own[1::2]) for own in lengths))
        ]
        twice = [fit for fit in fits for _ in range(2)]
        models: tuple[ReadableModel, ReadableModel] = (self.engine, self.teacher)
        found = zip(
            *(
                self._differences(model, chat, [job for job, fit in zip(own, twice) if fit])
                for model, chat, own in zip(models, self.chats, jobs)
            )
        )
        return [next(found) if fit else None for fit in fits]

    def _differences(self, model: ReadableModel, chat: Chat, jobs: Sequence[Job]) -> list[float]:
        """Log-probability of the first, third, ... - that of the text behind it. Collective."""
        scores = score_ids(model, self.engine, jobs, chat, tokens=self.cfg.batch.tokens, stop=False)
        sums = [float(s.logp.sum()) for s in scores]
        return [a - b for a, b in zip(sums[::2], sums[1::2])]

    def _gain_jobs(self, chat: Chat, cut: Cut) -> tuple[Job, Job]:
        """Behind the error: the correction, and the text that goes on."""
        goes_on = cut.rollout.text[len(cut.clean) :]
        corrected = cut.clean[_first_difference(cut.clean, cut.wrong) :] + goes_on
        turn = {"role": "assistant", "content": cut.wrong}
        start = ContinuedChat(chat).prompt_ids((*cut.rollout.prompt.messages, turn))
        marker = self.cfg.diagnose.correction_marker
        return (start, chat.encode(marker + corrected)), (start, chat.encode(goes_on))


class ContinuedChat(Chat):
    """A chat whose last message is the beginning of the answer."""

    def __init__(self, chat: Chat):
        self.__dict__ = chat.__dict__  # one tokenizer, one table, one cache

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        return super().prompt_ids(messages[:-1]) + self.encode(messages[-1]["content"])


def _first_of_prompts(stats: Sequence[TokenStats]) -> list[Rollout]:
    """The first text of each prompt."""
    return list({s.prompt: s.rollout for s in reversed(stats)}.values())


def _cuts(chat: Chat, stats: Sequence[TokenStats], draw: np.random.Generator) -> Iterator[Cut]:
    """One text a prompt at every fraction of CUTS where there is something to break."""
    for rollout in _first_of_prompts(stats):
        for fraction in CUTS:
            clean = _beginning(chat, rollout, fraction)
            wrong = insert_error(clean, draw) if clean else None
            if clean and wrong is not None:
                yield Cut(rollout, clean, wrong)


def _beginning(chat: Chat, rollout: Rollout, fraction: float) -> str | None:
    """The text's first tokens, spelled; None where they are no true beginning of it."""
    ids = rollout.content_ids
    text = chat.decode(ids[: max(1, round(fraction * len(ids)))])
    begins = text and rollout.text.startswith(text) and len(text) < len(rollout.text)
    return text if begins else None


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
