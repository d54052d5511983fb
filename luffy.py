"""LUFFY: learning to reason under off-policy guidance. Yan et al. 2025, arXiv 2504.14945;
official code ElliottYan/LUFFY.

One row of every group is the expert's trace. It shares the group's baseline with the policy's own
rows. Its tokens are off-policy samples whose behaviour probability is defined as 1, so their ratio
is the policy's own probability p. The shaping f(p) = p / (p + gamma) moves the gradient from tokens
that the policy finds likely anyway to those that it finds unlikely.

    ratio = exp(logprobs) = p on expert tokens,  exp(logprobs - old_logprobs) on policy tokens
    loss  = - sum_t w A f(p) over expert tokens  -  sum_t w v A ratio over policy tokens
            - entropy_coef sum_t w H
    The coefficient of grad logprobs on an expert token is A gamma p / (p + gamma)^2: at most A / 4,
    which is reached at p = gamma.

Differs from grpo.py in two places: the expert row, and the ratio on its tokens.
It is grpo.py with --expert_rows 0 and grpo.py's own values of the other defaults:

    --expert_rows 0 --scale_by_std --loss_norm token --clip_low 0.2 --clip_high 0.2 --entropy_coef 0
    --updates_per_step 1

Departures. Where paper and official script differ, the defaults are the script's: no std, a sum
over tokens / max_completion_tokens, no clip (paper: 0.2 on both sides for policy tokens; expert
tokens are never clipped), entropy 0.001 (paper: 0.01). Z of the paper's equation 5 is --loss_norm
token. The script does not divide by its 64 rows a rank, and its entropy bonus is a mean of each
micro-batch: on our scale its grad_clip is 0.016 and its entropy_coef 0.00026. It has no tis_cap.
--gamma -1 is the ablation with an unshaped mixed policy.

    torchrun luffy.py --model Qwen2.5-1.5B                               one GPU
    torchrun --nproc_per_node 8 luffy.py --model Elliott/Qwen2.5-Math-7B-16k-think \
        --grad_clip 0.016 --entropy_coef 0.00026 --tis_cap 0             the paper's
    python luffy.py --model map                                          a laptop
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
    expert_rows: Literal[0, 1] = 1  # rows of the group that are the expert's
    max_completion_tokens: int = 8192  # EOS and, where there is one, the hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    # loss
    scale_by_std: bool = False  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: keep them in w, or drop them
    loss_norm: Literal["token", "sequence", "constant"] = "constant"  # w of grpo.py's docstring
    clip_low: float = -1.0  # where A < 0, a ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = -1.0  # where A > 0, a ratio above 1 + clip_high gets no gradient; negative: off
    gamma: float = 0.1  # of the shaping f(p) = p / (p + gamma) on expert tokens; negative: f(p) = p
    tis_cap: float = 2.0  # largest v of grpo.py's docstring; 0: v = 1
    kl_coef: float = 0.0  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.001  # bonus per nat
    # optimization
    lr: float = 1e-6  # AdamW; constant after the warm-up
    warmup_steps: int = 0  # linear
    updates_per_step: int = 2  # optimizer steps per rollout batch, each on its own share of the groups
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
    mask, num_tokens, num_rows = batch.completion_mask, counts.policy + counts.expert, counts.rows + counts.expert_rows
    w = common.token_weights(mask, cfg.loss_norm, num_tokens, num_rows, cfg.max_completion_tokens)
    A = batch.advantages[:, None]
    old_logprobs = common.old_logprobs(batch, logprobs)
    v = common.importance_weights(batch, old_logprobs, cfg.tis_cap)
    # First update: old_logprobs are those of this policy, so ratio is exactly 1 but has a gradient.
    ratio = torch.exp(torch.where(batch.policy_mask, logprobs - old_logprobs, 0.0))
    surrogate, clipped = common.clipped_surrogate(ratio, A, cfg.clip_low, cfg.clip_high)
    p = torch.exp(torch.where(batch.expert_mask, logprobs, 0.0))
    shaped = p / (p + cfg.gamma) if cfg.gamma >= 0 else p
    surrogate = torch.where(batch.expert_mask, shaped * A, surrogate)
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
    train, test = common.load_data(cfg, tokenizer, reward_fn, require_expert=True)
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
            cfg.group_size - cfg.expert_rows,
            cfg.max_completion_tokens,
            cfg.temperature,
            (cfg.run.seed, step, 0),
        )

        for problem, group in zip(problems, groups, strict=True):
            group.extend([common.expert_rollout(problem, tokenizer)] * cfg.expert_rows * bool(problem.expert_ids))

        log.phase("rewards")
        log.add(**common.score(groups))
        common.log_rollouts(log, groups)

        log.phase("advantages")
        for group in groups:
            rewards = torch.tensor([[r.reward for r in group]])
            advantages = common.group_advantages(rewards, cfg.scale_by_std, baseline=rewards.mean())
            for rollout, advantage in zip(group, advantages[0].tolist(), strict=True):
                rollout.advantage = advantage
        log.add_mean("expert_advantage", [r.advantage for group in groups for r in group if r.num_expert_tokens])
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
                log.add_mean("expert_probability", logprobs.detach().exp(), batch.expert_mask)
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
