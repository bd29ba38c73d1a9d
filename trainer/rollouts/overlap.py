"""One step off: the servers sample the texts of the next step while this one trains.

    step s    takes the texts that were asked for at step s - 1, by the weights before that step's
              update; hands the present weights over; asks for the texts of step s + 1

So texts are one update old from the second step on, and ratios need the log-probabilities that
they were sampled with. A resumed run samples its first step anew: other texts than without a stop.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import Engine, Sampling

from .samplers import EngineSampler, build_sampler

Groups = list[list[Rollout]]


class StepJob(NamedTuple):
    """What a rank samples in one step."""

    prompts: Sequence[Prompt]
    group: int
    sampling: Sampling


class StepSampler:
    """The texts of training steps, in order; with rollout.overlap those of the next one are on
    their way. staleness: updates between the weights that sampled the last texts and those that
    train on them.
    """

    def __init__(self, cfg: Config, engine: Engine, chat: Chat):
        """Collective; ValueError as build_sampler."""
        self.sampler = build_sampler(cfg, engine, chat)
        self.overlaps, self.last = bool(cfg.rollout.overlap), cfg.steps
        self.staleness = 0
        self._next: tuple[int, Callable[[], Groups]] | None = None

    def sample(self, step: int, job_of: Callable[[int], StepJob]) -> Groups:
        """[P][G] rollouts of this rank's part of `step`. Collective."""
        if not self.overlaps:
            return self.sampler.sample(*job_of(step))
        assert isinstance(self.sampler, EngineSampler)
        if self._next is not None and self._next[0] == step:
            rollouts_PG, self.staleness = self._next[1](), 1
        else:
            rollouts_PG, self.staleness = self.sampler.sample(*job_of(step)), 0
        self._next = None
        if step < self.last:
            self._next = step + 1, self.sampler.start(*job_of(step + 1))
        return rollouts_PG
