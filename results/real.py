"""A real pretrained model learns to add: real.png and a section of results/README.md.

python results/real.py                   what is missing of six runs, on two cores: three hours
python results/real.py --methods grpo    one of them
make speedrun                            four of them on one GPU at once, with four times the rows
python results/real.py --page            only page and figure, from results/real.jsonl

The model is SmolLM2-135M-Instruct of tests/real_model.py, the problems "What is 59 + 63?", two to
four numbers. Right is a completion whose last number is the sum: a reward function of one's own,
results/sums.py, since this model never writes a box. A trace adds from the left: "59 + 63 = 122.
122 + 40 = 162. The answer is 162."

All runs have the same steps, rows a step and limit of tokens, and their files' defaults besides,
but for the rates in RATES, one for RL and one for SFT. sft_then_grpo begins with SFT_STEPS of SFT.
A run that was ended goes on with the same command.
"""

import concurrent.futures
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from real_model import from_parts, real_model  # noqa: E402

from results.methods import write  # noqa: E402
from results.sums import sums  # noqa: E402

METHODS = "sft sft_then_grpo grpo bread luffy uft".split()
SFT_STEPS, TARGET = 10, 0.5  # the named accuracy
RATES = {"sft": 2e-5, "grpo": 1e-5, "bread": 1e-5, "luffy": 1e-5, "uft": 1e-5}
SIZES = {  # of a step
    "cpu": {"problems_per_step": 8, "steps": 48, "eval_every": 12, "save_every": 12},
    "cuda": {"problems_per_step": 32, "steps": 60, "eval_every": 10, "save_every": 1000},
}
SAME = {"max_completion_tokens": 96, "request": "", "eval_samples": 2, "keep": 1}
OWN = {"sft": {}, "uft": {"group_size": 8, "hint_steps": 30}}
MEASURE = "--samples 16 --k 1 16 --max_tokens 96 --request".split() + [""]
REWARD = f"{ROOT}/results/sums.py:last_number"


@dataclass
class Config:
    methods: tuple[str, ...] = tuple(METHODS)
    out: Path = Path("runs/real")  # of the runs; the records go to results/
    records: Path = ROOT / "results/real.jsonl"
    model: str = ""  # folder; empty: the one of tests/real_model.py
    weights: tuple[Path, ...] = ()  # its GGUF file, whole or in parts, where nothing can be fetched
    sampler: str = "auto"
    jobs: int = 1  # runs at a time
    minutes: float = 1e9  # then the runs save and end; the same command goes on
    steps: int = 0  # of each run; 0: as in SIZES
    problems_per_step: int = 0  # likewise
    test: int = 128  # test problems
    seed: int = 0
    page: bool = False  # no runs


def make_data(folder: Path, test: int) -> None:
    """train.jsonl and test.jsonl, apart."""
    folder.mkdir(parents=True, exist_ok=True)
    held = sums(1, test)
    asked = {row["problem"] for row in held}
    rows = [row for row in sums(0, 3000) if row["problem"] not in asked]
    for name, part in (("train", rows), ("test", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


# One run ------------------------------------------------------------------------------------------
def stages(method: str, steps: int) -> list[tuple[str, int]]:
    """(file, steps): one training, or two."""
    first = min(SFT_STEPS, steps // 2)
    return [("sft", first), ("grpo", steps - first)] if method == "sft_then_grpo" else [(method, steps)]


def commands(method: str, cfg: Config, sizes: dict) -> list[tuple[Path, list[str]]]:
    """(what is there when it is done, command), in order: trainings, then the measuring."""
    model, found, folder = cfg.model, [], cfg.out / f"{method}-{cfg.seed}"
    for script, steps in stages(method, sizes["steps"]) if method != "base" else ():
        out = folder / script
        flags = {"model": model, "out": out, "resume": out, "sampler": cfg.sampler, "seed": cfg.seed, "reward": REWARD}
        flags |= {"data": cfg.out / "train.jsonl", "test_data": cfg.out / "test.jsonl", "lr": RATES[script]}
        flags |= SAME | sizes | {"steps": steps} | OWN.get(script, {})
        if script == "sft":
            flags["problems_per_step"] *= 2  # traces
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        found.append((out / "final", [f"{script}.py", *words]))
        model = str(out / "final")
    out = folder / "eval"
    where = ["--model", model, "--data", str(cfg.out / "test.jsonl"), "--out", str(out), "--sampler", cfg.sampler]
    return [*found, (out / "report.json", ["eval.py", *where, "--reward", REWARD, *MEASURE])]


def run(method: str, cfg: Config, sizes: dict, until: float) -> str:
    """Do what is not done of a method; what went wrong, or nothing."""
    for done, (script, *flags) in commands(method, cfg, sizes):
        if done.exists() or time.time() > until:
            continue
        log = cfg.out / f"{method}-{cfg.seed}.log"
        with log.open("a") as out:
            process = subprocess.Popen([sys.executable, str(ROOT / script), *flags], stdout=out, stderr=out, cwd=ROOT)
            try:
                process.wait(max(1, min(until - time.time(), 1e6)))
            except subprocess.TimeoutExpired:
                process.terminate()  # it saves a checkpoint and ends
                process.wait()
        if process.returncode or not (done.exists() or time.time() > until):
            return f"{method}: {script} failed, {log} says more"
    return ""


def record(method: str, cfg: Config, sizes: dict) -> dict:
    """What a run left: accuracy, seconds and tokens by step, pass@k, three completions."""
    folder, step, accuracy, config = cfg.out / f"{method}-{cfg.seed}", 0, {}, {}
    totals = {"seconds": [0.0], "sampled_tokens": [0], "trained_tokens": [0]}
    for script, steps in stages(method, sizes["steps"]) if method != "base" else ():
        if not (folder / script / "metrics.jsonl").exists():
            continue
        for line in map(json.loads, (folder / script / "metrics.jsonl").read_text().splitlines()):
            if "test_accuracy" in line:
                accuracy[step + line["step"]] = line["test_accuracy"]
            if "trained_tokens" not in line:
                continue  # the end, measured alone
            clocks = [v for k, v in line.items() if k.startswith("seconds_") and k != "seconds_evaluation"]
            for name, values in totals.items():
                values.append(round(values[-1] + {**line, "seconds": sum(clocks)}.get(name, 0), 1))
        step, config = step + steps, json.loads((folder / script / "config.json").read_text())
    found = {"method": method, "seed": cfg.seed, "rows": 8 * sizes["problems_per_step"], "jobs": cfg.jobs}
    if (folder / "eval/report.json").exists():
        result = json.loads((folder / "eval/report.json").read_text())["test"]["result"]
        found |= {k: round(v, 4) for k, v in result.items() if k.startswith("pass@")}
        samples = (folder / "eval/test.samples.jsonl").read_text().splitlines()
        found["samples"] = [json.loads(line)["text"] for line in samples[: 3 * 16 : 16]]
    made = {k: config[k] for k in ("commit", "dirty", "versions", "hardware") if k in config}
    return found | {"accuracy": accuracy} | totals | made


# Page ---------------------------------------------------------------------------------------------
def in_order(records: list[dict]) -> list[dict]:
    """By rows a step, then as in METHODS, the base before them."""
    return sorted(records, key=lambda r: (r["rows"], ["base", *METHODS].index(r["method"])))


def reached(record: dict) -> str:
    """Minutes of rollouts and updates until a measured accuracy was TARGET."""
    steps = [int(step) for step, accuracy in record["accuracy"].items() if accuracy >= TARGET]
    return f"{record['seconds'][steps[0]] / 60:.1f}" if steps else "not reached"


def table(records: list[dict]) -> str:
    """A row for each run, and what it makes of three problems."""
    lines = ["| run | rows a step | steps | test accuracy, last and best | pass@1 | pass@16 | tokens sampled |"]
    lines[0] += f" minutes | minutes to {TARGET} |"
    lines.append("|---" * 9 + "|")
    for r in records:
        measured = " | ".join(f"{r[k]:.3f}" if k in r else "" for k in ("pass@1", "pass@16"))
        if values := list(r["accuracy"].values()):
            run = f"{r['rows']} | {len(r['seconds']) - 1} | {values[-1]:.3f}, {max(values):.3f}"
            cost = f"{r['sampled_tokens'][-1]:,.0f} | {r['seconds'][-1] / 60:.1f} | {reached(r)}"
            lines.append(f"| {r['method']} | {run} | {measured} | {cost} |")
        else:
            lines.append(f"| {r['method']} | | | | {measured} | | | |")
    lines.append("\n| run | what it says to the first three test problems |\n|---|---|")
    for r in (r for r in records if "samples" in r):
        texts = ["`" + " ".join(text.split())[:120] + "`" for text in r["samples"]]
        lines.append(f"| {r['method']}, {r['rows']} rows | {'<br>'.join(texts)} |")
    return "\n".join(lines)


def draw(records: list[dict], file: Path) -> None:
    """Test accuracy over steps, sampled tokens and minutes; a line of panels for each size."""
    sizes = sorted({r["rows"] for r in records if r["accuracy"]})
    figure, axes = plt.subplots(len(sizes), 3, figsize=(11, 3.2 * len(sizes)), squeeze=False, sharey=True)
    for row, size in zip(axes, sizes, strict=True):
        for r in (r for r in records if r["rows"] == size and r["accuracy"]):
            steps = [int(step) for step in r["accuracy"]]
            for axis, values in zip(row, (range(len(r["seconds"])), r["sampled_tokens"], r["seconds"]), strict=True):
                scale = 60 if values is r["seconds"] else 1e6 if values is r["sampled_tokens"] else 1
                style = {"marker": "o", "ms": 3, "lw": 1.3, "label": r["method"]}
                axis.plot([values[step] / scale for step in steps], r["accuracy"].values(), **style)
        row[0].set_ylabel(f"test accuracy, {size} rows a step")
        for axis, label in zip(
            row, ("steps", "million tokens sampled", "minutes of rollouts and updates"), strict=True
        ):
            axis.set_xlabel(label)
            axis.axhline(TARGET, color="gray", lw=0.6, ls="--")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main(cfg: Config) -> None:
    kept = [json.loads(line) for line in cfg.records.read_text().splitlines()] if cfg.records.exists() else []
    if not cfg.page:
        sizes = SIZES["cuda" if torch.cuda.is_available() else "cpu"]
        sizes |= {name: value for name in ("steps", "problems_per_step") if (value := getattr(cfg, name))}
        made = from_parts if cfg.weights else real_model
        cfg.model, cfg.out, wrong = cfg.model or str(made(*cfg.weights)), cfg.out.resolve(), []
        make_data(cfg.out, cfg.test)
        until, methods = time.time() + 60 * cfg.minutes, ["base", *cfg.methods]
        with concurrent.futures.ThreadPoolExecutor(cfg.jobs) as pool:
            for method, said in zip(methods, pool.map(lambda m: run(m, cfg, sizes, until), methods), strict=True):
                wrong += [said] if said else []
                new = record(method, cfg, sizes)
                kept = [r for r in kept if any(r[k] != new[k] for k in ("method", "seed", "rows"))] + [new]
                cfg.records.write_text("".join(json.dumps(r) + "\n" for r in kept))
        if wrong:
            sys.exit("\n".join(wrong))
    if not (kept := in_order(kept)):
        return print(f"{cfg.records} holds no run yet")
    print(table(kept))
    draw(kept, cfg.records.with_suffix(".png"))
    if cfg.records == Config.records:
        write("results/README.md", "real", table(kept) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
