"""Answers held-out prompts with the engine's model and measures the answers: greedy, sampled, and
by the likelihood of options. Used by the phase `evaluate` and by those that train.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.parts import tasks
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.failed_grades import FEW, check_parts
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.task_routing import GraderNames
from reflux.trainer.phase import Engine, Grader, Sampler, Sampling
from reflux.trainer.rollouts.defences import DefendedDecoding
from reflux.trainer.rollouts.generate import EmbeddedSampler
from reflux.trainer.rollouts.samplers import build_sampler

from .acceptance import check_metric, load_graded
from .metrics import Difference, check_same, compare, measure, metric_values, of_part
from .multiple_choice import choices_by_likelihood, score_options
from .predictions import (
    MODES,
    Generation,
    Prediction,
    Question,
    Unfinished,
    failed_grades,
    prompt_id,
    save_predictions,
    save_questions,
    with_outcomes,
)
from .questions import chance, load_questions
from .results import Evaluation, log_fields
from .settings import Settings, check_settings, load_settings, save_settings, settings_of

SAMPLE_STREAM = 1 << 31  # evaluation draws its own random numbers, whatever step it happens at
BLOCK = 4  # times rollout.rows: answers of one rank between two writes of unfinished.jsonl
# what the answers depend on, of [eval]
SPEC = (
    *(f.name for f in fields(SourceSection)),
    "parts",
    "samples",
    "by",
)

Answer = Callable[[Sequence[Prompt]], list[Prediction]]


class Evaluator:
    """Evaluates when a step is due. It has no state: the same weights give the same answers at any
    step.
    """

    def __init__(
        self,
        cfg: Config,
        engine: Engine,
        chat: Chat,
        grader: Grader | None,
        *,
        defence: DefendedDecoding | None = None,
        whole_run: bool = False,
    ):
        """grader: None only where nothing is evaluated (eval.source is empty). defence: what the
        model is served with. whole_run: the run is this evaluation. Then sampled answers take
        rollout.temperature, top_p and top_k, else the full softmax at temperature 1; and answers
        are cached on disk, so that a killed evaluation goes on. ValueError, before anything is
        answered, for questions that cannot be used and for an eval.against with other ones.
        """
        self.cfg, self.engine, self.chat, self.grader = cfg, engine, chat, grader
        self.whole_run = whole_run
        e = cfg.eval
        self.prompts: Sequence[Prompt] = ()
        self.settings: Settings = {}
        self._theirs: list[Prediction] | None = None
        self._unfinished: Unfinished | None = None
        if not e.asks:
            return
        self.sampler = self._build_sampler(defence)
        self.questions = load_questions(cfg, engine, chat)
        self.prompts = self.questions.prompts
        self.settings = settings_of(cfg, self._sampling(greedy=False), chat, self.questions)
        if e.against:
            self._theirs = load_graded(e.against, "eval.against", tasks(cfg))
            check_same(self.expected(), self._theirs, e.against)
            check_settings(self.settings, load_settings(e.against), e.against, self._modes)
            for metric in e.metrics:
                check_metric("eval.against", e.against, self._theirs, metric)
        if whole_run:
            self._unfinished = Unfinished(Path(cfg.folder), self._spec())

    def _build_sampler(self, defence: DefendedDecoding | None) -> Sampler:
        cfg, engine = self.cfg, self.engine
        if defence is None or not cfg.defence.changes_text:
            return build_sampler(cfg, engine, self.chat)
        return EmbeddedSampler(defence.weights(engine.gathered_weights), self.chat)

    def due(self, step: int) -> dict[str, Any]:
        """Log fields if this step evaluates, else nothing. Collective."""
        e, last = self.cfg.eval, step == self.cfg.steps
        at_start = step == 0 and e.at_start
        every = e.every and step and step % e.every == 0
        return self.results(step) if last or every or at_start else {}

    def results(self, step: int) -> dict[str, Any]:
        """Log fields; none without questions. Collective."""
        if not self.prompts:
            return {}
        return log_fields(self.measure(self.answer(step)), self.cfg.eval.metrics)

    def expected(self) -> list[Question]:
        """The questions, before anything is answered."""
        return [
            Question(
                mode=mode, prompt=p.index, sample=k, id=prompt_id(p), answer=p.answer, part=p.part
            )
            for way, count in self._samples.items()
            for mode in MODES[way]
            for p in self.prompts
            for k in range(count)
        ]

    def answer(self, step: int) -> list[Prediction]:
        """All predictions, in order, on every rank, and in predictions/step-N.jsonl. Collective.

        ValueError, on every rank, where more grades failed than task.max_failed allows.
        """
        engine, unfinished = self.engine, self._unfinished
        cached = unfinished.load(self._samples) if unfinished and engine.rank == 0 else []
        predictions = engine.gather(cached)
        if unfinished and engine.is_main:
            unfinished.open(predictions)
        for block, answer in self._blocks(predictions):
            new = engine.gather(answer(block[engine.rank :: engine.world]))
            predictions += new
            if unfinished and engine.is_main:
                unfinished.add(new)
            self._check_failed_grades(predictions, to_come=True)
        self._check_failed_grades(predictions)
        predictions = self._with_outcomes(predictions)
        predictions.sort(key=lambda p: (p.mode, p.prompt, p.sample))
        if engine.is_main:
            save_predictions(Path(self.cfg.folder), step, predictions)
            save_questions(Path(self.cfg.folder), self.prompts)
            save_settings(Path(self.cfg.folder), self.settings)
            if unfinished:
                unfinished.close()
        return predictions

    def measure(self, predictions: Sequence[Prediction]) -> Evaluation:
        """The numbers of all predictions, and their differences to eval.against."""
        metrics, differences = self.cfg.eval.metrics, dict[str, Difference]()
        if self._theirs is not None:
            differences = {
                m: compare(metric_values(predictions, m), metric_values(self._theirs, m))
                for m in metrics
            }
        parts = {part: measure(of_part(predictions, part), metrics) for part in self.cfg.eval.parts}
        estimates = measure(predictions, metrics)
        return Evaluation(estimates, differences, parts=parts, chance=chance(self.questions))

    @cached_property
    def _generated(self) -> Counter[str]:
        """Texts that there will be, by part; those by likelihood need no grader."""
        each = sum(n for way, n in self._samples.items() if way != "likelihood")
        return Counter(p.part for p in self.prompts for _ in range(each))

    @property
    def _samples(self) -> dict[str, int]:
        """Way of answering (key of MODES) -> answers of a prompt."""
        e = self.cfg.eval
        generated = {"greedy": 1, "sampled": e.samples} if e.generates else {}
        counts = generated | {"likelihood": int(e.scores_options)}
        return {way: count for way, count in counts.items() if count}

    @property
    def _modes(self) -> list[str]:
        return [mode for way in self._samples for mode in MODES[way]]

    def _check_failed_grades(
        self, predictions: Sequence[Prediction], *, to_come: bool = False
    ) -> None:
        """An evaluation that a training run makes on its way has the budget of FEW texts at least:
        one failed grade does not end the run. to_come: ValueError only where the texts that are
        still to come cannot mend it.
        """
        grading, counts = tasks(self.cfg), failed_grades(predictions)
        if to_come:
            counts = {
                part: count
                for part, count in counts.items()
                if count.failed > grading[part].max_failed * self._generated[part]
            }
        try:
            check_parts(counts, grading, few=0 if self.whole_run else FEW)
        except ValueError as error:
            if self._unfinished is None:
                raise
            raise ValueError(f"{error}. The texts are in {self._unfinished.path}") from None

    def _with_outcomes(self, predictions: list[Prediction]) -> list[Prediction]:
        """A user's grader may give no answers at all: then none is missing."""
        names, asked = GraderNames(self.cfg), {p.index: p for p in self.prompts}
        generated = [p for p in predictions if p.generation]
        naming = names.with_answers((asked[p.prompt], p.extracted) for p in generated)
        return with_outcomes(
            predictions, self.cfg.eval.refusal, lambda p: names.of(asked[p.prompt]) in naming
        )

    def _spec(self) -> dict[str, Any]:
        """All that the answers depend on."""
        c = self.cfg
        sections = (("model", c.model), ("defence", c.defence))
        spec = {name: asdict(section) for name, section in (*sections, ("rollout", c.rollout))}
        spec["tasks"] = {part: asdict(task) for part, task in tasks(c).items()}
        questions = asdict(c.eval)
        chosen = {key: questions[key] for key in SPEC}
        return {**spec, "seed": c.seed, **chosen, "inputs": self.engine.inputs}

    def _blocks(self, done: Sequence[Prediction]) -> Iterator[tuple[list[Prompt], Answer]]:
        """What is still to be answered: prompts of all ranks, and how."""
        for way, count in self._samples.items():
            answered = {p.prompt for p in done if p.mode == MODES[way][0]}
            left = [i for i in range(len(self.prompts)) if i not in answered]
            size = max(1, BLOCK * self.cfg.rollout.rows // count) * self.engine.world
            answer = partial(self._generate, mode=way, count=count)
            for start in range(0, len(left), size):
                block = [self.prompts[i] for i in left[start : start + size]]
                yield block, self._choose if way == "likelihood" else answer

    def _generate(self, prompts: Sequence[Prompt], mode: str, count: int) -> list[Prediction]:
        sampling = self._sampling(greedy=mode == "greedy")
        shown = [self.questions.shown(p) for p in prompts]
        texts = [x for group in self.sampler.sample(shown, count, sampling) for x in group]
        assert self.grader is not None
        ids = [prompt_id(p) for p in prompts for _ in range(count)]
        return [
            self._prediction(mode, k % count, ids[k], text, grade)
            for k, (text, grade) in enumerate(zip(texts, self.grader.grade(texts)))
        ]

    def _sampling(self, *, greedy: bool) -> Sampling:
        r = self.cfg.rollout
        plain = Sampling(r.max_tokens, self.cfg.seed, SAMPLE_STREAM, rows=r.rows, greedy=greedy)
        if greedy or not self.whole_run:
            return plain
        return replace(plain, temperature=r.temperature, top_p=r.top_p, top_k=r.top_k)

    def _prediction(
        self, mode: str, sample: int, id: str, rollout: Rollout, grade: Grade
    ) -> Prediction:
        options = self.questions.options_or_none(rollout.prompt)
        # beyond 1e-4 nats lies float32 rounding, which depends on the batch: a resumed evaluation
        # answers what is left in other batches
        nll = round(-float(np.sum(rollout.logp)), 4)
        return Prediction(
            mode=mode,
            prompt=rollout.prompt.index,
            part=rollout.prompt.part,
            sample=sample,
            id=id,
            answer=rollout.prompt.answer,
            reward=grade.reward,
            correct=grade.correct,
            extracted=grade.extracted,
            error=grade.error,
            position=options.correct if options else None,
            choice_at=options.position_of(grade.extracted) if options else None,
            generation=Generation(
                rollout.text, rollout.ended, len(rollout.ids), nll, graded=grade.graded
            ),
        )

    def _choose(self, prompts: Sequence[Prompt]) -> list[Prediction]:
        shown = [self.questions.shown(p) for p in prompts]
        questions = [(p, self.questions.options(p)) for p in shown]
        scores = score_options(self.engine, self.chat, questions, tokens=self.cfg.batch.tokens)
        return [
            prediction
            for p, question, logp in zip(prompts, questions, scores)
            for prediction in choices_by_likelihood(*question, logp, prompt_id(p))
        ]
