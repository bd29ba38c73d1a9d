"""Other runs that a configuration compares with: whether they can be judged as it wants."""

from collections.abc import Callable, Iterator
from functools import partial

from reflux.trainer.config.parts import tasks
from reflux.trainer.config.schema import Config
from reflux.trainer.evaluation.acceptance import check_metric, check_rule, load_graded
from reflux.trainer.runs.answer_files import answer_files

from .report import Finding


def run_findings(cfg: Config) -> list[Finding]:
    """Of [accept] and of eval.against. A run that has not evaluated yet is a warning: another one
    may be about to.
    """
    findings: list[Finding] = []
    for runs, check in _comparisons(cfg):
        try:
            missing = [f"{option} = {f!r}" for option, f in runs.items() if not answer_files(f)]
            if not missing:
                check()
        except ValueError as error:
            findings.append(Finding("error", str(error), "the run would end so"))
            continue
        advice = "this run wants one before it starts"
        findings += [
            Finding("warning", f"{what}: no evaluation there yet", advice) for what in missing
        ]
    return findings


def _comparisons(cfg: Config) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """(option -> folder of another run, what raises where they cannot be judged)."""
    for name, rule in cfg.accept.items():
        named = {f"accept.{name}.{key}": getattr(rule, key) for key in ("run", "against")}
        runs = {option: folder for option, folder in named.items() if folder}
        yield runs, partial(check_rule, name, rule, None, tasks(cfg))
    if cfg.eval.asks and cfg.eval.against:
        yield {"eval.against": cfg.eval.against}, partial(_check_against, cfg)


def _check_against(cfg: Config) -> None:
    theirs = load_graded(cfg.eval.against, "eval.against", tasks(cfg))
    for metric in cfg.eval.metrics:
        check_metric("eval.against", cfg.eval.against, theirs, metric)
