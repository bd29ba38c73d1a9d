"""One model's side of a conversation: its template, its tokenizer, its stop set. Templates are
never mapped as strings: each model renders the messages its own way and only the response bytes are
shared (docs/method.md, "Templates").
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from reflux.tokenalign.byte_table import ByteTable, encode_text, normalizer_of

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
    """`stop_ids` is a set: any of them ends a response. `stop_id` is the one the template itself
    ends a turn with.
    """

    def __init__(self, path: str):
        from transformers import AutoTokenizer  # seconds to import: only a run that speaks needs it

        self.path = path
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.stop_ids = self._find_stop_ids()
        self.stop_id = self._find_stop_id()
        self._rendered = lru_cache(maxsize=65536)(self._render)  # prompts come back every epoch

    @cached_property
    def table(self) -> ByteTable:
        """id -> bytes; refuses tokenizers whose ids do not spell their text."""
        return ByteTable.of(self.tokenizer)

    @cached_property
    def normalize(self) -> Callable[[str], str] | None:
        """What the tokenizer does to a text before it looks at it; None for nothing."""
        return normalizer_of(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer can produce; a model's head may be padded beyond it."""
        return len(self.tokenizer)

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """The rendered conversation up to where the response begins. Never empty: the first token
        needs a predictor.
        """
        return self._rendered(json.dumps(list(messages)))

    def _render(self, conversation: str) -> tuple[int, ...]:
        messages = json.loads(conversation)
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
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

    def encode(self, text: str) -> tuple[int, ...]:
        """Response content: control strings inside it are plain text, nothing is added."""
        return tuple(encode_text(self.tokenizer, text))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _find_stop_ids(self) -> tuple[int, ...]:
        found = [self.tokenizer.eos_token_id, *_generation_stops(self.path)]
        # all_special_ids has only
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        # tokens with a role, which Llama 3's <|eot_id|> does not have
        special |= set(self.tokenizer.all_special_ids)
        for token in TURN_ENDS:
            i = self.tokenizer.convert_tokens_to_ids(token)
            if i is not None and i in special and i != self.tokenizer.unk_token_id:
                found.append(i)
        # a padded head has more ids
        stops = tuple(sorted({i for i in found if i is not None and i < self.vocab_size}))
        if not stops:
            raise ValueError(
                f"{self.path}: the tokenizer names no end-of-sequence token; set eos_token in its "
                "tokenizer_config.json"
            )
        return stops

    def _find_stop_id(self) -> int:
        """The first stop token behind an assistant's turn as the template writes it, else the
        tokenizer's EOS.
        """
        if self.tokenizer.chat_template:
            turn = [{"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Zyx"}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            behind = self.tokenizer(text[text.rindex("Zyx") + 3 :], add_special_tokens=False)[
                "input_ids"
            ]
            ends = [i for i in behind or ids[-1:] if i in self.stop_ids]
            if ends:
                return ends[0]
        return (
            self.tokenizer.eos_token_id
            if self.tokenizer.eos_token_id is not None
            else self.stop_ids[0]
        )


def same_vocabulary(a: Chat, b: Chat) -> bool:
    """Equality of the token maps, not of sizes: same id -> same piece for every id."""
    return a.path == b.path or a.tokenizer.get_vocab() == b.tokenizer.get_vocab()


def _generation_stops(path: str) -> list[int]:
    file = Path(path) / "generation_config.json"
    if not file.exists():
        return []
    stops = json.loads(file.read_text()).get("eos_token_id") or []
    return stops if isinstance(stops, list) else [stops]
