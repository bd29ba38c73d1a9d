"""Frozen models beside the trained one (reference, proxy, teacher): sharded alike, seen by no
optimizer or checkpoint.

Weights come from the Hugging Face folder straight into the shards (weights.py); no rank holds the
whole model.

Shapes: N rows, L row length, D hidden size, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools import utils

from reflux.trainer.config.sections import FrozenSection

from .decoding import run_root
from .forward import hidden_states
from .head import logit_softcap, open_head
from .hf_models import positions_of, text_config
from .quantized import check_quantizes, quantize
from .weights import load_weights


class FrozenModel:
    """A model that is only read; built by build_frozen. Every method is collective.

    model: the sharded module. path: its folder. vocab_size: V. softcap: of the logits, see head.py.
    """

    def __init__(self, model: nn.Module, path: str, vocab_size: int):
        self.model, self.path, self.vocab_size = model, path, vocab_size
        self.softcap = logit_softcap(model)

    @torch.no_grad()
    def hidden(
        self,
        ids_NL: Tensor,
        positions_NL: Tensor,
        packed: bool = False,
        mask_NL: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, L, D] after the final norm, in the model's dtype; arguments as
        hidden_states.
        """
        return hidden_states(self.model, ids_NL, positions_NL, packed=packed, mask_NL=mask_NL)

    def open_head(self) -> contextlib.AbstractContextManager[Tensor]:
        """Context of the plain [V, D] head weight, gathered inside."""
        return open_head(self.model)

    def weights_hash(self) -> str:
        """sha256 over every rank's shards in rank order: equal as long as no weight changed, for
        one world size.
        """
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            digest.update(name.encode())
            digest.update(local.detach().cpu().contiguous().view(torch.uint8).numpy())
        digests = [""] * dist.get_world_size()
        dist.all_gather_object(digests, digest.hexdigest())
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def build_frozen(
    spec: ModelSpec,
    path: str,
    trainer_config,
    parallel_dims,
    device: torch.device,
    *,
    dtype: str,
    seq_len: int,
    offload: bool = False,
) -> FrozenModel:
    """The model of `spec` with the weights of the Hugging Face folder `path`, in `dtype` ("float32"
    or "bfloat16").

    trainer_config, parallel_dims, device: the Trainer's; all models of a run share one mesh.
    seq_len: the longest row it will see. offload: keep the shards in host memory (CUDA only; needs
    a gloo process group for the CPU). Collective. ValueError for an unknown dtype, too long a
    seq_len, and weights that do not fit the model.
    """
    offload = offload and device.type != "cpu"
    spec, config = _fitted(spec, path, trainer_config, dtype=dtype, seq_len=seq_len)
    config.training = dataclasses.replace(config.training, enable_cpu_offload=offload)
    model = _sharded(spec, config, parallel_dims, device, TORCH_DTYPE_MAP[dtype])
    load_weights(model, spec, path)
    run_root(model)
    return FrozenModel(model, path, text_config(path).vocab_size)


def build_quantized(
    spec: ModelSpec, path: str, trainer_config, device: torch.device, role: FrozenSection, seq_len
) -> FrozenModel:
    """The same with the linear layers of the blocks in `role.quantization`, whole on every rank.

    The weights pass through host memory, in role.dtype. Collective. ValueError on a CPU, and where
    bitsandbytes is not installed.
    """
    check_quantizes(role.quantization, device)
    spec, _ = _fitted(spec, path, trainer_config, dtype=role.dtype, seq_len=seq_len)
    with torch.device("meta"), utils.set_default_dtype(TORCH_DTYPE_MAP[role.dtype]):
        model = spec.model.build()
    model.requires_grad_(False)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    load_weights(model, spec, path)
    quantize(model, role.quantization, device)
    run_root(model.eval())
    return FrozenModel(model, path, text_config(path).vocab_size)


def _fitted(spec: ModelSpec, path: str, trainer_config, *, dtype: str, seq_len: int):
    """Copies of the spec and of torchtitan's configuration for a frozen model of this dtype and
    length. ValueError as of build_frozen.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"{path}: dtype = {dtype!r}; want 'float32' or 'bfloat16'")
    limit = positions_of(text_config(path))
    if limit is not None and seq_len > limit:
        raise ValueError(
            f"{path}: seq_len = {seq_len}; the model has {limit} positions "
            "(max_position_embeddings). Shorten prompt or response, or take a model with a longer "
            "context"
        )
    # update_from_config cuts its RoPE cache
    spec = dataclasses.replace(spec, model=copy.deepcopy(spec.model))
    config = copy.copy(trainer_config)
    config.training = dataclasses.replace(
        config.training, seq_len=seq_len, mixed_precision_param=dtype
    )
    spec.model.update_from_config(config=config)
    return spec, config


def _sharded(spec: ModelSpec, config, parallel_dims, device: torch.device, dtype: torch.dtype):
    """The steps of torchtitan's Trainer, without gradients and activation checkpointing. The
    weights are still random.
    """
    offload = config.training.enable_cpu_offload
    with torch.device("meta"), utils.set_default_dtype(dtype):
        model = spec.model.build()
    model.requires_grad_(False)
    model = spec.parallelize_fn(
        model,
        parallel_dims=parallel_dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder=config.dump_folder,
    )
    model.to_empty(device="cpu" if offload else device)
    with torch.no_grad():
        model.init_weights(buffer_device=device if offload else None)
    return model.eval()
