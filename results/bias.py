"""Where each gradient points: every method's expected gradient, exact, in a world of three tokens.

All groups of the world in three_tokens.py are enumerated. Gradients are those of the method files'
own loss_fn, in an update of so many groups that its counts are what they are on average. Of them
there is, over policies from hopeless to solved along the gradient of mean log reward:

    cosine   of -E[gradient] and the true gradient of the expected reward
    bias     the part of E[gradient] across the true gradient / all of it: 0 where cosine is 1
    noise    trace of the covariance of one group's gradient / |E[gradient]|^2; / n with n groups

Entropy bonus and KL are off. How long a gradient is plays no part: AdamW divides it out.

    python results/bias.py        the table, bias.png and coefficients.png, under a minute
"""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # run as a script: the method files are one folder up
import common  # noqa: E402
from results.three_tokens import (  # noqa: E402
    IDS,
    METHOD,
    PROBLEMS,
    RIGHT,
    TARGETS,
    TEXTS,
    N,
    Policy,
    T,
    policies,
    rows_of,
)

MANY = 1e12  # groups of an update


# Variants -----------------------------------------------------------------------------------------
class Variant(NamedTuple):
    """A method as an update has it."""

    method: str  # its file
    layout: str = "group"
    flags: dict = {}
    writer: str = "now"  # who samples; old: before the last update, other: with noise on the weights
    rest: tuple = ()  # what its loss_fn takes beyond the others' arguments
    one_group: bool = False  # an update of one group
    policy_part: bool = False  # without the slopes of expert tokens

    @property
    def cfg(self):
        known = {field.name for field in dataclasses.fields(METHOD[self.method].Config)}
        shared = {"max_completion_tokens": T, "group_size": N}
        shared |= dict.fromkeys(("entropy_coef", "kl_coef", "sft_entropy_coef"), 0.0)
        return METHOD[self.method].Config(**{k: v for k, v in shared.items() if k in known} | self.flags)

    def slopes(self, batch, place: tuple[Tensor, Tensor], now: Policy, counts: common.Counts) -> Tensor:
        """(B, T): -d loss / d logprob of each token, what pushes its probability up."""
        module, cfg, logprobs = METHOD[self.method], self.cfg, now.logprobs[place].requires_grad_()
        reference = policies()[0].logprobs[place]  # of iw_sft.py: the model that the run started from
        loss, _ = module.loss_fn(cfg, batch, logprobs, now.entropy[place], reference, counts, *self.rest)
        if self.method == "relift":  # its SFT step beside its RL step
            loss = loss + module.sft_loss_fn(cfg, batch, logprobs, now.entropy[place], counts)[0]
        if self.method == "bridge":  # of theta, as its main mixes them
            loss = cfg.lam * loss - (1 - cfg.lam) * common.token_mean(logprobs, batch.expert_mask, counts.expert)
        slopes = -torch.autograd.grad(loss, logprobs)[0]
        return slopes.where(batch.policy_mask, 0.0) if self.policy_part else slopes


BARE = {"scale_by_std": False, "loss_norm": "constant", "clip_low": -1.0, "clip_high": -1.0}
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
WEIGHTS = ("iw", "iw_step", "dft", "trsft", "chord_phi", "pear")
PLAIN = Variant("grpo", flags=BARE)  # the unbiased one, up to the factor (N - 1) / N
FAMILIES = {  # one thing at a time is switched on; then each method as its file has it
    "division by std, equal groups": {
        "plain: minus the group's mean": PLAIN,
        "divided by std": PLAIN._replace(flags=BARE | {"scale_by_std": True}),
        "equal groups dropped": PLAIN._replace(flags=BARE | {"zero_variance": "drop"}),
    },
    "division by length": {
        "by the row's tokens": PLAIN._replace(flags=BARE | {"loss_norm": "sequence"}),
        "by the tokens of one group": PLAIN._replace(flags=BARE | {"loss_norm": "token"}, one_group=True),
        "by the tokens of many groups": PLAIN._replace(flags=BARE | {"loss_norm": "token"}),
    },
    "rows of the policy before": {
        "ratio, no clip": PLAIN._replace(writer="old"),
        "clip 0.2": PLAIN._replace(writer="old", flags=BARE | CLIP),
        "clip 0.2, upwards 0.28": PLAIN._replace(writer="old", flags=BARE | CLIP | {"clip_high": 0.28}),
    },
    "rows of a sampler that is off": {
        "uncorrected": PLAIN._replace(writer="other", flags=BARE | {"tis_cap": 0.0}),
        "TIS, at most 2": PLAIN._replace(writer="other"),
        "TIS without a cap": PLAIN._replace(writer="other", flags=BARE | {"tis_cap": 1e9}),
    },
    "the expert's trace as a row": {
        "in the baseline alone": Variant("luffy", "group with trace", policy_part=True),
        "trained too, f(p) = p": Variant("luffy", "group with trace", {"gamma": -1.0}),
        "trained too, f(p) = p / (p + 0.1)": Variant("luffy", "group with trace"),
    },
    "expert tokens as context": {
        "a hint of 1 token": Variant("bread", "hint of 1", BARE),
        "a hint of 2 tokens": Variant("bread", "hint of 2", BARE),
        "a hint after a failure": Variant("bread", "anchor", BARE),
    },
    "methods without an expert target": {
        "grpo": Variant("grpo"),
        "dapo": Variant("dapo"),
        "bread": Variant("bread", "anchor"),
        "uft": Variant("uft", "hints"),
    },
    "methods with expert tokens in the group": {
        "luffy": Variant("luffy", "group with trace"),
        "srft": Variant("srft", "group with trace"),
        "srft, pm1": Variant("srft", "group with trace", {"rollouts": "pm1"}),
        "prefix_rft": Variant("prefix_rft", "hybrid"),
        "trapo": Variant("trapo", "micro-groups"),
    },
    "methods with traces beside the group": {
        "chord, mu 0.5": Variant("chord", "group and trace", rest=(0.5,)),
        "chord, phi": Variant("chord", "group and trace", {"phi": True}, rest=(0.1,)),
        "bridge, theta": Variant("bridge", "group and trace"),
        "hpt": Variant("hpt", "group or trace"),
        "relift, SFT step": Variant("relift", "trace after a failure"),
    },
    "methods of traces alone": {
        "sft": Variant("sft", "trace"),
        **{f"iw_sft, {w}": Variant("iw_sft", "trace", {"weight": w}) for w in WEIGHTS},
    },
}


# The expectation ----------------------------------------------------------------------------------
def expected_push(v: Variant, now: Policy) -> tuple[Tensor, float]:
    """(-E[gradient], (18,); noise) of an update of a policy."""
    rows, writer = rows_of(v.layout), now.writer(v.writer)
    place, chances, written = rows.place, rows.chances(writer), writer.logprobs[rows.place]
    A = rows.advantages(getattr(v.cfg, "scale_by_std", False))
    batch = dataclasses.replace(
        rows.batch,
        old_logprobs=written if v.writer == "old" else now.logprobs[place],
        sampler_logprobs=written,
        rewards=rows.rewards,
        advantages=A,
        token_advantages=A[:, None].expand(-1, T),
    )
    mask = batch.policy_mask
    drop = getattr(v.cfg, "zero_variance", "keep") == "drop"
    kept = rows.sums(A.abs())[rows.group] > 0 if drop else mask.any(1)
    counts = torch.stack([mask.sum(1) * kept, batch.expert_mask.sum(1), mask.any(1) * kept, ~mask.any(1)], 1)
    counts = rows.sums(counts.double()) if v.one_group else MANY * (chances @ rows.sums(counts.double()))[None]
    pushes = 0.0
    for count in counts.unique(dim=0):
        slopes = v.slopes(batch, place, now, common.Counts(*count.tolist()))
        slopes = slopes.where((counts == count).all(1)[rows.group if v.one_group else [0]][:, None], 0.0)
        pushes = pushes + rows.sums((slopes[..., None] * now.scores[place]).sum(1))
    mean = chances @ pushes
    noise = (chances @ pushes.square().sum(1) / mean.square().sum() - 1).item()
    return mean * (1 if v.one_group else MANY), max(noise, 0.0)


def measure(v: Variant, now: Policy) -> tuple[float, float, float]:
    """(cosine, bias, noise)"""
    (push, noise), true = expected_push(v, now), now.true_gradient()
    along = push @ true / true.square().sum() * true
    return torch.cosine_similarity(push, true, dim=0).item(), ((push - along).norm() / push.norm()).item(), noise


# The pictures -------------------------------------------------------------------------------------
SHOWN = (0, 6, 12)  # policies of the table
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:gray")
Measured = dict[str, list[tuple[float, float, float]]]  # of each variant, (cosine, bias, noise) at every policy


def alike(one: list, other: list) -> bool:
    """Cosine and bias to 0.02, noise to a tenth."""
    pairs = [(x, y) for i in SHOWN for x, y in zip(one[i], other[i], strict=True)]
    near = [abs(x - y) < (0.1 * max(x, y) if k % 3 == 2 else 0.02) for k, (x, y) in enumerate(pairs)]
    return all(near)


def table(found: Measured) -> str:
    """Markdown, at three policies; variants that are alike share a line, with the first's numbers."""
    lines: list[list[str]] = []
    for title in found:
        line = next((line for line in lines if alike(found[line[0]], found[title])), [])
        line.append(title)
        lines += [line] if len(line) == 1 else []
    heads = [f"{name} at {TARGETS[i]:g}" for name in ("cosine (bias)", "noise") for i in SHOWN]
    rows = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for titles in lines:
        values = [found[titles[0]][i] for i in SHOWN]
        cells = [f"{cosine:.2f} ({bias:.2f})" for cosine, bias, _ in values]
        cells += [
            f"{noise:.1f}" if noise < 10 else f"{noise:.0f}" if noise < 1e5 else f"{noise:.0e}" for *_, noise in values
        ]
        rows.append(f"| {'; '.join(titles)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw_bias(found: Measured) -> None:
    """Small multiples: a family a column, cosine, bias and noise below each other."""
    figure = plt.figure(figsize=(17, 15), layout="constrained")
    rewards = [policy.reward().mean().item() for policy in policies()]
    ticks = [0.001, 0.03, 0.5, 0.97, 0.999]
    looks = (("cosine", (-0.5, 1.08), "linear"), ("bias", (8e-4, 1.4), "log"), ("noise of a group", (0.5, 1e4), "log"))
    for band, part in zip(figure.subfigures(2, 1), (list(FAMILIES)[:5], list(FAMILIES)[5:]), strict=True):
        grid = band.subplots(3, 5, sharex=True, sharey="row", height_ratios=(3, 2, 2))
        for column, family in enumerate(part):
            for which, (name, limits, scale) in enumerate(looks):
                axis = grid[which, column]
                for k, (title, color) in enumerate(zip(FAMILIES[family], COLORS, strict=False)):
                    values = [min(max(value[which], limits[0]), limits[1]) for value in found[title]]
                    axis.plot(rewards, values, color=color, lw=4 - 0.5 * k, alpha=0.8, label=title)
                axis.set(ylim=limits, xscale="logit", yscale=scale)
                axis.set_xticks(
                    [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999], ["0.001", "", "0.1", "0.5", "0.9", "", "0.999"]
                )
                axis.minorticks_off()
                axis.grid(alpha=0.3)
                axis.set_ylabel(name if not column else "")
            legend = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.01), "frameon": False, "fontsize": 9}
            grid[0, column].legend(title=family, title_fontproperties={"weight": "bold"}, **legend)
            grid[2, column].set_xlabel("expected reward of the policy")
    figure.savefig(HERE / "bias.png", dpi=90)
    plt.close(figure)


EXAMPLE = [("ab.", 0), ("bab.", 0), (".", 0), ("b.", 0), ("ba.", 0), ("bbb.", 0), ("aab.", 2), ("aab.", 4)]
OWN, PREFIX, TRACE = range(6), (6,), (7,)  # rows of the policy's alone, with an expert prefix, of the expert's alone
PANELS = {  # what a method uses of the eight rows, of which its baseline has `first`
    "grpo\nA / std, mean over tokens": (Variant("grpo"), (*OWN,), 6),
    "dr.grpo\nA, constant norm: the unbiased one": (PLAIN, (*OWN,), 6),
    "dapo\ngrpo with more room upwards": (Variant("dapo"), (*OWN,), 6),
    "bread\nprefix is context, never a target": (Variant("bread"), (*OWN, *PREFIX), 7),
    "uft\nprefix is context, and 0.001 of a target": (Variant("uft"), (*OWN, *PREFIX), 7),
    "prefix_rft\nA on its most uncertain prefix tokens": (Variant("prefix_rft"), (*OWN, *PREFIX), 7),
    "trapo\nprefixes by min(1, p / 0.1), whatever A": (Variant("trapo"), (*OWN, *PREFIX, *TRACE), 8),
    "luffy\ntrace by A 0.1 p / (p + 0.1)^2": (Variant("luffy"), (*OWN, *TRACE), 8),
    "srft\nluffy, traces imitated, few pushes up": (Variant("srft"), (*OWN, *TRACE), 8),
    "chord, mu 0.5\nhalf GRPO, half SFT": (Variant("chord", rest=(0.5,)), (*OWN, *TRACE), 6),
    "bridge, theta\nhalf GRPO, half SFT": (Variant("bridge"), (*OWN, *TRACE), 6),
    "hpt\ntrace of another problem, which failed": (Variant("hpt", flags={"group_size": 6}), (*OWN, *TRACE), 6),
    "relift\nRL step, and SFT step on what failed": (Variant("relift"), (*OWN, *TRACE), 6),
    "sft\ntrace alone": (Variant("sft"), TRACE, 0),
    "iw_sft\ntrace alone, one weight for all of it": (Variant("iw_sft"), TRACE, 0),
    "iw_sft, dft\ntrace alone, by p": (Variant("iw_sft", flags={"weight": "dft"}), TRACE, 0),
}


def example_slopes(v: Variant, used: tuple[int, ...], shared: int) -> tuple[common.Batch, Tensor]:
    """(batch, (B, T) pushes) of the rows that a method uses; the first `shared` have a baseline."""
    now, chosen = policies()[5], [EXAMPLE[i] for i in used]
    rollouts = [common.Rollout(PROBLEMS[1], IDS[TEXTS.index(text)], shown) for text, shown in chosen]
    place = (torch.ones(len(chosen), dtype=torch.long), torch.tensor([TEXTS.index(text) for text, _ in chosen]))
    A, old = torch.zeros(len(chosen), dtype=torch.float64), now.writer("old").logprobs[place]
    if shared:
        rewards = RIGHT[place][:shared]
        A[:shared] = common.group_advantages(rewards[None], v.cfg.scale_by_std)[0]
    batch = dataclasses.replace(
        common.make_batch(rollouts),
        old_logprobs=old,
        sampler_logprobs=old,
        rewards=RIGHT[place],
        advantages=A,
        token_advantages=A[:, None].expand(-1, T),
    )
    own, whole = batch.policy_mask, ~batch.policy_mask.any(1)
    counts = common.Counts(*(x.sum().item() for x in (own, batch.expert_mask, ~whole, whole)))
    return batch, v.slopes(batch, place, now, counts)


def draw_coefficients() -> None:
    """The same eight rows under every method: what pushes each token, policy's and expert's."""
    figure, axes = plt.subplots(4, 4, figsize=(17, 12), sharex=True, sharey=True, layout="constrained")
    names = [text if not shown or shown == len(text) else f"{text[:shown]}|{text[shown:]}" for text, shown in EXAMPLE]
    for axis, (title, (v, used, shared)) in zip(axes.flat, PANELS.items(), strict=True):
        batch, slopes = example_slopes(v, used, shared)
        scale = slopes.abs().max()
        for i in set(range(len(EXAMPLE))) - set(used):
            axis.axvspan(5 * i - 0.9, 5 * i + 3.9, color="0.9", lw=0)
        for b, i in enumerate(used):
            for t in range(batch.lengths[b]):
                expert, height = bool(batch.expert_mask[b, t]), (slopes[b, t] / scale).item()
                axis.bar(5 * i + t, height, 0.85, color="tab:orange" if expert else "tab:blue")
                if not height:
                    axis.plot(5 * i + t, 0, ".", ms=4, color="tab:orange" if expert else "tab:blue")
        axis.axhline(0, color="black", lw=0.6)
        axis.set_title(title, fontsize=10)
        axis.set(ylim=(-1.15, 1.15), yticks=(-1, 0, 1), xlim=(-1.2, 39.2))
        marks = ["right" if RIGHT[1, TEXTS.index(text)] else "wrong" for text, _ in EXAMPLE]
        marks[6:] = ["prefix,\nright", "trace"]
        axis.set_xticks([5 * i + 1.5 for i in range(8)], [f"{n}\n{m}" for n, m in zip(names, marks, strict=True)])
        axis.tick_params(axis="x", labelsize=8, length=0)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in ("tab:blue", "tab:orange", "0.9")]
    labels = ["token that the policy wrote", "token that the expert wrote", "row that the method has not"]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    figure.supylabel("push on the token's log-probability, - d loss / d logprob, largest of the panel = 1")
    figure.savefig(HERE / "coefficients.png", dpi=90)
    plt.close(figure)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    found = {
        title: [measure(v, policy) for policy in policies()]
        for family in FAMILIES.values()
        for title, v in family.items()
    }
    print(table(found))
    draw_bias(found)
    draw_coefficients()


if __name__ == "__main__":
    main()
