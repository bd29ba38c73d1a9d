"""The shapes of rows that public data sets have: which columns tell one, and what of a row is the
prompt, the reference answer, and the given response.

    plain        prompt; optionally answer, response
    messages     messages: OpenAI's; an assistant's last message is the response
    sharegpt     conversations: [{"from": "human", "value": ...}, ...]; optionally system
    preference   chosen, and a prompt or conversations with the same beginning; rejected is ignored
    completion   prompt and completion, both texts or both messages
    instruction  instruction, with input (Alpaca) or context (Dolly), and output or response
    choices      question and choices or options, with the correct one: MMLU, MMLU-Pro, ARC, CSQA
    question     question or problem; answer, solution. GSM8K, MATH
    text         text: a document without a prompt, to be given as it is

Columns that are no part of these are in Prompt.extra. A message of the system may stand in a column
of its own (prompts.py).
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .options import read_label
from .prompt import spell
from .row import Message, Row, is_left_out, read_conversation

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SOLUTION = re.compile(r"(?:^|\n)####[ \t]*(\S[^\n]*)\s*$")  # the last line of GSM8K's answers


@dataclass(frozen=True)
class Parts:
    """What a row holds. used: the columns that it was taken from. options: labels and texts."""

    messages: tuple[Message, ...]
    used: Collection[str]
    answer: str | None = None
    response: str | None = None
    options: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """needs: one of each group of columns tells the shape; `tells` looks at the first row, too."""

    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Row], Parts]
    tells: Callable[[Mapping[str, Any]], bool] = bool

    def fits(self, columns: Collection[str], first: Mapping[str, Any]) -> bool:
        return all(any(c in columns for c in group) for group in self.needs) and self.tells(first)


def detect_shape(columns: Collection[str], first: Mapping[str, Any]) -> str | None:
    """The name of the first shape that fits; None where none does."""
    return next((name for name, s in SHAPES.items() if s.fits(columns, first)), None)


def user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def gold_and_solution(answer: str | None) -> tuple[str | None, str | None]:
    """An answer that ends with a line "#### 42", as GSM8K has it, is a worked solution: its last
    number, and all of it. Else the answer, and None.
    """
    found = SOLUTION.search(answer) if answer is not None else None
    return (found[1].strip(), answer) if found else (answer, None)


def join_input(instruction: str, more: str | None) -> str:
    """Alpaca's form of an instruction with an input."""
    return f"{instruction}\n\n### Input:\n{more}" if more and more.strip() else instruction


# --- how each is read


def _read_plain(row: Row) -> Parts:
    gold, solution = gold_and_solution(row.answer("answer"))
    response = row.text("response")
    used: tuple[str, ...] = ("prompt", "answer", "response")
    response = solution if response is None else response
    text = row.question("prompt")
    if "input" in row.names:  # Alpaca's columns, of which a user named `instruction` the prompt
        text, used = join_input(text, row.text("input")), (*used, "input")
    return Parts(user(text), used, gold, response)


def _read_messages(row: Row) -> Parts:
    messages, last = row.conversation("messages")
    response = row.text("response")
    if last is not None and response is not None:
        raise ValueError(
            f"{row.where('messages')}: its last message is the assistant's, and column response "
            "holds a response too; want one of them"
        )
    gold, solution = gold_and_solution(row.answer("answer"))
    response = next((r for r in (last, response, solution) if r is not None), None)
    return Parts(messages, ("messages", "answer", "response"), gold, response)


def _read_sharegpt(row: Row) -> Parts:
    turns = row.turns("conversations")
    system = row.text("system")
    if system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    messages, last = read_conversation(turns, row.where("conversations"))
    last = None if is_left_out(row.value("conversations")[-1]) else last
    return Parts(messages, ("conversations", "system", "answer"), row.answer("answer"), last)


def _read_preference(row: Row) -> Parts:
    used = ("prompt", "chosen", "rejected", "answer")
    chosen, answer = row.value("chosen"), row.answer("answer")
    if not isinstance(chosen, list):
        return Parts(_asked(row), used, answer, row.text("chosen"))
    before = row.value("prompt")
    turns = [*before, *chosen] if isinstance(before, list) else chosen
    messages, last = read_conversation(turns, row.where("chosen"))
    if last is None:
        raise ValueError(f"{row.where('chosen')}: it does not end with the assistant's message")
    return Parts(messages, used, answer, last)


def _read_completion(row: Row) -> Parts:
    used = ("prompt", "completion", "answer")
    completion, answer = row.value("completion"), row.answer("answer")
    if not isinstance(completion, list):
        return Parts(_asked(row), used, answer, row.text("completion"))
    before = row.value("prompt")
    turns = [*(before if isinstance(before, list) else user(row.question("prompt"))), *completion]
    messages, last = read_conversation(turns, row.where("completion"))
    return Parts(messages, used, answer, last)


def _asked(row: Row) -> tuple[Message, ...]:
    """The column prompt: a text, or messages that end with the user's."""
    if isinstance(row.value("prompt"), list):
        return row.conversation("prompt")[0]
    return user(row.question("prompt"))


def _read_instruction(row: Row) -> Parts:
    instruction = row.question("instruction")
    context = row.text("context")
    text = join_input(instruction, row.text("input"))
    if context and context.strip():
        text = f"{text}\n\n{context}"
    given = "output" if "output" in row.values else "response"
    used = ("instruction", "input", "context", given, "answer")
    return Parts(user(text), used, row.answer("answer"), row.text(given))


OPTIONS = ("choices", "options")
CORRECT = ("answerKey", "answer_letter", "answer_index", "answer", "label")


def _read_choices(row: Row) -> Parts:
    column = next(c for c in OPTIONS if row.value(c) is not None)
    labels, texts = _options(row, column)
    named = next((c for c in CORRECT if row.value(c) not in (None, "", -1, "-1")), None)
    answer = None if named is None else _correct(row, named, labels, texts)
    used = ("question", *OPTIONS, *CORRECT)
    options = {"label": labels, "text": texts}
    return Parts(user(row.question("question")), used, answer, None, options)


def _options(row: Row, column: str) -> tuple[list[str], list[str]]:
    given = row.value(column)
    texts = given.get("text") if isinstance(given, Mapping) else given
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"{row.where(column)}: {given!r:.60}; want 2 to 26 options")
    labels = list(LETTERS[: len(texts)])
    if isinstance(given, Mapping) and given.get("label"):
        labels = list(map(read_label, given["label"]))
    if any(label not in LETTERS for label in labels):  # ARC has some rows with 1 to 4
        labels = list(LETTERS[: len(texts)])
    return labels, [spell(text) for text in texts]


def _correct(row: Row, column: str, labels: list[str], texts: list[str]) -> str:
    """The letter of the correct option: named by letter, by number, or by its text."""
    value = row.value(column)
    if isinstance(value, str) and value.upper() in labels:
        # options can be letters themselves: "a" is the option "a" before it is the label A
        is_text = value not in labels and value in texts
        return labels[texts.index(value)] if is_text else value.upper()
    given = next((row.value(c) for c in OPTIONS if row.value(c) is not None), None)
    named = given.get("label") if isinstance(given, Mapping) else None
    spelled = list(map(read_label, named or ()))
    if read_label(value) in spelled:  # 1 to 4, as numbers or texts, which are shown as letters
        return labels[spelled.index(read_label(value))]
    if isinstance(value, str) and value in texts:
        return labels[texts.index(value)]
    if isinstance(value, int) and 0 <= value < len(labels):
        return labels[value]
    if isinstance(value, str) and value.isdecimal() and int(value) < len(labels):
        return labels[int(value)]
    raise ValueError(
        f"{row.where(column)}: {value!r:.60} is none of its options; want one of "
        f"{', '.join(labels)}, a number from 0, or the text of one"
    )


def _read_question(row: Row) -> Parts:
    asked = "question" if "question" in row.values else "problem"
    gold, solution = gold_and_solution(row.answer("answer"))
    given = row.text("solution")
    given = solution if given is None else given
    response = row.text("response")
    response = given if response is None else response
    used = (asked, "answer", "solution", "response")
    return Parts(user(row.question(asked)), used, gold if gold is not None else given, response)


def _read_text(row: Row) -> Parts:
    return Parts((), ("text",), None, row.question("text"))


def _is_list(column: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: isinstance(row.get(column), list)


SHAPES = {
    "messages": Shape((("messages",),), _read_messages),
    "sharegpt": Shape((("conversations",),), _read_sharegpt, _is_list("conversations")),
    "preference": Shape((("chosen",), ("rejected",)), _read_preference),
    "completion": Shape((("prompt",), ("completion",)), _read_completion),
    "plain": Shape((("prompt",),), _read_plain),
    "instruction": Shape((("instruction",), ("output", "response")), _read_instruction),
    "choices": Shape((("question",), OPTIONS), _read_choices),
    "question": Shape((("question", "problem"),), _read_question),
    "text": Shape((("text",),), _read_text),
}
