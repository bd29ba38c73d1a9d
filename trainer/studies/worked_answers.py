"""What the rivals that are trained outside a run share (doge.py, antidistillation.py): models in
plain transformers, and worked answers as rows of ids.

Shapes: N rows, L row length, T response tokens (stop included), D hidden size, V vocabulary.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflux.trainer.data.chat import Chat
from reflux.trainer.data.sources import Lines

# of a model folder: what is copied to a folder with other weights
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class WorkedAnswer:
    """Ids of a prompt and of its response, the stop token included."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class WorkedBatch:
    """Rows padded on the right; where the responses are predicted, and what they are."""

    ids_NL: Tensor
    real_NL: Tensor  # bool
    predictor_NL: Tensor  # bool, T of them true: positions whose next token is of a response
    target_T: Tensor

    def logits_of(self, model: Any) -> Tensor:
        """[T, V] at the predictors, in the model's dtype."""
        logits_NLV = model(input_ids=self.ids_NL, attention_mask=self.real_NL.long()).logits
        return logits_NLV[self.predictor_NL]


def load_answers(path: Path, chat: Chat, limit: int = 0) -> list[WorkedAnswer]:
    """Rows of a JSON-lines file with the columns prompt and response; the first `limit`, 0: all.
    ValueError for a file without them.
    """
    answers = []
    for row in read_rows(path, ("prompt", "response"), limit):
        prompt = chat.prompt_ids(({"role": "user", "content": row["prompt"]},))
        answers.append(WorkedAnswer(prompt, (*chat.encode(row["response"]), chat.stop_id)))
    return answers


def read_rows(path: Path, columns: Sequence[str], limit: int = 0) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; the first `limit`, 0: all. ValueError where it has none, where a
    line is no object in JSON, or where a row has no text in one of `columns`.
    """
    lines, wanted = Lines(path, limit or None), " and ".join(columns)
    if not len(lines):
        raise ValueError(f"{path}: no rows; want some with {wanted}")
    rows = [lines[i] for i in range(len(lines))]
    for i, row in enumerate(rows):
        found = sorted(key for key, value in row.items() if isinstance(value, str))
        if not set(columns) <= set(found):
            raise ValueError(f"{lines.location(i)}: texts in {found}; want {wanted}")
    return rows


def pad(answers: Sequence[WorkedAnswer]) -> WorkedBatch:
    """One batch of them."""
    rows = [a.prompt_ids + a.response_ids for a in answers]
    shape = len(rows), max(map(len, rows))
    ids_NL = torch.zeros(shape, dtype=torch.long)
    real_NL, predictor_NL = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape).bool()
    for i, (row, answer) in enumerate(zip(rows, answers)):
        ids_NL[i, : len(row)] = torch.tensor(row)
        real_NL[i, : len(row)] = True
        predictor_NL[i, len(answer.prompt_ids) - 1 : len(row) - 1] = True
    target_T = torch.tensor([t for a in answers for t in a.response_ids])
    return WorkedBatch(ids_NL, real_NL, predictor_NL, target_T)


def batches(
    answers: Sequence[WorkedAnswer], size: int, seed: int | None = None
) -> Iterator[WorkedBatch]:
    """One pass over them, `size` rows at a time; in an order drawn by the seed, None: as given."""
    order = list(range(len(answers)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    for start in range(0, len(order), size):
        yield pad([answers[i] for i in order[start : start + size]])


def load_model(path: str) -> Any:
    """A causal LM of transformers in float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def save_model(model: Any, out: Path, tokenizer_of: str) -> None:
    """A model folder with the tokenizer of another one."""
    model.save_pretrained(out)
    for name in (*TOKENIZER_FILES, "chat_template.jinja"):
        if (source := Path(tokenizer_of) / name).exists():
            shutil.copyfile(source, out / name)
