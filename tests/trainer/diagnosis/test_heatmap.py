"""The heat page: every token with its numbers, safe against its own content, and right in a real
browser where one is.
"""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from reflux.trainer.diagnosis.heatmap import heat_page

ROW = {
    "prompt": 3,
    "writer": "student",
    "right": False,
    "pieces": ["<b>", " 1 & 2", "\n", "你"],
    "ids": [7, 8, 9, 10],
    "kl_forward": [0.0, 1.0, 0.5, 2.0],
    "kl_reverse": [1.0, 0.0, 0.25, 0.5],
    "student_logp": [-1.0] * 4,
    "teacher_logp": [-2.0] * 4,
}
SPANS = {
    "prompt": 0,
    "writer": "student",
    "right": None,
    "pieces": ["the", " cat", "<stop>"],
    "ids": [1, 2, 3, 9],
    "teacher_ids": [5, 6],
    "student_pieces": [["the"], [" c", "at"], ["</s>"]],
    "teacher_pieces": [["the"], [" cat"], ["<end>"]],
    "kl_forward": [0.5, None, 0.1],
    "kl_reverse": [0.2, None, 0.3],
    "student_logp": [-1, -2, -3],
    "teacher_logp": [-4, -5, -6],
}
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Tokens(HTMLParser):
    """Collects the token spans: (class of the paragraph, title, style, text)."""

    def __init__(self):
        super().__init__()
        self.way, self.found, self.open = None, [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.open += [tag] if tag not in ("meta", "input") else []
        if tag == "p":
            self.way = given["class"].split()[1]
        if tag == "span":
            self.found.append([self.way, given["title"], given["style"], ""])
        assert tag != "b", "a token's text became markup"

    def handle_data(self, data):
        if self.open and self.open[-1] == "span":
            self.found[-1][3] += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page):
    tokens = Tokens()
    tokens.feed(page)
    assert not tokens.open
    return tokens.found


def test_every_token_has_its_text_its_colour_and_its_numbers():
    found = parsed(heat_page([ROW], "x < y"))
    for way in ("forward", "reverse"):
        mine = [f for f in found if f[0] == way]
        assert [f[3] for f in mine] == ROW["pieces"]
        alpha = [float(re.search(r"/ ([\d.]+)\)", f[2])[1]) for f in mine]
        values = ROW[f"kl_{way}"]
        assert (
            sorted(range(4), key=alpha.__getitem__) == sorted(range(4), key=values.__getitem__)
            and max(alpha) == 0.75
        )
    assert (
        "KL forward 2.0000, reverse 0.5000" in found[3][1]
        and "id 10" in found[3][1]
        and "teacher -2.000" in found[3][1]
    )


def test_the_page_needs_no_network_and_no_script():
    page = heat_page([ROW], "t")
    assert not re.search(r"https?://|<script|src=|url\(", page) and html.escape("x < y") not in page


def test_grades_and_writers_are_named():
    rows = [ROW, ROW | {"right": True, "writer": "teacher"}, ROW | {"right": None}]
    heads = re.findall(r"<h2>(.*?)</h2>", heat_page(rows, "t"))
    assert heads == [
        "prompt 3, written by the student, wrong",
        "prompt 3, written by the teacher, right",
        "prompt 3, written by the student",
    ]


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")


def shown_by_a_browser(page, folder, script):
    """What the browser puts into the title: the value of a script run on the page."""
    folder.mkdir()
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"<script>document.title = {script}</script></body>"))
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-500:]
    return html.unescape(title[1])


@needs_browser
def test_a_real_browser_shows_one_direction_at_a_time(tmp_path):
    script = "['forward', 'reverse'].map(w => getComputedStyle(document.querySelector('p.' + w)).display).join()"
    for checked, shown in (("forward", "block,none"), ("reverse", "none,block")):
        page = (
            heat_page([ROW], "t")
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
    shown = shown_by_a_browser(heat_page([SPANS], "t"), tmp_path / "spans", script)
    assert shown == "solid 2px true true,dotted 2px true true,solid 2px true true"
    plain = shown_by_a_browser(heat_page([ROW], "t"), tmp_path / "tokens", script)
    assert plain.split(",")[0].startswith("none 0px"), "tokens of one vocabulary have no rules"
