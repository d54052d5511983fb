"""grpo.py and sft.py against scalar loops, value and gradient; common.py's formulas by hand."""

import dataclasses
import math

import oracles
import pytest
import torch
import transformers
from oracles import NORMS, agree, change, importance, loss, policy_terms, ragged, rearrange, settings, slope

import common
import grpo
import iw_sft
import sft


@pytest.fixture(autouse=True)
def double():
    """Constants in double precision, so that value and gradient can be compared to 1e-9."""
    with oracles.float64():
        yield


# The losses ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", ["no expert", "mixed"])
@pytest.mark.parametrize("kind", ["mixed", "extreme", "right"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (-1, -1), (-1, 0.1)])
@pytest.mark.parametrize(
    ("kl", "estimator", "bonus"), [(0, "k3", 0), (0.3, "k1", 0.1), (0.3, "k2", 0), (0.3, "k3", 0.1)]
)
def test_grpo(rows, kind, norm, low, high, kl, estimator, bonus):
    """Value, gradient and metrics: the policy's tokens alone, over the counts of the whole step."""
    flags = {"loss_norm": norm, "clip_low": low, "clip_high": high, "kl_coef": kl, "kl_estimator": estimator}
    c, cfg = ragged(rows, kind), settings(grpo, entropy_coef=bonus, **flags)
    value, metrics = loss(grpo, c, cfg)
    agree(c, value, policy_terms(c, cfg))
    assert metrics["loss"] == value and not any(metric.requires_grad for metric in metrics.values())
    places = c.tokens(expert=False)
    wanted = {"entropy": sum(c.entropy[place].item() for place in places), "clip_fraction": 0}
    for b, t in places:
        a = c.advantage(b)
        wanted["clip_fraction"] += a != 0 and oracles.surrogate(c, cfg, b, t, a)[1] == 0
    if kl:
        wanted["kl"] = sum(oracles.kl(c, cfg, b, t)[0] for b, t in places)
    found = {name: metric.item() * c.counts.policy for name, metric in metrics.items() if name != "loss"}
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("cap", [0.0, 0.7, 2.0, 100.0])
def test_grpo_weighs_by_how_far_the_sampler_is_off(cap):
    """min(old policy / sampler, cap) before the surrogate alone: neither KL nor entropy has it."""
    c, cfg = ragged(), settings(grpo, tis_cap=cap, kl_coef=0.3, entropy_coef=0.1, clip_low=-1, clip_high=-1)
    value, _ = loss(grpo, c, cfg)
    agree(c, value, policy_terms(c, cfg))
    others = [slope(loss(grpo, c, settings(grpo, **vars(cfg) | {"tis_cap": other}))[0], c) for other in (0.6, 2.1)]
    assert all(not torch.allclose(slope(value, c), other) for other in others)


@pytest.mark.parametrize("rows", ["no expert", "mixed"])
def test_garbage_outside_the_mask_changes_nothing(rows):
    """NaN and infinity in masked places: loss and gradient stay finite and the same."""
    c, cfg, results = ragged(rows), settings(grpo, kl_coef=0.1, entropy_coef=0.1), []
    mask = c.batch.policy_mask
    for junk in (0.0, math.nan, math.inf, -math.inf):
        values = {"logprobs": c.logprobs.detach(), "ref_logprobs": c.ref_logprobs}
        values |= {"old_logprobs": c.batch.old_logprobs, "sampler_logprobs": c.batch.sampler_logprobs}
        changed = change(c, **{field: torch.where(mask, x, junk) for field, x in values.items()})
        value, _ = loss(grpo, changed, cfg)
        results.append((value.item(), slope(value, changed)))
    for value, gradient in results[1:]:
        assert value == results[0][0] and torch.equal(gradient, results[0][1])
    assert math.isfinite(value) and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("norm", NORMS)
def test_padding_width_and_empty_rows(norm):
    """A hundred more columns change nothing; rows without a trained token give exactly 0."""
    c, cfg = ragged("no expert"), settings(grpo, loss_norm=norm, kl_coef=0.1, entropy_coef=0.1)
    value, _ = loss(grpo, c, cfg)
    wide = rearrange(c, [0, 1, 2, 3], 100)
    assert loss(grpo, wide, cfg)[0].item() == pytest.approx(value.item(), rel=1e-12)
    nothing = torch.zeros_like(c.batch.policy_mask)
    for counts in (c.counts, common.Counts(0, 0, 0)):
        empty = change(c, policy_mask=nothing, completion_mask=nothing, counts=counts)
        assert loss(grpo, empty, cfg)[0] == 0 and (slope(loss(grpo, empty, cfg)[0], empty) == 0).all()


@pytest.mark.parametrize("rows", ["only expert", "mixed", "no expert"])
def test_sft(rows):
    """One mean over the expert's tokens of the step, of which this micro-batch holds some."""
    c, cfg = ragged(rows), settings(sft)
    value, metrics = loss(sft, c, cfg)
    agree(c, value, oracles.likelihood_terms(c, 1 / max(c.counts.expert, 1)))
    wanted = sum(c.entropy[place].item() for place in c.tokens(expert=True)) / max(c.counts.expert, 1)
    assert metrics["loss"] == value and metrics["entropy"].item() == pytest.approx(wanted, rel=1e-9)
    mask = c.batch.expert_mask
    for junk in (math.nan, math.inf, -math.inf):
        bad = change(c, logprobs=torch.where(mask, c.logprobs.detach(), junk))
        again, _ = loss(sft, bad, cfg)
        assert again == value and torch.equal(slope(again, bad), slope(value, c))


def hugging_face(steps: int, warmup: float) -> list[float]:
    """The rates of its cosine with a peak of 1, one more than it has updates."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * steps), steps)
    rates = []
    for _ in range(steps + 1):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("steps", "warmup"), [(625, 0.05), (2100, 0.1), (7, 0.0), (3, 0.5), (1, 0.1), (4, 1.0)])
@pytest.mark.parametrize("method", [sft, iw_sft])
def test_schedule(method, steps, warmup):
    """Hugging Face's, in the warm-up one update earlier: no update has rate 0, nor has the last."""
    theirs, rising = hugging_face(steps, warmup), math.ceil(warmup * steps)
    assert theirs[steps] == 0 or rising == steps
    for floor in (0.0, 0.1):
        rates = [method.learning_rate(step, steps, 3.0, warmup, floor) for step in range(steps)]
        cosine = [3 * (floor + (1 - floor) * rate) for rate in theirs[rising:steps]]
        assert rates == pytest.approx([3 * rate for rate in theirs[1 : rising + 1]] + cosine, rel=1e-9, abs=1e-15)
        assert min(rates) > 0 and max(rates) == 3 and all(rate > 3 * floor for rate in rates[rising:])
        if rising < steps:
            above = math.sin(math.pi / (2 * (steps - rising))) ** 2
            assert rates[-1] == pytest.approx(3 * (floor + (1 - floor) * above), rel=1e-6)


def test_the_last_rate_of_the_defaults():
    """10 % of the peak in sft.py, to six digits; in iw_sft.py no longer 0."""
    last = {}
    for method in (sft, iw_sft):
        cfg = method.Config()
        last[method] = method.learning_rate(cfg.steps - 1, cfg.steps, 1.0, cfg.warmup, cfg.final_lr)
    assert last[sft] == pytest.approx(0.1, rel=1e-5) and 1e-6 < last[iw_sft] < 1e-5


# The formulas -------------------------------------------------------------------------------------
def test_advantages_by_hand():
    """Minus the mean, divided by the unbiased std on request; equal rewards or one row give 0."""
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 10.0], [0.1] * 4])
    plain = common.group_advantages(rewards, False)
    assert torch.allclose(plain, torch.tensor([[-0.5, 0.5, -0.5, 0.5], [-2.5, -2.5, -2.5, 7.5], [0.0] * 4]))
    scaled = common.group_advantages(rewards, True)
    assert scaled[0, 1] == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-6), rel=1e-6)
    assert scaled[1, 3] == pytest.approx(7.5 / (5 + 1e-6), rel=1e-6)
    assert (scaled[2] == 0).all() and (plain[2] == 0).all()
    assert (common.group_advantages(torch.ones(2, 1), True) == 0).all()
    for n, dtype in ((8, torch.float32), (7, torch.float64)):  # whose mean of 0.1 is not 0.1
        equal = torch.full((1, n), 0.1, dtype=dtype)
        assert equal.mean() != equal[0, 0] and (common.group_advantages(equal, True) == 0).all()


def test_the_baseline_of_advantages():
    """It takes the mean's place; the std stays the group's; equal rewards still give 0."""
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0] * 4])
    found = common.group_advantages(rewards, False, baseline=torch.tensor(0.25))
    assert torch.equal(found, torch.tensor([[-0.25, 0.75, -0.25, 0.75], [0.0] * 4]))
    scaled = common.group_advantages(rewards, True, baseline=torch.tensor(0.25))
    assert scaled[0, 1] == pytest.approx(0.75 / (math.sqrt(1 / 3) + 1e-6), rel=1e-6) and (scaled[1] == 0).all()
    for flag in (False, True):
        given = common.group_advantages(rewards[:1], flag, baseline=rewards[:1].mean())
        assert torch.equal(given, common.group_advantages(rewards[:1], flag))


def test_clip_by_hand():
    """The minimum of both products, and a mark only where the clipped one is below the other."""
    ratio, advantages = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]]), torch.tensor([[1.0], [-1.0]])
    surrogate, clipped = common.clipped_surrogate(ratio, advantages, 0.2, 0.3)
    assert torch.allclose(surrogate, torch.tensor([[0.5, 1.0, 1.3], [-0.8, -1.0, -1.5]]))
    assert clipped.tolist() == [[False, False, True], [True, False, False]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_against_enumeration(estimator):
    """A three-symbol policy, every outcome weighted by its probability: what each estimates."""
    logits = torch.tensor([0.2, -0.5, 0.9], requires_grad=True)
    reference = torch.log_softmax(torch.tensor([-0.3, 0.4, 0.1]), 0)
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


def test_token_weights_by_hand():
    """Over the step's 10 tokens, 4 rows and at most 5 tokens a row; 0 outside the mask."""
    mask = torch.tensor([[True, True, False], [False, True, False], [False] * 3])
    wanted = {"token": [0.1, 0.1], "sequence": [1 / 8, 1 / 4], "constant": [1 / 20, 1 / 20]}
    for norm, (first, second) in wanted.items():
        found = common.token_weights(mask, norm, 10, 4, 5)
        assert torch.allclose(found, torch.tensor([[first, first, 0.0], [0.0, second, 0.0], [0.0] * 3]), rtol=1e-12)
        assert (common.token_weights(torch.zeros_like(mask), norm, 0, 0, 5) == 0).all()


def test_token_mean_by_hand():
    """Weighted values over the mask / the step's tokens; garbage elsewhere is no part of it."""
    values, mask = (
        torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 8.0]]),
        torch.tensor([[1, 1, 0], [1, 0, 1]]).bool(),
    )
    assert common.token_mean(values, mask, 10) == pytest.approx(1.5)
    weights = torch.tensor([[2.0, 1.0, 7.0], [0.5, 7.0, 0.0]])
    assert common.token_mean(values, mask, 10, weights) == pytest.approx(0.6)
    assert common.token_mean(values, torch.zeros_like(mask), 0) == 0
    assert common.token_mean(mask, mask, 10) == pytest.approx(0.4)  # of a bool: a share


def test_importance_weights_by_hand():
    """old / sampler up to the cap on policy tokens, 1 on the expert's and at cap 0; constant."""
    c = ragged()
    for cap in (1.2, 2.0, 100.0, 0.0):
        cfg = settings(grpo, tis_cap=cap)
        found = common.importance_weights(c.batch, c.batch.old_logprobs, cap)
        wanted = {place: importance(c, cfg, *place) for place in c.tokens()}
        assert {place: found[place].item() for place in wanted} == pytest.approx(wanted, rel=1e-12)
        assert (found[c.batch.expert_mask] == 1).all() and (found == 1).all() == (cap == 0)
    assert not common.importance_weights(c.batch, c.logprobs.detach(), 2.0).requires_grad


def test_old_logprobs_row_by_row():
    """A row that stores some keeps them; one that stores none has the policy's, no gradient."""
    c = ragged(stored=(True, False, False, True))
    found = common.old_logprobs(c.batch, c.logprobs)
    assert torch.equal(found[[1, 2]], c.logprobs.detach()[[1, 2]]) and not found.requires_grad
    assert torch.equal(found[[0, 3]], ragged().batch.old_logprobs[[0, 3]])
    assert not torch.equal(found[[0, 3]], c.logprobs.detach()[[0, 3]])


# The kit ------------------------------------------------------------------------------------------
def test_the_kits_batch_is_make_batchs():
    """Its fields are what make_batch says of the same rollouts, in float64 instead of float32."""
    for rows in oracles.EXPERT:
        c = ragged(rows)
        made = common.make_batch(c.batch.rollouts)
        for name in (field.name for field in dataclasses.fields(common.Batch)):
            mine, theirs = getattr(c.batch, name), getattr(made, name)
            if name == "sampler_logprobs":  # the kit's own
                assert (mine[~c.batch.policy_mask] == 0).all()
            elif isinstance(mine, torch.Tensor):
                assert torch.allclose(mine.double(), theirs.double(), atol=1e-7), name
            elif name not in ("line", "place"):
                assert mine == theirs, name


@pytest.mark.parametrize("far", [-700.0, -29.0, -3.0, 0.5, 700.0])
def test_k3_is_bounded(far):
    """At most 10, without gradient there; a reference far above the policy gives no infinity."""
    logprobs = torch.tensor([[far]], requires_grad=True)
    value = common.kl_divergence(logprobs, torch.zeros(1, 1), "k3")
    (slope,) = torch.autograd.grad(value.sum(), logprobs)
    wanted = min(10.0, math.exp(min(-far, 99.0)) - 1 + far)
    assert value.item() == pytest.approx(wanted, rel=1e-5)
    assert slope.item() == pytest.approx(0.0 if wanted == 10 else 1 - math.exp(-far), rel=1e-5)
