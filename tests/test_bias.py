"""results/bias.py: what it calls exact is exact, and its table is the one on the page."""

import math
from pathlib import Path

import oracles
import pytest
import torch

import common
from results import bias, three_tokens
from results.methods import METHODS

PAGE = Path(__file__).resolve().parent.parent / "results/README.md"
PLACES = (0, 4, 6, 9, 12)  # of policies: from hopeless to solved


@pytest.fixture(autouse=True)
def double():
    with oracles.float64():
        yield


@pytest.mark.parametrize("place", PLACES)
def test_plain_is_unbiased_but_for_its_own_row_in_the_mean(place):
    """(N - 1) / N of the true gradient, over T by the constant norm; without it, all 15 rewards."""
    now = three_tokens.policies()[place]
    push, noise = bias.expected_push(bias.PLAIN, now)
    wanted = now.true_gradient() * (three_tokens.N - 1) / three_tokens.N / three_tokens.T
    assert torch.allclose(push, wanted, rtol=0, atol=1e-10 * wanted.norm()) and noise > 1
    assert torch.allclose(now.logprobs.sum(-1).exp().sum(1), torch.ones(2), atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
def test_true_gradient_is_that_of_the_expected_reward(place):
    """Against central differences of the enumerated reward."""
    now, step, found = three_tokens.policies()[place], 1e-5, []
    for shift in torch.eye(now.weights.numel()).view(-1, *now.weights.shape) * step:
        up, down = (three_tokens.Policy(now.weights + sign * shift).reward().mean() for sign in (1, -1))
        found.append((up - down) / (2 * step))
    assert torch.allclose(torch.stack(found), now.true_gradient(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("layout", three_tokens.LAYOUTS)
@pytest.mark.parametrize("writer", ["now", "old", "other"])
def test_chances_of_the_groups_sum_to_one(layout, writer):
    """What trains after a failure alone sums to the chance of a failure."""
    for place in (0, 6, 12):
        now = three_tokens.policies()[place].writer(writer)
        failure = ((1 - now.reward()) ** three_tokens.N).mean().item()
        total = bias.rows_of(layout).chances(now).sum().item()
        assert total == pytest.approx(failure if layout == "trace after a failure" else 1, rel=1e-10)


@pytest.mark.parametrize("name", ["grpo", "divided by the row's tokens", "luffy"])
def test_expected_gradient_is_what_sampling_gives(name, world):
    """2,000 groups as an update makes them: sampled rows, make_batch, count, loss, backward."""
    v = {k: v for family in bias.FAMILIES.values() for k, v in family.items()}[name]._replace(one_group=True)
    now, traced = three_tokens.policies()[5], v.layout == "group with trace"
    draw, gradients = torch.Generator().manual_seed(0), []
    for _ in range(2000):
        problem = int(torch.randint(2, (), generator=draw))
        chances = now.logprobs[problem].sum(-1).exp()
        chosen = torch.multinomial(chances, three_tokens.N - traced, replacement=True, generator=draw).tolist()
        rows = [(y, 0) for y in chosen] + list(three_tokens.EXPERT[problem]) * traced
        rollouts = [common.Rollout(three_tokens.PROBLEMS[problem], three_tokens.IDS[y], k) for y, k in rows]
        rewards = three_tokens.RIGHT[problem, [y for y, _ in rows]]
        advantages = common.group_advantages(rewards[None], v.cfg.scale_by_std)[0]
        for rollout, advantage in zip(rollouts, advantages.tolist(), strict=True):
            rollout.advantage = advantage
        weights = now.weights.clone().requires_grad_()
        batch, place = common.make_batch(rollouts), [y for y, _ in rows]
        width = batch.completion_ids.shape[1]
        logprobs, entropy = (x[problem, place, :width] for x in three_tokens.Policy.look_up(weights))
        batch.old_logprobs = batch.sampler_logprobs = logprobs.detach()
        counts = common.count(rollouts, world)
        loss, _ = three_tokens.METHOD[v.method].loss_fn(v.cfg, batch, logprobs, entropy, None, counts)
        gradients.append(-torch.autograd.grad(loss, weights)[0].flatten())
    sampled, (push, noise) = torch.stack(gradients), bias.expected_push(v, now)
    error = sampled.std(0) / math.sqrt(len(sampled))
    assert ((sampled.mean(0) - push).abs() < 4 * error + 1e-9).all()
    assert sampled.var(0).sum() / push.square().sum() == pytest.approx(noise, rel=0.15)


def test_every_method_is_here():
    """In the table and in the picture of the tokens."""
    listed = {v.method for family in bias.FAMILIES.values() for v in family.values()}
    assert listed == {v.method for v, _, _ in bias.PANELS.values()} == {method.name for method in METHODS}


def test_each_token_has_the_push_that_its_method_gives():
    """Context has none, a clipped token has none, a likelihood pushes every expert token alike."""
    rows = {title.split(":")[0]: bias.pushes(*panel) for title, panel in bias.PANELS.items()}
    assert [push for expert, push in rows["bread"][6] if expert] == [0, 0]
    assert rows["grpo"][1][2][1] == 0 < rows["dapo"][1][2][1]
    assert len({push for _, push in rows["sft"][7]}) == 1 and list(rows["sft"]) == [7]
    longest = {i: sum(abs(push) for _, push in rows["grpo, sequence norm"][i]) for i in (2, 3, 4, 5)}
    assert max(longest.values()) == pytest.approx(min(longest.values()))


def test_page_has_the_table_and_the_figures(monkeypatch):
    """What the script prints is on the page as it is, and both figures can be drawn."""
    variants = {title: v for family in bias.FAMILIES.values() for title, v in family.items()}
    shown = {i: three_tokens.policies()[i] for i in bias.SHOWN}
    measured = {title: {i: bias.measure(v, now) for i, now in shown.items()} for title, v in variants.items()}
    nearest = [min(shown, key=lambda i, place=place: abs(i - place)) for place in range(len(three_tokens.TARGETS))]
    found = {title: [values[i] for i in nearest] for title, values in measured.items()}
    page, drawn = PAGE.read_text(), []
    assert bias.table(found) in page, "run: python results/bias.py"
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: drawn.append(path))
    bias.draw(found)
    assert [path.name for path in drawn] == ["bias.png", "coefficients.png"]
    assert all(path.exists() and f"]({path.name})" in page for path in drawn)
