"""A LoRA adapter and its base as one model folder: python -m reflux.trainer.merge ADAPTER OUT

W + s B A in fp32, rounded once to --dtype; file by file, on the CPU. OUT must not exist. Exit code
0, or 2 with what is wrong.
"""

import argparse
import shutil
import sys
from pathlib import Path

from .adapter_folder import read_adapter
from .engine.adapter_weights import saved_adapter
from .engine.export import write_config_and_card
from .engine.lora_export import merge_files, stored_float32, stored_layers, write_index
from .engine.model_builder import build_spec
from .engine.weight_files import weight_files

DTYPES = ("bfloat16", "float32")


def merge(folder: str, out: Path, dtype: str) -> None:
    """Writes the model folder `out`. ValueError for what is no adapter, and where `out` exists."""
    adapter = read_adapter(folder)
    if adapter is None:
        raise ValueError(f"{folder}: no adapter_config.json there; want a LoRA adapter's folder")
    if out.exists():
        raise ValueError(f"{out} exists; want a new folder")
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with saved_adapter(adapter) as saved:
            spec = build_spec(folder)
            layers = stored_layers(spec, adapter.base, saved.names)
            adapted = {t: name for t, name in layers.items() if name in set(saved.names)}
            merge_files(
                weight_files(adapter.base),
                staging,
                lambda t: saved.delta(adapted[t]) if t in adapted else None,
                dtype,
                stored_float32(spec, adapter.base),
            )
        write_index(staging, adapter.base)
        card = f"`{adapter.base}` with the LoRA adapter `{adapter.path}` merged into it.\n"
        write_config_and_card(staging, source=adapter.path, dtype=dtype, card=card)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main(arguments: list[str] | None = None, prog: str = "python -m reflux.trainer.merge") -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("adapter", help="a folder with adapter_config.json")
    parser.add_argument("out", type=Path, help="the model folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    given = parser.parse_args(arguments)
    try:
        merge(given.adapter, given.out, given.dtype)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
