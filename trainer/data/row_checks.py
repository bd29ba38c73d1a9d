"""What is checked of every row of a source before a run starts, in words that name the rows.

N: rows of the source.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from reflux.trainer.config.sections import TaskSection

from .chat import Chat
from .shortening import Messages
from .sources import Location

NEEDS_ANSWER = ("exact", "math", "multiple_choice")  # tasks that compare with Prompt.answer
NAMED = 3  # rows that a message names
A_RESPONSE = "a response"  # of another tokenizer: how many tokens it has is not known yet


@dataclass(frozen=True, eq=False)
class Need:
    """What a model that reads the prompts needs of them, and what it has."""

    role: str
    chat: Chat
    prompt_N: np.ndarray  # tokens of the prompt
    behind_N: np.ndarray  # tokens that have to fit behind it
    behind: str  # what they are
    room: int  # tokens of a row, at most
    limit: str  # what sets it

    @property
    def knows_responses(self) -> bool:
        """Whether `behind_N` is a whole response's; else one token's."""
        return self.behind != A_RESPONSE

    @cached_property
    def tokens_N(self) -> np.ndarray:
        return self.prompt_N + self.behind_N

    @cached_property
    def over_N(self) -> np.ndarray:
        """bool: too long."""
        return self.tokens_N > self.room

    def excess(self, row: int, messages: Messages) -> int:
        """Tokens too many, were these the messages of the row."""
        return len(self.chat.prompt_ids(messages)) + int(self.behind_N[row]) - self.room

    def words(self, location: Location) -> str:
        """Which rows are too long, and the longest of them."""
        rows, longest = np.flatnonzero(self.over_N), int(self.tokens_N.argmax())
        tokens = int(self.prompt_N[longest]), int(self.behind_N[longest])
        return (
            f"{named_rows(location, rows)}: {len(rows):,} of {len(self.over_N):,} prompts are too "
            f"long for the {self.role}. The longest, {location(longest)}, has {tokens[0]} "
            f"tokens, with {tokens[1]} for {self.behind} {sum(tokens)}; want at most {self.room}, "
            f"{self.limit}"
        )

    @property
    def advice(self) -> str:
        """The beginning of a sentence: what gives the model of [model] more room, or less text."""
        least, positions = int(self.tokens_N.max()) - 1, self.chat.positions
        if positions is not None and least > positions:
            return f"The model has no more than {positions} positions: lower rollout.max_tokens"
        return f"Set training.seq_len >= {least}, lower rollout.max_tokens"


def named_rows(location: Location, rows: np.ndarray) -> str:
    """The first of these rows, and how many more there are."""
    named = "; ".join(location(int(row)) for row in rows[:NAMED])
    more = len(rows) - NAMED
    return f"{named} and {more:,} more" if more > 0 else named


def check_answers(
    location: Location, answered_N: np.ndarray, task: TaskSection, section: str
) -> None:
    """ValueError where more rows have no answer than grades may fail. section: of the source."""
    if missing := missing_answers(location, answered_N, task, section):
        raise ValueError(missing)


def missing_answers(
    location: Location, answered_N: np.ndarray, task: TaskSection, section: str
) -> str:
    """Which rows these are; "" where they are not more."""
    missing = np.flatnonzero(~answered_N)
    if task.name not in NEEDS_ANSWER or len(missing) <= task.max_failed * len(answered_N):
        return ""
    return (
        f"{named_rows(location, missing)}: no answer, in {len(missing):,} of "
        f"{len(answered_N):,} rows, and task {task.name} compares with it. Name its column: "
        f'{section}.columns = {{answer = "..."}}'
    )
