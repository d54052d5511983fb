"""HPT: hybrid post-training, SFT where RL fails. Lv et al. 2025, arXiv 2509.04419; official code
TsinghuaC3I/Unify-Post-Training.

A gate on every problem. When at most `gate` rows of its group are right, the rows are thrown away
and the problem's expert trace is imitated instead; otherwise the group trains by GRPO and the
trace is not used. Both kinds meet in one update.

    more than gate rows right:  rows = the group             otherwise:  rows = the expert's trace
    loss = (1 - q) GRPO's over policy tokens  -  sft_coef q / num_expert sum_t logprobs over
           expert tokens,        q = the share of the update's problems that are imitated

So RL and SFT are weighed by their numbers of problems, as the paper's mixture is one per problem;
with --zero_variance drop by those of the problems that are left.
This is ReLIFT without its buffer and second optimizer. Differs from grpo.py in three places: the
gate, the SFT term, the skipped updates. It is grpo.py without them and with its other defaults:

    --gate -1 --skip_above 0 --scale_by_std --loss_norm token --clip_low 0.2 --clip_high 0.2
    --entropy_coef 0 --lr 1e-6 --updates_per_step 1

Departures. The defaults are the official script's: no std, no clip, a sum over tokens /
max_completion_tokens (here also / rows), sft_coef 1 (0.3 at 1.5B), gate 0 (2 for Llama), no update
where the gradient norm exceeds skip_above (not for Llama). Without q and the rows, at 64 rows a
rank, its RL term weighs 8 to 20 times ours beside SFT (12 to 56 times that of two plain means),
8 where few fail: --sft_coef 0.12. Its clip at 1.0 is 0.016 on our scale, its skip at 80 is 1.25,
its entropy bonus 0.00026, and covers the traces too. Its updates have 64 of the rows that are left,
ours half of the problems. It has no tis_cap.

    torchrun hpt.py --model Qwen2.5-1.5B                                 one GPU
    torchrun --nproc_per_node 8 hpt.py --model Qwen2.5-Math-7B --rope_theta 40000 \
        --max_positions 16384 --sft_coef 0.12 --grad_clip 0.016 --skip_above 1.25 \
        --entropy_coef 0.00026 --tis_cap 0                               the script's
    python hpt.py --model map                                            a laptop
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
    gate: int = 0  # groups with at most this many right rows become SFT; negative: no gate
    # loss
    sft_coef: float = 1.0  # of the expert's traces, beside their share of the problems
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
    lr: float = 5e-6  # AdamW; constant after the warm-up
    warmup_steps: int = 0  # linear
    skip_above: float = 80.0  # no update when the norm before clipping exceeds this; 0: always update
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
    mask, num_tokens, num_rows = batch.policy_mask, counts.policy, counts.rows
    q = counts.expert_rows / max(num_rows / cfg.group_size + counts.expert_rows, 1)
    w = (1 - q) * common.token_weights(mask, cfg.loss_norm, num_tokens, num_rows, cfg.max_completion_tokens)
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
    sft_loss = -common.token_mean(logprobs, batch.expert_mask, counts.expert)
    metrics["sft_loss"] = sft_loss.detach()
    loss = loss + cfg.sft_coef * q * sft_loss if counts.expert else loss
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

        failed = [sum(r.solved for r in group) <= cfg.gate and group[0].problem.expert_ids != [] for group in groups]
        log.add_mean("gated", failed)
        for i, problem in enumerate(problems):
            kept[i] = [common.expert_rollout(problem, tokenizer)] if failed[i] else kept[i]

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
            if not cfg.skip_above or norm <= cfg.skip_above:
                optimizer.step()
            log.add(skipped_updates=float(0 < cfg.skip_above < norm) / world.size)
            optimizer.zero_grad()

        log.phase("sync")
        sampler.sync(policy)
        log.step(step)

    common.finish(log, step, policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Config))
