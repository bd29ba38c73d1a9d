"""What a program may look at while a run goes on.

    class Print(Callback):
        def on_step(self, event):
            print(event.step, event.metrics["loss"])

Every rank calls the callbacks that it was given, in their order; all ranks have to be given equally
many. Metrics and evaluations are the same on every rank, rollouts are those of the rank. What a
callback raises ends the run on all ranks, after the last finished step is saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .config.explain import explain

if TYPE_CHECKING:
    from .data.batch import Rollout


@dataclass(frozen=True)
class StepEvent:
    """A step is finished and logged. metrics: its line in run.jsonl (losses in nats per token)."""

    step: int
    total_steps: int
    metrics: Mapping[str, Any]
    rank: int


@dataclass(frozen=True)
class EvaluationEvent:
    """An evaluation, or the measurements of a phase without steps (step 0)."""

    step: int
    metrics: Mapping[str, Any]  # "eval/sampled", ...
    accept: Mapping[str, Any]  # "accept/NAME": verdicts on the rules of [accept]
    rank: int


@dataclass(frozen=True)
class RolloutsEvent:
    """The texts of a step as they were sampled or given, before they are scored."""

    step: int
    rollouts: Sequence["Rollout"]
    rank: int


class Callback:
    """Override what you want to see."""

    def on_step(self, event: StepEvent) -> None:
        """After each step."""

    def on_evaluation(self, event: EvaluationEvent) -> None:
        """After each evaluation, the one before the first step too."""

    def on_rollouts(self, event: RolloutsEvent) -> None:
        """After the texts of each step are sampled."""


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """ValueError for what is no callback, a class in place of its instance for example."""
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks: got {callback!r}; want instances of subclasses of reflux.Callback"
            )


class Callbacks:
    """Hands events to callbacks. Every method is collective where there are any."""

    def __init__(self, callbacks: Sequence[Callback], rank: int, total_steps: int):
        check_callbacks(callbacks)
        self._callbacks, self._rank, self._total_steps = tuple(callbacks), rank, total_steps

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._callbacks:
            self._tell("on_step", StepEvent(step, self._total_steps, dict(metrics), self._rank))

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        if self._callbacks and results:
            accept = {k: v for k, v in results.items() if k.startswith("accept/")}
            metrics = {k: v for k, v in results.items() if k not in accept}
            self._tell("on_evaluation", EvaluationEvent(step, metrics, accept, self._rank))

    def rollouts(self, step: int, texts_PG: Sequence[Sequence[Any]]) -> None:
        """texts_PG: G rollouts, or texts with a `rollout`, of each of this rank's P prompts."""
        if self._callbacks:
            flat = tuple(getattr(text, "rollout", text) for group in texts_PG for text in group)
            self._tell("on_rollouts", RolloutsEvent(step, flat, self._rank))

    def _tell(self, method: str, event: StepEvent | EvaluationEvent | RolloutsEvent) -> None:
        """ValueError on every rank where a callback of one of them raises."""
        from .engine.agreement import agreed  # torch: only where a run goes on

        for callback in self._callbacks:
            agreed(partial(_call, callback, method, event))


def _call(callback: Callback, method: str, event: Any) -> None:
    try:
        getattr(callback, method)(event)
    except Exception as error:
        name = f"{type(callback).__name__}.{method}"
        raise ValueError(f"{name} failed at step {event.step}: {explain(error)}") from error
