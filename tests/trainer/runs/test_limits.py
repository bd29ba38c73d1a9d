"""The limit of open files is raised where that is possible, and told where it is too low."""

import resource
import subprocess
import sys

import pytest

SHOW = (
    "import resource\n"
    "from reflux.trainer.runs.limits import raise_descriptor_limit\n"
    "try:\n"
    "    raise_descriptor_limit()\n"
    "    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    "except ValueError as error:\n"
    "    print(error)\n"
)


@pytest.mark.parametrize(
    "limits, says",
    [
        ((64, 1000), "1000"),
        ((64, 9000), "4096"),
        ((5000, 9000), "5000"),
        ((256, 256), "256"),
        (
            (64, 255),
            "this process may have 255 files open, a hard limit; want at least 256.",
        ),
        ((40, 40), "this process may have 40 files open"),
    ],
)
def test_the_limit_is_raised_or_told(limits, says):
    def lower():
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    done = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, preexec_fn=lower
    )
    assert done.returncode == 0 and done.stdout.startswith(says), done.stderr
