"""The README.md of an exported model: what it is, how it was made, limits, configuration."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reflux.trainer.config.guard_schedule import compared_with
from reflux.trainer.config.loader import to_toml
from reflux.trainer.config.phases import spec_of
from reflux.trainer.config.roles import loads_reference
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


@dataclass(frozen=True)
class Measured:
    """The numbers of the last step, and the last `eval` event of the log with its step."""

    last_step: Mapping[str, Any]
    evaluation: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    cfg: Config,
    measured: Measured,
    title: str,
    story: str,
    outcome: Outcome,
    templated: bool = True,
) -> str:
    """Markdown with a YAML head, as the Hugging Face hub reads it. title, story: what the phase
    says of the model (its `card`). templated: whether it is talked to through a chat template.
    """
    is_adapter = cfg.lora.rank > 0 and not cfg.export.merge
    library, tags = ("peft", ", lora") if is_adapter else ("transformers", "")
    stats, licence = measured.last_step, licence_of(cfg.model.path)
    numbers = "\n".join(f"| {k} | {stats[k]:.5g} |" for k in LAST_STEP if k in stats)
    return f"""---
library_name: {library}
base_model: {json.dumps(cfg.model.path)}
{f"license: {json.dumps(licence)}{chr(10)}" if licence else ""}tags: [reflux, {cfg.phase}{tags}]
---
# {title}

{story}{_adapters(cfg)}

Made with reflux-llm {_version()} in {_steps(cfg, outcome)}, seed {cfg.seed}. Method: {PAPER}.
{_warnings(outcome)}{_guards(cfg, stats, outcome)}{_evaluation(measured.evaluation)}
## Use
```python
{_usage(cfg, is_adapter, templated)}
```
{_arguments(cfg, templated)}{_licence(licence)}

| last step | |
|---|--:|
{numbers}

## Limits
{LIMITS}

## Configuration
```toml
{to_toml(cfg)}```
"""


def licence_of(model: str) -> str | None:
    """What the head of the README.md in a model's folder names as its licence."""
    file = Path(model).expanduser() / "README.md"
    try:
        head = file.read_text(encoding="utf-8", errors="replace").split("---")
    except OSError:
        return None
    found = re.search(r"^license: *[\"']?([\w.-]+)", head[1], re.M) if len(head) > 2 else None
    return found[1] if found else None


def _licence(licence: str | None) -> str:
    if licence:
        return f"Licence: `{licence}`, that of the base model; its terms hold here too."
    return "Licence: that of the base model, whose folder names none."


def _usage(cfg: Config, is_adapter: bool, templated: bool) -> str:
    """Python that loads the model and answers one question."""
    here = json.dumps(cfg.export.push_to_hub or "path/to/this/folder")
    base, more = (json.dumps(cfg.model.path), "") if is_adapter else (here, "")
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if is_adapter:
        lines.insert(0, "from peft import PeftModel")
        more = f"model = PeftModel.from_pretrained(model, {here})"
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({here})",
        f"model = AutoModelForCausalLM.from_pretrained({base})",
        more,
        *_prompt(cfg, templated),
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=256)[0]))",
    ]
    return "\n".join(line for i, line in enumerate(lines) if line or i <= 2)


def _prompt(cfg: Config, templated: bool) -> list[str]:
    """Lines that render a question as training did."""
    if not templated:
        return [
            "# no chat template: a prompt is the text of its messages",
            'ids = tokenizer("What is 3 + 4?", return_tensors="pt")',
        ]
    given = dict(cfg.model.template_arguments)
    return [
        'chat = [{"role": "user", "content": "What is 3 + 4?"}]',
        *([f"arguments = {given!r}"] if given else []),
        "ids = tokenizer.apply_chat_template(",
        '    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True'
        + (", **arguments" if given else ""),
        ")",
    ]


def _arguments(cfg: Config, templated: bool) -> str:
    """What no file of the folder can hold."""
    given = cfg.model.template_arguments
    if not given or not templated:
        return ""
    names = ", ".join(f"`{name} = {value!r}`" for name, value in given.items())
    return (
        f"Every prompt was rendered with {names}. A template cannot hold its arguments: give them "
        "each time (`chat_template_kwargs` of a server, `teacher.template_arguments` of a run).\n\n"
    )


def _evaluation(fields: Mapping[str, Any]) -> str:
    """Every metric that has an interval."""
    names = [k for k in fields if f"{k}_low" in fields and f"{k}_high" in fields]
    if not names:
        return ""
    rows = "".join(
        f"| {k.removeprefix('eval/')} | {fields[k]:.4g} "
        f"| [{fields[f'{k}_low']:.4g}, {fields[f'{k}_high']:.4g}] |\n"
        for k in names
    )
    return (
        f"\n## Evaluation\nHeld-out prompts of `[eval]`, the weights of step {fields['step']}; "
        "intervals are 95 % over prompts and say nothing of another seed.\n\n"
        f"| metric | value | interval |\n|---|--:|---|\n{rows}"
    )


def _guards(cfg: Config, stats: Mapping[str, Any], outcome: Outcome) -> str:
    """What watched over a calibration, and whether it stepped in."""
    if not spec_of(cfg.phase).has_reference:
        return ""
    guard = cfg.guard
    kl_budget = guard.kl_budget if loads_reference(cfg) else 0.0  # else nothing measured it
    kl = f" (the last step had {stats['reference_kl']:.4g})" if "reference_kl" in stats else ""
    rules = [
        (kl_budget, f"KL to the original above {kl_budget:g} nats per token{kl}"),
        (
            # only where it could have: a card must not name a watch that nobody kept
            compared_with(cfg),
            f"accuracy more than {guard.utility_drop:g} below {compared_with(cfg)}, twice",
        ),
        (guard.length_drift, f"text length drifting by more than {guard.length_drift:g}"),
        (guard.entropy_drift, f"entropy drifting by more than {guard.entropy_drift:g}"),
        (guard.truncation_drift, f"truncation rising by more than {guard.truncation_drift:g}"),
    ]
    on = "".join(f"- {text}\n" for limit, text in rules if limit)
    did = "One of them did" if outcome.stopped is not None else "None of them did"
    return f"\n## Guards\nThe run would have ended on:\n{on}\n{did}.\n" if on else ""


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
        weights = f"weights of step {outcome.steps}" if outcome.steps else "untrained weights"
        lines.insert(0, f"A guard ended the run: {outcome.stopped}. These are the {weights}.")
    return "\n## Warnings\n" + "".join(f"- {line}\n" for line in lines) if lines else ""


def _version() -> str:
    try:
        return version("reflux-llm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"
