"""Which models a run loads, by role, and which two of them score the same texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .parts import used_tasks
from .sections import DefenceSection, FrozenSection

if TYPE_CHECKING:
    from .schema import Config

MAX_UNALIGNED = 0.5  # of a pair's texts, where the phase sets no limit of its own

# What --check does with a frozen model (preflight/model_checks.py):
#   same_weights  the KL of the trained model to it is zero before the first step
#   token_order   it prefers texts to the same tokens in another order
#   token_kl      the KL of the student to it is finite, and not zero
Probe = Literal["same_weights", "token_order", "token_kl"]


# two tokens of the sampler, the second beginning with the first (tokenalign.vocab_map.first_merge)
Merge = tuple[bytes, bytes] | None

OTHER_IDS = (
    "Use distill.objective = 'byte', which compares next-byte distributions whatever the tokens, "
    "or a teacher of the student's family (docs/tokenalign.md, 'Exact bytes')"
)


@dataclass(frozen=True)
class Role:
    """A model of the run and what it is for. `section` is the part of the config that names it."""

    name: str
    model: FrozenSection
    section: str
    own: bool = False  # the model of [model]; all others are frozen
    trained: bool = False
    samples: bool = False  # texts are sampled from it
    writes: bool = False  # it reads rollout.max_tokens tokens that a teacher samples, here or not
    probe: Probe | None = None  # None: --check does not load it
    elsewhere: bool = False  # its weights are not loaded by this run: a served or cached teacher
    shared: bool = False  # no model of its own: that of [model] with its adapters off

    @property
    def option(self) -> str:
        """What names its folder in the configuration."""
        return self.section if "." in self.section else f"{self.section}.path"

    @property
    def is_copy(self) -> bool:
        """A frozen copy of the model of [model]: the same folder, the same tokenizer."""
        return self.section == "model" and not self.own


@dataclass(frozen=True)
class Pair:
    """Two roles that score the same texts, and what their tokenizers have to have in common."""

    sampled_by: str  # role that the texts come from
    scored_by: str
    # what counts as the same token ids: the whole vocabulary, or only what every id spells
    same_ids: Literal["vocabulary", "bytes"] = "bytes"
    aligned: bool = True  # compared by aligned byte spans where the ids differ
    max_unaligned: float = MAX_UNALIGNED  # fraction of texts


@dataclass(frozen=True)
class Advice:
    """What a configuration makes of a pair of tokenizers, where that deserves a line."""

    level: Literal["warning", "error"]
    text: str


def own_model(cfg: Config) -> FrozenSection:
    """The model of [model], as a role describes it."""
    m = cfg.model
    return FrozenSection(
        m.path,
        m.backend,
        m.attention,
        dtype="float32",
        template=m.template,
        template_arguments=m.template_arguments,
        liger=m.liger,
    )


def defence_roles(cfg: Config) -> list[Role]:
    """The models beside the served one: the proxy of a product, or the two copies of
    antidistillation sampling.
    """
    d = cfg.defence
    if d.proxy:
        proxy = FrozenSection(d.proxy, dtype=d.dtype)
        return [Role("defence proxy", proxy, "defence.proxy", writes=True)]
    copies = "defence.antidistillation"
    return [
        Role(f"defence {side}", FrozenSection(path, dtype=d.dtype), copies, writes=True)
        for side, path in antidistillation_copies(d).items()
    ]


def antidistillation_copies(d: DefenceSection) -> dict[str, str]:
    """plus and minus -> their folders; empty without the defence."""
    if not d.antidistillation:
        return {}
    return {side: str(Path(d.antidistillation) / side) for side in ("plus", "minus")}


def loads_reference(cfg: Config) -> bool:
    """Whether a calibration has a reference model; without one nothing measures the KL to it."""
    cal = cfg.calibration
    return bool(cfg.reference.beta or (cal.eta and cal.denominator == "reference"))


def another(model: FrozenSection, path: str) -> FrozenSection:
    """Another model that is loaded as this one, and renders by its own template: a file that was
    written for one model is wrong for the next. A folder without one, as a base model's, takes the
    file. The template's arguments go to both, for each template reads those that it knows.
    """
    return replace(model, path=path, template="" if _has_template(path) else model.template)


def _has_template(path: str) -> bool:
    """What is no folder here, as a served model or one of the hub, is taken to have one."""
    folder = Path(path)
    table = folder / "tokenizer_config.json"
    if not table.is_file() or any(folder.glob("chat_template*")):
        return True
    return '"chat_template"' in table.read_text(encoding="utf-8", errors="replace")


def teachers_of(cfg: Config) -> list[FrozenSection]:
    """Those of teacher.path and distill.more_teachers, in this order."""
    return [cfg.teacher, *(another(cfg.teacher, path) for path in cfg.distill.more_teachers)]


def proxies_of(cfg: Config) -> list[FrozenSection]:
    """Those of proxy.path and calibration.proxies, in this order."""
    return [cfg.proxy, *(another(cfg.proxy, path) for path in cfg.calibration.proxies)]


def calibrate_roles(cfg: Config) -> list[Role]:
    """The reference model where a KL or a reward needs it, and the proxy unless eta is 0."""
    r, roles = cfg.reference, []
    if loads_reference(cfg):
        reference = replace(own_model(cfg), dtype=r.dtype, offload=r.offload)
        shared = cfg.lora.rank > 0
        roles.append(Role("reference", reference, "model", probe="same_weights", shared=shared))
    if cfg.calibration.eta:
        first, *more = proxies_of(cfg)
        roles.append(Role("proxy", first, "proxy", probe="token_order"))
        roles += [Role(f"proxy {i}", m, "calibration.proxies") for i, m in enumerate(more, 2)]
    return roles


def calibrate_pair(cfg: Config) -> Pair | None:
    limit = cfg.calibration.max_unaligned
    return Pair("policy", "proxy", max_unaligned=limit) if cfg.calibration.eta else None


def calibrate_advice(cfg: Config, same_ids: bool, merge: Merge = None) -> Advice | None:
    cal = cfg.calibration
    if cal.credit == "span" and not same_ids and not cal.allow_biased:
        return Advice(
            "error",
            "calibration.credit = 'span' with a proxy of another tokenizer: what the proxy says of "
            "a span may change with the token that follows, so leaving earlier spans out biases "
            "the gradient (docs/tokenalign.md, \"Credit\"). Use calibration.credit = 'prefix' or "
            "'sequence'; calibration.allow_biased = true runs it all the same, for comparison",
        )
    if same_ids or cal.score_norm != "per_token":
        return None
    return Advice(
        "warning",
        "calibration.score_norm = 'per_token' counts different tokens on the two sides; use 'sum' "
        "or 'per_byte'",
    )


def distill_samples(cfg: Config) -> bool:
    """Whether the student samples: on-policy texts, or answers of an evaluation."""
    return cfg.distill.on_policy > 0 or cfg.eval.asks


def distill_grades(cfg: Config) -> bool:
    return cfg.distill.correct_only


def distill_shows_grades(cfg: Config) -> bool:
    """The student's own texts, where a task is named: logged as `task`, and not learned from."""
    return cfg.distill.on_policy > 0


def distill_given(cfg: Config) -> bool:
    """Whether nothing is sampled: SFT, or a teacher that reads the data's own texts."""
    return cfg.distill.source == "dataset" and cfg.distill.on_policy == 0


def distill_roles(cfg: Config) -> list[Role]:
    """Every teacher; none for plain SFT on given texts."""
    d = cfg.distill
    if d.objective == "nll" and d.source != "teacher":
        return []
    first, *more = teachers_of(cfg)
    samples = d.on_policy < 1 and d.source == "teacher"
    if cfg.teacher.source != "local":
        asked = samples and cfg.teacher.source == "server"
        return [Role("teacher", cfg.teacher, "teacher", writes=asked, elsewhere=True)]
    words = [Role("paraphraser", paraphraser_of(cfg), "distill.paraphraser")]
    return [
        Role("teacher", first, "teacher", samples=samples, probe="token_kl"),
        *(
            Role(f"teacher {i}", model, "distill.more_teachers", writes=samples)
            for i, model in enumerate(more, 2)
        ),
        *(words if d.paraphraser else []),
    ]


def paraphraser_of(cfg: Config) -> FrozenSection:
    """The model of distill.paraphraser, with the teacher's settings but for template and
    revision.
    """
    t = cfg.teacher
    return FrozenSection(cfg.distill.paraphraser, t.backend, t.attention, t.dtype, t.offload)


def distill_pair(cfg: Config) -> Pair | None:
    if not cfg.needs_teacher:
        return None
    aligned = cfg.distill.objective in ("byte", "policy_gradient", "span", "class")
    return Pair("student", "teacher", same_ids="vocabulary", aligned=aligned)


def distill_advice(cfg: Config, same_ids: bool, merge: Merge = None) -> Advice | None:
    objective = cfg.distill.objective
    if objective == "kl" and not same_ids:
        return Advice("error", f"distill.objective = 'kl' compares token by token. {OTHER_IDS}")
    if objective == "class" and not same_ids and merge and not cfg.distill.allow_biased:
        shorter, longer = (token.decode(errors="backslashreplace") for token in merge)
        return Advice(
            "error",
            f"distill.objective = 'class': the student's token {longer!r} begins with its token "
            f"{shorter!r}, so where its tokens end depends on what follows, and a student that is "
            "right is trained away from the truth. Use distill.objective = 'byte', or a student of "
            "bytes or characters; distill.allow_biased = true runs it as a biased baseline "
            "(docs/tokenalign.md, 'Fixed points')",
        )
    if objective in ("byte", "span", "class") and same_ids:
        return Advice(
            "warning",
            f"distill.objective = 'kl' is exact here; {objective!r} is for different tokenizers",
        )
    return None


def cache_samples(cfg: Config) -> bool:
    return cfg.cache.texts == "teacher"


def cache_given(cfg: Config) -> bool:
    return cfg.cache.texts == "dataset"


def diagnose_grades(cfg: Config) -> bool:
    """Without a task there is no gap."""
    return all(task.name for task in used_tasks(cfg, "data"))


def diagnose_roles(cfg: Config) -> list[Role]:
    samples = "teacher" in cfg.diagnose.prefixes
    return [Role("teacher", cfg.teacher, "teacher", samples=samples, probe="token_kl")]


def diagnose_pair(cfg: Config) -> Pair | None:
    return Pair("student", "teacher")
