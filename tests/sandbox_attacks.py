"""A grader that runs the text, as no grader should: what a sandbox has to hold back.

Each attack is a text; `{victim}` is a file with the content "whole", `{made}` a path where nothing
is, `{pid}` the trainer.
"""

GRADER = '''
import ctypes, mmap, os, pickle, signal, socket, subprocess, sys, threading, time

libc = ctypes.CDLL(None, use_errno=True)


def call(number, *arguments):
    """A system call, past every check of Python's own."""
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def grade(prompt, text):
    if text == prompt.answer:
        return True
    exec(text, globals())
    return 0.5  # nothing stopped it
'''

WRITES = {  # none of them may leave a trace
    "open": "open('{made}', 'w').close()",
    "append": "open('{victim}', 'a').write('x')",
    "update": "open('{victim}', 'r+').write('x')",
    "truncate": "os.truncate('{victim}', 0)",
    "mkdir": "os.mkdir('{made}')",
    "unlink": "os.unlink('{victim}')",
    "rename": "os.rename('{victim}', '{made}')",
    "link": "os.link('{victim}', '{made}')",
    "symlink": "os.symlink('{victim}', '{made}')",
    "mkfifo": "os.mkfifo('{made}')",
    "chmod": "os.chmod('{victim}', 0o777)",
    "utime": "os.utime('{victim}', (0, 0))",
    "system": "assert os.system('touch {made}') == 0, 'Operation not permitted'",
    "subprocess": "subprocess.run(['touch', '{made}'], check=True)",
    "exec": "os.execv('/usr/bin/touch', ['touch', '{made}'])",
    "fork": "os.fork() or open('{made}', 'w')",
    "creat": "call(85, b'{made}', 0o644)",
    "openat2": "call(437, -100, b'{made}', (ctypes.c_uint64 * 3)(0o101, 0o644, 0), 24)",
    "32-bit numbers": "call(0x40000000 | 83, b'{made}', 0o755)",
    "own memory file": "open(f'/proc/{pid}/mem', 'r+b')",
}
REACHES = {  # out of the process
    "inet": "socket.socket(socket.AF_INET)",
    "inet6": "socket.socket(socket.AF_INET6)",
    "unix": "socket.socket(socket.AF_UNIX)",
    "socketpair": "socket.socketpair()",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "kill": "os.kill({pid}, 9)",
    "kill all": "os.kill(-1, 9)",
    "signal 0": "os.kill(1 if os.getpid() != 1 else 2, 0)",
    "pidfd": "os.pidfd_open(os.getpid())",
    "ptrace": "call(101, 16, {pid}, 0, 0)",
    "process_vm_writev": "call(311, {pid}, 0, 0, 0, 0, 0)",
    "io_uring": "call(425, 8, ctypes.create_string_buffer(120))",
    "mount": "call(165, b'tmpfs', b'/tmp', b'tmpfs', 0, 0)",
    "remount": "call(442, -100, b'/', 0x8000, (ctypes.c_uint64 * 4)(), 32)",
    "unshare": "call(272, 0x10000000)",
    "setns": "call(308, os.open('/proc/self/ns/net', 0), 0)",
    "chroot": "os.chroot('/')",
    "keyctl": "call(250, 0, -3, 0)",
    "bpf": "call(321, 0, 0, 0)",
    "perf": "call(298, 0, 0, -1, -1, 0)",
    "shared memory": "call(29, 0, 4096, 0o1600)",
    "memfd": "os.memfd_create('x')",
    "another's limits": "call(302, {pid}, 7, (ctypes.c_uint64 * 2)(0, 0), 0)",
    "own limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "signals by descriptors": "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, {pid})",
    "typing for the terminal": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
    "priority": "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "affinity": "os.sched_setaffinity({pid}, [0])",
}
WEARS_DOWN = {
    "memory": "len(bytearray(2 << 30))",
    "shared anonymous memory": "len(mmap.mmap(-1, 8 << 30))",
    "threads": "[threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in iter("
    "int, 1)]",
    "descriptors": "kept = [os.open('/dev/null', 0) for _ in range(9999)]",
    "deaf": "signal.signal(14, signal.SIG_IGN); signal.setitimer(signal.ITIMER_REAL, 0)\n"
    "while True:\n try:\n  while True: pass\n except BaseException: pass",
    "blocked signals": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64)); time.sleep(99)",
    "one loop in C": "sum(range(10 ** 13))",
}
LIES = {  # to the trainer, by the socket
    "two answers": "os.write(int(sys.argv[2]), GOOD + GOOD)",
    "half an answer": "os.write(int(sys.argv[2]), GOOD[:9]); time.sleep(99)",
    "no end": "[os.write(int(sys.argv[2]), b' ' * 65536) for _ in iter(int, 1)]",
    "no JSON": "os.write(int(sys.argv[2]), b'yes\\n')",
    "a list": "os.write(int(sys.argv[2]), b'[1]\\n')",
    "a text as reward": "os.write(int(sys.argv[2]), GOOD.replace(b'1.0', b'\"1\"'))",
    "no finite reward": "os.write(int(sys.argv[2]), GOOD.replace(b'1.0', b'NaN'))",
    "one field more": "os.write(int(sys.argv[2]), GOOD[:-2] + b', \"more\": 1}\\n')",
    "a pickle": "os.write(int(sys.argv[2]), pickle.dumps(print) + b'\\n')",
    "hanging up": "os.close(int(sys.argv[2]))",
    "shutting up": "os._exit(0)",
}
GOOD = (
    'GOOD = b\'{"reward": 1.0, "correct": true, "extracted": null, "error": null, "graded": true}'
    "\\n'\n"
)
