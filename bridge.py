"""BRIDGE: cooperative SFT and RL by bilevel optimization. Chen et al. 2025, arXiv 2509.06948 v3. Unofficial: no code was found.

SFT leads and RL follows. The base weights theta take a mix of both gradients. A low-rank adapter w on top of them, the leader,
learns by SFT plus the cooperative gain: how much better the reward of (theta, w) is than that of (shadow, w), where the shadow is
a copy of theta trained by RL alone. w is merged into theta for sampling and in the end.

    J_RL  = GRPO's surrogate over policy tokens, - kl_coef KL, + entropy_coef H          J_SFT = mean logprobs over expert tokens
    theta  += lr      ( (1 - lam) grad J_SFT(theta, w) + lam grad J_RL(theta, w) )
    w      += lora_lr ( (1 - lam) grad J_SFT(theta, w) + lam (grad J_RL(theta, w) - grad J_RL(shadow, w)) )
    shadow += lr        grad J_RL(shadow, w)

Differs from grpo.py by the adapter, the expert rows of a step, and the shadow's pass. The rollouts are drawn once, from (theta, w),
and serve all three updates; clipping comes before the minus sign. --lam 1 --lora_rank 0 is grpo.py, and theta at --lam 0 is sft.py.

Departures and choices where the paper is silent: GRPO as the RL algorithm; lam constant (its appendix; --lam_schedule linear is its
method text); AdamW for all three; all gradients taken at the same weights; a shadow that persists (--shadow one_step: theta after
one RL step, made anew each time; --reset_every n: copied from theta every n steps, since it drifts and the ratios leave the clip
range); rank 16, alpha 32 on every linear layer. --no-meta drops the gain, the ablation that the paper says costs ten points.

    torchrun bridge.py --model Qwen2.5-1.5B                              one GPU
    torchrun --nproc_per_node 8 bridge.py --model Qwen2.5-3B --data math_levels_3_to_5.jsonl  the paper's, as far as it is known
    python bridge.py --model tiny                                        a laptop
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    max_completion_tokens: int = 3072  # hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    template: str = "auto"  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    columns: str = ""  # "problem=... answer=... expert=..." where the data set's names are not recognised
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # inference engine; auto: vLLM where there is one and a GPU
    sampler_memory: float = 0.4  # share of the GPU for vLLM
    tensor_parallel: int = 1  # ranks that share a vLLM engine
    rope_theta: float = 0.0  # rotary base for a longer context, with max_positions; 0: the model's own
    max_positions: int = 0  # window of the model; 0: its own
    # bilevel
    lam: float = 0.5  # share of RL; the rest is SFT
    lam_schedule: Literal["constant", "linear"] = "constant"  # linear: from 0 up to 1 over the run
    sft_problems_per_step: int = 64  # expert traces over all ranks
    meta: bool = True  # the cooperative gain in the adapter's gradient
    lora_rank: int = 16  # of the adapter; 0: none
    lora_alpha: float = 32.0  # its output is scaled by alpha / rank
    lora_lr: float = 5e-7  # constant after the warm-up
    shadow: Literal["persist", "one_step"] = "persist"  # see above
    reset_every: int = 0  # steps between copies of the base weights to the shadow; 0: never
    # loss
    scale_by_std: bool = True  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: in the update and its denominator, or left out
    loss_norm: Literal["token", "sequence", "constant"] = "token"  # what a token's weight is; see above
    clip_low: float = 0.2  # ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = 0.2  # ratio above 1 + clip_high gets no gradient; negative: off
    tis_cap: float = 2.0  # of the importance weight for what sampler and trainer disagree on; 0: off
    kl_coef: float = 0.0  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.0  # bonus per nat
    # optimization
    lr: float = 5e-7  # constant after the warm-up
    warmup_steps: int = 0  # linear
    weight_decay: float = 0.01  # AdamW
    grad_clip: float = 1.0  # norm of the summed gradient; 0: off
    updates_per_step: int = 1  # optimizer steps per rollout batch, each on its own share of the groups
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
    mask: Tensor,  # (B, T) bool, the tokens that are trained
    num_tokens: int,  # trained tokens of the whole optimizer step, all ranks
) -> Tensor:
    """-J_SFT over one micro-batch, sft.py's loss."""
    weights = torch.where(mask, 1 / max(num_tokens, 1), 0.0)  # (B, T)
    return -(weights * logprobs).sum()


# ----------------------------------------------------------------------------------------------------------------------
# The adapter
# ----------------------------------------------------------------------------------------------------------------------


class LoraLinear(nn.Linear):
    """x W^T + b + (alpha / rank) x A^T B^T, A (rank, in) and B (out, rank). Hu et al. 2021, 2106.09685; B starts at 0."""

    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_adapter(model: nn.Module, rank: int, alpha: float, seed: int) -> nn.Module:
    """Give every linear layer but the head an adapter; rank 0 leaves the model as it is. The weights keep their names."""
    generator = torch.Generator().manual_seed(seed)
    for module in list(model.get_decoder().modules()) if rank else ():
        if type(module) is nn.Linear:
            module.__class__, module.lora_scale = LoraLinear, alpha / rank
            start = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            module.lora_a = nn.Parameter(start.to(module.weight.dtype))
            module.lora_b = nn.Parameter(module.weight.new_zeros(module.out_features, rank))
    return model


def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight) with the adapter added, one at a time (collective); the policy itself is not changed."""
    modules = dict(policy.model.named_modules())
    for name, weight in common.named_weights(policy):
        module = modules[name.rpartition(".")[0]]
        if name.endswith(".weight") and isinstance(module, LoraLinear):
            a, b = common.full_tensor(module.lora_a), common.full_tensor(module.lora_b)
            weight = weight + module.lora_scale * b @ a
        if "lora_" not in name:
            yield name, weight


def split_parameters(policy: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """(base weights, adapter weights)."""
    named = list(policy.named_parameters())
    return [p for name, p in named if "lora_" not in name], [p for name, p in named if "lora_" in name]


def subtract_shadow(adapter: list[Tensor], shadow_adapter: list[Tensor], lam: float) -> None:
    """grad_w += lam grad_w of the shadow's J_RL (a loss is -J): the second half of the cooperative gain."""
    for mine, theirs in zip(adapter, shadow_adapter, strict=True):
        if theirs.grad is not None:
            mine.grad = -lam * theirs.grad if mine.grad is None else mine.grad - lam * theirs.grad


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
    policy, shadow = (
        common.shard(
            add_adapter(common.load_model(cfg.model, torch.float32, "packed"), cfg.lora_rank, cfg.lora_alpha, cfg.seed),
            dist,
            cfg.checkpoint_activations,
        )
        for _ in range(2)
    )
    reference = common.load_policy(cfg.model, dist).requires_grad_(False) if cfg.kl_coef else None
    longest = cfg.max_prompt_tokens + cfg.max_completion_tokens
    sampler = common.load_sampler(cfg.sampler, cfg.model, tokenizer, dist, longest, cfg.sampler_memory, cfg.tensor_parallel)
    (base, adapter), (shadow_base, shadow_adapter) = split_parameters(policy), split_parameters(shadow)
    optimizer = torch.optim.AdamW(base, lr=cfg.lr, weight_decay=cfg.weight_decay)
    shadow_optimizer = torch.optim.AdamW(shadow_base, lr=cfg.lr, weight_decay=cfg.weight_decay)
    state = {"model": policy, "optimizer": (policy, optimizer)}
    state |= {"shadow": shadow, "shadow_optimizer": (shadow, shadow_optimizer)}
    if adapter:
        lora_optimizer = torch.optim.AdamW(adapter, lr=cfg.lora_lr, weight_decay=0.0)
        state["lora_optimizer"] = (policy, lora_optimizer)
    log = common.RunLog(cfg, __file__, dist)
    start, _ = common.resume(log, state)
    sampler.sync(merged_weights(policy))

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
        sft_problems = common.draw(train, cfg.sft_problems_per_step, step, cfg.seed + 1, dist)

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
            lam = cfg.lam if cfg.lam_schedule == "constant" else step / max(1, cfg.steps - 1)
            warm = min(1.0, (step + 1) / (cfg.warmup_steps or 1))
            lr = cfg.lr * warm
            for param_group in [*optimizer.param_groups, *shadow_optimizer.param_groups]:
                param_group["lr"] = lr
            for param_group in lora_optimizer.param_groups if adapter else ():
                param_group["lr"] = cfg.lora_lr * warm
            if cfg.reset_every and step % cfg.reset_every == 0:
                common.follow(shadow, policy)
            if cfg.updates_per_step > 1:
                rows = [rollout for group in kept for rollout in group]
                common.store_old_logprobs(policy, rows, cfg.temperature, cfg.tokens_per_microbatch, dist)
            for update in range(cfg.updates_per_step):
                part = common.share(kept, update, cfg.updates_per_step, cfg.problems_per_step, dist)
                rows = [rollout for group in part for rollout in group]
                taught = common.share(sft_problems, update, cfg.updates_per_step, cfg.sft_problems_per_step, dist)
                experts = [common.expert_rollout(problem, tokenizer) for problem in taught]
                _, num_expert, _ = common.count_tokens(experts, dist)
                for batch in common.microbatches(experts, cfg.tokens_per_microbatch, dist):
                    logprobs, _ = common.token_logprobs(policy, batch, cfg.temperature)
                    sft_loss = sft_loss_fn(logprobs, batch.completion_mask, num_expert)
                    ((1 - lam) * sft_loss).backward()
                    log.add(sft_loss=sft_loss / cfg.updates_per_step)

                def rl_backward(model: nn.Module, share: float) -> dict[str, float]:
                    num_tokens, _, num_rows = common.count_tokens(rows, dist)  # noqa: B023, called in this update only
                    total = {"loss": 0.0}
                    for batch in common.microbatches(rows, cfg.tokens_per_microbatch, dist):  # noqa: B023
                        logprobs, entropy = common.token_logprobs(model, batch, cfg.temperature, cfg.entropy_coef != 0)
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
                        (share * loss).backward()
                        common.keep_old_logprobs(batch, old_logprobs)  # the shadow's ratio is to the policy that sampled
                        total |= {name: total.get(name, 0.0) + metric / cfg.updates_per_step for name, metric in metrics.items()}
                    return total

                metrics = rl_backward(policy, lam)
                log.add(**metrics)
                if cfg.shadow == "one_step":
                    common.follow(shadow, policy)
                    rl_backward(shadow, 1.0)
                    values["shadow_grad_norm"] = common.clip_gradients(shadow_base, cfg.grad_clip).item()
                    shadow_optimizer.step()
                    shadow.zero_grad()
                if cfg.meta:
                    shadow_metrics = rl_backward(shadow, 1.0)
                    subtract_shadow(adapter, shadow_adapter, lam)
                    log.add(cooperative_gain=shadow_metrics["loss"] - metrics["loss"])
                    log.add(shadow_clip_fraction=shadow_metrics.get("clip_fraction", 0.0))
                values["grad_norm"] = common.clip_gradients(base, cfg.grad_clip).item()
                optimizer.step()
                if adapter:
                    values["lora_grad_norm"] = common.clip_gradients(adapter, cfg.grad_clip).item()
                    lora_optimizer.step()
                if cfg.meta and cfg.shadow == "persist":
                    values["shadow_grad_norm"] = common.clip_gradients(shadow_base, cfg.grad_clip).item()
                    shadow_optimizer.step()
                policy.zero_grad()
                shadow.zero_grad()
                common.follow(shadow, policy, part="lora_")

        # Sync and log
        with log.timer("sync"):
            sampler.sync(merged_weights(policy))
        log.step(step, groups, lr=lr, **values)

    common.finish(log, step, values, policy, tokenizer, cfg.model, merged_weights(policy))


if __name__ == "__main__":
    main(common.parse(Config))
