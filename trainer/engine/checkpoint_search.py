"""Which checkpoint a run goes on from: the newest that proves whole. Changes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from .checkpoint_folder import NO_MANIFEST, Findings, inspect, listed, steps_in, wrong_files
from .ranks import Peers


@dataclass(frozen=True)
class Wanted:
    """step: this one only; -1: the newest. at_most: none after it; then it is no error if there is
    none. total_steps: how far the run trains, for which weights alone do not do.
    """

    step: int = -1
    at_most: int | None = None
    total_steps: int = 0


@dataclass(frozen=True)
class Found:
    """Which checkpoint to load, and what is to become of the others."""

    step: int | None  # None: there is none, start from the model's folder
    weights_only: bool = False
    is_hf: bool = False
    aside: Mapping[int, str] = field(default_factory=dict)  # step -> first word of its new name
    messages: tuple[str, ...] = ()


def find(home: Path, wanted: Wanted, peers: Peers, *, renames: bool = True) -> Found:
    """The newest checkpoint of those wanted that proves whole. renames: whether the others will be
    renamed, for the messages.

    ValueError if the step wanted is missing, and if there are some but none of them will do.
    """
    there = peers.from_first(partial(steps_in, home))
    reasons: dict[int, str] = {}  # why one that comes first is not taken
    aside: dict[int, str] = {}
    candidates = _candidates(home, there, wanted)
    _check_steps(home, candidates, wanted)
    for n in reversed(candidates):
        findings = _verify(home / f"step-{n}", peers)
        if findings.damage:
            reasons[n], aside[n] = _damage(findings), "damaged"
        elif findings.weights_only and n < wanted.total_steps:
            reasons[n], aside[n] = _weights_only(n, wanted.total_steps), "given-up"
        else:
            aside |= {later: "given-up" for later in there if later > n and later not in aside}
            messages = _messages(home, reasons, aside if renames else {}, n)
            if not findings.has_manifest:
                messages += (f"{home / f'step-{n}'}: {NO_MANIFEST}",)
            return Found(n, findings.weights_only, findings.is_hf, aside, messages)
    if reasons and wanted.at_most is None:
        why = "; ".join(f"step-{n} {reason}" for n, reason in reasons.items())
        raise ValueError(
            f"{home} holds no checkpoint to go on from: {why}. Nothing was changed. Set "
            "on_existing_run = 'new' to start over"
        )
    aside |= {n: "given-up" for n in there if n not in aside}
    return Found(None, aside=aside, messages=_messages(home, reasons, aside if renames else {}, 0))


def _check_steps(home: Path, candidates: list[int], wanted: Wanted) -> None:
    """The schedule of the learning rate ends with the last step, and knows none after it."""
    newest = max(candidates, default=0)
    if newest > wanted.total_steps:
        raise ValueError(
            f"steps = {wanted.total_steps}, but {home} holds step-{newest}: set steps = {newest} "
            f"or more, or go back by checkpoint.load_step = {wanted.total_steps}"
        )


def _candidates(home: Path, there: list[int], wanted: Wanted) -> list[int]:
    if wanted.step == -1:
        return [n for n in there if wanted.at_most is None or n <= wanted.at_most]
    if wanted.step not in there:
        raise ValueError(
            f"checkpoint.load_step = {wanted.step}: {home} has no such checkpoint; it has "
            f"{listed(there)}"
        )
    return [wanted.step]


def _verify(folder: Path, peers: Peers) -> Findings:
    """Everything that can be known: the first rank inspects, then the ranks share the hashing."""
    findings = peers.from_first(partial(inspect, folder))
    if findings.damage:
        return findings
    mine = peers.share(findings.files)
    wrong = peers.from_all(partial(wrong_files, folder, mine))
    return replace(findings, damage=tuple(sentence for part in wrong for sentence in part))


def _messages(
    home: Path, reasons: Mapping[int, str], aside: Mapping[int, str], goes_on: int
) -> tuple[str, ...]:
    return tuple(
        f"{home / f'step-{n}'} {why}. "
        + (f"It is renamed to {aside[n]}-{n}. " if n in aside else "")
        + f"The run goes on from step {goes_on}"
        for n, why in reasons.items()
    )


def _damage(findings: Findings) -> str:
    more = len(findings.damage) - 1
    return f"is damaged: {findings.damage[0]}" + (f" (and {more} more)" if more else "")


def _weights_only(step: int, total: int) -> str:
    return (
        f"holds the weights alone (checkpoint.last_save_model_only or weights_only_at_end), and "
        f"training to step {total} needs the optimizer's state; steps = {step} can use it"
    )
