"""Runs that are disturbed, and what they have to leave: the same as the undisturbed run."""

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fork_server import Ended, ForkServer, Request
from runs import REWARD_VOWELS, config, numbers, write_data

from reflux.trainer.config.loader import to_toml
from reflux.trainer.runs.logger import load_run

EXACT = {"name": "exact", "options": {"marker": "=>"}, "max_failed": 1.0}
TRAINING = {
    "steps": 6,
    "checkpoint": {"interval": 2, "keep_latest_k": 3},
    "export": {"enable": True, "dtype": "float32"},
    "log": {"quiet": True, "samples_every": 1},
}
EVALUATED = {"every": 3, "limit": 2, "samples": 0}
# by phase: tables over those of runs.table
PHASES: dict[str, dict[str, Any]] = {
    "calibrate": TRAINING | {"task": EXACT | {"name": REWARD_VOWELS, "options": {}}},
    "distill": TRAINING,
    "evaluate": {"task": EXACT, "rollout": {"max_tokens": 14}},
    "diagnose": {"task": EXACT, "data": {"limit": 3}},
    # a guard ends it after a step or two, and the weights before are exported
    "stopped": TRAINING | {"phase": "calibrate", "guard": {"kl_budget": 1e-3}},
}
EXIT_CODES = {"stopped": 4}
TRAINED = ("calibrate", "distill")
# a run may leave these otherwise: times of day and durations, the state of the code's repository
OWN_TO_A_RUN = ("run.jsonl", "summary.json", "config.toml", "code.diff", "inputs.json")


def budget(short: int, ci: int, long: int) -> int:
    """How many of a kind of fault are tried, by REFLUX_FAULTS = short | ci | long."""
    return {"short": short, "ci": ci, "long": long}[os.environ.get("REFLUX_FAULTS", "short")]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves that has to be equal, to the last digit and byte."""

    steps: tuple[Mapping[str, Any], ...]
    results: tuple[Mapping[str, Any], ...]  # the events eval and accept
    files: Mapping[str, bytes]  # by path in the run folder
    checkpoints: tuple[str, ...]

    def differences(self, other: "Outcome") -> list[str]:
        out = []
        for name in ("steps", "results", "checkpoints"):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                out.append(f"{name}: {mine} against {others}")
        for path in sorted({*self.files, *other.files}):
            if self.files.get(path) != other.files.get(path):
                lengths = [len(o.files[path]) if path in o.files else None for o in (self, other)]
                out.append(f"{path}: {lengths[0]} bytes against {lengths[1]}, other content")
        return out


def outcome(folder: Path) -> Outcome:
    run = load_run(folder)
    assert run.summary is not None, f"{folder}: no summary.json"
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    checked = [p for p in files if p.parts[0] not in (*OWN_TO_A_RUN, "checkpoint")]
    checkpoint = folder / "checkpoint"
    # a run without steps that is started again measures again: what is equal counts once
    results = [numbers(e) for e in run.events if e["event"] in ("eval", "accept")]
    results = [r for i, r in enumerate(results) if r not in results[:i]]
    return Outcome(
        steps=tuple(numbers(step) for step in run.steps),
        results=tuple(results),
        files={str(p): (folder / p).read_bytes() for p in checked},
        checkpoints=tuple(sorted(os.listdir(checkpoint))) if checkpoint.exists() else (),
    )


def notes_beside(directory: Path) -> Path:
    """Not inside: a run there may be moved, or its disk be full."""
    notes = directory.parent.parent / f"{directory.parent.name}-{directory.name}-notes"
    notes.mkdir()
    return notes


@dataclass
class Place:
    """A directory with the files of one run: run.toml, data.jsonl, run/ and cache/. `notes`: the
    folder for what the runs say.
    """

    directory: Path
    server: ForkServer
    notes: Path
    code: int = 0  # of a run that ends as planned
    arguments: tuple[str, ...] = ("--config", "run.toml")
    ends: list[Ended] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.directory / "run"

    def run(
        self,
        *sets: str,
        kill_after: float | None = None,
        kill_at: int = 0,
        delay: float = 0.0,
        largest_file: int = 0,
        limit: float = 120,
    ) -> Ended:
        """The same command again, the options `sets` over the file's."""
        over = [word for text in sets for word in ("--set", text)]
        request = Request(
            (*self.arguments, *over),
            str(self.directory),
            str(self.notes / "output.txt"),
            kill_at,
            delay,
            largest_file,
            str(self.notes / "changes.txt"),
        )
        ended = self.server.run(request, kill_after, limit)
        self.ends.append(ended)
        return ended

    def ends_well(self, *sets: str) -> Outcome:
        ended = self.run(*sets)
        assert ended.code == self.code, self.story()
        return outcome(self.folder)

    def start(self) -> int:
        """The process id of the run, which goes on."""
        words = (*self.arguments,), str(self.directory), str(self.notes / "output.txt")
        return self.server.start(Request(*words))

    @property
    def changes(self) -> int:
        """How many changes of files the last run made that ended by itself."""
        return int((self.notes / "changes.txt").read_text())

    def story(self) -> str:
        """What the runs here said, the last one whole."""
        codes = ", ".join(str(e.code) for e in self.ends)
        return f"{self.directory}: exit codes {codes}; {self.ends[-1].output[-3000:]}"


def make_place(server: ForkServer, talkers: Path, directory: Path, phase: str, **over) -> Place:
    """A run that has not started. All names in its configuration are relative, so that runs in
    different directories are the same run.
    """
    directory.mkdir(parents=True)
    write_data(directory)
    tables = PHASES[phase] | {"on_existing_run": "resume"} | over
    code, phase = EXIT_CODES.get(phase, 0), tables.pop("phase", phase)
    section = "eval" if phase == "evaluate" else "data"
    tables[section] = {"source": "data.jsonl"} | tables.get(section, {})
    cfg = config(talkers, directory / "run", phase, **tables)
    text = to_toml(cfg).replace(f'folder = "{directory}/run"', 'folder = "run"')
    (directory / "run.toml").write_text(text)
    return Place(directory, server, notes_beside(directory), code)


def copy_place(place: Place, directory: Path) -> Place:
    shutil.copytree(place.directory, directory)
    return Place(directory, place.server, notes_beside(directory), place.code)


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbed: what it left, its number of changes and its duration."""

    outcome: Outcome
    changes: int
    seconds: float
    place: Place


def undisturbed(place: Place) -> Undisturbed:
    left = place.ends_well()
    return Undisturbed(left, place.changes, place.ends[-1].seconds, place)


def draw_kill(rng: random.Random, whole: Undisturbed) -> dict[str, Any]:
    """Half of the kills at any time; the others at the change of a file, or up to 20 ms after."""
    if rng.random() < 0.5:
        return {"kill_after": rng.uniform(0.02, whole.seconds)}
    delay = 0.0 if rng.random() < 0.5 else rng.uniform(0.0005, 0.02)
    return {"kill_at": rng.randint(1, whole.changes), "delay": delay}


def write_record(path: Path, faults: list[dict[str, Any]], command: list[str]) -> None:
    """One JSON file: commit, command, versions, and each fault with its seed and its end."""
    import platform
    import subprocess
    from importlib.metadata import version

    root = Path(__file__).parents[1]
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "transformers", "torchtitan", "hypothesis")
    table = {
        "commit": commit,
        "command": " ".join(command),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: version(name) for name in packages},
        "tried": len(faults),
        "lost": sum(not f["survived"] for f in faults),
        "faults": faults,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
