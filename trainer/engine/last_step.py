"""The last finished step: what of it only memory has, and how to save it when a later one fails.

A step is finished when its last update is made, closed when evaluation and guards have seen it. One
that is not closed is saved with its numbers, so that a resume begins by closing it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from .torchtitan_host import Finished, RefluxTrainer


class LastStep:
    """Weights, optimizer, schedule, notes and random state after the last finished step. They can
    be saved until the next optimizer step moves the first weight.
    """

    def __init__(self, trainer: RefluxTrainer):
        self._trainer = trainer
        self._cuda = trainer.device.type == "cuda"
        self._stable = trainer.checkpointer.weights_keep_their_storage()
        self.ends()

    @property
    def is_whole(self) -> bool:
        """Whether the weights are those of a finished step."""
        return self._finished is not None

    def begins_to_move(self) -> None:
        """From here on the weights are of no step, until `ends`."""
        self._finished: Finished | None = None

    def measures(self, numbers: Mapping[str, float]) -> None:
        """More is known of the step that has ended and is not closed."""
        if self._finished is not None:
            self._finished = replace(self._finished, to_close=dict(numbers))

    def ends(self, to_close: Mapping[str, float] | None = None) -> None:
        """to_close: its numbers, if evaluation and guards are still to see them."""
        self._finished = self._trainer.finished(None if to_close is None else dict(to_close))
        self._moved = torch.cuda.Event() if self._cuda else None
        if self._moved is not None:
            self._moved.record()

    def is_loaded(self) -> None:
        """Another checkpoint's weights are in memory: there is nothing to save."""
        self._finished = replace(
            self._trainer.finished(), step=self._trainer.checkpointer.saved_step
        )

    def unsaved(self) -> int | None:
        """The finished step that only memory has; None if all is saved, or saving is off or failed.
        ValueError while a step moves weights.
        """
        checkpointer, finished = self._trainer.checkpointer, self._finished
        if finished is None:
            raise ValueError(f"step {self._trainer.step} was moving the weights")
        saved = finished.step == checkpointer.saved_step
        return None if saved or checkpointer.load_only or checkpointer.has_failed else finished.step

    def save_if_unsaved(self) -> tuple[int | None, str | None]:
        """On a single rank. Returns the step that is saved now, or None, and what went wrong."""
        try:
            step = self.unsaved()
            if step is not None and self._finished is not None:
                with self._trainer.held(self._finished):
                    self._trainer.checkpointer.write(step)
            return step, None
        except (OSError, ValueError) as error:
            return None, f"the last finished step is not saved: {error}"

    def save_beside(self) -> None:
        """Saves what `unsaved` names, collective, from any thread, while the main one waits in a
        collective or computes. ValueError for a model whose state is not its parameters.
        """
        assert self._finished is not None
        if not self._stable:
            raise ValueError("the model makes its state anew for every save")
        with self._trainer.held(self._finished), self._own_stream():
            self._trainer.checkpointer.write(self._finished.step, as_it_lies=True)

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """A CUDA stream that does not queue behind the collective in which the main one waits."""
        if self._moved is None:
            yield
            return
        device = self._trainer.device
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream(device)
        stream.wait_event(self._moved)
        with torch.cuda.stream(stream):
            yield
