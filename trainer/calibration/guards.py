"""What ends a calibration before it does harm (docs/method.md, "Guards"): a KL budget, a
task-utility gate, and how far length, entropy and truncation may drift from the first step's.
"""

import logging
import math
import warnings
from collections.abc import Mapping

from reflux.trainer.config.roles import loads_reference
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import CalibrationSection
from reflux.trainer.phase import Engine, Stop

log = logging.getLogger(__name__)
KL_DECAY = 0.8  # of the moving averages that are compared with the budget and with the start
MARKS = (0.5, 0.75, 0.9)  # of a budget or a drift: a checkpoint is written where one is passed

# guard.NAME -> the field of the log that it watches
DRIFTS = {"length_drift": "length", "entropy_drift": "entropy", "truncation_drift": "truncated"}
# notes of checkpoints before "inside": the step whose numbers passed, and whose update, which no
# number had seen yet, was restored
OLD_NOTES = ("kl_accepted", "drift_accepted")


class Guards:
    """State lives in engine.notes, so that a resumed run stops where the uninterrupted one would.

    The numbers of step N are those of the weights before its update, checkpoint N - 1; only an
    evaluation is of checkpoint N. A guard that stops the run goes back to the newest checkpoint
    that is not after `back_to`. On the way to a limit one is written at each of MARKS; that of an
    evaluation that passed is written and kept.
    """

    def __init__(self, cfg: Config, engine: Engine):
        self.cfg, self.engine = cfg, engine
        engine.steps_to_keep = self.accepted
        cal, beta = cfg.calibration, cfg.reference.beta
        if cal.mode == "undistillable" and cal.denominator != "reference" and cal.strength >= beta:
            warnings.warn(_margin_words(cal, beta), stacklevel=2)
        if cfg.guard.kl_budget and not loads_reference(cfg):
            warnings.warn(
                f"guard.kl_budget = {cfg.guard.kl_budget} is not watched: with reference.beta = 0 "
                "no reference model is loaded, and nothing measures the KL. Set reference.beta = "
                "1e-6 to have it measured, at the memory of that model, or guard.kl_budget = 0",
                stacklevel=2,
            )
        if cfg.reference.estimator == "k3_loss":
            warnings.warn(
                "reference.estimator = 'k3_loss' descends the forward KL, not "
                "KL(policy || reference); use 'exact' or 'k3_is'",
                stacklevel=2,
            )

    @property
    def notes(self) -> dict[str, float]:
        """Read anew each time: loading a checkpoint puts another dictionary in the engine."""
        return self.engine.notes

    def accepted(self) -> set[int]:
        """The steps that a guard may go back to."""
        return {self._last_inside(), int(self.notes.get("utility_passed", 0))}

    def back_to(self) -> int:
        """The newest step whose weights no guard objects to: KL and drift were measured inside,
        and where the last evaluation was low, not after the last one that passed.
        """
        low = any(self.notes[n] for n in self.notes if n.startswith("utility_failures"))
        passed = [int(self.notes.get("utility_passed", 0))] if low else []
        return min([self._last_inside(), *passed])

    def _last_inside(self) -> int:
        """0, the start, as long as no update's weights were measured inside."""
        old = min((self.notes[name] for name in OLD_NOTES if name in self.notes), default=0.0)
        return int(self.notes.get("inside", max(old - 1, 0)))

    def check(self, step: int, stats: Mapping[str, float], results: Mapping[str, float]) -> None:
        """Raises Stop when the KL budget is spent, the texts have drifted too far, or the task
        accuracy fell twice in a row.
        """
        inside = self._check_kl(step, stats)
        inside &= self._check_drift(step, stats)
        if inside:
            # with rollout.overlap the texts are of older weights still
            before = 1 + math.ceil(stats.get("staleness", 0.0))
            self.notes["inside"] = float(max(step - before, self._last_inside()))
        self._check_utility(step, results)

    def _check_kl(self, step: int, stats: Mapping[str, float]) -> bool:
        """Whether the weights that the step began with are inside by their own KL too: the moving
        average, which stops the run, follows some steps behind.
        """
        budget, kl = self.cfg.guard.kl_budget, stats.get("reference_kl")
        if not budget or kl is None:
            return True
        average = KL_DECAY * self.notes.get("reference_kl", kl) + (1 - KL_DECAY) * kl
        self.notes["reference_kl"] = average
        if not average <= budget:  # NaN stops too
            raise self._stop(
                f"KL(policy || reference) reached {average:.3f} nats per token in step "
                f"{step}, over guard.kl_budget = {budget}"
            )
        words = f"KL(policy || reference) is {average:.3f} nats per token"
        warning = f"step {step}: {words}, half of guard.kl_budget"
        self._approach("kl", average / budget, kl / budget, warning)
        return kl <= budget

    def _check_drift(self, step: int, stats: Mapping[str, float]) -> bool:
        """Against the first step, whose texts are those of the model before its first update.
        Returns whether this step's own numbers are inside too.
        """
        inside = True
        for name, field in DRIFTS.items():
            limit, now = getattr(self.cfg.guard, name), stats.get(field)
            if not limit or now is None:
                continue
            start = self.notes.setdefault(f"{name}/start", now)
            average = KL_DECAY * self.notes.get(name, now) + (1 - KL_DECAY) * now
            self.notes[name] = average
            moved = (
                f"{field} went from {start:.3g} in the first step to {average:.3g} (moving "
                f"average) in step {step}"
            )
            if not _within(name, start, average, limit):  # NaN stops too
                raise self._stop(f"{moved}, beyond guard.{name} = {limit}")
            share, own = (_share(name, start, x, limit) for x in (average, now))
            self._approach(name, share, own, f"{moved}, half of guard.{name} = {limit}")
            inside &= _within(name, start, now, limit)
        return inside

    def _stop(self, reason: str) -> Stop:
        """With the step to go back to, and in plain words where that is the start."""
        step = self.back_to()
        if not step:
            reason += "; no later weights are known to be inside: back to those of the start"
        return Stop(reason, restore=step)

    def _approach(self, name: str, average: float, own: float, warning: str) -> None:
        """Saves on the way to the limit, by the moving average and by the step's own number, which
        is ahead of it: the next step measures what is saved, and may find it outside. Warns at the
        first mark of the average.
        """
        if self._passes(f"{name}_marks", average) == 1:
            log.warning(warning)
        self._passes(f"{name}_own_marks", own)

    def _passes(self, note: str, share: float) -> int:
        """1 at the first of MARKS that is passed, 2 at later ones, 0 between them. The checkpoint
        is written at the end of the step: then every guard has noted what it saw.
        """
        passed, before = sum(share > mark for mark in MARKS), self.notes.get(note, 0)
        if passed <= before:
            return 0
        self.notes[note] = float(passed)
        self.engine.save_this_step()
        return 2 if before else 1

    def _check_utility(self, step: int, results: Mapping[str, float]) -> None:
        """Every part of [eval.parts] by itself: one that falls is not made up for by another."""
        if not self.cfg.guard.utility_drop:
            return
        low, stop = False, ""
        for part in self.cfg.eval.parts or ("",):
            fallen, words = self._check_part(part, results)
            low, stop = low or fallen, stop or words
        if not low and ("eval/sampled" in results or "eval/greedy" in results):
            self.notes["utility_passed"] = float(step)
            if step:  # the weights of the start are those of model.path
                self.engine.save_this_step()
        if stop:
            raise self._stop(stop)

    def _check_part(self, part: str, results: Mapping[str, float]) -> tuple[bool, str]:
        """Whether the accuracy is low, and why the run has to stop, if it has."""
        prefix, suffix = (f"eval/{part}/", f"/{part}") if part else ("eval/", "")
        accuracy = results.get(f"{prefix}sampled", results.get(f"{prefix}greedy"))
        if accuracy is None:
            return False, ""
        start = self.notes.setdefault(f"utility_start{suffix}", accuracy)
        low = accuracy < start - self.cfg.guard.utility_drop
        failures = self.notes.get(f"utility_failures{suffix}", 0.0) + 1.0 if low else 0.0
        self.notes[f"utility_failures{suffix}"] = failures
        if failures < 2:
            return low, ""
        of = f" of part {part}" if part else ""
        return low, (
            f"accuracy {accuracy:.3f}{of} is more than guard.utility_drop = "
            f"{self.cfg.guard.utility_drop} below the start's {start:.3f} for the second time"
        )


def _margin_words(cal: CalibrationSection, beta: float) -> str:
    """What a strength above beta means, by calibration.margin_guard."""
    asked = f"undistillable with calibration.strength = {cal.strength}, reference.beta = {beta}: "
    if cal.margin_guarded:
        return asked + (
            "calibration.margin_guard lowers the strength to 0.75 beta std_cal where that is less "
            "(docs/method.md, 'Guards'); `eta` in the log is the one in use. Raise reference.beta "
            "for a larger one"
        )
    return asked + (
        "the un-normalised objective has no interior optimum there (docs/method.md, 'Optimum and "
        "guards'). Watch reference_kl, raise reference.beta, or set "
        "calibration.margin_guard = true"
    )


def _within(name: str, start: float, now: float, limit: float) -> bool:
    """Fractions may rise by the limit; other numbers change by a factor of 1 + limit at most."""
    if name == "truncation_drift":
        return now <= start + limit
    return start / (1 + limit) <= now <= start * (1 + limit)


def _share(name: str, start: float, now: float, limit: float) -> float:
    """How much of the limit is used; 1 is where _within ends."""
    if name == "truncation_drift":
        return (now - start) / limit
    return (max(now / start, start / now) - 1) / limit if min(now, start) > 0 else 0.0
