"""The one way to matplotlib, and the one style of all figures: panels, colours, names that a reader
knows, reference lines, seeds as points, and what is missing drawn as missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # also for the signatures of what draws
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

STYLE: Any = {  # of matplotlib, whose type names every key there is
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "hatch.color": "#9ca3af",
    "hatch.linewidth": 0.7,
}
BLUE, RED, AMBER, GREY, GREEN = "#2563eb", "#dc2626", "#d97706", "#6b7280", "#15803d"
TEACHERS = {"original": GREY, "distillable": BLUE, "undistillable": RED, "task_only": AMBER}
WRITERS = {"student": RED, "teacher": BLUE, "dataset": GREY}  # of texts, in a diagnosis
DIRECTIONS = {"forward": BLUE, "reverse": RED}
NAMES = {  # labels of matrices -> what a figure says
    "task_only": "task only, eta = 0",
    "sft": "SFT",
    "seq_kd": "sequence KD",
    "seq_kd_filtered": "sequence KD,\ncorrect only",
    "seq_kd_long": "sequence KD,\nlonger",
    "seq_kd_new_prompts": "sequence KD,\nnew prompts",
    "gkd_on_policy": "GKD,\non-policy",
    "gkd_reverse": "GKD,\nreverse KL",
    "kd_forward": "token KD,\nforward KL",
    "kd_reverse": "token KD,\nreverse KL",
    "cross_tokenizer": "another\ntokenizer",
    "deeper_student": "sequence KD,\ndeeper student",
    "answers_only": "answers rewritten,\neasy order",
    "seq_kd_cold": "sequence KD,\ntemperature 0.5",
    "seq_kd_greedy": "sequence KD,\nlikeliest text",
    "seq_kd_more": "sequence KD,\n4 x the text",
    "mixed_teachers": "half from\nthe original",
    "kd_top1": "token KD,\ntop 1",
    "kd_top5": "token KD,\ntop 5",
    "kd_top20": "token KD,\ntop 20",
    "kd_top64": "token KD,\ntop 64",
    "gkd_forward": "GKD,\nforward KL",
    "gkd_jsd": "GKD,\nJSD",
    "cross_class": "another tokenizer,\nclasses",
    "wider_student": "sequence KD,\nwider student",
    "stronger_start": "sequence KD,\nstronger start",
    "learnable_only": "only what is\nin the easy order",
}
MISSING = "not run"
SEED_SIZE = 9  # points^2


@dataclass(frozen=True)
class ReferenceLine:
    """A value to compare with, of draw_line. value: None where it is not known; words say why."""

    value: float | None
    words: str
    style: str = "--"


def panels(
    columns: int, rows: int = 1, width: float = 4.2, height: float = 3.2
) -> "tuple[Figure, np.ndarray]":
    """A figure, and its axes [rows, columns] in the style. width, height: of one panel, inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows))
        return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: "Figure", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """In the format that the ending of the path names, without the margin. metadata: of a PNG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=120, bbox_inches="tight", metadata=dict(metadata or {}))


def readable(name: str) -> str:
    """The name of a label as a figure says it; may have two lines."""
    return NAMES.get(name, name.replace("_", " "))


def legend(ax: "Axes", **options: Any) -> None:
    ax.legend(**{"frameon": False, "fontsize": STYLE["legend.fontsize"], **options})


def draw_missing(ax: "Axes", x: float, width: float, words: str = MISSING) -> None:
    """A hatched place with a word, from the bottom of the panel up: no value of 0."""
    low, high = ax.get_ylim()
    height = 0.3 * (high - low)
    ax.bar(x, height, width, bottom=low, fill=False, hatch="////", edgecolor="#9ca3af", lw=0.6)
    middle = low + height / 2
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    ax.text(x, middle, words, rotation=90, ha="center", va="center", fontsize=7, bbox=box)


def draw_line(ax: "Axes", line: ReferenceLine) -> None:
    """A horizontal line to compare with; its words go to the legend, without a line where there is
    no value.
    """
    if line.value is None:
        ax.plot([], [], " ", label=line.words)
        return
    label = f"{line.words} ({line.value:.2f})"
    ax.axhline(line.value, color="black", lw=0.9, ls=line.style, alpha=0.7, label=label)


def draw_seeds(ax: "Axes", x: float, values: Sequence[float], width: float = 0.0) -> None:
    """Each seed as a point, side by side within `width`, where there is more than one."""
    if len(values) > 1:
        places = np.linspace(x - width / 2, x + width / 2, len(values)) if width else [x] * 9
        ax.scatter(
            places[: len(values)],
            values,
            s=SEED_SIZE,
            color="white",
            edgecolor="black",
            lw=0.6,
            zorder=3,
        )
