"""The loop, the same for every phase: sample -> score -> pack -> step -> record."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator

from reflux.trainer.calibration.guards import Stop
from reflux.trainer.calibration.phase import Calibrate
from reflux.trainer.config.loader import as_table
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import pack
from reflux.trainer.diagnosis.phase import Diagnose
from reflux.trainer.distillation.phase import Distill
from reflux.trainer.engine.engine import Engine
from reflux.trainer.evaluation.phase import Evaluate
from reflux.trainer.runs.logger import Record
from reflux.trainer.runs.model_card import model_card
from reflux.trainer.runs.run_folder import save_config

SAME_SIGNAL_S = 2.0
# they differ below, never here
PHASES = {"calibrate": Calibrate, "distill": Distill, "diagnose": Diagnose, "evaluate": Evaluate}


def train(cfg: Config) -> int:
    """Runs a whole configuration. Returns the exit code: 0; 3 where an [accept] rule does not hold;
    130 when a signal ended it after a saved step.
    """
    engine = Engine(cfg)
    try:
        phase = PHASES[cfg.phase](cfg, engine)
        if engine.is_main:
            save_config(cfg)
        # who has no steps stops at once
        patient = _finish_step_on_signal(engine) if cfg.trains else contextlib.nullcontext()
        with _record(cfg, engine) as record, patient:
            if not cfg.trains or cfg.steps == 0 or engine.resumed_step == 0:
                _note(record, phase.close_step(0, {}))  # what the guards compare with later
            stats: dict[str, float] = {}
            if cfg.trains:
                stats = _run_steps(cfg, engine, phase, record)
            if engine.wants_to_stop:
                record.event("interrupted", resume="run the same command again")
                record.to_be_continued = True
                return 130
            if cfg.export.enable and cfg.trains:
                record.event("export", folder=engine.export(model_card(cfg, stats)))
        return getattr(phase, "exit_code", 0)
    finally:
        engine.close()


def _run_steps(cfg: Config, engine, phase, record: Record) -> dict[str, float]:
    stats: dict[str, float] = {}
    for step in engine.steps():  # resumes where the checkpoint left off
        start = time.perf_counter()
        texts_PG = phase.sample(step)  # P prompts -> G texts each
        sampled = time.perf_counter()
        samples_N = phase.score(texts_PG)  # -> reward parts, advantages, teacher targets
        scored = time.perf_counter()
        batches = pack(
            samples_N, tokens=cfg.batch.tokens, seq_len=engine.seq_len, joined=cfg.batch.pack
        )
        stats = engine.step(batches, phase.loss)  # forward, loss, backward, clip, AdamW
        stats |= engine.mean(phase.metric_sums) | _timing(stats, start, sampled, scored, engine)
        record(step, _words(cfg, stats), _examples(texts_PG) if cfg.log.samples_every else None)
        try:
            _note(record, phase.close_step(step, stats))  # evaluation and guards
        except Stop as stop:
            restored = None if stop.restore is None else engine.restore(stop.restore)
            if restored is None:
                engine.checkpoint()
            record.event("stopped", reason=str(stop), restored_step=restored)
            break
    return stats


def _note(record: Record, found: dict) -> None:
    """What was measured, and the verdicts on it."""
    for event, mine in (
        ("eval", lambda name: not name.startswith("accept/")),
        ("accept", lambda name: name.startswith("accept/")),
    ):
        if fields := {name: value for name, value in found.items() if mine(name)}:
            record.event(event, **fields)


def _timing(
    stats: dict[str, float], start: float, sampled: float, scored: float, engine
) -> dict[str, float]:
    end = time.perf_counter()
    return {
        "tokens_per_s": stats["tokens"] / (end - start),
        "sample_s": sampled - start,
        "score_s": scored - sampled,
        "step_s": end - scored,
        "memory_gib": engine.memory_gib(),
    }


def _words(cfg: Config, stats: dict) -> dict:
    """The dial in words: what eta is called, and how strong it is in use."""
    if cfg.phase != "calibrate":
        return stats
    return stats | {"eta": f"{cfg.calibration.mode} {abs(stats.get('eta', 0.0)):.3g}"}


def _examples(texts_PG: list) -> list[dict]:
    rollouts = [getattr(t, "rollout", t) for group in texts_PG[:4] for t in group[:1]]
    return [
        {
            "prompt": r.prompt.messages[-1]["content"],
            "text": r.text,
            "answer": r.prompt.answer,
            "ended": r.ended,
        }
        for r in rollouts
    ]


def _record(cfg: Config, engine) -> Record:
    track = (
        (
            lambda step, metrics: engine.log(
                {k: v for k, v in metrics.items() if isinstance(v, int | float)}, step
            )
        )
        if cfg.log.tensorboard or cfg.log.wandb
        else None
    )
    return Record(
        folder=cfg.folder,
        config=as_table(cfg),
        command=sys.argv,
        total_steps=cfg.steps,
        samples_every=cfg.log.samples_every,
        resumed_step=engine.resumed_step,
        is_main=engine.is_main,
        quiet=cfg.log.quiet,
        on_step=track,
    )


@contextlib.contextmanager
def _finish_step_on_signal(engine) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) lets the step end and saves it; another one, later, stops at
    once.
    """
    asked_at = None

    def ask(signum, frame):
        nonlocal asked_at
        if asked_at is not None:
            if time.monotonic() - asked_at < SAME_SIGNAL_S:
                # a terminal signals torchrun's workers, and torchrun then passes the same Ctrl-C on
                # to them
                return
            raise KeyboardInterrupt
        asked_at = time.monotonic()
        engine.asked_to_stop = True
        if engine.is_main:
            print(
                "finishing this step, then saving; once more to stop at once",
                file=sys.stderr,
                flush=True,
            )

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever embeds the loop keeps its own handlers
        yield
        return
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
