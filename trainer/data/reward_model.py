"""Scores of a frozen Hugging Face sequence-classification model with one logit, as a task reward.

Shapes: B conversations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .local_models import check_place
from .prompt import Prompt


@dataclass(frozen=True)
class RewardModelOptions:
    """The options of the task reward_model."""

    path: str  # a local checkpoint with its tokenizer and chat template
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    max_tokens: int = 32768  # a longer conversation is not scored

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"reward_model: {name} = {value}; want at least 1")
        check_place("reward_model", self.device, self.dtype)


class RewardModel:
    """ValueError for a folder that cannot be loaded, has no chat template, no safetensors, or no
    trained head of one logit.
    """

    def __init__(self, options: RewardModelOptions):
        self.options = options
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(options.path)
            # no pickles: loading one runs what it says
            model, info = AutoModelForSequenceClassification.from_pretrained(
                options.path,
                dtype=getattr(torch, options.dtype),
                output_loading_info=True,
                use_safetensors=True,
            )
        except Exception as error:  # transformers, tokenizers and safetensors have many
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"reward_model: {options.path} cannot be loaded: {reason}. Want a local folder "
                "with config.json, weights in safetensors, and a tokenizer"
            ) from error
        if self._tokenizer.chat_template is None:
            raise ValueError(
                f"reward_model: the tokenizer in {options.path} has no chat template; add the "
                "model's own"
            )
        if info["missing_keys"] or model.config.num_labels != 1:
            # a causal language model loads too, with a head of random numbers
            raise ValueError(
                f"reward_model: {options.path} has {model.config.num_labels} labels and lacks the "
                f"weights {sorted(info['missing_keys'])}; want a trained reward model with one "
                "logit"
            )
        self._pad = self._tokenizer.pad_token_id
        if self._pad is None:
            self._pad = model.config.get_text_config().pad_token_id
        self._model = model.eval().requires_grad_(False).to(options.device)

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | Exception]:
        """The raw logit of each answer in its conversation, or why it was not scored."""
        scores: list[float | Exception] = [RuntimeError("not scored")] * len(texts)
        ids = {}
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            try:
                ids[i] = self._encode(prompt, text)
            except Exception as error:  # a template may not take a role: only that answer fails
                scores[i] = error
        by_length = sorted(ids, key=lambda i: len(ids[i]))  # least padding
        for start in range(0, len(by_length), self.options.batch_size):
            part = by_length[start : start + self.options.batch_size]
            logits = self._attempt([ids[i] for i in part])
            for i, logit in zip(part, logits, strict=True):
                scores[i] = logit
        return scores

    def _encode(self, prompt: Prompt, text: str) -> list[int]:
        messages = [*map(dict, prompt.messages), {"role": "assistant", "content": text}]
        rendered = self._tokenizer.apply_chat_template(messages, tokenize=False)
        # the template has added the special tokens
        ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if len(ids) > self.options.max_tokens:
            raise ValueError(
                f"{len(ids)} tokens for the reward model; max_tokens is {self.options.max_tokens}"
            )
        return ids

    def _attempt(self, ids: list[list[int]]) -> Sequence[float | Exception]:
        """The logits of a batch, or its error for each of its texts."""
        try:
            return self._forward(ids)
        except Exception as error:
            return [error] * len(ids)

    @torch.no_grad()
    def _forward(self, ids: list[list[int]]) -> list[float]:
        pad = self._pad_of(ids)
        # the model reads its logit at the last token that is no pad
        self._model.config.get_text_config().pad_token_id = pad
        width = max(map(len, ids))
        ids_BL = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids])
        real_BL = torch.arange(width) < torch.tensor([[len(row)] for row in ids])
        device = self.options.device
        logits_B1 = self._model(
            input_ids=ids_BL.to(device), attention_mask=real_BL.long().to(device)
        ).logits
        return logits_B1[:, 0].float().tolist()

    def _pad_of(self, ids: Sequence[Sequence[int]]) -> int:
        """The model's own pad; without one, an id that no text of the batch holds. The EOS would
        not do: a text ends with it, and its logit would be read in front of it.
        """
        if self._pad is not None:
            return self._pad
        used = set().union(*ids)
        rows = self._model.get_input_embeddings().num_embeddings
        unused = next((i for i in range(rows) if i not in used), None)
        if unused is None:
            raise ValueError(
                "the tokenizer has no pad token, and a batch holds every id that there is; give "
                "it a pad_token, or set batch_size = 1"
            )
        return unused
