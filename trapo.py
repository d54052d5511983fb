"""TRAPO: trust-region adaptive policy optimization. Su et al. 2025, arXiv 2512.17636; code Su-my/TRAPO.

A group is drawn in micro-groups. The first is plain; each later one is given a longer expert prefix, but only while the mean reward
of the rows so far is below its threshold. All rows share one baseline. What the policy writes is trained by GRPO, the prefix by a
trust-region SFT that follows the expert fully where the policy already gives a token at least trsft_alpha, and below that in
proportion to p.

    micro-group j of a question: prefix = the first share[j] of the trace if mean(rewards so far) < threshold[j], else none
    loss = - sum_t w[t] v[t] A ratio[t] over policy tokens  - sft_coef sum_t w[t] p[t] / max(p[t], trsft_alpha) over prefix tokens
           of one row a prefix, the maximum constant: the coefficient of grad logprobs[t] is min(1, p / trsft_alpha)

Differs from grpo.py in the micro-groups and in the prefix term. --shares 0 0 0 0 is GRPO on a group drawn in four parts.

Departures. Sizes 4, 2, 1, 1, shares 0, 0.2, 0.5, 1 and thresholds -1, 0.5, 0.7, 0.9 are the paper's; the official script has 0.25,
0.5, 1 snapped to paragraphs and 0.5, 0.67, 1. The full trace at share 1 is the row itself, nothing is drawn after it; the code
reads a second trace there. Expert tokens never carry an advantage. lr 5e-6 is the paper's.

    torchrun trapo.py --model Qwen2.5-1.5B                               one GPU
    torchrun --nproc_per_node 8 trapo.py --model Qwen2.5-Math-7B --rope_theta 40000 --max_positions 16384  the paper's
    python trapo.py --model tiny                                         a laptop
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
    group_size: int = 8  # completions per problem, the sum of the micro-groups
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
    # micro-groups
    sizes: tuple[int, int, int, int] = (4, 2, 1, 1)  # rows
    shares: tuple[float, float, float, float] = (0.0, 0.2, 0.5, 1.0)  # of the expert's trace that is given
    thresholds: tuple[float, float, float, float] = (-1.0, 0.5, 0.7, 0.9)  # given where the mean reward so far is below
    # loss
    sft_coef: float = 1.0  # of the prefix term
    trsft_alpha: float = 0.1  # probability from which a prefix token has its full weight
    scale_by_std: bool = False  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: in the update and its denominator, or left out
    loss_norm: Literal["token", "sequence", "constant"] = "constant"  # what a token's weight is; see above
    clip_low: float = -1.0  # ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = -1.0  # ratio above 1 + clip_high gets no gradient; negative: off
    tis_cap: float = 2.0  # of the importance weight for what sampler and trainer disagree on; 0: off
    kl_coef: float = 0.0  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.001  # bonus per nat
    # optimization
    lr: float = 5e-6  # constant after the warm-up
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
    mask: Tensor,  # (B, T) bool, the policy tokens, trained by RL
    prefix_mask: Tensor,  # (B, T) bool, the prefix tokens, trained by SFT
    num_tokens: int,  # trained tokens of the whole optimizer step, all ranks
    num_rows: int,  # rows of the whole optimizer step, all ranks
    max_tokens: int,  # the constant of loss_norm constant
    loss_norm: str,
    clip_low: float,
    clip_high: float,
    sft_coef: float,
    trsft_alpha: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equation above over one micro-batch: a sum, so micro-batches and ranks add up. Metrics likewise, detached."""
    lengths = (mask | prefix_mask).sum(1, keepdim=True).clamp(min=1).to(logprobs.dtype)
    weight = {"token": 1 / max(num_tokens, 1), "sequence": 1 / (num_rows * lengths), "constant": 1 / (num_rows * max_tokens)}
    weights, prefix_weights = (torch.where(m, weight[loss_norm], 0.0) for m in (mask, prefix_mask))  # (B, T)
    per_token = torch.where(mask, 1 / max(num_tokens, 1), 0.0)  # for metrics: the mean over trained tokens
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    surrogate, clipped = common.clipped_surrogate(log_ratio.exp(), advantages[:, None], clip_low, clip_high)
    loss = -(weights * importance * surrogate).sum()
    metrics = {"clip_fraction": (per_token * clipped).sum(), "entropy": (per_token * entropy.detach()).sum()}
    p = torch.where(prefix_mask, logprobs, 0.0).exp()
    sft_loss = -(prefix_weights * p / p.detach().clamp(min=trsft_alpha)).sum()
    loss = loss + sft_coef * sft_loss
    metrics["sft_loss"] = sft_loss.detach()
    if kl_coef:
        kl = common.kl_divergence(torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0), kl_estimator)
        loss = loss + kl_coef * (weights * kl).sum()
        metrics["kl"] = (per_token * kl.detach()).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (weights * entropy).sum()
    return loss, metrics | {"loss": loss.detach()}


# ----------------------------------------------------------------------------------------------------------------------
# The micro-groups
# ----------------------------------------------------------------------------------------------------------------------


def prefix_tokens(trace_tokens: int, share: float, threshold: float, rewards: list[float]) -> int:
    """Expert tokens given to a micro-group: share x trace where the mean of the rewards so far is below the threshold, else 0."""
    if not rewards or sum(rewards) / len(rewards) >= threshold:
        return 0
    return int(share * trace_tokens)


def taught_mask(batch: common.Batch, groups: list[list[common.Rollout]]) -> Tensor:
    """(B, T) bool: the prefix tokens of the first row that has each prefix; its other rows would teach the same again."""
    first = {(r.problem.id, r.num_expert_tokens): id(r) for group in groups for r in reversed(group)}
    taught = [first.get((r.problem.id, r.num_expert_tokens)) == id(r) for r in batch.rollouts]
    return batch.completion_mask & batch.expert_mask & torch.tensor(taught, device=batch.expert_mask.device)[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    dist = common.init(cfg.seed)
    tokenizer = common.load_tokenizer(cfg.model)
    limits = {"max_prompt_tokens": cfg.max_prompt_tokens, "max_completion_tokens": cfg.max_completion_tokens}
    data = {"template": cfg.template, "columns": cfg.columns, **limits}
    if sum(cfg.sizes) != cfg.group_size:
        common.fail(f"--sizes {cfg.sizes} do not add up to --group_size {cfg.group_size}")
    train = common.load_problems(cfg.data, tokenizer, **data, require_expert=True)
    test = common.load_problems(cfg.test_data, tokenizer, **data, split="test") if cfg.test_data else []
    policy = common.load_policy(cfg.model, dist, cfg.checkpoint_activations)
    reference = common.load_policy(cfg.model, dist).requires_grad_(False) if cfg.kl_coef else None
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

        # Rollouts
        groups: list[list[common.Rollout]] = [[] for _ in problems]
        for stage, (size, share, threshold) in enumerate(zip(cfg.sizes, cfg.shares, cfg.thresholds, strict=True)):
            with log.timer("rollouts"):
                lengths = [
                    prefix_tokens(len(problem.expert_ids), share, threshold, [r.reward for r in group])
                    for problem, group in zip(problems, groups, strict=True)
                ]
                whole = [length == len(problem.expert_ids) for problem, length in zip(problems, lengths, strict=True)]
                asked = [i for i, full in enumerate(whole) if not full]
                drawn = sampler.generate(
                    [problems[i] for i in asked],
                    [problems[i].expert_ids[: lengths[i]] for i in asked],
                    size,
                    cfg.max_completion_tokens,
                    cfg.temperature,
                    (cfg.seed, step, stage),
                )
                made = [[common.expert_rollout(problem, tokenizer) for _ in range(size)] for problem in problems]
                for i, rows in zip(asked, drawn, strict=True):
                    made[i] = rows

            # Rewards
            with log.timer("rewards"):
                log.add(verifier_errors=common.score(made))
            groups = [group + rows for group, rows in zip(groups, made, strict=True)]
        log.add_mean("guided_rows", [r.num_expert_tokens > 0 for group in groups for r in group])
        log.add_mean("plain_reward", [r.reward for group in groups for r in group[: cfg.sizes[0]]])

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
                num_policy, num_expert, num_rows = common.count_tokens(rows, dist)
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
                        batch.completion_mask & ~batch.expert_mask,
                        taught_mask(batch, groups),
                        num_policy + num_expert,
                        num_rows,
                        cfg.max_completion_tokens,
                        cfg.loss_norm,
                        cfg.clip_low,
                        cfg.clip_high,
                        cfg.sft_coef,
                        cfg.trsft_alpha,
                        cfg.kl_coef,
                        cfg.kl_estimator,
                        cfg.entropy_coef,
                    )
                    loss.backward()
                    log.add(**{name: metric / cfg.updates_per_step for name, metric in metrics.items()})
                values["grad_norm"] = common.clip_gradients(policy.parameters(), cfg.grad_clip).item()
                optimizer.step()
                optimizer.zero_grad()

        # Sync and log
        with log.timer("sync"):
            sampler.sync(policy)
        log.step(step, groups, lr=lr, **values)

    common.finish(log, step, values, policy, tokenizer, cfg.model)


if __name__ == "__main__":
    main(common.parse(Config))
