"""The answers of a run are those of the weights that it kept."""

import json

import pytest

from reflux.trainer.runs.answer_files import answer_files


def write_run(folder, *lines, files=(0, 2, 9, 10)):
    """A folder with these lines in its log, and files of these steps."""
    (folder / "predictions").mkdir(parents=True)
    for step in files:
        (folder / f"predictions/step-{step}.jsonl").touch()
    (folder / "predictions/unfinished.jsonl").touch()
    log = [{"schema": 1}, *lines]
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def evals(*steps):
    return [{"event": "eval", "step": step} for step in steps]


def stop(restored):
    return {"event": "stopped", "step": 10, "restored_step": restored}


@pytest.mark.parametrize(
    "lines, steps",
    [
        (evals(0, 2, 9, 10), [0, 2, 9, 10]),
        ([*evals(0, 2, 9), stop(2), *evals(2)], [0, 2]),
        ([*evals(0, 2, 9), stop(0), *evals(0)], [0]),
        ([*evals(0, 2, 9), stop(None), *evals(10)], [0, 2, 9, 10]),
        # resumed from step 2: the log was cut there, the files were not
        ([*evals(0, 2), {"event": "resume", "step": 2}], [0, 2]),
        ([{"event": "resume", "step": 0}], []),
    ],
)
def test_files_of_rejected_weights_stay_and_are_not_read(tmp_path, lines, steps):
    write_run(tmp_path, *lines)
    assert list(answer_files(tmp_path)) == steps
    assert all(file.name == f"step-{n}.jsonl" for n, file in answer_files(tmp_path).items())
    assert len(list(tmp_path.glob("predictions/step-*.jsonl"))) == 4, "nothing is removed"


def test_a_folder_without_a_log_has_all_of_its_files_in_order(tmp_path):
    write_run(tmp_path)
    (tmp_path / "run.jsonl").unlink()
    assert list(answer_files(tmp_path)) == [0, 2, 9, 10]
    assert answer_files(tmp_path / "nowhere") == {}
