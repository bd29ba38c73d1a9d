"""The phase `evaluate`: one evaluation of `model` as it stands, its report, and the acceptance
rules. No weight moves.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reflux.trainer.config.parts import tasks
from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.task_routing import build_grader
from reflux.trainer.phase import Engine
from reflux.trainer.rollouts.defences import DefendedDecoding

from .acceptance import NOT_ACCEPTED, check_rule, judge
from .evaluator import Evaluator
from .harness import load_harness, run_harness
from .report import write_evaluation
from .results import log_fields

HARNESS_ROWS = 64  # at most, of a batch of the harness


class EvaluatePhase:
    """All of its work is one close_step."""

    exit_code = 0

    def __init__(self, cfg: Config, engine: Engine):
        """ValueError, before anything is answered, for whatever could only fail later."""
        if cfg.eval.harness:
            load_harness()
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            if ranks > 1:
                raise ValueError(
                    f"eval.harness on {ranks} ranks: the harness loads a copy of its own. Start it "
                    "with one process"
                )
        self.cfg, self.engine = cfg, engine
        self.chat = chat = Chat.of(cfg.model)
        engine.vocab_size = min(engine.vocab_size, chat.vocab_size)
        grader = build_grader(cfg, engine.once_per_row)
        defence = DefendedDecoding(cfg, engine, [chat])
        self.evaluator = Evaluator(cfg, engine, chat, grader, defence=defence, whole_run=True)
        for name, rule in cfg.accept.items():
            check_rule(name, rule, self.evaluator.expected(), tasks(cfg), self.evaluator.settings)

    def close_step(self, step: int, stats: Mapping[str, float]) -> dict[str, Any]:
        """Evaluates; every rank comes to the same verdicts. Collective."""
        cfg = self.cfg
        predictions = self.evaluator.answer(step)
        evaluation = replace(
            self.evaluator.measure(predictions),
            harness=self._harness(),
            verdicts=tuple(judge(name, rule, predictions) for name, rule in cfg.accept.items()),
        )
        self.exit_code = 0 if evaluation.accepted else NOT_ACCEPTED
        if self.engine.is_main:
            write_evaluation(cfg, predictions, evaluation)
        return log_fields(evaluation, cfg.eval.metrics)

    def _harness(self) -> dict[str, float]:
        cfg, e = self.cfg, self.cfg.eval
        if not e.harness:
            return {}
        return run_harness(
            self.chat,
            e.harness,
            device=str(self.engine.device),
            rows=min(cfg.rollout.rows, HARNESS_ROWS),
            limit=e.limit,
            seed=cfg.seed,
        )
