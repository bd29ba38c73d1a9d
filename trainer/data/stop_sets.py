"""Two models with the same ids that stop at different ones.

A text ends where its model stops. A student that learns the teacher's token for it, at which it
does not stop itself, writes that token and goes on.
"""

from collections.abc import Iterable
from pathlib import Path

from reflux.trainer.config.roles import Advice

from .chat import Chat


def unknown_stops(student: Chat, teacher: Chat) -> tuple[int, ...]:
    """Stop ids of the teacher at which the student does not stop. Both have the same ids."""
    return tuple(i for i in teacher.stop_ids if i not in student.stop_ids)


def tokens_in_words(chat: Chat, ids: Iterable[int]) -> str:
    return ", ".join(f"{chat.tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids)


def name_them(student: Chat, unknown: Iterable[int]) -> str:
    """How the student learns to stop at them, too."""
    ids = sorted({*student.stop_ids, *unknown})
    file = f"{student.path}/generation_config.json"
    if not Path(student.path).is_dir():  # of the hub
        file = f"generation_config.json of a local copy of {student.path}"
    return f"Name them in {file}: eos_token_id = {ids}"


def stop_advice(objective: str, student: Chat, teacher: Chat) -> Advice | None:
    """Of two models with the same ids under a distill.objective. Token by token the end of a text
    is one id; every other objective compares the ends themselves.
    """
    unknown = unknown_stops(student, teacher)
    if objective != "kl" or not unknown:
        return None
    fix = name_them(student, unknown)
    if teacher.stop_id not in unknown:
        return Advice(
            "warning", f"of texts that end so the student learns to write them and go on. {fix}"
        )
    return Advice(
        "error",
        "distill.objective = 'kl' compares token by token, so the student would learn to write "
        f"{tokens_in_words(teacher, (teacher.stop_id,))} at the end of a text, and to go on: it "
        f"stops at {tokens_in_words(student, student.stop_ids)}. {fix}, or use objective = 'byte' "
        "or 'nll', in which a text ends with the student's own",
    )
