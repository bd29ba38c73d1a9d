"""What checkpoints and export take, against those of a run."""

from types import SimpleNamespace

import pytest
from preflight_cases import problems
from runs import run_here

from reflux.trainer.engine.checkpoint_folder import folder_bytes
from reflux.trainer.preflight import disk_checks
from reflux.trainer.preflight.check import examine
from reflux.trainer.preflight.dry_run import plan
from reflux.trainer.preflight.shapes import planned_shapes, planned_titan

LORA = {"rank": 4, "alpha": 8.0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "over",
    [
        {"export": {"enable": True}},
        {"lora": LORA, "export": {"enable": True}},
        {"lora": LORA, "export": {"enable": True, "merge": True, "dtype": "float32"}},
    ],
    ids=["whole", "adapters", "merged"],
)
def test_they_are_as_large_as_planned(distill, titan_process, tmp_path, over):
    cfg = distill(steps=1, **over)
    shapes, _ = planned_shapes(cfg)
    config = planned_titan(cfg, shapes[0])
    run_here(cfg)
    written = folder_bytes(tmp_path / "run" / "checkpoint" / "step-1")
    planned = disk_checks.checkpoint_bytes(config, shapes[0])
    assert planned < written < planned + 800_000, "its metadata comes to the weights"
    export = sum(p.stat().st_size for p in (tmp_path / "run" / "export").glob("*.safetensors"))
    assert disk_checks.export_bytes(cfg, shapes[0]) == pytest.approx(export, abs=8_000)


@pytest.mark.parametrize(
    "steps, keep, more, count",
    [
        (1, 3, {}, 1),
        (50, 3, {}, 1),
        (51, 3, {}, 2),
        (500, 1, {}, 2),
        (500, 2, {}, 2),
        (500, 3, {}, 3),  # before it writes, retention leaves two of them
        (500, 3, {"every": 20}, 4),  # and the last evaluation that passed
        (101, 3, {"every": 100}, 3),
        (500, 0, {"every": 20}, 30),  # 10 of the interval, 24 of which 4 are those, step 500
        (500, 3, {"every": 20, "enable": False}, 0),
        (500, 0, {}, 10),
        (500, 0, {"enable_first_step_checkpoint": True}, 11),
        (3, 0, {"enable_first_step_checkpoint": True, "interval": 1}, 3),
        (1, 0, {"enable_first_step_checkpoint": True}, 1),
        (0, 3, {}, 0),
        (500, 3, {"load_only": True}, 0),
        (500, 3, {"enable": False}, 0),
    ],
)
def test_how_many_there_are_at_once(steps, keep, more, count):
    more, usual = dict(more), {"enable": True, "load_only": False}
    usual["enable_first_step_checkpoint"] = False
    every = more.pop("every", 0)
    section = SimpleNamespace(keep_latest_k=keep, **{"interval": 50} | usual | more)
    assert disk_checks.kept_at_once(steps, section, every) == count


@pytest.mark.parametrize("look", [plan, examine])
def test_a_disk_that_is_too_small_is_told_before_the_run(calibrate, monkeypatch, look):
    """119,232 parameters: 1.4 MB with both moments, and 0.2 MB as bf16."""
    cfg = calibrate(steps=100, checkpoint={"interval": 10}, export={"enable": True})
    says = "at least 3 checkpoint(s) of 1.4 MB at once and an export of 238.5 kB, 4.5 MB"
    for free, level in ((4_600_000, "ok"), (4_400_000, "warning")):
        monkeypatch.setattr(disk_checks, "free_bytes", lambda _, free=free: free)
        assert says in problems(look(cfg).findings, level)
    every = calibrate(steps=100, checkpoint={"interval": 10, "keep_latest_k": 0})
    assert "set checkpoint.keep_latest_k" in problems(look(every).findings, "warning")


def test_checkpoints_that_a_resumed_run_replaces_count_as_room(calibrate, monkeypatch, tmp_path):
    """Not those that it sets aside, and none of a run that starts beside it."""
    section = {"interval": 10}
    cfg = calibrate(steps=100, checkpoint=section, on_existing_run="resume")
    monkeypatch.setattr(disk_checks, "free_bytes", lambda _: 3_400_000)
    aside = tmp_path / "run" / "checkpoint" / "damaged-10"
    aside.mkdir(parents=True)
    (aside / "x.distcp").write_bytes(bytes(1_400_000))
    assert "disk:" in problems(plan(cfg).findings, "warning")
    aside.rename(aside.with_name("step-10"))
    assert "disk:" in problems(plan(cfg).findings, "ok")
    new = calibrate(steps=100, checkpoint=section, on_existing_run="new")
    assert "disk:" in problems(plan(new).findings, "warning")


def test_a_last_checkpoint_of_weights_alone_is_smaller(calibrate, monkeypatch):
    monkeypatch.setattr(disk_checks, "free_bytes", lambda _: 1_000_000)
    for more, level in (({}, "warning"), ({"last_save_model_only": True}, "ok")):
        cfg = calibrate(steps=10, checkpoint={"interval": 10} | more)
        assert "at least 1 checkpoint(s)" in problems(plan(cfg).findings, level)

    for steps, level in ((20, "ok"), (100, "warning")):  # later ones push the whole ones out before
        cfg = calibrate(steps=steps, checkpoint={"interval": 10, "last_save_model_only": True})
        monkeypatch.setattr(disk_checks, "free_bytes", lambda _: 2_400_000)
        assert "disk:" in problems(plan(cfg).findings, level)


@pytest.mark.parametrize(
    "more, count", [({}, 4), ({"every": 0}, 3), ({"source": ""}, 3), ({"drop": 0.0}, 3)]
)
def test_the_checkpoint_that_the_utility_guard_goes_back_to_counts(calibrate, more, count):
    asked = {"source": calibrate().data.source, "every": 20} | more
    guard = {"utility_drop": asked.pop("drop", 0.02)}
    cfg = calibrate(steps=100, checkpoint={"interval": 10}, guard=guard, eval=asked)
    assert f"at least {count} checkpoint(s)" in problems(plan(cfg).findings, "ok")


def test_a_folder_that_cannot_be_entered_is_a_finding(calibrate, monkeypatch):
    def refuses(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(disk_checks, "free_bytes", refuses)
    assert "Permission denied" in problems(plan(calibrate(steps=10)).findings, "warning")
