"""The teachers of a distillation: frozen models, each with its own tokenizer and its weight, and
how their distributions are compared with the student's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from reflux.kernels.linear_kl import LinearKL
from reflux.tokenalign import vocab_map
from reflux.tokenalign.class_losses import (
    PartitionIndex,
    class_kl,
    hybrid,
    map_topk,
    partition_index,
    uld,
)
from reflux.tokenalign.linear_class_kl import linear_class_kl
from reflux.tokenalign.linear_rows import linear_rows
from reflux.tokenalign.projection import Projection
from reflux.tokenalign.vocab_map import Partition, Vocabulary, first_merge
from reflux.trainer.config.distillation import DistillSection, exact_settings
from reflux.trainer.config.roles import distill_advice, teachers_of
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Batch, Rollout, TeacherView, TopKRows
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.data.stop_sets import stop_advice
from reflux.trainer.losses import (
    HeadInputs,
    Loss,
    at_positions,
    distill_kl,
    teacher_topk_of,
    topk_kl,
)
from reflux.trainer.phase import Engine, FrozenModel, Sampler, Teacher, TextScore
from reflux.trainer.rollouts.defences import DefendedDecoding
from reflux.trainer.rollouts.generate import EmbeddedSampler
from reflux.trainer.rollouts.scoring import Prefixes, score_ids

from .byte_loss import ByteLoss, byte_loss
from .cached_teacher import load_cached
from .draws import draw_noise
from .reading import Reading, not_compared
from .served_teacher import load_served

BY_BYTES = ("byte", "policy_gradient")  # objectives that need both vocabularies as tries
PARTITIONS: dict[str, Callable[[Vocabulary, Vocabulary], Partition]] = {
    "first_byte": vocab_map.first_byte,
    "common": vocab_map.common,
    "prefix": vocab_map.prefix,
    "hybrid": vocab_map.common,
}


@dataclass(frozen=True, eq=False)
class ClassLoss:
    """Divergence of two models with different vocabularies at aligned positions.

    The formulas are those of reflux.tokenalign.class_losses. `first_byte`, `common` and `prefix`
    with the whole teacher are kernels.bucket_kl; `common` with a top-k teacher is
    kernels.linear_topk_kl; the rest goes through linear_rows.
    """

    spec: DistillSection
    partition: PartitionIndex | None  # None: uld needs none
    student_id_W: Tensor | None  # of a top-k teacher with `common`: its ids in the student's

    def __call__(self, student: HeadInputs, teacher: HeadInputs) -> Loss:
        """(sum over the aligned positions, metrics as sums). Row t of both is one position."""
        spec = self.spec
        if self.student_id_W is not None:
            topk = map_topk(teacher_topk_of(teacher, spec), self.student_id_W)
            total, metrics = topk_kl(student, topk, spec)
        else:
            result = self._divergence(student, teacher)
            scale = spec.temperature**2 if spec.scale_t2 else 1.0
            total, metrics = scale * result.total, {"kl": result.kl.detach().sum()}
        positions = torch.full_like(total.detach(), len(student.hidden_TD))
        return total, metrics | {"aligned_positions": positions}

    def _divergence(self, student: HeadInputs, teacher: HeadInputs) -> LinearKL:
        spec, temperature = self.spec, self.spec.temperature
        other = teacher_topk_of(teacher, spec) if spec.top_k else teacher
        if self.partition is None:
            return linear_rows(partial(uld, temperature=temperature), student, other)
        if not spec.top_k and spec.partition != "hybrid":
            return linear_class_kl(
                student,
                teacher,
                self.partition,
                divergence=spec.divergence,
                beta=spec.beta,
                temperature=temperature,
            )
        loss = partial(
            hybrid if spec.partition == "hybrid" else class_kl,
            partition=self.partition,
            divergence=spec.divergence,
            beta=spec.beta,
            temperature=temperature,
        )
        return linear_rows(loss, student, other)


@dataclass(frozen=True, eq=False)
class FrozenTeacher:
    """A frozen model as the Teacher of a run."""

    engine: Engine
    spec: DistillSection
    model: FrozenModel
    chat: Chat
    sampler: Sampler  # of its texts, as `[defence]` serves them
    weight: float
    shares_ids: bool
    reading: Reading
    tokens: int  # of a micro-batch, padding included
    class_loss: ClassLoss | None  # of objective = "class"
    byte_loss: ByteLoss | None = None  # of objective = "byte"
    seed: int = 0  # of draws from it

    def views(self, rollouts: Sequence[Rollout], step: int) -> list[TeacherView | None]:
        """Its own rendering of the prompts, and where its tokens are drawn; None where the student
        reads the same.
        """
        return [self._view(rollout, step) for rollout in rollouts]

    def _view(self, rollout: Rollout, step: int) -> TeacherView | None:
        if not self.reading.is_for(rollout.prompt):
            return not_compared(rollout, self.spec.top_k if self.spec.tail == "sampled" else 0)
        ids = self.chat.prompt_ids(self.reading.messages(rollout.prompt))
        if self.spec.tail != "sampled":
            return None if ids == rollout.prompt_ids else TeacherView(ids)
        noise = draw_noise(rollout, self.spec.top_k, seed=self.seed, step=step)
        return TeacherView(ids, uniform=noise)

    def kept_rows(self, rollout: Rollout) -> TopKRows | None:
        """None: it is asked."""
        return None

    def divergence(self, student: HeadInputs, batch: Batch, index: int) -> Loss:
        """See phase.Teacher. Collective: the teacher's head is gathered."""
        vocab_size = student.vocab_size if self.shares_ids else self.chat.vocab_size
        teacher_batch = batch.for_teacher(index)
        with self.engine.forward_no_grad(self.model, teacher_batch, vocab_size) as teacher:
            if self.byte_loss is not None:
                return self.byte_loss(student, teacher, batch, teacher_batch)
            if self.class_loss is None:
                student = at_positions(student, batch.aligned_positions(index))
                return distill_kl(student, teacher, self.spec, self._uniform(batch, index))
            return self.class_loss(at_positions(student, batch.aligned_positions(index)), teacher)

    def _uniform(self, batch: Batch, index: int) -> Tensor | None:
        if self.spec.tail != "sampled":
            return None
        uniform_TK = batch.uniform(index)
        if uniform_TK is None:  # a batch without tokens, for a rank that has none left
            uniform_TK = torch.zeros(
                0, self.spec.top_k, dtype=torch.float64, device=batch.row_T.device
            )
        return uniform_TK

    def score_texts(
        self,
        jobs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        spaces: Sequence[bool] | None = None,
    ) -> list[TextScore]:
        """See phase.Teacher. Collective."""
        prefixes = None
        if spaces is not None and self.byte_loss is not None:
            prefixes = Prefixes(self.byte_loss.teacher, spaces)
        return score_ids(
            self.model, self.engine, jobs, self.chat, tokens=self.tokens, prefixes=prefixes
        )


def load_teachers(cfg: Config, engine: Engine, chat: Chat) -> Sequence[Teacher]:
    """The teachers of a run, by teacher.source. Collective. ValueError for a source that is not
    built, and, before a model is loaded or a server asked, where the objective cannot compare
    vocabularies or stops.
    """
    if cfg.teacher.source not in SOURCES:
        raise ValueError(
            f"teacher.source = {cfg.teacher.source!r} is not available; want {' | '.join(SOURCES)}"
        )
    chats = [Chat.of(model) for model in teachers_of(cfg)]
    _refuse(cfg, chat, chats)
    _refuse_unknown_stops(cfg.distill, chat, chats)
    return SOURCES[cfg.teacher.source](cfg, engine, chat, chats)


def load_local(cfg: Config, engine: Engine, chat: Chat, chats: Sequence[Chat]) -> Sequence[Teacher]:
    """`teacher.path` and `distill.more_teachers` as frozen models, in this order. Collective."""
    paths = (cfg.teacher.path, *cfg.distill.more_teachers)
    weights = cfg.distill.teacher_weights or (1.0,) * len(paths)
    total = 1.0 if cfg.distill.route else sum(weights)  # routed: a text has one teacher
    shares_ids = [same_vocabulary(chat, c) for c in chats]
    objective = cfg.distill.objective
    losses = [
        (
            _class_loss(cfg.distill, chat, c, engine) if objective == "class" else None,
            byte_loss(cfg.distill, chat, c, engine, same=same) if objective in BY_BYTES else None,
        )
        for c, same in zip(chats, shares_ids)
    ]
    models = [engine.frozen(model) for model in teachers_of(cfg)]
    defence = DefendedDecoding(cfg, engine, chats)
    return [
        FrozenTeacher(
            engine,
            cfg.distill,
            model,
            teacher_chat,
            EmbeddedSampler(
                defence.weights(partial(engine.gathered_frozen_weights, model)), teacher_chat
            ),
            weight / total,
            same,
            Reading(cfg.distill, paths, i),
            cfg.batch.tokens,
            *compared,
            cfg.seed,
        )
        for i, (model, teacher_chat, weight, same, compared) in enumerate(
            zip(models, chats, weights, shares_ids, losses)
        )
    ]


# teacher.source -> its teachers, of the student's tokenizer and their own
SOURCES: dict[str, Callable[[Config, Engine, Chat, Sequence[Chat]], Sequence[Teacher]]] = {
    "local": load_local,
    "cache": load_cached,
    "server": load_served,
}


def _refuse(cfg: Config, chat: Chat, chats: Sequence[Chat]) -> None:
    """ValueError where the objective cannot compare the student with a teacher, or only with a
    biased fixed point that is not allowed.
    """
    other = next((c.path for c in chats if not same_vocabulary(chat, c)), None)
    if other is None:
        return
    merge = first_merge(chat.table) if cfg.distill.objective == "class" else None
    advice = distill_advice(cfg, False, merge)
    if advice is not None:
        raise ValueError(f"{other} and {cfg.model.path} have different vocabularies. {advice.text}")


def _refuse_unknown_stops(spec: DistillSection, chat: Chat, chats: Sequence[Chat]) -> None:
    """ValueError where the objective would teach the student a stop at which it does not stop."""
    for teacher in chats:
        if same_vocabulary(chat, teacher):
            advice = stop_advice(spec.objective, chat, teacher)
            if advice is not None and advice.level == "error":
                raise ValueError(f"{teacher.path} and {chat.path}: {advice.text}")


def has_biased_fixed_point(spec: DistillSection, chat: Chat, teachers: Sequence[Teacher]) -> bool:
    """Whether a student that is as good as its teachers would be trained away from them."""
    if all(t.shares_ids for t in teachers) or spec.objective not in ("class", "span"):
        return False
    return (
        spec.objective == "span"
        or bool(exact_settings(spec))
        or first_merge(chat.table) is not None
    )


def _class_loss(spec: DistillSection, student: Chat, teacher: Chat, engine: Engine) -> ClassLoss:
    if spec.partition == "uld":
        return ClassLoss(spec, None, None)
    # heads are used up to what the tokenizers know: rows beyond it are padding
    vocabularies = (
        Vocabulary(student.table, student.stop_ids, engine.vocab_size),
        Vocabulary(teacher.table, teacher.stop_ids, teacher.vocab_size),
    )
    if spec.partition == "projection":
        projection = Projection.build(*vocabularies)
        return ClassLoss(spec, partition_index(projection, engine.device), None)
    built = PARTITIONS[spec.partition](*vocabularies)
    if built.kind == "common":
        _refuse_a_tail_of_control_ids(spec, built, *vocabularies)
    if spec.divergence == "reverse" and built.student_only:
        raise ValueError(
            f"distill.divergence = 'reverse' with distill.partition = {spec.partition!r}: the "
            f"student has {built.student_only} classes of tokens that the teacher has no id in, so "
            "the KL is infinite. Use divergence = 'forward', 'jsd' or a skew, or objective = 'span'"
        )
    student_id_W = None
    if spec.top_k:
        student_id_W = torch.from_numpy(vocab_map.student_id_of(*vocabularies)).to(engine.device)
    return ClassLoss(spec, partition_index(built, engine.device), student_id_W)


def _refuse_a_tail_of_control_ids(
    spec: DistillSection, built: Partition, student: Vocabulary, teacher: Vocabulary
) -> None:
    """ValueError where the student's tail bucket has control ids only, and the teacher's text."""
    student_tail, teacher_tail = (
        [x for x, c in zip(side.spellings, class_V.tolist()) if c == built.control_class]
        for side, class_V in ((student, built.student_class), (teacher, built.teacher_class))
    )
    lacking = [x for x in teacher_tail if x]
    if lacking and not any(student_tail):
        raise ValueError(
            f"distill.partition = {spec.partition!r}: the teacher has {len(lacking)} tokens that "
            f"the student lacks, such as {lacking[0]!r}, and the only ids of the student that are "
            f"not common are {len(student_tail)} control ids: it would learn to emit those. Use "
            "partition = 'prefix' with top_k = 0, or objective = 'span'"
        )
