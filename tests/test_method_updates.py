"""One whole update of each method's main: the gradient that it clips against the equations.

The rows that main trains on are taken from its micro-batches. From their rewards and the model's
log-probabilities a loop computes d loss / d log p of every token, the cheat sheet of coefficients,
and one backward turns them into the wanted gradient.
"""

import dataclasses
import hashlib
import importlib
import math

import numpy as np
import pytest
import torch
from conftest import problem, random_model, run_script
from one_step import one_step
from torch.utils._python_dispatch import TorchDispatchMode

import common
import hpt
import prefix_rft
import uft
from core.config import flat
from results.methods import METHODS

NAMES = [method.name for method in METHODS]
TRACES = ["1+1=2\n2+2=4\n\\boxed{24}", "3-1=2\n\\boxed{2}", "5*3=5\n5+4=9\n9-1=8\n\\boxed{598}", "0\n\\boxed{0}"]
PROBLEMS = [problem("q" * (i + 1), expert=text, id=str(i)) for i, text in enumerate(TRACES)]
PLAIN = {
    "tis_cap": 0.0,
    "updates_per_step": 1,
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
    "problems_per_step": 4,
    "max_completion_tokens": 64,
}
TWICE = {
    "updates_per_step": 2,
    "group_size": 4,
    "sizes": (1, 1, 1, 1),  # of trapo.py
    "lr": 0.01,
    "sft_lr": 0.01,
    "adapter_lr": 0.01,
    "tis_cap": 2.0,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "mu_peak": 0.5,
    "mu_valley": 0.5,
    "sft_problems_per_step": 4,
    "buffer_size": 1,
    "normalize": True,
}
Found = tuple[list[list[torch.Tensor]], list[list[common.Rollout]], list[dict]]


def fake_generate(problems, prefixes, n, max_tokens, temperature, seed, top_p=1.0):
    """Ragged rows with rewards that depend on (problem, attempt, row) alone.

    The last problem is never solved without a prefix.
    """
    groups = []
    for question, prefix in zip(problems, prefixes or [[]] * len(problems), strict=True):
        group = []
        for i in range(n):
            noise = np.frombuffer(hashlib.sha256(repr((question.id, seed, i)).encode()).digest(), np.uint8)
            ids = [*prefix, *(int(x) % 256 + 1 for x in noise[: 2 + noise[0] % 7])]
            row = common.Rollout(question, ids, len(prefix), finished=True)
            row.sampler_logprobs = [-x / 32 for x in noise[: len(ids) - len(prefix)].tolist()]
            row.reward = float(noise[1] % 2 and (question.id != "3" or bool(prefix)))
            group.append(row)
        groups.append(group)
    return groups


def update(name: str, **flags: object) -> Found:
    """Gradients at each clip, the rows of each optimizer step, and the metrics."""
    method, seen, make = importlib.import_module(name), [], common.microbatches

    def spy(rows, *rest):
        seen.append(list(rows))
        return make(rows, *rest)

    known = {flag: value for flag, value in PLAIN.items() if flag in flat(method.Config())}
    models = [random_model("qwen2", 0, torch.float64) for _ in range(2)]  # some methods load two
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "microbatches", spy)
        found, lines = one_step(method, models, fake_generate, PROBLEMS, **known | flags)
    return found, seen, lines


def update_twice(name: str, **flags: object) -> Found:
    """Two updates on rows that one policy made; two steps of a method without rollouts."""
    known = {flag: value for flag, value in TWICE.items() if flag in flat(importlib.import_module(name).Config())}
    return update(name, **known | ({} if "updates_per_step" in known else {"steps": 2}) | flags)


def wanted(rows: list[common.Rollout], coefficient, policy: common.Policy | None = None) -> list[torch.Tensor]:
    """Gradient of sum_t c[t] log p[t], c = coefficient(row, t, p, all H of the row), constant."""
    policy = policy or common.Policy(random_model("qwen2", 0, torch.float64))
    batch = common.make_batch(rows)
    logprobs, entropy = common.token_logprobs(policy, batch, 1.0, True)
    c = torch.zeros_like(logprobs)
    for b, row in enumerate(rows):
        own = entropy[b, : len(row.completion_ids)].tolist()
        for t in range(len(row.completion_ids)):
            c[b, t] = coefficient(row, t, math.exp(logprobs[b, t].item()), own)
    return list(torch.autograd.grad((c.detach() * logprobs).sum(), list(policy.parameters())))


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    scale = max(w.abs().max() for w in expected)
    assert scale > 0 and len(found) == len(expected)
    assert all((f - w).abs().max() <= 1e-6 * scale for f, w in zip(found, expected, strict=True))


def advantage(row: common.Rollout, rows: list[common.Rollout], by_std: bool = False) -> float:
    """R - mean of its problem's rows, over their unbiased std on request."""
    rewards = [r.reward for r in rows if r.problem.id == row.problem.id]
    centred = row.reward - sum(rewards) / len(rewards)
    if not by_std or len(set(rewards)) == 1:
        return centred
    return centred / (float(np.std(rewards, ddof=1)) + 1e-6)


def expert(row: common.Rollout, t: int) -> bool:
    """Whether the expert wrote token t."""
    return t < row.num_expert_tokens


def count(rows: list[common.Rollout]) -> tuple[int, int, int]:
    """(policy tokens, expert tokens, rows)."""
    num_expert = sum(r.num_expert_tokens for r in rows)
    return sum(len(r.completion_ids) for r in rows) - num_expert, num_expert, len(rows)


def grpo_like(rows: list[common.Rollout], rl_rows: list[common.Rollout] | None = None, by_std: bool = True):
    """-A / policy tokens on policy tokens, 0 on the others; without std -A / (rows x longest)."""
    rl_rows = rows if rl_rows is None else rl_rows
    w = 1 / count(rl_rows)[0] if by_std else 1 / (len(rl_rows) * 64)
    return lambda row, t, p, own: 0.0 if expert(row, t) else -w * advantage(row, rl_rows, by_std)


def dapo_like(rows: list[common.Rollout]):
    """GRPO's, of rewards less half the length over the limit: the cache is the whole of it."""
    shaped = [dataclasses.replace(r, reward=r.reward - 0.5 * len(r.completion_ids) / 64) for r in rows]
    place = {id(r): i for i, r in enumerate(rows)}
    return lambda row, t, p, own: -advantage(shaped[place[id(row)]], shaped, True) / count(rows)[0]


def norm(rows: list[common.Rollout], loss_norm: str = "constant") -> float:
    """Of rows whose tokens are all trained."""
    return 1 / (len(rows) * 64) if loss_norm == "constant" else 1 / sum(len(r.completion_ids) for r in rows)


def luffy_like(rows: list[common.Rollout], *loss_norm: str):
    """d f(p) / d log p = gamma p / (p + gamma)^2 in place of 1 on the expert's tokens."""
    w = norm(rows, *loss_norm)
    return lambda row, t, p, own: -w * advantage(row, rows) * (0.1 * p / (p + 0.1) ** 2 if expert(row, t) else 1.0)


def srft_like(rows: list[common.Rollout], *loss_norm: str):
    """LUFFY's; SFT of weight 0.5 exp(-H) on the expert's tokens; 0.1 exp(H) on right rows."""
    w, num_expert = norm(rows, *loss_norm), count(rows)[1]

    def coefficient(row, t, p, own):
        a, h = advantage(row, rows), sum(own) / len(own)
        if expert(row, t):
            return -w * a * 0.1 * p / (p + 0.1) ** 2 - 0.5 * math.exp(-h) / num_expert
        return -w * a * (0.1 * math.exp(h) if a > 0 else 1.0)

    return coefficient


def prefix_like(rows: list[common.Rollout], *loss_norm: str):
    """Of a prefix only the fifth with the highest entropy, with the row's advantage."""
    w = norm(rows, *loss_norm)

    def coefficient(row, t, p, own):
        k = row.num_expert_tokens
        kept = sorted(range(k), key=lambda j: -own[j])[: math.ceil(0.2 * k - 1e-9)]
        return -w * advantage(row, rows) * (t in kept or not expert(row, t))

    return coefficient


def uft_like(rows: list[common.Rollout]):
    """A mean over all hint tokens beside GRPO."""
    num_hint, rl = count(rows)[1], grpo_like(rows)
    return lambda row, t, p, own: -0.3 / num_hint if expert(row, t) else rl(row, t, p, own)


def chord_like(rows: list[common.Rollout]):
    """mu of the first step: a 200th of the way from 0.9 to 0.05."""
    own_rows, mu = [r for r in rows if not r.num_expert_tokens], 0.05 + 0.425 * (1 + math.cos(math.pi / 200))
    rl, num_expert = grpo_like(rows, own_rows), count(rows)[1]
    return lambda row, t, p, own: -mu / num_expert if expert(row, t) else (1 - mu) * rl(row, t, p, own)


def hpt_like(rows: list[common.Rollout]):
    """Traces in place of failed groups; one vote a problem, whatever it became."""
    own_rows = [r for r in rows if not r.num_expert_tokens]
    problems, num_expert = len({r.problem.id for r in rows}), count(rows)[1]
    taught, size = len(rows) - len(own_rows), len(own_rows) // len({r.problem.id for r in own_rows})

    def coefficient(row, t, p, own):
        if expert(row, t):
            return -taught / problems / num_expert
        return -advantage(row, own_rows) / (size * problems * 64)

    return coefficient


def trapo_like(rows: list[common.Rollout]):
    """The prefix of the first row that has it."""
    rl, w, first = grpo_like(rows, by_std=False), 1 / (len(rows) * 64), {}
    for row in rows:
        first.setdefault((row.problem.id, row.num_expert_tokens), id(row))

    def coefficient(row, t, p, own):
        taught = first[row.problem.id, row.num_expert_tokens] == id(row)
        return -w * min(1.0, p / 0.1) * taught if expert(row, t) else rl(row, t, p, own)

    return coefficient


def sft_like(rows: list[common.Rollout]):
    """1 / the step's tokens."""
    return lambda row, t, p, own: -1 / count(rows)[1]


def dft_like(rows: list[common.Rollout]):
    """The same times p."""
    return lambda row, t, p, own: -p / count(rows)[1]


SHEET = {
    "grpo": ({}, grpo_like),
    "dapo": ({"resample_rounds": 0, "overlong_cache": 1.0}, dapo_like),
    "sft": ({}, sft_like),
    "iw_sft": ({"weight": "dft"}, dft_like),
    "bread": ({}, grpo_like),
    "luffy": ({}, luffy_like),
    "srft": ({}, srft_like),
    "prefix_rft": ({}, prefix_like),
    "uft": ({"hint_coef": 0.3, "format_reward": 0.0}, uft_like),
    "chord": ({"sft_problems_per_step": 3}, chord_like),
    "hpt": ({"skip_above": 0.0}, hpt_like),
    "trapo": ({}, trapo_like),
}
ROWS = {  # what the rows of the step must be: (rows, rows with expert tokens, rows of the expert alone)
    "grpo": (32, 0, 0),
    "dapo": (48, 0, 0),  # sixteen a group, of which one failed
    "luffy": (32, 4, 4),
    "srft": (32, 4, 4),
    "prefix_rft": (32, 4, 0),
    "hpt": (25, 1, 1),
    "chord": (35, 3, 3),
    "sft": (4, 4, 4),
    "iw_sft": (4, 4, 4),
}


def test_every_method_has_a_sheet():
    """But ReLIFT, which has two kinds of updates (below), and BRIDGE (test_bridge.py)."""
    assert {*SHEET, "relift", "bridge"} == set(NAMES)


@pytest.mark.parametrize("budget", [1, 60, 10**6])
@pytest.mark.parametrize("method", SHEET)
def test_update(method, budget, world):
    """The gradient that main clips is the sheet's, for any size of the micro-batches."""
    flags, coefficients = SHEET[method]
    found, steps, _ = update(method, tokens_per_microbatch=budget, **flags)
    assert len(found) == len(steps) == 1
    rows = steps[0]
    prefixed = sum(r.num_expert_tokens > 0 for r in rows)
    kinds = len(rows), prefixed, sum(r.num_expert_tokens == len(r.completion_ids) for r in rows)
    assert kinds == ROWS.get(method, kinds) and (any(r.reward for r in rows) or kinds[0] == kinds[2])
    if method in ("bread", "uft", "trapo"):
        assert kinds[1] > kinds[2] * (method == "trapo"), "no row with a prefix: the test misses the method"
    assert_close(found[0], wanted(rows, coefficients(rows)))


@pytest.mark.parametrize("method", ["luffy", "srft", "prefix_rft"])
def test_token_mean_counts_expert_tokens(method, world):
    """With --loss_norm token the weight is 1 / all trained tokens, the expert's among them."""
    found, (rows,), _ = update(method, loss_norm="token")
    assert_close(found[0], wanted(rows, SHEET[method][1](rows, "token")))


@pytest.mark.parametrize("buffer_size", [1, 2])
def test_relift(buffer_size, world):
    """The RL step is GRPO's; the SFT step has the one failed question, once the buffer is full."""
    found, steps, _ = update("relift", buffer_size=buffer_size, sft_entropy_coef=0.0)
    assert_close(found[0], wanted(steps[0], grpo_like(steps[0], by_std=False)))
    trace = steps[1]
    assert len(found) == (2 if trace else 1) and bool(trace) == (buffer_size == 1)
    if trace:
        assert [r.problem.id for r in trace] == ["3"] and trace[0].completion_ids == PROBLEMS[3].expert_ids
        flags = {"lr": 0.0, "weight_decay": 0.0, "buffer_size": 1, "sft_entropy_coef": 0.0}
        fresh, _, _ = update("relift", **flags)
        assert_close(fresh[1], wanted(trace, lambda row, t, p, own: -1 / len(row.completion_ids)))


def test_hpt_gate_and_skip(world):
    """gate 8 turns every group into its trace, -1 none; above skip_above the weights stay."""
    all_sft, none = (update("hpt", gate=gate)[1][0] for gate in (8, -1))
    assert sorted(r.problem.id for r in all_sft) == ["0", "1", "2", "3"]
    assert all(r.completion_ids == r.problem.expert_ids for r in all_sft)
    assert len(none) == 32 and not any(r.num_expert_tokens for r in none)
    for skip, moved in ((1e-9, False), (0.0, True)):
        model = random_model("qwen2", 0, torch.float64)
        before = [p.detach().clone() for p in model.parameters()]
        one_step(hpt, [model], fake_generate, PROBLEMS, **PLAIN | {"skip_above": skip, "weight_decay": 0.0})
        after = [common.full_tensor(p) for p in model.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) == moved


def test_prefix_rft_split_advantages(world):
    """Plain rows among themselves; the hybrid by its reward, its prefix by that over their mean."""
    found, (rows,), _ = update("prefix_rft", advantages="split")

    def coefficient(row, t, p, own):
        k, w = row.num_expert_tokens, 1 / (len(rows) * 64)
        plain = [r for r in rows if r.problem.id == row.problem.id and not r.num_expert_tokens]
        kept = sorted(range(k), key=lambda j: -own[j])[: math.ceil(0.2 * k - 1e-9)]
        if expert(row, t):
            return -w * (row.reward - sum(r.reward for r in plain) / len(plain)) * (t in kept)
        return -w * (row.reward if k else advantage(row, plain))

    assert_close(found[0], wanted(rows, coefficient))


@pytest.mark.parametrize("right", [(0, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 0, 0, 0, 0)])
def test_prefix_rft_split_drops_a_group_without_any_advantage_alone(right, world):
    """All plain rows right and the hybrid wrong: its prefix is pushed down, so the group stays."""
    hybrid, *plain = right

    def generate(problems, prefixes, n, *rest):
        rewards = plain if prefixes is None else [hybrid]
        return [
            [common.Rollout(p, [*x, 5, 6], len(x), [-1.0] * 2, reward=float(r)) for r in rewards]
            for p, x in zip(problems, prefixes or [[]] * len(problems), strict=True)
        ]

    flags = {"advantages": "split", "zero_variance": "drop", "group_size": 5, "keep_share": 1.0} | PLAIN
    found, _ = one_step(prefix_rft, [random_model("qwen2", 0, torch.float64)], generate, PROBLEMS, **flags)
    assert bool(found[0]) == any(right) and (not found[0] or max(g.abs().max() for g in found[0]) > 1e-4)


@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_srft_entropy_of_the_update(budget, world):
    """--entropy_scope batch: H is one number, the mean over all tokens of the update."""
    found, steps, _ = update("srft", tokens_per_microbatch=budget, entropy_scope="batch")
    rows = steps[-1]
    policy = common.Policy(random_model("qwen2", 0, torch.float64))
    batch = common.make_batch(rows)
    mean = common.token_logprobs(policy, batch, 1.0)[1][batch.completion_mask].mean().item()
    row_wise = srft_like(rows)
    assert_close(found[0], wanted(rows, lambda row, t, p, own: row_wise(row, t, p, [mean])))


@pytest.mark.parametrize("method", ["luffy", "srft", "prefix_rft", "uft", "chord", "trapo"])
def test_a_constant_added_to_all_rewards_changes_nothing(method, world, monkeypatch):
    """The baseline takes it away (HPT's gate and BREAD's search look at the rewards)."""
    flags = SHEET[method][0] | ({"thresholds": (9.0, 9.0, 9.0, 9.0)} if method == "trapo" else {})
    one, _, _ = update(method, **flags)

    def higher(groups):
        for row in (row for group in groups for row in group):
            row.reward += 5.0 + (row.num_expert_tokens == len(row.completion_ids))
        return {}

    monkeypatch.setattr("one_step.reward_experts", higher)
    two, _, _ = update(method, **flags)
    assert_close(two[0], one[0])


def test_prefix_rft_schedule_and_draws():
    """low is a cosine from 0.95 to 0.05, the share uniform in [low, high]; a token is left over."""
    low = [prefix_rft.lowest_share(step, 0.95, 0.05, 500) for step in (0, 250, 500, 900)]
    assert low == pytest.approx([0.95, 0.5, 0.05, 0.05])
    rng = np.random.default_rng(0)
    drawn = np.array([prefix_rft.draw_prefix(1000, 0.2, 0.8, 1, rng) for _ in range(4000)])
    assert drawn.min() >= 200 and drawn.max() < 800 and abs(drawn.mean() - 500) < 4 * 600 / math.sqrt(12 * 4000)
    histogram = np.bincount((drawn - 200) // 100, minlength=6)
    assert (np.abs(histogram - 4000 / 6) < 5 * math.sqrt(4000 / 6)).all()
    assert {prefix_rft.draw_prefix(10, 0.95, 0.95, 1, rng) for _ in range(9)} == {9}
    assert prefix_rft.draw_prefix(10, 0.0, 0.0, 1, rng) == 1 and prefix_rft.draw_prefix(2, 1.0, 1.0, 5, rng) == 1


def test_uft_schedule_and_draws():
    """p is a cosine of t = step + 1, then 0; k is binomial, or uniform; no answer is shown."""
    share = [uft.hint_share(step, 0.95, 0.05, 300) for step in (0, 149, 299, 300, 400)]
    assert share == pytest.approx([0.05 + 0.45 * (1 + math.cos(math.pi / 300)), 0.5, 0.05, 0.0, 0.0])
    ends = [3, 7, 12, 20, 31, 40]  # six segments; the last, with the answer, is never shown
    assert uft.hint_cuts(ends, "chunk", 5) == uft.hint_cuts(ends, "segment", 2) == [0, 3, 7, 12, 20, 31]
    assert uft.hint_cuts(ends, "token", 5) == list(range(32))
    assert all(uft.hint_cuts([9], unit, 5) == [0] for unit in ("chunk", "segment", "token"))
    many = uft.hint_cuts(list(range(10, 210, 10)), "chunk", 5)
    assert len(many) == 6 and many[-1] == 190
    rng, cuts = np.random.default_rng(0), [0, 3, 7, 12, 20, 31]
    drawn = [cuts.index(uft.draw_hint(cuts, 0.3, "cosine", rng)) for _ in range(4000)]
    for k in range(6):
        p = math.comb(5, k) * 0.3**k * 0.7 ** (5 - k)
        assert abs(drawn.count(k) - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p)) + 1
    even = [cuts.index(uft.draw_hint(cuts, 0.3, "uniform", rng)) for _ in range(4000)]
    assert all(abs(even.count(k) - 4000 / 6) < 5 * math.sqrt(4000 / 6) for k in range(6))
    late = [cuts.index(uft.draw_hint(cuts, 0.0, "uniform", rng)) for _ in range(4000)]  # R3 goes on to the end
    assert all(abs(late.count(k) - 4000 / 6) < 5 * math.sqrt(4000 / 6) for k in range(6))
    assert {uft.draw_hint(cuts, 0.0, "cosine", rng) for _ in range(99)} == {0}
    assert uft.draw_hint([0], 0.9, "cosine", rng) == uft.draw_hint([0], 0.9, "uniform", rng) == 0


@pytest.fixture(scope="module")
def whole(world):
    """Two updates of every method, all rows in one micro-batch on one rank."""
    return {name: update_twice(name, tokens_per_microbatch=10**6) for name in NAMES}


@pytest.mark.parametrize("budget", [1, 60])
@pytest.mark.parametrize("method", NAMES)
def test_two_updates_with_any_microbatch_size(method, budget, whole):
    """Old log-probabilities stay with their rows, beside rows that store none, in any mix."""
    found, expected = update_twice(method, tokens_per_microbatch=budget)[0], whole[method][0]
    assert len(found) == len(expected) >= 2
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("method", [name for name in NAMES if name not in ("sft", "iw_sft")])
def test_two_updates_are_off_policy(method, whole):
    """Else the test above would miss a lost ratio: tokens are clipped, in the second update."""
    line = whole[method][2][0]
    assert line["clip_fraction"] > 0 and line["sampler_ratio_off"] > 0.5


@pytest.mark.parametrize("method", ["grpo", "chord"])
def test_second_update(method, world):
    """-A w ratio to the policy before the first update, 0 where clipped; SFT has no ratio."""
    (first, second), steps, _ = update_twice(method, tis_cap=0.0)
    rows, policy = steps[-1], common.Policy(random_model("qwen2", 0, torch.float64))
    batch = common.make_batch(rows)
    before = common.reference_logprobs(policy, batch, 1.0).float().double()  # as stored
    for parameter, gradient in zip(policy.parameters(), first, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    torch.optim.AdamW(policy.parameters(), TWICE["lr"], weight_decay=0.01).step()
    own_rows, mu, clipped = [r for r in rows if not r.num_expert_tokens], 0.5 * (method == "chord"), []
    place, rl, num_expert = {id(r): b for b, r in enumerate(rows)}, grpo_like(rows, own_rows), count(rows)[1]

    def coefficient(row, t, p, own):
        if expert(row, t):
            return -mu / num_expert
        ratio = p / math.exp(before[place[id(row)], t].item())
        gone = ratio > 1.2 if advantage(row, own_rows) > 0 else ratio < 0.8
        clipped.append(gone)
        return 0.0 if gone else (1 - mu) * ratio * rl(row, t, p, own)

    assert_close(second, wanted(rows, coefficient, policy))
    assert 0 < sum(clipped) < len(clipped) and bool(num_expert) == (method == "chord")


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for the device: a scalar is read, a shape hangs on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket._qualified_op_name not in ("aten::_local_scalar_dense", "aten::nonzero")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("method", NAMES)
def test_nobody_waits_for_the_device_inside_a_microbatch(method, world):
    """From one micro-batch to the next the device is fed: no number of it is read."""
    make, seen = common.microbatches, []

    def spy(*args):
        for batch in make(*args):
            with NoWaiting(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("tolist"))
                seen.append(batch)
                yield batch

    flags = SHEET[method][0] if method in SHEET else {"buffer_size": 1} if method == "relift" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "microbatches", spy)
        patch.setattr(common, "keep_old_logprobs", lambda *args: None)  # of bridge.py, which sends them to their rank
        update(method, **flags)
    assert seen


def updates(budget: int = 60) -> dict[tuple[str, int], list[list[torch.Tensor]]]:
    """Two updates of every method on 3 problems, and one on 1: what update_worker.py runs."""
    found, others = {}, {"relift": {"buffer_size": 1}, "bridge": {"sft_problems_per_step": 3}}
    for name in NAMES:
        flags = SHEET[name][0] if name in SHEET else others[name]
        for problems, run in ((3, update_twice), (1, update)):
            found[name, problems] = run(name, problems_per_step=problems, tokens_per_microbatch=budget, **flags)[0]
    return found


@pytest.fixture(scope="module")
def on_ranks(world, tmp_path_factory):
    """The same on one rank in one micro-batch, and on two."""
    file = tmp_path_factory.mktemp("updates") / "found.pt"
    run_script("tests/update_worker.py", "test_method_updates", str(file), nproc=2, timeout=200)
    return updates(10**6), torch.load(file)


@pytest.mark.parametrize("problems", [3, 1])
@pytest.mark.parametrize("method", NAMES)
def test_ranks(method, problems, on_ranks):
    """Two ranks have the gradients of one: with unequal shares, and with none on one rank."""
    one, two = (found[method, problems] for found in on_ranks)
    assert len(one) == len(two)
    for mine, theirs in zip(one, two, strict=True):
        assert_close(theirs, mine)
