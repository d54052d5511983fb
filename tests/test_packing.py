"""Packed, padded and alone give the same log-probabilities; prompts are not trained."""

import dataclasses
import math
import random
import time

import numpy as np
import pytest
import torch
import transformers
from conftest import SIZES, problem, random_model, run_script

import common
from core import model as core_model
from core.packing import measure, plan, units
from core.sampler import TransformersEngine


def rows(tokenizer) -> list[common.Rollout]:
    """Four ragged rows that end with EOS; the expert wrote the first two tokens, or the first."""
    texts = [("ab", "hello"), ("ab ab ab", "x"), ("c c", "the quick brown fox"), ("a much longer prompt", "7")]
    made = [(p, [*tokenizer(c).input_ids, tokenizer.eos_token_id], min(2, len(c))) for p, c in texts]
    return [common.Rollout(problem(prompt), ids, expert) for prompt, ids, expert in made]


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3", "gemma"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_padded_and_alone_agree(architecture, temperature, tokenizer, world):
    """Log-probabilities, entropies and gradients against the stock model.

    On each row alone, and on all rows padded to the left.
    """
    stock = random_model(architecture, dtype=torch.float64, attention="sdpa")
    policy = common.shard(random_model(architecture, dtype=torch.float64), world)
    batch = common.make_batch(rows(tokenizer), world.device)
    logprobs, entropy = common.token_logprobs(policy, batch, temperature, True)
    lines = [r.problem.prompt_ids + r.completion_ids for r in batch.rollouts]
    width = max(map(len, lines))
    padded = torch.tensor([[0] * (width - len(line)) + line for line in lines])
    mask = torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in lines])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded_logits = stock(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone_total = 0
    for b, line in enumerate(lines):
        start, length = len(batch.rollouts[b].problem.prompt_ids), batch.lengths[b]
        logits = stock(input_ids=torch.tensor([line]), use_cache=False).logits[0, start - 1 : -1]
        alone = torch.log_softmax(logits / temperature, -1)
        left = torch.log_softmax(padded_logits[b, width - len(line) :] / temperature, -1)[start - 1 : -1]
        targets = torch.tensor(line[start:])[:, None]
        assert torch.allclose(logprobs[b, :length], alone.gather(1, targets)[:, 0], atol=1e-10)
        assert torch.allclose(logprobs[b, :length], left.gather(1, targets)[:, 0], atol=1e-8)
        assert torch.allclose(entropy[b, :length], -(alone.exp() * alone).sum(-1), atol=1e-10)
        assert (logprobs[b, length:] == 0).all()
        alone_total = alone_total + alone.gather(1, targets).sum() - 0.3 * (alone.exp() * alone).sum()
    alone_total.backward()
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    for name, parameter in stock.named_parameters():
        found = common.full_tensor(dict(policy.model.named_parameters())[name].grad)
        assert torch.allclose(found, parameter.grad, atol=1e-5 if architecture == "gemma" else 1e-9), name


def test_a_neighbour_does_not_leak(tokenizer, world):
    """Another completion in row 1 changes row 1 and nothing in the rows beside it."""
    policy = common.shard(random_model("qwen2", dtype=torch.float64), world)
    batch = rows(tokenizer)
    before, _ = common.token_logprobs(policy, common.make_batch(batch, world.device), 1.0)
    batch[1].completion_ids = [9] * 2
    after, _ = common.token_logprobs(policy, common.make_batch(batch, world.device), 1.0)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert torch.allclose(before[2], after[2], atol=1e-12)


def test_masks(tokenizer, world):
    """EOS is trained, padding is not, though both have the same id.

    The expert mask is exactly the first k, and the policy's is the rest of the row.
    """
    batch = common.make_batch(rows(tokenizer), world.device)
    assert batch.completion_mask.sum(1).tolist() == [6, 2, 20, 2]
    last = [batch.completion_ids[b, length - 1].item() for b, length in enumerate(batch.lengths)]
    assert last == [tokenizer.eos_token_id] * 4
    assert all(batch.completion_mask[b, length - 1] for b, length in enumerate(batch.lengths))
    assert batch.expert_mask.sum(1).tolist() == [2, 1, 2, 1] and batch.expert_mask[:, 0].all()
    assert not batch.completion_mask[1, 2:].any()
    assert torch.equal(batch.policy_mask, batch.completion_mask & ~batch.expert_mask)
    assert batch.policy_mask.sum(1).tolist() == [4, 1, 18, 1]


def test_prompt_is_not_trained(tokenizer, world):
    """A column for each completion token and none for the prompt's, whose targets have none."""
    policy, lengths = common.shard(random_model("llama", dtype=torch.float64), world), [6, 2, 20, 2]
    batch = common.make_batch(rows(tokenizer), world.device)
    logprobs, _ = common.token_logprobs(policy, batch, 1.0)
    assert logprobs.shape == batch.completion_ids.shape == (4, 20)
    assert (logprobs != 0).sum(1).tolist() == batch.completion_mask.sum(1).tolist() == lengths


def tensors(batch: common.Batch) -> dict[str, torch.Tensor]:
    """A copy of all that a batch holds, without NaN."""
    return {k: v.nan_to_num(7.0).clone() for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}


def test_nothing_is_written_in_place(tokenizer, world):
    """Asked again, log-probabilities are the same, and the batch is as it was; at 0.7 too."""
    policy = common.shard(random_model("llama"), world)
    batch = common.make_batch(rows(tokenizer), world.device)
    before, first = tensors(batch), common.token_logprobs(policy, batch, 0.7)
    common.old_logprobs(batch, common.reference_logprobs(policy, batch, 0.7))
    again = common.token_logprobs(policy, batch, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(batch).items())


def test_dropout_is_off(tokenizer, world, tmp_path):
    """A model trained with dropout in attention, embeddings and residuals has one answer here."""
    sizes = {name: size for name, size in SIZES.items() if "key_value" not in name}
    noise = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}
    config = transformers.PhiConfig(**sizes, **noise, vocab_size=257, eos_token_id=0, bos_token_id=None)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    run = common.RunConfig(model=str(tmp_path))
    policy, stock = common.load_policy(run, world), common.load_model(run, attention="sdpa").train()
    batch = common.make_batch(rows(tokenizer), world.device)
    one, two = (common.token_logprobs(policy, batch, 1.0)[0] for _ in range(2))
    ids = torch.arange(1, 9)[None]
    assert policy.training and torch.equal(one, two) and one.any()
    assert torch.equal(stock(ids).logits, stock(ids).logits)


def test_microbatches_keep_every_row_once_and_the_budget(tokenizer, world):
    """Every row is in one micro-batch, and only a row alone may exceed the budget."""
    all_rows = rows(tokenizer) * 3
    batches = common.microbatches(all_rows, 30, world)
    assert sorted(id(r) for b in batches for r in b.rollouts) == sorted(id(r) for r in all_rows)
    for batch in batches:
        assert len(batch.rollouts) == 1 or sum(batch.line[2].queries) <= 30


# Balance ------------------------------------------------------------------------------------------
LAWS = {  # completion tokens of 128 problems x 8 rows, cut at 8192: (median, spread of problems, of rows)
    "instruct": (600, 0.5, 0.35),
    "reasoning": (3000, 0.7, 0.4),
    "long": (5000, 0.8, 0.4),
    "uniform": None,
}


def drawn_sizes(law: str, seed: int) -> list[int]:
    """Prompt and completion tokens of a step's 1024 rows."""
    rng = np.random.default_rng(seed)
    if LAWS[law] is None:
        lengths = rng.uniform(200, 8192, (128, 8))
    else:
        median, problems, rows = LAWS[law]
        lengths = median * np.exp(problems * rng.normal(size=(128, 1)) + rows * rng.normal(size=(128, 8)))
    return (np.minimum(lengths, 8192).astype(int) + rng.integers(60, 300, (128, 1))).ravel().tolist()


@pytest.mark.parametrize("budget", [2**14, 2**15])
@pytest.mark.parametrize("law", LAWS)
def test_ranks_hardly_wait_for_each_other(law, budget):
    """On 8 ranks the slowest of each micro-batch costs what all do, and their budget is used."""
    cost, efficiency, filling = lambda n: n + n * n / 41_000, [], []
    for seed in range(20):
        sizes = drawn_sizes(law, seed)
        steps = plan([(size, 0) for size in sizes], 8, budget)
        slowest = sum(max(sum(cost(sizes[i]) for i, _ in rows) for rows in step) for step in steps)
        efficiency.append(sum(map(cost, sizes)) / 8 / slowest)
        filling.append(sum(sizes) / 8 / len(steps) / budget)
    assert min(efficiency) >= 0.99  # less without the order of the micro-batches
    assert np.mean(filling) >= (0.9 if np.mean(sizes) > 1000 or budget == 2**14 else 0.8)  # four short ones, or three


def drawn_rows(rng: random.Random) -> list[tuple[list, list, int]]:
    """(prompt, completion, expert tokens) of groups: rows share a prompt, and some a prefix."""
    rows = []
    for _ in range(rng.randint(0, 8)):
        prompt, trace = ([rng.randint(1, 9) for _ in range(rng.choice([1, 5, 30]))] for _ in range(2))
        for _ in range(rng.randint(1, 8)):
            expert = rng.choice([0, len(trace) // 2, len(trace)])
            rows.append((prompt, trace[:expert] + [rng.randint(1, 9) for _ in range(rng.randint(1, 20))], expert))
    return rows


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_plan_has_every_row_once_and_keeps_the_budget(ranks):
    """Whatever the lengths: a row above the budget is alone, none is empty while rows are left.
    What a row is said to share is what the first of its unit begins with.
    """
    rng, budget, joined = random.Random(ranks), 50, 0
    for _ in range(200):
        rows = drawn_rows(rng)
        measured = measure(rows)
        sizes, steps = [size for size, _ in measured], plan(measured, ranks, budget)
        filled = [rows for step in steps for rows in step]
        assert sorted(i for part in filled for i, _ in part) == list(range(len(sizes)))
        assert all(len(part) <= 1 or sum(sizes[i] - shared for i, shared in part) <= budget for part in filled)
        assert all(len(step) == ranks for step in steps) and steps == plan(measured, ranks, budget)
        assert len(steps) <= math.ceil(len(sizes) / ranks)
        for part in filled:
            first = None
            for i, shared in part:
                first = i if not shared else first
                assert sum(rows[i][:2], [])[:shared] == sum(rows[first][:2], [])[:shared] and shared < sizes[i]
                assert not shared or shared >= len(rows[i][0])
                joined += shared > 0
        plain = plan([(size, 0) for size in sizes], ranks, budget)
        assert len(plain) <= math.ceil(len(sizes) / ranks) and (all(map(all, plain)) or len(sizes) < ranks * len(plain))
    assert plan([], ranks, budget) == [] and joined > 500


def test_a_group_is_one_unit_where_that_is_cheaper():
    """All rows of a prompt stand together, or those with a longer beginning by themselves."""
    prompt, trace = [1] * 100, [2] * 60
    rows = [(prompt, trace[:expert] + [3] * 10, expert) for expert in (0, 0, 60, 60, 60)]
    assert measure(rows) == [(110, 0), (110, 100), (170, 100), (170, 160), (170, 160)]
    assert units(measure(rows), 1000) == [[(0, 0), (1, 100)], [(2, 0), (3, 160), (4, 160)]]
    assert units(measure(rows[2:]), 1000) == [[(0, 0), (1, 160), (2, 160)]]
    assert units(measure(rows), 130) == [[(0, 0), (1, 100)], [(2, 0)], [(3, 0)], [(4, 0)]]
    assert plan(measure(rows), 1, 1000) == [[[(2, 0), (3, 160), (4, 160), (0, 0), (1, 100)]]]


def in_groups(tokenizer) -> tuple[list[common.Rollout], list[int]]:
    """Rows of which some share a prompt, and some a prefix that has more tokens than one row."""
    rows = []
    for prompt, texts in (
        ("what is it?", [("", "no"), ("", "perhaps a longer one"), ("", "x")]),
        ("another", [("it is ", "7"), ("it is ", "eight"), ("it is ", "")]),
        ("alone", [("", "text")]),
    ):
        for prefix, text in texts:
            ids = [*tokenizer(prefix).input_ids, *tokenizer(text).input_ids, tokenizer.eos_token_id]
            rows.append(common.Rollout(problem(prompt), ids, len(prefix)))
    return rows, [0, 11, 11, 0, 13, 13, 0]


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3", "gemma"])
def test_what_a_group_shares_changes_nothing(architecture, tokenizer, world):
    """Log-probabilities, entropies and gradients are those of whole rows; the line is shorter."""
    found = []
    for sharing in (False, True):
        policy = common.shard(random_model(architecture, dtype=torch.float64), world)
        made, shared = in_groups(tokenizer)
        batch = common.make_batch(made, world.device, shared=shared if sharing else ())
        logprobs, entropy = common.token_logprobs(policy, batch, 0.7, True)
        weights = torch.arange(logprobs.numel()).reshape(logprobs.shape) % 7
        ((logprobs + 0.3 * entropy) * weights).sum().backward()
        gradients = [common.full_tensor(p.grad) for p in policy.parameters()]
        found.append((batch, logprobs, entropy, *gradients))
    (plain, *wanted), (batch, *got) = found
    assert batch.line[0].numel() == plain.line[0].numel() - sum(shared) and plain.line[2].seen is None
    assert len(batch.line[3]) == len(plain.line[3]) - 2 * len("it is ")  # its tokens have the first row's
    for a, b in zip(wanted, got, strict=True):
        assert (a - b).norm() < 1e-6 * a.norm()  # norms are made in fp32
    for name, tensor in tensors(plain).items():
        assert torch.equal(tensor, tensors(batch)[name]), name


def test_microbatches_share_what_a_group_has_in_common(tokenizer, world):
    """The rows of a group stand behind one prompt, and every row is there."""
    made, shared = in_groups(tokenizer)
    (batch,) = common.microbatches(made, 1000, world)
    sizes = [len(r.problem.prompt_ids) + len(r.completion_ids) for r in made]
    assert batch.line[0].numel() == sum(sizes) - sum(shared)
    assert sorted(map(id, batch.rollouts)) == sorted(map(id, made))


def made_rows(rank: int) -> list[common.Rollout]:
    """The rows that a rank made: many, few, none."""
    made, rng = [], random.Random(rank)
    for i in range((9, 2, 0)[rank]):
        ids, expert = [rng.randint(1, 256) for _ in range(rng.randint(2, 30))], rng.randint(0, 2)
        row = common.Rollout(problem("q" * (i + 1), id=f"{rank}-{i}"), ids, expert, [-0.1 * i] * (len(ids) - expert))
        row.reward, row.advantage, row.taught = i / 8, i / 4 - 1, bool(i % 2)
        row.prefix_advantage = None if i % 3 else 5.0
        row.old_logprobs = None if i % 2 else -torch.rand(len(ids), generator=torch.Generator().manual_seed(i))
        row.text, row.parts = "said", {"x": 1.0}
        made.append(row)
    return made


def updates() -> list[tuple[list, list]]:
    """Of every rank its micro-batches and its rows afterwards: what update_worker.py runs."""
    world = common.init(0)
    rows, common.SHOWN = made_rows(world.rank), 4
    batches = common.microbatches(rows, 60, world)
    seen = [([r.problem.id for r in b.rollouts], tensors(b), [r.text for r in b.rollouts]) for b in batches]
    for batch in batches:  # what is kept is made of the tokens
        common.keep_old_logprobs(batch, batch.completion_ids / 1000, world)
    return common.gather([(seen, [(r.problem.id, r.completion_ids, r.old_logprobs) for r in rows])], world)


@pytest.fixture(scope="module")
def on_three_ranks(tmp_path_factory):
    """What `updates` finds on three ranks."""
    file = tmp_path_factory.mktemp("packing") / "found.pt"
    run_script("tests/update_worker.py", "test_packing", str(file), nproc=3)
    return torch.load(file)


def test_rows_move_with_all_that_an_update_reads(on_three_ranks):
    """Of rows that another rank made a micro-batch has the same id and tensors, but a text only
    where the log shows the row.
    """
    made, found = {r.problem.id: r for rank in range(3) for r in made_rows(rank)}, []
    for rank, (batches, _) in enumerate(on_three_ranks):
        assert len(batches) == len(on_three_ranks[0][0]) > 1
        for ids, held, texts in batches:
            found += ids
            wanted = tensors(common.make_batch([made[i] for i in ids]))
            assert held.keys() == wanted.keys() and all(torch.equal(held[k], wanted[k]) for k in held)
            assert texts == ["said" if int(i[0]) == rank or i in ("0-0", "0-1", "0-2", "0-3") else "" for i in ids]
    assert sorted(found) == sorted(made)
    assert {id[0] for ids, *_ in on_three_ranks[2][0] for id in ids} >= {"0"}


def test_old_logprobs_come_home(on_three_ranks):
    """Each rank's own rows have what was computed of them, on whichever rank."""
    assert [len(rows) for _, rows in on_three_ranks] == [9, 2, 0]
    for _, ids, kept in (row for _, rows in on_three_ranks for row in rows):
        assert torch.equal(kept, torch.tensor(ids) / 1000)


def test_a_step_of_four_million_tokens_takes_the_host_a_second(world):
    """Packing, indices, padding and logging, without the model; the bound is for a slow machine."""
    ids, sampled = list(range(100_000, 104_096)), (-np.random.default_rng(0).random(4096)).tolist()
    rows = [common.Rollout(problem("q" * 200, id=str(i)), ids, 0, sampled) for i in range(1024)]
    nothing, begin = torch.zeros(3 * 4096), time.process_time()
    for batch in common.microbatches(rows, 3 * 4296, world):
        common.token_logprobs(lambda *line: (nothing[: len(line[5])],) * 2, batch, 1.0)
    seconds = time.process_time() - begin
    print(f"{seconds:.2f} s for {1024 * 4096 / 1e6:.1f} M tokens")
    assert seconds < 4


def test_overfit_one_row_reproduces_it_and_stops(tokenizer, world, model_folder):
    """An off-by-one, an untrained EOS or a trained prompt would show here."""
    run = common.RunConfig(model=model_folder("qwen2"))
    sampler, policy = common.load_sampler(run, tokenizer, world, 30), common.load_policy(run, world)
    question = problem("what?", expert="it is 7")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(60):
        batch = common.make_batch([common.expert_rollout(question, tokenizer)], world.device)
        logprobs, _ = common.token_logprobs(policy, batch, 1.0)
        (-logprobs.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    sampler.sync(policy)
    rollout = sampler.generate([question], None, 1, 30, 0.0, (0,))[0][0]
    assert rollout.completion_ids == question.expert_ids and rollout.finished and rollout.text == "it is 7"


def test_unsupported_attention_is_refused():
    """A mask, borders that are not handed on, and a cap without an eager function."""
    layer, q = random_model("qwen2").model.layers[0].self_attn, torch.zeros(1, 4, 5, 8)
    rows = core_model.Rows([5], [5], torch.tensor([0, 5]), torch.tensor([0, 5]), None)
    for module, mask, features in (
        (layer, q, {"rows": rows}),
        (layer, None, {}),
        (torch.nn.Linear(1, 1), None, {"softcap": 30.0, "rows": rows}),
    ):
        with pytest.raises(NotImplementedError, match="mask of its own or no borders of rows"):
            core_model.packed_attention(module, q, q, q, mask, 1.0, **features)


def test_activation_checkpointing_changes_no_gradient(tokenizer, world):
    """With and without --checkpoint_activations the gradients are equal."""
    found = []
    for again in (False, True):
        policy = common.shard(random_model("qwen2", dtype=torch.float64), world, again)
        logprobs, _ = common.token_logprobs(policy, common.make_batch(rows(tokenizer), world.device), 1.0)
        logprobs.sum().backward()
        found.append([common.full_tensor(p.grad) for p in policy.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_longer_context(architecture, model_folder, tokenizer, world, tmp_path):
    """--rope_theta and --max_positions change trainer, sampler and the exported config."""
    run = common.RunConfig(model=model_folder(architecture))
    plain = common.load_model(run, torch.float32, "sdpa")
    longer = dataclasses.replace(run, rope_theta=40000.0, max_positions=16384)
    policy, engine = common.load_policy(longer, world), TransformersEngine(longer, tokenizer, world)
    assert policy.model.config.max_position_embeddings == engine.model.config.max_position_embeddings == 16384
    group = common.Sampler(engine, tokenizer).generate([problem("q" * 30)], None, 4, 20, 1.0, (0,))[0]
    batch = common.make_batch(group, world.device)
    logprobs, _ = common.token_logprobs(policy, batch, 1.0)
    assert (logprobs - batch.sampler_logprobs)[batch.completion_mask].abs().max() < 1e-4
    ids = torch.arange(1, 60)[None]
    engine.model.save_pretrained(tmp_path / "final")
    saved = common.load_model(common.RunConfig(model=str(tmp_path / "final")), torch.float32, "sdpa")
    assert saved.config.rope_parameters["rope_theta"] == 40000 and saved.config.max_position_embeddings == 16384
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, engine.model(ids).logits)
        assert not torch.allclose(saved(ids).logits, plain(ids).logits)


def test_a_model_without_rotary_positions_is_refused(tmp_path):
    """GPT-2 learns its positions: --rope_theta has nothing to change, and says so."""
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="gpt2 has no rotary position embedding"):
        common.load_model(common.RunConfig(model=str(tmp_path), rope_theta=1e4))


FREED = """
import torch, common
common.init(0)
kept, found = [], []
for _ in range(2):
    large = [torch.ones(7_000_000) for _ in range(17)]
    kept.append(torch.ones(500_000))  # on top of the heap
    del large
    found.append(int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20)
print(found[1] - found[0])
"""


def test_freed_memory_goes_back():
    """A micro-batch is not kept by the allocator below a small tensor that outlives it."""
    assert float(run_script("-c", FREED, fresh=True).stdout) < 100
