"""What the first rank decides reaches all others, under torchrun and without it; none hangs."""

import os
import subprocess
import sys

import pytest
from assets import free_port
from runs import environment

from reflux.trainer.runs import first_rank

DECIDE = """
import sys, time
from reflux.trainer.runs import first_rank
if first_rank.is_first():
    time.sleep(0.3)
    first_rank.decide({folder!r})
else:
    print("got", first_rank.wait_for_decision(), flush=True)
    if not first_rank.is_first_to_say("wrong"):
        print("quiet", flush=True)
if first_rank.is_first() and first_rank.is_first_to_say("wrong"):
    print("said", flush=True)
if first_rank.is_first():
    time.sleep(2)
"""


def start_by_hand(code: str, ranks: int) -> list[subprocess.Popen]:
    """Without torchrun, as srun does it."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("folder", ["runs/a b", None])
def test_by_hand(folder):
    first, *others = start_by_hand(DECIDE.format(folder=folder), 3)
    printed = [process.communicate(timeout=120)[0] for process in others]
    said = printed + [first.communicate(timeout=120)[0]]
    assert all(f"got {folder}\n" in text for text in printed), said
    assert "".join(said).count("quiet") == 2, "one of three may say it"


def test_under_torchrun(tmp_path):
    (tmp_path / "x.py").write_text(DECIDE.format(folder="f"))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "x.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "got f" in done.stdout
    assert ("quiet" in done.stdout) == ("said" in done.stdout), "one of the two says it"


def test_a_first_rank_that_ends_without_a_word_ends_the_others():
    code = "import os\nfrom reflux.trainer.runs import first_rank\n"
    code += "first_rank._store()\nif first_rank.is_first():\n    import time; time.sleep(2)\n"
    code += "    os._exit(1)\nfirst_rank.wait_for_decision()\n"
    first, other = start_by_hand(code, 2)
    assert first.wait(120) == 1
    _, error = other.communicate(timeout=120)
    assert other.returncode != 0 and "the first rank has ended before the start" in error


def test_a_single_rank_needs_no_store(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(first_rank, "_store", lambda: pytest.fail("opened"))
    first_rank._store.cache_info = lambda: pytest.fail("opened")
    assert first_rank.is_first()
    first_rank.decide("x")
    assert "RANK" not in os.environ
