"""The command line of a run:

torchrun trainer/main.py --config FILE [--set a.b=value ...] [--print-config] [--dry-run] [--check]
"""

import os
import sys

if os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    # Python puts a script's own folder first; there, trainer/x.py would be imported as x
    del sys.path[0]

import argparse
import contextlib
import socket
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

# absolute imports: a script has no package to be relative to
from reflux.trainer.config import loader
from reflux.trainer.config.guard_schedule import utility_guard_gap
from reflux.trainer.config.origins import with_origins
from reflux.trainer.config.phases import roles
from reflux.trainer.config.schema import Config
from reflux.trainer.preflight.named_inputs import check_named_inputs
from reflux.trainer.runs import commands, first_rank, hub, limits, output, run_folder, signals

PROGRAM = "torchrun trainer/main.py"
EXIT_CODES = """exit codes
  0    done; phase = "evaluate": every [accept] rule holds
  2    a mistake in the command line, the configuration or the data; the message says which
  3    phase = "evaluate": an [accept] rule does not hold (report.md says which and by how much)
  4    a guard ended the run (KL budget, utility); the export holds the weights before
  130  stopped by a signal (Ctrl-C, SIGTERM, SIGHUP): the first one saves the current step, the
       second one does not; a phase that trains nothing stops at the first
torchrun ends with the same code where reflux is installed; where it is not, with 1.
REFLUX_TRACEBACK=1 shows the traceback of an error."""


INTERRUPTED = 130
READER_LOST = (
    "nobody reads the standard output any more; the run goes on without it, see run.jsonl in its "
    "folder"
)


def main(arguments: list[str] | None = None, typed: Sequence[str] = (), prog: str = "") -> int:
    """Runs what the command line says. Returns the exit code. typed: what was typed behind
    `reflux` (cli.py), for messages. prog: what calls itself so in front of an error.
    """
    prog = prog or (f"reflux {typed[0]}" if typed else PROGRAM)
    args = _parser().parse_args(arguments, argparse.Namespace(typed=tuple(typed), prog=prog))
    commands.remember(arguments, typed=typed)
    if sys.stdout is sys.__stdout__:  # nobody captures it
        quiet = args.print_config or args.dry_run or args.check
        output.survive_lost_reader("" if quiet else READER_LOST)
    _set_single_rank()
    with signals.handled_by(signals.raise_interrupt), output.plain_warnings():
        try:
            signals.end_with_launcher()
            limits.raise_descriptor_limit()
            cfg = loader.load(args.config, tuple(args.set))
            with with_origins(cfg):
                if args.print_config:
                    print(_every_option(cfg), end="")
                    return 0
                return _run(cfg, args, arguments)
        except KeyboardInterrupt as signal:
            if failed := _failed_rank(signal):  # the launcher's signal came while that was closed
                _refuse(failed, args)
            stopped = f"stopped at once ({signal or 'Ctrl-C'}); what is saved stays."
            hint = [] if args.check or args.dry_run else [_hint()]
            _print_once("\n".join([stopped, *_notes(signal), *hint]))
            return INTERRUPTED
        except run_folder.Refused:
            raise SystemExit(2) from None
        except (OSError, ValueError, FloatingPointError) as error:
            _refuse(error, args)


def _refuse(error: Exception, args: argparse.Namespace) -> NoReturn:
    """A mistake in words, by one of the ranks that find it, and exit code 2."""
    if os.environ.get("REFLUX_TRACEBACK"):
        raise error
    lines = [f"{args.prog}: error: {error}", *_notes(error), "(REFLUX_TRACEBACK=1 shows where)"]
    message = "\n".join(lines)
    with contextlib.suppress(KeyboardInterrupt):  # the launcher ends all ranks when one has ended
        if first_rank.is_first_to_say(str(error)):
            print(message, file=sys.stderr, flush=True)
    raise SystemExit(2)


def _failed_rank(signal: BaseException) -> Exception | None:
    """The error of another rank that was on its way out when the signal came."""
    if "reflux.trainer.loop" not in sys.modules:  # no rank has begun, and torch takes seconds
        return None
    from reflux.trainer.loop import RankFailed

    error: BaseException | None = signal
    while error is not None and not isinstance(error, RankFailed):
        error = error.__context__
    return error


def _notes(error: BaseException) -> list[str]:
    """What was done about it: the step that is saved, the command that goes on."""
    return getattr(error, "__notes__", [])


def _hint() -> str:
    return f"To go on, in {commands.directory()}:\n  {commands.resume()}"


def _print_once(text: str) -> None:
    if first_rank.is_first():
        print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Calibrate a teacher, distil a student, diagnose a pair or evaluate a model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXIT_CODES,
    )
    add = parser.add_argument
    add(
        "--config",
        required=True,
        help="a .toml or .yaml file, a recipe's name, or a .py file with config()",
    )
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


def _every_option(cfg: Config) -> str:
    """TOML, torchtitan's sections with the values of this run included."""
    from reflux.trainer.preflight.shapes import every_option

    return "\n".join(loader.write_tables(every_option(cfg))) + "\n"


def _run(cfg: Config, args: argparse.Namespace, arguments: list[str] | None) -> int:
    """Imports only what the action needs: torch and transformers take seconds."""
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    cfg = hub.with_local_models(cfg, weights=not args.dry_run)
    if args.dry_run:
        from reflux.trainer.preflight.dry_run import dry_run

        return dry_run(cfg)
    if args.check:
        from reflux.trainer.preflight.check import check

        return check(cfg)
    with run_folder.claimed(cfg, partial(_refuse, args=args)) as (settled, lock):
        if settled.folder != cfg.folder:
            commands.remember(arguments, run_folder=settled.folder, typed=args.typed)
        check_named_inputs(settled)
        _say_start(settled)
        from reflux.trainer import loop

        code = loop.train(settled, lock)
        if code != INTERRUPTED and (address := hub.push_export(settled)):
            print(f"uploaded: {address}", flush=True)
    if code == INTERRUPTED:
        _print_once(_hint())
    return code


def _say_start(cfg: Config) -> None:
    """Imports, weights and the first rollout take a while, in which nothing else is printed."""
    if cfg.log.quiet or not first_rank.is_first():
        return
    steps = f", {cfg.steps} steps" if cfg.trains else ""
    paths = [role.model.path for role in roles(cfg) if not role.elsewhere]
    models = " and ".join(dict.fromkeys(filter(None, paths)))
    print(f"{cfg.phase}{steps}, in {cfg.folder}: loads {models}", flush=True)
    if (gap := utility_guard_gap(cfg)) is not None:
        print(f"warning: {gap}", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
