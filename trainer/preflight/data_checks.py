"""Prompts, their lengths, the data's own responses, and what the grader says of them."""

from collections.abc import Mapping, Sequence

from reflux.trainer.config.phases import spec_of
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.tasks import build_task
from reflux.trainer.rollouts.generate import given_rollout

from .report import Finding, first_line, short
from .shapes import Shape

FIRST_PROMPTS = 256  # rows whose length is measured
FIRST_TEXTS = 32  # responses that are graded
ACCEPTED = 0.9  # fraction of the data's own responses that a grader should call correct


def first_prompts(cfg: Config) -> tuple[list[Prompt], list[Finding]]:
    """The first rows of the phase's own prompts."""
    section = spec_of(cfg.phase).data_section
    d = cfg.eval if section == "eval" else cfg.data
    limit = min(d.limit or FIRST_PROMPTS, FIRST_PROMPTS)
    try:
        return list(load_prompts(d.source, split=d.split, columns=d.columns, limit=limit)), []
    except (OSError, ValueError, ImportError) as error:
        what = f"{section}.source = {d.source!r} cannot be read: {first_line(error)}"
        return [], [Finding("error", what, "lengths, grader and texts are not checked")]


def length_findings(
    cfg: Config,
    shapes: Sequence[Shape],
    chats: Mapping[str, Chat],
    prompts: Sequence[Prompt],
    seq_len: int,
) -> list[Finding]:
    """Whether prompt + rollout.max_tokens fits: a row of the model of [model] has training.seq_len
    + 1 tokens at most, a frozen model has its own positions.
    """
    if not prompts:
        return []
    return [
        _length_finding(cfg, s, chats[s.role.name], prompts, seq_len)
        for s in shapes
        if s.role.name in chats and not s.role.is_copy
    ]


def _length_finding(
    cfg: Config, shape: Shape, chat: Chat, prompts: Sequence[Prompt], seq_len: int
) -> Finding:
    role, response = shape.role, cfg.rollout.max_tokens
    room = seq_len + 1 if role.own else shape.max_positions
    lengths = [len(chat.prompt_ids(p.messages)) for p in prompts]
    longest = max(lengths)
    too_long = sum(n + response > room for n in lengths) / len(lengths)
    limit = "training.seq_len + 1" if role.own else "positions of the model"
    what = (
        f"{role.name}: longest of the first {len(prompts)} prompts {longest} + rollout.max_tokens "
        f"{response} = {longest + response} tokens, {limit} {room}"
    )
    if not too_long:
        return Finding("ok", what)
    fix = "take a model with a longer context"
    if role.own:
        fix = f"set training.seq_len >= {longest + response - 1}"
    return Finding(
        "error" if role.own else "warning",
        f"{what}: {too_long:.1%} of the prompts are too long",
        f"{fix}, lower rollout.max_tokens, or leave long prompts out",
    )


def given_responses(
    cfg: Config, chat: Chat, prompts: Sequence[Prompt]
) -> tuple[list[Rollout], list[Finding]]:
    """The data's own responses that fit into rollout.max_tokens, in the tokens of `chat`."""
    with_text = [p for p in prompts if p.response is not None][:FIRST_TEXTS]
    texts = [given_rollout(chat, p, cfg.rollout.max_tokens) for p in with_text]
    whole = [t for t in texts if t.ended]
    if len(whole) == len(texts):
        return whole, []
    what = (
        f"{1 - len(whole) / len(texts):.1%} of the first {len(texts)} responses are cut at "
        f"rollout.max_tokens = {cfg.rollout.max_tokens}"
    )
    advice = "raise rollout.max_tokens; a truncated text has no stop token to learn"
    return whole, [Finding("warning", what, advice)]


def task_findings(cfg: Config, texts: Sequence[Rollout]) -> list[Finding]:
    """Whether the grader accepts the data's own responses."""
    if not cfg.task.name:
        return []
    if cfg.task.name == "reward_model":
        return [Finding("ok", "task reward_model: its grades have no correct and incorrect")]
    try:
        task = build_task(cfg.task.name, cfg.task.options)
    except (OSError, ValueError, ImportError) as error:
        return [Finding("error", f"task: {first_line(error)}", "mend task.name or task.options")]
    if not texts:
        return [
            Finding(
                "warning",
                f"task {cfg.task.name}: the data has no responses to grade",
                "the grader is not checked; a `response` column with correct answers would do it",
            )
        ]
    return [_grader_finding(cfg.task.name, texts, task.grade(texts))]


def _grader_finding(task: str, texts: Sequence[Rollout], grades: Sequence[Grade]) -> Finding:
    failed = next((g.error for g in grades if g.error is not None), None)
    if failed is not None:
        what = f"task {task}: the grader failed on the data's own response: {failed}"
        return Finding("error", what, "a failed grade is reward 0; mend the grader")
    correct = [g.correct for g in grades if g.correct is not None]
    if not correct:
        mean = sum(g.reward for g in grades) / len(grades)
        what = f"task {task}: mean reward {mean:.3g} on the data's own {len(grades)} responses"
        return Finding("ok", what)
    what = f"task {task}: accepts {sum(correct)} of the data's own {len(correct)} responses"
    if sum(correct) / len(correct) >= ACCEPTED:
        return Finding("ok", what)
    k = next(k for k, g in enumerate(grades) if g.correct is False)
    example = (
        f"prompt {texts[k].prompt.index}: {short(texts[k].text)}, extracted "
        f"{grades[k].extracted!r}, want {texts[k].prompt.answer!r}"
    )
    return Finding(
        "warning" if any(correct) else "error",
        f"{what}; {example}",
        "check task.name, task.options (marker, pattern) and the answer column",
    )
