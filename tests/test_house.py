"""The walls of the house, checked. A rule nobody runs is a wish; a rule without a reason in its
message is a cage.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "tokenalign", "trainer"]  # each may import itself and the floors before it
MODULES = sorted(p for floor in FLOORS for p in (ROOT / floor).glob("*.py"))
OPS = [p.stem for p in MODULES if p.parent.name == "kernels" and not p.stem.startswith("_")]
TITAN_DOOR = "trainer/titan"  # titan.py, titan_models.py, titan_compat.py ...
OVERSIZE: dict[str, str] = {}  # "floor/file.py": why splitting it would make it worse
# module -> the tests that exercise it, where one file of its own would repeat them
TESTED_ELSEWHERE = {
    "tokenalign/__main__.py": "test_tokenalign_main.py",
    "trainer/metric_sums.py": "test_ranks.py",
    "trainer/titan_decode.py": "test_titan_models.py",
    "trainer/titan_native.py": "test_titan_models.py",
    "trainer/run_folder.py": "test_loop.py",
    "trainer/guards.py": "test_loop.py",
    "trainer/model_card.py": "test_loop.py",
    "trainer/readings.py": "test_diagnose.py",
    "trainer/diagnose_report.py": "test_diagnose.py",
    "trainer/config_checks.py": "test_config.py",
    "trainer/distill_config.py": "test_config.py",
    "trainer/report_entries.py": "test_report_checks.py",
    "trainer/report_tables.py": "test_report.py",
    "trainer/diagnose_plots.py": "test_diagnose.py",
    "trainer/preflight_memory.py": "test_preflight.py",
    "trainer/preflight_text.py": "test_preflight.py",
}
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}/{p.name}")


def imports(path: Path) -> list[str]:
    """Every absolute import as a dotted name, those inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, (
                f"{path}:{node.lineno} uses '..': write reflux.<floor> to cross floors"
            )
            names += (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.level == 0 else []
            )
    return names


@each_module
def test_imports_never_look_up(path):
    above = FLOORS[FLOORS.index(path.parent.name) + 1 :]
    for name in imports(path):
        package, floor = (name + ".").split(".")[:2]
        assert package not in FLOORS, (
            f"{path} imports {name}: write reflux.{name}, or its ops register twice"
        )
        assert not (package == "reflux" and floor in above), (
            f"{path} imports {name}: a lower floor may not look up"
        )
        assert package not in ("bench", "tests"), (
            f"{path} imports {name}: an installed package has neither bench nor tests"
        )


@each_module
def test_torchtitan_has_one_door(path):
    if any(name.split(".")[0] == "torchtitan" for name in imports(path)):
        assert f"{path.parent.name}/{path.name}".startswith(TITAN_DOOR), (
            f"{path}: only {TITAN_DOOR}*.py may, so that an upgrade costs one door"
        )


def test_kernels_need_torch_and_triton_only():
    for path in (p for p in MODULES if p.parent.name == "kernels"):
        foreign = (
            {n.split(".")[0] for n in imports(path)}
            - set(sys.stdlib_module_names)
            - {"torch", "triton", "reflux"}
        )
        assert not foreign, f"{path} imports {foreign}: people take this folder without the rest"


def test_no_floor_is_a_top_level_package():
    for floor in FLOORS:
        assert not (ROOT / floor / "__init__.py").exists(), (
            f"{floor}/__init__.py would hide a package named {floor}"
        )
    assert not list((ROOT / "tests").rglob("__init__.py")), (
        "tests/kernels/__init__.py would become `kernels`"
    )


def test_nothing_in_trainer_shadows_another_module():
    ours = {p.stem for p in MODULES if p.parent.name == "trainer"}
    others = {name.split(".")[0] for p in MODULES for name in imports(p)} | {
        "datasets",
        "evaluate",
        "tokenizers",
    }
    taken = ours & (others | set(sys.stdlib_module_names))
    assert not taken, (
        f"torchrun puts trainer/ first on the path; these would pose as other modules: {taken}"
    )


def test_names_are_unique_so_that_tests_can_be_flat():
    stems = [p.stem for p in MODULES]
    assert len(stems) == len(set(stems)), "two modules would share one tests/test_<module>.py"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_definition_its_test_and_its_bench_case(op):
    assert f"def {op}_ref(" in (ROOT / "kernels" / f"{op}.py").read_text(), (
        f"kernels/{op}.py has no {op}_ref"
    )
    assert (ROOT / "tests" / f"test_{op}.py").exists(), f"{op} has no test"
    assert op in (ROOT / "bench" / "cases.py").read_text(), (
        f"bench/cases.py has no {op}: nobody would see it get slow"
    )


@each_module
def test_every_module_has_a_test_file(path):
    name = f"{path.parent.name}/{path.name}"
    if path.stem.startswith("_") and path.stem != "__main__":
        return  # private: tested through the ops that use it
    wanted = TESTED_ELSEWHERE.get(name, f"test_{path.stem}.py")
    assert (ROOT / "tests" / wanted).exists(), (
        f"{name}: no tests/{wanted}; write it, or say in TESTED_ELSEWHERE who tests it"
    )


@each_module
def test_sizes(path):
    name, text = f"{path.parent.name}/{path.name}", path.read_text()
    if name in OVERSIZE:
        return
    assert len(text.splitlines()) <= 400, (
        f"{name} is over 400 lines: split it, or add it to OVERSIZE with the reason"
    )
    for f in ast.walk(ast.parse(text)):
        if isinstance(f, ast.FunctionDef):
            assert f.end_lineno - f.lineno < 60, (
                f"{name}: {f.name} is over 60 lines: split it, or see OVERSIZE"
            )
            few = len(f.args.posonlyargs + f.args.args + f.args.kwonlyargs) <= 8
            assert few or path.parent.name == "kernels", (
                f"{name}: {f.name} takes over 8 arguments: make a dataclass"
            )


def test_every_config_loads():
    from reflux.trainer.config.loader import load

    files = list((ROOT / "configs").rglob("*.toml"))
    assert files
    # by a matrix
    filled_in = ("model.path=m", "proxy.path=p", "teacher.path=t", "data.source=d", "folder=f")
    for path in files:
        # that is a matrix itself
        if not any(mark in path.read_text() for mark in ("[[cell]]", "base = [")):
            assert load(path, filled_in).phase, path
        assert path.read_text().startswith("# "), (
            f"{path}: want its purpose and cost in the first line"
        )
