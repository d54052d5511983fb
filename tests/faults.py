"""Faults at moments drawn from a seed: is a run that is resumed as one that nothing disturbed?

python tests/faults.py                           a hundred trials, most of an hour on two cores
python tests/faults.py --trials 1 --seed 17      trial 17 again: a seed gives all of a trial
python tests/faults.py --only nodes --trials 5   one fault; nodes and restart are drawn only so

A trial starts a method on the bundled model, does it harm, checks what is left, resumes it on some
number of ranks and compares metrics, samples and weights with an undisturbed run: bit for bit on
the same number of ranks, within 1e-5 on another. The exit code is 1 if a trial failed.
"""

import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
import warm
from conftest import ROOT, easy_problems, read_metrics
from safetensors.torch import load_file
from test_methods import FLAGS

METHODS = "grpo bread relift bridge uft sft luffy dapo prefix_rft iw_sft".split()
SMALL = "--model tiny --test_data= --steps 4 --problems_per_step 6 --save_every 2 --lr 2e-5".split()
GENTLE = {
    "relift": ["--sft_lr", "2e-5"],
    "bridge": ["--adapter_lr", "2e-5"],
    "sft": ["--lr", "2e-4"],
}  # sft.py's rate falls
LONG = ["--problems_per_step", "48", "--group_size", "16"]  # steps in which a second signal finds the run
MOMENTS = ["start", "rollouts", "update", "save", "export"]
FAULTS = ["kill_all", "kill_rank", "sigterm", "ctrl_c", "twice", "disk_full", "damaged"]
DAMAGES = {  # to the newest checkpoint
    "short .distcp": lambda folder: os.truncate(min(folder.glob("*.distcp")), 1000),
    "no .metadata": lambda folder: (folder / ".metadata").unlink(),
    "empty state.json": lambda folder: (folder / "state.json").write_text(""),
}
HUNG = "HUNG: killed by tests/faults.py"
ROUNDING = "sampler_ratio_max"  # of all tokens the one whose rounding is largest: not the same on other ranks
FALLS_BACK = "the checkpoint is set aside"  # of the sentence about a damaged one


@dataclass(frozen=True)
class Trial:
    """One run, one fault, one resume."""

    seed: int
    method: str
    ranks: int
    fault: str
    moment: str
    step: int  # in which the moment lies
    late: float  # where in the moment, 0 to 1
    choice: float  # which rank, which limit, which damage, 0 to 1
    resumed_on: int  # ranks

    def __str__(self) -> str:
        place = f"{self.moment} {self.step}" if self.moment in ("rollouts", "update", "save") else self.moment
        ranks = f"{self.ranks} -> {self.resumed_on} ranks"
        return f"{self.seed:>4}  {self.method:<10} {ranks:<13} {self.fault:<9} {place:<10} +{self.late:.2f}"


def draw(seed: int, only: str = "", method: str = "", most: int = 3) -> Trial:
    """The trial of a seed, on at most so many ranks. If none is given, faults take turns."""
    rng = random.Random(seed)
    fault = only or FAULTS[seed % len(FAULTS)]
    method = method or rng.choice([m for m in METHODS if fault != "twice" or "--group_size" in FLAGS[m]])
    ranks = rng.choice({"kill_rank": [2, 2, 3], "nodes": [2], "restart": [2]}.get(fault, [1, 1, 1, 2, 3]))
    moment = {"damaged": "export", "twice": "rollouts"}.get(fault) or rng.choices(MOMENTS, [1, 4, 4, 4, 2])[0]
    step = rng.choice([2, 4] if moment == "save" else [0, 1, 2, 3])
    late, choice, resumed_on = rng.random(), rng.random(), rng.choice([1, 2, 3, ranks])
    return Trial(seed, method, min(ranks, most), fault, moment, step, late, choice, min(resumed_on, most))


# Processes ----------------------------------------------------------------------------------------
def start(trial: Trial, ranks: int, *flags: object, torchrun: tuple | list = ()) -> subprocess.Popen:
    """A run in a process group of its own, as a terminal would start it."""
    launch = torchrun or (["--standalone", "--nproc_per_node", ranks] if ranks > 1 else [])
    command = [sys.executable, *(["-m", "torch.distributed.run", *launch] if launch else []), f"{trial.method}.py"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else an agent that joins later waits in vain (torch 2.13)
    popen = subprocess.Popen if launch else warm.Popen  # torchrun is what is tried
    return popen([str(part) for part in (*command, *flags)], cwd=ROOT, env=environment, **options)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = [int(n) for path in Path(f"/proc/{pid}/task").glob("*/children") for n in read(path).split()]
    return [pid, *(n for child in children for n in family(child))]


def read(path: Path) -> str:
    """A file's text; empty where there is none, or of a process that ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def ranks_of(pid: int) -> list[int]:
    """The processes that train: torchrun's children, or the process itself."""
    own = [child for child in family(pid)[1:] if f"\nPPid:\t{pid}\n" in read(Path(f"/proc/{child}/status"))]
    torchrun = "torch.distributed.run" in read(Path(f"/proc/{pid}/cmdline"))
    return own if torchrun else [pid]


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes of ours, of which some may have ended."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def end(process: subprocess.Popen, limit: float = 200) -> str:
    """What a run printed up to its end; one that hangs is killed, and says so."""
    try:
        return process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        kill(family(process.pid))
        return process.communicate()[0] + f"\n{HUNG}\n"


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that still run, three seconds from now at the latest."""
    for _ in range(30):
        left = [pid for pid in pids if re.search(r"State:\t[^ZX]", read(Path(f"/proc/{pid}/status")))]
        if not left:
            return []
        time.sleep(0.1)
    return left


# The moment ---------------------------------------------------------------------------------------
@dataclass
class Reference:
    """A run that nothing disturbed."""

    out: Path
    seconds_to_start: float
    lines: list[dict] = field(default_factory=list)  # of metrics.jsonl, with clocks


def lines_of(out: Path) -> int:
    """Steps that a run has ended."""
    return sum('"loss"' in line for line in read(out / "metrics.jsonl").splitlines())


def checkpoints(out: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit())


def wait_until(process: subprocess.Popen, come: object, limit: float = 120) -> None:
    """Look every few milliseconds; what ended, or never comes, is not waited for."""
    until = time.monotonic() + limit
    while not come() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.003)


def wait_for_moment(trial: Trial, process: subprocess.Popen, out: Path, reference: Reference) -> None:
    """Watch the run's folder until a phase begins, then wait for a part of what it took in the
    reference. Rollouts begin with the line of the step before, or where it saves, its checkpoint.
    """
    step, line = trial.step, reference.lines[min(trial.step, 3)]
    aside = out / f"checkpoints/{step:08d}.partial"
    if trial.moment == "start":
        time.sleep(trial.late * reference.seconds_to_start)
    elif trial.moment == "save":
        wait_until(process, lambda: aside.exists() or step in checkpoints(out))
        time.sleep(trial.late * 0.15)
    elif trial.moment == "export":
        wait_until(process, (out / "final").exists)
        time.sleep(trial.late * 0.15)
    else:
        saves = step and step % 2 == 0
        wait_until(process, lambda: (out / "config.json").exists())
        wait_until(process, lambda: lines_of(out) >= step and (not saves or step in checkpoints(out)))
        before = line.get("seconds_rollouts", 0.0) + line.get("seconds_rewards", 0.0) if trial.moment == "update" else 0
        time.sleep(before + trial.late * line.get(f"seconds_{trial.moment}", line["seconds_update"]))


# The fault ----------------------------------------------------------------------------------------
def harm(trial: Trial, process: subprocess.Popen, out: Path) -> None:
    """Do it."""
    ranks = ranks_of(process.pid)
    if trial.fault in ("kill_all", "damaged", "nodes"):
        kill(family(process.pid))
    elif trial.fault in ("kill_rank", "restart"):
        kill([ranks[int(trial.choice * len(ranks))]] if ranks else [])
    elif trial.fault == "disk_full":
        size = (out / "metrics.jsonl").stat().st_size if (out / "metrics.jsonl").exists() else 0
        limit = [100, size + 300, 30_000, 3_000_000][int(trial.choice * 4)]
        for pid in ranks if process.poll() is None else ():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
    else:
        number = signal.SIGINT if trial.fault == "ctrl_c" or trial.choice < 0.5 else signal.SIGTERM
        number = signal.SIGTERM if trial.fault == "sigterm" else number
        for _ in range(2 if trial.fault == "twice" else 1):
            if process.poll() is None:
                os.killpg(process.pid, number)
            time.sleep(1.3 if trial.fault == "twice" else 0)


# The verdict --------------------------------------------------------------------------------------
def differences(one: Path, two: Path, same_ranks: bool) -> list[str]:
    """How two ended runs differ: metrics, samples, weights."""
    found, limit = [], 0.0 if same_ranks else 1e-5
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        gaps = {k: abs(a[k] - b[k]) / max(1.0, abs(a[k])) for k in a if k in b and not (k == ROUNDING and limit)}
        found += [f"step {a['step']}: {k} by {gap:.1e}" for k, gap in gaps.items() if not gap <= limit]
        found += [f"step {a['step']}: {k} in one alone" for k in a.keys() ^ b.keys()]
    if same_ranks and read(one / "samples.jsonl") != read(two / "samples.jsonl"):
        found.append("samples")
    one, two = (load_file(folder / "final/model.safetensors") for folder in (one, two))
    found += [f"{k} by {gap:.1e}" for k in one if not (gap := float((one[k] - two[k]).abs().max())) <= limit]
    return found


def complaints(trial: Trial, process: subprocess.Popen, out: Path, printed: str) -> list[str]:
    """What is wrong with how the run ended, and with what it left."""
    found, steps, ended = [], checkpoints(out), process.returncode == 0
    done = (out / "metrics.jsonl").exists() and lines_of(out) == 4 and "the trained model is in" in printed
    asked = re.search(r"SIG\w+: saves and ends after this step", printed)
    if trial.fault in ("sigterm", "ctrl_c", "twice") and asked:
        if re.search(r'File "[^"]*/(core/\w+|common|' + trial.method + r')\.py"', printed):
            found.append("a traceback of ours")
        if "again: ended at once" in printed:
            found += [f"exit code {process.returncode}"] if trial.ranks == 1 and process.returncode != 130 else []
        elif not done and f"stopped at step {lines_of(out)};" not in printed:
            found.append("it did not stop after the step")
        elif max(steps, default=0) != lines_of(out):
            found.append(f"{lines_of(out)} steps, but the last checkpoint is of {steps}")
        elif trial.ranks == 1 and not ended:
            found.append(f"exit code {process.returncode}")
    elif trial.fault == "disk_full" and not done and ended:
        found.append("exit code 0 on a full disk")
    return found


def resume(trial: Trial, out: Path, flags: list) -> tuple[list[str], str]:
    """Resume the run to its end. (What is wrong, what was printed)."""
    steps = checkpoints(out)
    if trial.fault == "damaged":
        steps.remove(max(steps))
    begun = (out / "config.json").exists()
    process = start(trial, trial.resumed_on, *(["--resume", out] if begun else [*flags, "--out", out]))
    printed = end(process)
    found = [] if process.returncode == 0 else [f"resume: exit code {process.returncode}"]
    if begun and f"at step {max(steps, default=0)}" not in printed:
        found.append(f"it did not go on from checkpoint {max(steps, default=0)}")
    if trial.fault == "damaged" and len(re.findall(FALLS_BACK, printed)) != 1:
        found.append("no sentence about the damaged checkpoint")
    return found, printed


class Session:
    """A folder with the data and the references, each run once."""

    def __init__(self, folder: Path):
        self.folder, self.references, self.lock = folder, {}, threading.Lock()
        easy_problems(folder / "easy.jsonl")

    def flags(self, trial: Trial) -> list:
        """Of a trial's run, without --out."""
        own = [*FLAGS[trial.method], *GENTLE.get(trial.method, []), *(LONG if trial.fault == "twice" else [])]
        return [*SMALL, *own, "--data", self.folder / "easy.jsonl"]

    def reference(self, trial: Trial, ranks: int) -> Reference:
        """The run of a trial's flags, undisturbed, on some number of ranks."""
        key = (*map(str, self.flags(trial)), trial.method, ranks)
        with self.lock:
            if key not in self.references:
                out = self.folder / f"reference-{len(self.references)}"
                began, process = time.monotonic(), start(trial, ranks, *self.flags(trial), "--out", out)
                wait_until(process, lambda: lines_of(out))
                seconds = time.monotonic() - began
                printed = end(process)
                if process.returncode:
                    raise SystemExit(f"error: {trial.method} on {ranks} ranks does not run at all:\n{printed[-3000:]}")
                self.references[key] = Reference(out, seconds, read_metrics(out, clocks=True))
        return self.references[key]

    def run(self, trial: Trial) -> list[str]:
        """What went wrong in a trial; empty where all is as it should be."""
        out, flags = self.folder / f"trial-{trial.seed}", self.flags(trial)
        reference = self.reference(trial, trial.ranks)
        if trial.fault in ("nodes", "restart"):
            found, printed = self.elastic(trial, out, reference)
        else:
            process = start(trial, trial.ranks, *flags, "--out", out)
            wait_for_moment(trial, process, out, reference)
            everyone = family(process.pid)
            harm(trial, process, out)
            printed = end(process)
            found = complaints(trial, process, out, printed)
            found += ["it hung"] if HUNG in printed else []
            found += [f"processes {left} live on"] if (left := alive(everyone)) else []
            if trial.fault == "damaged":
                list(DAMAGES.values())[int(trial.choice * 3)](out / f"checkpoints/{max(checkpoints(out)):08d}")
            more, again = resume(trial, out, flags)
            found, printed = found + more, f"{printed}\n--- resumed ---\n{again}"
        if (out / "final/model.safetensors").exists():
            same = trial.fault in ("nodes", "restart") or trial.resumed_on == trial.ranks
            found += differences(reference.out, out, same)
        else:
            found.append("no model")
        (self.folder / f"trial-{trial.seed}.log").write_text(printed)
        if not found:
            shutil.rmtree(out)
        return found

    def elastic(self, trial: Trial, out: Path, reference: Reference) -> tuple[list[str], str]:
        """Two ranks that torchrun starts again, the same command: of two agents the one that
        does not hold the rendezvous is killed and started anew, or of one agent's ranks one is
        killed. (What is wrong, what was printed).
        """
        flags = [*self.flags(trial), "--out", out, "--resume", out]
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        together = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", trial.seed]
        nodes = ["--nnodes", 2, "--nproc_per_node", 1, "--max_restarts", 3, *together]
        alone = ["--standalone", "--nproc_per_node", 2, "--max_restarts", 3]
        launches = (
            [[*nodes, "--rdzv_conf", f"is_host={host}"] for host in (1, 0)] if trial.fault == "nodes" else [alone]
        )
        agents = [start(trial, 2, *flags, torchrun=launch) for launch in launches]
        wait_for_moment(trial, agents[-1], out, reference)
        harm(trial, agents[-1], out)
        before = ""
        if trial.fault == "nodes":
            before = end(agents[-1])
            agents[-1] = start(trial, 2, *flags, torchrun=launches[-1])
        printed = [before, *map(end, agents)]
        found = [f"exit code {agent.returncode}" for agent in agents if agent.returncode]
        return found, "\n--- the other node ---\n".join(printed)


@dataclass
class Options:
    """What to try."""

    trials: int = 100
    seed: int = 0  # of the first trial; the next has the next
    only: str = ""  # one fault
    method: str = ""  # one method
    most: int = 3  # ranks
    jobs: int = 1  # trials at a time
    keep: bool = False  # the folder with all runs


def main(options: Options) -> int:
    """Try, print a line a trial and one at the end. The number of trials that failed."""
    torch.set_num_threads(1)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="faults-"))
    session, drawn = Session(folder), {"only": options.only, "method": options.method, "most": options.most}
    same = "".join(f" --{name} {value}" for name, value in drawn.items() if value)

    def attempt(number: int) -> bool:
        trial, since = draw(number, **drawn), time.monotonic()
        found = session.run(trial)
        verdict = f"FAILED: {'; '.join(found[:4])}" if found else "ok"
        print(f"{trial}  {verdict}  ({time.monotonic() - since:.0f} s)", flush=True)
        if found:
            again = f"python tests/faults.py --trials 1 --seed {number}{same}"
            print(f"      {folder}/trial-{number}.log; again: {again}", flush=True)
        return bool(found)

    with ThreadPoolExecutor(options.jobs) as pool:
        failed = sum(pool.map(attempt, range(options.seed, options.seed + options.trials)))
    minutes = (time.monotonic() - began) / 60
    print(f"{options.trials} trials, {options.trials - failed} survived, {failed} failed, {minutes:.1f} minutes")
    if not failed and not options.keep:
        shutil.rmtree(folder)
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(tyro.cli(Options, description=__doc__)) else 0)
