"""torch's writer of distributed checkpoints, with the error of the disk in place of what follows
from it: torch.save answers a full disk with "unexpected pos 704 vs 598".
"""

import contextlib
import io
import os
from collections.abc import Generator
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class _Stream(io.BufferedWriter):
    """A file that remembers the first error of a write."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


class _FileSystem(FileSystem):
    error: OSError | None = None

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as plain:
                yield plain
            return
        stream = _Stream(io.FileIO(os.fspath(path), "w"))
        try:
            with stream:
                yield stream
        finally:
            self.error = self.error or stream.error


class CheckpointWriter(FileSystemWriter):
    """Raises the OSError of a write that failed, on every rank."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self._recorder = _FileSystem()
        self.fs = self._recorder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            if self._recorder.error is not None:
                raise self._recorder.error from error
            raise
