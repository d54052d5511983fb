"""iw-SFT: importance weighted SFT, and the family of weighted SFT losses. Qin, Springenberg 2025, arXiv 2507.12856; emmyqin/iw_sft.

SFT on successful traces maximises a loose lower bound of the reward. Any positive q tightens it, because p / ref >= (q / ref) (1 +
log(p / q)): each trace's log-likelihood is weighted by q / ref, a constant. q is the current policy and ref the model that the run
started from, so traces that the policy has come to find likely count more. Every other weighting is one more line of this table.

    loss = - 1 / num_tokens  sum_b sum_t weight[b, t] logprobs[b, t],      weight constant, from the policy as it is:
    iw         clamp(exp(power mean_t(log q[t] - log ref[t])), 0, 16), one number per trace                   iw-SFT
    iw_step    clamp(q[t] / ref[t], 0.2, 1.8)                                                              iw-SFT, step variant
    dft        p[t]                                                     Wu et al. 2025, 2508.05629, equation 9
    trsft      min(1, p[t] / trsft_alpha)                               Su et al. 2025, TRAPO, 2512.17636
    chord_phi  p[t] (1 - p[t])                                          Zhang et al. 2025, CHORD, 2508.11408
    pear       clamp(pear_gamma^(T - t) prod_{j > t} clamp(p[j] / ref[j]))     Zhang et al. 2026, 2602.01058, third-party report

Differs from sft.py in the weights. --weight iw --q reference is sft.py. With q = policy it is sft.py only at the first step, where
policy and reference are equal: the gradient is then the true importance weighted one, contrary to what is often said.

Departures. The official run's means are per trace (micro-batch of one): --loss_norm sequence; the default is sft.py's global token
mean. --q ema is the control half of the paper. The bound asks for the policy that wrote the traces as ref; its log-probabilities
are seldom known, the official code takes the start model, and --reference names another. pear's ref is the writer too. Weights
are not normalised; --normalize divides them by their mean over the step's tokens.

    torchrun iw_sft.py --model Qwen2.5-1.5B                              one GPU
    torchrun --nproc_per_node 8 iw_sft.py --model Qwen2.5-32B-Instruct --data simplescaling/s1K-1.1 --loss_norm sequence
    python iw_sft.py --model tiny                                        a laptop
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
    steps: int = 625  # of one update; five epochs of 1000 traces
    problems_per_step: int = 8  # expert traces over all ranks
    max_prompt_tokens: int = 1024  # longer prompts are dropped at load
    max_completion_tokens: int = 20000  # longer expert traces are dropped at load
    temperature: float = 1.0  # of sampler and log-probabilities alike
    template: str = "auto"  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    columns: str = ""  # "problem=... answer=... expert=..." where the data set's names are not recognised
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # for the evaluation; auto: vLLM where there is one and a GPU
    sampler_memory: float = 0.4  # share of the GPU for vLLM
    tensor_parallel: int = 1  # ranks that share a vLLM engine
    rope_theta: float = 0.0  # rotary base for a longer context, with max_positions; 0: the model's own
    max_positions: int = 0  # window of the model; 0: its own
    # weights
    weight: Literal["iw", "iw_step", "dft", "trsft", "chord_phi", "pear"] = "iw"  # see above
    q: Literal["policy", "ema", "reference"] = "policy"  # of iw and iw_step
    q_decay: float = 0.9  # of the moving average of the weights behind q = ema, per step
    reference: str = ""  # model of the denominator, of iw, iw_step and pear; empty: --model
    power: float = 1.0  # iw: of the geometric mean ratio
    weight_high: float = 16.0  # iw: largest weight
    step_low: float = 0.2  # iw_step: smallest weight
    step_high: float = 1.8  # iw_step: largest weight
    trsft_alpha: float = 0.1  # trsft: p above which the weight is 1
    pear_gamma: float = 0.999  # pear: per token to the end of the trace
    normalize: bool = False  # divide the weights by their mean over the step's tokens
    loss_norm: Literal["token", "sequence"] = "token"  # mean over tokens, or over rows of their means
    # optimization
    lr: float = 1e-5  # peak
    warmup: float = 0.05  # share of the steps, linear
    final_lr: float = 0.0  # where the cosine ends, as a share of the peak
    weight_decay: float = 1e-4  # AdamW
    beta2: float = 0.95  # AdamW
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
    token_weights: Tensor,  # (B, T), constant
    entropy: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool, the tokens that are trained
    num_tokens: int,  # trained tokens of the whole optimizer step, all ranks
    num_rows: int,  # rows of the whole optimizer step, all ranks
    loss_norm: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equation above over one micro-batch: a sum, so micro-batches and ranks add up. Metrics likewise, detached."""
    lengths = mask.sum(1, keepdim=True).clamp(min=1).to(logprobs.dtype)
    weights = torch.where(mask, 1 / max(num_tokens, 1) if loss_norm == "token" else 1 / (num_rows * lengths), 0.0)  # (B, T)
    logprobs = torch.where(mask, logprobs, 0.0)
    loss = -(weights * token_weights * logprobs).sum()
    metrics = {"weight": (weights * token_weights).sum(), "nll": -(weights * logprobs.detach()).sum()}
    return loss, metrics | {"entropy": (weights * entropy.detach()).sum(), "loss": loss.detach()}


# ----------------------------------------------------------------------------------------------------------------------
# The weights
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def weigh(
    logprobs: Tensor,  # (B, T) of the policy
    q_logprobs: Tensor | None,  # (B, T) of q; None where the weight has no q
    ref_logprobs: Tensor | None,  # (B, T) of the reference; None where the weight has none
    mask: Tensor,  # (B, T) bool, the tokens that are trained
    weight: str,
    power: float,
    weight_high: float,
    step_low: float,
    step_high: float,
    trsft_alpha: float,
    pear_gamma: float,
) -> Tensor:
    """The constant in front of every log-probability, (B, T), 0 outside the mask."""
    logprobs = torch.where(mask, logprobs, 0.0)
    if weight in ("iw", "iw_step"):
        log_ratio = torch.where(mask, q_logprobs - ref_logprobs, 0.0)
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        chosen = (power * mean).exp().clamp(0, weight_high) if weight == "iw" else log_ratio.exp().clamp(step_low, step_high)
    elif weight == "pear":  # per-token bounds and bounds of the product as reported for the paper
        delta = torch.where(mask, logprobs - ref_logprobs, 0.0).clamp(-0.08, 0.3)
        left = mask.flip(1).cumsum(1).flip(1) - 1  # trained tokens after this one
        after = delta.flip(1).cumsum(1).flip(1) - delta
        chosen = (left * math.log(pear_gamma) + after).clamp(-10, 5).exp()
    else:
        p = logprobs.exp()
        chosen = {"dft": p, "trsft": (p / trsft_alpha).clamp(max=1), "chord_phi": p * (1 - p)}[weight]
    return torch.where(mask, chosen, 0.0)


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
    ratio = cfg.weight in ("iw", "iw_step")
    needed = ratio or cfg.weight == "pear"
    reference = common.load_policy(cfg.reference or cfg.model, dist).requires_grad_(False) if needed else None
    ema = common.load_policy(cfg.model, dist).requires_grad_(False) if ratio and cfg.q == "ema" else None
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay)
    state = {"model": policy, "optimizer": (policy, optimizer)} | ({"q": ema} if ema else {})
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

        # Weights
        def weights_of(logprobs: Tensor, batch: common.Batch) -> Tensor:
            ref_logprobs = common.reference_logprobs(reference, batch, cfg.temperature)
            q_logprobs = {"policy": logprobs, "reference": ref_logprobs}.get(cfg.q)
            return weigh(
                logprobs,
                common.reference_logprobs(ema, batch, cfg.temperature) if q_logprobs is None else q_logprobs,
                ref_logprobs,
                batch.completion_mask,
                cfg.weight,
                cfg.power,
                cfg.weight_high,
                cfg.step_low,
                cfg.step_high,
                cfg.trsft_alpha,
                cfg.pear_gamma,
            )

        _, num_tokens, num_rows = common.count_tokens(rows, dist)
        scale = 1.0
        if cfg.normalize:
            total = torch.zeros((), device=dist.device)
            for batch in common.microbatches(rows, cfg.tokens_per_microbatch, dist):
                total += weights_of(common.reference_logprobs(policy, batch, cfg.temperature), batch).sum()
            scale = num_tokens / max(common.all_sum(total, dist).item(), 1e-9)

        # Update
        with log.timer("update"):
            sampler.sleep()
            lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.final_lr)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            for batch in common.microbatches(rows, cfg.tokens_per_microbatch, dist):
                logprobs, entropy = common.token_logprobs(policy, batch, cfg.temperature)
                token_weights = scale * weights_of(logprobs, batch)
                log.add_max(weight_max=token_weights.max().item())
                loss, metrics = loss_fn(
                    logprobs,
                    token_weights,
                    entropy,
                    batch.completion_mask,
                    num_tokens,
                    num_rows,
                    cfg.loss_norm,
                )
                loss.backward()
                log.add(**metrics)
            values["grad_norm"] = common.clip_gradients(policy.parameters(), cfg.grad_clip).item()
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                common.follow(ema, policy, cfg.q_decay)

        # Sync and log
        with log.timer("sync"):
            sampler.sync(policy)
        log.step(step, [], lr=lr, **values)

    common.finish(log, step, values, policy, tokenizer, cfg.model)


if __name__ == "__main__":
    main(common.parse(Config))
