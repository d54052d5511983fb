"""Prefix-RFT: blending supervised and reinforcement fine-tuning with prefix sampling. Huang et al. 2025, arXiv 2507.01679.

The last row of every group starts from a random prefix of the expert's trace and the policy finishes it. It is scored as a whole
and shares the group's baseline; its prefix is trained with the row's own advantage, as if the policy had written it, but only at
the most uncertain fifth of the prefix tokens. The shortest allowed prefix shrinks by a cosine, from imitation to plain RL.

    low(t) = low_final + (low_start - low_final) (1 + cos(pi t / prefix_steps)) / 2,      share ~ Uniform(low(t), prefix_high)
    k      = floor(share x tokens of the trace), at least min_prefix_tokens and at most one token less than the trace
    A[t]   = A of the row; 0 on the 1 - keep_share of the prefix tokens with the lowest H
    s[t]   = min(ratio[t] A[t], clip(ratio[t], 1 - clip_low, 1 + clip_high) A[t]),   and not below dual_clip A[t] where A[t] < 0
    loss   = - sum_t w[t] v[t] s[t] - entropy_coef sum_t w[t] H[t]

The denominator of the ratio is the policy before the update on prefix tokens too: an expert token has the full weight A, not
LUFFY's A f(p), which is why the filter is needed. Differs from grpo.py in three places: the prefix, the filter, the dual clip;
--hybrid_rows 0 --dual_clip 0 is grpo.py.

Departures. The paper's launch settings were never published. --advantages group is its equation 3; split is the repository's
dr_grpo_prefix (plain rows against their own mean, the continuation uncentred); its third estimator can never push a prefix up and
is left out. The filter ranks within a row, so that it does not depend on the packing; --keep_scope microbatch is the official
ranking. Prefixes are token ids, never decoded and tokenised again.

    torchrun prefix_rft.py --model Qwen2.5-1.5B                          one GPU
    torchrun --nproc_per_node 8 prefix_rft.py --model Qwen2.5-Math-7B --rope_theta 40000 --max_positions 16384  the paper's
    python prefix_rft.py --model tiny                                    a laptop
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
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
    group_size: int = 8  # completions per problem, the hybrid one included
    hybrid_rows: Literal[0, 1] = 1  # of the group
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
    # prefix
    prefix_high: float = 0.95  # largest share of the trace
    low_start: float = 0.95  # smallest share at first
    low_final: float = 0.05  # and at prefix_steps
    prefix_steps: int = 500
    min_prefix_tokens: int = 1
    keep_share: float = 0.2  # of the prefix tokens that is trained, the most uncertain
    keep_scope: Literal["row", "microbatch"] = "row"  # among which tokens they are ranked
    # loss
    advantages: Literal["group", "split"] = "group"  # see above
    scale_by_std: bool = False  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: in the update and its denominator, or left out
    loss_norm: Literal["token", "sequence", "constant"] = "constant"  # what a token's weight is; see above
    clip_low: float = 0.2  # ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = 0.2  # ratio above 1 + clip_high gets no gradient; negative: off
    dual_clip: float = 3.0  # a negative advantage counts at most this many times; 0: off
    tis_cap: float = 2.0  # of the importance weight for what sampler and trainer disagree on; 0: off
    kl_coef: float = 0.0  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.001  # bonus per nat
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
    prefix_advantages: Tensor,  # (B,) of the prefix tokens
    importance: Tensor,  # (B, T) truncated ratio of old policy to sampler, constant
    entropy: Tensor,  # (B, T)
    ref_logprobs: Tensor | None,  # (B, T) of the frozen reference; None without KL
    mask: Tensor,  # (B, T) bool, the tokens that are trained
    prefix_mask: Tensor,  # (B, T) bool, those that the expert wrote
    num_tokens: int,  # trained tokens of the whole optimizer step, all ranks
    num_rows: int,  # rows of the whole optimizer step, all ranks
    max_tokens: int,  # the constant of loss_norm constant
    loss_norm: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    keep_share: float,
    keep_scope: str,
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
    kept = most_uncertain(entropy, mask & prefix_mask, keep_share, keep_scope)
    advantages = torch.where(prefix_mask, torch.where(kept, prefix_advantages[:, None], 0.0), advantages[:, None])  # (B, T)
    surrogate, clipped = common.clipped_surrogate(log_ratio.exp(), advantages, clip_low, clip_high)
    if dual_clip:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    loss = -(weights * importance * surrogate).sum()
    metrics = {"clip_fraction": (per_token * clipped).sum(), "entropy": (per_token * entropy.detach()).sum()}
    metrics["kept_prefix_tokens"] = kept.sum()
    if kl_coef:
        kl = common.kl_divergence(torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0), kl_estimator)
        loss = loss + kl_coef * (weights * kl).sum()
        metrics["kl"] = (per_token * kl.detach()).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (weights * entropy).sum()
    return loss, metrics | {"loss": loss.detach()}


def most_uncertain(entropy: Tensor, prefix_mask: Tensor, keep_share: float, scope: str) -> Tensor:
    """Mask of the ceil(keep_share x n) prefix tokens with the highest entropy, of each row or of the micro-batch, (B, T)."""
    scores = torch.where(prefix_mask, entropy.detach(), -math.inf)
    scores, valid = (x if scope == "row" else x.reshape(1, -1) for x in (scores, prefix_mask))
    count = torch.ceil(keep_share * valid.sum(1, keepdim=True).double() - 1e-9)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ((rank < count) & valid).view_as(prefix_mask)


# ----------------------------------------------------------------------------------------------------------------------
# The prefix
# ----------------------------------------------------------------------------------------------------------------------


def lowest_share(step: int, start: float, final: float, steps: int) -> float:
    """low(t) above at a 0-based step: a cosine from start to final, final from `steps` on."""
    return final + 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)) * (start - final)


def draw_prefix(trace_tokens: int, low: float, high: float, least: int, rng: np.random.Generator) -> int:
    """Tokens of one prefix; at least one token of the trace is left to the policy."""
    share = low + max(0.0, high - low) * rng.random()
    return min(max(int(share * trace_tokens), least), trace_tokens - 1)


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

        # Prefixes
        low, prefixes = lowest_share(step, cfg.low_start, cfg.low_final, cfg.prefix_steps), []
        for problem in problems:
            rng = np.random.default_rng(common.group_seed((cfg.seed, step, 2), problem.id))
            length = draw_prefix(len(problem.expert_ids), low, cfg.prefix_high, cfg.min_prefix_tokens, rng)
            prefixes.append(problem.expert_ids[:length])

        # Rollouts
        with log.timer("rollouts"):
            groups = sampler.generate(
                problems,
                None,
                cfg.group_size - cfg.hybrid_rows,
                cfg.max_completion_tokens,
                cfg.temperature,
                (cfg.seed, step, 0),
            )
            if cfg.hybrid_rows:
                hybrids = sampler.generate(problems, prefixes, 1, cfg.max_completion_tokens, cfg.temperature, (cfg.seed, step, 1))
                groups = [[*group, *hybrid] for group, hybrid in zip(groups, hybrids, strict=True)]
                log.add_mean("prefix_fraction", [len(x) / len(p.expert_ids) for x, p in zip(prefixes, problems, strict=True)])

        # Rewards
        with log.timer("rewards"):
            log.add(verifier_errors=common.score(groups))

        # Advantages
        prefix_advantages = {}  # of hybrid rows, by their identity
        for group in groups:
            rewards = torch.tensor([[r.reward for r in group]])
            for rollout, advantage in zip(group, common.group_advantages(rewards, cfg.scale_by_std)[0].tolist(), strict=True):
                rollout.advantage = advantage
            if cfg.hybrid_rows:
                prefix_advantages[id(group[-1])] = group[-1].advantage
            if cfg.hybrid_rows and cfg.advantages == "split":
                plain = common.group_advantages(rewards[:, :-1], cfg.scale_by_std)[0].tolist()
                for rollout, advantage in zip(group[:-1], plain, strict=True):
                    rollout.advantage = advantage
                prefix_advantages[id(group[-1])] = group[-1].reward - rewards[0, :-1].mean().item()
                group[-1].advantage = group[-1].reward
        log.add_rollouts(groups)
        log.add_mean("plain_reward", [r.reward for group in groups for r in group[: cfg.group_size - cfg.hybrid_rows]])
        log.add_mean("hybrid_reward", [r.reward for group in groups for r in group[cfg.group_size - cfg.hybrid_rows :]])
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
                num_policy, num_prefix, num_rows = common.count_tokens(rows, dist)
                for batch in common.microbatches(rows, cfg.tokens_per_microbatch, dist):
                    logprobs, entropy = common.token_logprobs(policy, batch, cfg.temperature, cfg.entropy_coef != 0)
                    ref_logprobs = common.reference_logprobs(reference, batch, cfg.temperature)
                    old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
                    loss, metrics = loss_fn(
                        logprobs,
                        old_logprobs,
                        batch.advantages,
                        torch.tensor([prefix_advantages.get(id(r), 0.0) for r in batch.rollouts], device=dist.device),
                        common.truncated_importance(old_logprobs, batch, cfg.tis_cap, log),
                        entropy,
                        ref_logprobs,
                        batch.completion_mask,
                        batch.expert_mask,
                        num_policy + num_prefix,
                        num_rows,
                        cfg.max_completion_tokens,
                        cfg.loss_norm,
                        cfg.clip_low,
                        cfg.clip_high,
                        cfg.dual_clip,
                        cfg.keep_share,
                        cfg.keep_scope,
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
