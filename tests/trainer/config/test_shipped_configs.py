"""Every file of configs/ loads, those of a matrix with each cell's options."""

import tomllib
from pathlib import Path

import pytest

from reflux.trainer.config.loader import load
from reflux.trainer.matrix_file import read_matrix

CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.toml"))
PAPER = [path for path in CONFIGS if path.parent.name == "paper"]
CHOSEN_LATER = {
    "folder": "f",
    "phase": "distill",
    "model.path": "m",
    "data.source": "d",
    "teacher.path": "t",
    "proxy.path": "p",
    "task.name": "math",
}  # a piece of a matrix leaves these to its cells


def test_there_are_shipped_configs():
    assert CONFIGS, "configs/ holds no .toml file"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(p.parents[1])))
def test_every_shipped_config_loads(path, monkeypatch):
    table = tomllib.loads(path.read_text())
    # only a matrix stands on several
    if "cell" not in table and not isinstance(table.get("base"), list):
        load(
            path,
            tuple(
                f"{key}={value}" for key, value in CHOSEN_LATER.items() if not written(path, key)
            ),
        )
        return
    monkeypatch.chdir(path.parent.parent)  # where a matrix is started
    for cell in read_matrix(path, {}).cells:
        if not cell.module:
            named = dict(zip(cell.arguments[::2], cell.arguments[1::2]))
            sets = [
                value for flag, value in zip(cell.arguments, cell.arguments[1:]) if flag == "--set"
            ]
            load(named["--config"], tuple(sets))


def written(path: Path, key: str) -> bool:
    """Whether the file or one of its bases sets `key`."""
    table = tomllib.loads(path.read_text())
    here: object = table
    for part in key.split("."):
        here = here.get(part) if isinstance(here, dict) else None
    return here is not None or ("base" in table and written(path.parent / table["base"], key))


@pytest.mark.parametrize("mode", ["distillable", "undistillable", "off"])
@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_paper_configs_load_and_say_that_they_were_not_run(path, mode):
    cfg = load(path, (f"calibration.mode={mode}",))
    assert path.read_text().startswith("# NOT RUN.") and cfg.calibration.mode == mode
    assert cfg.rollout.prompts % cfg.titan["parallelism"]["data_parallel_shard_degree"] == 0


def test_there_are_paper_configs():
    assert len(PAPER) == 7
