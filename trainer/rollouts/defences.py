"""What a provider serves instead of its model: product-of-experts decoding and temperature,
defences to compare calibration with.

    log p_served = [(1 - gamma) log p_model + gamma log p_proxy] / temperature - log Z            docs/method.md,
        "Defences"

It is paid for at every token served, changes no weight, and reaches whoever is given text; who is
given logits gets the model's.

Shapes: N rows, L length so far, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor

from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import FrozenSection
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.phase import Decode


def product_decoder(decode: Callable, other: Callable, gamma: float) -> Callable:
    """A decoder (as generate takes it) whose logits are (1 - gamma) of one's plus gamma of the
    other's; both caches keep step.
    """

    @contextlib.contextmanager
    def both(rows: int, max_length: int) -> Iterator[tuple[Callable, Any]]:
        with decode(rows, max_length) as (own, device), other(rows, max_length) as (proxy, _):

            def step(ids_NL: Tensor, positions_NL: Tensor, real_NL: Tensor, first: bool) -> Tensor:
                a_NV, b_NV = (
                    run(ids_NL, positions_NL, real_NL, first).float() for run in (own, proxy)
                )
                # heads may be padded beyond the ids they share
                V = min(a_NV.shape[1], b_NV.shape[1])
                return (1 - gamma) * a_NV[:, :V] + gamma * b_NV[:, :V]

            yield step, device

    return both


def tempered_decoder(decode: Callable, temperature: float) -> Callable:
    """A decoder whose logits are divided by the temperature; greedy answers stay what they are."""

    @contextlib.contextmanager
    def tempered(rows: int, max_length: int) -> Iterator[tuple[Callable, Any]]:
        with decode(rows, max_length) as (own, device):
            yield lambda *fed: own(*fed).float() / temperature, device

    return tempered


class DefendedDecoding:
    """Decoders as `[defence]` says: multiplied with its proxy, at its temperature; bit for bit as
    they are where it says nothing.
    """

    def __init__(self, cfg: Config, engine: Any, chats: Iterable[Chat]):
        """chats: of the models that are served. ValueError where the proxy's vocabulary is another
        one. Collective.
        """
        self._engine, self._spec, self._proxy, s = engine, cfg.defence, None, cfg.defence
        if not s.proxy:
            return
        if not all(same_vocabulary(chat, Chat(s.proxy)) for chat in chats):
            raise ValueError(
                f"defence.proxy = {s.proxy!r} has another vocabulary than the model it is multiplied "
                "with: their next tokens are not the same events. Want a proxy with the model's "
                "tokenizer"
            )
        self._proxy = engine.frozen(FrozenSection(s.proxy, dtype=s.dtype))

    def weights(
        self, gathered: Callable[[], AbstractContextManager[Decode]]
    ) -> Callable[[], AbstractContextManager[Decode]]:
        """The defended decoder of `gathered`, in the form an EmbeddedSampler takes. `gathered` is
        engine.gathered_weights, or a function that calls engine.gathered_frozen_weights(model).
        Entering the context is collective.
        """
        return partial(self._defended, gathered)

    def apply(self, weights: AbstractContextManager[Decode]) -> AbstractContextManager[Decode]:
        """The same for a context that is already made."""
        return self._defended(lambda: weights)

    @contextlib.contextmanager
    def _defended(self, gathered: Callable[[], AbstractContextManager[Decode]]) -> Iterator[Decode]:
        with gathered() as decode, contextlib.ExitStack() as stack:
            if self._proxy is not None:
                proxy = stack.enter_context(self._engine.gathered_frozen_weights(self._proxy))
                decode = product_decoder(decode, proxy, self._spec.gamma)
            if self._spec.temperature != 1:
                decode = tempered_decoder(decode, self._spec.temperature)
            yield decode
