"""Where a record comes from: commit, command, versions, device. Written once and never edited."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "records"


def git(*args: str) -> str:
    return subprocess.run(
        ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def commit() -> tuple[str, bool]:
    """(commit, is the tree dirty?). A copy without .git takes REFLUX_COMMIT, see gpu.py."""
    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (subprocess.CalledProcessError, FileNotFoundError):
        return os.environ.get("REFLUX_COMMIT", "unknown"), "REFLUX_COMMIT" not in os.environ


def versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "tokenizers", "liger-kernel", "trl"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    torch = sys.modules.get("torch")  # with its build (+cpu, +cu130); not imported for this alone
    return installed | ({"torch": str(torch.__version__)} if torch else {})


def device() -> dict:
    """Of a GPU its name, driver and what it gives right now; of a CPU its name, cores and threads,
    its load, and the rate of a matrix product right now.
    """
    import torch

    if not torch.cuda.is_available():
        from .clock import gemm_gflops

        there = {"device": _cpu(), "cpus": os.cpu_count(), "load_average": os.getloadavg()}
        return there | {"threads": torch.get_num_threads(), "gemm_gflops": gemm_gflops()}
    from .clock import roofline_now

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"  # a machine without the tool still has numbers
    return {"device": torch.cuda.get_device_name(), "driver": driver, **roofline_now()}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine()
    )


def write(
    name: str, content: dict, folder: Path = FOLDER, command: str = "python -m bench"
) -> Path:
    """<date>_<name>.json, never over an existing one. Records this process' own arguments."""
    date = datetime.datetime.now(datetime.UTC)
    revision, dirty = commit()
    record = {
        "commit": revision,
        "dirty": dirty,
        "date": date.isoformat(timespec="seconds"),
        "command": " ".join([command, *sys.argv[1:]]),
        "versions": versions(),
        **content,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date:%Y-%m-%d}_{name}.json"
    if path.exists():
        path = folder / f"{date:%Y-%m-%d_%H%M%S}_{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
