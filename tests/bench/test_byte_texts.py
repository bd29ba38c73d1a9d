"""The run over many texts, on few; the peak of the byte head over T."""

from bench import byte_texts
from reflux.tokenalign import linear_next_byte


def test_few_texts_of_two_real_tokenizers():
    sides = [byte_texts.Side(name) for name in ("mistral_v3", "deepseek")]
    drawn = byte_texts.texts(40)
    found = byte_texts.check(sides, drawn)
    assert found["disagree"] == 0 and found["texts"] == 40
    assert found["sum_error"] < 1e-5 and found["prefix_error"] < 1e-5
    assert found["distributions"] > 0 and all(0 < x < 1 for x in found["missing"].values())
    assert max(found["unaligned"].values()) <= 4 and found["positions"] == found["bytes"] + (
        40 - max(found["unaligned"].values())
    )


def test_the_byte_heads_memory_grows_by_positions_not_by_the_vocabulary(monkeypatch):
    """Beyond one chunk of positions: less than logits of both sides and their gradient, at a
    vocabulary of 8,000; a larger one costs nothing more.
    """
    monkeypatch.setattr(linear_next_byte, "POSITIONS", 256)
    small, large = byte_texts.memory((256, 768), size=200)
    tokens = large["student_tokens"] - small["student_tokens"]
    grown = (large["peak_mib"] - small["peak_mib"]) / tokens
    per_token = large["logits_of_both_and_gradient_mib"] / large["student_tokens"]
    assert 0 < grown < per_token
