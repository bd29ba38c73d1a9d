"""`python -m reflux.trainer.studies.NAME FOLDER`: the command line of what writes a report of a
matrix folder.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def print_report(
    name: str, write: Callable[[Path], str], arguments: Sequence[str] | None = None
) -> int:
    """Writes the report of the folder named on the command line and prints it. Exit code 2 with a
    sentence where there is nothing to report.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m reflux.trainer.studies.{name}",
        description="Writes a report of the finished runs of a matrix into its folder.",
    )
    parser.add_argument("folder", type=Path, help="of the matrix: its key `folder`")
    folder = parser.parse_args(arguments).folder
    if not (folder / "matrix.json").is_file():
        parser.error(f"{folder}: no matrix.json there; want the folder of a matrix that was run")
    try:
        print(write(folder))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0
