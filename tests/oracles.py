"""A small ragged micro-batch in float64, and slow scalar loops for the terms that losses share.

A term is (value, slope) in Python floats: one token's share of a loss, from the paper's equation,
and the derivative with respect to that token's log-probability. A loop gives {(row, column): term};
agree() compares their sum, and every slope, with autograd.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import common

LENGTHS, T, MAX = [5, 3, 7, 1], 7, 10  # completion tokens of the rows, columns, max_completion_tokens
EXPERT = {"mixed": [0, 3, 3, 0], "no expert": [0] * 4, "only expert": LENGTHS}  # expert tokens of the rows
NORMS = ["token", "sequence", "constant"]
Term = tuple[float, float]
Terms = dict[tuple[int, int], Term]


# The micro-batch ----------------------------------------------------------------------------------
@dataclass
class Case:
    """What a loss_fn is given. Every (B, T) tensor is float64 and 0 outside the rows."""

    batch: common.Batch
    logprobs: Tensor  # (B, T), a leaf with gradient
    entropy: Tensor  # (B, T)
    ref_logprobs: Tensor  # (B, T)
    counts: common.Counts  # of an optimizer step that has more rows than these, of every kind that these are of

    def tokens(self, *, expert: bool | None = None) -> list[tuple[int, int]]:
        """Places of all tokens, of the expert's alone, or of the policy's alone."""
        places = [(b, t) for b, n in enumerate(self.batch.lengths) for t in range(n)]
        return [place for place in places if expert is None or bool(self.batch.expert_mask[place]) == expert]

    def lp(self, b: int, t: int) -> float:
        return self.logprobs[b, t].item()

    def old(self, b: int, t: int) -> float:
        """Of the policy that made the row; where none is stored that is the policy as it is."""
        stored = self.batch.old_logprobs[b, t].item()
        return self.lp(b, t) if math.isnan(stored) else stored

    def advantage(self, b: int) -> float:
        return self.batch.advantages[b].item()


def ragged(rows: str = "mixed", kind: str = "mixed", seed: int = 0, stored: tuple[bool, ...] = (True,) * 4) -> Case:
    """Four rows of 5, 3, 7 and 1 tokens.

    rows: mixed (all the policy's; all the expert's; a prefix of 3 and its continuation; a single
    token), no expert, only expert. kind: mixed, extreme (p near 0 and near 1), right (rewards 1,
    advantages 0), wrong (rewards 0). stored: which rows have old log-probabilities.
    """
    draw = torch.Generator().manual_seed(seed)
    uniform, normal = (lambda f=f: f(4, T, generator=draw, dtype=torch.float64) for f in (torch.rand, torch.randn))
    logprobs = -3 * uniform()
    old = logprobs + 0.4 * normal()
    if kind == "extreme":
        logprobs[:, ::2], logprobs[:, 1::2] = -30.0, -1e-9
        old = logprobs + 0.1
    entropy, reference = uniform(), logprobs + 0.3 * normal()
    weights = 0.5 + 2 * uniform()  # old policy / sampler, on both sides of 1 and of the default cap
    rewards = {"right": [1.0] * 4, "wrong": [0.0] * 4}.get(kind, [1.0, 1.0, 0.0, 0.0])
    shifts = [0.1, 0.0, -0.1, -0.3] if kind == "mixed" else [0.0] * 4
    advantages = [r - sum(rewards) / 4 + shift for r, shift in zip(rewards, shifts, strict=True)]
    problem = common.Problem("p", "", [0], "", None)
    rollouts = [
        common.Rollout(
            problem,
            [b + 1] * LENGTHS[b],
            EXPERT[rows][b],
            [0.0] * (LENGTHS[b] - EXPERT[rows][b]),
            reward=rewards[b],
            advantage=advantages[b],
            prefix_advantage=advantages[b] + 0.5,
            old_logprobs=old[b, : LENGTHS[b]] if stored[b] else None,
        )
        for b in range(4)
    ]
    batch = common.make_batch(rollouts)
    inside, adv = batch.completion_mask, torch.tensor(advantages, dtype=torch.float64)
    kept = torch.where(torch.tensor(stored)[:, None], old, math.nan)
    batch = dataclasses.replace(
        batch,
        old_logprobs=torch.where(inside, kept, 0.0),
        sampler_logprobs=torch.where(batch.policy_mask, old - weights.log(), 0.0),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        advantages=adv,
        token_advantages=torch.where(batch.expert_mask, adv[:, None] + 0.5, adv[:, None]),
    )
    whole = sum(n == k for n, k in zip(LENGTHS, EXPERT[rows], strict=True))
    mine = (sum(LENGTHS) - sum(EXPERT[rows]), sum(EXPERT[rows]), 4 - whole, whole)
    counts = common.Counts(*(n + more if n else 0 for n, more in zip(mine, (7, 5, 2, 1), strict=True)))
    logprobs, entropy, reference = (torch.where(inside, x, 0.0) for x in (logprobs, entropy, reference))
    return Case(batch, logprobs.requires_grad_(), entropy, reference, counts)


def change(c: Case, **fields: object) -> Case:
    """A copy with other fields of the case or of its batch; new logprobs become a leaf."""
    own = {name: value for name, value in fields.items() if hasattr(c, name)}
    batch = dataclasses.replace(c.batch, **{name: value for name, value in fields.items() if name not in own})
    if "logprobs" in own:
        own["logprobs"] = own["logprobs"].detach().clone().requires_grad_()
    return dataclasses.replace(c, **{"batch": batch} | own)


def rearrange(c: Case, order: list[int], columns: int = 0) -> Case:
    """These rows in this order, with more columns of padding."""

    def move(x: object) -> object:
        if isinstance(x, list):
            return [x[i] for i in order if x]
        if not isinstance(x, torch.Tensor):  # the line, whose order is no matter of a loss
            return x
        return F.pad(x[order], (0, columns)) if x.ndim == 2 else x[order]

    fields = {f.name: getattr(c.batch, f.name) for f in dataclasses.fields(c.batch)}
    fields |= {name: getattr(c, name).detach() for name in ("logprobs", "entropy", "ref_logprobs")}
    return change(c, **{name: move(x) for name, x in fields.items()})


def settings(method: ModuleType, **flags: object) -> object:
    """The method's Config with the case's length limit."""
    return method.Config(**{"max_completion_tokens": MAX} | flags)


def loss(method: ModuleType, c: Case, cfg: object, *rest: object) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of the method's loss_fn; rest: what it takes beyond the others' arguments."""
    return method.loss_fn(cfg, c.batch, c.logprobs, c.entropy, c.ref_logprobs, c.counts, *rest)


def slope(value: Tensor, c: Case) -> Tensor:
    """The derivative with respect to every log-probability, (B, T); zeros where there is none."""
    (gradient,) = torch.autograd.grad(value, c.logprobs, retain_graph=True, allow_unused=True)
    return torch.zeros_like(c.logprobs) if gradient is None else gradient


def agree(c: Case, value: Tensor, terms: Terms, rel: float = 1e-9) -> None:
    """Assert that a loss is the sum of the terms and has their slopes, up to rel x the largest."""
    wanted, values = torch.zeros_like(c.logprobs), [value for value, _ in terms.values()]
    for place, term in terms.items():
        wanted[place] = term[1]
    assert value.item() == pytest.approx(sum(values), rel=rel, abs=rel * sum(map(abs, values)))
    assert torch.allclose(slope(value, c), wanted, rtol=rel, atol=rel * wanted.abs().max().item())


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Constants such as 1 / num_tokens in double precision too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# The terms ----------------------------------------------------------------------------------------
def add(*parts: tuple[float, Term]) -> Term:
    """The sum of weight x term."""
    return sum(weight * value for weight, (value, _) in parts), sum(weight * slope for weight, (_, slope) in parts)


def share(cfg: object, length: int, tokens: int, rows: int) -> float:
    """w: what a token counts in a row of this length, in a step with these tokens and rows."""
    rows, limit = max(rows, 1), cfg.max_completion_tokens
    return 1 / {"token": max(tokens, 1), "sequence": rows * length, "constant": rows * limit}[cfg.loss_norm]


def importance(c: Case, cfg: object, b: int, t: int) -> float:
    """v: min(old policy / sampler, cap); 1 on expert tokens and at cap 0."""
    if c.batch.expert_mask[b, t] or not cfg.tis_cap:
        return 1.0
    return min(math.exp(c.old(b, t) - c.batch.sampler_logprobs[b, t].item()), cfg.tis_cap)


def surrogate(c: Case, cfg: object, b: int, t: int, a: float, dual: float = 0.0) -> Term:
    """-v min(ratio A, clip(ratio) A); a negative A counts at most `dual` times."""
    ratio, v = math.exp(c.lp(b, t) - c.old(b, t)), importance(c, cfg, b, t)
    low = 1 - cfg.clip_low if cfg.clip_low >= 0 else -math.inf
    high = 1 + cfg.clip_high if cfg.clip_high >= 0 else math.inf
    bounded = min(max(ratio, low), high)
    value, slope = (ratio * a, ratio * a) if ratio * a <= bounded * a else (bounded * a, 0.0)
    if dual and a < 0 and value < dual * a:
        value, slope = dual * a, 0.0
    return -v * value, -v * slope


def kl(c: Case, cfg: object, b: int, t: int) -> Term:
    """Per-token KL to the reference; k1 has the value of the log-ratio and the slope of k2.

    k3 is at most 10, and has no slope there.
    """
    d = c.lp(b, t) - c.ref_logprobs[b, t].item()
    k3 = math.exp(-d) - 1 + d
    estimates = {"k1": (d, d), "k2": (d * d / 2, d), "k3": (k3, 1 - math.exp(-d)) if k3 < 10 else (10.0, 0.0)}
    return estimates[cfg.kl_estimator]


def entropy(c: Case, b: int, t: int) -> Term:
    """H of the policy there; a number, as long as nobody asks for its gradient."""
    return c.entropy[b, t].item(), 0.0


def regularised(c: Case, cfg: object, w: float, term: Term, b: int, t: int) -> Term:
    """w x (term + kl_coef KL - entropy_coef H), on a token that an online loss counts."""
    pull = kl(c, cfg, b, t) if cfg.kl_coef else (0.0, 0.0)
    return add((w, term), (w * cfg.kl_coef, pull), (-w * cfg.entropy_coef, entropy(c, b, t)))


def policy_terms(c: Case, cfg: object) -> Terms:
    """GRPO on the policy's tokens: the parent's loss, and the online half of UFT, CHORD and HPT."""
    places = c.tokens(expert=False)
    terms = {}
    for b, t in places:
        w = share(cfg, sum(row == b for row, _ in places), c.counts.policy, c.counts.rows)
        terms[b, t] = regularised(c, cfg, w, surrogate(c, cfg, b, t, c.advantage(b)), b, t)
    return terms


def likelihood_terms(c: Case, weight: float) -> Terms:
    """-weight log p on the expert's tokens."""
    return {(b, t): (-weight * c.lp(b, t), -weight) for b, t in c.tokens(expert=True)}
