"""Defended decoding: the mixture on known distributions, and in whole runs at gamma = 0 and 1."""

import contextlib
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import config, numbers, run_here, with_other_stop, write_data
from transformers import AutoModelForCausalLM

from reflux.trainer.data.chat import Chat
from reflux.trainer.distillation.phase import DistillPhase
from reflux.trainer.rollouts.defences import (
    antidistillation_decoder,
    product_decoder,
    tempered_decoder,
)

pytestmark = pytest.mark.usefixtures("titan_process")
QUESTION = "What is 1+1?"
COPIES = {"antidistillation": "a", "penalty": 1.0, "dtype": "float32"}
TEXT = {"objective": "nll", "source": "teacher", "on_policy": 0.0}


def decoder(logits_NV):
    """A decoder with one distribution per row, whatever it is fed; also the list of its inputs."""
    fed = []

    @contextlib.contextmanager
    def decode(rows, max_length):
        def step(ids, positions, real, first, rows_N=None):
            fed.append((ids, first, rows, max_length))
            return logits_NV

        yield step, torch.device("cpu")

    return decode, fed


@given(st.floats(0, 1), st.integers(0, 1000))
def test_the_product_of_two_known_distributions(gamma, seed):
    g = torch.Generator().manual_seed(seed)
    p_NV, q_NV = (torch.rand(2, 3, generator=g).double() + 0.1 for _ in range(2))
    # a padded head
    (a, fed_a), (b, fed_b) = (
        decoder(p_NV.log() + 5),
        decoder(torch.cat([q_NV.log() - 2, torch.full((2, 4), 9.0)], 1)),
    )
    with product_decoder(a, b, gamma)(2, 7) as (step, device):
        got_NV = step("ids", "positions", "real", True).double().softmax(1)
    want_NV = p_NV ** (1 - gamma) * q_NV**gamma
    torch.testing.assert_close(got_NV, want_NV / want_NV.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert fed_a == fed_b == [("ids", True, 2, 7)] and device.type == "cpu"


def test_temperature_divides_the_logits_of_what_is_served():
    """p = (0.8, 0.2) at temperature 2 is (2, 1) / 3; of the product with (0.2, 0.8) at gamma =
    0.25, its square root, normalised.
    """
    p_NV, q_NV = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.2, 0.8]])
    (a, fed), (b, _) = decoder(p_NV.log()), decoder(q_NV.log())
    with tempered_decoder(a, 2.0)(1, 7) as (step, device):
        torch.testing.assert_close(
            step("ids", "positions", "real", False).softmax(1), torch.tensor([[2 / 3, 1 / 3]])
        )
    assert fed == [("ids", False, 1, 7)] and device.type == "cpu"
    # odds 4 ** (0.75 - 0.25) = 2, and their root
    with tempered_decoder(product_decoder(a, b, 0.25), 2.0)(1, 7) as (step, _):
        torch.testing.assert_close(
            step("ids", "positions", "real", False).softmax(1),
            torch.tensor([[2**0.5, 1.0]]) / (2**0.5 + 1),
        )


def test_antidistillation_adds_the_difference_of_the_copies():
    """Against the definition on probabilities, with a padded head."""
    g = torch.Generator().manual_seed(3)
    p, plus, minus = (torch.rand(2, 4, generator=g).double() + 0.1 for _ in range(3))
    p, plus, minus = (x / x.sum(1, keepdim=True) for x in (p, plus, minus))
    padded = torch.cat([plus.log() + 3, torch.full((2, 3), 9.0)], 1)  # logits lack a constant
    decoders = [decoder(p.log() - 1)[0], decoder(padded)[0], decoder(minus.log())[0]]
    with antidistillation_decoder(*decoders, 0.8)(2, 7) as (step, device):
        got_NV = step("ids", "positions", "real", True).double().softmax(1)
    want_NV = p * (0.8 * (plus.log() - minus.log())).exp()
    torch.testing.assert_close(got_NV, want_NV / want_NV.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert device.type == "cpu"


def test_antidistillation_in_a_whole_run(talkers, tmp_path, monkeypatch):
    """Sampled tokens have the log-probabilities of the moved teacher, by transformers; without the
    note of epsilon the run says what is missing.
    """
    copies = tmp_path / "copies"
    for name, source in (("plus", "policy"), ("minus", "teacher")):
        shutil.copytree(talkers / source, copies / name)
    served = {"antidistillation": str(copies), "penalty": 0.2, "dtype": "float32"}
    with pytest.raises(ValueError, match="does not say epsilon"):
        distill(talkers, tmp_path / "none", steps=1, defence=served)
    (copies / "antidistillation.json").write_text('{"epsilon": 0.25}')
    texts, real = [], DistillPhase.sample
    monkeypatch.setattr(
        DistillPhase, "sample", lambda self, step: texts.append(real(self, step)) or texts[-1]
    )
    distill(talkers, tmp_path / "run", steps=1, defence=served)
    model, plus = (
        AutoModelForCausalLM.from_pretrained(talkers / name) for name in ("teacher", "policy")
    )
    rollout = texts[0][0][0].rollout
    ids, start = torch.tensor([rollout.prompt_ids + rollout.ids]), len(rollout.prompt_ids) - 1
    with torch.no_grad():
        p_nV, plus_nV = (m(ids).logits[0, start:-1].double() for m in (model, plus))
    logp_nV = (p_nV + 0.4 * (plus_nV - p_nV)).log_softmax(1)  # minus is the teacher itself
    want = logp_nV.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(rollout.logp).double(), want, rtol=0, atol=1e-4)


def distill(talkers, folder, **over):
    return run_here(
        config(talkers, folder, "distill", **({"distill": TEXT, "rollout": {"group": 1}} | over))
    )


def test_with_gamma_1_students_learn_from_the_proxy(talkers, tmp_path):
    served = distill(
        talkers,
        tmp_path / "served",
        defence={"proxy": str(talkers / "policy"), "gamma": 1.0, "dtype": "float32"},
    )
    plain = distill(
        talkers, tmp_path / "plain", teacher={"path": str(talkers / "policy"), "dtype": "float32"}
    )
    assert [numbers(s) for s in served.steps] == [numbers(s) for s in plain.steps]


def test_with_gamma_0_it_is_the_teacher(talkers, tmp_path):
    served = distill(
        talkers,
        tmp_path / "served",
        defence={"proxy": str(talkers / "policy"), "gamma": 0.0, "dtype": "float32"},
    )
    plain = distill(talkers, tmp_path / "plain")
    assert [numbers(s) for s in served.steps] == [numbers(s) for s in plain.steps]


def test_with_gamma_a_half_texts_come_from_the_product(talkers, tmp_path, monkeypatch):
    """Every sampled token's log-probability is that of the normalised product, by transformers."""
    texts, real = [], DistillPhase.sample
    monkeypatch.setattr(
        DistillPhase, "sample", lambda self, step: texts.append(real(self, step)) or texts[-1]
    )
    distill(
        talkers,
        tmp_path / "run",
        steps=1,
        defence={"proxy": str(talkers / "policy"), "dtype": "float32"},
    )
    models = [
        AutoModelForCausalLM.from_pretrained(talkers / name) for name in ("teacher", "policy")
    ]
    for rollout in (t.rollout for group in texts[0] for t in group):
        ids = torch.tensor([rollout.prompt_ids + rollout.ids])
        with torch.no_grad():
            a_nV, b_nV = (
                m(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].double() for m in models
            )
        logp_nV = ((a_nV + b_nV) / 2).log_softmax(1)
        torch.testing.assert_close(
            torch.tensor(rollout.logp).double(),
            logp_nV.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0],
            rtol=0,
            atol=1e-4,
        )


def test_the_providers_temperature_is_that_of_sampling_at_it(talkers, tmp_path):
    served = distill(talkers, tmp_path / "served", defence={"temperature": 0.5})
    sampled = distill(talkers, tmp_path / "sampled", rollout={"group": 1, "temperature": 0.5})
    plain = distill(talkers, tmp_path / "plain")
    lengths = [[s["length"] for s in run.steps] for run in (served, sampled, plain)]
    assert lengths[0] == lengths[1] != lengths[2]
    losses = [[s["loss"] for s in run.steps] for run in (served, sampled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_evaluation_samples_at_the_providers_temperature(talkers, tmp_path):
    """Close to 0, sampled answers are the greedy ones, which the temperature leaves alone."""
    data = {"source": str(write_data(tmp_path)), "limit": 6}
    over = {"task": {"name": "exact", "options": {"marker": "=>"}}, "eval": data}
    texts = {}
    for name, serve in (("plain", {}), ("cold", {"temperature": 1e-3})):
        run_here(config(talkers, tmp_path / name, "evaluate", defence=serve, **over))
        rows = [
            json.loads(line)
            for line in (tmp_path / name / "predictions" / "step-0.jsonl").read_text().splitlines()
        ]
        texts[name] = {
            mode: [r["text"] for r in rows if r["mode"] == mode] for mode in ("greedy", "sampled")
        }
    assert (
        texts["cold"]["sampled"]
        == texts["cold"]["greedy"]
        == texts["plain"]["greedy"]
        != texts["plain"]["sampled"]
    )


@pytest.mark.parametrize("defence", ["proxy", "copies"])
def test_a_defence_without_positions_for_the_answers_is_refused(talkers, tmp_path, defence):
    longest = len(Chat(str(talkers / "policy")).prompt_ids([{"role": "user", "content": QUESTION}]))

    def make(name, positions):
        folder = shutil.copytree(talkers / "policy", tmp_path / name)
        table = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(table | {"max_position_embeddings": positions})
        )
        return folder

    def ask(name, positions, **over):
        served = {"proxy": str(make(f"{name}/proxy", positions)), "dtype": "float32"}
        if defence == "copies":
            make(f"{name}/copies/plus", positions)
            make(f"{name}/copies/minus", positions)
            (tmp_path / name / "copies" / "antidistillation.json").write_text('{"epsilon": 0.01}')
            served = COPIES | {"antidistillation": str(tmp_path / name / "copies")}
        run_here(config(talkers, tmp_path / name / "run", "evaluate", defence=served, **over))

    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"question": QUESTION, "choices": ["one", "two"], "answer": "A"}) + "\n"
    )
    over = {"task": {"name": "multiple_choice"}, "rollout": {"max_tokens": 9}}
    over["eval"] = {"source": str(rows), "by": "generation", "list_options": False}
    ask("fits", longest + 8, **over)
    with pytest.raises(
        ValueError, match=rf"too long for the defence .* want at most {longest + 8}"
    ):
        ask("short", longest + 7, **over)


def test_an_evaluation_judges_what_is_served(talkers, tmp_path):
    data = {"source": str(write_data(tmp_path)), "limit": 6}
    over = {"task": {"name": "exact", "options": {"marker": "=>"}}, "eval": data}
    run_here(
        config(
            talkers,
            tmp_path / "served",
            "evaluate",
            defence={"proxy": str(talkers / "teacher"), "gamma": 1.0, "dtype": "float32"},
            **over,
        )
    )
    run_here(
        config(
            talkers,
            tmp_path / "plain",
            "evaluate",
            model={"path": str(talkers / "teacher")},
            **over,
        )
    )
    texts = [
        [
            json.loads(line)["text"]
            for line in (tmp_path / name / "predictions" / "step-0.jsonl").read_text().splitlines()
        ]
        for name in ("served", "plain")
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 12


def test_another_vocabulary_is_an_error(talkers, tmp_path):
    with pytest.raises(
        ValueError, match="has another vocabulary than the model it is multiplied with"
    ):
        distill(talkers, tmp_path / "run", defence={"proxy": str(talkers / "proxy")})


def test_a_proxy_that_ends_texts_otherwise_is_an_error(talkers, tmp_path):
    """Neither model's end would be likely in the product: texts would run on."""
    proxy = with_other_stop(talkers / "policy", tmp_path / "proxy")
    with pytest.raises(ValueError, match=r"ends a text with '<\|pad\|>' \(0\).* = \[0, 2\]"):
        distill(talkers, tmp_path / "run", defence={"proxy": str(proxy)})


@pytest.mark.parametrize(
    "phase, over, message",
    [
        ("distill", {}, "only sampled text is served"),
        ("distill", {"distill": TEXT | {"source": "dataset"}}, "only sampled text is served"),
        (
            "evaluate",
            {"eval": {"source": "x", "by": "likelihood"}, "task": {"name": "multiple_choice"}},
            "only generated answers are served",
        ),
        ("diagnose", {}, "want phase = 'distill'"),
        ("distill", {"distill": TEXT, "defence": {"proxy": "p", "gamma": 1.5}}, "want 0 to 1"),
        (
            "distill",
            {"defence": {"temperature": 0.5}},
            "defence.temperature = 0.5 with distill.objective = 'kl'",
        ),
        ("distill", {"distill": TEXT, "defence": {"temperature": 0.0}}, "want > 0"),
        (
            "distill",
            {"distill": TEXT, "defence": {"penalty": 0.5}},
            "and a penalty > 0, or neither",
        ),
        ("distill", {"distill": TEXT, "defence": {"antidistillation": "a"}}, "or neither"),
        (
            "distill",
            {"distill": TEXT, "defence": COPIES | {"proxy": "p"}},
            "want one of the two",
        ),
        (
            "distill",
            {"distill": TEXT, "defence": COPIES | {"dtype": "bfloat16"}},
            "antidistillation = 'a' with dtype = 'bfloat16'.* Set dtype = 'float32'",
        ),
        (
            "distill",
            {"defence": COPIES},
            "defence.antidistillation = 'a' with distill.objective = 'kl'",
        ),
    ],
)
def test_what_cannot_be_served_is_an_error(talkers, tmp_path, phase, over, message):
    with pytest.raises(ValueError, match=message):
        config(talkers, tmp_path / "run", phase, **({"defence": {"proxy": "p"}} | over))
