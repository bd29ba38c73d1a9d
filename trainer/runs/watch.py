"""A page of a run or of a matrix: python -m reflux.trainer.runs.watch FOLDER [--follow]

Writes FOLDER/report.html from what the folder holds; nothing else in it is touched, so the run may
be going on. With --follow the page is written anew whenever the log grows, until the run has ended.

Exit code: 0; 2 where the folder holds neither a run nor a matrix.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from .logger import LOG
from .matrix_page import MATRIX, MatrixLog
from .run_log import RunLog
from .run_page import status, write_run_page

log = logging.getLogger(__name__)

PROGRAM = "python -m reflux.trainer.runs.watch"
EVERY_S = 5.0  # between two looks at the log


class PageWriter:
    """Writes the page of a run that goes on in this process. An error is told once and ends
    nothing.
    """

    def __init__(self, folder: str | Path):
        self._log, self._told = RunLog(Path(folder)), False

    def __call__(self) -> None:
        try:
            self._log.refresh()
            write_run_page(self._log)
        except Exception as error:  # whatever is wrong with a page, the run is worth more
            if not self._told:
                log.warning("no report.html: %s: %s", type(error).__name__, error)
            self._told = True


def write_page(folder: str | Path) -> Path:
    """Writes report.html of a run or matrix folder and returns its path. ValueError for another
    folder.
    """
    folder = Path(folder)
    if (folder / LOG).is_file():
        run = RunLog(folder)
        run.refresh()
        return write_run_page(run)
    return _matrix(folder).write()


def follow(folder: str | Path, every_s: float = EVERY_S) -> Path:
    """Writes the page, and again whenever the log grows, until the run, or every cell, has
    ended.
    """
    folder = Path(folder)
    if not (folder / LOG).is_file():
        return _follow_matrix(_matrix(folder), every_s)
    run, path = RunLog(folder), None
    while True:
        if run.refresh() or path is None:
            path = write_run_page(run, refresh=True)
        if status(run).word != "running":
            return path
        time.sleep(every_s)


def _follow_matrix(matrix: MatrixLog, every_s: float) -> Path:
    while True:
        path = matrix.write(refresh=True)
        if matrix.ended:
            return path
        time.sleep(every_s)


def _matrix(folder: Path) -> MatrixLog:
    if not (folder / MATRIX).is_file():
        raise ValueError(
            f"{folder}: neither {LOG} nor {MATRIX} is there; want the folder of a run or matrix"
        )
    return MatrixLog(folder)


def main(arguments: list[str] | None = None, prog: str = PROGRAM) -> int:
    """Runs what the command line says. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write report.html, one page on a run or on a matrix of runs.",
    )
    parser.add_argument("folder", type=Path, help="of a run, or of a matrix")
    parser.add_argument(
        "--follow", action="store_true", help="write it anew when the log grows, until the end"
    )
    parser.add_argument(
        "--every",
        type=float,
        default=EVERY_S,
        metavar="SECONDS",
        help="with --follow: between two looks at the log (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    if not args.every > 0:
        parser.error(f"--every {args.every}; want more than 0 seconds")
    try:
        path = follow(args.folder, args.every) if args.follow else write_page(args.folder)
    except KeyboardInterrupt:
        return 0
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
