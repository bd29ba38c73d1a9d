"""The figures of a diagnosis."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from reflux.trainer.runs.plotting import DIRECTIONS, WRITERS, legend, panels, save_figure

from .metrics import DIVERGENCES
from .results import Diagnosis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_diagnosis(folder: Path, diagnosis: Diagnosis) -> dict[str, str]:
    """Writes the plots; file name -> title."""
    plots: list[tuple[str, str, Callable[[Diagnosis], Figure]]] = [
        ("tail.png", "How the token KL builds up over the classes", _tail),
        ("types.png", "Which tokens carry the KL", _types),
        ("positions.png", "KL along the texts", _positions),
    ]
    for name, _, draw in plots:
        save_figure(draw(diagnosis), folder / name)
    return {name: title for name, title, _ in plots}


def _tail(diagnosis: Diagnosis) -> "Figure":
    figure, axes = panels(2)
    curves, gradients = axes[0]
    for d in DIVERGENCES:
        t, line = diagnosis.tail[d], {"marker": "o", "ms": 3, "color": DIRECTIONS[d]}
        whole = t.bucket[-1] or 1.0
        bucket, raw = ([x / whole for x in values] for values in (t.bucket, t.raw))
        curves.plot(t.k, bucket, label=f"{d}, with the tail bucket", **line)
        curves.plot(t.k, raw, ls=":", color=DIRECTIONS[d], label=f"{d}, first terms only")
        curves.axvline(t.top_k, color=DIRECTIONS[d], lw=0.8, alpha=0.5)
        gradients.plot(t.k, t.gradient_tail, label=d, **line)
    curves.set(xscale="log", xlabel="top k", ylabel="fraction of the full KL")
    gradients.set(xscale="log", xlabel="top k", ylabel="gradient outside it", ylim=(0, None))
    for ax in axes[0]:
        legend(ax)
    return figure


def _types(diagnosis: Diagnosis) -> "Figure":
    figure, axes = panels(2, width=4.6)
    for ax, d in zip(axes[0], DIVERGENCES):
        types = diagnosis.tail[d].types
        for i, (heights, label) in enumerate(
            (
                ([t.fraction for t in types.values()], "all classes"),
                ([t.fraction_at_10 for t in types.values()], "first 10"),
                ([t.frequency for t in types.values()], "frequency"),
            )
        ):
            ax.bar([x + 0.27 * i for x in range(len(types))], heights, 0.25, label=label)
        middles = [x + 0.27 for x in range(len(types))]
        ax.set_xticks(middles, list(types), rotation=45, ha="right", fontsize=8)
        ax.set_title(f"{d} KL")
    legend(axes[0, 0])
    return figure


def _positions(diagnosis: Diagnosis) -> "Figure":
    figure, axes = panels(2)
    for ax, d in zip(axes[0], DIVERGENCES):
        for source, values in diagnosis.off_policy.decile[d].items():
            label = f"on {source} prefixes"
            ax.plot(range(5, 100, 10), values, marker="o", ms=3, color=WRITERS[source], label=label)
        ax.set(xlabel="% of the text's bytes", ylabel=f"{d} KL, nats/token", ylim=(0, None))
    legend(axes[0, 0])
    return figure
