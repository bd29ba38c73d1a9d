"""Plots of a record: python -m bench.plots bench/records/<record>.json

Bars of ours, floor and peers per case; time and memory against the number of tokens where the
record sweeps it; the roofline, with one point per case.
"""

import argparse
import json
from pathlib import Path

from .cases import BANDWIDTH, FLOPS


def _measured(path: Path) -> list[dict]:
    return [
        row
        for row in json.loads(path.read_text())["rows"]["ours"]
        if "not_measured" not in row and row.get("op") != "tune"
    ]


def _p50(row: dict) -> dict[str, float]:
    return {name: ms[1] for name, ms in row["ms_p20_p50_p80"].items()}


def bars(rows: list[dict], axes) -> None:
    """Time over the floor, log scale: 1 is what the hardware allows."""
    names = sorted({name for row in rows for name in _p50(row)} - {"ours"})
    height = 0.8 / (len(names) + 1)
    for k, name in enumerate(["ours", *names]):
        bars_of = [
            (i, _p50(row)[name] / row["floor_ms"])
            for i, row in enumerate(rows)
            if name in _p50(row) and row["floor_ms"]
        ]
        axes.barh([i + k * height for i, _ in bars_of], [x for _, x in bars_of], height, label=name)
    axes.set(
        xscale="log",
        xlabel="time / floor",
        yticks=range(len(rows)),
        yticklabels=[f"{r['case']} {r['name']}" for r in rows],
    )
    axes.axvline(1, color="black", lw=1)
    axes.invert_yaxis()
    axes.legend(fontsize=7)


def over_tokens(rows: list[dict], axes, what: str) -> None:
    names = sorted({name for row in rows for name in row[what]})
    for name in names:
        points = sorted((row["T"], row[what][name]) for row in rows if name in row[what])
        axes.plot(
            [T for T, _ in points],
            [x[1] if isinstance(x, list) else x for _, x in points],
            marker="o",
            label=name,
        )
    unit = "ms" if what.startswith("ms") else "MiB above inputs and gradients"
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit, title=rows[0]["case"])
    axes.legend(fontsize=7)


def roofline(rows: list[dict], axes) -> None:
    ridge = FLOPS / BANDWIDTH
    reach = [ridge / 100, ridge, ridge * 100]
    axes.plot(reach, [min(x * BANDWIDTH, FLOPS) / 1e12 for x in reach], color="black", lw=1)
    for row in rows:
        if row["flop"] and row["bytes"]:
            x, y = row["flop"] / row["bytes"], row["flop"] / _p50(row)["ours"] / 1e9
            axes.plot(x, y, "o")
            axes.annotate(f"{row['case']} {row['name']}", (x, y), fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of row sweeps", ylabel="TFLOP/s")


def draw(path: Path) -> list[Path]:
    """PNG files beside the record; only those that its rows can fill."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, made = _measured(path), []

    def save(figure, kind: str) -> None:
        made.append(path.with_name(f"{path.stem}_{kind}.png"))
        figure.savefig(made[-1], dpi=130, bbox_inches="tight")
        pyplot.close(figure)

    if not rows:
        return made
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.6 * len(rows)))
    bars(rows, axes)
    save(figure, "bars")
    for case in sorted({row["case"] for row in rows}):
        of_case = [row for row in rows if row["case"] == case]
        if len({row["T"] for row in of_case}) > 2:
            figure, pair = pyplot.subplots(1, 2, figsize=(10, 4))
            over_tokens(of_case, pair[0], "ms_p20_p50_p80")
            over_tokens(of_case, pair[1], "extra_mib")
            save(figure, "tokens_" + case.replace(" ", "_"))
    if any(row["flop"] and row["bytes"] for row in rows):
        figure, axes = pyplot.subplots(figsize=(7, 5))
        roofline(rows, axes)
        save(figure, "roofline")
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description="Plots of a record.")
    parser.add_argument("record", type=Path, help="bench/records/DATE_OP.json")
    print(*draw(parser.parse_args().record), sep="\n")
