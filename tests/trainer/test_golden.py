"""Ten numbers a phase that a refactor must not move. A change of numerics moves them in a commit of
its own:

    REFLUX_WRITE_GOLDEN=1 pytest tests/trainer/test_golden.py
"""

import os
from pathlib import Path

import pytest
from runs import run_here

from reflux.trainer.config import loader as config_file
from reflux.trainer.studies import debug_models

ROOT = Path(__file__).parents[2]
# eps: an update of AdamW is the sign of a gradient, also of one that is rounding alone. With its
# default another CPU's rounding changed a sampled token by step 4
SETTINGS = ("log.quiet=true", "optim.eps=1e-4")
pytestmark = pytest.mark.usefixtures("titan_process")


@pytest.fixture(scope="module")
def debug_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "runs" / "debug"
    debug_models.main(["--out", str(folder)])
    return folder.parents[1]


@pytest.mark.parametrize("phase", ["calibrate", "distill"])
def test_the_debug_run_gives_the_golden_numbers(debug_folder, monkeypatch, phase):
    """1e-4 relative: torch 2.11 and 2.13 sum in other orders, and ten steps of AdamW carry that
    on.
    """
    monkeypatch.chdir(debug_folder)  # the configs name their models from the repository root
    run = run_here(config_file.load(ROOT / "configs" / f"debug_cpu_{phase}.toml", SETTINGS))
    got = [(step["loss"], step["grad_norm"]) for step in run.steps]
    golden = ROOT / "tests" / "golden" / f"debug_cpu_{phase}.txt"
    if os.environ.get("REFLUX_WRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(
            "# loss, gradient norm\n" + "".join(f"{loss:.8e} {norm:.8e}\n" for loss, norm in got)
        )
    want = [tuple(map(float, line.split())) for line in golden.read_text().splitlines()[1:]]
    assert len(got) == len(want) == 10
    for step, (a, b) in enumerate(zip(got, want), 1):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6), f"step {step}"
    assert (debug_folder / "runs" / f"debug_{phase}" / "export").is_dir() and len(set(got)) == 10
