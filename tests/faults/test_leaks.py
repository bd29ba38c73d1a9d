"""Nothing grows with the number of steps: memory, open files, threads, files in the run folder."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from fault_runs import TRAINED, budget, make_place

from reflux.trainer.runs.logger import load_run

STEPS = budget(120, 120, 500)
PAGE = os.sysconf("SC_PAGE_SIZE")
KB_PER_STEP = budget(100, 100, 24)  # of resident memory, over the second half


def sizes(pid: int) -> tuple[float, int, int]:
    """Resident kB, open files, threads."""
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text().split()[1])
    return pages * PAGE / 1024, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))


@pytest.mark.parametrize("phase", TRAINED[-1:] if STEPS < 500 else TRAINED)
def test_no_leak(server, talkers, tmp_path, record_property, phase):
    small = {"prompts": 1, "group": 2, "max_tokens": 4}
    over = {
        "steps": STEPS,
        "rollout": small,
        "checkpoint": {"interval": 25, "keep_latest_k": 2},
        "export": {"enable": False},
    }
    place = make_place(server, talkers, tmp_path / phase, phase, **over)
    pid, seen = place.start(), []
    log = place.folder / "run.jsonl"
    end = time.monotonic() + 400
    while (code := server.poll(0.05)) is None:
        assert time.monotonic() < end
        try:
            step = log.read_bytes().count(b'\n{"step"')
            seen.append((step, *sizes(pid)))
        except (OSError, IndexError):  # not there yet, or ended just now
            continue
    output = (place.notes / "output.txt").read_text()
    assert code == 0, output[-3000:]
    assert len(load_run(place.folder).steps) == STEPS
    late = np.array([s for s in seen if s[0] > STEPS / 2])
    assert len(late) > 5, "too few looks to tell"
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0]
    record_property("fault", f"{STEPS} steps")
    record_property("kB per step", round(float(slope), 2))
    assert slope < KB_PER_STEP, f"{slope:.1f} kB a step: {late[:, 1].tolist()}"
    for name, column in (("open files", 2), ("threads", 3)):
        first, last = (np.median(half[:, column]) for half in np.array_split(late, 2))
        assert last <= first, f"{name}: {late[:, column].tolist()}"
    assert len(list((place.folder / "checkpoint").iterdir())) == 2
