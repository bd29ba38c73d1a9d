"""`python -m reflux.tokenalign A B ...`: what it prints, what it writes, and how it refuses."""

import io
import json
import sys
from importlib import import_module

import numpy as np
import pytest
from tokenizer_fixtures import byte_level, metaspace

from reflux.tokenalign.byte_table import encode_text
from reflux.tokenalign.corpus import LoadedTokenizer

command = import_module("reflux.tokenalign.__main__")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two Hugging Face folders and a bare tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in (("plain", byte_level()), ("small", byte_level(size=300))):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / name)
    byte_level("NFC").save(str(root / "tokenizer.json"))
    return root


@pytest.fixture
def run(folders, monkeypatch, capsys):
    def call(*arguments, a="plain", b="small"):
        monkeypatch.setattr(
            sys,
            "argv",
            ["reflux.tokenalign", str(folders / a), str(folders / b), *map(str, arguments)],
        )
        try:
            command.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def pair():
    return [
        LoadedTokenizer(name, t) for name, t in (("A", byte_level()), ("B", byte_level(size=300)))
    ]


def test_a_text_and_its_counts(run):
    code, out, _ = run("--text", "12345 hence")
    assert code == 0 and out.splitlines()[:3] == [
        "  0          5",
        "A 12345    ‖ ·hence",
        "B 1|23|4|5 ‖ ·hence",
    ]
    assert out.splitlines()[-1] == (
        "bytes 11; tokens 2 and 5; spans 2; 1:1 50.0%; tokens per span 1.00 and 2.50; "
        "longest span 6 bytes; coverage 100.0%"
    )


def test_a_file_and_standard_input(run, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_bytes("a\r\né".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\r\né".encode())))
    from_file, from_stdin = run("--file", tmp_path / "x.txt"), run("--file", "-")
    assert from_file == from_stdin and "a ‖ ␍ ‖ ↵ ‖ <c3> ‖ <a9>" in from_file[1]


def test_color_when_asked_for(run):
    assert (
        "\x1b[" not in run("--text", "so")[1]
        and "\x1b[" in run("--text", "so", "--color", "always")[1]
    )


def test_the_terminal_decides_color_and_width(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def printed(**environment):
        for name in ("NO_COLOR", "TERM", "COLUMNS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(
            sys, "argv", ["reflux.tokenalign", "A", "B", "--text", "so 12345 hence " * 9]
        )
        monkeypatch.setattr(sys, "stdout", Terminal())
        command._show(*pair(), command._arguments())
        return sys.stdout.getvalue()

    assert "\x1b[" in printed(TERM="xterm") and "\x1b[" in printed(NO_COLOR="")
    assert "\x1b[" not in printed(NO_COLOR="1") and "\x1b[" not in printed(TERM="dumb")
    lanes = [
        line for line in printed(NO_COLOR="1", COLUMNS="40").splitlines() if line.startswith("A ")
    ][:-1]
    assert len(lanes) > 3 and all(len(line) <= 40 for line in lanes)


def test_the_page(run, tmp_path):
    code, out, _ = run("--text", "12345 hence", "--html", tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert code == 0 and "longest span <b>6 bytes</b>" in page and page.count('class="token"') == 7


def test_scores_give_bits_and_span_differences(run, tmp_path):
    ids = encode_text(byte_level(), "12345 hence")
    given = {
        "ids_a": ids,
        "logp_a": [-1.0, -2.0],
        "logp_b": [*[-0.5] * 4, -1.5],
        "stop_a": -0.25,
        "stop_b": -0.5,
    }
    (tmp_path / "s.json").write_text(json.dumps(given))
    code, out, _ = run("--scores", tmp_path / "s.json")
    assert code == 0 and "  +1.00      -0.50" in out and "■stop -0.25" in out
    assert (
        "bits per byte 0.393 and 0.459" in out
        and "log p of A - of B +0.75 nats, clipped +0.75" in out
    )


def test_sampled_ids_are_not_encoded_again():
    a, b = pair()
    ids = [a.table.pieces.index(piece) for piece in (b"1", b"2", b"3")]
    aligned = command.align_text(a, b, {"ids_a": ids})
    assert aligned.side_a.ids.tolist() == ids != a.encode("123") and aligned.counts.num_bytes == 3


@pytest.mark.parametrize(
    "given, message",
    [
        ({"txt": "x"}, "has keys txt; want text or ids_a"),
        ({}, "has keys none"),
        ({"text": "x", "ids_c": []}, "only ids_b"),
        ({"text": "x", "logp_a": [0.0]}, "want both logp_a and logp_b"),
        (
            {"text": "so", "logp_a": [-1.0, -1.0], "logp_b": [-1.0]},
            "logp_a has 2 numbers for 1 tokens; want one per id",
        ),
    ],
)
def test_scores_that_cannot_be_shown(given, message):
    with pytest.raises(ValueError, match=message):
        command.align_text(*pair(), given)


def test_ids_that_are_no_text_are_refused():
    a, b = pair()
    with pytest.raises(ValueError, match="ids_a do not spell UTF-8"):
        command.align_text(a, b, {"ids_a": [a.table.pieces.index(b"\xff")]})


def test_a_corpus(run, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "so 12345"}\n{"prompt": "hence"}\nx\n')
    code, out, err = run("--corpus", tmp_path / "c.jsonl", "--json", tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text())
    assert (
        code == 0
        and err == ""
        and "2 aligned, 0 of them in part; 1 failures" in out
        and "c.jsonl:3: the line is not JSON" in out
    )
    assert (
        data["documents"] == 2
        and data["num_bytes"] == 13
        and data["failures"] == {"the line is not JSON": 1}
    )


def test_a_tokenizer_file_with_a_normaliser(run):
    code, out, _ = run("--text", "cafe\u0301", a="tokenizer.json")
    assert code == 0 and "≠" not in out and "coverage 100.0%" in out


def test_ids_of_another_text_are_shown_and_named(run, tmp_path):
    (tmp_path / "s.json").write_text(
        json.dumps({"text": "12345 hence", "ids_a": encode_text(byte_level(), "12345 whence")})
    )
    code, out, _ = run("--scores", tmp_path / "s.json")
    assert (
        code == 0
        and "≠" in out
        and out.splitlines()[-1].startswith("A: its ids spell another text")
        and "at byte 6 of 11" in out
    )


def test_a_prompt_is_no_part_of_the_scores():
    a, b = pair()
    given = {"text": "12345 hence", "logp_a": [-5.0, -1.0], "logp_b": [-1.0] * 5}
    whole, behind = (
        command.align_text(a, b, given),
        command.align_text(a, b, given | {"prompt_bytes": 5}),
    )
    assert (
        np.isnan(behind.marks.span_values).tolist() == [True, False]
        and not np.isnan(whole.marks.span_values).any()
    )
    assert (whole.scores.num_bytes, behind.scores.num_bytes, behind.scores.logp_a) == (11, 6, -1.0)


def test_a_page_has_a_limit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PAGE_TOKENS", 3)
    code, _, err = run("--text", "12345 hence", "--html", tmp_path / "out.html")
    assert code == 2 and "7 tokens are too many for a browser; want at most 3" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "one of the arguments --text --file --scores --corpus is required"),
        (("--text", "x", "--file", "y"), "not allowed with argument --text"),
        (("--text", "x", "--json", "y"), "--json holds the statistics of --corpus"),
        (("--corpus", "x", "--html", "y"), "--html draws one text"),
        (("--file", "absent.txt"), "absent.txt"),
        (("--corpus", "absent"), "no file at absent; want"),
        (("--text", "x", "--html", "no/such/folder.html"), "no/such/folder.html"),
    ],
)
def test_one_line_and_exit_code_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_tokenizer_that_is_not_there(run, folders):
    (folders / "empty").mkdir(exist_ok=True)
    for name in ("absent", "empty"):
        code, _, err = run("--text", "x", b=name)
        assert code == 2 and "tokenizer B: " in err and err.count("\n") == 1


def test_metaspace_against_byte_level():
    a, b = (
        LoadedTokenizer(name, t)
        for name, t in (("A", metaspace("bpe", "always")), ("B", byte_level()))
    )
    assert command.align_text(a, b, {"text": "\nfoo"}).counts.empty_a == 1
