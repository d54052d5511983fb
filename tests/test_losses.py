"""Every loss against a slow scalar loop written from the equation, in value and gradient, on ragged rows and extreme numbers."""

import itertools
import math

import pytest
import torch

import bread
import common
import grpo
import sft

LENGTHS, T = [5, 1, 3, 7], 7


def scalar_grpo(lp, old, adv, imp, ent, ref, mask, norm, low, high, kl_coef, estimator, ent_coef, max_tokens):
    """Python floats, one token at a time; the derivative of the loss with respect to each log-probability beside it."""
    total = sum(sum(row) for row in mask)
    loss, gradient = 0.0, [[0.0] * T for _ in mask]
    for b, t in itertools.product(range(len(mask)), range(T)):
        if not mask[b][t]:
            continue
        weight = {"token": 1 / total, "sequence": 1 / (len(mask) * sum(mask[b])), "constant": 1 / (len(mask) * max_tokens)}[norm]
        ratio, a = math.exp(lp[b][t] - old[b][t]), adv[b]
        bounded = min(max(ratio, 1 - low if low >= 0 else -math.inf), 1 + high if high >= 0 else math.inf)
        loss -= weight * imp[b][t] * min(ratio * a, bounded * a)
        if ratio * a <= bounded * a:
            gradient[b][t] -= weight * imp[b][t] * ratio * a
        if kl_coef:
            d = lp[b][t] - ref[b][t]
            loss += kl_coef * weight * {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
            gradient[b][t] += kl_coef * weight * {"k1": d, "k2": d, "k3": 1 - math.exp(-d)}[estimator]
        loss -= ent_coef * weight * ent[b][t]
    return loss, gradient


def inputs(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    mask = torch.tensor([[t < n for t in range(T)] for n in LENGTHS])
    lp = -3 * torch.rand(4, T, dtype=torch.float64)
    old = lp + 0.4 * torch.randn(4, T, dtype=torch.float64)
    if kind == "extreme":  # p near 0 and near 1
        lp[:, ::2], lp[:, 1::2] = -30.0, -1e-9
        old = lp + 0.1
    adv = {
        "mixed": torch.tensor([1.2, -0.7, 0.3, -0.8], dtype=torch.float64),
        "extreme": torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64),
        "zero": torch.zeros(4, dtype=torch.float64),
    }[kind]
    ent, ref = torch.rand(4, T, dtype=torch.float64), lp + 0.3 * torch.randn(4, T, dtype=torch.float64)
    imp = 0.5 + torch.rand(4, T, dtype=torch.float64)
    return lp, old, adv, imp, ent, ref, mask


@pytest.mark.parametrize("kind", ["mixed", "extreme", "zero"])
@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (-1, -1), (-1, 0.1)])
@pytest.mark.parametrize(("kl", "estimator", "entropy"), [(0, "k3", 0), (0.3, "k1", 0.1), (0.3, "k2", 0), (0.3, "k3", 0.1)])
def test_grpo(kind, norm, low, high, kl, estimator, entropy):
    lp, old, adv, imp, ent, ref, mask = inputs(kind)
    lp.requires_grad_()
    tokens, rows = int(mask.sum()), len(mask)
    loss, metrics = grpo.loss_fn(lp, old, adv, imp, ent, ref, mask, tokens, rows, 10, norm, low, high, kl, estimator, entropy)
    loss.backward()
    lists = [x.tolist() for x in (lp, old, adv, imp, ent, ref, mask)]
    value, gradient = scalar_grpo(*lists, norm, low, high, kl, estimator, entropy, 10)
    assert loss.item() == pytest.approx(value, rel=1e-6, abs=1e-9) and metrics["loss"] == loss
    assert torch.allclose(lp.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_garbage_outside_the_mask_changes_nothing():
    """NaN and infinity in masked places: loss and gradient stay finite and the same."""
    lp, old, adv, imp, ent, ref, mask = inputs("mixed")
    rest = (int(mask.sum()), 4, 10, "token", 0.2, 0.2, 0.1, "k3", 0.1)
    results = []
    for junk in (0.0, math.nan, math.inf, -math.inf):
        bad = [torch.where(mask, x, junk) for x in (lp, old, ref)]
        bad[0].requires_grad_()
        loss, _ = grpo.loss_fn(bad[0], bad[1], adv, imp, torch.where(mask, ent, 0.0), bad[2], mask, *rest)
        loss.backward()
        results.append((loss.item(), bad[0].grad))
    for loss, grad in results[1:]:
        assert loss == results[0][0] and torch.equal(grad, results[0][1])


def test_padding_width_and_empty_rows():
    lp, old, adv, imp, ent, ref, mask = inputs("mixed")
    rest = (int(mask.sum()), 4, 10, "sequence", 0.2, 0.2, 0.1, "k3", 0.1)
    loss, _ = grpo.loss_fn(lp, old, adv, imp, ent, ref, mask, *rest)
    wide = [torch.nn.functional.pad(x, (0, 100)) for x in (lp, old, imp, ent, ref, mask)]
    assert grpo.loss_fn(wide[0], wide[1], adv, *wide[2:], *rest)[0] == pytest.approx(loss.item(), rel=1e-12)
    nothing, _ = grpo.loss_fn(lp, old, adv, imp, ent, ref, torch.zeros_like(mask), 0, *rest[1:])
    assert nothing == 0


def test_bread_is_grpo_on_the_policy_tokens():
    lp, old, adv, imp, ent, ref, mask = inputs("mixed")
    rest = (int(mask.sum()), 4, 10, "token", 0.2, 0.2, 0.1, "k3", 0.1)
    assert bread.loss_fn(lp, old, adv, imp, ent, ref, mask, *rest)[0] == grpo.loss_fn(lp, old, adv, imp, ent, ref, mask, *rest)[0]


def test_sft():
    lp, _, _, _, ent, _, mask = inputs("mixed")
    lp.requires_grad_()
    loss, _ = sft.loss_fn(lp, ent, mask, 40)
    loss.backward()
    value = -sum(lp[b, t].item() for b in range(4) for t in range(LENGTHS[b])) / 40
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert torch.allclose(lp.grad, -mask.double() / 40)


def test_sft_schedule():
    rate = [sft.learning_rate(step, 100, 1.0, 0.1, 0.1) for step in range(100)]
    assert rate[0] == pytest.approx(0.1) and rate[9] == rate[10] == 1.0 and rate[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rate[10:]))
    assert sft.learning_rate(0, 1, 1.0, 0.1, 0.1) == 1.0


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 10.0], [0.1] * 4])
    plain = common.group_advantages(rewards, False)
    assert torch.allclose(plain, torch.tensor([[-0.5, 0.5, -0.5, 0.5], [-2.5, -2.5, -2.5, 7.5], [0.0] * 4]))
    scaled = common.group_advantages(rewards, True)
    assert scaled[0, 1] == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-6), rel=1e-6)
    assert scaled[1, 3] == pytest.approx(7.5 / (5 + 1e-6), rel=1e-6)
    assert (scaled[2] == 0).all() and (plain[2] == 0).all()
    assert (common.group_advantages(torch.ones(2, 1), True) == 0).all()


def test_clip_by_hand():
    ratio, advantages = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]]), torch.tensor([[1.0], [-1.0]])
    surrogate, clipped = common.clipped_surrogate(ratio, advantages, 0.2, 0.3)
    assert torch.allclose(surrogate, torch.tensor([[0.5, 1.0, 1.3], [-0.8, -1.0, -1.5]]))
    assert clipped.tolist() == [[False, False, True], [True, False, False]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_against_enumeration(estimator):
    """A three-symbol policy, every outcome weighted by its probability: value and gradient of what each estimator estimates."""
    logits = torch.tensor([0.2, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([-0.3, 0.4, 0.1], dtype=torch.float64), 0)
    logp = torch.log_softmax(logits, 0)
    probs = logp.detach().exp()
    estimate = (probs * common.kl_divergence(logp, reference, estimator)).sum()
    (gradient,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    reverse = (logp.exp() * (logp - reference)).sum()
    forward = (reference.exp() * (reference - logp)).sum()
    wanted = torch.autograd.grad(forward if estimator == "k3" else reverse, logits)[0]
    assert torch.allclose(gradient, wanted)
    if estimator != "k2":
        assert estimate.item() == pytest.approx(reverse.item())
