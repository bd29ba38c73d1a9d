"""GGUF files of trained tokenizers."""

from gguf_files import gguf


def gguf_of_bpe(tokenizer, **more):
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    added = tokenizer.get_added_tokens_decoder()
    types = [3 if i in added and added[i].special else 4 if i in added else 1 for _, i in vocab]
    return gguf(
        {
            "tokenizer.ggml.model": (8, "gpt2"),
            "tokenizer.ggml.tokens": (9, (8, [p for p, _ in vocab])),
            "tokenizer.ggml.merges": (9, (8, ["a b"] * 9)),
            "tokenizer.ggml.token_type": (9, (5, types)),
        }
        | more
    )


def gguf_of_spm(p, prefix=None):
    types = [
        6
        if p.is_byte(i)
        else 2
        if p.is_unknown(i)
        else 3
        if p.is_control(i)
        else 5
        if p.is_unused(i)
        else 1
        for i in range(p.vocab_size())
    ]
    tokens = [p.id_to_piece(i) for i in range(p.vocab_size())]
    fields = {
        "tokenizer.ggml.model": (8, "llama"),
        "tokenizer.ggml.tokens": (9, (8, tokens)),
        "tokenizer.ggml.token_type": (9, (5, types)),
    }
    return gguf(
        fields if prefix is None else fields | {"tokenizer.ggml.add_space_prefix": (7, prefix)}
    )


def same_spelling(a, b):
    return (
        list(a.pieces) == list(b.pieces)
        and (a.kind == b.kind).all()
        and a.space_prefix == b.space_prefix
    )
