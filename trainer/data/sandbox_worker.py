"""The program of the process that grades; sandbox.py starts it, by its path.

    try SCRATCH PATH   enters the sandbox and proves it; the exit code says whether it holds
    grade SOCKET       one JSON object that sets it up, then (prompt, text) after (prompt, text)

The grader's own modules are imported before the filter is loaded: they are trusted, and import more
when they may write caches. Everything after, model text included, runs under the filter.
"""

import ctypes
import errno
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

FILE_BYTES = 64 << 20
DESCRIPTORS = 1024
CLONE_THREAD = 0x10000
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Reading, memory, time, threads, and what a process may ask about itself. Everything else is EPERM.
ALLOWED = """
    read readv pread64 preadv write writev pwrite64 pwritev close lseek fstat stat lstat newfstatat
    statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd
    chdir fchdir dup dup2 dup3 pipe pipe2 select pselect6 poll ppoll epoll_create1 epoll_ctl
    epoll_wait epoll_pwait eventfd2 ftruncate fadvise64
    mmap mprotect munmap mremap madvise brk mincore mlock munlock membarrier get_mempolicy
    futex set_robust_list get_robust_list set_tid_address rseq sched_yield sched_getaffinity
    sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min getcpu
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
    restart_syscall pause alarm getitimer setitimer nanosleep clock_nanosleep clock_gettime
    clock_getres gettimeofday time times getrusage getrlimit sysinfo uname getrandom
    getpid getppid gettid getuid geteuid getgid getegid getgroups getresuid getresgid getpgrp
    getpgid getsid getpriority arch_prctl exit exit_group
""".split()
WRITES = """
    open openat creat mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 truncate
    fallocate fsync fdatasync sync_file_range flock chmod fchmod fchmodat utimensat copy_file_range
    sendfile
""".split()  # only where mounts decide what can be written


def set_limits(memory_bytes: int) -> None:
    """Of the kernel, for the rest of this process."""
    _lower(resource.RLIMIT_DATA, memory_bytes)
    # libraries count here, torch's for CUDA are many GiB; and shared memory, which counts only here
    _lower(resource.RLIMIT_AS, 4 * memory_bytes)
    _lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, DESCRIPTORS)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # too large a file is an OSError


def _lower(limit: int, most: int) -> None:
    """A limit that is lower already, of the user or the machine, stays."""
    hard = resource.getrlimit(limit)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (most, most))


def load_filter(writes: bool) -> None:
    """The filter of system calls, for all threads and for good. writes: files may be opened for
    writing, because mounts decide which.
    """
    import pyseccomp as seccomp

    def equal(argument: int, value: int) -> Any:
        return seccomp.Arg(argument, seccomp.EQ, value)

    # pyseccomp's constants are libseccomp's
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    rules.set_attr(seccomp.Attr.CTL_TSYNC, 1)  # threads that imports have started, too
    # numbers of another architecture; libseccomp would kill one thread and leave the rest waiting
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.ERRNO(errno.EPERM))
    for name in [*ALLOWED, *(WRITES if writes else ())]:
        rules.add_rule(seccomp.ALLOW, name)
    if not writes:
        for name, flags in (("open", 1), ("openat", 2)):
            rules.add_rule(seccomp.ALLOW, name, seccomp.Arg(flags, seccomp.MASKED_EQ, WRITING, 0))
    # threads, no processes; glibc falls back to clone where there is no clone3
    thread = seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD)
    rules.add_rule(seccomp.ALLOW, "clone", thread)
    for name in ("clone3", "openat2"):
        rules.add_rule(seccomp.ERRNO(errno.ENOSYS), name)
    for name in ("kill", "tgkill"):  # this process only
        rules.add_rule(seccomp.ALLOW, name, equal(0, os.getpid()))
    rules.add_rule(seccomp.ALLOW, "prlimit64", equal(0, 0), equal(2, 0))  # limits are read only
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC; no signals by F_SETOWN
    for command in (0, 1, 2, 3, 4, 1030):
        rules.add_rule(seccomp.ALLOW, "fcntl", equal(1, command))
    for command in (0x5401, 0x5450, 0x5451, 0x5413):  # TCGETS, FIONCLEX, FIOCLEX, TIOCGWINSZ
        rules.add_rule(seccomp.ALLOW, "ioctl", equal(1, command))
    rules.add_rule(seccomp.ALLOW, "prctl", equal(0, PR_SET_NAME))  # of a thread
    rules.load()


def prove(scratch: str) -> None:
    """RuntimeError where the sandbox lets something through."""
    for act, name in (
        (_connect, "opens a socket"),
        (_fork, "starts a process"),
        (_write_beside, "writes a file"),
    ):
        try:
            act()
        except OSError:
            continue
        raise RuntimeError(f"the sandbox {name}")
    if scratch:
        with tempfile.TemporaryFile(dir=scratch) as file:
            file.write(b"x")


def _connect() -> None:
    socket.socket(socket.AF_UNIX).close()


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _write_beside() -> None:
    # the folder of the running program: whoever started it can mostly write there
    path = os.path.join(os.path.realpath(os.getcwd()), f".sandbox-{os.getpid()}")
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.unlink(path)


def try_out(scratch: str) -> None:
    set_limits(1 << 32)
    load_filter(writes=bool(scratch))
    prove(scratch)


# --- grading


def serve(descriptor: int) -> None:
    """A grader's set-up, then texts, until the parent is gone."""
    setup = json.loads(_read_message(descriptor) or b"{}")
    _end_with_parent(descriptor)
    if setup["memory_bytes"]:
        set_limits(setup["memory_bytes"])
    sys.path[:] = setup["path"]
    from reflux.trainer.data.attempt import GraderAlarm, attempt
    from reflux.trainer.data.grader_options import make_grader

    grader, limits = make_grader(setup["task"], setup["options"])
    getattr(grader, "warm_up", int)()
    sandbox = setup["sandbox"]
    if sandbox:
        load_filter(writes=bool(setup["scratch"]))
        prove(setup["scratch"])
    _send(descriptor, {"ready": True})
    with GraderAlarm(limits.timeout_s, grader) as limited:
        while (message := _read_message(descriptor)) is not None:
            answer = _plain(attempt(_grade, limited, message))
            if sandbox:
                answer["error"] = _explained(answer["error"])
            _send(descriptor, answer)


def _grade(grader: Any, message: bytes) -> Any:
    return grader(*pickle.loads(message))


def _plain(grade: Any) -> dict[str, Any]:
    """A user's Grade can hold what JSON does not, numpy's numbers for instance."""
    answer: dict[str, Any] = asdict(grade)
    answer["reward"] = float(answer["reward"])
    for name, kind in (("correct", bool), ("extracted", str), ("error", str)):
        answer[name] = None if answer[name] is None else kind(answer[name])
    return answer


HELD_BACK = (
    "Operation not permitted",
    "Read-only file system",
    "Function not implemented",
    "No usable temporary directory",
)


def _explained(error: str | None) -> str | None:
    if error is None or not any(words in error for words in HELD_BACK):
        return error
    return f"{error} (a grader has no network, starts no process and writes no file: docs/trust.md)"


def _end_with_parent(descriptor: int) -> None:
    """Also out of a loop in C, which lets no thread run: by the kernel, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        hung_up = select.poll()
        hung_up.register(descriptor, select.POLLHUP)
        hung_up.poll()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _read_message(descriptor: int) -> bytes | None:
    head = _read(descriptor, 8)
    return _read(descriptor, *struct.unpack("!Q", head)) if head else None


def _read(descriptor: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _send(descriptor: int, answer: Mapping[str, Any]) -> None:
    line = json.dumps(answer).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]


if __name__ == "__main__":
    if sys.argv[1] == "try":
        sys.path[:] = sys.argv[3].split(os.pathsep)
        try_out(sys.argv[2])
    else:
        serve(int(sys.argv[2]))
