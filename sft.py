"""SFT: supervised fine-tuning on expert traces. The correct baseline of "SFT then RL", Limozin et
al. 2026, arXiv 2604.23747.

Raise the log-probability of every token of the expert's completion, EOS included. What makes it
correct is the denominator: the tokens of the whole optimizer step, over all micro-batches and
ranks, counted before the first backward. results/accumulation_bugs.py shows what two published bugs
do, lost middle micro-batches and a mean of micro-batch means; neither can happen here.

    loss = - 1 / num_expert sum_t logprobs

This is grpo.py without rollouts, rewards and advantages: every completion token is the expert's.
The policy that it leaves is the start of the second stage, `grpo.py --model runs/.../final`.

Departures. Traces that are too long or judged wrong are dropped at load. As in the paper the cosine
ends at 10 % of the peak, rows are packed without padding, and no sequence is cut.

    torchrun sft.py --model Qwen2.5-1.5B                                 one GPU
    torchrun --nproc_per_node 8 sft.py --model Elliott/Qwen2.5-Math-7B-16k-think    2604.23747's
    python sft.py --model map                                            a laptop
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import common

reward_fn = common.math_reward  # (problem, completion) -> number or {name: (weight, number)}; --reward F wins


# Config -------------------------------------------------------------------------------------------
@dataclass
class Config:
    # rows
    steps: int = 2100  # of one update; three epochs of the default data
    problems_per_step: int = 64  # expert traces over all ranks
    max_completion_tokens: int = 8192  # longer expert traces are dropped at load
    temperature: float = 1.0  # of the evaluation's samples alone: a likelihood has none
    # optimization
    lr: float = 5e-5  # AdamW; peak
    warmup: float = 0.1  # share of the steps, linear
    final_lr: float = 0.1  # where the cosine ends, as a share of the peak
    # the same in every method: model, data, sampler, memory, bookkeeping
    run: common.RunConfig = common.RunConfig(model="Qwen2.5-1.5B", eval_every=100, save_every=500)


# The loss -----------------------------------------------------------------------------------------
def loss_fn(
    cfg: Config,
    batch: common.Batch,  # the rows: masks, advantages, and the log-probabilities they were sampled with
    logprobs: Tensor,  # (B, T) of the policy, with gradient
    entropy: Tensor,  # (B, T) of the policy
    ref_logprobs: Tensor | None,  # (B, T) of a frozen reference; None where none is used
    counts: common.Counts,  # tokens and rows of the whole optimizer step, all ranks
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equation above over one micro-batch: a sum, so that micro-batches and ranks add up."""
    mask = batch.expert_mask
    loss = -common.token_mean(logprobs, mask, counts.expert)
    metrics = {"entropy": common.token_mean(entropy.detach(), mask, counts.expert)}
    return loss, metrics | {"loss": loss.detach()}


def learning_rate(step: int, steps: int, peak: float, warmup: float, final_lr: float) -> float:
    """Linear over the first `warmup` share of the steps, then a cosine down to final_lr x peak.

    The cosine is Hugging Face's, which arrives after the last of its m updates: that one's rate is
    above final_lr x peak by sin(pi / 2m)^2 of the way, so never 0. Their warm-up is one update
    behind this one, for their first update has rate 0.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / (steps - rising)
    return peak * (final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


# Main ---------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    world = common.init(cfg.run.seed)
    tokenizer = common.load_tokenizer(cfg.run.model)
    train, test = common.load_data(cfg, tokenizer, reward_fn, require_expert=True)
    policy = common.load_policy(cfg.run, world)
    sampler = common.load_sampler(cfg.run, tokenizer, world, cfg.max_completion_tokens)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.run.weight_decay, fused=True)
    state = {"model": policy, "optimizer": (policy, optimizer)}
    log, stop = common.RunLog(cfg, __file__, world), common.StopSignal()
    start, _ = common.resume(log, state)

    for step in range(start, cfg.steps + 1):  # at step n the policy has made n steps; the last pass ends the run
        if test and (step % cfg.run.eval_every == 0 or step == cfg.steps):
            log.phase("evaluation")
            sampler.sync(policy)
            log.set(**common.evaluate(sampler, test, cfg, world))
            sampler.sleep()
        last = stop.asked(world) or step == cfg.steps
        if step > start and (last or step % cfg.run.save_every == 0):
            common.save(log, step, state)
        if last:
            break

        log.phase("rows")
        problems = common.draw(train, cfg.problems_per_step, step, cfg.run.seed, world)
        rows = [common.expert_rollout(problem, tokenizer) for problem in problems]
        log.add_mean("completion_tokens", [len(r.completion_ids) for r in rows])

        log.phase("update")
        log.set(lr=common.set_lr(learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.final_lr), optimizer))
        counts = common.count(rows, world)  # over all ranks, as gradients are summed: nothing divides by the ranks
        for batch in common.microbatches(rows, cfg.run.tokens_per_microbatch, world):
            logprobs, entropy = common.token_logprobs(policy, batch, temperature=1.0)
            loss, metrics = loss_fn(cfg, batch, logprobs, entropy, None, counts)
            loss.backward()
            log.add(batch.rollouts, **metrics, trained_tokens=batch.completion_mask.sum())
        log.set(grad_norm=common.clip_gradients(policy.parameters(), cfg.run.grad_clip))
        optimizer.step()
        optimizer.zero_grad()
        log.step(step)

    common.finish(log, step, policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Config))
