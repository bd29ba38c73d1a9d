"""torchrun's report on a run that has already said what was wrong: silence, and the exit code.

torchrun ends with a traceback of its own frames, about 25 lines, and exit code 1, whatever its
workers ended with. Installed as an entry point in the group `torchrun.handlers`, which torchrun
loads when it starts, this ends it with the exit code of trainer/main.py instead. A worker that a
signal has killed is still reported by torchrun, and so is everything that is not trainer/main.py.
"""

import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

INTERRUPTED = 130
MAIN = Path(__file__).parents[1] / "main.py"


def handler() -> Any:
    """What the entry point has to return: a maker of rendezvous handlers. This is none."""
    if any(_is_main(word) for word in sys.orig_argv):
        sys.excepthook = report
    return _no_rendezvous


def _no_rendezvous(parameters: Any) -> NoReturn:
    raise ValueError("--rdzv-backend=reflux: no such backend; want c10d or static")


def _is_main(word: str) -> bool:
    return word == "reflux.trainer.main" or (
        word.endswith(MAIN.name) and Path(word).resolve() == MAIN.resolve()
    )


def report(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """An excepthook. SystemExit with the exit code of the worker that ended first."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, SignalException):
        raise SystemExit(INTERRUPTED)
    if isinstance(error, ChildFailedError):
        _, failure = error.get_first_failure()
        if failure.exitcode > 0:
            raise SystemExit(failure.exitcode)
    sys.__excepthook__(kind, error, traceback)
