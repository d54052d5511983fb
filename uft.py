"""UFT: unifying supervised and reinforcement fine-tuning. Liu et al. 2025, arXiv 2505.16984;
official code liumy2010/UFT.

Every group starts from a hint: a random prefix of the expert's trace without its answer, shared by
all rows. The policy is trained by GRPO on what it writes itself, and a little by likelihood on the
hint. The expected share of its chunks that is shown falls by a cosine from hint_high to hint_low
over hint_steps steps and is 0 afterwards, so training ends as plain GRPO.

    p(t)  = hint_low + (hint_high - hint_low) (1 + cos(pi t / hint_steps)) / 2    t = step + 1
            up to t = hint_steps, and 0 afterwards
    m     = min(hint_chunks, segments but the last),   k ~ Binomial(m, p(t)), one draw per problem
    hint  = the first k of m chunks
    loss  = GRPO's over policy tokens, with KL
            - hint_coef / num_hint sum_t logprobs over hint tokens

Differs from grpo.py in three places: the hint, its likelihood, and the reward of a wrong answer in
a box. It is grpo.py with no hints and with its values of the other defaults, for any hint_coef:

    --hint_high 0 --hint_low 0 --format_reward 0 --kl_coef 0 --entropy_coef 0 --updates_per_step 1
    --group_size 8 --problems_per_step 128 --max_completion_tokens 8192

Departures. Where paper and official code differ, the defaults are the code's: segments (the data
set's steps, else lines, else sentences) regrouped into at most five chunks that span all but the
last segment and end before the answer, the mean over hint tokens (--hint_norm sum is the paper's),
an entropy bonus of 0.001 (the paper has none). As in both, KL is over policy tokens only, and a
wrong answer in a box earns 0.1, which the log's reward leaves out. The code's means of micro-batch
means are means over all tokens here, and it has no tis_cap. The hint counts against
max_completion_tokens and opens the assistant's turn. --hint_unit segment and token draw from
Binomial(segments) and Binomial(tokens). The paper's R3, every length equally likely to the end of
the run, is --schedule uniform --hint_coef 0.

    torchrun uft.py --model Qwen2.5-1.5B                                 one GPU
    torchrun --nproc_per_node 2 uft.py --model Qwen2.5-0.5B --tis_cap 0  the paper's
    python uft.py --model map                                            a laptop
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
    problems_per_step: int = 256  # over all ranks
    group_size: int = 4  # completions per problem
    max_completion_tokens: int = 1024  # EOS and, where there is one, the hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    # hint
    hint_high: float = 0.95  # expected share of the chunks that is shown at first
    hint_low: float = 0.05  # and at hint_steps
    hint_steps: int = 300  # afterwards a cosine shows nothing
    hint_chunks: int = 5  # pieces that a trace is cut into, at most
    hint_unit: Literal["chunk", "segment", "token"] = "chunk"  # what the binomial counts
    schedule: Literal["cosine", "uniform"] = "cosine"  # uniform: every length equally likely, to the end
    format_reward: float = 0.1  # of a wrong answer in a box
    # loss
    hint_coef: float = 0.001  # of the likelihood of hint tokens
    hint_norm: Literal["mean", "sum"] = "mean"  # over all hint tokens; or each row's sum, then the mean over rows
    scale_by_std: bool = True  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: keep them in w, or drop them
    loss_norm: Literal["token", "sequence", "constant"] = "token"  # w of grpo.py's docstring
    clip_low: float = 0.2  # where A < 0, a ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = 0.2  # where A > 0, a ratio above 1 + clip_high gets no gradient; negative: off
    tis_cap: float = 2.0  # largest v of grpo.py's docstring; 0: v = 1
    kl_coef: float = 0.001  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.001  # bonus per nat
    # optimization
    lr: float = 1e-6  # AdamW; constant after the warm-up
    warmup_steps: int = 0  # linear
    updates_per_step: int = 4  # optimizer steps per rollout batch, each on its own share of the groups
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
    if counts.expert and cfg.hint_coef:
        num_hint = counts.expert if cfg.hint_norm == "mean" else num_rows
        hint_loss = -common.token_mean(logprobs, batch.expert_mask, num_hint)
        loss = loss + cfg.hint_coef * hint_loss
        metrics["hint_loss"] = hint_loss.detach()
    if cfg.kl_coef:
        policy_lp, ref_lp = (torch.where(mask, x, 0.0) for x in (logprobs, ref_logprobs))
        kl = common.kl_divergence(policy_lp, ref_lp, cfg.kl_estimator)
        loss = loss + cfg.kl_coef * (w * kl).sum()
        metrics["kl"] = common.token_mean(kl.detach(), mask, num_tokens)
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * (w * entropy).sum()
    return loss, metrics | {"loss": loss.detach()}


# The hint -----------------------------------------------------------------------------------------
def hint_share(step: int, high: float, low: float, hint_steps: int) -> float:
    """p(t) above, t = step + 1: the expected share of chunks that is shown at a 0-based step."""
    t = step + 1
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * t / hint_steps)) if t <= hint_steps else 0.0


def hint_cuts(ends: list[int], unit: str, chunks: int) -> list[int]:
    """Tokens shown by 0, 1, ..., m chunks; the last segment is never shown."""
    shown = ends[:-1] if unit != "token" else list(range(1, (ends[-2] if len(ends) > 1 else 0) + 1))
    return common.regroup(shown, chunks if unit == "chunk" else max(1, len(shown)))


def draw_hint(cuts: list[int], share: float, schedule: str, rng: np.random.Generator) -> int:
    """Tokens of one hint: k of the m chunks, k binomial, or uniform with that schedule."""
    chunks = len(cuts) - 1
    return cuts[int(rng.integers(0, chunks + 1) if schedule == "uniform" else rng.binomial(chunks, share))]


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
        share, hints = hint_share(step, cfg.hint_high, cfg.hint_low, cfg.hint_steps), []
        for problem in problems:
            shown, cut_short = common.shown_ends(problem, tokenizer)
            log.add_mean("traces_cut_short", [cut_short])
            cuts = hint_cuts([*shown, len(problem.expert_ids)], cfg.hint_unit, cfg.hint_chunks)
            rng = np.random.default_rng(common.group_seed((cfg.run.seed, step, 1), problem))
            hints.append(problem.expert_ids[: draw_hint(cuts, share, cfg.schedule, rng)])
        log.add_mean("hint_fraction", [len(h) / (len(p.expert_ids) or 1) for h, p in zip(hints, problems, strict=True)])
        groups = sampler.generate(
            problems,
            hints,
            cfg.group_size,
            cfg.max_completion_tokens,
            cfg.temperature,
            (cfg.run.seed, step, 0),
        )

        log.phase("rewards")
        log.add(**common.score(groups))
        common.log_rollouts(log, groups)

        for r in [r for group in groups for r in group if not r.reward]:
            r.reward = cfg.format_reward if common.boxed(common.answer_part(r.text, r.problem.thinks)) else 0.0

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
