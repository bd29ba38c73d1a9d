"""The heatmap page: every token with its numbers, safe against its own content, and as it should be
in a real browser where one is.
"""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

from browser import Browser, needs_browser

from reflux.trainer.diagnosis.heatmap import heatmap_page
from reflux.trainer.diagnosis.token_rows import TextRow

ROW = TextRow(
    prompt=3,
    sampled_by="student",
    correct=False,
    answer=None,
    text="",
    ids=[7, 8, 9, 10],
    pieces=["<b>", " 1 & 2", "\n", "你"],
    student_logp=[-1.0] * 4,
    teacher_logp=[-2.0] * 4,
    kl_forward=[0.0, 1.0, 0.5, 2.0],
    kl_reverse=[1.0, 0.0, 0.25, 0.5],
)
SPANS = TextRow(
    prompt=0,
    sampled_by="student",
    correct=None,
    answer=None,
    text="the cat",
    ids=[1, 2, 3, 9],
    pieces=["the", " cat", "<stop>"],
    student_logp=[-1, -2, -3],
    teacher_logp=[-4, -5, -6],
    kl_forward=[0.5, None, 0.1],
    kl_reverse=[0.2, None, 0.3],
    teacher_ids=[5, 6],
    student_pieces=[["the"], [" c", "at"], ["</s>"]],
    teacher_pieces=[["the"], [" cat"], ["<end>"]],
)


class Tokens(HTMLParser):
    """Collects the token spans: (class of the paragraph, title, style, text)."""

    def __init__(self):
        super().__init__()
        self.divergence, self.spans, self.open = None, [], []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.open += [tag] if tag not in ("meta", "input", "link") else []
        if tag == "p":
            self.divergence = named["class"].split()[1]
        if tag == "span":
            self.spans.append([self.divergence, named["title"], named["style"], ""])
        assert tag != "b", "a token's text became markup"

    def handle_data(self, data):
        if self.open and self.open[-1] == "span":
            self.spans[-1][3] += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page):
    tokens = Tokens()
    tokens.feed(page)
    assert not tokens.open
    return tokens.spans


def test_every_token_has_its_text_its_colour_and_its_numbers():
    spans = parsed(heatmap_page([ROW], "x < y"))
    for divergence in ("forward", "reverse"):
        mine = [x for x in spans if x[0] == divergence]
        assert [x[3] for x in mine] == ROW.pieces
        alpha = [float(re.search(r"/ ([\d.]+)\)", x[2])[1]) for x in mine]
        ranked = sorted(range(4), key=ROW.kl(divergence).__getitem__)
        assert sorted(range(4), key=alpha.__getitem__) == ranked and max(alpha) == 0.75
    numbers = spans[3][1]
    assert "KL forward 2.0000, reverse 0.5000" in numbers
    assert "id 10" in numbers and "teacher -2.000" in numbers


def test_the_page_needs_no_network_and_no_script():
    page = heatmap_page([ROW], "t")
    assert not re.search(r"https?://|<script|src=|url\(", page) and html.escape("x < y") not in page


def test_grades_and_sources_are_named():
    rows = [ROW, replace(ROW, correct=True, sampled_by="teacher"), replace(ROW, correct=None)]
    heads = re.findall(r"<h2>(.*?)</h2>", heatmap_page(rows, "t"))
    assert heads == [
        "prompt 3, sampled by the student, wrong",
        "prompt 3, sampled by the teacher, correct",
        "prompt 3, sampled by the student",
    ]


def test_a_page_of_spans_shows_both_sides_tokens():
    page = heatmap_page([SPANS], "t")
    assert page.count('class="text forward spans"') == 1 and page.count('class="uncompared"') == 2
    assert (
        "student: &#39; c&#39; | &#39;at&#39;\nteacher: &#39; cat&#39;\n"
        "distributions not compared here\nlog p: student -2.000" in page
    )
    assert "KL forward 0.5000, reverse 0.2000" in page


def shown_by_a_browser(page, folder, script, **options):
    """The value of a script on the page in a real browser; no error, no request, no scrolling."""
    folder.mkdir()
    file = folder / "page.html"
    file.write_text(page)
    with Browser(folder / "profile") as browser:
        shown = browser.show(file, script=script, **options)
    assert shown.errors == [] and shown.requests == []
    assert shown.page_width <= options.get("width", 1280)
    return shown.value


@needs_browser
def test_a_real_browser_shows_one_divergence_at_a_time(tmp_path):
    script = (
        "['forward', 'reverse'].map(d => "
        "getComputedStyle(document.querySelector('p.' + d)).display).join()"
    )
    for checked, shown in (("forward", "block,none"), ("reverse", "none,block")):
        page = (
            heatmap_page([ROW], "t")
            .replace(" checked", "")
            .replace(f'id="{checked}"', f'id="{checked}" checked')
        )
        assert shown_by_a_browser(page, tmp_path / checked, script) == shown


@needs_browser
def test_a_real_browser_draws_a_rule_under_every_span(tmp_path):
    """Solid where a KL was measured, dotted where not; both models' tokens under the pointer."""
    script = (
        "[...document.querySelectorAll('p.forward span')].map(e => { const s = "
        "getComputedStyle(e); return [s.borderBottomStyle, s.borderBottomWidth, "
        "e.getBoundingClientRect().width > 0, e.title.includes('teacher: ')].join(' ') }).join()"
    )
    shown = shown_by_a_browser(heatmap_page([SPANS], "t"), tmp_path / "spans", script)
    assert shown == "solid 2px true true,dotted 2px true true,solid 2px true true"
    plain = shown_by_a_browser(heatmap_page([ROW], "t"), tmp_path / "tokens", script)
    assert plain.split(",")[0].startswith("none 0px"), "tokens of one vocabulary have no rules"


def test_a_prompt_stands_once_above_the_texts_of_its_writers():
    rows = [
        replace(ROW, question="Is 4 < 5?"),
        replace(ROW, question="Is 4 < 5?", sampled_by="teacher"),
        replace(ROW, question="And 6?", prompt=4),
    ]
    page = heatmap_page(rows, "t")
    questions = re.findall('<div class="question">(.*?)</div>', page)
    assert questions == ["Is 4 &lt; 5?", "And 6?"]
    assert page.count('<h3 class="forward">KL(teacher || student)</h3>') == 3


@needs_browser
def test_on_a_phone_both_directions_are_shown_and_a_tapped_token_tells_its_numbers(tmp_path):
    script = """(() => { const e = document.querySelector('p.forward span'); e.focus();
        const bar = getComputedStyle(e, '::after');
        return [bar.position, bar.content.includes('KL forward'), ...['forward', 'reverse'].map(
            d => getComputedStyle(document.querySelector('p.' + d)).display)].join() })()"""
    row = replace(ROW, question="a" * 500, pieces=["x" * 90, *ROW.pieces[1:]])
    shown = shown_by_a_browser(
        heatmap_page([row], "models/" + "long_name" * 20), tmp_path / "a", script, width=390
    )
    assert shown == "fixed,true,block,block"
