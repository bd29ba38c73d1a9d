"""Frozen models beside the trained one (reference, proxy, teacher): sharded alike, seen by no
optimizer or checkpoint.

Weights come from the Hugging Face folder straight into the shards; no rank holds the whole model. A
missing, extra or misshapen tensor is an error that names it, before anything is read. One tensor is
compared with the file afterwards: torchtitan silently starts from random weights when no load is
configured.

Shapes: N rows, L row length, D hidden size, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import glob
import hashlib
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools import utils

from .decoding import run_root
from .forward import hidden_states
from .head import logit_softcap, open_head
from .hf_models import text_config


class FrozenModel:
    """A model that is only read; built by build_frozen. Every method is collective.

    model: the sharded module. vocab_size: V. softcap: of the logits, see head.py.
    """

    def __init__(self, model: nn.Module, vocab_size: int):
        self.model, self.vocab_size = model, vocab_size
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
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"{path}: dtype = {dtype!r}; want 'float32' or 'bfloat16'")
    limit = text_config(path).max_position_embeddings
    if seq_len > limit:
        raise ValueError(
            f"{path}: seq_len = {seq_len}; the model has {limit} positions "
            "(max_position_embeddings). Shorten prompt or response, or take a model with a longer "
            "context"
        )
    offload = offload and device.type != "cpu"
    # update_from_config cuts its RoPE cache
    spec = dataclasses.replace(spec, model=copy.deepcopy(spec.model))
    config = copy.copy(trainer_config)
    config.training = dataclasses.replace(
        config.training, seq_len=seq_len, enable_cpu_offload=offload, mixed_precision_param=dtype
    )
    spec.model.update_from_config(config=config)
    model = _sharded(spec, config, parallel_dims, device, TORCH_DTYPE_MAP[dtype])
    load_weights(model, spec, path)
    run_root(model)
    return FrozenModel(model, text_config(path).vocab_size)


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


def load_weights(model, spec: ModelSpec, path: str) -> None:
    """Reads the folder's safetensors into the shards through the spec's adapter. Collective.

    ValueError naming the tensor for a missing, an extra or a misshapen one; RuntimeError if the
    weights did not change.
    """
    adapter = spec.state_dict_adapter(spec.model, path)
    weights = adapter.to_hf(ModelWrapper(model).state_dict())
    check_weights(weights, path)
    dcp.load(weights, storage_reader=adapter.get_hf_storage_reader(path))
    ModelWrapper(model).load_state_dict(adapter.from_hf(weights))
    verify_loaded(model, spec, path)


def file_shapes(path: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (file, shape), from the headers of the folder's safetensors."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors"))):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                shapes[name] = file, tuple(tensors.get_slice(name).get_shape())
    if not shapes:
        raise ValueError(
            f"{path}: no *.safetensors there; convert the weights with save_pretrained"
        )
    return shapes


def check_weights(weights: dict[str, Tensor], path: str) -> None:
    """ValueError unless the folder's tensors are exactly those of the model (global shapes, Hugging
    Face's names).
    """
    stored = file_shapes(path)
    for name, weight in weights.items():
        if name not in stored:
            raise ValueError(
                f"{path}: no tensor {name!r} {tuple(weight.shape)} in its safetensors; the "
                "folder's config.json describes another model, or a file is missing"
            )
        if stored[name][1] != tuple(weight.shape):
            raise ValueError(
                f"{path}: tensor {name!r} is {stored[name][1]}; the model of its config.json wants "
                f"{tuple(weight.shape)}"
            )
    # a tied head stored twice; buffers of old exports
    known = ("lm_head.weight", "rotary_emb.inv_freq")
    extra = sorted(name for name in stored.keys() - weights.keys() if not name.endswith(known))
    if extra:
        raise ValueError(
            f"{path}: {len(extra)} tensors that the model does not have, first {extra[0]!r}; the "
            "architecture in its config.json lacks them (multimodal folders: export the text model)"
        )


def verify_loaded(model, spec: ModelSpec, path: str) -> None:
    """Compares the smallest matrix with the file. RuntimeError if they differ, for then nothing was
    read. Collective.

    A matrix, because freshly initialised norms are ones and so are many stored ones.
    """
    weights = spec.state_dict_adapter(spec.model, path).to_hf(ModelWrapper(model).state_dict())
    name = min(
        (name for name in weights if weights[name].dim() == 2),
        key=lambda name: (weights[name].numel(), name),
    )
    with safe_open(file_shapes(path)[name][0], framework="pt") as tensors:
        want = tensors.get_tensor(name)
    got = weights[name].full_tensor() if isinstance(weights[name], DTensor) else weights[name]
    if not torch.equal(got.detach().cpu(), want.to(got.dtype)):
        raise RuntimeError(
            f"{path}: {name!r} in the model is not the one in the file: the weights were not loaded"
        )
