"""--check with weights: samples a few texts and tries what the method relies on.

sampler_gap    the sampler's log-probabilities are those of the training forward
start_kl       KL of the policy to the reference model, before any step: 0
token_order    a proxy prefers texts to the same tokens in another order
token_kl       KL of the student to a teacher: finite, and not 0
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from reflux.trainer.config.phases import pair_of
from reflux.trainer.config.roles import Pair, Probe, Role
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout, Sample, TeacherView, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.losses import exact_reference_kl
from reflux.trainer.phase import Engine, FrozenModel, Sampling
from reflux.trainer.rollouts.samplers import build_sampler
from reflux.trainer.rollouts.scoring import score_ids

from .pair_checks import shares_ids
from .report import Finding

SAMPLES, SAMPLE_TOKENS = 4, 64
MAX_GAP = {"float32": 1e-4, "bfloat16": 0.2}  # nats, sampler against trainer
MAX_START_KL = {"float32": 1e-4, "bfloat16": 1e-2}  # nats per token
SAME_MODEL_KL = 1e-6  # nats per token
ORDER_TEXTS = 16
ORDER_MARGIN = 0.01  # nats per token by which a text is likelier than its shuffled tokens
ORDER_FRACTION = 0.8  # of the texts


@dataclass(frozen=True, eq=False)
class Trial:
    """A loaded engine, and texts to try models on."""

    cfg: Config
    engine: Engine
    own: Role
    chats: Mapping[str, Chat]
    sampled: list[Rollout]  # by the model of [model]
    texts: list[Rollout]  # the data's own responses where it has some, else `sampled`


def sample_texts(
    cfg: Config, engine: Engine, chat: Chat, prompts: Sequence[Prompt]
) -> list[Rollout]:
    """One rollout for each of the SAMPLES shortest prompts."""
    shortest = sorted(prompts, key=lambda p: len(chat.prompt_ids(p.messages)))[:SAMPLES]
    room = engine.seq_len + 1 - max(len(chat.prompt_ids(p.messages)) for p in shortest)
    r = cfg.rollout
    sampling = Sampling(
        min(r.max_tokens, SAMPLE_TOKENS, room), cfg.seed, 0, r.temperature, rows=r.rows
    )
    groups = build_sampler(cfg, engine, chat).sample(shortest, 1, sampling)
    return [rollout for group in groups for rollout in group]


def load_frozen(engine: Engine, role: Role) -> FrozenModel:
    """A copy of the trained model is scored on its rows; other models also on longer ones."""
    if role.shared:
        return engine.base()
    if role.is_copy:
        return engine.frozen(role.model, longest=engine.seq_len)
    return engine.frozen(role.model)


def sampler_gap(trial: Trial) -> Finding:
    """Log-probabilities that the texts were sampled with against those of the training forward."""
    cfg, rollouts = trial.cfg, trial.sampled
    scores = score_ids(
        trial.engine,
        trial.engine,
        [(r.prompt_ids, r.ids) for r in rollouts],
        trial.chats[trial.own.name],
        tokens=cfg.batch.tokens,
        temperature=cfg.rollout.temperature,
    )
    gap = np.concatenate([np.abs(s.logp - np.asarray(r.logp)) for s, r in zip(scores, rollouts)])
    dtype = _precision(cfg)
    what = (
        f"sampler against trainer, {len(gap)} tokens: log-probabilities differ by {gap.mean():.2g} "
        f"in the mean, {gap.max():.2g} at most"
    )
    if gap.max() <= MAX_GAP[dtype]:
        return Finding("ok", f"{what} (limit {MAX_GAP[dtype]:g} for {dtype})")
    return Finding(
        "error" if dtype == "float32" else "warning",
        f"{what}; want at most {MAX_GAP[dtype]:g} for {dtype}",
        "set rollout.old_logp = 'trainer'; in float32 decoding and training compute different "
        "functions",
    )


def no_reference(cfg: Config) -> Finding:
    what = "reference.beta = 0: no KL holds the policy to the reference model"
    if not cfg.guard.kl_budget:
        return Finding("warning", what, "set reference.beta > 0")
    return Finding(
        "warning",
        f"{what}, and guard.kl_budget = {cfg.guard.kl_budget} is not watched: none is loaded",
        "set reference.beta > 0 (1e-6 only measures), or guard.kl_budget = 0",
    )


def start_kl(trial: Trial, role: Role, frozen: FrozenModel) -> Finding:
    """KL of the policy to its reference model; both are the weights of model.path."""
    samples = [Sample(r) for r in trial.sampled]
    kl = _kl(trial, frozen, samples, trial.cfg.rollout.temperature)
    dtype = _precision(trial.cfg, role.model.dtype)
    what = f"KL({trial.own.name} || {role.name}) at the start is {kl:.2g} nats per token"
    if abs(kl) < MAX_START_KL[dtype]:
        return Finding("ok", f"{what} (limit {MAX_START_KL[dtype]:g} for {dtype})")
    return Finding(
        "error",
        f"{what}; want < {MAX_START_KL[dtype]:g} for {dtype}",
        "both come from model.path: is model.from_scratch set, or do the weights not belong to "
        "config.json?",
    )


def token_kl(trial: Trial, role: Role, frozen: FrozenModel) -> Finding:
    """KL of the student to the teacher on the student's own texts."""
    pair = pair_of(trial.cfg) or Pair(trial.own.name, role.name)
    if not shares_ids(pair, trial.chats):
        return Finding("ok", f"{role.name} loads; token KL is undefined across tokenizers")
    chat = trial.chats[role.name]
    samples = [
        Sample(r, teacher_views=(TeacherView(chat.prompt_ids(r.prompt.messages)),))
        for r in trial.sampled
    ]
    kl = _kl(trial, frozen, samples, 1.0)
    own = trial.own.name
    what = f"KL({own} || {role.name}) on the {own}'s own texts is {kl:.3g} nats per token"
    if not math.isfinite(kl):
        return Finding(
            "error",
            what,
            "one of them bans tokens that the other uses, or its weights hold inf or NaN",
        )
    if abs(kl) < SAME_MODEL_KL:
        same = f"{own} and {role.name} are the same model: there is nothing to learn"
        return Finding("warning", what, same)
    return Finding("ok", what)


def token_order(trial: Trial, role: Role, frozen: FrozenModel) -> Finding:
    """Log-probability of each text against that of its tokens in another order.

    The same tokens: a model that knows nothing has no preference among their orders, while shuffled
    characters would cost it more tokens and look like knowledge.
    """
    chat = trial.chats[role.name]
    jobs, rng = [], np.random.default_rng(0)
    for text in trial.texts[:ORDER_TEXTS]:
        prompt_ids, ids = chat.prompt_ids(text.prompt.messages), chat.encode(text.text)
        shuffled = tuple(rng.permutation(ids).tolist())
        if shuffled != ids:
            jobs += [(prompt_ids, ids), (prompt_ids, shuffled)]
    if not jobs:
        return Finding(
            "warning",
            f"{role.name}: no text of two different tokens to shuffle",
            "give the data a response column",
        )
    scores = score_ids(frozen, trial.engine, jobs, chat, tokens=trial.cfg.batch.tokens)
    logp = np.array([s.logp.mean() for s in scores])
    gains = logp[::2] - logp[1::2]
    fraction = float((gains > ORDER_MARGIN).mean())
    what = (
        f"{role.name}: prefers {fraction:.0%} of {len(gains)} texts to their shuffled tokens, by "
        f"{gains.mean():.2g} nats per token"
    )
    if fraction >= ORDER_FRACTION:
        return Finding("ok", what)
    return Finding(
        "warning",
        what,
        "it does not tell text from noise: its reward, and the sign of the effect, would be "
        "arbitrary. Take a proxy that knows this task",
    )


PROBES: dict[Probe | None, Callable[[Trial, Role, FrozenModel], Finding]] = {  # by Role.probe
    "same_weights": start_kl,
    "token_order": token_order,
    "token_kl": token_kl,
}


def _precision(cfg: Config, *dtypes: str) -> str:
    """The coarsest of the trained model's compute dtype and others."""
    own = cfg.titan.get("training", {}).get("mixed_precision_param", "bfloat16")
    return "float32" if {own, *dtypes} == {"float32"} else "bfloat16"


def _kl(trial: Trial, frozen: FrozenModel, samples: Sequence[Sample], temperature: float) -> float:
    """KL(own || frozen) in nats per token, over the whole vocabulary."""
    engine, total, tokens = trial.engine, 0.0, 0
    for batch in pack(samples, tokens=trial.cfg.batch.tokens, seq_len=engine.seq_len):
        batch = batch.to(engine.device)
        with (
            torch.no_grad(),
            engine.forward_no_grad(engine, batch, engine.vocab_size) as own,
            engine.forward_no_grad(frozen, batch.for_teacher(), engine.vocab_size) as other,
        ):
            total += float(exact_reference_kl(own, other, temperature=temperature)[0])
        tokens += batch.tokens
    return total / max(tokens, 1)
