"""What the sub-commands of `reflux` do where that is more than one call: names of recipes become
files, and the rest goes to the program that does the work. Each returns an exit code.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import main as run_main
from . import matrix as run_table
from . import matrix_file
from .config.recipes import find
from .runs.commands import MAIN

ROOT = Path(__file__).parents[1]
GPUS = Path("/proc/driver/nvidia/gpus")
SHOWN = 12  # numbers of a run's last step that `report` prints, these first
FIRST = (
    *("loss", "reward/task", "accuracy", "reward/cal", "eta", "reference_kl", "kl", "nll"),
    *("entropy", "length", "truncated"),
)


def run(words: list[str], prog: str) -> int:
    """reflux run CONFIG: a run, or a matrix where the file is one."""
    parser = _parser(prog, "Run a configuration. " + run_main.EXIT_CODES)
    parser.add_argument("--print-config", action="store_true", help="print every option and exit")
    args = parser.parse_args(words)
    file = _file(parser, args.config)
    if matrix_file.is_matrix(file):
        if args.ranks > 1 or args.print_config:
            parser.error(f"{args.config} is a table of runs; want reflux matrix {args.config}")
        return run_table.main([str(file), *_sets(args)], "reflux matrix")
    more = ["--print-config"] if args.print_config else []
    if not more and args.ranks == 1:
        _say_ranks(words)
    return _start(["--config", str(file), *_sets(args), *more], args.ranks, parser, ["run", *words])


def matrix(words: list[str], prog: str) -> int:
    """reflux matrix FILE, as python -m reflux.trainer.matrix."""
    return run_table.main(words, prog)


def check(words: list[str], prog: str) -> int:
    """reflux check CONFIG: models, tokenizers, data and grader, tried on this machine."""
    parser = _parser(prog, "Try everything that a run needs; write nothing.")
    args = parser.parse_args(words)
    file = _no_matrix(parser, args.config)
    started = ["--config", str(file), *_sets(args), "--check"]
    return _start(started, args.ranks, parser, prog=prog)


def plan(words: list[str], prog: str) -> int:
    """reflux plan CONFIG: shapes and memory of one of --ranks ranks; of a matrix, its commands."""
    parser = _parser(prog, "Shapes, parameters and memory per rank; no weights are loaded.")
    args = parser.parse_args(words)
    file = _file(parser, args.config)
    if matrix_file.is_matrix(file):
        return run_table.main([str(file), *_sets(args), "--dry-run"], "reflux matrix")
    if args.ranks > 1:
        os.environ["WORLD_SIZE"] = str(args.ranks)  # what the plan is made for; nothing is started
    return run_main.main(["--config", str(file), *_sets(args), "--dry-run"], prog=prog)


def report(words: list[str], prog: str) -> int:
    """reflux report FOLDER: a run in a few lines and as a page, or a matrix's reports and page,
    written anew.
    """
    from .runs.watch import write_page

    parser = argparse.ArgumentParser(prog=prog, description=report.__doc__)
    parser.add_argument("folder", type=Path, help="of a run or of a matrix")
    folder = parser.parse_args(words).folder
    try:
        if (folder / "matrix.json").exists():
            missing = run_table.report_again(folder)
            print(f"see {write_page(folder)}")
            return 1 if missing else 0
        print(_told(folder))
        print(f"see {write_page(folder)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def align(words: list[str], prog: str) -> int:
    """reflux align A B, as python -m reflux.tokenalign."""
    from reflux.tokenalign.__main__ import main as align_main

    align_main(words, prog)
    return 0


def bench(words: list[str], prog: str) -> int:
    """reflux bench OP, as python -m bench in the checkout that is installed."""
    if not (ROOT / "bench" / "__main__.py").is_file():
        print(
            f"{prog}: error: a benchmark runs the tests of what it measures and records its "
            "commit, so it works in a checkout only: clone the repository, then make bench",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, "-m", "bench", *words], cwd=ROOT).returncode


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", help="a .toml or .yaml file, a recipe's name (reflux init), or a .py file")
    add("--set", action="append", default=[], metavar="A.B=VALUE", help="override one option")
    add("--ranks", type=int, default=1, help="processes, one for each GPU; started by torchrun")
    return parser


def _sets(args: argparse.Namespace) -> list[str]:
    return [word for text in args.set for word in ("--set", text)]


def _file(parser: argparse.ArgumentParser, given: str) -> Path:
    try:
        return find(given)
    except ValueError as error:
        parser.error(str(error))


def _no_matrix(parser: argparse.ArgumentParser, given: str) -> Path:
    file = _file(parser, given)
    if matrix_file.is_matrix(file):
        parser.error(f"{given} is a table of runs; want the configuration of one of its cells")
    return file


def _start(
    words: list[str],
    ranks: int,
    parser: argparse.ArgumentParser,
    typed: Sequence[str] = (),
    prog: str = "",
) -> int:
    """trainer/main.py with these words: here, or on several ranks."""
    if ranks == 1:
        return run_main.main(words, typed, prog)
    if ranks < 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        parser.error(f"--ranks {ranks}: want 1 or more, and not inside of torchrun")
    return launch(words, ranks)


def launch(words: Sequence[str], ranks: int) -> int:
    """trainer/main.py on `ranks` processes of this machine, by torchrun. Returns their exit code:
    that of the one that ended first where they differ.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from .runs.torchrun_report import report as end_with_exit_code

    try:
        torchrun.main(["--standalone", "--nproc-per-node", str(ranks), str(MAIN), *words])
    except (ChildFailedError, SignalException) as error:
        end_with_exit_code(type(error), error, error.__traceback__)
        return 1
    return 0


def _say_ranks(words: Sequence[str]) -> None:
    """One process uses one GPU; says how to use more of them."""
    count = _gpus()
    if count > 1 and "WORLD_SIZE" not in os.environ:
        print(
            f"one process uses one of {count} GPUs; for all of them add --ranks {count}",
            file=sys.stderr,
        )


def _gpus() -> int:
    """That the driver has and this process may see; without an import of torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(list(GPUS.iterdir())) if GPUS.is_dir() else 0
    return there if visible is None else min(there, len([x for x in visible.split(",") if x]))


def _told(folder: Path) -> str:
    """A run in lines: how it ended, its last step, its last evaluation and the verdicts on it, its
    pages.
    """
    from .runs.alarms import tell_again
    from .runs.console import ONCE, event_lines
    from .runs.logger import load_run
    from .runs.run_page import verdict_rows

    loaded = load_run(folder)
    last = loaded.steps[-1] if loaded.steps else {}
    config, ended = loaded.head["config"], loaded.summary
    state = "has ended" if ended else _unended(loaded.events)
    steps = f", step {last.get('step', 0)} of {config['steps']}"
    lines = [f"{folder}: {config['phase']}{'' if config['phase'] in ONCE else steps}; {state}"]
    if ended and ended.get("stopped"):
        lines.append(f"ended by a guard: {ended['stopped']}")
    alarms = [e for e in loaded.events if e["event"] == "alarm"]
    lines += [f"alarm in {tell_again(e, last.get('step', 0), last)}" for e in alarms]
    metrics = {k: v for k, v in last.items() if k not in ("step", "wall_s")}
    names = [k for k in FIRST if k in metrics] + [k for k in metrics if k not in FIRST]
    lines += [f"  {name} {_number(metrics[name])}" for name in names[:SHOWN]]
    for name in ("eval", "accept"):
        if found := [e for e in loaded.events if e["event"] == name]:
            fields = {key: value for key, value in found[-1].items() if "/" in key}
            lines += event_lines(name, found[-1]["step"], fields, config["phase"])
    lines += [f"  {trap}: {found}; {measured}" for trap, found, measured, _ in verdict_rows(folder)]
    pages = [folder / name for name in ("report.md", "heatmap.html", "export")]
    return "\n".join([*lines, *(f"see {page}" for page in pages if page.exists())])


def _unended(events: Sequence[Mapping[str, Any]]) -> str:
    if events and events[-1]["event"] == "interrupted":
        return "interrupted; its last step is saved"
    return "has not ended, or not cleanly"


def _number(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
