"""The bench of LoRA compares the same step: its configurations differ in the rank alone."""

from dataclasses import replace

from bench.lora import ARMS, LENGTH, ROWS, SHAPE, config_of, rows


def test_the_arms_differ_in_the_rank_alone(tmp_path):
    full, lora = (config_of(tmp_path, rank) for rank in ARMS.values())
    assert full.lora.rank == 0 < lora.lora.rank
    assert replace(lora, lora=full.lora, folder=full.folder) == full


def test_every_arm_sees_the_same_rows():
    (batch,), (again,) = rows(1), rows(1)
    assert batch.tokens == ROWS * LENGTH // 2 and batch.target_T.equal(again.target_T)
    assert int(batch.input_NL.max()) < SHAPE["vocab_size"]
    assert not batch.target_T.equal(rows(2)[0].target_T)
