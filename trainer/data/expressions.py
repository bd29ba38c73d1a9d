"""Text as data: parsed by Python's grammar, never evaluated. What is not in the grammar is None."""

import ast
from collections.abc import Container
from typing import Any

LONGEST = 20_000  # characters; a longer text is no answer, and deep ones can exhaust the parser
LONGEST_EXPRESSION = 2_000
MOST_BITS = 4096  # of a number: 9**9**9 is a short text
LARGEST_EXPONENT = 100
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)


def parse_literal(text: str) -> Any:
    """The value of a Python literal of lists, tuples, texts, numbers, booleans and None; None for
    every other text.
    """
    tree = _parsed(text, LONGEST)
    return None if tree is None or not _is_literal(tree) else ast.literal_eval(tree)


def _is_literal(node: ast.expr) -> bool:
    match node:
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return all(map(_is_literal, parts))
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=ast.Constant(value=value)):
            return type(value) in (int, float)
        case ast.Constant(value=value):
            return type(value) in (str, int, float, bool, type(None))
    return False


def parse_expression(
    text: str, names: Container[str] = (), functions: Container[str] = (), *, whole: bool = False
) -> str | None:
    """The same arithmetic expression, written anew from its tree, or None.

    Numbers, + - * / **, brackets, `names`, and calls of `functions` with positional arguments.
    whole: integers only.
    """
    tree = _parsed(text, LONGEST_EXPRESSION)
    if tree is None:
        return None
    try:
        _bits(tree, names, functions, (int,) if whole else (int, float))
        return ast.unparse(tree)
    except (_Outside, RecursionError):
        return None


class _Outside(Exception):
    """Of the grammar."""


def _bits(node: ast.expr, names: Container[str], functions: Container[str], numbers: tuple) -> int:
    """An upper bound of the size of the value's numbers, in bits; _Outside of the grammar."""
    match node:
        case ast.Constant(value=value) if type(value) in numbers:
            return _within(value.bit_length() + 1 if isinstance(value, int) else 64)
        case ast.Name(id=name) if name in names:
            return 1
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _bits(operand, names, functions, numbers)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]):
            if name in functions:
                return max(_bits(arg, names, functions, numbers) for arg in args)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, OPERATORS):
            a, b = (_bits(side, names, functions, numbers) for side in (left, right))
            if not isinstance(op, ast.Pow):
                return _within(a + b)
            return _within(a * _exponent(right))
    raise _Outside


def _within(bits: int) -> int:
    if bits > MOST_BITS:
        raise _Outside
    return bits


def _exponent(node: ast.expr) -> int:
    """Its largest magnitude: a number or a fraction of numbers; 1 where a name keeps it from being
    multiplied out.
    """
    if any(isinstance(part, ast.Name) for part in ast.walk(node)):
        return 1
    match node:
        case ast.UnaryOp(operand=operand):
            return _exponent(operand)
        case ast.BinOp(op=ast.Div(), left=ast.Constant() as left, right=ast.Constant(value=int())):
            return _exponent(left)
        case ast.Constant(value=int() | float() as value) if abs(value) <= LARGEST_EXPONENT:
            return max(1, int(abs(value)))
    raise _Outside


def _parsed(text: str, longest: int) -> ast.expr | None:
    if len(text) > longest or "\0" in text:
        return None
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
