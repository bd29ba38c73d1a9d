"""An evaluation on disk: evaluation.json (every number with its interval) and report.md (one page
of it).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.config.schema import Config
from reflux.trainer.runs.markdown_table import table, write_json, write_whole
from reflux.trainer.runs.stats import Estimate

from .acceptance import Verdict, as_row
from .metrics import Difference, positions
from .predictions import OUTCOMES

WORDS = {
    "right": "right",
    "wrong": "wrong answer",
    "no_answer": "no answer found",
    "refused": "refused",
    "truncated": "cut at the limit",
}


def write_evaluation(
    cfg: Config,
    rows: Sequence[dict],
    measured: Mapping[str, Estimate],
    differences: Mapping[str, Difference],
    *,
    harness: Mapping[str, float],
    verdicts: Sequence[Verdict],
) -> None:
    """Both files, whole or not at all."""
    modes = list(dict.fromkeys(r["mode"] for r in rows))
    found = {
        "model": cfg.model.path,
        "source": cfg.eval.source,
        "task": cfg.task.name,
        "by": cfg.eval.by,
        "seed": cfg.seed,
        "prompts": len({r["prompt"] for r in rows}),
        "samples": cfg.eval.samples,
        "max_tokens": cfg.rollout.max_tokens,
        "metrics": {name: e._asdict() for name, e in measured.items()},
        "against": {
            "folder": cfg.eval.against,
            **{name: _difference(d) for name, d in differences.items()},
        }
        if differences
        else None,
        "positions": {
            mode: rows_of
            for mode in modes
            if (rows_of := [p | {"right": p["right"]._asdict()} for p in positions(rows, mode)])
        },
        "harness": dict(harness),
        "accept": [as_row(v) for v in verdicts],
        "accepted": all(v.holds for v in verdicts),
    }
    found["metric_names"] = list(cfg.eval.metrics)
    folder = Path(cfg.folder)
    write_json(folder / "evaluation.json", found)
    write_whole(folder / "report.md", render(found))


def render(found: Mapping[str, Any]) -> str:
    """report.md: verdicts, then the tables behind them."""
    parts = [
        f"# Evaluation of `{found['model']}`",
        f"{found['prompts']} prompts of `{found['source']}`, task `{found['task']}`; "
        f"{_how(found)}. Intervals are 95 %, bootstrapped over prompts.",
        "\n".join(f"- **{v['name']}** {v['words']}" for v in found["accept"]),
        _metrics(found),
        _failures(found),
        _against(found),
        _positions(found),
        _harness(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how(found: Mapping[str, Any]) -> str:
    generated = f"answers of at most {found['max_tokens']} tokens, one greedy and {found['samples']} sampled at temperature 1"
    return {
        "generation": generated,
        "likelihood": "options by likelihood",
        "both": f"{generated}; options by likelihood",
    }[found["by"]]


def _metrics(found: Mapping[str, Any]) -> str:
    shown = [
        n
        for n in found["metrics"]
        if n in found["metric_names"] or n.endswith(("_length", "_logp"))
    ]
    return table(
        ("metric", "mean", "95 % interval"), [(n, *_cells(found["metrics"][n])) for n in shown]
    )


def _failures(found: Mapping[str, Any]) -> str:
    m = found["metrics"]
    modes = [mode for mode in ("greedy", "sampled") if f"{mode}_wrong" in m]
    rows = [
        (
            mode,
            *(
                f"{m[mode if kind == 'right' else f'{mode}_{kind}']['mean']:.1%}"
                for kind in OUTCOMES
            ),
        )
        for mode in modes
    ]
    return (
        "## What became of the answers\n\n"
        + table(("answers", *(WORDS[k] for k in OUTCOMES)), rows)
        if rows
        else ""
    )


def _against(found: Mapping[str, Any]) -> str:
    given = found["against"]
    if not given:
        return ""
    rows = [
        (
            name,
            f"{d['theirs']['mean']:.3f}",
            f"{d['ours']['mean']:.3f}",
            _interval(d["difference"], "{:+.3f}"),
            _interval(d["change"], "{:+.0%}"),
            f"{d['p']:.3g}",
        )
        for name, d in given.items()
        if name != "folder"
    ]
    return f"## Against `{given['folder']}`, paired by prompt\n\n" + table(
        ("metric", "there", "here", "difference", "relative", "p"), rows
    )


def _positions(found: Mapping[str, Any]) -> str:
    rows = [
        (mode, p["position"], p["prompts"], _interval(p["right"], "{:.3f}"), f"{p['chosen']:.1%}")
        for mode, places in found["positions"].items()
        for p in places
    ]
    return (
        (
            "## By place of the right option\n\nA model that does not look at places chooses each "
            "about as often as the right option stands there.\n\n"
            + table(("answers", "place", "prompts", "accuracy", "this place chosen"), rows)
        )
        if rows
        else ""
    )


def _harness(found: Mapping[str, Any]) -> str:
    rows = [
        (name.removeprefix("harness/"), f"{value:.4f}") for name, value in found["harness"].items()
    ]
    return "## lm-evaluation-harness\n\n" + table(("task", "value"), rows) if rows else ""


def _cells(e: Mapping[str, float]) -> tuple[str, str]:
    return f"{e['mean']:.3f}", _interval(e, "{:.3f}").partition(" ")[2]


def _interval(e: Mapping[str, float], form: str) -> str:
    """One prompt has no interval."""
    return form.format(e["mean"]) + (
        "" if math.isnan(e["low"]) else f" [{form.format(e['low'])}, {form.format(e['high'])}]"
    )


def _difference(d: Difference) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Estimate) else value
        for name, value in d._asdict().items()
    }
