"""How the answers of an evaluation were asked for and graded, in asked.json beside them. Answers of
two runs are compared where these settings are the same.

    rollout.max_tokens, temperature, top_p, top_k    as in use; the last three of sampled answers
    task.name, task.options, task.thinking_end       of the grader; with parts, eval.parts.NAME.task
    shown                                            sha256 of the messages and options as shown
    tokenizer, template, template_arguments          sha256 of the vocabulary and of the chat
                                                     template: models with another tokenizer have
                                                     another template
"""

import hashlib
import json
import tomllib
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.config.evaluation import LIKELIHOOD
from reflux.trainer.config.parts import part_configs
from reflux.trainer.config.phases import PHASES
from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import Sampling
from reflux.trainer.runs.files import write_json

from .questions import QuestionParts, Questions

FILE = "asked.json"
Settings = Mapping[str, Any]
SAMPLING = ("temperature", "top_p", "top_k")
RENDERED = ("template", "template_arguments")
# options of our own graders that change no grade
NO_GRADE = (
    "server",
    "timeout_s",
    "retries",
    "workers",
    "max_requests",
    "cache",
    "api_key_env",
    "device",
    "rows",
)
WORDS = {  # of settings whose values say nothing to a reader: what differs, what to do
    "shown": (
        "its prompts were shown otherwise, or their options in another order",
        "eval.list_options, task.options and, where options are shuffled, seed",
    ),
    "template": ("its prompts were rendered with another chat template", "model.template"),
}


def settings_of(
    cfg: Config, sampling: Sampling, chat: Chat, questions: Questions | QuestionParts
) -> Settings:
    """Of this run. sampling: of its sampled answers."""
    found: dict[str, Any] = {"rollout.max_tokens": sampling.max_tokens}
    found |= {f"rollout.{name}": getattr(sampling, name) for name in SAMPLING}
    for part, alone in part_configs(cfg, "eval").items():
        task = alone.task
        found |= _of_task(part, task.name, task.options, task.thinking_end)
    found |= {_name(part, "shown"): digest for part, digest in _shown(questions).items()}
    found["tokenizer"] = _digest(sorted(chat.tokenizer.get_vocab().items()))
    found["template"] = _digest(chat.tokenizer.chat_template or "")
    found["template_arguments"] = chat.arguments
    return json.loads(json.dumps(found, default=str))


def save_settings(folder: Path, settings: Settings) -> None:
    write_json(folder / FILE, settings)


def load_settings(folder: str | Path) -> Settings:
    """Of another run: as it noted them, else what its configuration says; empty without both."""
    try:
        noted = json.loads((Path(folder) / FILE).read_text())
        return noted if isinstance(noted, dict) else {}
    except (OSError, ValueError):
        return _configured(Path(folder) / "config.toml")


def check_settings(
    ours: Settings, theirs: Settings, folder: str, modes: Sequence[str], part: str = ""
) -> None:
    """ValueError that names the first setting in which the answers of two runs differ; a warning
    where one is not on record. folder: of theirs. modes, part: of the answers that are compared.
    """
    unknown = []
    for name in dict.fromkeys((*ours, *theirs)):
        if name == "tokenizer" or not _matters(name, modes, part):
            continue
        if name not in ours or name not in theirs:
            unknown.append(name)
        elif name in RENDERED and ours["tokenizer"] != theirs["tokenizer"]:
            continue
        elif ours[name] != theirs[name]:
            raise ValueError(_difference(name, ours[name], theirs[name], folder))
    if unknown:
        warnings.warn(
            f"{folder} is compared with, but it is not known whether its answers were asked for as "
            f"these: {', '.join(unknown)} is on record for one of the two alone (a run of an older "
            "version has less). Evaluate it again to be sure",
            stacklevel=2,
        )


def _difference(name: str, ours: Any, theirs: Any, folder: str) -> str:
    values = f"{name} = {theirs!r} there and {ours!r} here"
    what, same = WORDS.get(name.rpartition(".")[2], (values, name))
    return (
        f"{folder}: {what}; answers are compared where they were asked for and graded alike. "
        f"Evaluate both with the same {same}"
    )


def _matters(name: str, modes: Sequence[str], part: str) -> bool:
    if name.startswith("eval.parts."):
        return not part or name.startswith(_name(part, ""))
    if name.removeprefix("rollout.") in SAMPLING:
        return "sampled" in modes
    return name != "rollout.max_tokens" or bool(set(modes) - set(LIKELIHOOD))


def _of_task(part: str, name: str, options: Mapping[str, Any], thinking_end: str) -> Settings:
    given = {k: v for k, v in options.items() if ":" in name or k not in NO_GRADE}
    found = {"task.name": name, "task.options": given, "task.thinking_end": thinking_end}
    return {_name(part, key): value for key, value in found.items()}


def _name(part: str, setting: str) -> str:
    return f"eval.parts.{part}.{setting}" if part else setting


def _shown(questions: Questions | QuestionParts) -> dict[str, str]:
    """Part -> digest of all its prompts, as the model is shown them."""
    rows = defaultdict(list)
    for prompt in questions.prompts:
        shown = questions.shown(prompt)
        options = questions.options_or_none(shown)
        texts = options and [options.labels, options.texts]
        rows[prompt.part].append([list(shown.messages), texts])
    return {part: _digest(found) for part, found in rows.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _configured(file: Path) -> Settings:
    """Of a run that noted nothing: templates and what was shown are not known then."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    rollout, task, phase = table.get("rollout", {}), table.get("task", {}), table.get("phase")
    found: dict[str, Any] = {"rollout.max_tokens": rollout.get("max_tokens")}
    if phase in PHASES:
        whole_run = PHASES[phase].data_section == "eval"  # else at temperature 1, see Evaluator
        plain = {name: getattr(Sampling(1), name) for name in SAMPLING}
        found |= {f"rollout.{n}": rollout.get(n) if whole_run else plain[n] for n in SAMPLING}
    if not table.get("eval", {}).get("parts"):
        found |= _of_task(
            "", task.get("name"), task.get("options", {}), task.get("thinking_end", "")
        )
    return {name: value for name, value in found.items() if value is not None}
