"""dapo.py: the penalty and the draw by hand, a fake sampler on one and two ranks, resume."""

import hashlib
import json
import random
import shutil
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from conftest import ROOT, problem, random_model, read_metrics, run_script, train
from one_step import one_step
from safetensors.torch import load_file

import common
import dapo
import grpo
from core.config import flat

sys.path.insert(0, str(ROOT / "tiny"))
import make  # noqa: E402


def worlds(size: int) -> list[common.World]:
    """Every rank of a world of this size."""
    return [common.World(rank, size, torch.device("cpu")) for rank in range(size)]


# The penalty --------------------------------------------------------------------------------------
def equation_13(length: int, longest: int, cache: int) -> float:
    """As the paper writes it."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


def test_penalty_of_the_papers_settings():
    """0 up to 16384 tokens, -1 from 20480 on, a line between; the default takes half of it."""
    cfg = dapo.Config()
    paper = dapo.Config(overlong_coef=1.0)
    lengths = {1: 0, 16384: 0, 16385: -1 / 4096, 18432: -0.5, 20479: -4095 / 4096, 20480: -1, 20481: -1, 30000: -1}
    for length, wanted in lengths.items():
        assert dapo.length_reward(paper, length) == wanted == equation_13(length, 20480, 4096)
        assert dapo.length_reward(cfg, length) == wanted / 2


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3, 0.125])
def test_penalty_of_other_limits(share):
    """The cache is a share of whatever the limit is; 1 is a line from the first token on."""
    for longest in (80, 81, 1024):
        cfg = dapo.Config(max_completion_tokens=longest, overlong_cache=share, overlong_coef=2.0)
        for length in range(1, longest + 3):
            wanted = 2 * equation_13(length, longest, share * longest)
            assert dapo.length_reward(cfg, length) == pytest.approx(wanted, abs=1e-12)


def test_no_penalty():
    """A cache of 0 or a coefficient of 0, at any length."""
    for flags in ({"overlong_cache": 0.0}, {"overlong_coef": 0.0}):
        assert all(dapo.length_reward(dapo.Config(**flags), n) == 0 for n in (1, 20479, 20480, 20481))


def test_half_the_penalty_on_half_the_rewards_is_the_papers_advantage():
    """Rewards of -1 and 1 with a penalty of 1 have the advantages of 0 and 1 with one of 0.5."""
    lengths, right = [100, 17000, 18432, 20480, 20000, 16384], [1, 1, 0, 0, 1, 0]
    theirs = [[2 * r - 1 + equation_13(n, 20480, 4096) for r, n in zip(right, lengths, strict=True)]]
    ours = [[r + dapo.length_reward(dapo.Config(), n) for r, n in zip(right, lengths, strict=True)]]
    theirs, ours = (common.group_advantages(torch.tensor(x), True) for x in (theirs, ours))
    assert torch.allclose(theirs, ours, atol=1e-5) and ours.unique().numel() == 6


# The draw -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("total", "n"), [(20, 6), (20, 20), (5, 12), (7, 1)])
def test_draw_at_a_steps_place_is_commons(total, n):
    """Problems, occurrences and shares of ranks, in small data sets and over the ends of epochs."""
    problems = [problem("q", id=str(i)) for i in range(total)]
    for size in (1, 2, 3):
        for world in worlds(size):
            for step in range(9):
                assert common.draw(problems, n, 0, 4, world, step * n) == common.draw(problems, n, step, 4, world)


def test_draw_from_any_place():
    """Cut anywhere, the line of epochs has the same problems in one order, each once an epoch."""
    problems, (world,) = [problem("q", id=str(i)) for i in range(7)], worlds(1)
    whole = [p.id for p in common.draw(problems, 21, 0, 3, world, 0)]
    assert all(sorted(whole[k : k + 7]) == [str(i) for i in range(7)] for k in (0, 7, 14)) and whole[:7] != whole[7:14]
    for place in range(16):
        assert [p.id for p in common.draw(problems, 5, 0, 3, world, place)] == whole[place : place + 5]
        ranks = [[p.id for p in common.draw(problems, 5, 0, 3, w, place)] for w in worlds(3)]
        assert [ranks[k % 3][k // 3] for k in range(5)] == whole[place : place + 5]


@pytest.mark.parametrize("seed", range(20))
def test_fill(seed):
    """The batch is the first n of the line on any number of ranks; the rest is not used up."""
    rng = random.Random(seed)
    n, rounds = rng.randint(1, 7), rng.randint(1, 4)
    keep = [rng.random() < 0.4 for _ in range(n * rounds)]
    good = [k for k in range(n * rounds) if keep[k]]
    wanted, used = good[:n], good[n - 1] + 1 if len(good) >= n else n * rounds
    for size in (1, 2, 3, 8):
        found = []
        for world in worlds(size):
            mine = [[r * n + k] for r in range(rounds) for k in range(world.rank, n, size)]
            kept, done = dapo.fill(mine, keep, n, world)
            assert done == used and len(kept) == len(wanted)
            found.append(kept)
        assert [[k for rank in found for k in rank[j]] for j in range(len(wanted))] == [[k] for k in wanted]


# Batches of a fake sampler ------------------------------------------------------------------------
PROBLEMS = [problem("q" * (i % 5 + 1), id=str(i)) for i in range(40)]
LINE = [p.id for p in common.draw(PROBLEMS, 40, 0, 1, worlds(1)[0])]  # the first epoch of seed 1
PLAIN = {"problems_per_step": 4, "group_size": 4, "updates_per_step": 1, "max_completion_tokens": 10, "lr": 0.01}
PLAIN |= {"overlong_cache": 0.0, "tis_cap": 0.0, "warmup_steps": 0, "seed": 1, "tokens_per_microbatch": 10**6}
Found = tuple[list[list[torch.Tensor]], list[dict]]


class FakeSampler:
    """Groups of ragged rows that depend on problem and seed alone.

    mixed: of each place in LINE, again and again, whether its group has right and wrong rows (x).
    """

    def __init__(self, mixed: str):
        self.mixed, self.asked, self.seeds = mixed, [], []

    def __call__(self, problems, prefixes, n, max_tokens, temperature, seed):
        """As Sampler.generate."""
        self.asked.append([p.id for p in problems])
        self.seeds.append(seed)
        return [[self.row(question, seed, i) for i in range(n)] for question in problems]

    def row(self, question: common.Problem, seed: tuple[int, ...], i: int) -> common.Rollout:
        """Of two to eight tokens; where the group is not mixed, every other group is right."""
        place, noise = LINE.index(question.id), hashlib.sha256(repr((question.id, seed, i)).encode()).digest()
        row = common.Rollout(question, [x + 1 for x in noise[1 : 3 + noise[0] % 7]], finished=True)
        row.sampler_logprobs = [-x / 64 for x in noise[: len(row.completion_ids)]]
        row.reward = float((i if self.mixed[place % len(self.mixed)] == "x" else place) % 2)
        return row


def run(mixed: str, method: ModuleType = dapo, **flags: object) -> tuple[*Found, FakeSampler, list]:
    """(gradients at each clip, log, the sampler, the rows of each update)."""
    sampler, rows, count = FakeSampler(mixed), [], common.count

    def spy(mine, world):
        rows.append(list(mine))
        return count(mine, world)

    known = {k: v for k, v in (PLAIN | flags).items() if k in flat(method.Config())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "count", spy)
        found, lines = one_step(method, [random_model("qwen2", 0, torch.float64)], sampler, PROBLEMS, **known)
    return found, lines, sampler, rows


def places(rows: list[common.Rollout]) -> list[int]:
    """In LINE, of the problems of rows, four rows each."""
    found = [LINE.index(row.problem.id) for row in rows]
    assert all(len(set(found[k : k + 4])) == 1 for k in range(0, len(found), 4))
    return found[::4]


def counted(line: dict) -> tuple[float, float, float]:
    """What the log says of a step: rounds after the first, groups drawn, groups trained."""
    return line["resample_rounds"], line["groups_drawn"], line["groups_kept"]


@pytest.mark.parametrize("updates", [1, 2])
def test_full_at_once(updates, world):
    """Where every group is mixed there is one round, with the parent's rows and gradients."""
    found, (line,), sampler, rows = run("x", clip_high=0.2, updates_per_step=updates, weight_decay=0.01)
    assert sampler.asked == [LINE[:4]] and sampler.seeds == [(1, 0, 0)] and counted(line) == (0, 4, 4)
    theirs, (parents,), _, same = run("x", grpo, updates_per_step=updates)
    assert [places(part) for part in rows] == [places(part) for part in same]
    assert sum(map(places, rows), []) == [0, 1, 2, 3] and len(found) == updates
    assert all(torch.equal(a, b) for one, two in zip(found, theirs, strict=True) for a, b in zip(one, two, strict=True))
    assert all(line[name] == parents[name] for name in ("reward", "entropy", "loss", "grad_norm", "clip_fraction"))


def test_never_full(world):
    """Without a mixed group all rounds are drawn and no weight moves; the next step goes on."""
    found, lines, sampler, rows = run("-", resample_rounds=3, steps=2, updates_per_step=2)
    assert [counted(line) for line in lines] == [(3, 16, 0)] * 2
    assert rows == [[], []] and found == [[], []] and [line["grad_norm"] for line in lines] == [0, 0]
    assert sum(sampler.asked, []) == LINE[:32]
    assert sampler.seeds == [(1, step, attempt) for step in range(2) for attempt in range(4)]
    assert [(line["groups_mixed"], line["groups_solved"], line["reward"]) for line in lines] == [(0, 0.5, 0.5)] * 2


def test_redrawn_until_full(world):
    """Every other group is mixed: two rounds are just enough. The log's shares are of all drawn."""
    _, lines, sampler, rows = run("-x", steps=2)
    assert [counted(line) for line in lines] == [(1, 8, 4)] * 2
    assert sampler.asked == [LINE[k : k + 4] for k in (0, 4, 8, 12)]
    assert sampler.seeds == [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    assert [places(part) for part in rows] == [[1, 3, 5, 7], [9, 11, 13, 15]]
    assert [(line["groups_mixed"], line["reward"]) for line in lines] == [(0.5, 0.25)] * 2


@pytest.mark.parametrize("mixed", ["x---xxxx", "xxx-", "--xxx", "x--"])
def test_overfull(mixed, world):
    """Four groups a step in the order of the line, none lost and none twice, over an epoch."""
    _, lines, sampler, rows = run(mixed, steps=3)
    trained = sum(map(places, rows), [])
    assert [line["groups_kept"] for line in lines] == [4, 4, 4] == [len(part) // 4 for part in rows]
    assert trained == [k for k in range(40) if mixed[k % len(mixed)] == "x"][:12]
    starts = [
        LINE.index(asked[0]) for asked, (_, _, attempt) in zip(sampler.asked, sampler.seeds, strict=True) if not attempt
    ]
    assert starts == [0, trained[3] + 1, trained[7] + 1]
    if mixed == "x---xxxx":
        assert (
            trained == [0, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 20]
            and [counted(line) for line in lines] == [(1, 8, 4)] * 3
        )


@pytest.mark.parametrize(
    ("mixed", "updates", "sizes"),
    [
        ("x-------", 1, [1]),
        ("x-------", 4, [1]),
        ("x-x-----", 2, [2]),
        ("x-xx----", 2, [2, 1]),
        ("x-xx----", 4, [1, 1, 1]),
        ("x----x--", 8, [1, 1]),
    ],
)
def test_rounds_run_out(mixed, updates, sizes, world):
    """What was found is trained, in updates of the usual size; metrics are means over these."""
    found, (line,), _, rows = run(mixed, updates_per_step=updates, resample_rounds=1, lr=0.0)
    assert counted(line) == (1, 8, sum(sizes)) and [len(part) // 4 for part in rows] == sizes
    assert sum(map(places, rows), []) == [k for k in range(8) if mixed[k] == "x"]
    assert len(found) == len(sizes) and all(gradient for gradient in found) and line["grad_norm"] > 0
    if len(sizes) == 1:
        _, (once,), _, _ = run(mixed, updates_per_step=1, resample_rounds=1, lr=0.0)
        assert line["entropy"] == pytest.approx(once["entropy"]) and line["entropy"] > 1


def test_kept_groups_are_not_redrawn(world):
    """With --zero_variance keep a step is grpo.py's, whatever the rewards."""
    _, (line,), sampler, (rows,) = run("-x", zero_variance="keep")
    assert counted(line) == (0, 4, 4) and places(rows) == [0, 1, 2, 3] and sampler.asked == [LINE[:4]]


def test_one_round_drops_like_grpo(world):
    """Without a redraw the gradient is grpo.py's with --zero_variance drop."""
    found, (line,), _, _ = run("-x", resample_rounds=0, clip_high=0.2)
    theirs, _, _, _ = run("-x", grpo, zero_variance="drop")
    assert counted(line) == (0, 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(found[0], theirs[0], strict=True))


def test_penalty_in_the_step(world):
    """It shapes the advantages. What is mixed, and the log's reward, are the verifier's."""
    flags = {"overlong_cache": 0.5, "overlong_coef": 0.8}
    _, (line,), sampler, (rows,) = run("-x", **flags)
    _, (plain,), _, (others,) = run("-x")
    assert places(rows) == places(others) == [1, 3, 5, 7]
    assert all(line[name] == plain[name] for name in ("reward", "groups_mixed", "groups_solved", "groups_failed"))
    assert [row.reward for row in rows] == [0.0, 1.0, 0.0, 1.0] * 4 == [row.reward for row in others]
    shaped = [row.reward + 0.8 * equation_13(len(row.completion_ids), 10, 5) for row in rows]
    for k in range(0, 16, 4):
        group = shaped[k : k + 4]
        mean, std = sum(group) / 4, torch.tensor(group, dtype=torch.float64).std().item()
        assert [row.advantage for row in rows[k : k + 4]] == pytest.approx(
            [(x - mean) / (std + 1e-6) for x in group], abs=1e-5
        )
    asked = zip(sampler.asked, sampler.seeds, strict=True)
    drawn = [sampler.row(problem("q", id=name), seed, i) for names, seed in asked for name in names for i in range(4)]
    penalties = [0.8 * equation_13(len(row.completion_ids), 10, 5) for row in drawn]
    assert len(drawn) == 32 and line["overlong_penalty"] == pytest.approx(sum(penalties) / 32) and min(penalties) < -0.4
    assert plain["overlong_penalty"] == 0


# Two ranks ----------------------------------------------------------------------------------------
CASES = {
    "redrawn": ("x-x---x-xx", {}),
    "two updates": ("x-x---x-xx", {"updates_per_step": 2, "tis_cap": 2.0}),
    "uneven": ("x---xx-", {"problems_per_step": 3}),
    "none on a rank": ("x---xx-", {"problems_per_step": 1}),
    "one rank's": ("x-", {"resample_rounds": 1}),
    "too few": ("x----", {"resample_rounds": 1, "updates_per_step": 4}),
    "nothing": ("-", {"resample_rounds": 2}),
}


def updates() -> dict[str, tuple]:
    """Two steps of every case in small micro-batches: what update_worker.py runs."""
    found = {}
    for case, (mixed, flags) in CASES.items():
        gradients, lines, sampler, rows = run(
            mixed, steps=2, tokens_per_microbatch=30, overlong_cache=0.5, lr=1e-3, **flags
        )
        world = common.init(0)
        clocks = ("seconds", "tokens_per_second", "peak_memory")
        lines = [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in lines]
        parts = common.gather([(sampler.asked, sampler.seeds, [places(part) for part in rows])], world)
        found[case] = gradients, lines, parts
    return found


@pytest.fixture(scope="module")
def on_ranks(world, tmp_path_factory):
    """The same on one rank and on two."""
    file = tmp_path_factory.mktemp("dapo") / "found.pt"
    run_script("tests/update_worker.py", "test_dapo", str(file), nproc=2, timeout=200)
    return updates(), torch.load(file)


@pytest.mark.parametrize("case", CASES)
def test_ranks(case, on_ranks):
    """The draw, the rounds, the batch, its updates and gradients do not depend on their number."""
    (gradients, lines, (one,)), (theirs, others, two) = (found[case] for found in on_ranks)
    assert len(two) == 2 and one[1] == two[0][1] == two[1][1] and len(lines) == 2
    for k, asked in enumerate(one[0]):
        ranks = [part[0][k] for part in two]
        assert [ranks[i % 2][i // 2] for i in range(len(asked))] == asked and sum(map(len, ranks)) == len(asked)
    for k, trained in enumerate(one[2]):
        assert sorted(two[0][2][k] + two[1][2][k]) == sorted(trained)
    assert [len(part[2]) for part in two] == [len(one[2])] * 2
    assert others == [pytest.approx(line, rel=1e-6, abs=1e-6) for line in lines]
    assert len(gradients) == len(theirs) and any(gradients) == (case != "nothing")
    for mine, other in zip(gradients, theirs, strict=True):
        scale = max((g.abs().max() for g in mine), default=0.0)
        assert all((a - b).abs().max() <= 1e-6 * scale for a, b in zip(mine, other, strict=True))


def test_the_cases_are_what_they_say(on_ranks):
    """Redraws, a batch of one rank's groups alone, one without enough, one without any."""
    seen = {case: [counted(line) for line in lines] for case, (_, lines, _) in on_ranks[0].items()}
    assert seen["redrawn"] == [(2, 12, 4), (1, 8, 4)] == seen["two updates"]
    assert seen["uneven"][0] == (1, 6, 3) and seen["none on a rank"] == [(0, 1, 1), (3, 4, 1)]
    assert seen["too few"] == [(1, 8, 2), (1, 8, 2)] and seen["nothing"] == [(2, 12, 0)] * 2
    assert [part[2] for part in on_ranks[1]["one rank's"][2]] == [[[0, 2, 4, 6], []], [[], [8, 10, 12, 14]]]


# A killed run -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def straight(tmp_path_factory, world):
    """Five steps on few and easy problems, with a checkpoint of each."""
    rng, rows = random.Random(1), {}
    while len(rows) < 24:
        text, solution, answer = make.write_out(*make.chain(rng, len(rows) % 4, 1))
        rows[text] = {"id": text, "problem": text, "answer": answer, "solution": solution}
    folder = tmp_path_factory.mktemp("dapo")
    (folder / "easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    flags = "--model tiny --test_data= --steps 5 --problems_per_step 5 --group_size 4 --lr 1e-5 --save_every 1 --keep 9"
    flags += " --updates_per_step 2 --resample_rounds 3 --overlong_cache 0.8 --warmup_steps 0"
    train("dapo", *flags.split(), "--data", folder / "easy.jsonl", "--out", folder / "run")
    return folder / "run"


def killed(straight, out, step: int):
    """A copy of the run as a kill after this step leaves it."""
    shutil.copytree(straight, out)
    shutil.rmtree(out / "final")
    for checkpoint in (out / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return out


def test_the_run_redraws(straight):
    """Else the tests below would miss the draw's place, which is in every checkpoint."""
    lines = read_metrics(straight)[:-1]
    assert max(line["resample_rounds"] for line in lines) > 0 and max(line["groups_kept"] for line in lines) == 5
    assert min(line["overlong_penalty"] for line in lines) < 0
    states = [json.loads(path.read_text()) for path in sorted((straight / "checkpoints").glob("*/state.json"))]
    assert [state["step"] for state in states] == [1, 2, 3, 4, 5]
    moved = [b - a for a, b in pairwise([0, *(state["place"] for state in states)])]
    for line, places_used in zip(lines, moved, strict=True):
        assert line["groups_drawn"] - 5 < places_used <= line["groups_drawn"]
        assert line["groups_kept"] == 5 or places_used == line["groups_drawn"]
    assert any(state["place"] % 5 for state in states), "no step was overfull"


@pytest.mark.parametrize("step", [1, 3])
def test_resume(step, straight, tmp_path, world):
    """Bit for bit the straight run: lines, samples and weights."""
    out = killed(straight, tmp_path / "run", step)
    train("dapo", "--resume", out)
    assert read_metrics(out) == read_metrics(straight)
    assert (out / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()
    one, two = (load_file(folder / "final/model.safetensors") for folder in (out, straight))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resume_on_two_ranks(straight, tmp_path):
    """The same problems, samples and batches; sums in another order, so equal to rounding."""
    out = killed(straight, tmp_path / "run", 2)
    run_script("dapo.py", "--resume", str(out), nproc=2)
    assert read_metrics(out) == read_metrics(straight, exact=False)
