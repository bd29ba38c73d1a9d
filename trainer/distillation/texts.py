"""The texts of a distillation step: sampled by the student (on-policy), by a teacher, or given by
the data set.

Which prompts of a step are on-policy, and which teacher answers the others, are drawn from counters
keyed by (seed, step): the same on every rank, and after a resume.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reflux.trainer.config.explain import explain
from reflux.trainer.config.parts import tasks
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.failed_grades import FEW, add_parts, check_parts, count_by_part
from reflux.trainer.data.fitted_prompts import FittedPrompts
from reflux.trainer.data.mixture import Mixture
from reflux.trainer.data.prompts import shard
from reflux.trainer.data.sources import load_function, show
from reflux.trainer.data.task_routing import task_names
from reflux.trainer.data.training_prompts import load_training_prompts
from reflux.trainer.phase import Engine, Grader, Sampling, Teacher
from reflux.trainer.rollouts.generate import given_rollout
from reflux.trainer.rollouts.overlap import StepJob, StepSampler

from .attacker import likeliest, paraphrase
from .correct_texts import check_right_and_wrong
from .reading import Reading, teacher_of, that_fit
from .teacher_texts import FILE, load_teacher_texts, recipe_of, save_teacher_texts
from .teacher_texts import Groups as StoredGroups

log = logging.getLogger(__name__)

# Streams of random numbers beside those of the rollouts, which are keyed by (prompt, group member)
ON_POLICY_STREAM = 1 << 63
TEACHER_STREAM = (1 << 63) + 1
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer can encode


@dataclass(frozen=True)
class Text:
    """A rollout, which model it was sampled by, and which of the teachers."""

    rollout: Rollout
    sampled_by: Literal["student", "teacher", "dataset"]
    teacher: int = 0

    @property
    def off_policy(self) -> bool:
        return self.sampled_by != "student"


Groups = list[list[Text]]  # [P][G]
Slots = list[tuple[int, Prompt]]  # (place in the step's batch, prompt)


class TextSource:
    """Samples the texts of a step. With distill.query_budget the teacher texts are sampled once,
    at the start, and reused.
    """

    def __init__(
        self,
        cfg: Config,
        engine: Engine,
        chat: Chat,
        teachers: Sequence[Teacher],
        task: Grader | None,
    ):
        self.cfg, self.engine, self.spec = cfg, engine, cfg.distill
        self.chat, self.teachers, self.task = chat, teachers, task
        self.student: StepSampler | None = None
        if cfg.distill.on_policy > 0:
            self.student = StepSampler(cfg, engine, chat)
        self.prompts = load_training_prompts(cfg, chat, engine)
        self._paths = (cfg.teacher.path, *self.spec.more_teachers)
        self._readings = [Reading(self.spec, self._paths, i) for i in range(len(self._paths))]
        if self.spec.route:  # every row, before the first step
            self._teacher_of(0, [], self.prompts)
        chats = [teacher.chat for teacher in teachers]
        self.prompts = that_fit(self.prompts, self._readings, chats, cfg)
        self.rewrite: Callable[[Prompt, str], str | None] | None = (
            load_function(self.spec.rewrite) if self.spec.rewrite else None
        )
        budget = self.spec.query_budget if self.spec.source == "teacher" else 0
        bought = self._query_budget(budget) if budget else []
        self.teacher_texts = {group[0].rollout.prompt.index: group for group in bought}
        # their prompts
        self._bought = self.prompts.only(self.teacher_texts) if bought else self.prompts

    def sample(self, step: int) -> Groups:
        """[P][G] texts of this rank's part of the step's prompts, in the batch's order."""
        mine, others = self._slots(step)
        groups: dict[int, list[Text]] = {}  # by slot
        if self.student is not None:
            for (slot, _), group in zip(mine, self.student.sample(step, self._job)):
                groups[slot] = [Text(x, "student") for x in group]
        if self.spec.on_policy < 1:
            groups |= zip((slot for slot, _ in others), self._off_policy(step, others))
        return [groups[slot] for slot in sorted(groups)]

    def _slots(self, step: int) -> tuple[Slots, Slots]:
        """This rank's part of the step's batch: what the student answers, and the rest."""
        batch = self._batch(self.prompts, step, self.cfg.rollout.prompts)
        slots = shard(list(enumerate(batch)), self.engine.rank, self.engine.world)
        chosen = self._on_policy_slots(step)
        return [s for s in slots if s[0] in chosen], [s for s in slots if s[0] not in chosen]

    def _batch(self, prompts: FittedPrompts | Mixture, step: int, count: int) -> list[Prompt]:
        """The global batch of a step (from 1) that takes `count` of these prompts."""
        return prompts.batch(step - 1, count, seed=self.cfg.seed, shuffle=self.cfg.data.shuffle)

    def _job(self, step: int) -> StepJob:
        prompts = [prompt for _, prompt in self._slots(step)[0]]
        return StepJob(prompts, self.cfg.rollout.group, self._sampling(step))

    def _off_policy(self, step: int, slots: Sequence[tuple[int, Prompt]]) -> Groups:
        r = self.cfg.rollout
        if self.spec.source == "dataset":
            return [[Text(given_rollout(self.chat, p, r.max_tokens), "dataset")] for _, p in slots]
        if self.spec.query_budget:
            batch = self._batch(self._bought, step, r.prompts)
            return [self.teacher_texts[batch[slot].index] for slot, _ in slots]
        prompts = [prompt for _, prompt in slots]
        teacher_of = self._teacher_of(step, [slot for slot, _ in slots], prompts)
        return self._sampled_by_teachers(prompts, teacher_of, step)

    def _sampled_by_teachers(
        self, prompts: Sequence[Prompt], teacher_of: Sequence[int], step: int
    ) -> Groups:
        """One group of texts per prompt, in order, each written behind what its teacher reads.
        Every rank samples from every teacher, for that is collective.
        """
        groups: Groups = [[] for _ in prompts]
        for t, (teacher, reading) in enumerate(zip(self.teachers, self._readings)):
            mine = [i for i, chosen in enumerate(teacher_of) if chosen == t]
            rollouts_PG = teacher.sampler.sample(
                [reading.read(prompts[i]) for i in mine],
                self.cfg.rollout.group,
                self._sampling(step),
            )
            for i, group in zip(mine, rollouts_PG):
                # the prompt of the text is the student's
                group = [replace(x, prompt=prompts[i]) for x in group]
                groups[i] = [Text(x, "teacher", t) for x in self._rewritten(teacher.chat, group)]
        return groups

    def _rewritten(self, chat: Chat, group: list[Rollout]) -> list[Rollout]:
        """The first of equal texts of a prompt (distill.dedup), and as distill.rewrite leaves them;
        None from it drops a text.
        """
        if self.spec.dedup:
            first: dict[str, Rollout] = {}
            for x in group:
                first.setdefault(x.text, x)
            group = list(first.values())
        if self.rewrite is None:
            return group
        limit, kept = self.cfg.rollout.max_tokens, []
        for x in group:
            words = chat.whole_text(x.content_ids, x.text)
            text = rewritten(self.rewrite, self.spec.rewrite, x.prompt, words)
            if text is not None:
                kept.append(x if text == words else replace_text(chat, x, text, limit))
        return kept

    def _query_budget(self, count: int) -> Groups:
        """The texts of the budget: from the run folder where an earlier start has left them, else
        sampled and left there. Every rank holds all of them. ValueError, on every rank, for texts
        that are not those of this run, and where a run that has begun to train has lost them.
        """
        folder, recipe = Path(self.cfg.folder), self._recipe(count)
        stored = self._stored(folder, recipe)
        if stored is not None:
            return [[Text(x, "teacher", t) for t, x in group] for group in stored]
        groups = self._sample_query_budget(count)
        if self.engine.is_main:
            plain = [[(text.teacher, text.rollout) for text in group] for group in groups]
            save_teacher_texts(folder, recipe, plain)
        return groups

    def _stored(self, folder: Path, recipe: dict[str, Any]) -> StoredGroups | None:
        """What an earlier start has left. One rank looks, so that all of them do the same."""
        found, problem, step = None, "", self.engine.resumed_step
        if self.engine.rank == 0:
            try:
                found = load_teacher_texts(folder, recipe, self.prompts.of_row)
            except ValueError as error:
                problem = str(error)
        if step and found is None:
            problem = problem or f"{folder / FILE}: no such file; it holds the query budget's texts"
        found, problem = self.engine.gather([(found, problem)])[0]
        if problem and step:
            raise ValueError(
                f"{problem}. The run is at step {step}, and a budget is bought before the first "
                "step: put back what has changed, or set on_existing_run = 'new'"
            )
        if problem and self.engine.is_main:
            log.warning("%s. No step has been taken: it is bought anew", problem)
        return found

    def _recipe(self, count: int) -> dict[str, Any]:
        """Everything that the texts of the budget depend on; the tables of the configuration by
        their names.
        """
        cfg, d = self.cfg, self.spec
        # only where it is set: budgets that were bought before it mattered stay valid
        seen = {"privileged": (d.privileged, d.privileged_template)} if d.privileged else {}
        return recipe_of(
            **seen,
            query_budget=count,
            seed=cfg.seed,
            teacher=cfg.teacher,
            data=cfg.data,
            task=cfg.task,
            rollout=cfg.rollout,
            defence=cfg.defence,
            more_teachers=self.spec.more_teachers,
            teacher_weights=self.spec.teacher_weights,
            route=self.spec.route,
            rewrite=self.spec.rewrite,
            dedup=self.spec.dedup,
            correct_only=self.spec.correct_only,
            paraphraser=(self.spec.paraphraser, self.spec.paraphrase_template),
            keep_likeliest=(self.spec.keep_likeliest, cfg.model.path),
        )

    def _sample_query_budget(self, count: int) -> Groups:
        """The teachers' answers to the first `count` prompts that a run without a budget would
        draw, each once; every rank holds all of them.
        """
        rank, world = self.engine.rank, self.engine.world
        chosen = self._batch(self.prompts, 1, count)
        unique = [p for p in chosen if not p.repeat]
        teacher_of = self._teacher_of(0, list(range(len(unique))), unique)
        mine = self._sampled_by_teachers(unique[rank::world], teacher_of[rank::world], 0)
        if self.spec.paraphraser:
            mine = self._paraphrased(mine)
        if not self.engine.sum(float(any(mine))):
            raise ValueError(
                f"{self._dropped_by()} dropped all of the teacher's {count} answers; want one that "
                "keeps some of them, or raise distill.query_budget"
            )
        if self.spec.correct_only:
            mine = self._correct_only(mine, count)
        groups = [group for group in self.engine.gather(mine) if group]
        groups.sort(key=lambda group: group[0].rollout.prompt.index)
        return self._likeliest(groups) if self.spec.keep_likeliest < 1 else groups

    def _dropped_by(self) -> str:
        if self.spec.rewrite or not self.spec.paraphraser:
            return f"distill.rewrite = {self.spec.rewrite!r}"
        return f"distill.paraphraser = {self.spec.paraphraser!r}"

    def _paraphrased(self, groups: Groups) -> Groups:
        """This rank's groups in the paraphraser's words; without the texts that it has no positions
        for, did not end, or that are longer than rollout.max_tokens in the teacher's tokens.
        Collective.
        """
        flat = [text for group in groups for text in group]
        written = iter(paraphrase(self.cfg, self.engine, list(map(self._whole, flat))))
        found = [[self._restated(t, words) for t, words in zip(group, written)] for group in groups]
        kept = [[text for text in group if text is not None] for group in found]
        lost, count = self.engine.sum(len(flat) - sum(map(len, kept))), self.engine.sum(len(flat))
        if lost and self.engine.is_main:
            log.warning(
                "distill.paraphraser: %d of %d texts are left out: without an end, too long for "
                "it, or longer than rollout.max_tokens = %d in the teacher's tokens",
                *(lost, count, self.cfg.rollout.max_tokens),
            )
        return kept

    def _restated(self, text: Text, words: str | None) -> Text | None:
        chat, limit = self.teachers[text.teacher].chat, self.cfg.rollout.max_tokens
        if words is None or len(ids_of(chat, text.rollout, words)) > limit:
            return None
        return replace(text, rollout=replace_text(chat, text.rollout, words, limit))

    def _whole(self, text: Text) -> Rollout:
        """With its text up to the last whole character, as another tokenizer reads it."""
        rollout, chat = text.rollout, self.teachers[text.teacher].chat
        return replace(rollout, text=chat.whole_text(rollout.content_ids, rollout.text))

    def _likeliest(self, groups: Groups) -> Groups:
        """The texts that the student finds likeliest before its first step
        (distill.keep_likeliest).
        """
        rollouts = [self._whole(text) for group in groups for text in group]
        fraction, tokens = self.spec.keep_likeliest, self.cfg.batch.tokens
        kept = iter(likeliest(self.engine, self.chat, rollouts, fraction, tokens))
        chosen = [[text for text, keep in zip(group, kept) if keep] for group in groups]
        return [group for group in chosen if group]

    def _correct_only(self, groups: Groups, count: int) -> Groups:
        """This rank's groups without wrong answers: each text is graded once, by one rank, so that
        all ranks hold the same. Collective; ValueError where nothing is left, or too many grades
        failed.
        """
        assert self.task is not None
        grades = iter(self.task.grade([text.rollout for group in groups for text in group]))
        pairs = [[(text, next(grades)) for text in group] for group in groups]
        counts = count_by_part(
            (text.rollout.prompt.part, g.error) for group in pairs for text, g in group if g.graded
        )
        check_parts(add_parts(self.engine.gather([counts])), tasks(self.cfg), few=FEW)
        graded = [grade for group in pairs for _, grade in group]
        check_right_and_wrong(graded, self.engine, task_names(self.cfg))
        correct = [[text for text, grade in group if grade.correct] for group in pairs]
        if not self.engine.sum(float(any(correct))):
            raise ValueError(
                f"distill.correct_only: none of the teacher's {count} answers is correct; check "
                f"task.name = {task_names(self.cfg)!r} and task.options against the texts, or "
                "raise distill.query_budget"
            )
        return correct

    # random choices
    def _sampling(self, step: int) -> Sampling:
        r = self.cfg.rollout
        return Sampling(r.max_tokens, self.cfg.seed, step, r.temperature, r.top_p, r.top_k, r.rows)

    def _on_policy_slots(self, step: int) -> set[int]:
        """The slots of the step's batch that the student answers: on_policy x P of them, drawn anew
        every step, a fraction of one rounded up or down at random. The same on every rank.
        """
        count = self.cfg.rollout.prompts
        draws = self._uniform(step, ON_POLICY_STREAM, count + 1)
        chosen = int(self.spec.on_policy * count + draws[-1])
        return set(np.argsort(draws[:-1], kind="stable")[:chosen].tolist())

    def _teacher_of(self, step: int, slots: list[int], prompts: Sequence[Prompt]) -> list[int]:
        """Which teacher answers each prompt: the one that its row names (distill.route), or drawn
        by weight for its slot in the step's batch, the same on every rank.
        """
        if self.spec.route:
            return [teacher_of(prompt, self.spec, self._paths) for prompt in prompts]
        if len(self.teachers) == 1:
            return [0] * len(slots)
        draws = self._uniform(step, TEACHER_STREAM, max(slots, default=0) + 1)
        edges = np.cumsum([t.weight for t in self.teachers])[:-1]
        return np.searchsorted(edges, draws[slots], side="right").tolist()

    def _uniform(self, step: int, stream: int, count: int) -> np.ndarray:
        key = np.array([self.cfg.seed << 32 ^ step, stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).random(count)


def rewritten(
    rewrite: Callable[[Prompt, str], str | None], name: str, prompt: Prompt, words: str
) -> str | None:
    """What a user's function makes of a text. ValueError where it fails, or returns no text."""
    try:
        text = rewrite(prompt, words)
    except Exception as error:
        raise ValueError(
            f"distill.rewrite = {name!r} failed on a text of prompt {prompt.index}: "
            f"{explain(error)}. Mend it, or let it return None to drop the text"
        ) from error
    if text is None or (isinstance(text, str) and not SURROGATE.search(text)):
        return text
    raise ValueError(
        f"distill.rewrite = {name!r} returned {show(text)} for a text of prompt {prompt.index}; "
        "want a text of whole characters, or None to drop it"
    )


def ids_of(chat: Chat, rollout: Rollout, text: str) -> tuple[int, ...]:
    """Another text of the rollout in its sampler's tokens, with the stop where it had one."""
    if text == rollout.text:
        return rollout.ids
    return (*chat.encode(text), *((chat.stop_id,) if rollout.ended else ()))


def replace_text(chat: Chat, rollout: Rollout, text: str, max_tokens: int) -> Rollout:
    """The same rollout with another text, in its sampler's tokens; it has no log-probabilities of
    its own. ValueError where the text is longer than `max_tokens`.
    """
    if text == rollout.text:
        return rollout
    ids = ids_of(chat, rollout, text)
    if len(ids) > max_tokens:
        raise ValueError(
            f"distill.rewrite made {len(ids)} tokens of prompt {rollout.prompt.index}'s text; want "
            f"at most rollout.max_tokens = {max_tokens}. Shorten what it returns, or return None "
            "to drop the text"
        )
    return replace(rollout, ids=ids, logp=(0.0,) * len(ids), text=text)
