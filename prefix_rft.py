"""Prefix-RFT: blending supervised and reinforcement fine-tuning with prefix sampling. Huang et al.
2025, arXiv 2507.01679.

The last row of every group starts from a random prefix of the expert's trace, and the policy
finishes it. The row is scored as a whole and shares the group's baseline. Its prefix is trained
with the row's own advantage, as if the policy had written it, but only at the most uncertain fifth
of the prefix tokens. The shortest allowed prefix shrinks by a cosine: less and less imitation.

    low(t) = low_final + (low_start - low_final) (1 + cos(pi t / prefix_steps)) / 2
    share ~ Uniform(low(t), prefix_high)
    k      = floor(share x tokens of the trace), at least min_prefix_tokens, before the answer
    A_t    = A of the row; 0 on the 1 - keep_share of the prefix tokens with the lowest H
    s_t    = min(ratio A_t, clip(ratio, 1 - clip_low, 1 + clip_high) A_t), but not below
             dual_clip A_t where A_t < 0
    loss   = - sum_t w v s_t  -  entropy_coef sum_t w H

On prefix tokens too the denominator of the ratio is the policy before the update: an expert token
has the full weight A, not LUFFY's A f(p), which is why the filter is needed. Differs from grpo.py
in four places: the prefix, the filter, the dual clip, --advantages. It is grpo.py without them and
with grpo.py's own values of the other defaults:

    --hybrid_rows 0 --dual_clip 0 --scale_by_std --loss_norm token --entropy_coef 0
    --updates_per_step 1

Departures. The paper's launch settings were never published. --advantages group is its equation 3;
split is the repository's dr_grpo_prefix (plain rows and prefix against the plain rows' mean, the
continuation without a baseline; the std, where asked for, is the plain rows' and divides them
alone). Its _v2 can never push a prefix up and is left out. The filter
ranks within a row, so that it does not depend on the packing; --keep_scope microbatch is the
official ranking. Prefixes are token ids, never decoded and tokenised again, and end before the
trace gives its answer away. The official policy term is not divided by its rows but by its
micro-batches: with 64 rows in 3 of them its grad_clip 1.0 is 0.047 on our scale and its
entropy_coef 0.00026. It has no tis_cap.

    torchrun prefix_rft.py --model Qwen2.5-1.5B                          one GPU
    torchrun --nproc_per_node 8 prefix_rft.py --model Qwen2.5-Math-7B --rope_theta 40000 \
        --max_positions 16384 --grad_clip 0.047 --entropy_coef 0.00026 --tis_cap 0  the paper's
    python prefix_rft.py --model map                                     a laptop
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
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
    hybrid_rows: Literal[0, 1] = 1  # rows of the group that the expert begins
    max_completion_tokens: int = 8192  # EOS and, where there is one, the hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    # prefix
    prefix_high: float = 0.95  # largest share of the trace
    low_start: float = 0.95  # smallest share at first
    low_final: float = 0.05  # and at prefix_steps
    prefix_steps: int = 500
    min_prefix_tokens: int = 1
    keep_share: float = 0.2  # share of the prefix tokens that is trained: the most uncertain
    keep_scope: Literal["row", "microbatch"] = "row"  # among which tokens they are ranked
    # loss
    advantages: Literal["group", "split"] = "group"  # see above
    scale_by_std: bool = False  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: keep them in w, or drop them
    loss_norm: Literal["token", "sequence", "constant"] = "constant"  # w of grpo.py's docstring
    clip_low: float = 0.2  # where A < 0, a ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = 0.2  # where A > 0, a ratio above 1 + clip_high gets no gradient; negative: off
    dual_clip: float = 3.0  # a negative advantage counts at most this many times; 0: off
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
    kept = most_uncertain(entropy, batch.expert_mask, cfg.keep_share, cfg.keep_scope)
    A = torch.where(batch.expert_mask & ~kept, 0.0, batch.token_advantages)
    old_logprobs = common.old_logprobs(batch, logprobs)
    v = common.importance_weights(batch, old_logprobs, cfg.tis_cap)
    # First update: old_logprobs are those of this policy, so ratio is exactly 1 but has a gradient.
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))
    surrogate, clipped = common.clipped_surrogate(ratio, A, cfg.clip_low, cfg.clip_high)
    if cfg.dual_clip:
        surrogate = torch.where(A < 0, torch.maximum(surrogate, cfg.dual_clip * A), surrogate)
    loss = -(w * v * surrogate).sum()
    metrics = {"clip_fraction": common.token_mean(clipped, mask, num_tokens)}
    metrics["entropy"] = common.token_mean(entropy.detach(), mask, num_tokens)
    metrics["kept_prefix_tokens"] = kept.sum()
    if cfg.kl_coef:
        policy_lp, ref_lp = (torch.where(mask, x, 0.0) for x in (logprobs, ref_logprobs))
        kl = common.kl_divergence(policy_lp, ref_lp, cfg.kl_estimator)
        loss = loss + cfg.kl_coef * (w * kl).sum()
        metrics["kl"] = common.token_mean(kl.detach(), mask, num_tokens)
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * (w * entropy).sum()
    return loss, metrics | {"loss": loss.detach()}


def most_uncertain(entropy: Tensor, prefix_mask: Tensor, keep_share: float, scope: str) -> Tensor:
    """(B, T) mask of the ceil(keep_share x n) of n prefix tokens with the highest entropy."""
    scores = torch.where(prefix_mask, entropy.detach(), -math.inf)
    scores, valid = (x if scope == "row" else x.reshape(1, -1) for x in (scores, prefix_mask))
    count = torch.ceil(keep_share * valid.sum(1, keepdim=True).double() - 1e-9)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ((rank < count) & valid).view_as(prefix_mask)


# The prefix ---------------------------------------------------------------------------------------
def lowest_share(step: int, start: float, final: float, steps: int) -> float:
    """low(t) above at a 0-based step: a cosine from start to final, final from `steps` on."""
    return final + 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)) * (start - final)


def draw_prefix(trace_tokens: int, low: float, high: float, least: int, rng: np.random.Generator) -> int:
    """Tokens of one prefix; at least one token of the trace is left to the policy."""
    share = min(low, high) + max(0.0, high - low) * rng.random()
    return min(max(int(share * trace_tokens), least), trace_tokens - 1)


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
            cfg.group_size - cfg.hybrid_rows,
            cfg.max_completion_tokens,
            cfg.temperature,
            (cfg.run.seed, step, 0),
        )

        low, prefixes = lowest_share(step, cfg.low_start, cfg.low_final, cfg.prefix_steps), []
        for problem in problems if cfg.hybrid_rows else ():
            rng = np.random.default_rng(common.group_seed((cfg.run.seed, step, 2), problem))
            length = draw_prefix(len(problem.expert_ids), low, cfg.prefix_high, cfg.min_prefix_tokens, rng)
            limit = common.tokens_before_answer(problem, tokenizer)
            prefixes.append(problem.expert_ids[: min(length, limit)])
            log.add_mean("traces_cut_short", [length > limit])
            log.add_mean("prefix_fraction", [len(prefixes[-1]) / (len(problem.expert_ids) or 1)])
        if cfg.hybrid_rows:
            seed = (cfg.run.seed, step, 1)
            hybrids = sampler.generate(problems, prefixes, 1, cfg.max_completion_tokens, cfg.temperature, seed)
            groups = [[*group, *hybrid] for group, hybrid in zip(groups, hybrids, strict=True)]

        log.phase("rewards")
        log.add(**common.score(groups))
        common.log_rollouts(log, groups)

        log.phase("advantages")
        for group in groups:
            rewards = torch.tensor([[r.reward for r in group]])
            advantages = common.group_advantages(rewards, cfg.scale_by_std, baseline=rewards.mean())
            for rollout, advantage in zip(group, advantages[0].tolist(), strict=True):
                rollout.advantage = advantage
            if cfg.hybrid_rows and cfg.advantages == "split" and group[0].problem.expert_ids:
                *plain, hybrid = group
                centred = common.group_advantages(rewards[:, :-1], cfg.scale_by_std, baseline=rewards[:, :-1].mean())
                for rollout, advantage in zip(plain, centred[0].tolist(), strict=True):
                    rollout.advantage = advantage
                hybrid.advantage = hybrid.reward
                hybrid.prefix_advantage = hybrid.reward - rewards[:, :-1].mean().item()
        kept = [
            g if cfg.zero_variance == "keep" or any(r.advantage or r.prefix_advantage for r in g) else []
            for g in groups
        ]

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
