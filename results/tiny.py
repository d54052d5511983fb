"""Every method on the tiny model at equal settings: test accuracy, mean and range over seeds.

python results/tiny.py                         runs all that is missing under runs/tiny, then tables
python results/tiny.py --methods grpo bread    some of them
python results/tiny.py --steps 0               only table and figure, from results/tiny.jsonl

One step is 32 problems for all: 8 rollouts of each for the online methods (BREAD up to five times,
DAPO up to four times as many), their expert traces for sft and iw_sft. Settings: each file's own
defaults under tiny/settings.json, tuned for no method (relift, uft: no entropy bonus), at two
learning rates for all, of which some need the lower one.
"""

import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro
from methods import METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
NAMES = [method.name for method in METHODS]
NAMES.insert(NAMES.index("sft") + 1, "sft_then_grpo")


@dataclass
class Config:
    methods: tuple[str, ...] = tuple(NAMES)
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = (3e-4, 1e-4)  # ReLIFT's SFT step has the same
    steps: int = 60  # 0: no runs
    out: Path = Path("runs/tiny")


def train(script: str, model: str, seed: int, lr: float, steps: int, folder: Path) -> tuple[dict[int, float], dict]:
    """One training: test accuracy by step, and the run's config.json. Loud when it fails."""
    flags = {"model": model, "seed": seed, "steps": steps, "lr": lr, "out": folder, "save_every": 100000}
    if script == "relift":
        flags["sft_lr"] = lr
    command = [sys.executable, str(HERE.parent / f"{script}.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracy = {row["step"]: row["test_accuracy"] for row in rows if "test_accuracy" in row}
    return accuracy, json.loads((folder / "config.json").read_text())


def run(method: str, seed: int, lr: float, steps: int, out: Path) -> dict:
    """One line of tiny.jsonl. SFT then RL has half of the steps for each."""
    folder, start = out / f"{method}-{seed}-{lr}", time.time()
    if method == "sft_then_grpo":
        half = steps // 2
        accuracy, config = train("sft", "tiny", seed, lr, half, folder / "sft")
        second, config = train("grpo", str(folder / "sft/final"), seed, lr, steps - half, folder / "grpo")
        accuracy |= {half + step: value for step, value in second.items()}
    else:
        accuracy, config = train(method, "tiny", seed, lr, steps, folder)
    return {
        "method": method,
        "seed": seed,
        "lr": lr,
        "steps": steps,
        "test_accuracy": accuracy,
        "seconds": round(time.time() - start),
        "commit": config["commit"],
        "versions": config["versions"] | {"hardware": config["hardware"]},
    }


def show(records: list[dict]) -> None:
    """Markdown table of mean (lowest to highest seed), and the figure."""
    methods = [m for m in NAMES if any(r["method"] == m for r in records)]
    steps = sorted({int(s) for r in records for s in r["test_accuracy"]})
    lrs = sorted({r["lr"] for r in records}, reverse=True)
    columns = [f"lr {lr:g}, step {step}" for lr in lrs for step in steps[2::2]]
    print(f"| method | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    rows = -(-len(methods) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(11, 2.3 * rows), sharex=True, sharey=True)
    for axis, method in zip(axes.flat, methods, strict=False):
        cells = []
        for lr, color in zip(lrs, ("tab:blue", "tab:orange"), strict=False):
            mine = [r["test_accuracy"] for r in records if (r["method"], r["lr"]) == (method, lr)]
            runs = [{int(s): a for s, a in run.items()} for run in mine]
            values = [[run[s] for run in runs] for s in steps]
            means = [sum(v) / len(v) for v in values]
            cells += [f"{m:.2f} ({min(v):.2f} to {max(v):.2f})" for m, v in zip(means, values, strict=True)][2::2]
            axis.plot(steps, means, color=color, lw=1.8, label=f"lr {lr:g}")
            for run in runs:
                axis.plot(steps, [run[s] for s in steps], color=color, lw=0.6, alpha=0.7)
        print(f"| {method} | " + " | ".join(cells) + " |")
        axis.set(title=method, ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7, frameon=False)
    for axis in axes.flat[len(methods) :]:
        axis.axis("off")
    figure.supxlabel("step")
    figure.supylabel("test accuracy")
    figure.tight_layout()
    figure.savefig(HERE / "tiny.png", dpi=110)


def main(cfg: Config) -> None:
    found = HERE / "tiny.jsonl"
    records = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    for method, seed, lr in itertools.product(cfg.methods, cfg.seeds, cfg.lrs) if cfg.steps else ():
        wanted = (method, seed, lr, cfg.steps)
        if not any((r["method"], r["seed"], r["lr"], r["steps"]) == wanted for r in records):
            records.append(run(method, seed, lr, cfg.steps, cfg.out))
            with found.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
    show(records)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
