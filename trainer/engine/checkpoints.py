"""Checkpoints that are whole or absent, and that are verified before anything is loaded.

torchtitan's CheckpointManager decides when a save is due and what belongs to it. Here is how it
reaches the disk: written as writing-N, every file hashed and synced, then the manifest, then the
rename to step-N. A load takes the newest checkpoint that proves whole; damaged ones are renamed
aside (checkpoint_folder.py). Every public method is collective.
"""

import contextlib
import errno
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpointer.base import MODEL, ModelWrapper, _shares_storage
from torchtitan.components.checkpointer.dcp import AsyncMode, CheckpointManager

from reflux.trainer import disk_space
from reflux.trainer.disk_space import DiskError

from . import optimizer_state, random_state
from .checkpoint_folder import (
    clear_leftovers,
    folder_bytes,
    listed,
    set_aside,
    sizes_are_right,
    steps_in,
)
from .checkpoint_search import Found, Wanted, find
from .checkpoint_writer import CheckpointWriter
from .manifest import FileDigest, Manifest, data_files, digest_and_sync, sync_folder, write_manifest
from .optimizer_state import StoredOptimizerState
from .ranks import Peers
from .safe_metadata import SafePlanner, SafeReader, read_metadata
from .weights import FolderAdapter, read_weights

log = logging.getLogger(__name__)


class Checkpointer(CheckpointManager):
    """torchtitan's CheckpointManager over a folder of verified checkpoints."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        # the last checkpoint holds the weights alone, and once it is whole the others are deleted
        weights_only_at_end: bool = False

        def __post_init__(self) -> None:
            if self.weights_only_at_end:
                self.last_save_model_only = True  # type: ignore[misc]  # a slot of the parent
            CheckpointManager.Config.__post_init__(self)

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, **parts)
        self.home = Path(self.folder)
        self.peers = Peers()
        self.saved_step = 0  # of what is on the disk of the present weights
        self.has_failed = False  # a save did: another try would fail too
        self.start_over: Callable[[], None] | None = None  # loads what a run starts from
        self.steps_to_keep: Callable[[], Iterable[int]] = tuple  # beside the keep_latest_k newest
        self._weights_only_at_end = config.weights_only_at_end
        self._pending: int | None = None  # step of an asynchronous save that is not sealed

    # --- loading

    def find(self, step: int = -1, at_most: int | None = None) -> Found:
        """The newest checkpoint that proves whole; only `step`, unless that is -1; none after
        `at_most`. Changes nothing. ValueError as of checkpoint_search.find.
        """
        wanted = Wanted(step, at_most, self.states["train_state"].config.training.steps)
        return find(self.home, wanted, self.peers, renames=not self.load_only)

    @torch.no_grad()
    def load_found(self, found: Found) -> None:
        """Loads it, and renames the others aside unless checkpoint.load_only. ValueError if it does
        not fit the model or the optimizer.
        """
        for message in found.messages if self.peers.is_first else ():
            log.warning(message)
        if found.step is None:
            super()._load(-1)
            if self.start_over is not None:
                self.start_over()
        else:
            self._load_step(found)
        if not self.load_only:
            self.peers.from_first(partial(self._move, found.aside))
        self.saved_step = found.step or 0

    def _load_step(self, found: Found) -> None:
        folder = self.home / f"step-{found.step}"
        states = self._states_to_load(found.step == 0 or found.weights_only)
        if not found.is_hf:
            self._leave_out_absent(states, folder)
        try:
            self.dcp_load(states, str(folder), from_hf=found.is_hf, from_quantized=False)
        except (Exception, CheckpointException) as error:
            raise ValueError(
                f"{folder} is whole, but does not fit this run: {_reason(error)}. Was it written "
                "with another model, another [lora] or another version?"
            ) from error
        if found.weights_only:
            self.states["train_state"].step = found.step

    def _leave_out_absent(self, states: dict[str, Any], folder: Path) -> None:
        """Moments of weights that had none, and random states that the checkpoint lacks: of an
        older version, or of fewer ranks.
        """
        stored = read_metadata(folder).state_dict_metadata
        if (optimizer := states.get(optimizer_state.KEY)) is not None:
            states[optimizer_state.KEY] = StoredOptimizerState(optimizer.optimizers, stored)
        random = states.get(random_state.KEY)
        if random is None:
            return
        if not all(f"{random_state.KEY}.{name}" in stored for name in random.state_dict()):
            del states[random_state.KEY]

    def _move(self, aside: Mapping[int, str]) -> None:
        for step, word in aside.items():
            set_aside(self.home, step, word)

    def back_to(self, step: int) -> int:
        """Loads the newest whole checkpoint that is not after `step`, or else the weights that the
        run started from (step 0). Returns its step. Later ones are renamed to given-up-*.
        """
        self.finish_pending()
        found = self.find(at_most=step)
        self.load_found(found)
        return found.step or 0

    def _load(self, step: int = -1) -> bool:
        found = self.find(step)
        self.load_found(found)
        return found.step is not None

    def _find_load_step(self, folder: str = "") -> int:
        return -1  # torchtitan's own search; `find` is instead of it

    def dcp_load(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        from_hf: bool,
        from_quantized: bool,
    ) -> None:
        """As torchtitan's, but nothing that a file names is called."""
        if from_hf:
            adapter = self.sd_adapter
            assert isinstance(adapter, FolderAdapter)  # build_spec makes no others
            weights = adapter.to_hf(state_dict)
            read_weights(weights, checkpoint_id, adapter)
            self.states[MODEL].load_state_dict(adapter.from_hf(weights))
            return
        reader, planner = SafeReader(checkpoint_id), SafePlanner()
        group = self.peers.group
        dcp.load(state_dict, storage_reader=reader, planner=planner, process_group=group)
        self.states[MODEL].load_state_dict(state_dict)

    # --- saving

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if not self._should_save(curr_step, last_step):
            return False
        if self.async_mode != AsyncMode.DISABLED and not last_step:
            self.finish_pending()
            with self._failures_in_words(curr_step):
                self.peers.from_first(self._make_room)
                super()._save(curr_step)
            self._pending = curr_step
            return True
        return self.write(curr_step, is_last=last_step)

    def write(self, step: int, *, is_last: bool = False, as_it_lies: bool = False) -> bool:
        """Saves now, whatever the interval. Returns whether saving is on at all.

        is_last: the run ends with it, so last_save_model_only counts. as_it_lies: the model is not
        asked for its state, which would reshard it; see weights_keep_their_storage. DiskError, with
        what is still there, if it cannot be written.
        """
        if self.load_only:
            return False
        self.finish_pending()
        if step == self.saved_step and not (is_last and self.last_save_model_only):
            return True
        with self._failures_in_words(step):
            self.peers.from_first(self._make_room)
            if is_last:
                self._save_last_step(step)
            else:
                states = self._whole_state(as_it_lies)
                self.dcp_save(states, self._create_checkpoint_id(step), AsyncMode.DISABLED, True)
            self._seal(step)
        if is_last and self._weights_only_at_end:
            self.peers.from_first(partial(self._take_away_all_but, step))
        self._purge_stale_checkpoints()
        return True

    def weights_keep_their_storage(self) -> bool:
        """Whether the model's state is its parameters themselves, the same at every save."""
        wrapper: ModelWrapper = self.states[MODEL]
        lasting = wrapper.cached_state_dict
        now = wrapper._get_state_dict()
        return lasting.keys() == now.keys() and all(
            not isinstance(v, torch.Tensor) or _shares_storage(v, lasting[k])
            for k, v in now.items()
        )

    def _whole_state(self, as_it_lies: bool) -> dict[str, Any]:
        if not as_it_lies:
            return self._flattened_model_states_sd()
        others = {name: state for name, state in self.states.items() if name != MODEL}
        return others | self.states[MODEL].cached_state_dict

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """As torchtitan's, by a writer that reports a full disk as such."""
        if to_hf or async_mode != AsyncMode.DISABLED:
            return super().dcp_save(
                state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf
            )
        writer = CheckpointWriter(checkpoint_id)
        return dcp.save(state_dict, storage_writer=writer, process_group=self.peers.group)

    def seal_if_done(self) -> None:
        """Gives an asynchronous save its manifest and its name, once all ranks have written."""
        if self._pending is None:
            return
        future = self.save_future
        if all(self.peers.from_all(lambda: future is None or future.done())):
            self.finish_pending()

    def finish_pending(self) -> None:
        """Waits for an asynchronous save, and seals it."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        with self._failures_in_words(step):
            self.maybe_wait_for_saving()
            self._seal(step)
        self._purge_stale_checkpoints()

    def _create_checkpoint_id(self, step: int, folder: str = "") -> str:
        return str(Path(folder or self.folder) / f"writing-{step}")

    def _make_room(self) -> None:
        """Deletes leftovers and, where the next checkpoint would not fit beside them, those that
        retention deletes right after it anyway. One whole checkpoint always stays.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self.home)
        whole = self._whole_steps()
        if self.keep_latest_k and len(whole) >= self.keep_latest_k:
            needed = folder_bytes(self.home / f"step-{whole[-1]}") + disk_space.NEARLY_NONE
            if disk_space.free_bytes(self.home) < needed:
                self._take_away(self._stale(whole, self.keep_latest_k - 1), at_once=True)

    def _seal(self, step: int) -> None:
        """Hashes and syncs the files of writing-N, each by the rank that wrote it, then writes the
        manifest and renames the folder.
        """
        folder = Path(self._create_checkpoint_id(step))
        # a rank sees its own files at once; those of other nodes may come later
        names = self.peers.from_all(partial(data_files, folder))
        mine = self.peers.share(sorted(set().union(*names)))
        digests = self.peers.from_all(
            lambda: {name: digest_and_sync(folder / name) for name in mine}
        )
        files = {name: digest for part in digests for name, digest in part.items()}
        self.peers.from_first(partial(self._publish, step, folder, files))
        self.saved_step = step

    def _publish(self, step: int, folder: Path, files: Mapping[str, FileDigest]) -> None:
        write_manifest(folder, Manifest(step, files))
        if (self.home / f"step-{step}").exists():
            set_aside(self.home, step, "given-up")
        folder.rename(self.home / f"step-{step}")
        sync_folder(self.home)

    @contextlib.contextmanager
    def _failures_in_words(self, step: int) -> Iterator[None]:
        try:
            yield
        except (Exception, CheckpointException) as error:
            self.has_failed = True
            full = disk_space.is_full(error) or disk_space.has_none(self.home)
            needed = max(map(folder_bytes, self._steps_and(f"writing-{step}")), default=0)
            if self.peers.is_first:
                shutil.rmtree(self._create_checkpoint_id(step), ignore_errors=True)
            if full:
                what = f"the checkpoint of step {step} needs more than {disk_space.size(needed)}"
                raise disk_space.no_space(self.home, what, self.kept()) from error
            raise DiskError(
                getattr(error, "errno", None) or errno.EIO,
                f"the checkpoint of step {step} cannot be written to {self.home}: "
                f"{_reason(error)}. Kept: {self.kept()}",
            ) from error

    def _steps_and(self, name: str) -> list[Path]:
        return [self.home / name, *(self.home / f"step-{n}" for n in steps_in(self.home))]

    def _whole_steps(self) -> list[int]:
        return [n for n in steps_in(self.home) if sizes_are_right(self.home / f"step-{n}")]

    def kept(self) -> str:
        """Which checkpoints are on the disk, in words. Not collective."""
        whole = self._whole_steps()
        return f"{listed(whole)}, whole" if whole else "no checkpoint, none was written before"

    # --- retention

    def _purge_stale_checkpoints(self) -> None:
        """Deletes all but the keep_latest_k newest whole ones, and what the run may go back to.
        Damaged ones stay, uncounted.
        """
        if self.peers.is_first and self.keep_latest_k > 0:
            self._take_away(self._stale(self._whole_steps(), self.keep_latest_k))

    def _stale(self, whole: Sequence[int], count: int) -> list[int]:
        """All but the `count` newest (one at least) and, for each of steps_to_keep, the newest that
        is not after it.
        """
        kept = {n for step in self.steps_to_keep() for n in [m for m in whole if m <= step][-1:]}
        return [n for n in whole[: -max(count, 1)] if n not in kept]

    def _take_away_all_but(self, step: int) -> None:
        self._take_away([n for n in steps_in(self.home) if n != step])

    def _take_away(self, steps: Sequence[int], *, at_once: bool = False) -> None:
        """Renames first: what a killed process left of a deletion is no checkpoint."""
        for step in steps:
            gone = self.home / f"deleting-{step}"
            try:
                (self.home / f"step-{step}").rename(gone)
            except OSError as error:  # the run does not end for want of tidiness
                log.warning("%s cannot be deleted: %s", gone, error)
                continue
            if self.purge_thread is not None and not at_once:
                self.purge_queue.put(str(gone))
            else:
                shutil.rmtree(gone, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The first line of the error; of a CheckpointException, of the first rank's."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        error = next(iter(failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]
