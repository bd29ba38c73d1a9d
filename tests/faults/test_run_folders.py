"""A run folder in any sequence of starts, kills, resumes, other configurations and moves: what is
finished stays, another experiment is refused, and in the end it equals an undisturbed run.
"""

import os
import tempfile
from pathlib import Path

import pytest
from fault_runs import budget, copy_place, make_place
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from reflux.trainer.runs.logger import load_run

OTHER = ("seed=1", "optim.lr=0.5", "rollout.group=2", "distill.divergence='forward'")
HARMLESS = ("checkpoint.keep_latest_k=5", "log.quiet=false", "guard.kl_budget=0.0")


def manifests(folder: Path) -> set[str]:
    return {p.parent.name for p in folder.glob("checkpoint/step-*/manifest.json")}


def machine(blank, clean):
    """The state machine over copies of the run `blank`, that ends like `clean`."""

    class RunFolder(RuleBasedStateMachine):
        @initialize()
        def start(self):
            self.temporary = tempfile.TemporaryDirectory()
            (Path(self.temporary.name) / "x").mkdir()
            self.place = copy_place(blank, Path(self.temporary.name) / "x" / "a")
            self.moves = 0

        @rule(
            at=st.integers(1, clean.changes),
            delay=st.sampled_from((0.0, 0.001, 0.01)),
            sets=st.sampled_from(((), *((text,) for text in HARMLESS))),
        )
        def kill(self, at, delay, sets):
            kill_in(self.place, sets, at, delay)

        @rule(other=st.sampled_from(OTHER))
        def another_experiment(self, other):
            if not (self.place.folder / "config.toml").exists():
                return
            before = snapshot(self.place.folder)
            ended = self.place.run(other)
            assert ended.code == 2 and "other values of" in ended.output, self.place.story()
            assert snapshot(self.place.folder) == before, "a refused run wrote into the folder"

        @rule()
        def not_resumed(self):
            if not (self.place.folder / "run.jsonl").exists():
                return
            ended = self.place.run("on_existing_run='fail'")
            assert ended.code == 2 and "holds a run already" in ended.output, self.place.story()

        @rule(last=st.sampled_from((2, 3, 4)))
        def fewer_steps(self, last):
            """The run up to a step, as if no more had been planned."""
            if manifests(self.place.folder):
                return
            ended = self.place.run(f"steps={last}", "export.enable=false")
            assert ended.code == 0, self.place.story()
            assert len(load_run(self.place.folder).steps) == last

        @rule()
        def move(self):
            self.moves += 1
            target = Path(self.temporary.name) / f"moved-{self.moves}"
            os.rename(self.place.directory, target)
            self.place.directory = target

        def teardown(self):
            if hasattr(self, "place"):
                with self.temporary:
                    end_like(clean, self.place)

    return RunFolder


def kill_in(place, sets, at, delay) -> None:
    before = manifests(place.folder)
    ended = place.run(*sets, kill_at=at, delay=delay)
    assert ended.code in (-9, 0), place.story()
    newest = max(before, default=None)
    assert newest is None or newest in manifests(place.folder), "a checkpoint is lost"


def end_like(clean, place) -> None:
    """The place ends with what the run `clean` ended with."""
    differences = clean.outcome.differences(place.ends_well())
    # of a shorter run there may be one more: its last step was saved too
    differences = [d for d in differences if not d.startswith("checkpoints")]
    assert not differences, differences


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.filterwarnings("ignore")
def test_any_sequence(server, talkers, whole, tmp_path, record_property):
    examples = budget(3, 6, 40)
    record_property("fault", f"{examples} sequences of kills, changes and moves")
    blank = make_place(server, talkers, tmp_path / "blank", "distill")
    run_state_machine_as_test(
        machine(blank, whole("distill")),
        settings=settings(
            max_examples=examples,
            stateful_step_count=4,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
