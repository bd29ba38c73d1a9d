"""A teacher's rows on disk, and a student that learns from them: the same as from the teacher."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distillation_cases import GIVEN
from runs import config, run_here, run_ranks
from transformers import AutoModelForCausalLM

from reflux.trainer.data.batch import Prompt, Rollout, TopKRows
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.distillation import cache_phase
from reflux.trainer.distillation.teacher_cache import (
    CachedText,
    Description,
    Shard,
    TeacherCache,
    check_same,
    read_description,
    template_fingerprint,
    tokenizer_fingerprint,
    write_description,
    write_rows,
)
from reflux.trainer.rollouts.generate import given_rollout

pytestmark = pytest.mark.usefixtures("titan_process")
ROLLOUT = {"prompts": 4, "group": 2, "max_tokens": 12}
KEYS = ("loss", "grad_norm")


def write_cache(talkers, folder: Path, teacher="teacher", rollout=ROLLOUT, over=None, **cache):
    cfg = config(
        talkers,
        folder,
        "cache",
        model={"path": str(talkers / teacher)},
        rollout=rollout,
        cache={"shard": 10, "logp": "float32", "top_k": 9} | cache,
        **(over or {}),
    )
    run = run_here(cfg)
    return folder / "cache", run


def learn(talkers, folder: Path, cache: Path | None, **over):
    teacher = {"path": str(talkers / "teacher")}
    if cache is not None:
        teacher |= {"source": "cache", "cache": str(cache)}
    over = {"rollout": ROLLOUT, "teacher": teacher} | over
    return run_here(config(talkers, folder, "distill", steps=3, **over))


@pytest.mark.parametrize("tail", ["bucket", "sampled"])
def test_a_cached_row_is_what_the_teacher_says_of_the_text(talkers, tmp_path, tail):
    folder, run = write_cache(
        talkers, tmp_path / "cache", texts="dataset", tail=tail, temperature=1.3
    )
    cache = TeacherCache(str(folder))
    chat, model = (
        Chat(str(talkers / "teacher")),
        AutoModelForCausalLM.from_pretrained(talkers / "teacher"),
    )
    fractions, wanted = np.zeros(0), np.zeros(0)
    for prompt in load_prompts(str(tmp_path / "data.jsonl")):
        rollout = given_rollout(chat, prompt, 12)
        rows = cache.rows_of(rollout)
        with torch.no_grad():
            logits = model(torch.tensor([rollout.prompt_ids + rollout.ids])).logits[0]
        first = len(rollout.prompt_ids) - 1
        logp_nV = (logits[first:-1].double() / 1.3).log_softmax(-1)
        if tail == "bucket":
            top = logp_nV.topk(9, -1).values
            own = logp_nV.gather(1, torch.from_numpy(rows.ids))
            np.testing.assert_allclose(rows.logp, own.numpy(), atol=2e-5)
            np.testing.assert_allclose(rows.logp, top.numpy(), atol=2e-5)
            rest = torch.log1p(-top.exp().sum(-1))
            np.testing.assert_allclose(rows.tail, rest.numpy(), atol=2e-3)
        else:  # nine draws a position: fractions are those of the distribution
            p = np.take_along_axis(logp_nV.exp().numpy(), rows.ids.clip(0), 1)
            best = logp_nV.argmax(-1).numpy()
            hit = np.where(rows.ids == best[:, None], np.exp(rows.logp), 0).sum(1)
            fractions, wanted = np.append(fractions, hit), np.append(wanted, logp_nV.exp().amax(1))
            assert (p[rows.ids >= 0] > 0).all()
            np.testing.assert_allclose(np.exp(rows.logp.astype(float)).sum(1), 1, atol=1e-6)
    if tail == "sampled":
        spread = np.sqrt((wanted * (1 - wanted) / 9).sum()) / len(wanted)
        assert abs(fractions.mean() - wanted.mean()) < 4 * spread
    events = [e for e in run.events if "cache/texts" in e]
    assert events and events[0]["cache/texts"] == 24


@pytest.mark.parametrize(
    "options",
    [
        GIVEN | {"divergence": "forward", "tail": "bucket", "top_k": 9},
        GIVEN | {"divergence": "reverse", "tail": "bucket", "top_k": 5},
        GIVEN | {"divergence": "forward", "tail": "renorm", "top_k": 5, "temperature": 1.0},
    ],
    ids=str,
)
def test_learning_from_given_texts_is_learning_from_the_teacher(talkers, tmp_path, options):
    folder, _ = write_cache(talkers, tmp_path / "cache", texts="dataset")
    local = learn(talkers, tmp_path / "local", None, distill=options)
    cached = learn(talkers, tmp_path / "cached", folder, distill=options)
    for a, b in zip(local.steps, cached.steps, strict=True):
        for key in KEYS:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_learning_from_its_own_texts_is_learning_from_a_query_budget(talkers, tmp_path):
    """Sampled once each, for the KL and for likelihoods alone."""
    folder, _ = write_cache(talkers, tmp_path / "cache", texts="teacher")
    kl = {"on_policy": 0.0, "divergence": "forward", "tail": "bucket", "top_k": 9}
    for name, options in (("kl", kl), ("nll", {"objective": "nll", "on_policy": 0.0})):
        local = learn(
            talkers, tmp_path / f"local_{name}", None, distill=options | {"query_budget": 24}
        )
        cached = learn(talkers, tmp_path / f"cached_{name}", folder, distill=options)
        for a, b in zip(local.steps, cached.steps, strict=True):
            for key in KEYS:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), (name, key)


def test_a_student_of_other_tokens_learns_bytes_from_a_cache(talkers, tmp_path):
    """All ids kept: the numbers of the teacher itself; a few: positions are left out."""
    size = Chat(str(talkers / "proxy")).vocab_size
    options = {"objective": "byte", "on_policy": 0.0, "max_missing": 1.0}
    teacher = {"path": str(talkers / "proxy")}
    local = learn(
        talkers, tmp_path / "local", None, teacher=teacher, distill=options | {"query_budget": 24}
    )
    runs = []
    for k in (size, 4):
        folder, _ = write_cache(talkers, tmp_path / f"c{k}", "proxy", texts="teacher", top_k=k)
        kept = teacher | {"source": "cache", "cache": str(folder)}
        runs.append(learn(talkers, tmp_path / f"cached{k}", None, teacher=kept, distill=options))
    for a, b in zip(local.steps, runs[0].steps, strict=True):
        for key in (*KEYS, "missing/teacher", "byte_positions"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    assert runs[1].steps[0]["missing/teacher"] > 1.5 * runs[0].steps[0]["missing/teacher"]


def test_rounded_log_probabilities_cost_what_cache_json_says(talkers, tmp_path):
    """The forward KL moves by at most the error, for every stored log-probability does."""
    options = GIVEN | {"divergence": "forward", "tail": "bucket", "top_k": 9}
    local = learn(talkers, tmp_path / "local", None, distill=options).steps[0]["loss"]
    sizes = {}
    for kind in ("float32", "float16", "uint8"):
        folder, _ = write_cache(talkers, tmp_path / kind, texts="dataset", logp=kind)
        error = read_description(folder).error
        got = learn(talkers, tmp_path / f"run_{kind}", folder, distill=options).steps[0]["loss"]
        assert abs(got - local) <= 3 * error + 2e-5
        sizes[kind] = sum(p.stat().st_size for p in folder.glob("*.arrow"))
        assert (error < 1e-5) == (kind == "float32") and error < 0.1
    assert sizes["float32"] > sizes["float16"] > sizes["uint8"]


def test_an_interrupted_cache_goes_on_with_the_next_shard(talkers, tmp_path, monkeypatch):
    whole, _ = write_cache(talkers, tmp_path / "whole")
    written, real = [], cache_phase.write_rows

    def fail(path, texts, layout):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return real(path, texts, layout)

    monkeypatch.setattr(cache_phase, "write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        write_cache(talkers, tmp_path / "cut")
    folder = tmp_path / "cut" / "cache"
    assert not read_description(folder).complete and len(read_description(folder).shards) == 2
    with pytest.raises(ValueError, match="is not complete: 40 texts so far"):
        TeacherCache(str(folder))
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.arrow")}
    monkeypatch.setattr(cache_phase, "write_rows", real)
    write_cache(talkers, tmp_path / "cut", over={"on_existing_run": "resume"})
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("*.arrow") if p.name in before} == (
        before
    )
    a, b = (json.loads((f / "cache.json").read_text()) for f in (whole, folder))
    assert a["shards"] == b["shards"] and b["complete"]


def test_two_ranks_write_what_one_does(talkers, tmp_path):
    over = {"rollout": ROLLOUT, "model": {"path": str(talkers / "teacher")}}
    over["cache"] = {"shard": 10, "top_k": 9, "tail": "sampled"}
    run_here(config(talkers, tmp_path / "one", "cache", **over))
    run_ranks(config(talkers, tmp_path / "two", "cache", **over))
    one, two = (TeacherCache(str(tmp_path / name / "cache")) for name in ("one", "two"))
    assert sorted(two.description.shards[0].files) == [
        "rows-00000-000.arrow",
        "rows-00000-001.arrow",
    ]
    for prompt in load_prompts(str(tmp_path / "data.jsonl")):
        for a, b in zip(one.texts(prompt), two.texts(prompt), strict=True):
            assert a.ids == b.ids
            x, y = one.rows_of(a), two.rows_of(b)
            assert (x.ids == y.ids).all() and (x.logp == y.logp).all()


def test_datasets_reads_it(talkers, tmp_path):
    import datasets

    folder, _ = write_cache(talkers, tmp_path / "cache")
    rows = datasets.load_dataset(
        "arrow", data_files=str(folder / "rows-*.arrow"), cache_dir=str(tmp_path / "hf")
    )["train"]
    assert len(rows) == 48 and rows[0]["text"] and len(rows[0]["ids"]) == len(rows[0]["logp"])


def test_what_does_not_fit_is_said(talkers, tmp_path):
    given, _ = write_cache(talkers, tmp_path / "given", texts="dataset")
    options = GIVEN | {"divergence": "forward", "tail": "bucket", "top_k": 9}
    alone = tmp_path / "alone"  # no weights beside it
    shutil.copytree(given, alone)
    assert learn(
        talkers,
        tmp_path / "stand_in",
        alone,
        distill=options,
        teacher={"path": str(alone), "source": "cache", "cache": str(alone)},
    ).steps

    def refused(name, says, cache=given, **over):
        with pytest.raises(ValueError, match=says):
            learn(talkers, tmp_path / name, cache, **({"distill": options} | over))

    def of(path):
        return {"path": str(path), "source": "cache", "cache": str(given)}

    other = tmp_path / "other"
    shutil.copytree(talkers / "teacher", other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    refused("a", "not the teacher of this cache.*model.safetensors differs", teacher=of(other))
    settings = other / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("assistant: ", "helper: "))
    refused("b", "its chat template, template_arguments or stop set differs", teacher=of(other))
    by_bytes = GIVEN | {"objective": "byte"}
    refused("c", "its tokenizer differs", teacher=of(talkers / "proxy"), distill=by_bytes)
    refused("ids", "have different vocabularies", teacher=of(talkers / "proxy"))
    refused("d", "distill.temperature = 2.0, but the cache", distill=options | {"temperature": 2.0})
    refused("e", "distill.top_k = 10, but the cache", distill=options | {"top_k": 10})
    refused("f", "want the same kind", distill=options | {"tail": "sampled"})
    refused("g", "on_policy = 1.0, .*no response of the data", distill=options | {"on_policy": 1.0})
    refused("h", "holds no texts of the teacher", distill=options | {"source": "teacher"})
    refused("i", "no cache.json there", cache=tmp_path)
    rows = [{"prompt": "Something else?", "response": "No."}] * 4
    data = tmp_path / "else.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused("j", "no row for the text of prompt 0", data={"source": str(data)})
    torn = given / "cache.json"
    torn.write_text(torn.read_text()[:40])
    refused("k", "no description of a cache")


def test_a_teacher_that_thinks_is_not_the_one_that_wrote_the_cache(talkers):
    """Arguments change the prompts that the rows stand behind. Without, old caches stay good."""
    path = str(talkers / "teacher")
    plain, thinks = Chat(path), Chat(path, arguments={"enable_thinking": True})
    old = json.dumps([plain.tokenizer.chat_template or "", list(plain.stop_ids)])
    assert template_fingerprint(plain) == hashlib.sha256(old.encode()).hexdigest()
    assert template_fingerprint(thinks) != template_fingerprint(plain)
    written = Description(
        teacher={"path": path, "files": {}},
        tokenizer=tokenizer_fingerprint(plain),
        template=template_fingerprint(plain),
        vocab_size=plain.vocab_size,
        tail="bucket",
        top_k=4,
        temperature=1.0,
        logp="float16",
        texts={"made_by": "dataset"},
    )
    check_same(written, plain, {}, path)
    with pytest.raises(ValueError, match="template_arguments or stop set differs"):
        check_same(written, thinks, {}, path)


def test_two_rows_of_the_same_messages_keep_their_own_texts(tmp_path):
    """Row 5 asks what row 2 asks; each has a group of two texts."""

    def asked(index):
        return Prompt(index, ({"role": "user", "content": "Why?"},))

    rows = TopKRows(np.array([[1]]), np.array([[-0.1]], np.float32), np.array([-2.4], np.float32))
    texts = [
        CachedText(Rollout(asked(i), (), (i,), (-0.5,), 0.0, f"{i}.{g}", False), rows, g)
        for g in (1, 0)
        for i in (5, 2)
    ]
    made = {"made_by": "teacher"}
    description = Description({}, "", "", 9, "bucket", 1, 1.0, "float32", made, complete=True)
    digest = write_rows(tmp_path / "rows-00000-000.arrow", texts, description.layout)
    shard = Shard(0, 6, {"rows-00000-000.arrow": digest}, 4, 4, 0.0)
    write_description(tmp_path, description.with_shard(shard))
    cache = TeacherCache(str(tmp_path))
    for row, own in {2: 2, 5: 5, 8: 2}.items():  # row 8 of another source of these messages
        assert [x.text for x in cache.texts(asked(row))] == [f"{own}.0", f"{own}.1"]
        assert {x.prompt.index for x in cache.texts(asked(row))} == {row}
    assert cache.texts(Prompt(2, ({"role": "user", "content": "How?"},))) == []
