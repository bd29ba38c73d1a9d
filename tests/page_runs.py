"""Small run folders as the trainer writes them, for the tests of pages. Numbers are made."""

import math

from reflux.trainer.config.data import DataSection
from reflux.trainer.config.loader import as_table
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import (
    CalibrationSection,
    FrozenSection,
    ModelSection,
    TaskSection,
)
from reflux.trainer.runs.logger import Record

HOSTILE = "<b>bold</b> & </style><script>document.title = 'taken over'</script>"
SPANS = [["the ", 0.5], ["answer", -2.0], [" is", None], [HOSTILE, 0.25]]
GUARD = "KL(policy || reference) reached 0.310 nats per token in step 6, over guard.kl_budget = 0.3"


def calibration(folder, **changes) -> Config:
    options = dict(
        phase="calibrate",
        folder=str(folder),
        steps=6,
        model=ModelSection(path="models/teacher"),
        proxy=FrozenSection(path="models/proxy"),
        data=DataSection(source="data/sums.jsonl"),
        task=TaskSection(name="exact"),
        calibration=CalibrationSection(mode="distillable"),
    )
    return Config(**{**options, **changes})


def record(cfg, **options) -> Record:
    return Record(
        folder=cfg.folder,
        config=as_table(cfg),
        command=["trainer/main.py", "--config", "x.toml"],
        total_steps=cfg.steps,
        samples_every=2,
        quiet=True,
        inputs={"policy": {"path": "models/teacher", "files": {"config.json": "ab" * 32}}},
        **options,
    )


def write_calibration(folder, steps=6, **changes) -> None:
    """A calibration with evaluations, an alarm, a NaN, samples with spans, and a guard's end."""
    cfg = calibration(folder, **changes)
    with record(cfg) as log:
        log.event("eval", **evaluation(0.4))
        for step in range(1, steps + 1):
            log(step, metrics(step), [sample(step)])
            if step == 3:
                log.event("alarm", alarm="truncation", message="30% of the texts are truncated")
        log.event("eval", **evaluation(0.5))
        log.event("stopped", reason=GUARD, restored_step=5)
        log.exit_code, log.stopped = 4, GUARD


def metrics(step) -> dict:
    return {
        "loss": 0.1 * step,
        "reward/task": 0.5 + 0.05 * step,
        "accuracy": 0.5 + 0.05 * step,
        "reward/cal": -1.0 / step,
        "reference_kl": 0.05 * step,
        "grad_norm": math.nan if step == 2 else 1.0 + step,
        "length": 20.0 + step,
        "truncated": 0.3,
        "lr": 1e-5,
        "tokens_per_s": 900.0,
        "sample_s": 0.5,
        "score_s": 0.2,
        "step_s": 0.3,
        "memory_gib": 1.5,
    }


def evaluation(value) -> dict:
    fields = {}
    for name in ("greedy", "sampled"):
        low, high = value - 0.1, value + 0.1
        fields |= {f"eval/{name}": value, f"eval/{name}_low": low, f"eval/{name}_high": high}
    return {**fields, "eval/greedy_length": 21.0}


def sample(step) -> dict:
    return {
        "prompt": f"What is {step} + 1? {HOSTILE}",
        "text": "".join(text for text, _ in SPANS),
        "answer": str(step + 1),
        "ended": step % 4 != 0,
        "reward": 1.0,
        "correct": True,
        "extracted": str(step + 1),
        "r_cal": -1.25,
        "spans": SPANS,
    }
