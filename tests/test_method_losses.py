"""Every method's loss against a scalar loop written from its equation, and what each flag does.

A loop goes over tokens in Python floats: a token's share of the loss, and the derivative with
respect to its log-probability. The rows are all policy, all expert, a prefix and its continuation,
and a single token; the step has more rows than the micro-batch.
"""

import importlib
import itertools
import math

import oracles
import pytest
import torch
from oracles import NORMS, Case, T, Terms, add, agree, change, loss, policy_terms, ragged, settings, slope

import chord
import common
import relift
import trapo
from results.methods import METHODS


@pytest.fixture(autouse=True)
def double():
    """Constants in double precision, so that value and gradient can be compared to 1e-9."""
    with oracles.float64():
        yield


# The equations ------------------------------------------------------------------------------------
def of_whole_rows(c: Case, cfg, b: int) -> float:
    """w where expert and policy tokens count alike, those of a prefix that is not taught too."""
    counts = c.counts
    return oracles.share(cfg, c.batch.lengths[b], counts.policy + counts.expert, counts.rows + counts.expert_rows)


def shaped(c: Case, gamma: float, b: int, t: int) -> oracles.Term:
    """p / (p + gamma); p itself where gamma is negative."""
    p = math.exp(c.lp(b, t))
    return (p / (p + gamma), gamma * p / (p + gamma) ** 2) if gamma >= 0 else (p, p)


def luffy_terms(c: Case, cfg) -> Terms:
    """-A p / (p + gamma) on expert tokens, never clipped; -A ratio on the others."""
    terms = {}
    for b, t in c.tokens():
        a = c.advantage(b)
        expert = bool(c.batch.expert_mask[b, t])
        term = add((-a, shaped(c, cfg.gamma, b, t))) if expert else oracles.surrogate(c, cfg, b, t, a)
        terms[b, t] = oracles.regularised(c, cfg, of_whole_rows(c, cfg, b), term, b, t)
    return terms


def srft_terms(c: Case, cfg) -> Terms:
    """Equations 8, 10 to 13 and the code's variant: the entropy weights are constants."""
    terms = {}
    for b, t in c.tokens():
        own = [c.entropy[b, j].item() for j in range(c.batch.lengths[b])]
        h = {"token": c.entropy[b, t].item(), "row": sum(own) / len(own), "batch": MEAN_ENTROPY}[cfg.entropy_scope]
        up, a, lp = cfg.positive_coef * math.exp(cfg.positive_entropy_sign * h), c.advantage(b), c.lp(b, t)
        pull = (0.0, 0.0)
        if c.batch.expert_mask[b, t]:
            term = add((-a, shaped(c, cfg.gamma, b, t)))
            weight = cfg.sft_coef * math.exp(cfg.sft_entropy_sign * h) / c.counts.expert
            pull = (-weight * lp, -weight)
        elif cfg.rollouts == "adv":
            term = add((up if a > 0 else 1.0, oracles.surrogate(c, cfg, b, t, a)))
        else:
            v = oracles.importance(c, cfg, b, t)
            term = add((-v * (up if c.batch.rewards[b] == 1 else -1.0), (lp, 1.0)))
        terms[b, t] = add((1, oracles.regularised(c, cfg, of_whole_rows(c, cfg, b), term, b, t)), (1, pull))
    return terms


def prefix_rft_terms(c: Case, cfg) -> Terms:
    """Only the kept prefix tokens have an advantage; ratio and clip as on policy tokens."""
    prefix = c.tokens(expert=True)
    pools = [[place for place in prefix if place[0] == b] for b in range(len(c.batch.lengths))]
    kept = set()
    for pool in pools if cfg.keep_scope == "row" else [prefix]:
        count = math.ceil(round(cfg.keep_share * len(pool), 9))
        kept |= set(sorted(pool, key=lambda place: -c.entropy[place].item())[:count])
    terms = {}
    for b, t in c.tokens():
        of_prefix = c.batch.token_advantages[b, t].item() if (b, t) in kept else 0.0
        a = of_prefix if (b, t) in prefix else c.advantage(b)
        term = oracles.surrogate(c, cfg, b, t, a, cfg.dual_clip)
        terms[b, t] = oracles.regularised(c, cfg, of_whole_rows(c, cfg, b), term, b, t)
    return terms


def uft_terms(c: Case, cfg) -> Terms:
    """Hint tokens have likelihood only, policy tokens GRPO and KL only; each its own mean."""
    over = c.counts.expert if cfg.hint_norm == "mean" else max(c.counts.rows, 1)
    return policy_terms(c, cfg) | oracles.likelihood_terms(c, cfg.hint_coef / max(over, 1))


def chord_terms(c: Case, cfg, mu: float) -> Terms:
    """(1 - mu) GRPO + mu SFT; phi weights a token by p (1 - p), constant, at most 1 / 4."""
    terms = {place: add((1 - mu, term)) for place, term in policy_terms(c, cfg).items()}
    for place, term in oracles.likelihood_terms(c, 1.0).items():
        p = math.exp(c.lp(*place))
        terms[place] = add((mu * (p * (1 - p) if cfg.phi else 1.0) / c.counts.expert, term))
    return terms


def hpt_terms(c: Case, cfg) -> Terms:
    """One vote a problem: GRPO over its own rows, a token mean for the traces, by shares."""
    groups, traces = c.counts.rows / cfg.group_size, c.counts.expert_rows
    online, imitated = (x / max(groups + traces, 1) for x in (groups, traces))
    terms = {place: add((1 - imitated, term)) for place, term in policy_terms(c, cfg).items()}
    assert online + imitated == pytest.approx(1) or groups + traces < 1
    return terms | oracles.likelihood_terms(c, imitated * cfg.sft_coef / max(c.counts.expert, 1))


def trapo_terms(c: Case, cfg) -> Terms:
    """-p / max(p, alpha), the maximum constant: its slope is min(1, p / alpha) whatever A is.

    A row that is not taught has no prefix tokens as far as the loss goes.
    """
    terms, alpha = {}, cfg.trsft_alpha
    for b, t in c.tokens():
        p, w = math.exp(c.lp(b, t)), of_whole_rows(c, cfg, b)
        if not c.batch.expert_mask[b, t]:
            terms[b, t] = oracles.regularised(c, cfg, w, oracles.surrogate(c, cfg, b, t, c.advantage(b)), b, t)
        elif c.batch.taught[b]:
            terms[b, t] = add((-w * cfg.sft_coef, (p / max(p, alpha), min(1.0, p / alpha))))
    return terms


def sft_terms(c: Case, cfg) -> Terms:
    """One mean of -log p over the expert's tokens."""
    return oracles.likelihood_terms(c, 1 / max(c.counts.expert, 1))


def iw_sft_terms(c: Case, cfg) -> Terms:
    """The default weight: exp(mean(log p - log ref)) of the trace. The others: test_iw_sft.py."""
    terms = {}
    for b, n in enumerate(c.batch.lengths):
        own = [t for t in range(n) if c.batch.expert_mask[b, t]]
        mean = sum(c.lp(b, t) - c.ref_logprobs[b, t].item() for t in own) / max(len(own), 1)
        weight = min(math.exp(cfg.power * mean), cfg.weight_high) / c.counts.expert
        terms |= {(b, t): (-weight * c.lp(b, t), -weight) for t in own}
    return terms


MEAN_ENTROPY = 0.7  # of the update that a case is a part of
LOOPS = {name: policy_terms for name in ("grpo", "dapo", "bread", "relift", "bridge")}
LOOPS |= {"luffy": luffy_terms, "srft": srft_terms, "prefix_rft": prefix_rft_terms, "uft": uft_terms}
LOOPS |= {"chord": chord_terms, "hpt": hpt_terms, "trapo": trapo_terms, "sft": sft_terms, "iw_sft": iw_sft_terms}
MODULES = {m.name: importlib.import_module(m.name) for m in METHODS}
PLAIN = {"kl_coef": 0.0, "entropy_coef": 0.0}


def run(name: str, c: Case, mu: float = 0.5, **flags) -> torch.Tensor:
    """The loss of a method without KL and entropy bonus, unless the flags ask for them."""
    rest = {"chord": (mu,), "srft": (MEAN_ENTROPY,)}.get(name, ())
    value, metrics = loss(MODULES[name], c, settings(MODULES[name], **PLAIN | flags), *rest)
    assert metrics["loss"] == value and not any(metric.requires_grad for metric in metrics.values())
    return value


def check(name: str, c: Case, mu: float = 0.5, **flags) -> torch.Tensor:
    """Compare it with the scalar loop."""
    rest = (mu,) if name == "chord" else ()
    value = run(name, c, mu, **flags)
    agree(c, value, LOOPS[name](c, settings(MODULES[name], **PLAIN | flags), *rest))
    return value


# Value and gradient -------------------------------------------------------------------------------
FLAGS = {
    "dapo": [{}],
    "bread": [{}],
    "relift": [{}],
    "bridge": [{}],
    "luffy": [{"gamma": 0.1}, {"gamma": 0.5}, {"gamma": -1.0}],
    "srft": [
        {},
        {"rollouts": "pm1", "gamma": -1.0},
        {"entropy_scope": "token", "sft_entropy_sign": 1, "positive_entropy_sign": -1},
        {"entropy_scope": "batch"},
        {"sft_entropy_sign": 0, "positive_entropy_sign": 0},
    ],
    "prefix_rft": [
        {"dual_clip": 3.0, "keep_share": 0.2, "keep_scope": "row"},
        {"dual_clip": 0.0, "keep_share": 1.0, "keep_scope": "row"},
        {"dual_clip": 1.5, "keep_share": 0.5, "keep_scope": "microbatch"},
        {"dual_clip": 1.2, "keep_share": 0.0, "keep_scope": "row"},
    ],
    "uft": [
        {"hint_coef": 0.001, "hint_norm": "mean"},
        {"hint_coef": 0.7, "hint_norm": "sum"},
        {"hint_coef": 0.0, "hint_norm": "mean"},
    ],
    "chord": [{"mu": 0.3}, {"mu": 0.9, "phi": True}, {"mu": 0.0}, {"mu": 1.0, "phi": True}],
    "hpt": [{"sft_coef": 1.0}, {"sft_coef": 0.3}, {"sft_coef": 0.0}],
    "trapo": [
        {"sft_coef": 1.0, "trsft_alpha": 0.1},
        {"sft_coef": 0.5, "trsft_alpha": 1.0},
        {"sft_coef": 2.0, "trsft_alpha": 1e-9},
    ],
}
ROWS = [("mixed", kind) for kind in ("mixed", "extreme", "right", "wrong")]
ROWS += [("no expert", "mixed"), ("only expert", "mixed")]
CLIPS = [((-1, -1), (0.0, 0.0)), ((0.2, 0.28), (0.3, 0.1))]


@pytest.mark.parametrize(("rows", "kind"), ROWS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("clip", "extra"), CLIPS)
@pytest.mark.parametrize(("name", "flags"), [(name, flags) for name, many in FLAGS.items() for flags in many])
def test_loss_and_gradient(name, flags, rows, kind, norm, clip, extra):
    """Against the loop of the method: without clip, KL and entropy bonus, and with all of them."""
    shared = {"loss_norm": norm, "kl_coef": extra[0], "entropy_coef": extra[1]}
    check(name, ragged(rows, kind), **shared | dict(zip(("clip_low", "clip_high"), clip, strict=True)) | flags)


ONLINE = ["grpo", *FLAGS]  # what has rows of the policy, and a policy that made them


def test_every_method_is_here():
    """A new method gets a loop, and flags to be checked with."""
    assert set(LOOPS) == set(MODULES) == {*ONLINE, "sft", "iw_sft"}


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("cap", [0.0, 1.2, 100.0])
def test_the_sampler_weighs_policy_tokens_alone(name, cap):
    """The cap, no cap and no weights; what the sampler says of expert tokens is nowhere."""
    c = ragged()
    value = check(name, c, tis_cap=cap, kl_coef=0.1)
    bad = change(c, sampler_logprobs=torch.where(c.batch.policy_mask, c.batch.sampler_logprobs, math.nan))
    again = run(name, bad, tis_cap=cap, kl_coef=0.1)
    assert again == value and torch.equal(slope(again, bad), slope(value, c))
    louder = change(c, sampler_logprobs=torch.where(c.batch.policy_mask, c.batch.sampler_logprobs + 0.1, 0.0))
    other = slope(run(name, louder, tis_cap=cap, kl_coef=0.1), louder)
    assert torch.equal(other[c.batch.expert_mask], slope(value, c)[c.batch.expert_mask])
    assert torch.equal(other, slope(value, c)) == (cap == 0)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("stored", [(True, False, False, True), (False, True, True, False)])
def test_rows_with_and_without_old_logprobs(name, stored):
    """Each row by itself: where none are stored the ratio is exactly 1, with its gradient."""
    c, every, none = ragged(stored=stored), ragged(), ragged(stored=(False,) * 4)
    equal = change(every, old_logprobs=every.logprobs.detach())  # stored, and no different from the policy
    flags = {"clip_low": 0.1, "clip_high": 0.1, "kl_coef": 0.1}
    found, with_old, without, same = (slope(run(name, x, **flags), x) for x in (c, every, none, equal))
    kept = torch.tensor(stored)
    assert torch.equal(found[kept], with_old[kept]) and torch.equal(found[~kept], without[~kept])
    assert torch.equal(without, same) and not torch.allclose(with_old, without)
    check(name, c, **flags)


def by_hand(name: str) -> Case:
    """Three rows in float32 as one would type them: the policy's, a prefix, the expert's."""
    problem = common.Problem("p", "1 + 1 =", [3, 4], "2", [5, 6, 7, 0])
    rows = [
        common.Rollout(problem, [5, 8, 0], 0, [-0.5, -1.0, -0.1], reward=1.0, advantage=0.7),
        common.Rollout(problem, [5, 6, 9, 9, 0], 2, [-2.0, -0.3, -0.4], advantage=-0.2, prefix_advantage=0.3),
        common.Rollout(problem, [5, 6, 7, 0], 4, reward=1.0, advantage=-0.5, prefix_advantage=0.0),
    ]
    batch = common.make_batch(rows)
    logprobs = [[-0.4, -1.1, -0.2, 0.0, 0.0], [-0.9, -0.1, -1.8, -0.6, -0.4], [-1.0, -0.7, -0.3, -2.0, 0.0]]
    entropy = [[0.9, 0.5, 0.3, 0.0, 0.0], [0.2, 0.8, 0.4, 0.1, 0.6], [0.7, 0.2, 0.5, 0.3, 0.0]]
    logprobs, entropy = torch.tensor(logprobs, requires_grad=True), torch.tensor(entropy)
    reference = torch.where(batch.completion_mask, logprobs.detach() - 0.2, 0.0) if name in ("uft", "iw_sft") else None
    counts = common.Counts(policy=6, expert=6, rows=2, expert_rows=1)
    return Case(batch, logprobs, entropy, reference, counts)


@pytest.mark.parametrize("name", list(MODULES))
def test_by_hand(name, world):
    """From a Python prompt: the Config as it is, make_batch of three rows, tensors, counts."""
    torch.set_default_dtype(torch.float32)  # the fixture puts back what was there before it
    c, cfg, rest = by_hand(name), MODULES[name].Config(), (0.3,) if name == "chord" else ()
    value, metrics = MODULES[name].loss_fn(cfg, c.batch, c.logprobs, c.entropy, c.ref_logprobs, c.counts, *rest)
    agree(c, value, LOOPS[name](c, cfg, *rest), rel=1e-5)
    assert metrics["loss"] == value and value.dtype == torch.float32 and value.item() != 0
    assert c.counts == common.count(c.batch.rollouts, world)


# What each method is ------------------------------------------------------------------------------
def test_luffy_coefficient_peaks_at_gamma():
    """At most A / 4, reached at p = gamma; it beats plain p below sqrt(gamma) - gamma."""
    c = change(ragged("only expert"), advantages=torch.ones(4))
    rows = c.counts.rows + c.counts.expert_rows

    def slope_at(p: float, gamma: float = 0.1) -> float:
        there = change(c, logprobs=torch.full((4, T), math.log(p)))
        return -slope(run("luffy", there, gamma=gamma), there)[0, 0].item() * rows * oracles.MAX

    for p, wanted in [(1e-3, 0.0098), (0.1, 0.25), (0.5, 0.139), (1.0, 0.0826)]:
        assert slope_at(p) == pytest.approx(wanted, abs=2e-4)
    assert slope_at(math.sqrt(0.1) - 0.1) == pytest.approx(slope_at(math.sqrt(0.1) - 0.1, -1.0))


def test_luffy_limits_and_what_does_not_matter():
    """gamma -> infinity, times gamma, is plain p; gamma -> 0, over gamma, is 1 / p."""
    c = ragged("only expert")
    slopes = {gamma: slope(run("luffy", c, gamma=gamma), c) for gamma in (1e6, 1e-9, -1.0)}
    assert torch.allclose(slopes[1e6] * 1e6, slopes[-1.0], rtol=1e-4)
    assert torch.allclose(slopes[1e-9] / 1e-9 * c.logprobs.detach().exp() ** 2, slopes[-1.0], rtol=1e-4)
    moved = change(c, old_logprobs=c.batch.old_logprobs + 3)
    assert run("luffy", moved) == run("luffy", c)
    rewards = torch.tensor([[1.0] + [0.0] * 7])  # 2.7.6
    assert common.group_advantages(rewards, False)[0].tolist() == [7 / 8] + [-1 / 8] * 7


def test_srft_weights():
    """0.5 and 0.1 without uncertainty, 0.184 and 0.272 at one nat; pm1 has no advantage."""
    for nats, sft_weight, up in ((0.0, 0.5, 0.1), (1.0, 0.184, 0.272)):
        c = ragged("no expert", "right")
        c = change(c, entropy=torch.full_like(c.entropy, nats))
        mask, v = c.batch.completion_mask, common.importance_weights(c.batch, c.batch.old_logprobs, 2.0)
        for advantages in (c.batch.advantages, c.batch.advantages + 5):
            c = change(c, advantages=advantages)
            gradient = slope(run("srft", c, rollouts="pm1"), c)
            assert torch.allclose(gradient[mask], -(up * v / (c.counts.rows * oracles.MAX))[mask], rtol=2e-3)
        c = ragged("only expert", "right")
        c = change(c, entropy=torch.full_like(c.entropy, nats))
        gradient = slope(run("srft", c), c)[c.batch.expert_mask] * c.counts.expert
        assert torch.allclose(gradient, torch.tensor(-sft_weight), rtol=2e-3)


def test_prefix_rft_is_luffy_unshaped_on_the_prefix():
    """With pi_old = 1 there, no clip and no filter; keep 0 leaves the prefix no gradient."""
    c = ragged()
    expert = c.batch.expert_mask
    same = c.batch.advantages[:, None].expand(4, T)
    c = change(c, old_logprobs=torch.where(expert, 0.0, c.batch.old_logprobs), token_advantages=same)
    flags = {"loss_norm": "constant", "clip_low": -1, "clip_high": -1}
    one = slope(run("prefix_rft", c, dual_clip=0.0, keep_share=1.0, **flags), c)
    assert torch.allclose(one, slope(run("luffy", c, gamma=-1.0, **flags), c)) and (one[expert] != 0).all()
    assert (slope(run("prefix_rft", c, keep_share=0.0), c)[expert] == 0).all()


def test_chord_schedule():
    """Up to the peak over the warm-up, from the next step a cosine down to the valley."""
    mu = [chord.sft_share(step, 0.9, 0.05, 10, 100) for step in range(200)]
    assert mu[0] == pytest.approx(0.09) and mu[9] == pytest.approx(0.9)
    assert mu[10] == pytest.approx(0.05 + 0.85 / 2 * (1 + math.cos(math.pi / 100)))
    assert mu[59] == pytest.approx((0.9 + 0.05) / 2) and mu[109] == mu[199] == pytest.approx(0.05)
    assert all(a > b for a, b in itertools.pairwise(mu[9:110]))
    assert chord.sft_share(199, 0.9, 0.05, 0, 200) == 0.05
    assert chord.sft_share(5, 0.1, 0.1, 0, 200) == pytest.approx(0.1)


def test_uft_hint_alone():
    """Equal rewards leave the hint's gradient only; without the term it has none."""
    c = ragged(kind="right")
    expert, gradient = c.batch.expert_mask, slope(run("uft", c, hint_coef=0.5), c)
    assert (gradient[~expert] == 0).all()
    assert torch.allclose(gradient[expert], torch.tensor(-0.5 / c.counts.expert))
    c = ragged()
    assert (slope(run("uft", c, hint_coef=0.0), c)[expert] == 0).all()


def test_trapo_prefixes():
    """The first micro-group is plain; a later one has its share while the mean so far is low."""
    shares, thresholds = (0, 0.2, 0.5, 1), (-1, 0.5, 0.7, 0.9)
    rewards = [[0.0] * n for n in (0, 4, 6, 7)]
    lengths = [trapo.prefix_tokens(100, *given) for given in zip(shares, thresholds, rewards, strict=True)]
    assert lengths == [0, 20, 50, 100]
    assert trapo.prefix_tokens(100, 0.5, 0.5, [1.0, 0.0]) == 0
    assert trapo.prefix_tokens(100, 0.5, 0.51, [1.0, 0.0]) == 50
    assert trapo.prefix_tokens(100, 1.0, 2.0, [1.0]) == 100 and trapo.prefix_tokens(100, 0.5, 2.0, []) == 0


def test_trapo_thresholds_are_the_scripts_sums():
    """The script gives a prefix below 2 of 4, below 4 of 6 and below 7 of 7 right rows."""
    given = trapo.Config().thresholds
    for stage, (rows, enough) in enumerate(((4, 2), (6, 4), (7, 7)), 1):
        for right in range(rows + 1):
            rewards = [1.0] * right + [0.0] * (rows - right)
            assert bool(trapo.prefix_tokens(100, 0.5, given[stage], rewards)) == (right < enough), (rows, right)


@pytest.mark.parametrize("norm", NORMS)
def test_trapo_teaches_what_is_marked(norm):
    """A prefix that another row teaches has no gradient; w counts it all the same."""
    for taught in ((True, True, False, True), (True, False, True, True)):
        c = change(ragged(), taught=torch.tensor(taught))
        gradient = slope(check("trapo", c, loss_norm=norm, kl_coef=0.1), c)
        marked = c.batch.taught[:, None].expand(4, T)[c.batch.expert_mask]
        assert torch.equal(gradient[c.batch.expert_mask] != 0, marked) and marked.any() and not marked.all()


def test_trapo_marks_the_first_row_of_each_prefix():
    """Of rows with the same prefix the first; rows without one have nothing to teach either way."""
    problem = common.Problem("p", "", [0], "", None)
    group = [common.Rollout(problem, [1] * 9, n) for n in (0, 0, 4, 4, 6, 9, 9)]
    trapo.mark_taught(group)
    assert [r.taught for r in group if r.num_expert_tokens] == [True, False, True, True, False]


@pytest.mark.parametrize("kind", ["mixed", "extreme"])
@pytest.mark.parametrize("bonus", [0.0, 0.001, 0.5])
def test_relift_sft_step(kind, bonus):
    """One mean over all tokens of the step, of which this micro-batch has some."""
    c, num_tokens = ragged("only expert", kind), 40
    counts, cfg = common.Counts(0, num_tokens, 0, 9), settings(relift, sft_entropy_coef=bonus)
    value, metrics = relift.sft_loss_fn(cfg, c.batch, c.logprobs, c.entropy, counts)
    terms = {}
    for b, t in c.tokens():
        terms[b, t] = (-(c.lp(b, t) + bonus * c.entropy[b, t].item()) / num_tokens, -1 / num_tokens)
    agree(c, value, terms)
    assert metrics["sft_loss"] == value and sum(oracles.LENGTHS) < num_tokens


def test_relift_buffer():
    """Newest first: what just failed, in the step's order, before what waits; never too many."""
    push = relift.push_and_pop
    assert push([], ["a", "b"], 3, "newest") == (["a", "b"], [])
    assert push(["a", "b"], ["c", "d"], 3, "newest") == (["b"], ["c", "d", "a"])
    assert push(["a", "b"], ["c", "d"], 3, "oldest") == (["c"], ["d", "a", "b"])
    old, new = [f"old{i}" for i in range(100)], [f"new{i}" for i in range(50)]
    assert push(old, new, 128, "newest") == (old[78:], new + old[:78])  # 3.7.6
    assert push(["a"], ["b"], -1, "newest") == ([], [])  # the official switch for pure RL, 3.7.1
    assert push(["a"], ["b"], 0, "newest") == ([], []) and push(["a"], [], 1, "newest") == ([], ["a"])


# What every method has ----------------------------------------------------------------------------
LIVE = {  # flags of a float each, and a value at which twice as much is something else
    "luffy": {"gamma": 0.1},
    "srft": {"positive_coef": 0.1, "sft_coef": 0.5, "gamma": 0.1},
    "prefix_rft": {"dual_clip": 1.1, "keep_share": 0.5},
    "uft": {"hint_coef": 0.001},
    "chord": {"mu": 0.3},
    "hpt": {"sft_coef": 0.3},
    "trapo": {"sft_coef": 0.3, "trsft_alpha": 0.3},
}
SHARED = {"kl_coef": 0.1, "tis_cap": 1.0, "clip_low": 0.2, "clip_high": 0.2}


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name in ONLINE for flag in SHARED | LIVE.get(name, {})])
def test_every_float_is_live(name, flag):
    """Doubled, it changes the gradient."""
    c, own = ragged(), LIVE.get(name, {})
    flags, value = {"clip_low": -1.0, "clip_high": -1.0, "kl_coef": 0.1} | own, (SHARED | own)[flag]
    one, two = (slope(run(name, c, **flags | {flag: x}), c) for x in (value, 2 * value))
    assert not torch.allclose(one, two, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ONLINE)
def test_entropy_bonus_is_live(name):
    """It has its gradient through the entropy, on every token that RL trains."""
    c = ragged()
    c = change(c, entropy=c.entropy.requires_grad_())
    one, two = (torch.autograd.grad(run(name, c, entropy_coef=x), c.entropy)[0] for x in (0.1, 0.2))
    both = name in ("luffy", "srft", "prefix_rft")
    trained = c.batch.completion_mask if both else c.batch.policy_mask
    assert (one[trained] < 0).all() and (one[~trained] == 0).all() and torch.allclose(two, 2 * one)


def test_relift_sft_entropy_bonus_is_live():
    """The same in the SFT step, on the expert's tokens."""
    c = ragged()
    c = change(c, entropy=c.entropy.requires_grad_())
    values = [
        relift.sft_loss_fn(settings(relift, sft_entropy_coef=x), c.batch, c.logprobs, c.entropy, c.counts)[0]
        for x in (0.1, 0.2)
    ]
    one, two = (torch.autograd.grad(value, c.entropy)[0] for value in values)
    expert = c.batch.expert_mask
    assert (one[expert] < 0).all() and (one[~expert] == 0).all() and torch.allclose(two, 2 * one)


@pytest.mark.parametrize("name", ONLINE)
def test_garbage_and_padding_change_nothing(name):
    """NaN and infinity outside the rows; a wider batch; rows in another order."""
    flags = {"clip_low": -1.0, "clip_high": -1.0, "kl_coef": 0.1} | LIVE.get(name, {})
    c = ragged()
    mask, value = c.batch.completion_mask, run(name, c, **flags)
    wanted = slope(value, c)
    assert wanted.isfinite().all() and wanted.any()
    for junk in (math.nan, math.inf, -math.inf):
        values = {"logprobs": c.logprobs.detach(), "ref_logprobs": c.ref_logprobs}
        values |= {"old_logprobs": c.batch.old_logprobs, "sampler_logprobs": c.batch.sampler_logprobs}
        worse = change(c, **{field: torch.where(mask, x, junk) for field, x in values.items()})
        again = run(name, worse, **flags)
        assert again == value and torch.equal(slope(again, worse), wanted)
    order = [2, 0, 3, 1]
    wide = oracles.rearrange(c, order, 9)
    found = slope(run(name, wide, **flags), wide)
    assert torch.allclose(found[:, :T], wanted[order], rtol=1e-9) and (found[:, T:] == 0).all()


@pytest.mark.parametrize("name", list(MODULES))
def test_a_loss_writes_nothing_in_place(name):
    """What it is given is as it was: the next one that reads it counts and weighs the same."""
    c = ragged(stored=(True, False, False, True))
    given = {k: v for k, v in vars(c.batch).items() if isinstance(v, torch.Tensor)}
    given |= {"logprobs": c.logprobs, "entropy": c.entropy, "ref_logprobs": c.ref_logprobs}
    before = {k: v.detach().nan_to_num(7.0).clone() for k, v in given.items()}
    rest = {"chord": (0.3,), "srft": (MEAN_ENTROPY,)}.get(name, ())
    flags = {"kl_coef": 0.1, "entropy_coef": 0.1} if name in ONLINE else {}
    loss(MODULES[name], c, settings(MODULES[name], **flags), *rest)
    assert all(torch.equal(before[k], v.detach().nan_to_num(7.0)) for k, v in given.items())


@pytest.mark.parametrize("name", list(MODULES))
def test_a_filler_has_no_weight(name):
    """A rank without rows runs through loss and backward with a row that adds exactly nothing."""
    filler = common.Rollout(common.Problem("filler", "", [0], "", None), [0])
    one = torch.full((1, 1), -0.7)
    batch, counts = common.make_batch([filler], filler=True), common.Counts(9, 9, 3, 1)
    c = Case(batch, one.clone().requires_grad_(), -one, one, counts)
    rest, flags = (0.3,) if name == "chord" else (), {"kl_coef": 0.1, "entropy_coef": 0.1} if name in ONLINE else {}
    value, metrics = loss(MODULES[name], c, settings(MODULES[name], **flags), *rest)
    assert value == 0 and (slope(value, c) == 0).all() and all(metric == 0 for metric in metrics.values())


def test_without_expert_tokens_all_are_grpo():
    """Bit for bit, with the flags that make a method's own term 1, whatever the others are."""
    c = ragged("no expert")
    flags = {"loss_norm": "token", "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.1, "entropy_coef": 0.1}
    wanted = slope(run("grpo", c, **flags), c)
    for name in ONLINE:
        own = {"positive_coef": 1.0, "positive_entropy_sign": 0} if name == "srft" else {}
        own |= {"mu": 0.0} if name == "chord" else {}
        own |= {"dual_clip": 0.0} if name == "prefix_rft" else {}
        assert torch.equal(slope(run(name, c, **flags | own), c), wanted), name


@pytest.mark.parametrize("name", ["trapo", "uft", "grpo"])
def test_metrics_of_the_policy_are_means_over_its_tokens(name):
    """Entropy and clip fraction of a step are not thinned by expert tokens."""
    c = ragged()
    cfg = settings(MODULES[name], clip_low=0.0, clip_high=0.0, **PLAIN)
    c = change(c, counts=common.count(c.batch.rollouts, common.World(0, 1, torch.device("cpu"))))
    _, metrics = loss(MODULES[name], c, cfg)
    places = c.tokens(expert=False)
    assert metrics["entropy"].item() == pytest.approx(sum(c.entropy[place].item() for place in places) / len(places))
    assert 0 < metrics["clip_fraction"].item() <= 1
