"""What the pages say is run: their examples, the numbers they give, the files and links they name,
and the list of ops.
"""

import importlib
import re
from pathlib import Path

import pytest
import torch
from shards import run_on_ranks

from reflux.kernels._plan import Work, plan_for

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "configs/README.md",
    ROOT / "tests/README.md",
    ROOT / "CONTRIBUTING.md",
]
KERNELS = (ROOT / "docs/kernels.md").read_text()
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>not run|ranks): (?P<value>[^\n]+) -->\n)?```python\n(?P<code>.*?)^```$",
    re.M | re.S,
)
BASES = [
    "tests/trainer",
    "",
    "kernels",
    "tokenalign",
    "tokenalign/native",
    "trainer",
    "tests",
    "bench",
    "configs",
    "docs",
]
# by a run; so are bare names of other kinds than these in FILE
LOG_FIELDS = (
    "missing/",
    "epoch",
    "length/",
    "accuracy/",
    "cache/",
    "accept/",
    "cal/",
    "eval/",
    "gap/",
    "groups/",
    "is/",
    "judge/",
    "off_policy/",
    "reward/",
    "tail/",
)
WORKED = ("trainer/calibration/brevity.py", "trainer/counting.py")  # of CONTRIBUTING.md
MADE = ("runs/", "predictions/", "export/", "config.toml", *WORKED)
FENCE, CODE, LINK = (
    re.compile(r"^```.*?^```$", re.M | re.S),
    re.compile(r"`([^`\n]+)`"),
    re.compile(r"\]\(([^)\s]+)\)"),
)
FILE = re.compile(r"[\w.*-]+\.(?:py|toml|hpp|cpp)|(?:\w[\w.-]*/)+[\w.*-]*")


def examples(*pages: Path) -> list:
    found = [(page, match) for page in pages for match in BLOCK.finditer(page.read_text())]
    assert len(found) == sum(page.read_text().count("```python") for page in pages), (
        "a block with another mark before or behind it"
    )
    return [
        pytest.param(
            match["code"],
            int(match["value"]) if match["mark"] == "ranks" else 1,
            id=f"{page.stem}:{page.read_text()[: match.start('code')].count(chr(10)) + 1}",
        )
        for page, match in found
        if match["mark"] != "not run"
    ]


def run(code: str) -> None:
    """In a namespace that has what docs/use.md takes for granted."""
    torch.manual_seed(0)
    given = {
        "student_hidden": torch.randn(6, 8, requires_grad=True),
        "student_head": torch.randn(20, 8, requires_grad=True),
        "teacher_hidden": torch.randn(6, 12),
        "teacher_head": torch.randn(20, 12),
        "mask": torch.ones(6),
        "tokens": 6,
    }
    exec(compile(code, "example", "exec"), given | {"__name__": "example"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code, ranks", examples(ROOT / "docs/kernels.md", ROOT / "docs/use.md"))
def test_an_example_runs(code, ranks, titan_process, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("accelerate") if "transformers" in code else None
    if "torchtitan" in code:
        from reflux.trainer.engine import compat

        compat.install()
    run_on_ranks(run, code, ranks=ranks) if ranks > 1 else run(code)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in ("kernels.md", "use.md")],
    ids=lambda page: page.name,
)
def test_other_pages_import_what_exists(page):
    for match in BLOCK.finditer(page.read_text()):
        compile(match["code"], str(page), "exec")
        for module, names in re.findall(
            r"^from (reflux\.[\w.]+) import ([\w, ]+?) *(?:#.*)?$", match["code"], re.M
        ):
            assert all(
                hasattr(importlib.import_module(module), name.strip()) for name in names.split(",")
            ), (module, names)


def test_the_table_names_every_op_once():
    table = KERNELS.split("## The ops")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert sorted(named) == sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_at_exists(page):
    text = FENCE.sub("", page.read_text())
    links = [
        link.split("#")[0] for link in LINK.findall(text) if not link.startswith(("http", "#"))
    ]
    missing = [link for link in links if not (page.parent / link).exists()]
    for name in CODE.findall(text):
        name = name.split(" ")[0]
        if FILE.fullmatch(name) and not name.startswith((*MADE, *LOG_FIELDS)):
            # a recipe goes by its name without the suffix
            found = (list((ROOT / b).glob(n)) for b in BASES for n in (name, f"{name}.toml"))
            missing += [] if any(found) else [name]
    assert not missing, f"{page.name} names {missing}"


def test_nothing_is_installed_by_our_name():
    """It is on no index: `pip install -e ".[real]"` in a clone. CHANGELOG.md tells of what was."""
    by_name = re.compile(r"(?:pip|uv|pipx) [^\n`&;]*\breflux(?:-llm)?\b(?!\.|/)")
    assert by_name.search("pip install 'reflux-llm[real]'")
    folders = ("docs", "configs", "trainer", "kernels", "tokenalign", "bench")
    found = [p for f in folders for s in ("md", "py", "toml") for p in (ROOT / f).rglob(f"*.{s}")]
    files = {*PAGES, *found, ROOT / "Makefile", ROOT / "Dockerfile"}
    told = [
        f"{p.relative_to(ROOT)}: {m[0]}" for p in files for m in by_name.finditer(p.read_text())
    ]
    assert not told


def numbers(name: str) -> list[float]:
    """A row of a table of docs/kernels.md."""
    row = next(line for line in KERNELS.splitlines() if line.startswith(f"| {name} |"))
    return [float(cell.strip(" *").replace("−", "-")) for cell in row.split("|")[2:-1]]


def test_the_exploit_is_the_one_that_is_tested():
    from tail_table import SHIFTS, TABLE

    assert numbers("shift of the support's logits") == SHIFTS
    for name, row in {
        "truncated reverse KL": "truncated",
        "`renorm`": "renorm",
        "`bucket`": "bucket",
        "full reverse KL": "full",
    }.items():
        assert numbers(name) == TABLE[row]


def test_a_kept_tail_does_not_tell_the_tail_at_another_temperature():
    for others, want in ((1, 0.25), (1000, 0.91)):
        p = torch.tensor([0.9] + [0.1 / others] * others, dtype=torch.float64)
        assert (p.log() / 2).softmax(0)[1:].sum().item() == pytest.approx(want, abs=5e-3)


def test_rounded_logits_lose_small_divergences():
    """Peaked rows: twenty tokens stand 18 above a normal rest; the student is the teacher and a
    little noise.
    """
    randn, generator = torch.randn, torch.Generator().manual_seed(0)
    for name, eps in (("1e-2", 0.3), ("1e-3", 0.1)):
        u = randn(16, 151_936, generator=generator) * 2.5
        at = torch.randint(0, 151_936, (16, 20), generator=generator)
        u.scatter_(1, at, randn(16, 20, generator=generator) * 2 + 18)
        z = u + eps * randn(16, 151_936, generator=generator) * 0.5
        (kl, d), *rounded = (
            forward_kl(z.to(dtype), u.to(dtype))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        )
        assert kl.mean().item() == pytest.approx(float(name), rel=0.3)
        cells = next(line for line in KERNELS.splitlines() if line.startswith(f"| {name} |")).split(
            "|"
        )[2:-1]
        for cell, (coarse, coarse_d) in zip(cells, rounded, strict=True):
            got = (
                ((coarse - kl).abs() / kl).mean().item(),
                ((coarse_d - d).norm() / d.norm()).item(),
            )
            assert [float(x) for x in cell.split("/")] == pytest.approx(got, rel=0.1), (name, got)


def forward_kl(z, u):
    """kl [T] and its gradient in z, in fp64."""
    logp, logq = z.double().log_softmax(1), u.double().log_softmax(1)
    return (logq.exp() * (logq - logp)).sum(1), logp.exp() - logq.exp()


def test_the_table_of_chunks_is_the_formula():
    rows = [
        [float(cell.split()[0].strip("*")) for cell in line.split("|")[1:-1]]
        for line in KERNELS.split("| `workspace_mb` |")[1].split("\n\n")[0].splitlines()[2:]
    ]
    T, V, D, E = 8192, 151_936, 2048, 4096
    for mb, size, group, heads_ms, dhead_ms, alone_ms in rows:
        plan = plan_for(Work(T, V, D, E, 2, 8, 2), int(mb * 2**20))
        assert (size, group) == plan
        chunks, groups = -(-T // plan.chunk), -(-T // plan.group)
        heads = chunks * 2 * V * (D + E) + groups * 2 * V * D
        assert heads_ms == pytest.approx(heads / 4.3e9, rel=0.03)
        assert dhead_ms == pytest.approx(groups * 8 * V * D / 4.3e9, rel=0.03)
        rows_alone = int(mb * 2**20 / (10 * V)) // 128 * 128
        assert alone_ms == pytest.approx(-(-T // rows_alone) * 8 * V * D / 4.3e9, rel=0.03)
