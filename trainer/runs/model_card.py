"""The README.md of an exported model: what it is, how it was made, limits, configuration."""

import json
from collections.abc import Mapping
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


def model_card(cfg: Config, stats: Mapping[str, float], title: str, story: str) -> str:
    """Markdown with a YAML head, as the Hugging Face hub reads it. title, story: what the phase
    says of the model (its `card`); stats: the numbers of the last step.
    """
    numbers = "\n".join(f"| {k} | {stats[k]:.5g} |" for k in LAST_STEP if k in stats)
    return f"""---
library_name: transformers
base_model: {json.dumps(cfg.model.path)}
tags: [reflux, {cfg.phase}]
---
# {title}

{story}

Made with reflux-llm {_version()} in {cfg.steps} steps, seed {cfg.seed}. Method: {PAPER}.

| last step | |
|---|--:|
{numbers}

## Limits
{LIMITS}

## Configuration
```toml
{to_toml(cfg)}```
"""


def _version() -> str:
    try:
        return version("reflux-llm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"
