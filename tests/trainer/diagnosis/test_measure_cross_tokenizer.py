"""Diagnosis of two tokenizers: in worlds of which every text is listed, and on real models by the
definition of next-byte distributions.
"""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from byte_cases import masses_of, tokens_of
from fixed_point_cases import PAIRS, FixedPoint
from runs import config, run_here, run_ranks
from token_stats_cases import token_stats
from transformers import AutoModelForCausalLM
from vocab_pairs import longest_first

from reflux.kernels._divergence import divergence_ref
from reflux.tokenalign.byte_trie import SYMBOLS, ByteTrie, alphabet
from reflux.tokenalign.byte_windows import byte_windows, next_byte_logprob
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.data.batch import Prompt, Rollout, Sample, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.graders import Grade
from reflux.trainer.diagnosis.measure import GradedText, StatsSpec
from reflux.trainer.diagnosis.measure_cross_tokenizer import (
    _logp_from,
    byte_divergence,
    count_symbols,
    measure_texts_cross_tokenizer,
    pair_of,
    symbol_types,
    unaligned_stats,
)
from reflux.trainer.diagnosis.summary import diagnose_token_stats
from reflux.trainer.diagnosis.token_classes import BANDS, TYPES, frequency_bands
from reflux.trainer.diagnosis.verdict import with_verdict
from reflux.trainer.losses import HeadInputs

pytestmark = [pytest.mark.usefixtures("titan_process"), pytest.mark.filterwarnings("ignore")]
OVER = {
    "task": {"name": "small_tasks:is_even"},
    "data": {"limit": 4},
    "rollout": {"max_tokens": 12},
    "diagnose": {
        "prefixes": ["dataset", "teacher", "student"],
        "student_texts": 4,
        "heatmap_texts": 3,
        "correction": False,
        "gradient_batches": 2,
        "max_missing": 1.0,  # random models spell in every way
    },
}


# --- every text listed


class ListedWorld:
    """A student and a teacher of fixed_point_cases as an engine, with all texts of their source.
    `z`: the student's logits, a row for each history.
    """

    rank, world, seq_len, device = 0, 1, 99, torch.device("cpu")
    positions = 99

    def __init__(self, name: str, noise: float = 0.0):
        self.truth = w = FixedPoint(*PAIRS[name], longest=3)
        random = torch.Generator().manual_seed(0)
        z = w.student.logits(1e-12)
        self.z = z + noise * torch.randn(z.shape, generator=random, dtype=z.dtype)
        self.sides = {"student": (w.student, self.z), "teacher": (w.teacher, w.teacher_logits)}
        self.chats = [self._chat(side) for side in (w.student, w.teacher)]
        rows = [len(side.pieces) + 1 for side in (w.student, w.teacher)]
        self.pair = pair_of(*self.chats, rows, self.device)

    def _chat(self, side):
        stop = len(side.pieces)

        def encode(text):
            return longest_first(text, side.pieces)

        return SimpleNamespace(
            table=side.table,
            stop_id=stop,
            stop_ids=(stop,),
            encode=encode,
            prompt_ids=lambda messages: (0,),
            has_room=lambda tokens: tokens <= self.positions + 1,
        )

    def texts(self, sources=("student", "teacher")):
        """Every text once from each source, in the ids of the model that sampled it."""
        found = []
        for source in sources:
            side, _ = self.sides["student" if source == "dataset" else source]
            for i, ids in enumerate(side.ids):
                prompt, text = Prompt(i, ()), "".join(side.pieces[t] for t in ids[:-1])
                rollout = Rollout(prompt, (0,), ids, (0.0,) * len(ids), 0.0, text, True)
                found.append(GradedText(rollout, source, Grade(1.0, i % 2 == 0)))
        return found

    def head_inputs(self, name, batch):
        side, z = self.sides[name]
        history: dict[int, tuple] = {}
        rows = []
        for i, t in zip(batch.sample_T.tolist(), batch.target_T.tolist()):
            rows.append(side.row[history.get(i, ())])
            history[i] = (*history.get(i, ()), t)
        hidden_TD = torch.eye(len(z), dtype=z.dtype)[rows]
        return HeadInputs(hidden_TD, z.T.contiguous(), None, z.shape[1])

    @contextlib.contextmanager
    def forward_no_grad(self, model, batch, vocab_size):
        with torch.no_grad():
            yield self.head_inputs("student" if model is self else "teacher", batch)

    def pad_across_ranks(self, batches):
        return batches

    def measure(self, texts):
        bands = frequency_bands(count_symbols(t.rollout for t in texts))
        spec = StatsSpec(4, torch.from_numpy(symbol_types()), torch.from_numpy(bands))
        return measure_texts_cross_tokenizer(
            self, None, texts, self.pair, tokens=200, spec=spec, joined=True
        )

    def gradient(self, divergence):
        samples = [
            Sample(s.rollout, teacher_views=(s.alignment.view,))
            for s in self.measure(self.texts())[0]
        ]
        (batch,) = pack(samples, tokens=10**6, seq_len=99)
        out = self.head_inputs("student", batch)
        head_VD = out.head_VD.clone().requires_grad_()
        loss = byte_divergence(self, None, self.pair, divergence)
        loss(out._replace(head_VD=head_VD), batch)[0].backward()
        return float(head_VD.grad.norm())


@pytest.mark.parametrize("name", PAIRS)
def test_two_models_of_one_byte_distribution_read_zero_in_every_trap(name):
    """However they cut the texts: KLs, tail, nucleus, bands, importance weights, gradients."""
    w = ListedWorld(name)
    stats, unaligned = w.measure(w.texts())
    assert not unaligned and len(stats) == 2 * len(w.truth.student.ids)
    diagnosis = with_verdict(diagnose_token_stats(stats))
    for d in ("forward", "reverse"):
        tail = diagnosis.tail[d]
        for cell in diagnosis.grid[d].values():
            assert max(abs(e.high) for e in (cell.per_token, cell.per_byte, cell.per_text)) < 1e-6
        assert max(map(abs, tail.bucket + tail.raw)) < 1e-6
        assert abs(diagnosis.sequence[d].sampled_tokens.mean) < 1e-5
        assert w.gradient(d) < 1e-5
    assert [t.present for t in diagnosis.verdict[:2]] == [False, False]
    assert all(t.mean == 0 for t in diagnosis.verdict[:2])
    off, gap, cross = diagnosis.off_policy, diagnosis.gap, diagnosis.cross_tokenizer
    assert off.effective_samples["whole"].low == pytest.approx(1, abs=1e-5)
    assert off.log_ratio.max < 1e-5 and abs(gap.entropy_gap.mean) < 1e-5
    assert gap.teachable.mean == pytest.approx(1, abs=1e-5)
    assert all(abs(e.mean) < 1e-5 for e in cross.bits_per_byte_gap.values())
    # where the student's own texts end, nothing lies outside what the teacher would say
    assert diagnosis.symptoms.off_nucleus == 0
    # a shorter token that the text does not take is missing only inside a merge
    assert cross.compared == 1.0 if name == "no merge" else 0.5 < cross.compared < 1.0


@pytest.mark.parametrize("name", PAIRS)
def test_a_student_that_is_wrong_is_measured_by_the_definition(name):
    """Log-probabilities add up to those of the texts wherever positions are left out; with none
    left out the KLs add up to that of the whole texts.
    """
    w = ListedWorld(name, noise=0.7)
    stats, _ = w.measure(w.texts(("teacher",)))
    want = w.truth.prob_N.log().numpy()
    got = np.array([s.teacher_logp_n.sum() for s in stats])
    assert got == pytest.approx(want, abs=1e-5)
    if name in ("no merge", "teacher merges 2", "teacher merges 3", "teacher merges 2 and 3"):
        own = w.truth.text_logp(w.z).numpy()  # of a student that spells in one way
        assert np.array([s.student_logp_n.sum() for s in stats]) == pytest.approx(own, abs=1e-5)
    if name == "no merge":
        prob = w.truth.prob_N.numpy()
        kl = sum(p * s.kl["forward"].sum() for p, s in zip(prob, stats))
        assert kl == pytest.approx(prob @ (want - own), rel=1e-4) and kl > 0.1
        both = w.measure(w.texts())[0]
        diagnosis = diagnose_token_stats(both)
        assert diagnosis.sequence["forward"].exact_tokens is not None
        assert set(diagnosis.tail["forward"].bands) == set(BANDS)
    assert min(w.gradient(d) for d in ("forward", "reverse")) > 1e-2
    assert diagnose_token_stats(w.measure(w.texts())[0]).grid["forward"]["teacher"].per_byte.low > 0


def test_a_text_that_the_teacher_has_no_positions_for_is_unaligned():
    """Not read beyond them in silence, and no end of the run."""
    w = ListedWorld("no merge")
    texts = w.texts()
    w.positions = 2  # the prompt and one token: texts of two bytes and the stop are too long
    stats, unaligned = w.measure(texts)
    longest = max(len(s.rollout.ids) for s in stats)
    assert longest == 2 and {len(s.rollout.ids) for s in unaligned} == {3, 4}
    assert len(stats) + len(unaligned) == len(texts)


def test_a_text_of_the_teacher_with_too_many_tokens_for_the_student_is_unaligned():
    """It has room in the teacher's tokens, which hold more bytes; the run does not end by it."""
    w = ListedWorld("teacher merges 2 and 3")
    texts = w.texts(("teacher",))
    w.seq_len = 2  # of the student: the prompt and one token are read
    stats, unaligned = w.measure(texts)
    assert {len(s.rollout.ids) for s in stats} == {2} and len(unaligned) > 0
    assert len(stats) + len(unaligned) == len(texts)


def test_symbols_have_types_and_are_counted():
    types = symbol_types()
    names = {c: TYPES[types[ord(c)]] for c in "a1 +.{"} | {"end": TYPES[types[SYMBOLS - 1]]}
    assert list(names.values()) == [
        "content",
        "digit",
        "whitespace",
        "operator",
        "punctuation",
        "code",
        "stop",
    ]
    ended = Rollout(Prompt(0, ()), (1,), (2, 3), (0.0,) * 2, 0.0, "abb", True)
    counts = count_symbols([ended, ended])
    assert counts[ord("a")] == 2 and counts[ord("b")] == 4 and counts[-1] == 2


def test_a_lossy_tokenizer_is_refused_in_words():
    from dataclasses import replace

    chats = ListedWorld("no merge").chats
    chats[1].table = replace(chats[1].table, family="wordpiece")
    with pytest.raises(ValueError, match="lossy family 'wordpiece'"):
        pair_of(*chats, (4, 4), torch.device("cpu"))


# --- real models


def run(talkers, folder, start=run_here, **over):
    log = start(
        config(
            talkers,
            folder,
            "diagnose",
            **OVER | {"teacher": {"path": str(talkers / "proxy"), "dtype": "float32"}} | over,
        )
    )
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    return log, json.loads((folder / "diagnosis.json").read_text()), rows


@pytest.fixture(scope="module")
def cross(talkers, tmp_path_factory, titan_process):
    folder = tmp_path_factory.mktemp("cross") / "run"
    return *run(talkers, folder), folder


@pytest.mark.parametrize("source", ["student", "teacher", "dataset"])
def test_one_text_by_transformers(talkers, cross, source):
    """Both KLs and the log-probabilities, from the two models' softmax rows and the definition."""
    row = next(r for r in cross[2] if r["sampled_by"] == source and r["pieces"][-1] == "<stop>")
    data = [json.loads(line) for line in next(talkers.glob("data.jsonl")).read_text().splitlines()]
    message = ({"role": "user", "content": data[row["prompt"]]["prompt"]},)
    chats = [Chat(str(talkers / name)) for name in ("policy", "proxy")]
    tries = [ByteTrie.of(Vocabulary(c.table, c.stop_ids, c.vocab_size)) for c in chats]
    contents = [row["ids"][:-1], row["teacher_ids"]]
    found = []
    for name, chat, trie, content in zip(("policy", "proxy"), chats, tries, contents):
        prompt, ids = list(chat.prompt_ids(message)), [*content, chat.stop_id]
        raw = chat.table.bytes_of(content)
        w = byte_windows(trie, tokens_of([ids], [raw != row["text"].encode()]))
        model = AutoModelForCausalLM.from_pretrained(talkers / name)
        with torch.no_grad():
            logits_RV = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        prob_RV = logits_RV[:, : chat.vocab_size].double().softmax(1)
        found.append(next_byte_logprob(w, masses_of(w, trie, prob_RV), alphabet(tries)))
    own_P = torch.tensor([*row["text"].encode(), SYMBOLS - 1])
    for side, x in zip(("student", "teacher"), found):
        # to the end by prefixes, and the end itself
        want = float(x.prefix_P[-1] + x.logp_PS[-1, own_P[-1]])
        assert sum(row[f"{side}_logp"]) == pytest.approx(want, abs=1e-3)
    for d in ("forward", "reverse"):
        want_P = divergence_ref(found[0].logp_PS, found[1].logp_PS, d, 0.5)
        assert sum(row[f"kl_{d}"]) == pytest.approx(float(want_P.sum()), rel=1e-3)
        assert row[f"kl_{d}"][0] == pytest.approx(float(want_P[0]), rel=2e-3, abs=2e-5)


def test_the_files_agree_with_each_other(cross):
    _, diagnosis, rows, folder = cross
    a = diagnosis["cross_tokenizer"]
    assert a["unaligned"] + len(rows) == 4 * (1 + 2 + 4)
    assert a["unaligned"] == sum(a["unaligned_by"].values())
    ended = [r["pieces"][-1] == "<stop>" for r in rows]
    assert a["byte_positions"] == sum(len(r["text"].encode()) for r in rows) + sum(ended)
    assert a["compared"] == 1.0 and all(0 < x < 1 for x in a["missing"].values())
    assert a["bytes_per_token"]["student"] >= 1
    students = [r for r in rows if r["sampled_by"] == "student"]
    positions = sum(len(r["text"].encode()) + (r["pieces"][-1] == "<stop>") for r in students)
    for d in ("forward", "reverse"):
        mean = diagnosis["grid"][d]["student"]["per_token"]["mean"]
        total = sum(sum(r[f"kl_{d}"]) for r in students)
        assert mean == pytest.approx(total / positions, rel=1e-4)
        gradient = diagnosis["off_policy"]["gradient"][d]["student"]["unbiased"]
        assert np.isfinite(gradient["mean"]) and diagnosis["tail"][d]["bands"]
    for r, stop in zip(rows, ended):
        assert "".join(r["pieces"][: len(r["pieces"]) - stop]) == r["text"]
        for side in ("student", "teacher"):
            begun = [p for tokens in r[f"{side}_pieces"] for p in tokens]
            assert len(begun) - stop == len(r[f"{side}_unit"])
    report = (folder / "report.md").read_text()
    for words in ("Two tokenizers (", "at 100.0% of", "signal to noise", "top-p 0.999"):
        assert words in report, words
    assert "None" not in report
    page = (folder / "heatmap.html").read_text()
    assert 'class="text forward spans"' in page and "teacher: " in page


def test_positions_with_too_much_missing_are_left_out_and_none_is_an_error(talkers, tmp_path):
    diagnose = OVER["diagnose"] | {"gradient_batches": 0}
    some = run(talkers, tmp_path / "some", diagnose=diagnose | {"max_missing": 0.3})[1]
    assert 0 < some["cross_tokenizer"]["compared"] < 1
    assert "exact_tokens" not in some["sequence"]["forward"]
    with pytest.raises(ValueError, match=r"none of 28 texts can be compared.*max_missing"):
        run(talkers, tmp_path / "none", diagnose=diagnose | {"max_missing": 0.0})


def test_unaligned_texts_still_have_symptoms_and_are_counted():
    """Broken text is what does not align: without it the fraction of broken texts would be 0 by
    selection.
    """
    broken = Rollout(Prompt(0, ()), (1,), (7, 7, 7, 7, 7, 7), (0.0,) * 6, 0.0, "\ufffd", False)
    unaligned = [
        unaligned_stats(GradedText(broken, "student", Grade(0.0, False))),
        unaligned_stats(GradedText(broken, "teacher", Grade(0.0, None))),
    ]
    with pytest.raises(ValueError, match="none of 2 texts can be compared"):
        diagnose_token_stats([], unaligned=unaligned)
    stats = [token_stats(0, "student", correct=True)]
    diagnosis = diagnose_token_stats(stats, unaligned=unaligned)
    symptoms = diagnosis.symptoms
    assert symptoms.broken_text == symptoms.truncated == 0.5 and symptoms.repeated_4grams > 0
    assert symptoms.confidence.accuracy == 1.0 and diagnosis.texts["student"].texts == 1


def test_two_ranks_find_what_one_finds(talkers, cross, tmp_path):
    _, one, rows, _ = cross
    _, two, others = run(talkers, tmp_path / "two", start=run_ranks)
    assert sorted(r["text"] for r in rows) == sorted(r["text"] for r in others)
    assert one["cross_tokenizer"]["unaligned"] == two["cross_tokenizer"]["unaligned"]
    for d in ("forward", "reverse"):
        for source, kl in one["grid"][d].items():
            got = two["grid"][d][source]["per_byte"]["mean"]
            assert got == pytest.approx(kl["per_byte"]["mean"], rel=1e-4)


def test_a_space_that_was_put_in_front_is_no_part_of_the_text():
    """Prefixes that begin at log p(" ...") = -0.7: units are what follows it."""
    prefix_P, own_P = np.array([-0.7, -1.7, -3.0]), np.array([-1.0, -1.3, -2.0])
    assert _logp_from(prefix_P, own_P, np.arange(3)) == pytest.approx([-1.0, -1.3, -2.0])
    assert _logp_from(prefix_P, own_P, np.array([1])) == pytest.approx([-1.0 - 3.3])
    assert _logp_from(prefix_P, own_P, np.array([0, 2])) == pytest.approx([-2.3, -2.0])
    assert len(_logp_from(prefix_P, own_P, np.zeros(0, int))) == 0
