"""Which class losses a pair of vocabularies cannot have; what they compute is in
test_distill.py.
"""

from types import SimpleNamespace

import pytest
from vocab_pairs import table_of

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.distillation.teachers import _class_loss


@pytest.mark.parametrize("classes", ["common", "hybrid"])
def test_a_student_whose_rest_is_control_ids_is_not_sent_there(classes):
    """What the teacher writes as "ab" would be asked of the student's OTHER, in which only <0> is;
    with a piece of its own there it may be.
    """

    def load(*pieces):
        return _class_loss(
            DistillSection(objective="class", classes=classes, on_policy=0.0),
            chat_of(*pieces),
            chat_of(b"a", b"b", b"ab"),
            SimpleNamespace(vocab_size=len(pieces) + 2, device="cpu"),
        )

    with pytest.raises(
        ValueError,
        match=r"1 tokens that the student lacks, such as b'ab'.*1 control ids.*classes = 'prefix'",
    ):
        load(b"a", b"b")
    assert load(b"a", b"b", b"bb").pools is not None
    assert load(b"a", b"b", b"ab").pools is not None


def chat_of(*pieces):
    table = table_of(pieces, controls=2)
    return SimpleNamespace(table=table, stop_ids=(len(pieces),), vocab_size=len(table))
