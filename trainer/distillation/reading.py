"""How a teacher reads a prompt: only the rows that are for it (distill.route), and with a text that
the student does not see (distill.privileged).

With teacher.path = model.path the second one is on-policy self-distillation: the student learns
from itself behind a longer prompt (arXiv:2601.18734).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.batch import Prompt, Rollout, TeacherView
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompt import fill_template
from reflux.trainer.data.row_choice import chosen_model


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

    def check_room(self, chat: Chat, prompts: Sequence[Prompt], max_tokens: int) -> None:
        """ValueError for the first prompt whose row lacks the privileged text, or that the teacher,
        whose tokenizer is `chat`, has no positions for behind it, response included.
        """
        if not self.spec.privileged:  # then data/fitted_prompts.py has seen to it
            return
        own = list(filter(self.is_for, prompts))
        conversations = [self.messages(prompt) for prompt in own]
        if chat.positions is None:  # encodes nothing: a long data set takes minutes
            return
        for prompt, tokens in zip(own, chat.prompt_lengths(conversations)):
            longest = max_tokens
            if self.spec.source == "dataset" and not self.spec.on_policy:
                longest = min(max_tokens, len(chat.encode(prompt.response or "")) + 1)
            if not chat.has_room(tokens + longest):
                raise ValueError(
                    f"distill.privileged = {self.spec.privileged!r}: prompt {prompt.index} has "
                    f"{tokens} tokens for the teacher and {longest} of response; want at most its "
                    f"{chat.positions} positions + 1. Shorten the column, or lower "
                    "rollout.max_tokens"
                )


def teacher_of(prompt: Prompt, spec: DistillSection, paths: Sequence[str]) -> int:
    """The teacher that a row names. ValueError where it names none."""
    return chosen_model(prompt, spec.route, paths, "distill.route")


def not_compared(rollout: Rollout, draws: int) -> TeacherView:
    """The view of a teacher that another one is taken for: one token, and no position."""
    none, uniform = np.zeros(0, np.int64), np.zeros((0, draws)) if draws else None
    return TeacherView(rollout.prompt_ids[:1], rollout.ids[:1], none, none, uniform=uniform)
