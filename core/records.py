"""What a run leaves: its folder, one line a step, checkpoints that survive a kill, the model."""

import fcntl
import hashlib
import importlib
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as sharded
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from core.config import RunConfig, flat, read_json, read_settings, resolve_model
from core.model import Policy, Tokenizer, broken_weight, frozen_bits, load_config, lora_weights, named_weights
from core.processes import ROOT, World, doing, fail, first_line, gather, once, print0, shutdown
from core.sampler import stop_ids

SIGNS = (  # of a collapse: (value, its healthy range, what it means)
    ("entropy", 0.01, math.inf, "the policy writes nearly the same whatever is sampled"),
    ("groups_mixed", 0.05, math.inf, "nearly all groups have equal rewards, from which nothing is learned"),
    ("truncated", 0.0, 0.8, "most completions do not end before the length limit"),
    ("sampler_ratio_off", 0.0, 0.1, "the sampler has other probabilities than the trainer"),
)
SHOWN = 16  # rows of each update, the first ones, that samples.jsonl has token by token
LINE = (  # on the terminal: key of metrics.jsonl, and its name there; first what a person steers by
    {"reward": "reward", "test_accuracy": "test"},
    {"kl": "kl", "clip_fraction": "clip", "entropy": "entropy", "completion_tokens": "len", "truncated": "cut"},
    {"groups_mixed": "mixed", "groups_failed": "failed", "guided_reward": "guided"},
    {"loss": "loss", "grad_norm": "grad"},
)
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
        self.totals: list[tuple[str, Tensor | float]] = []
        self.values: dict[str, float] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.open_phase, self.samples, self.shown = ("", 0.0), [], []  # rollouts; what describe_row takes of others
        self.next_step, self.skipped, self.skip = 0, 0, False  # skip: the update at hand is left out
        self.terms: list[tuple] = []  # of the update at hand: (name, value, the rows of the micro-batch)
        self.recent: list[dict] = []  # the lines of at most five steps
        self.own, self.spent = {}, []  # what loss_fn returns; seconds of each step so far
        self.out = open_folder(cfg, script, world)
        if world.rank == 0 and cfg.run.wandb_project:  # the one optional package; a resumed run is the same there
            named = {"name": self.out.name, "id": hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:16]}
            self.wandb = importlib.import_module("wandb").init(
                project=cfg.run.wandb_project, **named, resume="allow", config=flat(cfg)
            )
        print0(f"run {self.out} on {world.size} x {world.device.type}")

    def phase(self, name: str) -> None:
        """Start a phase of the step, timed as seconds_<name>; an empty name only ends the last."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        (opened, since), now = self.open_phase, time.perf_counter()
        if opened:
            self.seconds[opened] += now - since
        self.open_phase = (name, now)
        doing[:] = name or "the step's end", now

    def set(self, **values: Tensor | float) -> None:
        """Values of the step that are the same on every rank; what ends in grad_norm is checked."""
        self.values |= {name: float(value) for name, value in values.items()}
        for name in (name for name in values if name.endswith("grad_norm") and not self.skip):
            self.check_update(name, self.values[name])

    def add(self, rows: list | tuple = (), **terms: Tensor | float) -> None:
        """Add to the totals of the step, which are reduced over ranks; rows: a micro-batch's.

        Tensors are read when the update or the step ends; nobody waits for the device before.
        """
        terms = {k: v.detach() if isinstance(v, Tensor) else v for k, v in terms.items()}
        self.totals += terms.items()
        if rows:
            ids, self.skip = "rows " + ", ".join(row.problem.id for row in rows[:8]), False
            self.terms += [(k, v, ids) for k, v in terms.items() if k != "trained_tokens"]
            self.own |= dict.fromkeys(terms)
            self.shown += [(row, *row.seen) for row in rows if row.seen]

    def check_update(self, norm_name: str, norm: float) -> None:
        """End the run before an update that is not finite, or leave it out (collective)."""
        names, values, ids = zip(*self.terms, strict=True) if self.terms else ((), (), ())
        terms = zip(names, read(values), ids, strict=True)
        mine = [(not math.isfinite(v), abs(v), f"{k} {v:.3g} on rank {self.world.rank} of {i}") for k, v, i in terms]
        bad, _, largest = max(gather([max(mine, default=(False, 0.0, "not known"))], self.world))
        if math.isfinite(norm) and not bad:
            return
        self.skipped, self.skip, most = self.skipped + 1, True, self.cfg.run.skip_nonfinite
        said = f"step {self.next_step}: {norm_name} {norm:.3g}, largest term {largest}; the update was not made"
        if self.skipped > most:
            fail(f"{said} and nothing saved: lower --lr, or leave such updates out with --skip_nonfinite {most + 1}")
        print0(f"{said} ({self.skipped} of --skip_nonfinite {most})")

    def before_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Without gradients AdamW moves neither weights nor moments. A hook of every optimizer."""
        self.terms.clear()
        if self.skip:
            optimizer.zero_grad()

    def add_mean(self, name: str, values: list[float] | Tensor, mask: Tensor | None = None) -> None:
        """Add to a mean over values (in a mask) of step and ranks; not in the line without any."""
        total, count = (sum(values), len(values)) if mask is None else (values.where(mask, 0).sum(), mask.sum())
        self.add(**{f"{name}/sum": total, f"{name}/count": count})

    def step(self, step: int) -> None:
        """Reduce over ranks, print, write to the files, and start anew (collective)."""
        self.phase("")
        mine = combine(zip([k for k, _ in self.totals], read([v for _, v in self.totals]), strict=True))
        totals = combine(term for part in gather([mine], self.world) for term in part.items())
        counts = {name.removesuffix("/count"): n for name, n in totals.items() if name.endswith("/count")}
        line = {"step": step, "loss": 0.0}  # no loss was added when every group was left out
        line |= {name: value for name, value in totals.items() if "/" not in name} | self.values
        line |= {name: totals[f"{name}/sum"] / n for name, n in counts.items() if n}
        line |= {"skipped_nonfinite": self.skipped} if self.skipped else {}
        line |= {f"seconds_{phase}": round(seconds, 4) for phase, seconds in self.seconds.items()}
        for phase, tokens in (("update", "trained_tokens"), ("rollouts", "sampled_tokens")):
            if self.seconds.get(phase):
                line[f"tokens_per_second_{phase}"] = round(line.get(tokens, 0.0) / self.seconds[phase], 1)
        line["peak_memory_mb"] = round(peak_memory_mb(self.world.device))
        self.append("metrics.jsonl", [line])
        shown = gather([describe_row(*found) for found in self.shown], self.world)
        self.append("samples.jsonl", [{"step": step, **row} for row in [*map(describe_row, self.samples), *shown]])
        if self.wandb:
            self.wandb.log(line, step=step)
        self.spent.append(sum(self.seconds.values()))
        left = sum(self.spent) / len(self.spent) * (self.cfg.steps - step - 1)
        print0(describe_line(line, self.cfg.steps, self.own, left))
        self.warn(line)
        self.next_step = step + 1
        for part in (self.totals, self.values, self.seconds, self.samples, self.shown, self.terms):
            part.clear()

    def warn(self, line: dict[str, float]) -> None:
        """Every five steps, say what their mean has of the signs of a collapse."""
        self.recent.append(line)
        for name, low, high, meaning in SIGNS if len(self.recent) == 5 else ():
            values = [line[name] for line in self.recent if name in line]
            if values and not low <= sum(values) / len(values) <= high:
                print0(f"steps up to {line['step']}: {meaning} ({name} {sum(values) / len(values):.3f})")
        self.recent = self.recent[len(self.recent) // 5 * 5 :]

    def append(self, file: str, lines: list[dict]) -> None:
        """Append JSON lines to a file of the run's folder, on rank 0."""
        if self.world.rank == 0:
            with open(self.out / file, "a") as out:
                out.write("".join(json.dumps(line) + "\n" for line in lines))

    def rewind(self, step: int) -> None:
        """Forget what a killed run wrote after its last checkpoint; these steps are run again."""
        paths = [self.out / name for name in ("metrics.jsonl", "samples.jsonl")] if self.world.rank == 0 else []
        for path in filter(Path.exists, paths):
            *lines, cut = path.read_bytes().split(b"\n")
            if cut:
                print0(f"{path}: the last line, which a kill cut short, is dropped")
            kept = [line for n, line in enumerate(lines, 1) if read_json(line, f"{path}:{n}", "step")["step"] < step]
            write_atomic(path, b"".join(line + b"\n" for line in kept).decode())


def read(values: Sequence[Tensor | float]) -> list[float]:
    """Numbers and scalars of the device, which come in one transfer."""
    found = [value for value in values if isinstance(value, Tensor)]
    known = iter(torch.stack([v.to(found[0].device, torch.float64) for v in found]).tolist() if found else [])
    return [next(known) if isinstance(value, Tensor) else float(value) for value in values]


def combine(terms: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The sum of the terms of each name; of a name that ends in _max the largest."""
    totals: dict[str, float] = {}
    for name, term in terms:
        if name in totals:
            term = max(totals[name], term) if name.endswith("_max") else totals[name] + term
        totals[name] = term
    return totals


def describe_row(row, number: int | None = None, values: Tensor | None = None) -> dict:
    """A line of samples.jsonl. values, (3, T): each token's log-probability and entropy in an
    update, and the gradient of the loss by the former. Lists are texts: half as long.
    """
    found = {"id": row.problem.id, "problem": row.problem.text, "completion": row.text, "reward": row.reward}
    found |= {"expert_tokens": row.num_expert_tokens, "tokens": len(row.completion_ids), "advantage": row.advantage}
    if number is None:
        return found
    lists = {"ids": row.completion_ids, "sampler_logprobs": row.sampler_logprobs}
    lists |= zip(("logprobs", "entropy", "gradient"), values.tolist(), strict=True)
    lists |= {"old_logprobs": [] if row.old_logprobs is None else row.old_logprobs.tolist()}
    texts = {k: " ".join(f"{x:.2g}" if k == "gradient" else f"{round(x, 3):.7g}" for x in v) for k, v in lists.items()}
    return found | texts | {"row": number, "prefix_advantage": row.prefix_advantage}


def describe_line(line: dict[str, float], steps: int, own: Iterable[str], left: float) -> str:
    """step 12/500 | reward 0.412 test 0.38 | ...: LINE, what loss_fn returns beside that, trained
    tokens a second, time left, where the time went. The README explains it in this order.
    """
    known = {name for part in LINE for name in part} | {"trained_tokens"}
    parts = [*LINE, {name: name for name in own if name not in known}]
    shown = [" ".join(f"{name} {line[key] + 0:.4g}" for key, name in part.items() if key in line) for part in parts]
    seconds = {k.removeprefix("seconds_"): v for k, v in line.items() if k.startswith("seconds_") and v >= 0.05}
    rate = line.get("trained_tokens", 0) / max(sum(v for k, v in seconds.items() if k != "evaluation"), 0.05)
    shown += [f"{rate:.0f} tokens/s {timedelta(seconds=round(left))} left" if rate else "no row to train on"]
    shown += [" ".join([*(f"{k} {v:.1f}s" for k, v in seconds.items()), f"{line['peak_memory_mb']} MB"])]
    return " | ".join([f"step {line['step']:>4}/{steps}", *filter(None, shown)])


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of the device, or on a CPU the resident peak of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# The folder ---------------------------------------------------------------------------------------
def agree(cfg, train: list, test: list) -> tuple[list, list]:
    """The problems of a run, which takes their hash; it ends where another rank has others, or the
    run that is resumed had (collective).
    """
    digest, run = hashlib.sha256(), cfg.run
    for p in [*train, *test]:
        digest.update(repr((p.id, p.prompt_ids, p.answer, p.expert_ids)).encode())
    found = once(digest.hexdigest, digest.hexdigest())
    if run.data_hash not in ("", found):
        fail(f"--resume {run.resume} began with other problems than --data {run.data} and --test_data now give")
    cfg.run = replace(run, data_hash=found)
    return train, test


def take_lock(out: Path) -> str:
    """Make a run's folder and lock it while this process lives; or the sentence of who has it."""
    doing[0] = f"opening --out {out}"
    out.mkdir(parents=True, exist_ok=True)
    path, host, locked = out / "lock", platform.node(), True
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)  # stays open; of a process that was killed the kernel closes it
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        locked = False
    except OSError:
        pass  # a file system without locks
    holder = os.read(descriptor, 999).decode()
    if not locked or holder.partition(" ")[0] not in ("", host):
        end = f"if that one is gone, remove {path}" if locked else "end that one, or choose another folder"
        return f"--out {out} is in use on {holder}; {end}"
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{host} by process {os.getpid()} since {time.ctime()}".encode(), 0)
    return ""


def open_folder(cfg: object, script: str, world: World) -> Path:
    """The run's folder, with config.json and a copy of all that runs; no old run is overwritten."""
    name = f"runs/{Path(script).stem}-{Path(cfg.run.model).name}-{time.strftime('%m%d-%H%M%S')}"
    out = Path(cfg.run.out or once(lambda: name))  # all ranks agree on the time
    if taken := once(lambda: take_lock(out)):
        fail(taken)
    if not cfg.run.resume and (out / "metrics.jsonl").exists():
        fail(f"--out {out} already holds a run; continue it with --resume {out} or choose another folder")
    if world.rank == 0 and not cfg.run.resume:
        own = [Path(cfg.run.reward.rpartition(":")[0])] if ":" in cfg.run.reward else []
        for source in {Path(script).resolve(), ROOT / "common.py", *own}:
            shutil.copy(source, out / source.name)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "core", out / "core", ignore=ignored, dirs_exist_ok=True)
        write_atomic(out / "config.json", json.dumps(describe_run(cfg), indent=1))
    return out


def describe_run(cfg: object) -> dict:
    """What is needed to make a run again: flags, command, commit, versions, hardware, data hash."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    files, cuda = [Path(name) for name in cfg.run.data.split(",")], torch.cuda.is_available()
    return {
        "flags": flat(cfg),
        "argv": sys.argv,
        "commit": git(["/usr/bin/env", "git", "rev-parse", "HEAD"]).stdout.strip(),
        "dirty": bool(git(["/usr/bin/env", "git", "status", "--porcelain", "-uno"]).stdout),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)} | {"python": platform.python_version()},
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "data_sha256": [hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else None for f in files],
    }


# Checkpoints --------------------------------------------------------------------------------------
def collect(state: State, run: RunConfig) -> dict[str, dict]:
    """What DCP takes, by names that no number of ranks changes; with LoRA no weight of --model."""
    models = {name: e.state_dict() for name, e in state.items() if not isinstance(e, tuple)}
    own = {n: {k: w for k, w in found.items() if "lora_" in k or not run.lora_rank} for n, found in models.items()}
    return own | {n: sharded.get_optimizer_state_dict(*e) for n, e in state.items() if isinstance(e, tuple)}


def complete_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("*") if f.name.isdigit())


def fingerprints(folder: Path, world: World) -> dict[str, list]:
    """Size and sha256 of the files of a checkpoint, each read by one of the ranks (collective)."""
    names, mine = once(lambda: sorted(f.name for f in folder.iterdir() if f.name != "manifest.json")), []
    for name in names[world.rank :: world.size]:
        with open(folder / name, "rb") as file:
            mine.append([os.stat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()])
    return dict(zip(names, gather(mine, world), strict=True))


def damage(folder: Path, found: dict[str, list]) -> str:
    """What is wrong with a checkpoint of these files, by its manifest and torch's list, or ""."""
    try:
        written = json.loads((folder / "manifest.json").read_text())
        wrong = [n for n in (".metadata", "state.json", *written) if n not in found or found[n] != written.get(n)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{folder / 'manifest.json'} is damaged ({first_line(error)})"
    parts = [] if wrong else dcp.FileSystemReader(folder).read_metadata().storage_data.values()
    wrong += [p.relative_path for p in parts if found.get(p.relative_path, [0])[0] < p.offset + p.length]
    return f"{folder / wrong[0]} is missing or not as it was written" if wrong else ""


def newest_whole(log: RunLog) -> Path | None:
    """The newest checkpoint that is as it was written; damaged ones are set aside (collective)."""
    for folder in reversed(once(lambda: complete_checkpoints(log.out))):
        if not (wrong := once(partial(damage, folder, fingerprints(folder, log.world)))):
            return folder
        aside = once(partial(folder.rename, f"{folder}.damaged-{time.time():.0f}"))
        print0(f"{wrong}; the checkpoint is set aside as {aside}, the next older one is tried")
    if once(lambda: any((log.out / "checkpoints").glob("*.damaged-*"))):
        fail(f"--resume {log.out}: none of its checkpoints is whole; begin again with another --out")
    return None


def save(log: RunLog, step: int, state: State, **extra: object) -> None:
    """Write checkpoints/<step>, aside and renamed when complete; keep the last few (collective).

    step is the next step to run; extra is the method's own state, as JSON.
    """
    folder = log.out / "checkpoints" / f"{step:08d}"
    aside = folder.with_name(folder.name + ".partial")
    if folder.exists():
        return
    log.phase("saving")
    mine = "".join(broken_weight(e) for e in state.values() if isinstance(e, nn.Module))
    if broken := max(gather([mine], log.world)):
        fail(f"step {step}: the weight {broken} is not finite; no checkpoint was written, the last ones are whole")
    extra |= {"frozen": frozen_bits(state["model"], log.world)}
    if log.world.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        extra |= {"skipped": log.skipped, "data": log.cfg.run.data_hash}
        (aside / "state.json").write_text(json.dumps({"step": step, **extra}))
    dist.barrier()
    stepped = {name: entry for name, entry in state.items() if not isinstance(entry, tuple) or entry[1].state}
    dcp.save(collect(stepped, log.cfg.run), checkpoint_id=aside)  # torch would step an optimizer that has no state yet
    found = fingerprints(aside, log.world)
    once(lambda: (aside / "manifest.json").write_text(json.dumps(found)))
    if wrong := once(lambda: damage(aside, found)):
        fail(f"step {step}: {wrong}, though just written; the older checkpoints are as they were")
    if log.world.rank == 0:
        os.replace(aside, folder)
        for old in complete_checkpoints(log.out)[: -log.cfg.run.keep]:
            shutil.rmtree(old)
    dist.barrier()


def resume(log: RunLog, state: State) -> tuple[int, dict]:
    """Load the newest complete checkpoint, on any number of ranks. (next step, the method's state).

    Without a checkpoint (a new run, or one killed before its first) the run starts at step 0.
    """
    found = newest_whole(log) if log.cfg.run.resume else None
    extra = {"step": 0}
    if found:
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DCP's lr, betas ... are pickles too, which could run code
        saved = {key.partition(".")[0] for key in dcp.FileSystemReader(found).read_metadata().state_dict_metadata}
        stepped = {name: entry for name, entry in state.items() if name in saved}
        loaded = collect(stepped, log.cfg.run)
        dcp.load(loaded, checkpoint_id=found)  # and gives the models theirs
        for name, entry in stepped.items():
            if isinstance(entry, tuple):
                groups = [{k: v for k, v in group.items() if k != "params"} for group in entry[1].param_groups]
                sharded.set_optimizer_state_dict(*entry, optim_state_dict=loaded[name])
                for group, now in zip(entry[1].param_groups, groups, strict=True):
                    group.update(now)  # what the flags say now, --weight_decay among them
        extra = json.loads((found / "state.json").read_text())
        if extra.get("data", log.cfg.run.data_hash) != log.cfg.run.data_hash:
            fail(f"{found} was trained on other problems than --data {log.cfg.run.data} gives")
        if extra.get("frozen", 0) != frozen_bits(state["model"], log.world):
            fail(f"{found} is an adapter of other weights than --model {log.cfg.run.model} now has")
    if extra["step"] > log.cfg.steps:
        fail(f"--resume {log.out}: --steps {log.cfg.steps}, but its last checkpoint is of step {extra['step']}")
    for entry in (entry for entry in state.values() if isinstance(entry, tuple)):
        entry[1].register_step_pre_hook(log.before_update)
    log.next_step, log.skipped = extra["step"], extra.get("skipped", 0)
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
        log.phase("exporting")
        log.append("metrics.jsonl", [{"step": step, **log.values}])  # what the final policy was measured at
        values = "".join(f" | {name.replace('_', ' ')} {value:.3f}" for name, value in log.values.items())
        print0(f"step {step:>4}/{step} | done{values}")
        export(log, policy, tokenizer, weights or named_weights(policy))
    else:
        print0(f"stopped at step {step}; continue with --resume {log.out} (with --steps {step}: final/)")
    if log.world.rank == 0:
        (log.out / "lock").write_text("")  # a run that ended may go on on another host
    shutdown()


def export(log: RunLog, policy: Policy, tokenizer: Tokenizer, weights: Weights) -> None:
    """Hugging Face folder final/, in its source's dtype; LoRA also in adapter/ (collective)."""
    run, final, model = log.cfg.run, log.out / "final", policy.model
    dtype = load_config(run).dtype or torch.float32
    whole, broken = {}, ""  # on rank 0 alone
    for name, tensor in ((name, tensor.to(dtype)) for name, tensor in weights):
        broken = broken or ("" if tensor.isfinite().all() else name)
        whole |= {name: tensor.to("cpu", copy=True)} if log.world.rank == 0 else {}
    if broken:
        fail(f"the weight {broken} is not finite as {dtype}; no model was exported, the checkpoints are as they were")
    adapter = {name: weight.full_tensor().cpu() for name, weight in lora_weights(policy).items()}
    if log.world.rank == 0:
        if adapter:
            model.peft_config["default"].save_pretrained(final / "adapter")
            save_file(adapter, final / "adapter/adapter_model.safetensors")
        generation, model.generation_config = model.generation_config, transformers.GenerationConfig()
        ends = stop_ids(tokenizer, generation)
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        model.save_pretrained(final, state_dict=whole)
        model.config.dtype = dtype  # it took that of the masters
        model.config.save_pretrained(final)
        generation.to_json_file(final / "generation_config.json")  # save_pretrained refuses some that are published
        tokenizer.save_pretrained(final)
        settings = read_settings(Path(resolve_model(run.model)) / "settings.json")
        asked = {name: getattr(run, name) for name in ("template", "template_args", "system", "request")}
        settings |= {name: value for name, value in asked.items() if value not in ("auto", None)}
        if run.reward:
            settings |= {"reward": f"../{Path(run.reward).name}", "solved": run.solved}  # the copy beside config.json
        (final / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")  # asks as this run did
        for file in final.glob("*.safetensors"):
            file.chmod(0o644)  # they are written 0600
    dist.barrier()
    print0(f"the trained model is in {final}\n  vllm serve {final}\n  python eval.py --model {final}")
