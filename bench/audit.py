"""Known vulnerabilities of the installed packages, by pip-audit: `make audit`.

Where its data cannot be reached (no network, a mirror without advisories), nothing is known, and
that is what it says: the list of what is installed, with the date, is then all there is
(docs/dependencies.txt).

    python -m bench.audit --tool build/audit/bin/pip-audit [--list docs/dependencies.txt]

Exit codes: 0 nothing known against them, 1 a known vulnerability, 3 the data could not be reached.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

FOUND, NOT_REACHED = 1, 3
OURS = "reflux-llm"


@dataclass(frozen=True)
class Audit:
    """What pip-audit says. vulnerable: "name version: ID (fixed in ...)", a line each."""

    audited: int
    skipped: int
    vulnerable: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        if self.vulnerable:
            return FOUND
        return 0 if self.audited else NOT_REACHED


def read_audit(report: Mapping[str, Any]) -> Audit:
    """pip-audit's JSON."""
    audited = [d for d in report["dependencies"] if "skip_reason" not in d]
    lines = [
        f"{d['name']} {d['version']}: {v['id']} (fixed in {', '.join(v['fix_versions']) or '-'})"
        for d in audited
        for v in d["vulns"]
    ]
    return Audit(len(audited), len(report["dependencies"]) - len(audited), tuple(lines))


def run_audit(tool: str, packages: str) -> Audit:
    """Of the packages in the folder `packages`. A tool that cannot even ask has audited none."""
    command = [tool, "--format", "json", "--progress-spinner", "off", "--path", packages]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return read_audit(json.loads(done.stdout))
    except ValueError:
        print((done.stderr.strip() or "no output").splitlines()[-1], file=sys.stderr)
        return Audit(0, 0, ())


def installed() -> list[str]:
    """name==version of every package that this interpreter sees, in order."""
    found = {d.metadata["Name"].lower(): d.version for d in distributions() if d.metadata["Name"]}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name != OURS]


def write_list(file: Path, audit: Audit, pins: Sequence[str]) -> None:
    reached = f"{audit.audited} audited, {len(audit.vulnerable)} known vulnerabilities"
    state = reached if audit.audited else "no advisories could be reached: nothing is known"
    head = f"# What `make test` ran with, {datetime.now(UTC):%Y-%m-%d}. pip-audit: {state}."
    file.write_text("\n".join([head, *audit.vulnerable, *pins]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", default="pip-audit")
    parser.add_argument("--list", type=Path, help="write what is installed, with the date")
    options = parser.parse_args()
    audit, pins = run_audit(options.tool, sysconfig.get_paths()["purelib"]), installed()
    if options.list:
        write_list(options.list, audit, pins)
    print(
        f"{audit.audited} packages audited, {audit.skipped} not found", *audit.vulnerable, sep="\n"
    )
    if not audit.audited:
        print("no advisories could be reached; what is installed:", *pins, sep="\n")
    return audit.exit_code


if __name__ == "__main__":
    sys.exit(main())
