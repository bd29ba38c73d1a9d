"""Antidistillation sampling (Savani et al., arXiv:2504.13146), first half: two copies of a proxy on
both sides of its weights along the gradient of its downstream loss.

    python -m reflux.trainer.studies.antidistillation --proxy FOLDER --data FILE --out FOLDER

    loss(theta)    mean negative log-likelihood of the response tokens of FILE, worked answers that
                   the provider keeps to itself
    plus, minus    theta + epsilon g and theta - epsilon g, g the gradient of the loss at theta

A student that ascends log p(token) by a step of size a changes the loss by a <g, grad log p(token)>
to first order, and that product is

    (log p_plus(token) - log p_minus(token)) / (2 epsilon) + O(epsilon^2)

So tokens for which this is large teach least. `[defence] antidistillation = OUT` adds `penalty`
times that to the teacher's logits (rollouts/defences.py). Writes plus/, minus/ and
antidistillation.json (epsilon, rows, loss, norm of g).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reflux.trainer.data.chat import Chat
from reflux.trainer.runs.files import write_json

from .worked_answers import WorkedAnswer, batches, load_answers, load_model, save_model

ROWS = 64  # of a batch


def loss_gradient(model: Any, answers: list[WorkedAnswer]) -> tuple[float, dict[str, Tensor]]:
    """(mean loss of a response token in nats, its gradient by parameter name), in the model's
    dtype.
    """
    model.zero_grad()
    tokens = sum(len(a.response_ids) for a in answers)
    total = 0.0
    for batch in batches(answers, ROWS):
        loss = cross_entropy(batch.logits_of(model), batch.target_T, reduction="sum") / tokens
        loss.backward()
        total += float(loss.detach())
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, found


@torch.no_grad()
def move(model: Any, gradient: dict[str, Tensor], step: float) -> None:
    """theta + step g, in place."""
    for name, parameter in model.named_parameters():
        if name in gradient:
            parameter.add_(gradient[name], alpha=step)


def write_copies(
    proxy: str, data: Path, out: Path, epsilon: float, limit: int
) -> dict[str, float | int]:
    """plus/ and minus/ in `out`; what antidistillation.json holds."""
    model = load_model(proxy)
    answers = load_answers(data, Chat(proxy), limit)
    loss, gradient = loss_gradient(model, answers)
    norm = float(sum(float(g.double().square().sum()) for g in gradient.values())) ** 0.5
    for name, step in (("plus", epsilon), ("minus", -2 * epsilon)):
        move(model, gradient, step)
        save_model(model, out / name, proxy)
    about = {"epsilon": epsilon, "rows": len(answers), "loss": loss, "gradient_norm": norm}
    write_json(out / "antidistillation.json", about)
    return about


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.antidistillation",
        description="Write the two copies of a proxy that antidistillation sampling compares.",
    )
    parser.add_argument("--proxy", required=True, help="model folder with the teacher's tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines: prompt, response")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epsilon", type=float, default=0.01)
    parser.add_argument("--limit", type=int, default=1000, help="rows of the data; 0: all")
    args = parser.parse_args(arguments)
    if not args.epsilon > 0:
        parser.error(f"--epsilon {args.epsilon}; want > 0")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        about = write_copies(args.proxy, args.data, args.out, args.epsilon, args.limit)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
