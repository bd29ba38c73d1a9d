"""Phase 3: which trap is this teacher-student pair in? Weights held still; writes report.md, plots, JSON, tokens.jsonl, heat.html.

    model = the student, teacher = the teacher, data = any prompts, task = what grades texts (optional: without it no gap)
"""
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from .batch import Prompt, Rollout
from .chat import Chat, same_vocabulary
from .config import Config
from .diagnose_report import write_diagnosis
from .diagnosis import diagnose_readings, flatten, verdict
from .prompts import load_prompts
from .readings import Reading, read_texts
from .readings_across import pair_of, read_across
from .rollout import Sampling, generate, given
from .symptoms import insert_error, recovery, revises
from .tasks import build_task
from .text_scores import score_ids
from .token_types import token_types

STREAM = {"student": 1 << 29, "teacher": (1 << 29) + 1, "clean": (1 << 29) + 2, "error": (1 << 29) + 3, "cut": 1 << 28}
CUTS = (0.25, 0.5, 0.75)  # of a right text's tokens


class Diagnose:
    """Reads, adds up, writes. Everything it does is collective."""

    def __init__(self, cfg: Config, engine):
        self.cfg, self.engine, self.spec = cfg, engine, cfg.diagnose
        self.chat, self.teacher_chat = Chat(cfg.model.path), Chat(cfg.teacher.path)
        self.same = same_vocabulary(self.chat, self.teacher_chat)
        engine.vocab_size = min(engine.vocab_size, self.chat.vocab_size)
        self.teacher = engine.frozen(cfg.teacher)
        self.unaligned = 0  # texts of this rank that the two tokenizers do not spell alike
        prompts = load_prompts(cfg.data.source, split=cfg.data.split, columns=cfg.data.columns, limit=cfg.data.limit)
        self.prompts = [prompts[i] for i in range(engine.rank, len(prompts), engine.world)]
        self.task = build_task(cfg.task.name, cfg.task.options) if cfg.task.name else None

    def close_step(self, step: int, stats: dict[str, float]) -> dict[str, float]:
        return self.run()

    def run(self) -> dict[str, float]:
        """The whole diagnosis; returns the verdict's numbers on every rank."""
        mine = list(chain.from_iterable(self._read(writer) for writer in self.spec.prefixes))
        probe = self._correction([r for r in mine if r.right and r.rollout.ended])
        readings = sorted(self.engine.gather(mine), key=lambda r: (r.writer, r.rollout.prompt.index))  # stable inside a prompt
        found = diagnose_readings(readings, share=self.spec.share)
        if not self.same:
            found["across"] = (found["across"] or {}) | {"unaligned": int(self.engine.sum(self.unaligned))}
        found["symptoms"] |= _recovery(self.engine.gather(probe))
        found["verdict"] = verdict(found)
        if self.engine.is_main:
            write_diagnosis(Path(self.cfg.folder), self.cfg, found, readings, (self.chat, self.teacher_chat))
        return flatten(found)

    # the texts
    def _read(self, writer: str) -> list[Reading]:
        rollouts = self._texts(writer)
        grades = [g.correct for g in self.task.grade(rollouts)] if self.task else [None] * len(rollouts)
        texts = [(x, writer, g) for x, g in zip(rollouts, grades)]
        options = {"tokens": self.cfg.batch.tokens, "top": self.spec.top, "joined": self.cfg.batch.pack}
        if not self.same:
            rows = self.engine.vocab_size, min(self.teacher.vocab_size, self.teacher_chat.vocab_size)
            pair = pair_of(self.chat, self.teacher_chat, rows, self.engine.device)
            readings, lost = read_across(self.engine, self.teacher, texts, pair, **options)
            self.unaligned += lost
            return readings
        return read_texts(self.engine, self.teacher, texts, (self.chat, self.teacher_chat),
                          type_V=torch.from_numpy(token_types(self.chat.table, self.chat.stop_ids)), **options)

    def _texts(self, writer: str) -> list[Rollout]:
        """In the student's ids, behind its own prompt; the teacher's own in its own, where it has another vocabulary."""
        if writer == "dataset":
            return [given(self.chat, p, self.cfg.rollout.max_tokens) for p in self.prompts]
        count = self.spec.student_texts if writer == "student" else self.spec.teacher_texts
        if writer == "student":
            with self.engine.publish() as decode:
                groups = generate(decode, self.chat, self.prompts, count, self._draw(writer))
            return list(chain.from_iterable(groups))
        with self.engine.publish_frozen(self.teacher) as decode:
            groups = generate(decode, self.teacher_chat, self.prompts, count, self._draw(writer))
        if not self.same:
            return list(chain.from_iterable(groups))
        return [replace(x, prompt_ids=self.chat.prompt_ids(x.prompt.messages)) for x in chain.from_iterable(groups)]

    def _draw(self, stream: str) -> Sampling:
        r = self.cfg.rollout
        return Sampling(r.max_tokens, self.cfg.seed, STREAM[stream], rows=r.rows)

    # self-correction
    def _correction(self, right: Sequence[Reading]) -> list[dict]:
        """Right texts cut short, with and without an error at the cut: does the student still arrive?"""
        if not self.spec.correction or self.task is None:
            return []
        draw = np.random.default_rng(self.cfg.seed << 8 ^ STREAM["cut"] ^ self.engine.rank)
        first = {r.rollout.prompt.index: r.rollout for r in reversed(right)}  # one text a prompt
        cut = [(rollout, share, *ends) for rollout in first.values() for share in CUTS if (ends := _cut(self.chat, rollout, share, draw))]
        rows = [{"prompt": x.prompt.index, "cut": share} for x, share, *_ in cut]
        for name, at in (("clean", 2), ("error", 3)):
            prefixes = [(c[0].prompt, c[at]) for c in cut]
            for row, (right_again, text) in zip(rows, self._continue(prefixes, name)):
                row |= {name: right_again, f"{name}_revises": revises(text)}
        for who, reader, chat in (("student", self.engine, self.chat), ("teacher", self.teacher, self.teacher_chat)):
            for row, gain in zip(rows, self._correcting_gain(reader, chat, cut)):
                row[f"{who}_gain"] = gain
        return rows

    def _continue(self, prefixes: Sequence[tuple[Prompt, str]], stream: str) -> list[tuple[bool, str]]:
        asked = [replace(p, messages=(*p.messages, {"role": "assistant", "content": prefix})) for p, prefix in prefixes]
        with self.engine.publish() as decode:
            groups = generate(decode, _Continued(self.chat), asked, 1, self._draw(stream))
        whole = [replace(g[0], prompt=p, text=prefix + g[0].text) for g, (p, prefix) in zip(groups, prefixes)]
        return [(bool(grade.correct), g[0].text) for grade, g in zip(self.task.grade(whole), groups)]

    def _correcting_gain(self, reader, chat: Chat, cut: Sequence[tuple]) -> list[float]:
        """log p(correction | error) - log p(the text goes on as if nothing had happened | error), nats, in the reader's own tokens behind
        its own template; collective."""
        jobs = []
        for rollout, _, clean, wrong in cut:
            rest = rollout.text[len(clean):]
            start = _Continued(chat).prompt_ids((*rollout.prompt.messages, {"role": "assistant", "content": wrong}))
            jobs += [(start, chat.encode(self.spec.correction_marker + clean[_first_difference(clean, wrong):] + rest)),
                     (start, chat.encode(rest))]
        scored = score_ids(reader, self.engine, jobs, chat, tokens=self.cfg.batch.tokens, stop=False)
        sums = [float(s.logp.sum()) for s in scored]
        return [sums[2 * i] - sums[2 * i + 1] for i in range(len(cut))]


class _Continued:
    """A Chat whose last message is the beginning of the answer."""

    def __init__(self, chat: Chat):
        self._chat = chat

    def __getattr__(self, name: str):
        return getattr(self._chat, name)

    def prompt_ids(self, messages) -> tuple[int, ...]:
        return self._chat.prompt_ids(messages[:-1]) + self._chat.encode(messages[-1]["content"])


def _cut(chat: Chat, rollout: Rollout, share: float, draw: np.random.Generator) -> tuple[str, str] | None:
    """(the text's beginning, the same with one error at its end), or None where there is nothing to break."""
    ids = rollout.content_ids
    clean = chat.decode(ids[:max(1, round(share * len(ids)))])
    wrong = insert_error(clean, draw)
    return None if wrong is None or not rollout.text.startswith(clean) or len(clean) == len(rollout.text) else (clean, wrong)


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _recovery(rows: Sequence[dict]) -> dict:
    if not rows:
        return {}
    clean, wrong = ([row[name] for row in rows] for name in ("clean", "error"))
    revised = [row["error"] for row in rows if row["error_revises"]]
    return {"correction": {
        "cuts": len(rows), "right_after_clean": float(np.mean(clean)), "right_after_error": float(np.mean(wrong)),
        "recovery": recovery(wrong, clean), "revises": float(np.mean([row["error_revises"] for row in rows])),
        "right_if_revised": float(np.mean(revised)) if revised else float("nan"),
        **{f"{who}_gain": float(np.mean([row[f"{who}_gain"] for row in rows])) for who in ("student", "teacher")}}}
