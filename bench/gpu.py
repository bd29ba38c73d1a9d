"""One command for a machine that has a GPU and nothing of this project installed: make bench-gpu

    python bench/gpu.py [OP] [--out FOLDER] [--seconds 420]

Needs torch, triton, pytest and hypothesis (pytest-xdist makes the gate several times faster) and no
network; without them, carry the wheels: `pip download -d wheels pytest pytest-xdist hypothesis`
elsewhere, then `pip install --no-index --find-links wheels ...` there. A copy without .git takes
the commit from REFLUX_COMMIT. Tests of every op run on the GPU first, each hypothesis test with a
few examples, for every drawn shape may be a kernel to compile; then the clock; then records and
plots in FOLDER.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHERE = """
import bench.__main__
import reflux.kernels.span_sum as op

print("reflux.kernels from", op.__file__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="?", default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "records", metavar="FOLDER")
    parser.add_argument(
        "--seconds", type=float, default=420, help="for the clock; the gate comes before it"
    )
    parser.add_argument("--tokens", nargs="+", default=[], metavar="T")
    parser.add_argument(
        "--dry-run", action="store_true", help="say where reflux.kernels comes from, and stop"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shim") as shim:
        Path(shim, "reflux").mkdir()
        for floor in ("kernels", "tokenalign", "trainer"):
            Path(shim, "reflux", floor).symlink_to(ROOT / floor)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([shim, str(ROOT)]),
            "HYPOTHESIS_PROFILE": "gpu",
            "OMP_NUM_THREADS": "4",
            "REFLUX_KERNELS_OF": shim,
        }
        if args.dry_run:
            command = [sys.executable, "-c", WHERE]
            sys.exit(subprocess.run(command, env=environment, cwd=ROOT).returncode)
        limits = ["--seconds", str(args.seconds), "--out", str(args.out.resolve())]
        sweep = ["--tokens", *args.tokens] if args.tokens else []
        command = [sys.executable, "-m", "bench", args.op, *limits, *sweep]
        sys.exit(subprocess.run(command, env=environment, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
