"""The prompts of a training run, from one source or a mixture."""

from reflux.trainer.config.parts import input_name, part_configs
from reflux.trainer.config.schema import Config

from .chat import Chat
from .fitted_prompts import FittedPrompts, Fitting
from .mixture import Mixture
from .prompt_lengths import Host


def load_training_prompts(cfg: Config, chat: Chat, host: Host) -> FittedPrompts | Mixture:
    """The prompts of [data] for the model of [model], whose tokenizer is `chat`. Collective.

    ValueError, the same on every rank, for a row that is no prompt, that lacks an answer or a
    response where the phase needs it, or that is too long.
    """
    if not cfg.data.parts:
        return Fitting(cfg, host, chat).fitted()
    parts = {
        name: Fitting(part, host, chat, input_name("data", name)).fitted()
        for name, part in part_configs(cfg, "data").items()
    }
    return Mixture(parts, {name: part.weight for name, part in cfg.data.parts.items()})
