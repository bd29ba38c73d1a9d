"""Task accuracy of the trained model on held-out prompts, greedy and sampled, with every answer kept on disk."""
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .batch import Rollout
from .chat import Chat
from .config import Config
from .prompts import load_prompts
from .rollout import Sampling, generate
from .tally import Tally

SAMPLE_STREAM = 1 << 31  # evaluation draws its own random numbers, whatever step it happens at


class Evaluator:
    """Runs when it is due and remembers nothing: the same weights give the same answers at any step."""

    def __init__(self, cfg: Config, engine, chat: Chat, task):
        self.cfg, self.engine, self.chat, self.task = cfg, engine, chat, task
        e = cfg.eval
        self.prompts = load_prompts(e.source, split=e.split, columns=e.columns, limit=e.limit) if e.source else None

    def due(self, step: int) -> dict[str, float]:
        """Accuracy metrics if this step evaluates, else nothing."""
        e = self.cfg.eval
        last = step == self.cfg.steps
        if self.prompts is None or not (last or (e.every and step and step % e.every == 0) or (step == 0 and e.at_start)):
            return {}
        return self.run(step)

    def run(self, step: int) -> dict[str, float]:
        """Answers every held-out prompt greedily once and `eval.samples` times at temperature 1; collective."""
        mine = [self.prompts[i] for i in range(self.engine.rank, len(self.prompts), self.engine.world)]
        r, found, rows = self.cfg.rollout, {}, []
        for mode, count in (("greedy", 1), ("sampled", self.cfg.eval.samples)):
            if not count:
                continue
            sampling = Sampling(r.max_tokens, self.cfg.seed, SAMPLE_STREAM, rows=r.rows, greedy=mode == "greedy")
            with self.engine.publish() as decode:
                texts = [x for group in generate(decode, self.chat, mine, count, sampling) for x in group]
            grades = self.task.grade(texts)
            found |= self._summarise(mode, texts, grades)
            rows += [_row(mode, t, g, k % count) for k, (t, g) in enumerate(zip(texts, grades))]
        rows = self.engine.gather(rows)
        if self.engine.is_main:
            self._save(step, rows)
        return found

    def _summarise(self, mode: str, texts: list[Rollout], grades: list) -> dict[str, float]:
        t = Tally()
        graded = all(g.correct is not None for g in grades)
        t.add(f"eval/{mode}", [float(g.correct) if graded else g.reward for g in grades])
        t.add(f"eval/{mode}_no_answer", [float(g.extracted is None and g.correct is not None) for g in grades])
        t.add(f"eval/{mode}_truncated", [float(not x.ended) for x in texts])
        t.add(f"eval/{mode}_length", [len(x.ids) for x in texts])
        return self.engine.mean(t)

    def _save(self, step: int, rows: list[dict]) -> None:
        folder = Path(self.cfg.folder) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        order = sorted(rows, key=lambda row: (row["mode"], row["prompt"], row["sample"]))
        partial = folder / f"step-{step}.jsonl.partial"
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in order))
        partial.replace(folder / f"step-{step}.jsonl")


class Evaluate:
    """The phase `evaluate`: no optimizer step, one evaluation of `model` as it stands."""

    def __init__(self, cfg: Config, engine):
        from .tasks import build_task

        self.chat = Chat(cfg.model.path)
        engine.vocab_size = min(engine.vocab_size, self.chat.vocab_size)
        self.evaluator = Evaluator(cfg, engine, self.chat, build_task(cfg.task.name, cfg.task.options))

    def close_step(self, step: int, stats: dict[str, float]) -> dict[str, float]:
        return self.evaluator.run(step)


def _row(mode: str, rollout: Rollout, grade, sample: int) -> dict:
    nll = -float(np.sum(rollout.logp))
    return {"mode": mode, "prompt": rollout.prompt.index, "sample": sample, "text": rollout.text,
            "answer": rollout.prompt.answer, "ended": rollout.ended, "tokens": len(rollout.ids), "nll": nll, **asdict(grade)}
