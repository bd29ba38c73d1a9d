"""Two ranks choose the same checkpoint, whichever of them sees the damage."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_runs import flip
from shards import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from reflux.trainer.engine.checkpoint_search import Wanted, find
from reflux.trainer.engine.manifest import Manifest, data_files, digest_and_sync, write_manifest
from reflux.trainer.engine.ranks import Peers


def save_two(home: Path) -> None:
    """Two checkpoints of a tensor in two shards, a file of each rank."""
    mesh = init_device_mesh("cpu", (2,))
    for step in (1, 2):
        weight = distribute_tensor(torch.arange(1000.0) * step, mesh, [Shard(0)])
        folder = home / f"step-{step}"
        dcp.save({"weight": weight, "train_state": {"step": step}}, checkpoint_id=folder)
        if dist.get_rank() == 0:
            files = {name: digest_and_sync(folder / name) for name in data_files(folder)}
            write_manifest(folder, Manifest(step, files))
        dist.barrier()


DAMAGE = ("", "__0_0.distcp", "__1_0.distcp", ".metadata")


def choose(home: Path) -> dict[str, dict]:
    """What this rank finds, by which file of the newer checkpoint is damaged."""
    found = {}
    for damaged in DAMAGE:
        folder = home / (damaged or "none")
        save_two(folder)
        if dist.get_rank() == 0 and damaged:
            flip(folder / "step-2" / damaged, 0.9)
        dist.barrier()
        found[damaged] = asdict(find(folder, Wanted(total_steps=5), Peers()))
    return found


def test_all_ranks_choose_the_same(tmp_path):
    one, two = run_on_ranks(choose, tmp_path)
    assert one == two
    for damaged, found in one.items():
        assert found["step"] == (1 if damaged else 2)
        assert found["aside"] == ({2: "damaged"} if damaged else {})
        assert not damaged or damaged in found["messages"][0]


class Unportable(Exception):
    """A user's error that pickle cannot make again."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


ERRORS = {  # of rank 1 -> what rank 0 raises
    "OSError 28": (OSError(28, "No space left"), "OSError 28 [Errno 28] rank 1: No space left"),
    "ValueError": (ValueError("bad"), "ValueError None rank 1: bad"),
    "KeyError": (KeyError("x"), "RuntimeError None rank 1: 'x'"),
    "Unportable": (Unportable("a", "b"), "RuntimeError None rank 1: a b"),
}


def raised() -> dict[str, str]:
    """What this rank raises where rank 1 fails, and which files are its share."""
    words = {}
    for name, (error, _) in ERRORS.items():

        def work(error: Exception = error) -> int:
            if dist.get_rank() == 1:
                raise error
            return 1

        with pytest.raises(Exception) as caught:
            Peers().from_all(work)
        number = getattr(caught.value, "errno", None)
        words[name] = f"{type(caught.value).__name__} {number} {caught.value}"
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "__7_0.distcp"]
    return words | {"share": " ".join(Peers().share(files))}


def test_an_error_of_one_rank_is_the_others_too_without_a_hang():
    first, second = run_on_ranks(raised)
    for name, (error, other) in ERRORS.items():
        assert first[name] == other and second[name].startswith(type(error).__name__)
    shares = (first["share"] + " " + second["share"]).split()
    assert sorted(shares) == [".metadata", "__0_0.distcp", "__1_0.distcp", "__7_0.distcp"]
    assert "__0_0.distcp" in first["share"] and "__1_0.distcp" in second["share"]
