# %% [markdown]
# # The first hour
# A real small language model through the four things that `reflux` does: **check**, **diagnose**,
# **distil**, **report**. About 8 minutes of one CPU core; the rest of the hour is reading. `make
# first-hour` sets up everything and runs this page; as a notebook it is `docs/first_hour.ipynb`,
# as a script `docs/first_hour.py`. Both hold the same cells.
#
# The teacher is SmolLM2-135M-Instruct, out of a registry package (4-bit weights, written out in
# float32). The student is a copy of it that keeps nine of 30 layers: small, with the same
# tokenizer, and unable to write a sentence at first. The task is sums of two digits. Nothing here
# is a result about the method: it is one seed, 12 sums, and a task that the teacher itself half
# knows. The outputs are those of one run with the real model on a CPU.

# %%
import os
import subprocess
import sys
from pathlib import Path

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "configs/first_hour").is_dir())
os.chdir(ROOT)
HOUR = Path("runs/first_hour")  # everything that is written
TINY = bool(os.environ.get("FIRST_HOUR_TINY"))  # random models, to see the steps in a minute


def python(*words: str, name: str) -> None:
    """A command, as in a terminal. What it printed is kept in logs/, and shown again where it is
    done already: a second start of this page goes on where the first one stopped.
    """
    log = HOUR / "logs" / f"{name}.txt"
    if not log.exists():
        plain = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
        command = [sys.executable, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=plain)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout)
    print("$ python", *words)
    lines = [x for x in log.read_text().splitlines() if "left at most" not in x]  # no progress
    print("\n".join(lines[-25:]))


def run(name: str, config: str, *sets: str, flags: tuple[str, ...] = ()) -> None:
    """One run of the trainer with a configuration of configs/first_hour."""
    file = f"configs/first_hour/{config}.toml"
    options = [word for value in (*sets, "on_existing_run=resume") for word in ("--set", value)]
    python("trainer/main.py", "--config", file, *options, *flags, name=name)


def show(path: Path) -> None:
    """A picture in a notebook; its path elsewhere."""
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(filename=str(path)))
    print(path)


# %% [markdown]
# ## The models
# Two folders in Hugging Face's format, made once: the package's file is read, compared with what
# was written, and cut.

# %%
python(
    "-m",
    "reflux.trainer.studies.first_hour",
    *(["--tiny"] if TINY else []),
    "--out",
    str(HOUR / "models"),
    name="models",
)

# %% [markdown]
# ## Check
# Before a run costs anything, `--check` tries what it is made of: tokenizers, templates with the
# loss mask, data, grader, and each model on a few rows. It writes nothing. Look at the example: it
# shows which tokens are learned.

# %%
run("check", "distil", flags=("--check",))

# %% [markdown]
# ## Diagnose
# How far apart are teacher and student, and which of three traps are they in? The diagnosis
# changes no weights. An unhealed copy is far from its teacher: expect a large KL per token, and
# the advice to bring the student nearer first.

# %%
run(
    "teacher",
    "evaluate",
    "model.path=runs/first_hour/models/teacher",
    "folder=runs/first_hour/teacher",
)
run("diagnosis_before", "diagnose")

# %%
report = (HOUR / "diagnosis_before/report.md").read_text()
print(report[:2500])
show(HOUR / "diagnosis_before/positions.png")

# %% [markdown]
# ## Distil
# The teacher answers 12 sums a step, and the student learns its texts by likelihood
# (sequence-level KD). Every fifth step the student is asked 12 sums. Ctrl-C in a terminal saves
# the step; the command that is printed then goes on. 240 texts are few: what to look for is the
# falling loss. The student writes words now; it does not add yet.

# %%
run("distil", "distil")

# %%
from reflux.trainer.studies.first_hour import draw_distillation  # noqa: E402

show(draw_distillation(HOUR / "distil", HOUR / "distil.png"))

# %% [markdown]
# ## Diagnose again
# The student of the export, a folder like any other model's. What has changed is the distance:
# compare the KL per token of the two reports. What has not is the number of layers, and the advice
# is still to go on with likelihood on the teacher's texts.

# %%
run(
    "diagnosis_after",
    "diagnose",
    "model.path=runs/first_hour/distil/export",
    "folder=runs/first_hour/diagnosis_after",
)
print((HOUR / "diagnosis_after/report.md").read_text()[:2500])
show(HOUR / "diagnosis_after/positions.png")

# %% [markdown]
# ## Report
# Accuracy of the teacher and of the student before and after, from the logs that the runs left;
# and where the pictures and texts are.

# %%
from reflux.trainer.runs.logger import load_run  # noqa: E402


def accuracies(folder: Path) -> list[float]:
    """Greedy, of every evaluation in the log."""
    events = load_run(folder).events
    return [e["eval/greedy"] for e in events if e["event"] == "eval" and "eval/greedy" in e]


teacher, student = accuracies(HOUR / "teacher"), accuracies(HOUR / "distil")
print(f"correct sums: teacher {teacher[-1]:.0%}, student {student[0]:.0%} -> {student[-1]:.0%}")
for name in ("distil/report.html", "diagnosis_before/heatmap.html", "diagnosis_after/heatmap.html"):
    print(HOUR / name)

# %% [markdown]
# ## On from here
# - Another objective: `--set distill.objective=kl --set distill.on_policy=1.0` compares
#   distributions on the student's own texts.
# - Adapters in place of all weights: `--set lora.rank=16` ([lora.md](lora.md)).
# - Your own models, data and task: [use.md](use.md). A calibrated teacher: `make quickstart`, then
#   [method.md](method.md).
