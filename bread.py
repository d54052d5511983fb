"""BREAD: branched rollouts from expert anchors. Zhang et al. 2025, arXiv 2506.17211. Unofficial: no official code was found.

A small policy fails hard problems in every completion of the group, so GRPO learns nothing from them. BREAD then looks, by binary
search over the K episodes of an expert trace, for the shortest prefix from which the group succeeds sometimes, and branches the
group there. As the policy improves the anchor moves to the start. Expert tokens are context, never a target.

    plain group has a success: an ordinary GRPO group; otherwise
    lo, hi = 0, K - 1;  while lo < hi:  mid = ceil((lo + hi) / 2),  s = success rate of a group that continues episodes[:mid]
        s <= band_low: lo = mid      s in the band: take this group      s >= band_high: hi = mid - 1
    loss = GRPO's, over policy tokens only; ratio, KL and advantage are conditioned on the prefix

Differs from grpo.py in two places: the anchors, and the mask of the loss. At most 1 + ceil(log2 K) generate calls a step: probes of
all problems go together, and the probe that is taken is the training group, nothing is sampled again.

Departures and choices where the paper is silent: the band is open, (0, 1), any mixed group; the last episode, which holds the
answer, is never shown; without a group in the band the shortest prefix with any success is taken; when every probe fails the
group stays as it is, with zero advantage; the prefix opens the assistant's turn. Group size, lr and clip are grpo.py's.

    torchrun bread.py --model Qwen2.5-1.5B                               one GPU
    torchrun --nproc_per_node 8 bread.py --problems_per_step 32 --steps 200 --warmup_steps 10 --clip_high 0.3  a published re-run's
    python bread.py --model tiny                                         a laptop, about two minutes
"""

from collections.abc import Callable
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
    num_episodes: int = 10  # K, pieces an expert trace is cut into; the last is never shown
    band_low: float = 0.0  # a group is taken when its success rate is strictly between these
    band_high: float = 1.0
    trigger: Literal["all_fail", "always"] = "all_fail"  # search only where the plain group has no success, or everywhere
    stop_on_first: bool = True  # take the first group in the band; else go on to look for a shorter prefix
    leak_check: bool = False  # never show an episode after the answer's text has appeared
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
    lr: float = 1e-6  # constant after the warm-up
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


# ----------------------------------------------------------------------------------------------------------------------
# The anchor
# ----------------------------------------------------------------------------------------------------------------------


def anchor_search(
    lengths: list[list[int]],  # per problem, expert tokens in its first 0, 1, 2, ... episodes; the last is the longest allowed
    probe: Callable[[list[int], list[int], int], list[list[common.Rollout]]],  # (problems, prefix lengths, round) -> scored groups
    band_low: float,
    band_high: float,
    stop_on_first: bool,
) -> tuple[list[list[common.Rollout] | None], list[int], int]:
    """Binary search for the shortest prefix in the band, all problems in step. (group or None, episodes shown, rounds)."""
    best: list[list[common.Rollout] | None] = [None] * len(lengths)
    in_band, anchor = [False] * len(lengths), [0] * len(lengths)
    lo, hi, rounds = [0] * len(lengths), [len(cuts) - 1 for cuts in lengths], 0
    while searching := [i for i in range(len(lengths)) if lo[i] < hi[i]]:
        mids = [(lo[i] + hi[i] + 1) // 2 for i in searching]
        rounds += 1
        groups = probe(searching, [lengths[i][mid] for i, mid in zip(searching, mids, strict=True)], rounds)
        for i, mid, group in zip(searching, mids, groups, strict=True):
            success = sum(r.reward for r in group) / len(group)
            accepted = band_low < success < band_high
            if success > 0 and (accepted or not in_band[i]):  # a group in the band replaces one outside; then the later is shorter
                best[i], anchor[i], in_band[i] = group, mid, accepted
            if accepted and stop_on_first:
                lo[i] = hi[i]
            elif success <= band_low:
                lo[i] = mid
            else:
                hi[i] = mid - 1
    return best, anchor, rounds


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
                cfg.group_size,
                cfg.max_completion_tokens,
                cfg.temperature,
                (cfg.seed, step, 0),
            )

        # Rewards
        with log.timer("rewards"):
            log.add(verifier_errors=common.score(groups))

        # Anchors
        with log.timer("anchors"):
            hard = [i for i, group in enumerate(groups) if cfg.trigger == "always" or not any(r.reward for r in group)]
            cuts = [common.episode_cuts(problems[i], tokenizer, cfg.num_episodes, cfg.leak_check)[:-1] for i in hard]

            def probe(chosen: list[int], prefix_lengths: list[int], attempt: int) -> list[list[common.Rollout]]:
                asked = [problems[hard[i]] for i in chosen]  # noqa: B023, called in this step only
                probes = sampler.generate(
                    asked,
                    [p.expert_ids[:length] for p, length in zip(asked, prefix_lengths, strict=True)],
                    cfg.group_size,
                    cfg.max_completion_tokens,
                    cfg.temperature,
                    (cfg.seed, step, attempt),  # noqa: B023
                )
                log.add(verifier_errors=common.score(probes), probes=len(probes))
                return probes

            found, anchors, rounds = anchor_search(cuts, probe, cfg.band_low, cfg.band_high, cfg.stop_on_first)
            log.add_mean("plain_reward", [r.reward for group in groups for r in group])
            log.add_mean("search_rate", [i in hard for i in range(len(groups))])
            log.add_mean("search_failed", [group is None for group in found])
            log.add_mean("anchor_depth", [a / len(c) for a, c in zip(anchors, cuts, strict=True) if a])
            values["search_rounds"] = rounds
            for i, group in zip(hard, found, strict=True):
                groups[i] = group or groups[i]

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
                        batch.completion_mask & ~batch.expert_mask,
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

        # Sync and log
        with log.timer("sync"):
            sampler.sync(policy)
        log.step(step, groups, lr=lr, **values)

    common.finish(log, step, values, policy, tokenizer, cfg.model)


if __name__ == "__main__":
    main(common.parse(Config))
