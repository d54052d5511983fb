"""The anchor search with a deterministic fake policy, the cuts of an expert trace, and that expert tokens are no target."""

import itertools
import math

import pytest
import torch
from conftest import problem

import bread
import common

K, N = 10, 8


class FakePolicy:
    """Solves a share of its N rollouts that depends on the number of episodes shown."""

    def __init__(self, curves):
        self.curves, self.calls, self.asked = curves, [], [[] for _ in curves]

    def __call__(self, chosen, prefix_lengths, attempt):
        self.calls.append(attempt)
        groups = []
        for i, length in zip(chosen, prefix_lengths, strict=True):
            self.asked[i].append(length)
            right = self.curves[i][length]
            groups.append([common.Rollout(problem("p"), [1] * length + [2], length, reward=float(j < right)) for j in range(N)])
        return groups


def search(curves, band_low=0.0, band_high=1.0, stop_on_first=True, episodes=K):
    """Prefix length in tokens equals the number of episodes here; the last episode is never offered."""
    policy = FakePolicy(curves)
    found, anchors, rounds = bread.anchor_search([list(range(episodes))] * len(curves), policy, band_low, band_high, stop_on_first)
    return policy, found, anchors, rounds


RAMP = [min(N, max(0, 2 * (j - 3))) for j in range(K)]


def test_a_mixed_group_is_found_whenever_there_is_one():
    """Every monotone curve with a mixed value somewhere that a binary search can see: the group taken is mixed."""
    for first, width in itertools.product(range(1, K), range(1, 5)):
        curve = [0 if j < first else (4 if j < first + width else N) for j in range(K)]
        policy, found, anchors, rounds = search([curve])
        assert 0 < sum(r.reward for r in found[0]) < N
        assert found[0][0].num_expert_tokens == anchors[0] == len(found[0][0].completion_ids) - 1
        assert rounds <= math.ceil(math.log2(K)) and len(set(policy.asked[0])) == len(policy.asked[0])


def test_the_number_of_generate_calls():
    """At most 1 + ceil(log2 K) with the plain group, for any number of problems and any answers, each index probed once."""
    for bits in itertools.product([0, 4, N], repeat=5):
        curves = [[0, *bits, *bits][:K] + [N] * 2, [0] * K, [0] + [N] * K, RAMP]
        policy, found, _, rounds = search([c[:K] for c in curves])
        assert rounds == len(policy.calls) <= math.ceil(math.log2(K))
        assert policy.calls == list(range(1, rounds + 1))
        assert all(len(set(asked)) == len(asked) and 0 not in asked and max(asked, default=0) < K for asked in policy.asked)
        assert found[1] is None


def test_the_minimal_succeeding_prefix_with_a_closed_band():
    """Any success accepted, searched to the end: the shortest prefix of a monotone policy."""
    for first in range(1, K):
        for value in (1, 4, N):
            curve = [0 if j < first else value for j in range(K)]
            _, found, anchors, _ = search([curve], band_high=1.1, stop_on_first=False)
            assert anchors == [first] and sum(r.reward for r in found[0]) == value


def test_a_sharp_step_takes_the_shortest_succeeding_prefix():
    _, found, anchors, _ = search([[0] * 6 + [N] * 4])
    assert anchors == [6] and all(r.reward for r in found[0])


def test_nothing_helps():
    _, found, anchors, _ = search([[0] * K])
    assert found == [None] and anchors == [0]


def test_one_episode_or_none_ends_at_once():
    policy, found, _, rounds = search([[0], [0]], episodes=1)
    assert found == [None, None] and rounds == 0 and policy.calls == []
    assert search([])[3] == 0


def test_band():
    """A success rate at or below the band is too hard, at or above it too easy."""
    _, found, _, _ = search([RAMP], band_low=0.3, band_high=0.6)
    assert 0.3 < sum(r.reward for r in found[0]) / N < 0.6


def test_a_group_has_one_anchor_and_its_advantages_sum_to_zero():
    _, found, _, _ = search([RAMP])
    assert len({r.num_expert_tokens for r in found[0]}) == 1
    advantages = common.group_advantages(torch.tensor([[r.reward for r in found[0]]]), True)
    assert advantages.sum().abs() < 1e-6 and advantages.abs().max() > 0


def test_the_prefix_gets_no_gradient(dist):
    """Changing log-probabilities on the prefix changes neither loss nor gradient elsewhere; its own gradient is zero."""
    rows = [
        common.Rollout(problem("p"), [5, 6, 7, 0], 2, advantage=1.0),
        common.Rollout(problem("p"), [5, 6, 8, 9, 0], 2, advantage=-1.0),
    ]
    batch = common.make_batch(rows, dist)
    results = []
    for shift in (0.0, -3.0):
        torch.manual_seed(0)
        logprobs = -torch.rand(2, 5)
        old = logprobs.clone()
        logprobs[:, :2] += shift
        logprobs.requires_grad_()
        mask = batch.completion_mask & ~batch.expert_mask
        rest = (torch.ones(2, 5), torch.zeros(2, 5), None, mask, 5, 2, 9, "token", 0.2, 0.2, 0.0, "k3", 0.0)
        loss, _ = bread.loss_fn(logprobs, old, batch.advantages, *rest)
        loss.backward()
        assert (logprobs.grad[:, :2] == 0).all() and logprobs.grad[:, 2:].abs().max() > 0
        results.append((loss.item(), logprobs.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert common.count_tokens(rows, dist) == (5, 4, 2)


def test_cuts_are_on_tokens_and_lines(tokenizer):
    trace = "".join(f"line {i}\n" for i in range(22)) + "\\boxed{1}"
    question = problem("q", expert=trace)
    cuts = common.episode_cuts(question, tokenizer, 10, False)
    assert len(cuts) == 11 and cuts[0] == 0 and cuts[-1] == len(question.expert_ids) and cuts == sorted(set(cuts))
    shown = [tokenizer.decode(question.expert_ids[:cut]) for cut in cuts[:-1]]
    assert all(trace.startswith(text) and text.endswith("\n") for text in shown[1:])
    assert [text.count("\n") for text in shown[1:]] == [round(i * 23 / 10) for i in range(1, 10)]


@pytest.mark.parametrize(
    ("trace", "pieces"), [("a\nb\n\\boxed{1}", 3), ("One. Two! Three \\boxed{1}", 3), ("nothing to cut \\boxed{1}", 1)]
)
def test_few_pieces(trace, pieces, tokenizer):
    cuts = common.episode_cuts(problem("q", expert=trace), tokenizer, 10, False)
    assert len(cuts) == pieces + 1


def test_blank_lines_belong_to_the_line_before(tokenizer):
    question = problem("q", expert="a\n\n\nb\n\n\\boxed{1}")
    cuts = common.episode_cuts(question, tokenizer, 10, False)
    assert [tokenizer.decode(question.expert_ids[a:b]) for a, b in itertools.pairwise(cuts)][:2] == ["a\n\n\n", "b\n\n"]


def test_leak_check(tokenizer):
    question = problem("q", answer="72", expert="6*6=36\n36+36=72\nso 72\n\\boxed{72}")
    assert len(common.episode_cuts(question, tokenizer, 10, False)) == 5
    shown = [tokenizer.decode(question.expert_ids[:c]) for c in common.episode_cuts(question, tokenizer, 10, True)[:-1]]
    assert shown == ["", "6*6=36\n"]
