"""One model's side of a conversation: its template, its tokenizer, its stop set.

Templates are never mapped as strings: each model renders the messages with its own, and only the
response bytes are shared (docs/method.md, "Templates").
"""

import hashlib
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from reflux.tokenalign.byte_table import ByteTable, encode_text, normalizer_of
from reflux.tokenalign.offsets import spell
from reflux.tokenalign.table_cache import cached_table, key_of
from reflux.trainer.adapter_folder import base_of, file_of, tokenizer_of

from .time_limit import time_limit
from .tokenizer_files import TEMPLATE, read_template
from .tokenizer_health import panics_in_words, warn_of_another_tokenizer

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no text
TEMPLATE_S = 10.0  # seconds in which a template has to render one conversation
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
)


class ReadsPrompts(Protocol):
    """What a section says of a model that reads prompts."""

    @property
    def path(self) -> str: ...

    @property
    def template(self) -> str: ...

    @property
    def template_arguments(self) -> Mapping[str, Any]: ...


class Chat:
    """Renders prompts, encodes and decodes text, and knows which tokens end a response.

    stop_ids: any of them ends a response. stop_id: the one that the template ends a turn with.
    """

    def __init__(self, path: str, template: str = "", arguments: Mapping[str, Any] | None = None):
        """path: a folder with a tokenizer. template: a file with another template than its own.
        arguments: of the template. ValueError where the tokenizer or the file cannot be loaded,
        where the template fails or shows no message, and where there is no end-of-sequence token.
        """
        self.path, self.arguments = path, dict(arguments or {})
        # of an adapter's folder without tokenizer, its base's
        self._folder = tokenizer_of(path)
        self.tokenizer = _load_tokenizer(self._folder)
        warn_of_another_tokenizer(self._folder, self.tokenizer)
        self.template_file = Path(template) if template else _template_file(self._folder)
        if template:
            self.tokenizer.chat_template = read_template(self.template_file)
        self._check_template()
        self.stop_ids = self._find_stop_ids()
        self.stop_id = self._find_stop_id()
        self._rendered = lru_cache(maxsize=65536)(self._render)  # prompts come back every epoch

    @classmethod
    def of(cls, model: ReadsPrompts) -> "Chat":
        """The model of a section, as it says that it is to be talked to."""
        return cls(model.path, model.template, model.template_arguments)

    @property
    def key(self) -> str:
        """Of everything that prompts are rendered with, as it lies on the disk now; for caches."""
        spec = [key_of(Path(self._folder)), self.tokenizer.chat_template, sorted(self.arguments)]
        spec += [repr(self.arguments[name]) for name in sorted(self.arguments)]
        return hashlib.sha256(json.dumps(spec).encode()).hexdigest()

    @cached_property
    def table(self) -> ByteTable:
        """id -> bytes, verified by this tokenizer; from the cache of earlier runs if it is there.

        ValueError for a tokenizer whose ids do not spell their text.
        """
        return cached_table(self._folder, self.tokenizer)

    @cached_property
    def normalize(self) -> Callable[[str], str]:
        """What the tokenizer makes of a text before it splits it."""
        return normalizer_of(self.tokenizer)

    @cached_property
    def positions(self) -> int | None:
        """max_position_embeddings of the folder's config.json, or of its text part; None where it
        sets no limit.
        """
        file = Path(base_of(self.path)) / "config.json"
        if not file.exists() or _torn(file) is not None:  # loading the model will say so
            return None
        config = json.loads(file.read_bytes())
        text = config.get("text_config") or {}
        return config.get("max_position_embeddings") or text.get("max_position_embeddings")

    def has_room(self, tokens: int) -> bool:
        """Whether the model has positions for a row of so many tokens, of which the last one is
        predicted and not read.
        """
        return self.positions is None or tokens <= self.positions + 1

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer can produce; a model's head may be padded beyond it."""
        return len(self.tokenizer)

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The rendered conversation up to where the response begins; without a message, what a
        document begins behind: the BOS token, or the EOS token of the document before it.

        Never empty, for the first response token needs a predictor: ValueError.
        """
        return self._rendered(json.dumps(list(messages)))

    def prompt_lengths(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[int]:
        """`len(prompt_ids(messages))` of each, on all cores where the tokenizer is a fast one."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [len(self.prompt_ids(messages)) for messages in conversations]
        plain = not self.tokenizer.chat_template
        texts = [self._text_of(list(map(dict, c))) if c else "" for c in conversations]
        self.tokenizer("")  # switches off truncation that its file may ask for
        encoded = backend.encode_batch_fast(texts, add_special_tokens=plain)
        lengths = [len(e) for e in encoded]
        if plain:
            eos = self.tokenizer.eos_token_id
            lengths = [n - (e.ids[-1:] == [eos]) for n, e in zip(lengths, encoded)]
        lengths = [n if c else 1 for n, c in zip(lengths, conversations)]
        for text, n in zip(texts, lengths):
            if not n:
                raise ValueError(self._no_token(text))
        return lengths

    def _render(self, conversation: str) -> tuple[int, ...]:
        messages = json.loads(conversation)
        if not messages:
            bos = self.tokenizer.bos_token_id
            return (self.stop_id if bos is None else bos,)
        text = self._text_of(messages)
        if self.tokenizer.chat_template:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(text)["input_ids"]
            ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        if not ids:
            raise ValueError(self._no_token(text))
        return tuple(ids)

    def _no_token(self, text: str) -> str:
        return (
            f"{self.path}: the prompt {text!r} has no token. Give it a text, or the tokenizer a "
            "BOS token"
        )

    def _text_of(self, messages: list[dict[str, str]]) -> str:
        """A rendered prompt."""
        if self.tokenizer.chat_template:
            return self._through_template(messages, add_generation_prompt=True)
        return "\n".join(m["content"] for m in messages)

    def _through_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        try:
            return self._apply_template(messages, add_generation_prompt)
        except Exception as error:
            raise ValueError(self._template_failure(messages, error)) from error

    def _apply_template(self, messages: list[dict[str, str]], generate: bool) -> str:
        with time_limit(TEMPLATE_S):
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generate, tokenize=False, **self.arguments
            )
        assert isinstance(text, str)  # of one conversation
        return text

    def _template_failure(self, messages: list[dict[str, str]], error: Exception) -> str:
        """Where the template failed, on what, and what to do."""
        roles = ", ".join(m["role"] for m in messages)
        fix = "Mend the template, or take that of the model's publisher"
        without = [m for m in messages if m["role"] != "system"]
        if without and len(without) < len(messages):
            try:
                self._apply_template(without, generate=True)
                fix = (
                    "It takes the conversation without its system message: leave system messages "
                    "out of the data, or put their text into the user's"
                )
            except Exception:
                pass  # the system message is not what it fails on
        where = f"{self.template_file}: chat_template{_template_line(error)}"
        what = f"{type(error).__name__}: {str(error).rstrip('.')}"
        return f"{where} fails on a conversation with the roles {roles}: {what}. {fix}"

    def _check_template(self) -> None:
        """ValueError where it fails on one message of the user, or does not show it."""
        if not self.tokenizer.chat_template:
            return
        texts = {self._text_of([{"role": "user", "content": text}]) for text in ("Ask", "Zyx")}
        if len(texts) == 1:
            raise ValueError(
                f"{self.template_file}: chat_template makes {texts.pop()[:80]!r} of any "
                "message of the user: every prompt would be the same. Take the template of the "
                "model's publisher, or remove it for a base model"
            )

    def token_starts(self, text: str) -> list[int]:
        """The character at which each token of a text begins; every character, where the tokenizer
        does not tell.
        """
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in plain["offset_mapping"]]

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of response content: control strings in it are plain text, nothing is added."""
        with panics_in_words(self.path, text):
            return tuple(encode_text(self.tokenizer, text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without control tokens."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # of one row of ids
        return text

    def whole_text(self, ids: Sequence[int], text: str) -> str:
        """`text`, as `decode` gives it of `ids`, without the character that they end inside: a
        length stop may cut one, and the decoder writes U+FFFD for its bytes.
        """
        spelled = spell(self.table, ids)
        if spelled.text is None or not spelled.cut:
            return text
        meant = len(spelled.text) - len(spelled.text.rstrip(REPLACEMENT))  # U+FFFD of the writer
        return text.rstrip(REPLACEMENT) + REPLACEMENT * meant

    def _find_stop_ids(self) -> tuple[int, ...]:
        candidates = [self.tokenizer.eos_token_id, *_generation_stops(self.path)]
        # all_special_ids has only tokens with a role, and Llama 3's <|eot_id|> has none
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        for token in TURN_ENDS:
            i = self.tokenizer.convert_tokens_to_ids(token)
            if i is not None and i in special and i != self.tokenizer.unk_token_id:
                candidates.append(i)
        # ids beyond the vocabulary are padding of the head
        stops = tuple(sorted({i for i in candidates if i is not None and i < self.vocab_size}))
        if not stops:
            raise ValueError(
                f"{self.path}: the tokenizer names no end-of-sequence token; set eos_token in its "
                "tokenizer_config.json"
            )
        return stops

    def _find_stop_id(self) -> int:
        """The first stop token that the template puts behind a turn, else the tokenizer's EOS."""
        if self.tokenizer.chat_template:
            turn = [{"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Zyx"}]
            text = self._through_template(turn)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            suffix = text.rpartition("Zyx")[2]
            behind = self.tokenizer(suffix, add_special_tokens=False)["input_ids"]
            ends = [i for i in behind or ids[-1:] if i in self.stop_ids]
            if ends:
                return ends[0]
        eos = self.tokenizer.eos_token_id
        return self.stop_ids[0] if eos is None else eos


def same_vocabulary(a: Chat, b: Chat) -> bool:
    """Every id has the same piece in both."""
    return a.path == b.path or a.tokenizer.get_vocab() == b.tokenizer.get_vocab()


def _load_tokenizer(path: str) -> Any:
    if not Path(path).is_dir():
        raise ValueError(
            f"{path}: no such folder; want a Hugging Face folder with a tokenizer. Ids of the hub "
            "are not downloaded"
        )
    from transformers import AutoTokenizer  # seconds to import

    try:
        return AutoTokenizer.from_pretrained(path)
    except (KeyboardInterrupt, SystemExit):
        raise
    # KeyError, TypeError, the exceptions of tokenizers, and a panic of its Rust code, which is a
    # BaseException
    except BaseException as error:
        torn = next((x for f in sorted(Path(path).glob("*.json")) if (x := _torn(f))), None)
        if torn is not None:
            raise ValueError(f"{torn}. Copy or download it again") from error
        lines = (str(error).strip() or "no message").splitlines()
        raise ValueError(
            f"{path}: transformers cannot read its tokenizer ({type(error).__name__}: {lines[0]}). "
            "Want tokenizer.json and tokenizer_config.json as save_pretrained writes them"
        ) from error


def _torn(file: Path) -> str | None:
    """Why a JSON file cannot be read."""
    try:
        table = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"{file}: no JSON ({type(error).__name__}: {error}); it is torn or was edited"
    if not isinstance(table, dict):
        return f"{file}: {type(table).__name__} in JSON; want an object"
    return None


def _template_file(path: str) -> Path:
    own = Path(path) / TEMPLATE
    return own if own.exists() else Path(path) / "tokenizer_config.json"


def _template_line(error: Exception) -> str:
    """', line N' of the template, where that is known."""
    line = getattr(error, "lineno", None)
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == "<template>" else line
    return f", line {line}," if line else ""


def _generation_stops(path: str) -> list[int]:
    file = Path(file_of(path, "generation_config.json"))
    if not file.exists():
        return []
    if (torn := _torn(file)) is not None:
        raise ValueError(f"{torn}. Copy or download it again")
    stops = json.loads(file.read_text()).get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    if not all(type(i) is int for i in stops):
        raise ValueError(f"{file}: eos_token_id = {stops}; want an id or a list of ids")
    return stops
