"""The contracts of the trainer: what each part may expect of the others.

    Phase              close_step; TrainingPhase adds sample, score, loss. Registered in
                       config/phases.py; implemented by the file phase.py of each phase's room
    Engine             the trained model and everything that knows about ranks (engine/engine.py)
    FrozenModel        a model that is only read: reference, proxy, teacher (engine/frozen.py)
    Sampler            samples responses (rollouts/samplers.py)
    Teacher            what a student learns from (distillation/teachers.py)
    CalibrationReward  scores rollouts (calibration/rewards.py)
    Grader             grades rollouts for the task reward (data/tasks.py)

The nouns that pass between them are frozen dataclasses: Prompt -> Rollout -> Sample -> Batch
(data/batch.py), HeadInputs and Loss (losses.py), and the two below.

Shapes: P prompts, G rollouts of each, N rows, L row length, T response tokens, D hidden size,
V vocabulary, S spans, n tokens of one response.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from reflux.trainer.config.sections import FrozenSection
from reflux.trainer.data.batch import Batch, Prompt, Rollout, Sample, TeacherView, TopKRows
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.graders import Grade
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.losses import HeadInputs, Loss


class DecodeStep(Protocol):
    """One call of a decoder with a KV cache."""

    def __call__(
        self,
        ids_NL: Tensor,
        positions_NL: Tensor,
        real_NL: Tensor,
        first: bool,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, V] of the last position. real_NL: bool, false for padding, over everything fed
        so far. rows_N: which row of the call before each row goes on with, so that prompts are fed
        once for many texts and finished texts are left out; None: the same rows.
        """
        ...


class RankFailed(ValueError):
    """Another rank failed first: which one, and what it says."""


# decode(rows, max_length) -> context of (step, device): one KV cache. rows: at most
Decode = Callable[[int, int], AbstractContextManager[tuple[DecodeStep, torch.device]]]
LossFunction = Callable[[HeadInputs, Batch], Loss]
Advance = Callable[[int], None]  # is called with the number of items done since the last call


@dataclass(frozen=True)
class Sampling:
    """How to sample. `greedy` takes the most likely token and reports its log-probability at
    temperature 1.
    """

    max_tokens: int
    seed: int = 0
    step: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    rows: int = 256  # sequences decoded together
    greedy: bool = False
    # by prompt: tokens of the answer that stand in it already; its texts have that many fewer
    spent: tuple[int, ...] = ()

    def limit(self, prompt: int) -> int:
        """Tokens that a text of the prompt at this place may have."""
        return self.max_tokens - (self.spent[prompt] if self.spent else 0)


@dataclass(frozen=True, eq=False)
class CalibrationScore:
    """The calibration reward of one rollout and its parts. Nats unless it says otherwise."""

    value: float  # r_cal: nats of the text for score_norm "sum" and "length_free", else in its unit
    raw: float  # the unclipped difference of the sequence scores, stop term included
    span_value: np.ndarray  # [S] clipped span differences, proxy minus denominator
    span: np.ndarray  # [n] span of each response token, -1 outside
    stop: float  # difference of the stop terms; 0 if the rollout was truncated or score_stop is off
    n_bytes: int
    clipped: float  # fraction of spans whose difference was clipped
    scored: bool  # False: the text is unaligned, or the rollout is masked by rule
    # [n] spans that were settled before each response token, the stop token included
    # (tokenalign.credit); None: none, so that span credit is the whole sum
    settled: np.ndarray | None = None
    # [n] the difference of log-probabilities, nats, that the text before each response token is
    # worth whatever follows (tokenalign.credit.prefix_to_go); None: nothing is known of it
    before: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class TextScore:
    """log p of each content token [n], and of the stop set right behind them; nats. Of sampled ids
    (CalibrationReward): logp holds the sampled stop token's, too, and `stop` counts only where the
    rollout ended.
    """

    logp: np.ndarray
    stop: float
    # log-probability of the bytes up to each byte position of the text, its end included, that no
    # later byte can change (tokenalign.byte_windows.settled_prefix_logp); None: not asked for
    prefix_logp: np.ndarray | None = None


class Stop(Exception):
    """Raised by a phase's close_step: the run ends here, in good order. `restore` names a
    checkpoint's step to go back to, or None.
    """

    def __init__(self, reason: str, restore: int | None = None):
        super().__init__(reason)
        self.restore = restore


class Phase(Protocol):
    """What a run does. Built as `PhaseClass(cfg, engine)`; every method is collective."""

    exit_code: int  # of the process, when the run ends by itself

    def close_step(self, step: int, stats: Mapping[str, float]) -> dict[str, Any]:
        """Evaluation and guards after a step; the whole work of a phase that does not train, and
        the start of one that does, at step 0. Raises Stop to end the run in good order.
        """
        ...


class TrainingPhase(Phase, Protocol):
    """A phase whose steps move weights."""

    metric_sums: MetricSums  # what the last `score` adds to the line of the log
    data_fields: Mapping[str, Any]  # of the event `data`; empty where every prompt fits

    def sample(self, step: int) -> Sequence[Sequence[Any]]:
        """[P][G] texts for this rank's part of the step's prompts, in the batch's order; each is a
        Rollout, or has one as `.rollout`.
        """
        ...

    def score(self, texts_PG: Sequence[Sequence[Any]]) -> list[Sample]:
        """Rewards, advantages or teacher targets of those texts."""
        ...

    def loss(self, out: HeadInputs, batch: Batch) -> Loss:
        """(sum over the batch's tokens, metrics as sums over the same tokens)."""
        ...

    def evaluate(self, step: int) -> dict[str, Any]:
        """Of the weights that a guard goes back to: what `close_step` of the last step would."""
        ...

    def log_fields(self, stats: Mapping[str, float]) -> dict[str, Any]:
        """The line of the log, from the numbers of the step."""
        ...

    def sample_fields(self, text: Any, index: int) -> dict[str, Any]:
        """What the last `score` found of a text of the last `sample`, the `index`-th of the flat
        list: grade, r_cal, spans. Fields of a line of samples.jsonl.
        """
        ...

    def card(self) -> tuple[str, str]:
        """(title, one paragraph) for the model card of what was trained."""
        ...


Result = TypeVar("Result")


class ReadableModel(Protocol):
    """A model whose hidden states and head can be read: the engine's own, or a frozen one."""

    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def softcap(self) -> float | None: ...

    def hidden(self, ids_NL: Tensor, positions_NL: Tensor, packed: bool = False) -> Tensor:
        """Hidden states [N, L, D] after the final norm, without a graph."""
        ...

    def open_head(self) -> AbstractContextManager[Tensor]:
        """Context of the plain [V, D] head weight, gathered inside."""
        ...


class FrozenModel(ReadableModel, Protocol):
    """A model that is only read, in no optimizer and no checkpoint."""

    path: str  # its folder
    vocab_size: int


class Engine(ReadableModel, Protocol):
    """The trained model, its optimizer and checkpoints, and everything that knows about ranks.
    Methods are collective unless they say otherwise.
    """

    rank: int  # among the data-parallel ranks
    world: int  # data-parallel ranks
    is_main: bool  # the one rank that writes files
    vocab_size: int  # ids that count; a phase lowers it to what its tokenizer knows
    resumed_step: int
    to_close: Mapping[str, float] | None  # its numbers, if evaluation and guards have not seen it
    asked_to_stop: bool  # set on this rank by a signal
    wants_to_stop: bool  # agreed on by all ranks at the end of a step
    # asked when checkpoints are deleted: the newest one that is not after each of these stays
    steps_to_keep: Callable[[], Iterable[int]]

    @property
    def device(self) -> torch.device: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def compute_dtype(self) -> str:
        """Of a forward: "float32" or "bfloat16"."""
        ...

    @property
    def weights_version(self) -> str:
        """The name of the present weights, the same on every rank: another one as soon as one of
        them has moved.
        """
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor in the compute dtype), one after the other; every rank
        has to take all of them.
        """
        ...

    @property
    def inputs(self) -> dict[str, Any]:
        """What the run reads, by hash: the head of run.jsonl."""
        ...

    @property
    def notes(self) -> dict[str, float]:
        """Numbers that survive a restart, the same on every rank (moving averages of guards)."""
        ...

    def frozen(self, role: FrozenSection, *, longest: int = ...) -> FrozenModel:
        """Loads a frozen model, sharded like the trained one."""
        ...

    def base(self) -> FrozenModel:
        """The trained model with its adapters off ([lora]); no copy."""
        ...

    def steps(self) -> Iterator[int]:
        """Step numbers from the one after the checkpoint; saves when a checkpoint is due."""
        ...

    def step(
        self, epochs: Sequence[Sequence[Sequence[Batch]]], loss: LossFunction
    ) -> dict[str, float]:
        """Forward, loss, backward, one division by the global token count, clip, AdamW, for every
        mini-batch of every epoch: epochs[e][m] are its micro-batches on this rank. Returns the
        first epoch's means over tokens; those of later ones as "epoch2/..." and so on.
        """
        ...

    def backward(self, batches: Sequence[Batch], loss: LossFunction) -> None:
        """The gradient of the plain loss sum over all ranks, left in `.grad`; no weight moves."""
        ...

    def clear_gradients(self) -> None: ...

    def gathered_weights(self) -> AbstractContextManager[Decode]:
        """The training weights, gathered for decoding."""
        ...

    def gathered_frozen_weights(self, frozen: FrozenModel) -> AbstractContextManager[Decode]:
        """The same for a frozen model."""
        ...

    def forward_no_grad(
        self, model: ReadableModel, batch: Batch, vocab_size: int
    ) -> AbstractContextManager[HeadInputs]:
        """Head inputs of `model` at the batch's predictor positions, without a graph."""
        ...

    def pad_across_ranks(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same number of micro-batches on every rank: empty ones where there are fewer."""
        ...

    def sum(self, value: float) -> float:
        """Over data-parallel ranks, in float64."""
        ...

    def mean(self, metric_sums: MetricSums) -> dict[str, float]:
        """Means over all ranks' entries, without the names that have none; every rank must have
        added under the same names.
        """
        ...

    def gather(self, rows: list) -> list:
        """All ranks' rows in rank order, on every rank."""
        ...

    def once_per_row(self, work: Callable[[], Result]) -> Result:
        """work() of one of the ranks that hold the same rows (tensor parallelism), on all of them;
        its error too. Collective over them.
        """
        ...

    def restore(self, step: int) -> int:
        """Back to the newest checkpoint that is not after `step`. Returns its step."""
        ...

    def measured(self, numbers: Mapping[str, float]) -> None:
        """The numbers of the step that was made: if the run ends before close_step has seen them,
        they are saved with it, and `to_close` has them in the process that goes on.
        """
        ...

    def save_this_step(self) -> None:
        """Has the checkpoint of the current step written at its end, whatever the interval."""
        ...

    def checkpoint(self) -> None:
        """Writes a checkpoint of the current step, with which the run ends before its last one: it
        holds what [checkpoint] wants of the last one.
        """
        ...

    def export(self, card: str) -> str:
        """Writes a Hugging Face folder with this model card and returns its path."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """TensorBoard and W&B, where enabled. Not collective."""
        ...

    def memory_gib(self) -> float:
        """Peak of this rank. Not collective."""
        ...

    def when_closing(self, close: Callable[[], None]) -> None:
        """Calls `close` as the last thing before the process group ends. Not collective."""
        ...

    def close(self) -> None: ...


class Sampler(Protocol):
    """Samples responses, from weights on this machine or elsewhere."""

    def sample(
        self, prompts: Sequence[Prompt], group: int, sampling: Sampling, advance: Advance = ...
    ) -> list[list[Rollout]]:
        """P prompts -> [P][G] rollouts with the log-probabilities they were sampled with.
        Collective.
        """
        ...


class Teacher(Protocol):
    """What a student learns from: texts, and distributions at the student's positions."""

    @property
    def chat(self) -> Chat: ...

    @property
    def sampler(self) -> Sampler: ...

    @property
    def weight(self) -> float:
        """Of its loss; the weights of all teachers of a text sum to one."""
        ...

    @property
    def shares_ids(self) -> bool:
        """Its token ids mean what the student's mean."""
        ...

    def views(self, rollouts: Sequence[Rollout], step: int) -> Sequence[TeacherView | None]:
        """What it reads of each text, or has said of it, where that is not what the student reads.
        Not collective; ValueError where it can say nothing of a text.
        """
        ...

    def divergence(self, student: HeadInputs, batch: Batch, index: int) -> Loss:
        """Divergence from the teacher's distributions at the positions it shares with the student,
        summed. `index`: which of the batch's teacher views is its own.
        """
        ...

    def kept_rows(self, rollout: Rollout) -> TopKRows | None:
        """What it has said at every token of a text of its ids; None where it is asked instead."""
        ...

    def score_texts(
        self,
        jobs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        spaces: Sequence[bool] | None = None,
    ) -> list[TextScore]:
        """Log-probabilities of (prompt ids, content ids) pairs in the teacher's tokens. spaces:
        score the bytes before every position, too (TextScore.prefix_logp); whether a text's first
        byte is a space that the teacher's tokenizer put there. Collective.
        """
        ...


class CalibrationReward(Protocol):
    """r_cal of rollouts. Built as `RewardClass(cfg, engine, chat)`; registered in REWARDS of
    calibration/rewards.py.
    """

    def score(
        self,
        rollouts: Sequence[Rollout],
        behaviour: Sequence[TextScore],
        reference: Sequence[TextScore] | None,
        metric_sums: MetricSums,
    ) -> list[CalibrationScore]:
        """One score per rollout. behaviour, reference: what those two models say of the sampled
        ids. Collective.
        """
        ...


class Grader(Protocol):
    """The task reward. Never raises or hangs because of one response."""

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout, in order."""
        ...
