"""Every family of model_families.py, tiny and random, against transformers and through a whole run:

    python -m bench.model_scan FOLDER                  # goes on where it stopped
    python -m bench.model_scan FOLDER --family mixtral jamba
    python -m bench.model_scan FOLDER --record         # a record, and the table of docs/models.md

Compared are the logarithms of probabilities (nats, the largest difference over three texts and the
vocabulary): logits, head as a matrix, padded rows, packed rows, decoding with a cache. Then
dry-run, check, two steps of calibrate and of distill with the family in every role, and the export
of the last, read by transformers. FOLDER/FAMILY.json holds what came out; a file that is there is
not made again.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .model_families import FAMILIES, MULTIMODAL, make_model
from .records import ROOT, commit, device, write

TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))  # tiny tokenizers, data and runs are those of the tests
DOCUMENT = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m bench.model_scan -->", "<!-- end of table -->"
LENGTHS = (11, 7, 17)  # tokens of the texts
SAME = 2e-5  # nats


def scan(family: str, folder: Path) -> dict[str, Any]:
    """What the table says of a family."""
    work, result = folder / "work" / family, {"family": family, "refused": ""}
    shutil.rmtree(work, ignore_errors=True)
    try:
        for seed, name in enumerate(("model", "other")):
            make_model(family, work / name, seed)
            _add_tokenizer(folder, work / name)
        with _host(folder):
            result |= _differences(work / "model", family)
    except Exception as error:
        return result | {"refused": _words(error)}
    runs = _runs(work, packs=isinstance(result["packed"], float))
    for name, run in runs.items():
        result[name] = _tried(run)
    export = work / "distill" / "export"
    if result["distill"] == "yes":
        with _host(folder):
            result["export"] = _tried(lambda: _export_difference(export, family))
    shutil.rmtree(work)
    return result


# --- against transformers


def _differences(path: Path, family: str) -> dict[str, Any]:
    from engine_cases import head_product, load_frozen, positions

    from reflux.trainer.engine.decoding import gathered
    from reflux.trainer.engine.forward import hidden_states
    from reflux.trainer.engine.head import head_logits
    from reflux.trainer.engine.probe import prove_decoding, prove_forward

    texts = _texts()
    want = _reference(path, family, texts)
    model = load_frozen(_trainer, path).model
    with torch.no_grad():
        hidden = [hidden_states(model, ids[None], positions(len(ids))) for ids in texts]
        result: dict[str, Any] = {
            "logits": _largest([head_logits(model, h)[0] for h in hidden], want),
            "fused": _largest([head_product(model, h)[0] for h in hidden], want),
            "padded": _largest(_padded(model, texts), want),
        }
        result["packed"] = _tried(lambda: prove_forward(model, family, packed=True))
        if result["packed"] == "yes":
            result["packed"] = _largest(_packed(model, texts), want)
        with gathered(model):
            result["decoding"] = _tried(lambda: prove_decoding(model, family))
            if result["decoding"] == "yes":
                result["decoding"] = _largest(_decoded(model, texts), [w[-3:] for w in want])
    return result


def _export_difference(path: Path, family: str) -> float:
    """Also a ValueError where transformers misses a tensor of the export, or finds another."""
    from engine_cases import load_frozen, positions

    texts = _texts()
    want = _reference(path, family, texts)
    model = load_frozen(_trainer, path).model
    with torch.no_grad():
        return _largest([model(t[None], positions=positions(len(t)))[0] for t in texts], want)


def _reference(path: Path, family: str, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    model, info = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if wrong := [key for key in ("missing_keys", "unexpected_keys") if info[key]]:
        raise ValueError(f"transformers reads it with {wrong[0]}: {sorted(info[wrong[0]])[:2]}")
    if family == "llama4":  # its own forward wants images
        model = model.language_model
    with torch.no_grad():
        return [model.eval()(ids[None]).logits[0] for ids in texts]


def _texts() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(64, 512, (n,), generator=random) for n in LENGTHS]


def _largest(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    nats = [(x.double().log_softmax(-1), y.double().log_softmax(-1)) for x, y in zip(got, want)]
    return max(float((x - y).abs().max()) for x, y in nats)


def _padded(model: Any, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    from reflux.trainer.engine.forward import hidden_states
    from reflux.trainer.engine.head import head_logits

    width = max(LENGTHS)
    ids_NL = torch.zeros(len(texts), width, dtype=torch.long)
    positions_NL = torch.zeros_like(ids_NL)
    for i, text in enumerate(texts):
        n = len(text)
        ids_NL[i, :n] = text
        positions_NL[i] = torch.cat([torch.arange(n), torch.arange(width - n)])
    logits_NLV = head_logits(model, hidden_states(model, ids_NL, positions_NL))
    return [logits_NLV[i, : len(text)] for i, text in enumerate(texts)]


def _packed(model: Any, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    from reflux.trainer.engine.forward import hidden_states
    from reflux.trainer.engine.head import head_logits

    positions_L = torch.cat([torch.arange(n) for n in LENGTHS])
    hidden_1LD = hidden_states(model, torch.cat(texts)[None], positions_L[None], packed=True)
    return list(head_logits(model, hidden_1LD)[0].split(LENGTHS))


def _decoded(model: Any, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits at the last three places: behind prompts padded on the left, then token by token."""
    from reflux.trainer.engine.decoding import kv_decoder

    width = max(LENGTHS) - 2
    ids_NL = torch.zeros(len(texts), width, dtype=torch.long)
    positions_NL, real_NL = torch.zeros_like(ids_NL), torch.zeros_like(ids_NL, dtype=torch.bool)
    for i, text in enumerate(texts):
        n = len(text) - 2
        ids_NL[i, width - n :], positions_NL[i, width - n :] = text[:n], torch.arange(n)
        real_NL[i, width - n :] = True
    with kv_decoder(model, max_length=width + 2) as step:
        logits = [step(ids_NL, positions_NL, real_NL, True)]
        for back in (2, 1):
            real_NL = torch.cat([real_NL, torch.ones_like(real_NL[:, :1])], 1)
            last_N1 = torch.stack([text[len(text) - back :][:1] for text in texts])
            place_N1 = torch.tensor([[len(text) - back] for text in texts])
            logits.append(step(last_N1, place_N1, real_NL, False))
    return list(torch.stack(logits, 1))


# --- whole runs


def _runs(work: Path, packs: bool) -> dict[str, Callable[[], None]]:
    from runs import REWARD_VOWELS, config

    from reflux.trainer.preflight.check import check
    from reflux.trainer.preflight.dry_run import dry_run

    model, other = ({"path": str(work / n), "dtype": "float32"} for n in ("model", "other"))
    over: dict[str, Any] = {
        "model": {"path": model["path"]},
        "batch": {"pack": packs},
        "task": {"name": REWARD_VOWELS},
    }
    calibrate = over | {"proxy": other}
    distill = over | {"teacher": other, "export": {"enable": True, "dtype": "float32"}}
    cfg = config(work, work / "calibrate", "calibrate", **calibrate)
    return {
        "dry_run": lambda: _expect_zero(dry_run, cfg),
        "check": lambda: _expect_zero(check, cfg),
        "calibrate": lambda: _train(cfg),
        "distill": lambda: _train(config(work, work / "distill", "distill", **distill)),
    }


def _expect_zero(act: Callable[[Any], int], cfg: Any) -> None:
    from assets import free_port

    os.environ["MASTER_PORT"] = str(free_port())
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = act(cfg)
    if code:
        wrong = [line for line in said.getvalue().splitlines() if "error" in line.lower()]
        raise ValueError(" ".join(wrong[:1]) or f"exit code {code}")


def _train(cfg: Any) -> None:
    from reflux.trainer import loop

    _expect_zero(loop.train, cfg)


# --- around it


def _tried(act: Callable[[], Any]) -> Any:
    """What it returns, "yes" for None, or the words of its error."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            result = act()
        return "yes" if result is None else result
    except (Exception, SystemExit) as error:
        return _words(error)
    finally:
        if sys.exc_info()[0] and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text}"[:300]


_trainer: Any = None  # of _host


@contextlib.contextmanager
def _host(folder: Path) -> Iterator[None]:
    """A process group and a mesh, for models outside of a run."""
    global _trainer
    from assets import free_port, make_trainer

    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone | {"MASTER_PORT": str(free_port())})
    with contextlib.redirect_stderr(io.StringIO()):
        _trainer = make_trainer(folder / "assets" / "qwen3", folder / "host")
    try:
        yield
    finally:
        _trainer.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _add_tokenizer(folder: Path, model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / "assets" / "qwen3" / name, model / name)


def _prepare(folder: Path) -> None:
    import logging

    from transformers.models.auto import tokenization_auto
    from transformers.utils import logging as transformers_logging

    from reflux.trainer.studies.debug_models import write_models

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ["PYTHONPATH"] = str(TESTS)
    os.environ["HF_HUB_OFFLINE"] = "1"
    # where it is installed for its tokenizer files alone, transformers would load it for mistral
    kinds = tokenization_auto.TOKENIZER_MAPPING_NAMES
    for name in [n for n, kind in kinds.items() if kind == "MistralCommonBackend"]:
        kinds[name] = "TokenizersBackend"
    if not (folder / "assets" / "gemma3").exists():
        (folder / "assets").mkdir(parents=True, exist_ok=True)
        write_models(folder / "assets")
    logging.disable(logging.WARNING)


# --- the table


def verdict(row: dict[str, Any]) -> str:
    """whole: every step, packing aside | some | refused | wrong: a number is too large."""
    if row["refused"]:
        return "refused"
    numbers = [
        row[k]
        for k in ("logits", "fused", "padded", "packed", "decoding", "export")
        if isinstance(row.get(k), float)
    ]
    if any(not value <= 10 * SAME for value in numbers):
        return "wrong"
    names = ("dry_run", "check", "calibrate", "distill")
    return "whole" if all(row.get(n) == "yes" for n in names) else "some"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = (
        "family",
        "logits",
        "head",
        "padded",
        "packed",
        "decoding",
        "calibrate",
        "distill",
        "export",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    notes = []
    for row in sorted(rows, key=lambda r: r["family"]):
        if row["refused"]:
            notes.append(f"- `{row['family']}`: {_short(row['refused'])}")
            continue
        keys = ("logits", "fused", "padded", "packed", "decoding", "calibrate", "distill", "export")
        cells = [_cell(row.get(key, "")) for key in keys]
        lines.append(f"| {row['family']} | {' | '.join(cells)} |")
        if refused := [
            k
            for k in ("decoding", "calibrate", "distill", "export")
            if _cell(row.get(k, "")) == "no"
        ]:
            notes.append(f"- `{row['family']}`, {refused[0]}: {_short(row[refused[0]])}")
    return "\n".join([*lines, "", "Refused, and why:", "", *notes])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.0e}"
    return value if value in ("yes", "") else "no"


def _short(words: str) -> str:
    return words if len(words) < 160 else words[:157] + "..."


def _record(folder: Path) -> None:
    """Without the paths of this machine."""
    from importlib.metadata import version

    texts = [file.read_text() for file in sorted(folder.glob("*.json"))]
    rows = [json.loads(text.replace(f"{folder / 'work'}{os.sep}", "")) for text in texts]
    content = {
        "commits": sorted({row["commit"] for row in rows}),
        "transformers": version("transformers"),
        "torchtitan": version("torchtitan"),
        **device(),
        "nats_of_agreement": SAME,
        "families": rows,
    }
    path = write("model_scan_cpu", content, command="python -m bench.model_scan")
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    said = document_table(json.loads(path.read_text()), path.name)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{said}\n{END}{after}")
    print(f"Recorded in {path}, {len(rows)} families")


def document_table(record: dict[str, Any], name: str) -> str:
    """What stands between the marks of docs/models.md."""
    rows, versions = record["families"], record["versions"]
    counts = dict.fromkeys(("whole", "some", "refused", "wrong"), 0)
    for row in rows:
        counts[verdict(row)] += 1
    return (
        f"{len(rows)} families with torch {versions['torch']} and transformers "
        f"{record['transformers']} on a CPU ([record](../bench/records/{name})). "
        f"{counts['whole']} go through every step, {counts['some']} through some, "
        f"{counts['refused']} are refused, {counts['wrong']} differ by more than {10 * SAME:g} "
        f"nats in some column.\n\n{table(rows)}"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.model_scan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", nargs="+", default=[*FAMILIES, *MULTIMODAL])
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args(arguments)
    folder: Path = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.record:
        _record(folder)
        return 0
    _prepare(folder)
    for family in args.family:
        file = folder / f"{family}.json"
        if file.exists():
            continue
        start = time.time()
        revision, dirty = commit()
        result = scan(family, folder) | {"commit": revision, "dirty": dirty}
        result["seconds"] = round(time.time() - start, 1)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{family}: {verdict(result)} {result}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
