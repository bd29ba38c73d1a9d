"""The README.md of an exported model: what it is, how it was made, limits, configuration."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from reflux.trainer.config.loader import to_toml
from reflux.trainer.config.schema import Config

PAPER = "[arXiv:2604.18963](https://arxiv.org/abs/2604.18963)"
LAST_STEP = ("loss", "reference_kl", "accuracy", "reward/cal", "kl", "nll")  # if the run logs it
LIMITS = (
    "This says what the tested students gained through the tested channels at the stated budget, "
    "and nothing more. It is no\nclaim that the model cannot be copied. Weights were changed: tell "
    "those who use it."
)


@dataclass(frozen=True)
class Outcome:
    """How a training run ended: the steps that the exported weights have seen, why it ended before
    the last one, and what it was warned of.
    """

    steps: int
    stopped: str | None = None  # a guard's reason
    alarms: tuple[str, ...] = ()


def model_card(
    cfg: Config, stats: Mapping[str, float], title: str, story: str, outcome: Outcome
) -> str:
    """Markdown with a YAML head, as the Hugging Face hub reads it. title, story: what the phase
    says of the model (its `card`); stats: the numbers of the last step.
    """
    is_adapter = cfg.lora.rank > 0 and not cfg.export.merge
    library, tags = ("peft", ", lora") if is_adapter else ("transformers", "")
    numbers = "\n".join(f"| {k} | {stats[k]:.5g} |" for k in LAST_STEP if k in stats)
    return f"""---
library_name: {library}
base_model: {json.dumps(cfg.model.path)}
tags: [reflux, {cfg.phase}{tags}]
---
# {title}

{story}{_adapters(cfg)}

Made with reflux-llm {_version()} in {_steps(cfg, outcome)}, seed {cfg.seed}. Method: {PAPER}.
{_warnings(outcome)}
| last step | |
|---|--:|
{numbers}

## Limits
{LIMITS}

## Configuration
```toml
{to_toml(cfg)}```
"""


def _adapters(cfg: Config) -> str:
    """What was trained where that is not every weight."""
    lora = cfg.lora
    if not lora.rank:
        return ""
    where = ", ".join(f"`{t}`" for t in lora.targets) or "every linear layer except the head"
    what = f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}{', rslora' * lora.rslora}, on {where}"
    if cfg.export.merge:
        return f" Trained as {what}; merged into the weights."
    return (
        f" {what}. Load with `peft.PeftModel.from_pretrained(base, folder)`, or make one model of "
        "both by `python -m reflux.trainer.merge`."
    )


def _steps(cfg: Config, outcome: Outcome) -> str:
    if outcome.steps == cfg.steps:
        return f"{outcome.steps} steps"
    return f"{outcome.steps} of {cfg.steps} planned steps"


def _warnings(outcome: Outcome) -> str:
    lines = list(outcome.alarms)
    if outcome.stopped is not None:
        lines.insert(0, f"A guard ended the run: {outcome.stopped}. These are the weights before.")
    return "\n## Warnings\n" + "".join(f"- {line}\n" for line in lines) if lines else ""


def _version() -> str:
    try:
        return version("reflux-llm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"
