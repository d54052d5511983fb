"""What a run leaves: its folder, one line a step, checkpoints that survive a kill, the model."""

import hashlib
import importlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as sharded
import transformers
from torch import Tensor, nn

from core.config import beside, flat, resolve_model
from core.model import Policy, Tokenizer, load_config, named_weights
from core.processes import ROOT, World, fail, print0, shutdown
from core.sampler import stop_ids

Weights = Iterable[tuple[str, Tensor]]  # (name, whole tensor)
State = dict[str, nn.Module | tuple[nn.Module, torch.optim.Optimizer]]  # what a checkpoint holds


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# The log ------------------------------------------------------------------------------------------
class RunLog:
    """One line a step on the terminal, in metrics.jsonl, in wandb; rollouts in samples.jsonl."""

    def __init__(self, cfg: object, script: str, world: World):
        self.cfg, self.world, self.wandb = cfg, world, None
        self.totals: dict[str, Tensor | float] = {}
        self.values: dict[str, float] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.open_phase, self.samples = ("", 0.0), []
        self.out = open_folder(cfg, script, world)
        if world.rank == 0 and cfg.run.wandb:
            wandb = importlib.import_module("wandb")  # the one optional package
            self.wandb = wandb.init(project="sft-rl", name=self.out.name, config=flat(cfg))
        print0(f"run {self.out} on {world.size} x {world.device.type}")

    def phase(self, name: str) -> None:
        """Start a phase of the step, timed as seconds_<name>; an empty name only ends the last."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        (opened, since), now = self.open_phase, time.perf_counter()
        if opened:
            self.seconds[opened] += now - since
        self.open_phase = (name, now)

    def set(self, **values: Tensor | float) -> None:
        """Values of the step that are the same on every rank."""
        self.values |= {name: float(value) for name, value in values.items()}

    def add(self, **terms: Tensor | float) -> None:
        """Add to the totals of the step, which are reduced over ranks."""
        combine(self.totals, {k: v.detach() if isinstance(v, Tensor) else v for k, v in terms.items()})

    def add_mean(self, name: str, values: list[float]) -> None:
        """Add to a mean over all values of step and ranks; without any it is not in the line."""
        self.add(**{f"{name}/sum": float(sum(values)), f"{name}/count": len(values)})

    def step(self, step: int) -> None:
        """Reduce over ranks, print, write to the files, and start anew (collective)."""
        self.phase("")
        totals = self.reduced()
        counts = {name.removesuffix("/count"): n for name, n in totals.items() if name.endswith("/count")}
        line = {"step": step, "loss": 0.0}  # no loss was added when every group was left out
        line |= {name: value for name, value in totals.items() if "/" not in name} | self.values
        line |= {name: totals[f"{name}/sum"] / n for name, n in counts.items() if n}
        line |= {f"seconds_{phase}": round(seconds, 4) for phase, seconds in self.seconds.items()}
        for phase in ("update", "rollouts"):
            if self.seconds.get(phase):
                tokens = line.get({"update": "trained_tokens", "rollouts": "sampled_tokens"}[phase], 0.0)
                line[f"tokens_per_second_{phase}"] = round(tokens / self.seconds[phase], 1)
        line["peak_memory_mb"] = round(peak_memory_mb(self.world.device))
        self.append("metrics.jsonl", [line])
        self.append("samples.jsonl", [{"step": step, **sample} for sample in self.samples])
        if self.wandb:
            self.wandb.log(line, step=step)
        print0(describe_line(line, self.cfg.steps))
        for part in (self.totals, self.values, self.seconds, self.samples):
            part.clear()

    def reduced(self) -> dict[str, float]:
        """The totals over all ranks (collective)."""
        parts: list = [None] * self.world.size
        dist.all_gather_object(parts, {name: float(value) for name, value in self.totals.items()})
        total: dict[str, float] = {}
        for part in parts:
            combine(total, part)
        return total

    def append(self, file: str, lines: list[dict]) -> None:
        """Append JSON lines to a file of the run's folder, on rank 0."""
        if self.world.rank == 0:
            with open(self.out / file, "a") as out:
                out.write("".join(json.dumps(line) + "\n" for line in lines))

    def last(self, step: int) -> None:
        """The line of a finished run: what the final policy was measured at."""
        self.append("metrics.jsonl", [{"step": step, **self.values}])
        values = "".join(f" | {name.replace('_', ' ')} {value:.3f}" for name, value in self.values.items())
        print0(f"step {step:>4}/{self.cfg.steps} | done{values}")

    def rewind(self, step: int) -> None:
        """Forget what a killed run wrote after its last checkpoint; these steps are run again."""
        for name in ("metrics.jsonl", "samples.jsonl") if self.world.rank == 0 else ():
            path = self.out / name
            if path.exists():
                whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                write_atomic(path, "".join(line for line in whole if json.loads(line)["step"] < step))


def combine(totals: dict, terms: dict) -> None:
    """Add terms to totals of the same names; of a name that ends in _max keep the largest."""
    for name, term in terms.items():
        if name in totals:
            term = max(totals[name], term) if name.endswith("_max") else totals[name] + term
        totals[name] = term


def describe_line(line: dict[str, float], steps: int) -> str:
    """step 12/500 | reward 0.412 | ..., at fixed widths; the README explains it in this order."""
    shown = [f"step {line['step']:>4}/{steps}"]
    if "groups_mixed" in line:
        shares = (f"{name} {line[f'groups_{name}']:.2f}" for name in ("mixed", "solved", "failed"))
        shown.append(f"reward {line['reward']:.3f} | {' '.join(shares)}")
    if "guided_reward" in line:
        shown.append(f"guided {line['guided_reward']:.3f}")
    cut = f" cut {line['truncated']:.2f}" if "truncated" in line else ""
    if "completion_tokens" in line:
        shown.append(f"len {line['completion_tokens']:6.1f}{cut}")
    entropy = f"entropy {line['entropy']:.3f}" if "entropy" in line else "no row to train on"
    shown.append(f"loss {line['loss']:+.4f} {entropy} grad {line['grad_norm']:.3f}")
    seconds = {k.removeprefix("seconds_"): v for k, v in line.items() if k.startswith("seconds_") and v >= 0.05}
    shown.append(" ".join([*(f"{k} {v:.1f}s" for k, v in seconds.items()), f"{line['peak_memory_mb']} MB"]))
    if "test_accuracy" in line:
        shown.append(f"test accuracy {line['test_accuracy']:.3f}")
    return " | ".join(shown)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of the device, or on a CPU the resident peak of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# The folder ---------------------------------------------------------------------------------------
def open_folder(cfg: object, script: str, world: World) -> Path:
    """The run's folder, with config.json and a copy of all that runs; no old run is overwritten."""
    name = f"{Path(script).stem}-{Path(cfg.run.model).name}-{time.strftime('%m%d-%H%M%S')}"
    chosen = [cfg.run.out or str(Path("runs") / name)]
    dist.broadcast_object_list(chosen, 0)  # all ranks agree on the time in the name
    out = Path(chosen[0])
    if not cfg.run.resume and (out / "metrics.jsonl").exists():
        fail(f"--out {out} already holds a run; continue it with --resume {out} or choose another folder")
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not cfg.run.resume:
            own = [Path(cfg.run.reward.rpartition(":")[0])] if ":" in cfg.run.reward else []
            for source in {Path(script).resolve(), ROOT / "common.py", *own}:
                shutil.copy(source, out / source.name)
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "core", out / "core", ignore=ignored, dirs_exist_ok=True)
            write_atomic(out / "config.json", json.dumps(describe_run(cfg), indent=1))
    return out


def describe_run(cfg: object) -> dict:
    """What is needed to make a run again: flags, command, commit, versions, hardware, data hash."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    files, cuda = [Path(name) for name in cfg.run.data.split(",")], torch.cuda.is_available()
    return {
        "flags": flat(cfg),
        "argv": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)}
        | {"python": platform.python_version()},
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "data_sha256": [hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else None for f in files],
    }


# Checkpoints --------------------------------------------------------------------------------------
def collect(state: State) -> dict[str, dict]:
    """The sharded tensors of a state, under names that do not depend on the number of ranks."""
    return {
        name: sharded.get_optimizer_state_dict(*e) if isinstance(e, tuple) else sharded.get_model_state_dict(e)
        for name, e in state.items()
    }


def complete_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("*") if f.suffix != ".partial")


def save(log: RunLog, step: int, state: State, **extra: object) -> None:
    """Write checkpoints/<step>, aside and renamed when complete; keep the last few (collective).

    step is the next step to run; extra is the method's own state, as JSON.
    """
    folder = log.out / "checkpoints" / f"{step:08d}"
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists():
        return
    if log.world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    stepped = {name: entry for name, entry in state.items() if not isinstance(entry, tuple) or entry[1].state}
    dcp.save(collect(stepped), checkpoint_id=partial)  # torch would step an optimizer that has no state yet
    dist.barrier()
    if log.world.rank == 0:
        (partial / "state.json").write_text(json.dumps({"step": step, **extra}))
        os.replace(partial, folder)
        for old in complete_checkpoints(log.out)[: -log.cfg.run.keep]:
            shutil.rmtree(old)
    dist.barrier()


def resume(log: RunLog, state: State) -> tuple[int, dict]:
    """Load the newest complete checkpoint, on any number of ranks. (next step, the method's state).

    Without a checkpoint (a new run, or one killed before its first) the run starts at step 0.
    """
    found = complete_checkpoints(log.out) if log.cfg.run.resume else []
    extra = {"step": 0}
    if found:
        saved = {key.partition(".")[0] for key in dcp.FileSystemReader(found[-1]).read_metadata().state_dict_metadata}
        stepped = {name: entry for name, entry in state.items() if name in saved}
        loaded = collect(stepped)
        dcp.load(loaded, checkpoint_id=found[-1])
        for name, entry in stepped.items():
            if isinstance(entry, tuple):
                sharded.set_optimizer_state_dict(*entry, optim_state_dict=loaded[name])
            else:
                sharded.set_model_state_dict(entry, loaded[name])
        extra = json.loads((found[-1] / "state.json").read_text())
    if log.cfg.run.resume:
        print0(f"resuming {log.out} at step {extra['step']}{'' if found else ' (it has no checkpoint yet)'}")
        log.rewind(extra["step"])
        dist.barrier()
    return extra["step"], extra


# The end ------------------------------------------------------------------------------------------
def finish(log: RunLog, step: int, policy: Policy, tokenizer: Tokenizer, weights: Weights | None = None) -> None:
    """End a run: the last line and the exported model, or how to go on after a signal (collective).

    weights are what is exported where it is not the policy as it is.
    """
    if step == log.cfg.steps:
        log.last(step)
        export(log, policy, tokenizer, weights or named_weights(policy))
    else:
        print0(f"stopped at step {step}; continue with --resume {log.out}")
    shutdown()


def export(log: RunLog, policy: Policy, tokenizer: Tokenizer, weights: Weights) -> None:
    """The model as a Hugging Face folder at final/, in its source's dtype (collective)."""
    run, final, model = log.cfg.run, log.out / "final", policy.model
    dtype = load_config(run).dtype or torch.float32
    weights = {name: tensor.to("cpu", dtype, copy=True) for name, tensor in weights}
    if log.world.rank == 0:
        generation, model.generation_config = model.generation_config, transformers.GenerationConfig()
        ends = stop_ids(tokenizer, generation)
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        model.save_pretrained(final, state_dict=weights)
        model.config.dtype = dtype  # it took that of the masters
        model.config.save_pretrained(final)
        generation.to_json_file(final / "generation_config.json")  # save_pretrained refuses some that are published
        tokenizer.save_pretrained(final)
        path = Path(resolve_model(run.model)) / "settings.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        asked = {name: getattr(run, name) for name in ("template", "template_args", "system", "request")}
        settings |= {name: value for name, value in asked.items() if value not in ("auto", None)}
        for section in (settings, *(value for value in settings.values() if isinstance(value, dict))):
            section |= {k: beside(path, section[k]) for k in ("data", "test_data", "reward") if k in section}
        if run.reward:
            settings |= {"reward": f"../{Path(run.reward).name}", "solved": run.solved}  # the copy beside config.json
        (final / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")  # asks as this run did
        for file in final.glob("*.safetensors"):
            file.chmod(0o644)  # they are written 0600
    dist.barrier()
    print0(f"the trained model is in {log.out / 'final'}")
