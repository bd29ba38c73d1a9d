"""Diagnosis of two tokenizers: by transformers and by hand on one text, by the one-vocabulary path
where there is one, and as a page.
"""

import json
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import config, run_here, run_ranks
from transformers import AutoModelForCausalLM

from reflux.tokenalign.class_losses import partition_index
from reflux.tokenalign.vocab_map import Partition
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.graders import Grade
from reflux.trainer.diagnosis import phase as diagnose
from reflux.trainer.diagnosis.heatmap import heat_page
from reflux.trainer.diagnosis.measure_cross_tokenizer import _unread, pair_of
from reflux.trainer.diagnosis.metrics import kl_profile, top_overlap
from reflux.trainer.diagnosis.summary import diagnose_readings, verdict
from reflux.trainer.diagnosis.token_classes import TYPES
from reflux.trainer.losses import HeadInputs

pytestmark = [pytest.mark.usefixtures("titan_process"), pytest.mark.filterwarnings("ignore")]
OVER = {
    "task": {"name": "runs:is_even"},
    "data": {"limit": 4},
    "rollout": {"max_tokens": 12},
    "diagnose": {
        "prefixes": ["dataset", "teacher", "student"],
        "student_texts": 4,
        "heat": 3,
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
def across(talkers, tmp_path_factory, titan_process):
    return run(talkers, tmp_path_factory.mktemp("across") / "run")


def outputs(g, T, V, D=5):
    return HeadInputs(
        torch.randn(T, D, generator=g, dtype=torch.float64),
        torch.randn(V, D, generator=g, dtype=torch.float64),
        None,
        V,
    )


@given(st.integers(0, 10_000), st.integers(0, 5), st.sampled_from(["forward", "reverse"]))
def test_classes_of_one_id_each_are_the_vocabulary(seed, T, mode):
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
            vars(kl_profile(student, teacher, mode, type_V, len(TYPES), partition=p)).values()
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
    known = {
        p
        for p, i in zip(other.table.pieces, range(other.vocab_size))
        if p and i not in other.stop_ids and other.table.kind[i] == 0
    }
    mine = {
        p
        for p, i in zip(chat.table.pieces, range(chat.vocab_size))
        if p and i not in chat.stop_ids and chat.table.kind[i] == 0
    }
    found: dict[bytes, float] = {}
    for i, p in enumerate(logits_V[: chat.vocab_size].double().softmax(0).tolist()):
        piece = chat.table.pieces[i] if chat.table.kind[i] == 0 and i not in chat.stop_ids else b""
        key = next(
            (
                piece[:n]
                for n in range(len(piece), 0, -1)
                if piece[:n] in known and piece[:n] in mine
            ),
            piece[:1],
        )
        found[key] = found.get(key, 0.0) + p
    return found


@pytest.mark.parametrize("writer", ["student", "teacher", "dataset"])
def test_one_text_by_transformers(talkers, across, writer):
    """Span log-probabilities, and both KLs at every place, from the two models' logits and the
    definition of the classes.
    """
    chats = {"student": Chat(str(talkers / "policy")), "teacher": Chat(str(talkers / "proxy"))}
    row = next(
        r
        for r in across[2]
        if r["writer"] == writer and len(r["pieces"]) > 2 and r["pieces"][-1] == "<stop>"
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


def test_the_files_agree_with_each_other(talkers, across):
    _, found, rows = across
    a = found["across"]
    assert a["spans"] == sum(len(r["pieces"]) for r in rows) and a["unaligned"] + len(rows) == 4 * (
        1 + 2 + 4
    )
    assert (
        a["places"] == sum(kl is not None for r in rows for kl in r["kl_forward"])
        and 0 < a["compared"] <= 1
    )
    assert all(0 < x <= 1 for x in a["common_mass"].values()) and a["student_tokens_per_span"] >= 1
    for d in ("forward", "reverse"):
        total = sum(
            kl for r in rows if r["writer"] == "student" for kl in r[f"kl_{d}"] if kl is not None
        )
        places = sum(
            kl is not None for r in rows if r["writer"] == "student" for kl in r[f"kl_{d}"]
        )
        assert found["grid"][d]["student"]["per_token"]["mean"] == pytest.approx(
            total / places, rel=1e-4
        )
    assert "exact_tokens" not in found["sequence"]["forward"]
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
    page = (tmp_path / "run" / "heat.html").read_text()
    assert 'class="text forward spans"' in page and "teacher: " in page


def test_with_one_vocabulary_both_ways_of_looking_agree(talkers, tmp_path):
    """Every token is a span, every span a place; control ids are one class, so that a KL may only
    fall, by what they are apart.
    """
    same = run(talkers, tmp_path / "same", teacher="teacher")
    with mock.patch.object(diagnose, "same_vocabulary", lambda *chats: False):
        forced = run(talkers, tmp_path / "forced", teacher="teacher")
    a, b = same[1], forced[1]
    assert b["across"]["compared"] == 1.0 and a["across"] is None
    assert (
        sum(t["texts"] for t in b["texts"].values()) + b["across"]["unaligned"]
        == 28
        == sum(t["texts"] for t in a["texts"].values())
    )
    texts = {tuple(r["ids"]): r for r in same[2] if r["writer"] == "student"}
    checked = 0
    for r in (
        r
        for r in forced[2]
        if r["writer"] == "student" and r["ids"][: len(r["teacher_ids"])] == r["teacher_ids"]
    ):
        # a text whose sampled ids are the canonical ones, so that the teacher reads the same
        other = texts[tuple(r["ids"])]
        n = len(r["pieces"]) - 1
        assert r["student_logp"][:n] == pytest.approx(other["student_logp"][:n], abs=1e-4)
        assert r["teacher_logp"][:n] == pytest.approx(other["teacher_logp"][:n], abs=1e-4)
        for d in ("kl_forward", "kl_reverse"):
            assert all(x <= y + 1e-5 for x, y in zip(r[d], other[d])) and r[d] == pytest.approx(
                other[d], rel=0.2, abs=0.02
            )
        checked += 1
    assert checked >= 4


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
        kept = {
            k: v
            for k, v in json.loads(settings.read_text()).items()
            if k not in ("pad_token", "bos_token", "add_bos_token")
        }
        settings.write_text(json.dumps(kept))
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


def test_where_every_class_is_one_id_the_two_ways_agree_to_the_last_digit(plain, tmp_path):
    """KLs to 1e-9; importance weights, preference and confidence follow. Texts whose sampled ids an
    encoder would give, too.
    """
    seen = []
    for same in (True, False):
        with (
            mock.patch.object(
                diagnose,
                "write_diagnosis",
                lambda folder, cfg, found, readings, chats: seen.append(readings),
            ),
            mock.patch.object(diagnose, "same_vocabulary", lambda *chats, same=same: same),
        ):
            over = {"teacher": {"path": str(plain / "teacher"), "dtype": "float32"}}
            run_here(config(plain, tmp_path / str(same), "diagnose", **OVER | over))
    by_token, across = (
        {(r.writer, r.rollout.prompt.index, r.rollout.ids): r for r in rows} for rows in seen
    )
    keys = [
        k
        for k, r in across.items()
        if k in by_token and r.rollout.content_ids == r.across.teacher_ids
    ]
    assert len(keys) >= 10 and {k[0] for k in keys} == {"dataset", "teacher", "student"}
    for r, x in ((across[k], by_token[k]) for k in keys):
        assert r.states == len(x.student_n) == r.tokens and r.type_n.tolist() == x.type_n.tolist()
        assert r.state_start_n.tolist() == x.start_n.tolist() and r.n_bytes == x.n_bytes
        for d in ("forward", "reverse"):
            assert r.kl[d] == pytest.approx(x.kl[d], abs=1e-9)
            for name in ("raw_K", "bucket_K", "gradient_tail_K"):
                assert getattr(r.curves[d], name) == pytest.approx(
                    getattr(x.curves[d], name), abs=1e-8
                ), name
        assert r.overlap_n == pytest.approx(x.overlap_n) and r.teachable_n == pytest.approx(
            x.teachable_n, abs=1e-9
        )
        assert r.student_n == pytest.approx(x.student_n, abs=1e-5) and r.teacher_n == pytest.approx(
            x.teacher_n, abs=1e-5
        )
    other, one = (diagnose_readings([rows[k] for k in keys]) for rows in (across, by_token))
    assert other["across"]["compared"] == other["across"]["compared_bytes"] == 1.0
    for part in ("grid", "gap"):
        same_numbers(other[part], one[part], part)
    same_numbers(
        {
            k: other["off_policy"][k]
            for k in ("decile", "effective_samples", "prefix_ratio", "drift")
        },
        {k: one["off_policy"][k] for k in ("decile", "effective_samples", "prefix_ratio", "drift")},
    )
    same_numbers(other["symptoms"]["confidence"], one["symptoms"]["confidence"])


def test_texts_that_do_not_align_still_have_symptoms_and_are_counted(across):
    """Broken text is what does not align: without it the share of broken texts would be 0 by
    selection.
    """
    broken = Rollout(Prompt(0, ()), (1,), (7, 7, 7, 7, 7, 7), (0.0,) * 6, 0.0, "\ufffd", False)
    unread = [
        _unread((broken, "student", Grade(0.0, False))),
        _unread((broken, "teacher", Grade(0.0, None))),
    ]
    with pytest.raises(ValueError, match="none of 2 texts could be aligned"):
        diagnose_readings([], unread=unread)
    from token_stats_cases import reading  # the same numbers as there

    found = diagnose_readings([reading(0, "student", right=True)], unread=unread)
    assert (
        found["symptoms"]["broken_text"] == found["symptoms"]["truncated"] == 0.5
        and found["symptoms"]["repeated_4grams"] > 0
    )
    assert (
        found["symptoms"]["confidence"]["accuracy"] == 1.0
        and found["texts"]["student"]["texts"] == 1
    )
    assert across[1]["across"]["unaligned"] == sum(across[1]["across"]["unaligned_by"].values())


def test_what_two_tokenizers_are_told_to_do_is_a_config_that_exists(across):
    """Token KL is refused between vocabularies, and a truncated teacher for `prefix`."""
    found = across[1] | {
        "tail": {
            d: {**t, "tail_noise_index": {"mean": 2.0, "std": 0.1, "low": 1.5, "high": 2.5, "n": 4}}
            for d, t in across[1]["tail"].items()
        }
    }
    found["across"] = found["across"] | {"common_mass": {"student": 1.0, "teacher": 0.99}}
    advice = verdict(found)[0]["advice"]
    options = dict(re.findall(r"(\w+) = '(\w+)'", advice))
    assert options == {"objective": "class", "partition": "common", "tail": "bucket"}
    assert (
        DistillSection(**options, top_k=int(re.search(r"top_k = (\d+)", advice)[1])).objective
        == "class"
    )
    found["across"]["common_mass"]["teacher"] = 0.6
    advice = verdict(found)[0]["advice"]
    assert (
        advice.startswith("all classes (distill.objective = 'class', classes = 'prefix')")
        and "only 60.0% of the teacher's mass" in advice
    )


def test_coverage_and_bits_by_the_rows(talkers, across):
    """Bytes from the student's own tokens, span by span."""
    _, found, rows = across
    lens, sums = (
        Chat(str(talkers / "policy")).table.lens,
        {"bytes": 0, "compared": 0, "dataset": 0, "gap": 0.0},
    )
    for r in rows:
        stop = r["pieces"][-1] == "<stop>"
        inside = r["ids"][: len(r["student_span"])]
        bytes_S = np.bincount(r["student_span"], lens[inside], len(r["pieces"]))
        sums["bytes"] += bytes_S.sum()
        sums["compared"] += bytes_S[[kl is not None for kl in r["kl_forward"]]].sum()
        if r["writer"] == "dataset":
            n = len(r["pieces"]) - stop
            sums["dataset"] += bytes_S.sum()
            sums["gap"] += (sum(r["teacher_logp"][:n]) - sum(r["student_logp"][:n])) / np.log(2)
    assert found["across"]["compared_bytes"] == pytest.approx(sums["compared"] / sums["bytes"])
    assert found["across"]["bits_per_byte_gap"]["dataset"]["mean"] == pytest.approx(
        sums["gap"] / sums["dataset"], rel=1e-4
    )


def test_two_ranks_find_what_one_finds(talkers, across, tmp_path):
    _, one, rows = across
    _, two, others = run(talkers, tmp_path / "two", start=run_ranks)
    assert (
        sorted(r["text"] for r in rows) == sorted(r["text"] for r in others)
        and one["across"]["unaligned"] == two["across"]["unaligned"]
    )
    for d in ("forward", "reverse"):
        for w, cell in one["grid"][d].items():
            assert two["grid"][d][w]["per_byte"]["mean"] == pytest.approx(
                cell["per_byte"]["mean"], rel=1e-4
            )


def test_classes_have_the_type_of_their_shortest_token(talkers):
    student, teacher = Chat(str(talkers / "policy")), Chat(str(talkers / "proxy"))
    pair = pair_of(student, teacher, (student.vocab_size, teacher.vocab_size), torch.device("cpu"))
    of_class = {}
    for i, c in zip(pair.partition.student.id_M.tolist(), pair.partition.student.class_M.tolist()):
        if student.table.kind[i] == 0 and i not in student.stop_ids:
            of_class.setdefault(c, []).append(
                (len(student.table.pieces[i]), pair.student_type_V[i])
            )
    assert len(of_class) > 100
    for c, found in of_class.items():
        shortest = min(found)[0]
        assert int(pair.class_type_N[c]) in {t for n, t in found if n == shortest}
    assert (
        TYPES[
            int(
                pair.class_type_N[
                    pair.partition.student.class_M[
                        list(pair.partition.student.id_M).index(student.stop_id)
                    ]
                ]
            )
        ]
        == "stop"
    )


def test_a_page_of_spans_shows_both_sides_tokens():
    row = {
        "prompt": 0,
        "writer": "student",
        "right": None,
        "pieces": ["the", " cat", "<stop>"],
        "ids": [1, 2, 3, 9],
        "teacher_ids": [5, 6],
        "student_pieces": [["the"], [" c", "at"], ["</s>"]],
        "teacher_pieces": [["the"], [" cat"], ["<end>"]],
        "kl_forward": [0.5, None, 0.1],
        "kl_reverse": [0.2, None, 0.3],
        "student_logp": [-1, -2, -3],
        "teacher_logp": [-4, -5, -6],
    }
    page = heat_page([row], "t")
    assert page.count('class="text forward spans"') == 1 and page.count('class="apart"') == 2
    assert (
        "student: &#x27; c&#x27; | &#x27;at&#x27;\nteacher: &#x27; cat&#x27;\ndistributions not "
        "compared here\nlog p: student -2.000" in page
    )
    assert "KL forward 0.5000, reverse 0.2000" in page
