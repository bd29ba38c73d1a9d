"""Texts of several teachers to the same questions side by side, and what they cost a reader.

    python -m reflux.trainer.studies.side_by_side --reader MODEL --questions FILE
        --runs RUN ... --out FOLDER

Of each run the sampled answers of its last evaluation. The reader is a third model, neither teacher
nor proxy, which reads the question as plain text and then the answer:

    nats per byte   - sum_i log p_reader(token_i | question, token_<i) / bytes of the answer
    perplexity      exp of the same sum / tokens of the answer

texts.md has both, their change against the first run (paired by question), lengths, the fraction of
distinct texts and the first answers; texts.json the same as numbers. Intervals are over questions
of one run (item-level): they say nothing about another seed.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reflux.trainer.runs.answer_files import answer_files
from reflux.trainer.runs.files import write_json, write_whole
from reflux.trainer.runs.markdown_table import table, with_interval
from reflux.trainer.runs.stats import Estimate, mean_over_prompts

from .worked_answers import read_rows

TEXTS = 200  # of each run that the reader reads
SHOWN = 12  # questions in the page
ROWS = 32  # texts read together

Read = Callable[[Sequence[tuple[str, str]]], list[tuple[float, int]]]


@dataclass(frozen=True)
class Answer:
    """A sampled text and the question that it answers."""

    prompt: int  # row of the questions
    question: str
    text: str
    correct: bool | None  # None: its grader gives rewards


@dataclass(frozen=True)
class TextsOfRun:
    """What a reader meets. Estimates are over prompts, item-level."""

    run: str
    texts: int
    correct: float  # fraction of the graded ones; NaN without any
    bytes: Estimate  # of a text
    words: Estimate
    nats_per_byte: Estimate  # under the reader
    perplexity: float  # per token of the reader, over all texts together
    distinct: float  # fraction of the texts that differ from all before them
    # nats per byte - the first run's, question by question; None for the first run
    change: Estimate | None = None


@dataclass(frozen=True)
class Measured:
    """What a run's texts cost, and the nats per byte of each question."""

    texts: TextsOfRun
    cost: Mapping[int, float]  # question -> mean of its texts


def load_answers(run: Path, questions: Sequence[Mapping[str, Any]], count: int) -> list[Answer]:
    """The first `count` sampled texts of the last evaluation, one prompt after the other: the first
    sample of each prompt, then the second. questions: rows with "prompt", and "answer" where there
    is one. ValueError where there is no text, or where the run was asked other questions.
    """
    files = list(answer_files(run).values())
    lines = files[-1].read_text().split("\n") if files else []
    rows = [row for row in map(json.loads, filter(None, lines)) if row["mode"] == "sampled"]
    if not rows:
        raise ValueError(f"{run}: no sampled answers; want a run with eval.samples > 0 that ended")
    if any(_asks_another(row, questions) for row in rows):
        raise ValueError(
            f"{run}: was asked other questions than those of --questions; want the eval.source of "
            "its config.toml, the same for all runs"
        )
    rows.sort(key=lambda row: (row["sample"], row["prompt"]))
    return [
        Answer(r["prompt"], questions[r["prompt"]]["prompt"], r["text"], r["correct"])
        for r in rows[:count]
    ]


def _asks_another(row: Mapping[str, Any], questions: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a prediction is of another question, by its reference answer."""
    if row["prompt"] >= len(questions):
        return True
    wanted, known = questions[row["prompt"]].get("answer"), row.get("answer")
    if not (isinstance(wanted, str) and isinstance(known, str)):
        return False
    return wanted.strip() != known.strip()


def _names(runs: Sequence[Path]) -> list[str]:
    """A name of its own for each run: its folder's, or as much of the path as tells them apart."""
    for parts in range(1, max(len(run.parts) for run in runs) + 1):
        names = ["/".join(run.parts[-parts:]) for run in runs]
        if len(set(names)) == len(runs):
            return names
    raise ValueError("--runs names a run twice")


def measure(run: str, answers: Sequence[Answer], read: Read) -> Measured:
    """`read`: (question, text) pairs -> (nats, tokens) of each text. Empty texts are not read."""
    written = [a for a in answers if a.text]
    scores = read([(a.question, a.text) for a in written])
    sizes = [len(a.text.encode()) for a in written]
    per_byte = [nats / size for (nats, _), size in zip(scores, sizes)]
    tokens = sum(n for _, n in scores)
    graded = [a.correct for a in answers if a.correct is not None]
    texts = TextsOfRun(
        run=run,
        texts=len(answers),
        correct=sum(graded) / len(graded) if graded else math.nan,
        bytes=mean_over_prompts(_by_prompt(written, sizes)),
        words=mean_over_prompts(_by_prompt(written, [len(a.text.split()) for a in written])),
        nats_per_byte=mean_over_prompts(_by_prompt(written, per_byte)),
        perplexity=math.exp(sum(nats for nats, _ in scores) / max(tokens, 1)),
        distinct=len({a.text for a in answers}) / len(answers),
    )
    return Measured(texts, _by_prompt(written, per_byte))


def _by_prompt(answers: Sequence[Answer], values: Sequence[float]) -> Mapping[int, float]:
    """Prompt -> mean of its texts."""
    grouped: dict[int, list[float]] = {}
    for answer, value in zip(answers, values):
        grouped.setdefault(answer.prompt, []).append(value)
    return {p: sum(v) / len(v) for p, v in grouped.items()}


def against_first(measured: Sequence[Measured]) -> list[TextsOfRun]:
    """All runs, each but the first with its change of nats per byte against the first one, over
    the questions that both answered.
    """
    first = measured[0].cost
    return [measured[0].texts] + [
        replace(
            m.texts,
            change=mean_over_prompts({p: m.cost[p] - first[p] for p in m.cost if p in first}),
        )
        for m in measured[1:]
    ]


def make_reader(folder: str) -> Read:
    """A causal language model in fp32. It reads "question\\ntext"."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    known: dict[tuple[str, str], tuple[float, int]] = {}  # teachers often say the same

    def read(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        new = list(dict.fromkeys(pair for pair in pairs if pair not in known))
        for at in range(0, len(new), ROWS):
            some = new[at : at + ROWS]
            known.update(zip(some, _read_some(model, tokenizer, some)))
        return [known[pair] for pair in pairs]

    return read


def _read_some(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]
) -> list[tuple[float, int]]:
    """Rows are padded on the right, where a causal model does not look."""
    import torch

    # N rows, L positions
    prompts = [tokenizer(question + "\n")["input_ids"] for question, _ in pairs]
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in pairs]
    rows = [p + t for p, t in zip(prompts, texts)]
    ids_NL = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids_NL[i, : len(row)] = torch.tensor(row)
    # K positions: those that predict a text's token, in at least one row; a head has many rows
    first = min(map(len, prompts)) - 1
    with torch.no_grad():
        logits_NKV = model(ids_NL, logits_to_keep=ids_NL.shape[1] - first).logits[:, :-1]
        logp_NKV = logits_NKV.log_softmax(-1)
    logp_NK = logp_NKV.gather(-1, ids_NL[:, first + 1 :, None])[..., 0]
    return [
        (-float(logp_NK[i, len(p) - 1 - first :][: len(t)].sum()), len(t))
        for i, (p, t) in enumerate(zip(prompts, texts))
    ]


def page(measured: Sequence[TextsOfRun], answers: Sequence[Sequence[Answer]], reader: str) -> str:
    """texts.md"""
    sizes = ("texts", "correct", "bytes", "words")
    head = ("run", *sizes, "nats per byte", "against the first", "perplexity", "distinct")
    rows = [
        (
            m.run,
            m.texts,
            "not measured" if math.isnan(m.correct) else f"{m.correct:.3f}",
            with_interval(m.bytes, "{:.1f}"),
            with_interval(m.words, "{:.1f}"),
            with_interval(m.nats_per_byte),
            with_interval(m.change, "{:+.3f}") if m.change else "",
            f"{m.perplexity:.2f}",
            f"{m.distinct:.2f}",
        )
        for m in measured
    ]
    names = [m.run for m in measured]
    shown = [(row[0].question, *(_mark(a) for a in row)) for row in side_by_side(answers)]
    return "\n\n".join(
        [
            "# Texts side by side",
            f"Read by {reader}. Item-level intervals over the texts of one run: another seed may "
            "give other numbers. Sampled at temperature 1; a text that is not correct ends in (x).",
            table(head, rows),
            table(("question", *names), shown),
            "",
        ]
    )


def side_by_side(answers: Sequence[Sequence[Answer]]) -> list[tuple[Answer, ...]]:
    """The first questions, each with every run's answer."""
    return list(zip(*answers))[:SHOWN]


def _mark(answer: Answer) -> str:
    text = " ".join(answer.text.split()).replace("|", "\\|")
    return text if answer.correct is not False else f"{text} (x)"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.side_by_side",
        description="Show the texts of several runs side by side, and their perplexity.",
    )
    parser.add_argument("--reader", required=True, help="a model folder")
    parser.add_argument("--questions", type=Path, required=True, help="what the runs were asked")
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--texts", type=int, default=TEXTS, help="of each run")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        names, questions = _names(args.runs), read_rows(args.questions, ("prompt",))
        answers = [load_answers(run, questions, args.texts) for run in args.runs]
        read = make_reader(args.reader)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    measured = against_first([measure(name, a, read) for name, a in zip(names, answers)])
    args.out.mkdir(parents=True, exist_ok=True)
    reader = Path(args.reader).name
    shown = [{m.run: a for m, a in zip(measured, row)} for row in side_by_side(answers)]
    write_json(args.out / "texts.json", {"reader": reader, "runs": measured, "shown": shown})
    write_whole(args.out / "texts.md", page(measured, answers, reader))
    print(f"wrote texts.md and texts.json to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
