"""vLLM itself, in this process: it has to sample what the trainer would, by the same rules.

Shapes: V vocabulary, L length.
"""

from dataclasses import replace

import pytest
import torch

from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import Sampling
from reflux.trainer.rollouts.engine_texts import ScoreRequest, TextRequest
from reflux.trainer.rollouts.generate import _truncate
from reflux.trainer.rollouts.vllm_engine import HALF_LOADED, EngineOptions, VllmEngine

pytestmark = pytest.mark.engines

PROMPT = (1, 40, 50, 60)
GAP = 1e-5  # nats, fp32


class Alone:
    """An engine outside of a run, and transformers' model of the same weights."""

    def __init__(self, path):
        from transformers import AutoModelForCausalLM

        self.engine = VllmEngine(EngineOptions(str(path), "float32", 128, 8, max_logprobs=16))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model, self.chat = model.eval(), Chat(str(path))

    def logits(self, ids) -> torch.Tensor:
        """[L, V] behind every id."""
        with torch.no_grad():
            return self.model(torch.tensor([list(ids)])).logits[0]

    def weights(self):
        """Without the head: it is tied."""
        return {n: w.detach().clone() for n, w in self.model.named_parameters()}

    def request(self, **changes) -> TextRequest:
        stops = tuple(self.chat.stop_ids)
        fixed = TextRequest(PROMPT, 4, 1 << 20, 12, 1.0, 1.0, 0, stops, self.chat.vocab_size)
        return replace(fixed, **changes)

    def score_gap(self, ids=(1, 40, 50, 60, 70, 80, 90), start=3) -> float:
        """Between the two models, of the tokens that are there."""
        (score,) = self.engine.score([ScoreRequest(tuple(ids), start, 0)])
        logp_LV = self.logits(ids)[start - 1 : -1].log_softmax(-1)
        want = logp_LV[torch.arange(len(ids) - start), list(ids[start:])]
        return float((torch.tensor(score.logp) - want).abs().max())


@pytest.fixture(scope="module")
def alone(talkers):
    held = Alone(talkers / "policy")  # its head is tied
    yield held
    held.engine.close()


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8, "temperature": 1.5},
        {"stop_ids": (2, 7, 9, 300)},
        {"vocab_size": 400},  # a padded head
        {"temperature": 0.0},
    ],
)
def test_the_rules_of_sampling_mean_what_they_mean_in_the_embedded_sampler(alone, rules):
    request = alone.request(**rules)
    greedy, V = request.temperature == 0, request.vocab_size
    s = Sampling(12, temperature=request.temperature or 1.0, top_p=request.top_p)
    s = replace(s, top_k=request.top_k)
    (texts,) = alone.engine.generate([request])
    assert len(texts) == 4 and (greedy or len({tuple(t.ids) for t in texts}) > 1)
    for text in texts:
        logits_LV = alone.logits(PROMPT + tuple(text.ids))[len(PROMPT) - 1 : -1, :V]
        logp_LV = _truncate(logits_LV / s.temperature, s).log_softmax(-1)
        want_L = logp_LV[torch.arange(len(text.ids)), text.ids]
        assert float((torch.tensor(text.logp) - want_L).abs().max()) < GAP
        assert text.ids.max() < V and text.versions == ("folder",)
        stops = [i for i, token in enumerate(text.ids) if token in request.stop_ids]
        assert stops in ([], [len(text.ids) - 1]) and (stops or len(text.ids) == 12)
        if stops:
            want = float(logp_LV[-1, list(request.stop_ids)].logsumexp(-1))
            assert abs(text.stop_logp - want) < GAP
        assert not greedy or torch.equal(logits_LV.argmax(-1), torch.tensor(text.ids))


def test_a_seed_gives_the_same_text_whatever_is_sampled_beside_it(alone):
    request, other = alone.request(seed=3 << 16), alone.request(seed=9 << 16, prompt_ids=(1, 5))
    first = alone.engine.generate([request])[0]
    _, again, _ = alone.engine.generate([other, request, alone.request(seed=4 << 16)])
    assert [t.ids.tolist() for t in first] == [t.ids.tolist() for t in again]


def test_the_top_k_rows_of_a_text_are_the_models_own(alone):
    ids = (1, 40, 50, 60, 70, 80, 90)
    (score,) = alone.engine.score([ScoreRequest(ids, 1, 16)])
    want = alone.logits(ids)[:-1].log_softmax(-1).topk(16)
    assert score.topk_ids.shape == (6, 16)
    assert float((torch.tensor(score.topk_logp) - want.values).abs().max()) < GAP
    assert (torch.tensor(score.topk_ids) == want.indices).float().mean() > 0.95  # but for ties


def test_weights_are_loaded_in_place_also_a_tied_head_and_after_a_push_that_broke_off(alone):
    assert alone.score_gap() < GAP
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in alone.model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    assert alone.score_gap() > 0.01
    items = list(alone.weights().items())
    alone.engine.begin_load()  # of other numbers, and not all of them
    alone.engine.load_chunk([(name, w + 1.0) for name, w in items[:9]])
    assert alone.engine.weights_version == HALF_LOADED
    alone.engine.load("moved", items)
    assert alone.score_gap() < GAP
    assert alone.engine.generate([alone.request()])[0][0].versions == ("moved",)
    with pytest.raises(ValueError, match="nothing was sent for .*mlp.down_proj"):
        alone.engine.load("holes", [x for x in items if "down_proj" not in x[0]])
    assert alone.engine.weights_version == HALF_LOADED
    with pytest.raises(ValueError, match="vLLM cannot take the weights"):
        alone.engine.load("other", [("model.nothing.weight", torch.ones(2))])
    alone.engine.load("again", items)
    assert alone.score_gap() < GAP


def test_what_cannot_be_run_is_an_error_in_words(talkers, tmp_path):
    """No engine starts here."""
    path = str(talkers / "policy")
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows", "hidden_size": 8}')
    options = EngineOptions(path, "float32", 128, memory_fraction=1e-7)
    with pytest.raises(ValueError, match="vLLM has too little memory: .*rollout.max_running = 256"):
        VllmEngine(options)
    with pytest.raises(ValueError, match="rollout.engine = 'vllm': vLLM cannot run .*nobody"):
        VllmEngine(replace(options, path=str(tmp_path)))
