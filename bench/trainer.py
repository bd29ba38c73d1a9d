"""This trainer against TRL on the same models, texts and machine, step by step in turns.

    python -m bench trainer                     # all jobs; a record and a plot
    python -m bench trainer --jobs sft grpo --rounds 3 --out FOLDER

Two processes a job, one in build/trl/.venv (made at the first call, TRL pinned), each holding its
models; a round is one step of each, in forward and backward order by turns. CPU seconds are what is
compared: other work on the machine does not count in them. The first step of each is a warm-up.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from .records import FOLDER, ROOT, device, write
from .trainer_jobs import GROUP, JOBS, NEW_TOKENS, PROMPTS, make_assets

TRL = "trl==1.16.0"
ENVIRONMENT = ROOT / "build" / "trl" / ".venv"
OURS = (*JOBS, "calibrate")
PARTS = ("cpu_s", "wall_s", "sample_cpu_s", "train_cpu_s", "tokens", "peak_mib")


def trl_python() -> str:
    """The interpreter of TRL's environment, which sees the packages of this one."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        site = subprocess.run(
            [str(python), "-c", "import site; print(site.getsitepackages()[0])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        import torch

        packages = Path(torch.__file__).resolve().parents[1]
        Path(site, "packages.pth").write_text(f"{packages}\n")
        subprocess.run([str(python), "-m", "pip", "install", "-q", TRL], check=True)
        (ENVIRONMENT / "ready").touch()
    return str(python)


class WorkerEnded(Exception):
    """With the end of what it printed."""


class Worker:
    """A process that trains one step when it is asked to."""

    def __init__(self, python: str, file: str, job: str, assets: Path, runs: Path):
        self.name = f"{Path(file).stem} {job}"
        self._errors = open(runs / f"{Path(file).stem}-{job}.txt", "w+")
        self._process = subprocess.Popen(
            [python, str(ROOT / "bench" / file), job, str(assets), str(runs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        while self._line() != "ready":
            pass

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise WorkerEnded(f"{self.name} ended:\n{self._errors.read()[-3000:]}")
        return line.strip()

    def step(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        report: dict[str, float] = {}
        while "cpu_s" not in report:
            line = self._line()
            report |= json.loads(line) if line.startswith("{") else {}
        return report

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._errors.close()


def measure(job: str, workers: dict[str, Worker], rounds: int) -> dict:
    """One row: medians of every part, by side, and all CPU seconds."""
    steps: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    for round_ in range(rounds + 1):
        for side in list(workers)[:: 1 if round_ % 2 else -1]:
            report = workers[side].step()
            if round_:  # the first one compiles and fills caches
                steps[side].append(report)
    return {"job": job, "sides": {side: summary(reports) for side, reports in steps.items()}}


def summary(reports: list[dict[str, float]]) -> dict:
    """Medians; where only sampling was timed, training is the rest of the step."""
    for r in reports:
        if "sample_cpu_s" in r:
            r.setdefault("train_cpu_s", r["cpu_s"] - r["sample_cpu_s"])
    median = {k: statistics.median(r[k] for r in reports) for k in PARTS if k in reports[0]}
    return median | {"cpu_s_all": [round(r["cpu_s"], 4) for r in reports]}


def show(row: dict) -> str:
    """One line for people."""
    if "failed" in row:
        return f"{row['job']:<12} failed: {row['failed']}"
    (a, first), (b, second) = row["sides"].items()
    parts = [f"{row['job']:<12} {a} {first['cpu_s']:.2f} s, {b} {second['cpu_s']:.2f} s CPU"]
    for part, what in (("cpu_s", "whole"), ("sample_cpu_s", "sampling"), ("train_cpu_s", "rest")):
        if part in first and part in second:
            parts.append(f"{what} {second[part] / first[part]:.2f}x")
    parts.append(f"peak {first['peak_mib']:.0f} and {second['peak_mib']:.0f} MiB")
    return ", ".join(parts)


def plot(rows: list[dict], path: Path) -> Path:
    """CPU seconds of a step of TRL over ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "trl" in row["sides"]]
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(rows) + 1.2))
    for k, part in enumerate(("cpu_s", "train_cpu_s")):
        values = [
            (i, row["sides"]["trl"][part] / row["sides"]["ours"][part])
            for i, row in enumerate(rows)
            if part in row["sides"]["trl"] and part in row["sides"]["ours"]
        ]
        label = "whole step" if part == "cpu_s" else "all but sampling"
        axes.barh([i + 0.4 * k for i, _ in values], [x for _, x in values], 0.4, label=label)
    axes.set(yticks=range(len(rows)), yticklabels=[row["job"] for row in rows])
    axes.set_xlabel(f"CPU time of a step of {TRL} / ours")
    axes.axvline(1, color="black", lw=1)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path


def run_jobs(chosen: list[str], rounds: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        assets, python = Path(folder), trl_python()
        make_assets(assets)
        for job in chosen:
            ours = (sys.executable, "trainer_ours.py")
            sides = {"ours": (*ours, job), "trl": (python, "trainer_trl.py", job)}
            if job == "calibrate":
                sides = {"grpo": (*ours, "grpo"), "calibrate": (*ours, job)}
            rows.append(_row(job, sides, assets, rounds))
            print(show(rows[-1]), flush=True)
    return rows


def _row(job: str, sides: dict[str, tuple[str, str, str]], assets: Path, rounds: int) -> dict:
    """A job's row; what does not run is a row that says so."""
    workers: dict[str, Worker] = {}
    try:
        for side, how in sides.items():
            workers[side] = Worker(*how, assets, assets)
        return measure(job, workers, rounds)
    except WorkerEnded as error:
        return {"job": job, "failed": str(error)[-1000:], "sides": {}}
    finally:
        for worker in workers.values():
            worker.close()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench trainer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", nargs="+", default=list(OURS), choices=OURS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER")
    args = parser.parse_args(arguments)
    rows = run_jobs(args.jobs, args.rounds)
    shape = {"texts": PROMPTS * GROUP, "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    content = {**device(), "peer": TRL, "threads": 1, "rounds": args.rounds, **shape, "rows": rows}
    path = write("trainer_cpu", content, args.out)
    print("Recorded in", path, plot(rows, path.with_suffix(".png")))
