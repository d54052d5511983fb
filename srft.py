"""SRFT: supervised reinforcement fine-tuning in one stage. Fu et al. 2025, arXiv 2506.19767.

LUFFY's group with three additions to its loss, all steered by the policy's entropy H: the expert's trace is also imitated, the less
the more uncertain the policy is, and the positive part of the policy's own rows is weakened, the less the more uncertain it is.

    w_sft = sft_coef exp(sft_entropy_sign H),   w_pos = positive_coef exp(positive_entropy_sign H)                both constant
    loss  = - 1 / num_expert  sum_t w_sft[t] logprobs[t]                                      over expert tokens, equation 8
            - sum_t w[t] A f(p[t])                                                            over expert tokens, as luffy.py
            - sum_t w[t] v[t] A ratio[t] (w_pos[t] if A > 0 else 1)                           over policy tokens, --rollouts adv
      or    - sum_t w[t] v[t] (w_pos[t] if reward is 1 else -1) logprobs[t]                   over policy tokens, --rollouts pm1
            - entropy_coef sum_t w[t] H[t]

Differs from luffy.py in the weights of the loss. --sft_coef 0 --positive_coef 1 --positive_entropy_sign 0 is luffy.py, and with
--expert_rows 0 grpo.py.

Departures. Paper and official code conflict. Sign of H in w_sft: the paper's -1 is the default, the code has +1. Policy rows: the
code's advantage x ratio is the default because equation 12 (pm1) pushes every wrong row down without bound when few are right.
Expert tokens are shaped as in the code; the paper's p is --gamma -1. What H is averaged over is open in the paper: the default is
the row's mean, the only scope seen in code that ran; --entropy_scope token is the other. The paper divides A by the std
(--scale_by_std), both codes do not. Its ablations are --sft_coef 1 --sft_entropy_sign 0 and --positive_coef 1
--positive_entropy_sign 0. The normalisers differ on purpose, a token mean for the imitation and --loss_norm for the rest.

    torchrun srft.py --model Qwen2.5-1.5B                                one GPU
    torchrun --nproc_per_node 8 srft.py --model Elliott/Qwen2.5-Math-7B-16k-think  the paper's
    python srft.py --model tiny                                          a laptop
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
    group_size: int = 8  # completions per problem, the expert's row included
    expert_rows: Literal[0, 1] = 1  # of the group
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
    rollouts: Literal["adv", "pm1"] = "adv"  # what pushes a policy row: its advantage, or +1 / -1 for right / wrong
    positive_coef: float = 0.1  # of policy rows that are pushed up
    positive_entropy_sign: Literal[-1, 0, 1] = 1  # of H in their weight; 0: no entropy
    sft_coef: float = 0.5  # of the imitation of expert tokens
    sft_entropy_sign: Literal[-1, 0, 1] = -1  # of H in its weight; 0: no entropy
    entropy_scope: Literal["row", "token"] = "row"  # H in both weights: the row's mean, or the token's own
    gamma: float = 0.1  # of the shaping f(p) = p / (p + gamma) on expert tokens; negative: f(p) = p
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
    rewards: Tensor,  # (B,)
    importance: Tensor,  # (B, T) truncated ratio of old policy to sampler, constant
    entropy: Tensor,  # (B, T)
    ref_logprobs: Tensor | None,  # (B, T) of the frozen reference; None without KL
    mask: Tensor,  # (B, T) bool, the tokens that are trained
    expert_mask: Tensor,  # (B, T) bool, those that the expert wrote
    num_tokens: int,  # trained tokens of the whole optimizer step, all ranks
    num_expert: int,  # those of them that the expert wrote
    num_rows: int,  # rows of the whole optimizer step, all ranks
    max_tokens: int,  # the constant of loss_norm constant
    loss_norm: str,
    clip_low: float,
    clip_high: float,
    rollouts: str,
    positive_coef: float,
    positive_entropy_sign: int,
    sft_coef: float,
    sft_entropy_sign: int,
    entropy_scope: str,
    gamma: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equation above over one micro-batch: a sum, so micro-batches and ranks add up. Metrics likewise, detached."""
    lengths = mask.sum(1, keepdim=True).clamp(min=1).to(logprobs.dtype)
    weight = {"token": 1 / max(num_tokens, 1), "sequence": 1 / (num_rows * lengths), "constant": 1 / (num_rows * max_tokens)}
    weights = torch.where(mask, weight[loss_norm], 0.0)  # (B, T)
    per_token = torch.where(mask, 1 / max(num_tokens, 1), 0.0)  # for metrics: the mean over trained tokens
    log_ratio = torch.where(mask & ~expert_mask, logprobs - old_logprobs, 0.0)
    surrogate, clipped = common.clipped_surrogate(log_ratio.exp(), advantages[:, None], clip_low, clip_high)
    uncertainty = torch.where(mask, entropy.detach(), 0.0)
    uncertainty = uncertainty if entropy_scope == "token" else uncertainty.sum(1, keepdim=True) / lengths
    positive = positive_coef * torch.exp(positive_entropy_sign * uncertainty)
    if rollouts == "adv":
        surrogate = torch.where(advantages[:, None] > 0, positive, 1.0) * surrogate
    else:
        signs = torch.where(rewards[:, None] == 1, positive, -1.0)
        surrogate, clipped = signs * torch.where(mask & ~expert_mask, logprobs, 0.0), torch.zeros_like(clipped)
    p = torch.where(mask & expert_mask, logprobs, 0.0).exp()
    shaped = p / (p + gamma) if gamma >= 0 else p
    surrogate = torch.where(expert_mask, shaped * advantages[:, None], surrogate)
    loss = -(weights * importance * surrogate).sum()
    imitation = torch.where(mask & expert_mask, 1 / max(num_expert, 1), 0.0)  # (B, T)
    sft_weight = sft_coef * torch.exp(sft_entropy_sign * uncertainty)
    loss = loss - (imitation * sft_weight * torch.where(mask & expert_mask, logprobs, 0.0)).sum()
    metrics = {"clip_fraction": (per_token * clipped).sum(), "entropy": (per_token * entropy.detach()).sum()}
    metrics["sft_weight"] = (imitation * sft_weight).sum()
    metrics["positive_weight"] = (per_token * positive).sum()
    if kl_coef:
        kl = common.kl_divergence(torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0), kl_estimator)
        loss = loss + kl_coef * (weights * kl).sum()
        metrics["kl"] = (per_token * kl.detach()).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (weights * entropy).sum()
    return loss, metrics | {"loss": loss.detach()}


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

        # Rollouts
        with log.timer("rollouts"):
            groups = sampler.generate(
                problems,
                None,
                cfg.group_size - cfg.expert_rows,
                cfg.max_completion_tokens,
                cfg.temperature,
                (cfg.seed, step, 0),
            )
        for problem, group in zip(problems, groups, strict=True):
            group.extend([common.expert_rollout(problem, tokenizer)] * cfg.expert_rows)

        # Rewards
        with log.timer("rewards"):
            log.add(verifier_errors=common.score(groups))

        # Advantages
        for group in groups:
            rewards = torch.tensor([[r.reward for r in group]])
            for rollout, advantage in zip(group, common.group_advantages(rewards, cfg.scale_by_std)[0].tolist(), strict=True):
                rollout.advantage = advantage
        log.add_rollouts(groups)
        log.add_mean("plain_reward", [r.reward for group in groups for r in group if not r.num_expert_tokens])
        log.add_mean("expert_reward", [r.reward for group in groups for r in group if r.num_expert_tokens])
        log.add_mean("expert_advantage", [r.advantage for group in groups for r in group if r.num_expert_tokens])
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
                    log.add_mean("expert_probability", logprobs.detach()[batch.expert_mask].exp().tolist())
                    old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
                    loss, metrics = loss_fn(
                        logprobs,
                        old_logprobs,
                        batch.advantages,
                        batch.rewards,
                        common.truncated_importance(old_logprobs, batch, cfg.tis_cap, log),
                        entropy,
                        ref_logprobs,
                        batch.completion_mask,
                        batch.expert_mask,
                        num_policy + num_expert,
                        num_expert,
                        num_rows,
                        cfg.max_completion_tokens,
                        cfg.loss_norm,
                        cfg.clip_low,
                        cfg.clip_high,
                        cfg.rollouts,
                        cfg.positive_coef,
                        cfg.positive_entropy_sign,
                        cfg.sft_coef,
                        cfg.sft_entropy_sign,
                        cfg.entropy_scope,
                        cfg.gamma,
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
