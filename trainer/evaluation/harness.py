"""lm-evaluation-harness on a model folder (extra `harness`): its tasks, its prompts, its numbers;
one process, one copy of the model.
"""

import copy
from collections.abc import Sequence
from typing import Any

from reflux.trainer.adapter_folder import read_adapter
from reflux.trainer.data.chat import Chat
from reflux.trainer.runs import commands

REQUIREMENT = "lm-eval[hf]>=0.4.13"  # as in pyproject.toml


def load_harness() -> Any:
    """The package, before anything expensive has happened. ValueError where it is not installed."""
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError(
            f"eval.harness needs lm-evaluation-harness, which is not installed ({error}):\n"
            f"  {commands.module('pip', 'install', REQUIREMENT)}"
        ) from error
    return lm_eval


def run_harness(
    chat: Chat, tasks: Sequence[str], *, device: str, rows: int, limit: int | None, seed: int
) -> dict[str, float]:
    """{"harness/TASK/METRIC": value} for every number the harness reports, standard errors too.

    The harness loads the model in `chat.path` itself, renders its tasks as `chat` renders prompts
    (model.template and its arguments, no template if there is none), and reads data sets from where
    `datasets` finds them. rows: of a batch. limit: first items of every task.
    """
    lm_eval, adapter = load_harness(), read_adapter(chat.path)
    # a copy: the harness may give it a padding token
    model: dict[str, Any] = {"pretrained": chat.path, "tokenizer": copy.deepcopy(chat.tokenizer)}
    if adapter is not None:
        model |= {"pretrained": adapter.base, "peft": adapter.path}
    if chat.arguments:
        model["chat_template_args"] = chat.arguments
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=model,
        tasks=list(tasks),
        batch_size=rows,
        device=device,
        limit=limit,
        apply_chat_template=bool(chat.tokenizer.chat_template),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
    )
    return {
        f"harness/{task}/{metric.replace(',none', '')}": float(value)
        for task, row in results["results"].items()
        for metric, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
