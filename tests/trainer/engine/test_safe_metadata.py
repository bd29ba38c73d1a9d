"""Checkpoints of torch are read without running what they name, and read the same otherwise."""

import enum
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import PAYLOADS, Calls
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from reflux.trainer.engine.safe_metadata import (
    METADATA,
    SafePlanner,
    SafeReader,
    read_metadata,
    torn_files,
    unsafe_objects,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
DTYPES += [torch.bool, torch.int32, torch.float8_e4m3fn]


def state() -> dict:
    """Every kind of entry that a trainer's checkpoint has."""
    tensors = {str(t): torch.zeros(3, 2).to(t) for t in DTYPES}
    numbers = {"step": 3, "notes": "{}", "flag": True, "none": None, "betas": (0.9, 0.95)}
    return (
        tensors
        | {"deep": {"list": [1.5, {"x": torch.ones(2)}]}, "scalar": torch.tensor(2.0)}
        | numbers
    )


def save(folder, extra: dict | None = None) -> None:
    dcp.save(state() | (extra or {}), checkpoint_id=str(folder), no_dist=True)


def load(folder, wanted: dict) -> dict:
    dcp.load(wanted, storage_reader=SafeReader(folder), planner=SafePlanner(), no_dist=True)
    return wanted


def test_the_description_is_the_one_that_torch_reads(tmp_path):
    save(tmp_path)
    with open(tmp_path / METADATA, "rb") as file:
        assert read_metadata(tmp_path) == pickle.load(file)
    assert torn_files(tmp_path, read_metadata(tmp_path)) == []
    assert unsafe_objects(tmp_path, read_metadata(tmp_path)) == []


def test_everything_comes_back(tmp_path):
    save(tmp_path)
    blank = {
        name: torch.full_like(x, 1) if isinstance(x, torch.Tensor) else x
        for name, x in state().items()
    }
    loaded = load(tmp_path, blank | {"step": 0, "notes": "", "betas": (0.0, 0.0)})
    for name, x in state().items():
        same = torch.equal(loaded[name], x) if isinstance(x, torch.Tensor) else None
        assert same if same is not None else str(loaded[name]) == str(x), name


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_the_description_does_not_run(tmp_path, payload, protocol):
    mark = tmp_path / "mark"
    planted = Metadata({}, planner_data=PAYLOADS[payload](mark), storage_data={})
    (tmp_path / METADATA).write_bytes(pickle.dumps(planted, protocol=protocol))
    with pytest.raises(ValueError, match="names .*which no checkpoint needs; it was not loaded"):
        read_metadata(tmp_path)
    assert not mark.exists()
    pickle.loads((tmp_path / METADATA).read_bytes())
    assert mark.exists(), "a payload that runs nowhere proves nothing"


class OldPickler(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 does."""

    def reducer_override(self, value):
        if isinstance(value, enum.Enum):
            return getattr, (type(value), value.name)
        return NotImplemented


def test_the_description_by_an_older_python_is_read(tmp_path):
    save(tmp_path)
    described = read_metadata(tmp_path)
    with open(tmp_path / METADATA, "wb") as file:
        OldPickler(file, 4).dump(described)
    assert b"getattr" in (tmp_path / METADATA).read_bytes()
    assert read_metadata(tmp_path) == described


@pytest.mark.parametrize(
    "kind, name",
    [
        (_MEM_FORMAT_ENCODING, "__class__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (_MEM_FORMAT_ENCODING, ["TORCH_PRESERVE_FORMAT"]),
        (torch.Size, "numel"),
        (Metadata, "__init__"),
    ],
)
def test_no_other_attribute_is_looked_up(tmp_path, kind, name):
    planted = Metadata({}, planner_data=Calls(getattr, kind, name), storage_data={})
    (tmp_path / METADATA).write_bytes(pickle.dumps(planted))
    says = "names builtins.getattr of .*which no checkpoint needs|cannot be read"
    with pytest.raises(ValueError, match=says):
        read_metadata(tmp_path)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_an_entry_does_not_run(tmp_path, payload):
    mark = tmp_path / "mark"
    save(tmp_path / "x", {"entry": PAYLOADS[payload](mark)})
    assert not mark.exists()
    (sentence,) = unsafe_objects(tmp_path / "x", read_metadata(tmp_path / "x"))
    assert "the entry entry is not plain data, and was not loaded" in sentence
    with pytest.raises(CheckpointException, match="not plain data"):
        load(tmp_path / "x", {"entry": 0})
    assert not mark.exists()
    dcp.load({"entry": 0}, checkpoint_id=str(tmp_path / "x"), no_dist=True)
    assert mark.exists(), "a payload that runs nowhere proves nothing"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save(folder)
    return folder


@given(where=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_torn_description_is_an_error_in_words(whole, tmp_path_factory, where):
    folder = tmp_path_factory.mktemp("torn")
    data = (whole / METADATA).read_bytes()
    (folder / METADATA).write_bytes(data[: int(where * len(data))])
    with pytest.raises(ValueError, match=METADATA):
        read_metadata(folder)


@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_description_loads_or_is_an_error_in_words(whole, tmp_path_factory, where, byte):
    folder = tmp_path_factory.mktemp("changed")
    data = bytearray((whole / METADATA).read_bytes())
    data[int(where * len(data))] ^= byte
    (folder / METADATA).write_bytes(data)
    try:
        metadata = read_metadata(folder)
        torn_files(folder, metadata)
    except ValueError:
        pass


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", ".", "", "a/b", ".metadata"])
def test_files_outside_the_folder_are_refused(tmp_path, name):
    save(tmp_path)
    with open(tmp_path / METADATA, "rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.relative_path = name
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="want a plain name"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("thing", [3, "text", Metadata({}), Metadata({}, storage_data=[1])])
def test_what_is_no_description_is_an_error_in_words(tmp_path, thing):
    (tmp_path / METADATA).write_bytes(pickle.dumps(thing))
    with pytest.raises(ValueError, match="is no description"):
        read_metadata(tmp_path)


def test_files_that_end_too_early_are_named(tmp_path):
    save(tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    (sentence,) = torn_files(tmp_path, read_metadata(tmp_path))
    assert sentence.startswith(f"{file.name} has {size // 2:,} bytes, its .metadata wants")
    file.unlink()
    assert "cannot be read" in torn_files(tmp_path, read_metadata(tmp_path))[0]
