"""Where a key is that was written into the wrong section, or as another library calls it."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

# of the trainers of transformers and TRL -> ours
ELSEWHERE: Mapping[str, str] = {
    "learning_rate": "optim.lr",
    "adam_epsilon": "optim.eps",
    "max_steps": "steps",
    "output_dir": "folder",
    "model_name_or_path": "model.path",
    "dataset_name": "data.source",
    "eval_steps": "eval.every",
    "save_steps": "checkpoint.interval",
    "save_total_limit": "checkpoint.keep_latest_k",
    "warmup_steps": "lr_scheduler.warmup_steps",
    "max_grad_norm": "training.max_norm",
    "max_length": "training.seq_len",
    "max_new_tokens": "rollout.max_tokens",
    "max_completion_length": "rollout.max_tokens",
    "num_generations": "rollout.group",
    "per_device_train_batch_size": "rollout.prompts",
    "lmbda": "distill.on_policy",
    "epsilon": "policy.clip",
    "num_iterations": "policy.epochs",
    "packing": "batch.pack",
}


def meant(key: str, config: type, name: str) -> str:
    """`, did you mean A or B?`, the keys of other sections that are called so; empty: none is.
    name: as it was written, which is no answer.
    """
    found = [ELSEWHERE[key]] if key in ELSEWHERE else list(_places(key, config))
    found = [place for place in found if place != name]
    return f", did you mean {' or '.join(found)}?" if 0 < len(found) <= 3 else ""


def _places(key: str, config: type) -> Iterable[str]:
    hints: Mapping[str, Any] = get_type_hints(config)
    for section, hint in hints.items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from (f"{section}.{f.name}" for f in fields(hint) if f.name == key)
