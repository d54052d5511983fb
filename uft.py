"""UFT: unifying supervised and reinforcement fine-tuning. Liu et al. 2025, arXiv 2505.16984; code liumy2010/UFT.

Every group starts from a hint, a random prefix of the expert's trace without its answer, shared by all rows. The policy is trained
by GRPO on what it writes itself, and a little by likelihood on the hint. The expected share of the trace that is shown falls by a
cosine from hint_high to hint_low over hint_steps steps and is 0 afterwards, so that training ends as plain GRPO.

    p(t)  = hint_low + (hint_high - hint_low) (1 + cos(pi t / hint_steps)) / 2,   t = step + 1 <= hint_steps,   0 afterwards
    m     = min(hint_chunks, segments of the trace),   k ~ Binomial(m, p(t)),   hint = the first k of m chunks, one draw a problem
    loss  = GRPO's over policy tokens, with KL  - hint_coef / num_hint sum_t logprobs[t] over hint tokens

Differs from grpo.py in two places: the hint, and its likelihood in the loss. Without hints (--hint_high 0 --hint_low 0) and with
--format_reward 0 it is grpo.py for any hint_coef.

Departures. The official code's are the defaults where it and the paper differ: segments (steps of the data set, lines, sentences)
regrouped into at most five chunks that span the whole trace, the mean over hint tokens (--hint_norm sum is the paper's), KL over
policy tokens only, and 0.1 for a wrong answer in a box. Its entropy bonus of 0.001 is --entropy_coef; the paper has none. Its means
of micro-batch means are means over all tokens. The hint counts against max_completion_tokens and opens the assistant's turn.
--hint_unit segment and token draw from Binomial(segments) and Binomial(tokens), --schedule uniform is R3's (every length equally
likely, no annealing).

    torchrun uft.py --model Qwen2.5-1.5B                                 one GPU
    torchrun --nproc_per_node 2 uft.py --model Qwen2.5-0.5B --data countdown.jsonl --entropy_coef 0.001  the paper's
    python uft.py --model tiny                                           a laptop
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
    problems_per_step: int = 256  # over all ranks
    group_size: int = 4  # completions per problem
    max_prompt_tokens: int = 1024  # longer prompts are dropped at load
    max_completion_tokens: int = 1024  # hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    template: str = "auto"  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    columns: str = ""  # "problem=... answer=... expert=..." where the data set's names are not recognised
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # inference engine; auto: vLLM where there is one and a GPU
    sampler_memory: float = 0.4  # share of the GPU for vLLM
    tensor_parallel: int = 1  # ranks that share a vLLM engine
    rope_theta: float = 0.0  # rotary base for a longer context, with max_positions; 0: the model's own
    max_positions: int = 0  # window of the model; 0: its own
    # hint
    hint_high: float = 0.95  # expected share of the trace that is shown at first
    hint_low: float = 0.05  # and at hint_steps
    hint_steps: int = 300  # afterwards nothing is shown
    hint_chunks: int = 5  # pieces that a trace is cut into, at most
    hint_unit: Literal["chunk", "segment", "token"] = "chunk"  # what the binomial counts
    schedule: Literal["cosine", "uniform"] = "cosine"  # uniform: every length equally likely up to hint_steps
    format_reward: float = 0.1  # of a wrong answer in a box
    # loss
    hint_coef: float = 0.001  # of the likelihood of hint tokens
    hint_norm: Literal["mean", "sum"] = "mean"  # over the hint tokens of the step, or their sum over its rows
    scale_by_std: bool = True  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: in the update and its denominator, or left out
    loss_norm: Literal["token", "sequence", "constant"] = "token"  # what a token's weight is; see above
    clip_low: float = 0.2  # ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = 0.2  # ratio above 1 + clip_high gets no gradient; negative: off
    tis_cap: float = 2.0  # of the importance weight for what sampler and trainer disagree on; 0: off
    kl_coef: float = 0.001  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.0  # bonus per nat
    # optimization
    lr: float = 1e-6  # constant after the warm-up
    warmup_steps: int = 0  # linear
    weight_decay: float = 0.01  # AdamW
    grad_clip: float = 1.0  # norm of the summed gradient; 0: off
    updates_per_step: int = 4  # optimizer steps per rollout batch, each on its own share of the groups
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
    hint_mask: Tensor,  # (B, T) bool, the tokens of the hint; none of them is in mask
    num_tokens: int,  # trained tokens of the whole optimizer step, all ranks
    num_hint: int,  # hint tokens of the whole optimizer step, all ranks
    num_rows: int,  # rows of the whole optimizer step, all ranks
    max_tokens: int,  # the constant of loss_norm constant
    loss_norm: str,
    clip_low: float,
    clip_high: float,
    hint_coef: float,
    hint_norm: str,
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
    if num_hint and hint_coef:
        hint_weights = torch.where(hint_mask, 1 / num_hint if hint_norm == "mean" else 1 / num_rows, 0.0)  # (B, T)
        hint_loss = -(hint_weights * torch.where(hint_mask, logprobs, 0.0)).sum()
        loss = loss + hint_coef * hint_loss
        metrics["hint_loss"] = hint_loss.detach()
    if kl_coef:
        kl = common.kl_divergence(torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0), kl_estimator)
        loss = loss + kl_coef * (weights * kl).sum()
        metrics["kl"] = (per_token * kl.detach()).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (weights * entropy).sum()
    return loss, metrics | {"loss": loss.detach()}


# ----------------------------------------------------------------------------------------------------------------------
# The hint
# ----------------------------------------------------------------------------------------------------------------------


def hint_share(step: int, high: float, low: float, hint_steps: int) -> float:
    """p(t) above, t = step + 1: the expected share of the trace that is shown at a 0-based step."""
    t = step + 1
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * t / hint_steps)) if t <= hint_steps else 0.0


def hint_cuts(ends: list[int], unit: str, chunks: int) -> list[int]:
    """Tokens shown by 0, 1, ..., m chunks of a trace whose last segment, the answer, is never shown."""
    shown = ends[:-1] if unit != "token" else list(range(1, (ends[-2] if len(ends) > 1 else 0) + 1))
    return common.regroup(shown, chunks if unit == "chunk" else max(1, len(shown)))


def draw_hint(cuts: list[int], share: float, schedule: str, rng: np.random.Generator) -> int:
    """Tokens of one hint: k of the m chunks, binomial, or with the uniform schedule every k equally likely."""
    chunks = len(cuts) - 1
    if not share:
        return 0
    return cuts[int(rng.integers(0, chunks + 1) if schedule == "uniform" else rng.binomial(chunks, share))]


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

        # Hints
        share, hints = hint_share(step, cfg.hint_high, cfg.hint_low, cfg.hint_steps), []
        for problem in problems:
            cuts = hint_cuts(common.episode_ends(problem, tokenizer), cfg.hint_unit, cfg.hint_chunks)
            rng = np.random.default_rng(common.group_seed((cfg.seed, step, 1), problem.id))
            hints.append(problem.expert_ids[: draw_hint(cuts, share, cfg.schedule, rng)])
        log.add_mean("hint_fraction", [len(h) / len(p.expert_ids) for h, p in zip(hints, problems, strict=True)])

        # Rollouts
        with log.timer("rollouts"):
            groups = sampler.generate(
                problems,
                hints,
                cfg.group_size,
                cfg.max_completion_tokens,
                cfg.temperature,
                (cfg.seed, step, 0),
            )

        # Rewards
        with log.timer("rewards"):
            log.add(verifier_errors=common.score(groups))
        log.add_mean("correct", [r.reward for group in groups for r in group])
        for rollout in [
            r for group in groups for r in group if not r.reward and common.boxed(common.answer_part(r.text, r.problem.thinks))
        ]:
            rollout.reward = cfg.format_reward

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
                num_tokens, num_hint, num_rows = common.count_tokens(rows, dist)
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
                        batch.expert_mask,
                        num_tokens,
                        num_hint,
                        num_rows,
                        cfg.max_completion_tokens,
                        cfg.loss_norm,
                        cfg.clip_low,
                        cfg.clip_high,
                        cfg.hint_coef,
                        cfg.hint_norm,
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
