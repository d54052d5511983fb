"""Processes: one world of ranks for `python x.py` and torchrun alike, and how a run ends."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent  # of the repository


@dataclass(frozen=True)
class World:
    """This process among all of the run. A plain `python x.py` is a world of one."""

    rank: int
    size: int
    device: torch.device


def init(seed: int) -> World:
    """Start the process group: NCCL on CUDA, gloo on CPU, one process per device."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun does, so that both give the same numbers
    if not cuda and os.uname().sysname == "Linux":
        ctypes.CDLL(None).mallopt(-3, 2**23)  # M_MMAP_THRESHOLD: what is freed goes back, a fifth slower, half the peak
    if not dist.is_initialized():
        store = None if "RANK" in os.environ else dist.HashStore()  # a world of one needs no port
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
    torch.manual_seed(seed)
    return World(rank, size, device)


before_shutdown: list[Callable[[], None]] = []  # what must end while the process group still stands


def shutdown() -> None:
    """Leave the process group, so that torchrun ends without a warning."""
    if dist.is_initialized():
        dist.barrier()
    while before_shutdown:
        before_shutdown.pop()()
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(values: Tensor, world: World) -> Tensor:
    """The sum of a tensor over ranks, as a new tensor on the device (collective)."""
    total = values.detach().clone().to(world.device)
    dist.all_reduce(total)
    return total


def gather(values: list, world: World) -> list:
    """This rank's values, one per problem -> those of the step in the draw's order (collective)."""
    parts: list = [None] * world.size
    dist.all_gather_object(parts, values)
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]


class StopSignal:
    """Remembers Ctrl-C and SIGTERM, so that the loop can save and leave between two steps."""

    def __init__(self) -> None:
        self.seen = False
        for number in (signal.SIGTERM, signal.SIGINT):
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, lambda *_: setattr(self, "seen", True))

    def asked(self, world: World) -> bool:
        """Whether any rank was asked to stop (collective)."""
        return bool(all_sum(torch.tensor(float(self.seen)), world).item())


def print0(*args: object) -> None:
    """Print on rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, flush=True)


def fail(sentence: str) -> NoReturn:
    """End the run with one sentence that says what is wrong and where. Raises SystemExit."""
    raise SystemExit(f"error: {sentence}" if int(os.environ.get("RANK", 0)) == 0 else 1)


def first_line(error: BaseException) -> str:
    """An exception as one short line, for the end of a sentence."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
