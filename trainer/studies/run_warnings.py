"""What the runs of a matrix folder were warned of: guards that ended one, and alarms, one line
each kind. Every report of a matrix prints them, so that no number stands there without them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.runs.logger import LOG, Run, load_run

SHOWN = 5  # names of runs in a line


def run_warnings(folder: Path) -> tuple[str, ...]:
    """Of all cells that have begun, also of those without an end."""
    cells = json.loads((folder / "matrix.json").read_text())["cells"]
    runs, unread = dict[str, Run](), list[str]()
    for c in cells:
        if (folder / c["folder"] / LOG).exists():
            try:
                runs[c["name"]] = load_run(folder / c["folder"])
            except ValueError as error:  # it has just begun, or was killed before its first line
                unread.append(f"{c['name']}: not in the report, nor its warnings: {error}")
    return (*_stops(runs), *_alarms(runs), *unread)


def as_markdown(warnings: Sequence[str]) -> str:
    """A section of a page; empty without warnings."""
    return "\n## Warnings\n\n" + "".join(f"- {w}\n" for w in warnings) if warnings else ""


def _stops(runs: dict[str, Run]) -> list[str]:
    return [
        f"{name}: a guard ended it{_accepted(run)}: {reason}"
        for name, run in runs.items()
        if (reason := (run.summary or {}).get("stopped"))
    ]


def _accepted(run: Run) -> str:
    """Which weights were exported, where any were."""
    exports = [e for e in run.events if e["event"] == "export"]
    return (
        f"; its export holds the accepted weights of step {exports[-1]['steps']}" if exports else ""
    )


def _alarms(runs: dict[str, Run]) -> list[str]:
    by_alarm: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, run in runs.items():
        for event in run.events:
            if event["event"] == "alarm":
                by_alarm.setdefault(event["alarm"], []).append((name, event))
    return [_line(alarm, raised) for alarm, raised in by_alarm.items()]


def _line(alarm: str, raised: Sequence[tuple[str, dict[str, Any]]]) -> str:
    places = [f"{name} (step {event['step']})" for name, event in raised]
    more = f" and {len(places) - SHOWN} more runs" if len(places) > SHOWN else ""
    example = raised[0][1]["message"]
    said = example if len(raised) == 1 else f"of the first: {example}"
    return f"{alarm} in {', '.join(places[:SHOWN])}{more}; {said}"
