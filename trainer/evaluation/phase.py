"""How good the trained model is on held-out prompts, with every answer kept on disk: greedy,
sampled, and by the likelihood of options.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from reflux.trainer.config.evaluation import check_options
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.phase import Sampling
from reflux.trainer.rollouts.defences import DefendedDecoding
from reflux.trainer.rollouts.generate import generate
from reflux.trainer.runs.stats import Estimate

from .acceptance import NOT_ACCEPTED, Verdict, check_rule, judge
from .harness import load_harness, run_harness
from .metrics import Difference, check_same, compare, measure, metric_values
from .multiple_choice import Options, likelihood_rows, list_options, read_options, score_options
from .predictions import (
    MODES,
    Unfinished,
    add_outcomes,
    generated_row,
    load_rows,
    prompt_id,
    save_rows,
)
from .report import write_evaluation

SAMPLE_STREAM = 1 << 31  # evaluation draws its own random numbers, whatever step it happens at
BLOCK = 4  # times rollout.rows: answers of one rank between two looks at the disk


class Evaluator:
    """Runs when it is due and remembers nothing: the same weights give the same answers at any
    step.
    """

    def __init__(self, cfg: Config, engine, chat: Chat, task):
        self.cfg, self.engine, self.chat, self.task = cfg, engine, chat, task
        # a student is never served
        self._defence = DefendedDecoding(cfg, engine, [chat]) if cfg.phase == "evaluate" else None
        e = cfg.eval
        self.prompts = (
            load_prompts(e.source, split=e.split, columns=e.columns, limit=e.limit)
            if e.source
            else None
        )
        if self.prompts is None:
            return
        check_options(e, cfg.task.name)
        self._choices = {
            key: value
            for key, value in (
                ("column", cfg.task.options.get("choices")),
                ("answer_is", cfg.task.options.get("answer_is")),
            )
            if value is not None
        }
        for prompt in self.prompts if e.scores_options or e.list_options else ():
            read_options(prompt, **self._choices)  # a mistake is told now, and on every rank
        self._theirs = load_rows(e.against, "eval.against") if e.against else None
        if e.against:
            check_same(self.expected(), self._theirs, e.against)  # before anything is answered

    @property
    def _ways(self) -> dict[str, int]:
        """Ways of answering (keys of MODES) -> answers of a prompt."""
        e = self.cfg.eval
        generated = {"greedy": 1, "sampled": e.samples} if e.generates else {}
        return {
            way: count
            for way, count in (generated | {"likelihood": int(e.scores_options)}).items()
            if count
        }

    def expected(self) -> list[dict]:
        """What rows there will be, as far as that is known before anything is answered."""
        known = [{"prompt": p.index, "id": prompt_id(p), "answer": p.answer} for p in self.prompts]
        return [
            row | {"mode": mode, "sample": k}
            for way, count in self._ways.items()
            for mode in MODES[way]
            for row in known
            for k in range(count)
        ]

    def due(self, step: int) -> dict[str, float]:
        """Metrics if this step evaluates, else nothing."""
        e = self.cfg.eval
        last = step == self.cfg.steps
        if self.prompts is None or not (
            last or (e.every and step and step % e.every == 0) or (step == 0 and e.at_start)
        ):
            return {}
        return self.run(step)

    def run(self, step: int) -> dict[str, float]:
        """Answers every held-out prompt and says how well; collective, the same numbers on every
        rank.
        """
        rows = self.answer(step)
        return flatten(
            measure(rows, self.cfg.eval.metrics), self.compare(rows), self.cfg.eval.metrics
        )

    def answer(self, step: int) -> list[dict]:
        """All rows, in order, on every rank; also in predictions/step-N.jsonl."""
        kept = None if self.cfg.trains else Unfinished(Path(self.cfg.folder), self._asked())
        rows = self.engine.gather(kept.load(self._ways) if kept and self.engine.rank == 0 else [])
        if kept and self.engine.is_main:
            kept.open(rows)
        for block, answer in self._blocks(rows):
            new = self.engine.gather(answer(block[self.engine.rank :: self.engine.world]))
            rows += new
            if kept and self.engine.is_main:
                kept.add(new)
        names_answers = ":" not in self.cfg.task.name or any(
            r["extracted"] is not None for r in rows
        )
        add_outcomes((r for r in rows if "text" in r), self.cfg.eval.refusal, names_answers)
        rows.sort(key=lambda row: (row["mode"], row["prompt"], row["sample"]))
        if self.engine.is_main:
            save_rows(Path(self.cfg.folder), step, rows)
            if kept:
                kept.close()
        return rows

    def compare(self, rows: Sequence[dict]) -> dict[str, Difference]:
        """Every metric against the run in `eval.against`; empty without one."""
        if self._theirs is None:
            return {}
        return {
            m: compare(metric_values(rows, m), metric_values(self._theirs, m))
            for m in self.cfg.eval.metrics
        }

    def _asked(self) -> dict[str, Any]:
        """All that the answers depend on."""
        e, c = asdict(self.cfg.eval), self.cfg
        return {
            "model": asdict(c.model),
            "defence": asdict(c.defence),
            "task": asdict(c.task),
            "rollout": asdict(c.rollout),
            "seed": c.seed,
            **{
                key: e[key]
                for key in ("source", "split", "columns", "limit", "samples", "by", "list_options")
            },
        }

    def _blocks(self, done: Sequence[dict]) -> Iterator[tuple[list[Prompt], Callable]]:
        """What is still to be answered: prompts of all ranks, and how."""
        for way, count in self._ways.items():
            seen = {row["prompt"] for row in done if row["mode"] == MODES[way][0]}
            left = [i for i in range(len(self.prompts)) if i not in seen]
            size = max(1, BLOCK * self.cfg.rollout.rows // count) * self.engine.world
            for start in range(0, len(left), size):
                block = [self.prompts[i] for i in left[start : start + size]]
                yield (
                    block,
                    self._score
                    if way == "likelihood"
                    else partial(self._generate, mode=way, count=count),
                )

    def _generate(self, prompts: Sequence[Prompt], mode: str, count: int) -> list[dict]:
        r = self.cfg.rollout
        sampling = Sampling(
            r.max_tokens, self.cfg.seed, SAMPLE_STREAM, rows=r.rows, greedy=mode == "greedy"
        )
        weights = self.engine.gathered_weights()
        with self._defence.apply(weights) if self._defence else weights as decode:
            texts = [
                x
                for group in generate(
                    decode, self.chat, [self._shown(p) for p in prompts], count, sampling
                )
                for x in group
            ]
        rows = []
        for k, (text, grade) in enumerate(zip(texts, self.task.grade(texts))):
            options = self._options(text.prompt)
            place = {
                "position": options and options.right,
                "choice_at": options and options.place_of(grade.extracted),
            }
            rows.append(
                generated_row(
                    mode, text, grade, k % count, {"id": prompt_id(prompts[k // count]), **place}
                )
            )
        return rows

    def _score(self, prompts: Sequence[Prompt]) -> list[dict]:
        shown = [self._shown(p) for p in prompts]
        asked = [(p, read_options(p, **self._choices)) for p in shown]
        scores = score_options(self.engine, self.chat, asked, tokens=self.cfg.batch.tokens)
        return [
            row | {"id": prompt_id(p)}
            for p, pair, logp in zip(prompts, asked, scores)
            for row in likelihood_rows(*pair, logp)
        ]

    def _shown(self, prompt: Prompt) -> Prompt:
        return (
            list_options(prompt, self.cfg.seed, **self._choices)
            if self.cfg.eval.list_options
            else prompt
        )

    def _options(self, prompt: Prompt) -> Options | None:
        """None where the task has none, or they cannot be read: a generated answer can be graded
        without their places.
        """
        if self.cfg.task.name != "multiple_choice":
            return None
        try:
            return read_options(prompt, **self._choices)
        except ValueError:
            return None


class Evaluate:
    """The phase `evaluate`: no optimizer step, one evaluation of `model` as it stands, its report,
    and the acceptance gate.
    """

    exit_code = 0

    def __init__(self, cfg: Config, engine):
        from reflux.trainer.data.tasks import build_task

        if cfg.eval.harness:
            load_harness()
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            if ranks > 1:
                raise ValueError(
                    f"eval.harness on {ranks} ranks: the harness loads a copy of its own. Start it "
                    "with one process"
                )
        self.cfg, self.engine, self.chat = cfg, engine, Chat(cfg.model.path)
        engine.vocab_size = min(engine.vocab_size, self.chat.vocab_size)
        self.evaluator = Evaluator(
            cfg, engine, self.chat, build_task(cfg.task.name, cfg.task.options)
        )
        for name, rule in cfg.accept.items():
            check_rule(name, rule, self.evaluator.expected())

    def close_step(self, step: int, stats: dict[str, float]) -> dict[str, Any]:
        """Everything there is to do; every rank comes to the same verdicts."""
        cfg = self.cfg
        rows = self.evaluator.answer(step)
        measured, differences = measure(rows, cfg.eval.metrics), self.evaluator.compare(rows)
        harness = self._harness()
        verdicts = [judge(name, rule, rows) for name, rule in cfg.accept.items()]
        self.exit_code = 0 if all(v.holds for v in verdicts) else NOT_ACCEPTED
        if self.engine.is_main:
            write_evaluation(cfg, rows, measured, differences, harness=harness, verdicts=verdicts)
        return flatten(measured, differences, cfg.eval.metrics) | harness | _said(verdicts)

    def _harness(self) -> dict[str, float]:
        e = self.cfg.eval
        return (
            run_harness(
                self.cfg.model.path,
                e.harness,
                device=str(self.engine.device),
                rows=min(self.cfg.rollout.rows, 64),
                limit=e.limit,
                seed=self.cfg.seed,
            )
            if e.harness
            else {}
        )


def flatten(
    measured: Mapping[str, Estimate], differences: Mapping[str, Difference], metrics: Sequence[str]
) -> dict[str, float]:
    """The log line: every mean, the interval of each metric that has a name in the configuration,
    differences to `eval.against`.
    """
    found: dict[str, float] = {}
    for name, e in measured.items():
        found |= {f"eval/{name}": e.mean} | (
            {f"eval/{name}_low": e.low, f"eval/{name}_high": e.high} if name in metrics else {}
        )
    for name, d in differences.items():
        found |= {
            f"eval/{name}_difference": d.difference.mean,
            f"eval/{name}_difference_low": d.difference.low,
            f"eval/{name}_difference_high": d.difference.high,
            f"eval/{name}_change": d.change.mean,
            f"eval/{name}_change_low": d.change.low,
            f"eval/{name}_change_high": d.change.high,
            f"eval/{name}_p": d.p,
        }
    return found


def _said(verdicts: Sequence[Verdict]) -> dict[str, str]:
    return {f"accept/{v.name}": v.words for v in verdicts}
