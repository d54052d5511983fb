"""iw_sft.py's weights and loss against scalar loops, what each weighting is at its limits, and the
draw by scores."""

import json
import math
import shutil

import oracles
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, byte_tokenizer, problem, random_model, read_metrics, train
from one_step import expert_problems, one_step
from oracles import LENGTHS, Case, agree, change, loss, ragged, rearrange, settings, share, slope
from safetensors.torch import load_file
from torch import Tensor

import common
import iw_sft
import sft
from core.sampler import TransformersEngine

WEIGHTS = ["iw", "iw_step", "dft", "trsft", "chord_phi", "pear"]
FLAGS = {"power": 1.0, "weight_high": 16.0, "step_low": 0.2, "step_high": 1.8, "trsft_alpha": 0.1, "pear_gamma": 0.999}
OTHERS = {"power": 3.0, "weight_high": 1.5, "step_high": 1.2, "trsft_alpha": 0.5, "pear_gamma": 0.2}
CASES = [  # flags of main, seeds of the models behind q and reference
    ({}, (0, 1)),
    ({"q": "ema"}, (2, 1)),
    ({"normalize": True}, (0, 1)),
    ({"loss_norm": "sequence"}, (0, 1)),
    ({"q": "reference"}, (1, 1)),
]
precise = pytest.mark.usefixtures("double")


@pytest.fixture
def double():
    """Constants in double precision, so that value and gradient can be compared to 1e-9."""
    with oracles.float64():
        yield


# The weights --------------------------------------------------------------------------------------
def draw(rows: str = "only expert", spread: float = 1.0) -> tuple[Case, Tensor]:
    """A case and log q; log-ratios of both signs, beyond PEAR's bounds too."""
    c, noise = ragged(rows), torch.Generator().manual_seed(1)
    lp = c.logprobs.detach()
    reference, q = (lp + spread * torch.randn(lp.shape, generator=noise, dtype=lp.dtype) for _ in range(2))
    return change(c, ref_logprobs=reference), q


def flags(weight: str, **changes: object) -> object:
    """A Config in which q is what the caller gives."""
    return settings(iw_sft, weight=weight, **{"q": "ema"} | changes)


def weigh(c: Case, log_q: Tensor | None, weight: str, **changes: object) -> Tensor:
    """The weights of a case, (B, T)."""
    return iw_sft.weigh(flags(weight, **changes), c.batch, c.logprobs, log_q, c.ref_logprobs)


def scalar_weights(c: Case, q: Tensor, cfg: object) -> dict[tuple[int, int], float]:
    """The table of the docstring, one token at a time."""
    out = {}
    for b, t in c.tokens(expert=True):
        own = [j for row, j in c.tokens(expert=True) if row == b]
        ratio = {j: (q[b, j] - c.ref_logprobs[b, j]).item() for j in own}
        p, mean = math.exp(c.lp(b, t)), sum(ratio.values()) / len(own)
        later = [min(max(c.lp(b, j) - c.ref_logprobs[b, j].item(), -0.08), 0.3) for j in own if j > t]
        out[b, t] = {
            "iw": min(max(math.exp(cfg.power * mean), 0.0), cfg.weight_high),
            "iw_step": min(max(math.exp(ratio[t]), cfg.step_low), cfg.step_high),
            "dft": p,
            "trsft": min(1.0, p / cfg.trsft_alpha),
            "chord_phi": p * (1 - p),
            "pear": math.exp(min(max(len(later) * math.log(cfg.pear_gamma) + sum(later), -10.0), 5.0)),
        }[cfg.weight]
    return out


def both(c: Case, q: Tensor | None, cfg: object) -> tuple[Tensor, Tensor]:
    """(loss, gradient)."""
    value, _ = loss(iw_sft, c, cfg, q)
    return value.detach(), slope(value, c)


def equal(a, b) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@precise
@pytest.mark.parametrize("rows", ["only expert", "mixed"])
@pytest.mark.parametrize("norm", ["token", "sequence"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("changes", [{}, OTHERS])
def test_weights_loss_and_gradient(weight, norm, changes, rows):
    """The slope of log p[t] is the weight, constant, times the norm and the scale."""
    (c, q), scale = draw(rows), 1.7
    cfg = flags(weight, loss_norm=norm, **changes)
    found, wanted = weigh(c, q, weight, **changes), scalar_weights(c, q, cfg)
    assert not found.requires_grad and (found[~c.batch.expert_mask] == 0).all()
    assert {place: found[place].item() for place in wanted} == pytest.approx(wanted, rel=1e-12)
    terms, norms = {}, {}
    for b, t in wanted:
        length = sum(row == b for row, _ in wanted)
        norms[b, t] = share(cfg, length, c.counts.expert, c.counts.rows + c.counts.expert_rows)
        terms[b, t] = oracles.add((-scale * norms[b, t] * wanted[b, t], (c.lp(b, t), 1.0)))
    value, metrics = loss(iw_sft, c, cfg, q, scale)
    agree(c, value, terms)
    means = {
        "weight": scale * sum(norms[place] * wanted[place] for place in wanted),
        "weight_max": scale * max(wanted.values()),
        "nll": -sum(norms[place] * c.lp(*place) for place in wanted),
        "entropy": sum(c.entropy[place].item() for place in wanted) / c.counts.expert,
        "loss": value.item(),
    }
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(means, rel=1e-9)


@precise
@pytest.mark.parametrize("weight", ["iw", "iw_step"])
def test_whose_q_it_is(weight):
    """q = policy is log p itself, constant; q = reference is log ref."""
    c, q = draw()
    assert torch.equal(weigh(c, q, weight, q="policy"), weigh(c, c.logprobs.detach(), weight))
    assert torch.equal(weigh(c, q, weight, q="reference"), c.batch.expert_mask.double())
    assert not torch.equal(weigh(c, q, weight, q="policy"), weigh(c, q, weight))
    assert not weigh(c, None, weight, q="policy").requires_grad


@precise
def test_q_equal_to_the_reference_is_sft():
    """As SFT: also q = policy at step 0, bounds of [1, 1], PEAR at gamma 1, TrSFT at alpha -> 0."""
    c, q = draw()
    lp, plain = c.logprobs.detach(), settings(sft)
    start = change(c, ref_logprobs=lp)
    wanted, _ = loss(sft, c, plain)
    wanted = wanted.detach(), slope(wanted, c)
    for case, given, weight, changes in (
        (c, c.ref_logprobs, "iw", {}),
        (c, None, "iw", {"q": "reference"}),
        (start, None, "iw", {"q": "policy", "power": 7.0}),
        (c, c.ref_logprobs, "iw_step", {}),
        (c, q, "iw_step", {"step_low": 1.0, "step_high": 1.0}),
        (start, None, "pear", {"pear_gamma": 1.0}),
        (change(c, ref_logprobs=None), None, "trsft", {"trsft_alpha": 1e-9}),
    ):
        assert torch.equal(weigh(case, given, weight, **changes), c.batch.expert_mask.double())
        assert equal(both(case, given, flags(weight, **changes)), wanted)
    assert not equal(both(c, lp, flags("iw")), wanted)


@precise
@pytest.mark.parametrize("weight", WEIGHTS)
def test_padding_permutation_garbage_and_micro_batches(weight):
    """None of them changes a weight, a loss or a gradient."""
    c, q = draw()
    found, order, mask = weigh(c, q, weight), [2, 0, 3, 1], c.batch.expert_mask
    assert torch.equal(weigh(rearrange(c, order), q[order], weight), found[order])
    wide = weigh(rearrange(c, [0, 1, 2, 3], 9), F.pad(q, (0, 9)), weight)
    assert torch.equal(wide[:, :7], found) and (wide[:, 7:] == 0).all()
    for junk in (1.0, math.nan, math.inf, -math.inf):
        lp, other, ref = (torch.where(mask, x, junk) for x in (c.logprobs.detach(), q, c.ref_logprobs))
        bad = change(c, logprobs=lp, ref_logprobs=ref)
        assert torch.equal(weigh(bad, other, weight), found)
        assert equal(both(bad, other, flags(weight)), both(c, q, flags(weight)))
    for norm in ("token", "sequence"):
        cfg = flags(weight, loss_norm=norm)
        alone = [both(rearrange(c, [b]), q[[b]], cfg) for b in range(len(LENGTHS))]
        value, gradient = both(c, q, cfg)
        assert sum(part for part, _ in alone).item() == pytest.approx(value.item(), rel=1e-12)
        assert torch.allclose(torch.cat([part for _, part in alone]), gradient, rtol=1e-12)


def traces(logprobs: Tensor, reference: Tensor) -> Case:
    """Expert rows of equal length with these log-probabilities."""
    rows, length = logprobs.shape
    batch = common.make_batch([common.Rollout(problem("p"), [1] * length, length) for _ in range(rows)])
    return Case(batch, logprobs, torch.zeros_like(logprobs), reference, common.Counts(0, rows * length, 0, rows))


@precise
def test_extremes():
    """Infinite and opposite log-ratios stay within the bounds; PEAR's product does so from afar."""
    lp = torch.full((3, 2), -1.0)
    c, d = traces(lp, lp), torch.tensor([[10.0, 10.0], [-math.inf, 0.0], [400.0, -400.0]])
    assert weigh(c, lp + d, "iw").tolist() == [[16.0, 16.0], [0.0, 0.0], [1.0, 1.0]]
    assert weigh(c, lp + d, "iw_step")[1].tolist() == [0.2, 1.0]
    long = torch.zeros(1, 200)
    up = weigh(traces(long, long - 9), None, "pear", pear_gamma=1.0)[0]
    down = weigh(traces(long - 9, long), None, "pear")[0]
    assert up[0] == pytest.approx(math.exp(5)) and down[0] == pytest.approx(math.exp(-10)) and up[-1] == down[-1] == 1
    assert up[-2].item() == pytest.approx(math.exp(0.3)) and down[-2].item() == pytest.approx(0.999 * math.exp(-0.08))


@precise
def test_dft_is_the_gradient_of_p():
    """Weight p on log p has the slope of p; so has TrSFT at alpha 1; p (1 - p) is at most 1 / 4."""
    c, _ = draw()
    lp = c.logprobs.detach().clone()
    lp[0, 0] = 0.0  # p = 1
    c = change(c, logprobs=lp, ref_logprobs=None)
    value = -torch.where(c.batch.expert_mask, c.logprobs.exp(), 0.0).sum() / c.counts.expert
    found = weigh(c, None, "dft")
    assert torch.allclose(both(c, None, flags("dft"))[1], slope(value, c), rtol=1e-12)
    assert found[0, 0] == 1 and torch.equal(found, weigh(c, None, "trsft", trsft_alpha=1.0))
    assert 0.2 < weigh(c, None, "chord_phi").max() <= 0.25


@precise
@pytest.mark.parametrize("flag", FLAGS)
def test_every_float_is_live(flag):
    """Halving it changes the gradient; its default is the paper's."""
    weight = {"power": "iw", "weight_high": "iw", "trsft_alpha": "trsft", "pear_gamma": "pear"}.get(flag, "iw_step")
    c, q = draw(spread=1.5)
    base = FLAGS | {"weight_high": 1.2, "trsft_alpha": 0.4}
    one, two = (both(c, q, flags(weight, **base | {flag: x}))[1] for x in (base[flag], base[flag] / 2))
    assert not torch.equal(one, two) and getattr(iw_sft.Config(), flag) == FLAGS[flag]


# Main ---------------------------------------------------------------------------------------------
def explicit(q_seed: int, ref_seed: int, normalize: bool = False, loss_norm: str = "token") -> tuple[Tensor, ...]:
    """Gradient of -sum w log p over four traces; w = q / ref, of models with these seeds."""
    policy, q, ref = (common.Policy(random_model("qwen2", seed, torch.float64)) for seed in (0, q_seed, ref_seed))
    rows = [common.expert_rollout(p, byte_tokenizer()) for p in expert_problems()]
    batch, value, total, count = common.make_batch(rows), 0.0, 0.0, sum(len(r.completion_ids) for r in rows)
    lp, lp_q, lp_ref = (common.token_logprobs(model, batch, 1.0)[0] for model in (policy, q, ref))
    for b, n in enumerate(batch.lengths):
        w = min(16.0, math.exp((lp_q[b, :n] - lp_ref[b, :n]).mean().item()))
        value = value - w * lp[b, :n].sum() / (count if loss_norm == "token" else 4 * n)
        total += w * n
    return torch.autograd.grad(value * (count / total if normalize else 1), list(policy.parameters()))


@pytest.mark.parametrize("budget", [1, 30, 10**6])
@pytest.mark.parametrize(("changes", "seeds"), CASES)
def test_main(changes, seeds, budget, world):
    """Models come in the order policy, reference, q; micro-batches do not change the gradient."""
    models = [random_model("qwen2", seed, torch.float64) for seed in (0, 1, 2)]
    found, _ = one_step(iw_sft, models, problems_per_step=4, tokens_per_microbatch=budget, **changes)
    wanted = explicit(*seeds, **{k: v for k, v in changes.items() if k != "q"})
    scale = max(w.abs().max() for w in wanted)
    assert all((f - w).abs().max() <= 1e-6 * scale for f, w in zip(found[0], wanted, strict=True))


@pytest.mark.parametrize(("q", "reference"), [("reference", 1), ("policy", 0)])
def test_main_is_sft_at_the_first_step(q, reference, world):
    """Bit for bit, with q = reference or with the policy still equal to it."""
    found, _ = one_step(iw_sft, [random_model("qwen2", seed) for seed in (0, reference)], problems_per_step=4, q=q)
    wanted, _ = one_step(sft, [random_model("qwen2")], problems_per_step=4)
    assert equal(found[0], wanted[0])


def test_ema_follows_the_policy(world):
    """After the step q is q_decay of what it was, and the policy as it is now for the rest."""
    models = [random_model("qwen2", seed) for seed in (0, 1, 2)]
    one_step(iw_sft, models, problems_per_step=4, q="ema", q_decay=0.7, lr=1e-2)
    start = random_model("qwen2", 2).parameters()
    for policy, ema, before in zip(models[0].parameters(), models[2].parameters(), start, strict=True):
        assert torch.allclose(common.full_tensor(ema), 0.7 * before + 0.3 * common.full_tensor(policy), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize(("method", "changes"), [(sft, {}), (iw_sft, {"q": "ema", "normalize": True})])
def test_temperature_is_not_the_likelihoods(method, changes, temperature, world):
    """The gradient is the same at any --temperature, bit for bit, also at the greedy 0."""
    found, wanted = (
        one_step(method, [random_model("qwen2", s) for s in (0, 1, 2)], problems_per_step=4, **changes, **flags)[0]
        for flags in ({"temperature": temperature}, {})
    )
    assert equal(found[0], wanted[0])


@pytest.mark.parametrize("method", ["sft", "iw_sft"])
def test_temperature_is_the_evaluations(method, tmp_path, world, monkeypatch):
    """The test problems are sampled at it, and nothing else but what the first sync checks."""
    asked, decode = [], TransformersEngine.decode

    def spy(engine, prompts, prefixes, n, max_tokens, temperature, *rest):
        asked.append((len(prompts), temperature))
        return decode(engine, prompts, prefixes, n, max_tokens, temperature, *rest)

    monkeypatch.setattr(TransformersEngine, "decode", spy)
    lines = (ROOT / "tiny/test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(lines[:3]))
    flags = "--model tiny --steps 1 --problems_per_step 2 --temperature 0.25".split()
    train(method, *flags, "--test_data", tmp_path / "test.jsonl", "--out", tmp_path / "run")
    assert asked == [(1, 1.0), *[(3, 0.25)] * 2]


# The draw by scores -------------------------------------------------------------------------------
SCORES = [0, 1, 2, 3, 0.5, 6.25]


def scored() -> list[common.Problem]:
    """A problem per score, which is named by its place."""
    return [common.Problem(str(i), "", [0], "", [1], score=score) for i, score in enumerate(SCORES)]


def drawn(n: int, step: int, seed: int = 0, rank: int = 0, size: int = 1) -> list[int]:
    """The places of a rank's problems."""
    world = common.World(rank, size, torch.device("cpu"))
    return [int(p.id) for p in iw_sft.draw_by_score(scored(), n, step, seed, world)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frequencies_are_the_scores(seed):
    """Chi-square of 16000 draws below its 0.1 % bound, of pairs in a step too; 0 never comes."""
    steps = [drawn(8, step, seed) for step in range(2000)]
    shares = [score / sum(SCORES) for score in SCORES]
    counts = [sum(step.count(i) for step in steps) for i in range(len(SCORES))]
    chi = sum((n - 16000 * p) ** 2 / (16000 * p) for n, p in zip(counts, shares, strict=True) if p)
    assert counts[0] == 0 and sum(counts) == 16000 and chi < 18.47
    pairs = {(i, j): 8000 * shares[i] * shares[j] for i in range(1, 6) for j in range(1, 6)}
    seen = [(step[k], step[k + 1]) for step in steps for k in range(0, 8, 2)]
    assert sum((seen.count(pair) - n) ** 2 / n for pair, n in pairs.items()) < 51.18


def test_the_draw_is_a_function_of_seed_and_step():
    """The same on any number of ranks, in disjoint shares; another for another step or seed."""
    for step in range(5):
        whole = drawn(12, step)
        assert drawn(12, step) == whole != drawn(12, step + 1) and whole != drawn(12, step, seed=1)
        for size in (2, 3, 5):
            shares = [drawn(12, step, rank=rank, size=size) for rank in range(size)]
            assert [shares[k % size][k // size] for k in range(12)] == whole and sum(map(len, shares)) == 12


def tiny_data(path, scores: list) -> str:
    """The first problems of the bundled set, with these scores; None: without one."""
    rows = [json.loads(line) for line in (ROOT / "tiny/train.jsonl").read_text().splitlines()[: len(scores)]]
    for row, score in zip(rows, scores, strict=True):
        row |= {} if score is None else {"score": score}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([1, 2, None], "row tiny/train/002 has score None"),
        ([1, -0.5, 1], "row tiny/train/001 has score -0.5"),
        ([math.nan, 1, 1], "row tiny/train/000 has score nan"),
        ([1, math.inf, 1], "row tiny/train/001 has score inf"),
        ([1, "2", 1], "row tiny/train/001 has score None"),
        ([0, 0, 0.0], "all scores are 0"),
    ],
)
def test_scores_that_nothing_can_be_drawn_by(scores, said, tmp_path, world, monkeypatch):
    """One sentence with file and row, before a model is loaded; nothing without --quality."""
    data = tiny_data(tmp_path / "scores.jsonl", scores)
    monkeypatch.setattr(common, "load_policy", lambda *args: pytest.fail("a model is loaded"))
    flags = ["--model", "tiny", "--data", data, "--test_data=", "--out", tmp_path / "run"]
    with pytest.raises(SystemExit, match=f"^error: --quality: in {data} {said}; it draws by finite ones, 0 or more$"):
        train("iw_sft", *flags, "--quality")
    with pytest.raises(pytest.fail.Exception, match="a model is loaded"):
        train("iw_sft", *flags)


FOUR = "--model tiny --test_data= --steps 4 --problems_per_step 6 --lr 1e-3 --save_every 2 --keep 9".split()
LIKE_SFT = "--warmup 0 --final_lr 1 --weight_decay 0 --max_completion_tokens 80".split()


def weights(out) -> dict[str, Tensor]:
    """Of the trained model."""
    return load_file(out / "final/model.safetensors")


def differ(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest difference of two models."""
    return max((one[k] - two[k]).abs().max().item() for k in one)


@pytest.fixture
def runs(tmp_path, world, monkeypatch):
    """A function that trains four steps on six scored problems and returns folder and problems."""

    def trained(method, name, *flags, scores=SCORES):
        seen, make = [], common.expert_rollout

        def spy(question, tokenizer):
            seen.append(int(question.id.rsplit("/", 1)[-1]))
            return make(question, tokenizer)

        data = tiny_data(tmp_path / f"{name}.jsonl", scores)
        with monkeypatch.context() as patch:
            patch.setattr(common, "expert_rollout", spy)
            train(method, *FOUR, "--data", data, "--out", tmp_path / name, *flags)
        return tmp_path / name, seen

    return trained


def test_quality_in_a_run(runs):
    """iw-SFT(Q) draws by score, at every step what the seed says, after a resume too."""
    flags = ["--quality", "--q", "ema"]
    out, seen = runs("iw_sft", "straight", *flags)
    assert seen == [place for step in range(4) for place in drawn(6, step)] and 0 not in seen
    again = out.with_name("again")
    shutil.copytree(out, again)
    shutil.rmtree(again / "final")
    (checkpoint,) = (again / "checkpoints").glob("*4")
    shutil.rmtree(checkpoint)
    train("iw_sft", "--resume", again)
    assert read_metrics(again) == read_metrics(out) and differ(weights(again), weights(out)) == 0


def test_sft_of_quality_is_sft_on_these_traces(runs, monkeypatch):
    """--quality --q reference is sft.py bit for bit, where that one draws the same traces."""
    out, seen = runs("iw_sft", "child", "--quality", "--q", "reference", "--beta2", 0.999, *LIKE_SFT)
    plain, others = runs("sft", "plain", *LIKE_SFT)
    monkeypatch.setattr(common, "draw", iw_sft.draw_by_score)
    parent, same = runs("sft", "parent", *LIKE_SFT)
    assert same == seen != others
    assert differ(weights(out), weights(parent)) == 0 < differ(weights(out), weights(plain))


def test_without_quality_a_score_changes_nothing(runs):
    """Every trace once an epoch, and the weights of a run on data without the column."""
    assert not iw_sft.Config().quality
    (scored, seen), (plain, others) = (runs("iw_sft", n, scores=s) for n, s in (("a", SCORES), ("b", [None] * 6)))
    assert seen == others and all(sorted(seen[k : k + 6]) == list(range(6)) for k in range(0, 24, 6))
    assert differ(weights(scored), weights(plain)) == 0 and read_metrics(scored) == read_metrics(plain)
