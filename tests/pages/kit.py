"""What a page is written with, and the record of a real main that it is compared with.

A page is a generator page(cfg, problems, ask): cfg has the flags, problems those of PROBLEMS, and
ask(seed, [(problem, prefix ids)], n) gives the groups that the scripted policy writes. For every
step it yields the list of its Updates. SCENARIOS of a page are the flags that it is run with.
"""

import dataclasses
import hashlib
import importlib
import math
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import problem, random_model
from one_step import one_step

import common
from core.config import flat

TRACES = ["1+1=2\n2+2=4\n4+4=8\n\\boxed{248}", "3-1=2\n\\boxed{2}", "5*3=5\n5+4=9\n9-1=8\n8+1=9\n\\boxed{5989}"]
TRACES += ["0\n\\boxed{0}", "7+1=8\n8+1=9\n9-2=7\n7+0=7\n7-7=0\n0+5=5\n\\boxed{897705}", "2\n3\n\\boxed{23}"]
PROBLEMS = [problem("q" * (i + 1), expert=text, id=str(i)) for i, text in enumerate(TRACES)]
PROBLEMS = [dataclasses.replace(p, score=(1.0, 0.0, 0.5, 3.0, 2.0, 1.0)[i]) for i, p in enumerate(PROBLEMS)]


# What a page yields -------------------------------------------------------------------------------
@dataclasses.dataclass
class Row:
    """A row that the scripted policy wrote, or a whole trace (`trace`)."""

    problem: common.Problem
    ids: list[int]
    expert: int  # tokens that the expert wrote
    reward: float
    sampler: list[float]  # log-probability of each token that the policy wrote, as the sampler says
    text: str = ""


@dataclasses.dataclass
class Seen:
    """What the model says of a row at an update: lists over its tokens."""

    lp: list[float]  # log-probabilities of the policy as it is
    before: list[float]  # of the policy at the start of the step's updates
    entropy: list[float]
    start: list[float]  # of the policy at the start of the run, and of every frozen reference
    other: list[float] | None = None  # under the weights other(cfg, [weights before each update]) of the page, if any
    update: "list[Seen]" = dataclasses.field(default_factory=list, repr=False)  # of all rows of the update
    microbatch: "list[tuple[int, Seen]]" = dataclasses.field(default_factory=list, repr=False)  # with expert tokens


@dataclasses.dataclass
class Update:
    """One optimizer step: its rows, d loss / d log p of token t of a row, and the learning rate.

    A coefficient may look at what the model says of its row: coefficient(row, t, seen).
    """

    rows: list[Row]
    coefficient: Callable[[Row, int, Seen], float]
    lr: float
    stepped: bool | Callable[[float], bool] = True  # False: the gradient is thrown away; may look at its norm
    temperature: float = 0.0  # of the log-probabilities; 0: the sampler's
    limit: float | None = None  # of the gradient's norm; None: --grad_clip
    beta2: float = 0.999  # of AdamW
    optimizer: str = ""  # two names are two optimizers, each with moments of its own
    bonus: Callable[[Row, int, Seen], float] | None = None  # d loss / d entropy of token t; None: not looked at


def trace(question: common.Problem) -> Row:
    """The expert's whole completion, which is right."""
    return Row(question, question.expert_ids, len(question.expert_ids), 1.0, [])


def draw(problems: list[common.Problem], n: int, step: int, seed: int) -> list[common.Problem]:
    """The n problems of a step, on all ranks: consecutive places of shuffled epochs."""
    drawn = []
    for place in range(step * n, (step + 1) * n):
        order = np.random.default_rng([seed, place // len(problems)]).permutation(len(problems))
        found = problems[order[place % len(problems)]]
        drawn.append(dataclasses.replace(found, occurrence=sum(p.id == found.id for p in drawn)))
    return drawn


def named(question: common.Problem) -> tuple:
    """What tells problems of a step apart; a hint in the question makes the prompt longer."""
    return question.id, question.occurrence, len(question.prompt_ids)


def part(values: list, update: int, updates: int) -> list:
    """The values, one per problem of the step, that belong to one of the step's updates."""
    return [value for i, value in enumerate(values) if i * updates // len(values) == update]


# The scripted policy ------------------------------------------------------------------------------
def script(question: common.Problem, seed: tuple, prefix: list[int], n: int, world: str) -> list[Row]:
    """n ragged rows, a function of problem, occurrence, seed, prefix and place alone.

    world: mixed (problem 3 is never solved without a prefix), fail, solve, hints (right in half of
    the rows where a prefix is at least a third of the trace or in the question, else in none).
    """
    rows = []
    for i in range(n):
        key = repr((question.id, question.occurrence, seed, len(prefix), i)).encode()
        noise = [int(x) for x in hashlib.sha256(key).digest()]
        ids = [*prefix, *(x % 256 + 1 for x in noise[: 2 + noise[0] % 5]), 0]
        helped = question.hinted or len(prefix) * 3 >= len(question.expert_ids)
        right = {
            "mixed": noise[1] % 2 and (question.id != "3" or bool(prefix) or question.hinted),
            "fail": False,
            "solve": True,
            "hints": helped and i % 2 == 0,
        }[world]
        text = "\\boxed{9}" if noise[2] % 2 else "nothing"
        rows.append(
            Row(question, ids, len(prefix), float(right), [-x / 64 for x in noise[: len(ids) - len(prefix)]], text)
        )
    return rows


# The record ---------------------------------------------------------------------------------------
def whole(values: list, world: common.World) -> list:
    """The values of all ranks."""
    parts: list = [None] * world.size
    dist.all_gather_object(parts, values)
    return [value for one in parts for value in one]


def record(name: str, flags: dict, script_world: str, world: common.World) -> list[SimpleNamespace]:
    """Every optimizer step of the real main: rows with coefficients, rates, what was asked for.

    rows: (*named, ids, expert tokens) with .coefficients and .seen; asked: Counter of (*named,
    seed, tokens of the prefix, rows, completion limit, temperature), of its step.
    """
    method, updates, asked, open_rows, state = importlib.import_module(name), [], [], [], SimpleNamespace(policy=None)
    fresh, forward = common.Policy(random_model("qwen2", 0, torch.float64)), common.token_logprobs
    shard, phase, step, clip = common.shard, common.RunLog.phase, torch.optim.AdamW.step, common.clip_gradients
    other, history = getattr(importlib.import_module(f"pages.{name}"), "other", None), []
    cfg = SimpleNamespace(**{**flat(method.Config()), **flags})

    def generate(problems, prefixes, n, max_tokens, temperature, seed, top_p=1.0):
        groups = []
        for question, prefix in zip(problems, prefixes or [[]] * len(problems), strict=True):
            key = (*named(question), seed, len(prefix), n, max_tokens, temperature)
            asked.append(key)
            groups.append([])
            for row in script(question, seed, prefix, n, script_world):
                made = common.Rollout(question, row.ids, row.expert, row.sampler, row.text, True, row.reward)
                groups[-1].append(made)
        return groups

    def spy_shard(*args):
        policy = shard(*args)
        state.policy = state.policy or policy
        return policy

    def spy_phase(log, label):
        if label == "update":
            state.before = {key: value.clone() for key, value in common.named_weights(state.policy)}
        phase(log, label)

    def spy_forward(policy, batch, temperature, entropy_grad=False):
        logprobs, entropy = forward(policy, batch, temperature, entropy_grad)
        if policy is state.policy and torch.is_grad_enabled():
            assert open_rows or all(p.grad is None for p in policy.parameters()), "an old gradient is left"
            gradients: list = [torch.zeros_like(logprobs)]
            logprobs.register_hook(lambda gradient: gradients.append(gradient))
            bonuses: list = [torch.zeros_like(entropy)]
            if entropy.requires_grad:
                entropy.register_hook(lambda gradient: bonuses.append(gradient))
            open_rows.append((batch, temperature, logprobs.detach(), entropy.detach(), gradients, bonuses))
        return logprobs, entropy

    def at(weights: dict, batch: common.Batch, temperature: float) -> list:
        fresh.model.load_state_dict({**fresh.model.state_dict(), **weights})
        with torch.no_grad():
            return forward(fresh, batch, temperature)[0].tolist()

    def spy_clip(parameters, limit):
        mine = []
        if other:
            history.append({key: value.clone() for key, value in common.named_weights(state.policy)})
        for batch, temperature, logprobs, entropy, gradients, bonuses in open_rows:
            before, start = at(state.before, batch, temperature), at(state.start, batch, temperature)
            gradient, bonus = sum(gradients).tolist(), sum(bonuses).tolist()
            third, together = at(other(cfg, history), batch, temperature) if other else None, []
            for b, rollout in enumerate(batch.rollouts):
                if batch.completion_mask[b].any():
                    n, question = len(rollout.completion_ids), rollout.problem
                    seen = Seen(logprobs[b, :n].tolist(), before[b][:n], entropy[b, :n].tolist(), start[b][:n])
                    seen.microbatch, seen.other = together, third and third[b][:n]
                    together.append((rollout.num_expert_tokens, seen))
                    key = (*named(question), tuple(rollout.completion_ids), rollout.num_expert_tokens)
                    coefficients = {"coefficients": gradient[b][:n], "bonus": bonus[b][:n]}
                    mine.append(SimpleNamespace(key=key, seen=seen, temperature=temperature, **coefficients))
        open_rows.clear()
        calls = Counter(whole(asked, world))
        asked.clear()
        rows = whole(mine, world)
        for row in rows:
            row.seen.update = [other.seen for other in rows]
        updates.append(SimpleNamespace(rows=rows, lr=None, asked=calls, limit=limit, synced=False))
        return clip(parameters, limit)

    def sync(policy):
        assert policy is state.policy
        if updates:
            updates[-1].synced = True

    def spy_step(optimizer, *args, **kwargs):
        group = optimizer.param_groups[0]
        updates[-1].lr, updates[-1].optimizer = group["lr"], id(optimizer)
        updates[-1].adam = (group["betas"], group["weight_decay"])
        return step(optimizer, *args, **kwargs)

    models = [random_model("qwen2", 0, torch.float64) for _ in range(3)]
    state.start = {key: value.clone() for key, value in models[0].state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "shard", spy_shard)
        patch.setattr(common.RunLog, "phase", spy_phase)
        patch.setattr(common, "token_logprobs", spy_forward)
        patch.setattr(torch.optim.AdamW, "step", spy_step)
        patch.setattr(common, "clip_gradients", spy_clip)
        found, _ = one_step(method, models, generate, PROBLEMS, sync, **flags)
    for update, gradients in zip(updates, found, strict=True):
        update.norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
    return updates


# The comparison -----------------------------------------------------------------------------------
def assert_page(name: str, page: Callable, flags: dict, script_world: str, world: common.World) -> None:
    """The real main does what the page says: what it asks for, rows, coefficients, rates."""
    found, calls, place, owners = record(name, flags, script_world, world), [], 0, {}
    module = importlib.import_module(name)
    defaults = flat(module.Config())
    cfg = SimpleNamespace(**{**defaults, **flags})

    def ask(seed, items, n):
        groups = []
        for question, prefix in items:
            limit = cfg.max_completion_tokens
            calls.append((*named(question), seed, len(prefix), n, limit, cfg.temperature))
            groups.append(script(question, seed, prefix, n, script_world))
        return groups

    for number, updates in enumerate(page(cfg, PROBLEMS, ask)):
        for k, expected in enumerate(updates):
            where, update = f"step {number}, update {k}", found[place]
            place += 1
            assert update.asked == (Counter(calls) if k == 0 else Counter()), where
            calls = calls if k else []
            stepped = expected.stepped(update.norm) if callable(expected.stepped) else expected.stepped
            assert (update.lr is not None) == stepped, where
            assert update.lr is None or owners.setdefault(expected.optimizer, update.optimizer) == update.optimizer, (
                where
            )
            assert len(set(owners.values())) == len(owners), f"{where}: one optimizer for {set(owners)}"
            assert update.lr is None or update.lr == pytest.approx(expected.lr, rel=1e-12), where
            assert update.lr is None or update.adam == ((0.9, expected.beta2), cfg.weight_decay), where
            wanted = Counter((*named(r.problem), tuple(r.ids), r.expert) for r in expected.rows)
            assert Counter(row.key for row in update.rows) == wanted, where
            assert {row.temperature for row in update.rows} <= {expected.temperature or cfg.temperature}, where
            assert update.limit == (cfg.grad_clip if expected.limit is None else expected.limit), where
            assert update.synced == (k == len(updates) - 1 and hasattr(cfg, "group_size")), where
            compare(update.rows, expected.rows, expected.coefficient, "coefficients", where)
            if expected.bonus:
                compare(update.rows, expected.rows, expected.bonus, "bonus", where)
    assert place == len(found), f"{len(found)} updates were made, the page has {place}"


def compare(rows: list, expected: list[Row], coefficient: Callable, name: str, where: str) -> None:
    """d loss / d log p, or d entropy, of every token; of equal rows in any order."""
    largest, pairs, free = 0.0, [], list(rows)
    for row in expected:
        key = (*named(row.problem), tuple(row.ids), row.expert)
        mine = [one for one in free if one.key == key]
        wanted = [[coefficient(row, t, one.seen) for t in range(len(row.ids))] for one in mine]
        gaps = [
            max(abs(a - b) for a, b in zip(w, getattr(one, name), strict=True))
            for w, one in zip(wanted, mine, strict=True)
        ]
        best = min(range(len(mine)), key=gaps.__getitem__)
        free = [one for one in free if one is not mine[best]]  # equal ones hold each other
        pairs.append((key, gaps[best]))
        largest = max([largest, *map(abs, wanted[best])])
    for key, gap in pairs:
        assert gap <= 2e-6 * max(largest, 1e-9), f"{where}: {name} of row {key} off by {gap:.1e} of {largest:.1e}"
