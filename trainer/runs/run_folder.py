"""What to do about a run folder that exists: nothing is ever deleted or silently mixed."""

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reflux.trainer.config.loader import as_table, load, to_toml
from reflux.trainer.config.schema import Config

MAY_CHANGE = (
    "steps",
    "on_existing_run",
    "log",
    "eval",
    "guard",
    "export",
    "checkpoint",
    "profiler",
    "comm",
    "metrics",
    "compile",
    "folder",
)  # a resumed run may differ in these


def settle(cfg: Config) -> Config:
    """The configuration with the folder the run will really use. Every rank decides the same before
    anything is written.

    Raises ValueError when the folder holds a run and on_existing_run does not say what to do, or
    when the resumed run would not be the same experiment.
    """
    folder = Path(cfg.folder)
    if not (folder / "run.jsonl").exists() and not (folder / "checkpoint").exists():
        return cfg
    asks = cfg.on_existing_run == "ask"
    choice = _ask(folder) if asks else cfg.on_existing_run
    if choice == "fail":
        raise ValueError(
            f"{folder} holds a run already. Set on_existing_run = 'resume' to continue it, 'new' "
            "for a fresh folder beside it, or another folder"
        )
    if choice == "new":
        return replace(cfg, folder=str(_free(folder)))
    _refuse_another_experiment(cfg, folder)
    return cfg


def save_config(cfg: Config) -> None:
    """The resolved configuration beside the log; `--config <folder>/config.toml` repeats the
    run.
    """
    Path(cfg.folder).mkdir(parents=True, exist_ok=True)
    (Path(cfg.folder) / "config.toml").write_text(to_toml(cfg))


def _ask(folder: Path) -> str:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not sys.stdin.isatty():
        return "fail"  # nobody there to answer, or several ranks would ask at once
    while True:
        answer = (
            input(f"{folder} holds a run already: [r]esume it, [n]ew folder, [q]uit? ")
            .strip()
            .lower()[:1]
        )
        if answer in ("r", "n", "q"):
            return {"r": "resume", "n": "new", "q": "fail"}[answer]


def _free(folder: Path) -> Path:
    return next(
        p for i in range(2, 10**6) if not (p := folder.with_name(f"{folder.name}-{i}")).exists()
    )


def _refuse_another_experiment(cfg: Config, folder: Path) -> None:
    saved = folder / "config.toml"
    if not saved.exists():
        return
    before, now = as_table(load(saved)), as_table(cfg)
    changed = [name for name in _differences(before, now) if name.split(".")[0] not in MAY_CHANGE]
    if changed:
        raise ValueError(
            f"{folder} was started with other values of {', '.join(changed)}. A resumed run has to "
            "be the same experiment: change them back, or set on_existing_run = 'new'"
        )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    out = []
    for key in sorted(set(a) | set(b)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            out += _differences(x, y, f"{prefix}{key}.")
        elif x != y:
            out.append(prefix + key)
    return out
