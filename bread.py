"""BREAD: branched rollouts from expert anchors. Zhang et al. 2025, arXiv 2506.17211. Unofficial: no
official code was found.

A small policy fails hard problems in every completion of the group, so GRPO learns nothing from
them. BREAD then searches by bisection over the K episodes of an expert trace for the shortest
prefix from which the group succeeds sometimes, and branches the group there. As the policy
improves, the anchor moves to the start. Expert tokens are context, never a target.

    a plain group with a success is an ordinary GRPO group; otherwise
    lo, hi = 0, K - 1
    while lo < hi:
        mid = ceil((lo + hi) / 2);  s = success rate of a group that continues episodes[:mid]
        s <= band_low: lo = mid     otherwise: hi = mid - 1
    the group to train: of the plain one and the probes one in the band, else a mixed one, else one
        with a success, and the one with the shortest prefix of those
    loss = GRPO's, over policy tokens only; ratio, KL and advantage are conditioned on the prefix

Differs from grpo.py in the anchors alone: loss_fn is the same, and --num_episodes 1 is grpo.py.
A step has at most 1 + ceil(log2 K) generate calls, because all problems are probed together.
The probe that is taken is the training group; nothing is sampled again.

Departures, and choices where the paper is silent. The band is open, (0, 1): any mixed group.
Readers of the paper say that the shortest prefix is searched; --stop_on_first ends at the first
group in the band. Most of them also place it in the question: --prefix_site user; here it opens the
assistant's turn, as "complete the rest" reads. The K-th episode is never shown, nor a box, nor what
a thought calls its answer. Where every probe fails the plain group stays, and the update has
no success for that problem, which the paper says it has. KL is off; group size, lr and clip are
grpo.py's.

    torchrun bread.py --model Qwen2.5-1.5B                               one GPU
    torchrun --nproc_per_node 8 bread.py --problems_per_step 32 --steps 200 --warmup_steps 10 \
        --clip_high 0.3                                                  a published re-run's
    python bread.py --model map                                          a laptop, about two minutes
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common

reward_fn = common.math_reward  # (problem, completion) -> number or {name: (weight, number)}; --reward F wins


# Config -------------------------------------------------------------------------------------------
@dataclass
class Config:
    # rollouts
    steps: int = 500  # rounds of rollouts and update(s)
    problems_per_step: int = 128  # over all ranks
    group_size: int = 8  # completions per problem
    max_completion_tokens: int = 8192  # EOS and, where there is one, the hint included
    temperature: float = 1.0  # of sampler and log-probabilities alike
    # anchors
    num_episodes: int = 10  # K: pieces of an expert trace, at most; the last is never shown
    band_low: float = 0.0  # a group is taken when its success rate is strictly between these
    band_high: float = 1.0
    trigger: Literal["all_fail", "always"] = "all_fail"  # search where no plain row is right, or few: band_low
    stop_on_first: bool = False  # take the first group in the band; else go on to look for a shorter prefix
    prefix_site: Literal["assistant", "user"] = "assistant"  # whose turn shows the prefix: user, behind the question
    # loss
    scale_by_std: bool = True  # divide the advantage by the group's std
    zero_variance: Literal["keep", "drop"] = "keep"  # groups with equal rewards: keep them in w, or drop them
    loss_norm: Literal["token", "sequence", "constant"] = "token"  # w of grpo.py's docstring
    clip_low: float = 0.2  # where A < 0, a ratio below 1 - clip_low gets no gradient; negative: off
    clip_high: float = 0.2  # where A > 0, a ratio above 1 + clip_high gets no gradient; negative: off
    tis_cap: float = 2.0  # largest v of grpo.py's docstring; 0: v = 1
    kl_coef: float = 0.0  # 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # per-token estimate of KL(policy || reference)
    entropy_coef: float = 0.0  # bonus per nat
    # optimization
    lr: float = 1e-6  # AdamW; constant after the warm-up
    warmup_steps: int = 0  # linear
    updates_per_step: int = 1  # optimizer steps per rollout batch, each on its own share of the groups
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
    if cfg.kl_coef:
        policy_lp, ref_lp = (torch.where(mask, x, 0.0) for x in (logprobs, ref_logprobs))
        kl = common.kl_divergence(policy_lp, ref_lp, cfg.kl_estimator)
        loss = loss + cfg.kl_coef * (w * kl).sum()
        metrics["kl"] = common.token_mean(kl.detach(), mask, num_tokens)
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * (w * entropy).sum()
    return loss, metrics | {"loss": loss.detach()}


# The anchor ---------------------------------------------------------------------------------------
def worth(cfg: Config, group: list[common.Rollout], episodes: int) -> tuple[bool, bool, bool, int]:
    """Of two groups the one of larger worth is taken: in the band, mixed, some success, shorter."""
    success = sum(r.solved for r in group) / len(group)
    return cfg.band_low < success < cfg.band_high, 0 < success < 1, success > 0, -episodes


def anchor_search(cfg: Config, sampler, log, step: int, problems: list, plain: list) -> tuple[list, list[str]]:
    """Bisection for the shortest prefix in the band. (groups, ids of opened traces) of this rank.

    plain: the groups without a prefix, each of which stays unless a better one is found.
    """
    tokenizer, best, shown, rounds = sampler.tokenizer, list(plain), [0] * len(plain), 0
    hard = [sum(r.solved for r in g) / len(g) <= (cfg.band_low if cfg.trigger == "always" else 0.0) for g in plain]
    traces = [common.shown_ends(p, tokenizer) if h else ([], False) for p, h in zip(problems, hard, strict=True)]
    cuts = [common.regroup([*ends, 0], cfg.num_episodes)[:-1] for ends, _ in traces]  # without the last episode's end
    lo, hi = [0] * len(plain), [len(c) - 1 for c in cuts]
    opened = [problem.id if last else "" for problem, last in zip(problems, hi, strict=True)]
    while searching := [i for i in range(len(plain)) if lo[i] < hi[i]]:
        mids, rounds = [(lo[i] + hi[i] + 1) // 2 for i in searching], rounds + 1
        asked = [problems[i] for i in searching]
        prefixes = [problems[i].expert_ids[: cuts[i][mid]] for i, mid in zip(searching, mids, strict=True)]
        if cfg.prefix_site == "user":
            asked, prefixes = [common.with_hint(*x, tokenizer) for x in zip(asked, prefixes, strict=True)], None
        log.phase("rollouts")
        seed = (cfg.run.seed, step, rounds)
        groups = sampler.generate(asked, prefixes, cfg.group_size, cfg.max_completion_tokens, cfg.temperature, seed)
        log.phase("rewards")
        log.add(**(counts := common.score(groups)), probes=len(groups), probe_tokens=counts["sampled_tokens"])
        for i, mid, group in zip(searching, mids, groups, strict=True):
            if worth(cfg, group, mid) > worth(cfg, best[i], shown[i]):
                best[i], shown[i] = group, mid
            if sum(r.solved for r in group) / len(group) <= cfg.band_low:
                lo[i] = mid
            else:
                hi[i] = lo[i] if cfg.stop_on_first and worth(cfg, group, mid)[0] else mid - 1
    log.add(search_rounds_max=rounds)
    log.add_mean("search_rate", [bool(name) for name in opened])
    log.add_mean("search_mixed", [worth(cfg, group, 0)[1] for group, name in zip(best, opened, strict=True) if name])
    log.add_mean("anchor_depth", [c[n] / len(p.expert_ids) for p, c, n in zip(problems, cuts, shown, strict=True) if n])
    log.add_mean("traces_cut_short", [cut_short for (_, cut_short), h in zip(traces, hard, strict=True) if h])
    common.log_rollouts(log, [group for group, n in zip(best, shown, strict=True) if n])
    return best, opened


# Main ---------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    world = common.init(cfg.run.seed)
    tokenizer = common.load_tokenizer(cfg.run.model)
    train, test = common.load_data(cfg, tokenizer, reward_fn, require_expert=True)
    policy = common.load_policy(cfg.run, world)
    reference = common.load_reference(cfg.run, policy, world) if cfg.kl_coef else None
    window = cfg.max_completion_tokens * (2 if cfg.prefix_site == "user" else 1)  # a hint in the prompt needs room
    sampler = common.load_sampler(cfg.run, tokenizer, world, window)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.run.weight_decay, fused=True)
    state = {"model": policy, "optimizer": (policy, optimizer)}
    log, stop = common.RunLog(cfg, __file__, world), common.StopSignal()
    start, extra = common.resume(log, state)
    opened = set(extra.get("opened", []))
    sampler.sync(policy)

    for step in range(start, cfg.steps + 1):  # at step n the policy has made n steps; the last pass ends the run
        if test and (step % cfg.run.eval_every == 0 or step == cfg.steps):
            log.phase("evaluation")
            log.set(**common.evaluate(sampler, test, cfg, world))
        last = stop.asked(world) or step == cfg.steps
        if step > start and (last or step % cfg.run.save_every == 0):
            common.save(log, step, state, opened=sorted(opened))
        if last:
            break

        log.phase("rollouts")
        problems = common.draw(train, cfg.problems_per_step, step, cfg.run.seed, world)
        groups = sampler.generate(
            problems,
            None,
            cfg.group_size,
            cfg.max_completion_tokens,
            cfg.temperature,
            (cfg.run.seed, step, 0),
        )

        log.phase("rewards")
        log.add(**common.score(groups))
        common.log_rollouts(log, groups)

        groups, ids = anchor_search(cfg, sampler, log, step, problems, groups)

        log.phase("advantages")
        for group in groups:
            rewards = torch.tensor([[r.reward for r in group]])
            advantages = common.group_advantages(rewards, cfg.scale_by_std, baseline=rewards.mean())
            for rollout, advantage in zip(group, advantages[0].tolist(), strict=True):
                rollout.advantage = advantage
        kept = [group if cfg.zero_variance == "keep" or any(r.advantage for r in group) else [] for group in groups]

        log.phase("update")
        sampler.sleep()
        opened |= set(filter(None, common.gather(ids, world)))
        log.set(traces_opened=len(opened))
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
