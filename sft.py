"""SFT: supervised fine-tuning on expert traces. The correct baseline of "SFT-then-RL", Limozin et al. 2026, arXiv 2604.23747.

Raise the log-probability of every token of the expert's completion, EOS included. What makes it correct is the denominator: the
tokens of the whole optimizer step, over all micro-batches and ranks, counted before the first backward. Two published bugs, lost
middle micro-batches and a mean of micro-batch means, are shown by results/accumulation_bugs.py; neither can happen here.

    loss = - 1 / num_tokens  sum_b sum_t logprobs[b, t]

This is grpo.py without rollouts, rewards and advantages: every completion token is the expert's. The policy it leaves is the start
of the second stage, `grpo.py --model runs/.../final`.

Departures: the cosine ends at 10 % of the peak and rows are packed without padding, as in the paper; no sequence is cut.

    torchrun sft.py --model Qwen2.5-1.5B                                 one GPU
    torchrun --nproc_per_node 8 sft.py --model Elliott/Qwen2.5-Math-7B-16k-think  the SFT of 2604.23747
    python sft.py --model tiny                                           a laptop
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common

# ----------------------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    # run
    model: str = "Qwen2.5-1.5B"  # hub name, folder, or tiny (bundled)
    data: str = "Elliott/Openr1-Math-46k-8192"  # hub name, .jsonl, .jsonl.gz or .parquet
    test_data: str = "HuggingFaceH4/MATH-500"  # the same; empty: no evaluation
    out: str = ""  # the run's folder; empty: runs/<method>-<model>-<time>
    resume: str = ""  # a run's folder to continue, with its own flags
    seed: int = 0  # of the order of problems and of everything sampled
    # rows
    steps: int = 2100  # of one update; three epochs of the default data
    problems_per_step: int = 64  # expert traces over all ranks
    max_prompt_tokens: int = 1024  # longer prompts are dropped at load
    max_completion_tokens: int = 8192  # longer expert traces are dropped at load
    temperature: float = 1.0  # of sampler and log-probabilities alike
    template: str = "auto"  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    columns: str = ""  # "problem=... answer=... expert=..." where the data set's names are not recognised
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # for the evaluation; auto: vLLM where there is one and a GPU
    sampler_memory: float = 0.4  # share of the GPU for vLLM
    tensor_parallel: int = 1  # ranks that share a vLLM engine
    rope_theta: float = 0.0  # rotary base for a longer context, with max_positions; 0: the model's own
    max_positions: int = 0  # window of the model; 0: its own
    # optimization
    lr: float = 5e-5  # peak
    warmup: float = 0.1  # share of the steps, linear
    final_lr: float = 0.1  # where the cosine ends, as a share of the peak
    weight_decay: float = 0.01  # AdamW
    grad_clip: float = 1.0  # norm of the summed gradient; 0: off
    tokens_per_microbatch: int = 16384  # prompt + completion tokens in one forward; never changes the gradient
    checkpoint_activations: bool = False  # recompute layers in the backward: less memory, a third more time
    # bookkeeping
    eval_every: int = 100  # steps
    eval_samples: int = 1  # per test problem
    save_every: int = 500  # steps
    keep: int = 2  # checkpoints
    wandb: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------------------------------


def loss_fn(
    logprobs: Tensor,  # (B, T) of the policy, with gradient
    entropy: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool, the tokens that are trained
    num_tokens: int,  # trained tokens of the whole optimizer step, all ranks
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equation above over one micro-batch: a sum, so micro-batches and ranks add up. Metrics likewise, detached."""
    weights = torch.where(mask, 1 / max(num_tokens, 1), 0.0)  # (B, T)
    loss = -(weights * logprobs).sum()
    return loss, {"entropy": (weights * entropy.detach()).sum(), "loss": loss.detach()}


def learning_rate(step: int, steps: int, peak: float, warmup: float, final_lr: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine down to final_lr x peak at the last step."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - 1 - rising)
    return peak * (final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    dist = common.init(cfg.seed)
    tokenizer = common.load_tokenizer(cfg.model)
    limits = {"max_prompt_tokens": cfg.max_prompt_tokens, "max_completion_tokens": cfg.max_completion_tokens}
    data = {"template": cfg.template, "columns": cfg.columns, **limits}
    train = common.load_problems(cfg.data, tokenizer, **data, require_expert=True)
    test = common.load_problems(cfg.test_data, tokenizer, **data, split="test") if cfg.test_data else []
    policy = common.load_policy(cfg.model, dist, cfg.checkpoint_activations)
    longest = cfg.max_prompt_tokens + cfg.max_completion_tokens
    sampler = common.load_sampler(cfg.sampler, cfg.model, tokenizer, dist, longest, cfg.sampler_memory, cfg.tensor_parallel)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    state = {"model": policy, "optimizer": (policy, optimizer)}
    log = common.RunLog(cfg, __file__, dist)
    start, _ = common.resume(log, state)
    sampler.sync(policy)

    for step in range(start, cfg.steps + 1):
        # Evaluate and save. The policy of `step` has made `step` updates; the last pass through here ends the run.
        values = {}
        if test and (step % cfg.eval_every == 0 or step == cfg.steps):
            with log.timer("evaluation"):
                values["test_accuracy"] = common.evaluate(
                    sampler, test, cfg.eval_samples, cfg.max_completion_tokens, cfg.temperature, cfg.seed, dist
                )
        stop = log.should_stop()
        if step > start and (step % cfg.save_every == 0 or step == cfg.steps or stop):
            common.save(log, step, state, cfg.keep)
        if step == cfg.steps or stop:
            break

        # Problems
        problems = common.draw(train, cfg.problems_per_step, step, cfg.seed, dist)

        # Rows
        rows = [common.expert_rollout(problem, tokenizer) for problem in problems]
        log.add_mean("completion_tokens", [len(r.completion_ids) for r in rows])

        # Update
        with log.timer("update"):
            sampler.sleep()
            lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.final_lr)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            _, num_tokens, _ = common.count_tokens(rows, dist)
            for batch in common.microbatches(rows, cfg.tokens_per_microbatch, dist):
                logprobs, entropy = common.token_logprobs(policy, batch, cfg.temperature)
                loss, metrics = loss_fn(
                    logprobs,
                    entropy,
                    batch.completion_mask,
                    num_tokens,
                )
                loss.backward()
                log.add(**metrics)
            values["grad_norm"] = common.clip_gradients(policy.parameters(), cfg.grad_clip).item()
            optimizer.step()
            optimizer.zero_grad()

        # Sync and log
        with log.timer("sync"):
            sampler.sync(policy)
        log.step(step, [], lr=lr, **values)

    common.finish(log, step, values, policy, tokenizer, cfg.model)


if __name__ == "__main__":
    main(common.parse(Config))
