"""Whether every prompt fits, and what becomes of those that do not: the checks that a run makes
before its first step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from reflux.trainer.config.parts import input_name, part_configs
from reflux.trainer.config.phases import spec_of
from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.fitted_prompts import Fitting
from reflux.trainer.data.prompt_lengths import OneRank
from reflux.trainer.data.row_checks import Need
from reflux.trainer.data.training_prompts import said_of_ungraded
from reflux.trainer.engine.fingerprints import data_input, data_sources
from reflux.trainer.evaluation.questions import load_questions

from .report import Finding
from .shapes import Shape

MEND = "mend the rows named"


@dataclass(frozen=True)
class PlannedRun(OneRank):
    """What the checks ask of an engine."""

    seq_len: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict)


def length_findings(
    cfg: Config, shapes: Sequence[Shape], chats: Mapping[str, Chat], seq_len: int
) -> list[Finding]:
    """Of the prompts that the phase reads, every one of them, and of the questions of [eval]."""
    if any(s.role.name not in chats for s in shapes):  # that is a finding already
        return []
    own = next(s.role for s in shapes if s.role.own)
    sources = data_sources(cfg)
    used = [n for n in sources if n.partition(".")[0] == "eval" or _reads_data(cfg)]
    try:
        inputs = {name: asdict(data_input(sources[name])) for name in used}
    except (OSError, ValueError) as error:
        return [Finding("error", f"the data cannot be read: {error}", MEND)]
    run, findings = PlannedRun(seq_len=seq_len, inputs=inputs), []
    for part, alone in part_configs(cfg, "data").items() if _reads_data(cfg) else ():
        name = input_name("data", part)
        findings += _training_findings(alone, run, chats[own.name], name)
    if cfg.eval.asks:
        findings.append(_question_finding(cfg, run, chats[own.name]))
    return findings


def _reads_data(cfg: Config) -> bool:
    return spec_of(cfg.phase).data_section == "data"


def _training_findings(cfg: Config, run: PlannedRun, chat: Chat, name: str) -> list[Finding]:
    try:
        fitting = Fitting(cfg, run, chat, name)
    except (OSError, ValueError, ImportError) as error:
        return [Finding("error", f"{name}.source: {error}", MEND)]
    findings = [_need_finding(cfg, need, own=not i) for i, need in enumerate(fitting.needs)]
    if fitting.ungraded:
        findings.append(Finding("warning", f"{name}.source: {said_of_ungraded(fitting)}"))
    if not any(f.level == "error" for f in findings):
        try:
            fitting.fitted()
        except ValueError as error:  # nothing is left, or cannot be cut
            findings.append(Finding("error", f"{name}.source: {error}", MEND))
    return findings


def _need_finding(cfg: Config, need: Need, *, own: bool) -> Finding:
    longest, count = int(need.tokens_N.argmax()), int(need.over_N.sum())
    known = need.knows_responses
    behind = int(need.behind_N[longest]) if known else cfg.rollout.max_tokens
    what = need.behind if known else "rollout.max_tokens"
    tokens = int(need.prompt_N[longest])
    total = tokens + behind
    words = (
        f"{need.role}: longest of all {len(need.over_N):,} prompts {tokens} + {what} {behind} = "
        f"{total} tokens, {need.limit} {need.room}"
    )
    advice = need.advice if own else "Take a model with a longer context"
    if count and cfg.data.too_long != "error":
        done = {"drop": "left out", "truncate_left": "cut"}[cfg.data.too_long]
        return Finding("warning", f"{words}: {count:,} prompts are too long and will be {done}")
    if count:
        words += f": {count / len(need.over_N):.1%} of the prompts are too long"
        return Finding("error", words, f"{advice}, or set data.too_long")
    if total > need.room:  # a frozen model, whose tokens of a text are not known yet
        return Finding("warning", f"{words}: longer texts are left out as unaligned", advice)
    return Finding("ok", words)


def _question_finding(cfg: Config, run: PlannedRun, chat: Chat) -> Finding:
    try:
        count = len(load_questions(cfg, run, chat).prompts)
    except (OSError, ValueError, ImportError) as error:
        return Finding("error", f"eval.source: {error}", MEND)
    return Finding("ok", f"eval.source: all {count} questions fit")
