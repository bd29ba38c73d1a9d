"""Small tokenizers trained in the test process, and their tables."""

import functools
import io

import pytest
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from reflux.tokenalign.byte_table import PROBES, ByteTable

CORPUS = [
    *PROBES,
    *(f"{a} + {b} = {a + b}, then {w}." for a in range(40) for b, w in ((7, "so"), (130, "hence"))),
]


TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \n\t\r.,012345aAeE'\"-_<>|\u2581é你🙂\u200d\u0301\ufffd\u00a0"),
    ),
    max_size=40,
)


@functools.cache
def byte_level(normalizer=None, prefix=False, size=600):
    """size 258 has no merges: a character tokenizer (a byte tokenizer, in truth)."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>"],
            show_progress=False,
        ),
    )
    return tokenizer


@functools.cache
def sentencepiece(kind, prefix=True, byte_fallback=True):
    spm = pytest.importorskip(
        "sentencepiece", reason="SentencePiece tables need the package sentencepiece"
    )
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([x.replace("\0", "") for x in CORPUS]),
        model_writer=out,
        vocab_size=430,
        model_type=kind,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_proto=out.getvalue())


@functools.cache
def metaspace(kind, scheme):
    """A SentencePiece model of `tokenizers`; "legacy" is Llama-2's Prepend and Replace."""
    processor = sentencepiece(kind)
    n = processor.vocab_size()
    vocab = {processor.id_to_piece(i): i for i in range(n)}
    if kind == "unigram":
        tokenizer = Tokenizer(
            models.Unigram([(p, processor.get_score(i)) for p, i in vocab.items()], 0, True)
        )
    else:
        ranked = sorted(
            (i for i in range(n) if not (processor.is_byte(i) or processor.is_control(i))),
            key=lambda i: -processor.get_score(i),
        )
        merges = [
            (p[:k], p[k:])
            for p in map(processor.id_to_piece, ranked)
            for k in range(1, len(p))
            if p[:k] in vocab and p[k:] in vocab
        ]
        tokenizer = Tokenizer(
            models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
        )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def normalize_of(tokenizer):
    if hasattr(tokenizer, "id_to_piece"):
        return lambda text: text.replace("\u2581", " ")
    return tokenizer.normalizer.normalize_str if tokenizer.normalizer else str


table_of = functools.cache(ByteTable.of)
