"""The tables of a configuration, one frozen dataclass each: every option with its unit, its reason
and its default. Where a default comes from: docs/method.md, "Hyper-parameters".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .calibration_rewards import REWARDS
from .checks import above_zero, check_addresses, fraction, not_negative, positive

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
Backend = Literal["auto", "native", "hf"]
Attention = Literal["auto", "sdpa", "flash_attention_2", "flex"]
Liger = Literal["off", "auto", "on"]


@dataclass(frozen=True)
class ModelSection:
    """The trained model: a Hugging Face folder, or an id of the hub, as Qwen/Qwen3-8B."""

    path: str = ""  # the folder or the id
    # native: torchtitan's qwen3/llama3 (tensor parallel); hf: transformers'
    backend: Backend = "auto"
    attention: Attention = "auto"  # flash_attention_2 (hf) and flex (native) need CUDA
    # random weights on purpose: only config.json and the tokenizer are read from `path`
    from_scratch: bool = False
    # a file with a chat template instead of the tokenizer's own
    template: str = ""
    # what the template is given beside the messages: { enable_thinking = false }
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    revision: str = ""  # of an id of the hub: branch, tag or commit; "": its main branch
    # liger-kernel's RMSNorm, RoPE and gated MLPs with backend "hf"; auto: on CUDA, where it is
    # installed and knows the family. Not measured on a GPU yet, so off
    liger: Liger = "off"


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters that are trained in place of the weights (docs/lora.md)."""

    rank: int = 0  # r; 0: off, every weight is trained
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / r
    # ends of module names, "q_proj", or patterns, "layers.1?.*_proj", in the names of transformers'
    # model on both back ends; empty: every linear layer except the head
    targets: tuple[str, ...] = ()
    dropout: float = 0.0  # only 0: the texts are sampled from the function that is trained
    rslora: bool = False  # alpha / sqrt(r): the update keeps its size when r grows

    def __post_init__(self):
        not_negative(self, "rank")
        above_zero(self, "alpha")
        if self.dropout:
            raise ValueError(
                f"dropout = {self.dropout}; want 0. Ratios, KL and samples are of one function, "
                "and dropout would train another one than is sampled from; lower rank or optim.lr "
                "against overfitting"
            )
        if not self.rank and self.targets:
            raise ValueError(
                f"targets = {list(self.targets)} with rank = 0, which is off; want rank >= 1"
            )

    @property
    def scale(self) -> float:
        """s of y = W x + s B A x, as PEFT computes it."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class FrozenSection:
    """A model that is never trained: teacher, proxy. In no optimizer and no checkpoint."""

    path: str = ""  # a Hugging Face folder, or an id of the hub
    backend: Backend = "auto"  # as model.backend
    attention: Attention = "auto"  # as model.attention
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of its weights and its forward
    offload: bool = False  # CUDA: weights wait in host memory between uses
    # CUDA: the linear layers but the head in 8 or 4 bits (bitsandbytes, extra `quantized`), whole
    # on every rank; computed in `dtype`. Its log-probabilities are those of the rounded model
    quantization: Literal["none", "int8", "nf4"] = "none"
    # a file with a chat template instead of the tokenizer's own
    template: str = ""
    # what the template is given beside the messages: { enable_thinking = false }
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    revision: str = ""  # of an id of the hub, as model.revision
    liger: Liger = "off"  # as model.liger

    def __post_init__(self):
        if self.offload and self.quantization != "none":
            raise ValueError(
                f"offload = true with quantization = {self.quantization!r}: quantised weights stay "
                "on the GPU. Want one of the two"
            )


@dataclass(frozen=True)
class TeacherSection(FrozenSection):
    """The teacher of distill and diagnose. `path` is its folder; where its weights are not loaded
    here, only config.json and the tokenizer are read from it.
    """

    # local: loaded by this run. server: asked over HTTP. cache: read from what an earlier run wrote
    source: Literal["local", "server", "cache"] = "local"
    # source = "cache": the folder <run>/cache that phase = "cache" has written. `path` is the
    # teacher that wrote it, or this folder again, where the teacher is not at hand
    cache: str = ""
    servers: tuple[str, ...] = ()  # of source = "server": http://host:port

    def __post_init__(self):
        FrozenSection.__post_init__(self)
        if self.source != "local" and self.quantization != "none":
            raise ValueError(
                f"quantization = {self.quantization!r} with source = {self.source!r}: no weights "
                "are loaded here. Whoever serves or caches a teacher decides on its precision"
            )
        if (self.source == "server") != bool(self.servers):
            raise ValueError(
                f"source = {self.source!r} with servers = {list(self.servers)}; want source = "
                "'server' and the addresses of servers, such as 'http://host:8000', or neither"
            )
        check_addresses(self.servers)


@dataclass(frozen=True)
class TaskSection:
    # exact | math | multiple_choice | instructions | reasoning_gym | reward_model | judge |
    # column | package.module:function
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)  # of that grader (docs/data.md)
    max_failed: float = 0.05  # fraction of failed grades above which a run ends; they leave groups
    # only what follows the last one of these is graded, "</think>" say; a text without it is whole
    thinking_end: str = ""

    def __post_init__(self):
        fraction(self, "max_failed")


@dataclass(frozen=True)
class RolloutSection:
    prompts: int = 32  # P, per optimizer step, over all ranks
    group: int = 8  # G, rollouts per prompt; fewest that give a usable group std
    max_tokens: int = 1024  # response length; truncation should stay below 5 %
    temperature: float = 1.0  # the trainer divides its logits by the same number
    top_p: float = 1.0  # mass of the likeliest tokens that are sampled from; 1: all
    top_k: int = 0  # likeliest tokens that are sampled from; 0: all
    rows: int = 256  # sequences decoded together on one rank
    # trainer: one more forward; bf16 samplers are off by 0.05 nats
    old_logp: Literal["sampler", "trainer"] = "sampler"
    # who samples: the training weights themselves; vLLM in this process, one engine per rank or
    # tensor-parallel group; vLLM servers (docs/engines.md)
    engine: Literal["embedded", "vllm", "server"] = "embedded"
    gpu_memory_fraction: float = 0.4  # vllm: of the device (a CPU's memory) while it samples
    max_running: int = 256  # vllm: sequences decoded together by one engine
    tensor_parallel: int = 1  # vllm: ranks of one engine
    servers: tuple[str, ...] = ()  # server: http://host:port of reflux.trainer.rollouts.serve
    server_timeout_s: float = 600.0  # server: seconds in which one request has to be answered
    server_retries: int = 3  # server: times that a request is asked again, elsewhere if there is
    # server: 1 samples the next step's texts while a step trains; they are one update old
    overlap: int = 0

    def __post_init__(self):
        positive(self, "prompts", "group", "max_tokens", "rows", "max_running", "tensor_parallel")
        not_negative(self, "top_k", "server_retries", "overlap")
        above_zero(self, "server_timeout_s")
        _check_engine(self)
        if not self.temperature > 0:
            raise ValueError(
                f"temperature = {self.temperature}; want > 0. Greedy rollouts of a prompt are all "
                "the same"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}; want 0 < top_p <= 1")


def _check_engine(r: RolloutSection) -> None:
    """ValueError for options of an engine that is not chosen, and for numbers out of range."""
    if not 0 < r.gpu_memory_fraction <= 1:
        raise ValueError(
            f"gpu_memory_fraction = {r.gpu_memory_fraction}; want 0 < gpu_memory_fraction <= 1"
        )
    if (r.engine == "server") != bool(r.servers):
        raise ValueError(
            f"engine = {r.engine!r} with servers = {list(r.servers)}; want engine = 'server' and "
            "the addresses of servers, such as 'http://host:8000', or neither"
        )
    check_addresses(r.servers)
    if r.tensor_parallel > 1 and r.engine != "vllm":
        raise ValueError(
            f"tensor_parallel = {r.tensor_parallel} with engine = {r.engine!r}; want engine = "
            "'vllm'. A server has its own --tensor-parallel"
        )
    if r.overlap > 1:
        raise ValueError(f"overlap = {r.overlap}; want 0 or 1")
    if r.overlap and r.engine != "server":
        raise ValueError(
            f"overlap = 1 with engine = {r.engine!r}: it samples on the device that trains. Want "
            "engine = 'server'"
        )
    if r.overlap and r.old_logp != "sampler":
        raise ValueError(
            "overlap = 1 with old_logp = 'trainer': the trainer's weights are no longer those that "
            "sampled, and ratios need the behaviour policy. Use old_logp = 'sampler'"
        )


@dataclass(frozen=True)
class CalibrationSection:
    # the sign of eta; off: plain GRPO
    mode: Literal["off", "distillable", "undistillable"] = "off"
    reward: str = "likelihood_ratio"  # a name in config/calibration_rewards.py
    # folders beside proxy.path, loaded alike, each with its own template: r_cal is made of all
    proxies: tuple[str, ...] = ()
    # mean | min | max of them, or row: that of the one proxy which column proxy_route of [data]
    # names, by its number or the last part of its folder's path
    proxy_aggregate: Literal["mean", "min", "max", "row"] = "mean"
    proxy_route: str = ""  # of proxy_aggregate = "row": the column
    strength: float = 0.5  # |eta|: weight of the calibration reward, both at unit std
    # what becomes of a score's length (docs/method.md, "Length"). length_free: nats per byte,
    # without what a line through the group explains by length; where answers have one length that
    # is `sum`. per_token has no span_clip and no stop term
    score_norm: Literal["length_free", "sum", "per_token", "per_byte"] = "length_free"
    # whose log-probability is subtracted from the proxy's: that of the sampled ids under the policy
    # or the reference, or that of the text under the policy, summed over its spellings, so that
    # spreading over spellings does not pay
    denominator: Literal["policy", "marginal", "reference"] = "policy"
    score_stop: bool = True  # add the stop set's log-probability where a rollout was not truncated
    # joint: one z-score of r_task + eta r_cal; the term of the larger std dominates
    normalise: Literal["separate", "joint"] = "separate"
    # prefix: each token without what the text before it is worth under proxy and denominator, not
    # winsorised; exact for any two tokenizers that take the longest match. span: without the spans
    # settled before it; refused where the proxy has other token ids
    credit: Literal["sequence", "prefix", "span"] = "sequence"
    # credit = "span" across tokenizers, as if every earlier span were settled: for comparison
    allow_biased: bool = False
    # what becomes of rollouts cut at max_tokens
    truncated: Literal["mask_cal", "drop", "score_prefix"] = "mask_cal"
    span_clip: float = 10.0  # nats; 0: off. Span differences are heavy-tailed
    winsor: float = 3.0  # scaled MADs inside the group; 0: off
    # nats per byte; a group whose rewards hardly differ is not scaled up to unit std
    std_floor: float = 0.01
    # which groups have no calibration term: those without a correct text, those whose texts are
    # all correct or all wrong (of a grader without right and wrong: that have equal rewards); or
    # the term times the std of the task reward
    cal_gate: Literal["none", "skip_all_wrong", "skip_degenerate", "scale_by_task_std"] = (
        "skip_all_wrong"
    )
    margin_guard: bool = True  # undistillable + policy: keep beta + eta_eff >= beta / 4
    # fraction of rollouts whose text both tokenizers cannot spell; more is an error
    max_unaligned: float = 0.05

    def __post_init__(self):
        if self.reward not in REWARDS:
            raise ValueError(f"reward = {self.reward!r}; want {' | '.join(REWARDS)}")
        if not self.strength >= 0:
            raise ValueError(
                f"strength = {self.strength}; want >= 0. The sign of eta is set by mode"
            )
        if (self.proxy_aggregate == "row") != bool(self.proxy_route):
            raise ValueError(
                f"proxy_aggregate = {self.proxy_aggregate!r} with proxy_route = "
                f"{self.proxy_route!r}; want both, 'row' and a column of [data], or neither"
            )
        if self.proxies and self.proxy_aggregate in ("min", "max") and self.credit == "prefix":
            raise ValueError(
                f"proxy_aggregate = {self.proxy_aggregate!r} with credit = 'prefix': which proxy "
                "counts depends on the whole text, so what a token leaves out would, too, and the "
                "gradient is biased. Use credit = 'sequence', or proxy_aggregate = 'mean' or 'row'"
            )
        if self.proxies and self.proxy_aggregate != "row" and self.credit == "span":
            raise ValueError(
                f"proxy_aggregate = {self.proxy_aggregate!r} with credit = 'span': the proxies cut "
                "the texts of a group into different spans. Use credit = 'sequence', or 'row'"
            )
        not_negative(self, "span_clip", "winsor", "std_floor")
        fraction(self, "max_unaligned")
        if self.credit != "sequence" and self.score_norm != "sum":
            raise ValueError(
                f"credit = {self.credit!r} with score_norm = {self.score_norm!r}: a score that "
                "looks at the length of the whole text is no sum over spans, so no reward-to-go. "
                "Use score_norm = 'sum' or credit = 'sequence'"
            )
        if self.denominator == "marginal" and self.score_norm == "per_token":
            raise ValueError(
                "denominator = 'marginal' with score_norm = 'per_token': spellings of one text "
                "have different numbers of tokens. Use score_norm = 'sum' or 'per_byte'"
            )
        if self.credit != "sequence" and self.normalise == "joint":
            raise ValueError(
                f"credit = {self.credit!r} with normalise = 'joint': the sum of the rewards "
                "belongs to the whole text. Use credit = 'sequence' or normalise = 'separate'"
            )

    @property
    def eta(self) -> float:
        """The signed coefficient of the calibration reward."""
        sign = {"off": 0.0, "distillable": 1.0, "undistillable": -1.0}[self.mode]
        return sign * self.strength

    @property
    def margin_guarded(self) -> bool:
        """Whether the strength in use is held below reference.beta's share (margin_guard)."""
        own = self.mode == "undistillable" and self.denominator != "reference"
        return own and self.margin_guard


@dataclass(frozen=True)
class ReferenceSection:
    # raise to >= 0.2 for responses under 64 tokens: eta per nat grows as 1 / std_cal
    beta: float = 0.04
    # of the KL to the reference; exact: over the vocabulary. docs/method.md has all of them
    estimator: Literal["exact", "k1_reward", "k2_loss", "k3_is", "k3_loss", "k1_loss"] = "exact"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of its weights and its forward
    offload: bool = False  # CUDA: its weights wait in host memory between uses

    def __post_init__(self):
        not_negative(self, "beta")
        if self.estimator == "k1_loss":
            raise ValueError(
                "estimator = 'k1_loss'; its expected gradient is zero. Use exact, k2_loss or "
                "k3_is, or k1_reward inside the advantage"
            )


@dataclass(frozen=True)
class PolicySection:
    """The clipped policy gradient of equation (5)."""

    clip: float = 0.2  # the ratio to the behaviour policy stays inside 1 +- clip
    epochs: int = 1  # passes over a step's rollouts
    # optimizer updates in each pass, over whole groups dealt anew; rollout.prompts is a multiple of
    # it, and of it times the ranks for equal work
    minibatches: int = 1
    # truncated importance weights for an engine that is not quite the trainer: each token's
    # advantage times min(p_trainer / p_sampler, max_is). 0: off; 2 is common
    max_is: float = 0.0

    def __post_init__(self):
        positive(self, "epochs", "minibatches")
        not_negative(self, "max_is")
        if 0 < self.max_is < 1:
            raise ValueError(f"max_is = {self.max_is}; want 0 (off) or >= 1")
        above_zero(self, "clip")


@dataclass(frozen=True)
class GuardSection:
    kl_budget: float = 0.10  # nats per token of KL(pi || pi_ref); the run stops above it. 0: off
    # accuracy; two evaluations in a row below the start by more than this stop the run. 0: off
    utility_drop: float = 0.02
    # how far a moving average of the texts may drift from the first step's; more ends it (0: off);
    length_drift: float = 0.0  # 0.25: longer than 1.25 times, or shorter than 1 / 1.25
    entropy_drift: float = 0.0  # of the entropy, likewise
    truncation_drift: float = 0.0  # 0.1: a tenth of the texts more than at first is truncated

    def __post_init__(self):
        drifts = ("length_drift", "entropy_drift", "truncation_drift")
        not_negative(self, "kl_budget", "utility_drop", *drifts)


@dataclass(frozen=True)
class DiagnoseSection:
    """What is measured on the prompts of `data`; the student is `model`."""

    # which model, or the data set, the texts come from
    prefixes: tuple[Literal["dataset", "teacher", "student"], ...] = ("teacher", "student")
    student_texts: int = 16  # per prompt; the gap needs correct and incorrect ones of it
    teacher_texts: int = 2  # per prompt
    overlap_k: int = 20  # K of the overlap of the K likeliest tokens
    # across tokenizers: byte positions at which more of either distribution is missing are left out
    max_missing: float = 0.01
    kl_fraction: float = 0.95  # of the KL that the recommended top_k has to hold
    # insert an error into correct texts; does the student still reach the answer?
    correction: bool = True
    correction_marker: str = " Wait, no: "  # the first words of a correction
    heatmap_texts: int = 12  # texts in heatmap.html
    # micro-batches for the gradient's signal-to-noise ratio, at most one a prompt; 0: not measured
    gradient_batches: int = 16
    # folders of finished distillations of this pair, any seeds: was training stable?
    runs: tuple[str, ...] = ()

    def __post_init__(self):
        positive(self, "student_texts", "teacher_texts", "overlap_k")
        not_negative(self, "heatmap_texts", "gradient_batches")
        fraction(self, "kl_fraction", "max_missing")
        if self.gradient_batches == 1:
            raise ValueError(
                "gradient_batches = 1: one gradient has no std; want 16 or more, or 0 to leave it "
                "out"
            )
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(
                f"runs = {list(self.runs)}; want each folder once, or its run is counted twice"
            )
        if not self.prefixes or len(set(self.prefixes)) < len(self.prefixes):
            raise ValueError(
                f"prefixes = {list(self.prefixes)}; want one or more of dataset, teacher, student, "
                "each once"
            )


@dataclass(frozen=True)
class DefenceSection:
    """What is served instead of the model itself: the teacher of a `distill`, the model of an
    `evaluate` (docs/method.md, "Defences").
    """

    proxy: str = ""  # folder of a model with the same vocabulary; empty: nothing but the model
    # weight of the proxy in the product of experts, (1 - gamma) log p_model + gamma log p_proxy
    gamma: float = 0.5
    temperature: float = 1.0  # of the provider; the customer's own temperature comes on top
    # antidistillation sampling (arXiv:2504.13146): what studies/antidistillation.py has written;
    # penalty [log p_plus - log p_minus] / (2 epsilon) is added to log p_model
    antidistillation: str = ""
    penalty: float = 0.0  # lambda of it
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the proxies; antidistillation: float32

    def __post_init__(self):
        fraction(self, "gamma")
        above_zero(self, "temperature")
        not_negative(self, "penalty")
        if bool(self.antidistillation) != bool(self.penalty):
            raise ValueError(
                f"antidistillation = {self.antidistillation!r} with penalty = {self.penalty}; want "
                "a folder of studies/antidistillation.py and a penalty > 0, or neither"
            )
        if self.antidistillation and self.dtype != "float32":
            raise ValueError(
                f"antidistillation = {self.antidistillation!r} with dtype = {self.dtype!r}: what "
                "tells its two copies apart is lost in bfloat16's rounding. Set dtype = 'float32'"
            )
        if self.antidistillation and self.proxy:
            raise ValueError(
                f"antidistillation = {self.antidistillation!r} with proxy = {self.proxy!r}; want "
                "one of the two: a product of experts or antidistillation sampling"
            )

    @property
    def changes_text(self) -> bool:
        """Whether what is served differs from what the model itself would answer."""
        return bool(self.proxy or self.antidistillation) or self.temperature != 1


@dataclass(frozen=True)
class OptimSection:
    lr: float | None = None  # left out: 1e-5 to distil and for adapters, else 1e-6
    weight_decay: float = 0.0  # of AdamW, per unit of lr
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the two moments of AdamW
    eps: float = 1e-8  # added to the root of the second moment

    def __post_init__(self):
        above_zero(self, "eps", *(["lr"] if self.lr is not None else []))
        not_negative(self, "weight_decay")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas = {self.betas}; want 0 <= beta < 1 for both")


@dataclass(frozen=True)
class BatchSection:
    tokens: int = 16384  # of a micro-batch on one rank, padding included
    # join short sequences into rows of training.seq_len; the attention mask separates them
    pack: bool = False

    def __post_init__(self):
        positive(self, "tokens")


@dataclass(frozen=True)
class LogSection:
    samples_every: int = 10  # steps between printed rollouts; 0: never
    tensorboard: bool = False  # numbers of steps and evaluations, beside run.jsonl
    wandb: bool = False  # the same to Weights & Biases
    report: bool = False  # report.html in the folder: at evaluations, at alarms and at the end
    quiet: bool = False  # no progress and no tables on the terminal

    def __post_init__(self):
        not_negative(self, "samples_every")


@dataclass(frozen=True)
class ExportSection:
    enable: bool = True  # a Hugging Face folder of the result, in <folder>/export
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the exported weights
    # with [lora]: a whole model, base plus adapter, in place of the adapter's folder; on one
    # machine's disk, tensor by tensor
    merge: bool = False
    # id of a repository of the hub, "user/model", that gets the export after the run; empty:
    # nothing leaves this machine. Its card holds the configuration, paths included
    push_to_hub: str = ""
    hub_private: bool = True  # a new repository is private; a public one of that name is refused
    hub_revision: str = "main"  # the branch that gets it

    def __post_init__(self):
        if self.push_to_hub and not HUB_ID.fullmatch(self.push_to_hub):
            raise ValueError(
                f"push_to_hub = {self.push_to_hub!r}; want the id of a repository, 'user/model'"
            )
        if self.push_to_hub and not self.enable:
            raise ValueError("push_to_hub with enable = false: there is no export to push")
