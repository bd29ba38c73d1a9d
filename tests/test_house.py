"""The walls of the house, checked. Every wall says why it stands.

The order of floors and rooms is the table ROOMS; CONTRIBUTING.md prints it.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "tokenalign", "trainer"]  # each may import itself and the floors before it
ROOMS = {  # room or file of trainer/ -> the rooms that it may import, beside the floors below
    "config": "",
    "file_hash": "",
    "runs": "config file_hash",
    "adapter_folder": "config",
    "data": "config adapter_folder file_hash",
    "losses": "config",
    "disk_space": "",
    "engine": "config data losses phase disk_space file_hash adapter_folder",
    "phase": "config data losses engine.metrics",
    "rollouts": "config runs data losses phase",
    "evaluation": "config runs data rollouts phase adapter_folder",
    "calibration": "config runs data losses engine.metrics phase rollouts evaluation",
    "distillation": "config runs data losses engine.metrics phase rollouts evaluation file_hash",
    "diagnosis": "config runs data losses phase rollouts",
    "callbacks": "config data engine",
    "loop": "config runs data engine phase disk_space callbacks",
    "preflight": "config runs data losses engine phase rollouts evaluation adapter_folder "
    "disk_space",
    "main": "config runs loop preflight",
    "verify": "engine disk_space",
    "merge": "engine adapter_folder",
    "studies": "config runs data file_hash",
    "integrations": "data calibration rollouts",
    "cells": "runs main",
    "matrix_file": "config cells studies",
    "matrix": "config runs cells studies matrix_file",
    "cli": "config runs",  # sub-commands are named as text: what they need is imported when called
    "subcommands": "config runs main matrix matrix_file",
    "api": "config runs loop preflight callbacks",
    "recipe_files": "config matrix_file",
    "reference": "config engine",
    "completion": "config cli",
}
OPS = sorted(p.stem for p in (ROOT / "kernels").glob("[!_]*.py"))
# the second is for torchtitan's own Trainer, and is of no use without it
TORCHTITAN_DOORS = "trainer/engine/", "trainer/integrations/torchtitan_loss.py"
OVERSIZE = {  # "floor/file.py" or "floor/file.py:function": why it stays whole
    "kernels/_logprob_rows.py:logprob_gradient": "one Triton kernel: a call would leave registers",
    "kernels/_logprob_tiles.py:head_tiles": "one Triton kernel: most of it are arguments",
    "trainer/integrations/trl_losses.py:divergence_loss": "TRL calls it with these arguments",
    "kernels/_topk_rows.py:topk_terms": "one Triton kernel: a call would leave registers",
}
TESTED_ELSEWHERE = {  # module -> the test file that exercises it
    "trainer/integrations/axolotl_trainer.py": "trainer/integrations/test_axolotl_plugin.py",
    "trainer/phase.py": "trainer/engine/test_engine.py",  # contracts; mypy holds the rooms to them
    "trainer/calibration/likelihood_ratio.py": "trainer/calibration/test_phase.py",
    "trainer/config/calibration_rewards.py": "trainer/calibration/test_rewards.py",
    "trainer/callbacks.py": "trainer/test_api.py",
    "trainer/config/files.py": "trainer/config/test_loader.py",
    "trainer/subcommands.py": "trainer/test_cli.py",
    "trainer/config/caching.py": "trainer/distillation/test_cache_phase.py",
    "trainer/distillation/teacher_cache.py": "trainer/distillation/test_cache_phase.py",
    "trainer/distillation/absent_teacher.py": "trainer/distillation/test_served_teacher.py",
    "trainer/distillation/cached_teacher.py": "trainer/distillation/test_cache_phase.py",
    "trainer/config/checks.py": "trainer/config/test_schema.py",
    "trainer/config/distillation.py": "trainer/config/test_schema.py",
    "trainer/config/phase_checks.py": "trainer/config/test_schema.py",
    "trainer/config/roles.py": "trainer/config/test_phases.py",
    "trainer/config/sections.py": "trainer/config/test_schema.py",
    "trainer/diagnosis/measure.py": "trainer/diagnosis/test_phase.py",
    "trainer/diagnosis/plots.py": "trainer/diagnosis/test_report.py",
    "trainer/diagnosis/token_rows.py": "trainer/diagnosis/test_phase.py",
    "trainer/rollouts/overlap.py": "engines/test_serve.py",
    "trainer/rollouts/samplers.py": "engines/test_vllm_runs.py",
    "trainer/rollouts/serve.py": "trainer/rollouts/test_client.py",
    "trainer/rollouts/server_source.py": "engines/test_serve.py",
    "trainer/engine/publish.py": "trainer/engine/test_engine.py",
    "trainer/rollouts/fingerprint.py": "trainer/rollouts/test_client.py",
    "trainer/data/row_checks.py": "trainer/data/test_fitted_prompts.py",
    "trainer/engine/document_masks.py": "trainer/engine/test_forward.py",
    "trainer/engine/hf_adapter.py": "trainer/engine/test_conversions.py",
    "trainer/evaluation/questions.py": "trainer/evaluation/test_evaluator.py",
    "trainer/preflight/data_checks.py": "trainer/preflight/test_check.py",
    "trainer/preflight/length_checks.py": "trainer/preflight/test_check.py",
    "trainer/preflight/model_checks.py": "trainer/preflight/test_check.py",
    "trainer/preflight/pair_checks.py": "trainer/preflight/test_check.py",
    "trainer/preflight/shapes.py": "trainer/preflight/test_dry_run.py",
    "trainer/preflight/tokenizer_checks.py": "trainer/preflight/test_check.py",
}
GUARDED = {"datasets", "evaluate", "lm_eval", "markdown", "tokenizers", "kernels"}


def modules() -> list[Path]:
    """Every module of the three floors, in whatever room."""
    found = [p for floor in FLOORS for p in (ROOT / floor).rglob("*.py")]
    return sorted(p for p in found if "native" not in p.parts)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    """The room of a module of trainer/; a file at its root is a room of its own."""
    parts = path.relative_to(ROOT / "trainer").with_suffix("").parts
    return parts[0]


MODULES = modules()
each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)
TRAINER = [p for p in MODULES if name_of(p).startswith("trainer/")]


def imports(path: Path) -> list[str]:
    """Every import as an absolute dotted name, those inside functions too; not those that only a
    type checker follows.
    """
    names = []
    package = ["reflux", *path.relative_to(ROOT).parent.parts]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}:{node.lineno} uses '..': write reflux.<floor>.<room>"
            start = ".".join(package) + "." if node.level else ""
            module = start + (node.module or "")
            names += [f"{module.rstrip('.')}.{alias.name}" for alias in node.names]
    return names


@each_module
def test_imports_never_look_up(path):
    floor_of_path = path.relative_to(ROOT).parts[0]
    above = FLOORS[FLOORS.index(floor_of_path) + 1 :]
    for name in imports(path):
        package, floor = (name + ".").split(".")[:2]
        assert package not in FLOORS, (
            f"{path} imports {name}: write reflux.{name}: ops register once"
        )
        looks_up = package == "reflux" and floor in above
        assert not looks_up, f"{path} imports {name}: a lower floor may not look up"
        assert package not in ("bench", "tests"), f"{path} imports {name}: not in the wheel"


@pytest.mark.parametrize("path", TRAINER, ids=name_of)
def test_a_room_imports_only_the_rooms_of_its_row(path):
    room = room_of(path)
    assert room in ROOMS, f"{path}: give the room {room} a row in ROOMS"
    allowed = {room, *ROOMS[room].split()}
    for name in imports(path):
        if name.startswith("reflux.trainer."):
            target = name.split(".")[2:4]
            ok = target[0] in allowed or ".".join(target) in allowed
            assert ok, f"{path} imports {name}: {room} may import {ROOMS[room] or 'no room'}"


def test_the_rooms_have_an_order():
    """No cycle: a table in which every row only names rows that can be placed before it."""
    placed: set[str] = set()
    left = {room: {r for r in row.split() if r != "engine.metrics"} for room, row in ROOMS.items()}
    left["engine"].discard("phase")  # engine/metrics.py stands below phase.py, the rest above it
    while left:
        ready = [room for room, needs in left.items() if needs <= placed]
        assert ready, f"a cycle among {sorted(left)}"
        placed.update(ready)
        for room in ready:
            del left[room]


def test_contributing_prints_the_rooms():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = {p.name for p in (ROOT / "trainer").iterdir() if p.is_dir() and list(p.glob("*.py"))}
    printed = set(re.findall(r"^  (\w+)/ ", page, re.M))
    assert rooms <= printed, f"the tree in CONTRIBUTING.md lacks {sorted(rooms - printed)}"
    assert rooms == ROOMS.keys() & rooms, "a room without a row in ROOMS"


@each_module
def test_torchtitan_has_one_door(path):
    if any(name.split(".")[0] == "torchtitan" for name in imports(path)):
        inside = name_of(path).startswith(TORCHTITAN_DOORS)
        assert inside, f"{path}: only {TORCHTITAN_DOORS} may, so that an upgrade costs one door"


def test_kernels_need_torch_and_triton_only():
    for path in (p for p in MODULES if name_of(p).startswith("kernels/")):
        foreign = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)
        foreign -= {"torch", "triton", "reflux"}
        assert not foreign, f"{path} imports {foreign}: people take this folder without the rest"


def test_an_op_imports_neither_trainer_nor_torchtitan_nor_transformers():
    code = (
        "import sys, reflux.kernels.linear_kl; print([m for m in sys.modules if m.split('.')[0] in "
        "('transformers', 'torchtitan') or m.startswith('reflux.trainer')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_floor_is_a_top_level_package():
    for floor in FLOORS:
        init = ROOT / floor / "__init__.py"
        assert not init.exists(), f"{floor}/__init__.py would hide a package named {floor}"
    packages = list((ROOT / "tests").rglob("__init__.py"))
    assert not packages, "tests/kernels/__init__.py would become `kernels`"


def test_no_module_shadows_another_whichever_folder_comes_first_on_the_path():
    """A script's own folder is first on sys.path: trainer/ under torchrun, a room under python."""
    others = {n.split(".")[0] for p in MODULES for n in imports(p)} - set(FLOORS) - {"reflux"}
    taken = others | GUARDED | set(sys.stdlib_module_names)
    for path in TRAINER:
        if path.stem != "__init__":
            assert path.stem not in taken, f"{path} would pose as the module {path.stem}"
    for room in {p.parent.name for p in TRAINER} - {"trainer"}:
        assert room not in taken, f"trainer/{room}/ would pose as the module {room}"


def test_every_room_says_what_it_is_for():
    for room in {p.parent for p in TRAINER} - {ROOT / "trainer"}:
        init = room / "__init__.py"
        assert init.exists() and ast.get_docstring(ast.parse(init.read_text())), f"{room}: no door"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_definition_its_test_and_its_bench_case(op):
    source = (ROOT / "kernels" / f"{op}.py").read_text()
    assert f"def {op}_ref(" in source, f"kernels/{op}.py has no {op}_ref"
    assert (ROOT / "tests" / "kernels" / f"test_{op}.py").exists(), f"{op} has no test"
    cases = (ROOT / "bench" / "cases.py").read_text()
    assert op in cases, f"bench/cases.py has no {op}: nobody would see it get slow"


@each_module
def test_every_module_has_a_test_file(path):
    if path.stem.startswith("_") and path.stem != "__main__":
        return  # private: tested through the ops that use it
    stem = path.stem.strip("_")
    default = f"{name_of(path.parent)}/test_{stem}.py"
    wanted = TESTED_ELSEWHERE.get(name_of(path), default)
    exists = (ROOT / "tests" / wanted).exists()
    assert exists, f"{name_of(path)}: no tests/{wanted}; write it, or see TESTED_ELSEWHERE"


@each_module
def test_sizes(path):
    name, text = name_of(path), path.read_text()
    few = len(text.splitlines()) <= 500 or name in OVERSIZE
    assert few, f"{name} is over 500 lines: split it, or add it to OVERSIZE with the reason"
    for f in ast.walk(ast.parse(text)):
        if not isinstance(f, ast.FunctionDef) or f"{name}:{f.name}" in OVERSIZE:
            continue
        assert f.end_lineno - f.lineno < 60, f"{name}: {f.name} is over 60 lines: see OVERSIZE"
        arguments = f.args.posonlyargs + f.args.args + f.args.kwonlyargs
        few = len(arguments) - (arguments[:1] != [] and arguments[0].arg == "self") <= 8
        assert few or name.startswith("kernels/"), f"{name}: {f.name} takes over 8 arguments"


def test_oversize_names_what_is_oversize():
    for name in OVERSIZE:
        file, _, function = name.partition(":")
        text = (ROOT / file).read_text()
        assert (f"def {function}(" in text) if function else len(text.splitlines()) > 500, name


def test_nothing_asks_for_a_phase_by_name():
    for path in (p for p in TRAINER if room_of(p) != "config"):
        asks = re.findall(r"cfg\.phase (?:==|!=|in)", path.read_text())
        assert not asks, f"{path} asks for a phase: what phases differ in is in config/phases.py"


def test_only_plotting_imports_matplotlib():
    for path in (p for p in TRAINER if p.stem not in ("plotting",)):
        foreign = [n for n in imports(path) if n.split(".")[0] == "matplotlib"]
        assert not foreign, f"{path} imports {foreign}: runs/plotting.py is the only door to it"


def test_every_config_loads():
    from reflux.trainer.config.loader import load

    files = list((ROOT / "configs").rglob("*.toml"))
    assert files
    values = ("model.path=m", "proxy.path=p", "teacher.path=t", "data.source=d", "folder=f")
    for path in files:
        text = path.read_text()
        if "[[cell]]" not in text and "base = [" not in text:  # that is a matrix itself
            assert load(path, values).phase, path
        assert text.startswith("# "), f"{path}: want its purpose and cost in the first line"
