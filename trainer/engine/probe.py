"""A few rows through a model that has just been loaded: are the forwards that a run relies on one
and the same function of a document?

    prove_forward   padded = alone, training mode = evaluation mode, packed = alone
    prove_decoding  the sampler's KV cache = the trainer's forward

Some architectures ignore positions in their attention mask, carry a state from one document to the
next, or drop out in a way that no configuration names. Then losses and samples are off by nats, and
nothing else would say so. ValueError with what differs, and by how much. Collective. No weight
moves and no random number is drawn.

Shapes: N rows, L row length, D hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchtitan.tools import utils

from .agreement import agreed
from .decoding import kv_decoder
from .forward import hidden_states
from .head import head_logits, head_rows
from .hf_models import shortened

DOCUMENTS = (4, 3, 5)  # tokens
# Limits of the mean over tokens of |difference| / |value|. Rounding is 1e-6 in float32 and 0.01 in
# bfloat16, a document that sees another one 0.4 to 1.6.
SAME = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# where no number behind the value changes, so that most kernels round alike
UNTOUCHED = {torch.float32: 1e-4, torch.bfloat16: 0.02}
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True)
class Gap:
    """Of two values that have to be the same: the relative norm of their difference, and the most
    that rounding explains.
    """

    name: str
    value: float
    limit: float
    advice: str


def prove_forward(model: nn.Module, path: str, *, packed: bool, trains: bool = False) -> None:
    """path: what an error names. packed: rows will hold several documents (batch.pack). trains: the
    model will also run in training mode.
    """
    with _words(path, "its forward fails on a row of tokens"), _undisturbed(model):
        gaps = _forward_gaps(model, packed, trains)
    agreed(partial(_judge, path, gaps))


def prove_decoding(model: nn.Module, path: str) -> None:
    """Inside `gathered`; once in the life of a model."""
    if getattr(model, "reflux_decoding_proved", False):
        return
    with _words(path, "it cannot decode with a KV cache"), _undisturbed(model):
        gap = _decoding_gap(model)
    agreed(partial(_judge, path, [gap]))
    model.reflux_decoding_proved = True  # type: ignore[assignment]  # a flag of ours


def _judge(path: str, gaps: Sequence[Gap]) -> None:
    for gap in gaps:
        if not gap.value <= gap.limit:  # NaN too
            raise ValueError(
                f"{path}: {gap.name}: off by {gap.value:.2g} of the value, want at most "
                f"{gap.limit:g}. {gap.advice}"
            )


# --- what is compared


def _forward_gaps(model: nn.Module, packed: bool, trains: bool) -> list[Gap]:
    ids = _documents(model)
    ids_NL, positions_NL = _padded(ids)
    n = len(ids[1])
    model.eval()
    padded_NLD = hidden_states(model, ids_NL, positions_NL)
    alone_1LD = hidden_states(model, ids_NL[1:2, :n], positions_NL[1:2, :n])
    gaps = [
        _gap(
            "hidden states of a text change with the padding behind it, or hold NaN",
            padded_NLD[1, :n],
            alone_1LD[0],
            "Take another backend, attention or model",
        )
    ]
    if trains:
        model.train()
        gaps.append(
            _gap(
                "in training mode it computes another function than in evaluation mode",
                hidden_states(model, ids_NL, positions_NL)[1, :n],
                padded_NLD[1, :n],
                "It drops out, or adds noise: set that rate to 0 in its config.json",
            )
        )
    if packed:
        apart = torch.cat([padded_NLD[i, : len(x)] for i, x in enumerate(ids)])
        gaps += _packing_gaps(model, ids, apart)
    return gaps


def _packing_gaps(model: nn.Module, ids: Sequence[Tensor], apart_LD: Tensor) -> list[Gap]:
    """Documents in one row against the same documents apart, and the later ones against themselves
    behind another first document.
    """
    model.eval()
    row_L, first = torch.cat(list(ids)), len(ids[0])
    other_L = row_L.clone()
    other_L[:first] = row_L[:first].flip(0)
    positions_L = torch.cat([torch.arange(len(x), device=row_L.device) for x in ids])
    two_NL, positions_NL = torch.stack([row_L, other_L]), positions_L.expand(2, -1)
    row_NLD = hidden_states(model, two_NL, positions_NL, packed=True)
    name = f"batch.pack = true, but {_kind(model)} "
    advice = "Set batch.pack = false, or take another attention or model"
    return [
        _gap(
            f"{name}lets a document see the one before it in its row",
            row_NLD[1, first:],
            row_NLD[0, first:],
            advice,
            UNTOUCHED,
        ),
        _gap(f"{name}computes another function of packed documents", row_NLD[0], apart_LD, advice),
    ]


def _decoding_gap(model: nn.Module) -> Gap:
    """Logits behind two prompts of different lengths, padded on the left, and behind one token
    more.
    """
    whole = _documents(model)[1:]
    prompts = [ids[:-1] for ids in whole]
    width, device = max(map(len, prompts)), whole[0].device
    ids_NL = torch.zeros(len(whole), width, dtype=torch.long, device=device)
    positions_NL, real_NL = torch.zeros_like(ids_NL), torch.zeros_like(ids_NL, dtype=torch.bool)
    for i, ids in enumerate(prompts):
        ids_NL[i, width - len(ids) :] = ids
        positions_NL[i, width - len(ids) :] = torch.arange(len(ids), device=device)
        real_NL[i, width - len(ids) :] = True
    last_N1 = torch.stack([ids[-1:] for ids in whole])
    next_N1 = torch.tensor([[len(ids)] for ids in prompts], device=device)
    with kv_decoder(model, max_length=width + 1) as step:
        first_NV = step(ids_NL, positions_NL, real_NL, True)
        real_NL = torch.cat([real_NL, torch.ones_like(real_NL[:, :1])], 1)
        second_NV = step(last_N1, next_N1, real_NL, False)
    logits_NLV = head_logits(model, hidden_states(model, *_padded(whole)))
    at = [len(ids) - 1 for ids in prompts]
    want = [logits_NLV[i, k + step] for step in (0, 1) for i, k in enumerate(at)]
    return _gap(
        "decoding with a KV cache gives other logits than the forward of training",
        torch.cat([first_NV, second_NV]),
        torch.stack(want),
        "It would not sample from the model that is trained. Take another backend or model",
    )


def _gap(
    name: str,
    got_ND: Tensor,
    want_ND: Tensor,
    advice: str,
    limits: dict[torch.dtype, float] = SAME,
) -> Gap:
    difference_N = (got_ND.float() - want_ND.float()).norm(dim=-1)
    value = float((difference_N / want_ND.float().norm(dim=-1)).mean())
    return Gap(name, value, limits.get(got_ND.dtype, limits[torch.bfloat16]), advice)


# --- rows


def _documents(model: nn.Module) -> list[Tensor]:
    """Token ids of three short documents, the same in every run."""
    rows, total = head_rows(model), sum(DOCUMENTS)
    low = rows // 8  # beyond most control tokens
    ids = low + torch.arange(1, total + 1, device=utils.device_type) * 7919 % (rows - low)
    return list(ids.split(DOCUMENTS))


def _padded(ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and positions [N, L] as data/batch.py lays out rows: padding is behind the text, with
    positions of its own.
    """
    width = max(map(len, ids))
    pads = [width - len(x) for x in ids]
    device = ids[0].device
    ids_NL = torch.stack([torch.cat([x, x.new_zeros(pad)]) for x, pad in zip(ids, pads)])
    positions = [torch.cat([torch.arange(len(x)), torch.arange(pad)]) for x, pad in zip(ids, pads)]
    return ids_NL, torch.stack(positions).to(device)


def _kind(model: nn.Module) -> str:
    config = getattr(getattr(model, "hf", None), "config", None)
    return "this model" if config is None else f"the architecture {config.model_type!r}"


# --- around it


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Without gradients; mode and random numbers are as before. What is compiled runs uncompiled:
    the shapes of these rows are no others'.
    """
    training, cuda = model.training, utils.device_type == "cuda"
    devices = [torch.cuda.current_device()] if cuda else []
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _words(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise ValueError(
            f"{path}: {what} ({shortened(error)}). Take another backend or model"
        ) from error
