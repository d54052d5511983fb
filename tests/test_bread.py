"""The anchor search with a fake policy, and expert tokens that are no target."""

import dataclasses
import inspect
import itertools
import math
import random
import sys

import pytest
import torch
from conftest import byte_tokenizer, problem, random_model, train
from one_step import one_step

import bread
import common

K, N = 10, 8


class FakePolicy:
    """In place of a sampler: right in as many of N rollouts as the episodes shown say."""

    def __init__(self, curves):
        self.curves, self.calls, self.asked, self.tokenizer = curves, [], [[] for _ in curves], byte_tokenizer()

    def generate(self, problems, prefixes, n, max_tokens, temperature, seed):
        assert self.log.phases[-1] == "rollouts"
        self.calls.append(seed[-1])
        groups = []
        for question, prefix in zip(problems, prefixes, strict=True):
            episodes = self.tokenizer.decode(prefix).count("\n")
            self.asked[int(question.id)].append(episodes)
            groups.append(group_of(question, self.curves[int(question.id)][episodes], prefix))
        return groups


def group_of(question, right, prefix=()):
    """A group of N rows that continue a prefix, some of them right."""
    ids = [*prefix, 2]
    return [common.Rollout(question, ids, len(prefix), reward=float(j < right)) for j in range(N)]


def search(curves, plain=0, episodes=K, **flags):
    """(policy, groups, episodes shown, lines of the log) of one search.

    A trace has as many lines as episodes; the last line is never offered. plain: right rows of the
    plain groups, or of each.
    """
    trace = "".join(f"{i}\n" for i in range(episodes - 1)) + "\\boxed{1}"
    questions = [problem("q", expert=trace, id=str(i)) for i in range(len(curves))]
    policy, cfg, log = FakePolicy(curves), bread.Config(group_size=N, **flags), Log()
    policy.log = log

    def score(groups):
        assert log.phases[-1] == "rewards"
        return {"sampled_tokens": 7 * len(groups)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "score", score)
        right = plain if isinstance(plain, list) else [plain] * len(curves)
        groups, log.opened = bread.anchor_search(cfg, policy, log, 0, questions, list(map(group_of, questions, right)))
    shown = [policy.tokenizer.decode(g[0].completion_ids[: g[0].num_expert_tokens]).count("\n") for g in groups]
    return policy, groups, shown, log


class Log:
    """Keeps what a RunLog is told."""

    def __init__(self):
        self.values, self.samples, self.phases = {}, [], ["rewards"]

    def phase(self, name):
        self.phases.append(name)

    def add(self, **values):
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0) + value

    def add_mean(self, name, values):
        self.values[name] = sum(values) / max(len(values), 1)


def right(group):
    """How many rows of a group are right."""
    return sum(r.reward for r in group)


RAMP = [min(N, max(0, 2 * (j - 3))) for j in range(K)]


def test_the_shortest_prefix_in_the_band_is_found():
    """On a monotone curve, from the first mixed length on; every length is probed at most once."""
    for first, width in itertools.product(range(1, K), range(1, 5)):
        curve = [0 if j < first else (4 if j < first + width else N) for j in range(K)]
        policy, groups, shown, log = search([curve])
        assert shown == [first] and right(groups[0]) == 4 and log.values["search_mixed"] == 1
        assert groups[0][0].num_expert_tokens == 2 * first == len(groups[0][0].completion_ids) - 1
        assert log.values["search_rounds_max"] <= math.ceil(math.log2(K))
        assert len(set(policy.asked[0])) == len(policy.asked[0])


@pytest.mark.parametrize("flags", [{}, {"trigger": "always"}, {"stop_on_first": True}])
def test_credit_for_wrong_rows_changes_no_search(flags, monkeypatch):
    """Rows that earn 0.9 without being right are asked on, and taken, as rows that earn 0."""
    curves = [RAMP, [0] * K, [0] * 2 + [4] * (K - 2), [0] * 5 + [N] * (K - 5)]
    wanted = search(curves, **flags)

    def credited(question, right, prefix=()):
        ids = [*prefix, 2]
        return [common.Rollout(question, ids, len(prefix), reward=max(0.9, float(j < right))) for j in range(N)]

    monkeypatch.setattr(sys.modules[__name__], "group_of", credited)
    found = search(curves, **flags)
    assert found[0].asked == wanted[0].asked and found[2] == wanted[2]


def test_stop_on_first_takes_the_first_mixed_group():
    """Success from one episode on: half of the trace is shown, where one episode would do."""
    policy, _, shown, _ = search([[0] + [4] * (K - 1)], stop_on_first=True)
    assert shown == [5] and policy.asked == [[5]]
    assert search([[0] + [4] * (K - 1)])[2] == [1]


def test_the_number_of_generate_calls():
    """At most ceil(log2 K) for any number of problems and answers, each length probed once."""
    for bits in itertools.product([0, 4, N], repeat=5):
        curves = [[0, *bits, *bits][:K] + [N] * 2, [0] * K, [0] + [N] * K, RAMP]
        policy, _, shown, log = search([c[:K] for c in curves])
        assert log.values["search_rounds_max"] == len(policy.calls) <= math.ceil(math.log2(K))
        assert policy.calls == list(range(1, len(policy.calls) + 1))
        for asked in policy.asked:
            assert len(set(asked)) == len(asked) and 0 not in asked and max(asked, default=0) < K
        assert shown[1] == 0


@pytest.mark.parametrize("stop_on_first", [False, True])
@pytest.mark.parametrize("trigger", ["all_fail", "always"])
@pytest.mark.parametrize("band", [(0.0, 1.0), (0.3, 0.6), (0.3, 1.1)])
@pytest.mark.parametrize("plain", [0, 2, 4, N])
def test_the_best_group_that_was_seen_is_taken(plain, band, trigger, stop_on_first):
    """In the band, then mixed, then with a success, then shorter: of plain group and probes."""
    draw = random.Random(repr((plain, band, trigger, stop_on_first)))
    curves = [[plain, *(draw.choice([0, 0, 1, 2, 3, 4, 6, N]) for _ in range(K - 1))] for _ in range(60)]
    flags = {"band_low": band[0], "band_high": band[1], "trigger": trigger, "stop_on_first": stop_on_first}
    policy, groups, shown, _ = search(curves, plain, **flags)
    searched = plain / N <= band[0] if trigger == "always" else plain == 0
    for curve, asked, group, episodes in zip(curves, policy.asked, groups, shown, strict=True):
        assert bool(asked) == searched

        def rank(j, curve=curve):
            rate = curve[j] / N
            return (band[0] < rate < band[1], 0 < rate < 1, rate > 0, -j)

        assert episodes == max([0, *asked], key=rank) and right(group) == curve[episodes]


def test_a_mixed_group_below_the_band_beats_an_all_right_one():
    """Band (0.3, 0.6), a quarter right with five lines, all with seven: five lines are trained."""
    _, groups, shown, _ = search([[0] * 5 + [2, 2] + [N] * 3], band_low=0.3, band_high=0.6)
    assert shown == [5] and right(groups[0]) == 2


def test_always_searches_where_the_plain_group_is_not_above_the_band():
    """A mixed or an all right group is not searched; one below the band stays unless bettered."""
    for solved in (2, N):
        policy, groups, shown, _ = search([[solved] + [N] * (K - 1)], plain=solved, trigger="always")
        assert shown == [0] and policy.calls == []
    flags = {"plain": 2, "trigger": "always", "band_low": 0.3, "band_high": 0.6}
    _, groups, shown, _ = search([[2] + [N] * (K - 1), [2] * 5 + [4] * 5], **flags)
    assert shown == [0, 5] and [right(group) for group in groups] == [2, 4]


@pytest.mark.parametrize(
    ("pieces", "wanted"), [(1, []), (2, [12]), (3, [8, 15]), (10, [2, 5, 7, 9, 12, 14, 16, 18, 21])]
)
def test_episodes_are_equal_pieces_of_the_trace(pieces, wanted):
    """Of 23 lines, the last with the box: cut i is round(i 23 / K), and the K-th is hidden."""
    for lines in wanted:
        curve = [0] * lines + [4] * (24 - lines)
        policy, _, shown, _ = search([curve], episodes=23, num_episodes=pieces)
        assert shown == [lines] and set(policy.asked[0]) <= set(wanted)
    assert wanted or search([[0] * 24], episodes=23, num_episodes=pieces)[0].calls == []


def test_a_sharp_step_takes_the_shortest_succeeding_prefix():
    """From all wrong to all right: no group is mixed, the shortest right one is taken."""
    _, groups, shown, log = search([[0] * 6 + [N] * 4])
    assert shown == [6] and right(groups[0]) == N and log.values["search_mixed"] == 0


def test_nothing_helps():
    """The plain group stays where every prefix fails, and its trace counts as opened."""
    _, groups, shown, log = search([[0] * K])
    assert shown == [0] and right(groups[0]) == 0 and log.opened == ["0"]


def test_one_episode_or_none_ends_at_once():
    """A trace with nothing to show is not probed, and no problem at all is no round."""
    for curves, flags in (([[0], [0]], {"episodes": 1}), ([[0] * K] * 2, {"num_episodes": 1}), ([], {})):
        policy, _, shown, log = search(curves, **flags)
        assert shown == [0] * len(curves) and log.values["search_rounds_max"] == 0 and policy.calls == []
        assert log.opened == [""] * len(curves)


def test_what_a_search_logs():
    """One of ten lines shown is a depth of a tenth or so; probes and their tokens are counted."""
    policy, _, _, log = search([[0, 4] + [N] * 8, [0] * K])
    probes = sum(map(len, policy.asked))
    assert log.values["probes"] == probes and log.values["probe_tokens"] == log.values["sampled_tokens"] == 7 * probes
    assert log.values["anchor_depth"] == pytest.approx(2 / 28) and log.values["search_mixed"] == 0.5
    assert log.values["guided_reward"] == 0.5 and log.values["search_rate"] == 1
    assert log.values["traces_cut_short"] == 0


def test_what_was_not_searched_is_no_search():
    """Of four problems one is solved without help: it counts for the rate alone."""
    _, _, _, log = search([[0, 4] + [N] * 8, [0] * K, [N] * K, [0] * K], plain=[0, 0, N, 0])
    assert log.values["search_rate"] == 0.75 and log.values["search_mixed"] == pytest.approx(1 / 3)
    assert log.opened == ["0", "1", "", "3"]


def test_traces_opened_adds_up_over_steps(world):
    """Problems whose trace was ever used, each counted once over all steps."""

    def fail(problems, prefixes, n, *rest):
        opens = prefixes or [[]] * len(problems)
        return [
            [common.Rollout(p, [*x, 2], len(x), [-1.0]) for _ in range(n)] for p, x in zip(problems, opens, strict=True)
        ]

    questions = [problem("q", expert="1\n2\n\\boxed{1}", id=str(i)) for i in range(4)]
    flags = {"problems_per_step": 2, "steps": 4, "max_completion_tokens": 64}
    _, lines = one_step(bread, [random_model("qwen2", 0, torch.float64)], fail, questions, **flags)
    assert [line["traces_opened"] for line in lines] == [2, 4, 4, 4]


@pytest.mark.parametrize(("site", "times"), [("assistant", 1), ("user", 2)])
def test_a_hint_in_the_prompt_has_room(site, times, tmp_path, world, monkeypatch):
    """The engine's window holds prompt, hint and completion."""
    seen, load = [], common.load_sampler
    monkeypatch.setattr(common, "load_sampler", lambda *args: seen.append(args[-1]) or load(*args))
    flags = ["--model", "tiny", "--test_data=", "--steps", 1, "--problems_per_step", 1, "--group_size", 2]
    train("bread", *flags, "--prefix_site", site, "--out", tmp_path / "run")
    assert seen == [80 * times]


def test_a_group_has_one_anchor_and_its_advantages_sum_to_zero():
    """The group that is found is one group: the same prefix in all its rows."""
    _, groups, _, _ = search([RAMP])
    assert len({r.num_expert_tokens for r in groups[0]}) == 1
    advantages = common.group_advantages(torch.tensor([[r.reward for r in groups[0]]]), True)
    assert advantages.sum().abs() < 1e-6 and advantages.abs().max() > 0


def test_a_hint_in_the_users_turn(tokenizer):
    """Behind the question, before what the template adds; nothing of it is a completion."""
    question = problem("Question? Now.", expert="one\ntwo\n\\boxed{1}", id="0")
    prompt = tokenizer("Question? Question? Now.").input_ids  # a template that shows an example first
    question = dataclasses.replace(question, text="Question?", prompt_ids=prompt)
    seen, log = [], Log()

    class User(FakePolicy):
        def generate(self, problems, prefixes, *rest):
            seen.extend(tokenizer.decode(p.prompt_ids) for p in problems)
            assert prefixes is None and all(p.id == "0" and p.answer == "1" for p in problems)
            return [group_of(p, 4) for p in problems]

    cfg = bread.Config(group_size=N, prefix_site="user")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "score", lambda groups: {"sampled_tokens": 0})
        groups, _ = bread.anchor_search(cfg, User([]), log, 0, [question], [group_of(question, 0)])
    assert seen == ["Question? Question?\n\nThe solution begins like this:\none\n\n Now."]
    assert groups[0][0].num_expert_tokens == 0 and groups[0][0].problem.hinted
    assert log.values["guided_reward"] == 0.5 and "reward" not in log.values, "no hinted row is the policy's own"
    with pytest.raises(SystemExit, match="problem 0: its prompt does not hold the question"):
        common.with_hint(dataclasses.replace(question, text="Another?"), [5], tokenizer)


def test_ranks_that_share_an_engine_wait_in_sleep():
    """A rank with fewer probes serves the others until all sleep: no collective before that."""
    source = inspect.getsource(bread.main)
    assert source.index("anchor_search(") < source.index("sampler.sleep()") < source.index("common.gather(")


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
