"""A reader that goes away ends nothing; any other error of the output still does."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from reflux.trainer.runs import output

WRITE = """
import sys
from reflux.trainer.runs.output import survive_lost_reader
survive_lost_reader("nobody reads")
write = print
{before}
for line in range(2_000):
    write("line" * 30, line)
print("the end", file=sys.stderr)
"""


def run(code: str, **streams) -> subprocess.CompletedProcess:
    words = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(words, text=True, timeout=60, **streams)


def to_a_reader_of(lines: int, code: str) -> tuple[int, str]:
    """Exit code and error stream of a process whose output is read that far."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    return process.wait(60), error


@pytest.mark.parametrize(
    "before", ["", "import rich.console; write = rich.console.Console().print"]
)
def test_a_program_under_head_goes_on_and_says_so_once(before):
    code, error = to_a_reader_of(3, WRITE.format(before=before))
    assert (code, error) == (0, "nobody reads\nthe end\n")


def test_without_it_the_same_program_ends_in_a_traceback():
    code, error = to_a_reader_of(3, WRITE.format(before="sys.stdout = sys.__stdout__"))
    assert code != 0 and "BrokenPipeError" in error


def test_all_lines_arrive_where_somebody_reads():
    done = run(WRITE.format(before=""), capture_output=True)
    assert done.stdout.splitlines()[-1] == "line" * 30 + " 1999" and done.stderr == "the end\n"


def test_a_closed_stream_is_no_stream():
    code = WRITE.format(before="")
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -W ignore - >&- 2>&-"], input=code, text=True
    )
    assert done.returncode == 0


def test_a_lost_error_stream_is_silent_too():
    read, write = os.pipe()
    os.close(read)
    code = WRITE.format(before="") + "import os; os._exit(7)"
    try:
        assert run(code, stdout=subprocess.DEVNULL, stderr=write).returncode == 7
    finally:
        os.close(write)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_output_is_an_error_as_before():
    with open("/dev/full", "w") as full:
        done = run(WRITE.format(before=""), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode != 0 and "No space left on device" in done.stderr


def test_our_warnings_are_words_and_those_of_others_are_left():
    where = str(Path(output.__file__).parents[1] / "calibration" / "guards.py")
    before = warnings.formatwarning
    with output.plain_warnings():
        ours = warnings.formatwarning("no proxy", UserWarning, where, 3)
        other = warnings.formatwarning("old", DeprecationWarning, where, 3)
        theirs = warnings.formatwarning("x", UserWarning, "/lib/torch/a.py", 3)
    assert ours == "warning: no proxy\n"
    assert "guards.py:3: DeprecationWarning: old" in other and "a.py:3: UserWarning: x" in theirs
    assert warnings.formatwarning is before
