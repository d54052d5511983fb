"""ReLIFT: reinforcement learning interleaved with online fine-tuning. Ma et al. 2025, arXiv 2506.07527; code TheRoadQaQ/ReLIFT.

Train with GRPO. A question that every row of its group fails teaches GRPO nothing, so it is put into a buffer together with its
expert's trace, and when the buffer holds buffer_size questions one step of SFT on them follows. The frequency adapts by itself:
many SFT steps early, few later. Expert traces never enter a group or its baseline.

    after the rewards:  buffer = [questions of this step whose rewards are all 0] + buffer
    RL step:            grpo.py's, with its optimizer
    SFT step, at most one a step, when len(buffer) >= buffer_size, on the newest buffer_size of them, with an optimizer of its own:
      loss = - 1 / num_tokens sum_t (logprobs[t] + sft_entropy_coef H[t])

Differs from grpo.py in two places: the buffer and the SFT step, whose loss is sft.py's. --buffer_size 0 is grpo.py.

Departures. Defaults are the official script's: no std, sum over tokens / max_completion_tokens, no clip, two AdamW states on the
same weights. Its RL grad clip of 0.7 is --grad_clip 0.7. Its SFT sizes are not divided by the number of ranks, which makes that
gradient as many times too small; here the SFT mean is over all tokens of all ranks. The paper's best sft_entropy_coef is 1e-4, its
code has 1e-3. Expert traces are the data set's, verified once at load.

    torchrun relift.py --model Qwen2.5-1.5B                              one GPU
    torchrun --nproc_per_node 8 relift.py --model Elliott/Qwen2.5-Math-7B-16k-think --steps 1070 --grad_clip 0.7  the paper's
    python relift.py --model tiny                                        a laptop
"""

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
    model: str = "Qwen2.5-1.5B-Instruct"  # hub name, folder, or tiny (bundled)
    data: str = "Elliott/Openr1-Math-46k-8192"  # hub name, .jsonl, .jsonl.gz or .parquet
    test_data: str = "HuggingFaceH4/MATH-500"  # the same; empty: no evaluation
    out: str = ""  # the run's folder; empty: runs/<method>-<model>-<time>
    resume: str = ""  # a run's folder to continue, with its own flags
    seed: int = 0  # of the order of problems and of everything sampled
    # rollouts
    steps: int = 500  # of rollouts and update(s)
    problems_per_step: int = 128  # over all ranks
    group_size: int = 8  # completions per problem
    max_prompt_tokens: int = 1024  # longer prompts are dropped at load
    max_completion_tokens: int = 8192  # hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    template: str = "auto"  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    columns: str = ""  # "problem=... answer=... expert=..." where the data set's names are not recognised
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # inference engine; auto: vLLM where there is one and a GPU
    sampler_memory: float = 0.4  # share of the GPU for vLLM
    tensor_parallel: int = 1  # ranks that share a vLLM engine
    rope_theta: float = 0.0  # rotary base for a longer context, with max_positions; 0: the model's own
    max_positions: int = 0  # window of the model; 0: its own
    # loss
    scale_by_std: bool = False  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: in the update and its denominator, or left out
    loss_norm: Literal["token", "sequence", "constant"] = "constant"  # what a token's weight is; see above
    clip_low: float = -1.0  # ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = -1.0  # ratio above 1 + clip_high gets no gradient; negative: off
    tis_cap: float = 2.0  # of the importance weight for what sampler and trainer disagree on; 0: off
    kl_coef: float = 0.0  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.001  # bonus per nat
    # SFT step
    buffer_size: int = 128  # failed questions that start one, and that it trains on; 0 or -1: never
    buffer_order: Literal["newest", "oldest"] = "newest"  # which of them when the buffer holds more
    sft_lr: float = 1e-6  # constant
    sft_grad_clip: float = 1.0  # norm of the summed gradient; 0: off
    sft_entropy_coef: float = 0.001  # bonus per nat
    shared_optimizer: bool = False  # one AdamW state for both kinds of step
    # optimization
    lr: float = 1e-6  # constant after the warm-up
    warmup_steps: int = 0  # linear
    weight_decay: float = 0.01  # AdamW
    grad_clip: float = 1.0  # norm of the summed gradient; 0: off
    updates_per_step: int = 2  # optimizer steps per rollout batch, each on its own share of the groups
    tokens_per_microbatch: int = 16384  # prompt + completion tokens in one forward; never changes the gradient
    checkpoint_activations: bool = False  # recompute layers in the backward: less memory, a third more time
    # bookkeeping
    eval_every: int = 10  # steps
    eval_samples: int = 1  # per test problem
    save_every: int = 50  # steps
    keep: int = 2  # checkpoints
    wandb: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------------------------------


def loss_fn(
    logprobs: Tensor,  # (B, T) of the policy, with gradient
    old_logprobs: Tensor,  # (B, T) of the policy that made the batch
    advantages: Tensor,  # (B,)
    importance: Tensor,  # (B, T) truncated ratio of old policy to sampler, constant
    entropy: Tensor,  # (B, T)
    ref_logprobs: Tensor | None,  # (B, T) of the frozen reference; None without KL
    mask: Tensor,  # (B, T) bool, the tokens that are trained
    num_tokens: int,  # trained tokens of the whole optimizer step, all ranks
    num_rows: int,  # rows of the whole optimizer step, all ranks
    max_tokens: int,  # the constant of loss_norm constant
    loss_norm: str,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equation above over one micro-batch: a sum, so micro-batches and ranks add up. Metrics likewise, detached."""
    lengths = mask.sum(1, keepdim=True).clamp(min=1).to(logprobs.dtype)
    weight = {"token": 1 / max(num_tokens, 1), "sequence": 1 / (num_rows * lengths), "constant": 1 / (num_rows * max_tokens)}
    weights = torch.where(mask, weight[loss_norm], 0.0)  # (B, T)
    per_token = torch.where(mask, 1 / max(num_tokens, 1), 0.0)  # for metrics: the mean over trained tokens
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    surrogate, clipped = common.clipped_surrogate(log_ratio.exp(), advantages[:, None], clip_low, clip_high)
    loss = -(weights * importance * surrogate).sum()
    metrics = {"clip_fraction": (per_token * clipped).sum(), "entropy": (per_token * entropy.detach()).sum()}
    if kl_coef:
        kl = common.kl_divergence(torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0), kl_estimator)
        loss = loss + kl_coef * (weights * kl).sum()
        metrics["kl"] = (per_token * kl.detach()).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (weights * entropy).sum()
    return loss, metrics | {"loss": loss.detach()}


def sft_loss_fn(
    logprobs: Tensor,  # (B, T) of the policy, with gradient
    entropy: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool, the tokens that are trained
    num_tokens: int,  # trained tokens of the whole optimizer step, all ranks
    entropy_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The SFT step's equation over one micro-batch, sft.py's with an entropy bonus."""
    weights = torch.where(mask, 1 / max(num_tokens, 1), 0.0)  # (B, T)
    loss = -(weights * logprobs).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (weights * entropy).sum()
    return loss, {"sft_entropy": (weights * entropy.detach()).sum(), "sft_loss": loss.detach()}


# ----------------------------------------------------------------------------------------------------------------------
# The buffer
# ----------------------------------------------------------------------------------------------------------------------


def push_and_pop(buffer: list[str], failed: list[str], size: int, order: str) -> tuple[list[str], list[str]]:
    """Problem ids: (what stays in the buffer, what the SFT step takes). Newest block first, a block in the step's own order.

    Nothing is taken before `size` ids are there, and never more than `size`.
    """
    buffer = [*failed, *buffer]
    if size <= 0 or len(buffer) < size:
        return buffer if size > 0 else [], []
    return (buffer[size:], buffer[:size]) if order == "newest" else (buffer[:-size], buffer[-size:])


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    dist = common.init(cfg.seed)
    tokenizer = common.load_tokenizer(cfg.model)
    limits = {"max_prompt_tokens": cfg.max_prompt_tokens, "max_completion_tokens": cfg.max_completion_tokens}
    data = {"template": cfg.template, "columns": cfg.columns, **limits}
    train = common.load_problems(cfg.data, tokenizer, **data, require_expert=True)
    by_id = {problem.id: problem for problem in train}
    test = common.load_problems(cfg.test_data, tokenizer, **data, split="test") if cfg.test_data else []
    policy = common.load_policy(cfg.model, dist, cfg.checkpoint_activations)
    reference = common.load_policy(cfg.model, dist).requires_grad_(False) if cfg.kl_coef else None
    longest = cfg.max_prompt_tokens + cfg.max_completion_tokens
    sampler = common.load_sampler(cfg.sampler, cfg.model, tokenizer, dist, longest, cfg.sampler_memory, cfg.tensor_parallel)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    sft_optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.sft_lr, weight_decay=cfg.weight_decay)
    sft_optimizer = optimizer if cfg.shared_optimizer else sft_optimizer
    state = {"model": policy, "optimizer": (policy, optimizer), "sft_optimizer": (policy, sft_optimizer)}
    log = common.RunLog(cfg, __file__, dist)
    start, extra = common.resume(log, state)
    buffer = extra.get("buffer", [])
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
            common.save(log, step, state, cfg.keep, buffer=buffer)
        if step == cfg.steps or stop:
            break

        # Problems
        problems = common.draw(train, cfg.problems_per_step, step, cfg.seed, dist)

        # Rollouts
        with log.timer("rollouts"):
            groups = sampler.generate(
                problems,
                None,
                cfg.group_size,
                cfg.max_completion_tokens,
                cfg.temperature,
                (cfg.seed, step, 0),
            )

        # Rewards
        with log.timer("rewards"):
            log.add(verifier_errors=common.score(groups))

        # Buffer
        failed = common.gather([None if any(r.reward for r in group) else group[0].problem.id for group in groups], dist)
        buffer, taken = push_and_pop(buffer, [i for i in failed if i], cfg.buffer_size, cfg.buffer_order)
        values |= {"buffer": len(buffer), "sft_rows": len(taken)}

        # Advantages
        for group in groups:
            rewards = torch.tensor([[r.reward for r in group]])
            for rollout, advantage in zip(group, common.group_advantages(rewards, cfg.scale_by_std)[0].tolist(), strict=True):
                rollout.advantage = advantage
        log.add_rollouts(groups)
        kept = [group if cfg.zero_variance == "keep" or any(r.advantage for r in group) else [] for group in groups]

        # Update
        with log.timer("update"):
            sampler.sleep()
            lr = cfg.lr * min(1.0, (step + 1) / (cfg.warmup_steps or 1))
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            if cfg.updates_per_step > 1:
                rows = [rollout for group in kept for rollout in group]
                common.store_old_logprobs(policy, rows, cfg.temperature, cfg.tokens_per_microbatch, dist)
            for update in range(cfg.updates_per_step):
                part = common.share(kept, update, cfg.updates_per_step, cfg.problems_per_step, dist)
                rows = [rollout for group in part for rollout in group]
                num_tokens, _, num_rows = common.count_tokens(rows, dist)
                for batch in common.microbatches(rows, cfg.tokens_per_microbatch, dist):
                    logprobs, entropy = common.token_logprobs(policy, batch, cfg.temperature, cfg.entropy_coef != 0)
                    ref_logprobs = common.reference_logprobs(reference, batch, cfg.temperature)
                    old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
                    loss, metrics = loss_fn(
                        logprobs,
                        old_logprobs,
                        batch.advantages,
                        common.truncated_importance(old_logprobs, batch, cfg.tis_cap, log),
                        entropy,
                        ref_logprobs,
                        batch.completion_mask,
                        num_tokens,
                        num_rows,
                        cfg.max_completion_tokens,
                        cfg.loss_norm,
                        cfg.clip_low,
                        cfg.clip_high,
                        cfg.kl_coef,
                        cfg.kl_estimator,
                        cfg.entropy_coef,
                    )
                    loss.backward()
                    log.add(**{name: metric / cfg.updates_per_step for name, metric in metrics.items()})
                values["grad_norm"] = common.clip_gradients(policy.parameters(), cfg.grad_clip).item()
                optimizer.step()
                optimizer.zero_grad()

        # SFT step
        with log.timer("sft"):
            for param_group in sft_optimizer.param_groups if taken else ():
                param_group["lr"] = cfg.sft_lr
            rows = [common.expert_rollout(by_id[i], tokenizer) for i in taken[dist.rank :: dist.world_size]]
            _, num_tokens, _ = common.count_tokens(rows, dist)
            for batch in common.microbatches(rows, cfg.tokens_per_microbatch, dist):
                logprobs, entropy = common.token_logprobs(policy, batch, cfg.temperature, cfg.sft_entropy_coef != 0)
                loss, metrics = sft_loss_fn(logprobs, entropy, batch.completion_mask, num_tokens, cfg.sft_entropy_coef)
                loss.backward()
                log.add(**metrics)
            if taken:
                values["sft_grad_norm"] = common.clip_gradients(policy.parameters(), cfg.sft_grad_clip).item()
                sft_optimizer.step()
                sft_optimizer.zero_grad()

        # Sync and log
        with log.timer("sync"):
            sampler.sync(policy)
        log.step(step, groups, lr=lr, **values)

    common.finish(log, step, values, policy, tokenizer, cfg.model)


if __name__ == "__main__":
    main(common.parse(Config))
