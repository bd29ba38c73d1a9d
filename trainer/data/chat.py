"""One model's side of a conversation: its template, its tokenizer, its stop set.

Templates are never mapped as strings: each model renders the messages with its own, and only the
response bytes are shared (docs/method.md, "Templates").
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from reflux.tokenalign.byte_table import ByteTable, encode_text, normalizer_of
from reflux.tokenalign.table_cache import cached_table

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


class Chat:
    """Renders prompts, encodes and decodes text, and knows which tokens end a response.

    stop_ids: any of them ends a response. stop_id: the one that the template ends a turn with.
    """

    def __init__(self, path: str):
        """path: a folder with a tokenizer. ValueError where it has no end-of-sequence token."""
        from transformers import AutoTokenizer  # seconds to import

        self.path = path
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # transformers raises what its parsers raise
            what = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{path}: transformers cannot read its tokenizer ({type(error).__name__}: {what})"
            ) from error
        self.stop_ids = self._find_stop_ids()
        self.stop_id = self._find_stop_id()
        self._rendered = lru_cache(maxsize=65536)(self._render)  # prompts come back every epoch

    @cached_property
    def table(self) -> ByteTable:
        """id -> bytes, verified by this tokenizer; from the cache of earlier runs if it is there.

        ValueError for a tokenizer whose ids do not spell their text.
        """
        return cached_table(self.path, self.tokenizer)

    @cached_property
    def normalize(self) -> Callable[[str], str]:
        """What the tokenizer makes of a text before it splits it."""
        return normalizer_of(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer can produce; a model's head may be padded beyond it."""
        return len(self.tokenizer)

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The rendered conversation up to where the response begins.

        Never empty, for the first response token needs a predictor: ValueError.
        """
        return self._rendered(json.dumps(list(messages)))

    def _render(self, conversation: str) -> tuple[int, ...]:
        messages = json.loads(conversation)
        if self.tokenizer.chat_template:
            text = self._through_template(messages, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = "\n".join(m["content"] for m in messages)
            ids = self.tokenizer(text)["input_ids"]
            ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        if not ids:
            raise ValueError(
                f"{self.path}: the prompt {text!r} has no token. Give it a text, or the tokenizer "
                "a BOS token"
            )
        return tuple(ids)

    def _through_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        assert isinstance(text, str)  # of one conversation
        return text

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of response content: control strings in it are plain text, nothing is added."""
        return tuple(encode_text(self.tokenizer, text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without control tokens."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # of one row of ids
        return text

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
            suffix = text[text.rindex("Zyx") + 3 :]
            behind = self.tokenizer(suffix, add_special_tokens=False)["input_ids"]
            ends = [i for i in behind or ids[-1:] if i in self.stop_ids]
            if ends:
                return ends[0]
        eos = self.tokenizer.eos_token_id
        return self.stop_ids[0] if eos is None else eos


def same_vocabulary(a: Chat, b: Chat) -> bool:
    """Every id has the same piece in both."""
    return a.path == b.path or a.tokenizer.get_vocab() == b.tokenizer.get_vocab()


def _generation_stops(path: str) -> list[int]:
    file = Path(path) / "generation_config.json"
    if not file.exists():
        return []
    stops = json.loads(file.read_text()).get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    if not all(type(i) is int for i in stops):
        raise ValueError(f"{file}: eos_token_id = {stops}; want an id, or a list of ids")
    return stops
