"""iw-SFT: importance weighted SFT, and the family of weighted SFT losses. Qin and Springenberg
2025, arXiv 2507.12856; official code emmyqin/iw_sft.

SFT on successful traces maximises a loose lower bound of the reward. A q close to p tightens it,
because p / ref >= (q / ref) (1 + log(p / q)): each trace's log-likelihood is weighted by q / ref, a
constant. q is the current policy and ref the model that the run started from, so traces that the
policy has come to find likely count more. Every other weighting is one more line of this table.

    loss = - 1 / num_expert sum_t weight logprobs      weight constant, from the policy as it is:

    iw         clamp(exp(power mean_t(log q - log ref)), 0, 16)     iw-SFT, one number a trace
    iw_step    clamp(q / ref, 0.2, 1.8)                             iw-SFT, step variant
    dft        p                                                    Wu 2025, 2508.05629, equation 9
    trsft      min(1, p / trsft_alpha)                              Su 2025, TRAPO, 2512.17636
    chord_phi  p (1 - p)                                            Zhang 2025, CHORD, 2508.11408
    pear       clamp(pear_gamma^(T - t) prod_{j > t} clamp(p_j / ref_j))   Zhang 2026, 2602.01058,
                                                                    as a third party reports it

Differs from sft.py in the weights and, with --quality, in the traces drawn. --q reference makes iw
and iw_step 1. With --q policy they are 1 at the first step only, where policy and reference are
equal; later the gradient is the true importance weighted one and not SFT's, contrary to what is
often said.

The paper's variant for traces of known quality, iw-SFT(Q), is --quality; SFT(Q) is --quality with
--q reference. Both draw traces with replacement, in proportion to the data's column `score`. Only
the control half has code for them, with filters instead of scores: the best 10 % of its data are
there once, the best 5 % twice, the best 2 % three times, and a draw is uniform. Scores of 1, 2, 3
and 0 for the rest do the same.

Departures. The official run's means are per trace (micro-batches of one): --loss_norm sequence; the
default is sft.py's global token mean. --q ema is the control half of the paper. The bound asks for
the policy that wrote the traces as ref; its log-probabilities are seldom known, the official code
takes the start model, and --reference names another. pear's ref is the writer too. Weights are not
normalised; --normalize divides them by their mean over the step's tokens.

    torchrun iw_sft.py --model Qwen2.5-1.5B                              one GPU
    torchrun --nproc_per_node 8 iw_sft.py --model Qwen2.5-32B-Instruct --loss_norm sequence \
        --data simplescaling/s1K-1.1                                     the paper's
    python iw_sft.py --model map                                         a laptop
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import common

reward_fn = common.math_reward  # (problem, completion) -> number or {name: (weight, number)}; --reward F wins


# Config -------------------------------------------------------------------------------------------
@dataclass
class Config:
    # rows
    steps: int = 625  # of one update; five epochs of 1000 traces
    problems_per_step: int = 8  # expert traces over all ranks
    max_completion_tokens: int = 20000  # longer expert traces are dropped at load
    temperature: float = 1.0  # of the evaluation's samples alone: a likelihood has none
    quality: bool = False  # draw traces in proportion to their score, a column of the data; else each once an epoch
    # weights
    weight: Literal["iw", "iw_step", "dft", "trsft", "chord_phi", "pear"] = "iw"  # see above
    q: Literal["policy", "ema", "reference"] = "policy"  # of iw and iw_step
    q_decay: float = 0.9  # q = ema: decay per step of the moving average of the policy's parameters
    reference: str = ""  # model in the denominator of iw, iw_step and pear; empty: --model
    power: float = 1.0  # iw: power of the geometric mean of q / ref
    weight_high: float = 16.0  # iw: largest weight
    step_low: float = 0.2  # iw_step: smallest weight
    step_high: float = 1.8  # iw_step: largest weight
    trsft_alpha: float = 0.1  # trsft: p above which the weight is 1
    pear_gamma: float = 0.999  # pear: per token to the end of the trace
    normalize: bool = False  # divide the weights by their mean over the step's tokens
    loss_norm: Literal["token", "sequence"] = "token"  # mean over tokens, or over rows of their means
    # optimization
    lr: float = 1e-5  # AdamW; peak
    warmup: float = 0.05  # share of the steps, linear
    final_lr: float = 0.0  # where the cosine ends, as a share of the peak
    beta2: float = 0.95  # AdamW
    # the same in every method: model, data, sampler, memory, bookkeeping
    run: common.RunConfig = common.RunConfig(model="Qwen2.5-1.5B", weight_decay=1e-4, eval_every=100, save_every=500)


# The loss -----------------------------------------------------------------------------------------
def loss_fn(
    cfg: Config,
    batch: common.Batch,  # the rows: masks, advantages, and the log-probabilities they were sampled with
    logprobs: Tensor,  # (B, T) of the policy, with gradient
    entropy: Tensor,  # (B, T) of the policy
    ref_logprobs: Tensor | None,  # (B, T) of a frozen reference; None where none is used
    counts: common.Counts,  # tokens and rows of the whole optimizer step, all ranks
    q_logprobs: Tensor | None = None,  # (B, T) of the moving average, with q = ema
    scale: float = 1.0,  # of the weights, with normalize
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equation above over one micro-batch: a sum, so that micro-batches and ranks add up."""
    mask = batch.expert_mask
    w = common.token_weights(mask, cfg.loss_norm, counts.expert, counts.rows + counts.expert_rows)
    weight = scale * weigh(cfg, batch, logprobs, q_logprobs, ref_logprobs)
    logprobs = torch.where(mask, logprobs, 0.0)
    loss = -(w * weight * logprobs).sum()
    metrics = {"entropy": common.token_mean(entropy.detach(), mask, counts.expert)}
    metrics |= {"weight": (w * weight).sum(), "weight_max": weight.max(), "nll": -(w * logprobs.detach()).sum()}
    return loss, metrics | {"loss": loss.detach()}


@torch.no_grad()
def weigh(cfg: Config, batch, logprobs: Tensor, q_logprobs: Tensor | None, ref_logprobs: Tensor | None) -> Tensor:
    """The constant in front of every log-probability, (B, T), 0 outside the mask."""
    mask, p = batch.expert_mask, torch.where(batch.expert_mask, logprobs, 0.0).exp()
    if cfg.weight in ("iw", "iw_step"):
        q_logprobs = {"policy": logprobs, "reference": ref_logprobs, "ema": q_logprobs}[cfg.q]
        log_ratio = torch.where(mask, q_logprobs - ref_logprobs, 0.0)
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        iw = (cfg.power * mean).exp().clamp(0, cfg.weight_high)
        weight = iw if cfg.weight == "iw" else log_ratio.exp().clamp(cfg.step_low, cfg.step_high)
    elif cfg.weight == "pear":  # per-token bounds and bounds of the product as reported for the paper
        delta = torch.where(mask, logprobs - ref_logprobs, 0.0).clamp(-0.08, 0.3)
        left = mask.flip(1).cumsum(1).flip(1) - 1  # trained tokens after this one
        after = delta.flip(1).cumsum(1).flip(1) - delta
        weight = (left * math.log(cfg.pear_gamma) + after).clamp(-10, 5).exp()
    else:
        weight = {"dft": p, "trsft": (p / cfg.trsft_alpha).clamp(max=1), "chord_phi": p * (1 - p)}[cfg.weight]
    return torch.where(mask, weight, 0.0)


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


def normalizer(cfg: Config, policy, ema, reference, rows: list, counts: common.Counts, world: common.World) -> float:
    """1 / the mean weight over the tokens of the step, all ranks (collective)."""
    total = torch.zeros((), device=world.device)
    for batch in common.microbatches(rows, cfg.run.tokens_per_microbatch, world):
        models = (common.reference_logprobs(model, batch, temperature=1.0) for model in (policy, ema, reference))
        total += weigh(cfg, batch, *models).sum()
    return counts.expert / max(common.all_sum(total, world).item(), 1e-9)


def draw_by_score(problems: list, n: int, step: int, seed: int, world: common.World) -> list[common.Problem]:
    """As common.draw, but each of the n alone, with replacement, in proportion to the scores."""
    scores = np.array([problem.score for problem in problems])
    drawn = np.random.default_rng([seed, step]).choice(len(problems), n, p=scores / scores.sum())
    return [problems[k] for k in drawn[world.rank :: world.size]]


def check_scores(problems: list[common.Problem], data: str) -> None:
    """End the run at a trace whose score nothing can be drawn by, or where all scores are 0."""
    wrong = [f"row {p.id} has score {p.score}" for p in problems if p.score is None or not 0 <= p.score < math.inf]
    if wrong or not any(p.score for p in problems):
        common.fail(f"--quality: in {data} {(wrong or ['all scores are 0'])[0]}; it draws by finite ones, 0 or more")


# Main ---------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    world = common.init(cfg.run.seed)
    tokenizer = common.load_tokenizer(cfg.run.model)
    train, test = common.load_data(cfg, tokenizer, reward_fn, require_expert=True)
    if cfg.quality:
        check_scores(train, cfg.run.data)
    policy = common.load_policy(cfg.run, world)
    sampler = common.load_sampler(cfg.run, tokenizer, world, cfg.max_completion_tokens)
    ratio = cfg.weight in ("iw", "iw_step")
    ref_run = replace(cfg.run, model=cfg.reference or cfg.run.model)
    reference = common.load_reference(ref_run, policy, world) if ratio or cfg.weight == "pear" else None
    ema = common.load_policy(cfg.run, world).requires_grad_(False) if ratio and cfg.q == "ema" else None
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, (0.9, cfg.beta2), 1e-8, cfg.run.weight_decay, fused=True)
    state = {"model": policy, "optimizer": (policy, optimizer)} | ({"q": ema} if ema else {})
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
        draw = draw_by_score if cfg.quality else common.draw
        problems = draw(train, cfg.problems_per_step, step, cfg.run.seed, world)
        rows = [common.expert_rollout(problem, tokenizer) for problem in problems]
        log.add_mean("completion_tokens", [len(r.completion_ids) for r in rows])

        log.phase("update")
        log.set(lr=common.set_lr(learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.final_lr), optimizer))
        counts = common.count(rows, world)  # over all ranks, as gradients are summed: nothing divides by the ranks
        scale = normalizer(cfg, policy, ema, reference, rows, counts, world) if cfg.normalize else 1.0
        for batch in common.microbatches(rows, cfg.run.tokens_per_microbatch, world):
            logprobs, entropy = common.token_logprobs(policy, batch, temperature=1.0)
            ref_logprobs, q_logprobs = (common.reference_logprobs(m, batch, temperature=1.0) for m in (reference, ema))
            loss, metrics = loss_fn(cfg, batch, logprobs, entropy, ref_logprobs, counts, q_logprobs, scale)
            loss.backward()
            log.add(batch.rollouts, **metrics, trained_tokens=batch.completion_mask.sum())
        log.set(grad_norm=common.clip_gradients(policy.parameters(), cfg.run.grad_clip))
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            common.follow(ema, policy, cfg.q_decay)
        log.step(step)

    common.finish(log, step, policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Config))
