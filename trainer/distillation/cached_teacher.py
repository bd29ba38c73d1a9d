"""A teacher that is not there: its texts and rows come from a cache (teacher_cache.py), and no
weight of it is loaded.

    loss = that of the teacher itself with tail = "bucket", "renorm", "drop" or "sampled", within
           the error of stored log-probabilities (cache.json)

Texts of other models cannot be scored, so nothing is on-policy here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Batch, Prompt, Rollout, TeacherView, TopKRows
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.losses import HeadInputs, Loss
from reflux.trainer.phase import Advance, Engine, Sampler, Sampling, Teacher
from reflux.trainer.runs.progress import ignore

from .absent_teacher import AbsentTeacher
from .byte_loss import ByteLoss, byte_loss
from .teacher_cache import Description, TeacherCache, check_same, narrowed

# what a text in a cache depends on: a name of its description -> one of Sampling
SAMPLED_WITH = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}


@dataclass(frozen=True, eq=False)
class CachedTexts:
    """Texts of a cache as a Sampler: the same at every step."""

    cache: TeacherCache

    def sample(
        self,
        prompts: Sequence[Prompt],
        group: int,
        sampling: Sampling,
        advance: Advance = ignore,
    ) -> list[list[Rollout]]:
        """The first `group` texts of each prompt; see phase.Sampler. ValueError where the cache has
        fewer, or other ones.
        """
        self._check(sampling)
        groups = []
        for prompt in prompts:
            texts = self.cache.texts(prompt)
            if len(texts) < group:
                raise ValueError(
                    f"teacher.cache = '{self.cache.folder}' has {len(texts)} texts of prompt "
                    f"{prompt.index}; want rollout.group = {group}. Lower rollout.group, or write "
                    "the cache for this data"
                )
            groups.append(texts[:group])
            advance(group)
        return groups

    def _check(self, sampling: Sampling) -> None:
        written = self.cache.description.texts
        if written["made_by"] != "teacher":
            raise ValueError(
                f"teacher.cache = '{self.cache.folder}' holds no texts of the teacher, but those "
                "of a data set; want distill.source = 'dataset'"
            )
        now = {name: getattr(sampling, of) for name, of in SAMPLED_WITH.items()}
        now["max_tokens"] = sampling.max_tokens
        for name, value in now.items():
            if written[name] != value:
                raise ValueError(
                    f"rollout.{name} = {value}, but the texts of teacher.cache = "
                    f"'{self.cache.folder}' were sampled with {written[name]}. Set it to that"
                )


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedTeacher(AbsentTeacher):
    """A cache as the Teacher of a run."""

    cache: TeacherCache
    byte_loss: ByteLoss | None = None  # of objective = "byte"

    @property
    def sampler(self) -> Sampler:
        return CachedTexts(self.cache)

    def views(self, rollouts: Sequence[Rollout], step: int) -> list[TeacherView]:
        """What the teacher has said of the texts."""
        return [self._view(rollout) for rollout in rollouts]

    def _view(self, rollout: Rollout) -> TeacherView:
        rows = self.kept_rows(rollout)
        kept = rows if self.spec.tail == "sampled" else narrowed(rows, self.spec.top_k)
        return TeacherView(rollout.prompt_ids, rows=kept)

    def kept_rows(self, rollout: Rollout) -> TopKRows:
        """What the teacher has said at every token of a text of its ids."""
        rows = self.cache.rows_of(rollout)
        if rows is None:
            raise ValueError(
                f"teacher.cache = '{self.cache.folder}' has no row for the text of prompt "
                f"{rollout.prompt.index}: it is another text, or longer than the cached one "
                f"({self.cache.description.texts}). Write the cache for this data and these lengths"
            )
        return rows

    def divergence(self, student: HeadInputs, batch: Batch, index: int) -> Loss:
        """See phase.Teacher."""
        if self.byte_loss is None:
            return super().divergence(student, batch, index)
        rows = self.rows_of_batch(student, batch, index)
        return self.byte_loss.of_cache(student, rows, batch, batch.for_teacher(index))


def load_cached(cfg: Config, engine: Engine, chat: Chat, chats: Sequence[Chat]) -> list[Teacher]:
    """The cache of teacher.cache. ValueError where it is not of teacher.path, or does not hold what
    the configuration asks for.
    """
    cache, (own,) = TeacherCache(cfg.teacher.cache), chats
    files = engine.inputs.get("teacher", {}).get("files", {})
    check_same(cache.description, own, files, cfg.teacher.path)
    shares_ids = same_vocabulary(chat, own)
    if cfg.distill.objective == "kl":
        _check_rows(cfg.distill, cache.description, engine.vocab_size)
    compared = None
    if cfg.distill.objective == "byte":
        _check_for_bytes(cache.description)
        compared = byte_loss(cfg.distill, chat, own, engine, same=shares_ids)
    return [
        CachedTeacher(cfg.distill, own, shares_ids, cache=cache, byte_loss=compared),
    ]


def _check_for_bytes(cache: Description) -> None:
    if cache.tail == "sampled" or cache.temperature != 1:
        raise ValueError(
            f"distill.objective = 'byte' with a cache of tail = {cache.tail!r}, temperature = "
            f"{cache.temperature}; want the likeliest tokens at temperature 1 (distill.temperature "
            "acts on the bytes): write the cache with cache.tail = 'bucket', temperature = 1.0"
        )


def _check_rows(spec: DistillSection, cache: Description, vocab_size: int) -> None:
    where = f"the cache has temperature = {cache.temperature}, top_k = {cache.top_k}"
    if spec.temperature != cache.temperature:
        raise ValueError(
            f"distill.temperature = {spec.temperature}, but {where}: log-probabilities and tail "
            "hold at one temperature. Set it to that of the cache"
        )
    if (spec.tail == "sampled") != (cache.tail == "sampled"):
        raise ValueError(
            f"distill.tail = {spec.tail!r} with a cache of tail = {cache.tail!r}; want the same "
            "kind: 'bucket', 'renorm' and 'drop' read the likeliest tokens, 'sampled' reads draws"
        )
    if spec.top_k > cache.top_k or (spec.tail == "sampled" and spec.top_k != cache.top_k):
        raise ValueError(
            f"distill.top_k = {spec.top_k}, but {where}. Set it to that of the cache"
            + ("" if spec.tail == "sampled" else ", or to less")
        )
    if cache.vocab_size != vocab_size:
        raise ValueError(
            f"the cache normalises over {cache.vocab_size} ids and the student has {vocab_size}; "
            "want a teacher of the student's vocabulary"
        )


_TEACHER: type[Teacher] = CachedTeacher  # mypy proves that it keeps the contract
