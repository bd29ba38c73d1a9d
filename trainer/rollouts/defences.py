"""What a provider serves instead of its model: product-of-experts decoding, antidistillation
sampling (Savani et al., arXiv:2504.13146) and temperature. They are defences to compare calibration
with (docs/method.md, "Defences"):

    log p_served = [(1 - gamma) log p_model + gamma log p_proxy] / temperature - log Z
    log p_served = [log p_model + penalty (log p_plus - log p_minus) / (2 epsilon)] / temperature
                   - log Z

plus and minus are a proxy's weights + and - epsilon times the gradient of its downstream loss
(studies/antidistillation.py). Serving costs one or two more forwards for every token, and no weight
changes. It protects sampled text;
whoever gets logits gets the model's own.

Shapes: N rows, L length so far, V vocabulary.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from reflux.trainer.config.roles import defence_roles
from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.data.stop_sets import name_them, tokens_in_words, unknown_stops
from reflux.trainer.phase import Decode, DecodeStep, Engine, FrozenModel

GatherWeights = Callable[[], AbstractContextManager[Decode]]


def product_decoder(model: Decode, proxy: Decode, gamma: float) -> Decode:
    """A decoder whose logits are (1 - gamma) of the model's plus gamma of the proxy's; each keeps
    its own cache.
    """

    def product(model_NV: Tensor, proxy_NV: Tensor) -> Tensor:
        # heads may be padded beyond the ids they share
        V = min(model_NV.shape[1], proxy_NV.shape[1])
        return (1 - gamma) * model_NV[:, :V] + gamma * proxy_NV[:, :V]

    return _combined(product, model, proxy)


def antidistillation_decoder(model: Decode, plus: Decode, minus: Decode, weight: float) -> Decode:
    """A decoder whose logits are the model's plus weight times the difference of the two copies'.
    weight: penalty / (2 epsilon). What log p lacks of a logit is constant in a row.
    """

    def moved(model_NV: Tensor, plus_NV: Tensor, minus_NV: Tensor) -> Tensor:
        # heads may be padded beyond the ids they share
        V = min(model_NV.shape[1], plus_NV.shape[1])
        return model_NV[:, :V] + weight * (plus_NV[:, :V] - minus_NV[:, :V])

    return _combined(moved, model, plus, minus)


def tempered_decoder(model: Decode, temperature: float) -> Decode:
    """A decoder whose logits are divided by the temperature; greedy answers do not change."""
    return _combined(lambda model_NV: model_NV / temperature, model)


def _combined(combine: Callable[..., Tensor], *decoders: Decode) -> Decode:
    """A decoder whose logits are `combine` of those of the decoders, in fp32."""

    @contextlib.contextmanager
    def decode(rows: int, max_length: int) -> Iterator[tuple[DecodeStep, torch.device]]:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(d(rows, max_length)) for d in decoders]

            def step(
                ids_NL: Tensor,
                positions_NL: Tensor,
                real_NL: Tensor,
                first: bool,
                rows_N: Tensor | None = None,
            ) -> Tensor:
                fed = ids_NL, positions_NL, real_NL, first, rows_N
                return combine(*(one(*fed).float() for one, _ in opened))

            yield step, opened[0][1]

    return decode


def _check_ends(what: str, proxy: Chat, served: Sequence[Chat]) -> None:
    """ValueError where the proxy ends a turn with a token at which a served model does not stop."""
    for chat in served:
        unknown = unknown_stops(chat, proxy)
        if proxy.stop_id in unknown:
            raise ValueError(
                f"{what} ends a text with {tokens_in_words(proxy, (proxy.stop_id,))}, at which the "
                f"model it is multiplied with does not stop: texts would run on. "
                f"{name_them(chat, unknown)}"
            )


class DefendedDecoding:
    """Decoders as `[defence]` says: multiplied with its proxy or moved by its two copies, at its
    temperature. Without a `[defence]` they are unchanged, bit for bit.
    """

    def __init__(self, cfg: Config, engine: Engine, chats: Iterable[Chat]):
        """chats: of the models that are served. ValueError where the proxy's vocabulary is another
        one, or where it ends texts otherwise. Collective.
        """
        self._engine, self._section = engine, cfg.defence
        roles, served = defence_roles(cfg), list(chats)
        for role in roles:
            own = Chat(role.model.path)
            if not all(same_vocabulary(chat, own) for chat in served):
                raise ValueError(
                    f"{role.section} = {role.model.path!r} has another vocabulary than the model "
                    "it is multiplied with: their next tokens are not the same events. Want a "
                    "proxy with the model's tokenizer"
                )
            _check_ends(f"{role.section} = {role.model.path!r}", own, served)
        self._weight = 0.0
        if cfg.defence.antidistillation:
            epsilon = read_epsilon(Path(cfg.defence.antidistillation))
            self._weight = cfg.defence.penalty / (2 * epsilon)
        self._others: list[FrozenModel] = [engine.frozen(role.model) for role in roles]

    def weights(self, gathered: GatherWeights) -> GatherWeights:
        """The defended decoder of `gathered`, in the form an EmbeddedSampler takes. `gathered` is
        engine.gathered_weights, or a function that calls engine.gathered_frozen_weights(model).
        Entering the context is collective.
        """
        return partial(self._defended, gathered)

    @contextlib.contextmanager
    def _defended(self, gathered: GatherWeights) -> Iterator[Decode]:
        with gathered() as decode, contextlib.ExitStack() as stack:
            others = [
                stack.enter_context(self._engine.gathered_frozen_weights(model))
                for model in self._others
            ]
            if self._weight:
                plus, minus = others
                decode = antidistillation_decoder(decode, plus, minus, self._weight)
            elif others:
                (proxy,) = others
                decode = product_decoder(decode, proxy, self._section.gamma)
            if self._section.temperature != 1:
                decode = tempered_decoder(decode, self._section.temperature)
            yield decode


def read_epsilon(folder: Path) -> float:
    """Of the two copies in `folder`. ValueError where nothing says it."""
    path = folder / "antidistillation.json"
    try:
        return float(json.loads(path.read_text())["epsilon"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"defence.antidistillation = {str(folder)!r}: {path.name} does not say epsilon "
            f"({error}); want a folder that reflux.trainer.studies.antidistillation has written"
        ) from error
