"""Before a run costs anything.   --dry-run: shapes, parameters, memory per rank, budget, from
config.json alone. --check: everything the method takes for granted, tried on this machine with the
real models; writes nothing.

Both print Findings (preflight_text.py) once, at the end, and return 1 if one of them is an error.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.api import CheckpointException

from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Rollout, Sample, TeacherView, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.engine.engine import NATIVE_CACHE_LIMIT, Engine
from reflux.trainer.engine.trainer_config import titan_config
from reflux.trainer.losses import exact_reference_kl
from reflux.trainer.phase import Sampling
from reflux.trainer.rollouts.generate import generate
from reflux.trainer.rollouts.scoring import score_ids

from .checks import (
    Finding,
    alignment_findings,
    describe,
    first_prompts,
    length_findings,
    missing,
    open_chats,
    pair_findings,
    references,
    render,
    roles,
    share_ids,
    task_findings,
    tokenizer_findings,
)
from .memory import (
    Part,
    Ranks,
    Shape,
    activation_bytes,
    build_shape,
    memory_parts,
    plan_ranks,
    totals,
)

SAMPLES, SAMPLE_TOKENS = 4, 64  # of --check
GAP = {"float32": 1e-4, "bfloat16": 0.2}  # nats, sampler against trainer
SELF_KL = {"float32": 1e-4, "bfloat16": 1e-2}  # nats per token, policy against its own original
ORDER_MARGIN = 0.01  # nats per token by which a proxy must prefer a text to its shuffled pieces
ORDER_SHARE = 0.8  # of the texts


# --dry-run


def dry_run(cfg: Config) -> int:
    """Print what the run would load and hold, from config.json and tokenizer only. Returns 1 if it
    cannot work.
    """
    return _print(*plan(cfg))


def plan(cfg: Config) -> tuple[list[Table], list[Finding]]:
    """Everything `dry_run` prints. No weights, no process group; a missing tokenizer or data file
    is only a warning.
    """
    shapes, findings = _shapes(cfg)
    chats, more = open_chats([s.role for s in shapes])
    findings += [replace(f, level="warning") for f in more]  # a plan needs no tokenizer
    tables = [_role_table(shapes, chats)] if shapes else []
    trained = [s for s in shapes if s.role.table == "model" and s.role.name != "reference"]
    if trained and not any(f.level == "error" for f in findings):
        try:
            config = _titan(cfg, trained[0])
            ranks = plan_ranks(config.parallelism, int(os.environ.get("WORLD_SIZE", "1")))
        except ValueError as error:
            findings.append(Finding("error", str(error), "mend the section named"))
        else:
            parts = memory_parts(cfg, config.training, ranks, shapes)
            tables.append(_memory_table(parts, ranks))
            findings += _budget(cfg, config, ranks, trained[0], parts)
            findings += _lengths(cfg, chats, shapes, config.training.seq_len)
    findings += [
        f
        for s in shapes
        if s.role.name in chats and s.role.name != "reference"
        for f in tokenizer_findings(s.role, chats[s.role.name], s.config.vocab_size)
    ]
    return tables, findings


def _shapes(cfg: Config) -> tuple[list[Shape], list[Finding]]:
    shapes, findings = [], []
    for role in roles(cfg):
        gone = missing(role)
        if gone:
            findings.append(gone)
            continue
        try:
            shapes.append(build_shape(role))
        except (OSError, ValueError, AttributeError) as error:
            findings.append(
                Finding(
                    "error", f"{role.name}: {error}", "take another model, backend or attention"
                )
            )
    return shapes, findings


def _titan(cfg: Config, shape: Shape) -> Any:
    """torchtitan's configuration with all its refusals: unknown keys, rows longer than the model's
    positions.
    """
    config = titan_config(cfg, shape.spec)
    shape.spec.model.update_from_config(config=config)
    if shape.spec.name == "hf" and config.parallelism.tensor_parallel_degree > 1:
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {config.parallelism.tensor_parallel_degree} "
            f"with the backend 'hf' ({shape.why}); want 1"
        )
    return config


def _lengths(
    cfg: Config, chats: dict[str, Chat], shapes: Sequence[Shape], seq_len: int
) -> list[Finding]:
    prompts, unread = first_prompts(cfg)
    return [replace(f, level="warning") for f in unread] + length_findings(
        cfg, chats, prompts, seq_len, _limits(shapes)
    )


def _limits(shapes: Sequence[Shape]) -> dict[str, int]:
    return {s.role.name: min(s.config.max_position_embeddings, NATIVE_CACHE_LIMIT) for s in shapes}


def _budget(
    cfg: Config, config: Any, ranks: Ranks, shape: Shape, parts: Sequence[Part]
) -> list[Finding]:
    r, seq_len = cfg.rollout, config.training.seq_len
    rows = max(1, cfg.batch.tokens // seq_len)
    mine = math.ceil(r.prompts * r.group / ranks.data)
    found = [
        Finding(
            "ok",
            f"{r.prompts} prompts x {r.group} x {r.max_tokens} tokens = "
            f"{r.prompts * r.group * r.max_tokens:,} response tokens a step at most; "
            f"{math.ceil(mine / rows)} micro-batches of {rows} full rows on each of {ranks.data} "
            f"data ranks, {cfg.policy.epochs} update(s)",
        )
    ]
    if r.prompts % ranks.data:
        found.append(
            Finding(
                "error",
                f"rollout.prompts = {r.prompts} cannot be shared by {ranks.data} data ranks",
                f"use a multiple of {ranks.data}",
            )
        )
    none, full = activation_bytes(cfg, config.training, shape)
    found.append(
        Finding(
            "ok",
            f"activations of one micro-batch: {_size(none)} without checkpointing, {_size(full)} "
            "with activation_checkpoint = 'full' (upper estimates)",
        )
    )
    peak = max(v for k, v in totals(parts).items() if k != "host")
    if torch.cuda.is_available() and peak > torch.cuda.get_device_properties(0).total_memory:
        found.append(
            Finding(
                "warning",
                f"peak of {_size(peak)} on a device of "
                f"{_size(torch.cuda.get_device_properties(0).total_memory)}",
                "more ranks, batch.tokens down, rollout.rows down, or activation_checkpoint = "
                "'full'",
            )
        )
    return found


# --check


def check(cfg: Config) -> int:
    """Try tokenizers, templates, data, grader and models on this machine. Writes nothing to the run
    folder. 1 on errors.
    """
    return _print(*examine(cfg))


def examine(cfg: Config) -> tuple[list[Table], list[Finding], list[tuple[str, Chat, Any, str]]]:
    """Everything `check` prints: tables, findings, and (role, chat, prompt, response) to show as
    examples. Collective.
    """
    shapes, findings = _shapes(cfg)
    rows = {s.role.name: s.config.vocab_size for s in shapes}
    chats, more = open_chats([s.role for s in shapes])
    findings += more
    findings += [
        f
        for s in shapes
        if s.role.name in chats and s.role.name != "reference"
        for f in tokenizer_findings(s.role, chats[s.role.name], rows[s.role.name])
    ]
    findings += pair_findings(cfg, chats)
    prompts, more = first_prompts(cfg)
    findings += more
    own = next(iter(chats.values()), None)
    texts: list[Rollout] = []
    if own is not None and prompts and rows.keys() == {r.name for r in roles(cfg)}:
        findings += _lengths_here(cfg, chats, shapes, prompts)
        texts, more = references(cfg, own, prompts)
        findings += more + task_findings(cfg, texts)
    if any(f.level == "error" for f in findings):
        findings.append(
            Finding(
                "warning", "the models were not loaded", "mend the errors first, then check again"
            )
        )
    else:
        more, texts = _model_findings(cfg, chats, prompts, texts)
        findings += more
    tables = [_token_table({n: describe(c, rows[n]) for n, c in chats.items()})] if chats else []
    examples = [
        (name, chat, texts[0].prompt, texts[0].text)
        for name, chat in chats.items()
        if texts and name != "reference"
    ]
    return tables, findings, examples


def _lengths_here(
    cfg: Config, chats: dict[str, Chat], shapes: Sequence[Shape], prompts: Sequence
) -> list[Finding]:
    try:
        seq_len = _titan(cfg, shapes[0]).training.seq_len
    except ValueError as error:
        return [Finding("error", str(error), "mend the section named")]
    return length_findings(cfg, chats, prompts, seq_len, _limits(shapes))


@contextlib.contextmanager
def _engine(cfg: Config) -> Iterator[Any]:
    """An engine whose every file lies in a folder that is deleted; it starts from the model's
    folder, not a checkpoint.
    """
    own = {
        k: v for k, v in cfg.titan.get("checkpoint", {}).items() if k not in ("folder", "load_step")
    }
    with tempfile.TemporaryDirectory(prefix="reflux-check-") as folder:
        quiet = replace(
            cfg,
            folder=folder,
            titan={**cfg.titan, "checkpoint": own},
            log=replace(cfg.log, tensorboard=False, wandb=False),
        )
        try:
            engine = Engine(quiet)
            engine.vocab_size = min(engine.vocab_size, Chat(cfg.model.path).vocab_size)
            yield engine
            engine.close()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _model_findings(
    cfg: Config, chats: dict[str, Chat], prompts: Sequence, texts: list[Rollout]
) -> tuple[list[Finding], list[Rollout]]:
    """Loads the models and samples a little. The texts are the data's own where it has some."""
    findings: list[Finding] = []
    try:
        with _engine(cfg) as engine:
            rollouts = _sample(cfg, engine, next(iter(chats.values())), prompts)
            texts = texts or rollouts
            findings.append(_gap(cfg, engine, next(iter(chats.values())), rollouts))
            findings += alignment_findings(cfg, chats, texts)
            models = {
                r.name: engine.frozen(
                    r.model, **({"longest": engine.seq_len} if r.name == "reference" else {})
                )
                for r in roles(cfg)
                if r.name in ("reference", "proxy", "teacher")
            }
            if cfg.phase == "calibrate":
                findings.append(_anchor(cfg, engine, models.get("reference"), rollouts))
            if "proxy" in models:
                findings.append(_order(cfg, engine, models["proxy"], chats["proxy"], texts))
            if "teacher" in models:
                findings.append(_distance(cfg, engine, models["teacher"], chats, rollouts))
    except (OSError, ValueError, RuntimeError, CheckpointException) as error:
        if os.environ.get("REFLUX_TRACEBACK"):
            raise
        findings.append(
            Finding(
                "error",
                f"the models cannot be loaded or run: {error}",
                "see --dry-run for the memory they need; REFLUX_TRACEBACK=1 shows where it failed",
            )
        )
    return findings, texts


def _sample(cfg: Config, engine: Any, chat: Chat, prompts: Sequence) -> list[Rollout]:
    shortest = sorted(prompts, key=lambda p: len(chat.prompt_ids(p.messages)))[:SAMPLES]
    room = engine.seq_len + 1 - max(len(chat.prompt_ids(p.messages)) for p in shortest)
    r = cfg.rollout
    sampling = Sampling(
        min(r.max_tokens, SAMPLE_TOKENS, room), cfg.seed, 0, r.temperature, rows=r.rows
    )
    with engine.gathered_weights() as decode:
        return [x for group in generate(decode, chat, shortest, 1, sampling) for x in group]


def _precision(cfg: Config, *dtypes: str) -> str:
    """The coarsest of the trained model's compute dtype and others."""
    own = cfg.titan.get("training", {}).get("mixed_precision_param", "bfloat16")
    return "float32" if {own, *dtypes} == {"float32"} else "bfloat16"


def _gap(cfg: Config, engine: Any, chat: Chat, rollouts: Sequence[Rollout]) -> Finding:
    """What the sampler says of its own tokens against what the training forward says."""
    read = score_ids(
        engine,
        engine,
        [(r.prompt_ids, r.ids) for r in rollouts],
        chat,
        tokens=cfg.batch.tokens,
        temperature=cfg.rollout.temperature,
    )
    gap = np.concatenate([np.abs(s.logp - np.asarray(r.logp)) for s, r in zip(read, rollouts)])
    dtype = _precision(cfg)
    what = (
        f"sampler against trainer, {len(gap)} tokens: log-probabilities differ by {gap.mean():.2g} "
        f"in the mean, {gap.max():.2g} at most"
    )
    if gap.max() <= GAP[dtype]:
        return Finding("ok", f"{what} (limit {GAP[dtype]:g} for {dtype})")
    return Finding(
        "error" if dtype == "float32" else "warning",
        f"{what}; want at most {GAP[dtype]:g} for {dtype}",
        "set rollout.old_logp = 'trainer'; in float32 decoding and training compute different "
        "functions",
    )


def _kl(
    cfg: Config, engine: Any, frozen: Any, samples: Sequence[Sample], temperature: float
) -> float:
    """KL(trained || frozen) in nats per token over the whole vocabulary."""
    total = tokens = 0.0
    for batch in (
        b.to(engine.device) for b in pack(samples, tokens=cfg.batch.tokens, seq_len=engine.seq_len)
    ):
        with (
            torch.no_grad(),
            engine.forward_no_grad(engine, batch, engine.vocab_size) as own,
            engine.forward_no_grad(frozen, batch.for_teacher(), engine.vocab_size) as other,
        ):
            total += float(exact_reference_kl(own, other, temperature=temperature)[0])
        tokens += batch.tokens
    return total / max(tokens, 1)


def _anchor(cfg: Config, engine: Any, original: Any, rollouts: Sequence[Rollout]) -> Finding:
    if original is None:
        return Finding(
            "warning",
            "reference.beta = 0: nothing holds the policy near the original",
            "the KL budget of [guard] is not watched either; set reference.beta > 0",
        )
    kl = _kl(cfg, engine, original, [Sample(r) for r in rollouts], cfg.rollout.temperature)
    dtype = _precision(cfg, cfg.reference.dtype)
    what = f"KL(policy || original) at the start is {kl:.2g} nats per token"
    if abs(kl) < SELF_KL[dtype]:
        return Finding("ok", f"{what} (limit {SELF_KL[dtype]:g} for {dtype})")
    return Finding(
        "error",
        f"{what}; want < {SELF_KL[dtype]:g} for {dtype}",
        "both come from model.path: is model.from_scratch set, or do the weights not belong to "
        "config.json?",
    )


def _distance(
    cfg: Config, engine: Any, teacher: Any, chats: dict[str, Chat], rollouts: Sequence[Rollout]
) -> Finding:
    if not share_ids(cfg, chats):
        return Finding("ok", "teacher loads; token KL is undefined across tokenizers")
    samples = [
        Sample(r, teacher_views=(TeacherView(chats["teacher"].prompt_ids(r.prompt.messages)),))
        for r in rollouts
    ]
    kl = _kl(cfg, engine, teacher, samples, 1.0)
    what = f"KL(student || teacher) on the student's own texts is {kl:.3g} nats per token"
    if not math.isfinite(kl):
        return Finding(
            "error",
            what,
            "one of them bans tokens that the other uses, or its weights hold inf or NaN",
        )
    if abs(kl) < 1e-6:
        return Finding(
            "warning", what, "student and teacher are the same model: there is nothing to learn"
        )
    return Finding("ok", what)


def _order(cfg: Config, engine: Any, proxy: Any, chat: Chat, texts: Sequence[Rollout]) -> Finding:
    """Does the proxy know text at all? Its tokens of each text against the same tokens in another
    order.

    The same tokens, because a model that knows nothing has no preference among their orders, while
    shuffled characters would cost it more tokens and look like knowledge.
    """
    jobs, rng = [], np.random.default_rng(0)
    for text in texts[:16]:
        ids = chat.encode(text.text)
        shuffled = tuple(rng.permutation(ids).tolist())
        if shuffled != ids:
            jobs += [
                (chat.prompt_ids(text.prompt.messages), ids),
                (chat.prompt_ids(text.prompt.messages), shuffled),
            ]
    if not jobs:
        return Finding(
            "warning",
            "proxy: no text of two different tokens to shuffle",
            "give the data a response column",
        )
    sums = [s.logp.mean() for s in score_ids(proxy, engine, jobs, chat, tokens=cfg.batch.tokens)]
    gains = np.array(sums[::2]) - np.array(sums[1::2])
    share = float((gains > ORDER_MARGIN).mean())
    what = f"proxy: prefers {share:.0%} of {len(gains)} texts to their shuffled tokens, by {gains.mean():.2g} nats per token"
    if share >= ORDER_SHARE:
        return Finding("ok", what)
    return Finding(
        "warning",
        what,
        "it cannot tell text from noise: its reward, and the sign of the effect, would be "
        "arbitrary. Take a proxy that knows this task",
    )


# Printing


def _role_table(shapes: Sequence[Shape], chats: dict[str, Chat]) -> Table:
    table = Table(
        "role",
        "folder",
        "architecture",
        "backend",
        "parameters",
        "layers x hidden",
        "head rows / ids",
        box=box.SIMPLE,
        title="models",
    )
    for s in shapes:
        ids = str(chats[s.role.name].vocab_size) if s.role.name in chats else "?"
        table.add_row(
            s.role.name + (" (trained)" if s.role.trained else " (frozen)"),
            s.role.model.path,
            s.config.model_type,
            f"{s.spec.name}: {s.why}",
            f"{s.numel:,}",
            f"{s.config.num_hidden_layers} x {s.config.hidden_size}",
            f"{s.config.vocab_size} / {ids}",
        )
    return table


def _memory_table(parts: Sequence[Part], ranks: Ranks) -> Table:
    table = Table(
        "role",
        "what",
        "when",
        "where",
        "per rank",
        box=box.SIMPLE,
        title=(
            f"memory of one of {ranks.world} ranks: shard {ranks.shard}, replicate "
            f"{ranks.replicate}, tensor {ranks.tensor}"
        ),
    )
    for p in parts:
        table.add_row(p.role, p.what, p.when, "host" if p.host else "device", _size(p.bytes))
    for name, value in totals(parts).items():
        table.add_row(
            "total", name, "", "host" if name == "host" else "device", _size(value), style="bold"
        )
    return table


def _token_table(columns: dict[str, dict[str, str]]) -> Table:
    table = Table("", *columns, box=box.SIMPLE, title="tokenizers")
    for label in next(iter(columns.values())):
        table.add_row(label, *(column[label] for column in columns.values()))
    return table


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"


def _print(tables: Sequence[Table], findings: Sequence[Finding], examples: Sequence = ()) -> int:
    """Rank 0 prints. 1 if there is an error."""
    code = int(any(f.level == "error" for f in findings))
    if os.environ.get("RANK", "0") != "0":
        return code
    console = Console(markup=False, highlight=False, emoji=False)
    console = (
        console
        if console.is_terminal
        else Console(markup=False, highlight=False, emoji=False, width=180)
    )
    for table in tables:
        console.print(table)
    for name, chat, prompt, response in examples:
        console.print(f"{name} reads:", style="bold")
        console.print(render(chat, prompt, response, colour=console.is_terminal), soft_wrap=True)
    report = Table("", "finding", "what to do", box=box.SIMPLE)
    for f in findings:
        report.add_row(
            f.level,
            f.what,
            f.advice,
            style={"ok": "green", "warning": "yellow", "error": "bold red"}[f.level],
        )
    console.print(report)
    return code
