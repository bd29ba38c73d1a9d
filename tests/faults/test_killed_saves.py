"""SIGKILL while checkpoints and exports are written: the run goes on to the same numbers and the
same bytes, and nothing that lies there under the name of a checkpoint is half of one.
"""

import random
from collections import Counter
from pathlib import Path

import pytest
from fault_runs import Process, differences, extent, fails_with_output, moved, result
from runs import config

from reflux.trainer.engine.checkpoint_folder import steps_in
from reflux.trainer.verify import verify

pytestmark = pytest.mark.faults
OVER = {
    "steps": 6,
    "checkpoint": {"interval": 1, "keep_latest_k": 2},
    "export": {"enable": True, "dtype": "float32"},
}
PHASES = {
    "calibrate": {"calibration": {"mode": "undistillable"}, "reference": {"dtype": "float32"}},
    "distill": {},
}


@pytest.fixture(scope="module", params=PHASES)
def whole(request, talkers, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = config(talkers, folder / "run", request.param, **OVER, **PHASES[request.param])
    process = Process(cfg, folder / "run.toml")
    with fails_with_output(process):
        assert process.wait() == 0
    return cfg, result(cfg.folder)


def moment(folder: Path, random_: random.Random):
    """(name, when it happens, how long after it): in the midst of writing something."""
    home, export = folder / "checkpoint", folder / "export.partial"
    before = {p.name for p in home.glob("step-*")}

    def writes() -> bool:
        return next(home.glob("writing-*"), None) is not None

    def seals() -> bool:
        return any(True for _ in home.glob("writing-*/.metadata"))

    def deletes() -> bool:
        return next(home.glob("deleting-*"), None) is not None

    def renamed() -> bool:
        return bool({p.name for p in home.glob("step-*")} - before)

    moments = {
        "write": (writes, 0.03),
        "seal": (seals, 0.01),
        "deletion": (deletes, 0.003),
        "rename": (renamed, 0.02),
        "export": (export.exists, 0.05),
    }
    name = random_.choice(list(moments))
    happens, longest = moments[name]
    return name, happens, random_.uniform(0, longest)


def test_kills_in_the_midst_of_writing(whole, tmp_path, record_property):
    cfg, wanted = whole
    random_, survived, tried = random.Random(7), Counter(), extent(5, 50)
    for attempt in range(tried):
        run = moved(cfg, tmp_path / f"run-{attempt}")
        folder = Path(run.folder)
        for _ in range(random_.randint(1, 2)):
            process = Process(run, tmp_path / f"{attempt}.toml")
            name, happens, delay = moment(folder, random_)
            if process.kill_when(happens, delay):
                survived[name] += 1
            if steps_in(folder / "checkpoint"):
                assert [v.line for v in verify(folder) if v.damage] == []
        process = Process(run, tmp_path / f"{attempt}.toml")
        with fails_with_output(process):
            assert process.wait() == 0
            assert differences(result(folder), wanted) == [], f"attempt {attempt} after {survived}"
            names = {p.name for p in (folder / "checkpoint").iterdir()}
            assert names == {"step-5", "step-6"}
    record_property("survived", dict(survived))
    assert sum(survived.values()) >= tried / 2, "most of the kills came too late to test anything"
