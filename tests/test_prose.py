"""Pages that are read from top to bottom have short sentences."""

import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = re.compile(  # fences, comments, headings, tables, indented formulas, pictures
    r"(?s:^```.*?^```$)|(?s:^<!--.*?-->$)|^#.*$|^ *\|.*$|^    .*$|^!\[.*$", re.M
)
TABLES = re.compile(r"^<!-- bench\.tables .*?^<!-- end -->$", re.M | re.S)
# an end of a sentence: a stop behind a word or bracket, then a capital, a mark-up or a line's end
END = re.compile(r"(?<=[\w)\]%*`\"])[.?!:]\)?\*{0,2}(?=\s+[A-Z*`\[(\"]|\s*$)")
MEDIAN, LONGEST_DECILE = 25, 32  # words


def sentences(text: str) -> list[str]:
    """Of running text and list items; a formula between backticks is one word."""
    text = LEFT_OUT.sub("", TABLES.sub("", text))
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`\n]*`", "`code`", text))
    parts = [part for p in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", text) for part in END.split(p)]
    return [" ".join(p.split()) for p in parts if len(p.split()) > 2]


def lengths(path: Path) -> list[int]:
    return [len(s.split()) for s in sentences(path.read_text())]


@pytest.mark.parametrize("name", ["docs/method.md", "README.md", "docs/results.md", "docs/use.md"])
def test_half_of_the_sentences_have_25_words_or_fewer(name):
    found = sorted(lengths(ROOT / name))
    assert len(found) > 10
    assert statistics.median(found) <= MEDIAN, found
    decile = found[int(0.9 * len(found))]
    assert decile <= LONGEST_DECILE, [
        s for s in sentences((ROOT / name).read_text()) if len(s.split()) > LONGEST_DECILE
    ]


def test_sentences_are_told_apart():
    text = """# A heading. With a stop.
One two three four. *Optimum*, i.e. the best `a. b`: five six seven.
- an item of [four](x.md) words
| a | table. Not read. |

    (1) a formula. Not read.
Last one? Yes it is.
"""
    assert [len(s.split()) for s in sentences(text)] == [4, 8, 6, 3]


def test_the_readme_is_one_page_with_one_table_and_one_picture():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"^\|[-:| ]+\|$", text, re.M)) == 1 and text.count("![") == 1
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) - 2 <= 8
