"""Models of every kind behind torchtitan, and what transformers computes with the same weights."""

import torch
from assets import MODELS
from transformers import AutoModelForCausalLM

from reflux.trainer.engine.frozen import FrozenModel, build_frozen
from reflux.trainer.engine.head import logit_scale, logit_softcap, open_head
from reflux.trainer.engine.model_builder import build_spec

NATIVE = ["qwen3", "qwen3_tied", "llama3"]
BACKENDS = [(name, "native" if name in NATIVE else "hf") for name in MODELS]
BACKENDS += [("qwen3_tied", "hf")]


def load_frozen(
    host, path, backend="auto", *, dtype="float32", seq_len=64, spec=None
) -> FrozenModel:
    """The checkpoint as a frozen model on the mesh of `host`, a torchtitan Trainer."""
    return build_frozen(
        spec or build_spec(str(path), backend=backend),
        str(path),
        host.config,
        host.parallel_dims,
        host.device,
        dtype=dtype,
        seq_len=seq_len,
    )


def random_ids(*shape, seed=0):
    return torch.randint(3, 384, shape, generator=torch.Generator().manual_seed(seed))


def positions(*lengths, rows=1):
    return torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)


def reference_logits(path, ids_NL):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids_NL).logits


def head_product(model, hidden_NLD):
    """Logits as a fused loss computes them: the head as a matrix, then scale and cap."""
    with open_head(model) as head_VD:
        z = logit_scale(model) * hidden_NLD @ head_VD.T
    cap = logit_softcap(model)
    return z if cap is None else cap * torch.tanh(z / cap)
