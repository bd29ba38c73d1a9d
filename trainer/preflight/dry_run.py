"""--dry-run: shapes, parameters, memory per rank and budget, from config.json and tokenizers alone.
No weights, no process group.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich import box
from rich.table import Table

from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat

from .data_checks import first_prompts, guard_findings
from .disk_checks import disk_findings
from .gpus import gpu_table
from .length_checks import length_findings
from .memory import Part, RankPlan, activation_bytes, memory_parts, peak, plan_ranks, totals
from .report import Finding, PreflightReport, has_errors, print_report, size, with_sources
from .shapes import Shape, planned_shapes, planned_titan
from .tokenizer_checks import open_chats, tokenizer_findings


def dry_run(cfg: Config) -> int:
    """Prints what the run would load and hold. Returns 1 if it cannot work."""
    return print_report(plan(cfg))


def plan(cfg: Config) -> PreflightReport:
    """Everything `dry_run` prints. A missing tokenizer or data file is only a warning."""
    shapes, findings = planned_shapes(cfg)
    chats, failed = open_chats([s.role for s in shapes])
    findings += as_warnings(failed)
    tables = [_role_table(shapes, chats)] if shapes else []
    own = next((s for s in shapes if s.role.own), None)
    if own is not None and not has_errors(findings):
        try:
            config = planned_titan(cfg, own)
            ranks = plan_ranks(config.parallelism, int(os.environ.get("WORLD_SIZE", "1")))
        except ValueError as error:
            findings.append(Finding("error", str(error), "mend the section named"))
        else:
            parts = memory_parts(cfg, config.training, ranks, shapes)
            tables.append(_memory_table(parts, ranks))
            tables.append(
                gpu_table(ranks, lambda r: peak(memory_parts(cfg, config.training, r, shapes)))
            )
            findings += _budget(cfg, config.training, ranks, own, parts)
            findings += disk_findings(cfg, config, own)
            prompts, failed = first_prompts(cfg)
            findings += as_warnings(failed)
            if prompts:
                findings += length_findings(cfg, shapes, chats, config.training.seq_len)
    findings += guard_findings(cfg) + tokenizer_findings(shapes, chats)
    return PreflightReport(with_sources(cfg, findings), tables)


def as_warnings(findings: Sequence[Finding]) -> list[Finding]:
    """Errors that a plan can live with."""
    return [replace(f, level="warning") if f.level == "error" else f for f in findings]


def _budget(
    cfg: Config, training: Any, ranks: RankPlan, shape: Shape, parts: Sequence[Part]
) -> list[Finding]:
    """Response tokens and micro-batches of a step, and whether activations and peak fit."""
    r = cfg.rollout
    rows = max(1, cfg.batch.tokens // training.seq_len)
    batches = math.ceil(math.ceil(r.prompts * r.group / ranks.data) / rows)
    none, full = activation_bytes(cfg, training, shape)
    findings = [
        Finding(
            "ok",
            f"{r.prompts} prompts x {r.group} x {r.max_tokens} tokens = "
            f"{r.prompts * r.group * r.max_tokens:,} response tokens a step at most; "
            f"{batches} micro-batches of {rows} full rows on each of {ranks.data} "
            f"data ranks, {cfg.policy.epochs * cfg.policy.minibatches} update(s)",
        ),
        Finding(
            "ok",
            f"activations of one micro-batch: {size(none)} without checkpointing, {size(full)} "
            "with activation_checkpoint = 'full' (upper estimates)",
        ),
    ]
    if r.prompts % ranks.data:
        what = f"rollout.prompts = {r.prompts} cannot be shared by {ranks.data} data ranks"
        findings.append(Finding("error", what, f"use a multiple of {ranks.data}"))
    return findings + _device_finding(peak(parts))


def _device_finding(needed: int) -> list[Finding]:
    if not torch.cuda.is_available():
        return []
    memory = torch.cuda.get_device_properties(0).total_memory
    if needed <= memory:
        return []
    advice = "more ranks, batch.tokens down, rollout.rows down, or activation_checkpoint = 'full'"
    return [Finding("warning", f"peak of {size(needed)} on a device of {size(memory)}", advice)]


ROLE_COLUMNS = (
    "role",
    "folder",
    "architecture",
    "backend",
    "parameters",
    "layers x hidden",
    "head rows / ids",
)


def _role_table(shapes: Sequence[Shape], chats: Mapping[str, Chat]) -> Table:
    table = Table(box=box.SIMPLE, title="models")
    for name in ROLE_COLUMNS:
        table.add_column(name)
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


def _memory_table(parts: Sequence[Part], ranks: RankPlan) -> Table:
    title = (
        f"memory of one of {ranks.world} ranks: shard {ranks.shard}, replicate {ranks.replicate}, "
        f"tensor {ranks.tensor}"
    )
    table = Table("role", "what", "when", "where", "per rank", box=box.SIMPLE, title=title)
    for p in parts:
        table.add_row(p.role, p.what, p.when, "host" if p.host else "device", size(p.bytes))
    for name, count in totals(parts).items():
        device = "host" if name == "host" else "device"
        table.add_row("total", name, "", device, size(count), style="bold")
    return table
