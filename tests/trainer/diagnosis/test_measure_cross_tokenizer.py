"""Diagnosis of two tokenizers: by transformers and by hand on one text, and by the one-vocabulary
path where there is one.
"""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import config, run_here, run_ranks
from token_stats_cases import token_stats
from transformers import AutoModelForCausalLM

from reflux.tokenalign.class_losses import partition_index
from reflux.tokenalign.vocab_map import Partition
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.graders import Grade
from reflux.trainer.diagnosis import phase
from reflux.trainer.diagnosis.measure import GradedText
from reflux.trainer.diagnosis.measure_cross_tokenizer import pair_of, unaligned_stats
from reflux.trainer.diagnosis.metrics import kl_profile, top_overlap
from reflux.trainer.diagnosis.results import measured
from reflux.trainer.diagnosis.summary import diagnose_token_stats
from reflux.trainer.diagnosis.token_classes import TYPES
from reflux.trainer.losses import HeadInputs
from reflux.trainer.runs.files import to_json

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
    },
}


def run(talkers, folder, teacher="proxy", start=run_here, **over):
    log = start(
        config(
            talkers,
            folder,
            "diagnose",
            **OVER | {"teacher": {"path": str(talkers / teacher), "dtype": "float32"}} | over,
        )
    )
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    return log, json.loads((folder / "diagnosis.json").read_text()), rows


@pytest.fixture(scope="module")
def cross(talkers, tmp_path_factory, titan_process):
    return run(talkers, tmp_path_factory.mktemp("cross") / "run")


def outputs(g, T, V, D=5):
    return HeadInputs(
        torch.randn(T, D, generator=g, dtype=torch.float64),
        torch.randn(V, D, generator=g, dtype=torch.float64),
        None,
        V,
    )


@given(st.integers(0, 10_000), st.integers(0, 5), st.sampled_from(["forward", "reverse"]))
def test_classes_of_one_id_each_are_the_vocabulary(seed, T, divergence):
    g, V = torch.Generator().manual_seed(seed), 23
    student, teacher = outputs(g, T, V), outputs(g, T, V)
    partition = partition_index(
        Partition(
            "prefix", np.arange(V, dtype=np.int32), np.arange(V, dtype=np.int32), V, V - 1, "a", "b"
        )
    )
    type_V = torch.randint(len(TYPES), (V,), generator=g)
    for got, want in zip(
        *(
            vars(kl_profile(student, teacher, divergence, type_V, len(TYPES), partition=p)).values()
            for p in (partition, None)
        )
    ):
        assert (
            got == want
            if isinstance(want, tuple)
            else torch.allclose(got, want, rtol=1e-9, atol=1e-11)
        )
    for got, want in zip(
        *(vars(top_overlap(student, teacher, 4, p)).values() for p in (partition, None))
    ):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-11)


def prefix_masses(logits_V, chat, other):
    """Mass by the longest prefix of a token that the other side has as a token, stop and control
    ids together: by its definition.
    """
    student, teacher = (
        {
            p
            for p, i in zip(c.table.pieces, range(c.vocab_size))
            if p and i not in c.stop_ids and c.table.kind[i] == 0
        }
        for c in (chat, other)
    )
    shared = student & teacher
    masses: dict[bytes, float] = {}
    for i, p in enumerate(logits_V[: chat.vocab_size].double().softmax(0).tolist()):
        piece = chat.table.pieces[i] if chat.table.kind[i] == 0 and i not in chat.stop_ids else b""
        prefixes = (piece[:n] for n in range(len(piece), 0, -1))
        key = next((x for x in prefixes if x in shared), piece[:1])
        masses[key] = masses.get(key, 0.0) + p
    return masses


@pytest.mark.parametrize("source", ["student", "teacher", "dataset"])
def test_one_text_by_transformers(talkers, cross, source):
    """Span log-probabilities, and both KLs at every aligned position, from the two models' logits
    and the definition of the classes.
    """
    chats = {"student": Chat(str(talkers / "policy")), "teacher": Chat(str(talkers / "proxy"))}
    row = next(
        r
        for r in cross[2]
        if r["sampled_by"] == source and len(r["pieces"]) > 2 and r["pieces"][-1] == "<stop>"
    )
    logits, spans = {}, {"student": row["student_span"], "teacher": row["teacher_span"]}
    ids = {"student": row["ids"][:-1], "teacher": row["teacher_ids"]}
    data = [json.loads(line) for line in next(talkers.glob("data.jsonl")).read_text().splitlines()]
    for side, name in (("student", "policy"), ("teacher", "proxy")):
        prompt = chats[side].prompt_ids(
            ({"role": "user", "content": data[row["prompt"]]["prompt"]},)
        )
        model = AutoModelForCausalLM.from_pretrained(talkers / name)
        with torch.no_grad():
            logits[side] = (
                model(torch.tensor([[*prompt, *ids[side]]])).logits[0, len(prompt) - 1 :].float()
            )
        logp = logits[side][:, : chats[side].vocab_size].log_softmax(1)
        sums = [0.0] * len(row["pieces"])
        for at, (i, span) in enumerate(zip(ids[side], spans[side])):
            sums[span] += float(logp[at, i])
        sums[-1] = float(logp[len(ids[side]), list(chats[side].stop_ids)].logsumexp(0))
        assert row[f"{side}_logp"] == pytest.approx(sums, abs=2e-4)
    compared = [s for s, kl in enumerate(row["kl_forward"]) if kl is not None]
    assert compared
    for s in compared:
        at = {side: spans[side].index(s) if s in spans[side] else len(ids[side]) for side in spans}
        p, q = (
            prefix_masses(logits[side][at[side]], chats[side], chats[other])
            for side, other in (("student", "teacher"), ("teacher", "student"))
        )
        for name, a, b in (("forward", q, p), ("reverse", p, q)):
            want = sum(
                x * np.log(x / b[key]) for key, x in a.items() if x > 0 and b.get(key, 0) > 0
            )
            assert row[f"kl_{name}"][s] == pytest.approx(want, abs=2e-4, rel=2e-3), (s, name)


def test_the_files_agree_with_each_other(talkers, cross):
    _, diagnosis, rows = cross
    a = diagnosis["cross_tokenizer"]
    assert a["spans"] == sum(len(r["pieces"]) for r in rows)
    assert a["unaligned"] + len(rows) == 4 * (1 + 2 + 4)
    positions = sum(kl is not None for r in rows for kl in r["kl_forward"])
    assert a["aligned_positions"] == positions and 0 < a["compared"] <= 1
    assert all(0 < x <= 1 for x in a["common_mass"].values()) and a["student_tokens_per_span"] >= 1
    students = [r for r in rows if r["sampled_by"] == "student"]
    for d in ("forward", "reverse"):
        kls = [kl for r in students for kl in r[f"kl_{d}"] if kl is not None]
        mean = diagnosis["grid"][d]["student"]["per_token"]["mean"]
        assert mean == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert "exact_tokens" not in diagnosis["sequence"]["forward"]
    for r in rows:
        body = [i for i, p in enumerate(r["pieces"]) if p != "<stop>"]
        for side in ("student", "teacher"):
            assert all(
                "".join(r[f"{side}_pieces"][i]).strip() == r["pieces"][i].strip()
                or "\ufffd" in r["pieces"][i]
                for i in body
            )


def test_the_report_says_what_two_tokenizers_leave(talkers, tmp_path):
    run(talkers, tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    assert (
        "Two tokenizers. Log-probabilities are those of" in report
        and "longest tokens" in report
        and "None" not in report
    )
    page = (tmp_path / "run" / "heatmap.html").read_text()
    assert 'class="text forward spans"' in page and "teacher: " in page


def test_with_one_vocabulary_both_measurements_agree(talkers, tmp_path):
    """Every token is a span, every span an aligned position; control ids are one class, so that a
    KL may only fall, by what they differ in.
    """
    same = run(talkers, tmp_path / "same", teacher="teacher")
    with mock.patch.object(phase, "same_vocabulary", lambda *chats: False):
        forced = run(talkers, tmp_path / "forced", teacher="teacher")
    a, b = same[1], forced[1]
    assert b["cross_tokenizer"]["compared"] == 1.0 and a["cross_tokenizer"] is None
    aligned = sum(t["texts"] for t in b["texts"].values())
    assert aligned + b["cross_tokenizer"]["unaligned"] == 28
    assert sum(t["texts"] for t in a["texts"].values()) == 28
    texts = {tuple(r["ids"]): r for r in same[2] if r["sampled_by"] == "student"}
    # texts whose sampled ids are the canonical ones, so that the teacher reads the same
    canonical = [
        r
        for r in forced[2]
        if r["sampled_by"] == "student" and r["ids"][: len(r["teacher_ids"])] == r["teacher_ids"]
    ]
    assert len(canonical) >= 4
    for r in canonical:
        other, n = texts[tuple(r["ids"])], len(r["pieces"]) - 1
        assert r["student_logp"][:n] == pytest.approx(other["student_logp"][:n], abs=1e-4)
        assert r["teacher_logp"][:n] == pytest.approx(other["teacher_logp"][:n], abs=1e-4)
        for d in ("kl_forward", "kl_reverse"):
            assert all(x <= y + 1e-5 for x, y in zip(r[d], other[d]))
            assert r[d] == pytest.approx(other[d], rel=0.2, abs=0.02)


@pytest.fixture(scope="module")
def plain(talkers, tmp_path_factory):
    """policy and teacher whose only control token is the stop: all other ids are text, so every
    class is one id.
    """
    out = tmp_path_factory.mktemp("plain")
    for name in ("policy", "teacher"):
        shutil.copytree(talkers / name, out / name)
        file, settings = out / name / "tokenizer.json", out / name / "tokenizer_config.json"
        tokenizer = json.loads(file.read_text())
        for token in tokenizer["added_tokens"]:
            token["special"] = token["content"] == "<|eos|>"
        file.write_text(json.dumps(tokenizer))
        table = json.loads(settings.read_text())
        for key in ("pad_token", "bos_token", "add_bos_token"):
            table.pop(key, None)
        settings.write_text(json.dumps(table))
    return out


def same_numbers(a, b, path=""):
    if isinstance(b, dict):
        assert a.keys() == b.keys(), path
        for key in b:
            same_numbers(a[key], b[key], f"{path}.{key}")
    elif isinstance(b, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same_numbers(x, y, f"{path}[{i}]")
    elif isinstance(b, float):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5, nan_ok=True), path
    else:
        assert a == b, path


def stats_of(folder, plain, same):
    """The token stats of a run, measured token by token or as if across tokenizers."""
    seen = []

    def keep(folder, cfg, diagnosis, stats, chats):
        seen.extend(stats)

    with (
        mock.patch.object(phase, "write_diagnosis", keep),
        mock.patch.object(phase, "same_vocabulary", lambda *chats: same),
    ):
        over = {"teacher": {"path": str(plain / "teacher"), "dtype": "float32"}}
        run_here(config(plain, folder, "diagnose", **OVER | over))
    return {(s.sampled_by, s.prompt, s.rollout.ids): s for s in seen}


def test_where_every_class_is_one_id_both_measurements_agree_to_the_last_digit(plain, tmp_path):
    """KLs to 1e-9; importance weights, preference and confidence follow. Texts whose sampled ids an
    encoder would give, too.
    """
    by_token, by_span = (stats_of(tmp_path / str(same), plain, same) for same in (True, False))
    keys = [
        k
        for k, s in by_span.items()
        if k in by_token and s.rollout.content_ids == s.alignment.teacher_ids
    ]
    assert len(keys) >= 10 and {k[0] for k in keys} == {"dataset", "teacher", "student"}
    for s, x in ((by_span[k], by_token[k]) for k in keys):
        assert s.positions == len(x.student_logp_n) == s.tokens and s.n_bytes == x.n_bytes
        assert s.type_n.tolist() == x.type_n.tolist()
        assert s.position_start_n.tolist() == x.start_n.tolist()
        for d in ("forward", "reverse"):
            assert s.kl[d] == pytest.approx(x.kl[d], abs=1e-9)
            for name in ("raw_K", "bucket_K", "gradient_tail_K"):
                got, want = getattr(s.curves[d], name), getattr(x.curves[d], name)
                assert got == pytest.approx(want, abs=1e-8), name
        assert s.overlap_n == pytest.approx(x.overlap_n)
        assert s.teachable_n == pytest.approx(x.teachable_n, abs=1e-9)
        assert s.student_logp_n == pytest.approx(x.student_logp_n, abs=1e-5)
        assert s.teacher_logp_n == pytest.approx(x.teacher_logp_n, abs=1e-5)
    other, one = (diagnose_token_stats([stats[k] for k in keys]) for stats in (by_span, by_token))
    assert other.cross_tokenizer.compared == other.cross_tokenizer.compared_bytes == 1.0
    other, one = to_json(measured(other)), to_json(measured(one))
    for part in ("grid", "gap"):
        same_numbers(other[part], one[part], part)
    for key in ("decile", "effective_samples", "prefix_ratio", "drift"):
        same_numbers(other["off_policy"][key], one["off_policy"][key], key)
    same_numbers(other["symptoms"]["confidence"], one["symptoms"]["confidence"])


def test_unaligned_texts_still_have_symptoms_and_are_counted(cross):
    """Broken text is what does not align: without it the fraction of broken texts would be 0 by
    selection.
    """
    broken = Rollout(Prompt(0, ()), (1,), (7, 7, 7, 7, 7, 7), (0.0,) * 6, 0.0, "\ufffd", False)
    unaligned = [
        unaligned_stats(GradedText(broken, "student", Grade(0.0, False))),
        unaligned_stats(GradedText(broken, "teacher", Grade(0.0, None))),
    ]
    with pytest.raises(ValueError, match="none of 2 texts could be aligned"):
        diagnose_token_stats([], unaligned=unaligned)
    stats = [token_stats(0, "student", correct=True)]
    diagnosis = diagnose_token_stats(stats, unaligned=unaligned)
    symptoms = diagnosis.symptoms
    assert symptoms.broken_text == symptoms.truncated == 0.5 and symptoms.repeated_4grams > 0
    assert symptoms.confidence.accuracy == 1.0 and diagnosis.texts["student"].texts == 1
    counts = cross[1]["cross_tokenizer"]
    assert counts["unaligned"] == sum(counts["unaligned_by"].values())


def test_coverage_and_bits_by_the_rows(talkers, cross):
    """Bytes from the student's own tokens, span by span."""
    _, diagnosis, rows = cross
    lens = Chat(str(talkers / "policy")).table.lens
    sums = {"bytes": 0, "compared": 0, "dataset": 0, "gap": 0.0}
    for r in rows:
        stop = r["pieces"][-1] == "<stop>"
        inside = r["ids"][: len(r["student_span"])]
        bytes_S = np.bincount(r["student_span"], lens[inside], len(r["pieces"]))
        sums["bytes"] += bytes_S.sum()
        sums["compared"] += bytes_S[[kl is not None for kl in r["kl_forward"]]].sum()
        if r["sampled_by"] == "dataset":
            n = len(r["pieces"]) - stop
            sums["dataset"] += bytes_S.sum()
            sums["gap"] += (sum(r["teacher_logp"][:n]) - sum(r["student_logp"][:n])) / np.log(2)
    got = diagnosis["cross_tokenizer"]
    assert got["compared_bytes"] == pytest.approx(sums["compared"] / sums["bytes"])
    gap = got["bits_per_byte_gap"]["dataset"]["mean"]
    assert gap == pytest.approx(sums["gap"] / sums["dataset"], rel=1e-4)


def test_two_ranks_find_what_one_finds(talkers, cross, tmp_path):
    _, one, rows = cross
    _, two, others = run(talkers, tmp_path / "two", start=run_ranks)
    assert sorted(r["text"] for r in rows) == sorted(r["text"] for r in others)
    assert one["cross_tokenizer"]["unaligned"] == two["cross_tokenizer"]["unaligned"]
    for d in ("forward", "reverse"):
        for source, kl in one["grid"][d].items():
            got = two["grid"][d][source]["per_byte"]["mean"]
            assert got == pytest.approx(kl["per_byte"]["mean"], rel=1e-4)


def test_classes_have_the_type_of_their_shortest_token(talkers):
    student, teacher = Chat(str(talkers / "policy")), Chat(str(talkers / "proxy"))
    pair = pair_of(student, teacher, (student.vocab_size, teacher.vocab_size), torch.device("cpu"))
    index, of_class = pair.partition.student, {}
    class_of = dict(zip(index.id_M.tolist(), index.class_M.tolist()))
    for i, c in class_of.items():
        if student.table.kind[i] == 0 and i not in student.stop_ids:
            token = len(student.table.pieces[i]), pair.student_type_V[i]
            of_class.setdefault(c, []).append(token)
    assert len(of_class) > 100
    for c, tokens in of_class.items():
        shortest = min(tokens)[0]
        assert int(pair.class_type_C[c]) in {t for n, t in tokens if n == shortest}
    assert TYPES[int(pair.class_type_C[class_of[student.stop_id]])] == "stop"
