"""The losses of the mixed methods against scalar loops written from their equations: value, gradient, and what each flag does.

A loop goes over tokens in Python floats and returns, per token, its share of the loss and the derivative with respect to log p[t].
The rows mix expert and policy tokens: all policy, all expert, a prefix and its continuation, a single token.
"""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import chord
import common
import hpt
import luffy
import prefix_rft
import relift
import srft
import trapo
import uft

LENGTHS, EXPERT, T, MAX = [5, 3, 7, 1], [0, 3, 3, 0], 7, 10
ROWS = {"mixed": (LENGTHS, EXPERT), "no expert": (LENGTHS, [0] * 4), "only expert": (LENGTHS, LENGTHS)}
NORMS = ["token", "sequence", "constant"]


class Case:
    """Tensors of one micro-batch and the same as lists."""

    def __init__(self, rows: str = "mixed", kind: str = "mixed", seed: int = 0):
        torch.manual_seed(seed)
        lengths, expert = ROWS[rows]
        self.mask = torch.tensor([[t < n for t in range(T)] for n in lengths])
        self.expert = torch.tensor([[t < k for t in range(T)] for k in expert])
        lp = -3 * torch.rand(4, T, dtype=torch.float64)
        old = lp + 0.4 * torch.randn(4, T, dtype=torch.float64)
        if kind == "extreme":  # p near 0 and near 1
            lp[:, ::2], lp[:, 1::2] = -30.0, -1e-9
            old = lp + 0.1
        self.lp, self.old = lp.requires_grad_(), old
        self.rewards = torch.tensor({"right": [1.0] * 4, "wrong": [0.0] * 4}.get(kind, [1.0, 1.0, 0.0, 0.0]), dtype=torch.float64)
        self.adv = self.rewards - self.rewards.mean() + (torch.tensor([0.1, 0, -0.1, -0.3]) if kind == "mixed" else 0)
        self.ent, self.ref = torch.rand(4, T, dtype=torch.float64), lp.detach() + 0.3 * torch.randn(4, T, dtype=torch.float64)
        self.imp = torch.where(self.expert, 1.0, 0.5 + torch.rand(4, T, dtype=torch.float64))  # 1 on expert tokens, as common's
        self.lengths, self.num_expert = lengths, sum(expert)
        self.total = sum(lengths)

    def tokens(self):
        return [(b, t) for b in range(4) for t in range(self.lengths[b])]


def share(norm: str, length: int, tokens: int, rows: int) -> float:
    return {"token": 1 / max(tokens, 1), "sequence": 1 / (rows * max(length, 1)), "constant": 1 / (rows * MAX)}[norm]


def ppo(c: Case, b: int, t: int, a: float, low: float, high: float, dual: float = 0.0) -> tuple[float, float]:
    """(-min(ratio A, clip(ratio) A), its slope), times the importance; a negative A counts at most `dual` times."""
    lp, old, imp = c.lp[b, t].item(), c.old[b, t].item(), c.imp[b, t].item()
    ratio = math.exp(lp - old)
    bounded = min(max(ratio, 1 - low if low >= 0 else -math.inf), 1 + high if high >= 0 else math.inf)
    value, slope = (ratio * a, ratio * a) if ratio * a <= bounded * a else (bounded * a, 0.0)
    if dual and a < 0 and value < dual * a:
        value, slope = dual * a, 0.0
    return -imp * value, -imp * slope


def k3(c: Case, b: int, t: int) -> tuple[float, float]:
    d = (c.lp[b, t] - c.ref[b, t]).item()
    return math.exp(-d) - 1 + d, 1 - math.exp(-d)


def compare(c: Case, loss: torch.Tensor, terms: dict[tuple[int, int], tuple[float, float]]) -> None:
    (gradient,) = torch.autograd.grad(loss, c.lp, retain_graph=True)
    slow = torch.zeros(4, T, dtype=torch.float64)
    for place, (_, slope) in terms.items():
        slow[place] = slope
    assert loss.item() == pytest.approx(sum(value for value, _ in terms.values()), rel=1e-5, abs=1e-9)
    assert torch.allclose(gradient, slow, rtol=1e-6, atol=1e-9)


def add(*parts: tuple[float, tuple[float, float]]) -> tuple[float, float]:
    return tuple(sum(weight * part[i] for weight, part in parts) for i in (0, 1))


GRID = [
    (rows, kind, norm, clip, extra)
    for rows, kind in [
        ("mixed", "mixed"),
        ("mixed", "extreme"),
        ("mixed", "right"),
        ("mixed", "wrong"),
        ("no expert", "mixed"),
        ("only expert", "mixed"),
    ]
    for norm in NORMS
    for clip, extra in [((-1, -1), (0.0, 0.0)), ((0.2, 0.28), (0.3, 0.1))]
]


def run_luffy(c: Case, norm="constant", clip=(-1, -1), gamma=0.1, kl=0.0, ent=0.0, tokens=None):
    tokens = c.total if tokens is None else tokens
    return luffy.loss_fn(
        c.lp, c.old, c.adv, c.imp, c.ent, c.ref, c.mask, c.expert, tokens, 4, MAX, norm, *clip, gamma, kl, "k3", ent
    )[0]


@pytest.mark.parametrize(("rows", "kind", "norm", "clip", "extra"), GRID)
@pytest.mark.parametrize("gamma", [0.1, 0.5, -1.0])
def test_luffy(rows, kind, norm, clip, extra, gamma):
    """2.2: -A p / (p + gamma) on expert tokens, never clipped; -A ratio on the others; Z the tokens of both (2.7.1 and 2.7.3)."""
    c, (kl, ent), terms = Case(rows, kind), extra, {}
    for b, t in c.tokens():
        a, p = c.adv[b].item(), math.exp(c.lp[b, t].item())
        value, slope = (p / (p + gamma), gamma * p / (p + gamma) ** 2) if gamma >= 0 else (p, p)
        term = (-a * value, -a * slope) if c.expert[b, t] else ppo(c, b, t, a, *clip)
        w = share(norm, c.lengths[b], c.total, 4)
        terms[b, t] = add((w, term), (kl * w, k3(c, b, t)), (-ent * w, (c.ent[b, t].item(), 0)))
    compare(c, run_luffy(c, norm, clip, gamma, kl, ent), terms)


def test_luffy_coefficient_peaks_at_gamma():
    """At most A / 4, reached at p = gamma; the shaping beats plain p below sqrt(gamma) - gamma. The spec's table for 0.1."""
    c = Case("only expert")
    for p, wanted in [(1e-3, 0.0098), (0.1, 0.25), (0.5, 0.139), (1.0, 0.0826)]:
        c.lp, c.adv = torch.full((4, T), math.log(p), dtype=torch.float64, requires_grad=True), torch.ones(4, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(run_luffy(c), c.lp)
        assert -gradient[0, 0].item() * 4 * MAX == pytest.approx(wanted, abs=2e-4)
    c.lp = torch.full((4, T), math.log(math.sqrt(0.1) - 0.1), dtype=torch.float64, requires_grad=True)
    one, two = (torch.autograd.grad(run_luffy(c, gamma=g), c.lp)[0][0, 0].item() for g in (0.1, -1.0))
    assert one == pytest.approx(two)


def test_luffy_limits_and_what_does_not_matter():
    """2.7.3: gamma -> infinity times gamma is the plain p; 2.7.4: gamma -> 0 over gamma is 1 / p; 2.7.7."""
    c = Case("only expert")
    slope = {g: torch.autograd.grad(run_luffy(c, gamma=g), c.lp)[0] for g in (1e6, 1e-9, -1.0)}
    assert torch.allclose(slope[1e6] * 1e6, slope[-1.0], rtol=1e-4)
    assert torch.allclose(slope[1e-9] / 1e-9 * c.lp.detach().exp() ** 2, slope[-1.0], rtol=1e-4)
    one, c.old = run_luffy(c), c.old + 3
    assert run_luffy(c) == one
    rewards = torch.tensor([[1.0] + [0.0] * 7])  # 2.7.6
    assert common.group_advantages(rewards, False)[0].tolist() == [7 / 8] + [-1 / 8] * 7


def test_srft_weights():
    """4.7.1: 0.5 and 0.1 without uncertainty, 0.184 and 0.272 at one nat; 4.7.5: pm1 does not hang on the other rows."""
    for entropy, sft_weight, up in ((0.0, 0.5, 0.1), (1.0, 0.184, 0.272)):
        c = Case("no expert", "right")
        c.ent = torch.full_like(c.ent, entropy)
        for advantages in (c.adv, c.adv + 5):
            c.adv = advantages
            (gradient,) = torch.autograd.grad(run_srft(c, rollouts="pm1"), c.lp)
            assert torch.allclose(gradient[c.mask], -(up * c.imp / (4 * MAX))[c.mask], rtol=2e-3)
        c = Case("only expert", "right")
        c.ent, c.adv = torch.full_like(c.ent, entropy), torch.zeros_like(c.adv)
        (gradient,) = torch.autograd.grad(run_srft(c), c.lp)
        assert torch.allclose(gradient[c.mask] * c.num_expert, torch.tensor(-sft_weight).double(), rtol=2e-3)


def test_prefix_rft_is_luffy_unshaped_on_the_prefix():
    """5.7.7: with pi_old = 1 there, no clip and no filter; 5.7.2: keep 0 leaves the prefix without gradient."""
    c = Case()
    c.old = torch.where(c.expert, 0.0, c.old)
    rest = (c.total, 4, MAX, "constant", -1, -1, 0.0, 1.0, "row", 0.0, "k3", 0.0)
    loss = prefix_rft.loss_fn(c.lp, c.old, c.adv, c.adv, c.imp, c.ent, c.ref, c.mask, c.expert, *rest)[0]
    one, two = (torch.autograd.grad(x, c.lp)[0] for x in (loss, run_luffy(c, gamma=-1.0)))
    assert torch.allclose(one, two) and (one[c.expert] != 0).all()
    assert (torch.autograd.grad(run_prefix(c, keep=0.0), c.lp)[0][c.expert] == 0).all()


SRFT = {
    "rollouts": "adv",
    "positive_coef": 0.1,
    "positive_entropy_sign": 1,
    "sft_coef": 0.5,
    "sft_entropy_sign": -1,
    "entropy_scope": "row",
    "gamma": 0.1,
}


def run_srft(c: Case, norm="constant", clip=(-1, -1), kl=0.0, ent=0.0, **flags):
    rest = (c.total, c.num_expert, 4, MAX, norm, *clip, *(SRFT | flags).values(), kl, "k3", ent)
    return srft.loss_fn(c.lp, c.old, c.adv, c.rewards, c.imp, c.ent, c.ref, c.mask, c.expert, *rest)[0]


@pytest.mark.parametrize(("rows", "kind", "norm", "clip", "extra"), GRID)
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"rollouts": "pm1", "gamma": -1.0},
        {"entropy_scope": "token", "sft_entropy_sign": 1, "positive_entropy_sign": -1},
        {"sft_entropy_sign": 0, "positive_entropy_sign": 0},
    ],
)
def test_srft(rows, kind, norm, clip, extra, flags):
    """Equations 8, 10 to 13 and the code's variant: the entropy weights are constants."""
    c, (kl, ent), terms = Case(rows, kind), extra, {}
    f = SRFT | flags
    for b, t in c.tokens():
        own = [c.ent[b, j].item() for j in range(c.lengths[b])]
        h = c.ent[b, t].item() if f["entropy_scope"] == "token" else sum(own) / len(own)
        a, lp, imp = c.adv[b].item(), c.lp[b, t].item(), c.imp[b, t].item()
        p, w = math.exp(lp), share(norm, c.lengths[b], c.total, 4)
        up = f["positive_coef"] * math.exp(f["positive_entropy_sign"] * h)
        if c.expert[b, t]:
            shaped = (p / (p + f["gamma"]), f["gamma"] * p / (p + f["gamma"]) ** 2) if f["gamma"] >= 0 else (p, p)
            pull = f["sft_coef"] * math.exp(f["sft_entropy_sign"] * h) / c.num_expert
            term = add((-w * a, shaped), (-pull, (lp, 1.0)))
        elif f["rollouts"] == "adv":
            term = add((w * (up if a > 0 else 1.0), ppo(c, b, t, a, *clip)))
        else:
            term = add((-w * imp * (up if c.rewards[b] == 1 else -1.0), (lp, 1.0)))
        terms[b, t] = add((1, term), (kl * w, k3(c, b, t)), (-ent * w, (c.ent[b, t].item(), 0)))
    compare(c, run_srft(c, norm, clip, kl, ent, **flags), terms)


def run_prefix(c: Case, norm="constant", clip=(0.2, 0.2), dual=3.0, keep=0.2, scope="row", kl=0.0, ent=0.0):
    prefix_adv = c.adv + 0.5
    rest = (c.total, 4, MAX, norm, *clip, dual, keep, scope, kl, "k3", ent)
    return prefix_rft.loss_fn(c.lp, c.old, c.adv, prefix_adv, c.imp, c.ent, c.ref, c.mask, c.expert, *rest)[0]


@pytest.mark.parametrize(("rows", "kind", "norm", "clip", "extra"), GRID)
@pytest.mark.parametrize(
    ("dual", "keep", "scope"), [(3.0, 0.2, "row"), (0.0, 1.0, "row"), (1.5, 0.5, "microbatch"), (1.2, 0.0, "row")]
)
def test_prefix_rft(rows, kind, norm, clip, extra, dual, keep, scope):
    """Only the kept prefix tokens carry an advantage, all tokens count in the norm; ratio and clip as on policy tokens."""
    c, (kl, ent), terms = Case(rows, kind), extra, {}
    pools = [[(b, t) for t in range(T) if c.expert[b, t]] for b in range(4)]
    pools = pools if scope == "row" else [sum(pools, [])]
    kept = set()
    for pool in pools:
        count = math.ceil(round(keep * len(pool), 9))
        kept |= set(sorted(pool, key=lambda place: -c.ent[place].item())[:count])
    for b, t in c.tokens():
        w, prefix = share(norm, c.lengths[b], c.total, 4), bool(c.expert[b, t])
        a = c.adv[b].item() + 0.5 if (b, t) in kept else 0.0 if prefix else c.adv[b].item()
        terms[b, t] = add((w, ppo(c, b, t, a, *clip, dual)), (kl * w, k3(c, b, t)), (-ent * w, (c.ent[b, t].item(), 0)))
    compare(c, run_prefix(c, norm, clip, dual, keep, scope, kl, ent), terms)


def policy_part(c: Case, norm: str, clip: tuple, kl: float, ent: float, rows: int = 4) -> dict:
    """GRPO on the policy tokens alone: what UFT, CHORD and HPT have in common."""
    terms, tokens = {}, c.total - c.num_expert
    for b, t in c.tokens():
        if c.expert[b, t]:
            terms[b, t] = (0.0, 0.0)
            continue
        w = share(norm, sum(not c.expert[b, j] for j in range(c.lengths[b])), tokens, rows)
        terms[b, t] = add((w, ppo(c, b, t, c.adv[b].item(), *clip)), (kl * w, k3(c, b, t)), (-ent * w, (c.ent[b, t].item(), 0)))
    return terms


def run_uft(c: Case, norm="token", clip=(0.2, 0.2), coef=0.001, hint_norm="mean", kl=0.001, ent=0.0):
    policy, tokens = c.mask & ~c.expert, c.total - c.num_expert
    rest = (tokens, c.num_expert, 4, MAX, norm, *clip, coef, hint_norm, kl, "k3", ent)
    return uft.loss_fn(c.lp, c.old, c.adv, c.imp, c.ent, c.ref, policy, c.expert, *rest)[0]


@pytest.mark.parametrize(("rows", "kind", "norm", "clip", "extra"), GRID)
@pytest.mark.parametrize(("coef", "hint_norm"), [(0.001, "mean"), (0.7, "sum"), (0.0, "mean")])
def test_uft(rows, kind, norm, clip, extra, coef, hint_norm):
    """Hint tokens have likelihood only, policy tokens GRPO and KL only; both means are their own."""
    c = Case(rows, kind)
    terms = policy_part(c, norm, clip, *extra)
    for b, t in c.tokens():
        if c.expert[b, t]:
            w = coef / (c.num_expert if hint_norm == "mean" else 4)
            terms[b, t] = (-w * c.lp[b, t].item(), -w)
    compare(c, run_uft(c, norm, clip, coef, hint_norm, *extra), terms)


def run_chord(c: Case, norm="token", clip=(0.2, 0.2), mu=0.5, phi=False, kl=0.0, ent=0.0):
    policy, tokens = c.mask & ~c.expert, c.total - c.num_expert
    rest = (tokens, c.num_expert, 4, MAX, norm, *clip, mu, phi, kl, "k3", ent)
    return chord.loss_fn(c.lp, c.old, c.adv, c.imp, c.ent, c.ref, policy, c.expert, *rest)[0]


@pytest.mark.parametrize(("rows", "kind", "norm", "clip", "extra"), GRID)
@pytest.mark.parametrize(("mu", "phi"), [(0.3, False), (0.9, True), (0.0, False), (1.0, True)])
def test_chord(rows, kind, norm, clip, extra, mu, phi):
    """(1 - mu) GRPO + mu SFT; phi weights a token by p (1 - p), constant, at most 1 / 4."""
    c = Case(rows, kind)
    terms = {place: add((1 - mu, term)) for place, term in policy_part(c, norm, clip, *extra).items()}
    for b, t in c.tokens():
        if c.expert[b, t]:
            p = math.exp(c.lp[b, t].item())
            w = mu * (p * (1 - p) if phi else 1.0) / c.num_expert
            terms[b, t] = (-w * c.lp[b, t].item(), -w)
    compare(c, run_chord(c, norm, clip, mu, phi, *extra), terms)


def test_chord_schedule():
    mu = [chord.sft_share(step, 0.9, 0.05, 10, 100) for step in range(200)]
    assert mu[0] == pytest.approx(0.09) and mu[9] == mu[10] == pytest.approx(0.9) and mu[60] == pytest.approx((0.9 + 0.05) / 2)
    assert mu[110] == mu[199] == pytest.approx(0.05) and all(a >= b for a, b in itertools.pairwise(mu[10:]))
    assert chord.sft_share(0, 0.9, 0.05, 0, 200) == 0.9 and chord.sft_share(5, 0.1, 0.1, 0, 200) == pytest.approx(0.1)


def run_hpt(c: Case, norm="constant", clip=(-1, -1), coef=1.0, kl=0.0, ent=0.0):
    policy, tokens = c.mask & ~c.expert, c.total - c.num_expert
    rest = (tokens, c.num_expert, 3, MAX, norm, *clip, coef, kl, "k3", ent)
    return hpt.loss_fn(c.lp, c.old, c.adv, c.imp, c.ent, c.ref, policy, c.expert, *rest)[0]


@pytest.mark.parametrize(("rows", "kind", "norm", "clip", "extra"), GRID)
@pytest.mark.parametrize("coef", [1.0, 0.3, 0.0])
def test_hpt(rows, kind, norm, clip, extra, coef):
    """GRPO over its own rows, a token mean for the traces."""
    c = Case(rows, kind)
    terms = policy_part(c, norm, clip, *extra, rows=3)
    for b, t in c.tokens():
        if c.expert[b, t]:
            terms[b, t] = (-coef / c.num_expert * c.lp[b, t].item(), -coef / c.num_expert)
    compare(c, run_hpt(c, norm, clip, coef, *extra), terms)


def run_trapo(c: Case, norm="constant", clip=(-1, -1), coef=1.0, alpha=0.1, kl=0.0, ent=0.0):
    rest = (c.total, 4, MAX, norm, *clip, coef, alpha, kl, "k3", ent)
    return trapo.loss_fn(c.lp, c.old, c.adv, c.imp, c.ent, c.ref, c.mask & ~c.expert, c.expert, *rest)[0]


@pytest.mark.parametrize(("rows", "kind", "norm", "clip", "extra"), GRID)
@pytest.mark.parametrize(("coef", "alpha"), [(1.0, 0.1), (0.5, 1.0), (2.0, 1e-9)])
def test_trapo(rows, kind, norm, clip, extra, coef, alpha):
    """-p / max(p, alpha), the maximum constant: the coefficient is min(1, p / alpha), whatever the advantage."""
    c, (kl, ent), terms = Case(rows, kind), extra, {}
    for b, t in c.tokens():
        w, p = share(norm, c.lengths[b], c.total, 4), math.exp(c.lp[b, t].item())
        if c.expert[b, t]:
            terms[b, t] = (-w * coef * p / max(p, alpha), -w * coef * min(1.0, p / alpha))
        else:
            parts = (w, ppo(c, b, t, c.adv[b].item(), *clip)), (kl * w, k3(c, b, t)), (-ent * w, (c.ent[b, t].item(), 0))
            terms[b, t] = add(*parts)
    compare(c, run_trapo(c, norm, clip, coef, alpha, kl, ent), terms)


def test_uft_hint_alone():
    """1.7.5: equal rewards leave the hint's gradient only; 1.7.2: without the term the hint has none."""
    c = Case(kind="right")
    (gradient,) = torch.autograd.grad(run_uft(c, coef=0.5, kl=0.0), c.lp)
    assert (gradient[~c.expert] == 0).all() and torch.allclose(gradient[c.expert], torch.tensor(-0.5 / c.num_expert).double())
    c = Case()
    assert (torch.autograd.grad(run_uft(c, coef=0.0), c.lp)[0][c.expert] == 0).all()


def test_trapo_prefixes():
    """The first micro-group is plain; a later one is given its share of the trace while the mean so far is below the threshold."""
    lengths = [
        trapo.prefix_tokens(100, share, threshold, [0.0] * n)
        for share, threshold, n in zip((0, 0.2, 0.5, 1), (-1, 0.5, 0.7, 0.9), (0, 4, 6, 7), strict=True)
    ]
    assert lengths == [0, 20, 50, 100]
    assert trapo.prefix_tokens(100, 0.5, 0.5, [1.0, 0.0]) == 0 and trapo.prefix_tokens(100, 0.5, 0.51, [1.0, 0.0]) == 50
    assert trapo.prefix_tokens(100, 1.0, 2.0, [1.0]) == 100 and trapo.prefix_tokens(100, 0.5, 2.0, []) == 0


def run_relift(c: Case, ent=0.001):
    return relift.sft_loss_fn(c.lp, c.ent, c.mask, 40, ent)[0]


@pytest.mark.parametrize("kind", ["mixed", "extreme"])
@pytest.mark.parametrize("ent", [0.0, 0.001, 0.5])
def test_relift_sft_step(kind, ent):
    """One mean over all tokens of the step, 40 here: of it this micro-batch holds 16."""
    c = Case("only expert", kind)
    compare(c, run_relift(c, ent), {(b, t): (-(c.lp[b, t].item() + ent * c.ent[b, t].item()) / 40, -1 / 40) for b, t in c.tokens()})


def test_relift_buffer():
    """Newest first: what just failed, in the step's order, before what waits; never more than its size is taken."""
    push = relift.push_and_pop
    assert push([], ["a", "b"], 3, "newest") == (["a", "b"], [])
    assert push(["a", "b"], ["c", "d"], 3, "newest") == (["b"], ["c", "d", "a"])
    assert push(["a", "b"], ["c", "d"], 3, "oldest") == (["c"], ["d", "a", "b"])
    old, new = [f"old{i}" for i in range(100)], [f"new{i}" for i in range(50)]
    assert push(old, new, 128, "newest") == (old[78:], new + old[:78])  # 3.7.6
    assert push(["a"], ["b"], -1, "newest") == ([], [])  # the official switch for pure RL, 3.7.1
    assert push(["a"], ["b"], 0, "newest") == ([], []) and push(["a"], [], 1, "newest") == ([], ["a"])


RUNS = {
    "luffy": (run_luffy, {"gamma": 0.1, "kl": 0.1}),
    "srft": (run_srft, {"positive_coef": 0.1, "sft_coef": 0.5, "gamma": 0.1, "kl": 0.1}),
    "prefix_rft": (functools.partial(run_prefix, clip=(-1, -1)), {"dual": 1.1, "keep": 0.5, "kl": 0.1}),
    "uft": (run_uft, {"coef": 0.001, "kl": 0.001}),
    "chord": (run_chord, {"mu": 0.3, "kl": 0.1}),
    "hpt": (run_hpt, {"coef": 0.3, "kl": 0.1}),
    "trapo": (run_trapo, {"coef": 0.3, "alpha": 0.3, "kl": 0.1}),
}


@pytest.mark.parametrize(("method", "flag"), [(m, f) for m, (_, flags) in RUNS.items() for f in flags])
def test_every_float_is_live(method, flag):
    """Doubled, it changes the gradient."""
    run, flags = RUNS[method]
    c = Case()
    one, two = (torch.autograd.grad(run(c, **flags | {flag: value}), c.lp)[0] for value in (flags[flag], 2 * flags[flag]))
    assert not torch.allclose(one, two, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [*RUNS, "relift"])
def test_entropy_bonus_is_live(method):
    """It has its gradient through the entropy, on every token that RL trains."""
    run = (RUNS | {"relift": (run_relift, {})})[method][0]
    c = Case()
    c.ent.requires_grad_()
    one, two = (torch.autograd.grad(run(c, ent=value), c.ent, allow_unused=True)[0] for value in (0.1, 0.2))
    assert (one[c.mask & (~c.expert if method in ("uft", "chord", "hpt", "trapo") else True)] < 0).all()
    assert torch.allclose(two, 2 * one)


@pytest.mark.parametrize("method", list(RUNS))
def test_garbage_and_padding_change_nothing(method):
    """NaN and infinity outside the rows; a wider batch; rows in another order."""
    run, flags = RUNS[method]
    c = Case()
    loss = run(c, **flags)
    (wanted,) = torch.autograd.grad(loss, c.lp)
    for junk in (math.nan, math.inf, -math.inf):
        bad = Case()
        bad.lp = torch.where(c.mask, c.lp.detach(), junk).requires_grad_()
        bad.old, bad.ref = torch.where(c.mask, c.old, junk), torch.where(c.mask, c.ref, junk)
        again = run(bad, **flags)
        assert again == loss and torch.equal(torch.autograd.grad(again, bad.lp)[0], wanted)
    wide, order = Case(), torch.tensor([2, 0, 3, 1])
    for name in ("lp", "old", "ent", "ref", "imp", "mask", "expert"):
        setattr(wide, name, F.pad(getattr(c, name).detach()[order], (0, 9)))
    wide.adv, wide.rewards, wide.lp = c.adv[order], c.rewards[order], wide.lp.requires_grad_()
    (found,) = torch.autograd.grad(run(wide, **flags), wide.lp)
    assert torch.allclose(found[:, :T], wanted[order], rtol=1e-9) and (found[:, T:] == 0).all()
