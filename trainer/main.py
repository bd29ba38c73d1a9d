"""torchrun trainer/main.py --config FILE [--set a.b=value ...] [--print-config] [--dry-run]
[--check]
"""

import os
import sys

if os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    # Python puts a script's own folder first; there, trainer/x.py would pose as the package x
    del sys.path[0]

import argparse

from reflux.trainer.config import loader  # absolute: a script has no package to be relative to
from reflux.trainer.runs import run_folder  # absolute: a script has no package to be relative to

EXIT_CODES = """exit codes
  0    done; phase = "evaluate": every [accept] rule holds
  2    a mistake in the command line, the configuration or the data, told in words
  3    phase = "evaluate": an [accept] rule does not hold (report.md says which and by how much)
  130  stopped by a signal: by the first after a saved step; by the second, and where nothing is trained, at once
torchrun itself turns every code but 0 into 1; evaluation.json has "accepted" for scripts around it."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="torchrun trainer/main.py",
        description="Calibrate, distil or evaluate a model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "--config", required=True, help="a .toml file, or a .py recipe with config()"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="override one knob; repeatable",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every knob as TOML and stop"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print shapes, parameters and memory per rank; load nothing",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check tokenizers, templates, alignment and models; write nothing",
    )
    args = parser.parse_args(arguments)
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)  # plain `python trainer/main.py` is one rank
    try:
        cfg = loader.load(args.config, tuple(args.set))
        if args.print_config:
            print(loader.to_toml(cfg), end="")
            return 0
        return _run(cfg, args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what has been saved", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        if os.environ.get("REFLUX_TRACEBACK"):
            raise
        parser.error(f"{error}\n(REFLUX_TRACEBACK=1 shows where)")


def _run(cfg, args) -> int:
    """Imports only what the chosen action needs: torch and transformers take seconds."""
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
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
