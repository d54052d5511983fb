"""Each of results/architectures.py: as transformers computes it, or refused at load."""

import dataclasses

import pytest
import torch
from conftest import ROOT, byte_tokenizer, problem, run_script

import common
from core import model as core_model
from core.engines import longest_row
from results import architectures

FLOAT32 = "qwen2_moe qwen3_moe mixtral gpt_oss deepseek_v3".split()  # torch's grouped product has no float64
REFUSED = "gpt2 bloom falcon stablelm hyperclovax lfm2 mamba2 falcon_h1 rwkv qwen3_next llama4".split()
RUNS = [name for name in architectures.MODELS if name not in REFUSED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of an architecture's small model."""

    def make(name: str) -> str:
        path = tmp_path_factory.getbasetemp() / f"architecture-{name}"
        if not path.exists():
            architectures.small_model(name).save_pretrained(path)
            byte_tokenizer().save_pretrained(path)
        return str(path)

    return make


def rows(tokenizer) -> list[common.Rollout]:
    """Three ragged rows, two of them longer than every sliding window of the table."""
    texts = [("ab", "the quick brown fox"), ("c", "7"), ("a longer prompt", "hello there")]
    return [common.Rollout(problem(p), [*tokenizer(c).input_ids, tokenizer.eos_token_id], 1) for p, c in texts]


def alone(stock, batch: common.Batch, temperature: float) -> torch.Tensor:
    """Log-probabilities of the completion tokens, each row by itself through transformers."""
    found = []
    for row in batch.rollouts:
        line = torch.tensor([row.problem.prompt_ids + row.completion_ids])
        logits = stock(input_ids=line, use_cache=False).logits[0, len(row.problem.prompt_ids) - 1 : -1]
        logp = torch.log_softmax(logits / temperature, -1)
        found.append(logp.gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("name", RUNS)
def test_packed_is_each_row_alone(name, folder, tokenizer, world):
    """Log-probabilities, and the gradient of every parameter, in training mode against eager."""
    dtype, near = (torch.float32, 2e-4) if name in FLOAT32 else (torch.float64, 2e-5)
    run = common.RunConfig(model=folder(name))
    stock, policy = common.load_model(run, dtype, "eager"), common.shard(common.load_model(run, dtype), world)
    batch = common.make_batch(rows(tokenizer), world.device)
    logprobs, _ = common.token_logprobs(policy, batch, 0.7)
    wanted = alone(stock.eval(), batch, 0.7)
    assert torch.allclose(logprobs[batch.completion_mask], wanted, atol=near)
    logprobs.sum().backward()
    wanted.sum().backward()
    grads = {key: p.grad for key, p in stock.named_parameters() if p.grad is not None}
    found = {key: common.full_tensor(p.grad) for key, p in policy.model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()
    size = max(float(grad.abs().max()) for grad in grads.values())
    assert all(torch.allclose(found[key], grads[key], atol=near * size) for key in grads)


@pytest.mark.parametrize("name", RUNS)
def test_the_sampler_agrees(name, folder, tokenizer, world, capsys):
    """Past a sliding window too; the first sync says how well."""
    run = common.RunConfig(model=folder(name), sampler="hf", max_prompt_tokens=20)
    sampler, policy = common.load_sampler(run, tokenizer, world, 30), common.load_policy(run, world)
    sampler.sync(policy)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" between ")[1] for line in said] == [
        f"rows of {run.model} packed and alone",
        "sampler and trainer",
    ]
    group = sampler.generate([problem("q" * 14)], None, 3, 30, 1.0, (0,))[0]
    batch = common.make_batch(group, world.device)
    logprobs, _ = common.token_logprobs(policy, batch, 1.0)
    assert (logprobs - batch.sampler_logprobs)[batch.completion_mask].abs().max() < 1e-3


@pytest.mark.parametrize("name", RUNS)
def test_a_leak_is_refused(name, folder, world, monkeypatch):
    """Attention over the whole packed line, as a model that ignores the borders would have it."""
    whole = core_model.packed_attention

    def leaky(*args, rows, **features):
        return whole(*args, rows=rows._replace(queries=[sum(rows.queries)], keys=[sum(rows.keys)]), **features)

    core_model.transformers.AttentionInterface.register("packed", leaky)
    try:
        with pytest.raises(SystemExit, match=r"packed and alone are [\d.]+ nats apart, more than 0.001"):
            common.load_policy(common.RunConfig(model=folder(name)), world)
    finally:
        core_model.transformers.AttentionInterface.register("packed", whole)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_load(name, folder, world):
    """By one sentence, before a step."""
    with pytest.raises(SystemExit, match=r"^error: [^\n]*(trained here|could be loaded|cannot be packed)[^\n]*$"):
        common.load_policy(common.RunConfig(model=folder(name)), world)


def test_a_stale_sampler_is_refused(folder, tokenizer, world):
    """The first sync compares four sampled tokens with the trainer's log-probabilities."""
    run = common.RunConfig(model=folder("llama"), sampler="hf", max_prompt_tokens=20)
    sampler, policy = common.load_sampler(run, tokenizer, world, 30), common.load_policy(run, world)
    decode = sampler.engine.decode
    sampler.engine.decode = lambda *args: [[(ids, [x + 0.1 for x in found]) for ids, found in g] for g in decode(*args)]
    with pytest.raises(SystemExit, match="sampler and trainer are 0.1 nats apart"):
        sampler.sync(policy)


def test_longrope_keeps_to_its_first_table(folder):
    """A row past it would change the table of its neighbours: the window ends there."""
    run = common.RunConfig(model=folder("phi3 (longrope)"), max_prompt_tokens=24)
    assert longest_row(run, 40) == 64
    with pytest.raises(SystemExit, match="up to 65 tokens, the window of .* is 64"):
        longest_row(run, 41)
    with pytest.raises(SystemExit, match="is 64"):
        longest_row(dataclasses.replace(run, max_positions=4096), 41)


def test_two_ranks_check_and_refuse(folder):
    """A script over two processes: the line once, and the sentence once."""
    flags = ["--data", "tiny/train.jsonl", "--test_data", "", "--max_completion_tokens", "200"]
    flags += ["--steps", "1", "--problems_per_step", "2", "--out"]
    done = run_script("sft.py", "--model", folder("gemma2"), *flags, folder("gemma2") + "-run", nproc=2)
    assert done.stdout.count("log-probability check: ") == 1
    done = run_script("sft.py", "--model", folder("lfm2"), *flags, folder("lfm2") + "-run", nproc=2, check=False)
    assert done.returncode and done.stderr.count("Lfm2ForCausalLM cannot be trained here") == 1


def test_readme_table_is_current(world):
    """What python results/architectures.py prints."""
    assert f"{architectures.table(world)}\n" in (ROOT / "MANUAL.md").read_text(), "run: python results/architectures.py"
