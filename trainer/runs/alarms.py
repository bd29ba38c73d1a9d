"""Warnings about a run that goes on but should not be trusted: each is reported once, in words.

A guard ends a run; an alarm only speaks, in the console, in run.jsonl (event `alarm`) and in the
model card. The numbers are those of the log line, the same on every rank.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from reflux.trainer.config.schema import Config

STEPS = 3  # in a row before an alarm
NO_GRADIENT = 1e-6  # gradient norm
ALIKE = 0.95  # of the groups
TRUNCATED = 0.05  # of the texts
SPELLING = 0.05  # of the texts, less in their canonical spelling than at the first step
DRIFT = 3.0  # times, or a third of, the first step's value
REWARDED_LENGTH = 1.5  # the same of the length where texts are rewarded, which may pay for it
DRIFTING = {"entropy": "nats per token", "length": "tokens"}  # log field -> unit
LENGTH_EXPLAINS = 0.5  # of the variance of the calibration reward inside groups


# log field whose number an alarm gives: it has another one by the time that it is read again
NUMBERS = {
    "truncation": "truncated",
    "truncation_drift": "truncated",
    "too_long": "too_long",
}


def tell_again(event: Mapping[str, Any], last_step: int, last: Mapping[str, Any]) -> str:
    """What an alarm of the log said, of which step, and its number in the last one. Later than the
    alarm, of a run that may have changed since.
    """
    said = f"step {event['step']}: {event['message']}"
    now = last.get(NUMBERS.get(event.get("alarm", ""), ""))
    if last_step == event["step"] or not isinstance(now, int | float):
        return said
    return f"{said} (in step {last_step}: {now:.0%})"


@dataclass(frozen=True)
class Alarm:
    name: str
    message: str


class Alarms:
    """`check` after every step. Counts and first values live in `notes` (Engine.notes), so that a
    resumed run neither repeats an alarm nor forgets where it started.
    """

    def __init__(self, cfg: Config, notes: Callable[[], MutableMapping[str, float]]):
        self.cfg, self._notes = cfg, notes

    def check(self, stats: Mapping[str, float]) -> list[Alarm]:
        """The alarms that are due now and have not been reported."""
        notes, due = self._notes(), []
        for name, message in self._conditions(stats, notes):
            count = notes.get(f"alarm/{name}", 0.0)
            if message is None:
                notes[f"alarm/{name}"] = min(count, 0.0)  # -1: reported already
            elif count >= 0:
                reached = count + 1 >= STEPS
                notes[f"alarm/{name}"] = -1.0 if reached else count + 1
                due += [Alarm(name, message)] if reached else []
        return due

    def _conditions(
        self, stats: Mapping[str, float], notes: MutableMapping[str, float]
    ) -> Iterator[tuple[str, str | None]]:
        """(name, message) of every alarm; None where its condition does not hold."""
        yield "no_learning", self._no_learning(stats)
        yield "groups_alike", self._groups_alike(stats)
        yield "truncation", self._truncation(stats)
        yield "too_long", self._too_long(stats)
        if "canonical" in stats:
            first = notes.setdefault("alarm/first/canonical", stats["canonical"])
            yield "spelling", _spelling(first, stats["canonical"])
        yield "length_reward", self._length_reward(stats)
        for field, unit in DRIFTING.items():
            if field in stats:
                rewarded = field == "length" and "reward/task" in stats
                factor = REWARDED_LENGTH if rewarded else DRIFT
                first = notes.setdefault(f"alarm/first/{field}", stats[field])
                yield f"{field}_drift", _drift(field, unit, factor, first, stats[field])
        if "truncated" in stats:
            first = notes.setdefault("alarm/first/truncated", stats["truncated"])
            yield "truncation_drift", self._truncation_drift(first, stats["truncated"])

    def _no_learning(self, stats: Mapping[str, float]) -> str | None:
        if stats.get("grad_norm", 1.0) > NO_GRADIENT:
            return None
        return f"nothing is learned: the gradient has been 0 for {STEPS} steps. {self._why(stats)}"

    def _why(self, stats: Mapping[str, float]) -> str:
        limit = self.cfg.rollout.max_tokens
        if stats.get("truncated", 0.0) > 1 - TRUNCATED:
            return (
                f"All texts are truncated at rollout.max_tokens = {limit}, and a truncated text "
                "has no reward: raise it, or set task.options.grade_truncated = true"
            )
        if stats.get("too_long", 0.0) == 1:
            return "No text fits training.seq_len in the student's tokens: raise it"
        if stats.get("passed_filter", 1.0) == 0:
            return "No text passed distill.correct_only: see task.name and its options"
        if _alike(stats) > ALIKE:
            return "All rewards of a group are equal: see the prompts, task.name and the samples"
        return "See the rewards and samples in the log, and optim.lr"

    def _groups_alike(self, stats: Mapping[str, float]) -> str | None:
        alike = _alike(stats)
        if alike <= ALIKE:
            return None
        return (
            f"{alike:.0%} of the groups are all correct or all wrong: the task reward teaches "
            "nothing there. Take prompts of another difficulty, or a larger rollout.group"
        )

    def _truncation(self, stats: Mapping[str, float]) -> str | None:
        truncated = stats.get("truncated", 0.0)
        if truncated <= TRUNCATED:
            return None
        return (
            f"{truncated:.0%} of the texts are truncated at rollout.max_tokens = "
            f"{self.cfg.rollout.max_tokens}; want at most {TRUNCATED:.0%}, or length decides what "
            "is learned. Raise rollout.max_tokens"
        )

    def _too_long(self, stats: Mapping[str, float]) -> str | None:
        too_long = stats.get("too_long", 0.0)
        if too_long <= TRUNCATED:
            return None
        return (
            f"{too_long:.0%} of the texts are longer than training.seq_len + 1 in the student's "
            "tokens and are left out: short texts decide what is learned. Raise training.seq_len, "
            "or lower rollout.max_tokens"
        )

    def _truncation_drift(self, first: float, now: float) -> str | None:
        if now <= first + TRUNCATED:
            return None
        return (
            f"{now:.0%} of the texts are truncated, {first:.0%} were in the first step: texts grow "
            "until they are cut. See guard.truncation_drift, which ends such a run"
        )

    def _length_reward(self, stats: Mapping[str, float]) -> str | None:
        explained = stats.get("cal/length_r2", 0.0)
        if explained <= LENGTH_EXPLAINS:
            return None
        norm = self.cfg.calibration.score_norm
        hint = "score_norm = 'length_free' takes that out"
        if norm == "length_free":
            hint = "it is taken out, and what is left may be small"
        return (
            f"length explains {explained:.0%} of the calibration reward's variance inside groups "
            f"(calibration.score_norm = {norm!r}): {hint}; guard.length_drift ends a run "
            "whose texts change their length"
        )


def _alike(stats: Mapping[str, float]) -> float:
    return stats.get("groups/all_correct", 0.0) + stats.get("groups/all_wrong", 0.0)


def _spelling(first: float, now: float) -> str | None:
    if now >= first - SPELLING:
        return None
    return (
        f"{now:.0%} of the texts are spelled as the tokenizer spells them, at first {first:.0%}: "
        "other spellings of the same text raise the calibration reward in distillable mode. Set "
        "calibration.denominator = 'marginal', or raise reference.beta"
    )


def _drift(field: str, unit: str, factor: float, first: float, now: float) -> str | None:
    if first <= 0 or first / factor <= now <= first * factor:
        return None
    return (
        f"{field} went from {first:.3g} to {now:.3g} {unit}: read samples.jsonl for what the texts "
        "have become; a smaller optim.lr, or a larger reference.beta, slows the drift"
    )
