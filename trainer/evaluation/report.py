"""An evaluation on disk: evaluation.json (every number with its interval) and report.md (one page
of it, from report.md.jinja).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.config.evaluation import EvalSection
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import RolloutSection
from reflux.trainer.data.task_routing import task_names
from reflux.trainer.runs.files import write_json, write_whole
from reflux.trainer.runs.markdown_table import interval, render_template, with_interval
from reflux.trainer.runs.stats import Estimate

from .acceptance import RuleVerdict
from .metrics import PositionStats, position_stats
from .predictions import OUTCOMES, Prediction
from .results import Evaluation

TEMPLATE = Path(__file__).with_name("report.md.jinja")


def write_evaluation(
    cfg: Config, predictions: Sequence[Prediction], evaluation: Evaluation
) -> None:
    """Both files, each whole or not at all."""
    folder, prompts = Path(cfg.folder), len({p.prompt for p in predictions})
    modes = dict.fromkeys(p.mode for p in predictions)
    positions = {m: stats for m in modes if (stats := position_stats(predictions, m))}
    write_json(folder / "evaluation.json", _json(cfg, prompts, evaluation, positions))
    write_whole(folder / "report.md", _page(cfg, prompts, evaluation, positions))


def _json(
    cfg: Config,
    prompts: int,
    evaluation: Evaluation,
    positions: Mapping[str, Sequence[PositionStats]],
) -> dict[str, Any]:
    e, differences = cfg.eval, evaluation.differences
    return {
        "model": cfg.model.path,
        "source": e.name,
        "task": task_names(cfg),
        "by": e.by,
        "seed": cfg.seed,
        "prompts": prompts,
        "samples": e.samples,
        "max_tokens": cfg.rollout.max_tokens,
        "sampling": {key: getattr(cfg.rollout, key) for key in ("temperature", "top_p", "top_k")},
        "metrics": evaluation.estimates,
        "parts": evaluation.parts,
        "against": {"folder": e.against, **differences} if differences else None,
        "positions": positions,
        "harness": evaluation.harness,
        "accept": [_verdict(v) for v in evaluation.verdicts],
        "accepted": evaluation.accepted,
        "metric_names": e.metrics,
    }


def _verdict(v: RuleVerdict) -> dict[str, Any]:
    row = {"name": v.name, "holds": v.holds, "value": v.value, "threshold": v.threshold}
    return row | {"margin": v.margin, "words": v.words}


def _page(
    cfg: Config,
    prompts: int,
    evaluation: Evaluation,
    positions: Mapping[str, Sequence[PositionStats]],
) -> str:
    """report.md: verdicts, then the tables behind them."""
    shown, endings = cfg.eval.metrics, ("_length", "_logp")
    estimates = evaluation.estimates
    return render_template(
        TEMPLATE,
        cfg=cfg,
        prompts=prompts,
        how=_how(cfg.eval, cfg.rollout),
        verdicts=evaluation.verdicts,
        metrics={n: e for n, e in estimates.items() if n in shown or n.endswith(endings)},
        outcomes=_outcomes(estimates),
        parts={
            part: {n: own[n] for n in shown if n in own} for part, own in evaluation.parts.items()
        },
        task=task_names(cfg),
        differences=evaluation.differences,
        positions=positions,
        harness=evaluation.harness,
        interval=interval,
        with_interval=with_interval,
    )


def _how(e: EvalSection, r: RolloutSection) -> str:
    sampled = f" and {e.samples} sampled {_sampled_at(r)}" if e.samples else ""
    generated = f"answers of at most {r.max_tokens} tokens, one greedy{sampled}"
    generates, scores = (generated,) * e.generates, ("options by likelihood",) * e.scores_options
    return "; ".join(generates + scores)


def _sampled_at(r: RolloutSection) -> str:
    top_p = f", top_p {r.top_p:g}" * (r.top_p < 1)
    return f"at temperature {r.temperature:g}{top_p}" + f", top_k {r.top_k}" * (r.top_k > 0)


def _outcomes(estimates: Mapping[str, Estimate]) -> dict[str, list[str]]:
    """Mode -> fraction of each of OUTCOMES, of the modes with graded texts."""
    return {
        mode: [
            f"{estimates[name].mean:.1%}"
            for name in (mode, *(f"{mode}_{kind}" for kind in OUTCOMES[1:]))
        ]
        for mode in ("greedy", "sampled")
        if f"{mode}_wrong" in estimates
    }
