"""The prompts of a training run, from one source or a mixture."""

import logging

from reflux.trainer.config.parts import input_name, part_configs
from reflux.trainer.config.schema import Config

from .chat import Chat
from .fitted_prompts import FittedPrompts, Fitting
from .mixture import Mixture
from .prompt_lengths import Host

log = logging.getLogger(__name__)


def load_training_prompts(cfg: Config, chat: Chat, host: Host) -> FittedPrompts | Mixture:
    """The prompts of [data] for the model of [model], whose tokenizer is `chat`. Collective.

    ValueError, the same on every rank, for a row that is no prompt, that lacks an answer or a
    response where the phase needs it, or that is too long.
    """
    if not cfg.data.parts:
        return _fitted(cfg, host, chat, "data")
    parts = {
        name: _fitted(part, host, chat, input_name("data", name))
        for name, part in part_configs(cfg, "data").items()
    }
    return Mixture(parts, {name: part.weight for name, part in cfg.data.parts.items()})


def _fitted(cfg: Config, host: Host, chat: Chat, name: str) -> FittedPrompts:
    fitting = Fitting(cfg, host, chat, name)
    if fitting.ungraded and host.is_main:
        log.warning("%s", said_of_ungraded(fitting))
    return fitting.fitted()


def said_of_ungraded(fitting: Fitting) -> str:
    """In a phase that goes on without grades."""
    return f"`task` is logged of the other rows alone, if any: {fitting.ungraded}"
