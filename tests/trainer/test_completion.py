"""The completion scripts in the shells themselves, where those are installed; bash: test_cli.py."""

import os
import pty
import select
import shutil
import subprocess
import time

import pytest

from reflux.trainer.completion import script

CASES = {  # what is typed -> the word that the tab key makes of it
    "reflux ch": "check",
    "reflux run debug_cpu_cal": "debug_cpu_calibrate",
    "reflux run x.toml --ra": "--ranks",
    "reflux init --al": "--all",
    "reflux completion z": "zsh",
}
WAIT_S = 60


def needs(shell: str):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"no {shell} on this machine")


@needs("fish")
def test_fish_completes_commands_recipes_and_options(tmp_path):
    file = tmp_path / "reflux.fish"
    file.write_text(script("fish"))
    (tmp_path / "checkpoint.txt").write_text("")  # no file in place of a command
    lines = [f"source {file}", *(f"complete -C '{typed}'" for typed in CASES)]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        ["fish", "--no-config", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == list(CASES.values()), done


@needs("zsh")
def test_zsh_completes_commands_recipes_and_options(tmp_path):
    (tmp_path / "reflux.zsh").write_text(script("zsh"))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ.update(TERM="dumb", PS1="> ", HOME=str(tmp_path))
        os.execvp("zsh", ["zsh", "-f", "-i"])
    try:
        setup = "autoload -U compinit && compinit -u -D; source reflux.zsh; unsetopt beep"
        os.write(terminal, f"{setup}; echo rea''dy\n".encode())
        read_until(terminal, "ready\r\n")
        for typed, word in CASES.items():
            os.write(terminal, f"{typed}\t".encode())
            read_until(terminal, f"{typed.rpartition(' ')[0]} {word}")
            os.write(terminal, b"\x15")  # Ctrl-U: an empty line again
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)


def read_until(terminal: int, wanted: str) -> None:
    """What the shell shows; fails where `wanted` does not come."""
    seen, end = "", time.monotonic() + WAIT_S
    while wanted not in seen:
        assert time.monotonic() < end, f"{wanted!r} is not in {seen!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
