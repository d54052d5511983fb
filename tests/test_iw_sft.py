"""The weights of iw_sft.py and its loss against scalar loops, and what each weighting turns into at its limits."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import byte_tokenizer, random_model
from one_step import expert_problems, one_step
from test_losses import LENGTHS, inputs

import common
import iw_sft
import sft

WEIGHTS = ["iw", "iw_step", "dft", "trsft", "chord_phi", "pear"]
FLAGS = {"power": 1.0, "weight_high": 16.0, "step_low": 0.2, "step_high": 1.8, "trsft_alpha": 0.1, "pear_gamma": 0.999}
OTHERS = {"power": 3.0, "weight_high": 1.5, "step_high": 1.2, "trsft_alpha": 0.5, "pear_gamma": 0.2}
CASES = [
    ({}, (0, 1)),
    ({"q": "ema"}, (2, 1)),
    ({"normalize": True}, (0, 1)),
    ({"loss_norm": "sequence"}, (0, 1)),
    ({"q": "reference"}, (1, 1)),
]


def draw(seed: int = 0, spread: float = 1.0):
    """Policy, q, reference, entropy and mask; log-ratios of both signs, beyond PEAR's bounds too."""
    lp, _, _, _, ent, _, mask = inputs("mixed", seed)
    return lp, lp + spread * torch.randn_like(lp), lp + spread * torch.randn_like(lp), ent, mask


def weigh(lp, q, ref, mask, weight, **changes):
    return iw_sft.weigh(lp, q, ref, mask, weight, **FLAGS | changes)


def scalar_weights(lp, q, ref, mask, weight, power, weight_high, step_low, step_high, trsft_alpha, pear_gamma):
    out = [[0.0] * len(row) for row in mask]
    for b, t in itertools.product(range(len(mask)), range(len(mask[0]))):
        if not mask[b][t]:
            continue
        own = [j for j in range(len(mask[0])) if mask[b][j]]
        p, d = math.exp(lp[b][t]), sum(q[b][j] - ref[b][j] for j in own) / len(own)
        later = [min(max(lp[b][j] - ref[b][j], -0.08), 0.3) for j in own if j > t]
        out[b][t] = {
            "iw": min(max(math.exp(power * d), 0.0), weight_high),
            "iw_step": min(max(math.exp(q[b][t] - ref[b][t]), step_low), step_high),
            "dft": p,
            "trsft": min(1.0, p / trsft_alpha),
            "chord_phi": p * (1 - p),
            "pear": math.exp(min(max(len(later) * math.log(pear_gamma) + sum(later), -10.0), 5.0)),
        }[weight]
    return out


def gradient(lp, token_weights, ent, mask, norm="token"):
    """(loss, gradient); without weights those of sft.py."""
    lp, tokens = lp.clone().requires_grad_(), int(mask.sum())
    plain = token_weights is None
    loss = (sft.loss_fn(lp, ent, mask, tokens) if plain else iw_sft.loss_fn(lp, token_weights, ent, mask, tokens, len(mask), norm))[
        0
    ]
    return loss.detach(), torch.autograd.grad(loss, lp)[0]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("norm", ["token", "sequence"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("changes", [{}, OTHERS])
def test_weights_loss_and_gradient(weight, norm, changes):
    """Cheat sheet 0.3: the gradient in front of log p[t] is the weight, constant, times the norm."""
    lp, q, ref, ent, mask = draw()
    lp.requires_grad_()
    found = weigh(lp, q, ref, mask, weight, **changes)
    lists = (x.tolist() for x in (lp, q, ref, mask))
    wanted = torch.tensor(scalar_weights(*lists, weight, **FLAGS | changes), dtype=torch.float64)
    assert not found.requires_grad and torch.allclose(found, wanted, rtol=1e-12)
    share = [1 / sum(LENGTHS) if norm == "token" else 1 / (4 * n) for n in LENGTHS]
    slow = -torch.tensor(share, dtype=torch.float64)[:, None] * wanted
    loss, metrics = iw_sft.loss_fn(lp, found, ent, mask, sum(LENGTHS), 4, norm)
    loss.backward()
    assert loss.item() == pytest.approx((slow * lp.detach()).sum().item(), rel=1e-6) and metrics["loss"] == loss
    assert torch.allclose(lp.grad, slow, rtol=1e-6) and metrics["weight"].item() == pytest.approx(-slow.sum().item(), rel=1e-6)


def test_q_equal_to_the_reference_is_sft():
    """4.7: also q = policy at step 0, the step variant bounded to [1, 1], PEAR at its start with gamma 1, TrSFT with alpha -> 0."""
    lp, q, ref, ent, mask = draw()
    for found in (
        weigh(lp, ref, ref, mask, "iw"),
        weigh(lp, lp, lp, mask, "iw", power=7.0),
        weigh(lp, ref, ref, mask, "iw_step"),
        weigh(lp, q, ref, mask, "iw_step", step_low=1.0, step_high=1.0),
        weigh(lp, None, lp, mask, "pear", pear_gamma=1.0),
        weigh(lp, None, None, mask, "trsft", trsft_alpha=1e-9),
    ):
        assert torch.equal(found, mask.double())
        assert equal(gradient(lp, found, ent, mask), gradient(lp, None, ent, mask))
    assert not equal(gradient(lp, weigh(lp, lp, ref, mask, "iw"), ent, mask), gradient(lp, None, ent, mask))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_padding_permutation_garbage_and_micro_batches(weight):
    lp, q, ref, ent, mask = draw()
    found, order = weigh(lp, q, ref, mask, weight), torch.tensor([2, 0, 3, 1])
    assert torch.equal(weigh(lp[order], q[order], ref[order], mask[order], weight), found[order])
    wide = weigh(*(F.pad(x, (0, 9)) for x in (lp, q, ref, mask)), weight)
    assert torch.equal(wide[:, :7], found) and (wide[:, 7:] == 0).all()
    for junk in (1.0, math.nan, math.inf, -math.inf):
        bad = [torch.where(mask, x, junk) for x in (lp, q, ref)]
        assert torch.equal(weigh(*bad, mask, weight), found)
        assert equal(gradient(bad[0], found, ent, mask), gradient(lp, found, ent, mask))
    for norm in ("token", "sequence"):
        each = [weigh(lp[b : b + 1], q[b : b + 1], ref[b : b + 1], mask[b : b + 1], weight) for b in range(4)]
        alone = [iw_sft.loss_fn(lp[b : b + 1], w, ent[b : b + 1], mask[b : b + 1], 16, 4, norm)[0] for b, w in enumerate(each)]
        assert sum(alone).item() == pytest.approx(gradient(lp, found, ent, mask, norm)[0].item(), rel=1e-12)


def test_extremes():
    lp, mask = torch.full((3, 2), -1.0).double(), torch.ones(3, 2, dtype=torch.bool)
    d = torch.tensor([[10.0, 10.0], [-math.inf, 0.0], [400.0, -400.0]]).double()
    assert weigh(lp, lp + d, lp, mask, "iw").tolist() == [[16.0, 16.0], [0.0, 0.0], [1.0, 1.0]]
    assert weigh(lp, lp + d, lp, mask, "iw_step")[1].tolist() == [0.2, 1.0]
    long, every = torch.zeros(1, 200).double(), torch.ones(1, 200, dtype=torch.bool)
    up, down = weigh(long, None, long - 9, every, "pear", pear_gamma=1.0)[0], weigh(long - 9, None, long, every, "pear")[0]
    assert up[0] == pytest.approx(math.exp(5)) and down[0] == pytest.approx(math.exp(-10)) and up[-1] == down[-1] == 1
    assert up[-2].item() == pytest.approx(math.exp(0.3)) and down[-2].item() == pytest.approx(0.999 * math.exp(-0.08))


def test_dft_is_the_gradient_of_p():
    lp, _, _, ent, mask = draw()
    lp[0, 0] = 0.0  # p = 1
    found = weigh(lp, None, None, mask, "dft")
    leaf = lp.clone().requires_grad_()
    (-torch.where(mask, leaf.exp(), 0.0).sum() / mask.sum()).backward()
    assert torch.allclose(gradient(lp, found, ent, mask)[1], leaf.grad, rtol=1e-6)
    assert found[0, 0] == 1 and torch.equal(found, weigh(lp, None, None, mask, "trsft", trsft_alpha=1.0))
    assert weigh(lp, None, None, mask, "chord_phi").max() <= 0.25


@pytest.mark.parametrize("flag", FLAGS)
def test_every_float_is_live(flag):
    """Halving it changes the gradient."""
    weight = {"power": "iw", "weight_high": "iw", "trsft_alpha": "trsft", "pear_gamma": "pear"}.get(flag, "iw_step")
    lp, q, ref, ent, mask = draw(spread=1.5)
    base = FLAGS | {"weight_high": 1.2, "trsft_alpha": 0.4}
    pair = [weigh(lp, q, ref, mask, weight, **base | {flag: value}) for value in (base[flag], base[flag] / 2)]
    assert not torch.equal(*(gradient(lp, w, ent, mask)[1] for w in pair))


def explicit(q_seed, ref_seed, normalize=False, loss_norm="token"):
    """Gradient of -sum w log p over the four traces; w = q / ref from models of the given seeds, constant."""
    policy, q, ref = (common.Policy(random_model("qwen2", seed, torch.float64)) for seed in (0, q_seed, ref_seed))
    rows = [common.expert_rollout(p, byte_tokenizer()) for p in expert_problems()]
    batch, loss, total, count = common.make_batch(rows, common.init(0)), 0.0, 0.0, sum(len(r.completion_ids) for r in rows)
    lp, lp_q, lp_ref = (common.token_logprobs(model, batch, 1.0)[0] for model in (policy, q, ref))
    for b, n in enumerate(batch.lengths):
        w = min(16.0, math.exp((lp_q[b, :n] - lp_ref[b, :n]).mean().item()))
        loss, total = loss - w * lp[b, :n].sum() / (count if loss_norm == "token" else 4 * n), total + w * n
    return torch.autograd.grad(loss * (count / total if normalize else 1), list(policy.parameters()))


@pytest.mark.parametrize("budget", [1, 30, 10**6])
@pytest.mark.parametrize(("flags", "seeds"), CASES)
def test_main(flags, seeds, budget, dist):
    """Models are loaded in the order policy, reference, q; micro-batches do not change the gradient."""
    models = [random_model("qwen2", seed, torch.float64) for seed in (0, 1, 2)]
    found, _ = one_step(iw_sft, models, problems_per_step=4, tokens_per_microbatch=budget, **flags)
    wanted = explicit(*seeds, **{k: v for k, v in flags.items() if k != "q"})
    scale = max(w.abs().max() for w in wanted)
    assert all((f - w).abs().max() <= 1e-6 * scale for f, w in zip(found[0], wanted, strict=True))


@pytest.mark.parametrize(("q", "reference"), [("reference", 1), ("policy", 0)])
def test_main_is_sft_at_the_first_step(q, reference, dist):
    """Bit for bit, with q = reference or with the policy still equal to it."""
    found, _ = one_step(iw_sft, [random_model("qwen2", seed) for seed in (0, reference)], problems_per_step=4, q=q)
    wanted, _ = one_step(sft, [random_model("qwen2")], problems_per_step=4)
    assert equal(found[0], wanted[0])


def test_ema_follows_the_policy(dist):
    models = [random_model("qwen2", seed) for seed in (0, 1, 2)]
    one_step(iw_sft, models, problems_per_step=4, q="ema", q_decay=0.7, lr=1e-2)
    start = random_model("qwen2", 2).parameters()
    for policy, ema, before in zip(models[0].parameters(), models[2].parameters(), start, strict=True):
        assert torch.allclose(common.full_tensor(ema), 0.7 * before + 0.3 * common.full_tensor(policy), atol=1e-6)
