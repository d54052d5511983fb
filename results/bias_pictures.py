"""The two figures of bias.py: drawing alone, every number comes from there."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:gray")
LOOKS = (  # what is drawn, between which limits, on which scale
    ("cosine with the\ntrue gradient", (-0.55, 1.1), "linear"),
    ("bias: share\nacross it", (8e-4, 1.4), "log"),
    ("noise / signal\nof one group", (0.5, 1e4), "log"),
)


def draw_bias(families: dict, found: dict[str, list], rewards: list[float]) -> None:
    """A family a column: (cosine, bias, noise) at every policy; what is off a scale at its edge."""
    figure = plt.figure(figsize=(17, 16), layout="constrained")
    names = list(families)
    for band, part in zip(figure.subfigures(2, 1), (names[:5], names[5:]), strict=True):
        grid = band.subplots(3, 5, sharex=True, sharey="row", height_ratios=(3, 2, 2))
        for column, family in enumerate(part):
            for which, (name, limits, scale) in enumerate(LOOKS):
                axis = grid[which, column]
                for k, title in enumerate(families[family]):
                    values = [min(max(value[which], limits[0]), limits[1]) for value in found[title]]
                    axis.plot(rewards, values, color=COLORS[k], lw=7 * 0.72**k, alpha=0.85, label=title)
                axis.set(ylim=limits, xscale="logit", yscale=scale)
                axis.set_xticks([0.001, 0.03, 0.5, 0.97, 0.999], ["0.001", "0.03", "0.5", "0.97", "0.999"])
                axis.minorticks_off()
                axis.grid(alpha=0.3)
                axis.set_ylabel("" if column else name, fontsize=12)
            legend = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.01), "frameon": False, "fontsize": 10.5}
            grid[0, column].legend(title=family, title_fontproperties={"weight": "bold", "size": 12}, **legend)
            grid[0, column].axhline(0, color="black", lw=0.6)
            grid[2, column].set_xlabel("expected reward of the policy", fontsize=11)
    save(figure, "bias.png")


def draw_coefficients(labels: list[str], panels: dict[str, dict[int, list[tuple[bool, float]]]]) -> None:
    """Rows that a method has: its tokens as (expert's, push); the others are grey."""
    figure, axes = plt.subplots(5, 4, figsize=(17, 15), sharex=True, sharey=True, layout="constrained")
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        largest = max(abs(push) for row in rows.values() for _, push in row)
        for i in range(len(labels)):
            if i not in rows:
                axis.axvspan(5 * i - 0.9, 5 * i + 3.9, color="0.9", lw=0)
            for t, (expert, push) in enumerate(rows.get(i, ())):
                color = "tab:orange" if expert else "tab:blue"
                axis.bar(5 * i + t, push / largest, 0.85, color=color)
                axis.plot(5 * i + t, 0, "x" if push == 0 else "", ms=5, mew=1.5, color=color)
        axis.axhline(0, color="black", lw=0.6)
        name, what = title.split(": ")
        axis.set_title(what, fontsize=11)
        above = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
        axis.annotate(name, (0.5, 1), (0, 20), weight="bold", fontsize=12, **above)
        axis.set(ylim=(-1.15, 1.15), yticks=(-1, 0, 1), xlim=(-1.2, 39.2))
        axis.set_xticks([5 * i + 1.5 for i in range(len(labels))], labels)
        axis.tick_params(axis="x", labelsize=9, length=0, labelbottom=True)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in ("tab:blue", "tab:orange", "0.9")]
    handles.append(plt.Line2D([], [], marker="x", color="black", ls="", mew=1.5))
    names = [
        "a token that the policy wrote",
        "a token that the expert wrote",
        "a row that the method has not",
        "no push: clipped, context, or certain",
    ]
    figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False, fontsize=13)
    figure.supylabel(
        "push on each token's log-probability (- d loss / d logprob; largest of the panel = 1)", fontsize=13
    )
    save(figure, "coefficients.png")


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=85)
    plt.close(figure)
