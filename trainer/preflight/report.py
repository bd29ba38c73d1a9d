"""What --dry-run and --check print: tables, findings and examples, once, at the end."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reflux.trainer.config.origins import origin_notes
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.chat import Chat

TOKEN_COLOURS = ("black on bright_cyan", "black on bright_yellow")
LEVEL_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}
SHORT = 80  # characters of a text in a finding


@dataclass(frozen=True)
class Finding:
    """One line of the report, and what to do about it: in words, and by which commands."""

    level: Literal["ok", "warning", "error"]
    what: str
    advice: str = ""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt with its response, to be shown in the tokens of one role."""

    role: str
    chat: Chat
    prompt: Prompt
    response: str


@dataclass(frozen=True, eq=False)
class PreflightReport:
    """Everything a pre-flight found out."""

    findings: list[Finding]
    tables: list[Table] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return has_errors(self.findings)


def with_sources(cfg: Config, findings: Sequence[Finding]) -> list[Finding]:
    """The findings; those that something is wrong with say where the options they name are set."""
    out = []
    for f in findings:
        notes = [] if f.level == "ok" else origin_notes(cfg, f.what)
        out.append(replace(f, what=f"{f.what} ({'; '.join(notes)})") if notes else f)
    return out


def has_errors(findings: Sequence[Finding]) -> bool:
    return any(f.level == "error" for f in findings)


def print_report(report: PreflightReport) -> int:
    """Rank 0 prints. Returns the exit code: 1 if there is an error."""
    if os.environ.get("RANK", "0") == "0":
        _print(report, _console())
    return int(report.failed)


def _console() -> Console:
    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        return console
    return Console(markup=False, highlight=False, emoji=False, width=180)


def _print(report: PreflightReport, console: Console) -> None:
    for table in report.tables:
        console.print(table)
    for example in report.examples:
        console.print(f"{example.role} reads:", style="bold")
        console.print(render(example, colour=console.is_terminal), soft_wrap=True)
    table = Table("", "finding", "what to do", box=box.SIMPLE)
    for f in report.findings:
        table.add_row(f.level, f.what, f.advice, style=LEVEL_COLOURS[f.level])
    console.print(table)
    for command in dict.fromkeys(c for f in report.findings for c in f.commands):
        console.print(f"  {command}", soft_wrap=True)


def render(example: Example, *, colour: bool) -> Text:
    """One example as its role reads it. The prompt is dim; the response tokens, the only ones with
    a loss, alternate in colour; the stop token ends it.

    Without colour every response token stands in square brackets and the stop token in double angle
    brackets.
    """
    chat = example.chat
    prompt_ids = chat.prompt_ids(example.prompt.messages)
    out = Text(str(chat.tokenizer.decode(list(prompt_ids))), style="dim")
    for k, i in enumerate(chat.encode(example.response)):
        piece = chat.table.pieces[i].decode("utf-8", "backslashreplace")
        out.append(piece if colour else f"[{piece}]", style=TOKEN_COLOURS[k % 2])
    stop = str(chat.tokenizer.convert_ids_to_tokens(chat.stop_id))
    out.append(stop if colour else f"«{stop}»", style="bold white on red")
    return out


def first_line(error: BaseException) -> str:
    """Of its message, at most 400 characters; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]


def short(text: str) -> str:
    """Quoted, at most SHORT characters."""
    return repr(text if len(text) <= SHORT else text[: SHORT - 3] + "...")


def size(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"
