"""How a teacher reads a prompt: only the rows that are for it (distill.route), and with a text that
the student does not see (distill.privileged).

With teacher.path = model.path the second one is on-policy self-distillation: the student learns
from itself behind a longer prompt (arXiv:2601.18734).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout, TeacherView
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.fitted_prompts import FittedPrompts
from reflux.trainer.data.mixture import Mixture
from reflux.trainer.data.prompt import fill_template
from reflux.trainer.data.row_choice import chosen_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """Of one teacher among `paths`."""

    spec: DistillSection
    paths: tuple[str, ...]
    index: int

    def is_for(self, prompt: Prompt) -> bool:
        """Whether this teacher is compared with the student on the prompt's texts."""
        return not self.spec.route or teacher_of(prompt, self.spec, self.paths) == self.index

    def messages(self, prompt: Prompt) -> Sequence[Mapping[str, str]]:
        """The conversation that it reads. ValueError where the row lacks the privileged text."""
        column = self.spec.privileged
        if not column:
            return prompt.messages
        if not prompt.messages:
            raise ValueError(
                f"distill.privileged = {column!r}: prompt {prompt.index} is a document, without "
                "a prompt to put it behind; want rows with prompts, or leave privileged out"
            )
        text = prompt.answer if column == "answer" else prompt.extra.get(column)
        text = prompt.response if column == "response" else text
        if not isinstance(text, str) or not text:
            raise ValueError(
                f"distill.privileged = {column!r}: prompt {prompt.index} has {text!r} there; want "
                "a text that the teacher reads and the student does not"
            )
        *before, last = prompt.messages
        form = self.spec.privileged_template
        content = fill_template(form, prompt=last["content"], privileged=text)
        return (*before, {**last, "content": content})

    def read(self, prompt: Prompt) -> Prompt:
        """The prompt as the teacher reads it, to answer it."""
        return replace(prompt, messages=tuple(self.messages(prompt)))

    def tokens_over(
        self, chat: Chat, prompts: Sequence[Prompt], max_tokens: int
    ) -> dict[int, tuple[int, int]]:
        """Index of a prompt -> tokens of what the teacher reads and of the response, where `chat`,
        its tokenizer, has no positions for both. ValueError for a row that lacks the privileged
        text.
        """
        if not self.spec.privileged:  # then data/fitted_prompts.py has seen to it
            return {}
        own = list(filter(self.is_for, prompts))
        conversations = [self.messages(prompt) for prompt in own]
        if chat.positions is None:  # encodes nothing: a long data set takes minutes
            return {}
        over = {}
        for prompt, tokens in zip(own, chat.prompt_lengths(conversations)):
            longest = max_tokens
            if self.spec.source == "dataset" and not self.spec.on_policy:
                longest = min(max_tokens, len(chat.encode(prompt.response or "")) + 1)
            if not chat.has_room(tokens + longest):
                over[prompt.index] = tokens, longest
        return over


def that_fit(
    prompts: FittedPrompts | Mixture,
    readings: Sequence[Reading],
    chats: Sequence[Chat],
    cfg: Config,
) -> FittedPrompts | Mixture:
    """The prompts that every teacher has room for behind its privileged text; all of them where
    there is none. chats: of the teachers. ValueError where some are too long and data.too_long is
    not "drop", or where a source would have none left.
    """
    over: set[int] = set()
    for reading, chat in zip(readings, chats):
        long = reading.tokens_over(chat, prompts, cfg.rollout.max_tokens)
        if long and cfg.data.too_long != "drop":
            raise ValueError(_too_long(long, chat, cfg))
        over |= set(long)
    if not over:
        return prompts
    rows_left = [prompt.index for prompt in prompts if prompt.index not in over]
    if lost := {p.part for p in prompts} - {p.part for p in prompts if p.index not in over}:
        part = min(lost)
        raise ValueError(
            f"distill.privileged = {cfg.distill.privileged!r}: with it every prompt of "
            f"{f'data.parts.{part}' if part else 'data.source'} is too long for a teacher. Shorten "
            "the column, or lower rollout.max_tokens"
        )
    log.warning(
        "distill.privileged = %r: %s of %s prompts are too long for a teacher with it, and are "
        "left out (data.too_long = 'drop')",
        *(cfg.distill.privileged, f"{len(over):,}", f"{len(prompts):,}"),
    )
    return prompts.only(rows_left)


def _too_long(over: Mapping[int, tuple[int, int]], chat: Chat, cfg: Config) -> str:
    index = max(over, key=lambda row: sum(over[row]))
    tokens, longest = over[index]
    return (
        f"distill.privileged = {cfg.distill.privileged!r}: {len(over):,} prompts are too long for "
        f"the teacher. The longest, prompt {index}, has {tokens} tokens and {longest} of response; "
        f"want at most its {chat.positions} positions + 1. Shorten the column, lower "
        "rollout.max_tokens, or set data.too_long = 'drop' ('truncate_left' cuts none of it)"
    )


def teacher_of(prompt: Prompt, spec: DistillSection, paths: Sequence[str]) -> int:
    """The teacher that a row names. ValueError where it names none."""
    return chosen_model(prompt, spec.route, paths, "distill.route")


def not_compared(rollout: Rollout, draws: int) -> TeacherView:
    """The view of a teacher that another one is taken for: one token, and no position."""
    none, uniform = np.zeros(0, np.int64), np.zeros((0, draws)) if draws else None
    return TeacherView(rollout.prompt_ids[:1], rollout.ids[:1], none, none, uniform=uniform)
