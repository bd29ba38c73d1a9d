"""The page: self-contained, well-formed, with everything that the terminal shows, and more."""

from html.parser import HTMLParser

import numpy as np
from hypothesis import given
from tokenizer_fixtures import TEXTS, byte_level
from view_cases import aligned, encoded

from reflux.tokenalign.view import Marks, visible
from reflux.tokenalign.view_html import to_html

VOID = {"meta"}


class Page(HTMLParser):
    """Elements with their attributes and text; fails on a tag that is closed out of order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        element = {
            "tag": tag,
            "text": "",
            **attrs,
            "class": (attrs.get("class") or "").split(),
            "inside": list(self.open),
        }
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()["tag"] == tag, tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def of(self, name):
        return [e for e in self.elements if name in e["class"]]


@given(TEXTS.filter(bool))
def test_every_token_is_a_box_with_its_text(text):
    a, b, alignment = encoded(byte_level(), byte_level(size=300), text)
    page = Page(to_html(a, b, alignment))
    assert len(page.of("column")) == alignment.num_spans
    for one, below in ((a, False), (b, True)):
        boxes = [
            e["text"] for e in page.of("token") if ("below" in e["inside"][-1]["class"]) == below
        ]
        assert boxes == [
            "".join(shown for _, shown in visible(one.table.pieces[i])) for i in one.ids
        ]


def test_under_the_pointer():
    a, b, alignment = aligned([b"the", b" cat", b"alog"], [b"the", b" ca", b"talog"])
    marks = Marks(
        ("long", "short"),
        token_values=([0, -1.5, 0], [0, 2.0, 0]),
        span_values=[0.0, 0.25],
        token_label="log p",
        span_label="T - S",
    )
    tips = [e["data-tip"].splitlines() for e in Page(to_html(a, b, alignment, marks)).of("token")]
    assert [tip[0] for tip in tips] == [
        f"{lane}: token {i}, id {i}"
        for lane, i in (
            ("long", 0),
            ("short", 0),
            ("long", 1),
            ("long", 2),
            ("short", 1),
            ("short", 2),
        )
    ]
    assert tips[2][1:] == [
        "bytes 3..7: 20 63 61 74",
        "span 1, 2:2, bytes 3..11",
        "log p -1.5000",
        "T - S +0.2500",
    ]


def test_nothing_is_fetched_and_nothing_of_the_text_is_markup():
    text = "<script>alert('x')</script> \" & </style> https://x.y"
    page = to_html(
        *encoded(byte_level(), byte_level(size=300), text),
        Marks(('">', "B")),
        title="<b>",
        facts=[("<i>", "&")],
    )
    assert Page(page).of("token")[0]["data-tip"].startswith('">: token 0')
    tags = {e["tag"] for e in Page(page).elements}
    assert (
        not tags & {"script", "link", "img", "iframe"}
        and "@import" not in page
        and "url(" not in page
    )
    assert "<title>&lt;b&gt;</title>" in page and "&lt;i&gt; <b>&amp;</b>" in page


def test_marks_of_spans_and_text():
    a, b, alignment = aligned([b"Q: ", b"ab", b"cd", b"ef"], [b"Q: a", b"b", b"cd", b"eX"])
    page = Page(to_html(a, b, alignment, Marks(seam=3, stop=("<eos>", "</s>"))))
    assert [("bad" in e["class"]) for e in page.of("column")] == [True, False, True, False]
    assert [e["text"] for e in page.of("mark")] == ["§", "≠"] and not page.of("seam")
    assert [e["text"] for e in page.of("token")][-2:] == ["■<eos>", "■</s>"]
    assert len(Page(to_html(a, b, alignment, Marks(seam=5))).of("seam")) == 1


def test_empty_tokens_are_ticks_and_bytes_are_counted_by_the_ruler():
    a, b, alignment = aligned([b" ", "é".encode()], [b"\xc3", b"\xa9"], skip_a=1)
    page = Page(to_html(a, b, alignment))
    assert [("empty" in e["class"], e["text"]) for e in page.of("token")] == [
        (True, ""),
        (False, "é"),
        (False, "<c3>"),
        (False, "<a9>"),
    ]
    assert page.of("ruler")[0]["style"] == "--bytes:2"


def test_the_tint_is_a_fraction_of_the_largest_value():
    a, b, alignment = aligned([b"a", b"b", b"c"], [b"abc"])
    styles = [
        e.get("style")
        for e in Page(
            to_html(a, b, alignment, Marks(token_values=([4.0, -2.0, np.nan], [0.0])))
        ).of("token")
    ]
    assert styles == ["--tint:var(--more)/0.75", "--tint:var(--less)/0.38", "", ""]
