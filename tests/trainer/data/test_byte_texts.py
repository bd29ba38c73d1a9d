"""Which responses two models can read byte by byte."""

from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.byte_texts import byte_view
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
