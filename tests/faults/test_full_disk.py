"""A disk that fills up at any moment: told in words, nothing lost, and with more space the run goes
on to the same numbers.
"""

from pathlib import Path

import pytest
from fault_runs import Process, differences, extent, fails_with_output, moved, result
from full_disk import grow, may_mount, small_disk
from runs import config

from reflux.trainer.config.schema import Config
from reflux.trainer.engine.checkpoint_folder import steps_in
from reflux.trainer.runs.logger import load_run
from reflux.trainer.verify import verify

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not may_mount(), reason="needs the right to mount a tmpfs"),
]
LARGE = 200  # megabytes
EVALUATED = {"task": {"name": "runs:is_even"}, "eval": {"every": 1, "limit": 4}}
TRAINED = {
    "steps": 5,
    "checkpoint": {"interval": 2, "keep_latest_k": 2},
    "export": {"enable": True, "dtype": "float32"},
    "log": {"samples_every": 1},
}
RUNS = {
    "distill": TRAINED,
    "calibrate": TRAINED
    | {"calibration": {"mode": "undistillable"}, "reference": {"dtype": "float32"}},
    "diagnose": {
        "task": {"name": "runs:is_even"},
        "data": {"limit": 2},
        "diagnose": {"student_texts": 2, "heatmap_texts": 1},
    },
}


@pytest.fixture(scope="module", params=RUNS)
def whole(request, talkers, tmp_path_factory):
    """A run with all the space it wants, its result, and the megabytes it leaves."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = config(talkers, folder / "run", request.param, **RUNS[request.param])
    process = Process(cfg, folder / "run.toml")
    with fails_with_output(process):
        assert process.wait() == 0
    size = sum(p.stat().st_size for p in Path(cfg.folder).rglob("*") if p.is_file())
    return cfg, result(cfg.folder), size / 2**20


def sizes(megabytes: float) -> list[float]:
    """Of disks that are too small in another moment each; the first ones by what issues name."""
    count = extent(4, 40)
    named = [size for size in (1.0, 5.0, 8.0) if size < megabytes]
    return named + [0.03 + (megabytes - 0.03) * i / count for i in range(count)]


def test_every_size_of_disk(whole, tmp_path):
    cfg, wanted, megabytes = whole
    for number, size in enumerate(sizes(megabytes)):
        with small_disk(tmp_path / str(number), size) as disk:
            fill_up_and_go_on(moved(cfg, disk / "run"), disk, wanted, f"{size:.2f} MB")


def fill_up_and_go_on(cfg: Config, disk: Path, wanted: dict, size: str) -> None:
    file = disk.with_suffix(".toml")
    process = Process(cfg, file)
    with fails_with_output(process):
        code = process.wait()
        assert code in (0, 2), f"{size}: exit code {code}"
        if code == 2:
            assert "no space left" in process.printed.lower(), size
            assert cfg.folder in process.printed, size
            assert "Traceback" not in process.printed, size
    home = Path(cfg.folder) / "checkpoint"
    saved = steps_in(home)
    if saved:
        assert [v.line for v in verify(Path(cfg.folder)) if v.damage] == [], size
        logged = [step["step"] for step in load_run(cfg.folder).steps]
        assert logged[: max(saved)] == list(range(1, max(saved) + 1)), (
            "a checkpoint without its log"
        )
    grow(disk, LARGE)
    process = Process(cfg, file)
    with fails_with_output(process):
        assert process.wait() == 0, size
        assert differences(result(cfg.folder), wanted) == [], size
    left = {p.name for p in Path(cfg.folder).iterdir()}
    assert not [name for name in left if name.endswith(".partial")], f"{size}: {left}"
