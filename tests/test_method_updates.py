"""One whole update of each method's main on a small model: the gradient that it clips against one built from the equations.

The rows that main trains on are taken from its micro-batches. From their rewards and the model's log-probabilities a loop computes
d loss / d log p of every token, the cheat sheet of coefficients, and one backward turns them into the wanted gradient.
"""

import hashlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import problem, random_model, run_script
from one_step import one_step

import bread
import chord
import common
import grpo
import hpt
import luffy
import prefix_rft
import relift
import srft
import trapo
import uft

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


def fake_generate(problems, prefixes, n, max_tokens, temperature, seed, top_p=1.0):
    """Ragged rows with rewards that hang on (problem, attempt, row) alone; the last problem is never solved without a prefix."""
    groups = []
    for question, prefix in zip(problems, prefixes or [[]] * len(problems), strict=True):
        group = []
        for i in range(n):
            noise = np.frombuffer(hashlib.sha256(repr((question.id, seed, i)).encode()).digest(), np.uint8)
            ids = [*prefix, *(int(x) % 256 + 1 for x in noise[: 2 + noise[0] % 7])]
            row = common.Rollout(question, ids, len(prefix), [0.0] * (len(ids) - len(prefix)), finished=True)
            row.reward = float(noise[1] % 2 and (question.id != "3" or bool(prefix)))
            group.append(row)
        groups.append(group)
    return groups


def update(method: ModuleType, monkeypatch, **flags) -> tuple[list[list[torch.Tensor]], list[list[common.Rollout]]]:
    """Gradients at each clip, and the rows of each optimizer step."""
    seen, make = [], common.microbatches

    def spy(rows, *rest):
        seen.append(list(rows))
        return make(rows, *rest)

    monkeypatch.setattr(common, "microbatches", spy)
    found, _ = one_step(method, [random_model("qwen2", 0, torch.float64)], fake_generate, PROBLEMS, **PLAIN | flags)
    monkeypatch.setattr(common, "microbatches", make)
    return found, seen


def wanted(rows: list[common.Rollout], coefficient) -> list[torch.Tensor]:
    """Gradient of sum_t c[t] log p[t], c constant: coefficient(row, t, p, H, own H) is d loss / d log p[t]."""
    policy = common.Policy(random_model("qwen2", 0, torch.float64))
    batch = common.make_batch(rows, common.init(0))
    logprobs, entropy = common.token_logprobs(policy, batch, 1.0, True)
    c = torch.zeros_like(logprobs)
    for b, row in enumerate(rows):
        for t in range(len(row.completion_ids)):
            own = entropy[b, : len(row.completion_ids)].tolist()
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
    return t < row.num_expert_tokens


def count(rows: list[common.Rollout]) -> tuple[int, int, int]:
    """(policy tokens, expert tokens, rows)."""
    return sum(len(r.completion_ids) - r.num_expert_tokens for r in rows), sum(r.num_expert_tokens for r in rows), len(rows)


def grpo_like(rows: list[common.Rollout], rl_rows: list[common.Rollout] | None = None, by_std: bool = True):
    """-A / policy tokens (or, without std, / (rows x longest)) on policy tokens, 0 on the others."""
    rl_rows = rows if rl_rows is None else rl_rows
    w = 1 / count(rl_rows)[0] if by_std else 1 / (len(rl_rows) * 64)
    return lambda row, t, p, own: 0.0 if expert(row, t) else -w * advantage(row, rl_rows, by_std)


def norm(rows: list[common.Rollout], loss_norm: str = "constant") -> float:
    """Of rows whose tokens are all trained."""
    return 1 / (len(rows) * 64) if loss_norm == "constant" else 1 / sum(len(r.completion_ids) for r in rows)


def luffy_like(rows: list[common.Rollout], *loss_norm: str):
    w = norm(rows, *loss_norm)
    return lambda row, t, p, own: -w * advantage(row, rows) * (0.1 * p / (p + 0.1) ** 2 if expert(row, t) else 1.0)


def srft_like(rows: list[common.Rollout], *loss_norm: str):
    w, num_expert = norm(rows, *loss_norm), count(rows)[1]

    def coefficient(row, t, p, own):
        a, h = advantage(row, rows), sum(own) / len(own)
        if expert(row, t):
            return -w * a * 0.1 * p / (p + 0.1) ** 2 - 0.5 * math.exp(-h) / num_expert
        return -w * a * (0.1 * math.exp(h) if a > 0 else 1.0)

    return coefficient


def prefix_like(rows: list[common.Rollout], *loss_norm: str):
    """Of a hybrid row's prefix only the fifth with the highest entropy, with the row's advantage."""
    w = norm(rows, *loss_norm)

    def coefficient(row, t, p, own):
        k = row.num_expert_tokens
        kept = sorted(range(k), key=lambda j: -own[j])[: math.ceil(0.2 * k - 1e-9)]
        return -w * advantage(row, rows) * (t in kept or not expert(row, t))

    return coefficient


def uft_like(rows: list[common.Rollout]):
    num_hint, rl = count(rows)[1], grpo_like(rows)
    return lambda row, t, p, own: -0.3 / num_hint if expert(row, t) else rl(row, t, p, own)


def chord_like(rows: list[common.Rollout]):
    """mu = 0.9 at the first step."""
    own_rows = [r for r in rows if not r.num_expert_tokens]
    rl, num_expert = grpo_like(rows, own_rows), count(rows)[1]
    return lambda row, t, p, own: -0.9 / num_expert if expert(row, t) else 0.1 * rl(row, t, p, own)


def hpt_like(rows: list[common.Rollout]):
    own_rows = [r for r in rows if not r.num_expert_tokens]
    rl, num_expert = grpo_like(rows, own_rows, by_std=False), count(rows)[1]
    return lambda row, t, p, own: -1 / num_expert if expert(row, t) else rl(row, t, p, own)


def trapo_like(rows: list[common.Rollout]):
    """The prefix of the first row that has it."""
    rl, w, first = grpo_like(rows, by_std=False), 1 / (len(rows) * 64), {}
    for row in rows:
        first.setdefault((row.problem.id, row.num_expert_tokens), id(row))

    def coefficient(row, t, p, own):
        taught = first[row.problem.id, row.num_expert_tokens] == id(row)
        return -w * min(1.0, p / 0.1) * taught if expert(row, t) else rl(row, t, p, own)

    return coefficient


METHODS = {
    "grpo": (grpo, {}, grpo_like),
    "bread": (bread, {}, grpo_like),
    "luffy": (luffy, {}, luffy_like),
    "srft": (srft, {}, srft_like),
    "prefix_rft": (prefix_rft, {}, prefix_like),
    "uft": (uft, {"hint_coef": 0.3, "format_reward": 0.0}, uft_like),
    "chord": (chord, {"sft_problems_per_step": 3}, chord_like),
    "hpt": (hpt, {"skip_above": 0.0}, hpt_like),
    "trapo": (trapo, {}, trapo_like),
}
ROWS = {  # what the rows of the step must be: (rows, rows with expert tokens, rows of the expert alone)
    "grpo": (32, 0, 0),
    "luffy": (32, 4, 4),
    "srft": (32, 4, 4),
    "prefix_rft": (32, 4, 0),
    "hpt": (25, 1, 1),
    "chord": (35, 3, 3),
}


@pytest.mark.parametrize("budget", [1, 60, 10**6])
@pytest.mark.parametrize("method", METHODS)
def test_update(method, budget, dist, monkeypatch):
    """For any size of the micro-batches."""
    module, flags, coefficients = METHODS[method]
    found, steps = update(module, monkeypatch, tokens_per_microbatch=budget, **flags)
    assert len(found) == len(steps) == 1
    rows = steps[0]
    kinds = len(rows), sum(r.num_expert_tokens > 0 for r in rows), sum(r.num_expert_tokens == len(r.completion_ids) for r in rows)
    assert kinds == ROWS.get(method, kinds) and any(r.reward for r in rows)
    if method in ("bread", "uft", "trapo"):
        assert kinds[1] > kinds[2] * (method == "trapo"), "no row with a prefix: the test misses the method"
    assert_close(found[0], wanted(rows, coefficients(rows)))


@pytest.mark.parametrize("method", ["luffy", "srft", "prefix_rft"])
def test_token_mean_counts_expert_tokens(method, dist, monkeypatch):
    module, _, coefficients = METHODS[method]
    found, (rows,) = update(module, monkeypatch, loss_norm="token")
    assert_close(found[0], wanted(rows, coefficients(rows, "token")))


@pytest.mark.parametrize("buffer_size", [1, 2])
def test_relift(buffer_size, dist, monkeypatch):
    """The RL step is GRPO's; the SFT step has the trace of the one failed question, once the buffer is full."""
    found, steps = update(relift, monkeypatch, buffer_size=buffer_size, sft_entropy_coef=0.0)
    assert_close(found[0], wanted(steps[0], grpo_like(steps[0], by_std=False)))
    trace = steps[1]
    assert len(found) == (2 if trace else 1) and bool(trace) == (buffer_size == 1)
    if trace:
        assert [r.problem.id for r in trace] == ["3"] and trace[0].completion_ids == PROBLEMS[3].expert_ids
        fresh = one_step(
            relift,
            [random_model("qwen2", 0, torch.float64)],
            fake_generate,
            PROBLEMS,
            **PLAIN | {"lr": 0.0, "weight_decay": 0.0, "buffer_size": 1, "sft_entropy_coef": 0.0},
        )
        assert_close(fresh[0][1], wanted(trace, lambda row, t, p, own: -1 / len(row.completion_ids)))


def test_hpt_gate_and_skip(dist, monkeypatch):
    """gate 8 turns every group into its trace, -1 none; a gradient above skip_above leaves the weights."""
    all_sft, none = (update(hpt, monkeypatch, gate=gate)[1][0] for gate in (8, -1))
    assert [r.completion_ids for r in all_sft] == [
        p.expert_ids for p in sorted(PROBLEMS, key=lambda p: [r.problem.id for r in all_sft].index(p.id))
    ]
    assert len(none) == 32 and not any(r.num_expert_tokens for r in none)
    for skip, moved in ((1e-9, False), (0.0, True)):
        model = random_model("qwen2", 0, torch.float64)
        before = [p.detach().clone() for p in model.parameters()]
        one_step(hpt, [model], fake_generate, PROBLEMS, **PLAIN | {"skip_above": skip, "weight_decay": 0.0})
        assert any(not torch.equal(common.full_tensor(p), b) for p, b in zip(model.parameters(), before, strict=True)) == moved


def test_prefix_rft_split_advantages(dist, monkeypatch):
    """Plain rows among themselves, the prefix by the hybrid's reward over their mean, the continuation by its reward (spec 5)."""
    found, (rows,) = update(prefix_rft, monkeypatch, advantages="split")

    def coefficient(row, t, p, own):
        k, w = row.num_expert_tokens, 1 / (len(rows) * 64)
        plain = [r for r in rows if r.problem.id == row.problem.id and not r.num_expert_tokens]
        kept = sorted(range(k), key=lambda j: -own[j])[: math.ceil(0.2 * k - 1e-9)]
        if expert(row, t):
            return -w * (row.reward - sum(r.reward for r in plain) / len(plain)) * (t in kept)
        return -w * (row.reward if k else advantage(row, plain))

    assert_close(found[0], wanted(rows, coefficient))


@pytest.mark.parametrize("method", ["luffy", "srft", "prefix_rft", "uft", "chord", "trapo"])
def test_a_constant_added_to_all_rewards_changes_nothing(method, dist, monkeypatch):
    """The baseline takes it away (the gate of HPT and BREAD's search look at rewards themselves)."""
    module, flags, _ = METHODS[method]
    if method == "trapo":
        flags = flags | {"thresholds": (9.0, 9.0, 9.0, 9.0)}
    one, _ = update(module, monkeypatch, **flags)
    monkeypatch.setattr(
        "one_step.reward_experts",
        lambda groups: (
            [setattr(r, "reward", r.reward + 5.0 + (r.num_expert_tokens == len(r.completion_ids))) for g in groups for r in g] and 0
        ),
    )
    two, _ = update(module, monkeypatch, **flags)
    assert_close(two[0], one[0])


def test_prefix_rft_schedule_and_draws():
    """low falls by a cosine from 0.95 to 0.05; the share is uniform in [low, high]; a token is always left to the policy."""
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
    """p falls from 0.95 to 0.05 by a cosine of t = step + 1 and is 0 afterwards; k is binomial, or uniform; no answer is shown."""
    share = [uft.hint_share(step, 0.95, 0.05, 300) for step in (0, 149, 299, 300, 400)]
    assert share == pytest.approx([0.05 + 0.45 * (1 + math.cos(math.pi / 300)), 0.5, 0.05, 0.0, 0.0])
    ends = [3, 7, 12, 20, 31, 40]  # six segments; the last, with the answer, is never shown
    assert uft.hint_cuts(ends, "chunk", 5) == [0, 3, 7, 12, 20, 31] and uft.hint_cuts(ends, "segment", 2) == [0, 3, 7, 12, 20, 31]
    assert uft.hint_cuts(ends, "token", 5) == list(range(32)) and uft.hint_cuts([9], "chunk", 5) == [0]
    assert (
        len(uft.hint_cuts(list(range(10, 210, 10)), "chunk", 5)) == 6
        and uft.hint_cuts(list(range(10, 210, 10)), "chunk", 5)[-1] == 190
    )
    rng, cuts = np.random.default_rng(0), [0, 3, 7, 12, 20, 31]
    drawn = [cuts.index(uft.draw_hint(cuts, 0.3, "cosine", rng)) for _ in range(4000)]
    for k in range(6):
        p = math.comb(5, k) * 0.3**k * 0.7 ** (5 - k)
        assert abs(drawn.count(k) - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p)) + 1
    flat = [cuts.index(uft.draw_hint(cuts, 0.3, "uniform", rng)) for _ in range(4000)]
    assert all(abs(flat.count(k) - 4000 / 6) < 5 * math.sqrt(4000 / 6) for k in range(6))
    assert uft.draw_hint(cuts, 0.0, "uniform", rng) == 0 and uft.draw_hint([0], 0.9, "cosine", rng) == 0


@pytest.mark.parametrize("problems", [3, 1])
def test_ranks(problems, tmp_path):
    """Two ranks have the gradients of one, in fp64: with unequal shares, and with a rank that has no problem."""
    worker, found = str(Path(__file__).with_name("update_worker.py")), []
    for nproc in (1, 2):
        file = tmp_path / f"{nproc}.pt"
        run_script(worker, str(problems), str(file), nproc=nproc, timeout=200)
        found.append(torch.load(file))
    assert set(found[0]) == {*METHODS, "relift"}
    for method, steps in found[0].items():
        assert len(steps) == len(found[1][method])
        for one, two in zip(steps, found[1][method], strict=True):
            scale = max(o.abs().max() for o in one)
            assert all((o - t).abs().max() <= 1e-6 * scale for o, t in zip(one, two, strict=True)), method
