"""The answers of an evaluation on disk: predictions/step-N.jsonl, one line each, and those of an
evaluation that has not finished; questions.jsonl beside them, the text of the first.

Every line: mode (greedy, sampled, likelihood_sum, likelihood_per_byte), prompt (its index), part
(where there are several), id (of the question itself), sample, answer, correct, reward, extracted,
error; position and choice_at, the positions of the correct and of the chosen option (from 0; null
without). With an error, correct and reward say nothing: such a line is in no metric.
  generated        text, ended, tokens, nll, outcome, graded
  by likelihood    logp (nats) and bytes of every option, in the order shown; extracted is the text
                   of the chosen one
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reflux.trainer.config.evaluation import LIKELIHOOD
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.failed_grades import FailedGrades, count_by_part
from reflux.trainer.runs.answer_files import answer_files
from reflux.trainer.runs.files import named, write_whole
from reflux.trainer.runs.run_folder import NO_RESULT, differing

# way of answering -> modes: predictions of each prompt and sample
MODES = {"greedy": ("greedy",), "sampled": ("sampled",), "likelihood": LIKELIHOOD}
QUESTIONS_KEPT = 400
QUESTION_LETTERS = 6000  # at most, of a question
OUTCOMES = ("correct", "wrong", "no_answer", "refused", "truncated")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a prediction answers, known before it is there. Two runs can be compared where their
    questions are the same.
    """

    mode: str
    prompt: int  # index in the source
    sample: int
    id: str | None  # of the question and its answer (prompt_id); None in files of older versions
    answer: str | None  # the reference answer
    part: str = ""  # of an evaluation of several parts


@dataclass(frozen=True)
class Generation:
    """A generated text."""

    text: str
    ended: bool
    tokens: int  # stop token included
    nll: float  # nats to 1e-4, of the whole text as it was sampled
    # one of OUTCOMES; None where the grader failed or knows no correct answers
    outcome: str | None = None
    graded: bool = True  # False: a truncated text that no grader saw


@dataclass(frozen=True)
class OptionScores:
    """The options of a prompt by likelihood, in the order shown."""

    logp: tuple[float, ...]  # nats
    n_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Prediction(Question):
    """One graded answer: a generation, or the choice that option scores lead to."""

    reward: float
    correct: bool | None
    extracted: str | None  # what the grader took for the answer; by likelihood, the chosen text
    error: str | None  # of the grader
    position: int | None = None  # of the correct option, from 0
    choice_at: int | None = None  # position of the chosen option
    generation: Generation | None = None
    options: OptionScores | None = None

    @property
    def failed(self) -> bool:
        """The grader failed on it: `correct` and `reward` say nothing."""
        return self.error is not None


def failed_grades(predictions: Iterable[Prediction]) -> dict[str, FailedGrades]:
    """Of the generated texts that were given to the grader, by part."""
    graded = [p for p in predictions if p.generation and p.generation.graded]
    return count_by_part((p.part, p.error) for p in graded)


def prompt_id(prompt: Prompt) -> str:
    """12 hex digits of the question and its answer: equal ids, equal questions."""
    text = json.dumps([list(prompt.messages), prompt.answer], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]


def with_outcomes(
    predictions: Iterable[Prediction], refusal: str, names_answers: Callable[[Prediction], bool]
) -> list[Prediction]:
    """Gives every generation with a grade exactly one of OUTCOMES: correct, else cut at the limit,
    else refused, else without an answer, else wrong.

    refusal: regular expression of a refusal; empty: there is none. names_answers: whether the
    grader of a text says what it took for the answer; if not, it counts as wrong without one.
    """
    expression = re.compile(refusal) if refusal else None

    def judged(p: Prediction) -> Prediction:
        if p.generation is None or p.correct is None or p.failed:
            return p
        outcome = _outcome(p, p.generation, expression, names_answers(p))
        return replace(p, generation=replace(p.generation, outcome=outcome))

    return [judged(p) for p in predictions]


def _outcome(p: Prediction, g: Generation, refusal: re.Pattern | None, names_answers: bool) -> str:
    if p.correct:
        return "correct"
    if not g.ended:
        return "truncated"
    if refusal and refusal.search(g.text):
        return "refused"
    return "no_answer" if names_answers and p.extracted is None else "wrong"


def save_predictions(folder: Path, step: int, predictions: Sequence[Prediction]) -> None:
    """All of them, in order, or none."""
    _write_lines(folder / "predictions" / f"step-{step}.jsonl", map(_to_row, predictions))


def save_questions(folder: Path, prompts: Sequence[Prompt]) -> None:
    """questions.jsonl: the text of the first QUESTIONS_KEPT prompts by their index, for
    those who read the answers.
    """
    rows = [
        {"prompt": p.index, "text": p.question[:QUESTION_LETTERS]} for p in prompts[:QUESTIONS_KEPT]
    ]
    _write_lines(folder / "questions.jsonl", rows)


def load_predictions(folder: str | Path, option: str) -> list[Prediction]:
    """The last predictions of the weights that a run kept. ValueError, naming the option that wants
    them, where there are none.
    """
    files = list(answer_files(folder).values())
    if not files:
        raise ValueError(
            f"{option} = {str(folder)!r}: no predictions/step-*.jsonl there of an evaluation in "
            "its log; want the folder of a run that has evaluated"
        )
    # only "\n" ends a line: a text may hold other line breaks of Unicode
    return [_from_row(json.loads(line)) for line in files[-1].read_text().split("\n") if line]


class Unfinished:
    """Predictions of an evaluation under way, block by block, so that a killed one goes on instead
    of starting again.

    `spec` is all that its answers depend on, with the tables of the configuration by their names;
    predictions cached for another one are not read. Where texts are sampled makes no other one.
    """

    def __init__(self, folder: Path, spec: Mapping[str, Any]):
        self.path = folder / "predictions" / "unfinished.jsonl"
        self._head = json.loads(json.dumps({"spec": spec}, default=list))

    def load(self, samples: Mapping[str, int]) -> list[Prediction]:
        """Those of prompts that have all of theirs, without a failed grade: the grader may be
        mended by now. samples: answers of a prompt by way of answering (a key of MODES).
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
        head, *rows = [json.loads(line) for line in lines] or [{}]
        if "spec" not in head or differing(head["spec"], self._head["spec"], NO_RESULT):
            return []
        way = {mode: way for way in samples for mode in MODES[way]}
        count = Counter((way[r["mode"]], r["prompt"]) for r in rows if r["error"] is None)
        whole = {(w, p) for (w, p), n in count.items() if n == samples[w] * len(MODES[w])}
        return [_from_row(row) for row in rows if (way[row["mode"]], row["prompt"]) in whole]

    def open(self, predictions: Sequence[Prediction]) -> None:
        """Starts the file anew with these; in one rename, because other ranks may be reading it."""
        _write_lines(self.path, [self._head, *map(_to_row, predictions)])

    def add(self, predictions: Sequence[Prediction]) -> None:
        with named(self.path), open(self.path, "a") as file:
            file.write("".join(_line(_to_row(p)) for p in predictions))

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


def _to_row(p: Prediction) -> dict[str, Any]:
    """The keys of a line, in their order."""
    row: dict[str, Any] = {"mode": p.mode, "prompt": p.prompt, "sample": p.sample}
    row |= {"part": p.part} if p.part else {}
    positions = {"position": p.position, "choice_at": p.choice_at}
    if g := p.generation:
        row |= {"text": g.text, "answer": p.answer, "ended": g.ended, "tokens": g.tokens}
        row |= {"nll": g.nll, "reward": p.reward, "correct": p.correct, "extracted": p.extracted}
        row |= {"error": p.error, "id": p.id, **positions, "outcome": g.outcome}
        return row | {"graded": g.graded}
    row |= {"answer": p.answer, "extracted": p.extracted, "correct": p.correct}
    row |= {"reward": p.reward, "error": p.error, **positions}
    if o := p.options:
        row |= {"logp": list(o.logp), "bytes": list(o.n_bytes)}
    return row | {"id": p.id}


def _from_row(row: Mapping[str, Any]) -> Prediction:
    """A line; older versions wrote neither ids nor positions nor `graded`."""
    generation = options = None
    if "text" in row:
        nll, outcome = row.get("nll", 0.0), row.get("outcome")
        text, ended, tokens = row["text"], row["ended"], row["tokens"]
        generation = Generation(text, ended, tokens, nll, outcome, row.get("graded", True))
    if "logp" in row:
        options = OptionScores(tuple(row["logp"]), tuple(row["bytes"]))
    names = ("mode", "prompt", "sample", "answer", "reward", "correct", "extracted", "error")
    return Prediction(
        **{name: row[name] for name in names},
        id=row.get("id"),
        part=row.get("part", ""),
        position=row.get("position"),
        choice_at=row.get("choice_at"),
        generation=generation,
        options=options,
    )


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(map(_line, rows)))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
