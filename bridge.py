"""BRIDGE: cooperative SFT and RL by bilevel optimization. Chen et al. 2025, arXiv 2509.06948 v3.
Unofficial: no official code was found.

SFT leads and RL follows. The base weights theta take a mix of both gradients. A low-rank adapter w
on top of them, the leader, learns by SFT plus the cooperative gain: how much better the reward of
(theta, w) is than that of (shadow, w), where the shadow is a copy of theta that is trained by RL
alone. For sampling, and in the end, w is merged into theta.

    J_RL    = GRPO's surrogate over policy tokens, - kl_coef KL, + entropy_coef H
    J_SFT   = mean logprobs over expert tokens
    theta  += lr      ((1 - lam) grad J_SFT(theta, w) + lam grad J_RL(theta, w))
    w      += adapter_lr ((1 - lam) grad J_SFT(theta, w)
                          + lam (grad J_RL(theta, w) - grad J_RL(shadow, w)))
    shadow  = theta + lr grad J_RL(theta, w)       of every update: --shadow one_step
    shadow += lr grad J_RL(shadow, w)              one for the whole run: --shadow persist

Differs from grpo.py by the adapter, the expert rows of a step, and the shadow. The rollouts are
drawn once, from (theta, w), and serve all updates. J_RL(shadow) is clipped before its minus. Where
A < 0, PPO's min has no lower bound: a token of the shadow counts at least shadow_dual_clip A. It is
grpo.py with --lam 1 --adapter_rank 0 --lr 1e-6 --max_completion_tokens 8192; with --lam 0
--adapter_rank 0 the loss is sft.py's. At another rank theta is neither file's, since w moves too.

One RL step from theta is what the reviewers of v1 and v2 describe. All gradients are taken at the
same weights, so the gain compares theta before its joint step with the shadow after its RL step: it
measures that step, not the help of SFT, as w at the new theta would; which the paper means cannot
be decided without its text. A shadow that persists drifts off. In the log, surrogate_gain is
J_RL(theta, w) - J_RL(shadow, w) on the policy's own rollouts, no difference of rewards; shadow_kl
and shadow_ratio_max say how far the shadow is.

Departures, and choices where the paper is silent. GRPO is the RL algorithm, without the paper's KL
to a fixed reference. lam is constant (its appendix; --lam_schedule linear is its method text).
AdamW makes all three updates; theta, w and shadow are clipped separately. SFT and RL draw from one
data set, in different orders. J_SFT is at the sampling temperature. In a group with equal rewards
the gain is exactly 0. Rank 16 and alpha 32 on every linear layer but the head. --lora_rank is of
theta, for one card. --no-meta drops the shadow: w then follows SFT and RL alone (ten points less).

    torchrun bridge.py --model Qwen2.5-1.5B                              one GPU
    torchrun --nproc_per_node 8 bridge.py --model Qwen2.5-3B            the paper's, as far as known
    python bridge.py --model map                                         a laptop
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

reward_fn = common.math_reward  # (problem, completion) -> number or {name: (weight, number)}; --reward F wins


# Config -------------------------------------------------------------------------------------------
@dataclass
class Config:
    # rollouts
    steps: int = 500  # rounds of rollouts and update(s)
    problems_per_step: int = 128  # over all ranks
    group_size: int = 8  # completions per problem
    max_completion_tokens: int = 3072  # EOS and, where there is one, the hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    # bilevel
    lam: float = 0.5  # share of RL; the rest is SFT
    lam_schedule: Literal["constant", "linear"] = "constant"  # linear: from 0 up to 1 over the run
    sft_problems_per_step: int = 64  # expert traces over all ranks
    meta: bool = True  # the cooperative gain in the adapter's gradient
    adapter_rank: int = 16  # of the adapter; 0: none
    adapter_alpha: float = 32.0  # its output is scaled by alpha / rank
    adapter_lr: float = 0.0  # 0: lr
    shadow: Literal["one_step", "persist"] = "one_step"  # see above
    shadow_dual_clip: float = 3.0  # for the shadow, a negative advantage counts at most this many times; 0: off
    # loss
    scale_by_std: bool = True  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: keep them in w, or drop them
    loss_norm: Literal["token", "sequence", "constant"] = "token"  # w of grpo.py's docstring
    clip_low: float = 0.2  # where A < 0, a ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = 0.2  # where A > 0, a ratio above 1 + clip_high gets no gradient; negative: off
    tis_cap: float = 2.0  # largest v of grpo.py's docstring; 0: v = 1
    kl_coef: float = 0.0  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.0  # bonus per nat
    # optimization
    lr: float = 5e-7  # AdamW; constant after the warm-up
    warmup_steps: int = 0  # linear
    updates_per_step: int = 1  # optimizer steps per rollout batch, each on its own share of the groups
    # the same in every method: model, data, sampler, memory, bookkeeping
    run: common.RunConfig = common.RunConfig()


# The loss -----------------------------------------------------------------------------------------
def loss_fn(
    cfg: Config,
    batch: common.Batch,  # the rows: masks, advantages, and the log-probabilities they were sampled with
    logprobs: Tensor,  # (B, T) of the policy, with gradient
    entropy: Tensor,  # (B, T) of the policy
    ref_logprobs: Tensor | None,  # (B, T) of the frozen reference; None without KL
    counts: common.Counts,  # tokens and rows of the whole optimizer step, all ranks
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equation above over one micro-batch: a sum, so that micro-batches and ranks add up."""
    mask, num_tokens, num_rows = batch.policy_mask, counts.policy, counts.rows
    w = common.token_weights(mask, cfg.loss_norm, num_tokens, num_rows, cfg.max_completion_tokens)
    A = batch.advantages[:, None]
    old_logprobs = common.old_logprobs(batch, logprobs)
    v = common.importance_weights(batch, old_logprobs, cfg.tis_cap)
    # First update: old_logprobs are those of this policy, so ratio is exactly 1 but has a gradient.
    ratio = torch.exp(torch.where(batch.policy_mask, logprobs - old_logprobs, 0.0))
    surrogate, clipped = common.clipped_surrogate(ratio, A, cfg.clip_low, cfg.clip_high)
    loss = -(w * v * surrogate).sum()
    metrics = {"clip_fraction": common.token_mean(clipped, mask, num_tokens)}
    metrics["entropy"] = common.token_mean(entropy.detach(), mask, num_tokens)
    if cfg.kl_coef:
        policy_lp, ref_lp = (torch.where(mask, x, 0.0) for x in (logprobs, ref_logprobs))
        kl = common.kl_divergence(policy_lp, ref_lp, cfg.kl_estimator)
        loss = loss + cfg.kl_coef * (w * kl).sum()
        metrics["kl"] = common.token_mean(kl.detach(), mask, num_tokens)
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * (w * entropy).sum()
    return loss, metrics | {"loss": loss.detach()}


# The adapter --------------------------------------------------------------------------------------
class LoraLinear(nn.Linear):
    """x W^T + b + (alpha / rank) x A^T B^T, B = 0 at first. Hu et al. 2021, LoRA, 2106.09685."""

    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_scale * F.linear(F.linear(x, self.w_lora_a), self.w_lora_b)


def add_adapter(model: nn.Module, rank: int, alpha: float, seed: int) -> nn.Module:
    """Give every linear layer but the head an adapter, none at rank 0. Weights keep their names."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.get_decoder().named_modules()) if rank else ():
        if type(module) is nn.Linear and ".lora_" not in name:
            module.__class__, module.lora_scale = LoraLinear, alpha / rank
            start = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            module.w_lora_a = nn.Parameter(start.to(module.weight.dtype))
            module.w_lora_b = nn.Parameter(module.weight.new_zeros(module.out_features, rank))
    return model


def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight) with the adapter added, one at a time; the policy stays (collective)."""
    modules = {name.replace(".base_layer", ""): module for name, module in policy.model.named_modules()}
    for name, weight in common.named_weights(policy):
        module = modules[name.rpartition(".")[0]]
        if name.endswith(".weight") and isinstance(module, LoraLinear):
            a, b = common.full_tensor(module.w_lora_a), common.full_tensor(module.w_lora_b)
            weight = weight + module.lora_scale * b @ a
        if "w_lora_" not in name:
            yield name, weight


def split_parameters(policy: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """(base weights, adapter weights), what is trained of them."""
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    return [p for name, p in named if "w_lora_" not in name], [p for name, p in named if "w_lora_" in name]


# The shadow ---------------------------------------------------------------------------------------
def bound_ratio(batch: common.Batch, logprobs: Tensor, ref_logprobs: Tensor | None, cap: float) -> tuple:
    """(logprobs, ref_logprobs), (B, T), with which loss_fn's surrogate is at least cap A for A < 0.

    A ratio above cap counts as cap, without gradient: dual clip, Ye et al. 2020 (1912.09729).
    The reference moves by as much, so that the KL stays. Nothing moves at cap 0.
    """
    highest = common.old_logprobs(batch, logprobs) + math.log(cap or math.inf)
    bounded = torch.where(batch.advantages[:, None] < 0, torch.minimum(logprobs, highest), logprobs)
    return bounded, None if ref_logprobs is None else ref_logprobs - (logprobs - bounded)


def shadow_backward(cfg: Config, log, shadow, reference, rows: list, counts: common.Counts, world) -> None:
    """Add the shadow's gradient of -J_RL on the policy's rows; log how far it is (collective)."""
    for batch in common.microbatches(rows, cfg.run.tokens_per_microbatch, world):
        logprobs, entropy = common.token_logprobs(shadow, batch, cfg.temperature, cfg.entropy_coef != 0)
        ref_logprobs = common.reference_logprobs(reference, batch, cfg.temperature)
        bounded, ref_logprobs = bound_ratio(batch, logprobs, ref_logprobs, cfg.shadow_dual_clip)
        loss, metrics = loss_fn(cfg, batch, bounded, entropy, ref_logprobs, counts)
        loss.backward()
        log_ratio = logprobs.detach() - common.old_logprobs(batch, logprobs)  # 0 outside a row
        kl = -common.token_mean(log_ratio, batch.policy_mask, counts.policy)  # k1 of policy before || shadow
        means = {"surrogate_gain": metrics["loss"], "shadow_clip_fraction": metrics["clip_fraction"], "shadow_kl": kl}
        log.add(**{name: mean / cfg.updates_per_step for name, mean in means.items()})
        log.add(shadow_ratio_max=log_ratio.exp().max())


# Main ---------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    world = common.init(cfg.run.seed)
    tokenizer = common.load_tokenizer(cfg.run.model)
    train, test = common.load_data(cfg, tokenizer, reward_fn, require_expert=True)
    traced, lora = [p for p in train if p.expert_ids], (cfg.adapter_rank, cfg.adapter_alpha, cfg.run.seed)
    copies = 2 if cfg.meta and cfg.adapter_rank else 1  # the shadow serves the adapter alone
    models = [add_adapter(common.load_model(cfg.run, empty=world.rank > 0), *lora) for _ in range(copies)]
    policy, *shadows = (common.shard(model, world, cfg.run.checkpoint_activations) for model in models)
    shadow = shadows[0] if shadows else None
    reference = common.load_reference(cfg.run, policy, world) if cfg.kl_coef else None
    sampler = common.load_sampler(cfg.run, tokenizer, world, cfg.max_completion_tokens)
    base, adapter = split_parameters(policy)
    parameters = [{"params": base}, {"params": adapter, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.run.weight_decay, fused=True)
    state = {"model": policy, "optimizer": (policy, optimizer)}
    if shadow is not None:
        shadow_base, shadow_adapter = split_parameters(shadow)
        shadow_optimizer = torch.optim.AdamW(shadow_base, lr=cfg.lr, weight_decay=cfg.run.weight_decay, fused=True)
        state |= {"shadow": shadow, "shadow_optimizer": (shadow, shadow_optimizer)}
    log, stop = common.RunLog(cfg, __file__, world), common.StopSignal()
    start, _ = common.resume(log, state)
    sampler.sync(merged_weights(policy))

    for step in range(start, cfg.steps + 1):  # at step n the policy has made n steps; the last pass ends the run
        if test and (step % cfg.run.eval_every == 0 or step == cfg.steps):
            log.phase("evaluation")
            log.set(**common.evaluate(sampler, test, cfg, world))
        last = stop.asked(world) or step == cfg.steps
        if step > start and (last or step % cfg.run.save_every == 0):
            common.save(log, step, state)
        if last:
            break

        log.phase("rollouts")
        problems = common.draw(train, cfg.problems_per_step, step, cfg.run.seed, world)
        sft_problems = common.draw(traced, cfg.sft_problems_per_step, step, cfg.run.seed + 1, world)
        groups = sampler.generate(
            problems,
            None,
            cfg.group_size,
            cfg.max_completion_tokens,
            cfg.temperature,
            (cfg.run.seed, step, 0),
        )

        log.phase("rewards")
        log.add(**common.score(groups))
        common.log_rollouts(log, groups)

        log.phase("advantages")
        for group in groups:
            rewards = torch.tensor([[r.reward for r in group]])
            advantages = common.group_advantages(rewards, cfg.scale_by_std, baseline=rewards.mean())
            for rollout, advantage in zip(group, advantages[0].tolist(), strict=True):
                rollout.advantage = advantage
        kept = [group if cfg.zero_variance == "keep" or any(r.advantage for r in group) else [] for group in groups]

        log.phase("update")
        sampler.sleep()
        warm = min(1.0, (step + 1) / (cfg.warmup_steps or 1))
        lam = cfg.lam if cfg.lam_schedule == "constant" else step / max(1, cfg.steps - 1)
        log.set(lr=common.set_lr(cfg.lr * warm, optimizer), lam=lam)
        optimizer.param_groups[1]["lr"] = (cfg.adapter_lr or cfg.lr) * warm
        if shadow is not None:
            common.set_lr(cfg.lr * warm, shadow_optimizer)
        if cfg.updates_per_step > 1:
            common.store_old_logprobs(policy, [row for group in kept for row in group], cfg, world)
        for update in range(cfg.updates_per_step):
            part = common.share(kept, update, cfg.updates_per_step, cfg.problems_per_step, world)
            rows = [row for group in part for row in group]
            counts = common.count(rows, world)  # over all ranks, as gradients are summed: nothing divides by the ranks
            for batch in common.microbatches(rows, cfg.run.tokens_per_microbatch, world):
                logprobs, entropy = common.token_logprobs(policy, batch, cfg.temperature, cfg.entropy_coef != 0)
                ref_logprobs = common.reference_logprobs(reference, batch, cfg.temperature)
                loss, metrics = loss_fn(cfg, batch, logprobs, entropy, ref_logprobs, counts)
                loss.backward()
                common.log_update(log, metrics, batch, logprobs, cfg.updates_per_step)
                common.keep_old_logprobs(batch, common.old_logprobs(batch, logprobs), world)
                if shadow is not None:
                    log.add(surrogate_gain=-metrics["loss"] / cfg.updates_per_step)
            if shadow is not None and counts.policy:
                common.follow(shadow, policy, part="w_lora_" if cfg.shadow == "persist" else "")
                if cfg.shadow == "one_step":
                    for mine, theirs in zip(base, shadow_base, strict=True):
                        theirs.grad = mine.grad.clone()
                    log.set(shadow_grad_norm=common.clip_gradients(shadow_base, cfg.run.grad_clip))
                    shadow_optimizer.step()
                shadow_backward(cfg, log, shadow, reference, rows, counts, world)
                for mine, theirs in zip(adapter, shadow_adapter, strict=True):
                    mine.grad = mine.grad - theirs.grad  # a loss is -J
                if cfg.shadow == "persist":
                    log.set(shadow_grad_norm=common.clip_gradients(shadow_base, cfg.run.grad_clip))
                    shadow_optimizer.step()
                shadow.zero_grad()
            for parameter in (p for p in policy.parameters() if p.grad is not None):
                parameter.grad *= lam
            taught = common.share(sft_problems, update, cfg.updates_per_step, cfg.sft_problems_per_step, world)
            experts = [common.expert_rollout(problem, tokenizer) for problem in taught]
            num_expert = common.count(experts, world).expert
            for batch in common.microbatches(experts, cfg.run.tokens_per_microbatch, world):
                logprobs, _ = common.token_logprobs(policy, batch, cfg.temperature)
                sft_loss = -common.token_mean(logprobs, batch.expert_mask, num_expert)
                ((1 - lam) * sft_loss).backward()
                log.add(batch.rollouts, sft_loss=sft_loss / cfg.updates_per_step)
            norm = common.clip_gradients(base, cfg.run.grad_clip)
            log.set(grad_norm=norm)
            log.set(lora_grad_norm=common.clip_gradients(adapter, cfg.run.grad_clip))
            optimizer.step()
            optimizer.zero_grad()

        log.phase("sync")
        sampler.sync(merged_weights(policy))
        log.step(step)

    common.finish(log, step, policy, tokenizer, merged_weights(policy))


if __name__ == "__main__":
    main(common.parse(Config))
