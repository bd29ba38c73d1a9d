"""A copy of a model folder with fewer layers, or another chat template, or both.

    python -m reflux.trainer.studies.cut_layers --model FOLDER --layers 0,4,9,29 --out NEW
    python -m reflux.trainer.studies.cut_layers --model FOLDER --template FILE --out NEW

A student or a proxy made of a teacher: the named layers are kept in their order, embeddings, final
norm and head as they are. Nothing is trained here. A cut model has lost most of what it knew and
has to be healed, by SFT or by distillation (configs/language/).

The weights are one `model.safetensors`, with layers called `model.layers.N`, as those of real_pair
are. cut.json says what the folder was made of, and a folder that is there already is not written
again.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.trainer.data.tokenizer_files import read_template, write_template
from reflux.trainer.file_hash import file_sha256
from reflux.trainer.runs.files import to_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

LAYER = re.compile(r"^(?P<stem>.*\blayers\.)(?P<number>\d+)(?P<rest>\..+)$")
WEIGHTS, PROVENANCE = "model.safetensors", "cut.json"
SKIPPED = (WEIGHTS, "conversion.json", PROVENANCE)  # not true of the copy


@dataclass(frozen=True)
class Cut:
    """What a folder was made of; cut.json."""

    source_sha256: str  # of the weights it was cut from
    layers: tuple[int, ...]  # kept, in the numbers of the source; empty: all
    template_sha256: str  # "": the source's own
    parameters: int


def keep_layers(weights: Mapping[str, "Tensor"], layers: Sequence[int]) -> dict[str, "Tensor"]:
    """Tensors of the kept layers under their new numbers, and all tensors outside of layers."""
    number_of = {str(old): new for new, old in enumerate(layers)}
    kept = {}
    for name, tensor in weights.items():
        match = LAYER.match(name)
        if match is None:
            kept[name] = tensor
        elif match["number"] in number_of:
            kept[f"{match['stem']}{number_of[match['number']]}{match['rest']}"] = tensor
    return kept


def cut_config(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """config.json of the kept layers. ValueError for a layer that is not there, or named twice."""
    count = config["num_hidden_layers"]
    if list(layers) != sorted(set(layers)) or not all(0 <= n < count for n in layers):
        raise ValueError(
            f"layers = {list(layers)}; want numbers from 0 to {count - 1}, rising, each once"
        )
    types = config.get("layer_types")
    changed = {"layer_types": [types[n] for n in layers]} if types else {}
    return {**config, **changed, "num_hidden_layers": len(layers)}


def cut(source: Path, out: Path, layers: Sequence[int], template: Path | None = None) -> Cut:
    """Writes the model into `out`. ValueError where `out` holds another one."""
    made = _describe(source, layers, template)
    if _is_there(out, made):
        return made
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / PROVENANCE, made)
    for file in source.iterdir():
        if file.is_file() and file.name not in SKIPPED:
            shutil.copy(file, out)
    if template is not None:
        write_template(out, read_template(template))
    _write_weights(source, out, layers)
    return made


def _is_there(out: Path, made: Cut) -> bool:
    """Weights are written last: where they are missing, the writing was interrupted."""
    file, weights = out / PROVENANCE, out / WEIGHTS
    there = json.loads(file.read_text()) if file.exists() else None
    if there != to_json(made) and (there is not None or weights.exists()):
        raise ValueError(
            f"{out}: holds a model that was made of other layers, other weights or another template"
            f" ({there}; want {to_json(made)}). Remove it, or choose another --out"
        )
    return weights.exists()


def _describe(source: Path, layers: Sequence[int], template: Path | None) -> Cut:
    weights, config = source / WEIGHTS, source / "config.json"
    if not weights.is_file() or not config.is_file():
        raise ValueError(f"{source}: no {WEIGHTS} with a config.json; want a model folder")
    if layers:
        cut_config(json.loads(config.read_text()), layers)
    return Cut(
        source_sha256=file_sha256(weights),
        layers=tuple(layers),
        template_sha256="" if template is None else file_sha256(template),
        parameters=_count(weights, layers),
    )


def _write_weights(source: Path, out: Path, layers: Sequence[int]) -> None:
    """config.json and, by another name at first, the weights."""
    from safetensors.torch import load_file, save_file

    partial = out / f"{WEIGHTS}.partial"
    partial.unlink(missing_ok=True)
    if layers:
        save_file(keep_layers(load_file(source / WEIGHTS), layers), partial, {"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        write_json(out / "config.json", cut_config(config, layers))
    else:
        try:
            os.link(source / WEIGHTS, partial)  # no second copy on the disk
        except OSError:
            shutil.copy(source / WEIGHTS, partial)
    os.replace(partial, out / WEIGHTS)


def _count(weights: Path, layers: Sequence[int]) -> int:
    from safetensors import safe_open

    numbers = {str(n) for n in layers}
    total = 0
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():
            match = LAYER.match(name)
            if not layers or match is None or match["number"] in numbers:
                size = 1
                for side in file.get_slice(name).get_shape():
                    size *= side
                total += size
    return total


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.cut_layers",
        description="Copy a model folder with some of its layers, or with another chat template.",
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layers", default="", help="kept ones, as 0,4,9; default: all")
    parser.add_argument("--template", type=Path, help="a chat template in jinja")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        layers = [int(n) for n in args.layers.split(",") if n]
        made = cut(args.model, args.out, layers, args.template)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.out}: {len(made.layers) or 'all'} layers, {made.parameters / 1e6:.1f} M")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
