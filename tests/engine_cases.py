"""Models of every kind behind torchtitan, what transformers computes with the same weights, and the
samples and the loss of a step.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from assets import MODELS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from reflux.trainer.data.batch import Batch, Prompt, Rollout, Sample
from reflux.trainer.engine.engine import Engine
from reflux.trainer.engine.frozen import FrozenModel, build_frozen
from reflux.trainer.engine.head import logit_scale, logit_softcap, open_head
from reflux.trainer.engine.model_builder import build_spec
from reflux.trainer.losses import HeadInputs, Loss, token_logprob_of

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


def edited(assets, name, tmp_path, edit):
    """A copy of a checkpoint after edit(tensors)."""
    path = tmp_path / name
    shutil.copytree(assets / name, path)
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def edit_config(path: Path, **changes) -> None:
    table = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(table | changes))


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


def samples(lengths=(3, 7, 5)) -> list[Sample]:
    """Random prompts of 4, 5, ... tokens with responses of these lengths."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, 500, n).tolist())

    return [
        Sample(Rollout(Prompt(i, ()), ids(4 + i), ids(n), (0.0,) * n, 0.0, "", True))
        for i, n in enumerate(lengths)
    ]


def likelihood_loss(out: HeadInputs, batch: Batch) -> Loss:
    return -token_logprob_of(out, batch.target_T).logp.sum(), {}


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """A copy of every weight, unsharded."""
    state = engine.model.state_dict()
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for n, p in state.items()
    }
