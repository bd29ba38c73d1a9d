"""Seed one fault at a time into the kernels and see whether their tests notice.

    python tests/mutate_kernels.py                        # the mutants below, and --sample drawn by rule from each file
    python tests/mutate_kernels.py --only class --list    # those of files with class in their names; print, do not run
    python tests/mutate_kernels.py --sample 40 --seed 1   # more of them, others
    python tests/mutate_kernels.py --jobs 2 --record      # two at a time, and write bench/records/<date>_kernel_mutants.json

A fault is one replacement in one file of a copy of the repository; the narrow tests of that file then run with -x. One that
no test notices survives, and the exit code is 1: either a test is missing, or the mutant computes the same (EQUIVALENT
says why). Rules apply to @triton.jit functions, with the tests that run kernels, and to their PyTorch twins, with the
others. Runs each mutant in a fork of a process that has torch imported, 2 to 60 s each.
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

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300  # for one mutant: one that loops for ever is dead, too
FEW = 8  # Hypothesis examples that most mutants die of; a survivor meets the 25 of the fast profile
TESTS = {  # file -> its narrow tests, the quickest to fail first
    "_class_rows": "class_logprob bucket_kl", "_classes": "class_logprob bucket_kl", "class_logprob": "class_logprob",
    "bucket_kl": "bucket_kl", "align_spans": "align_spans", "span_sum": "span_sum",
    "_chunks": "chunks linear_kl linear_logprob class_logprob", "_parallel": "parallel linear_logprob class_logprob",
    "_divergence": "token_kl linear_kl", "_kl_rows": "kl_rows token_kl parallel linear_kl", "linear_kl": "linear_kl parallel",
    "token_kl": "token_kl parallel", "_logprob_rows": "token_logprob linear_logprob", "linear_logprob": "linear_logprob",
    "token_logprob": "token_logprob", "linear_nll": "linear_nll", "_topk_rows": "topk_tail_kl tail_laws linear_topk_kl",
    "topk_tail_kl": "topk_tail_kl tail_laws", "linear_topk_kl": "linear_topk_kl", "renormalised_topk_kl": "renormalised_topk_kl",
    "teacher_topk": "teacher_topk", "teacher_sample": "teacher_sample", "_select_rows": "teacher_topk teacher_sample"}
GATE = "gate"  # instead of tests: what the interpreter cannot see, the compile gate must
BY_HAND = [  # file, old text (found once), new text, tests or None for the file's own
    ("_class_rows", "s = s * exp_diff(m, new) + tl.sum(exp_diff(a, new[:, None]), 1)\n        m = new\n    tl.store",
     "s = s + tl.sum(exp_diff(a, new[:, None]), 1)\n        m = new\n    tl.store", None),  # drop the rescale
    ("_class_rows", "tl.where(live, a, float(\"-inf\"))", "a", None),  # zero padding adds exp(0)
    ("_class_rows", "short = end - begin <= LONG", "short = end - begin < LONG", None),  # nobody sums a class of LONG ids
    ("_class_rows", "at < end[:, None]", "at <= end[:, None]", None),
    ("_class_rows", "tl.sum(s * exp_diff(m, M), 0)", "tl.sum(s, 0)", None),
    ("_class_rows", "(raw * inv_temp - M) - z", "raw * inv_temp - z", None),  # the shares are relative to the row's max
    ("_class_rows", "tl.where(dz == 0, 0.0, d)", "d", None),
    ("_class_rows", "inv_temp, inv_temp * grad_scale,", "inv_temp, grad_scale,", None),  # temperature factor
    ("_class_rows", "d *= 1.0 - (raw * inv_cap) * (raw * inv_cap)", "pass", None),  # softcap factor
    ("_class_rows", "t = tl.program_id(0).to(tl.int64)\n    M", "t = tl.program_id(0)\n    M", None),
    ("_class_rows", "merge_sums(top_CN, sums_CN, group)", "(top_CN, sums_CN)", "class_logprob"),
    ("_class_rows", "top_C = top_CN.amax(1)", "top_C = torch.zeros_like(top_CN[:, 0])", None),  # digits at large logits
    ("_classes", "torch.sort(class_V, stable=True)", "torch.sort(class_V, descending=True)", None),
    ("_classes", "outside = int((class_V < 0).sum())", "outside = 0", None),
    ("_classes", "(first_N1.diff() > _class_rows.LONG)", "(first_N1.diff() >= _class_rows.LONG)", None),
    ("_classes", "d.index_copy_(0, columns[0], d_L.to(like.dtype))", "d_L.to(like.dtype)", None),
    ("_classes", "all_sum(self.dhidden_TD, group) if", "self.dhidden_TD if", None),
    ("class_logprob", "value=-1", "value=1", None),
    ("class_logprob", "torch.where(logp_CN == -torch.inf, 0.0, g_TN[c].to(top_T.dtype))", "g_TN[c].to(top_T.dtype)", None),
    ("class_logprob", "dz_CN.masked_fill_(~log_s_T[c].isfinite()[:, None], 0.0)", "pass", None),
    ("bucket_kl", "coeff_T, kl_T = weight_T * t2,", "coeff_T, kl_T = weight_T,", None),
    ("bucket_kl", "kl_T.mul_(t2)", "pass", None),
    ("bucket_kl", "\"forward\": student.empty - teacher.empty", "\"forward\": teacher.empty - student.empty", None),
    ("bucket_kl", "temperature, teacher_group)", "temperature, student_group)", None),
    ("align_spans", "(longest + 1)", "longest", None),
    ("align_spans", "& (length > 0)", "", None),
    ("align_spans", "hit.long().cumsum(1) - hit.long()", "hit.long().cumsum(1)", None),
    ("align_spans", "torch.where(end[:, -1:] == last_B1, num_B1 - 1, -1)", "num_B1 - 1", None),
    ("span_sum", "| (span_T >= num_spans)", "", None),
    ("span_sum", "torch.sort(span_T, stable=True)", "torch.sort(span_T)", None),
    ("span_sum", "grad_S.new_zeros(1)", "grad_S.new_ones(1)", None),
    ("_chunks", "block[:, V:] = -torch.inf", "block[:, V:] = 0", None),  # zero padding adds exp(0)
    ("_chunks", "logits_CV += bias_V", "pass", None),
    ("_chunks", "logits_CV.mul_(logit_scale / softcap)", "logits_CV.mul_(1 / softcap)", None),
    ("_chunks", "dbias_V += dlogits_CV.sum(0, dtype=dbias_V.dtype)", "dbias_V = dlogits_CV.sum(0, dtype=dbias_V.dtype)", None),
    ("_chunks", "(1 / temperature, logit_scale) if softcap", "(1 / temperature, 1.0) if softcap", None),
    ("_chunks", "yield c if rows_M is None else rows_M[c]", "yield c", None),
    ("_chunks", "torch.autocast(hidden_CD.device.type, enabled=False)", "torch.autocast(hidden_CD.device.type, enabled=True)", None),
    ("_parallel", "max_C = all_max(local_max_C.clone(), group)", "max_C = local_max_C", "parallel"),
    ("_parallel", "torch.where(local_max_C == -torch.inf, 0.0, (local_max_C - max_C).exp())", "(local_max_C - max_C).exp()", None),
    ("_parallel", "max(0, min(rows, vocab_size - start))", "max(0, min(rows, vocab_size))", None),
    ("_divergence", "loss = tl.where(q == 0, 0.0, -q * diff)\n        g = -q", "loss = -q * diff\n        g = -q", None),
    ("_divergence", "g = -q\n    elif", "g = q\n    elif", None),
    ("_divergence", "top = tl.where(top == float(\"-inf\"), 0.0, top)", "pass", None),
    ("_divergence", "return tl.where(x == float(\"-inf\"), 0.0, tl.exp(x - m))", "return tl.exp(x - m)", None),
    ("_divergence", "loss = g + tl.where(q == 0, 0.0, beta * q * (logq - logm))", "loss = g + tl.where(q == 0, 0.0, q * (logq - logm))", None),
    ("_kl_rows", "s_z = s_z * scale_z + tl.sum(e_z, 1)", "s_z = s_z + tl.sum(e_z, 1)", None),  # drop the rescale
    ("_kl_rows", "s_u = s_u * scale_u + tl.sum(e_u, 1)", "s_u = s_u + tl.sum(e_u, 1)", None),
    ("_kl_rows", "w = w * scale_u + ", "w = w + ", None),
    ("_kl_rows", "w = w * scale_z + ", "w = w + ", None),
    ("_kl_rows", "tl.store(out + 2 * C, tl.sum(s_z * scale_z, 0))", "tl.store(out + 2 * C, tl.sum(s_z, 0))", None),
    ("_kl_rows", "c = tl.load(coeff + t).to(WIDE) * mul_z", "c = tl.load(coeff + t).to(WIDE)", None),  # temperature factor
    ("_kl_rows", "d = c * (g - p * sum_g)", "d = g - p * sum_g", None),  # upstream factor
    ("_kl_rows", "d = c * (g - p * sum_g)", "d = c * g", None),
    ("_kl_rows", "d * (1.0 - (raw * inv_cap) * (raw * inv_cap))", "d", None),  # softcap factor
    ("_kl_rows", "if ok == 0:\n", "if False:\n", None),
    ("_kl_rows", "ok = ok & (tl.load(chosen + t) != 0)", "pass", "topk_tail_kl"),
    ("_kl_rows", "side = 1 if mode == \"forward\" else 0", "side = 0", "parallel"),
    ("linear_kl", "coeff_T = weight_T * (t2 * gradient_scale)", "coeff_T = weight_T * gradient_scale", None),
    ("linear_kl", "torch.where(weight_T != 0, weight_T * kl_T, 0.0).sum()", "(weight_T * kl_T).sum()", None),
    ("linear_kl", "all_sum(dx_TD, group) if need_dhidden else dx_TD,\n            dhead", "dx_TD,\n            dhead", None),
    ("linear_kl", "(d * g_total if needed", "(d if needed", None),
    ("linear_kl", "kl_T.mul_(t2)", "pass", None),
    ("_logprob_rows", "s = s * scale + tl.sum(e, 1)", "s = s + tl.sum(e, 1)", None),
    ("_logprob_rows", "w = tl.where(scale > 0, scale * (w + s * (m - m_new)), 0.0)\n", "w = w * scale\n", None),  # entropy term
    ("_logprob_rows", "live = tl.maximum(live, tl.max((y != -1).to(tl.int32), 0))", "live = 1", None),
    ("_logprob_rows", "tl.where(y[:, None] == y_2[None, :], g_2[None, :], 0.0)", "tl.where((first + k)[:, None] == (other + k)[None, :], g_2[None, :], 0.0)", None),
    ("_logprob_rows", "d = g + p * c", "d = g", None),
    ("_logprob_rows", "tl.store(out + v, (d * inv_temp)", "tl.store(out + v, d", None),
    ("_logprob_rows", "tl.store(scratch + t * K + first + k, d * inv_temp", "tl.store(scratch + t * K + first + k, d", None),
    ("_logprob_rows", "tl.debug_barrier()  # dlogits may be", "pass  # dlogits may be", GATE),
    ("_logprob_rows", "tl.debug_barrier()\n    for first", "pass\n    for first", GATE),
    ("_logprob_rows", "peak_C = all_max(top_C.clone(), group) if group else top_C", "peak_C = top_C", "linear_logprob"),
    ("_logprob_rows", "mine_TK = (target_TK >= start) & (target_TK < start + width)", "mine_TK = target_TK >= start", "linear_logprob"),
    ("_topk_rows", "tl.store(row + y, tl.full((KB,), float(\"-inf\"), z.dtype.element_ty), mask=here)", "pass", None),  # the tail term
    ("_topk_rows", "s = s * exp_diff(m, m_new) + ", "s = s + ", None),
    ("_topk_rows", "loss += l_tail", "pass", None),
    ("_topk_rows", "G += g_tail", "pass", None),
    ("_topk_rows", "logq_tail = tl.where(n_live == V, float(\"-inf\"), logq_tail)", "pass", None),
    ("_topk_rows", "s += s_tail", "pass", None),
    ("_topk_rows", "c = tl.load(coeff + t).to(WIDE) * inv_temp", "c = tl.load(coeff + t).to(WIDE)", None),
    ("_topk_rows", "tl.debug_barrier()  # every read", "pass  # every read", GATE),
    ("_topk_rows", "tl.debug_barrier()\n    lanes", "pass\n    lanes", GATE),
    ("_topk_rows", "tl.debug_barrier()  # the sweep has", "pass  # the sweep has", GATE),
    ("renormalised_topk_kl", "acc += w_kd * x_d[None, :]", "acc = w_kd * x_d[None, :]", None),
    ("renormalised_topk_kl", "n // K", "n", None),
]
EQUIVALENT = {  # (file, line of source, old, new): why it computes the same
    ("_logprob_rows", "live = tl.maximum(live, tl.max((y != -1).to(tl.int32), 0))", "live = tl.maximum(live, tl.max((y != -1).to(tl.int32), 0))",
     "live = 1"): "an ignored row is then read in vain: the host puts zeros in its place, NaN in its logits included",
    ("span_sum", "sorted_T, order_T = torch.sort(span_T, stable=True)", "torch.sort(span_T, stable=True)", "torch.sort(span_T)"):
        "torch's CPU sort happens to be stable; on a GPU it is not",
    ("span_sum", "first = tl.load(offset + s, mask=s < S, other=0)", "<", "<="): "the lane behind the last span owns nothing and is not stored",
    ("_class_rows", "raw = tl.load(row + v, mask=v < V, other=float(\"-inf\")).to(WIDE)", "<", "<="):
        "what is read behind the row is not stored",
    ("renormalised_topk_kl", "if first < end:  # else nobody kept this id, and zeros are there already", "<", "<="):
        "an empty segment stores the zeros it started from",
}
COMPARISONS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
               ast.NotEq: ("!=", "==")}
OPERATORS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
CALLS = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "amax": "amin", "logsumexp": "amax"}
IN_PLACE = ("mul_", "add_", "sub_", "div_", "masked_fill_", "masked_fill", "clamp", "clamp_", "square_", "index_add_", "exp_")


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
    return tuple(path for op in TESTS.get(file, file).split() if (ROOT / (path := f"tests/test_{op}.py")).exists())


def by_hand(file: str) -> list[Mutant]:
    """Those of the list above. A text that is not there once is stale: the list must follow the code."""
    source, found = (ROOT / f"kernels/{file}.py").read_text(), []
    for name, old, new, tests in BY_HAND:
        if name == file:
            if source.count(old) != 1:
                sys.exit(f"BY_HAND: {old!r} is {source.count(old)} times in kernels/{file}.py, want once: refresh the list")
            at = source.index(old)
            start = len(source[:at].encode())
            found.append(Mutant(file, start, start + len(old.encode()), old, new, source[:at].count("\n") + 1,
                                source.splitlines()[source[:at].count("\n")].strip(),
                                (GATE,) if tests == GATE else tests_of(file) if tests is None else (f"tests/test_{tests}.py",),
                                file.strip("_").split("_")[0] if tests == GATE else ""))
    return found


def by_rule(file: str) -> list[Mutant]:
    """Every replacement that the rules know in the file's kernels and PyTorch twins."""
    source = (ROOT / f"kernels/{file}.py").read_text()
    raw = source.encode()
    lines = [0]
    for line in raw.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        is_kernel = any(ast.unparse(d) == "triton.jit" for d in function.decorator_list)
        if not is_kernel and "_torch" not in function.name:
            continue
        for node in (n for statement in function.body for n in ast.walk(statement)):
            for start, end, new in edits(node, raw, lines):
                found.append(Mutant(file, start, end, raw[start:end].decode(), new, raw[:start].count(b"\n") + 1,
                                    source.splitlines()[raw[:start].count(b"\n")].strip(), tests_of(file),
                                    "kernel" if is_kernel else "not kernel"))
    return list({(m.start, m.end, m.new): m for m in found if m.old.strip() != m.new.strip()}.values())


def edits(node: ast.AST, raw: bytes, lines: list[int]) -> list[tuple[int, int, str]]:
    """(start, end, new text) of what can go wrong at one node."""
    def place(n: ast.AST) -> tuple[int, int]:
        return lines[n.lineno - 1] + n.col_offset, lines[n.end_lineno - 1] + n.end_col_offset

    def text(n: ast.AST) -> str:
        return raw[slice(*place(n))].decode()

    def between(left: ast.AST, right: ast.AST, swap: tuple[str, str]) -> list[tuple[int, int, str]]:
        at = raw.index(swap[0].encode(), place(left)[1], place(right)[0])
        return [(at, at + len(swap[0]), swap[1])]

    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        return between(node.left, node.comparators[0], COMPARISONS[type(node.ops[0])])
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return between(node.left, node.right, OPERATORS[type(node.op)])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return [(*place(node), text(node.operand))]
    if isinstance(node, (ast.AugAssign, ast.Expr)) and not isinstance(getattr(node, "value", None), ast.Constant):
        return [(*place(node), "pass")]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name == "where" and len(node.args) == 3:
            return [(*place(node), f"({text(arg)})") for arg in node.args[1:]]
        if name in IN_PLACE:
            return [(*place(node), text(node.func.value))]
        if name in CALLS:
            end = place(node.func)[1]
            return [(end - len(name), end, CALLS[name])]
        banned = [k.value for k in node.keywords if k.arg == "other" and "inf" in text(k.value)]
        return [(*place(value), "0.0") for value in banned]
    return []


def build_copy(folder: Path) -> None:
    """The kernels and tests of this checkout as reflux.kernels, for this process and those that tests start."""
    for name in ("kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "conftest.py"))
    (folder / "reflux").mkdir()
    (folder / "reflux/kernels").symlink_to(folder / "kernels")
    # an editable install would lead reflux to the original
    (folder / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith('ScikitBuild')]\n")
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
    sys.path[:0] = [str(folder), str(folder / "tests")]
    os.environ.update(PYTHONPATH=f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", PYTHONDONTWRITEBYTECODE="1")
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
        hypothesis.settings.register_profile(f"mutants{examples}", max_examples=examples, deadline=None, derandomize=True, database=None,
                                             phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate))


def tests_pass(folder: Path, mutant: Mutant, examples: int) -> bool:
    """Do the mutant's tests pass in the copy as it is now? In a fork: reflux must be imported anew."""
    if mutant.tests == (GATE,):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, str(folder / "tests/compile_for_gpus.py"), "--quick", "--only", mutant.only]
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
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--noconftest", "--rootdir", str(folder), *selected, *mutant.tests])
        os._exit(int(code))
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
    original = path.read_bytes()
    try:
        changed = original[:mutant.start] + mutant.new.encode() + original[mutant.end:]
        ast.parse(changed)
        path.write_bytes(changed)
        return tests_pass(folder, mutant, FEW) and (mutant.tests == (GATE,) or tests_pass(folder, mutant, 25))
    finally:
        path.write_bytes(original)


def write_record(counts: dict, survivors: list[Mutant], options: argparse.Namespace) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    path = ROOT / f"bench/records/{datetime.date.today()}_kernel_mutants.json"
    path.write_text(json.dumps({
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit, "command": " ".join(sys.argv),
        "sample": options.sample, "seed": options.seed, "counts": counts, "survivors": [str(m) for m in survivors],
        "equivalent": [f"{file}.py: {old} -> {new} in {line}: {why}" for (file, line, old, new), why in EQUIVALENT.items()],
    }, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


def in_parallel(mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, bool | None]]:
    """(mutant, does it survive?) as they come; None for all of a group whose tests are red before any. A process a share of groups."""
    groups: dict[tuple, list[int]] = {}
    for i, mutant in enumerate(mutants):
        groups.setdefault((mutant.tests, mutant.only), []).append(i)
    shares: list[list[list[int]]] = [[] for _ in range(jobs)]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(group)
    context = multiprocessing.get_context("fork")  # before torch is imported: every process builds and imports a copy of its own
    results = context.Queue()
    workers = [context.Process(target=run_share, args=(mutants, share, results)) for share in shares if share]
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


def run_share(mutants: list[Mutant], groups: list[list[int]], results) -> None:
    with tempfile.TemporaryDirectory(prefix="mutants") as name:
        folder = Path(name)
        build_copy(folder)
        preload()
        for group in groups:
            first = mutants[group[0]]
            green = tests_pass(folder, first, FEW)
            if not green:
                print(f"{' '.join(first.tests)} -k '{first.only}' fails without a mutant:\n{(folder / 'output.txt').read_text()[-2000:]}", flush=True)
            for i in group:
                began = time.monotonic()
                alive = survives(folder, mutants[i]) if green else None
                if green:
                    print(f"{'SURVIVED' if alive else 'killed  '} {time.monotonic() - began:5.1f} s  {mutants[i]}", flush=True)
                results.put((i, alive))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--sample", type=int, default=6, help="mutants by rule from each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each with a copy of its own")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")
    draw, mutants = random.Random(options.seed), []
    for file in sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if options.only in p.stem):
        rules = by_rule(file)
        mutants += [*by_hand(file), *draw.sample(rules, min(options.sample, len(rules)))]
    mutants = [m for m in mutants if m.tests and m.key not in EQUIVALENT]
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
    print("\n".join(f"{file:<24} {killed:>3} of {total:>3} killed" for file, (killed, total) in sorted(counts.items())))
    if options.record and not red:
        write_record(counts, survivors, options)
    print(*(f"SURVIVED {m}" for m in survivors), sep="\n")
    if survivors or red:
        sys.exit(f"{len(survivors)} of {len(mutants)} mutants survived, {len(red)} groups of tests were red before any. Write the test "
                 "that kills a survivor, or say in EQUIVALENT why none can")


if __name__ == "__main__":
    main()
