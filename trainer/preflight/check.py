"""--check: tokenizers, templates, data, grader and models, tried on this machine. Writes nothing to
the run's folder.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from reflux.trainer.config.phases import roles, spec_of
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.engine.engine import Engine
from reflux.trainer.runs import commands

from .data_checks import (
    control_findings,
    first_prompts,
    given_responses,
    guard_findings,
    held_out_findings,
    sampled_findings,
    task_findings,
)
from .disk_checks import disk_findings
from .engine_checks import engine_findings
from .length_checks import length_findings
from .model_checks import PROBES, Trial, load_frozen, no_reference, sample_texts, sampler_gap
from .pair_checks import alignment_findings, pair_findings, stop_findings
from .report import Example, Finding, PreflightReport, has_errors, print_report, with_sources
from .run_checks import run_findings
from .shapes import Shape, planned_shapes, planned_titan
from .tokenizer_checks import open_chats, tokenizer_findings, tokenizer_table


def check(cfg: Config) -> int:
    """Prints what is wrong with a configuration. Returns 1 if it cannot work."""
    return print_report(examine(cfg))


def examine(cfg: Config) -> PreflightReport:
    """Everything `check` prints. Collective."""
    shapes, findings = planned_shapes(cfg)
    chats, failed = open_chats([s.role for s in shapes])
    findings += failed + tokenizer_findings(shapes, chats) + pair_findings(cfg, chats)
    findings += stop_findings(cfg, chats)
    prompts, failed = first_prompts(cfg)
    findings += failed + control_findings(chats, prompts)
    findings += [] if has_errors(failed) else held_out_findings(cfg)
    findings += guard_findings(cfg)
    texts: list[Rollout] = []
    if chats and prompts and len(shapes) == len(roles(cfg)):
        findings += _lengths_and_disk(cfg, shapes, chats)
        texts, cut = given_responses(cfg, next(iter(chats.values())), prompts)
        findings += cut + task_findings(cfg, texts)
    findings += engine_findings(cfg) + run_findings(cfg)
    if has_errors(findings):
        advice = "mend the errors first, then check again"
        findings.append(Finding("warning", "the models were not loaded", advice))
    else:
        tried, texts = _try_models(cfg, chats, prompts, texts)
        findings += tried
    tables = [tokenizer_table(shapes, chats)] if chats else []
    copies = {s.role.name for s in shapes if s.role.is_copy}
    examples = [
        Example(name, chat, texts[0].prompt, texts[0].text)
        for name, chat in chats.items()
        if texts and name not in copies
    ]
    return PreflightReport(with_sources(cfg, findings), tables, examples)


def _lengths_and_disk(
    cfg: Config, shapes: Sequence[Shape], chats: Mapping[str, Chat]
) -> list[Finding]:
    try:
        config = planned_titan(cfg, shapes[0])
    except ValueError as error:
        return [Finding("error", str(error), "mend the section named")]
    lengths = length_findings(cfg, shapes, chats, config.training.seq_len)
    return lengths + disk_findings(cfg, config, shapes[0])


def _try_models(
    cfg: Config, chats: Mapping[str, Chat], prompts: Sequence[Prompt], texts: list[Rollout]
) -> tuple[list[Finding], list[Rollout]]:
    """Loads the models and samples a few texts. Returns the data's own texts, or the sampled ones
    where it has none.
    """
    findings: list[Finding] = []
    try:
        with _scratch_engine(cfg) as engine:
            own, *others = roles(cfg)
            sampled = sample_texts(cfg, engine, chats[own.name], prompts)
            if not texts:
                texts = sampled
                findings += sampled_findings(cfg, sampled)
            trial = Trial(cfg, engine, own, chats, sampled, texts)
            findings.append(sampler_gap(trial))
            findings += alignment_findings(cfg, chats, texts)
            if spec_of(cfg.phase).has_reference and not any(r.is_copy for r in others):
                findings.append(no_reference(cfg))
            loaded = [(role, load_frozen(engine, role)) for role in others if role.probe]
            findings += [PROBES[role.probe](trial, role, model) for role, model in loaded]
    except (OSError, ValueError, RuntimeError, CheckpointException) as error:
        if os.environ.get("REFLUX_TRACEBACK"):
            raise
        findings.append(
            Finding(
                "error",
                f"the models cannot be loaded or run: {error}",
                "see the memory they need, and where it failed, by the commands below",
                (
                    commands.plan(),
                    f"REFLUX_TRACEBACK=1 {commands.again()}",
                ),
            )
        )
    return findings, texts


@contextlib.contextmanager
def _scratch_engine(cfg: Config) -> Iterator[Engine]:
    """An engine whose every file lies in a folder that is deleted; it starts from the model's
    folder, not from a checkpoint.
    """
    checkpoint = {
        k: v for k, v in cfg.titan.get("checkpoint", {}).items() if k not in ("folder", "load_step")
    }
    with tempfile.TemporaryDirectory(prefix="reflux-check-") as folder:
        quiet = replace(
            cfg,
            folder=folder,
            titan={**cfg.titan, "checkpoint": checkpoint},
            log=replace(cfg.log, tensorboard=False, wandb=False),
        )
        try:
            engine = Engine(quiet, hashes_inputs=False)
            try:
                engine.vocab_size = min(engine.vocab_size, Chat.of(cfg.model).vocab_size)
                yield engine
            finally:
                engine.close()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
