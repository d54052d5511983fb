"""Processes: one world of ranks for `python x.py` and torchrun alike, and how a run ends."""

import atexit
import ctypes
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent  # of the repository
WAIT = timedelta(hours=4)  # in a collective: for rank 0, which checks the data, and for the slowest in rollouts
waiting = partial(tqdm, disable=None, leave=False, delay=2)  # a bar on a wait of over two seconds, on a terminal
PATIENCE = 600.0  # seconds without a new phase until rank 0 says in which all ranks are


class Waited(list):
    """What an update loops over."""

    def __iter__(self):
        return iter(waiting(super().__iter__(), total=len(self), desc="update"))


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
        if torch.cuda.get_device_capability(device) < (8, 0):
            fail(f"{torch.cuda.get_device_name(device)} is older than Ampere and lacks bf16, in which models compute")
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun does, so that both give the same numbers
    if not cuda and os.uname().sysname == "Linux":
        ctypes.CDLL(None).mallopt(-3, 24 * 2**20)  # M_MMAP_THRESHOLD: what is freed goes back; lower is slower
    if not dist.is_initialized():
        store = None if "RANK" in os.environ else dist.HashStore()  # a world of one needs no port
        place = {"rank": rank, "world_size": size, "device_id": device if cuda else None}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=WAIT, store=store, **place)
        if size > 1:
            ended = threading.Event()
            watcher = threading.Thread(target=watch, args=(rank, size, ended), daemon=True)
            watcher.start()
            atexit.register(lambda: (ended.set(), watcher.join(5)))  # Python aborts where a thread is in the store then
    torch.manual_seed(seed)
    sys.excepthook = explain
    return World(rank, size, device)


def watch(rank: int, size: int, ended: threading.Event) -> None:
    """In a thread: leave this rank's phase in the store; rank 0 tells all where none ends."""
    store, told = dist.distributed_c10d._get_default_store().clone(), time.perf_counter()
    try:
        while dist.is_initialized() and not ended.wait(PATIENCE / 20):
            (phase, since), now = doing, time.perf_counter()
            store.set(f"phase of rank {rank}", f"{phase} since {now - since:.0f} s")
            if rank == 0 and now - max(told, since) > PATIENCE:
                told, keys = now, [f"phase of rank {r}" for r in range(size)]
                known = [f"{key[9:]} in {store.get(key).decode()}" for key in keys if store.check([key])]
                print0(f"no new phase for {PATIENCE:.0f} s: {', '.join(known)}")
    except dist.DistError:
        pass  # the rank that keeps the store has ended, and says why


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


def exchange(parts: list, world: World) -> list:
    """parts[rank] goes to that rank -> what each has for this one, in their order (collective)."""
    if world.size == 1:
        return parts
    sent = [torch.frombuffer(bytearray(pickle.dumps(part)), dtype=torch.uint8) for part in parts]
    sizes = torch.tensor([len(part) for part in sent], device=world.device)
    dist.all_to_all_single(coming := torch.empty_like(sizes), sizes)
    found = torch.empty(int(coming.sum()), dtype=torch.uint8, device=world.device)
    dist.all_to_all_single(found, torch.cat(sent).to(world.device), coming.tolist(), sizes.tolist())
    return [pickle.loads(part.numpy()) for part in found.cpu().split(coming.tolist())]


def once(make: Callable[[], object], same: object = None) -> object:
    """What make returns on rank 0, on every rank: a verdict, for which a clock counts, can differ.
    It ends the run where the ranks do not give the same to begin with (collective).
    """
    found: list = [None] * int(os.environ.get("WORLD_SIZE", 1))
    if len(found) == 1:
        return make()
    dist.all_gather_object(found, same)
    if found.count(same) < len(found):
        fail(f"the ranks do not read the same data; give all of them the same files and flags ({found})")
    found = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    return found[0]


doing = ["loading", time.perf_counter()]  # what the run does, and since when: set by the log, told to who stops it


class StopSignal:
    """Remembers Ctrl-C and SIGTERM, so that the loop can save and leave between two steps; a second
    one ends at once.

    They are read in a thread: the main one may stand in a collective, where no handler runs.
    """

    def __init__(self) -> None:
        self.seen, (self.signals, self.kernel) = False, socket.socketpair()
        self.kernel.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            signal.set_wakeup_fd(self.kernel.fileno())
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a worker's signals are not ours
            threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """Say what a first signal waits for; end at another, a second or more later: torchrun hands
        on what Slurm sends to all.
        """
        while True:
            name, now = signal.Signals(self.signals.recv(1)[0]).name, time.perf_counter()
            if name in ("SIGTERM", "SIGINT") and not self.seen:
                self.seen, first = True, now
                since = f"{doing[0]} since {now - doing[1]:.0f} s"
                print0(f"{name}: saves and ends after this step, now in {since}; a second signal ends at once")
            elif name in ("SIGTERM", "SIGINT") and now - first > 1:
                print0(f"{name} again: ended at once; --resume goes on from the last checkpoint")
                os._exit(130)

    def asked(self, world: World) -> bool:
        """Whether any rank was asked to stop (collective)."""
        return bool(all_sum(torch.tensor(float(self.seen)), world).item())


def print0(*args: object) -> None:
    """Print on rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, flush=True)


def fail(sentence: str) -> NoReturn:
    """End the run with one sentence that says what is wrong and where. Raises SystemExit."""
    if rank := int(os.environ.get("RANK", 0)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)  # where rank 0 ends too, its sentence is enough, and torchrun ends this process
    raise SystemExit(f"error{f' on rank {rank}' if rank else ''}: {sentence}")


def explain(kind: type, error: BaseException, trace: object) -> None:
    """One sentence for a traceback where memory, disk, a package or another rank is missing."""
    said = first_line(error)
    if issubclass(kind, (torch.OutOfMemoryError, MemoryError)):
        update = "--tokens_per_microbatch, take --checkpoint_activations or --lora_rank,"
        said += f"; lower {update if doing[0] in ('update', 'sft') else '--sampler_memory'} or use more GPUs"
    elif any(s in str(error) for s in ("No space left", "Disk quota", "File too large", "inline_container")):
        said = "the disk takes no more (full, or a quota); make room, and --resume goes on from the last checkpoint"
    elif issubclass(kind, ModuleNotFoundError):
        said += f"; pip install {error.name}"
    elif isinstance(error, dist.DistError) or "gloo/transport" in str(error):
        said = "the connection to another rank is lost; that rank says why"
    elif not issubclass(kind, OSError):
        return sys.__excepthook__(kind, error, trace)
    fail(f"in {doing[0]}: {said}")


def first_line(error: BaseException) -> str:
    """An exception as one short line, for the end of a sentence."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
