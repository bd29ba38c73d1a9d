"""Seed one fault at a time into the kernels and see whether their tests notice.

    python tests/mutate_kernels.py                # those by hand, and --sample by rule of each file
    python tests/mutate_kernels.py --only class --list      # of files with class in their names:
                                                            # print them, do not run
    python tests/mutate_kernels.py --sample 40 --seed 1     # more of them, others
    python tests/mutate_kernels.py --again RECORD --record  # the survivors of RECORD, after a test
                                                            # was added
    python tests/mutate_kernels.py --jobs 2 --record        # two at a time, and write a record

A fault is one replacement in one file of a copy of the repository; the narrow tests of that file
then run with -x. One that no test notices survives, and the exit code is 1: either a test is
missing, or the mutant computes the same (EQUIVALENT says why). Rules apply to @triton.jit
functions, with the tests that run kernels, and to their PyTorch twins, with the others. Runs each
mutant in a fork of a process that has torch imported, 2 to 60 s each.
"""

import argparse
import ast
import datetime
import json
import multiprocessing
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kernel_faults import BY_HAND, EQUIVALENT, GATE, TESTS

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300  # for one mutant: one that loops for ever is dead, too
FEW = 8  # Hypothesis examples that most mutants die of; a survivor meets the 25 of the fast profile
COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}
OPERATORS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
CALLS = {
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "amax": "amin",
    "logsumexp": "amax",
}
IN_PLACE = (
    "mul_",
    "add_",
    "sub_",
    "div_",
    "masked_fill_",
    "masked_fill",
    "clamp",
    "clamp_",
    "square_",
    "index_add_",
    "exp_",
)


@dataclass(frozen=True)
class Mutant:
    file: str  # kernels/<file>.py
    start: int  # bytes of the source that go
    end: int
    old: str
    new: str
    line: int
    context: str  # the line of source where it begins
    tests: tuple[str, ...]
    only: str  # pytest -k

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.file, self.context, one_line(self.old), one_line(self.new)

    def __str__(self) -> str:
        old, new = one_line(self.old), one_line(self.new) or "(nothing)"
        within = "" if old.startswith(self.context) else f"  in  {self.context}"
        return f"{self.file}.py:{self.line}  {old[:80]}  ->  {new[:60]}{within}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def tests_of(file: str) -> tuple[str, ...]:
    return tuple(
        path
        for op in TESTS.get(file, file).split()
        if (ROOT / (path := f"tests/kernels/test_{op}.py")).exists()
    )


def by_hand(file: str) -> list[Mutant]:
    """Those of BY_HAND. ValueError for a text that does not occur exactly once."""
    source, mutants = (ROOT / f"kernels/{file}.py").read_text(), []
    for name, old, new, tests in BY_HAND:
        if name != file:
            continue
        if source.count(old) != 1:
            raise ValueError(
                f"BY_HAND: {old!r} is {source.count(old)} times in kernels/{file}.py; want once. "
                "Bring kernel_faults.py up to date with the kernel"
            )
        before = source[: source.index(old)]
        start, line = len(before.encode()), before.count("\n")
        only = file.strip("_").split("_")[0] if tests == GATE else ""
        mutants.append(
            Mutant(
                file,
                start,
                start + len(old.encode()),
                old,
                new,
                line + 1,
                source.splitlines()[line].strip(),
                noticed_by(file, tests),
                only,
            )
        )
    return mutants


def noticed_by(file: str, tests: str | None) -> tuple[str, ...]:
    """GATE, or the paths of the tests that a fault names; without a name those of its file."""
    if tests is None:
        return tests_of(file)
    return (GATE,) if tests == GATE else (f"tests/kernels/test_{tests}.py",)


def by_rule(file: str) -> list[Mutant]:
    """Every replacement that the rules know in the file's kernels and PyTorch twins."""
    source = (ROOT / f"kernels/{file}.py").read_text()
    raw = source.encode()
    lines = [0]
    for line in raw.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    mutants = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        is_kernel = any(ast.unparse(d) == "triton.jit" for d in function.decorator_list)
        if not is_kernel and "_torch" not in function.name:
            continue
        for node in (n for statement in function.body for n in ast.walk(statement)):
            for start, end, new in edits(node, raw, lines):
                line = raw[:start].count(b"\n")
                mutants.append(
                    Mutant(
                        file,
                        start,
                        end,
                        raw[start:end].decode(),
                        new,
                        line + 1,
                        source.splitlines()[line].strip(),
                        tests_of(file),
                        "kernel" if is_kernel else "not kernel",
                    )
                )
    return list(
        {(m.start, m.end, m.new): m for m in mutants if m.old.strip() != m.new.strip()}.values()
    )


def edits(node: ast.AST, raw: bytes, lines: list[int]) -> list[tuple[int, int, str]]:
    """(start, end, new text) of what can go wrong at one node."""

    def location(n: ast.AST) -> tuple[int, int]:
        return lines[n.lineno - 1] + n.col_offset, lines[n.end_lineno - 1] + n.end_col_offset

    def text(n: ast.AST) -> str:
        return raw[slice(*location(n))].decode()

    def between(left: ast.AST, right: ast.AST, swap: tuple[str, str]) -> list[tuple[int, int, str]]:
        at = raw.index(swap[0].encode(), location(left)[1], location(right)[0])
        return [(at, at + len(swap[0]), swap[1])]

    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        return between(node.left, node.comparators[0], COMPARISONS[type(node.ops[0])])
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return between(node.left, node.right, OPERATORS[type(node.op)])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return [(*location(node), text(node.operand))]
    if isinstance(node, (ast.AugAssign, ast.Expr)) and not isinstance(
        getattr(node, "value", None), ast.Constant
    ):
        return [(*location(node), "pass")]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name == "where" and len(node.args) == 3:
            return [(*location(node), f"({text(arg)})") for arg in node.args[1:]]
        if name in IN_PLACE:
            return [(*location(node), text(node.func.value))]
        if name in CALLS:
            end = location(node.func)[1]
            return [(end - len(name), end, CALLS[name])]
        banned = [k.value for k in node.keywords if k.arg == "other" and "inf" in text(k.value)]
        return [(*location(value), "0.0") for value in banned]
    return []


def build_copy(folder: Path) -> None:
    """The kernels and tests of this checkout, for this process and those that tests start."""
    for name in ("kernels", "tests"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "conftest.py")
        )
    # with its __init__: a package without one gives way to the installed one
    shutil.copytree(ROOT / "package/reflux", folder / "reflux")
    (folder / "reflux/kernels").symlink_to(folder / "kernels")
    # an editable install would lead reflux back to this checkout
    (folder / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if not "
        "type(f).__name__.startswith('ScikitBuild')]\n"
    )
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
    sys.path[:0] = [str(folder), str(folder / "tests")]
    os.environ.update(
        PYTHONPATH=f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        PYTHONDONTWRITEBYTECODE="1",
    )
    sys.dont_write_bytecode = True


def preload() -> None:
    """What every mutant needs and none changes. No shrinking: one failure is enough."""
    import hypothesis
    import pytest  # noqa: F401
    import torch
    import torch._dynamo
    import torch.testing

    torch.set_num_threads(1)
    for examples in (FEW, 25):
        hypothesis.settings.register_profile(
            f"mutants{examples}",
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
        )


def tests_pass(folder: Path, mutant: Mutant, examples: int) -> bool:
    """Do the mutant's tests pass in the copy as it is? In a fork: reflux must be imported anew."""
    if mutant.tests == (GATE,):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [
            sys.executable,
            str(folder / "tests/compile_for_gpus.py"),
            "--quick",
            "--only",
            mutant.only,
        ]
        return subprocess.run(command, env=environment, capture_output=True).returncode == 0
    child = os.fork()
    if child == 0:
        with open(folder / "output.txt", "w") as output:
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
        import hypothesis
        import pytest

        hypothesis.settings.load_profile(f"mutants{examples}")
        os.chdir(folder)
        selected = ["-k", mutant.only] if mutant.only else []
        options = ["-x", "-q", "-p", "no:cacheprovider", "--noconftest", f"--rootdir={folder}"]
        os._exit(int(pytest.main([*options, *selected, *mutant.tests])))
    deadline = time.monotonic() + LIMIT_S
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) in (0, 5)  # 5: no test was selected
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return False
        time.sleep(0.05)


def survives(folder: Path, mutant: Mutant) -> bool:
    path = folder / f"kernels/{mutant.file}.py"
    source = path.read_bytes()
    try:
        changed = source[: mutant.start] + mutant.new.encode() + source[mutant.end :]
        ast.parse(changed)
        path.write_bytes(changed)
        return tests_pass(folder, mutant, FEW) and (
            mutant.tests == (GATE,) or tests_pass(folder, mutant, 25)
        )
    finally:
        path.write_bytes(source)


def write_record(counts: dict, survivors: list[Mutant], options: argparse.Namespace) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    name = f"{datetime.date.today()}_kernel_mutants{'_again' if options.again else ''}.json"
    path = ROOT / "bench/records" / name
    path.write_text(
        json.dumps(
            {
                "date": datetime.datetime.now().isoformat(timespec="seconds"),
                "commit": commit,
                "command": " ".join(sys.argv),
                "sample": options.sample,
                "seed": options.seed,
                "again": options.again,
                "counts": counts,
                "survivors": [str(m) for m in survivors],
                "equivalent": [
                    f"{file}.py: {old} -> {new} in {line}: {why}"
                    for (file, line, old, new), why in EQUIVALENT.items()
                ],
            },
            indent=1,
        )
        + "\n"
    )
    print(f"wrote {path.relative_to(ROOT)}")


def in_parallel(mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, bool | None]]:
    """(mutant, does it survive?) as they come; None where the tests fail without any mutant."""
    groups: dict[tuple, list[int]] = {}
    for i, mutant in enumerate(mutants):
        groups.setdefault((mutant.tests, mutant.only), []).append(i)
    parts: list[list[list[int]]] = [[] for _ in range(jobs)]  # of one process each
    for group in sorted(groups.values(), key=len, reverse=True):
        min(parts, key=lambda part: sum(map(len, part))).append(group)
    # before torch is imported: every process builds and imports a copy of its own
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=run_groups, args=(mutants, part, results)) for part in parts if part
    ]
    for worker in workers:
        worker.start()
    for _ in mutants:
        while True:
            try:
                i, alive = results.get(timeout=60)
                break
            except queue.Empty:
                if all(not w.is_alive() for w in workers):
                    sys.exit("a process died without an answer; its output is above")
        yield mutants[i], alive
    for worker in workers:
        worker.join()


def run_groups(mutants: list[Mutant], groups: list[list[int]], results) -> None:
    with tempfile.TemporaryDirectory(prefix="mutants") as name:
        folder = Path(name)
        build_copy(folder)
        preload()
        for group in groups:
            first = mutants[group[0]]
            green = tests_pass(folder, first, FEW)
            if not green:
                print(
                    f"{' '.join(first.tests)} -k '{first.only}' fails without a "
                    f"mutant:\n{(folder / 'output.txt').read_text()[-2000:]}",
                    flush=True,
                )
            for i in group:
                began = time.monotonic()
                alive = survives(folder, mutants[i]) if green else None
                if green:
                    print(
                        f"{'SURVIVED' if alive else 'killed  '} {time.monotonic() - began:5.1f} s  "
                        f"{mutants[i]}",
                        flush=True,
                    )
                results.put((i, alive))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--sample", type=int, default=6, help="mutants by rule from each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes at a time, each with a copy of its own"
    )
    parser.add_argument(
        "--again",
        default="",
        metavar="RECORD",
        help="only those that survived when this record was written",
    )
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")
    draw, mutants = random.Random(options.seed), []
    for file in sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if options.only in p.stem):
        rules = by_rule(file)
        mutants += [*by_hand(file), *draw.sample(rules, min(options.sample, len(rules)))]
    mutants = [m for m in mutants if m.tests and m.key not in EQUIVALENT]
    if options.again:
        survived = json.loads(Path(options.again).read_text())["survivors"]
        mutants = [m for m in mutants if str(m) in survived]
    if options.list:
        print(*mutants, sep="\n")
        return
    survivors, counts, red = [], {}, set()
    for mutant, alive in in_parallel(mutants, options.jobs):
        if alive is None:
            red.add((mutant.tests, mutant.only))
            continue
        killed, total = counts.get(mutant.file, (0, 0))
        counts[mutant.file] = killed + (not alive), total + 1
        survivors += [mutant] if alive else []
    print(
        "\n".join(
            f"{file:<24} {killed:>3} of {total:>3} killed"
            for file, (killed, total) in sorted(counts.items())
        )
    )
    if options.record and not red:
        write_record(counts, survivors, options)
    print(*(f"SURVIVED {m}" for m in survivors), sep="\n")
    if survivors or red:
        sys.exit(
            f"{len(survivors)} of {len(mutants)} mutants survived, {len(red)} groups of tests were "
            "red before any. Write the test that kills a survivor, or say in EQUIVALENT why none "
            "can"
        )


if __name__ == "__main__":
    main()
