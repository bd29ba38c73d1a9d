"""Prompts that are too long: refused before the first step, left out, or cut; never met later."""

import json
from pathlib import Path

import pytest
from assets import save_tokenizer, sentences, train_tokenizer
from thread_ranks import ThreadRank, on_ranks

from reflux.trainer.config.loader import deep_merge, fill
from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.fitted_prompts import training_listing
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.training_prompts import load_training_prompts

LONG = (3, 8)  # rows
SEQ_LEN, MAX_TOKENS = 60, 10


def make_folder(folder: Path, positions: int, size: int = 300) -> str:
    save_tokenizer(train_tokenizer(sentences(100), size), folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_folder(tmp_path_factory.mktemp("model"), 256)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLUX_CACHE", str(tmp_path / "cache"))


def write(tmp_path, rows=None) -> str:
    path = tmp_path / "data.jsonl"
    rows = rows or [
        {"prompt": f"q {i} " + "long word " * (20 if i in LONG else 1), "answer": str(i)}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_config(model, source, **over) -> Config:
    table = {
        "phase": "calibrate",
        "folder": "run",
        "model": {"path": model},
        "data": {"source": source},
        "task": {"name": "exact"},
        "rollout": {"max_tokens": MAX_TOKENS},
    }
    return fill(Config, deep_merge(table, over), "test")


def load(cfg, host=None):
    host = host or ThreadRank(seq_len=SEQ_LEN)
    return load_training_prompts(cfg, Chat(cfg.model.path), host)


def test_they_are_refused_with_their_rows_their_number_and_the_longest(model, tmp_path):
    source = write(tmp_path)
    chat = Chat(model)
    longest = max(len(chat.prompt_ids(p.messages)) for p in load_prompts(source))
    with pytest.raises(ValueError) as error:
        load(make_config(model, source))
    assert str(error.value) == (
        f"{source}, line 4; {source}, line 9: 2 of 12 prompts are too long for the policy. The "
        f"longest, {source}, line 4, has {longest} tokens, with 10 for rollout.max_tokens "
        f"{longest + 10}; want at most 61, training.seq_len + 1. Set training.seq_len >= "
        f"{longest + 9}, lower rollout.max_tokens, or set data.too_long = 'drop' or 'truncate_left'"
    )
    fits = load(make_config(model, source), ThreadRank(seq_len=longest + 9))
    assert len(fits) == 12 and fits.fit.fields == {} and fits.fit.longest == longest + 10
    with pytest.raises(ValueError):
        load(make_config(model, source), ThreadRank(seq_len=longest + 8))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_are_left_out_and_keep_their_numbers(model, tmp_path, world):
    source = write(tmp_path)
    cfg = make_config(model, source, data={"too_long": "drop"})
    for prompts in on_ranks(world, lambda rank: load(cfg, rank), seq_len=SEQ_LEN):
        left = [i for i in range(12) if i not in LONG]
        assert [p.index for p in prompts] == left == [p.answer and int(p.answer) for p in prompts]
        assert prompts.fit.fields["dropped"] == prompts.fit.too_long == 2
        assert prompts.fit.rows == 12 and prompts.fit.truncated == 0
        assert prompts.of_row(11).index == 11 and prompts[-1].index == 11 and len(prompts) == 10
        assert prompts.location(11).endswith("line 12")
        epoch = {p.index for step in range(5) for p in prompts.batch(step, 2, seed=1)}
        assert epoch == set(left)
        with pytest.raises(IndexError):
            prompts[10]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_beginning_is_cut_and_the_template_stays(model, tmp_path, world):
    source = write(tmp_path)
    cfg, chat = make_config(model, source, data={"too_long": "truncate_left"}), Chat(model)
    plain = load_prompts(source)
    for prompts in on_ranks(world, lambda rank: load(cfg, rank), seq_len=SEQ_LEN):
        assert len(prompts) == 12 and prompts.fit.truncated == prompts.fit.too_long == 2
        for before, after in zip(plain, prompts):
            assert (before.messages != after.messages) == (before.index in LONG)
            text, whole = after.messages[0]["content"], before.messages[0]["content"]
            assert whole.endswith(text) and len(text) >= 14
            ids = chat.prompt_ids(after.messages)
            assert len(ids) + MAX_TOKENS <= SEQ_LEN + 1
            assert chat.tokenizer.decode(ids).startswith("<|bos|>user: ")
            if before.index in LONG:
                assert len(ids) + MAX_TOKENS >= SEQ_LEN - 2, "no more than needed"


def test_what_cannot_be_cut_is_refused_and_the_cache_remembers_it(model, tmp_path, monkeypatch):
    talk = [{"role": "system", "content": "rule " * 60}, {"role": "user", "content": "q"}]
    source = write(
        tmp_path, [{"messages": talk, "answer": "1"}] + [{"messages": talk[1:], "answer": "1"}]
    )
    cfg = make_config(model, source, data={"too_long": "truncate_left"})
    inputs = {"data": {"files": {"data.jsonl": "ab"}}}
    errors = [
        str(e)
        for world in (1, 2)
        for e in on_ranks(world, lambda rank: load(cfg, rank), seq_len=SEQ_LEN, inputs=inputs)
    ]
    assert len(set(errors)) == 1 and "line 1: 1 prompts are too long without all" in errors[0]
    assert "Shorten their other messages" in errors[0]


def test_no_more_room_is_advised_than_the_model_has_positions(tmp_path):
    rows = [{"prompt": "long word " * 20, "answer": "1"}, {"prompt": "q", "answer": "1"}]
    cfg = make_config(make_folder(tmp_path / "short", 64), write(tmp_path, rows))
    with pytest.raises(ValueError, match="The model has no more than 64 positions: lower roll"):
        load(cfg)


def test_nothing_left_is_an_error(model, tmp_path):
    source = write(tmp_path, [{"prompt": "long word " * 20, "answer": "1"}] * 3)
    with pytest.raises(ValueError, match="3 of 3 prompts are too long"):
        load(make_config(model, source, data={"too_long": "drop"}))


def test_a_frozen_model_needs_positions_for_the_prompt_and_one_token(model, tmp_path):
    """Of another tokenizer: how many tokens it makes of a response is not known yet."""
    source, chat = write(tmp_path), Chat(model)
    longest = max(len(chat.prompt_ids(p.messages)) for p in load_prompts(source))
    for name, size in (("other", 280), ("another", 290)):
        short = make_folder(tmp_path / name, 40, size)
        calibration = {"calibration": {"mode": "distillable"}, "proxy": {"path": short}}
        host = ThreadRank(seq_len=longest + 20)
        with pytest.raises(
            ValueError, match=r"too long for the proxy. .* most 40, the positions of"
        ):
            load(make_config(model, source, **calibration), host)
        left = load(make_config(model, source, **calibration, data={"too_long": "drop"}), host)
        assert len(left) == 10
        cut = load(
            make_config(model, source, **calibration, data={"too_long": "truncate_left"}), host
        )
        assert all(len(Chat(short).prompt_ids(p.messages)) < 40 for p in cut)
        calibration["proxy"] = {"path": make_folder(tmp_path / f"{name}_fits", 999, size)}
        assert len(load(make_config(model, source, **calibration), host)) == 12


ON = {"calibration": {"mode": "distillable"}}
SEQUENCE_KD = {"objective": "nll", "on_policy": 0.0}
GIVEN = {"objective": "kl", "source": "dataset", "on_policy": 0.0, "divergence": "forward"}
ROLES = {  # what says which model reads or writes whole responses of its own ids
    "proxy": lambda same, other: ("calibrate", {**ON, "proxy": {"path": same}}),
    "proxy 2": lambda same, other: (
        "calibrate",
        {"calibration": ON["calibration"] | {"proxies": [same]}, "proxy": {"path": other}},
    ),
    "teacher": lambda same, other: ("distill", {"teacher": {"path": same}}),
    "teacher that writes": lambda same, other: (
        "distill",
        {"teacher": {"path": other}, "distill": SEQUENCE_KD},
    ),
    "served teacher that writes": lambda same, other: (
        "distill",
        {
            "teacher": {"path": other, "source": "server", "servers": ["http://localhost:1"]},
            "distill": SEQUENCE_KD,
        },
    ),
    "diagnosed teacher": lambda same, other: ("diagnose", {"teacher": {"path": same}}),
    "defence proxy": lambda same, other: (
        "distill",
        {
            "teacher": {"path": make_folder(Path(same).parent / "roomy", 999)},
            "distill": SEQUENCE_KD,
            "defence": {"proxy": same},
        },
    ),
}


@pytest.mark.parametrize("role", ROLES)
def test_a_frozen_model_needs_positions_for_the_whole_response(model, tmp_path, role):
    """Where it reads the sampler's ids, or writes: it would end the run at its first long text, or
    be read beyond its context. The last token of a row is predicted only.
    """
    source, chat = write(tmp_path, [{"prompt": "q", "answer": "1"}] * 2), Chat(model)
    prompt = len(chat.prompt_ids(load_prompts(source)[0].messages))
    needed = prompt + MAX_TOKENS - 1
    fits = make_folder(tmp_path / "fits", needed)
    short = make_folder(tmp_path / "short", needed - 1)
    # for a role that writes its own ids the other tokenizer is as short
    for same, room in ((fits, True), (short, False)):
        other = make_folder(tmp_path / f"other_{room}", 999, 280)
        if "writes" in role:
            theirs = len(Chat(other).prompt_ids(load_prompts(source)[0].messages))
            positions = theirs + MAX_TOKENS - 2 + room
            (Path(other) / "config.json").write_text(
                json.dumps({"max_position_embeddings": positions})
            )
        phase, over = ROLES[role](same, other)
        cfg = make_config(model, source, phase=phase, **over)
        if room:
            assert len(load(cfg)) == 2
            continue
        name = next(x for x in ("proxy 2", "defence proxy", "proxy", "teacher") if x in role)
        with pytest.raises(
            ValueError,
            match=f"too long for the {name}. .*with {MAX_TOKENS} for "
            "rollout.max_tokens .*want at most .* the positions of .*lower rollout",
        ):
            load(cfg)


def test_a_teacher_of_given_texts_needs_positions_for_those(model, tmp_path):
    rows = [{"prompt": "q", "response": "a"}]
    source, chat = write(tmp_path, rows), Chat(model)
    prompt = len(chat.prompt_ids(load_prompts(source)[0].messages))
    for positions in (prompt + 1, prompt):  # the text and its stop, which is predicted only
        teacher = {"path": make_folder(tmp_path / str(positions), positions)}
        cfg = make_config(model, source, phase="distill", teacher=teacher, distill=GIVEN)
        if positions > prompt:
            assert len(load(cfg)) == 1
            continue
        with pytest.raises(ValueError, match="for the teacher. .*with 2 for the response"):
            load(cfg)


SFT = {"phase": "distill", "distill": {"objective": "nll", "source": "dataset", "on_policy": 0.0}}


def test_given_texts_need_room_for_themselves_only(model, tmp_path):
    rows = [{"prompt": "q " * 20, "response": "a"}, {"prompt": "q", "response": "yes " * 30}]
    max_tokens = 30  # the second row's response is cut there
    source, chat = write(tmp_path, rows), Chat(model)
    prompt = len(chat.prompt_ids(load_prompts(source)[0].messages))
    cfg = make_config(model, source, **SFT, rollout={"max_tokens": max_tokens})
    assert len(load(cfg, ThreadRank(seq_len=prompt + 1))) == 2
    with pytest.raises(ValueError, match=f"with 2 for the response {prompt + 2}; want at most"):
        load(cfg, ThreadRank(seq_len=prompt))
    sampled = {"phase": "distill", "teacher": {"path": model}, "rollout": {"max_tokens": 30}}
    with pytest.raises(ValueError, match="with 30 for rollout.max_tokens"):
        load(make_config(model, source, **sampled), ThreadRank(seq_len=prompt + 1))


def test_given_texts_have_to_be_there(model, tmp_path):
    source = write(tmp_path, [{"prompt": "q", "response": "a"}, {"prompt": "q"}])
    with pytest.raises(ValueError, match="line 2: no response, in 1 of 2 rows; want a `response`"):
        load(make_config(model, source, **SFT))
    rejected = {"prompt": "q", "completion": "b", "label": False}
    source = write(tmp_path, [{"prompt": "q", "completion": "a", "label": True}, rejected])
    with pytest.raises(ValueError, match="line 2: no response.*label = false of a completion"):
        load(make_config(model, source, **SFT))


@pytest.mark.parametrize(
    "missing, task, refused",
    [(12, "exact", True), (1, "exact", True), (1, "math", True), (12, "runs:is_even", False)],
)
def test_a_task_that_compares_needs_answers(model, tmp_path, caplog, missing, task, refused):
    rows = [{"prompt": f"q {i}"} | ({"answer": "1"} if i >= missing else {}) for i in range(12)]
    cfg = make_config(model, write(tmp_path, rows), task={"name": task})
    if not refused:
        assert len(load(cfg)) == 12
        return
    with pytest.raises(
        ValueError, match=rf"line 1.*: no answer, in {missing} of 12 rows, and task"
    ):
        load(cfg)
    distill = {"phase": "distill", "teacher": {"path": model}, "task": {"name": task}}
    caplog.clear()
    assert len(load(make_config(model, cfg.data.source, **distill))) == 12
    assert f"no answer, in {missing} of 12 rows" in caplog.text  # the log shows grades
    caplog.clear()
    off_policy = {"distill": {"on_policy": 0.0}, "rollout": {"group": 1, "max_tokens": 8}}
    assert len(load(make_config(model, cfg.data.source, **distill | off_policy))) == 12
    assert not caplog.text, "nobody grades"
    assert (
        len(load(make_config(model, cfg.data.source, task={"name": task, "max_failed": 1.0}))) == 12
    )


def test_a_prompt_that_comes_twice_in_a_step_is_numbered(model, tmp_path):
    cfg = make_config(
        model, write(tmp_path, [{"prompt": f"q {i}", "answer": "1"} for i in range(3)])
    )
    batch = load(cfg).batch(0, 8, seed=0, shuffle=False)
    assert [(p.index, p.repeat) for p in batch] == [
        *((0, 0), (1, 0), (2, 0)),
        *((0, 1), (1, 1), (2, 1)),
        *((0, 2), (1, 2)),
    ]
    assert not any(p.repeat for step in range(2) for p in load(cfg).batch(step, 3, seed=0))


@pytest.mark.parametrize("task", ["multiple_choice", "exact"])
def test_options_are_listed_as_the_configuration_says(task):
    """given: as they stand, in prompts of every shape."""
    over = {"task": {"name": task}}
    listings = [
        training_listing(make_config("m", "s", data={"list_options": given}, **over))
        for given in (False, True, "given")
    ]
    assert listings[0] is None
    assert [listing.shuffle for listing in listings[1:]] == [True, False]
    assert task == "exact" or all(listing.always for listing in listings[1:])
