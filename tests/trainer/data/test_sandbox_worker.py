"""The program of the grading process. What it holds back is in test_sandbox.py."""

import errno
import json
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reflux.trainer.data import sandbox_worker as worker
from reflux.trainer.data.graders import Grade


def test_messages_of_any_size_arrive_whole():
    ours, theirs = socket.socketpair()
    sent = os.urandom(3_000_000)
    if os.fork() == 0:
        ours.sendall(len(sent).to_bytes(8, "big") + sent)
        os._exit(0)
    assert worker._read_message(theirs.fileno()) == sent
    os.wait()
    ours.close()
    assert worker._read_message(theirs.fileno()) is None


def test_an_answer_is_one_line_of_json():
    read, write = os.pipe()
    worker._send(write, {"error": "two\nlines", "extracted": "\ud800"})
    line = os.read(read, 1000)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert json.loads(line) == {"error": "two\nlines", "extracted": "\ud800"}


def test_numpys_numbers_become_plain_ones():
    answer = worker._plain(Grade(np.float32(0.5), np.bool_(True), 7, None))
    assert json.loads(json.dumps(answer)) == answer
    assert (answer["reward"], answer["correct"], answer["extracted"]) == (0.5, True, "7")


@pytest.mark.parametrize(
    "error, more", [("PermissionError: [Errno 1] Operation not permitted", True), ("x", False)]
)
def test_only_what_was_held_back_is_explained(error, more):
    assert (worker._explained(error) != error) == more and worker._explained(None) is None


def test_the_filter_names_each_call_once_and_lets_none_change_the_outside():
    calls = [*worker.ALLOWED, *worker.WRITES]
    assert len(calls) == len(set(calls))
    outside = (
        "socket connect clone fork vfork execve execveat ptrace mount umount2 unshare setns bpf "
    )
    outside += (
        "kill tkill tgkill pidfd_open process_vm_writev io_uring_setup keyctl prctl ioctl fcntl "
    )
    outside += "setrlimit prlimit64 memfd_create shmget open_by_handle_at sendmsg sendto"
    assert not set(calls) & set(outside.split())
    assert not {"open", "openat", "mkdir", "unlink", "rename"} & set(worker.ALLOWED)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the header at hand has its numbers")
def test_every_name_of_the_filter_is_a_system_call():
    """A misspelt one would be refused by libseccomp only when the filter is loaded."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers")
    known = set(re.findall(r"__NR_(\w+)", header.read_text()))
    assert {*worker.ALLOWED, *worker.WRITES} <= known


def test_limits_hold_in_a_process():
    code = (
        "from reflux.trainer.data.sandbox_worker import set_limits; set_limits(1 << 30)\n"
        "try:\n len(bytearray(2 << 30))\nexcept MemoryError:\n print('memory')\n"
        "try:\n open('/dev/shm/large', 'wb').write(bytes((64 << 20) + 1))\n"
        "except OSError as error:\n print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    Path("/dev/shm/large").unlink(missing_ok=True)
    assert done.stdout.split() in (["memory"], ["memory", str(errno.EFBIG)]), done.stderr
