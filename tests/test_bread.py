"""The anchor search with a fake policy, a trace's cuts, and expert tokens that are no target."""

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
            ids = [1] * length + [2]
            groups.append([common.Rollout(problem("p"), ids, length, reward=float(j < right)) for j in range(N)])
        return groups


def search(curves, band_low=0.0, band_high=1.0, stop_on_first=True, episodes=K):
    """A prefix is as many tokens long as it has episodes; the last episode is never offered."""
    policy, cfg = FakePolicy(curves), bread.Config(band_low=band_low, band_high=band_high, stop_on_first=stop_on_first)
    return policy, *bread.anchor_search(cfg, [list(range(episodes))] * len(curves), policy)


RAMP = [min(N, max(0, 2 * (j - 3))) for j in range(K)]


def test_a_mixed_group_is_found_whenever_there_is_one():
    """On a monotone curve with a mixed value that bisection can see, the group is mixed."""
    for first, width in itertools.product(range(1, K), range(1, 5)):
        curve = [0 if j < first else (4 if j < first + width else N) for j in range(K)]
        policy, found, anchors, rounds = search([curve])
        assert 0 < sum(r.reward for r in found[0]) < N
        assert found[0][0].num_expert_tokens == anchors[0] == len(found[0][0].completion_ids) - 1
        assert rounds <= math.ceil(math.log2(K)) and len(set(policy.asked[0])) == len(policy.asked[0])


def test_the_number_of_generate_calls():
    """At most ceil(log2 K) for any number of problems and answers, each length probed once."""
    for bits in itertools.product([0, 4, N], repeat=5):
        curves = [[0, *bits, *bits][:K] + [N] * 2, [0] * K, [0] + [N] * K, RAMP]
        policy, found, _, rounds = search([c[:K] for c in curves])
        assert rounds == len(policy.calls) <= math.ceil(math.log2(K))
        assert policy.calls == list(range(1, rounds + 1))
        for asked in policy.asked:
            assert len(set(asked)) == len(asked) and 0 not in asked and max(asked, default=0) < K
        assert found[1] is None


def test_the_minimal_succeeding_prefix_with_a_closed_band():
    """Any success accepted, searched to the end: the shortest prefix of a monotone policy."""
    for first in range(1, K):
        for value in (1, 4, N):
            curve = [0 if j < first else value for j in range(K)]
            _, found, anchors, _ = search([curve], band_high=1.1, stop_on_first=False)
            assert anchors == [first] and sum(r.reward for r in found[0]) == value


def test_a_sharp_step_takes_the_shortest_succeeding_prefix():
    """From all wrong to all right: no group is in the band, the shortest right one stays."""
    _, found, anchors, _ = search([[0] * 6 + [N] * 4])
    assert anchors == [6] and all(r.reward for r in found[0])


def test_nothing_helps():
    """No group and no anchor where every prefix fails."""
    _, found, anchors, _ = search([[0] * K])
    assert found == [None] and anchors == [0]


def test_one_episode_or_none_ends_at_once():
    """A trace with nothing to show is not probed, and no problem at all is no round."""
    policy, found, _, rounds = search([[0], [0]], episodes=1)
    assert found == [None, None] and rounds == 0 and policy.calls == []
    assert search([])[3] == 0


def test_band():
    """A success rate at or below the band is too hard, at or above it too easy."""
    _, found, _, _ = search([RAMP], band_low=0.3, band_high=0.6)
    assert 0.3 < sum(r.reward for r in found[0]) / N < 0.6


def test_a_group_has_one_anchor_and_its_advantages_sum_to_zero():
    """The group that is found is one group: the same prefix in all its rows."""
    _, found, _, _ = search([RAMP])
    assert len({r.num_expert_tokens for r in found[0]}) == 1
    advantages = common.group_advantages(torch.tensor([[r.reward for r in found[0]]]), True)
    assert advantages.sum().abs() < 1e-6 and advantages.abs().max() > 0


def test_the_prefix_gets_no_gradient(world):
    """The prefix has none, and its log-probabilities change neither the loss nor the others'."""
    torch.manual_seed(0)
    logprobs = -torch.rand(2, 5)
    rows = []
    for ids, advantage, old in (([5, 6, 7, 0], 1.0, logprobs[0, :4]), ([5, 6, 8, 9, 0], -1.0, logprobs[1])):
        sampled = (old[2:] - 0.1).tolist()
        rows.append(common.Rollout(problem("p"), ids, 2, sampled, advantage=advantage, old_logprobs=old.clone()))
    batch, counts, results = common.make_batch(rows), common.count(rows, world), []
    for shift in (0.0, -3.0):
        moved = logprobs.clone()
        moved[:, :2] += shift
        moved.requires_grad_()
        loss, _ = bread.loss_fn(bread.Config(), batch, moved, torch.zeros(2, 5), None, counts)
        loss.backward()
        assert (moved.grad[:, :2] == 0).all() and (moved.grad[:, 2:][batch.policy_mask[:, 2:]] != 0).all()
        results.append((loss.item(), moved.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert counts == common.Counts(policy=5, expert=4, rows=2, expert_rows=0)


def test_cuts_are_on_tokens_and_lines(tokenizer):
    """Ten episodes of 23 lines: each ends with a line, and the last, the answer's, has no cut."""
    trace = "".join(f"line {i}\n" for i in range(22)) + "\\boxed{1}"
    question = problem("q", expert=trace)
    cuts = bread.episode_cuts(question, tokenizer, 10, False)
    assert len(cuts) == 10 and cuts[0] == 0 and cuts[-1] < len(question.expert_ids) and cuts == sorted(set(cuts))
    shown = [tokenizer.decode(question.expert_ids[:cut]) for cut in cuts]
    assert all(trace.startswith(text) and text.endswith("\n") for text in shown[1:])
    assert [text.count("\n") for text in shown[1:]] == [round(i * 23 / 10) for i in range(1, 10)]


@pytest.mark.parametrize(
    ("trace", "pieces"), [("a\nb\n\\boxed{1}", 3), ("One. Two! Three \\boxed{1}", 3), ("nothing to cut \\boxed{1}", 1)]
)
def test_few_pieces(trace, pieces, tokenizer):
    """A trace with fewer lines, or sentences, has fewer episodes; one alone shows nothing."""
    cuts = bread.episode_cuts(problem("q", expert=trace), tokenizer, 10, False)
    assert len(cuts) == pieces and cuts[0] == 0


def test_blank_lines_belong_to_the_line_before(tokenizer):
    """An episode never begins with a blank line."""
    question = problem("q", expert="a\n\n\nb\n\n\\boxed{1}")
    cuts = bread.episode_cuts(question, tokenizer, 10, False)
    assert [tokenizer.decode(question.expert_ids[a:b]) for a, b in itertools.pairwise(cuts)] == ["a\n\n\n", "b\n\n"]


def test_leak_check(tokenizer):
    """No prefix that is shown holds the answer's text, which a trace may name before its end."""
    question = problem("q", answer="72", expert="6*6=36\n36+36=72\nso 72\n\\boxed{72}")
    assert len(bread.episode_cuts(question, tokenizer, 10, False)) == 4
    shown = [tokenizer.decode(question.expert_ids[:c]) for c in bread.episode_cuts(question, tokenizer, 10, True)]
    assert shown == ["", "6*6=36\n"]
    numbers = common.Problem("n", "", [0], {"target": 72, "nums": [6]}, question.expert_ids)
    assert len(bread.episode_cuts(numbers, tokenizer, 10, True)) == 4  # Countdown's answer is no text
