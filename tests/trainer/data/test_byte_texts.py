"""Which responses two models can read byte by byte."""

import json
import shutil

from reflux.tokenalign.byte_trie import END, ByteTrie
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.data.batch import Rollout, Sample, pack
from reflux.trainer.data.byte_texts import byte_view, windows_of
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompt import Prompt


def rollout_of(chat, ids, ended=True):
    prompt = Prompt(0, ({"role": "user", "content": "hi"},))
    return Rollout(prompt, (1,), tuple(ids), (0.0,) * len(ids), 0.0, chat.decode(ids), ended)


def test_a_text_whose_bytes_are_not_spelled_is_left_out(talkers):
    student, teacher = Chat(str(talkers / "policy")), Chat(str(talkers / "proxy"))
    ids = student.encode("12 + 3")
    whole = rollout_of(student, (*ids, student.stop_id))
    view = byte_view(student, teacher, whole, None)
    assert teacher.table.bytes_of(view.ids[:-1]) == b"12 + 3" and view.ids[-1] == teacher.stop_id
    half = student.encode("é")[:1]
    assert student.table.bytes_of(half) != "é".encode()
    assert byte_view(student, teacher, rollout_of(student, half, False), None) is None
    control = rollout_of(student, (*ids, student.stop_id, *ids), ended=False)
    assert byte_view(student, teacher, control, None) is None


def spaced_folder(model, out):
    """A copy whose tokenizer puts a space in front of every text, as SentencePiece does."""
    shutil.copytree(model, out)
    table = json.loads((out / "tokenizer.json").read_text())
    assert table["pre_tokenizer"]["type"] == "ByteLevel"
    table["pre_tokenizer"]["add_prefix_space"] = True
    (out / "tokenizer.json").write_text(json.dumps(table))
    return out


def test_a_space_that_the_students_tokenizer_puts_in_front_of_the_teachers_text(talkers, tmp_path):
    """The teacher's own text keeps its bytes; the student's windows leave the space out."""
    student = Chat(str(spaced_folder(talkers / "policy", tmp_path / "spaced")))
    teacher = Chat(str(talkers / "proxy"))
    own, read = student.encode("12 + 3"), teacher.encode("12 + 3")
    assert student.table.bytes_of(own) == b" 12 + 3" and student.table.space_prefix
    rollout = rollout_of(student, (*own, student.stop_id))
    view = byte_view(student, teacher, rollout, read)
    assert view.student_space and not view.space and view.ids == (*read, teacher.stop_id)
    (batch,) = pack([Sample(rollout, teacher_views=(view,))], tokens=99, seq_len=64)
    assert batch.leading_space.all()
    tries = [ByteTrie.of(Vocabulary(c.table, c.stop_ids)) for c in (student, teacher)]
    bytes_ = [
        windows_of(trie, b).byte_P.tolist() for trie, b in zip(tries, (batch, batch.for_teacher()))
    ]
    assert bytes_[0] == bytes_[1] == [*b"12 + 3", END]
    # a text of the student's own: the space is part of what it said
    assert not byte_view(student, teacher, rollout, None).student_space
    assert byte_view(student, teacher, rollout, teacher.encode("12 + 4")) is None
