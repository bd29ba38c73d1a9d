"""The engine: torchtitan's Trainer with the loop turned inside out, so that a phase decides what a
step samples and which loss it takes.

    engine = Engine(cfg)           # meshes, FSDP2 model, AdamW, schedule, checkpoints; resumes
    for step in engine.steps():    # saves where the checkpoint section says
        with engine.gathered_weights() as decode: ...  # sample from the training weights
        engine.step(epochs, loss)  # loss sums divided once by the global token count

World-size rules (docs/method.md, "Ranks"): every rank calls each sharded model equally often,
gradients are summed, the token count is reduced before the division. Shapes: N rows, L row length,
T response tokens, D hidden size, V vocabulary.
"""

import contextlib
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpointer.base import MODEL
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools import utils

from reflux.trainer import disk_space
from reflux.trainer import phase as contracts
from reflux.trainer.adapter_folder import model_folder, read_adapter
from reflux.trainer.config.phases import spec_of
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import FrozenSection
from reflux.trainer.data.batch import Batch
from reflux.trainer.data.tokenizer_files import read_template
from reflux.trainer.losses import HeadInputs

from .agreement import agreed
from .decoding import decoder_of, gathered
from .export import export_hf
from .fingerprints import RunInputs
from .forward import hidden_states
from .frozen import FrozenModel, build_frozen, build_quantized
from .gradients import (
    Update,
    accumulate_gradients,
    dumped,
    epoch_means,
    forward_no_grad,
    totals,
)
from .head import head_rows, logit_softcap, open_head
from .hf_models import positions_of, text_config
from .last_step import LastStep
from .lora import AdapterState, BaseModel, adapted_layers, reset_adapters, with_adapters
from .lora_export import export_lora, stored_layers
from .metrics import MetricSums
from .model_builder import build_spec
from .model_folder import check_folders
from .probe import prove_decoding, prove_forward
from .publish import named_weights
from .ranks import RankGroup, Result, from_all_ranks
from .rescue import Announcement, Rescue, first_line
from .torchtitan_host import RefluxTrainer
from .trainer_config import check_world, titan_config, traces_folder
from .weights import load_weights, verify_numbers, verify_weights

log = logging.getLogger(__name__)

NATIVE_CACHE_LIMIT = 32768  # positions of a frozen native model's rotary cache


class Engine:
    """The trained model and everything that knows about ranks; see trainer/phase.py. Methods are
    collective unless they say otherwise.
    """

    def __init__(self, cfg: Config, *, hashes_inputs: bool = True):
        """Builds the model and loads its weights, or the newest checkpoint of the run's folder.

        hashes_inputs: False for a run that is only tried.
        """
        self.cfg = cfg
        check_folders(cfg)
        self._template = read_template(cfg.model.template) if cfg.model.template else None
        path = model_folder(cfg.model.path, "model.path")
        own = cfg.model
        spec = build_spec(path, backend=own.backend, attention=own.attention, liger=own.liger)
        if cfg.lora.rank:
            spec = with_adapters(spec, cfg.lora, path)
        self._config = titan_config(cfg, spec)
        check_world(self._config.parallelism, int(os.environ.get("WORLD_SIZE", "1")), cfg)
        self._trainer = RefluxTrainer(self._config)
        if cfg.lora.rank:
            self._prepare_adapters(spec, path)
        elif read_adapter(path) is not None:
            load = partial(load_weights, self.model, spec, path)
            self._trainer.checkpointer.start_over = load
        found = self._trainer.checkpointer.find(self._config.checkpoint.load_step)
        from_folder = found.step is None and not cfg.model.from_scratch
        inputs = RunInputs(cfg) if hashes_inputs else None
        if inputs and found.step is not None:
            inputs.check_remembered()
        self._trainer.checkpointer.load_found(found)
        self.resume_messages = found.messages  # what was wrong with newer checkpoints
        if inputs:
            inputs.check(self._trainer.loaded_inputs)
            self._trainer.inputs = inputs.table
            self.resume_messages = (*self.resume_messages, *inputs.messages)
        self.resumed_step, self.to_close = self._trainer.step, self._trainer.to_close
        if from_folder and self._trainer.checkpointer.start_over is None:
            verify_weights(self.model, spec, path)
        else:
            verify_numbers(self.model, f"{cfg.folder}, step {self.resumed_step}")
        packed = cfg.trains and cfg.batch.pack
        prove_forward(self.model, path, packed=packed, trains=cfg.trains)
        dims = self._trainer.parallel_dims
        data = dims.get_mesh("batch").get_group() if dims.dp_enabled else None
        tensor = dims.get_mesh("tp").get_group() if dims.tp_enabled else None
        self._ranks = RankGroup(data, self.device, tensor)
        self.rank, self.world = self._ranks.rank, self._ranks.world
        self.is_main = dist.get_rank() == 0
        # a phase lowers it to what its tokenizer knows (padded heads)
        self.vocab_size = head_rows(self.model)
        self.asked_to_stop = False  # set on this rank by a signal
        # agreed on by all ranks at the end of the step: a rank that left alone would hang the rest
        self.wants_to_stop = False
        self._last = LastStep(self._trainer)
        self._is_ending = self._saves_this_step = False
        self.steps_to_keep: Callable[[], Iterable[int]] = tuple
        self._trainer.checkpointer.steps_to_keep = lambda: self.steps_to_keep()
        # of weights_version; the same on every rank
        self._run_id = from_all_ranks(lambda: uuid.uuid4().hex[:12])[0]
        self._moves = 0
        self._closing: list[Callable[[], None]] = []
        self._rescue = self._watch_other_ranks()  # the last: its thread ends with close() alone

    def _prepare_adapters(self, spec: ModelSpec, path: str) -> None:
        """Loads what stays frozen; checkpoints and a return to step 0 are of the adapters alone."""
        if self.cfg.export.merge:  # what cannot be merged is said before anything is trained
            names = [layer.lora_name for layer in adapted_layers(self.model)]
            agreed(partial(stored_layers, spec, path, names))
        load_weights(self.model, spec, path)
        checkpointer = self._trainer.checkpointer
        checkpointer.states[MODEL] = AdapterState(self._trainer.model_parts)
        checkpointer.start_over = partial(reset_adapters, self.model, self.cfg.seed)

    # What a phase may look at

    @property
    def model(self) -> nn.Module:
        return self._trainer.model_parts[0]

    @property
    def device(self) -> torch.device:
        return self._trainer.device

    @property
    def inputs(self) -> dict[str, Any]:
        """What the run reads, by hash (fingerprints.py)."""
        return self._trainer.inputs

    @property
    def compute_dtype(self) -> str:
        """Of a forward: "float32" or "bfloat16"."""
        return self._config.training.mixed_precision_param

    @property
    def weights_version(self) -> str:
        """The name of the present weights: another one as soon as one of them has moved."""
        return f"{self._run_id}/{self._moves}"

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor in the compute dtype), one after the other."""
        return named_weights(self._trainer, self.compute_dtype)

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
        """Loads a frozen model, sharded like the trained one, outside optimizer and checkpoint.
        longest: the longest row it has to take, at most the positions it has.
        """
        path = model_folder(role.path, "path of a frozen model")
        limit = positions_of(text_config(path))
        spec = build_spec(path, backend=role.backend, attention=role.attention, liger=role.liger)
        seq_len = longest if limit is None else min(limit, longest)
        if role.quantization != "none":
            frozen = build_quantized(spec, path, self._config, self.device, role, seq_len)
        else:
            frozen = build_frozen(
                spec,
                path,
                self._config,
                self._trainer.parallel_dims,
                self.device,
                dtype=role.dtype,
                seq_len=seq_len,
                offload=role.offload,
            )
        prove_forward(frozen.model, path, packed=self.cfg.trains and self.cfg.batch.pack)
        return frozen

    def base(self) -> BaseModel:
        """The trained model with its adapters off ([lora]); it costs no memory."""
        return BaseModel(self.model, model_folder(self.cfg.model.path, "model.path"))

    # The loop

    def steps(self) -> Iterator[int]:
        """Step numbers from the one after the checkpoint. The checkpoint of a step is written when
        the next number is requested.
        """
        trainer = self._trainer
        with self._config.profiler.build(
            global_step=trainer.step, base_folder=self._config.dump_folder
        ) as profiler:
            trainer.random.apply()
            while trainer.step < self.cfg.steps and not self.wants_to_stop:
                trainer.step, self._saves_this_step = trainer.step + 1, False
                trainer.gc_handler.run(trainer.step)
                yield trainer.step
                self._last.ends()
                self.wants_to_stop = self._ranks.any(self.asked_to_stop)
                self._save_if_due()
                profiler.step()

    def _save_if_due(self) -> None:
        step, checkpointer = self._trainer.step, self._trainer.checkpointer
        checkpointer.seal_if_done()
        is_last = step == self.cfg.steps
        if not is_last and self.wants_to_stop:
            checkpointer.write(step)  # it will go on: with everything, whatever the last one holds
        elif not checkpointer.save(step, last_step=is_last) and self._saves_this_step:
            checkpointer.write(step)

    @contextlib.contextmanager
    def keeps_last_step(self, unless: type[BaseException] = GeneratorExit) -> Iterator[None]:
        """Whatever ends the inside, the last finished step is saved first if its weights are whole.
        On several ranks all of them end, with the words of the one that failed. unless: an error
        that all ranks raise, and after which nothing may be written. May be nested.
        """
        try:
            yield
        except unless:
            raise
        except BaseException as error:
            if self._is_ending:  # an outer context, or Ctrl-C while the step is being saved
                raise
            self._is_ending = True
            failed, notes = self._save_last_step(error)
            told = error
            if failed is not None:
                told = contracts.RankFailed(f"rank {failed.rank} ended the run: {failed.message}")
            for note in notes:
                told.add_note(note)
            if told is error:
                raise
            raise told from error

    def _save_last_step(self, error: BaseException) -> tuple[Announcement | None, list[str]]:
        """Returns which other rank failed first, if it was one, and what to add to the error."""
        failed: Announcement | None = None
        if self._rescue is not None:
            failed, saved, problem = self._rescue.fail(error)
            # what all ranks find is told by all in the same words
            if failed and (failed.rank == dist.get_rank() or failed.message == first_line(error)):
                failed = None
        else:
            saved, problem = self._last.save_if_unsaved()
        notes = [] if saved is None else [f"step {saved} is saved in {self._config.dump_folder}"]
        return failed, notes + ([] if problem is None else [problem])

    def measured(self, numbers: Mapping[str, float]) -> None:
        """Those of this step, saved with it if the run ends before it is closed. Not collective."""
        self._last.measures(numbers)

    @property
    def saved_step(self) -> int:
        """Of the newest checkpoint of these weights; 0: there is none."""
        return self._trainer.checkpointer.saved_step

    def kept(self) -> str:
        """Which checkpoints are on the disk, in words. Not collective."""
        return self._trainer.checkpointer.kept()

    def _watch_other_ranks(self) -> Rescue | None:
        world = dist.get_world_size()
        if world == 1:
            return None
        store = dist.PrefixStore("reflux-rescue", dist.distributed_c10d._get_default_store())
        own = store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        return Rescue(own, dist.get_rank(), world, self._last.unsaved, self._last.save_beside)

    def step(
        self, epochs: Sequence[Sequence[Sequence[Batch]]], loss: contracts.LossFunction
    ) -> dict[str, float]:
        """Forward, loss, backward, one division by the global token count, clip, AdamW, for every
        mini-batch of every epoch: epochs[e][m] are its micro-batches on this rank. The learning
        rate is that of the step.

        Returns the first epoch's means over tokens, with `grad_norm` (the mean of its updates),
        `tokens` and `lr`; those of epoch e from the second on as "epoch<e>/...".
        FloatingPointError if loss or gradient norm is not finite: the update moves no weight then,
        and its batch is saved.
        """
        stats: dict[str, float] = {}
        for number, minibatches in enumerate(epochs, 1):
            means = epoch_means([self._update(batches, loss) for batches in minibatches])
            stats |= means if number == 1 else {f"epoch{number}/{k}": v for k, v in means.items()}
        schedule = self._trainer.lr_schedulers
        stats["lr"] = schedule.schedulers[0].get_last_lr()[0]
        schedule.step()
        self._last.ends(stats)
        return stats

    def _update(self, batches: Sequence[Batch], loss: contracts.LossFunction) -> Update:
        trainer, batches = self._trainer, self.pad_across_ranks(batches)
        tokens = self.sum(float(sum(b.tokens for b in batches)))
        trainer.optimizers.zero_grad()
        sums = self._accumulate(batches, loss, max(tokens, 1.0))
        norm = dist_utils.clip_grad_norm_(
            list(self.model.parameters()), self._config.training.max_norm, foreach=True
        )
        update = Update(totals(self._ranks, sums), float(norm), tokens)
        if not (math.isfinite(update.totals["loss"]) and math.isfinite(update.grad_norm)):
            self._save_and_raise(batches, epoch_means([update]))
        trainer.checkpointer.maybe_wait_for_staging()
        self._last.begins_to_move()
        self._moves += 1
        if tokens:
            trainer.optimizers.step()
        return update

    def backward(self, batches: Sequence[Batch], loss: contracts.LossFunction) -> None:
        """The gradient of the plain loss sum over all ranks, left in `.grad`; no weight moves."""
        self.clear_gradients()
        self._accumulate(self.pad_across_ranks(batches), loss, 1.0)

    def clear_gradients(self) -> None:
        self._trainer.optimizers.zero_grad()

    def _accumulate(
        self, batches: Sequence[Batch], loss: contracts.LossFunction, tokens: float
    ) -> dict[str, Tensor]:
        return accumulate_gradients(
            self._trainer, batches, loss, vocab_size=self.vocab_size, tokens=tokens
        )

    def _save_and_raise(self, batches: Sequence[Batch], stats: Mapping[str, float]) -> None:
        name = f"nonfinite-step-{self._trainer.step}-rank-{dist.get_rank()}.pt"
        where = dumped(batches, stats, Path(self._config.dump_folder) / name)
        weights = "untouched" if self._last.is_whole else "those of the update before"
        raise FloatingPointError(
            f"step {self._trainer.step}: loss {stats['loss']}, gradient norm {stats['grad_norm']}; "
            f"the weights are {weights} and the batch {where}. Lower optim.lr, or look for inf "
            "scores"
        )

    # Sampling from a model, and reading it without a graph

    @contextlib.contextmanager
    def gathered_weights(self) -> Iterator[contracts.Decode]:
        """The training weights, gathered for decoding: yields decode(rows, max_length)."""
        with gathered(self.model, self._config.parallelism.fsdp_reshard_after_forward):
            prove_decoding(self.model, self.cfg.model.path)
            yield decoder_of(self.model, self.device)

    @contextlib.contextmanager
    def gathered_frozen_weights(self, frozen: contracts.FrozenModel) -> Iterator[contracts.Decode]:
        """The same for a frozen model."""
        with gathered(frozen.model, self._config.parallelism.fsdp_reshard_after_forward):
            prove_decoding(frozen.model, frozen.path)
            yield decoder_of(frozen.model, self.device)

    @torch.no_grad()
    def hidden(self, ids_NL: Tensor, positions_NL: Tensor, packed: bool = False) -> Tensor:
        """Hidden states [N, L, D] of the trained model after the final norm, without a graph."""
        return hidden_states(self.model, ids_NL, positions_NL, packed=packed)

    def open_head(self) -> AbstractContextManager[Tensor]:
        """Context of the plain [V, D] head weight, gathered inside."""
        return open_head(self.model)

    def forward_no_grad(
        self, model: contracts.ReadableModel, batch: Batch, vocab_size: int
    ) -> AbstractContextManager[HeadInputs]:
        """Head inputs of `model` at the batch's predictor positions, without a graph."""
        return forward_no_grad(model, batch, vocab_size)

    # Ranks

    def pad_across_ranks(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same number of micro-batches on every rank: empty ones where there are fewer."""
        return self._ranks.pad(batches)

    def sum(self, value: float) -> float:
        """Over data-parallel ranks, in float64."""
        return self._ranks.sum(value)

    def mean(self, metric_sums: MetricSums) -> dict[str, float]:
        """Means over all ranks' entries; every rank must have added under the same names."""
        return self._ranks.mean(metric_sums)

    def gather(self, rows: list) -> list:
        """All ranks' rows in rank order, on every rank."""
        return self._ranks.gather(rows)

    def once_per_row(self, work: Callable[[], Result]) -> Result:
        """work() of one of the ranks that hold the same rows, on all of them; its error too."""
        return self._ranks.once_per_row(work)

    # Checkpoints, export, logs

    def restore(self, step: int) -> int:
        """Back to the newest checkpoint that is not after `step`, or to the weights the run started
        from. Returns its step.
        """
        self._last.begins_to_move()
        self._moves += 1
        restored = self._trainer.checkpointer.back_to(step)
        self._last.is_loaded()
        return restored

    def save_this_step(self) -> None:
        """Its checkpoint is written at its end, whatever the interval. Not collective."""
        self._saves_this_step = True

    def checkpoint(self) -> None:
        """Writes a checkpoint of the current step, with which the run ends."""
        self._trainer.checkpointer.save(self._trainer.step, last_step=True)

    def export(self, card: str) -> str:
        """Writes the folder <folder>/export with this model card, and returns its path: the model,
        or with [lora] the adapter, unless export.merge is set.
        """
        out = str(Path(self._config.dump_folder).resolve() / "export")
        try:
            self._export(out, card)
        except (Exception, CheckpointException) as error:
            if not (disk_space.is_full(error) or disk_space.has_none(self._config.dump_folder)):
                raise
            raise disk_space.no_space(out, "the export does not fit", self.kept()) from error
        return out

    def _export(self, out: str, card: str) -> None:
        cfg = self.cfg
        if cfg.lora.rank:
            files = self.inputs.get(spec_of(cfg.phase).model_role, {}).get("files", {})
            write = partial(export_lora, self._trainer, cfg, files=files)
        else:
            write = partial(export_hf, self._trainer, dtype=cfg.export.dtype)
        write(out, os.path.abspath(cfg.model.path), card=card, template=self._template)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """TensorBoard and W&B, where enabled. Not collective."""
        self._trainer.metrics_processor.logger.log(dict(metrics), step)

    def memory_gib(self) -> float:
        """Peak of this rank: device memory on CUDA, resident memory on a CPU. Not collective."""
        stats = utils.device_module.memory_stats(self.device)
        return stats.get("reserved_bytes.all.peak", 0) / 2**30

    def when_closing(self, close: Callable[[], None]) -> None:
        """Calls `close` as the last thing before the process group ends."""
        self._closing.append(close)

    def close(self) -> None:
        if self._rescue is not None:
            self._rescue.close()
        try:
            self._trainer.close()
        except OSError as error:  # a tracker that cannot write its last numbers ends no run
            log.warning("closing: %s", error)
        for close in self._closing:
            close()
        if dist.is_initialized():
            dist.destroy_process_group()
        disk_space.remove_empty(self._config.dump_folder, traces_folder(self.cfg))


# mypy proves that these keep the contracts of trainer/phase.py
_ENGINE: type[contracts.Engine] = Engine
_FROZEN_MODEL: type[contracts.FrozenModel] = FrozenModel
