"""The engine: torchtitan's Trainer with the loop turned inside out, so that a phase decides what a
step reads and loses.

    engine = Engine(cfg)                      # meshes, FSDP2 model, AdamW, schedule, checkpointer;
        resumes by itself
    for step in engine.steps():               # saves where the checkpoint section says
        with engine.gathered_weights() as decode: ...  # sample from the training weights
        engine.step(batches, loss)            # loss sums divided once by the global token count

World-size rules (docs/method.md, "Ranks"): every rank calls each sharded model equally often,
gradients are summed, the token count is reduced before the division. Shapes: N rows, L row length,
T response tokens, D hidden, V vocabulary.
"""

# ruff: noqa: E402  install() has to run between the imports
from . import compat

compat.install()

import contextlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import FrozenSection
from reflux.trainer.data.batch import Batch, empty_batch
from reflux.trainer.losses import HeadInputs, Loss

from .decoding import gathered, kv_decoder
from .export import export_hf
from .frozen import FrozenModel, build_frozen, verify_loaded
from .metrics import MetricSums
from .model_builder import (
    build_spec,
    head_weight,
    hidden_states,
    logit_scale,
    logit_softcap,
    open_head,
)
from .trainer_config import titan_config

NATIVE_CACHE_LIMIT = 32768  # positions of a frozen native model's rotary cache

# torchtitan logs through the root logger; its remarks about missing lspci, index files and CPU peak
# flops are no news here
logging.getLogger().addFilter(
    lambda r: r.levelno >= logging.ERROR or f"{os.sep}torchtitan{os.sep}" not in r.pathname
)
warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")


class _NoData(BaseDataLoader):
    """Prompts are a pure function of (seed, step); torchtitan's loader has nothing to do."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, **_: Any):
        pass

    def __iter__(self):
        return iter(())

    def state_dict(self) -> dict:
        return {"none": 0}

    def load_state_dict(self, state: dict) -> None:
        pass


class _NoTokenizer(BaseTokenizer):
    """Tokenizers belong to roles (chat.py)."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any):
        super().__init__()

    def encode(self, *args, **kwargs):
        raise ValueError("the engine has no tokenizer; use Chat")

    decode = encode

    def get_vocab_size(self) -> int:
        return 0


class _NoLoss(BaseLoss):
    """The phase brings the loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config=None):
        pass


class RefluxTrainer(Trainer):
    """torchtitan's Trainer plus a small dictionary of numbers that must survive a restart."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Config):
        self.notes: dict[str, float] = {}
        super().__init__(config)

    def state_dict(self) -> dict[str, Any]:
        return Trainer.state_dict(self) | {"notes": json.dumps(self.notes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        Trainer.load_state_dict(self, state)
        self.notes = json.loads(state["notes"])


class Engine:
    """The trained model and everything that knows about ranks."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        spec = build_spec(
            _folder(cfg.model.path, "model.path"),
            backend=cfg.model.backend,
            attention=cfg.model.attention,
        )
        parts = (_NoData.Config(), _NoTokenizer.Config(), _NoLoss.Config())
        self._config = titan_config(cfg, RefluxTrainer.Config, spec, *parts)
        self._trainer = RefluxTrainer(self._config)
        fresh = not (Path(self._config.dump_folder) / self._config.checkpoint.folder).exists()
        self._trainer.checkpointer.load(step=self._config.checkpoint.load_step)
        self.resumed_step = self._trainer.step
        if fresh and not cfg.model.from_scratch:
            verify_loaded(self.model, spec, cfg.model.path)
        dims = self._trainer.parallel_dims
        self._group = dims.get_mesh("batch").get_group() if dims.dp_enabled else None
        self.rank, self.world = (
            (dist.get_rank(self._group), dist.get_world_size(self._group))
            if self._group
            else (0, 1)
        )
        self.is_main = dist.get_rank() == 0
        # a phase lowers it to what its tokenizer knows (padded heads)
        self.vocab_size = self.model.lm_head.weight.shape[0]
        self.asked_to_stop = False  # set on this rank by a signal
        # agreed on by all ranks at the end of the step: a rank that left alone would hang the rest
        self.wants_to_stop = False

    # what a phase may look at
    @property
    def model(self) -> torch.nn.Module:
        return self._trainer.model_parts[0]

    @property
    def device(self) -> torch.device:
        return self._trainer.device

    @property
    def seq_len(self) -> int:
        return self._config.training.seq_len

    @property
    def notes(self) -> dict[str, float]:
        """Numbers that survive a restart, the same on every rank (moving averages of guards)."""
        return self._trainer.notes

    @property
    def softcap(self) -> float | None:
        return logit_softcap(self.model)

    def frozen(self, role: FrozenSection, *, longest: int = NATIVE_CACHE_LIMIT) -> FrozenModel:
        """A model that is only read, sharded like the trained one, outside optimizer and
        checkpoint.
        """
        path = _folder(role.path, "path of a frozen model")
        known = json.loads((Path(path) / "config.json").read_text())
        limit = known.get("max_position_embeddings") or known.get("text_config", {}).get(
            "max_position_embeddings", longest
        )
        return build_frozen(
            build_spec(path, backend=role.backend, attention=role.attention),
            path,
            self._config,
            self._trainer.parallel_dims,
            self.device,
            dtype=role.dtype,
            seq_len=min(limit, longest),
            offload=role.offload,
        )

    # the loop
    def steps(self) -> Iterator[int]:
        """Step numbers from the one after the checkpoint; the checkpoint of a step is written when
        the next is asked for.
        """
        trainer = self._trainer
        with self._config.profiler.build(
            global_step=trainer.step, base_folder=self._config.dump_folder
        ) as profiler:
            while trainer.step < self.cfg.steps and not self.wants_to_stop:
                trainer.step += 1
                trainer.gc_handler.run(trainer.step)
                yield trainer.step
                self.wants_to_stop = self._on_any_rank(self.asked_to_stop)
                trainer.checkpointer.save(
                    trainer.step, last_step=trainer.step == self.cfg.steps or self.wants_to_stop
                )
                profiler.step()

    def step(
        self, batches: Sequence[Batch], loss: Callable[[HeadInputs, Batch], Loss]
    ) -> dict[str, float]:
        """Forward, loss, backward, one division by the global token count, clip, AdamW. Returns
        means over tokens.
        """
        trainer, batches = self._trainer, self.pad_across_ranks(batches)
        tokens = self.sum(float(sum(b.tokens for b in batches)))
        for epoch in range(self.cfg.policy.epochs):
            trainer.optimizers.zero_grad()
            sums = self._accumulate(batches, loss, max(tokens, 1.0))
            norm = dist_utils.clip_grad_norm_(
                list(self.model.parameters()), self._config.training.max_norm, foreach=True
            )
            if epoch == 0:
                stats = self._means(sums, max(tokens, 1.0)) | {
                    "grad_norm": float(norm),
                    "tokens": tokens,
                }
            if not (math.isfinite(stats["loss"]) and math.isfinite(float(norm))):
                self._dump(batches, stats)
            trainer.checkpointer.maybe_wait_for_staging()
            if tokens:
                trainer.optimizers.step()
        stats["lr"] = trainer.lr_schedulers.schedulers[0].get_last_lr()[0]
        trainer.lr_schedulers.step()
        return stats

    def backward(self, batches: Sequence[Batch], loss: Callable[[HeadInputs, Batch], Loss]) -> None:
        """The gradient of the loss's plain sum over all ranks, left in `.grad`; no weight moves.
        Collective.
        """
        self.clear_gradients()
        self._accumulate(self.pad_across_ranks(batches), loss, 1.0)

    def clear_gradients(self) -> None:
        self._trainer.optimizers.zero_grad()

    def _accumulate(
        self, batches: Sequence[Batch], loss: Callable, tokens: float
    ) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {"loss": torch.zeros((), device=self.device)}
        for batch in (b.to(self.device) for b in batches):
            with self._trainer.train_context():
                hidden_NLD = hidden_states(
                    self.model, batch.input_NL, batch.position_NL, packed=batch.packed
                )
                out = HeadInputs(
                    _select(hidden_NLD, batch, logit_scale(self.model)),
                    head_weight(self.model),
                    self.softcap,
                    self.vocab_size,
                )
                total, metrics = loss(out, batch)
                # an empty batch still runs the collectives
                (total / tokens + 0.0 * hidden_NLD.float().sum()).backward()
            for name, value in (metrics | {"loss": total.detach()}).items():
                before = sums.get(name)
                worst = name.startswith("max/")
                sums[name] = (
                    value
                    if before is None
                    else torch.maximum(before, value)
                    if worst
                    else before + value
                )
        return sums

    def _means(self, sums: dict[str, Tensor], tokens: float) -> dict[str, float]:
        """Sums and maxima over ranks in two reductions; sums are divided by the global token
        count.
        """
        names = sorted(sums)
        tops = [n for n in names if n.startswith("max/")]
        rest = [n for n in names if not n.startswith("max/")]
        added = self._reduce([sums[n] for n in rest], dist.ReduceOp.SUM)
        highest = self._reduce([sums[n] for n in tops], dist.ReduceOp.MAX)
        return {n: v / tokens for n, v in zip(rest, added)} | dict(zip(tops, highest))

    def _dump(self, batches: Sequence[Batch], stats: dict[str, float]) -> None:
        path = (
            Path(self._config.dump_folder)
            / f"nonfinite-step-{self._trainer.step}-rank-{self.rank}.pt"
        )
        torch.save({"batches": [vars(b) for b in batches], "stats": stats}, path)
        raise FloatingPointError(
            f"step {self._trainer.step}: loss {stats['loss']}, gradient norm {stats['grad_norm']}; "
            f"the weights are untouched and the batch lies in {path}. Lower optim.lr, or look for "
            "inf scores"
        )

    # reading the trained model
    @contextlib.contextmanager
    def gathered_weights(self) -> Iterator[Callable]:
        """The training weights, gathered for decoding: yields decode(rows, max_length) -> context
        of (step, device).
        """
        with gathered(self.model, self._config.parallelism.fsdp_reshard_after_forward):
            yield self._decoder_of(self.model)

    @contextlib.contextmanager
    def gathered_frozen_weights(self, frozen: FrozenModel) -> Iterator[Callable]:
        """The same for a frozen model."""
        with frozen.gathered():
            yield self._decoder_of(frozen.model)

    def _decoder_of(self, model: torch.nn.Module) -> Callable:
        @contextlib.contextmanager
        def decode(rows: int, max_length: int):
            with kv_decoder(model, max_length=max_length) as step:
                yield step, self.device

        return decode

    @torch.no_grad()
    def hidden(self, ids_NL: Tensor, positions_NL: Tensor, packed: bool = False) -> Tensor:
        """Hidden states of the trained model without a graph; with `open_head`, the interface of a
        FrozenModel.
        """
        return hidden_states(self.model, ids_NL, positions_NL, packed=packed)

    @contextlib.contextmanager
    def open_head(self) -> Iterator[Tensor]:
        with open_head(self.model) as weight_VD:
            yield weight_VD

    def forward_no_grad(
        self, reader: "Engine | FrozenModel", batch: Batch, vocab_size: int
    ) -> contextlib.AbstractContextManager[HeadInputs]:
        """What `reader` (a frozen model, or this engine without a graph) leaves at the batch's
        predictor positions.
        """
        return _read(reader, batch, vocab_size)

    # ranks
    def pad_across_ranks(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same number of micro-batches on every rank: ranks that have fewer get empty ones."""
        most = int(
            self._reduce(
                [torch.tensor(float(len(batches)), device=self.device)], dist.ReduceOp.MAX
            )[0]
        )
        return [*batches, *(empty_batch() for _ in range(max(most, 1) - len(batches)))]

    def sum(self, value: float) -> float:
        """Over data-parallel ranks, in float64."""
        return self._reduce(
            [torch.tensor(value, dtype=torch.float64, device=self.device)], dist.ReduceOp.SUM
        )[0]

    def _on_any_rank(self, flag: bool) -> bool:
        """The same answer everywhere, also inside a tensor-parallel group."""
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def mean(self, metric_sums: MetricSums) -> dict[str, float]:
        """Means of a metric_sums over all ranks' entries; every rank must have tallied the same names."""
        names = sorted(metric_sums.sums)
        flat = [
            torch.tensor(v, dtype=torch.float64, device=self.device)
            for n in names
            for v in metric_sums.sums[n]
        ]
        values = self._reduce(flat, dist.ReduceOp.SUM)
        return {
            n: values[2 * i] / values[2 * i + 1] if values[2 * i + 1] else 0.0
            for i, n in enumerate(names)
        }

    def gather(self, rows: list) -> list:
        """All ranks' rows in rank order, on every rank."""
        if self.world == 1:
            return rows
        parts: list[list] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, rows, group=self._group)
        return [row for part in parts for row in part]

    def _reduce(self, values: list[Tensor], op: Any) -> list[float]:
        if not values:
            return []
        stacked = torch.stack([v.detach().double() for v in values])
        if self.world > 1:
            dist.all_reduce(stacked, op, group=self._group)
        return stacked.tolist()

    # the way out
    def restore(self, step: int) -> int:
        """Back to the newest checkpoint that is not after `step`, or to the weights the run started
        from. Returns its step.
        """
        checkpointer, given = self._trainer.checkpointer, self._config.checkpoint
        saved = [
            int(p.parent.name.removeprefix("step-"))
            for p in Path(checkpointer.folder).glob("step-*/.metadata")
        ]
        newest = max((n for n in saved if n <= step), default=0)
        if newest:
            checkpointer.load(step=newest)
        elif given.initial_load_path:
            checkpointer.dcp_load(
                checkpointer._states_to_load(model_only=True),
                checkpoint_id=given.initial_load_path,
                from_hf=given.initial_load_in_hf,
                from_quantized=False,
            )
        dist.barrier()
        # a run resumed later must not start from what was given up; nothing is deleted
        if dist.get_rank() == 0:
            for n in (n for n in saved if n > newest):
                (Path(checkpointer.folder) / f"step-{n}").rename(
                    Path(checkpointer.folder) / f"given-up-{n}"
                )
        dist.barrier()
        return newest

    def checkpoint(self) -> None:
        """Write a checkpoint of the current step now."""
        self._trainer.checkpointer.save(self._trainer.step, last_step=True)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """TensorBoard and W&B, where enabled."""
        self._trainer.metrics_processor.logger.log(metrics, step)

    def export(self, card: str) -> str:
        """A Hugging Face folder in <folder>/export. Collective."""
        out = str(Path(self._config.dump_folder).resolve() / "export")
        export_hf(
            self._trainer,
            out,
            os.path.abspath(self.cfg.model.path),
            dtype=self.cfg.export.dtype,
            card=card,
        )
        return out

    def memory_gib(self) -> float:
        """Peak of this rank: device memory on CUDA, resident memory on a CPU."""
        stats = utils.device_module.memory_stats(self.device)
        return stats.get("reserved_bytes.all.peak", 0) / 2**30

    def close(self) -> None:
        self._trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _read(reader: Any, batch: Batch, vocab_size: int) -> Iterator[HeadInputs]:
    with torch.no_grad():
        hidden_NLD = reader.hidden(batch.input_NL, batch.position_NL, batch.packed)
    with reader.open_head() as weight_VD:
        yield HeadInputs(
            _select(hidden_NLD, batch, logit_scale(reader.model)),
            weight_VD,
            reader.softcap,
            min(vocab_size, weight_VD.shape[0]),
        )


def _select(hidden_NLD: Tensor, batch: Batch, scale: float) -> Tensor:
    hidden_TD = hidden_NLD.flatten(0, 1)[batch.row_T]
    return hidden_TD if scale == 1.0 else hidden_TD * scale


def _folder(path: str, name: str) -> str:
    full = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(os.path.join(full, "config.json")):
        raise ValueError(
            f"{name} = {path!r}: no config.json there; want a Hugging Face model folder"
        )
    return full
