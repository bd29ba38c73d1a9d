"""torchtitan's sections of a configuration, option by option: what they are in a run, and why."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from reflux.trainer.config.fit import spell
from reflux.trainer.config.options import Option
from reflux.trainer.config.schema import TITAN_SECTIONS, Config

from .titan_sections import REPLACED
from .trainer_config import titan_config

# Our words for what an option does here; an option that torchtitan gains has to get some.
NOTES = {
    "training.seq_len": "tokens of the longest row: prompt and response",
    "training.max_norm": "of the gradient, over all parameters; clipped above",
    "training.enable_cpu_offload": "weights, gradients and optimizer state wait in host memory",
    "training.disable_cuda_graphs": "true: rows change their shape from step to step",
    "training.dtype": "of the stored weights and of the optimizer state",
    "training.mixed_precision_param": "of forward and backward; float32 on a CPU is exact",
    "training.mixed_precision_reduce": "of gradients while they are summed over ranks",
    "training.gc_freq": "steps between two collections of garbage, on all ranks at once",
    "training.gc_debug": "logs what the garbage collector finds",
    "training.sync_every_microbatch": "false: gradients are reduced once a step; ours",
    "parallelism.data_parallel_replicate_degree": "copies of the model; their gradients are summed",
    "parallelism.data_parallel_shard_degree": "ranks that share one copy; -1: all that are left",
    "parallelism.fsdp_reshard_after_forward": "whether gathered weights are freed until backward",
    "parallelism.enable_fsdp_symm_mem": "symmetric memory for gathers, where GPUs have NVLink",
    "parallelism.tensor_parallel_degree": "ranks that share each layer; backend native only",
    "parallelism.enable_sequence_parallel": "with tensor parallelism: norms are split by position",
    "parallelism.spmd_backend": "fixed: the only one that runs on every supported torch",
    "parallelism.pipeline_parallel_degree": "fixed at 1",
    "parallelism.module_fqns_per_model_part": "of pipeline parallelism, which is off",
    "parallelism.pipeline_parallel_first_stage_less_layers": "as above",
    "parallelism.pipeline_parallel_last_stage_less_layers": "as above",
    "parallelism.pipeline_parallel_layers_per_stage": "as above",
    "parallelism.pipeline_parallel_schedule": "as above",
    "parallelism.pipeline_parallel_schedule_csv": "as above",
    "parallelism.pipeline_parallel_microbatch_size": "as above",
    "parallelism.context_parallel_degree": "fixed at 1",
    "parallelism.context_parallel_load_balancer": "of context parallelism, which is off",
    "parallelism.context_parallel_ptrr_mask_key": "as above",
    "parallelism.expert_parallel_degree": "fixed at 1",
    "checkpoint.enable": "false: none is written",
    "checkpoint.interval": "steps; the last is saved in any case; guards go back to one of them",
    "checkpoint.initial_load_model_only": "a model's folder holds no optimizer",
    "checkpoint.initial_load_in_hf": "set by model.from_scratch and lora",
    "checkpoint.initial_load_in_hf_quantized": "not used here",
    "checkpoint.last_save_model_only": "true: the last checkpoint cannot be trained further",
    "checkpoint.last_save_in_hf": "use [export] for a Hugging Face folder",
    "checkpoint.export_dtype": "of last_save_in_hf",
    "checkpoint.keep_latest_k": "newest checkpoints that stay, beside a guard's; 0: all",
    "checkpoint.load_step": "which one a resumed run starts from; -1: the newest whole one",
    "checkpoint.exclude_from_loading": "parts that a resumed run begins anew",
    "checkpoint.enable_first_step_checkpoint": "one after step 1, to see that saving works",
    "checkpoint.create_seed_checkpoint": "false: a run writes none",
    "checkpoint.load_only": "true: checkpoints are read and none is written",
    "checkpoint.async_mode": "writes beside the next step",
    "checkpoint.weights_only_at_end": "the last checkpoint loses its optimizer; ours",
    "compile.enable": "torch.compile of every block",
    "compile.enable_async_tensor_parallel": "overlaps its communication; wants compile",
    "compile.components": "what is compiled; the loss is ours and is not",
    "compile.backend": "of torch.compile",
    "comm.init_timeout_seconds": "of the first step, which loads and compiles",
    "comm.train_timeout_seconds": "of later steps; rollouts and graders skew ranks",
    "comm.trace_buf_size": "entries of the record of collectives",
    "comm.save_traces_folder": "where that record goes after a timeout, in the run's folder",
    "comm.save_traces_file_prefix": "of its files, one a rank",
    "comm.mode": "other values simulate ranks",
    "metrics.log_freq": "of torchtitan's own metrics; the log has every step",
    "metrics.enable_tensorboard": "set by log.tensorboard",
    "metrics.disable_color_printing": "of torchtitan's own lines",
    "metrics.save_tb_folder": "in the run's folder",
    "metrics.save_for_all_ranks": "one TensorBoard file a rank",
    "metrics.enable_wandb": "set by log.wandb",
    "debug.spmd_typechecking": "of another backend than ours",
    "debug.deterministic": "deterministic algorithms where torch has them; slower",
    "debug.deterministic_warn_only": "warns where it has none",
    "debug.moe_force_load_balance": "experts by turns in place of the router: for timing only",
    "debug.detect_anomaly": "names the forward that made a NaN in backward; slow",
    "debug.batch_invariant": "kernels whose numbers do not depend on the batch; slower",
    "debug.print_config": "--print-config prints all of it",
    "debug.save_config_file": "config.toml of the run's folder has it",
    "debug.enable_structured_logging": "torchtitan's own log; run.jsonl has ours",
    "profiler.enable_profiling": "traces of steps for Perfetto",
    "profiler.save_traces_folder": "in the run's folder",
    "profiler.profile_freq": "steps between two traces; at least warmup + active",
    "profiler.profiler_repeat": "how often; empty: to the end",
    "profiler.profiler_skip_first": "steps before the first trace",
    "profiler.profiler_skip_first_wait": "whether the first wait is left out",
    "profiler.profiler_active": "steps in a trace",
    "profiler.profiler_warmup": "steps that are run with the profiler and thrown away",
    "profiler.enable_memory_snapshot": "of the CUDA allocator, on an out-of-memory error too",
    "profiler.memory_snapshot_freq": "steps; empty: profile_freq",
    "profiler.save_memory_snapshot_folder": "in the run's folder",
    "profiler.memory_snapshot_max_entries": "of the allocator's history",
    "profiler.trace_post_processor": "a function; not from a file",
    "lr_scheduler.warmup_steps": "default: a tenth of steps, at most 10; at most total_steps",
    "lr_scheduler.total_steps": "of the schedule, steps or more; empty: steps",
    "lr_scheduler.decay_ratio": "last part, behind the warmup, in which the rate falls; 0: none",
    "lr_scheduler.decay_type": "the form of its fall",
    "lr_scheduler.min_lr_factor": "what is left of optim.lr at the end",
}


def titan_options(cfg: Config) -> dict[str, list[Option]]:
    """Section -> its options with the values of this run. Those that our own tables decide
    (REPLACED) are left out. KeyError for an option without a note.
    """
    config = titan_config(cfg, None)  # of the model only its folder counts
    return {section: _options(section, getattr(config, section)) for section in TITAN_SECTIONS}


def titan_table(cfg: Config) -> Mapping[str, Mapping[str, Any]]:
    """Section -> option -> value of this run, as a file writes them."""
    options = titan_options(cfg)
    return {s: {o.key: o.value for o in options[s] if _is_plain(o.value)} for s in options}


def _options(section: str, values: Any) -> list[Option]:
    hints = typing.get_type_hints(type(values), include_extras=True)
    return [
        Option(f.name, spell(hints[f.name]), getattr(values, f.name), NOTES[f"{section}.{f.name}"])
        for f in dataclasses.fields(values)
        if f"{section}.{f.name}" not in REPLACED
    ]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)
