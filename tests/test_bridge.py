"""BRIDGE's three updates against explicit autograd, its adapter, and what it is at lam 0 and 1."""

import inspect
import math

import pytest
import torch
from conftest import byte_tokenizer, problem, random_model
from one_step import expert_problems, fixed_groups, one_step

import bridge
import common
import grpo
import sft

ADD_ADAPTER = bridge.add_adapter


def filled_adapter(model, rank=4, alpha=8.0, seed=0):
    """As add_adapter, but B is not 0, as later in training."""
    ADD_ADAPTER(model, rank, alpha, seed)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def shadow_model(noise=0.02, dtype=torch.float64):
    """The policy's base weights, moved a little."""
    model = random_model("qwen2", 0, dtype)
    for parameter in model.parameters():
        parameter.data.add_(noise * torch.randn_like(parameter))
    return model


def surrogate(model, groups, old=None, reference=None, kl_coef=0.0):
    """(J_RL, log-probabilities per row), one token mean over all rows; ratios to `old`, per row."""
    total, rows, lps = 0.0, [row for group in groups for row in group], []
    for i, row in enumerate(rows):
        rewards = torch.tensor([r.reward for r in groups[i // 4]], dtype=torch.float64)
        a = ((row.reward - rewards.mean()) / (rewards.std() + 1e-6)).item()
        batch = common.make_batch([row])
        lp = common.token_logprobs(model, batch, 1.0)[0][0]
        ratio = (lp - (lp.detach() if old is None else old[i])).exp()
        total = total + torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()
        if kl_coef:
            d = lp - common.token_logprobs(reference, batch, 1.0)[0][0].detach()
            total = total - kl_coef * ((-d).exp() - 1 + d).sum()
        lps.append(lp.detach())
    return total / sum(len(r.completion_ids) for r in rows), lps


def explicit(lam, groups, meta=True, kl_coef=0.0):
    """Gradients to descend for theta, w and shadow, by the three equations of the docstring."""
    models = random_model("qwen2", 0, torch.float64), shadow_model()
    policy, shadow = (common.Policy(filled_adapter(model)) for model in models)
    reference = common.Policy(random_model("qwen2", 2, torch.float64))
    (theta, w), (hat, w_hat) = bridge.split_parameters(policy), bridge.split_parameters(shadow)
    experts = common.make_batch([common.expert_rollout(p, byte_tokenizer()) for p in expert_problems()])
    j_sft = common.token_logprobs(policy, experts, 1.0)[0].sum() / sum(experts.lengths)  # 0 outside a row
    j_rl, old = surrogate(policy, groups, None, reference, kl_coef)
    j_hat, _ = surrogate(shadow, groups, old, reference, kl_coef)
    g_theta = torch.autograd.grad(-(1 - lam) * j_sft - lam * j_rl, theta, retain_graph=True)
    g_sft, g_rl = torch.autograd.grad(j_sft, w, retain_graph=True), torch.autograd.grad(j_rl, w)
    g_hat, gain = torch.autograd.grad(-j_hat, hat, retain_graph=True), torch.autograd.grad(j_hat, w_hat)
    g_w = [-(1 - lam) * s - lam * (r - meta * h) for s, r, h in zip(g_sft, g_rl, gain, strict=True)]
    return g_theta, g_w, g_hat


def assert_close(found, wanted):
    scale = max(w.abs().max() for w in wanted)
    assert len(found) == len(wanted)
    assert all((f - w).abs().max() <= 1e-6 * max(scale, 1e-3) for f, w in zip(found, wanted, strict=True))


def main(patch, hat=None, groups=None, filled=True, dtype=torch.float64, **flags):
    """What one update of bridge.main clips: the gradients of theta, w and (hat) the shadow."""
    patch.setattr(bridge, "add_adapter", filled_adapter if filled else ADD_ADAPTER)
    models = [random_model("qwen2", 0, dtype), hat or shadow_model(dtype=dtype), random_model("qwen2", 2, dtype)]
    flags = {"lora_rank": 4, "lora_alpha": 8.0, "tis_cap": 0.0, "sft_problems_per_step": 4} | flags
    return one_step(bridge, models, groups or fixed_groups(), **flags)[0]


@pytest.mark.parametrize(
    "flags", [{}, {"lam": 0.3}, {"lam": 1.0}, {"lam": 0.7, "kl_coef": 0.2}, {"meta": False}, {"fail": True}]
)
@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_main_is_the_three_equations(flags, budget, world, monkeypatch):
    """theta gets nothing from the shadow, the shadow nothing from SFT; equal rewards leave SFT."""
    flags, groups = dict(flags), fixed_groups()
    for row in (row for group in groups for row in group) if flags.pop("fail", False) else ():
        row.reward = 0.0
    found = main(monkeypatch, groups=groups, tokens_per_microbatch=budget, **flags)
    wanted = explicit(flags.pop("lam", 0.5), fixed_groups() if groups[0][0].reward else groups, **flags)
    for f, w in zip(found, wanted[: len(found)], strict=True):
        assert_close(f, w)
    assert len(found) == (3 if flags.get("meta", True) else 2)


@pytest.mark.parametrize("flags", [{"lam": 1.0}, {"lam": 1.0, "reset_every": 5}, {"lam": 0.5}])
def test_equal_shadow_has_no_gain(flags, world, monkeypatch):
    """Shadow = theta, as after a reset: the gain's gradient on w is 0, (1 - lam) SFT is left."""
    same = None if "reset_every" in flags else random_model("qwen2")
    _, w, _ = main(monkeypatch, same, dtype=torch.float32, **flags)
    if flags["lam"] == 1:
        assert all((g == 0).all() for g in w)
    _, sft_only, _ = main(monkeypatch, random_model("qwen2"), dtype=torch.float32, lam=0.0)
    assert all(torch.allclose(g, (1 - flags["lam"]) * s, atol=1e-6) for g, s in zip(w, sft_only, strict=True))


@pytest.mark.parametrize("grad_clip", [1.0, 1e-8])
def test_one_step_shadow(grad_clip, world, monkeypatch):
    """The shadow is theta after one clipped AdamW step of RL, whatever it was before."""
    found = main(monkeypatch, shadow="one_step", lam=1.0, lr=1e-3, grad_clip=grad_clip)
    policy, hat = (common.Policy(filled_adapter(random_model("qwen2", 0, torch.float64))) for _ in range(2))
    (_, w), (base, w_hat) = bridge.split_parameters(policy), bridge.split_parameters(hat)
    j_rl, old = surrogate(policy, fixed_groups())
    (-surrogate(hat, fixed_groups())[0]).backward()
    torch.nn.utils.clip_grad_norm_(base, grad_clip)
    torch.optim.AdamW(base, 1e-3, weight_decay=0.01).step()
    gain = torch.autograd.grad(surrogate(hat, fixed_groups(), old)[0], w_hat)
    wanted = [h - r for r, h in zip(torch.autograd.grad(j_rl, w), gain, strict=True)]
    scale = max(g.abs().max() for g in wanted)
    assert scale > 1e-2 and all((f - g).abs().max() < 1e-3 * scale for f, g in zip(found[-1], wanted, strict=True))


def test_after_the_step_the_adapter_is_shared(world, monkeypatch):
    """w and theta move by their own warmed-up rates; the shadow holds the same w, its own base."""
    models = [random_model("qwen2"), random_model("qwen2")]
    start = dict(filled_adapter(random_model("qwen2")).named_parameters())
    flags = {"lora_rank": 4, "lora_alpha": 8.0, "sft_problems_per_step": 4}
    flags |= {"warmup_steps": 4, "lr": 1e-3, "lora_lr": 1e-2}
    monkeypatch.setattr(bridge, "add_adapter", filled_adapter)
    one_step(bridge, models, fixed_groups(), **flags)
    for (name, mine), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        mine, theirs = common.full_tensor(mine), common.full_tensor(theirs)
        moved, rate = mine - start[name].detach(), 1e-2 / 4 if "lora_" in name else 1e-3 / 4
        assert torch.equal(mine, theirs) == ("lora_" in name), name
        assert moved.abs().max().item() == pytest.approx(rate, rel=0.05), name


def test_at_the_ends_it_is_grpo_and_sft(world, monkeypatch):
    """Bit for bit without an adapter: lam 1 and the shadow are grpo.py, lam 0 is sft.py."""
    flags = {"lora_rank": 0, "filled": False, "dtype": torch.float32}
    theta, shadow = main(monkeypatch, random_model("qwen2"), lam=1.0, **flags)
    wanted = one_step(grpo, [random_model("qwen2")], fixed_groups(), tis_cap=0.0)[0][0]
    assert all(torch.equal(t, w) and torch.equal(s, w) for t, s, w in zip(theta, shadow, wanted, strict=True))
    wanted = one_step(sft, [random_model("qwen2")], problems_per_step=4)[0][0]
    for lam in ({"lam": 0.0}, {"lam_schedule": "linear"}):  # linear starts at 0
        theta, _ = main(monkeypatch, random_model("qwen2"), **lam, **flags)
        assert all(torch.equal(t, w) for t, w in zip(theta, wanted, strict=True))


def test_a_constant_added_to_all_rewards_changes_nothing(world, monkeypatch):
    """The baseline takes it away from all three gradients."""
    groups = fixed_groups()
    for row in (row for group in groups for row in group):
        row.reward += 7.0
    for one, two in zip(main(monkeypatch), main(monkeypatch, groups=groups), strict=True):
        assert_close(one, two)


def test_loss_is_the_parents():
    """Line by line (that its SFT loss is sft.py's is seen at lam 0 above)."""
    assert inspect.getsource(bridge.loss_fn) == inspect.getsource(grpo.loss_fn)


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_shadow_backward(budget, world):
    """The gradient of -J_RL with ratios to the rows' old policy and KL, and its metrics' sums."""
    cfg = bridge.Config(tis_cap=0.0, kl_coef=0.2, run=common.RunConfig(tokens_per_microbatch=budget))
    reference, groups = common.Policy(random_model("qwen2", 2, torch.float64)), fixed_groups()
    rows = [row for group in groups for row in group]
    for group in groups:
        advantages = common.group_advantages(torch.tensor([[r.reward for r in group]]), True)
        for row, advantage in zip(group, advantages[0].tolist(), strict=True):
            row.advantage = advantage
    _, old = surrogate(common.Policy(random_model("qwen2", 0, torch.float64)), groups)
    for row, logprobs in zip(rows, old, strict=True):
        row.old_logprobs = logprobs
    shadow, copy = (common.Policy(shadow_model()) for _ in range(2))
    metrics = bridge.shadow_backward(cfg, shadow, reference, rows, common.count(rows, world), world)
    j_rl, _ = surrogate(copy, groups, old, reference, 0.2)
    assert_close([p.grad for p in shadow.parameters()], torch.autograd.grad(-j_rl, list(copy.parameters())))
    assert metrics["loss"].item() == pytest.approx(-j_rl.item(), rel=1e-6) and 0 < metrics["clip_fraction"] < 1
    assert all(p.grad is None for p in reference.parameters())
    assert bridge.shadow_backward(cfg, shadow, reference, [], common.count([], world), world) == {}


@pytest.mark.parametrize(
    ("ratio", "a", "slope"), [(2.0, 1.0, 0), (2.0, -1.0, -2), (0.5, 1.0, 0.5), (0.5, -1.0, 0), (1.1, 1.0, 1.1)]
)
def test_clipping_comes_before_the_minus_sign(ratio, a, slope):
    """A token's d J_RL / d log p is A ratio, 0 where PPO clips: w descends -lam (A - that)."""
    w, w_hat = (torch.nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))
    one, cfg = torch.ones(1, 1, dtype=torch.float64), bridge.Config(tis_cap=0.0)
    row = common.Rollout(problem("q"), [1], sampler_logprobs=[-1.0], advantage=a, old_logprobs=-one[0])
    batch, counts = common.make_batch([row]), common.Counts(policy=1, expert=0, rows=1)
    for leaf, log_ratio, share in ((w, 0.0, 0.3), (w_hat, math.log(ratio), 1.0)):
        loss, _ = bridge.loss_fn(cfg, batch, leaf + log_ratio * one - 1, one, None, counts)
        (share * loss).backward()
    bridge.subtract_shadow([w], [w_hat], 0.3)
    assert w.grad.item() == pytest.approx(-0.3 * (a - slope))


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_adapter(architecture, world):
    """A fresh adapter changes no bit, only B has a gradient, and rank 0 is the model itself."""
    batch = common.make_batch([row for group in fixed_groups() for row in group])
    plain, fresh = random_model(architecture), bridge.add_adapter(random_model(architecture), 4, 8.0, 0)
    lp, lp_fresh = (common.token_logprobs(common.Policy(m), batch, 1.0)[0] for m in (plain, fresh))
    assert torch.equal(lp, lp_fresh)
    lp_fresh.sum().backward()
    for name, parameter in fresh.named_parameters():
        assert (parameter.grad == 0).all() if name.endswith("lora_a") else (parameter.grad != 0).any()
    assert sum(name.endswith("lora_a") for name, _ in fresh.named_parameters()) == 2 * 7
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in fresh.named_parameters() if "lora_" not in name] == names
    none = bridge.add_adapter(random_model(architecture), 0, 8.0, 0)
    assert [name for name, _ in none.named_parameters()] == names
    assert type(none.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_merged_weights(architecture, world):
    """Tied or not, merged weights in a plain model have the logits of (theta, w), left as it is."""
    adapted = filled_adapter(random_model(architecture, 0, torch.float64, "sdpa"))
    ids, before = torch.arange(1, 12)[None], {k: v.clone() for k, v in adapted.state_dict().items()}
    plain = random_model(architecture, 1, torch.float64, "sdpa")
    mine, merged = dict(plain.named_parameters()), dict(bridge.merged_weights(common.Policy(adapted)))
    assert mine.keys() == merged.keys()
    with torch.no_grad():
        for name, weight in merged.items():
            mine[name].copy_(weight)
        base = random_model(architecture, 0, torch.float64, "sdpa")(ids).logits
        assert torch.allclose(plain(ids).logits, adapted(ids).logits, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(base, adapted(ids).logits, atol=1e-1)
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
    policy = common.shard(filled_adapter(random_model(architecture, 0, torch.float64)), world)
    assert all(torch.equal(weight, merged[name]) for name, weight in bridge.merged_weights(policy))
