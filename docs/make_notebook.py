"""docs/first_hour.ipynb out of docs/first_hour.py: python docs/make_notebook.py [--run]

The script is the source: a cell begins at `# %%`, one of text at `# %% [markdown]`. --run executes
the notebook in a kernel (nbclient, ipykernel) and keeps what it shows; without, cells whose code is
unchanged keep their outputs. Paths of this machine are cut off.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPT, NOTEBOOK = HERE / "first_hour.py", HERE / "first_hour.ipynb"
MARK = re.compile(r"^# %%(?: \[(?P<kind>markdown)\])?\n", re.M)


def cells(script: str) -> list[tuple[str, str]]:
    """(kind, source): "code" or "markdown", the latter without its comment signs."""
    parts = MARK.split(script)[1:]
    found = []
    for kind, source in zip(parts[::2], parts[1::2]):
        text = re.sub(r"^# ?", "", source, flags=re.M) if kind else source
        found.append((kind or "code", text.strip()))
    return found


def notebook(script: str, shown: dict[str, Any]) -> dict[str, Any]:
    """nbformat 4.5. shown: source of a code cell -> its outputs."""
    made: list[dict[str, Any]] = []
    for number, (kind, source) in enumerate(cells(script)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell["source"] = source.splitlines(keepends=True)
        if kind == "code":
            cell |= {"execution_count": None, "outputs": shown.get(source, [])}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    head = {"metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return {"cells": made, **head}


def outputs_of(book: dict[str, Any]) -> dict[str, Any]:
    return {"".join(c["source"]): c["outputs"] for c in book["cells"] if c["cell_type"] == "code"}


def plain(text: str) -> str:
    """Without colours, and without paths of this machine."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).replace(str(HERE.parent), ".")


def execute(book: dict[str, Any]) -> dict[str, Any]:
    import nbformat
    from nbclient import NotebookClient

    node = nbformat.reads(json.dumps(book), as_version=4)
    where = {"metadata": {"path": str(HERE)}}
    NotebookClient(node, timeout=None, kernel_name="python3", resources=where).execute()
    for cell in node.cells:
        for output in cell.get("outputs", ()):
            output.pop("execution_count", None)
            if "text" in output:
                output["text"] = plain(output["text"])
    return json.loads(nbformat.writes(node))


def main(arguments: list[str]) -> int:
    shown = outputs_of(json.loads(NOTEBOOK.read_text())) if NOTEBOOK.exists() else {}
    book = notebook(SCRIPT.read_text(), shown)
    if "--run" in arguments:
        book = notebook(SCRIPT.read_text(), outputs_of(execute(book)))
    NOTEBOOK.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
