"""The sdist and the wheel, built from it, in an environment of their own and outside of the
checkout: make test-install.

The dependencies are those of the environment that runs the tests; only reflux-llm is installed.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.install
ROOT = Path(__file__).parents[2]
BUILD = (
    "build>=1.2",
    "scikit-build-core>=1.1",
    "nanobind>=2.4",
    "hatch-fancy-pypi-readme>=25.1",
)  # as [build-system] of pyproject
Reflux = Callable[..., subprocess.CompletedProcess]


def call(*words: object, **more) -> subprocess.CompletedProcess:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **more)
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def make_venv(folder: Path) -> Path:
    """Its interpreter."""
    call(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    home = tmp_path_factory.mktemp("dist")
    python = make_venv(home / "tools")
    call(python, "-m", "pip", "install", "-q", *BUILD)
    call(python, "-m", "build", "--no-isolation", "--outdir", home / "out", ROOT)
    return home / "out"


@pytest.fixture(scope="module")
def home(dist, tmp_path_factory) -> Path:
    """A folder with an environment in which the wheel is installed; tests work in it."""
    home = tmp_path_factory.mktemp("home")
    python = make_venv(home / "venv")
    call(python, "-m", "pip", "install", "-q", "--no-deps", *dist.glob("*.whl"))
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
    others = [p for p in sys.path if p.endswith("site-packages")]
    Path(site.strip(), "dependencies.pth").write_text("\n".join(others) + "\n")
    return home


@pytest.fixture(scope="module")
def reflux(home) -> Reflux:
    """The console command of the clean environment."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MASTER_", "RANK"))}
    env = keep | {"PATH": f"{home}/venv/bin:{keep['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> subprocess.CompletedProcess:
        return call(home / "venv/bin" / words[0], *words[1:], cwd=home, env=env)

    return run


def test_the_sdist_holds_the_native_sources_and_the_wheel_no_tests(dist):
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    sources = [n.split("/", 1)[-1] for n in tarfile.open(sdist).getnames()]
    assert {"tokenalign/native/module.cpp", "CMakeLists.txt", "package/reflux/__init__.py"} <= set(
        sources
    )
    built = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in built}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"reflux"}
    floors = {n.split("/")[1] for n in built if n.startswith("reflux/")}
    assert floors == {"__init__.py", "py.typed", "kernels", "tokenalign", "trainer", "configs"}
    assert not [n for n in built if n.endswith((".cpp", ".hpp")) or "/test" in n]
    shipped = {n.removeprefix("reflux/") for n in built if n.startswith("reflux/configs/")}
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*") if p.is_file()}
    assert shipped == own
    templates = {p.relative_to(ROOT).as_posix() for p in (ROOT / "trainer").rglob("*.jinja")}
    assert templates <= {n.removeprefix("reflux/") for n in built}


def test_it_is_the_wheel_that_runs(reflux, home):
    code = "import reflux; print(reflux.__file__, reflux.__version__, reflux.linear_kl.__module__)"
    where, version, module = reflux("python", "-c", code).stdout.split()
    assert where.startswith(str(home)) and module == "reflux.kernels.linear_kl"
    said = reflux("reflux", "--version").stdout
    assert said.startswith(f"reflux-llm {version}\n") and "torch " in said


def test_a_recipe_becomes_a_run_without_a_checkout(reflux, home):
    """The teacher of the quickstart's world, for three steps."""
    world = home / "runs/quickstart/seed-0/world"
    first = reflux("reflux", "matrix", "quickstart", "--dry-run").stdout.splitlines()[0]
    assert first.endswith("--out runs/quickstart/seed-0/world") and str(ROOT) not in first
    reflux(*first.split())
    reflux("reflux", "init", "miniature/pretrain", "--out", "mine.toml")
    sets = [f"model.path={world}/teacher", f"data.source={world}/train.jsonl", "folder=run"]
    sets += [f"eval.source={world}/heldout.jsonl", "eval.limit=8", "steps=3", "rollout.prompts=4"]
    words = ["mine.toml", *(w for s in sets for w in ("--set", s))]
    assert "parameters" in reflux("reflux", "plan", *words).stdout
    assert "step 3/3" in reflux("reflux", "run", *words).stdout
    assert list((home / "run/export").glob("*.safetensors"))
    told = reflux("reflux", "report", "run").stdout
    assert "run: distill, step 3 of 3; has ended" in told
    assert "evaluation after step 3:\n" in told and "\n    sampled  0." in told
    assert "whole" in reflux("reflux", "verify", "run").stdout
