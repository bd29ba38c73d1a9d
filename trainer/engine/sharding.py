"""Parallelism of every model here: FSDP2 or HSDP groups, the head a group of its own (see head.py);
tensor parallelism for native models; activation checkpointing; compile.
"""

import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import get_fsdp_reshard_after_forward_policy
from torchtitan.tools import utils

from .hf_models import HFDecoder
from .weights import ADAPTERS

log = logging.getLogger(__name__)


def parallelize(
    model,
    *,
    parallel_dims,
    training,
    parallelism,
    compile_config,
    ac_config,
    dump_folder,
    attach: Callable[[nn.Module, torch.dtype], None] | None = None,
):
    """torchtitan's parallelize_fn for every model here: TP (native), activation checkpointing,
    compile, FSDP2/HSDP.

    Gradients are summed over ranks: a loss divides by its global token count, once. attach: puts
    adapters into the model first, given the dtype of what stays frozen (lora.py).
    ValueError for context, pipeline and expert parallelism, and for TP with the Hugging Face
    backend.
    """
    if parallel_dims.cp_enabled or parallel_dims.pp_enabled or parallel_dims.ep_enabled:
        raise ValueError(
            "parallelism: context, pipeline or expert parallel degree above 1; want data and "
            "tensor parallelism only"
        )
    if attach is not None:
        attach(model, TORCH_DTYPE_MAP[training.mixed_precision_param])
    body = _with_layers(model) if isinstance(model, HFDecoder) else model
    if parallel_dims.tp_enabled:
        if isinstance(model, HFDecoder):
            raise ValueError(
                f"parallelism.tensor_parallel_degree = {parallel_dims.tp} with the backend 'hf'; "
                "want 1, or a model that the backend 'native' supports"
            )
        model.parallelize(parallel_dims)
    if ac_config is not None:
        if isinstance(ac_config, SelectiveAC.Config) and has_state(body):
            log.info("activation checkpointing is 'full': this architecture writes in place")
            ac_config = FullAC.Config()
        ac_config.build(dump_folder=dump_folder).apply(body)
    if compile_config.enable and "model" in compile_config.components:
        apply_compile(body, compile_config=compile_config, parallel_dims=parallel_dims)
    axes = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    _shard(model, parallel_dims.get_mesh(axes), training, parallelism.fsdp_reshard_after_forward)
    return model


def has_state(model: nn.Module) -> bool:
    """Whether some block is recurrent: linear attention, a state space, a short convolution. Their
    plain torch code changes tensors that selective checkpointing keeps.
    """
    kinds = (nn.Conv1d,)
    names = ("A_log", "time_decay", "recurrent_gate_weight")
    return any(
        isinstance(m, kinds) or any(hasattr(m, name) for name in names) for m in model.modules()
    )


def _with_layers(model: HFDecoder) -> nn.Module:
    """The decoder's blocks under the name that torchtitan looks for."""
    holder = nn.Module()
    holder.layers = model.block_list
    return holder


def _shard(model, mesh, training, policy: str) -> None:
    """FSDP2 groups: embedding, each block, head (with a tied embedding); the root keeps the final
    norm.
    """
    options = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            cast_forward_inputs=False,
        ),
    )
    # it pins memory, which CPU builds cannot
    if training.enable_cpu_offload and utils.device_type != "cpu":
        options["offload_policy"] = CPUOffloadPolicy()
    for modules, reshard in _units(model, policy):
        fully_shard(modules, **options, reshard_after_forward=reshard)
    fully_shard(model, **options)
    for unit in fsdp_units(model):
        unit.set_gradient_divide_factor(1.0)
        # a factor of 1.0 alone reduces with PREMUL_SUM; gloo has none
        unit.set_force_sum_reduction_for_comms(True)


def _units(model, policy: str) -> list[tuple[nn.Module | list[nn.Module], bool]]:
    """FSDP groups below the root, each with its reshard_after_forward under torchtitan's policy."""
    blocks = get_fsdp_reshard_after_forward_policy(policy, pp_enabled=False)
    # otherwise the backward follows at once and would gather it again; and with adapters the same
    # model is read as the reference between a forward and its backward
    head = policy == "always" and not has_adapters(model)
    if model.enable_weight_tying:
        ends = [([model.tok_embeddings, model.lm_head], head)]
    else:
        ends = [(model.tok_embeddings, blocks), (model.lm_head, head)]
    return ends + [(block, blocks) for block in model.layers.values()]


def has_adapters(model) -> bool:
    return any(name.endswith(ADAPTERS) for name, _ in model.named_parameters())


def restore_reshard(model, policy: str) -> None:
    """Sets every group's reshard_after_forward as `parallelize` did; FSDP2 has a setter and no
    getter.
    """
    model.set_reshard_after_forward(False, recurse=False)
    for modules, reshard in _units(model, policy):
        for module in modules if isinstance(modules, list) else [modules]:
            assert isinstance(module, FSDPModule)
            module.set_reshard_after_forward(reshard, recurse=False)


def fsdp_units(model) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
