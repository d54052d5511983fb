"""The gradient is the same number for any micro-batch size, order and number of ranks.

Every number comes from the real main of grpo.py, bread.py or sft.py, in fp64. Most rows come with
log-probabilities of another policy and with a sampler's that differ from them, so that ratio, clip
and importance weight are away from 1.
"""

from types import ModuleType

import pytest
import torch
from conftest import problem, random_model, run_script
from one_step import one_step

import bread
import common
import grpo
import sft

LENGTHS = [(9, 0), (1, 0), (17, 4), (4, 0), (3, 2), (12, 11), (6, 0), (2, 0)]  # completion, of it expert
UNKNOWN = (3, 6)  # rows that come without log-probabilities of another policy
SPLITS = {"even": (2, 2, 2, 2), "uneven": (6, 2), "empty": (8,)}  # rows of each problem, dealt to the ranks in turn
FLAGS = {"temperature": 0.7, "max_completion_tokens": 32, "tis_cap": 0.0}
CASES = {
    "token": (grpo, {"loss_norm": "token"}),
    "sequence": (grpo, {"loss_norm": "sequence"}),
    "constant": (grpo, {"loss_norm": "constant"}),
    "kl1": (grpo, {"kl_coef": 0.3, "kl_estimator": "k1"}),
    "kl2": (grpo, {"kl_coef": 0.3, "kl_estimator": "k2", "loss_norm": "sequence"}),
    "kl3": (grpo, {"kl_coef": 0.3, "kl_estimator": "k3"}),
    "entropy": (grpo, {"entropy_coef": 0.2}),
    "importance": (grpo, {"tis_cap": 1.5}),
    "unclipped": (grpo, {"clip_low": -1.0, "clip_high": -1.0}),
    "updates": (grpo, {"updates_per_step": 2, "lr": 0.01, "tis_cap": 1.5, "kl_coef": 0.3}),
    "bread": (bread, {"kl_coef": 0.3, "entropy_coef": 0.2, "loss_norm": "sequence"}),
    "sft": (sft, {}),
    "llama": (grpo, {"architecture": "llama", "entropy_coef": 0.2}),
}
Found = tuple[list[list[torch.Tensor]], list[dict]]


def split_problems(split: str) -> list[common.Problem]:
    """Problems whose id lists the numbers of their rows."""
    sizes, found = SPLITS[split], []
    for i, size in enumerate(sizes):
        numbers = range(sum(sizes[:i]), sum(sizes[:i]) + size)
        text = "\n".join("ab" * (j + 1) for j in range(i + 2))
        found.append(problem("q" * (3 * i + 1), expert=text, id=" ".join(map(str, numbers))))
    return found


def fixed_row(question: common.Problem, i: int, prefix: list[int] | None) -> common.Rollout:
    """Row i of LENGTHS, or its own tokens after another prefix."""
    generator, (length, expert) = torch.Generator().manual_seed(i), LENGTHS[i]
    ids = [*torch.randint(1, 257, (length - 1,), generator=generator).tolist(), 0]
    prefix = ids[:expert] if prefix is None else prefix
    row = common.Rollout(question, [*prefix, *ids[expert:]], len(prefix), reward=(i % 3) / 2)
    old = -3 - 3 * torch.rand(len(row.completion_ids), generator=generator)
    row.sampler_logprobs = (old + torch.randn(old.shape, generator=generator))[len(prefix) :].tolist()
    row.old_logprobs = None if i in UNKNOWN else old
    return row


def fixed_generate(problems, prefixes, n, max_tokens, temperature, seed):
    """The rows of every problem, in an order that is the seed's."""
    groups = []
    for question, prefix in zip(problems, prefixes or [None] * len(problems), strict=True):
        numbers = [int(number) for number in question.id.split()]
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed[0])).tolist()
        groups.append([fixed_row(question, numbers[place], prefix) for place in order])
    return groups


def fixed_hints(problems, prefixes, *rest):
    """The same, but nothing is right without a prefix: a group that BREAD replaces."""
    groups = fixed_generate(problems, prefixes, *rest)
    for row in (row for group in groups for row in group if prefixes is None):
        row.reward = 0.0
    return groups


def update(method: ModuleType, split: str, architecture: str = "qwen2", **flags: object) -> Found:
    """The gradients that the method's main clips, and its line of metrics."""
    models = [random_model(architecture, seed, torch.float64) for seed in (0, 1)]
    problems = split_problems(split)
    known = {name: value for name, value in FLAGS.items() if hasattr(method.Config, name)}
    flags = {"problems_per_step": len(problems), "tokens_per_microbatch": 10**6} | known | flags
    return one_step(method, models, fixed_hints if method is bread else fixed_generate, problems, **flags)


def updates() -> dict[tuple[str, str], Found]:
    """Every case with every split, in small micro-batches: what update_worker.py runs."""
    found = {}
    for split in SPLITS:
        for case, (method, flags) in CASES.items():
            found[case, split] = update(method, split, tokens_per_microbatch=20, **flags)
    return found


@pytest.fixture(scope="module")
def expected(world):
    """All rows in one micro-batch on one rank."""
    return {
        (case, split): update(method, split, **flags) for case, (method, flags) in CASES.items() for split in SPLITS
    }


@pytest.fixture(scope="module", params=[2, 3])
def on_ranks(request, tmp_path_factory):
    """The same on several ranks in small micro-batches, to which rows move."""
    file = tmp_path_factory.mktemp("gradients") / "found.pt"
    run_script("tests/update_worker.py", "test_gradients", str(file), nproc=request.param, timeout=200)
    return torch.load(file)


def assert_same(found: Found, expected: Found) -> None:
    """Gradients at every clip, and metrics; norms of hidden states are made in fp32."""
    assert len(found[0]) == len(expected[0])
    assert max(e.abs().max() for clip in expected[0] for e in clip) > 1e-3
    for mine, theirs in zip(found[0], expected[0], strict=True):
        scale = max((e.abs().max() for e in theirs), default=0.0)
        assert all((f - e).abs().max() <= 4e-6 * scale for f, e in zip(mine, theirs, strict=True))
    clocks = ("seconds", "tokens_per_second", "peak_memory")
    (mine, theirs) = ({k: v for k, v in x[1][0].items() if not k.startswith(clocks)} for x in (found, expected))
    assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("budget", [1, 20, 45])
@pytest.mark.parametrize("case", CASES)
def test_any_microbatch_size_and_order(case, budget, expected):
    """Neither micro-batches nor the order of problems and rows change a gradient or a metric."""
    method, flags = CASES[case]
    order = {} if "updates_per_step" in flags else {"seed": budget}  # the order says which problems an update has
    assert_same(update(method, "even", tokens_per_microbatch=budget, **order, **flags), expected[case, "even"])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES)
def test_ranks(case, split, expected, on_ranks):
    """Unequal numbers of micro-batches, or a rank without any row, do not change the result."""
    assert_same(on_ranks[case, split], expected[case, split])


def test_the_cases_are_off_policy(expected):
    """Else they would miss a wrong ratio, clip or importance weight: some tokens are clipped."""
    for case in ("token", "kl3", "importance", "bread", "llama", "updates"):
        line = expected[case, "even"][1][0]
        assert 0 < line["clip_fraction"] < 0.9 and line["sampler_ratio_off"] > 0.5, case
    assert expected["unclipped", "even"][1][0]["clip_fraction"] == 0
    assert expected["bread", "even"][1][0]["anchor_depth"] > 0


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("total", [1, 3, 4, 6, 7])
def test_updates_have_the_same_problems_on_any_number_of_ranks(total, updates):
    """Consecutive parts of the step's draw, of sizes that differ by at most one."""
    problems, parts = list(range(100, 120)), {}
    for size in (1, 2, 3):
        worlds = [common.World(rank, size, torch.device("cpu")) for rank in range(size)]
        drawn = [common.draw(problems, total, 2, 0, world) for world in worlds]
        parts[size] = [
            [common.share(mine, part, updates, total, world) for mine, world in zip(drawn, worlds, strict=True)]
            for part in range(updates)
        ]
    whole = [ranks[0] for ranks in parts[1]]
    assert sum(whole, []) == common.draw(problems, total, 2, 0, common.World(0, 1, torch.device("cpu")))
    assert max(map(len, whole)) - min(map(len, whole)) <= 1
    for size in (2, 3):
        assert [sorted(sum(ranks, [])) for ranks in parts[size]] == [sorted(part) for part in whole]


def test_nothing_to_train_on(world):
    """No row on any rank: no micro-batch, and a gradient norm of 0."""
    assert common.microbatches([], 100, world) == []
    assert common.clip_gradients(torch.nn.Linear(2, 2).parameters(), 1.0) == 0


def test_an_update_without_rows(expected):
    """One problem and two updates: the first has all rows, the second none and no gradient."""
    first, second = expected["updates", "empty"][0]
    assert first and not second


def test_filler_has_no_gradient(world):
    """A filler's row goes through the model, and no parameter gets anything from it."""
    blank = common.Rollout(common.Problem("filler", "", [0], "", None), [0])
    batch = common.make_batch([blank], filler=True)
    policy = common.shard(random_model("qwen2"), world)
    logprobs, _ = common.token_logprobs(policy, batch, 1.0)
    torch.where(batch.completion_mask, logprobs, 0.0).sum().backward()
    assert all(common.full_tensor(p.grad).abs().max() == 0 for p in policy.parameters())


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_groups_of_equal_rewards(norm, world):
    """Dropped, they are as if never sampled; kept, they count in w and add no direction."""
    found = {}
    for name, chosen, flag in (("all", "01", "keep"), ("drop", "01", "drop"), ("alone", "0", "keep")):
        groups = [[fixed_row(problem("q" * (g + 1)), i, []) for i in range(8)] for g in (0, 1) if str(g) in chosen]
        for row in groups[-1] if "1" in chosen else []:
            row.reward = 0.1  # eight of which have another mean
        flags = {"loss_norm": norm, "zero_variance": flag, "problems_per_step": len(groups)}
        ((found[name],), _) = one_step(grpo, [random_model("qwen2", 0, torch.float64)], groups, **FLAGS | flags)
    for mine, dropped, kept in zip(found["alone"], found["drop"], found["all"], strict=True):
        assert torch.equal(mine, dropped) and torch.allclose(kept, mine / 2, rtol=1e-6, atol=1e-12)
    assert max(gradient.abs().max() for gradient in found["alone"]) > 1e-3


@pytest.mark.parametrize(
    ("flag", "one", "two"),
    [
        ("kl_coef", 0.1, 0.2),
        ("entropy_coef", 0.1, 0.2),
        ("clip_low", 0.2, 0.7),
        ("clip_high", 0.2, 0.4),
        ("tis_cap", 1.5, 3.0),
        ("loss_norm", "token", "sequence"),
        ("loss_norm", "token", "constant"),
        ("kl_estimator", "k2", "k3"),
        ("temperature", 0.7, 1.0),
        ("scale_by_std", True, False),
    ],
)
def test_every_coefficient_is_live(flag, one, two, world):
    """Another value gives another gradient."""
    flags = {"kl_coef": 0.1} if flag == "kl_estimator" else {}
    ((a,), _), ((b,), _) = (update(grpo, "even", **flags | {flag: value}) for value in (one, two))
    assert max((x - y).abs().max() for x, y in zip(a, b, strict=True)) > 1e-4


def test_clip_norm_is_of_the_whole_gradient(expected, on_ranks):
    """The norm in the log is that of the gradient over all shards, summed over all ranks."""
    for found in (expected["token", "uneven"], on_ranks["token", "uneven"]):
        (gradients,), (line,) = found
        assert line["grad_norm"] == pytest.approx(sum(g.square().sum().item() for g in gradients) ** 0.5, rel=1e-9)


@pytest.mark.parametrize(("max_norm", "factor"), [(2.5, 0.5), (10.0, 1.0), (0.0, 1.0), (-1.0, 1.0)])
def test_clipping_by_hand(max_norm, factor):
    """A gradient of norm 5, halved by a limit of 2.5; a limit above it, 0 or below 0 leaves it."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, -4.0])
    assert common.clip_gradients([parameter], max_norm) == 5
    assert torch.allclose(parameter.grad, factor * torch.tensor([3.0, -4.0]), rtol=1e-5)
