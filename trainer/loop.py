"""The loop, the same for every phase: sample -> score -> pack -> step -> record."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch.distributed as dist

from . import disk_space
from .callbacks import Callback, Callbacks
from .config.loader import as_table
from .config.phases import spec_of
from .config.schema import Config
from .data.batch import Batch, Rollout, Sample, pack
from .data.minibatches import deal, key_of, split
from .data.tokenizer_files import has_template
from .disk_space import DiskError
from .engine.agreement import agreed
from .engine.engine import Engine
from .engine.fingerprints import ChangedInputs
from .engine.trainer_config import traces_folder
from .phase import Advance, LossFunction, Phase, Stop, TrainingPhase
from .phase import RankFailed as RankFailed  # for main, which knows no phase
from .runs import commands
from .runs.alarms import Alarms, tell_again
from .runs.lock import LockLost, RunLock
from .runs.logger import Record
from .runs.model_card import Measured, Outcome, model_card
from .runs.progress import inside_step, shown_stages
from .runs.run_folder import save_config
from .runs.signals import SAME_SIGNAL_S, handled_by
from .runs.watch import PageWriter

INTERRUPTED, STOPPED_BY_GUARD = 130, 4  # exit codes


def train(cfg: Config, lock: RunLock | None = None, callbacks: Sequence[Callback] = ()) -> int:
    """Runs a whole configuration. Returns the exit code: 0; the phase's own (3 where an [accept]
    rule does not hold); 4 when a guard ended the run; 130 when a signal did, after a saved step.

    lock: the main rank's, on the folder. Raises LockLost when another process has taken it over.
    callbacks: hear of steps, evaluations and rollouts on every rank (callbacks.py).
    """
    engine = _start(cfg)
    try:
        with _told_in_words(cfg, engine), engine.keeps_last_step(unless=LockLost):
            code = _run(cfg, engine, lock, Callbacks(callbacks, dist.get_rank(), cfg.steps))
            agreed(_nothing)  # the folder is complete before any rank looks into it
            return code
    finally:
        engine.close()


def _start(cfg: Config) -> Engine:
    """An engine. Files that have changed since are told with the command that accepts them."""
    try:
        return Engine(cfg)
    except BaseException as error:
        disk_space.remove_empty(cfg.folder, traces_folder(cfg))
        if any(isinstance(e, ChangedInputs) for e in (error, error.__cause__)):
            hint = f"in {commands.directory()}:\n  {commands.resume(changed_inputs=True)}"
            error.add_note(f"To go on with them as they are, {hint}")
        raise


@contextlib.contextmanager
def _told_in_words(cfg: Config, engine: Engine) -> Iterator[None]:
    """A full disk is told with the folder and with what is kept; whatever ends a run that has a
    checkpoint, with the command that goes on from there.
    """
    try:
        yield
    except (LockLost, KeyboardInterrupt):  # nothing to go on with; told by main.py
        raise
    except Exception as error:
        told = error
        if disk_space.is_full(error) and not isinstance(error, DiskError):
            told = disk_space.no_space(cfg.folder, f"{error} while writing", engine.kept())
            for note in getattr(error, "__notes__", []):
                told.add_note(note)
        if engine.is_main and (engine.saved_step or isinstance(told, DiskError)):
            what = f"go on from step {engine.saved_step}" if engine.saved_step else "start again"
            told.add_note(f"To {what}, in {commands.directory()}:\n  {commands.resume()}")
        if told is error:
            raise
        raise told from error


def _run(cfg: Config, engine: Engine, lock: RunLock | None, callbacks: Callbacks) -> int:
    phase: Phase = spec_of(cfg.phase).load()(cfg, engine)
    if engine.is_main:
        save_config(cfg)
    # inside the record, so that the log has the words of the rank that failed
    recorded = _record(cfg, engine)
    with (
        recorded as record,
        engine.keeps_last_step(unless=LockLost),
        shown_stages(record.console),
    ):
        for message in engine.resume_messages:
            record.event("checkpoint", message=message)
        if cfg.trains:
            training = cast(TrainingPhase, phase)
            if training.data_fields:
                record.event("data", **training.data_fields)
            record.exit_code = _train(cfg, engine, training, record, lock, callbacks)
        else:
            _record_results(record, callbacks, 0, phase.close_step(0, {}))
            record.exit_code = phase.exit_code
    return record.exit_code


def _train(
    cfg: Config,
    engine: Engine,
    phase: TrainingPhase,
    record: Record,
    lock: RunLock | None,
    callbacks: Callbacks,
) -> int:
    templated = has_template(cfg.model.path, cfg.model.template)
    with _finish_step_on_signal(engine):
        if cfg.steps == 0 or engine.resumed_step == 0:
            # what the guards compare with later
            _record_results(record, callbacks, 0, phase.close_step(0, {}))
        outcome = _run_steps(cfg, engine, phase, record, lock, callbacks)
        if engine.wants_to_stop:
            record.event("interrupted", resume=commands.resume(), directory=commands.directory())
            record.to_be_continued = True
            return INTERRUPTED
        if cfg.export.enable:
            measured = Measured(record.metrics_at(outcome.steps), record.last_evaluation)
            card = model_card(cfg, measured, *phase.card(), outcome, templated)
            folder = engine.export(card)
            record.event("export", folder=folder, steps=outcome.steps)
    return phase.exit_code if outcome.stopped is None else STOPPED_BY_GUARD


def _run_steps(
    cfg: Config,
    engine: Engine,
    phase: TrainingPhase,
    record: Record,
    lock: RunLock | None,
    callbacks: Callbacks,
) -> Outcome:
    """How the steps ended."""
    step, alarms = engine.resumed_step, Alarms(cfg, lambda: engine.notes)
    close = partial(_close, engine, phase, alarms, record, callbacks)
    # the process before ended between the updates of its last step and the guards
    if engine.to_close is not None and (outcome := close(step, engine.to_close)):
        return outcome
    for step in engine.steps():  # resumes where the checkpoint left off
        start = time.perf_counter()
        texts_PG = phase.sample(step)  # P prompts -> G texts each
        callbacks.rollouts(step, texts_PG)
        sampled = time.perf_counter()
        samples_N = phase.score(texts_PG)  # -> reward parts, advantages, teacher targets
        scored = time.perf_counter()
        epochs = _epochs(cfg, engine, step, texts_PG, samples_N)
        with inside_step("updating", _count(epochs), "micro-batches") as advance:
            # forward, loss, backward, clip, AdamW
            stats = engine.step(epochs, _counted(phase.loss, advance))
        stats |= engine.mean(phase.metric_sums) | _timing(stats, start, sampled, scored, engine)
        engine.measured(stats)
        _check_ownership(lock)
        fields = phase.log_fields(stats)
        record(step, fields, _examples(cfg, step, phase, texts_PG))
        callbacks.step(step, fields)
        if outcome := close(step, stats):
            return outcome
    return Outcome(step, None, _told_again(record, step))


def _told_again(record: Record, step: int) -> tuple[str, ...]:
    last = record.metrics_at(step)
    return tuple(tell_again(alarm, step, last) for alarm in record.alarms.values())


def _close(
    engine: Engine,
    phase: TrainingPhase,
    alarms: Alarms,
    record: Record,
    callbacks: Callbacks,
    step: int,
    stats: Mapping[str, float],
) -> Outcome | None:
    """Alarms, evaluation and guards. Returns how the steps ended if a guard ended them."""
    for alarm in alarms.check(stats):
        if alarm.message not in record.alarms:  # by the process before, of a step closed twice
            record.event("alarm", alarm=alarm.name, message=alarm.message)
    try:
        _record_results(record, callbacks, step, phase.close_step(step, stats))
    except Stop as stop:
        kept = _keep_accepted(engine, record, step, stop)
        # of the exported weights: the last evaluation was of others or went unrecorded
        _record_results(record, callbacks, kept, phase.evaluate(kept))
        return Outcome(kept, record.stopped, _told_again(record, kept))
    return None


def _keep_accepted(engine: Engine, record: Record, step: int, stop: Stop) -> int:
    """Goes back to the weights that the guard names. Returns their step."""
    restored = None if stop.restore is None else engine.restore(stop.restore)
    if restored is None:
        engine.checkpoint()
    record.stopped = f"{stop}{_instead(stop.restore, restored)}"
    record.event("stopped", reason=record.stopped, restored_step=restored)
    return step if restored is None else restored


def _instead(wanted: int | None, restored: int | None) -> str:
    """What is said where the step to go back to has no checkpoint."""
    if wanted == restored:
        return ""
    where = f"step {restored}" if restored else "the weights that it started from"
    return f". Step {wanted} is the last that passed, but has no checkpoint: the run is at {where}"


def _epochs(
    cfg: Config,
    engine: Engine,
    step: int,
    texts_PG: Sequence[Sequence[Any]],
    samples_N: Sequence[Sample],
) -> list[list[list[Batch]]]:
    """[E][M] lists of micro-batches: in each of policy.epochs, the samples of every mini-batch.
    Collective.
    """
    count, epochs = cfg.policy.minibatches, cfg.policy.epochs
    batched = partial(pack, tokens=cfg.batch.tokens, seq_len=engine.seq_len, joined=cfg.batch.pack)
    if count == 1:
        return [[batched(samples_N)]] * epochs
    keys_P = engine.gather([key_of(_rollout(g[0]).prompt) if g else None for g in texts_PG])
    deals = (deal(keys_P, count, seed=cfg.seed, step=step, epoch=e) for e in range(epochs))
    return [[batched(part) for part in split(samples_N, d, count)] for d in deals]


def _count(epochs: Sequence[Sequence[Sequence[Batch]]]) -> int:
    return sum(len(batches) for minibatches in epochs for batches in minibatches)


def _counted(loss: LossFunction, advance: Advance) -> LossFunction:
    """The loss, which is called once for each micro-batch, and its count."""

    def counted(*inputs: Any) -> Any:
        advance(1)
        return loss(*inputs)

    return counted


def _rollout(text: Any) -> Rollout:
    return getattr(text, "rollout", text)


def _check_ownership(lock: RunLock | None) -> None:
    """LockLost on every rank, before the step is logged or saved. Collective."""
    try:
        agreed(lock.check if lock else _nothing)
    except ValueError as error:
        raise LockLost(str(error)) from None


def _nothing() -> None:
    pass


def _record_results(
    record: Record, callbacks: Callbacks, step: int, results: Mapping[str, Any]
) -> None:
    """What was measured, and the verdicts on it, as two events of the log."""
    accept = {k: v for k, v in results.items() if k.startswith("accept/")}
    measured = {k: v for k, v in results.items() if k not in accept}
    for event, fields in (("eval", measured), ("accept", accept)):
        if fields:
            record.event(event, step=step, **fields)
    callbacks.evaluation(step, results)


def _timing(
    stats: Mapping[str, float], start: float, sampled: float, scored: float, engine: Engine
) -> dict[str, float]:
    end = time.perf_counter()
    return {
        "tokens_per_s": stats["tokens"] / (end - start),
        "sample_s": sampled - start,
        "score_s": scored - sampled,
        "step_s": end - scored,
        "memory_gib": engine.memory_gib(),
    }


def _examples(
    cfg: Config, step: int, phase: TrainingPhase, texts_PG: Sequence[Sequence[Any]]
) -> list[dict[str, Any]]:
    """The first text of the first four prompts, at the steps that save samples."""
    if not cfg.log.samples_every or step % cfg.log.samples_every:
        return []
    places = accumulate((len(group) for group in texts_PG), initial=0)
    firsts = [(at, group[0]) for at, group in zip(places, texts_PG) if group]
    return [
        {
            "prompt": _rollout(text).prompt.question,
            "text": _rollout(text).text,
            "answer": _rollout(text).prompt.answer,
            "ended": _rollout(text).ended,
            **phase.sample_fields(text, at),
        }
        for at, text in firsts[:4]
    ]


def _record(cfg: Config, engine: Engine) -> Record:
    tracked = cfg.log.tensorboard or cfg.log.wandb
    return Record(
        folder=cfg.folder,
        config=as_table(cfg),
        command=sys.argv,
        total_steps=cfg.steps,
        samples_every=cfg.log.samples_every,
        resumed_step=engine.resumed_step,
        is_main=engine.is_main,
        quiet=cfg.log.quiet,
        inputs=engine.inputs,
        on_numbers=(lambda step, numbers: engine.log(numbers, step)) if tracked else None,
        write_page=PageWriter(cfg.folder) if cfg.log.report and engine.is_main else None,
    )


@contextlib.contextmanager
def _finish_step_on_signal(engine: Engine) -> Iterator[None]:
    """The first stop signal lets the step end and saves it; another one, later, stops at once. A
    phase without steps has no such handler and stops at once.
    """
    first_at: float | None = None

    def stop(number: int, frame: Any) -> None:
        nonlocal first_at
        if first_at is not None:
            # a terminal signals torchrun's workers, and torchrun passes the same Ctrl-C on to them
            if time.monotonic() - first_at < SAME_SIGNAL_S:
                return
            raise KeyboardInterrupt
        first_at = time.monotonic()
        engine.asked_to_stop = True
        if engine.is_main:
            with contextlib.suppress(OSError):  # not print: it may be what was interrupted
                os.write(2, b"finishing this step, then saving; once more to stop at once\n")

    with handled_by(stop):
        yield
