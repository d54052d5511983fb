"""DAPO: decoupled clip and dynamic sampling policy optimization. Yu et al. 2025, arXiv 2503.14476;
official code verl, recipe/dapo.

A group whose rows are all right or all wrong has no advantage, and the more a policy learns, the
more of a batch is such groups. DAPO throws them away and draws other problems until the batch is
full. Besides, unlikely tokens may rise further before they are clipped, one mean is over all
tokens, and reward falls towards the length limit, where the verdict on a row that is cut is noise.

    round: the next problems_per_step problems in the line of epochs, a group of each
    batch: of all rounds, the first problems_per_step groups with right and with wrong rows
    A     = (R - mean(R)) / std(R)        R = reward + overlong_coef P
    P     = 0 up to max - cache tokens, from there (max - cache - tokens) / cache; -1 at max
    loss  = that of grpo.py               max = max_completion_tokens, cache = overlong_cache max

Differs from grpo.py in two places: the batch and the penalty. It is grpo.py without them and with
its other defaults:

    --zero_variance keep --overlong_cache 0 --clip_high 0.2 --problems_per_step 128 --group_size 8
    --max_completion_tokens 8192 --warmup_steps 0 --updates_per_step 1 --weight_decay 0.01

Departures. Defaults are the script's: 16 updates of 32 groups of 16, a cache of 4096 tokens. Its
rewards are -1 and 1, so its penalty of 1 is 0.5 here. Its equation has a token mean for each group,
its code for each micro-batch; here it is the update's. The paper sets no limit to the rounds; the
script stops the run after ten of 1536 problems. Here the step then trains what it has, in fewer
updates. Problems drawn beyond a full batch come first in the next step; the script loses them. It
has prompts of 2048 tokens, a dual clip of 10 and no tis_cap; the paper 20 warm-up steps. The
paper's overlong filtering is not in its best run (the recipe says so), and not here. The log's
reward, mixed, solved and failed are of all groups drawn, without the penalty.

    torchrun dapo.py --model Qwen2.5-1.5B --problems_per_step 64 --updates_per_step 2    one GPU
    torchrun --nproc_per_node 8 dapo.py --model Qwen2.5-32B --tensor_parallel 8 \
        --tis_cap 0                                                      the paper's
    python dapo.py --model map                                           a laptop
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
    problems_per_step: int = 512  # over all ranks
    group_size: int = 16  # completions per problem
    max_completion_tokens: int = 20480  # EOS and, where there is one, the hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    resample_rounds: int = 10  # at most, after the first, until enough groups are mixed
    # loss
    overlong_cache: float = 0.2  # last share of max_completion_tokens, in which the penalty grows; 0: no penalty
    overlong_coef: float = 0.5  # penalty at max_completion_tokens; rewards are 0 and 1
    scale_by_std: bool = True  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "drop"  # groups with equal rewards: keep them in w, or drop them
    loss_norm: Literal["token", "sequence", "constant"] = "token"  # w of grpo.py's docstring
    clip_low: float = 0.2  # where A < 0, a ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = 0.28  # where A > 0, a ratio above 1 + clip_high gets no gradient; negative: off
    tis_cap: float = 2.0  # largest v of grpo.py's docstring; 0: v = 1
    kl_coef: float = 0.0  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.0  # bonus per nat
    # optimization
    lr: float = 1e-6  # AdamW; constant after the warm-up
    warmup_steps: int = 10  # linear
    updates_per_step: int = 16  # optimizer steps per rollout batch, each on its own share of the groups
    # the same in every method: model, data, sampler, memory, bookkeeping
    run: common.RunConfig = common.RunConfig(weight_decay=0.1)


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


# The batch ----------------------------------------------------------------------------------------
def to_keep(cfg: Config, groups: list[list[common.Rollout]], world: common.World) -> list[bool]:
    """Of all ranks' groups of a round, in the draw's order: right and wrong rows? (collective)"""
    return common.gather([cfg.zero_variance == "keep" or len({r.reward for r in group}) > 1 for group in groups], world)


def fill(groups: list, keep: list[bool], n: int, world: common.World) -> tuple[list, int]:
    """(the first n groups to keep, [] where another rank has one; how many problems that took)."""
    mine = iter(groups)
    drawn = [next(mine) if k % n % world.size == world.rank else [] for k in range(len(keep))]
    batch = [k for k, good in enumerate(keep) if good][:n]
    return [drawn[k] for k in batch], batch[-1] + 1 if len(batch) == n else len(keep)


def length_reward(cfg: Config, length: int) -> float:
    """Eq. 13 times overlong_coef: 0 before the cache, a line down to the limit, flat beyond it."""
    cache = cfg.overlong_cache * cfg.max_completion_tokens
    return -cfg.overlong_coef * min(1.0, max(0.0, 1 - (cfg.max_completion_tokens - length) / cache)) if cache else 0.0


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
    start, extra = common.resume(log, state)
    place = extra.get("place", 0)  # of the next problem in the line of epochs
    sampler.sync(policy)

    for step in range(start, cfg.steps + 1):  # at step n the policy has made n steps; the last pass ends the run
        if test and (step % cfg.run.eval_every == 0 or step == cfg.steps):
            log.phase("evaluation")
            log.set(**common.evaluate(sampler, test, cfg, world))
        last = stop.asked(world) or step == cfg.steps
        if step > start and (last or step % cfg.run.save_every == 0):
            common.save(log, step, state, place=place)
        if last:
            break

        log.phase("rollouts")
        problems = common.draw(train, cfg.problems_per_step, step, cfg.run.seed, world, place)
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
        keep = to_keep(cfg, groups, world)
        while sum(keep) < cfg.problems_per_step and len(keep) <= cfg.resample_rounds * cfg.problems_per_step:
            log.phase("rollouts")
            problems = common.draw(train, cfg.problems_per_step, step, cfg.run.seed, world, place + len(keep))
            seed = (cfg.run.seed, step, len(keep) // cfg.problems_per_step)
            fresh = sampler.generate(problems, None, cfg.group_size, cfg.max_completion_tokens, cfg.temperature, seed)
            log.phase("rewards")
            log.add(**common.score(fresh))
            groups, keep = groups + fresh, keep + to_keep(cfg, fresh, world)
        kept, done = fill(groups, keep, cfg.problems_per_step, world)
        place += done
        log.set(resample_rounds=len(keep) // cfg.problems_per_step - 1, groups_drawn=len(keep), groups_kept=len(kept))
        log.add_mean("overlong_penalty", [length_reward(cfg, len(r.completion_ids)) for group in groups for r in group])
        common.log_rollouts(log, groups)

        log.phase("advantages")
        for group in groups:
            rewards = torch.tensor([[r.reward + length_reward(cfg, len(r.completion_ids)) for r in group]])
            advantages = common.group_advantages(rewards, cfg.scale_by_std, baseline=rewards.mean())
            for rollout, advantage in zip(group, advantages[0].tolist(), strict=True):
                rollout.advantage = advantage

        log.phase("update")
        sampler.sleep()
        warm = min(1.0, (step + 1) / (cfg.warmup_steps or 1))
        log.set(lr=common.set_lr(cfg.lr * warm, optimizer))
        if cfg.updates_per_step > 1:
            common.store_old_logprobs(policy, [row for group in kept for row in group], cfg, world)
        updates = -(-len(kept) * min(cfg.updates_per_step, cfg.problems_per_step) // cfg.problems_per_step) or 1
        for update in range(updates):  # of as many groups each where the batch is not full, so fewer
            part = common.share(kept, update, updates, len(kept), common.World(0, 1, world.device))
            rows = [row for group in part for row in group]
            counts = common.count(rows, world)  # over all ranks, as gradients are summed: nothing divides by the ranks
            for batch in common.microbatches(rows, cfg.run.tokens_per_microbatch, world):
                logprobs, entropy = common.token_logprobs(policy, batch, cfg.temperature, cfg.entropy_coef != 0)
                ref_logprobs = common.reference_logprobs(reference, batch, cfg.temperature)
                loss, metrics = loss_fn(cfg, batch, logprobs, entropy, ref_logprobs, counts)
                loss.backward()
                common.log_update(log, metrics, batch, logprobs, updates)
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
