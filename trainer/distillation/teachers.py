"""The teachers of a distillation: frozen models, each with its own tokenizer, its share, and how
its distributions are compared.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from reflux.tokenalign import vocab_map
from reflux.tokenalign.class_losses import Pools, class_kl, hybrid, map_topk, pools_of, uld
from reflux.tokenalign.linear_rows import linear_rows
from reflux.tokenalign.projection import Projection
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.losses import HeadInputs, Loss, kept_classes, kept_kl

MAPS = {
    "first_byte": vocab_map.first_byte,
    "common": vocab_map.common,
    "prefix": vocab_map.prefix,
    "hybrid": vocab_map.common,
}


@dataclass(frozen=True, eq=False)
class ClassLoss:
    """Divergence of two models with different vocabularies at the same places; see
    reflux.tokenalign.class_losses.
    """

    spec: DistillSection
    pools: Pools | None  # None: uld needs no map
    student_id_W: torch.Tensor | None  # of a top-k teacher: its ids in the student's

    def __call__(self, student: HeadInputs, teacher: HeadInputs) -> Loss:
        spec = self.spec
        if spec.top_k and spec.partition == "common":
            kept = map_topk(kept_classes(teacher, spec), self.student_id_W)
            total, metrics = kept_kl(student, kept, spec)
        else:
            theirs = kept_classes(teacher, spec) if spec.top_k else teacher
            result = linear_rows(self._rows(), student, theirs)
            scale = spec.temperature**2 if spec.scale_t2 else 1.0
            total, metrics = scale * result.total, {"kl": result.kl.detach().sum()}
        places = torch.full_like(total.detach(), len(student.hidden_TD))
        return total, metrics | {"places": places}

    def _rows(self):
        spec = self.spec
        if spec.partition == "uld":
            return partial(uld, temperature=spec.temperature)
        kind = hybrid if spec.partition == "hybrid" else class_kl
        return partial(
            kind,
            pools=self.pools,
            divergence=spec.divergence,
            beta=spec.beta,
            temperature=spec.temperature,
        )


@dataclass(frozen=True, eq=False)
class Teacher:
    """One frozen teacher. `weight`s of all of them sum to one."""

    model: Any
    chat: Chat
    weight: float
    same: bool  # its ids mean what the student's mean
    classes: ClassLoss | None = None

    def vocab_size(self, student: HeadInputs) -> int:
        """Ids of its head that take part: the student's where they are shared."""
        return student.vocab_size if self.same else self.chat.vocab_size


def load_teachers(cfg: Config, engine: Any, chat: Chat) -> list[Teacher]:
    """`teacher.path` and `distill.more_teachers`, in this order. ValueError where the objective
    cannot compare vocabularies.
    """
    paths = (cfg.teacher.path, *cfg.distill.more_teachers)
    weights = cfg.distill.teacher_weights or (1.0,) * len(paths)
    found = []
    for path, weight in zip(paths, weights):
        theirs = Chat(path)
        same = same_vocabulary(chat, theirs)
        if cfg.distill.objective == "kl" and not same:
            raise ValueError(
                f"distill.objective = 'kl' compares token by token, but {path} and "
                f"{cfg.model.path} have different vocabularies. Use distill.objective = 'class' or "
                "'span'"
            )
        classes = (
            _class_loss(cfg.distill, chat, theirs, engine)
            if cfg.distill.objective == "class"
            else None
        )
        found.append(
            Teacher(
                engine.frozen(replace(cfg.teacher, path=path)),
                theirs,
                weight / sum(weights),
                same,
                classes,
            )
        )
    return found


def _class_loss(spec: DistillSection, student: Chat, teacher: Chat, engine: Any) -> ClassLoss:
    if spec.partition == "uld":
        return ClassLoss(spec, None, None)
    # heads are read up to what the tokenizers know: rows beyond it are padding
    sides = [
        Vocabulary(c.table, c.stop_ids, rows)
        for c, rows in ((student, engine.vocab_size), (teacher, teacher.vocab_size))
    ]
    built = (
        Projection.build(*sides) if spec.partition == "projection" else MAPS[spec.partition](*sides)
    )
    if spec.partition in ("common", "hybrid"):
        _refuse_a_rest_of_control_ids(spec, built, *sides)
    ids = (
        torch.from_numpy(vocab_map.student_id_of(*sides)).to(engine.device) if spec.top_k else None
    )
    return ClassLoss(spec, pools_of(built, engine.device), ids)


def _refuse_a_rest_of_control_ids(
    spec: DistillSection, built: vocab_map.ClassMap, student: Vocabulary, teacher: Vocabulary
) -> None:
    """ValueError where the student could follow the teacher into the class of the rest only by
    control ids.
    """
    rests = [
        [x for x, c in zip(side.spellings, classes.tolist()) if c == built.silent]
        for side, classes in ((student, built.student_class), (teacher, built.teacher_class))
    ]
    mine, theirs = (sum(map(bool, rest)) for rest in rests)
    if theirs and not mine:
        raise ValueError(
            f"distill.partition = {spec.partition!r}: the teacher writes {theirs} tokens that the "
            f"student lacks, such as {next(x for x in rests[1] if x)!r}, and the only ids of the "
            f"student that are not common are {len(rests[0])} control ids: it would learn to emit "
            "those. Use classes = 'prefix' with top_k = 0, or objective = 'span'"
        )
