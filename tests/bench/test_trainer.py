"""The comparison with TRL: turns, medians, the jobs' configurations, the texts."""

import json
import sys
from pathlib import Path

import pytest

from bench import trainer_jobs
from bench.trainer import OURS, measure, show, summary

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))


class Worker:
    def __init__(self, name, calls, seconds):
        self.name, self.calls, self.seconds = name, calls, list(seconds)

    def step(self):
        self.calls.append(self.name)
        cpu = self.seconds.pop(0)
        return {"cpu_s": cpu, "wall_s": 2 * cpu, "sample_cpu_s": cpu / 4, "peak_mib": 100.0}


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls = []
    workers = {
        "ours": Worker("ours", calls, [9, 1, 2, 3]),
        "trl": Worker("trl", calls, [99, 4, 4, 6]),
    }
    row = measure("sft", workers, rounds=3)
    assert calls == ["trl", "ours", "ours", "trl", "trl", "ours", "ours", "trl"]
    ours, trl = row["sides"].values()
    assert (ours["cpu_s"], ours["wall_s"], trl["cpu_s"]) == (2, 4, 4)
    assert ours["train_cpu_s"] == 1.5 and ours["cpu_s_all"] == [1, 2, 3]
    assert "whole 2.00x" in show(row) and "rest 2.00x" in show(row)


def test_a_part_that_only_one_side_times_is_not_compared():
    reports = [{"cpu_s": 1.0, "wall_s": 1.0, "peak_mib": 5.0}]
    assert "train_cpu_s" not in summary(reports)


@pytest.mark.parametrize("job", OURS)
def test_every_job_has_a_configuration(job, tmp_path):
    import trainer_ours

    cfg = trainer_ours.config(job, tmp_path, tmp_path / "run")
    texts = cfg.rollout.prompts * (cfg.rollout.group if cfg.rollout.prompts < 16 else 1)
    assert texts == trainer_jobs.PROMPTS * trainer_jobs.GROUP
    assert (cfg.calibration.eta != 0) == (job == "calibrate")


def test_a_response_fills_the_limit_with_its_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_jobs, "_save_model", lambda folder, *_, **__: folder.mkdir())
    monkeypatch.setattr(trainer_jobs, "VOCAB", 700)
    trainer_jobs.make_assets(tmp_path)
    from reflux.trainer.data.chat import Chat

    chat = Chat(str(tmp_path / "student"))
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert len(rows) == 256 and chat.vocab_size == 700
    for row in rows[:20]:
        assert len(chat.encode(row["response"])) == trainer_jobs.NEW_TOKENS - 1
        assert len(chat.encode(row["prompt"])) == trainer_jobs.PROMPT_WORDS
