"""Scores of a frozen Hugging Face sequence-classification model with one logit, for tasks without a
verifier.

Shapes: B conversations, L tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .batch import Prompt


@dataclass(frozen=True)
class RewardModel:
    """path: a local checkpoint with its tokenizer and chat template. max_tokens: longer
    conversations are failures.
    """

    path: str
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    max_tokens: int = 32768

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"reward_model: batch_size = {self.batch_size}; want at least 1")
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"reward_model: dtype = {self.dtype!r}; want float32, bfloat16 or float16"
            )
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"reward_model: the tokenizer in {self.path} has no chat template; add the model's "
                "own"
            )
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model, info = AutoModelForSequenceClassification.from_pretrained(
            self.path, dtype=dtype, output_loading_info=True
        )
        if info["missing_keys"] or model.config.num_labels != 1:
            # a causal language model loads too, with a head of random numbers
            raise ValueError(
                f"reward_model: {self.path} has {model.config.num_labels} labels and lacks the "
                f"weights {sorted(info['missing_keys'])}; want a trained reward model with one "
                "logit"
            )
        # the model reads its logit at the last token that is no pad
        model.config.pad_token_id = tokenizer.pad_token_id
        object.__setattr__(self, "_tokenizer", tokenizer)
        object.__setattr__(self, "_model", model.eval().requires_grad_(False).to(self.device))

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | Exception]:
        """The raw logit of each answer in its conversation, or what kept it from being scored."""
        scores: list[float | Exception] = [RuntimeError("not scored")] * len(texts)
        ids = {}
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            try:
                ids[i] = self._encode(prompt, text)
            except Exception as error:
                # a template may refuse a role: that answer fails, the others do not
                scores[i] = error
        by_length = sorted(ids, key=lambda i: len(ids[i]))  # least padding
        for start in range(0, len(by_length), self.batch_size):
            part = by_length[start : start + self.batch_size]
            try:
                values = self._forward([ids[i] for i in part])
            except Exception as error:
                values = [error] * len(part)
            for i, value in zip(part, values, strict=True):
                scores[i] = value
        return scores

    def _encode(self, prompt: Prompt, text: str) -> list[int]:
        messages = [*prompt.messages, {"role": "assistant", "content": text}]
        rendered = self._tokenizer.apply_chat_template(messages, tokenize=False)
        # the template wrote them already
        ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"{len(ids)} tokens for the reward model; max_tokens is {self.max_tokens}"
            )
        return ids

    @torch.no_grad()
    def _forward(self, ids: list[list[int]]) -> list[float]:
        padded = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.device)
        logits_B1 = self._model(
            input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
        ).logits
        return logits_B1[:, 0].float().tolist()
