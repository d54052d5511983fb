"""Every method at equal budgets on the bundled map, and what the papers claim, as runs with seeds.

python results/claims.py                      what is missing of all runs, two at a time: hours
python results/claims.py --only bread uft     of the cells with one of these words in their name;
                                              unless OUT has a grid, or "rate/" is one,
                                              at the rates of claims.jsonl
python results/claims.py --hours 2            begins none after two hours; the same command goes on
python results/claims.py --count              only says how many runs are left

A cell is one or two trainings with their flags. `controlled`: every knob that is not the method's
own is the same in all, so that a difference is the method's. `paper`: each file's defaults, with
its schedule scaled to the run. `rate`: the grid of learning rates, the same for every method and
arm, of which the best goes into all other cells. `ablation`, `traces`, `tail`, `audit`: one thing
of a method switched, or other data, under `controlled`. No run is stopped early.

Each run appends a line to OUT/records.jsonl: accuracy on every split, curves, tokens, the commit.
"""

import concurrent.futures
import importlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

METHODS = "grpo dapo sft bread luffy srft relift prefix_rft uft bridge chord hpt trapo iw_sft".split()
RATES, GRID_SEED = (1e-4, 3e-4, 1e-3), 100

CONTROLLED = {
    "problems_per_step": 32,
    "group_size": 8,
    "sft_problems_per_step": 32,
    "updates_per_step": 1,
    "scale_by_std": True,
    "loss_norm": "token",
    "clip_low": 0.2,  # with one update a step no ratio leaves 1
    "clip_high": 0.2,
    "tis_cap": 2.0,
    "kl_coef": 0.0,
    "entropy_coef": 0.0,
    "sft_entropy_coef": 0.0,
    "format_reward": 0.0,
    "skip_above": 0.0,
    "warmup_steps": 0,
    "warmup": 0.0,
    "final_lr": 1.0,
    "beta2": 0.999,
    "grad_clip": 1.0,
    "weight_decay": 0.0,
}
SCALED = {  # schedules, in shares of the run as in each paper's own
    "uft": {"hint_steps": 0.6},
    "prefix_rft": {"prefix_steps": 1.0},
    "chord": {"mu_decay": 0.4},
    "dapo": {"warmup_steps": 0.02},
}
PAPER = {  # what stands beside the problems of a step in the file's defaults, for 32 of them
    "dapo": {"updates_per_step": 2},
    "relift": {"buffer_size": 32},
    "bridge": {"sft_problems_per_step": 16},
}

# name: (file, what is switched), each under `controlled`
ABLATIONS = {
    "bread, first hit": ("bread", {"stop_on_first": True}),
    "bread, always searches": ("bread", {"trigger": "always"}),
    "bread, 3 episodes": ("bread", {"num_episodes": 3}),
    "bread, band 0.2 to 0.8": ("bread", {"band_low": 0.2, "band_high": 0.8}),
    "luffy, not shaped": ("luffy", {"gamma": -1.0}),
    "luffy, no trace": ("luffy", {"expert_rows": 0}),
    "luffy, 4 updates, no clip": ("luffy", {"updates_per_step": 4, "clip_low": -1.0, "clip_high": -1.0}),
    "luffy, 4 updates, clip": ("luffy", {"updates_per_step": 4}),
    "srft, no entropy in the weights": ("srft", {"positive_entropy_sign": 0, "sft_entropy_sign": 0}),
    "srft, signs turned": ("srft", {"positive_entropy_sign": -1, "sft_entropy_sign": 1}),
    "srft, rewards of 1 and -1": ("srft", {"rollouts": "pm1"}),
    "srft, rollouts over the longest length": ("srft", {"loss_norm": "constant"}),
    "relift, SFT nearly every step": ("relift", {"buffer_size": 4}),
    "relift, oldest failures": ("relift", {"buffer_order": "oldest"}),
    "prefix_rft, every prefix token": ("prefix_rft", {"keep_share": 1.0}),
    "prefix_rft, not annealed": ("prefix_rft", {"low_final": 0.95}),
    "uft, fixed hint": ("uft", {"hint_high": 0.5, "hint_low": 0.5, "hint_steps": 1000}),
    "uft, uniform hint (R3)": ("uft", {"schedule": "uniform"}),
    "uft, no likelihood": ("uft", {"hint_coef": 0.0}),
    "bridge, no meta": ("bridge", {"meta": False}),
    "bridge, no adapter": ("bridge", {"adapter_rank": 0, "meta": False}),
    "chord, mu 0.5": ("chord", {"mu_peak": 0.5, "mu_valley": 0.5}),
    "chord, phi": ("chord", {"mu_peak": 0.1, "mu_valley": 0.1, "phi": True}),
    "hpt, gate 4": ("hpt", {"gate": 4}),
    "hpt, the script's mixture": ("hpt", {"sft_coef": 0.12}),  # hpt.py's docstring
    "trapo, no trust region": ("trapo", {"trsft_alpha": 1e-6}),
    "trapo, micro-groups alone": ("trapo", {"sft_coef": 0.0}),
}
TRACES = {  # on the same problems with traces of mixed quality
    "sft, mixed": ("sft", {}),
    "iw_sft, mixed": ("iw_sft", {}),
    "iw_sft, mixed, q fixed": ("iw_sft", {"q": "reference"}),
    "iw_sft, mixed, by score": ("iw_sft", {"quality": True}),
    "iw_sft, mixed, dft": ("iw_sft", {"weight": "dft"}),
}
SHARE = 40  # percent of the training problems have a trace, in the cells of that name
TAIL = ("grpo", "bread", "luffy", "uft", "sft_then_grpo")  # on the hardest training problems alone
TAIL_TRACES = ("clean", "style", "fused")
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
BUGS = ("correct", "first_last", "mean_of_means")  # of SFT, in results/accumulation_bugs.py


@dataclass(frozen=True)
class Cell:
    """One or two trainings, each (file, flags); the second begins with the first one's model."""

    name: str
    stages: tuple[tuple[str, dict], ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    bug: str = "correct"  # or what else no flag does: "random questions"
    threads: int = 1


@dataclass
class Config:
    only: tuple[str, ...] = ()  # words of names
    jobs: int = 2  # runs at a time
    hours: float = 1e9
    count: bool = False
    steps: int = 60  # of a run; fewer for a trial, with its own --out
    samples: int = 16  # of each problem of the four splits, at the end
    out: Path = Path("runs/claims")


# The cells ----------------------------------------------------------------------------------------
def has(script: str, flags: dict) -> dict:
    """Those of the flags that a file knows."""
    config = importlib.import_module(script).Config()
    return {k: v for k, v in flags.items() if hasattr(config, k) or hasattr(config.run, k)}


def arm(name: str, script: str, steps: int, lr: float, data: str = "", **own: object) -> tuple[str, dict]:
    """A training of one of the two arms."""
    scaled = {k: max(1, round(v * steps)) for k, v in SCALED.get(script, {}).items()}
    if name == "controlled":
        flags = has(script, scaled | CONTROLLED | {"clip_high": 0.28 if script == "dapo" else 0.2})
    else:
        config = importlib.import_module(script).Config()  # whose defaults the map's settings.json would replace
        own_defaults = {k: getattr(config, k, getattr(config.run, k, None)) for k in has(script, CONTROLLED)}
        flags = own_defaults | {"problems_per_step": 32} | PAPER.get(script, {}) | scaled
    rates = {"lr": lr} | has(script, {"sft_lr": lr})  # bridge's adapter takes lr
    return script, flags | rates | ({"data": data} if data else {}) | {"steps": steps} | own


def then_grpo(name: str, rates: dict, steps: int, data: str = "") -> tuple:
    """SFT, then GRPO, half of the steps each."""
    return tuple(arm(name, script, steps // 2, rates[name, script], data) for script in ("sft", "grpo"))


def best_rates(records: list[dict]) -> dict[tuple[str, str], float]:
    """The rate of the grid with the best mean test accuracy of the last three evaluations."""
    found: dict[tuple[str, str], list] = {}
    for r in (r for r in records if r["cell"].startswith("rate/")):
        _, name, script, rate = r["cell"].split("/")
        last = list(r["accuracy"].values())[-3:]
        found.setdefault((name, script), []).append((sum(last) / len(last), float(rate)))
    return {key: max(scores)[1] for key, scores in found.items() if len(scores) == len(RATES)}


def cells(records: list[dict], steps: int) -> list[Cell]:
    """All whose learning rate is known: the grid, and after it the rest."""
    arms = [(name, script) for name in ("controlled", "paper") for script in METHODS]
    grid = [Cell(f"rate/{n}/{s}/{lr:g}", (arm(n, s, steps, lr),), (GRID_SEED,)) for n, s in arms for lr in RATES]
    rates = best_rates(records)
    if len(rates) < len(arms):
        return grid
    five, found = (0, 1, 2, 3, 4), grid
    for name in ("controlled", "paper"):
        found += [Cell(f"{name}/{s}", (arm(name, s, steps, rates[name, s]),), five) for s in METHODS]
        found.append(Cell(f"{name}/sft_then_grpo", then_grpo(name, rates, steps), five))
    own = {s: rates["controlled", s] for s in METHODS}
    for kind, table, data in (("ablation", ABLATIONS, ""), ("traces", TRACES, "train_mixed.jsonl")):
        for name, (script, flags) in table.items():
            found.append(Cell(f"{kind}/{name}", (arm("controlled", script, steps, own[script], data, **flags),)))
    relift = arm("controlled", "relift", steps, own["relift"])
    found.append(Cell("ablation/relift, random questions", (relift,), bug="random questions"))
    data = f"some_{SHARE}.jsonl"
    some = arm("controlled", "bread", steps, own["bread"], data, traces="optional")  # on all problems, as GRPO
    found.append(Cell(f"traces/bread, {SHARE} %", (some,)))
    found.append(Cell(f"traces/sft_then_grpo, {SHARE} %", then_grpo("controlled", rates, steps, data)))
    for traces in TAIL_TRACES:
        for script in TAIL:
            data = f"tail_{traces}.jsonl"
            one = (arm("controlled", script, steps, own[script], data),) if script in METHODS else None
            found.append(Cell(f"tail/{script}, {traces}", one or then_grpo("controlled", rates, steps, data)))
    found += [Cell(f"audit/sft then grpo, {b}", then_grpo("controlled", rates, steps), five, b) for b in BUGS[1:]]
    found.append(Cell("threads/grpo", (arm("controlled", "grpo", steps, own["grpo"]),), (0,), threads=2))
    return found


# One run ------------------------------------------------------------------------------------------
def make_data(folder: Path) -> None:
    """Traces of other qualities, or of some problems, and the hardest training problems alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("mixed", *TAIL_TRACES[1:]):
        command = [sys.executable, str(ROOT / "map/make.py"), "--traces", kind, "--out", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    clean = ROOT / "map/train.jsonl"
    for name in TAIL_TRACES:
        file = clean if name == "clean" else folder / f"train_{name}.jsonl"
        rows = [line for line in file.read_text().splitlines() if json.loads(line)["meta"]["unsure"] >= 5]
        (folder / f"tail_{name}.jsonl").write_text("".join(line + "\n" for line in rows))
    rows = [json.loads(line) for line in clean.read_text().splitlines()]
    traced = {*random.Random(0).sample(range(len(rows)), round(len(rows) * SHARE / 100))}
    found = [row if i in traced else row | {"solution": None} for i, row in enumerate(rows)]
    (folder / f"some_{SHARE}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def break_sft(bug: str, sft: ModuleType) -> None:
    """Micro-batches of 4 rows, of which some are lost or each has the same weight."""
    whole, loss_fn, parts = common.make_batch, sft.loss_fn, []

    def microbatches(rows: list, budget: int, world: object) -> list:
        parts[:] = [whole(rows[i : i + 4], world.device) for i in range(0, len(rows), 4)]
        return [parts[0], parts[-1]] if bug == "first_last" else parts

    def mean_of_means(cfg, batch, logprobs, entropy, weights, counts):
        counts = counts._replace(expert=len(parts) * int(batch.expert_mask.sum()))
        return loss_fn(cfg, batch, logprobs, entropy, weights, counts)

    common.microbatches = microbatches
    sft.loss_fn = mean_of_means if bug == "mean_of_means" else loss_fn


def ask_at_random(relift: ModuleType, seed: int) -> None:
    """As many questions come into the buffer as failed, but any."""
    ids = [json.loads(line)["id"] for line in (ROOT / "map/train.jsonl").read_text().splitlines()]
    whole, rng = relift.push_and_pop, random.Random(seed)
    relift.push_and_pop = lambda buffer, failed, *how: whole(buffer, rng.sample(ids, len(failed)), *how)


def command_line(flags: dict) -> list[str]:
    """Flags as words of a command."""
    switches = {True: "--", False: "--no-"}
    words = [[switches[v] + k] if isinstance(v, bool) else [f"--{k}", str(v)] for k, v in flags.items()]
    return sum(words, [])


def train(script: str, flags: dict, folder: Path, bug: str) -> list[dict]:
    """The file's own main with these flags, in this process; its metrics."""
    module, kept = importlib.import_module(script), common.microbatches
    sys.argv = [f"{script}.py", *command_line(flags), "--out", str(folder)]
    if bug in BUGS[1:] and script == "sft":
        break_sft(bug, module)
    elif bug == "random questions":
        ask_at_random(module, flags["seed"])
    module.main(common.parse(module.Config))
    common.microbatches = kept
    shutil.rmtree(folder / "checkpoints")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measure(model: str, folder: Path, samples: int) -> dict[str, dict[str, float]]:
    """Every split by eval.py: {split: {"pass@1": ..., "pass@16": ...}}."""
    module = importlib.import_module("eval")
    sys.argv = f"eval.py --model {model} --out {folder} --samples {samples} --k 1 {samples}".split()
    module.main(common.parse(module.Config))
    report = json.loads((folder / "report.json").read_text())
    splits = {Path(name).stem: entry["result"] for name, entry in report.items()}
    return {name: {k: round(v, 4) for k, v in found.items() if k.startswith("pass@")} for name, found in splits.items()}


def curves(lines: list[dict], every: int = 10) -> dict[str, list]:
    """Of each ten steps the mean of what is drawn; tokens are summed from the start."""
    parts = [lines[i : i + every] for i in range(0, len(lines) - 1, every)]  # the last line is the measured end
    found = {}
    for name in ("reward", "entropy", "completion_tokens", "groups_mixed", "anchor_depth", "traces_opened"):
        values = [[line[name] for line in part if name in line] for part in parts]
        found[name] = [round(sum(v) / len(v), 4) if v else None for v in values]
    for name in ("sampled_tokens", "trained_tokens"):
        found[name] = [
            sum(int(line.get(name, 0)) for line in lines[: i + every]) for i in range(0, len(lines) - 1, every)
        ]
    return {name: values for name, values in found.items() if any(values)}


def run(cell: Cell, seed: int, out: Path, samples: int) -> dict:
    """Train and measure, in a process of its own: the record."""
    folder, start = out / f"{cell.name.replace('/', '-').replace(' ', '_')}-{seed}", time.time()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    torch.set_num_threads(cell.threads)
    os.environ["OMP_NUM_THREADS"] = str(cell.threads)
    model, lines, step = "map", [], 0
    for number, (script, flags) in enumerate(cell.stages):
        flags = flags | {"model": model, "seed": seed, "save_every": 100_000, "eval_samples": 4}
        if "data" in flags:
            flags["data"] = str(out / "data" / flags["data"])
        here = folder / f"{number}-{script}"
        for line in train(script, flags, here, cell.bug):
            lines.append(line | {"step": line["step"] + step, "trainer": script})
        model, step = str(here / "final"), step + flags["steps"]
    config = json.loads((here / "config.json").read_text())
    record = {"cell": cell.name, "seed": seed, "stages": cell.stages, "bug": cell.bug, "threads": cell.threads}
    record["accuracy"] = {line["step"]: line["test_accuracy"] for line in lines if "test_accuracy" in line}
    record |= {"splits": measure(model, folder / "eval", samples), "curves": curves(lines)}
    record["seconds"] = {k[8:]: round(sum(line.get(k, 0) for line in lines)) for k in lines[0] if k[:8] == "seconds_"}
    made = {k: config[k] for k in ("commit", "dirty", "versions", "hardware")}
    return record | made | {"wall": round(time.time() - start)}


# All of them --------------------------------------------------------------------------------------
def read(out: Path) -> list[dict]:
    """The records of all runs so far."""
    file = out / "records.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def recorded() -> list[dict]:
    """The grid of claims.jsonl, as far as best_rates reads a record."""
    lines = [json.loads(line) for line in (ROOT / "results/claims.jsonl").read_text().splitlines()]
    grid = [(line["cell"], run) for line in lines if line["cell"].startswith("rate/") for run in line["seeds"].values()]
    return [{"cell": cell, "accuracy": dict(enumerate(run["accuracy"]))} for cell, run in grid]


def left(cfg: Config, tried: set) -> list[tuple[Cell, int]]:
    """Runs that have no record yet and were not tried."""
    records = read(cfg.out)
    known = {(r["cell"], r["seed"]) for r in records} | tried
    gridless = cfg.only and not best_rates(records) and not any("rate/" in word for word in cfg.only)
    found = cells(recorded() if gridless else records, cfg.steps)
    found = [c for c in found if not c.name.startswith("rate/")] if gridless else found
    wanted = [c for c in found if not cfg.only or any(word in c.name for word in cfg.only)]
    return [(cell, seed) for cell in wanted for seed in cell.seeds if (cell.name, seed) not in known]


def main(cfg: Config) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": PATHS}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["common", "eval"])
    until, tried, failed = time.time() + 3600 * cfg.hours, set(), []
    while todo := left(cfg, tried):  # again after the grid, without which no other rate is known
        print(f"{len(todo)} runs to go", flush=True)
        if cfg.count:
            return
        if not (cfg.out / "data").exists():
            make_data(cfg.out / "data")
        with concurrent.futures.ProcessPoolExecutor(cfg.jobs, context, max_tasks_per_child=1) as pool:
            running: dict[concurrent.futures.Future, str] = {}
            while running or (todo and time.time() < until):
                while todo and len(running) < cfg.jobs and time.time() < until:
                    cell, seed = todo.pop(0)
                    tried.add((cell.name, seed))
                    running[pool.submit(run, cell, seed, cfg.out.resolve(), cfg.samples)] = f"{cell.name}, seed {seed}"
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                    name = running.pop(future)
                    if future.exception():
                        failed.append(name)
                        print(f"{name}: failed ({future.exception()!r}); its log.txt says more", flush=True)
                        continue
                    record = future.result()
                    with (cfg.out / "records.jsonl").open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    print(f"{name}: {record['splits']['test']['pass@1']:.3f}, {record['wall']} s", flush=True)
        if time.time() >= until:
            break
    if failed:
        sys.exit(f"{len(failed)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
