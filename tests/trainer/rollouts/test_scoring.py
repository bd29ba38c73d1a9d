"""Scores of a sampler's text under a scorer: the same by ids or by bytes, summed over spans without
loss, each with its own template.

Tokenizers are trained here; the models are a toy recurrence whose log-probabilities plain code can
repeat.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from assets import SPECIALS, save_tokenizer, sentences, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from reflux.tokenalign.scores import span_logprobs
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.losses import HeadInputs
from reflux.trainer.rollouts.scoring import align_texts, score_ids

D, PROMPT = 6, ({"role": "user", "content": "what remains?"},)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder, texts = tmp_path_factory.mktemp("chats"), sentences(200)
    large, small = train_tokenizer(texts, 400), train_tokenizer(texts, 300)
    for name, tokenizer in (("large", large), ("twin", large), ("small", small)):
        save_tokenizer(tokenizer, folder / name)
    return SimpleNamespace(
        **{name: Chat(str(folder / name)) for name in ("large", "twin", "small")}
    )


class Toy:
    """A causal model: state = tanh(A state + E[token]), begun anew at position 0."""

    def __init__(self, vocab: int, seed: int):
        g = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(D, D, generator=g, dtype=torch.float64) / 2
        self.embed, self.head = (
            torch.randn(vocab + 3, D, generator=g, dtype=torch.float64) for _ in range(2)
        )
        self.head[vocab:] = 9.0
        self.vocab = vocab

    def walk(self, ids, positions) -> torch.Tensor:
        state, out = torch.zeros(D, dtype=torch.float64), []
        for token, position in zip(ids, positions):
            state = torch.tanh(self.mix @ (state * (position > 0)) + self.embed[token])
            out.append(state)
        return torch.stack(out)

    def logp(self, ids) -> torch.Tensor:
        """log p of what follows each prefix of `ids`."""
        return (self.walk(ids, range(len(ids))) @ self.head[: self.vocab].t()).log_softmax(-1)


class Engine:
    device = torch.device("cpu")

    def pad_across_ranks(self, batches):
        return batches

    def sum(self, value):
        return value

    @contextmanager
    def forward_no_grad(self, model, batch, vocab_size):
        rows = [
            model.walk(i, p) for i, p in zip(batch.input_NL.tolist(), batch.position_NL.tolist())
        ]
        yield HeadInputs(torch.cat(rows)[batch.row_T], model.head, None, vocab_size)


def sampled(chat: Chat, text: str, ended: bool = True, ids=None) -> Rollout:
    ids = (*(chat.encode(text) if ids is None else ids), *((chat.stop_id,) if ended else ()))
    return Rollout(
        Prompt(0, PROMPT), chat.prompt_ids(PROMPT), ids, (0.0,) * len(ids), 0.0, text, ended
    )


def in_pieces(chat: Chat, text: str) -> tuple[int, ...]:
    """The same bytes character by character, an unusual tokenization that sampling may produce."""
    return tuple(i for c in text for i in chat.encode(c))


TEXTS = st.lists(
    st.sampled_from(
        [
            *sentences(20),
            "7 - 5 = 2",
            "ünïcode ✓ 漢字",
            "\n\n  tabs\t",
            "🙂🙃",
            "a" * 40,
            "<|eos|>",
            "x",
        ]
    ),
    min_size=1,
    max_size=4,
)


@given(TEXTS, st.integers(1, 300))
def test_scores_are_the_models_own_log_probabilities(chats, texts, tokens):
    chat, model = chats.large, Toy(chats.large.vocab_size, 1)
    chat.stop_ids = (0, chat.stop_id)  # two of them: their probabilities add
    jobs = [(chat.prompt_ids(PROMPT), chat.encode(text)) for text in [*texts, ""]]
    for (prompt, ids), got in zip(
        jobs, score_ids(model, Engine(), jobs, chat, tokens=tokens), strict=True
    ):
        logp = model.logp((*prompt, *ids))[len(prompt) - 1 :]
        np.testing.assert_allclose(
            got.logp,
            logp[:-1].gather(1, torch.tensor(ids, dtype=torch.long)[:, None])[:, 0],
            atol=1e-9,
        )
        assert got.stop == pytest.approx(
            logp[-1, list(chat.stop_ids)].logsumexp(0).item(), abs=1e-9
        )


@given(TEXTS, st.integers(1, 300))
def test_sampled_ids_are_scored_with_the_stop_set_in_the_place_of_their_stop(chats, texts, tokens):
    chat, model = chats.large, Toy(chats.large.vocab_size, 1)
    chat.stop_ids = (0, chat.stop_id)
    texts = [(chat.prompt_ids(PROMPT), chat.encode(text)) for text in [*texts, ""]]
    behind = score_ids(model, Engine(), texts, chat, tokens=tokens)
    whole = [(prompt, (*ids, chat.stop_id)) for prompt, ids in texts]
    inside = score_ids(model, Engine(), whole, chat, tokens=tokens, stop=False)
    for (prompt, ids), a, b in zip(texts, behind, inside):
        np.testing.assert_allclose(b.logp[:-1], a.logp, atol=1e-9)
        assert b.stop == pytest.approx(a.stop, abs=1e-9) and b.stop > b.logp[-1]
        assert b.logp[-1] == pytest.approx(model.logp((*prompt, *ids))[-1, chat.stop_id].item())


@given(TEXTS, st.booleans())
def test_the_same_tokenizer_is_the_same_by_ids_and_by_bytes(chats, texts, ended):
    model = Toy(chats.large.vocab_size, 1)
    rollouts = [sampled(chats.large, text, ended) for text in texts]
    by_ids, by_bytes = (
        align_texts(chats.large, chats.twin, rollouts, same=same) for same in (True, False)
    )
    for r, a, b in zip(rollouts, by_ids, by_bytes):
        assert tuple(a.scorer_ids) == tuple(
            b.scorer_ids
        ) == r.content_ids and a.n_bytes == b.n_bytes == len(r.text.encode())
        logp = score_ids(
            model, Engine(), [(r.prompt_ids, tuple(b.scorer_ids))], chats.twin, tokens=99
        )[0].logp
        sums = [span_logprobs(logp, x.scorer_span, x.spans) for x in (a, b)]
        assert sums[0].sum() == pytest.approx(sums[1].sum(), abs=1e-9)
        if all(ord(c) < 128 for c in r.text):  # no token is part of a character: a token is a span
            np.testing.assert_array_equal(a.sampler_span, b.sampler_span)
            for x, y in zip(
                (a.starts.a, a.starts.b, a.starts.span), (b.starts.a, b.starts.b, b.starts.span)
            ):
                np.testing.assert_array_equal(x, y)


def bytes_of_span(chat: Chat, ids, span, k: int) -> bytes:
    return b"".join(chat.table.bytes_of([i]) for i, s in zip(ids, span) if s == k)


@given(TEXTS, st.booleans(), st.booleans(), st.booleans())
def test_span_sums_add_up_to_the_sequence_on_both_sides(chats, texts, swap, ended, odd):
    """T19, in both directions and also for a tokenization the tokenizer itself would not choose."""
    sampler, scorer = (chats.small, chats.large) if swap else (chats.large, chats.small)
    rollouts = [sampled(sampler, t, ended, in_pieces(sampler, t) if odd else None) for t in texts]
    for r, a in zip(rollouts, align_texts(sampler, scorer, rollouts, same=False)):
        assert tuple(a.scorer_ids) == scorer.encode(r.text) and a.n_bytes == len(r.text.encode())
        for ids, span in ((r.content_ids, a.sampler_span), (a.scorer_ids, a.scorer_span)):
            logp = -np.random.default_rng(len(ids)).exponential(size=len(ids))
            sums = span_logprobs(logp, span, a.spans)
            assert (
                len(sums) == a.spans
                and sums.sum() == pytest.approx(logp.sum())
                and (np.diff(span) >= 0).all()
            )
        for k in range(a.spans):
            same = bytes_of_span(sampler, r.content_ids, a.sampler_span, k)
            assert same == bytes_of_span(scorer, a.scorer_ids, a.scorer_span, k) != b""


def test_tokens_outside_every_span_count_nothing(chats):
    """T19: a control token in the middle is neither part of the text nor a log-probability of 0."""
    text = sentences(1)[0]
    ids = chats.large.encode(text)
    rollout = sampled(chats.large, text, ids=(*ids[:3], 1, *ids[3:]))
    (a,) = align_texts(chats.large, chats.small, [rollout], same=False)
    assert (
        a.sampler_span[3] == -1
        and (np.delete(a.sampler_span, 3) >= 0).all()
        and a.n_bytes == len(text.encode())
    )
    logp = np.full(len(rollout.content_ids), -1.0)
    poisoned = logp.copy()
    poisoned[3] = -1e9
    np.testing.assert_array_equal(
        span_logprobs(poisoned, a.sampler_span, a.spans),
        span_logprobs(logp, a.sampler_span, a.spans),
    )
    assert span_logprobs(np.array([-1.0, -2.0, -4.0]), np.array([-1, 0, -1]), 2).tolist() == [
        -2.0,
        0.0,
    ]


def test_what_does_not_round_trip_cannot_be_scored(chats):
    whole = sampled(chats.large, sentences(1)[0])
    half = in_pieces(chats.large, "🙂")[:2]  # the first bytes of a character
    broken = sampled(chats.large, "?", ids=(*half, *chats.large.encode(" ab")))
    cut = sampled(chats.large, "ab", ended=False, ids=(*chats.large.encode("ab"), *half))
    a, b, c, d = align_texts(
        chats.large, chats.small, [broken, whole, cut, sampled(chats.large, "")], same=False
    )
    assert (
        a.spans is None
        and (a.sampler_span == -1).all()
        and len(a.sampler_span) == len(broken.content_ids)
    )
    assert b.spans and (b.sampler_span >= 0).all()
    assert c.spans and c.n_bytes == 2 and (c.sampler_span[-2:] == -1).all(), (
        "cut inside a character: up to the last whole one"
    )
    assert d.spans == 0 and d.n_bytes == 0 and d.scorer_ids == (), (
        "nothing but a stop is scored by its stop"
    )


def test_a_scorer_that_changes_the_text_needs_a_known_normaliser(chats):
    """A lower-casing scorer: its normaliser maps every position back; without it only texts that it
    does not change are scored.
    """
    texts = [sampled(chats.large, "Two remain."), sampled(chats.large, "two remain.")]

    def lower_casing(normalize) -> SimpleNamespace:
        return SimpleNamespace(
            table=chats.small.table,
            encode=lambda text: chats.small.encode(text.lower()),
            normalize=normalize,
        )

    a, b = align_texts(chats.large, lower_casing(None), texts, same=False)
    assert (
        a.spans is None
        and a.scorer_ids == ()
        and b.spans
        and b.scorer_ids == chats.small.encode("two remain.")
    )
    known, plain = align_texts(chats.large, lower_casing(str.lower), texts, same=False)
    assert known.scorer_ids == plain.scorer_ids == b.scorer_ids and plain.spans == b.spans
    # large letters are as long as small ones
    np.testing.assert_array_equal(known.scorer_span, b.scorer_span)


def test_starts_are_positions_where_both_have_read_the_same_bytes(chats):
    rollout = sampled(chats.large, sentences(1)[0])
    (a,) = align_texts(chats.large, chats.small, [rollout], same=False)
    sampler_bytes = np.append(0, np.cumsum(chats.large.table.lens[list(rollout.content_ids)]))
    scorer_bytes = np.append(0, np.cumsum(chats.small.table.lens[list(a.scorer_ids)]))
    assert sampler_bytes[a.starts.a].tolist() == scorer_bytes[a.starts.b].tolist()
    assert rollout.ended
    assert a.starts.a[-1] == len(rollout.content_ids) and a.starts.b[-1] == len(a.scorer_ids), (
        "the stop is predicted behind the text"
    )
    (same,) = align_texts(chats.large, chats.large, [rollout], same=True)
    assert (
        same.starts.a.tolist()
        == same.starts.b.tolist()
        == list(range(len(rollout.content_ids) + 1))
    ), "the stop is an aligned position, too"


def test_no_texts(chats):
    assert align_texts(chats.large, chats.small, [], same=False) == []
    assert score_ids(Toy(400, 0), Engine(), [], chats.large, tokens=9) == []


def test_each_side_renders_its_own_prompt_and_only_the_text_is_shared(chats, tmp_path):
    """T20: no marker of the sampler's template or stop set among what the scorer scores."""
    chats.small.tokenizer.save_pretrained(tmp_path)
    template = "{% for m in messages %}## {{ m['content'] }} ##{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    scorer = Chat(str(tmp_path))
    rollout = sampled(chats.large, sentences(1)[0])
    (a,) = align_texts(chats.large, scorer, [rollout], same=False)
    prompt = scorer.prompt_ids(PROMPT)
    assert scorer.decode(prompt) == "## what remains? ##"
    assert prompt != chats.small.prompt_ids(PROMPT)
    special = {scorer.tokenizer.convert_tokens_to_ids(s) for s in SPECIALS}
    assert not special & set(a.scorer_ids) and scorer.decode(a.scorer_ids) == rollout.text


@pytest.mark.parametrize("banned", ["token", "stop", "neither"])
def test_a_scorer_whose_probabilities_are_no_numbers_is_named(chats, banned):
    """A banned token, which no text has, is no harm; one that a text has is -inf for its reward."""
    chat, model = chats.large, Toy(chats.large.vocab_size, 1)
    chat.stop_ids, ids = (chat.stop_id,), chat.encode("7 - 5 = 2")
    unused = next(i for i in range(3, model.vocab) if i not in ids)
    row = {"token": ids[2], "stop": chat.stop_id, "neither": unused}[banned]
    real = model.walk

    def walk(given, positions):
        return torch.cat([real(given, positions), torch.ones(len(given), 1).double()], 1)

    model.walk = walk
    bias = torch.zeros(len(model.head), 1, dtype=torch.float64)
    bias[row] = -torch.inf
    model.head = torch.cat([model.head, bias], 1)
    jobs = [(chat.prompt_ids(PROMPT), ids)]
    if banned == "neither":
        assert np.isfinite(score_ids(model, Engine(), jobs, chat, tokens=99)[0].logp).all()
        return
    with pytest.raises(ValueError, match=f"{chat.path}: 1 log-probabilities of tokens under this"):
        score_ids(model, Engine(), jobs, chat, tokens=99)
    if banned == "stop":
        score_ids(model, Engine(), jobs, chat, tokens=99, stop=False)
