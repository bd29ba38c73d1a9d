"""Other runs that a configuration compares with: whether they can be judged as it wants."""

from collections.abc import Iterator

from reflux.trainer.config.parts import tasks
from reflux.trainer.config.schema import Config
from reflux.trainer.evaluation.acceptance import check_metric, check_rule, load_graded
from reflux.trainer.runs.answer_files import answer_files

from .report import Finding


def run_findings(cfg: Config) -> list[Finding]:
    """Of [accept] and of eval.against. A run that has not evaluated yet is a warning: another one
    may be about to.
    """
    try:
        missing = [f"{o} = {f!r}" for o, f in _named_runs(cfg) if not answer_files(f)]
        if missing:
            advice = "this run wants one before it starts"
            return [
                Finding("warning", f"{what}: no evaluation there yet", advice) for what in missing
            ]
        _check_runs(cfg)
    except ValueError as error:
        return [Finding("error", str(error), "the run would end so")]
    return []


def _check_runs(cfg: Config) -> None:
    for name, rule in cfg.accept.items():
        check_rule(name, rule, None, tasks(cfg))
    if cfg.eval.asks and cfg.eval.against:
        load_graded(cfg.eval.against, "eval.against", tasks(cfg))
        for metric in cfg.eval.metrics:
            check_metric("eval.against", cfg.eval.against, metric)


def _named_runs(cfg: Config) -> Iterator[tuple[str, str]]:
    for name, rule in cfg.accept.items():
        for key in ("run", "against"):
            if folder := getattr(rule, key):
                yield f"accept.{name}.{key}", folder
    if cfg.eval.asks and cfg.eval.against:
        yield "eval.against", cfg.eval.against
