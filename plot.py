"""metrics.jsonl files in, one figure out: reward, test accuracy, length, entropy and the rest.

python plot.py runs/bread-tiny-* runs/grpo-tiny-* --out comparison.png
python plot.py runs/* --keys test_accuracy entropy --x flops --no-captions --title Tiny --out x.svg

Runs that differ by --seed alone are one curve: the mean, in a band from the lowest to the highest.
"""

import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
import tyro
from safetensors import safe_open

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = {  # key of metrics.jsonl: label; what is drawn of a run without --keys
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
AXES = {"step": "step", "tokens": "tokens sampled and trained", "flops": "FLOPs of training"}


@dataclass
class Config:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # run folders or metrics.jsonl files
    out: Path = Path("")  # by its name PNG, SVG or PDF; empty: curves.png in the first run's folder
    keys: tuple[str, ...] = ()  # of metrics.jsonl, a panel each, your own too; empty: those that plot.py knows
    x: Literal["step", "tokens", "flops"] = "step"  # spent in training; flops: 2N a sampled, 6N a trained token
    title: str = ""  # above the panels
    width: float = 7.0  # inches, of two columns of text
    captions: bool = True  # below the panels, command and commit of each run


def read_lines(path: Path, *names: str) -> list[dict]:
    """JSON lines with a step and these names; a damaged one, as by a kill, is left out and said."""
    if not path.is_file():
        raise SystemExit(f"error: there is no {path}")
    rows = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(text)
            step, *_ = [row[name] for name in ("step", *names)]
            rows += [row] if step >= 0 else []
        except (ValueError, TypeError, KeyError):
            print(f"{path}:{number} is damaged and left out")
    return rows


def read_metrics(path: Path) -> list[dict]:
    """The lines of a run."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not (rows := read_lines(path)):
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


def setting(folder: Path) -> str:
    """What runs of several seeds have in common; a folder without a whole config.json is alone."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        flags = {flag: value for flag, value in config["flags"].items() if flag not in ("seed", "out", "resume")}
        return json.dumps([Path(config["argv"][0]).name, flags], sort_keys=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return str(folder.resolve())


def parameters(folder: Path) -> int:
    """N, by the shapes of the model that a run left."""
    files, total = [*(folder / "final").glob("*.safetensors")], 0
    if not files:
        raise SystemExit(f"error: --x flops: {folder} has no final/, whose weights would tell N; --x tokens needs none")
    for file in files:
        with safe_open(file, "np") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def places(cfg: Config, folder: Path, run: list[dict]) -> Iterator[tuple[float, dict]]:
    """(x, line): what was spent before the step, whose values are of the policy as it was then."""
    n, spent = parameters(folder) if cfg.x == "flops" else 1, 0.0
    sampled, trained = (2 * n, 6 * n) if cfg.x == "flops" else (1, 1)
    for row in run:
        yield row["step"] if cfg.x == "step" else spent, row
        spent += sampled * row.get("sampled_tokens", 0) + trained * row.get("trained_tokens", 0)


def curve(runs: list[list[tuple[float, dict]]], key: str) -> np.ndarray:
    """(4, points): x, mean, lowest and highest over runs, at the steps where all have the key."""
    found = [{row["step"]: (x, row[key]) for x, row in run if row.get(key) is not None} for run in runs]
    steps = sorted(set.intersection(*map(set, found)))
    x, y = np.array([[values[step] for step in steps] for values in found], float).reshape(len(runs), -1, 2).T
    return np.stack([x.mean(1), y.mean(1), y.min(1), y.max(1)])


def choose_panels(cfg: Config, runs: list[list[dict]]) -> dict[str, str]:
    """{key: label} of --keys, else of what is known of the runs, with the parts of a reward."""
    present = {key for run in runs for row in run for key in row} - {"step"}
    if unknown := [key for key in cfg.keys if key not in present]:
        raise SystemExit(
            f"error: --keys (apart by spaces): no run has {', '.join(unknown)}; there are {', '.join(sorted(present))}"
        )
    known = [key for key in [*PANELS, *sorted(key for key in present if key.startswith("reward_"))] if key in present]
    if not cfg.keys and not known:
        raise SystemExit(f"error: plot.py knows no key of these runs; name --keys: {', '.join(sorted(present))}")
    return {key: PANELS.get(key, key.replace("_", " ")) for key in cfg.keys or known}


def main(cfg: Config) -> None:
    if not cfg.runs or cfg.width <= 0:
        raise SystemExit("error: name at least one run folder, and a --width above 0")
    folders = [path if path.is_dir() else path.parent for path in cfg.runs]
    runs, groups = [read_metrics(path) for path in cfg.runs], defaultdict(list)
    for folder, run in zip(folders, runs, strict=True):
        groups[setting(folder)].append((folder, [*places(cfg, folder, run)]))
    panels, text = choose_panels(cfg, runs), "\n".join(textwrap.fill(caption(folder), 150) for folder in folders)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    plt.rcParams.update({"font.size": 8, "svg.fonttype": "none"})
    size = (cfg.width, cfg.width * (0.1 + 0.3 * rows * 2 / columns))
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for i, (axis, (key, label)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        for members in groups.values():
            x, mean, low, high = curve([run for _, run in members], key)
            name = members[0][0].name + (f" ({len(members)} runs)" if len(members) > 1 else "")
            (line,) = axis.plot(x, mean, marker="o" if len(x) < 30 else "", ms=2, lw=1.2, label=name)
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
        share = label.startswith(("reward", "test accuracy", "share", "anchor", "probability"))
        if share and 0 <= axis.dataLim.y0 <= axis.dataLim.y1 <= 1:  # a reward of one's own may have any range
            axis.set_ylim(-0.02, 1.02)
        if i + columns >= len(panels):
            axis.set_xlabel(AXES[cfg.x])
            axis.tick_params(labelbottom=True)
    axes[0, 0].xaxis.get_major_locator().set_params(integer=cfg.x == "step")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(cfg.title)
    if cfg.captions:
        figure.text(0.01, -0.01, text, fontsize=5, va="top")
    out = cfg.out if cfg.out.name else folders[0] / "curves.png"
    try:
        figure.savefig(out, dpi=200, bbox_inches="tight" if cfg.captions else None)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --out {out} cannot be written ({error})") from None
    print(f"wrote {out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
