"""What a provider serves instead of its model: product-of-experts decoding and temperature. They
are defences to compare calibration with (docs/method.md, "Defences"):

    log p_served = [(1 - gamma) log p_model + gamma log p_proxy] / temperature - log Z

Serving costs a second forward for every token, and no weight changes. It protects sampled text;
whoever gets logits gets the model's own.

Shapes: N rows, L length so far, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import FrozenSection
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.phase import Decode, DecodeStep, Engine, FrozenModel

GatherWeights = Callable[[], AbstractContextManager[Decode]]


def product_decoder(model: Decode, proxy: Decode, gamma: float) -> Decode:
    """A decoder whose logits are (1 - gamma) of the model's plus gamma of the proxy's; each keeps
    its own cache.
    """

    @contextlib.contextmanager
    def decode(rows: int, max_length: int) -> Iterator[tuple[DecodeStep, torch.device]]:
        with (
            model(rows, max_length) as (model_step, device),
            proxy(rows, max_length) as (proxy_step, _),
        ):

            def step(
                ids_NL: Tensor,
                positions_NL: Tensor,
                real_NL: Tensor,
                first: bool,
                rows_N: Tensor | None = None,
            ) -> Tensor:
                fed = ids_NL, positions_NL, real_NL, first, rows_N
                model_NV = model_step(*fed).float()
                proxy_NV = proxy_step(*fed).float()
                # heads may be padded beyond the ids they share
                V = min(model_NV.shape[1], proxy_NV.shape[1])
                return (1 - gamma) * model_NV[:, :V] + gamma * proxy_NV[:, :V]

            yield step, device

    return decode


def tempered_decoder(model: Decode, temperature: float) -> Decode:
    """A decoder whose logits are divided by the temperature; greedy answers do not change."""

    @contextlib.contextmanager
    def decode(rows: int, max_length: int) -> Iterator[tuple[DecodeStep, torch.device]]:
        with model(rows, max_length) as (model_step, device):

            def step(
                ids_NL: Tensor,
                positions_NL: Tensor,
                real_NL: Tensor,
                first: bool,
                rows_N: Tensor | None = None,
            ) -> Tensor:
                fed = ids_NL, positions_NL, real_NL, first, rows_N
                return model_step(*fed).float() / temperature

            yield step, device

    return decode


class DefendedDecoding:
    """Decoders as `[defence]` says: multiplied with its proxy, at its temperature. Without a
    `[defence]` they are unchanged, bit for bit.
    """

    def __init__(self, cfg: Config, engine: Engine, chats: Iterable[Chat]):
        """chats: of the models that are served. ValueError where the proxy's vocabulary is another
        one. Collective.
        """
        self._engine, self._section = engine, cfg.defence
        self._proxy: FrozenModel | None = None
        proxy = cfg.defence.proxy
        if not proxy:
            return
        if not all(same_vocabulary(chat, Chat(proxy)) for chat in chats):
            raise ValueError(
                f"defence.proxy = {proxy!r} has another vocabulary than the model it is multiplied "
                "with: their next tokens are not the same events. Want a proxy with the model's "
                "tokenizer"
            )
        self._proxy = engine.frozen(FrozenSection(proxy, dtype=cfg.defence.dtype))

    def weights(self, gathered: GatherWeights) -> GatherWeights:
        """The defended decoder of `gathered`, in the form an EmbeddedSampler takes. `gathered` is
        engine.gathered_weights, or a function that calls engine.gathered_frozen_weights(model).
        Entering the context is collective.
        """
        return partial(self._defended, gathered)

    @contextlib.contextmanager
    def _defended(self, gathered: GatherWeights) -> Iterator[Decode]:
        with gathered() as decode, contextlib.ExitStack() as stack:
            if self._proxy is not None:
                proxy = stack.enter_context(self._engine.gathered_frozen_weights(self._proxy))
                decode = product_decoder(decode, proxy, self._section.gamma)
            if self._section.temperature != 1:
                decode = tempered_decoder(decode, self._section.temperature)
            yield decode
