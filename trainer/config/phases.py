"""The phases of a run in one table: what the rest of the program may know of a phase without
loading it.

A new phase is one file that implements `reflux.trainer.phase.Phase`, and one line in PHASES. The
line names the implementation as text, so that reading a configuration imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .fit import nearest
from .phase_checks import (
    check_calibrate,
    check_common,
    check_distill,
    check_evaluate,
    check_measuring,
    check_prompts,
)
from .roles import (
    Advice,
    Merge,
    Pair,
    Role,
    cache_given,
    cache_samples,
    calibrate_advice,
    calibrate_pair,
    calibrate_roles,
    defence_roles,
    diagnose_grades,
    diagnose_pair,
    diagnose_roles,
    distill_advice,
    distill_given,
    distill_grades,
    distill_pair,
    distill_roles,
    distill_samples,
    distill_shows_grades,
    own_model,
)

if TYPE_CHECKING:
    from .schema import Config


def always(cfg: Config) -> bool:
    return True


def no_roles(cfg: Config) -> list[Role]:
    return []


def no_pair(cfg: Config) -> Pair | None:
    return None


def never(cfg: Config) -> bool:
    return False


def no_advice(cfg: Config, same_ids: bool, merge: Merge = None) -> Advice | None:
    return None


@dataclass(frozen=True)
class PhaseSpec:
    """One phase. Only `implementation` has no default."""

    implementation: str  # "package.module:Class" of a reflux.trainer.phase.Phase
    model_role: str = "model"  # what the model of [model] is in this phase
    trains: bool = False  # weights move; otherwise the phase does its work once, in close_step
    samples: Callable[[Config], bool] = always  # texts are sampled from the model of [model]
    data_section: Literal["data", "eval"] = "data"  # where its prompts come from
    grades: Callable[[Config], bool] = never  # it needs the answers of [data]
    shows_grades: Callable[[Config], bool] = never  # it logs them, and goes on without
    given: Callable[[Config], bool] = never  # it learns from the responses of [data] alone
    counts_rows: bool = False  # what it has done is numbered by the rows of [data] that fit
    has_reference: bool = False  # a KL to the start holds the model, unless reference.beta is 0
    check: Callable[[Config], None] = check_prompts  # raises ValueError for what cannot work
    frozen_roles: Callable[[Config], list[Role]] = no_roles
    pair: Callable[[Config], Pair | None] = no_pair  # whose tokenizers have to be compared
    pair_advice: Callable[[Config, bool, Merge], Advice | None] = no_advice

    def load(self) -> type[Any]:
        """The class behind `implementation`; imports what it needs."""
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)


PHASES: dict[str, PhaseSpec] = {
    "calibrate": PhaseSpec(
        "reflux.trainer.calibration.phase:CalibratePhase",
        model_role="policy",
        trains=True,
        grades=always,
        has_reference=True,
        check=check_calibrate,
        frozen_roles=calibrate_roles,
        pair=calibrate_pair,
        pair_advice=calibrate_advice,
    ),
    "distill": PhaseSpec(
        "reflux.trainer.distillation.phase:DistillPhase",
        model_role="student",
        trains=True,
        samples=distill_samples,
        grades=distill_grades,
        shows_grades=distill_shows_grades,
        given=distill_given,
        check=check_distill,
        frozen_roles=distill_roles,
        pair=distill_pair,
        pair_advice=distill_advice,
    ),
    "diagnose": PhaseSpec(
        "reflux.trainer.diagnosis.phase:DiagnosePhase",
        model_role="student",
        grades=diagnose_grades,
        check=check_measuring,
        frozen_roles=diagnose_roles,
        pair=diagnose_pair,
    ),
    "cache": PhaseSpec(
        "reflux.trainer.distillation.cache_phase:CachePhase",
        model_role="teacher",
        samples=cache_samples,
        given=cache_given,
        counts_rows=True,
        check=check_measuring,
    ),
    "evaluate": PhaseSpec(
        "reflux.trainer.evaluation.phase:EvaluatePhase", data_section="eval", check=check_evaluate
    ),
}


def spec_of(name: str) -> PhaseSpec:
    """ValueError with the nearest name for a phase that is not in the table."""
    if name not in PHASES:
        raise ValueError(
            f"unknown phase {name!r}{nearest(name, PHASES)} Known: {', '.join(PHASES)}"
        )
    return PHASES[name]


def check_phase(cfg: Config) -> None:
    """ValueError for what cannot work across the tables of a configuration."""
    spec = spec_of(cfg.phase)
    check_common(cfg)
    spec.check(cfg)


def roles(cfg: Config) -> list[Role]:
    """The models that this configuration will load, the one of [model] first."""
    spec = spec_of(cfg.phase)
    own = Role(
        spec.model_role,
        own_model(cfg),
        "model",
        own=True,
        trained=spec.trains,
        samples=spec.samples(cfg),
    )
    return [own, *spec.frozen_roles(cfg), *defence_roles(cfg)]


def pair_of(cfg: Config) -> Pair | None:
    """The two models whose tokenizers have to be compared."""
    return spec_of(cfg.phase).pair(cfg)
