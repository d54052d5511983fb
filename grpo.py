"""GRPO: group relative policy optimization. Shao et al. 2024, arXiv 2402.03300.

Sample a group of completions of each problem, let the verifier score them, and push every
completion up or down by how much it differs from its group's mean. This mean is the baseline, so
no value network is needed. This is the parent file: the other online methods descend from it.

    A     = (reward - mean(rewards)) / std(rewards)                 one number per completion
    ratio = exp(logprobs - old_logprobs)
    loss  = - sum_t w v min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)
            + kl_coef sum_t w KL(policy || reference)  -  entropy_coef sum_t w H
    v     = min(exp(old_logprobs - sampler_logprobs), tis_cap)     1 where sampler and trainer agree
    w     = 1 / tokens (token), 1 / (rows x tokens of the row) (sequence),
            1 / (rows x max_completion_tokens) (constant)    rows, tokens: of the update, all ranks

Departures. The paper's setting is --loss_norm sequence --kl_coef 0.04; the default is the token
mean of DAPO (2503.14476) without a reference model. Dr.GRPO (2503.20783) is --no-scale_by_std
--loss_norm constant. DAPO's loss is --clip_high 0.28 --zero_variance drop; dapo.py draws others
for the groups that are dropped.

    torchrun grpo.py --model Qwen2.5-1.5B                                one GPU
    torchrun --nproc_per_node 8 grpo.py --model Qwen2.5-7B --clip_high 0.28 --updates_per_step 2
    python grpo.py --model map                                           a laptop
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common

reward_fn = common.math_reward  # (problem, completion) -> number or {name: (weight, number)}; --reward F wins


# Config -------------------------------------------------------------------------------------------
@dataclass
class Config:
    # rollouts
    steps: int = 500  # rounds of rollouts and update(s)
    problems_per_step: int = 128  # over all ranks
    group_size: int = 8  # completions per problem
    max_completion_tokens: int = 8192  # EOS and, where there is one, the hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
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
    lr: float = 1e-6  # AdamW; constant after the warm-up
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


# Main ---------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    world = common.init(cfg.run.seed)
    tokenizer = common.load_tokenizer(cfg.run.model)
    train, test = common.load_data(cfg, tokenizer, reward_fn)
    policy = common.load_policy(cfg.run, world)
    reference = common.load_reference(cfg.run, policy, world) if cfg.kl_coef else None
    sampler = common.load_sampler(cfg.run, tokenizer, world, cfg.max_completion_tokens)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.run.weight_decay, fused=True)
    state = {"model": policy, "optimizer": (policy, optimizer)}
    log, stop = common.RunLog(cfg, __file__, world), common.StopSignal()
    start, _ = common.resume(log, state)
    sampler.sync(policy)

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
        log.set(lr=common.set_lr(cfg.lr * warm, optimizer))
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
            norm = common.clip_gradients(policy.parameters(), cfg.run.grad_clip)
            log.set(grad_norm=norm)
            optimizer.step()
            optimizer.zero_grad()

        log.phase("sync")
        sampler.sync(policy)
        log.step(step)

    common.finish(log, step, policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Config))
