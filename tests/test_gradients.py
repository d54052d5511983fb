"""The gradient is the same number for any micro-batch size, order and number of ranks: the bug class that distorted this field."""

import json

import pytest
import torch
from conftest import ROOT, run_script
from gradient_worker import fixed_rows, gradient

import common

CASES = {
    "token": {"loss_norm": "token"},
    "sequence": {"loss_norm": "sequence"},
    "constant": {"loss_norm": "constant"},
    "kl1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "kl2": {"kl_coef": 0.3, "kl_estimator": "k2", "loss_norm": "sequence"},
    "kl3": {"kl_coef": 0.3, "kl_estimator": "k3"},
    "entropy": {"entropy_coef": 0.2},
    "importance": {"tis_cap": 1.5},
    "unclipped": {"clip_low": -1, "clip_high": -1},
    "bread": {"method": "bread", "kl_coef": 0.3, "entropy_coef": 0.2, "loss_norm": "sequence"},
    "sft": {"method": "sft"},
    "llama": {"architecture": "llama", "entropy_coef": 0.2},
}


@pytest.fixture(scope="module")
def expected(dist):
    """All rows in one micro-batch on one rank."""
    return {name: gradient(fixed_rows(), 10**6, case, dist) for name, case in CASES.items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    scale = max(e.abs().max() for name, e in expected.items() if "metric/" not in name)
    assert scale > 1e-3
    for name, e in expected.items():
        assert (found[name] - e).abs().max() <= 1e-6 * max(scale, 1e-9), name


@pytest.mark.parametrize("budget", [1, 20, 45])
@pytest.mark.parametrize("case", CASES)
def test_any_microbatch_size_and_order(case, budget, expected, dist):
    assert_same(gradient(fixed_rows(), budget, CASES[case] | {"shuffle": budget}, dist), expected[case])


@pytest.mark.parametrize("split", ["even", "uneven", "empty"])
def test_two_ranks(split, expected, tmp_path):
    """Unequal numbers of micro-batches, and a rank with nothing to train on, neither hang nor change the result."""
    out = tmp_path / "gradients.pt"
    run_script(str(ROOT / "tests/gradient_worker.py"), str(out), split, "20", json.dumps(CASES), nproc=2, timeout=120)
    found = torch.load(out)
    for case in CASES:
        assert_same(found[case], expected[case])


def test_nothing_to_train_on(dist):
    assert common.microbatches([], 100, dist) == []
    assert common.clip_gradients(torch.nn.Linear(2, 2).parameters(), 1.0) == 0


def test_filler_has_no_gradient(dist):
    from conftest import random_model  # noqa: PLC0415

    blank = common.Rollout(common.Problem("filler", "", [0], "", None), [0])
    batch = common.make_batch([blank], dist, filler=True)
    policy = common.shard(random_model("qwen2"), dist)
    logprobs, _ = common.token_logprobs(policy, batch, 1.0)
    torch.where(batch.completion_mask, logprobs, 0.0).sum().backward()
    assert all(common.full_tensor(p.grad).abs().max() == 0 for p in policy.parameters())


@pytest.mark.parametrize("coefficient", ["kl_coef", "entropy_coef"])
def test_every_coefficient_is_live(coefficient, dist):
    once = gradient(fixed_rows(), 10**6, {coefficient: 0.1}, dist)
    twice = gradient(fixed_rows(), 10**6, {coefficient: 0.2}, dist)
    assert max((twice[name] - once[name]).abs().max() for name in once) > 1e-4


def test_clip_norm_is_of_the_whole_gradient(expected):
    case = expected["token"]
    norm = torch.sqrt(sum(g.square().sum() for name, g in case.items() if "metric/" not in name and name != "norm"))
    assert torch.allclose(norm, case["norm"])
