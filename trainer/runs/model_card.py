"""The README.md of an exported model: recipe, dial, parents, limits."""

import json
from importlib.metadata import PackageNotFoundError, version

from reflux.trainer.config.loader import to_toml
from reflux.trainer.config.schema import Config

LIMITS = """This says what the tested students gained through the tested channels at the stated budget, and nothing more. It is no
claim that the model cannot be copied. Weights were changed: tell those who use it."""


def model_card(cfg: Config, stats: dict) -> str:
    """Markdown with a YAML head, as the Hugging Face hub reads it."""
    title, story = {"calibrate": _calibrated, "distill": _distilled}[cfg.phase](cfg)
    measured = {
        k: stats[k]
        for k in ("loss", "reference_kl", "accuracy", "reward/cal", "kl", "nll")
        if k in stats
    }
    numbers = "\n".join(f"| {k} | {v:.5g} |" for k, v in measured.items())
    return (
        f"---\nlibrary_name: transformers\nbase_model: {json.dumps(cfg.model.path)}\ntags: "
        f"[reflux, {cfg.phase}]\n---\n# {title}\n\n{story}\n\nMade with reflux-llm {_version()} in "
        f"{cfg.steps} steps, seed {cfg.seed}. Method: "
        "[arXiv:2604.18963](https://arxiv.org/abs/2604.18963).\n\n| last step | "
        f"|\n|---|--:|\n{numbers}\n\n## Limits\n{LIMITS}\n\n## "
        f"Configuration\n```toml\n{to_toml(cfg)}```\n"
    )


def _calibrated(cfg: Config) -> tuple[str, str]:
    cal = cfg.calibration
    dial = (
        "task reward only (eta = 0)"
        if cal.mode == "off"
        else f"{cal.mode}, strength {cal.strength:g}"
    )
    proxy = f", against the frozen proxy `{cfg.proxy.path}`" if cal.mode != "off" else ""
    return f"Calibrated teacher: {dial}", (
        f"Reinforcement fine-tuned from `{cfg.model.path}`{proxy}, on the task "
        f"`{cfg.task.name}`, anchored to the original with beta {cfg.reference.beta:g}."
    )


def _distilled(cfg: Config) -> tuple[str, str]:
    d = cfg.distill
    if not cfg.needs_teacher:
        return (
            "Fine-tuned model",
            f"Supervised fine-tuning of `{cfg.model.path}` on `{cfg.data.source}`.",
        )
    how = {
        "nll": "likelihood of the teacher's texts",
        "span": "likelihoods of aligned byte spans",
        "kl": f"{d.divergence} KL, tail {d.tail}",
        "class": f"{d.divergence} KL over classes of both vocabularies ({d.partition})",
    }[d.objective]
    return "Distilled student", (
        f"Distilled from `{cfg.teacher.path}` into `{cfg.model.path}`: {how}, "
        f"{d.on_policy:.0%} on-policy."
    )


def _version() -> str:
    try:
        return version("reflux-llm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"
