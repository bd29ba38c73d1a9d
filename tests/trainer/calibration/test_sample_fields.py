"""What samples.jsonl says of a text: its grade, and the numbers of its spans in order."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from reflux.trainer.calibration import sample_fields as module
from reflux.trainer.calibration.rewards import UNALIGNED
from reflux.trainer.calibration.sample_fields import sample_fields, spans_of
from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.prompt import Prompt

PIECES = [b"the", b" ca", b"t", "é".encode()[:1], "é".encode()[1:], b"<end>"]
CHAT = SimpleNamespace(table=SimpleNamespace(pieces=PIECES))
SCORE = replace(
    UNALIGNED,
    value=1.23456,
    scored=True,
    span_value=np.array([0.5, -2.00004, 0.25]),
    span=np.array([0, 1, 1, 2, 2, -1]),
)


def rollout(ids=(0, 1, 2, 3, 4, 5), ended=True):
    prompt = Prompt(index=0, messages=({"role": "user", "content": "q"},), answer="a")
    return Rollout(prompt, (1,), tuple(ids), (0.0,) * len(ids), 0.0, "the caté", ended)


def test_spans_are_the_text_in_order_without_the_stop_token():
    spans = spans_of(rollout(), SCORE, PIECES)
    assert spans == [("the", 0.5), (" cat", -2.0), ("é", 0.25)]
    assert "".join(text for text, _ in spans) == rollout().text


def test_tokens_outside_all_spans_have_no_number():
    score = replace(SCORE, span=np.array([0, -1, -1, 2, 2, -1]))
    assert spans_of(rollout(), score, PIECES)[1] == (" cat", None)


def test_a_long_text_keeps_its_words_but_not_all_its_numbers(monkeypatch):
    monkeypatch.setattr(module, "MOST_SPANS", 1)
    assert spans_of(rollout(), SCORE, PIECES) == [("the", 0.5), (" caté", None)]


def test_grade_and_reward_stand_beside_the_spans():
    fields = sample_fields(rollout(), Grade(1.0, True, "a"), SCORE, CHAT)
    assert fields["r_cal"] == 1.2346 and len(fields["spans"]) == 3
    assert (fields["reward"], fields["correct"], fields["extracted"]) == (1.0, True, "a")


def test_what_was_not_scored_says_so():
    fields = sample_fields(rollout(), Grade(0.0, False), UNALIGNED, CHAT)
    assert "unaligned" in fields["not_scored"] and "spans" not in fields
    assert sample_fields(rollout(), Grade(0.0, None), None, CHAT) == {
        "reward": 0.0,
        "correct": None,
    }
    failed = sample_fields(rollout(), Grade(0.0, False, error="timeout"), None, CHAT)
    assert failed == {"grader_error": "timeout"}
    whole = replace(UNALIGNED, value=2.0, scored=True)  # a reward without spans
    assert sample_fields(rollout(), Grade(0.0, None), whole, CHAT)["spans"] == []
