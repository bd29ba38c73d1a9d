"""axolotl 0.19.0 that distils from a teacher at hand, by a plugin in its YAML file.

    plugins:
      - reflux.trainer.integrations.axolotl_plugin.RefluxPlugin
    reflux_teacher: path/of/a/model   # with the student's tokenizer
    reflux_loss:                      # options of linear_kl; reverse KL at temperature 1 without
      divergence: jsd
      beta: 0.5
      temperature: 2.0

Everything else, data sets and adapters too, is axolotl's. No log-probabilities are stored: both
models read the batch, and the loss is made from their hidden states. Without `reflux_teacher` the
plugin does nothing.
"""

import inspect
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from reflux.kernels.linear_kl import linear_kl

OPTIONS = {"divergence", "beta", "temperature", "scale_t2", "workspace_mb"} | {
    f"{side}_{what}" for side in ("student", "teacher") for what in ("logit_scale", "softcap")
}
# they replace methods of a model's class, which a teacher of the same class has, too
SHARED = [f"lora_{part}_kernel" for part in ("mlp", "qkv", "o", "embedding")]
assert inspect.signature(linear_kl).parameters.keys() >= OPTIONS


class RefluxArgs(BaseModel):
    """The plugin's keys of an axolotl configuration."""

    reflux_teacher: str | None = None
    reflux_loss: dict[str, Any] | None = None


class RefluxPlugin(BasePlugin):
    """ValueError, before a model is loaded: options that the loss does not have, or a way of
    training that it would replace without a word.
    """

    def register(self, cfg: Any) -> None:
        teacher, loss = cfg.get("reflux_teacher"), cfg.get("reflux_loss") or {}
        if unknown := sorted(loss.keys() - OPTIONS):
            raise ValueError(f"reflux_loss: no option {unknown[0]!r}; want of {sorted(OPTIONS)}")
        others = [key for key in ("rl", "reward_model", "kd_trainer", "orpo_alpha") if cfg.get(key)]
        if teacher and others:
            raise ValueError(
                f"reflux_teacher and {others[0]}: each has a loss of its own; want one"
            )
        for key in SHARED if teacher else ():
            if cfg.get(key):
                raise ValueError(
                    f"reflux_teacher and {key}: it changes the model's class, and with it the "
                    f"teacher. Set {key}: false"
                )
            cfg[key] = False  # axolotl switches them on for adapters

    def get_input_args(self) -> str:
        return f"{__name__}.{RefluxArgs.__name__}"

    def get_trainer_cls(self, cfg: Any) -> Any:
        """Imported when asked for: axolotl's trainers fix the arguments of all plugins."""
        if not cfg.reflux_teacher:
            return None
        from reflux.trainer.integrations.axolotl_trainer import AxolotlDistillTrainer

        return AxolotlDistillTrainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if not cfg.reflux_teacher:
            return
        teacher = AutoModelForCausalLM.from_pretrained(
            cfg.reflux_teacher,
            dtype=cfg.torch_dtype or torch.float32,
            attn_implementation=trainer.model.config._attn_implementation,
        )
        trainer.set_teacher(teacher, dict(cfg.reflux_loss or {}))
