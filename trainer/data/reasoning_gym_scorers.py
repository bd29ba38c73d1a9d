"""Scores of reasoning_gym data sets whose own scorers evaluate the answer by `eval` or by sympy.

Lists are compared by the data set's rule after parsing them; expressions are written anew from
their parsed tree before the data set's scorer reads them. The scores are those of reasoning_gym
0.1.25, but for an answer outside the grammar, which is wrong.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .expressions import parse_expression, parse_literal

# score_answer of a data set: (data set, answer, entry) -> score
Scorer = Callable[[Any, str, Mapping[str, Any]], float]
FUNCTIONS = frozenset(
    "sin cos tan sec csc cot asin acos atan sinh cosh tanh asinh acosh atanh exp log ln sqrt Abs "
    "erf Integral".split()
)
# of integration, with or without a digit, and two numbers
CONSTANTS = frozenset(("E", "pi", *(c + d for c in "CcKk" for d in ("", *"0123456789"))))
WRONG_IN_GAMES = 0.01  # what their own scorers give for an answer that they cannot read


def score_answer(source: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """The score in [0, 1] of an answer to an entry of the data set `source`."""
    name = entry["metadata"].get("source_dataset")
    if (parts := getattr(source, "datasets", None)) and name in parts:
        return score_answer(parts[name], answer, entry)  # a composite
    scorer = SCORERS.get(name)
    return float(scorer(source, answer, entry) if scorer else source.score_answer(answer, entry))


def _string_insertion(source: Any, answer: str, entry: Mapping[str, Any]) -> float:
    if answer == entry["answer"]:
        return 1.0
    parts = parse_literal(answer)
    if isinstance(parts, list | tuple | str) and all(isinstance(part, str) for part in parts):
        return 0.1 * ("".join(parts) == entry["answer"])
    return 0.0


def _spiral_matrix(source: Any, answer: str, entry: Mapping[str, Any]) -> float:
    gold = entry["answer"].strip()
    if answer.strip() == gold:
        return 1.0
    parts = parse_literal(answer)
    if isinstance(parts, list | tuple | str):
        return 0.1 * (" ".join(map(str, parts)) == gold)
    return 0.0


def _binary_matrix(source: Any, answer: str, entry: Mapping[str, Any]) -> float:
    if answer == entry["answer"]:
        return 1.0
    return 0.1 * (_grid(answer) == entry["answer"])


def _n_queens(source: Any, answer: str, entry: Mapping[str, Any]) -> float:
    solutions = entry["metadata"]["valid_answers"]
    if answer in solutions:
        return 1.0
    return 0.5 * (_grid(answer) in solutions)


def _grid(answer: str) -> str | None:
    """A list of lists as the lines that the data sets write."""
    rows = parse_literal(answer)
    if not isinstance(rows, list | tuple | str):
        return None
    if not all(isinstance(row, list | tuple | str) for row in rows):
        return None
    return "\n".join(" ".join(map(str, row)) for row in rows)


def _integration(source: Any, answer: str, entry: Mapping[str, Any]) -> float:
    names = CONSTANTS | {str(entry["metadata"]["variable"])}
    expression = parse_expression(answer, names, FUNCTIONS)
    return 0.0 if expression is None else source.score_answer(expression, entry)


def _polynomial(source: Any, answer: str, entry: Mapping[str, Any]) -> float:
    expression = parse_expression(answer, frozenset(map(str, source.config.variables)))
    return 0.0 if expression is None else source.score_answer(expression, entry)


def _arithmetic(source: Any, answer: str, entry: Mapping[str, Any]) -> float:
    expression = parse_expression(answer, whole=True)
    return WRONG_IN_GAMES if expression is None else source.score_answer(expression, entry)


SCORERS: dict[str, Scorer] = {
    "string_insertion": _string_insertion,
    "spiral_matrix": _spiral_matrix,
    "binary_matrix": _binary_matrix,
    "n_queens": _n_queens,
    "simple_integration": _integration,
    "intermediate_integration": _integration,
    "polynomial_multiplication": _polynomial,
    "puzzle24": _arithmetic,
    "countdown": _arithmetic,
}
