"""Responses byte by byte: in the tokens of two models, for the next-byte distributions of
reflux.tokenalign.linear_next_byte.
"""

from collections.abc import Sequence

import torch

from reflux.tokenalign.byte_trie import ByteTrie
from reflux.tokenalign.byte_windows import ByteWindows, Tokens, byte_windows
from reflux.tokenalign.offsets import spell

from .batch import Batch, Rollout, TeacherView
from .chat import Chat


def windows_of(trie: ByteTrie, batch: Batch) -> ByteWindows:
    """Of a batch's responses, in the tokens of the model that it was made for."""
    space_T = batch.leading_space
    if space_T is None:
        space_T = torch.zeros_like(batch.target_T, dtype=torch.bool)
    return byte_windows(trie, Tokens(batch.target_T, batch.sample_T, space_T))


def byte_view(
    student: Chat, teacher: Chat, rollout: Rollout, read: Sequence[int] | None
) -> TeacherView | None:
    """The response as the teacher reads it, for byte positions; None where one of the two does not
    spell its bytes: it ends inside a character, holds control ids, or a normaliser changes it.

    read: its content in the teacher's ids, where they are known; None: encoded.
    """
    lens, ids = student.table.lens, rollout.content_ids
    spelled = spell(student.table, ids)
    if spelled.text is None or spelled.cut or not lens[list(ids)].all():
        return None
    given, own = read is not None, spelled.bytes
    read = teacher.encode(spelled.text) if read is None else tuple(read)
    raw = teacher.table.bytes_of(read)
    # a space that one of the two tokenizers put in front; the text itself is known where it is the
    # teacher's
    space, student_space = raw == b" " + own, given and own == b" " + raw
    if not (space or student_space or raw == own) or not teacher.table.lens[list(read)].all():
        return None
    stop = (teacher.stop_id,) if rollout.ended else ()
    prompt_ids = teacher.prompt_ids(rollout.prompt.messages)
    return TeacherView(prompt_ids, (*read, *stop), space=space, student_space=student_space)
