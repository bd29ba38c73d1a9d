"""Mixtures: each part of [data] and [eval] as a configuration of its own, and whose task grades it.

A source without parts is one part, named "".
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Literal

from .data import SourceSection
from .sections import TaskSection

if TYPE_CHECKING:
    from .schema import Config


def part_configs(cfg: Config, table: Literal["data", "eval"]) -> dict[str, Config]:
    """Name of the part -> the configuration with this part as the one source of `table`, and with
    its task.
    """
    section = getattr(cfg, table)
    if not section.parts:
        return {"": cfg}
    grading, out = tasks(cfg), {}
    for name, part in section.parts.items():
        source = {f.name: getattr(part, f.name) for f in fields(SourceSection)}
        alone = replace(section, parts={}, **source)
        out[name] = replace(cfg, **{table: alone}, task=grading[name])
    return out


def tasks(cfg: Config) -> dict[str, TaskSection]:
    """Name of the part -> its task, of all parts of [data] and [eval]. ValueError where a part of
    both is graded in two ways.
    """
    out = {"": cfg.task}
    for name, part in cfg.data.parts.items():
        out[name] = part.task if part.task.name else cfg.task
    for name, questions in cfg.eval.parts.items():
        own = questions.task
        if own.name and name in cfg.data.parts and own != out[name]:
            raise ValueError(
                f"eval.parts.{name}.task = {own.name!r} and data.parts.{name}.task = "
                f"{out[name].name!r} differ; give the parts two names, or one of them no task"
            )
        out[name] = own if own.name else out.get(name, cfg.task)
    return out


def used_tasks(cfg: Config, *tables: Literal["data", "eval"]) -> list[TaskSection]:
    """Of the parts of these tables that have a source."""
    grading = tasks(cfg)
    sections = [getattr(cfg, table) for table in tables]
    names = [n for s in sections for n in (s.parts or ([""] if s.source else []))]
    return [grading[name] for name in dict.fromkeys(names)]


def input_name(table: str, part: str) -> str:
    """Of a source among the inputs of a run."""
    return f"{table}.{part}" if part else table
