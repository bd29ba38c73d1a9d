"""The prompts of a training run, all of which fit, and what became of those that did not
(data.too_long).

A prompt fits where its row, prompt and response, has at most training.seq_len + 1 tokens, and where
every other model that reads it has positions: for prompt and response where it reads the same ids
or writes the response, else for the prompt and one token more. All of it is found out before the
first step, on every row. How long a response is in another tokenizer is known when it is read: one
that is too long is left out there, and counted as unaligned.

N: rows of the source.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from reflux.trainer.config.phases import roles, spec_of
from reflux.trainer.config.roles import Role
from reflux.trainer.config.schema import Config

from .chat import Chat, same_vocabulary
from .options import Listing
from .prompt import Prompt
from .prompt_lengths import (
    Host,
    PromptLengths,
    cache_key,
    load_columns,
    measure_prompts,
    save_columns,
)
from .prompts import Prompts, load_prompts
from .row_checks import A_RESPONSE, Need, missing_answers, named_rows
from .shortening import Messages, shorten
from .unused import named_columns


@dataclass(frozen=True)
class Fit:
    """What became of prompts that are too long: counts of rows."""

    rows: int
    too_long: int = 0
    dropped: int = 0
    truncated: int = 0
    longest: int = 0  # tokens of prompt and response together

    @property
    def fields(self) -> dict[str, int]:
        """Of the event `data` in the log; empty where every prompt fits."""
        return dict(vars(self)) if self.too_long else {}


class FittedPrompts(Prompts):
    """The rows that are left; `index` stays that of the source."""

    def __init__(
        self,
        prompts: Prompts,
        fit: Fit,
        rows_left: np.ndarray | None = None,
        shortened: Callable[[Prompt], Prompt] | None = None,
    ):
        """rows_left: None for all."""
        self.fit = fit
        self._prompts, self._rows_left, self._shortened = prompts, rows_left, shortened

    def __len__(self) -> int:
        return len(self._prompts) if self._rows_left is None else len(self._rows_left)

    def _at(self, i: int) -> Prompt:
        return self.of_row(i if self._rows_left is None else int(self._rows_left[i]))

    def of_row(self, row: int) -> Prompt:
        prompt = self._prompts[row]
        return prompt if self._shortened is None else self._shortened(prompt)

    def location(self, row: int) -> str:
        return self._prompts.location(row)

    def only(self, rows: Iterable[int]) -> "FittedPrompts":
        """The prompts with these indices, in the order of their source; drawn alike."""
        rows_left = np.array(sorted(rows), np.int64)
        return FittedPrompts(self._prompts, self.fit, rows_left, self._shortened)


def training_listing(cfg: Config) -> Listing | None:
    """How the options of multiple-choice rows are written under their questions."""
    lists, options = cfg.data.list_options, cfg.task.options
    if lists is False:
        return None
    if cfg.task.name != "multiple_choice":
        return Listing(cfg.seed, shuffle=lists != "given")
    column, answer_is = options.get("choices", "choices"), options.get("answer_is", "letter")
    return Listing(cfg.seed, column, answer_is, always=bool(lists), shuffle=lists != "given")


class Fitting:
    """The rows of a source against the models that read them. Collective."""

    def __init__(self, cfg: Config, host: Host, chat: Chat, name: str = "data"):
        """name: of the source in host.inputs."""
        d, spec = cfg.data, spec_of(cfg.phase)
        self.cfg, self.host, self.name, self.given = cfg, host, name, spec.given(cfg)
        self.listing = training_listing(cfg)
        named = named_columns(cfg)
        self.prompts = load_prompts(d, listing=self.listing, check_rows=False, named=named)
        self.lengths = self._measured(chat)
        location, answered_N = self.prompts.location, self.lengths.answered_N
        ungraded = missing_answers(location, answered_N, cfg.task, "data")
        if ungraded and spec.grades(cfg):
            raise ValueError(ungraded)
        self.ungraded = ungraded if spec.shows_grades(cfg) else ""  # rows that grades leave out
        behind_N = np.full(len(self.prompts), cfg.rollout.max_tokens)
        if self.given:
            self._check_responses()
            behind_N = np.minimum(behind_N, self.lengths.response_N)
        own, *others = roles(cfg)
        what = "the response" if self.given else "rollout.max_tokens"
        room, limit = host.seq_len + 1, "training.seq_len + 1"
        need = Need(own.name, chat, self.lengths.prompt_N, behind_N, what, room, limit)
        self.needs = [need, *self._needs_of(others, need)]

    @property
    def over_N(self) -> np.ndarray:
        """bool: too long for one of the models."""
        return np.any([need.over_N for need in self.needs], axis=0)

    def fitted(self) -> FittedPrompts:
        """ValueError for data.too_long = "error", and where nothing would be left."""
        over_N, action = self.over_N, self.cfg.data.too_long
        count = int(over_N.sum())
        fit = Fit(len(over_N), count, longest=int(self.needs[0].tokens_N.max()))
        if not count:
            return FittedPrompts(self.prompts, fit)
        if action == "error" or (action == "drop" and count == len(over_N)):
            raise ValueError(self.words())
        if action == "drop":
            rows_left = np.flatnonzero(~over_N)
            return FittedPrompts(self.prompts, replace(fit, dropped=count), rows_left)
        self._check_shortened(over_N)
        return FittedPrompts(self.prompts, replace(fit, truncated=count), None, self.shortened)

    def words(self) -> str:
        """Which rows are too long, and what to do."""
        need = next(need for need in self.needs if need.over_N.any())
        fix = need.advice
        if need is not self.needs[0]:
            less = "lower rollout.max_tokens" if need.knows_responses else "shorten them"
            fix = f"Take a model with a longer context, {less}"
        what = need.words(self.prompts.location)
        return f"{what}. {fix}, or set data.too_long = 'drop' or 'truncate_left'"

    def shortened(self, prompt: Prompt) -> Prompt:
        """The prompt as it is where it fits, else without its oldest tokens."""
        row = prompt.index
        if not any(need.over_N[row] for need in self.needs):
            return prompt
        messages = self._shorten(prompt)
        assert messages is not None  # _check_shortened
        return replace(prompt, messages=tuple(messages))

    def _needs_of(self, others: list[Role], own: Need) -> Iterator[Need]:
        one_N = np.ones(len(self.prompts), np.int64)
        for role in others:
            if role.is_copy:
                continue
            chat = Chat.of(role.model)
            if chat.positions is None:
                continue
            same = chat.key == own.chat.key
            prompt_N = own.prompt_N if same else self._measured(chat).prompt_N
            behind_N, behind, room = one_N, A_RESPONSE, chat.positions
            limit = f"the positions of {role.model.path}"
            if role.samples or role.writes or same_vocabulary(chat, own.chat):
                # the last token of a row is predicted, and not read
                behind_N, behind, room = own.behind_N, own.behind, room + 1
                limit += " + 1"
            yield Need(role.name, chat, prompt_N, behind_N, behind, room, limit)

    def _check_responses(self) -> None:
        missing = np.flatnonzero(self.lengths.response_N == 0)
        if len(missing):
            raise ValueError(
                f"{self._named(missing)}: no response, in {len(missing):,} of "
                f"{len(self.prompts):,} rows; want a `response` column, or an assistant's last "
                'message, to train on given text. Name it: data.columns = {response = "..."}. An '
                "empty one is none, and neither is one that is marked not to be trained on "
                "(train = false, weight = 0, or label = false of a completion): leave such rows out"
            )

    def _shorten(self, prompt: Prompt) -> list[dict[str, str]] | None:
        def excess(messages: Messages) -> int:
            return max(need.excess(prompt.index, messages) for need in self.needs)

        return shorten(self.needs[0].chat, prompt.messages, excess)

    def _can_be_shortened(self, row: int) -> bool:
        try:
            return self._shorten(self.prompts[row]) is not None
        except ValueError:  # the template refuses a message that is empty
            return False

    def _check_shortened(self, over_N: np.ndarray) -> None:
        """ValueError for rows that are too long without all that their user wrote. The ranks share
        the work; what they find is cached beside the lengths.
        """
        key, host = self._shortening_key(), self.host
        known = host.gather([load_columns(key, ["failed"], len(over_N))] * (host.rank == 0))[0]
        if known is None:
            mine = np.flatnonzero(over_N)[host.rank :: host.world]
            failed = host.gather([int(r) for r in mine if not self._can_be_shortened(int(r))])
            failed_N = np.zeros(len(over_N), np.bool_)
            failed_N[failed] = True
            if host.is_main:
                save_columns(key, {"failed": failed_N})
        else:
            (failed_N,) = known
        rows = np.flatnonzero(failed_N)
        if len(rows):
            raise ValueError(
                f"{self._named(rows)}: {len(rows):,} prompts are too long without all "
                "that the user wrote, too, and data.too_long = 'truncate_left' cuts only that. "
                "Shorten their other messages, or set data.too_long = 'drop'"
            )

    def _shortening_key(self) -> str | None:
        keys = [self._key(need.chat) for need in self.needs]
        if None in keys:
            return None
        rooms = [(need.room, need.behind) for need in self.needs]
        spec = json.dumps([keys, rooms, self.cfg.rollout.max_tokens, "shortened"])
        return hashlib.sha256(spec.encode()).hexdigest()

    def _measured(self, chat: Chat) -> PromptLengths:
        key = self._key(chat)
        location = self.prompts.location
        return measure_prompts(
            self.prompts, chat, self.host, key, location=location, responses=self.given
        )

    def _key(self, chat: Chat) -> str | None:
        data = self.host.inputs.get(self.name)
        return cache_key(data, self.cfg.data, chat, responses=self.given, listing=self.listing)

    def _named(self, rows: np.ndarray) -> str:
        return named_rows(self.prompts.location, rows)
