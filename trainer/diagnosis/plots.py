"""The figures of a diagnosis."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflux.trainer.runs.plotting import panels, save_figure

from .measure import DIRECTIONS

COLOURS = {
    "student": "#dc2626",
    "teacher": "#2563eb",
    "dataset": "#6b7280",
    "forward": "#2563eb",
    "reverse": "#dc2626",
}


def plot_diagnosis(folder: Path, found: Mapping[str, Any]) -> dict[str, str]:
    """Writes the plots; file name -> title."""
    made = {}
    for name, title, draw in (
        ("tail.png", "How the token KL builds up over the classes", _tail),
        ("types.png", "Which tokens carry the KL", _types),
        ("positions.png", "KL along the texts", _positions),
    ):
        figure = draw(found)
        save_figure(figure, folder / name)
        made[name] = title
    return made


def _tail(found: Mapping[str, Any]):
    figure, axes = panels(2)
    for d in DIRECTIONS:
        t = found["tail"][d]
        whole = t["bucket"][-1] or 1.0
        axes[0, 0].plot(
            t["k"],
            [x / whole for x in t["bucket"]],
            marker="o",
            ms=3,
            color=COLOURS[d],
            label=f"{d}, with the tail's bucket",
        )
        axes[0, 0].plot(
            t["k"],
            [x / whole for x in t["raw"]],
            ls=":",
            color=COLOURS[d],
            label=f"{d}, first terms only",
        )
        axes[0, 1].plot(t["k"], t["gradient_tail"], marker="o", ms=3, color=COLOURS[d], label=d)
        axes[0, 0].axvline(t["k_share"], color=COLOURS[d], lw=0.8, alpha=0.5)
    axes[0, 0].set(xscale="log", xlabel="kept classes", ylabel="share of the full KL")
    axes[0, 1].set(
        xscale="log", xlabel="kept classes", ylabel="gradient outside them", ylim=(0, None)
    )
    axes[0, 0].legend(frameon=False, fontsize=7)
    axes[0, 1].legend(frameon=False, fontsize=7)
    return figure


def _types(found: Mapping[str, Any]):
    figure, axes = panels(2, width=4.6)
    for ax, d in zip(axes[0], DIRECTIONS):
        types = found["tail"][d]["types"]
        for i, (key, label) in enumerate(
            (("share", "all classes"), ("share_at_10", "first 10"), ("frequency", "frequency"))
        ):
            ax.bar(
                [x + 0.27 * i for x in range(len(types))],
                [t[key] for t in types.values()],
                0.25,
                label=label,
            )
        ax.set_xticks(
            [x + 0.27 for x in range(len(types))], list(types), rotation=45, ha="right", fontsize=7
        )
        ax.set_title(f"{d} KL", fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=7)
    return figure


def _positions(found: Mapping[str, Any]):
    figure, axes = panels(2)
    for ax, d in zip(axes[0], DIRECTIONS):
        for writer, values in found["off_policy"]["decile"][d].items():
            ax.plot(
                range(5, 100, 10),
                values,
                marker="o",
                ms=3,
                color=COLOURS[writer],
                label=f"on {writer} prefixes",
            )
        ax.set(xlabel="% of the text's bytes", ylabel=f"{d} KL, nats/token", ylim=(0, None))
    axes[0, 0].legend(frameon=False, fontsize=7)
    return figure
