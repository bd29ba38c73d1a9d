"""docs/first_hour.py runs from end to end with tiny models; the notebook holds the same cells."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from runs import run_forked

from reflux.trainer.studies import first_hour

ROOT = Path(__file__).parents[1]
SCRIPT, NOTEBOOK = ROOT / "docs/first_hour.py", ROOT / "docs/first_hour.ipynb"


SMALLER = {  # configuration -> what a test leaves out
    "configs/first_hour/distil.toml": ("steps=2", "rollout.prompts=2", "eval.every=1"),
    "configs/first_hour/diagnose.toml": ("data.limit=2", "diagnose.student_texts=2"),
    "configs/first_hour/evaluate.toml": ("eval.limit=4",),
}


def _maker():
    spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "docs/make_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()
CELLS = MAKER.cells(SCRIPT.read_text())


def test_the_notebook_holds_the_cells_of_the_script():
    book = json.loads(NOTEBOOK.read_text())
    assert [(c["cell_type"], "".join(c["source"])) for c in book["cells"]] == CELLS
    assert MAKER.notebook(SCRIPT.read_text(), MAKER.outputs_of(book)) == book, "make_notebook.py"


def test_a_notebook_keeps_the_outputs_of_unchanged_cells():
    script = "# %% [markdown]\n# # Title\n# text\n\n# %%\nx = 1\n\n# %%\ny = 2\n"
    assert MAKER.cells(script) == [
        ("markdown", "# Title\ntext"),
        ("code", "x = 1"),
        ("code", "y = 2"),
    ]
    book = MAKER.notebook(script, {"x = 1": [{"output_type": "stream"}]})
    again = MAKER.notebook(script.replace("y = 2", "y = 3"), MAKER.outputs_of(book))
    assert [c.get("outputs") for c in again["cells"]] == [None, [{"output_type": "stream"}], []]


def test_the_notebook_shows_a_run_with_the_real_model():
    book = json.loads(NOTEBOOK.read_text())
    outputs = [o for c in book["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    text = "".join("".join(o.get("text", "")) for o in outputs)
    assert outputs, "python docs/make_notebook.py --run"
    assert "left at most" not in text and "\x1b" not in text, "progress of a terminal"
    assert len(pictures) == 3 and "correct sums: teacher" in text and "--tiny" not in text
    assert str(ROOT) not in NOTEBOOK.read_text(), "a path of one machine"


def test_what_is_shown_has_no_colours_and_no_path_of_this_machine():
    assert MAKER.plain(f"\x1b[1;36m0.5\x1b[0m {ROOT}/runs") == "0.5 ./runs"


@pytest.mark.filterwarnings("ignore")
def test_the_script_runs_with_tiny_models(tmp_path, monkeypatch, capsys):
    """As it stands, but for the processes: those are forked, and take a second instead of six."""
    for name in ("configs", "trainer"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIRST_HOUR_TINY", "1")
    started = []

    def python(*words: str, name: str) -> None:
        started.append(words)
        if words[0] == "-m":
            assert words[1] == "reflux.trainer.studies.first_hour"
            assert first_hour.main(list(words[2:])) == 0
            return
        less = SMALLER.get(words[2], ())
        short = tuple(word for value in less for word in ("--set", value))
        done = run_forked([*words[1:], *short], tmp_path)
        assert done.wait(120) == 0, done.output[-4000:]

    names: dict = {"__name__": "first_hour"}
    for kind, source in CELLS:
        if kind == "code":
            exec(compile(source, str(SCRIPT), "exec"), names)
            names["python"] = python
    out = capsys.readouterr().out
    assert re.search(r"correct sums: teacher \d+%, student \d+% -> \d+%", out)
    assert "forward KL" in out and (tmp_path / "runs/first_hour/distil.png").stat().st_size > 5000
    assert [w[-1] == "--check" for w in started].count(True) == 1 and len(started) == 6


@pytest.mark.skipif(
    not os.environ.get("REFLUX_NOTEBOOK"), reason="a kernel and ten processes: make test-notebook"
)
def test_the_notebook_runs_in_a_kernel(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in ("configs", "trainer"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("FIRST_HOUR_TINY", "1")
    book = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": tmp_path}})
    client.execute()
    assert "correct sums" in json.dumps(book)
    shutil.rmtree(tmp_path / "runs")
