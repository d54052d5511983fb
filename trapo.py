"""TRAPO: trust-region adaptive policy optimization. Su et al. 2025, arXiv 2512.17636; official code
Su-my/TRAPO.

A group is drawn in micro-groups. The first is plain. Each later one is given a longer expert
prefix, but only while the mean reward of the rows so far is below its threshold. All rows share one
baseline. What the policy writes is trained by GRPO. The prefix is trained by a trust-region SFT,
which follows the expert fully where the policy already gives a token at least trsft_alpha, and
below that in proportion to p.

    micro-group j:  prefix = the first share_j of the trace if mean(rewards so far) < threshold_j,
                    else none
    loss = - sum_t w (v A ratio + entropy_coef H) over policy tokens
           - sft_coef sum_t w p / max(p, trsft_alpha) over the prefix tokens of one row per prefix
    The maximum is a constant: a prefix token's coefficient of grad logprobs is min(1, p / alpha).

Differs from grpo.py in the micro-groups and in the prefix term. With --shares 0 0 0 0 it is GRPO on
a group that is drawn in four parts.

Departures. The defaults are the official script's: 8 problems in one update, shares 0.25, 0.5, 1,
which it snaps to paragraphs and which here end before the answer, thresholds 0.5, 2/3, 1. The
paper's are in the second command; its updates are not known. The full trace at share 1 is the row
itself, nothing is drawn after it; the code reads a second trace there. Expert tokens get no
advantage and no entropy bonus; in the code they get the bonus. It does not divide by its 8 rows a
rank, and its bonus is a mean of each micro-batch: on our scale its grad_clip is 0.125 (0.016 with
the 64 rows of the second command), its entropy_coef 0.0004 to 0.001. It has no tis_cap.

    torchrun trapo.py --model Qwen2.5-1.5B                               one GPU
    torchrun --nproc_per_node 8 trapo.py --model Qwen2.5-Math-7B --rope_theta 40000 \
        --max_positions 16384 --problems_per_step 128 --updates_per_step 2 --shares 0 0.2 0.5 1 \
        --thresholds -1 0.5 0.7 0.9 --lr 5e-6 --grad_clip 0.016 --entropy_coef 0.00026 \
        --tis_cap 0                                                      the paper's
    python trapo.py --model map                                          a laptop
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
    problems_per_step: int = 8  # over all ranks
    group_size: int = 8  # completions per problem
    max_completion_tokens: int = 8192  # EOS and, where there is one, the hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    # micro-groups
    sizes: tuple[int, int, int, int] = (4, 2, 1, 1)  # rows, group_size in all
    shares: tuple[float, float, float, float] = (0.0, 0.25, 0.5, 1.0)  # of the expert's trace that is given
    thresholds: tuple[float, float, float, float] = (-1.0, 0.5, 2 / 3, 1.0)  # a prefix is given where the mean is below
    # loss
    sft_coef: float = 1.0  # of the prefix term
    trsft_alpha: float = 0.1  # probability from which a prefix token has its full weight
    scale_by_std: bool = False  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: keep them in w, or drop them
    loss_norm: Literal["token", "sequence", "constant"] = "constant"  # w of grpo.py's docstring
    clip_low: float = -1.0  # where A < 0, a ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = -1.0  # where A > 0, a ratio above 1 + clip_high gets no gradient; negative: off
    tis_cap: float = 2.0  # largest v of grpo.py's docstring; 0: v = 1
    kl_coef: float = 0.0  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.001  # bonus per nat
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
    taught = batch.expert_mask & batch.taught[:, None]
    total = (num_tokens + counts.expert, num_rows + counts.expert_rows)
    w = common.token_weights(batch.completion_mask, cfg.loss_norm, *total, cfg.max_completion_tokens)
    w, w_prefix = w * mask, w * taught
    A = batch.advantages[:, None]
    old_logprobs = common.old_logprobs(batch, logprobs)
    v = common.importance_weights(batch, old_logprobs, cfg.tis_cap)
    # First update: old_logprobs are those of this policy, so ratio is exactly 1 but has a gradient.
    ratio = torch.exp(torch.where(batch.policy_mask, logprobs - old_logprobs, 0.0))
    surrogate, clipped = common.clipped_surrogate(ratio, A, cfg.clip_low, cfg.clip_high)
    loss = -(w * v * surrogate).sum()
    metrics = {"clip_fraction": common.token_mean(clipped, mask, num_tokens)}
    metrics["entropy"] = common.token_mean(entropy.detach(), mask, num_tokens)
    p = torch.exp(torch.where(taught, logprobs, 0.0))
    sft_loss = -(w_prefix * p / p.detach().clamp(min=cfg.trsft_alpha)).sum()
    loss = loss + cfg.sft_coef * sft_loss
    metrics["sft_loss"] = sft_loss.detach()
    if cfg.kl_coef:
        policy_lp, ref_lp = (torch.where(mask, x, 0.0) for x in (logprobs, ref_logprobs))
        kl = common.kl_divergence(policy_lp, ref_lp, cfg.kl_estimator)
        loss = loss + cfg.kl_coef * (w * kl).sum()
        metrics["kl"] = common.token_mean(kl.detach(), mask, num_tokens)
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * (w * entropy).sum()
    return loss, metrics | {"loss": loss.detach()}


# The micro-groups ---------------------------------------------------------------------------------
def prefix_tokens(trace_tokens: int, share: float, threshold: float, solved: list[bool]) -> int:
    """Expert tokens of a micro-group: share x trace where the mean is below threshold, else 0."""
    if not solved or sum(solved) / len(solved) >= threshold:
        return 0
    return int(share * trace_tokens)


def mark_taught(group: list[common.Rollout]) -> None:
    """The first row that has a prefix teaches it; its other rows would teach the same again."""
    lengths = [r.num_expert_tokens for r in group]
    for place, rollout in enumerate(group):
        rollout.taught = lengths.index(rollout.num_expert_tokens) == place


# Main ---------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    world = common.init(cfg.run.seed)
    tokenizer = common.load_tokenizer(cfg.run.model)
    if sum(cfg.sizes) != cfg.group_size:
        common.fail(f"--sizes {cfg.sizes} do not add up to --group_size {cfg.group_size}")
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
        limits = [common.tokens_before_answer(problem, tokenizer) for problem in problems]
        groups: list[list[common.Rollout]] = [[] for _ in problems]
        for stage, (size, share, threshold) in enumerate(zip(cfg.sizes, cfg.shares, cfg.thresholds, strict=True)):
            log.phase("rollouts")
            lengths = [
                prefix_tokens(len(problem.expert_ids), share, threshold, [r.solved for r in group])
                for problem, group in zip(problems, groups, strict=True)
            ]
            if share < 1:  # the whole trace is a row of its own, a part of it must leave something to find
                log.add_mean("traces_cut_short", [n > limit for n, limit in zip(lengths, limits, strict=True) if n])
                lengths = list(map(min, lengths, limits))
            asked = [i for i, problem in enumerate(problems) if lengths[i] < (len(problem.expert_ids) or 1)]
            drawn = sampler.generate(
                [problems[i] for i in asked],
                [problems[i].expert_ids[: lengths[i]] for i in asked],
                size,
                cfg.max_completion_tokens,
                cfg.temperature,
                (cfg.run.seed, step, stage),
            )
            sampled = dict(zip(asked, drawn, strict=True))
            made = [
                sampled.get(i) or [common.expert_rollout(problem, tokenizer) for _ in range(size)]
                for i, problem in enumerate(problems)
            ]

            log.phase("rewards")
            log.add(**common.score(made))
            groups = [group + rows for group, rows in zip(groups, made, strict=True)]
        common.log_rollouts(log, groups)
        log.add_mean("guided_rows", [r.num_expert_tokens > 0 for group in groups for r in group])

        log.phase("advantages")
        for group in groups:
            rewards = torch.tensor([[r.reward for r in group]])
            advantages = common.group_advantages(rewards, cfg.scale_by_std, baseline=rewards.mean())
            for rollout, advantage in zip(group, advantages[0].tolist(), strict=True):
                rollout.advantage = advantage
            mark_taught(group)
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
