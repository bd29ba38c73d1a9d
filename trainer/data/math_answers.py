"""How the grader `math` reads an answer: as LaTeX, by math_verify, and as the one number that
stands among words ("18 eggs"), which LaTeX would have as a product of letters.
"""

import logging
import re
from decimal import Decimal
from functools import lru_cache

Reading = list  # of one text: expressions and how they are spelled; math_verify's own type

CURRENCY = re.compile(r"(?<!\\)((?:\\\\)*)\\\$")  # "\$" is no border of maths
NUMBER = re.compile(
    r"(?<![\w.,/^\\{-])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:/\d+)?"
    r"(?=$|[\s.;:?)]|,\s)"
)
# bold, italics and code, where words may begin and end: the stars of 2**7 are a power, those of
# a *b* c products
EMPHASIS = re.compile(
    r"""(?<![^\s(\["'])(^[*_]|\*{2,3}|_{2,3}|`{1,3})"""  # the mark, where a word may begin
    r"""(?=\S)((?:(?!\1).)+)(?<=\S)"""
    r"""\1(?=$|[\s.,;:!?)\]"'])""",  # the same mark, where one may end
    re.DOTALL,
)
# half of it: the other half stands before the marker, "**Answer:** 7"
OPENED = re.compile(r"(?<=\S)(?:\*\*|__?)(?=\.?$)|^(?:\*{1,3}|_{1,3})(?=\s)")
DISPLAYED = re.compile(r"(?<!\\)\\(?:\[(.*?)(?<!\\)\\\]|\((.*?)(?<!\\)\\\))", re.DOTALL)
SCIENTIFIC = re.compile(  # "1e6", in LaTeX a product with Euler's number
    r"(?<![\w.^\\])((?:\d{1,50}(?:\.\d{0,50})?|\.\d{1,50})[eE][-+]?\d{1,3})(?!\w|\.\d)"
)
WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
ARTICLE = re.compile(r"\b[Aa]n?\s+(?=[^\W\d_]{3})")  # "a day"; a lone a is a variable
# two letters are a product, "2 xy", unless they are one of these
SHORT = frozenset("of is in on at by we he it so as cm mm km kg mg ml oz ft lb hr".split())
# say nothing beside a number
FILLERS = frozenset("of is in on at by we he it so as the".split())
# words that make something else of the number beside them
CHANGES = frozenset(
    """
    not no nor neither never or and to between than least most wrong incorrect plus minus negative
    over under above below hundred hundreds thousand thousands million millions billion billions
    trillion trillions dozen dozens half halves third thirds quarter quarters fourths fifths sixths
    sevenths eighths ninths tenths hundredths squared cubed root roots sqrt sin cos tan cot sec csc
    log exp mod infinity factorial choose power twice thrice double triple without except but out
    false
    """.split()
)


def read_text(text: str) -> Reading:
    """The last expression of a text. Empty: it has none."""
    from math_verify import parse

    # it warns that its timeouts are off: ours is on
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text = SCIENTIFIC.sub(_written_out, CURRENCY.sub(r"\1", text))
    return parse(text, parsing_timeout=None)


def _written_out(number: re.Match[str]) -> str:
    return f"{Decimal(number[1]):f}"


def _plain(text: str) -> str:
    """Without mark-up, escaped dollars and powers of ten in letters."""
    text = CURRENCY.sub(r"\1", text)
    for _ in range(2):  # code in bold
        text = EMPHASIS.sub(r"\2", text.strip())
    text = DISPLAYED.sub(lambda maths: f"${maths[1] or maths[2] or ''}$", OPENED.sub("", text))
    return SCIENTIFIC.sub(_written_out, text.strip())


def read_answer(text: str) -> list[Reading]:
    """What a text that is an answer, and nothing else, may mean; none of them is empty."""
    number = _number_among_words(_plain(text))
    readings = [read_latex(text), read_text(f"${number}$") if number else []]
    return [reading for reading in readings if reading]


def read_latex(text: str) -> Reading:
    """A text that is one expression; unmarked, (1,2) and x^2+1 are not seen as maths."""
    text = _plain(text)
    return read_text(text if "$" in text or "\\boxed" in text else f"${text}$")


def names_another_thing(text: str, answer: str) -> bool:
    """Whether both have words and neither has all of the other's: 20 cents are not 20 dollars."""
    a, b = _words_beside(text), _words_beside(answer)
    return not (a <= b or b <= a)


def _words_beside(text: str) -> set[str]:
    rest = ARTICLE.sub("", NUMBER.sub(" ", CURRENCY.sub(r"\1", text)))
    return {word.lower() for word in WORD.findall(rest)} - FILLERS


@lru_cache(maxsize=4096)
def read_reference(answer: str) -> list[Reading]:
    """As `read_answer`, of a prompt's answer. ValueError where nothing could be equal to it."""
    readings = read_answer(answer)
    if not readings:
        raise ValueError(
            f"math_verify reads no expression in the prompt's answer {answer!r:.80}; want a "
            "number, LaTeX or a word. Mend the answer or leave the row out"
        )
    return readings


def spelling(reading: Reading) -> str | None:
    return next((part for part in reading if isinstance(part, str)), None)


def _number_among_words(text: str) -> str | None:
    """The only number of a text that is words beside it. None where letters may be variables, or
    words may change what it says.
    """
    numbers, rest = NUMBER.findall(text), ARTICLE.sub("", NUMBER.sub(" ", text))
    words = [word.lower() for word in WORD.findall(rest)]
    if len(numbers) != 1 or not words or WORD.sub("", rest).strip(" \t\n.,;:!?()\"'*"):
        return None
    if any(word in CHANGES or word.endswith(("n't", "n\u2019t")) for word in words):
        return None
    return numbers[0] if all(len(word) > 2 or word in SHORT for word in words) else None
