"""The held-out prompts of an evaluation: how the model is shown them, and what is checked of all of
them before anything is answered.

N: rows of the source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from reflux.trainer.config.evaluation import check_options
from reflux.trainer.config.parts import input_name, part_configs
from reflux.trainer.config.phases import roles, spec_of
from reflux.trainer.config.roles import Role, defence_roles
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.options import Options, list_options, read_options
from reflux.trainer.data.prompt_lengths import Host, PromptLengths, cache_key, measure_prompts
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.row_checks import Need, check_answers
from reflux.trainer.data.unused import named_columns


class Questions:
    """The prompts of [eval], as they are in one source."""

    def __init__(self, cfg: Config, host: Host, chat: Chat, name: str = "eval"):
        """name: of the source in host.inputs. Collective. ValueError for a row that is no prompt,
        whose options cannot be read, that lacks an answer or is too long for the model.
        """
        e, self.cfg, self._name = cfg.eval, cfg, name
        check_options(e, cfg.task.name)
        given = cfg.task.options
        named = {"column": given.get("choices"), "answer_is": given.get("answer_is")}
        self._format = {name: value for name, value in named.items() if value is not None}
        prompts = load_prompts(e, check_rows=False, named=named_columns(cfg))
        self.prompts: Sequence[Prompt] = prompts
        self.location = prompts.location
        choices = prompts.shape == "choices" and e.by == "generation"
        self._listed = choices if e.list_options is None else bool(e.list_options)
        lengths = self._measured(host, chat)
        for prompt in self.prompts if e.scores_options or self._listed else ():
            self.options(prompt)
        if e.generates:
            check_answers(self.location, lengths.answered_N, cfg.task, "eval")
        self._check_lengths(lengths, host.seq_len, chat)

    def shown(self, prompt: Prompt) -> Prompt:
        """As the model reads it: with its options, where they are to be listed."""
        if not self._listed:
            return prompt
        shuffle = self.cfg.eval.list_options != "given"
        return list_options(prompt, self.cfg.seed, **self._format, shuffle=shuffle)

    def options(self, prompt: Prompt) -> Options:
        """ValueError where they cannot be read."""
        return read_options(prompt, **self._format)

    def options_or_none(self, prompt: Prompt) -> Options | None:
        """None where the task has none, or they cannot be read: a generated answer can be graded
        without their positions.
        """
        if self.cfg.task.name != "multiple_choice":
            return None
        try:
            return self.options(prompt)
        except ValueError:
            return None

    def _measured(self, host: Host, chat: Chat) -> PromptLengths:
        e, location = self.cfg.eval, self.location
        if self._listed:
            shown = [self.shown(p) for p in self.prompts]
            return measure_prompts(shown, chat, host, location=location)
        key = cache_key(host.inputs.get(self._name), e, chat)
        return measure_prompts(self.prompts, chat, host, key, location=location)

    def _check_lengths(self, lengths: PromptLengths, seq_len: int, chat: Chat) -> None:
        e, behind_N, behind = self.cfg.eval, np.zeros(len(self.prompts), np.int64), "an option"
        if e.scores_options:
            behind_N[:] = [
                max(len(chat.encode(text)) for text in self.options(p).texts) for p in self.prompts
            ]
        if e.generates:
            behind_N = np.maximum(behind_N, self.cfg.rollout.max_tokens)
            behind = "rollout.max_tokens"
        own = roles(self.cfg)[0]
        room, limit = seq_len + 1, "training.seq_len + 1"
        need = Need(own.name, chat, lengths.prompt_N, behind_N, behind, room, limit)
        left_out = "leave these rows out of eval.source: an evaluation drops nothing by itself"
        if need.over_N.any():
            raise ValueError(f"{need.words(self.location)}. {need.advice}, or {left_out}")
        # where nothing but answers is asked for; elsewhere the defence is the teacher's
        defended = e.generates and spec_of(self.cfg.phase).data_section == "eval"
        for role in defence_roles(self.cfg) if defended else ():
            if words := self._without_room(role, lengths):
                raise ValueError(f"{words}. Lower rollout.max_tokens, or {left_out}")

    def _without_room(self, role: Role, lengths: PromptLengths) -> str:
        """Which rows a model that writes beside the evaluated one, in its tokens, has no positions
        for; empty if none.
        """
        chat = Chat.of(role.model)
        if chat.positions is None:
            return ""
        behind_N = np.full(len(self.prompts), self.cfg.rollout.max_tokens)
        limit = f"the positions of {role.model.path} + 1"  # the last token is not read
        room, behind = chat.positions + 1, "rollout.max_tokens"
        need = Need(role.name, chat, lengths.prompt_N, behind_N, behind, room, limit)
        return need.words(self.location) if need.over_N.any() else ""


class QuestionParts:
    """The questions of [eval.parts], one part behind the other; each prompt has the name of its
    part.
    """

    def __init__(self, parts: Mapping[str, Questions]):
        self._parts = parts
        self.prompts: Sequence[Prompt] = [
            replace(prompt, index=start + prompt.index, part=name)
            for (name, part), start in zip(parts.items(), _starts(parts))
            for prompt in part.prompts
        ]

    def shown(self, prompt: Prompt) -> Prompt:
        return self._parts[prompt.part].shown(prompt)

    def options(self, prompt: Prompt) -> Options:
        return self._parts[prompt.part].options(prompt)

    def options_or_none(self, prompt: Prompt) -> Options | None:
        return self._parts[prompt.part].options_or_none(prompt)


def chance(questions: Questions | QuestionParts) -> float | None:
    """Expected accuracy of a guess among the options, the mean of 1 / options over prompts; None
    where a prompt has no options.
    """
    found = [questions.options_or_none(prompt) for prompt in questions.prompts]
    if not found or None in found:
        return None
    return float(np.mean([1 / len(options.texts) for options in found if options]))


def _starts(parts: Mapping[str, Questions]) -> list[int]:
    return [0, *accumulate(len(part.prompts) for part in parts.values())]


def load_questions(cfg: Config, host: Host, chat: Chat) -> Questions | QuestionParts:
    """Of one source, or of all parts. Collective; ValueError as Questions."""
    if not cfg.eval.parts:
        return Questions(cfg, host, chat)
    return QuestionParts(
        {
            name: Questions(part, host, chat, input_name("eval", name))
            for name, part in part_configs(cfg, "eval").items()
        }
    )
