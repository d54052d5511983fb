"""BRIDGE's three updates against explicit autograd, its adapter, and what it is at lam 0 and 1."""

import inspect
import math
import shutil
from types import SimpleNamespace

import oracles
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import byte_tokenizer, problem, random_model, read_metrics, train
from one_step import expert_problems, fixed_groups, one_step
from safetensors.torch import load_file

import bridge
import common
import core.records
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


def surrogate(model, groups, old=None, reference=None, kl_coef=0.0, cap=math.inf):
    """(J_RL, log-probabilities per row), one token mean over all rows; ratios to `old`, per row."""
    total, rows, lps = 0.0, [row for group in groups for row in group], []
    for i, row in enumerate(rows):
        rewards = torch.tensor([r.reward for r in groups[i // 4]], dtype=torch.float64)
        a = ((row.reward - rewards.mean()) / (rewards.std() + 1e-6)).item()
        batch = common.make_batch([row])
        lp = common.token_logprobs(model, batch, 1.0)[0][0]
        ratio = (lp - (lp.detach() if old is None else old[i])).exp()
        s = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        total = total + (torch.where(s > cap * a, s, cap * a) if a < 0 else s).sum()
        if kl_coef:
            d = lp - common.token_logprobs(reference, batch, 1.0)[0][0].detach()
            total = total - kl_coef * ((-d).exp() - 1 + d).clamp(max=10).sum()
        lps.append(lp.detach())
    return total / sum(len(r.completion_ids) for r in rows), lps


def explicit(lam, groups, meta=True, kl_coef=0.0, noise=0.02, cap=3.0):
    """Gradients to descend for shadow, theta and w, by the equations of the docstring; the log."""
    models = random_model("qwen2", 0, torch.float64), shadow_model(noise)
    policy, shadow = (common.Policy(filled_adapter(model)) for model in models)
    reference = common.Policy(random_model("qwen2", 2, torch.float64))
    (theta, w), (hat, w_hat) = bridge.split_parameters(policy), bridge.split_parameters(shadow)
    experts = common.make_batch([common.expert_rollout(p, byte_tokenizer()) for p in expert_problems()])
    j_sft = common.token_logprobs(policy, experts, 1.0)[0].sum() / sum(experts.lengths)  # 0 outside a row
    j_rl, old = surrogate(policy, groups, None, reference, kl_coef)
    j_hat, now = surrogate(shadow, groups, old, reference, kl_coef, cap)
    g_theta = torch.autograd.grad(-(1 - lam) * j_sft - lam * j_rl, theta, retain_graph=True)
    g_sft, g_rl = torch.autograd.grad(j_sft, w, retain_graph=True), torch.autograd.grad(j_rl, w)
    g_hat, gain = torch.autograd.grad(-j_hat, hat, retain_graph=True), torch.autograd.grad(j_hat, w_hat)
    g_w = [-(1 - lam) * s - lam * (r - meta * h) for s, r, h in zip(g_sft, g_rl, gain, strict=True)]
    far = torch.cat(old) - torch.cat(now)
    log = {"surrogate_gain": j_rl - j_hat, "shadow_kl": far.mean(), "shadow_ratio_max": (-far).exp().max()}
    return [g_hat] * meta + [g_theta, g_w], {name: value.item() for name, value in log.items()}


def assert_close(found, wanted):
    scale = max(w.abs().max() for w in wanted)
    assert len(found) == len(wanted)
    assert all((f - w).abs().max() <= 1e-6 * max(scale, 1e-3) for f, w in zip(found, wanted, strict=True))


def main(patch, hat=None, groups=None, filled=True, dtype=torch.float64, policy=None, **flags):
    """What one update of main clips, the gradients of (hat) the shadow, theta and w; and its log.

    The models that it loads, in order: the policy, the shadow where there is one, the reference.
    """
    patch.setattr(bridge, "add_adapter", filled_adapter if filled else ADD_ADAPTER)
    flags = {"adapter_rank": 4, "adapter_alpha": 8.0, "shadow": "persist"} | flags
    flags = {"tis_cap": 0.0, "sft_problems_per_step": 4} | flags
    models = [policy or random_model("qwen2", 0, dtype), hat or shadow_model(dtype=dtype)]
    models = [*models, random_model("qwen2", 2, dtype)]
    models = models if flags.get("meta", True) and flags["adapter_rank"] else [models[0], models[2]]
    return one_step(bridge, models, groups or fixed_groups(), **flags)


EQUATIONS = [{}, {"lam": 0.3}, {"lam": 1.0}, {"lam": 0.7, "kl_coef": 0.2}, {"meta": False}, {"fail": True}]
EQUATIONS += [{"noise": 0.1, "kl_coef": 0.2}, {"noise": 0.1, "cap": math.inf}]


@pytest.mark.parametrize("flags", EQUATIONS)
@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_main_is_the_three_equations(flags, budget, world, monkeypatch):
    """theta gets nothing from the shadow, the shadow nothing from SFT; equal rewards leave SFT."""
    flags, groups = dict(flags), fixed_groups()
    for row in (row for group in groups for row in group) if flags.pop("fail", False) else ():
        row.reward = 0.0
    noise, cap = flags.pop("noise", 0.02), flags.pop("cap", 3.0)
    sizes = {"tokens_per_microbatch": budget, "shadow_dual_clip": cap if cap < 9 else 0.0}
    found, lines = main(monkeypatch, shadow_model(noise), groups, **sizes, **flags)
    again = fixed_groups() if groups[0][0].reward else groups
    wanted, log = explicit(flags.pop("lam", 0.5), again, noise=noise, cap=cap, **flags)
    assert len(found) == len(wanted) == (3 if flags.get("meta", True) else 2)
    for f, w in zip(found, wanted, strict=True):
        assert_close(f, w)
    if flags.get("meta", True):
        assert {name: lines[0][name] for name in log} == pytest.approx(log, rel=1e-5, abs=1e-6)
    assert log["shadow_ratio_max"] > (30 if noise > 0.02 else 1)


def test_a_drifted_shadow_is_bounded(world, monkeypatch):
    """Without the bound, a few tokens with A < 0 and a large ratio are most of w.s gradient."""
    norms, gains = [], []
    for cap in (3.0, 0.0):
        (_, _, w), lines = main(monkeypatch, shadow_model(0.1), lam=1.0, shadow_dual_clip=cap)
        norms.append(math.sqrt(sum(g.square().sum() for g in w)))
        gains.append(lines[0]["surrogate_gain"])
    assert norms[1] > 8 * norms[0] and gains[1] > 2 > 0.5 > gains[0]


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_equal_shadow_has_no_gain(lam, world, monkeypatch):
    """Shadow = theta, as at first if it persists: the gain is 0, (1 - lam) SFT is left of w's."""
    policy, start = random_model("qwen2"), dict(filled_adapter(random_model("qwen2")).named_parameters())
    flags = {"policy": policy, "lam": lam, "lr": 1e-3, "weight_decay": 0.5}
    (_, _, w), lines = main(monkeypatch, random_model("qwen2"), dtype=torch.float32, **flags)
    if lam == 1:
        assert all((g == 0).all() for g in w)
        for name, parameter in policy.named_parameters():  # w does not decay, theta does
            assert torch.equal(common.full_tensor(parameter), start[name]) == ("lora_" in name), name
    assert (lines[0]["surrogate_gain"], lines[0]["shadow_kl"], lines[0]["shadow_ratio_max"]) == (0, 0, 1)
    (_, _, sft_only), _ = main(monkeypatch, random_model("qwen2"), dtype=torch.float32, lam=0.0)
    assert all(torch.allclose(g, (1 - lam) * s, atol=1e-6) for g, s in zip(w, sft_only, strict=True))


@pytest.mark.parametrize("grad_clip", [1.0, 1e-8])
@pytest.mark.parametrize("lam", [1.0, 0.25])
def test_one_step_shadow(lam, grad_clip, world, monkeypatch):
    """By default the shadow is theta after one clipped AdamW step of RL, whatever it was before."""
    assert bridge.Config().shadow == "one_step"
    flags = {"shadow": "one_step", "lam": lam, "lr": 1e-3, "grad_clip": grad_clip}
    (first, theta, found), lines = main(monkeypatch, **flags)
    policy, hat = (common.Policy(filled_adapter(random_model("qwen2", 0, torch.float64))) for _ in range(2))
    base, w_hat = bridge.split_parameters(hat)
    (g_theta, without), _ = explicit(lam, fixed_groups(), meta=False)
    j_rl, old = surrogate(policy, fixed_groups())
    (-surrogate(hat, fixed_groups())[0]).backward()
    assert_close(first, [p.grad for p in base])
    assert_close(theta, g_theta)
    torch.nn.utils.clip_grad_norm_(base, grad_clip)
    torch.optim.AdamW(base, 1e-3, weight_decay=0.01).step()
    j_hat, now = surrogate(hat, fixed_groups(), old, cap=3.0)
    gain = torch.autograd.grad(j_hat, w_hat)
    wanted = [g + lam * h for g, h in zip(without, gain, strict=True)]
    scale = max(g.abs().max() for g in wanted)
    assert scale > 1e-2 and all((f - g).abs().max() < 1e-3 * scale for f, g in zip(found, wanted, strict=True))
    assert lines[0]["surrogate_gain"] == pytest.approx((j_rl - j_hat).item(), rel=1e-3)
    assert lines[0]["shadow_ratio_max"] == pytest.approx((torch.cat(now) - torch.cat(old)).exp().max().item(), rel=1e-3)


@pytest.mark.parametrize("adapter_lr", [1e-2, 0.0])
def test_rates(adapter_lr, world, monkeypatch):
    """Warmed up: theta and shadow move by lr, w by its own rate, or by lr where that is 0."""
    models = [random_model("qwen2"), random_model("qwen2")]
    start = dict(filled_adapter(random_model("qwen2")).named_parameters())
    main(monkeypatch, models[1], policy=models[0], warmup_steps=4, lr=1e-3, adapter_lr=adapter_lr)
    for (name, mine), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        mine, theirs = ((common.full_tensor(p) - start[name].detach()).abs().max().item() for p in (mine, theirs))
        rate = adapter_lr if "lora_" in name else 0.0
        assert mine == pytest.approx((rate or 1e-3) / 4, rel=0.05), name
        assert theirs == pytest.approx(0.0 if "lora_" in name else 1e-3 / 4, rel=0.05), name


def test_a_shadow_that_persists_follows_in_the_adapter_alone(world, monkeypatch):
    """In its second update it has the w that the policy's first update made, and its own base."""
    one, two, shadow = (random_model("qwen2") for _ in range(3))
    main(monkeypatch, random_model("qwen2"), policy=one, lr=1e-3)
    main(monkeypatch, shadow, policy=two, lr=1e-3, steps=2)
    for (name, mine), theirs in zip(one.named_parameters(), shadow.parameters(), strict=True):
        assert torch.equal(common.full_tensor(mine), common.full_tensor(theirs)) == ("lora_" in name), name


def test_the_log_of_two_updates(world, monkeypatch):
    """With weights that stay: the mean of what each group's update has, and the largest ratio."""
    flags = {"lr": 1e-30, "problems_per_step": 2, "updates_per_step": 2}
    found, (line,) = main(monkeypatch, shadow_model(0.1), **flags)
    parts = [explicit(0.5, [group], noise=0.1) for group in fixed_groups()]
    assert len(found) == 6 and min(log["shadow_ratio_max"] for _, log in parts) > 1.5
    for name in ("surrogate_gain", "shadow_kl"):
        assert line[name] == pytest.approx(sum(log[name] for _, log in parts) / 2, rel=1e-5), name
    assert line["shadow_ratio_max"] == pytest.approx(max(log["shadow_ratio_max"] for _, log in parts), rel=1e-5)
    assert 0 < line["shadow_clip_fraction"] < 1


@pytest.mark.parametrize("shadow", ["one_step", "persist"])
def test_a_step_without_rows_is_sft(shadow, world, monkeypatch):
    """All groups are dropped: the shadow has nothing to learn, theta and w have SFT's share."""
    groups = fixed_groups()
    for row in (row for group in groups for row in group):
        row.reward = 0.0
    found, (line,) = main(monkeypatch, groups=groups, shadow=shadow, zero_variance="drop")
    for mine, wanted in zip(found, explicit(0.5, groups, meta=False)[0], strict=True):
        assert_close(mine, wanted)
    assert "shadow_kl" not in line


@pytest.mark.parametrize("flags", [{"meta": False}, {"adapter_rank": 0}])
@pytest.mark.parametrize("shadow", ["one_step", "persist"])
def test_no_shadow_is_loaded(flags, shadow, world):
    """Without the gain or without an adapter main loads the policy and the reference alone."""
    flags = {"adapter_rank": 4, "sft_problems_per_step": 4, "kl_coef": 0.1, "shadow": shadow} | flags
    _, (line,) = one_step(bridge, [random_model("qwen2") for _ in range(2)], fixed_groups(), **flags)
    assert not any("shadow" in name or "gain" in name for name in line) and line["kl"] == 0


def test_at_the_ends_it_is_grpo_and_sft(world, monkeypatch):
    """Bit for bit: lam 1 without an adapter and the shadow are grpo.py, lam 0 is sft.py."""
    flags = {"adapter_rank": 0, "filled": False, "dtype": torch.float32}
    wanted = one_step(grpo, [random_model("qwen2")], fixed_groups(), tis_cap=0.0)[0][0]
    for shadow in ("persist", "one_step"):  # a fresh adapter adds nothing
        found = main(monkeypatch, random_model("qwen2"), lam=1.0, shadow=shadow, **flags | {"adapter_rank": 4})[0]
        assert all(torch.equal(f, w) for mine in found[:2] for f, w in zip(mine, wanted, strict=True))
    theta, _ = main(monkeypatch, lam=1.0, **flags)[0]
    assert all(torch.equal(t, w) for t, w in zip(theta, wanted, strict=True))
    wanted = one_step(sft, [random_model("qwen2")], problems_per_step=4)[0][0]
    for lam in ({"lam": 0.0}, {"lam_schedule": "linear"}):  # linear starts at 0
        theta, _ = main(monkeypatch, **lam, **flags)[0]
        assert all(torch.equal(t, w) for t, w in zip(theta, wanted, strict=True))


def test_the_linear_schedule_ends_at_one(world, monkeypatch):
    """RL weighs 0 in the first of three steps and 1 in the last."""
    _, lines = main(monkeypatch, meta=False, lam_schedule="linear", steps=3)
    assert [line["lam"] for line in lines] == [0, 0.5, 1]


def test_a_constant_added_to_all_rewards_changes_nothing(world, monkeypatch):
    """The baseline takes it away from all three gradients."""
    groups = fixed_groups()
    for row in (row for group in groups for row in group):
        row.reward += 7.0
    for one, two in zip(main(monkeypatch)[0], main(monkeypatch, groups=groups)[0], strict=True):
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
    shadow, copy, added = *(common.Policy(shadow_model(0.1)) for _ in range(2)), []
    log = SimpleNamespace(add=lambda **terms: added.extend(terms.items()))
    bridge.shadow_backward(cfg, log, shadow, reference, rows, common.count(rows, world), world)
    j_rl, now = surrogate(copy, groups, old, reference, 0.2, 3.0)
    assert_close([p.grad for p in shadow.parameters()], torch.autograd.grad(-j_rl, list(copy.parameters())))
    far, found = torch.cat(old) - torch.cat(now), core.records.combine(added)
    assert found["surrogate_gain"].item() == pytest.approx(-j_rl.item(), rel=1e-6)
    assert found["shadow_kl"].item() == pytest.approx(far.mean().item(), rel=1e-5)
    assert found["shadow_ratio_max"].item() == pytest.approx((-far).exp().max().item(), rel=1e-5)
    assert 0 < found["shadow_clip_fraction"] < 1 and all(p.grad is None for p in reference.parameters())
    bridge.shadow_backward(cfg, log, shadow, reference, [], common.count([], world), world)
    assert core.records.combine(added) == found


@pytest.mark.parametrize("cap", [3.0, 1.5, 0.0])
@pytest.mark.parametrize(("norm", "clip_high"), [("token", 0.2), ("sequence", -1.0), ("constant", 0.28)])
@pytest.mark.parametrize(("kl_coef", "estimator"), [(0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3")])
def test_bound_ratio(cap, norm, clip_high, kl_coef, estimator):
    """loss_fn after it, by token: where A < 0 not below cap A, and flat there; the KL is whole."""
    with oracles.float64():
        c = oracles.ragged("no expert", stored=(True, True, True, False))
        far = 4 * torch.arange(28.0).sin().view_as(c.logprobs)  # ratios up to e^4, in every row
        c = oracles.change(c, logprobs=c.logprobs + far)
        flags = {"loss_norm": norm, "clip_high": clip_high, "kl_coef": kl_coef, "kl_estimator": estimator}
        cfg = oracles.settings(bridge, **flags)
        bounded = bridge.bound_ratio(c.batch, c.logprobs, c.ref_logprobs if kl_coef else None, cap)
        loss, _ = bridge.loss_fn(cfg, c.batch, bounded[0], c.entropy, bounded[1], c.counts)
        terms, places, cut = {}, c.tokens(), 0
        for b, t in places:
            term = oracles.surrogate(c, cfg, b, t, c.advantage(b), cap)
            w = oracles.share(cfg, c.batch.lengths[b], c.counts.policy, c.counts.rows)
            terms[b, t] = oracles.regularised(c, cfg, w, term, b, t)
            cut += term != oracles.surrogate(c, cfg, b, t, c.advantage(b))
        oracles.agree(c, loss, terms)
        assert (2 < cut < len(places) / 2) == bool(cap)


def test_bound_ratio_has_no_overflow():
    """Where the ratio itself is infinite: cap A, and no gradient."""
    row = common.Rollout(
        problem("q"), [1], sampler_logprobs=[-200.0], advantage=-2.0, old_logprobs=-200 * torch.ones(1)
    )
    batch, logprobs = common.make_batch([row]), torch.full((1, 1), -0.1, requires_grad=True)
    bounded, _ = bridge.bound_ratio(batch, logprobs, None, 3.0)
    loss, _ = bridge.loss_fn(bridge.Config(), batch, bounded, torch.zeros(1, 1), None, common.Counts(1, 0, 1))
    loss.backward()
    assert loss.item() == pytest.approx(6.0, rel=1e-4) and logprobs.grad.item() == 0


@pytest.mark.parametrize(
    ("ratio", "a", "slope"), [(2.0, 1.0, 0), (2.0, -1.0, -2), (4.0, -1.0, 0), (0.5, 1.0, 0.5), (0.5, -1.0, 0)]
)
def test_clipping_comes_before_the_minus_sign(ratio, a, slope):
    """A token's d J_RL / d log p is A ratio, 0 where PPO or the bound cuts, before any minus."""
    leaf, one = torch.zeros((), dtype=torch.float64, requires_grad=True), torch.ones(1, 1, dtype=torch.float64)
    row = common.Rollout(problem("q"), [1], sampler_logprobs=[-1.0], advantage=a, old_logprobs=-one[0])
    batch, counts = common.make_batch([row]), common.Counts(policy=1, expert=0, rows=1)
    logprobs, _ = bridge.bound_ratio(batch, leaf + math.log(ratio) * one - 1, None, 3.0)
    loss, _ = bridge.loss_fn(bridge.Config(tis_cap=0.0), batch, logprobs, one, None, counts)
    loss.backward()
    assert leaf.grad.item() == pytest.approx(-slope)


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


@pytest.mark.parametrize("flags", [["--no-meta"], ["--adapter_rank", 0], ["--shadow", "persist"]])
def test_resume_with_and_without_a_shadow(flags, tmp_path, world):
    """Two steps and two are four, bit for bit; no shadow is in a checkpoint of a run without."""
    sizes = "--model tiny --test_data= --steps 4 --save_every 2 --problems_per_step 3 --group_size 2 --lr 1e-3".split()
    sizes += "--sft_problems_per_step 3 --adapter_rank 4 --entropy_coef 0.1 --max_completion_tokens 80".split()
    train("bridge", *sizes, *flags, "--out", tmp_path)
    straight, weights = read_metrics(tmp_path), load_file(tmp_path / "final/model.safetensors")
    first, last = core.records.complete_checkpoints(tmp_path)
    names = {key.partition(".")[0] for key in dcp.FileSystemReader(first).read_metadata().state_dict_metadata}
    shadow = {"shadow", "shadow_optimizer"} if "persist" in flags else set()
    assert names == {"model", "optimizer"} | shadow
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "final")
    train("bridge", "--resume", tmp_path)
    again = load_file(tmp_path / "final/model.safetensors")
    assert read_metrics(tmp_path) == straight and all(torch.equal(weights[k], again[k]) for k in weights)
    assert len({row["grad_norm"] for row in straight[:-1]}) == 4
