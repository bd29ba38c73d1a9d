"""Pickles that do something when they are loaded: each creates the file `mark`."""

import io
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path


class Calls:
    """Pickled as a call of `function(*arguments)`."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _shell(mark: Path) -> object:
    import os

    return Calls(os.system, f"touch {mark}")


def _evaluated(mark: Path) -> object:
    return Calls(eval, f"open({str(mark)!r}, 'w').close()")


def _process(mark: Path) -> object:
    return Calls(subprocess.check_call, ["touch", str(mark)])


def _opened(mark: Path) -> object:
    return Calls(open, str(mark), "w")


def _method(mark: Path) -> object:
    return Calls(Path.touch, mark)


def _by_torch(mark: Path) -> object:
    """Through a function of torch itself that unpickles what it is given."""
    import torch

    inner = io.BytesIO()
    torch.save(_shell(mark), inner)
    return Calls(_load_unsafe, inner.getvalue())


def _load_unsafe(data: bytes) -> object:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def _nested(mark: Path) -> object:
    return Calls(pickle.loads, pickle.dumps(_shell(mark)))


PAYLOADS = {
    "os.system": _shell,
    "eval": _evaluated,
    "subprocess": _process,
    "open": _opened,
    "method": _method,
    "torch.load": _by_torch,
    "pickle.loads": _nested,
}
