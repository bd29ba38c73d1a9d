"""What a loaded tokenizer says of itself, family by family: the bytes and the kind of each id, and
how it encodes content.

    byte_level      BPE of GPT-2, Llama-3, Qwen: a piece is a string over 256 stand-in characters,
                    one per byte
    sentencepiece   BPE or Unigram of Llama-2, Mistral, Gemma: a piece is UTF-8 with U+2581 for a
                    space; <0x41> is one byte
    ranks           tiktoken's encodings, Mistral's Tekken, RWKV's World: a piece is bytes
    bytes           ByT5: an id is a byte
    wordpiece       BERT: ##x continues a word, anything else begins one. Lossy: no spaces, case or
                    accents
    word_suffix     CLIP, GPT-1: x</w> ends a word. Lossy

In all of them an added token is literal UTF-8, matched in the text as it is written; a `normalized`
one in the normalised text, and spelled as it stands there. `single_word` only decides where it is
matched. Everything comes from the *loaded* object, because libraries rebuild pipelines when they
load a file.

V: vocabulary.
"""

import json
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

TEXT, CONTROL, UNKNOWN, UNUSED = 0, 1, 2, 3  # kind[id]: only TEXT spells bytes
MARK = "\u2581"  # SentencePiece's visible space
LOSSY = ("wordpiece", "word_suffix")  # families whose ids do not say what stood in the text

# Printable Latin-1 stands for itself; the 68 other bytes take U+0100 upwards, in byte order
# (GPT-2's map).
_SELF = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHER_BYTES = sorted({*range(256)} - _SELF)
# 0xFFFF: no stand-in of any byte
_STAND_IN = dict.fromkeys(_OTHER_BYTES, 0xFFFF) | {0x100 + k: b for k, b in enumerate(_OTHER_BYTES)}


class AddedText(NamedTuple):
    """An added token of text around which the text is not spelled as it stands."""

    id: int
    left: bool  # takes the whitespace in front of it out of the text (lstrip)
    right: bool  # the whitespace behind it (rstrip)
    restarts: bool  # what follows is encoded by itself, maybe with a space put in front


@dataclass(frozen=True, eq=False)
class TokenizerDescription:
    """One tokenizer, described. `ByteTable.of` makes a table of it and verifies it by `encode`."""

    pieces: Sequence[bytes]  # [V]; a CONTROL id has its name for display
    kind: np.ndarray  # int8 [V]
    family: str
    # content only, nothing added; None: a file without an encoder
    encode: Callable[[str], Sequence[int]] | None = None
    # N, without a space prefix: `encode` gives ids that spell N(text)
    normalize: Callable[[str], str] = str
    # ids of one raw byte that stand beside an ordinary piece of the same byte
    byte_ids: tuple[int, ...] = ()
    # added tokens that take the whitespace beside them out of the text
    swallows_spaces: tuple[str, ...] = ()
    added: tuple[AddedText, ...] = ()
    space_prefix: bool | None = None  # may put one space before a text; None: observe `encode`
    reads_names: bool = False  # takes a literal "</s>" in a text for the token of that name


def read(tokenizer: Any) -> TokenizerDescription:
    """Describe a loaded tokenizer; a TokenizerDescription is returned as it is.

    ValueError for an object that is none of: a fast or ByT5 tokenizer of transformers, a
    tokenizers.Tokenizer, a SentencePieceProcessor, a tiktoken.Encoding, RWKV's TRIE_TOKENIZER, a
    tokenizer of mistral_common; or a family whose ids do not give bytes.
    """
    if isinstance(tokenizer, TokenizerDescription):
        return tokenizer
    tokenizer = _inner(tokenizer)
    if hasattr(tokenizer, "encode_special_tokens"):
        return _read_backend(tokenizer)
    if _is_sentencepiece(tokenizer):
        return _read_sentencepiece(tokenizer)
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return _read_tiktoken(tokenizer)
    if hasattr(tokenizer, "id_to_byte_piece"):
        return _read_tekkenizer(tokenizer)
    if hasattr(tokenizer, "idx2token"):
        return _read_rwkv(tokenizer)
    if _is_byte_model(tokenizer):
        return _read_byte_model(tokenizer)
    raise _unreadable(tokenizer)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` as content: no special token is added, and one written in the text is encoded
    as plain characters.

    Takes what `read` takes. ValueError: a description without an encoder (a file that has none), a
    lone surrogate (some libraries would replace it silently).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"encode_text: {text[error.start]!r} at position {error.start} is half of a surrogate "
            "pair: it has no bytes, so no other model can score this text. Where does it come "
            "from? Bytes decoded with errors='surrogateescape'?"
        ) from error
    tokenizer = _inner(tokenizer)
    if hasattr(tokenizer, "encode_special_tokens"):
        with _content_mode(tokenizer):
            return tokenizer.encode(text, add_special_tokens=False).ids
    if _is_sentencepiece(tokenizer):
        return tokenizer.encode(
            text, out_type=int, add_bos=False, add_eos=False, reverse=False, enable_sampling=False
        )
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return tokenizer.encode_ordinary(text)
    if hasattr(tokenizer, "id_to_byte_piece"):
        return tokenizer.encode(text, bos=False, eos=False)
    if hasattr(tokenizer, "idx2token"):
        return tokenizer.encode(text)
    if isinstance(tokenizer, TokenizerDescription):
        if tokenizer.encode is None:
            raise ValueError(
                f"encode_text: this {tokenizer.family} file lists what its ids spell and has no "
                "encoder; encode with the library that runs the model."
            )
        return list(tokenizer.encode(text))
    if _is_byte_model(tokenizer):
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    raise _unreadable(tokenizer)


def normalizer_of(tokenizer: Any) -> Callable[[str], str]:
    """N, such that the ids of `encode_text` spell N(text), or a space and N(text); `str` where
    every text stays as it is.

    Takes what `read` takes. A file without an encoder is taken not to normalise.
    """
    tokenizer = _inner(tokenizer)
    if isinstance(tokenizer, TokenizerDescription):
        return tokenizer.normalize
    if _is_sentencepiece(tokenizer):
        return _without_prefix(lambda text: tokenizer.normalize(text).replace(MARK, " "))
    rule = getattr(getattr(tokenizer, "normalizer", None), "normalize_str", str)
    if hasattr(tokenizer, "encode_special_tokens") and _family(tokenizer) == "sentencepiece":
        return _without_prefix(lambda text: rule(text).replace(MARK, " "))
    return rule


def reads_names(tokenizer: Any) -> bool:
    """A literal "</s>" in a text becomes the token of that name. Takes what `read` takes."""
    tokenizer = _inner(tokenizer)
    if isinstance(tokenizer, TokenizerDescription):
        return tokenizer.reads_names
    return type(getattr(tokenizer, "model", None)).__name__ == "Unigram"


def spell_byte_level(piece: str) -> bytes:
    """The bytes of a byte-level piece; its UTF-8 where a character stands for no byte."""
    try:
        return piece.translate(_STAND_IN).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


def spell_sentencepiece(piece: str) -> bytes:
    return piece.replace(MARK, " ").encode()


def byte_of(piece: str) -> bytes:
    return bytes([int(piece[3:5], 16)])


def _inner(tokenizer: Any) -> Any:
    """The object that does the work inside a wrapper of transformers or mistral_common."""
    # transformers' wrapper of Mistral's wrapper
    if hasattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer"):
        tokenizer = tokenizer.tokenizer
    if hasattr(tokenizer, "instruct_tokenizer"):
        tokenizer = tokenizer.instruct_tokenizer.tokenizer
    # Mistral's SentencePieceTokenizer
    if _is_sentencepiece(model := getattr(tokenizer, "_model", None)):
        return model
    return getattr(tokenizer, "backend_tokenizer", tokenizer)


def _is_sentencepiece(tokenizer: Any) -> bool:
    return (
        hasattr(tokenizer, "id_to_piece")
        and hasattr(tokenizer, "is_byte")
        and hasattr(tokenizer, "is_unused")
    )


def _is_byte_model(tokenizer: Any) -> bool:
    return any(c.__name__ == "ByT5Tokenizer" for c in type(tokenizer).__mro__)


def _unreadable(tokenizer: Any) -> ValueError:
    return ValueError(
        f"ByteTable: cannot read a {type(tokenizer).__name__}; want a Hugging Face fast tokenizer, "
        "a tokenizers.Tokenizer, a SentencePieceProcessor, a tiktoken.Encoding, RWKV's "
        "TRIE_TOKENIZER, a tokenizer of mistral_common or the path of a "
        "tokenizer's file. Load it with AutoTokenizer.from_pretrained(folder)."
    )


@contextmanager
def _content_mode(backend: Any) -> Iterator[None]:
    """Special tokens are not parsed, nothing is padded or cut; the settings are restored after."""
    special, padding, truncation = (
        backend.encode_special_tokens,
        backend.padding,
        backend.truncation,
    )
    try:
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        yield
    finally:
        backend.encode_special_tokens = special
        if padding:
            backend.enable_padding(**padding)
        if truncation:
            backend.enable_truncation(**truncation)


def _read_backend(backend: Any) -> TokenizerDescription:
    # get_vocab, not to_str(): a description with its merges takes twice as long
    family = _family(backend)
    pieces, kind, byte_ids = _read_vocabulary(backend, family)
    added = backend.get_added_tokens_decoder()
    takes_space = _spell_normalized(backend, family, pieces)
    unknown = _unknown_id(backend)
    if unknown is not None:
        pieces[unknown], kind[unknown] = b"", UNKNOWN
    return TokenizerDescription(
        pieces,
        kind,
        family,
        partial(encode_text, backend),
        normalizer_of(backend),
        byte_ids,
        tuple(t.content for t in added.values() if t.lstrip or t.rstrip),
        _added_text(added, kind, takes_space, restarts=True),
        reads_names=reads_names(backend),
    )


def _spell_normalized(backend: Any, family: str, pieces: list[bytes]) -> set[int]:
    """Spells added tokens that are matched in the normalised text as they stand there, with a space
    where the normaliser puts one in front (Llama-2's finds only " <think>"). Returns ids that are
    pieces of the model, too, and so stand for both.
    """
    rule, takes_space = getattr(backend.normalizer, "normalize_str", str), set()
    for i, token in backend.get_added_tokens_decoder().items():
        if not token.normalized or token.special or family == "wordpiece":
            continue
        content = rule(token.content)
        spelled = spell_sentencepiece(content) if family == "sentencepiece" else content.encode()
        if family != "sentencepiece" or backend.model.token_to_id(token.content) is None:
            pieces[i] = spelled
        elif spelled != pieces[i]:
            takes_space.add(i)
    return takes_space


def _added_text(
    added: dict[int, Any], kind: np.ndarray, left: Container[int] = (), *, restarts: bool = False
) -> tuple[AddedText, ...]:
    rows = (
        AddedText(i, t.lstrip or i in left, t.rstrip, restarts)
        for i, t in added.items()
        if kind[i] == TEXT
    )
    return tuple(row for row in rows if row.left or row.right or row.restarts)


def _family(backend: Any) -> str:
    """From the decoder and the model. ValueError for a family whose ids do not give bytes."""
    model = type(backend.model).__name__
    types, marks = _component_types(backend.decoder), _replaces_mark(backend.decoder)
    suffix, prefix = (
        getattr(backend.model, name, None)
        for name in ("end_of_word_suffix", "continuing_subword_prefix")
    )
    if model == "BPE" and suffix and not prefix:
        return "word_suffix"
    if model == "WordPiece":
        return "wordpiece"
    if model == "BPE" and "ByteLevel" in types and not prefix:
        return "byte_level"
    if (marks or types & {"ByteFallback", "Metaspace"}) and (
        model == "Unigram" or model == "BPE" and not prefix
    ):
        return "sentencepiece"
    raise ValueError(
        f"ByteTable: unrecognised tokenizer family: model {model!r}, decoder {sorted(types)}. "
        "Known: byte-level BPE (decoder ByteLevel) and SentencePiece BPE or Unigram (decoder "
        "Metaspace, ByteFallback or Replace of U+2581); with lossy=True also "
        "WordPiece and BPE with an end-of-word suffix."
    )


def _is_byte_level(backend: Any) -> bool:
    return "ByteLevel" in _component_types(backend.decoder) | _component_types(
        backend.pre_tokenizer
    )


def _state(component: Any) -> dict:
    return json.loads(component.__getstate__()) if component else {}


def _component_types(component: Any) -> set[str]:
    """Types of a decoder or pre-tokenizer; a Sequence is looked into."""
    state = _state(component)
    return {
        str(part.get("type")) for part in state.get("decoders", state.get("pretokenizers", [state]))
    }


def _replaces_mark(decoder: Any) -> bool:
    state = _state(decoder)
    return any(
        p.get("type") == "Replace" and p.get("pattern") == {"String": MARK}
        for p in state.get("decoders", [state])
    )


def _read_vocabulary(backend: Any, family: str) -> tuple[list[bytes], np.ndarray, tuple[int, ...]]:
    vocab, added = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
    size = 1 + max([-1, *vocab.values(), *added])
    pieces, kind = [b""] * size, np.full(size, UNUSED, np.int8)
    spell = _speller(backend, family)
    for piece, i in vocab.items():
        pieces[i] = spell(piece)
    kind[list(vocab.values())] = TEXT
    # the 256 names are bytes only where the model falls back on them
    byte_ids = (
        {i for b in range(256) if (i := vocab.get(f"<0x{b:02X}>")) is not None}
        if _falls_back(backend, family)
        else set()
    )
    for b in byte_ids:
        pieces[b] = byte_of(backend.id_to_token(b))
    for i, token in added.items():
        if i not in byte_ids:
            # literal, unless SentencePiece's model has it too (Gemma lists its runs of marks twice)
            known = family == "sentencepiece" and token.content in vocab
            pieces[i] = spell(token.content) if known else token.content.encode()
            kind[i] = CONTROL if token.special else TEXT
    return pieces, kind, tuple(sorted(byte_ids))


def _speller(backend: Any, family: str) -> Callable[[str], bytes]:
    if family == "sentencepiece":
        return spell_sentencepiece
    if family == "wordpiece":
        prefix = backend.model.continuing_subword_prefix
        return lambda piece: piece.removeprefix(prefix).encode()
    if family == "byte_level":
        return spell_byte_level
    suffix = backend.model.end_of_word_suffix
    spell = spell_byte_level if _is_byte_level(backend) else str.encode  # CLIP, GPT-1
    return lambda piece: spell(piece.removesuffix(suffix)) + b" " * piece.endswith(suffix)


def _falls_back(backend: Any, family: str) -> bool:
    if family != "sentencepiece":
        return False
    return bool(
        getattr(backend.model, "byte_fallback", False) or _unigram(backend).get("byte_fallback")
    )


def _unknown_id(backend: Any) -> int | None:
    if _is_byte_level(backend):  # it never emits one: GPT-2 and CLIP name their stop token here
        return None
    if type(backend.model).__name__ == "Unigram":
        return _unigram(backend).get("unk_id")
    name = backend.model.unk_token
    return backend.model.token_to_id(name) if name is not None else None


def _unigram(backend: Any) -> dict:
    """Unigram's settings have no attributes; they stand around the vocabulary in its state."""
    if type(backend.model).__name__ != "Unigram":
        return {}
    state = backend.model.__getstate__()
    begin, end = state.index(b'"vocab":'), state.rindex(b"]")
    return json.loads(state[:begin] + b'"vocab":[]' + state[end + 1 :])


def _without_prefix(rule: Callable[[str], str]) -> Callable[[str], str]:
    """The rule without the space that it puts before every text, if it does."""
    if not rule("x").startswith(" "):
        return rule
    return lambda text: rule(text).removeprefix(" ") if text else rule(text)


def _read_sentencepiece(processor: Any) -> TokenizerDescription:
    ids = range(processor.vocab_size())
    spelled = [_sentencepiece_id(processor, i) for i in ids]
    return TokenizerDescription(
        [piece for piece, _ in spelled],
        np.array([kind for _, kind in spelled], np.int8),
        "sentencepiece",
        partial(encode_text, processor),
        normalizer_of(processor),
        tuple(i for i in ids if processor.is_byte(i)),
    )


def _sentencepiece_id(processor: Any, i: int) -> tuple[bytes, int]:
    """(bytes, kind) of one id."""
    piece = processor.id_to_piece(i)
    if processor.is_byte(i):
        return byte_of(piece), TEXT
    if processor.is_unknown(i):
        return b"", UNKNOWN
    if processor.is_unused(i):
        return b"", UNUSED
    if processor.is_control(i):
        return piece.encode(), CONTROL
    return spell_sentencepiece(piece), TEXT


def _read_tiktoken(encoding: Any) -> TokenizerDescription:
    pieces, kind = [b""] * encoding.n_vocab, np.full(encoding.n_vocab, UNUSED, np.int8)
    control = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    for i in range(encoding.n_vocab):
        try:
            pieces[i] = encoding.decode_single_token_bytes(i)
        except KeyError:  # ids may have holes between the ranks and the special tokens
            continue
        kind[i] = CONTROL if i in control else TEXT
    return TokenizerDescription(pieces, kind, "ranks", encoding.encode_ordinary)


def _read_tekkenizer(tekken: Any) -> TokenizerDescription:
    special = tekken.num_special_tokens
    pieces = [tekken.id_to_piece(i).encode() for i in range(special)]
    pieces += [tekken.id_to_byte_piece(i) for i in range(special, tekken.n_words)]
    kind = np.full(len(pieces), TEXT, np.int8)
    kind[:special] = CONTROL
    return TokenizerDescription(pieces, kind, "ranks", partial(encode_text, tekken))


def _read_rwkv(trie: Any) -> TokenizerDescription:
    return read_ranks(
        {piece: i for i, piece in trie.idx2token.items()}, encode=trie.encode, stop_ids=(0,)
    )


def read_ranks(
    ranks: dict[bytes, int],
    encode: Callable[[str], Sequence[int]] | None = None,
    stop_ids: Sequence[int] = (),
) -> TokenizerDescription:
    """A vocabulary given as bytes -> id: `stop_ids` are CONTROL, ids without bytes UNUSED."""
    size = 1 + max([*ranks.values(), *stop_ids])
    pieces, kind = [b""] * size, np.full(size, UNUSED, np.int8)
    for piece, i in ranks.items():
        pieces[i] = piece
    kind[list(ranks.values())] = TEXT
    kind[list(stop_ids)] = CONTROL
    return TokenizerDescription(pieces, kind, "ranks", encode)


def _read_byte_model(tokenizer: Any) -> TokenizerDescription:
    size = max(len(tokenizer), tokenizer.offset + 256)
    pieces, kind = [b""] * size, np.full(size, UNUSED, np.int8)
    for b in range(256):
        pieces[b + tokenizer.offset] = bytes([b])
    kind[tokenizer.offset : tokenizer.offset + 256] = TEXT
    for i, token in tokenizer.added_tokens_decoder.items():
        # </s> is not marked as special in itself
        control = token.special or i in tokenizer.all_special_ids
        pieces[i], kind[i] = token.content.encode(), CONTROL if control else TEXT
    return TokenizerDescription(
        pieces,
        kind,
        "bytes",
        partial(encode_text, tokenizer),
        swallows_spaces=tuple(
            t.content for t in tokenizer.added_tokens_decoder.values() if t.lstrip or t.rstrip
        ),
        added=_added_text(tokenizer.added_tokens_decoder, kind),
    )
