"""Phase 3: which trap is this teacher-student pair in? Weights held still; writes report.md, plots,
JSON, tokens.jsonl, heat.html.

    model = the student, teacher = the teacher, data = any prompts, task = what grades texts
        (optional: without it no gap)
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.tasks import build_task
from reflux.trainer.phase import Sampling
from reflux.trainer.rollouts.generate import generate, given_rollout
from reflux.trainer.rollouts.scoring import score_ids
from reflux.trainer.runs.progress import progress

from .answers import answer_symptoms, own_errors
from .frequency_bands import count_ids, frequency_bands
from .gradient_snr import deal, gradient_noise, gradients_of
from .measure import Asked, TokenStats, read_texts
from .measure_cross_tokenizer import pair_of, read_across
from .report import write_diagnosis
from .summary import diagnose_readings, flatten, verdict
from .symptoms import insert_error, recovery, revises
from .token_classes import token_types
from .training_stability import read_stability

STREAM = {
    "student": 1 << 29,
    "teacher": (1 << 29) + 1,
    "clean": (1 << 29) + 2,
    "error": (1 << 29) + 3,
    "own": (1 << 29) + 4,
    "cut": 1 << 28,
}
CUTS = (0.25, 0.5, 0.75)  # of a right text's tokens


class Diagnose:
    """Reads, adds up, writes. Everything it does is collective."""

    def __init__(self, cfg: Config, engine):
        self.cfg, self.engine, self.spec = cfg, engine, cfg.diagnose
        self.runs = read_stability(cfg)  # a wrong folder is told before anything is loaded
        self.chat, self.teacher_chat = Chat(cfg.model.path), Chat(cfg.teacher.path)
        self.same = same_vocabulary(self.chat, self.teacher_chat)
        engine.vocab_size = min(engine.vocab_size, self.chat.vocab_size)
        self.teacher = engine.frozen(cfg.teacher)
        # texts of this rank that the two tokenizers do not spell alike
        self.unaligned: list[TokenStats] = []
        rows = engine.vocab_size, min(self.teacher.vocab_size, self.teacher_chat.vocab_size)
        self.pair = (
            None if self.same else pair_of(self.chat, self.teacher_chat, rows, engine.device)
        )
        prompts = load_prompts(
            cfg.data.source, split=cfg.data.split, columns=cfg.data.columns, limit=cfg.data.limit
        )
        self.prompts = [prompts[i] for i in range(engine.rank, len(prompts), engine.world)]
        self.task = build_task(cfg.task.name, cfg.task.options) if cfg.task.name else None

    def close_step(self, step: int, stats: dict[str, float]) -> dict[str, float]:
        return self.run()

    def run(self) -> dict[str, float]:
        """The whole diagnosis; returns the verdict's numbers on every rank."""
        with progress(self.engine.is_main and not self.cfg.log.quiet) as self._stage:
            found, readings = self._measure()
        found["verdict"] = verdict(found)
        if self.engine.is_main:
            write_diagnosis(
                Path(self.cfg.folder), self.cfg, found, readings, (self.chat, self.teacher_chat)
            )
        return flatten(found)

    def _measure(self) -> tuple[dict[str, Any], list[TokenStats]]:
        gather, students = (
            self.engine.gather,
            lambda rows: [r for r in rows if r.writer == "student"],
        )
        texts = {writer: self._texts(writer) for writer in self.spec.prefixes}
        asked = self._asked(chain.from_iterable(texts.values())) if self.same else None
        mine = list(
            chain.from_iterable(
                self._read(writer, rollouts, asked) for writer, rollouts in texts.items()
            )
        )
        probe = self._correction([r for r in mine if r.right and r.rollout.ended])
        own = dict(
            gather(
                self._own_errors(
                    [r for r in students(mine) if r.right is False and r.rollout.ended]
                )
            )
        )
        greedy = dict(gather(self._greedy(students(mine))))
        # stable inside a prompt
        readings = sorted(gather(mine), key=lambda r: (r.writer, r.rollout.prompt.index))
        unread = gather(self.unaligned)
        found = diagnose_readings(readings, share=self.spec.kl_fraction, unread=unread)
        # a text need not align to have an answer
        written = sorted(students(readings + unread), key=lambda r: r.rollout.prompt.index)
        answers = answer_symptoms(written, greedy, names_answers=self._names_answers(written))
        found["symptoms"] |= answers | _recovery(gather(probe)) | own_errors(own, written)
        if gradient := self._gradient(readings):
            found["off_policy"]["gradient"] = gradient
        if self.runs:
            found["runs"] = self.runs
        return found, readings

    def _gradient(self, readings: Sequence[TokenStats]) -> dict[str, Any]:
        """Of the token KL, which two vocabularies do not have."""
        groups = (
            deal(readings, self.spec.gradient_batches)
            if self.spec.gradient_batches and self.same
            else {}
        )
        with self._stage("gradients", gradients_of(groups)) as advance:
            return gradient_noise(
                self.engine,
                self.teacher,
                groups,
                (self.chat, self.teacher_chat),
                tokens=self.cfg.batch.tokens,
                joined=self.cfg.batch.pack,
                advance=advance,
            )

    def _names_answers(self, readings: Sequence[TokenStats]) -> bool:
        return self.task is not None and (
            ":" not in self.cfg.task.name or any(r.answer is not None for r in readings)
        )

    # the texts
    def _asked(self, rollouts: Iterable[Rollout]) -> Asked:
        """Frequencies count all texts of all ranks, so every text has to exist before the first is
        read.
        """
        counts = self.engine.gather([count_ids((r.ids for r in rollouts), len(self.chat.table))])
        return Asked(
            self.spec.overlap_k,
            torch.from_numpy(token_types(self.chat.table, self.chat.stop_ids)),
            torch.from_numpy(frequency_bands(sum(counts))),
        )

    def _read(
        self, writer: str, rollouts: Sequence[Rollout], asked: Asked | None
    ) -> list[TokenStats]:
        """asked: None where the two vocabularies differ."""
        grades = self.task.grade(rollouts) if self.task else [Grade(0.0, None)] * len(rollouts)
        texts = [(x, writer, g) for x, g in zip(rollouts, grades)]
        with self._stage(f"reading texts by the {writer}", len(rollouts)) as advance:
            options = {
                "tokens": self.cfg.batch.tokens,
                "joined": self.cfg.batch.pack,
                "advance": advance,
            }
            if asked is None:
                readings, lost = read_across(
                    self.engine, self.teacher, texts, self.pair, top=self.spec.overlap_k, **options
                )
                self.unaligned += lost  # a list: they keep their text and grade
                return readings
            return read_texts(
                self.engine,
                self.teacher,
                texts,
                (self.chat, self.teacher_chat),
                asked=asked,
                **options,
            )

    def _texts(self, writer: str) -> list[Rollout]:
        """In the student's ids, behind its own prompt; the teacher's own in its own, where it has
        another vocabulary.
        """
        if writer == "dataset":
            return [given_rollout(self.chat, p, self.cfg.rollout.max_tokens) for p in self.prompts]
        count = self.spec.student_texts if writer == "student" else self.spec.teacher_texts
        with self._stage(f"texts by the {writer}", count * len(self.prompts)) as advance:
            if writer == "student":
                with self.engine.gathered_weights() as decode:
                    groups = generate(
                        decode, self.chat, self.prompts, count, self._draw(writer), advance
                    )
                return list(chain.from_iterable(groups))
            with self.engine.gathered_frozen_weights(self.teacher) as decode:
                groups = generate(
                    decode, self.teacher_chat, self.prompts, count, self._draw(writer), advance
                )
        if not self.same:
            return list(chain.from_iterable(groups))
        return [
            replace(x, prompt_ids=self.chat.prompt_ids(x.prompt.messages))
            for x in chain.from_iterable(groups)
        ]

    def _greedy(self, students: Sequence[TokenStats]) -> list[tuple[int, bool]]:
        """(prompt, is the student's likeliest text right?), where its sampled texts have grades to
        compare with.
        """
        if self.task is None or "student" not in self.spec.prefixes:
            return []
        graded = {r.rollout.prompt.index for r in students if r.right is not None}
        prompts = [p for p in self.prompts if p.index in graded]
        sampling = replace(self._draw("student"), greedy=True)
        with (
            self._stage("greedy texts by the student", len(prompts)) as advance,
            self.engine.gathered_weights() as decode,
        ):
            texts = list(
                chain.from_iterable(generate(decode, self.chat, prompts, 1, sampling, advance))
            )
        return [(x.prompt.index, bool(g.correct)) for x, g in zip(texts, self.task.grade(texts))]

    def _draw(self, stream: str) -> Sampling:
        r = self.cfg.rollout
        return Sampling(r.max_tokens, self.cfg.seed, STREAM[stream], rows=r.rows)

    # self-correction
    def _correction(self, right: Sequence[TokenStats]) -> list[dict]:
        """Right texts cut short, with and without an error at the cut: does the student still
        arrive?
        """
        if not self.spec.correction or self.task is None:
            return []
        draw = np.random.default_rng(self.cfg.seed << 8 ^ STREAM["cut"] ^ self.engine.rank)
        first = {r.rollout.prompt.index: r.rollout for r in reversed(right)}  # one text a prompt
        cut = [
            (rollout, share, *ends)
            for rollout in first.values()
            for share in CUTS
            if (ends := _cut(self.chat, rollout, share, draw))
        ]
        rows = [{"prompt": x.prompt.index, "cut": share} for x, share, *_ in cut]
        for name, at in (("clean", 2), ("error", 3)):
            prefixes = [(c[0].prompt, c[at]) for c in cut]
            for row, (right_again, text) in zip(rows, self._continue(prefixes, name)):
                row |= {name: right_again, f"{name}_revises": revises(text)}
        for who, reader, chat in (
            ("student", self.engine, self.chat),
            ("teacher", self.teacher, self.teacher_chat),
        ):
            for row, gain in zip(rows, self._correcting_gain(reader, chat, cut)):
                row[f"{who}_gain"] = gain
        return rows

    def _own_errors(self, wrong: Sequence[TokenStats]) -> list[tuple[int, bool]]:
        """(prompt, right after all?) of the student's own wrong texts, one a prompt, cut in the
        middle and continued.
        """
        if not self.spec.correction or self.task is None:
            return []
        first = {r.rollout.prompt.index: r.rollout for r in reversed(wrong)}
        halves = [
            (x.prompt, half) for x in first.values() if (half := _beginning(self.chat, x, 0.5))
        ]
        return [
            (p.index, right) for (p, _), (right, _) in zip(halves, self._continue(halves, "own"))
        ]

    def _continue(
        self, prefixes: Sequence[tuple[Prompt, str]], stream: str
    ) -> list[tuple[bool, str]]:
        asked = [
            replace(p, messages=(*p.messages, {"role": "assistant", "content": prefix}))
            for p, prefix in prefixes
        ]
        with (
            self._stage(f"continued texts, {stream}", len(asked)) as advance,
            self.engine.gathered_weights() as decode,
        ):
            groups = generate(decode, _Continued(self.chat), asked, 1, self._draw(stream), advance)
        whole = [
            replace(g[0], prompt=p, text=prefix + g[0].text)
            for g, (p, prefix) in zip(groups, prefixes)
        ]
        return [
            (bool(grade.correct), g[0].text) for grade, g in zip(self.task.grade(whole), groups)
        ]

    def _correcting_gain(self, reader, chat: Chat, cut: Sequence[tuple]) -> list[float]:
        """log p(correction | error) - log p(the text goes on as if nothing had happened | error),
        nats, in the reader's own tokens behind its own template; collective.
        """
        jobs = []
        for rollout, _, clean, wrong in cut:
            rest = rollout.text[len(clean) :]
            start = _Continued(chat).prompt_ids(
                (*rollout.prompt.messages, {"role": "assistant", "content": wrong})
            )
            jobs += [
                (
                    start,
                    chat.encode(
                        self.spec.correction_marker
                        + clean[_first_difference(clean, wrong) :]
                        + rest
                    ),
                ),
                (start, chat.encode(rest)),
            ]
        scored = score_ids(
            reader, self.engine, jobs, chat, tokens=self.cfg.batch.tokens, stop=False
        )
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


def _cut(
    chat: Chat, rollout: Rollout, share: float, draw: np.random.Generator
) -> tuple[str, str] | None:
    """(the text's beginning, the same with one error at its end), or None where there is nothing to
    break.
    """
    clean = _beginning(chat, rollout, share)
    wrong = insert_error(clean, draw) if clean else None
    return None if wrong is None else (clean, wrong)


def _beginning(chat: Chat, rollout: Rollout, share: float) -> str | None:
    """The text's first tokens, spelled; None where they are no true beginning of it."""
    ids = rollout.content_ids
    text = chat.decode(ids[: max(1, round(share * len(ids)))])
    return (
        text if text and rollout.text.startswith(text) and len(text) < len(rollout.text) else None
    )


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _recovery(rows: Sequence[dict]) -> dict:
    if not rows:
        return {}
    clean, wrong = ([row[name] for row in rows] for name in ("clean", "error"))
    revised = [row["error"] for row in rows if row["error_revises"]]
    return {
        "correction": {
            "cuts": len(rows),
            "right_after_clean": float(np.mean(clean)),
            "right_after_error": float(np.mean(wrong)),
            "recovery": recovery(wrong, clean),
            "revises": float(np.mean([row["error_revises"] for row in rows])),
            "right_if_revised": float(np.mean(revised)) if revised else float("nan"),
            **{
                f"{who}_gain": float(np.mean([row[f"{who}_gain"] for row in rows]))
                for who in ("student", "teacher")
            },
        }
    }
