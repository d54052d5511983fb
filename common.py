"""What would be a bug if two methods disagreed about it; the rest of a method is in its own file.

Rollouts, scoring, advantages and the other formulas, packing and counting, log-probabilities. The
ground under it is in core/ (processes, config, model, data, packing, engines, verifier, records).

Shapes: B rows, T completion tokens, V vocabulary, P problems, N rows of one problem (group size).
Every (B, T) tensor is on the completion axis: column t is completion token t, so logprobs[b, t] =
log pi(completion_ids[b, t] | prompt b, completion_ids[b, :t]). Nobody shifts by one.

The rule that keeps the numbers right: a loss is a sum over tokens of weight x term, the weights are
fixed before the first backward from counts over micro-batches and ranks, and gradients *sum*.
"""

import math
from collections import ChainMap
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.config import RunConfig, asked, parse
from core.data import Problem, alike, group_seed, load_problems, regroup, shown_ends, tokens_before_answer, with_hint
from core.engines import load_engine
from core.model import (
    Policy,
    Tokenizer,
    clip_gradients,
    follow,
    full_tensor,
    load_model,
    load_policy,
    load_reference,
    load_tokenizer,
    named_weights,
    set_lr,
    shard,
)
from core.packing import lay_out, measure, plan
from core.processes import StopSignal, Waited, World, all_sum, exchange, fail, gather, init, print0, shutdown
from core.records import SHOWN, RunLog, agree, finish, resume, save
from core.rewards import RewardFn, countdown_reward, grade, knights_reward, load_grader, math_reward, words_reward
from core.verifier import answer_part, boxed, completion_text


# Problems -----------------------------------------------------------------------------------------
def load_data(cfg, tokenizer: Tokenizer, reward_fn: RewardFn, require_expert: bool = False) -> tuple[list, list]:
    """Training and test Problems of a run; no test problems where --test_data is empty."""
    grader, test = load_grader(cfg.run, reward_fn), cfg.run.test_data
    train = load_problems(cfg.run.data, tokenizer, require_expert=require_expert, grader=grader, **asked(cfg))
    cfg.run = alike(replace(cfg.run, reward=grader.source or grader.kind), train)  # so are the test, final/, eval.py
    return agree(cfg, train, load_problems(test, tokenizer, split="test", grader=grader, **asked(cfg)) if test else [])


def draw(problems: list[Problem], n: int, step: int, seed: int, world: World, at: int | None = None) -> list[Problem]:
    """This rank's share of n problems in the line of epochs, from `at` on, else from step * n. A
    pure function. An epoch has every problem once, shuffled; rank r takes every world.size-th.
    """
    size, first = len(problems), step * n if at is None else at
    epochs = {place // size for place in range(first, first + n)}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(size).tolist() for epoch in epochs}
    drawn = [orders[place // size][place % size] for place in range(first, first + n)]
    before = [drawn[:k].count(i) for k, i in enumerate(drawn)]  # a second draw in a step samples anew
    found = [replace(problems[i], occurrence=k) if k else problems[i] for i, k in zip(drawn, before, strict=True)]
    return found[world.rank :: world.size]


def share(values: list, update: int, updates: int, total: int, world: World) -> list:
    """This rank's values (one per problem) of one of the step's updates: consecutive parts of its
    `total` problems, the same on any number of ranks.
    """
    return [value for i, value in enumerate(values) if (i * world.size + world.rank) * updates // total == update]


# Rollouts -----------------------------------------------------------------------------------------
@dataclass
class Rollout:
    """A completion. Its first num_expert_tokens tokens are the expert's, the rest the policy's."""

    problem: Problem
    completion_ids: list[int]
    num_expert_tokens: int = 0
    sampler_logprobs: list[float] = field(default_factory=list)  # of each policy token, as the sampler reported it
    text: str = ""
    finished: bool = False  # ends with EOS; a completion that hit the length limit does not
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)  # of the reward, where its function names them
    advantage: float = 0.0
    prefix_advantage: float | None = None  # of the expert's tokens, where it is not the row's (prefix_rft.py)
    taught: bool = True  # False: the expert's tokens are not a target, since another row has the same (trapo.py)
    old_logprobs: Tensor | None = None  # (completion length,), of the policy that made the batch; None: not stored
    seen: tuple | None = None  # what the last update computed of it, for samples.jsonl: token_logprobs

    @property
    def solved(self) -> bool:
        """Whether the reward reaches --solved: success, however rewards are scaled."""
        return self.problem.grader.solves(self.reward)


def expert_rollout(problem: Problem, tokenizer: Tokenizer) -> Rollout:
    """The expert's whole completion: every token is the expert's."""
    text = completion_text(problem.expert_ids, tokenizer)
    return Rollout(problem, problem.expert_ids, len(problem.expert_ids), text=text, finished=True)


class Sampler:
    """Completions from an inference copy of the weights, made by vLLM or transformers."""

    def __init__(self, engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer
        self.sleep, self.sync = engine.sleep, engine.sync  # free the device; take weights (collective)

    def generate(
        self,
        problems: list[Problem],
        prefixes: list[list[int]] | None,  # per problem, the expert tokens that open its completions; None: no prefixes
        n: int,
        max_tokens: int,  # of the whole completion, prefix included
        temperature: float,  # 0: greedy
        seed: tuple[int, ...],
        top_p: float = 1.0,
    ) -> list[list[Rollout]]:
        """n completions per problem. top_p below 1 biases the ratio, so training never passes it.

        ValueError where a prefix leaves no room for a token.
        """
        prefixes = prefixes or [[] for _ in problems]
        if any(len(prefix) >= max_tokens for prefix in prefixes):
            raise ValueError(f"a prefix leaves no room under {max_tokens} completion tokens")
        prompts, seeds = [p.prompt_ids for p in problems], [group_seed(seed, p) for p in problems]
        made = self.engine.decode(prompts, prefixes, n, max_tokens, temperature, seeds, top_p)
        groups = []
        for problem, prefix, rows in zip(problems, prefixes, made, strict=True):
            groups.append([Rollout(problem, [*prefix, *ids], len(prefix), logprobs) for ids, logprobs in rows])
        for rollout in (rollout for group in groups for rollout in group):
            rollout.text = completion_text(rollout.completion_ids, self.tokenizer, self.engine.stop_ids)
            rollout.finished = rollout.completion_ids[-1] in self.engine.stop_ids
        return groups


def load_sampler(run: RunConfig, tokenizer: Tokenizer, world: World, max_completion_tokens: int) -> Sampler:
    """The sampler of a run, on the engine that --sampler names."""
    return Sampler(load_engine(run, tokenizer, world, max_completion_tokens), tokenizer)


# Scoring ------------------------------------------------------------------------------------------
def score(groups: list[list[Rollout]]) -> dict[str, int]:
    """Write the reward and its parts into every rollout. Returns what the log counts of them."""
    flat = [rollout for group in groups for rollout in group]
    grades, errors = grade([r.problem for r in flat], [r.text for r in flat])
    for rollout, found in zip(flat, grades, strict=True):
        rollout.reward, rollout.parts = found
    return {"verifier_errors": errors, "sampled_tokens": sum(len(r.completion_ids) - r.num_expert_tokens for r in flat)}


def evaluate(sampler: Sampler, problems: list[Problem], cfg, world: World) -> dict[str, float]:
    """Share of solved samples, mean of a reward of one's own; seeds are fixed (collective)."""
    mine, seed = problems[world.rank :: world.size], (cfg.run.seed, -1)
    groups = sampler.generate(mine, None, cfg.run.eval_samples, cfg.max_completion_tokens, cfg.temperature, seed)
    score(groups)
    found = torch.tensor([(r.solved, r.reward, 1.0) for group in groups for r in group], dtype=torch.float64)
    solved, reward, count = all_sum(found.reshape(-1, 3).sum(0), world).tolist()
    return {"test_accuracy": solved / count} | ({"test_reward": reward / count} if problems[0].grader.source else {})


def log_rollouts(log: RunLog, groups: list[list[Rollout]]) -> None:
    """Log what the policy wrote alone, the reward of rows that had help, and two samples."""
    plain = [own for group in groups if (own := [r for r in group if not (r.num_expert_tokens or r.problem.hinted)])]
    log.add_mean("groups_mixed", [len({r.reward for r in group}) > 1 for group in plain])
    log.add_mean("groups_solved", [all(r.solved for r in group) for group in plain])
    log.add_mean("groups_failed", [not any(r.solved for r in group) for group in plain])
    log.add_mean("guided_reward", [r.reward for g in groups for r in g if r.num_expert_tokens or r.problem.hinted])
    for group in plain:  # each counts once, however many plain rows it has
        log.add_mean("reward", [sum(r.reward for r in group) / len(group)])
        for name in group[0].parts:
            log.add_mean(f"reward_{name}", [sum(r.parts.get(name, 0.0) for r in group) / len(group)])
        log.add_mean("completion_tokens", [sum(len(r.completion_ids) for r in group) / len(group)])
        log.add_mean("truncated", [sum(not r.finished for r in group) / len(group)])
    log.samples += [r for group in groups[:1] for r in (group[0], group[-1])]


# Formulas -----------------------------------------------------------------------------------------
def group_advantages(rewards: Tensor, scale_by_std: bool, baseline: Tensor | None = None) -> Tensor:
    """(P, N) -> (P, N): reward - baseline, if asked divided by the group's unbiased std + 1e-6.

    The baseline is the group's mean where none is given. Equal rewards have advantage exactly 0.
    Shao et al. 2024 (2402.03300) section 4.1.2; without std Liu et al. 2025 (2503.20783, Dr.GRPO).
    """
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    advantages = rewards - (rewards.mean(1, keepdim=True) if baseline is None else baseline)
    if scale_by_std and rewards.shape[1] > 1:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    return torch.where(constant, 0.0, advantages)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """(min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), where the clip cuts), both (B, T).

    A negative bound is off. Schulman et al. 2017 (1707.06347) eq. 7; DAPO (2503.14476) eq. 10.
    """
    low = 1 - clip_low if clip_low >= 0 else -math.inf
    high = 1 + clip_high if clip_high >= 0 else math.inf
    plain, clipped = ratio * advantages, ratio.clamp(low, high) * advantages
    return torch.minimum(plain, clipped), clipped < plain


def importance_weights(batch: "Batch", old_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_sampler, cap), (B, T), constant; 1 on expert tokens; all 1 at cap 0.

    The sampler is another engine in another precision, so its samples are slightly off-policy. Yao
    et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    ratio = torch.where(batch.policy_mask, old_logprobs - batch.sampler_logprobs, 0.0).exp()
    return torch.where(batch.policy_mask, ratio.clamp(max=cap), 1.0) if cap else torch.ones_like(ratio)


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) as each sampled token estimates it, (B, T). Schulman 2020.

    k1 = log_ratio, k2 = log_ratio^2 / 2, k3 = exp(-log_ratio) - 1 + log_ratio. On samples of the
    policy k2 has the gradient of the reverse KL, k3 that of the forward KL, and k1 has none in
    expectation: here k1 keeps its value and takes k2's gradient. k3 is at most 10, there without
    gradient, as in verl's core_algos.kl_penalty: one token can have e^29.
    """
    log_ratio = logprobs - ref_logprobs
    k2 = log_ratio.square() / 2
    if estimator == "k1":
        return log_ratio.detach() + k2 - k2.detach()
    return k2 if estimator == "k2" else (torch.exp(-log_ratio.clamp(min=-20)) - 1 + log_ratio).clamp(max=10)


def token_weights(mask: Tensor, loss_norm: str, num_tokens: int, num_rows: int = 1, max_tokens: int = 1) -> Tensor:
    """w of every loss, (B, T), 0 outside the mask, from counts of the whole optimizer step.

    token: 1 / num_tokens, sequence: 1 / (num_rows x row), constant: 1 / (num_rows x max_tokens).
    """
    if loss_norm == "sequence":
        lengths = mask.sum(1, keepdim=True).clamp(min=1).to(torch.get_default_dtype())
        return torch.where(mask, 1 / (max(num_rows, 1) * lengths), 0.0)
    return torch.where(mask, 1 / max(num_tokens if loss_norm == "token" else num_rows * max_tokens, 1), 0.0)


def token_mean(values: Tensor, mask: Tensor, num_tokens: int, weights: Tensor | float = 1.0) -> Tensor:
    """Sum of weights x values over the mask, (B, T), / num_tokens: parts of a step's mean add up.

    SFT's loss is -token_mean(logprobs, batch.expert_mask, counts.expert).
    """
    return (token_weights(mask, "token", num_tokens) * weights * torch.where(mask, values, 0.0)).sum()


# Packing ------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """A micro-batch. Past a row's length all masks are False and nothing else is used."""

    rollouts: list[Rollout]  # without its problem's text and grader where another rank made it
    lengths: list[int]  # completion tokens of each row
    completion_ids: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T) bool; all False in a filler row
    expert_mask: Tensor  # (B, T) bool; tokens that the expert wrote
    policy_mask: Tensor  # (B, T) bool; tokens that the policy wrote
    old_logprobs: Tensor  # (B, T), of the policy that made the batch; NaN in a row for which none are stored
    sampler_logprobs: Tensor  # (B, T), as the sampler reported them; 0 on expert tokens
    rewards: Tensor  # (B,)
    advantages: Tensor  # (B,)
    token_advantages: Tensor  # (B, T): the row's; on expert tokens the prefix's, where it has one of its own
    taught: Tensor  # (B,) bool; False: the expert's tokens are no target
    line: tuple  # the rows without padding: what Policy.forward begins with
    place: tuple[Tensor, Tensor]  # (row, column) of each completion token, (M,)
    numbers: list[int] = field(default_factory=list)  # of the rows among those of all ranks; none of a filler
    own: dict[int, Rollout] = field(default_factory=dict)  # by number what this rank made, wherever it is updated


def make_batch(rollouts: list[Rollout], device="cpu", filler: bool = False, shared: list[int] = ()) -> Batch:
    """Rows to tensors; shared as in lay_out. A filler, for a rank without rows, has no mask True.
    ValueError where a row has no prompt token or no completion token.
    """
    lengths = [len(r.completion_ids) for r in rollouts]
    if min(lengths) == 0 or min(len(r.problem.prompt_ids) for r in rollouts) == 0:
        raise ValueError("a row needs at least one prompt token and one completion token")
    line, place = lay_out([(r.problem.prompt_ids, r.completion_ids) for r in rollouts], device, shared)
    tokens = np.zeros((2, sum(lengths)), np.float32)
    for r, end, length in zip(rollouts, np.cumsum(lengths), lengths, strict=True):
        sampled, old = tokens[:, end - length : end]
        sampled[r.num_expert_tokens :][: len(r.sampler_logprobs)] = r.sampler_logprobs
        old[:] = math.nan if r.old_logprobs is None else r.old_logprobs
    prefix = [r.advantage if r.prefix_advantage is None else r.prefix_advantage for r in rollouts]
    rows = [(r.reward, r.advantage, p, r.taught, r.num_expert_tokens) for r, p in zip(rollouts, prefix, strict=True)]
    floats = torch.from_numpy(np.concatenate([tokens.ravel(), np.array(rows, np.float32).ravel()])).to(device)
    sampled, old = floats[: tokens.size].view(2, -1)
    rewards, advantages, prefix, taught, num_expert = floats[tokens.size :].view(-1, 5).T

    def pad(values: Tensor) -> Tensor:
        return values.new_zeros(len(rollouts), max(lengths)).index_put_(place, values)

    completion_mask = pad(torch.full_like(sampled, not filler, dtype=torch.bool))
    expert_mask = torch.arange(max(lengths), device=device) < num_expert[:, None]
    return Batch(
        rollouts=rollouts,
        lengths=lengths,
        completion_ids=pad(line[-2][line[-1]]),
        completion_mask=completion_mask,
        expert_mask=expert_mask,
        policy_mask=completion_mask & ~expert_mask,
        old_logprobs=pad(old),
        sampler_logprobs=pad(sampled),
        rewards=rewards,
        advantages=advantages,
        token_advantages=torch.where(expert_mask, prefix[:, None], advantages[:, None]),
        taught=taught.bool(),
        line=line,
        place=place,
    )


def bare(rollout: Rollout, number: int) -> Rollout:
    """What an update and the log need of a row, in arrays: so it goes to another rank."""
    p, ids = rollout.problem, np.array(rollout.problem.prompt_ids, np.int32)
    said, text = (p.text, rollout.text) if number < SHOWN else ("", "")
    problem = Problem(p.id, said, ids, "", None, score=p.score, occurrence=p.occurrence, hinted=p.hinted)
    ids, logprobs = np.array(rollout.completion_ids, np.int32), np.array(rollout.sampler_logprobs, np.float32)
    return replace(rollout, problem=problem, completion_ids=ids, sampler_logprobs=logprobs, text=text, parts={})


def microbatches(rollouts: list[Rollout], max_tokens: int, world: World) -> list[Batch]:
    """Rows as plan deals them, under a budget of prompt + completion tokens, 0: ours (collective).

    What rows of a group begin with is computed once. A row moves to the rank that updates it. Every
    rank gets the same number, fillers where rows are too few; none if no rank has a row.
    """
    max_tokens = max_tokens or (2**11 if world.device.type == "cpu" else 2**14)
    sizes = gather([measure([(r.problem.prompt_ids, r.completion_ids, r.num_expert_tokens) for r in rollouts])], world)
    steps = plan(sum(sizes, []), world.size, max_tokens)
    own = dict(enumerate(rollouts, sum(map(len, sizes[: world.rank]))))
    dealt = [[i for step in steps for i, _ in step[rank] if i in own] for rank in range(world.size)]
    leaving = [{} if rank == world.rank else {i: bare(own[i], i) for i in part} for rank, part in enumerate(dealt)]
    here, batches = ChainMap(own, *exchange(leaving, world)), Waited()
    blank = Rollout(Problem("filler", "", [0], "", None), [0])
    for step in steps:
        numbers, shared = zip(*step[world.rank], strict=True) if step[world.rank] else ((), ())
        batch = make_batch([here[i] for i in numbers] or [blank], world.device, filler=not numbers, shared=shared)
        batches.append(replace(batch, numbers=numbers, own=own))
    return batches


class Counts(NamedTuple):
    """What losses are divided by: tokens and rows of one optimizer step over all ranks."""

    policy: int  # tokens that the policy wrote
    expert: int  # tokens that the expert wrote
    rows: int  # rows in which the policy wrote a token
    expert_rows: int = 0  # rows that are wholly the expert's, not in rows


def count(rollouts: list[Rollout], world: World) -> Counts:
    """The counts of an optimizer step from this rank's rows (collective)."""
    expert, total = sum(r.num_expert_tokens for r in rollouts), sum(len(r.completion_ids) for r in rollouts)
    whole = sum(r.num_expert_tokens == len(r.completion_ids) for r in rollouts)
    return Counts(*all_sum(torch.tensor([total - expert, expert, len(rollouts) - whole, whole]), world).tolist())


# Log-probabilities --------------------------------------------------------------------------------
def token_logprobs(policy: Policy, batch: Batch, temperature: float, entropy_grad: bool = False) -> tuple[Tensor, ...]:
    """(log pi of every completion token, entropy), (B, T), at least fp32, 0 outside (collective).

    Temperature divides the logits as in the sampler. The entropy has a gradient only if asked for.
    """
    logprobs, entropy = policy(*batch.line, temperature, entropy_grad)
    empty = logprobs.new_zeros(batch.completion_ids.shape)
    logprobs, entropy = empty.index_put(batch.place, logprobs), empty.index_put(batch.place, entropy)
    if logprobs.requires_grad and min(batch.numbers, default=SHOWN) < SHOWN:
        kept = torch.stack((logprobs, entropy, empty)).detach()
        logprobs.register_hook(lambda grad: kept.__setitem__(2, grad))  # of the loss, in the backward
        for i, (number, row) in enumerate(zip(batch.numbers, batch.rollouts, strict=True)):
            row.seen = (number, kept[:, i, : batch.lengths[i]]) if number < SHOWN else None
    return logprobs, entropy


@torch.no_grad()
def reference_logprobs(reference: Policy | None, batch: Batch, temperature: float) -> Tensor | None:
    """log pi of a policy, (B, T), without gradient; None without a policy (collective)."""
    return None if reference is None else token_logprobs(reference, batch, temperature)[0]


def old_logprobs(batch: Batch, logprobs: Tensor) -> Tensor:
    """The stored ones, (B, T), constant; where a row stores none, the policy's as they are now."""
    return torch.where(batch.old_logprobs.isnan(), logprobs.detach(), batch.old_logprobs)


def keep_old_logprobs(batch: Batch, logprobs: Tensor, world: World) -> None:
    """Write log-probabilities (B, T) into the rollouts of a batch, on their ranks (collective)."""
    rows = zip(batch.numbers, logprobs.detach().cpu(), batch.lengths, strict=False)  # a filler has no number
    parts = gather([{i: row[:n].clone() for i, row, n in rows}], world)
    for i, values in ((i, values) for part in parts for i, values in part.items() if i in batch.own):
        batch.own[i].old_logprobs = values


def store_old_logprobs(policy: Policy, rollouts: list[Rollout], cfg, world: World) -> None:
    """Store the policy's log-probabilities in the rollouts, before several updates (collective)."""
    for batch in microbatches(rollouts, cfg.run.tokens_per_microbatch, world):
        keep_old_logprobs(batch, reference_logprobs(policy, batch, cfg.temperature), world)


def log_update(log: RunLog, metrics: dict[str, Tensor], batch: Batch, logprobs: Tensor, updates: int) -> None:
    """Log a micro-batch's metrics as means over updates, and how far sampler and trainer differ."""
    log.add(batch.rollouts, **{k: v / updates for k, v in metrics.items()}, trained_tokens=batch.completion_mask.sum())
    mask = batch.policy_mask
    gap = torch.where(mask, old_logprobs(batch, logprobs) - batch.sampler_logprobs, -math.inf).exp()
    log.add_mean("sampler_ratio", gap, mask)
    log.add_mean("sampler_ratio_off", (gap - 1).abs() > 0.1, mask)
    log.add(sampler_ratio_max=gap.max())


# What a method file uses of core/ is handed on here, so that it imports this module alone.
__all__ = ["RunConfig", "parse", "World", "StopSignal", "init", "shutdown", "all_sum", "gather", "print0", "fail"]
__all__ += ["Policy", "Tokenizer", "load_tokenizer", "load_model", "load_policy", "load_reference", "shard", "grade"]
__all__ += ["full_tensor", "follow", "clip_gradients", "set_lr", "Problem", "load_problems", "group_seed", "regroup"]
__all__ += ["shown_ends", "tokens_before_answer", "with_hint", "answer_part", "boxed", "RunLog", "save", "resume"]
__all__ += ["named_weights", "finish", "math_reward", "countdown_reward", "knights_reward", "words_reward"]
