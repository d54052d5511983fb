"""metrics.jsonl files in, one PNG out: reward, test accuracy, length, entropy and the rest.

python plot.py runs/bread-tiny-* runs/grpo-tiny-* --out comparison.png
"""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = {  # key of metrics.jsonl: axis label; those after entropy are drawn only where a run has them
    "reward": "reward (training)",
    "test_accuracy": "test accuracy",
    "completion_tokens": "completion tokens",
    "entropy": "entropy (nats)",
    "resample_rounds": "rounds drawn to fill the batch",
    "groups_drawn": "groups drawn",
    "groups_kept": "groups trained",
    "overlong_penalty": "penalty of length",
    "guided_reward": "reward of guided rows",
    "test_reward": "reward on the test set",
    "expert_advantage": "advantage of expert rows",
    "expert_probability": "probability of expert tokens",
    "prefix_fraction": "share of the trace in a prefix",
    "kept_prefix_tokens": "prefix tokens trained",
    "hint_fraction": "share of the trace in a hint",
    "hint_loss": "NLL of hint tokens",
    "search_rate": "share of problems searched",
    "search_mixed": "searches that end mixed",
    "anchor_depth": "anchor depth (share of the trace)",
    "search_rounds_max": "search rounds",
    "probe_tokens": "tokens sampled in probes",
    "traces_opened": "problems whose trace was used",
    "traces_cut_short": "traces cut before the answer",
    "guided_rows": "share of rows with a prefix",
    "buffer": "failed questions in the buffer",
    "sft_rows": "rows of the SFT step",
    "gated": "share of groups sent to SFT",
    "mu": "mu, the share of SFT",
    "sft_loss": "SFT loss",
    "sft_weight": "weight of imitation",
    "positive_weight": "weight of positive rows",
    "surrogate_gain": "J_RL of policy - of shadow",
    "shadow_clip_fraction": "clipped tokens of the shadow",
    "shadow_kl": "KL of the policy to the shadow",
    "shadow_ratio_max": "largest shadow / policy ratio",
    "weight": "mean weight of a token",
    "weight_max": "largest weight",
    "nll": "NLL of expert tokens",
    "sampler_ratio_max": "largest trainer / sampler ratio",
    "kl": "KL to the reference",
}


@dataclass
class Config:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # run folders or metrics.jsonl files
    out: Path = Path("")  # the PNG; empty: curves.png in the first run's folder


def read_metrics(path: Path) -> list[dict]:
    """The lines of a run; a damaged one, as by a kill, is left out with a notice."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise SystemExit(f"error: there is no {path}")
    rows = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(text)
            rows += [row] if row["step"] >= 0 else []
        except (ValueError, TypeError, KeyError):
            print(f"{path}:{number} is damaged and left out")
    if not rows:
        raise SystemExit(f"error: {path} holds no step yet")
    return rows


def caption(folder: Path) -> str:
    """Command and commit of a run, where its config.json tells."""
    if not (folder / "config.json").is_file():
        return folder.name
    try:
        config = json.loads((folder / "config.json").read_bytes())
        (script, *flags), dirty = config["argv"], "+changes" if config["dirty"] else ""
        return f"{folder.name}: {' '.join([Path(script).name, *flags])} @ {config['commit'][:10]}{dirty}"
    except (ValueError, TypeError, KeyError):
        return f"{folder.name} (its config.json is damaged)"


def main(cfg: Config) -> None:
    if not cfg.runs:
        raise SystemExit("error: name at least one run folder")
    folders = [path if path.is_dir() else path.parent for path in cfg.runs]
    runs = [read_metrics(path) for path in cfg.runs]
    present = {key for run in runs for row in run for key in row}
    panels = {key: label for i, (key, label) in enumerate(PANELS.items()) if i < 4 or key in present}
    panels |= {key: key.replace("_", " ") for key in sorted(present) if key.startswith("reward_")}  # its parts
    rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3 * rows + 0.3 * len(runs)), squeeze=False)
    for axis, (key, label) in zip(axes.flat, panels.items(), strict=False):
        for folder, run in zip(folders, runs, strict=True):
            points = [(row["step"], row[key]) for row in run if row.get(key) is not None]
            if points:
                marker = "o" if key == "test_accuracy" else ""
                axis.plot(*zip(*points, strict=True), marker=marker, ms=3, lw=1.2, label=folder.name)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        share = label.startswith(("reward", "test accuracy", "share", "anchor", "probability"))
        if share and 0 <= axis.dataLim.y0 <= axis.dataLim.y1 <= 1:  # a reward of one's own may have any range
            axis.set_ylim(-0.02, 1.02)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    axes.flat[1].legend(fontsize=7, frameon=False)
    text = "\n".join(textwrap.fill(caption(folder), 150) for folder in folders)
    figure.text(0.01, 0.005, text, fontsize=6, va="bottom")
    figure.tight_layout(rect=(0, 0.01 + 0.012 * (text.count("\n") + 1), 1, 1))
    out = cfg.out if cfg.out.name else folders[0] / "curves.png"
    figure.savefig(out, dpi=130)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
