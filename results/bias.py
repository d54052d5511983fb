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
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the methods are one folder up
import common  # noqa: E402
from results.bias_pictures import draw_bias, draw_coefficients  # noqa: E402
from results.three_tokens import IDS, METHOD, PROBLEMS, RIGHT, TARGETS, TEXTS, N, Policy, T, policies, rows_of  # noqa: E402

MANY = 1e12  # groups of an update


# Variants -----------------------------------------------------------------------------------------
class Variant(NamedTuple):
    """A method as an update has it."""

    method: str  # its file
    layout: str = "group"
    flags: dict = {}
    writer: str = "now"  # who samples; old: before the last update, other: with noise on the weights
    rest: tuple = ()  # what its loss_fn takes beyond the others' arguments
    one_group: bool = False  # an update is one group, not many
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
    "division by std, dropping": {
        "plain: minus the group's mean": PLAIN,
        "divided by std": PLAIN._replace(flags=BARE | {"scale_by_std": True}),
        "equal groups dropped": PLAIN._replace(flags=BARE | {"zero_variance": "drop"}),
    },
    "division by length": {
        "divided by the row's tokens": PLAIN._replace(flags=BARE | {"loss_norm": "sequence"}),
        "by the tokens of one group": PLAIN._replace(flags=BARE | {"loss_norm": "token"}, one_group=True),
        "by the tokens of many groups": PLAIN._replace(flags=BARE | {"loss_norm": "token"}),
    },
    "rows of an older policy": {
        "older rows, no clip": PLAIN._replace(writer="old"),
        "older rows, clip 0.2": PLAIN._replace(writer="old", flags=BARE | CLIP),
        "older rows, clip 0.2, up 0.28": PLAIN._replace(writer="old", flags=BARE | CLIP | {"clip_high": 0.28}),
    },
    "a sampler that is off": {
        "sampler off, uncorrected": PLAIN._replace(writer="other", flags=BARE | {"tis_cap": 0.0}),
        "sampler off, TIS up to 2": PLAIN._replace(writer="other"),
        "sampler off, TIS, no cap": PLAIN._replace(writer="other", flags=BARE | {"tis_cap": 1e9}),
    },
    "a trace as a row": {
        "trace in the baseline alone": Variant("luffy", "group with trace", policy_part=True),
        "trace trained too, by p": Variant("luffy", "group with trace", {"gamma": -1.0}),
        "trace trained too, p / (p + 0.1)": Variant("luffy", "group with trace"),
    },
    "expert tokens as context": {
        "a hint of 1 token in 4": Variant("bread", "hint of 1", BARE),
        "a hint after a failure": Variant("bread", "anchor", BARE),
    },
    "methods: no expert target": {
        "grpo": Variant("grpo"),
        "dapo": Variant("dapo"),
        "bread": Variant("bread", "anchor"),
        "uft": Variant("uft", "hints"),
    },
    "methods: expert in the group": {
        "luffy": Variant("luffy", "group with trace"),
        "srft": Variant("srft", "group with trace"),
        "srft, pm1": Variant("srft", "group with trace", {"rollouts": "pm1"}),
        "prefix_rft": Variant("prefix_rft", "hybrid"),
        "trapo": Variant("trapo", "micro-groups"),
    },
    "methods: trace beside it": {
        "chord, mu 0.5": Variant("chord", "group and trace", rest=(0.5,)),
        "chord, phi": Variant("chord", "group and trace", {"phi": True}, rest=(0.1,)),
        "bridge, theta": Variant("bridge", "group and trace"),
        "hpt": Variant("hpt", "group or trace"),
        "relift, SFT step": Variant("relift", "trace after a failure"),
    },
    "methods: traces alone": {
        "sft": Variant("sft", "trace"),
        **{f"iw_sft, {w}": Variant("iw_sft", "trace", {"weight": w}) for w in WEIGHTS},
    },
}


# The expectation ----------------------------------------------------------------------------------
def fill(batch: common.Batch, rewards: Tensor, A: Tensor, old: Tensor, sampler: Tensor) -> common.Batch:
    """A batch in float64: rewards and advantages (B,), log-probabilities (B, T)."""
    row = {"rewards": rewards, "advantages": A, "token_advantages": A[:, None].expand(-1, T)}
    return dataclasses.replace(batch, old_logprobs=old, sampler_logprobs=sampler, **row)


def expected_push(v: Variant, now: Policy) -> tuple[Tensor, float]:
    """(-E[gradient], (18,); noise) of an update of a policy."""
    rows, writer = rows_of(v.layout), now.writer(v.writer)
    place, chances, written = rows.place, rows.chances(writer), writer.logprobs[rows.place]
    A = rows.advantages(getattr(v.cfg, "scale_by_std", False))
    batch = fill(rows.batch, rows.rewards, A, written if v.writer == "old" else now.logprobs[place], written)
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


# The table ----------------------------------------------------------------------------------------
SHOWN = (0, 6, 12)  # policies of the table
Measured = dict[str, list[tuple[float, float, float]]]  # of each variant, (cosine, bias, noise) at every policy


def alike(one: list, other: list) -> bool:
    """Cosine and bias to 0.05, noise to a tenth."""
    pairs = [(x, y) for i in SHOWN for x, y in zip(one[i], other[i], strict=True)]
    near = [abs(x - y) < (0.1 * max(x, y) if k % 3 == 2 else 0.05) for k, (x, y) in enumerate(pairs)]
    return all(near)


def table(found: Measured) -> str:
    """Markdown, at three policies; variants that are alike share a line, of the first's numbers."""
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


# The tokens of eight rows -------------------------------------------------------------------------
ROWS = {  # of the problem "ab": (completion, how many tokens are the expert's)
    "ab.\nright": ("ab.", 0),
    "bab.\nright": ("bab.", 0),
    "'.'\nwrong": (".", 0),
    "b.\nwrong": ("b.", 0),
    "ba.\nwrong": ("ba.", 0),
    "bbb.\nwrong": ("bbb.", 0),
    "aa|b.\nprefix,\nright": ("aab.", 2),
    "aab.\ntrace": ("aab.", 4),
}
GROUP, PREFIX, TRACE = (0, 1, 2, 3, 4, 5), (6,), (7,)
PANELS = {  # which of the rows a method has, and how many of them share a baseline
    "grpo: A / std": (Variant("grpo"), GROUP, 6),
    "dr.grpo: A, constant norm, the unbiased one": (PLAIN, GROUP, 6),
    "grpo, sequence norm: long rows get less a token": (Variant("grpo", flags={"loss_norm": "sequence"}), GROUP, 6),
    "dapo: grpo with more room upwards": (Variant("dapo"), GROUP, 6),
    "bread: prefix is context, never a target": (Variant("bread"), GROUP + PREFIX, 7),
    "uft: prefix is context, and 0.001 of a target": (Variant("uft"), GROUP + PREFIX, 7),
    "prefix_rft: A on the prefix too, where uncertain": (Variant("prefix_rft"), GROUP + PREFIX, 7),
    "trapo: min(1, p / 0.1) on prefixes, without A": (Variant("trapo"), GROUP + PREFIX + TRACE, 8),
    "luffy, unshaped: A p on the trace": (Variant("luffy", flags={"gamma": -1.0}), GROUP + TRACE, 8),
    "luffy: 0.1 A p / (p + 0.1)$^2$ on the trace": (Variant("luffy"), GROUP + TRACE, 8),
    "srft: luffy, trace imitated, pushes up 0.1": (Variant("srft"), GROUP + TRACE, 8),
    "srft, pm1: reward 1 or -1 in place of A": (Variant("srft", flags={"rollouts": "pm1"}), GROUP + TRACE, 8),
    "chord, mu: half GRPO, half SFT": (Variant("chord", rest=(0.5,)), GROUP + TRACE, 6),
    "chord, phi: 0.9 GRPO, 0.1 p (1 - p) SFT": (Variant("chord", flags={"phi": True}, rest=(0.1,)), GROUP + TRACE, 6),
    "bridge, theta: half GRPO, half SFT": (Variant("bridge"), GROUP + TRACE, 6),
    "hpt: trace of another problem, that failed": (Variant("hpt", flags={"group_size": 6}), GROUP + TRACE, 6),
    "relift: an SFT step on what failed, apart": (Variant("relift"), GROUP + TRACE, 6),
    "sft: every token alike": (Variant("sft"), TRACE, 0),
    "iw_sft: one weight a trace": (Variant("iw_sft"), TRACE, 0),
    "iw_sft, dft: p": (Variant("iw_sft", flags={"weight": "dft"}), TRACE, 0),
}


def pushes(v: Variant, used: tuple[int, ...], shared: int) -> dict[int, list[tuple[bool, float]]]:
    """Of each row that a method has, of every token: (whether it is the expert's, its push).

    The policy has a reward of 0.3. One token, the third of the second row, has a ratio of 1.25.
    """
    now, chosen = policies()[5], [list(ROWS.values())[i] for i in used]
    rollouts = [common.Rollout(PROBLEMS[1], IDS[TEXTS.index(text)], shown) for text, shown in chosen]
    place = (torch.ones(len(chosen), dtype=torch.long), torch.tensor([TEXTS.index(text) for text, _ in chosen]))
    rewards, A, old = RIGHT[place], torch.zeros(len(chosen), dtype=torch.float64), now.logprobs[place]
    if shared:
        A[:shared] = common.group_advantages(rewards[None, :shared], v.cfg.scale_by_std)[0]
        old[1, 2] -= math.log(1.25)
    batch = fill(common.make_batch(rollouts), rewards, A, old, old)
    own, whole = batch.policy_mask, ~batch.policy_mask.any(1)
    counts = common.Counts(*(x.sum().item() for x in (own, batch.expert_mask, ~whole, whole)))
    rows = zip(batch.expert_mask.tolist(), v.slopes(batch, place, now, counts).tolist(), batch.lengths, strict=True)
    return {i: list(zip(e[:n], s[:n], strict=True)) for i, (e, s, n) in zip(used, rows, strict=True)}


def draw(found: Measured) -> None:
    draw_bias(FAMILIES, found, [policy.reward().mean().item() for policy in policies()])
    draw_coefficients(list(ROWS), {title: pushes(*panel) for title, panel in PANELS.items()})


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    variants = {title: v for family in FAMILIES.values() for title, v in family.items()}
    found = {title: [measure(v, policy) for policy in policies()] for title, v in variants.items()}
    print(table(found))
    draw(found)


if __name__ == "__main__":
    main()
