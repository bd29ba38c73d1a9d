"""Adapters on two ranks; test_lora.py runs it under torchrun: ASSETS FOLDER CASES, each case
[model, backend, tensor-parallel degree].
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from lora_cases import lora_config, train

from reflux.trainer.engine.engine import Engine


def main(assets: Path, folder: Path, cases: list) -> None:
    found = []
    for name, backend, degree in cases:
        over = dict(model={"backend": backend}, parallelism={"tensor_parallel_degree": degree})
        engine = Engine(lora_config(assets / name, folder / f"two-{name}", **over))
        found.append(train(engine))
        is_main = engine.is_main
        engine._rescue.close()
        engine._trainer.close()
    if is_main:
        (folder / "two.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
