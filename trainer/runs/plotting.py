"""The one way to matplotlib: a grid of panels, and its file."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # also for the signatures of what draws
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure


def panels(
    columns: int, rows: int = 1, width: float = 4.2, height: float = 3.2
) -> "tuple[Figure, np.ndarray]":
    """A figure, and its axes [rows, columns] with light horizontal lines. width, height: of one
    panel, inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    return figure, axes


def save_figure(figure: "Figure", path: Path) -> None:
    """In the format that the ending of the path names, without the margin."""
    figure.savefig(path, dpi=120, bbox_inches="tight")
