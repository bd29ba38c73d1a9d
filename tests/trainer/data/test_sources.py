"""Sources that cannot be read: a mistake in words that names the file and the line."""

import gzip
import json
import sys

import pytest

from reflux.trainer.data import sources
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.sources import load_function


@pytest.fixture(scope="module")
def parquet() -> bytes:
    import io

    from pyarrow import table
    from pyarrow.parquet import write_table

    out = io.BytesIO()
    write_table(table({"prompt": [f"q {i}" for i in range(1000)]}), out)
    return out.getvalue()


@pytest.mark.parametrize("cut", [0, 3, 100, 0.5, 0.99])
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_cut_parquet_file_is_named(tmp_path, parquet, cut, in_folder):
    file = tmp_path / "rows" / "part.parquet"
    file.parent.mkdir()
    file.write_bytes(parquet[: int(cut * len(parquet)) if cut < 1 else cut])
    with pytest.raises(ValueError, match=rf"^{file}: no Parquet file, or a cut one .*again$"):
        load_prompts(str(file.parent if in_folder else file))


@pytest.mark.parametrize("name", ["rows.parquet", "folder"])
def test_a_table_without_rows_is_named(tmp_path, name):
    from pyarrow import array, string, table
    from pyarrow.parquet import write_table

    path = tmp_path / name
    path.mkdir() if name == "folder" else None
    file = path / "a.parquet" if name == "folder" else path
    write_table(table({"prompt": array([], string())}), str(file))
    with pytest.raises(ValueError, match=f"^{path}: no rows$"):
        load_prompts(str(path))


def test_a_parquet_file_whose_pages_are_torn_is_named(tmp_path, parquet):
    """Its footer is whole, its data is not."""
    file = tmp_path / "rows.parquet"
    file.write_bytes(parquet[:4] + b"\x00" * (len(parquet) // 2) + parquet[4 + len(parquet) // 2 :])
    with pytest.raises(ValueError, match=f"^{file}: no data set that can be read"):
        load_prompts(str(file))


@pytest.mark.parametrize("content", [None, "{", '{"_data_files": []}'])
def test_a_folder_that_is_no_data_set_is_named(tmp_path, content):
    folder = tmp_path / "data"
    folder.mkdir()
    if content is not None:
        (folder / "state.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{folder}: no data set that can be read .* Is it whole"):
        load_prompts(str(folder))


@pytest.mark.parametrize(
    "line, says",
    [
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        (b'{"prompt": "a", "x": ' + b'{"a":' * 9999 + b"1" + b"}" * 9999 + b"}", "recursion"),
        (b'{"prompt": "' + b"a" * 5000 + b'"}', "more than 1,000 bytes; want one JSON object a"),
        (b"x" * 5000, "more than 1,000 bytes"),
        (gzip.compress(b'{"prompt": "a"}'), "codec can't decode|Expecting value"),
        (b"\0" * 100, "Expecting value"),
        (json.dumps([{"prompt": "a"}]).encode(), "list .*; want one JSON object a line"),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "Exceeds the limit|more than 1,000"),
    ],
    ids=["deep list", "deep object", "long", "long text", "gzip", "zeros", "array", "big number"],
)
def test_a_line_that_is_no_row_is_named(tmp_path, monkeypatch, line, says):
    monkeypatch.setattr(sources, "LONGEST", 10**6 if b"[[" in line or b'{"a":{' in line else 1000)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"(?s)^{file}, line 2: .*({says})"):
        load_prompts(str(file))


def test_a_line_of_the_greatest_length_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 100)
    row = b'{"prompt": "' + b"a" * 85 + b'"}\n'
    assert len(row) == 100
    (tmp_path / "rows.jsonl").write_bytes(row * 3)
    assert len(load_prompts(str(tmp_path / "rows.jsonl"))) == 3
    monkeypatch.setattr(sources, "LONGEST", 99)
    with pytest.raises(ValueError, match="line 1: more than 99 bytes"):
        load_prompts(str(tmp_path / "rows.jsonl"))


def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "broken_rows.py").write_text("import nothing_like_this\n")
    with pytest.raises(ValueError, match="broken_rows:f: cannot import broken_rows .*nothing_like"):
        load_function("broken_rows:f")
