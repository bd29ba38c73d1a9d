"""The configuration of a run: one frozen dataclass of tables. A TOML file or a recipe fills it.

Tables named like a section of torchtitan's `Trainer.Config` (TITAN_SECTIONS) stay as they are in
`Config.titan`; engine/trainer_config.py lays them over torchtitan's own dataclasses, with the type
rules of fit.py. All other tables are ours: sections.py, distillation.py, caching.py,
evaluation.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from .caching import CacheSection
from .checks import not_negative
from .data import DataSection
from .distillation import DistillSection
from .evaluation import AcceptSection, EvalSection
from .fit import nearest
from .phases import check_phase, spec_of
from .sections import (
    BatchSection,
    CalibrationSection,
    DefenceSection,
    DiagnoseSection,
    ExportSection,
    FrozenSection,
    GuardSection,
    LogSection,
    LoraSection,
    ModelSection,
    OptimSection,
    PolicySection,
    ReferenceSection,
    RolloutSection,
    TaskSection,
    TeacherSection,
)

TITAN_SECTIONS = (
    "training",
    "parallelism",
    "checkpoint",
    "compile",
    "comm",
    "metrics",
    "debug",
    "profiler",
    "lr_scheduler",
)
NO_SECTIONS = ("titan", "origins")  # fields of Config that no file has


@dataclass(frozen=True)
class Config:
    phase: (
        str  # calibrate | distill | diagnose | cache | evaluate (config/phases.py); must be chosen
    )
    folder: str  # of the run: log, checkpoints, export
    # each of policy.epochs x policy.minibatches optimizer updates on new rollouts
    steps: int = 100
    seed: int = 0  # of weights, data order, samples and bootstraps; 0 to 2**32 - 1
    # a folder that holds a run: go on, refuse, or take <folder>-2; ask: refuse without a terminal
    on_existing_run: Literal["ask", "resume", "fail", "new"] = "ask"
    # a resumed run whose models, data, grader or rewrite are other files than before
    on_changed_input: Literal["fail", "accept"] = "fail"
    # with "resume": also from an owner on another host, which is known to have ended
    take_over_lock: bool = False
    # what backward computes again to save memory: nothing, all but products, whole blocks
    activation_checkpoint: Literal["none", "selective", "full"] = "none"
    model: ModelSection = ModelSection()
    teacher: TeacherSection = TeacherSection()  # distill, diagnose
    lora: LoraSection = LoraSection()  # of the trained model
    proxy: FrozenSection = FrozenSection()  # calibrate
    data: DataSection = DataSection()
    task: TaskSection = TaskSection()
    rollout: RolloutSection = RolloutSection()
    calibration: CalibrationSection = CalibrationSection()
    reference: ReferenceSection = ReferenceSection()
    policy: PolicySection = PolicySection()
    guard: GuardSection = GuardSection()
    distill: DistillSection = DistillSection()
    cache: CacheSection = CacheSection()
    diagnose: DiagnoseSection = DiagnoseSection()
    defence: DefenceSection = DefenceSection()
    optim: OptimSection = OptimSection()
    batch: BatchSection = BatchSection()
    eval: EvalSection = EvalSection()
    # rules by name, [accept.NAME]: a run that breaks one exits with 3
    accept: Mapping[str, AcceptSection] = field(default_factory=dict)
    log: LogSection = LogSection()
    export: ExportSection = ExportSection()
    # torchtitan's own sections
    titan: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # a.b -> the file or the `--set` that it comes from (origins.py); for messages only
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        not_negative(self, "steps")
        if not self.folder.strip():
            raise ValueError(f"folder = {self.folder!r}; want a folder of the run's own")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed}; want 0 to 2**32 - 1")
        if not isinstance(self.teacher, TeacherSection):
            raise ValueError(
                f"teacher is a {type(self.teacher).__name__}; want a TeacherSection, which has "
                "`source` beside the same fields"
            )
        if self.take_over_lock and self.on_existing_run != "resume":
            raise ValueError(
                f"take_over_lock = true with on_existing_run = {self.on_existing_run!r}; want "
                "'resume': taking over a folder is going on with its run"
            )
        if self.optim.lr is None:
            large = self.phase == "distill" or self.lora.rank
            object.__setattr__(self, "optim", replace(self.optim, lr=1e-5 if large else 1e-6))
        _check_titan(self.titan)
        check_phase(self)

    @property
    def trains(self) -> bool:
        """Whether weights move; a phase that does not train measures once and writes a report."""
        return spec_of(self.phase).trains

    @property
    def ranks_of_a_row(self) -> int:
        """How many ranks hold the same rows: the degree of tensor parallelism."""
        return int(self.titan.get("parallelism", {}).get("tensor_parallel_degree", 1))

    @property
    def needs_teacher(self) -> bool:
        """Whether the run loads a teacher; SFT on a data set does not."""
        return any(role.section == "teacher" for role in spec_of(self.phase).frozen_roles(self))


def _check_titan(titan: Mapping[str, Mapping[str, Any]]) -> None:
    """Sections that a file may hold, as a file or a program names them."""
    for name, values in titan.items():
        if name not in TITAN_SECTIONS:
            guess = nearest(name, TITAN_SECTIONS)
            known = ", ".join(TITAN_SECTIONS)
            raise ValueError(f"titan.{name}: no section of torchtitan's here{guess} Known: {known}")
        if not isinstance(values, Mapping):
            raise ValueError(f"titan.{name} = {values!r}; want a section, {name}.key = value")


def sections() -> tuple[str, ...]:
    """The tables a config file may hold: ours, then torchtitan's."""
    return (*(f.name for f in fields(Config) if f.name not in NO_SECTIONS), *TITAN_SECTIONS)
