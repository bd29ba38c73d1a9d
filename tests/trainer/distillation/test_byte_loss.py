"""objective = "byte" in a run against its definition on softmax rows by transformers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from byte_cases import masses_of, tokens_of
from distillation_cases import GIVEN, KL_KEYS
from runs import config, run_here
from transformers import AutoModelForCausalLM
from vocab_pairs import table_of

from reflux.kernels._divergence import divergence_ref
from reflux.tokenalign.byte_trie import ByteTrie, alphabet
from reflux.tokenalign.byte_windows import byte_windows, next_byte_logprob
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.chat import Chat
from reflux.trainer.distillation.byte_loss import byte_loss

pytestmark = pytest.mark.usefixtures("titan_process")

EVERYWHERE = {"objective": "byte", "max_missing": 1.0}  # random models spell in every way


def byte_run(talkers, folder, teacher="proxy", steps=1, rollout=None, batch=None, **options):
    return config(
        talkers,
        folder,
        "distill",
        steps=steps,
        rollout=rollout or {"prompts": 2, "group": 2},
        batch=batch or {},
        teacher={"path": str(talkers / teacher), "dtype": "float32"},
        distill=EVERYWHERE | options,
    )


def rows(model, prompt, ids, size):
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([prompt + ids])).logits
    return logits[0, len(prompt) - 1 : -1, :size].double().softmax(1)


def by_definition(talkers, samples, teacher="proxy", index=0, divergence="reverse", T=1.0):
    """(sum over texts of D at every byte, number of bytes)"""
    chats = [Chat(str(talkers / name)) for name in ("policy", teacher)]
    tries = [ByteTrie.of(Vocabulary(c.table, c.stop_ids, c.vocab_size)) for c in chats]
    total, positions = 0.0, 0
    for s in samples:
        view, r, logp = s.teacher_views[index], s.rollout, []
        for name, chat, trie, prompt, ids, space in zip(
            ("policy", teacher),
            chats,
            tries,
            (r.prompt_ids, view.prompt_ids),
            (r.ids, view.ids),
            (False, view.space),
        ):
            w = byte_windows(trie, tokens_of([ids], [space]))
            prob_RV = rows(talkers / name, prompt, ids, chat.vocab_size)
            found = next_byte_logprob(w, masses_of(w, trie, prob_RV), alphabet(tries))
            logp.append((found.logp_PS / T).log_softmax(1))
        total += float(divergence_ref(*logp, divergence, 0.5).sum())
        positions += w.positions
    return total, positions


@pytest.mark.parametrize(
    "texts", [{}, GIVEN, {"on_policy": 0.0}], ids=["student", "dataset", "teacher"]
)
def test_the_loss_is_the_divergence_of_next_byte_distributions(talkers, tmp_path, seen, texts):
    run = run_here(byte_run(talkers, tmp_path / "run", **texts))
    samples = seen["score"][0]
    total, positions = by_definition(talkers, samples)
    tokens = sum(len(s.rollout.ids) for s in samples)
    step = run.steps[0]
    assert step["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert step["byte_positions"] == pytest.approx(positions / tokens) and positions > tokens
    assert step["byte_left_out"] == 0 and step["unaligned"] == 0
    assert 0 < step["missing/teacher"] < step["byte_positions"]


def test_divergences_temperatures_and_several_teachers(talkers, tmp_path, seen):
    options = {"divergence": "jsd", "temperature": 2.0, "scale_t2": True, "nll_weight": 0.0}
    options |= {"more_teachers": (str(talkers / "teacher"),), "teacher_weights": (1.0, 3.0)}
    run = run_here(byte_run(talkers, tmp_path / "run", **options))
    samples = seen["score"][0]
    total = sum(
        weight * 4 * by_definition(talkers, samples, name, i, "jsd", 2.0)[0]
        for i, (name, weight) in enumerate({"proxy": 0.25, "teacher": 0.75}.items())
    )
    tokens = sum(len(s.rollout.ids) for s in samples)
    assert run.steps[0]["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_micro_batches_and_packing_change_no_number(talkers, tmp_path):
    runs = [
        run_here(byte_run(talkers, tmp_path / str(k), batch=batch, on_policy=0.5, nll_weight=0.5))
        for k, batch in enumerate([{}, {"tokens": 1}, {"pack": True}])
    ]
    for other in runs[1:]:
        for key in KL_KEYS:
            assert other.steps[0][key] == pytest.approx(runs[0].steps[0][key], rel=1e-4), key


def test_positions_with_mass_left_out_are_counted_and_not_compared(talkers, tmp_path):
    step = run_here(byte_run(talkers, tmp_path / "run", max_missing=0.0)).steps[0]
    assert step["byte_left_out"] == step["byte_positions"] and step["loss"] == 0


def test_a_lossy_tokenizer_is_refused_in_words():
    chat = SimpleNamespace(table=table_of([b"a"]), stop_ids=(1,), vocab_size=2)
    lossy = SimpleNamespace(table=replace(table_of([b"a"]), family="wordpiece"))
    lossy.stop_ids, lossy.vocab_size = (1,), 2
    engine = SimpleNamespace(vocab_size=2, device="cpu")
    with pytest.raises(ValueError, match="lossy family 'wordpiece'"):
        byte_loss(DistillSection(objective="byte"), chat, lossy, engine, same=False)
