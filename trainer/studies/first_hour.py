"""The models and the picture of docs/first_hour.py.

    python -m reflux.trainer.studies.first_hour --out FOLDER [--tiny]

Writes FOLDER/teacher, SmolLM2-135M-Instruct out of its registry package (real_pair.py), and
FOLDER/student, a copy that keeps nine of its 30 layers: small, of the same tokenizer, and at first
unable to write a sentence. With --tiny both are random models of a few thousand weights, to see the
steps without the package.
"""

import argparse
import shutil
from pathlib import Path

from reflux.trainer.runs.logger import load_run
from reflux.trainer.runs.plotting import panels, save_figure

from . import debug_models, real_pair
from .cut_layers import cut

KEPT = (0, 1, 4, 8, 12, 17, 22, 28, 29)  # of 30: the first and last layers matter most
TINY = "llama3"  # SmolLM2's architecture


def write_models(out: Path, tiny: bool) -> None:
    """Teacher and student; folders that are there are kept."""
    teacher, student = out / "teacher", out / "student"
    if not teacher.exists() and tiny:
        debug_models.write_models(out / "debug")
        shutil.copytree(out / "debug" / TINY, teacher)
    elif not teacher.exists():
        source = real_pair.SOURCES[0]
        real_pair.require_packages((source,))
        real_pair.convert(source, out)
        (out / source.folder).rename(teacher)
    cut(teacher, student, KEPT[:1] if tiny else KEPT)


def draw_distillation(folder: Path, out: Path) -> Path:
    """A picture of a distillation in `folder`: loss by step, and greedy accuracy of its
    evaluations.
    """
    run = load_run(folder)
    evaluations = [e for e in run.events if e["event"] == "eval" and "eval/greedy" in e]
    figure, ((loss, accuracy),) = panels(2)
    loss.plot([s["step"] for s in run.steps], [s["loss"] for s in run.steps])
    loss.set(
        xlabel="step", ylabel="loss, nats per token", title="likelihood of the teacher's texts"
    )
    steps = [e["step"] for e in evaluations]
    accuracy.plot(steps, [e["eval/greedy"] for e in evaluations], marker="o")
    accuracy.set(xlabel="step", ylabel="correct sums, greedy", title="the student", ylim=(0, 1))
    figure.tight_layout()
    save_figure(figure, out)
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.first_hour",
        description="Write the teacher and the student of docs/first_hour.py.",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--tiny", action="store_true", help="random models of a few thousand weights"
    )
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        write_models(args.out, args.tiny)
    except ValueError as error:
        parser.error(str(error))
    print(f"teacher and student: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
