"""ReLIFT: reinforcement learning interleaved with online fine-tuning. Ma et al. 2025, arXiv
2506.07527; official code TheRoadQaQ/ReLIFT.

Train with GRPO. A problem that every row of its group fails teaches GRPO nothing, so it is put
into a buffer together with its expert's trace. When the buffer holds buffer_size problems, one
step of SFT on them follows. So the frequency adapts by itself: many SFT steps early, few later.
Expert traces never enter a group or its baseline.

    after the rewards:  buffer = [problems of this step whose rewards are all 0] + buffer
    RL step:            grpo.py's, with its own optimizer
    SFT step:           when len(buffer) >= buffer_size, on the newest buffer_size of them, at most
                        once a step, with an optimizer of its own
      loss = - 1 / num_expert sum_t (logprobs + sft_entropy_coef H)

Differs from grpo.py in two places: the buffer, and the SFT step (sft.py's loss, entropy bonus).
It is grpo.py with --buffer_size 0 and grpo.py's own values of the other defaults:

    --buffer_size 0 --scale_by_std --loss_norm token --clip_low 0.2 --clip_high 0.2 --entropy_coef 0
    --updates_per_step 1

Departures. The defaults are the official script's: no std, a sum over tokens /
max_completion_tokens, no clip, two AdamW states on the same weights. It does not divide by its 64
rows a rank, and its entropy bonus is a mean of each micro-batch: on our scale it clips the RL step
at 0.7 / 64 = 0.011 (ours: 1), and entropy_coef is 0.00026. Its SFT sizes are not divided by the
ranks, so that its SFT gradient is too small by their number, and its sft_grad_clip is 8 here. It
has no tis_cap. The paper's best sft_entropy_coef is 1e-4, its code has 1e-3. Expert traces are the
data set's, verified once at load.

    torchrun relift.py --model Qwen2.5-1.5B                              one GPU
    torchrun --nproc_per_node 8 relift.py --model Elliott/Qwen2.5-Math-7B-16k-think --steps 1070 \
        --grad_clip 0.011 --sft_grad_clip 8 --entropy_coef 0.00026 --tis_cap 0      the paper's
    python relift.py --model map                                         a laptop
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
    scale_by_std: bool = False  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: keep them in w, or drop them
    loss_norm: Literal["token", "sequence", "constant"] = "constant"  # w of grpo.py's docstring
    clip_low: float = -1.0  # where A < 0, a ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = -1.0  # where A > 0, a ratio above 1 + clip_high gets no gradient; negative: off
    tis_cap: float = 2.0  # largest v of grpo.py's docstring; 0: v = 1
    kl_coef: float = 0.0  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.001  # bonus per nat
    # SFT step
    buffer_size: int = 128  # failed problems that start an SFT step and that it trains on; 0 or less: no such steps
    buffer_order: Literal["newest", "oldest"] = "newest"  # which of them when the buffer holds more
    sft_lr: float = 1e-6  # constant
    sft_grad_clip: float = 1.0  # norm of the summed gradient; 0: off
    sft_entropy_coef: float = 0.001  # bonus per nat
    shared_optimizer: bool = False  # one AdamW state for both kinds of step
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


def sft_loss_fn(
    cfg: Config, batch: common.Batch, logprobs: Tensor, entropy: Tensor, counts: common.Counts
) -> tuple[Tensor, dict[str, Tensor]]:
    """The SFT step's equation over one micro-batch: sft.py's loss with an entropy bonus."""
    mask, num_tokens = batch.expert_mask, counts.expert
    loss = -common.token_mean(logprobs, mask, num_tokens)
    if cfg.sft_entropy_coef:
        loss = loss - cfg.sft_entropy_coef * common.token_mean(entropy, mask, num_tokens)
    return loss, {"sft_entropy": common.token_mean(entropy.detach(), mask, num_tokens), "sft_loss": loss.detach()}


# The buffer ---------------------------------------------------------------------------------------
def push_and_pop(buffer: list[str], failed: list[str], size: int, order: str) -> tuple[list[str], list[str]]:
    """(ids that stay, ids for the SFT step: `size` or none); the newest block comes first."""
    buffer = [*failed, *buffer]
    if size <= 0 or len(buffer) < size:
        return buffer if size > 0 else [], []
    return (buffer[size:], buffer[:size]) if order == "newest" else (buffer[:-size], buffer[-size:])


# Main ---------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    world = common.init(cfg.run.seed)
    tokenizer = common.load_tokenizer(cfg.run.model)
    train, test = common.load_data(cfg, tokenizer, reward_fn, require_expert=True)
    by_id = {problem.id: problem for problem in train if problem.expert_ids}
    policy = common.load_policy(cfg.run, world)
    reference = common.load_reference(cfg.run, policy, world) if cfg.kl_coef else None
    sampler = common.load_sampler(cfg.run, tokenizer, world, cfg.max_completion_tokens)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.run.weight_decay, fused=True)
    sft_optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.sft_lr, weight_decay=cfg.run.weight_decay, fused=True)
    sft_optimizer = optimizer if cfg.shared_optimizer else sft_optimizer
    state = {"model": policy, "optimizer": (policy, optimizer), "sft_optimizer": (policy, sft_optimizer)}
    log, stop = common.RunLog(cfg, __file__, world), common.StopSignal()
    start, extra = common.resume(log, state)
    buffer = extra.get("buffer", [])
    sampler.sync(policy)

    for step in range(start, cfg.steps + 1):  # at step n the policy has made n steps; the last pass ends the run
        if test and (step % cfg.run.eval_every == 0 or step == cfg.steps):
            log.phase("evaluation")
            log.set(**common.evaluate(sampler, test, cfg, world))
        last = stop.asked(world) or step == cfg.steps
        if step > start and (last or step % cfg.run.save_every == 0):
            common.save(log, step, state, buffer=buffer)
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

        log.phase("buffer")
        failed = common.gather(["" if any(r.solved for r in group) else group[0].problem.id for group in groups], world)
        buffer, taken = push_and_pop(buffer, list(filter(by_id.get, failed)), cfg.buffer_size, cfg.buffer_order)
        log.set(buffer=len(buffer), sft_rows=len(taken))

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

        log.phase("sft")
        rows = [common.expert_rollout(by_id[i], tokenizer) for i in taken[world.rank :: world.size]]
        counts = common.count(rows, world)
        for batch in common.microbatches(rows, cfg.run.tokens_per_microbatch, world):
            logprobs, entropy = common.token_logprobs(policy, batch, cfg.temperature, cfg.sft_entropy_coef != 0)
            loss, metrics = sft_loss_fn(cfg, batch, logprobs, entropy, counts)
            loss.backward()
            log.add(batch.rollouts, **metrics)
        if taken:
            common.set_lr(cfg.sft_lr, sft_optimizer)
            log.set(sft_grad_norm=common.clip_gradients(policy.parameters(), cfg.sft_grad_clip))
            sft_optimizer.step()
            sft_optimizer.zero_grad()

        log.phase("sync")
        sampler.sync(policy)
        log.step(step)

    common.finish(log, step, policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Config))
