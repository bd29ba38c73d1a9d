"""Several ranks for a test: gloo processes on this machine, one per slice of a vocabulary or of a
batch.
"""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable

import pytest
import torch

TIMEOUT_S = 600  # a collective that one rank never enters would wait for ever


def run_on_ranks(fn: Callable, *args, ranks: int = 2) -> list:
    """[fn(*args) of rank 0, of rank 1, ...], each in a process of its own with the default group
    initialised.

    fn is a function of a test module, args and results are what pickle takes; inside,
    dist.get_rank() gives the rank. If one fails, the tracebacks of all that failed are the
    message. Ranks are processes without a GPU: where there is one, the test is skipped; it runs
    there under CUDA_VISIBLE_DEVICES= (empty).
    """
    if torch.cuda.is_available():
        pytest.skip("ranks are CPU processes: run it with an empty CUDA_VISIBLE_DEVICES")
    context = multiprocessing.get_context("forkserver")
    # once, not per rank
    context.set_forkserver_preload(
        ["pytest", "hypothesis", "torch._dynamo", "torch.distributed.fsdp"]
    )
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank,
                args=(theirs, folder, rank, ranks, fn, pickle.dumps(args)),
                daemon=True,
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            answers = [_answer(pipe) for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    failed = [f"rank {rank}: {value}" for rank, (ok, value) in enumerate(answers) if not ok]
    assert not failed, "\n".join(failed)
    return [value for _, value in answers]


def _answer(pipe) -> tuple:
    return (
        pickle.loads(pipe.recv_bytes())
        if pipe.poll(TIMEOUT_S)
        else (False, f"no answer in {TIMEOUT_S} s")
    )


def _rank(pipe, folder: str, rank: int, ranks: int, fn: Callable, args: bytes) -> None:
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks
        )
        answer = True, fn(*pickle.loads(args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answer = False, traceback.format_exc()
    # plain pickle: torch's own would hand over memory that dies with this process
    pipe.send_bytes(pickle.dumps(answer))
