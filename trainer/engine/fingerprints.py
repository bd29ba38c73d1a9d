"""What a run is made of, by hash: the weights, tokenizer and settings of every model, the data, the
source of the grader and of distill.rewrite.

They stand in the head of run.jsonl and in every checkpoint. A run that is resumed on other inputs
than those it was trained on is another experiment: it is refused, with what has changed, unless
on_changed_input = "accept". Packages that grade or generate are told by their version.

Each file is hashed by one rank, once: inputs.json of the run's folder remembers its size, its times
and its hash.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from reflux.trainer.adapter_folder import BASE_FILES, CONFIG, WEIGHTS, read_adapter
from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.parts import input_name, tasks
from reflux.trainer.config.phases import roles
from reflux.trainer.config.schema import Config
from reflux.trainer.data.sources import source_files
from reflux.trainer.data.tokenizer_files import COPIED
from reflux.trainer.file_hash import file_sha256

from .agreement import agreed
from .weight_files import INDEX, weight_files

REMEMBERED = "inputs.json"
SETTINGS = ("config.json", *COPIED)
# a change within so short a time may leave a file's times as they were
CLOCK_S = 2.0
THREADS = 8
PACKAGES = {"math": "math-verify", "reasoning_gym": "reasoning-gym"}  # by task


@dataclass(frozen=True)
class Input:
    """One input of a run. files: name -> sha256 in hex, or package -> version."""

    path: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class _Source:
    """An input before it is hashed."""

    path: str
    files: Mapping[str, Path]
    versions: Mapping[str, str]


# --- which files


def _sources(cfg: Config) -> dict[str, _Source]:
    """By name: a role of config/roles.py, data, eval, task, rewrite."""
    sources = {}
    for role in roles(cfg):
        if not role.is_copy:
            unread = role.elsewhere or (role.own and cfg.model.from_scratch)
            if role.elsewhere and cfg.teacher.cache:
                # weights prove that the cache is of this teacher, where they are at hand
                unread = not any(Path(role.model.path).glob("*.safetensors"))
            template = role.model.template
            sources[role.name] = _model(role.model.path, weights=not unread, template=template)
    if cfg.teacher.cache:  # it names the hashes of its shards
        description = Path(cfg.teacher.cache).resolve() / "cache.json"
        files = {description.name: description} if description.is_file() else {}
        sources["teacher cache"] = _Source(str(description.parent), files, {})
    for name, source in data_sources(cfg).items():
        sources[name] = _data(source)
    for part, task in tasks(cfg).items():
        if task.name and (not part or task != cfg.task):
            sources[input_name("task", part)] = _task(task.name, task.options)
    if cfg.distill.rewrite:
        sources["rewrite"] = _function(cfg.distill.rewrite)
    return sources


def data_sources(cfg: Config) -> dict[str, str | tuple[str, ...]]:
    """Every source of prompts by its name among the inputs: data, eval, data.PART, eval.PART."""
    sections: dict[str, Mapping[str, SourceSection]] = {
        "data": cfg.data.parts or {"": cfg.data},
        "eval": cfg.eval.parts or {"": cfg.eval},
    }
    return {
        input_name(table, part): section.source
        for table, parts in sections.items()
        for part, section in parts.items()
        if section.source
    }


def _model(path: str, *, weights: bool = True, template: str = "") -> _Source:
    """Of a LoRA adapter, its own files and those of its base."""
    folder = os.path.abspath(os.path.expanduser(path))
    adapter = read_adapter(folder)
    if adapter is not None:
        base = {f"base/{name}": file for name, file in _model(adapter.base).files.items()}
        names = [CONFIG, WEIGHTS, *SETTINGS]
        own = {name: Path(folder) / name for name in names if (Path(folder) / name).is_file()}
        own |= {"template": Path(os.path.abspath(template))} if template else {}
        return _Source(folder, own | base, {})
    names = [*SETTINGS, INDEX] if weights else list(SETTINGS)
    names += [os.path.basename(f) for f in weight_files(folder)] if weights else []
    files = {name: Path(folder) / name for name in names}
    files |= {"template": Path(os.path.abspath(template))} if template else {}
    return _Source(folder, {n: f for n, f in files.items() if f.is_file()}, {})


def _data(source: str | Sequence[str]) -> _Source:
    files = [Path(os.path.abspath(file)) for file in source_files(source)]
    if len(files) == 1:
        return _Source(str(files[0]), {files[0].name: files[0]}, {})
    if files:
        top = Path(os.path.commonpath([file.parent for file in files]))
        return _Source(str(top), {f.relative_to(top).as_posix(): f for f in files}, {})
    assert isinstance(source, str)  # a list that names no files is a ValueError
    path = Path(os.path.abspath(source))
    if path.is_dir():
        return _Source(str(path), dict(_files_below(path)), {})
    name = source.partition("?")[0]
    package = PACKAGES.get(name.partition(":")[0])
    return _Source(source, {}, _version(package)) if package else _function(name)


def _files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Without hidden files and the caches that `datasets` puts beside its data."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith((".", "cache-", "tmp")):
                path = Path(parent) / name
                yield path.relative_to(folder).as_posix(), path


def _task(name: str, options: Mapping[str, Any]) -> _Source:
    if name == "reward_model" and isinstance(options.get("path"), str):
        return _model(options["path"])
    if name == "judge":
        return _judge(options)
    if name == "column":
        return _tasks_of_column(options)
    if name in PACKAGES:
        return _Source(name, {}, _version(PACKAGES[name]))
    return _function(name)


def _tasks_of_column(options: Mapping[str, Any]) -> _Source:
    """The files of all its tasks, by the value of the column. Building it says what is wrong."""
    files: dict[str, Path] = {}
    versions: dict[str, str] = {}
    tasks = options.get("tasks")
    for value, task in tasks.items() if isinstance(tasks, Mapping) else ():
        table = task if isinstance(task, Mapping) else {"name": task}
        if isinstance(table.get("name"), str):
            one = _task(table["name"], table.get("options", {}))
            files |= {f"{value}/{name}": file for name, file in one.files.items()}
            versions |= one.versions
    return _Source("column", files, versions)


def _judge(options: Mapping[str, Any]) -> _Source:
    """Its folder or the name of a served model, and its template."""
    path, template = options.get("path"), options.get("template")
    source = _model(path) if isinstance(path, str) and path else _Source("judge", {}, {})
    if not (isinstance(template, str) and os.path.isfile(template)):
        return source
    return _Source(source.path, {**source.files, "template": Path(template)}, source.versions)


def _function(name: str) -> _Source:
    """The file of `package.module:function`; what it imports is not followed."""
    module, colon, _ = name.partition(":")
    file = _module_file(module) if colon else None
    return _Source(name, {} if file is None else {file.name: file}, {})


def _module_file(module: str) -> Path | None:
    if os.getcwd() not in sys.path:  # as data/prompts.py finds it
        sys.path.append(os.getcwd())
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None  # loading it will say what is wrong
    return Path(spec.origin) if spec and spec.origin and os.path.isfile(spec.origin) else None


def _version(package: str) -> dict[str, str]:
    try:
        return {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        return {}


# --- their hashes


def fingerprints(cfg: Config) -> dict[str, Input]:
    """The inputs of a run by name. Collective: each rank hashes its part of the files."""
    sources = agreed(partial(_sources, cfg))
    files = sorted({str(file) for s in sources.values() for file in s.files.values()})
    known = _remembered(cfg.folder).get("hashes", {})
    stats = agreed(partial(_stats, files))
    unknown = [f for f in files if known.get(f, [None])[:-1] != stats[f]]
    hashes = {f: known[f][-1] for f in files if f not in unknown} | _hashed(unknown)
    _remember(cfg.folder, hashes={f: [*stats[f], hashes[f]] for f in files if _settled(stats[f])})
    found = {
        name: Input(s.path, {n: hashes[str(f)] for n, f in s.files.items()} | dict(s.versions))
        for name, s in sources.items()
    }
    agreed(partial(_check_bases, found.values()))
    return found


def _check_bases(inputs: Iterable[Input]) -> None:
    """ValueError for an adapter that was trained on other weights than its base has now."""
    for x in inputs:
        file = Path(x.path) / BASE_FILES
        if f"base/{SETTINGS[0]}" not in x.files or not file.is_file():
            continue
        trained_on = json.loads(file.read_text())
        for name, digest in x.files.items():
            told = trained_on.get(name.removeprefix("base/"), digest)
            if name.startswith("base/") and name.endswith(".safetensors") and told != digest:
                raise ValueError(
                    f"{x.path}: the adapter was trained on another {name.removeprefix('base/')} "
                    f"than its base has now ({BASE_FILES} holds its sha256). Put the base back, or "
                    "name it in adapter_config.json"
                )


def _stats(files: Sequence[str]) -> dict[str, list[int]]:
    """Size, and the times of the last change of content and of anything."""
    stats = {file: os.stat(file) for file in files}
    return {f: [s.st_size, s.st_mtime_ns, s.st_ctime_ns] for f, s in stats.items()}


def _settled(stat: Sequence[int]) -> bool:
    return time.time_ns() - max(stat[1:]) > CLOCK_S * 1e9


def _hashed(files: Sequence[str]) -> dict[str, str]:
    """sha256 of each, shared by the ranks. Collective."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    mine = files[dist.get_rank() :: dist.get_world_size()] if several else files
    own = agreed(partial(_hash_files, mine))
    if not several:
        return own
    parts: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    return {file: digest for part in parts for file, digest in part.items()}


def _hash_files(files: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(file_sha256, files)))


def data_input(source: str | Sequence[str]) -> Input:
    """One source of prompts, hashed anew. Not collective."""
    data = _data(source)
    hashes = _hash_files([str(file) for file in data.files.values()])
    files = {name: hashes[str(file)] for name, file in data.files.items()}
    return Input(data.path, files | dict(data.versions))


# --- what the folder remembers


def _remembered(folder: str) -> dict[str, Any]:
    """{"hashes", "inputs"} of an earlier start; empty if there is none, or it is torn."""
    try:
        table = json.loads((Path(folder) / REMEMBERED).read_text())
        return table if isinstance(table, dict) else {}
    except (OSError, ValueError):
        return {}


def _remember(folder: str, **entries: Any) -> None:
    if dist.is_initialized() and dist.get_rank():
        return
    file = Path(folder) / REMEMBERED
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_name(REMEMBERED + ".partial")
    partial_file.write_text(json.dumps(_remembered(folder) | entries, indent=1) + "\n")
    os.replace(partial_file, file)


# --- compared


def changed_inputs(before: Mapping[str, Input], now: Mapping[str, Input]) -> list[str]:
    """What has changed, one entry for each input that both have. Another eval.source is a choice
    and no change (runs/run_folder.py).
    """
    found = []
    for name in before.keys() & now.keys():
        a, b = before[name], now[name]
        if name == "eval" and a.path != b.path:
            continue
        words = [
            *(f"{f} has changed" for f in a.files if b.files.get(f, a.files[f]) != a.files[f]),
            *(f"{f} is gone" for f in a.files if f not in b.files),
            *(f"{f} is new" for f in b.files if f not in a.files),
        ]
        if words:
            more = f" and {len(words) - 3} more" if words[3:] else ""
            found.append(f"{name} ({b.path}: {', '.join(words[:3])}{more})")
    return sorted(found)


class ChangedInputs(ValueError):
    """A run is to be resumed on files that are not those it was trained on."""


class RunInputs:
    """The inputs of this run, against those of the run that is resumed.

    table: as run.jsonl and checkpoints hold them. messages: sentences about changes that
    on_changed_input = "accept" lets pass.
    """

    def __init__(self, cfg: Config):
        """Collective."""
        self._cfg, self._now = cfg, fingerprints(cfg)
        self.table: dict[str, Any] = {name: asdict(x) for name, x in self._now.items()}
        self.messages: tuple[str, ...] = ()

    def check_remembered(self) -> None:
        """Against the last start in this folder: what has changed is said before a checkpoint that
        does not fit is read. Collective.
        """
        with contextlib.suppress(LookupError, TypeError, AttributeError):  # edited by hand
            table = agreed(partial(_remembered, self._cfg.folder)).get("inputs", {})
            agreed(partial(self._check, table))

    def check(self, loaded: Mapping[str, Any]) -> None:
        """Against those of the checkpoint; then this folder remembers the present ones. ValueError
        for a change, with its name.
        """
        self._check(loaded)
        _remember(self._cfg.folder, inputs=self.table)

    def _check(self, table: Mapping[str, Any]) -> None:
        before = {name: Input(x["path"], x["files"]) for name, x in table.items()}
        changed = changed_inputs(before, self._now)
        if not changed:
            return
        what = f"{self._cfg.folder} was trained on other inputs: {'; '.join(changed)}"
        if self._cfg.on_changed_input == "fail":
            raise ChangedInputs(
                f"{what}. A resumed run has to be the same experiment: put them back, set "
                "on_existing_run = 'new', or go on with them by on_changed_input = 'accept'"
            )
        self.messages = (f"{what}. It goes on with the present ones: on_changed_input = 'accept'",)
