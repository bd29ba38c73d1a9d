"""Phase diagnose: which of the three traps is this teacher-student pair in? No weight moves; writes
report.md with its plots, diagnosis.json, tokens.jsonl and heatmap.html.

    model = the student, teacher = the teacher, data = any prompts, task = what grades texts
        (optional: without it no gap)
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout, TeacherView
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.task_routing import build_grader, task_names
from reflux.trainer.data.training_prompts import load_training_prompts
from reflux.trainer.phase import (
    Advance,
    Engine,
    Grader,
    LossFunction,
    Phase,
    ReadableModel,
    Sampler,
    Sampling,
)
from reflux.trainer.rollouts.generate import EmbeddedSampler, given_rollout
from reflux.trainer.rollouts.samplers import build_sampler
from reflux.trainer.rollouts.scoring import score_ids
from reflux.trainer.runs import commands
from reflux.trainer.runs.progress import Stage, progress

from .gradient_snr import (
    GradientNoise,
    deal,
    gradient_noise,
    gradients_of,
    token_divergence,
)
from .measure import GradedText, SampledBy, StatsSpec, TokenStats, measure_texts
from .measure_cross_tokenizer import (
    byte_divergence,
    count_symbols,
    measure_texts_cross_tokenizer,
    pair_of,
    symbol_types,
)
from .metrics import Divergence
from .report import write_diagnosis
from .results import Diagnosis
from .summary import diagnose_token_stats
from .symptoms import CutOutcome, correction, insert_error, own_error, revises, with_answers
from .token_classes import count_ids, frequency_bands, token_types
from .training_stability import read_stability
from .verdict import flatten, with_verdict

STREAM = {
    "student": 1 << 29,
    "teacher": (1 << 29) + 1,
    "clean": (1 << 29) + 2,
    "error": (1 << 29) + 3,
    "own": (1 << 29) + 4,
    "cut": 1 << 28,
}
ALIGNER = "reflux.tokenalign"
CUTS = (0.25, 0.5, 0.75)  # of a correct text's tokens


@dataclass(frozen=True)
class Cut:
    """The beginning of a correct text, as it is and with one error at its end."""

    rollout: Rollout
    clean: str
    wrong: str


class DiagnosePhase:
    """Measures, adds up, writes: a Phase. Everything it does is collective."""

    exit_code = 0

    def __init__(self, cfg: Config, engine: Engine):
        self.cfg, self.engine, self.section = cfg, engine, cfg.diagnose
        self.stability = read_stability(cfg)  # a wrong folder is an error before anything is loaded
        self.chat, self.teacher_chat = Chat.of(cfg.model), Chat.of(cfg.teacher)
        engine.vocab_size = min(engine.vocab_size, self.chat.vocab_size)
        self.teacher = engine.frozen(cfg.teacher)
        rows = engine.vocab_size, min(self.teacher.vocab_size, self.teacher_chat.vocab_size)
        # None: one vocabulary
        self.pair = (
            None
            if same_vocabulary(self.chat, self.teacher_chat)
            else pair_of(
                self.chat, self.teacher_chat, rows, engine.device, self.section.max_missing
            )
        )
        prompts = load_training_prompts(cfg, self.chat, engine)
        self.data_fields = prompts.fit.fields
        self.prompts = [prompts[i] for i in range(engine.rank, len(prompts), engine.world)]
        self.grader: Grader | None = None
        if task_names(cfg):
            self.grader = build_grader(cfg, engine.once_per_row)
        self.sampler = build_sampler(cfg, engine, self.chat)
        self.teacher_sampler = EmbeddedSampler(
            partial(engine.gathered_frozen_weights, self.teacher), self.teacher_chat
        )

    def close_step(self, step: int, stats: Mapping[str, float]) -> dict[str, Any]:
        return self.run()

    def run(self) -> dict[str, float]:
        """The whole diagnosis; returns the verdict's numbers on every rank."""
        with progress(self.engine.is_main and not self.cfg.log.quiet) as stage:
            diagnosis, stats = self._diagnose(stage)
        if self.engine.is_main:
            chats = self.chat, self.teacher_chat
            write_diagnosis(Path(self.cfg.folder), self.cfg, diagnosis, stats, chats)
        return flatten(diagnosis) | {f"data/{k}": n for k, n in self.data_fields.items()}

    @contextlib.contextmanager
    def _shows_unaligned(self, unaligned: Sequence[TokenStats]) -> Iterator[None]:
        """An error inside gets the command that shows where the two tokenizers part."""
        try:
            yield
        except ValueError as error:
            for stats in unaligned[:1]:
                pair = (self.cfg.model.path, self.cfg.teacher.path)
                text = f"--text={stats.rollout.text}"
                error.add_note(f"One of them:\n  {commands.module(ALIGNER, *pair, text)}")
            raise

    def _diagnose(self, stage: Stage) -> tuple[Diagnosis, list[TokenStats]]:
        """From all ranks' texts, the same on every rank."""
        gather = self.engine.gather
        mine, unaligned = self._measure(stage)
        students = [s for s in mine if s.sampled_by == "student"]
        cuts = gather(self._correction(stage, mine))
        own_errors = dict(gather(self._own_errors(stage, students)))
        greedy = dict(gather(self._greedy(stage, students)))
        stats = sorted(gather(mine), key=lambda s: (s.sampled_by, s.prompt))  # stable in a prompt
        unaligned = gather(unaligned)
        with self._shows_unaligned(unaligned):
            diagnosis = diagnose_token_stats(
                stats, kl_fraction=self.section.kl_fraction, unaligned=unaligned
            )
        # a text need not align to have an answer
        answered = sorted(
            (s for s in stats + unaligned if s.sampled_by == "student"), key=lambda s: s.prompt
        )
        symptoms = with_answers(
            diagnosis.symptoms, answered, greedy, names_answers=self._names_answers(answered)
        )
        diagnosis = replace(
            diagnosis,
            symptoms=replace(
                symptoms, correction=correction(cuts), own_error=own_error(own_errors, answered)
            ),
            off_policy=replace(diagnosis.off_policy, gradient=self._gradient(stage, stats)),
            runs=self.stability,
        )
        return with_verdict(diagnosis), stats

    def _names_answers(self, stats: Sequence[TokenStats]) -> bool:
        """A user's function may grade without naming an answer."""
        return self.grader is not None and (
            ":" not in task_names(self.cfg) or any(s.answer is not None for s in stats)
        )

    def _gradient(self, stage: Stage, stats: Sequence[TokenStats]) -> GradientNoise | None:
        """Of the token KL, or of the next byte's where there are two vocabularies."""
        batches = self.section.gradient_batches
        groups = deal(stats, batches) if batches else {}
        with stage("gradients", gradients_of(groups)) as advance:
            return gradient_noise(
                self.engine,
                groups,
                self._divergence,
                self._view,
                tokens=self.cfg.batch.tokens,
                joined=self.cfg.batch.pack,
                advance=advance,
            )

    def _divergence(self, divergence: Divergence) -> LossFunction:
        if self.pair is None:
            return token_divergence(self.engine, self.teacher, divergence)
        return byte_divergence(self.engine, self.teacher, self.pair, divergence)

    def _view(self, stats: TokenStats) -> TeacherView:
        if stats.alignment is not None:
            return stats.alignment.view
        return TeacherView(self.teacher_chat.prompt_ids(stats.rollout.prompt.messages))

    # sampling and measuring
    def _measure(self, stage: Stage) -> tuple[list[TokenStats], list[TokenStats]]:
        """Token stats of this rank's texts, and of those that are unaligned."""
        texts = {source: self._sample(stage, source) for source in self.section.prefixes}
        spec = self._stats_spec(chain.from_iterable(texts.values()))
        stats, unaligned = [], []
        for source, rollouts in texts.items():
            graded = self._graded(source, rollouts)
            with stage(f"measuring texts by the {source}", len(rollouts)) as advance:
                measured, others = self._measure_texts(graded, spec, advance)
            stats += measured
            unaligned += others
        return stats, unaligned

    def _measure_texts(
        self, texts: Sequence[GradedText], spec: StatsSpec, advance: Advance
    ) -> tuple[list[TokenStats], list[TokenStats]]:
        tokens, joined = self.cfg.batch.tokens, self.cfg.batch.pack
        if self.pair is not None:
            return measure_texts_cross_tokenizer(
                self.engine,
                self.teacher,
                texts,
                self.pair,
                tokens=tokens,
                spec=spec,
                joined=joined,
                advance=advance,
            )
        chats = self.chat, self.teacher_chat
        measured = measure_texts(
            self.engine,
            self.teacher,
            texts,
            chats,
            tokens=tokens,
            spec=spec,
            joined=joined,
            advance=advance,
        )
        return measured, []

    def _stats_spec(self, rollouts: Iterable[Rollout]) -> StatsSpec:
        """Frequencies count all texts of all ranks, so every text has to exist before the first is
        measured.
        """
        if self.pair is None:
            counts = count_ids((r.ids for r in rollouts), len(self.chat.table))
            types = token_types(self.chat.table, self.chat.stop_ids)
        else:
            counts, types = count_symbols(rollouts), symbol_types()
        everywhere = sum(self.engine.gather([counts]))
        return StatsSpec(
            self.section.overlap_k,
            torch.from_numpy(types),
            torch.from_numpy(frequency_bands(everywhere)),
        )

    def _graded(self, source: SampledBy, rollouts: Sequence[Rollout]) -> list[GradedText]:
        no_grades = [Grade(0.0, None)] * len(rollouts)
        grades = self.grader.grade(rollouts) if self.grader else no_grades
        return [GradedText(r, source, g) for r, g in zip(rollouts, grades)]

    def _sample(self, stage: Stage, source: SampledBy) -> list[Rollout]:
        """In the student's ids, behind its own prompt; the teacher's own texts in its own, where it
        has another vocabulary.
        """
        if source == "dataset":
            max_tokens = self.cfg.rollout.max_tokens
            return [given_rollout(self.chat, p, max_tokens) for p in self.prompts]
        if source == "student":
            return self._texts(stage, source, self.sampler, self.section.student_texts)
        rollouts = self._texts(stage, source, self.teacher_sampler, self.section.teacher_texts)
        if self.pair is not None:
            return rollouts
        return [replace(r, prompt_ids=self.chat.prompt_ids(r.prompt.messages)) for r in rollouts]

    def _texts(
        self, stage: Stage, source: SampledBy, sampler: Sampler, count: int
    ) -> list[Rollout]:
        with stage(f"texts by the {source}", count * len(self.prompts)) as advance:
            groups = sampler.sample(self.prompts, count, self._sampling(source), advance)
        return list(chain.from_iterable(groups))

    def _sampling(self, stream: str) -> Sampling:
        r = self.cfg.rollout
        return Sampling(r.max_tokens, self.cfg.seed, STREAM[stream], rows=r.rows)

    def _greedy(self, stage: Stage, students: Sequence[TokenStats]) -> list[tuple[int, bool]]:
        """(prompt, is the student's likeliest text correct?), where its sampled texts have grades
        to compare with.
        """
        if self.grader is None or "student" not in self.section.prefixes:
            return []
        graded = {s.prompt for s in students if s.correct is not None}
        prompts = [p for p in self.prompts if p.index in graded]
        sampling = replace(self._sampling("student"), greedy=True)
        with stage("greedy texts by the student", len(prompts)) as advance:
            groups = self.sampler.sample(prompts, 1, sampling, advance)
        texts = list(chain.from_iterable(groups))
        return [(x.prompt.index, bool(g.correct)) for x, g in zip(texts, self.grader.grade(texts))]

    # self-correction
    def _correction(self, stage: Stage, stats: Sequence[TokenStats]) -> list[CutOutcome]:
        """Correct texts cut short, with and without an error at the cut: is the student still
        correct?
        """
        if not self.section.correction or self.grader is None:
            return []
        draw = np.random.default_rng(self.cfg.seed << 8 ^ STREAM["cut"] ^ self.engine.rank)
        cuts = list(_cuts(self.chat, [s for s in stats if s.correct and s.rollout.ended], draw))
        clean = [(c.rollout.prompt, c.clean) for c in cuts]
        wrong = [(c.rollout.prompt, c.wrong) for c in cuts]
        return [
            CutOutcome(after_clean, after_error, revises(text), student_gain, teacher_gain)
            for (after_clean, _), (after_error, text), student_gain, teacher_gain in zip(
                self._continue(stage, self.grader, clean, "clean"),
                self._continue(stage, self.grader, wrong, "error"),
                self._correcting_gain(self.engine, self.chat, cuts),
                self._correcting_gain(self.teacher, self.teacher_chat, cuts),
            )
        ]

    def _own_errors(self, stage: Stage, students: Sequence[TokenStats]) -> list[tuple[int, bool]]:
        """(prompt, correct after all?) of the student's own wrong texts, one a prompt, cut in the
        middle and continued.
        """
        if not self.section.correction or self.grader is None:
            return []
        wrong = [s for s in students if s.correct is False and s.rollout.ended]
        halves = [
            (r.prompt, half)
            for r in _first_of_prompts(wrong)
            if (half := _beginning(self.chat, r, 0.5))
        ]
        outcomes = self._continue(stage, self.grader, halves, "own")
        return [(p.index, correct) for (p, _), (correct, _) in zip(halves, outcomes)]

    def _continue(
        self, stage: Stage, grader: Grader, prefixes: Sequence[tuple[Prompt, str]], stream: str
    ) -> list[tuple[bool, str]]:
        """(is the whole text correct?, the continuation) of each prefix of an answer."""
        prompts = [
            replace(p, messages=(*p.messages, {"role": "assistant", "content": prefix}))
            for p, prefix in prefixes
        ]
        sampler = build_sampler(self.cfg, self.engine, ContinuedChat(self.chat))
        with stage(f"continued texts, {stream}", len(prompts)) as advance:
            groups = sampler.sample(prompts, 1, self._sampling(stream), advance)
        continued = [g[0] for g in groups]
        whole = [
            replace(r, prompt=p, text=prefix + r.text)
            for r, (p, prefix) in zip(continued, prefixes)
        ]
        return [(bool(g.correct), r.text) for g, r in zip(grader.grade(whole), continued)]

    def _correcting_gain(
        self, model: ReadableModel, chat: Chat, cuts: Sequence[Cut]
    ) -> list[float]:
        """log p(correction | error) - log p(the text goes on as if nothing had happened | error),
        nats, in the model's own tokens behind its own template. Collective.
        """
        continued, jobs = ContinuedChat(chat), []
        for c in cuts:
            goes_on = c.rollout.text[len(c.clean) :]
            corrected = c.clean[_first_difference(c.clean, c.wrong) :] + goes_on
            turn = {"role": "assistant", "content": c.wrong}
            start = continued.prompt_ids((*c.rollout.prompt.messages, turn))
            jobs.append((start, chat.encode(self.section.correction_marker + corrected)))
            jobs.append((start, chat.encode(goes_on)))
        scores = score_ids(model, self.engine, jobs, chat, tokens=self.cfg.batch.tokens, stop=False)
        sums = [float(s.logp.sum()) for s in scores]
        return [a - b for a, b in zip(sums[::2], sums[1::2])]


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


_PHASE: type[Phase] = DiagnosePhase  # mypy proves that it keeps the contract
