"""The two figures of verdicts.py: curves of every method, mean and 95 % interval over seeds."""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from results.compared import ends, interval, spent

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
FAMILIES = {  # a column each; GRPO and SFT then GRPO are in all, in gray
    "baselines, and SFT weighted": ("dapo", "sft", "iw_sft"),
    "begun by the expert": ("bread", "uft", "prefix_rft", "trapo"),
    "a trace in the group, or after failures": ("luffy", "srft", "relift", "hpt"),
    "traces beside the group": ("bridge", "chord"),
}
GRAY = {"grpo": ("0.25", "-"), "sft_then_grpo": ("0.25", ":")}
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
ROWS = {  # file: rows of (arm, label, what is drawn over what)
    "accuracy.png": (
        ("controlled", "controlled arm\ntest accuracy", "accuracy", "steps"),
        ("controlled", "controlled arm\ntest accuracy", "accuracy", "tokens"),
        ("controlled", "controlled arm\ntest accuracy", "accuracy", "FLOPs"),
        ("paper", "paper arm\ntest accuracy", "accuracy", "steps"),
    ),
    "signals.png": (
        ("controlled", "entropy, nats a token", "entropy", "steps"),
        ("controlled", "tokens of a completion", "completion_tokens", "steps"),
        ("controlled", "share of groups\nwith signal", "groups_mixed", "steps"),
    ),
}
UNITS = {"steps": (1, "steps"), "tokens": (1e3, "sampled tokens, thousands"), "FLOPs": (1e12, "FLOPs, $10^{12}$")}


def curve(cell: dict, what: str, unit: str) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """x, and of every x (mean, half of the interval) over the runs that have a value there."""
    runs = list(cell["seeds"].values())
    if what == "accuracy":
        x, values = np.mean([spent(cell, run, unit) for run in runs], 0), [run["accuracy"] for run in runs]
    else:
        x = np.array(ends(cell), float)
        x = (x + [0, *x[:-1]]) / 2  # the middle of ten steps
        values = [run["curves"].get(what, [None] * len(x)) for run in runs]
    points = [[v for v in point if v is not None] for point in zip(*values, strict=True)]
    kept = [i for i, point in enumerate(points) if point]
    return x[kept], [interval(points[i]) for i in kept]


def draw(cells: dict) -> None:
    for file, rows in ROWS.items():
        rows = [row for row in rows if any(name.startswith(f"{row[0]}/") for name in cells)]
        size = (12, 2.4 * len(rows) + 1.2)
        figure, axes = plt.subplots(len(rows), len(FAMILIES), figsize=size, sharey="row", layout="constrained")
        for number, (arm, label, what, unit) in enumerate(rows):
            axes[number, 0].set_ylabel(label)
            for axis, (title, names) in zip(axes[number], FAMILIES.items(), strict=True):
                looks = GRAY | {name: (color, "-") for name, color in zip(names, COLORS, strict=False)}
                for name, (color, style) in looks.items():
                    draw_one(axis, cells.get(f"{arm}/{name}"), name, (what, unit), style, color)
                axis.set_xlabel(UNITS[unit][1], fontsize=9)
                axis.grid(alpha=0.3)
                if number == 0:
                    axis.set_title(title, fontsize=11, pad=58)
                    where = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2, "frameon": False}
                    axis.legend(**where, fontsize=9, handlelength=1.5, columnspacing=1).set_in_layout(False)
            if what in ("accuracy", "groups_mixed"):
                axes[number, 0].set_ylim(-0.02, 1.02)
        save(figure, file)


def draw_one(axis: plt.Axes, cell: dict | None, name: str, over: tuple[str, str], style: str, color: str) -> None:
    """The curve and its band; in the legend also where there are no runs, or no tokens sampled."""
    x, points = curve(cell, *over) if cell else (np.zeros(0), [])
    if len(x) == 0 or x[-1] == 0:
        axis.plot([], [], style, color=color, label=name)
        return
    x, (mean, half) = x / UNITS[over[1]][0], np.array(points).T
    axis.plot(x, mean, style, color=color, lw=1.6, label=name)
    if np.isfinite(half).all():
        axis.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, lw=0)


def save(figure: plt.Figure, file: str) -> None:
    """With 256 colors, a third of the bytes; the lines keep theirs."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).quantize(256, Image.Quantize.MAXCOVERAGE).save(HERE / file, optimize=True)
    plt.close(figure)
