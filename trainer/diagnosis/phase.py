"""Phase diagnose: which of the three traps is this teacher-student pair in? No weight moves; writes
report.md with its plots, diagnosis.json, tokens.jsonl and heatmap.html.

    model = the student, teacher = the teacher, data = any prompts, task = what grades texts
        (optional: without it no gap)
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from reflux.trainer.config.parts import tasks
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Rollout, TeacherView
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.data.failed_grades import (
    FailedGrades,
    add_parts,
    check_parts,
    count_by_part,
)
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.task_routing import GraderNames, build_grader, task_names
from reflux.trainer.data.training_prompts import load_training_prompts
from reflux.trainer.phase import (
    Advance,
    Engine,
    Grader,
    LossFunction,
    Phase,
    Sampler,
    Sampling,
)
from reflux.trainer.rollouts.generate import EmbeddedSampler, given_rollout
from reflux.trainer.rollouts.samplers import build_sampler
from reflux.trainer.runs import commands
from reflux.trainer.runs.progress import Stage, progress

from .continuations import Continuations
from .gradient_snr import (
    GradientNoise,
    deal,
    gradient_noise,
    gradients_of,
    token_divergence,
)
from .measure import (
    GradedText,
    SampledBy,
    StatsSpec,
    TokenStats,
    correct_of,
    measure_texts,
)
from .measure_cross_tokenizer import (
    byte_divergence,
    count_symbols,
    measure_texts_cross_tokenizer,
    pair_of,
    symbol_types,
)
from .metrics import Divergence
from .report import write_results, write_texts
from .results import Diagnosis
from .summary import diagnose_token_stats
from .symptoms import correction, own_error, with_answers
from .token_classes import count_ids, frequency_bands, token_types
from .training_stability import read_stability
from .verdict import flatten, with_verdict

STREAM = {"student": 1 << 29, "teacher": (1 << 29) + 1}  # others are in continuations.py
ALIGNER = "reflux.tokenalign"


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
        self.grader: CountedGrader | None = None
        if task_names(cfg):
            self.grader = CountedGrader(build_grader(cfg, engine.once_per_row))
        self.sampler = build_sampler(cfg, engine, self.chat)
        self.teacher_sampler = EmbeddedSampler(
            partial(engine.gathered_frozen_weights, self.teacher), self.teacher_chat
        )

    def close_step(self, step: int, stats: Mapping[str, float]) -> dict[str, Any]:
        return self.run()

    def run(self) -> dict[str, float]:
        """The whole diagnosis; returns the verdict's numbers on every rank. What the texts say is
        written before anything is asked of the models again.
        """
        with progress(self.engine.is_main and not self.cfg.log.quiet) as stage:
            mine, unaligned = self._measure(stage)
            gather = self.engine.gather
            # stable in a prompt
            stats = sorted(gather(mine), key=lambda s: (s.sampled_by, s.prompt))
            others = gather(unaligned)
            with self._shows_unaligned(others):
                diagnosis = diagnose_token_stats(
                    stats, kl_fraction=self.section.kl_fraction, unaligned=others
                )
            diagnosis = self._concluded(replace(diagnosis, runs=self.stability))
            if self.engine.is_main:
                chats = self.chat, self.teacher_chat
                heatmap = write_texts(Path(self.cfg.folder), self.cfg, stats, chats)
                write_results(self.cfg, diagnosis, heatmap=heatmap, whole=False)
            diagnosis = self._concluded(self._with_probes(stage, diagnosis, mine, stats, others))
            if self.engine.is_main:
                write_results(self.cfg, diagnosis, heatmap=heatmap)
        return flatten(diagnosis) | {f"data/{k}": n for k, n in self.data_fields.items()}

    def _concluded(self, diagnosis: Diagnosis) -> Diagnosis:
        """With the verdict, and the failed grades so far; ValueError, on every rank, where they are
        more than task.max_failed.
        """
        if self.grader is None:
            return with_verdict(diagnosis)
        failed = self._check_failed_grades()
        return with_verdict(replace(diagnosis, failed_grades=failed if failed.failed else None))

    def _check_failed_grades(self) -> FailedGrades:
        """Of all ranks."""
        assert self.grader is not None
        failed = add_parts(self.engine.gather([self.grader.counts]))
        check_parts(failed, tasks(self.cfg))
        return sum(failed.values(), FailedGrades())

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

    def _with_probes(
        self,
        stage: Stage,
        diagnosis: Diagnosis,
        mine: Sequence[TokenStats],
        stats: Sequence[TokenStats],
        unaligned: Sequence[TokenStats],
    ) -> Diagnosis:
        """Adds what more texts of the student and gradients say. mine: of this rank's texts; the
        others are of all ranks.
        """
        gather, cuts, own_errors = self.engine.gather, [], {}
        students = [s for s in mine if s.sampled_by == "student"]
        if self.section.correction and self.grader is not None:
            probe = Continuations(
                self.cfg, self.engine, self.teacher, (self.chat, self.teacher_chat), self.grader
            )
            cuts = gather(probe.correction(stage, mine))
            own_errors = dict(gather(probe.own_errors(stage, students)))
        greedy = dict(gather(self._greedy(stage, students)))
        # a text need not align to have an answer
        answered = sorted(
            (s for s in (*stats, *unaligned) if s.sampled_by == "student"), key=lambda s: s.prompt
        )
        symptoms = with_answers(
            diagnosis.symptoms, answered, greedy, names_answers=self._names_answers(answered)
        )
        return replace(
            diagnosis,
            symptoms=replace(
                symptoms,
                correction=correction([c for c in cuts if c is not None]),
                cuts_without_room=cuts.count(None) or None,
                own_error=own_error(own_errors, answered),
            ),
            off_policy=replace(diagnosis.off_policy, gradient=self._gradient(stage, stats)),
        )

    def _names_answers(self, stats: Sequence[TokenStats]) -> Callable[[TokenStats], bool]:
        """Of each text: does its grader say what it took for the answer?"""
        names = GraderNames(self.cfg)
        naming = names.with_answers((s.rollout.prompt, s.answer) for s in stats)
        return lambda s: names.of(s.rollout.prompt) in naming

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
        graded_texts = {
            source: self._graded(source, rollouts) for source, rollouts in texts.items()
        }
        if self.grader is not None:  # a grader that fails is told before anything is measured
            self._check_failed_grades()
        stats, unaligned = [], []
        for source, graded in graded_texts.items():
            rollouts = texts[source]
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
        grades = [correct_of(grade) for grade in self.grader.grade(texts)]
        return [(x.prompt.index, g) for x, g in zip(texts, grades) if g is not None]


class CountedGrader:
    """A grader that counts the texts on which it failed."""

    def __init__(self, grader: Grader):
        self._grader = grader
        self.counts: dict[str, FailedGrades] = {}  # by part

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout, in order."""
        grades = self._grader.grade(rollouts)
        pairs = [(r.prompt.part, g) for r, g in zip(rollouts, grades) if g.graded]
        new = count_by_part((part, g.error) for part, g in pairs)
        self.counts = add_parts([self.counts, new])
        return grades


_PHASE: type[Phase] = DiagnosePhase  # mypy proves that it keeps the contract
