"""Statistics of a body of text: numbers by hand, failures with reasons, streamed files."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from span_cases import side_of, tokenizations
from tokenizer_fixtures import byte_level, metaspace

from reflux.tokenalign import corpus
from reflux.tokenalign.byte_table import CONTROL, TEXT, ByteTable
from reflux.tokenalign.corpus import (
    Counts,
    Document,
    LoadedTokenizer,
    as_json,
    count,
    documents,
    measure,
    summary,
)
from reflux.tokenalign.offsets import side
from reflux.tokenalign.spans import align_spans


def tokenizer(name, loaded):
    return LoadedTokenizer(name, loaded)


def texts(*given):
    return [Document(f"row {i}", text) for i, text in enumerate(given)]


def counted(pieces_a, pieces_b, skip_a=0):
    a, b = side_of(pieces_a, skip_a), side_of(pieces_b)
    return count(b"".join(pieces_b), a, b, align_spans([a], [b])[0])


def test_counts_of_one_text():
    c = counted([b" ", b"the", b" cat", b"alog", b"!"], [b"the", b" ca", b"talog", b"!"], skip_a=1)
    assert c == Counts(1, 0, 12, 12, 5, 4, 1, 0, 5, 4, 3, 1, (8, " catalog"))
    assert (
        c.coverage == 1.0 and c.one_to_one_fraction == 1 / 3 and c.tokens_per_span == (5 / 3, 4 / 3)
    )


def test_tokens_outside_the_spans_have_counts_of_their_own():
    table = ByteTable((b"<s>", b"a"), np.array([CONTROL, TEXT], np.int8), "byte_level")
    one, other = side(table, [0, 1], b"a"), side(table, [1], b"a")
    c = count(b"a", one, other, align_spans([one], [other])[0])
    assert (c.tokens_a, c.inside_a, c.empty_a, c.one_to_one) == (2, 1, 0, 1)


def test_of_two_control_names_the_longer_one_counts():
    table = ByteTable(
        (b"<s", b"<s>", b"a"), np.array([CONTROL, CONTROL, TEXT], np.int8), "byte_level"
    )
    assert corpus._control_names(table).findall(b"<s><s a") == [b"<s>", b"<s"]


@given(tokenizations(), tokenizations())
def test_counts_add_up(one, other):
    x, y = counted(*one), counted(*other)
    total = x + y
    assert (
        total.spans == x.spans + y.spans
        and total.inside_b == x.inside_b + y.inside_b
        and total.documents == 2
    )
    assert total.longest[0] == max(x.longest[0], y.longest[0]) and total + Counts() == total
    assert x.num_bytes == x.exact_bytes == sum(map(len, one[0])) and x.tokens_a == len(one[0])
    assert x.one_to_one <= x.spans <= min(x.inside_a, x.inside_b) and x.empty_a == sum(
        not p for p in one[0]
    )


def test_documents_of_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "t", "prompt": "p"}\n{"prompt": "é"}\n{"text": 3}\nnot json\n["x"]\n'
    )
    (tmp_path / "sub" / "c.md").write_bytes(b"\xff\xfe")
    (tmp_path / "sub" / "d.jsonl").write_bytes(b'{"text": "\xff"}\n')
    results = [
        (d.where.removeprefix(f"{tmp_path}/"), d.text, d.problem) for d in documents(tmp_path)
    ]
    assert [f[:2] for f in results] == [
        ("a.jsonl:1", "t"),
        ("a.jsonl:2", "é"),
        ("a.jsonl:3", None),
        ("a.jsonl:4", None),
        ("a.jsonl:5", None),
        ("b.txt", "one\r\ntwo\n"),
        ("sub/c.md", None),
        ("sub/d.jsonl:1", None),
    ]
    assert [f[2] for f in results if f[1] is None] == [
        "no field text or prompt that holds a string",
        "the line is not JSON",
        "no field text or prompt that holds a string",
        "the file is not UTF-8",
        "the line is not JSON",
    ]


def test_a_long_text_file_is_cut_at_line_ends_and_read_lazily(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CUT", 100)
    text = "".join(f"line {i} é\n" for i in range(50))
    (tmp_path / "x.txt").write_text(text)
    results = list(documents(tmp_path / "x.txt"))
    assert "".join(d.text for d in results) == text and len(results) > 3
    assert all(d.text.endswith("\n") and len(d.text) < 120 for d in results) and len(
        {d.where for d in results}
    ) == len(results)


def test_nothing_to_read_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "absent.txt"):
        with pytest.raises(
            ValueError, match="no file at .*; want a text file, a .jsonl file, or a folder"
        ):
            list(documents(path))


def test_failures_have_reasons_and_only_what_is_equal_counts_as_covered(monkeypatch):
    monkeypatch.setattr(corpus, "BATCH", 2)
    reads_names, plain = (
        tokenizer("A", metaspace("unigram", "always")),
        tokenizer("B", byte_level()),
    )
    rows = [
        *texts("so 12345", "hence 1</s>2", "x", "\ud800", "hence"),
        Document("row 5", None, "the line is not JSON"),
    ]
    seen = []
    report = measure(reads_names, plain, rows, progress=lambda r: seen.append(r.counts.documents))
    c = report.counts
    assert (c.documents, c.partly, c.num_bytes, seen) == (
        4,
        1,
        26,
        [2, 3, 4],
    ) and 17 <= c.exact_bytes < 26
    assert report.failures == Counter(
        {
            "A: an unknown character, or a name read as a control token": 1,
            "the line is not JSON": 1,
            "the text holds half a surrogate pair: it is not Unicode text": 1,
        }
    )
    assert report.examples == [
        "row 1: A: an unknown character, or a name read as a control token: b'2' for b'</s>2' at "
        "byte 7 of 12",
        "row 3: the text holds half a surrogate pair: it is not Unicode text",
        "row 5: the line is not JSON",
    ]
    assert (
        report.tokens["encode_a"] == c.tokens_a
        and report.tokens["align"] == c.tokens_a + c.tokens_b
    )


def test_what_a_normaliser_changes_is_aligned_all_the_same():
    report = measure(
        tokenizer("A", byte_level("NFC")), tokenizer("B", byte_level()), texts("cafe\u0301 so")
    )
    assert not report.failures and report.counts.coverage == 1.0 and report.counts.num_bytes == 9


def test_the_report_for_people_and_machines():
    a, b = tokenizer("A", metaspace("bpe", "always")), tokenizer("B", byte_level())
    report = measure(a, b, texts("the <s>quick</s> <s>", "", "\nfoo"))
    assert report.controls[0] == report.controls[1] == Counter({"<s>": 2, "</s>": 1})
    assert report.counts.empty_a == 1 and report.counts.empty_b == 0 and not report.failures
    pieces = [
        {p for p, k in zip(t.table.pieces, t.table.kind, strict=True) if k == 0} for t in (a, b)
    ]
    assert report.common == len(pieces[0] & pieces[1]) > 256
    report_text = summary(report, "left", "right")
    assert (
        "3 aligned, 0 of them in part; 0 failures" in report_text
        and "of no bytes        A 1, B 0" in report_text
        and "A: <s> x 2, </s> x 1" in report_text
    )
    data = json.loads(json.dumps(as_json(report, "left", "right")))
    assert data["documents"] == 3 and data["coverage"] == 1.0 and data["tokens_per_s"]["align"] > 0
    assert data["tokens_per_span"][0] == report.counts.inside_a / report.counts.spans


def test_no_document_at_all_divides_by_nothing():
    plain = tokenizer("A", byte_level())
    report = measure(plain, plain, [])
    assert (
        report.counts == Counts()
        and report.rate("align") == 0
        and "0 aligned" in summary(report, "A", "B")
    )
