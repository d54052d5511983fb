"""CHORD: on-policy RL meets off-policy experts by dynamic weighting. Zhang et al. 2025, arXiv
2508.11408; official code in Trinity-RFT.

Every update trains on the policy's own rows by GRPO and on a separate batch of expert traces by
SFT. In CHORD-mu the share mu of SFT falls over the run, from imitation to exploration. In CHORD-phi
it is small and constant, and a token weight p (1 - p) keeps SFT away from tokens that the policy
has learned and from those that would break it.

    loss = (1 - mu) GRPO's over policy tokens
           - mu / num_expert sum_t phi logprobs over expert tokens
    mu   = mu_peak (step + 1) / mu_warmup up to mu_warmup,
           then a cosine to mu_valley over mu_decay steps, then mu_valley           CHORD-mu
    phi  = p (1 - p), constant, with mu_peak = mu_valley = 0.1                      CHORD-phi

Differs from grpo.py in the expert rows of a step and in the mix of the two losses. It is grpo.py
with --mu_peak 0 --mu_valley 0 --problems_per_step 128. Where both are 1 the loss is sft.py's.

Departures. The defaults are those of the official file's comments on CHORD-mu; the file itself has
--mu_peak 0.5 --mu_valley 0.02 --mu_warmup 200 --mu_decay 400 --phi. The official SFT and GRPO means
are per micro-batch. Its ratio has the sampler's log-probabilities below (here those of the policy
before the update, with v), no tis_cap, and a dual clip of 3 where A < 0.

    torchrun chord.py --model Qwen2.5-1.5B                               one GPU
    torchrun --nproc_per_node 8 chord.py --model Qwen2.5-7B-Instruct --max_completion_tokens 10240
    python chord.py --model map                                          a laptop
"""

import math
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
    problems_per_step: int = 32  # over all ranks
    group_size: int = 8  # completions per problem
    max_completion_tokens: int = 8192  # EOS and, where there is one, the hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    # SFT
    sft_problems_per_step: int = 64  # expert traces over all ranks
    mu_peak: float = 0.9  # largest share of SFT in the loss
    mu_valley: float = 0.05  # and the last
    mu_warmup: int = 0  # steps up to the peak, linear
    mu_decay: int = 200  # steps from peak to valley, cosine
    phi: bool = False  # weight expert tokens by p (1 - p)
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
    mu: float,  # of this step
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
    p = torch.exp(torch.where(batch.expert_mask, logprobs.detach(), 0.0))
    phi = p * (1 - p) if cfg.phi else torch.ones_like(p)
    w_sft = torch.where(batch.expert_mask, phi / max(counts.expert, 1), 0.0)
    sft_loss = -(w_sft * torch.where(batch.expert_mask, logprobs, 0.0)).sum()
    metrics["sft_loss"] = sft_loss.detach()
    loss = (1 - mu) * loss + mu * sft_loss
    return loss, metrics | {"loss": loss.detach()}


def sft_share(step: int, peak: float, valley: float, warmup: int, decay: int) -> float:
    """mu above at a 0-based step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step + 1 - warmup) / max(1, decay))
    return valley + 0.5 * (peak - valley) * (1 + math.cos(math.pi * done))


# Main ---------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    world = common.init(cfg.run.seed)
    tokenizer = common.load_tokenizer(cfg.run.model)
    train, test = common.load_data(cfg, tokenizer, reward_fn, require_expert=True)
    traced = [p for p in train if p.expert_ids]
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
        mu = sft_share(step, cfg.mu_peak, cfg.mu_valley, cfg.mu_warmup, cfg.mu_decay)
        sft_problems = common.draw(traced, cfg.sft_problems_per_step, step, cfg.run.seed + 1, world) if mu else []
        log.set(mu=mu)
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
            taught = common.share(sft_problems, update, cfg.updates_per_step, cfg.sft_problems_per_step, world)
            rows += [common.expert_rollout(problem, tokenizer) for problem in taught]
            counts = common.count(rows, world)  # over all ranks, as gradients are summed: nothing divides by the ranks
            for batch in common.microbatches(rows, cfg.run.tokens_per_microbatch, world):
                logprobs, entropy = common.token_logprobs(policy, batch, cfg.temperature, cfg.entropy_coef != 0)
                ref_logprobs = common.reference_logprobs(reference, batch, cfg.temperature)
                loss, metrics = loss_fn(cfg, batch, logprobs, entropy, ref_logprobs, counts, mu)
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
