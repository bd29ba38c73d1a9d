"""Tables: files, folders and data sets of the hub that the package `datasets` reads, as rows that
are mapped from the disk. One that cannot be read is a ValueError with its name.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.fit import nearest

PACKED = (".gz", ".zst", ".bz2", ".xz")
BUILDERS = {  # suffix of a file -> what of `datasets` reads it
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
FORMS = (
    ".jsonl, .json, .csv, .tsv, .parquet or .txt files (also .gz and .zst), one or more of them or "
    "a pattern, a folder of a data set, an id of the hub, reasoning_gym:NAME?size=1000&seed=7 or "
    "package.module:function"
)


def builder_of(file: Path) -> str | None:
    suffixes = [s for s in file.suffixes if s not in PACKED]
    return BUILDERS.get(suffixes[-1]) if suffixes else None


# columns of CSV files that are texts, whatever their cells look like: as numbers, 007 would lose
# its zeros, 42 would be 42.0 where another cell is empty, and NA or null would be no answer
TEXTS = (
    *("prompt", "question", "problem", "instruction", "input", "context", "text"),
    *("system", "system_prompt"),
    *("answer", "answerKey", "answer_letter", "answer_index", "label"),
    *("response", "output", "completion", "solution", "chosen"),
)


def text_of_cell(cell: str) -> str | None:
    """Of a CSV file, as it stands there; None where it is empty."""
    return cell or None


def read_files(builder: str | None, files: Sequence[Path], texts: Sequence[str] = ()) -> Any:
    """texts: columns that hold texts, beside those of TEXTS; of CSV files."""
    import datasets  # here: it takes 1.5 s to import

    names = [str(file) for file in files]
    if any(name.endswith(".zst") for name in names):
        _require_zstandard(names)
    more: dict[str, Any] = {"sep": "\t"} if ".tsv" in files[0].suffixes else {}
    if builder == "csv":
        more |= _csv_options(texts)
    try:
        with _quiet(datasets):
            table = datasets.load_dataset(builder, data_files=names, split="train", **more)
            return _without_blank(table) if builder == "text" else table
    except Exception as error:  # of datasets, pyarrow, and what they are built on
        raise _unreadable(names[0] if len(names) == 1 else str(names), error) from error


def _without_blank(table: Any) -> Any:
    """Without lines that hold no text: they are no documents."""
    kept = [i for i, text in enumerate(table["text"]) if text.strip()]
    return table if len(kept) == len(table) else table.select(kept)


def _csv_options(texts: Sequence[str]) -> dict[str, Any]:
    """NA is sodium, too: only an empty cell is none."""
    converters = dict.fromkeys([*TEXTS, *texts], text_of_cell)
    return {"converters": converters, "keep_default_na": False, "na_values": [""]}


def _require_zstandard(names: Sequence[str]) -> None:
    if importlib.util.find_spec("zstandard") is None:
        name = next(name for name in names if name.endswith(".zst"))
        raise ValueError(f"{name}: reading .zst wants the package zstandard")


def from_hub(source: str, section: SourceSection) -> Any:
    """From the hub; with HF_HUB_OFFLINE=1 from its cache."""
    import datasets
    import huggingface_hub

    revision = section.revision or None
    hint = (
        f". Where there is a network: hf download {source} --repo-type dataset --local-dir {source}"
        ". HF_HUB_OFFLINE=1 takes it from the cache of an earlier download"
    )
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:  # asked once: loading asks for minutes
            huggingface_hub.HfApi().dataset_info(source, revision=revision, timeout=10)
        with _quiet(datasets):
            table = datasets.load_dataset(source, section.subset or None, revision=revision)
    except Exception as error:
        what = str(error).strip().splitlines() or ["no message"]
        raise ValueError(
            f"{source}: no such file or folder, and no data set that can be had of the hub "
            f"({type(error).__name__}: {what[0][:200]}){hint}"
        ) from error
    return _part(source, table, section.split)


def read_folder(path: Path, split: str, texts: Sequence[str] = ()) -> Any:
    """Memory-mapped Arrow rows; other files are converted once into the cache of `datasets`. texts:
    as in read_files.
    """
    import datasets

    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    try:
        with _quiet(datasets):
            if saved:
                table = datasets.load_from_disk(str(path))
            else:
                lies_in = datasets.load_dataset_builder(str(path)).name
                more = _csv_options(texts) if lies_in == "csv" else {}
                table = datasets.load_dataset(str(path), **more)
    except Exception as error:
        raise _unreadable(str(path), error) from error
    return _part(str(path), table, split)


def _part(name: str, table: Any, split: str) -> Any:
    if not isinstance(table, dict):
        return table
    if split not in table:
        raise ValueError(
            f"{name}: no split {split!r}{nearest(split, table)} There are: {', '.join(table)}"
        )
    return table[split]


def _unreadable(name: str, error: Exception) -> ValueError:
    cause = error.__cause__ or error
    what = f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0]
    return ValueError(f"{name}: no data set that can be read ({what}); want {FORMS}. Is it whole?")


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the progress bars of `datasets`."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def check_parquet(path: Path) -> None:
    """ValueError for a file that is cut, and where there are no rows."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    rows = 0
    for file in files:
        try:
            rows += read_metadata(file).num_rows
        except (ArrowException, OSError) as error:
            raise ValueError(
                f"{file}: no Parquet file, or a cut one ({str(error).splitlines()[0]}); copy or "
                "download it again"
            ) from None
    if files and not rows:
        raise ValueError(f"{path}: no rows")
