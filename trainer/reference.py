"""docs/config_reference.md: every option of a configuration, from the dataclasses that define it.

python -m reflux.trainer.reference --out docs/config_reference.md
python -m reflux.trainer.reference --check docs/config_reference.md    # exit code 1 if stale
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from .config.loader import toml_value
from .config.options import Option, Section, own_sections
from .config.schema import Config

HEAD = """# Every option

Written by `python -m reflux.trainer.reference --out docs/config_reference.md`; a test says when
it is stale. Types and defaults are those of the dataclasses in `trainer/config/`; reasons are their
comments. A key without a default has to be chosen. `--print-config` prints all of it for one run.
How files are laid over each other: [commands.md](commands.md); what the symbols mean:
[method.md](method.md).
"""
TITAN = """
# Sections of torchtitan

They keep torchtitan's names and go to torchtitan 0.3.0, except what our own tables decide. Defaults
are those of a run of 100 steps here, where they differ from torchtitan's own.
"""


def page() -> str:
    """The whole page."""
    from .engine.titan_options import titan_options

    plain = Config(**_least())
    titan = [Section(name, "", tuple(o)) for name, o in titan_options(plain).items()]
    parts = [HEAD, *map(_section, own_sections()), TITAN, *map(_section, titan)]
    return "\n".join(parts)


def _least() -> dict[str, Any]:
    """What a configuration has to say, so that defaults can be asked for."""
    from .config.data import DataSection
    from .config.sections import ModelSection

    return {
        "phase": "evaluate",
        "folder": "runs/x",
        "model": ModelSection(path="m"),
        "data": DataSection(source="d"),
    } | _evaluated()


def _evaluated() -> dict[str, Any]:
    from .config.evaluation import EvalSection
    from .config.sections import TaskSection

    return {"eval": EvalSection(source="e"), "task": TaskSection(name="exact")}


def _section(section: Section) -> str:
    title = f"## [{section.name}]" if section.name else "## At the head of the file"
    lines = [title, "", section.purpose, ""] if section.purpose else [title, ""]
    rows = [_row(o) for o in section.options]
    return "\n".join([*lines, "| key | type | default | reason |", "|---|---|---|---|", *rows, ""])


def _row(o: Option) -> str:
    kind, reason = (text.replace("|", "\\|") for text in (o.kind, o.reason))
    return f"| `{o.key}` | {kind} | {_value(o.value)} | {reason} |"


def _value(value: Any) -> str:
    if value is MISSING:
        return "must be chosen"
    return "" if value is None else f"`{toml_value(value)}`".replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m reflux.trainer.reference", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="the file to write; default: print")
    parser.add_argument("--check", type=Path, help="a page that may be stale")
    args = parser.parse_args(arguments)
    text = page()
    if args.check:
        stale = args.check.read_text() != text
        print(f"{args.check}: {'stale' if stale else 'up to date'}")
        return int(stale)
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
