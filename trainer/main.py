"""The command line of a run:

torchrun trainer/main.py --config FILE [--set a.b=value ...] [--print-config] [--dry-run] [--check]
"""

import os
import sys

if os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    # Python puts a script's own folder first; there, trainer/x.py would be imported as x
    del sys.path[0]

import argparse
import socket

# absolute imports: a script has no package to be relative to
from reflux.trainer.config import loader
from reflux.trainer.config.schema import Config
from reflux.trainer.runs import run_folder

EXIT_CODES = """exit codes
  0    done; phase = "evaluate": every [accept] rule holds
  2    a mistake in the command line, the configuration or the data; the message says which
  3    phase = "evaluate": an [accept] rule does not hold (report.md says which and by how much)
  130  stopped by a signal: the first one saves the current step, the second one does not;
       a phase that trains nothing stops at the first
torchrun itself turns every code but 0 into 1; evaluation.json has "accepted" for scripts around it.
REFLUX_TRACEBACK=1 shows the traceback of an error."""


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line says. Returns the exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    _set_single_rank()
    try:
        cfg = loader.load(args.config, tuple(args.set))
        if args.print_config:
            print(loader.to_toml(cfg), end="")
            return 0
        return _run(cfg, args)
    except KeyboardInterrupt:
        print("stopped; the same command resumes from the last save", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        if os.environ.get("REFLUX_TRACEBACK"):
            raise
        parser.error(f"{error}\n(REFLUX_TRACEBACK=1 shows where)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun trainer/main.py",
        description="Calibrate a teacher, distil a student, diagnose a pair or evaluate a model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXIT_CODES,
    )
    add = parser.add_argument
    add("--config", required=True, help="a .toml file, or a .py recipe with config()")
    add(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="override one option; repeatable",
    )
    add("--print-config", action="store_true", help="print every option as TOML and exit")
    add(
        "--dry-run",
        action="store_true",
        help="print shapes, parameters and memory per rank; load no weights",
    )
    add(
        "--check",
        action="store_true",
        help="check tokenizers, templates, data, grader and models; write nothing",
    )
    return parser


def _set_single_rank() -> None:
    """Plain `python trainer/main.py` is one rank; torchrun has set these already."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in single.items():
        os.environ.setdefault(name, value)


def _run(cfg: Config, args: argparse.Namespace) -> int:
    """Imports only what the action needs: torch and transformers take seconds."""
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if args.dry_run:
        from reflux.trainer.preflight.dry_run import dry_run

        return dry_run(cfg)
    if args.check:
        from reflux.trainer.preflight.check import check

        return check(cfg)
    cfg = run_folder.settle(cfg)
    from reflux.trainer import loop

    return loop.train(cfg)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
