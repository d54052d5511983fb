"""Packed, padded and alone give the same log-probabilities; EOS is trained, prompt and padding are not; ids are never re-made."""

import pytest
import torch
import transformers
from conftest import problem, random_model

import common


def rows(tokenizer) -> list[common.Rollout]:
    texts = [("ab", "hello"), ("ab ab ab", "x"), ("c c", "the quick brown fox"), ("a much longer prompt", "7")]
    return [common.Rollout(problem(p), [*tokenizer(c).input_ids, tokenizer.eos_token_id], min(2, len(c))) for p, c in texts]


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3", "gemma"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_padded_and_alone_agree(architecture, temperature, tokenizer, dist):
    stock = random_model(architecture, dtype=torch.float64, attention="sdpa")
    policy = common.shard(random_model(architecture, dtype=torch.float64), dist)
    batch = common.make_batch(rows(tokenizer), dist)
    logprobs, entropy = common.token_logprobs(policy, batch, temperature, True)
    lines = [r.problem.prompt_ids + r.completion_ids for r in batch.rollouts]
    width = max(map(len, lines))
    padded = torch.tensor([[0] * (width - len(line)) + line for line in lines])
    mask = torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in lines])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded_logits = stock(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone_total = 0
    for b, line in enumerate(lines):
        start, length = len(batch.prompt_ids[b]), batch.lengths[b]
        alone = torch.log_softmax(stock(input_ids=torch.tensor([line]), use_cache=False).logits[0] / temperature, -1)[
            start - 1 : -1
        ]
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


def test_a_neighbour_does_not_leak(tokenizer, dist):
    policy = common.shard(random_model("qwen2", dtype=torch.float64), dist)
    batch = rows(tokenizer)
    before, _ = common.token_logprobs(policy, common.make_batch(batch, dist), 1.0)
    batch[1].completion_ids = [9] * 2
    after, _ = common.token_logprobs(policy, common.make_batch(batch, dist), 1.0)
    assert (
        torch.equal(before[0], after[0])
        and torch.allclose(before[2], after[2], atol=1e-12)
        and not torch.equal(before[1], after[1])
    )


def test_masks(tokenizer, dist):
    """EOS is trained, padding is not; pad id equal to EOS id changes nothing; the expert mask is exactly the first k."""
    batch = common.make_batch(rows(tokenizer), dist)
    assert batch.completion_mask.sum(1).tolist() == [6, 2, 20, 2]
    last = [batch.completion_ids[b, length - 1].item() for b, length in enumerate(batch.lengths)]
    assert last == [tokenizer.eos_token_id] * 4
    assert all(batch.completion_mask[b, length - 1] for b, length in enumerate(batch.lengths))
    assert batch.expert_mask.sum(1).tolist() == [2, 1, 2, 1] and batch.expert_mask[:, 0].all()
    assert not batch.completion_mask[1, 2:].any()


def test_prompt_is_not_trained(tokenizer, dist):
    """The gradient at the prompt's own predictions is zero: changing the target there is impossible, and no column is one."""
    policy = common.shard(random_model("llama", dtype=torch.float64), dist)
    batch = common.make_batch(rows(tokenizer), dist)
    logprobs, _ = common.token_logprobs(policy, batch, 1.0)
    assert logprobs.shape == batch.completion_ids.shape and int((logprobs != 0).sum()) == sum(batch.lengths)


def test_microbatches_keep_every_row_once_and_the_budget(tokenizer, dist):
    all_rows = rows(tokenizer) * 3
    batches = common.microbatches(all_rows, 30, dist)
    assert sorted(id(r) for b in batches for r in b.rollouts) == sorted(id(r) for r in all_rows)
    for batch in batches:
        assert len(batch.rollouts) == 1 or sum(map(len, batch.prompt_ids)) + sum(batch.lengths) <= 30


def test_overfit_one_row_reproduces_it_and_stops(tokenizer, dist, model_folder):
    """An off-by-one, an untrained EOS or a trained prompt would show here."""
    sampler = common.Sampler(model_folder("qwen2"), tokenizer, dist)
    policy = common.load_policy(model_folder("qwen2"), dist)
    question = problem("what?", expert="it is 7")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(60):
        batch = common.make_batch([common.expert_rollout(question, tokenizer)], dist)
        logprobs, _ = common.token_logprobs(policy, batch, 1.0)
        (-logprobs.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    sampler.sync(policy)
    rollout = sampler.generate([question], None, 1, 30, 0.0, (0,))[0][0]
    assert rollout.completion_ids == question.expert_ids and rollout.finished and rollout.text == "it is 7"


def test_unsupported_attention_is_refused(dist):
    model = random_model("qwen2")
    layer = model.model.layers[0].self_attn
    q = k = v = torch.zeros(1, 4, 5, 8)
    with pytest.raises(NotImplementedError, match="softcap"):
        common.packed_attention(layer, q, k, v, None, 1.0, softcap=30.0, row_lengths=[5])
    with pytest.raises(NotImplementedError, match="sliding window"):
        common.packed_attention(layer, q, k, v, None, 1.0, sliding_window=3, row_lengths=[5])


def test_activation_checkpointing_changes_no_gradient(tokenizer, dist):
    found = []
    for again in (False, True):
        policy = common.shard(random_model("qwen2", dtype=torch.float64), dist, again)
        logprobs, _ = common.token_logprobs(policy, common.make_batch(rows(tokenizer), dist), 1.0)
        logprobs.sum().backward()
        found.append([common.full_tensor(p.grad) for p in policy.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_longer_context(architecture, model_folder, tokenizer, dist, monkeypatch, tmp_path):
    """--rope_theta and --max_positions reach trainer and sampler alike, change the model, and are in the exported config."""
    plain = common.load_model(model_folder(architecture), torch.float32, "sdpa")
    monkeypatch.setattr(common, "CONTEXT", {"rope_theta": 40000.0, "max_positions": 16384})
    policy = common.load_policy(model_folder(architecture), dist)
    sampler = common.Sampler(model_folder(architecture), tokenizer, dist)
    assert policy.model.config.max_position_embeddings == sampler.model.config.max_position_embeddings == 16384
    group = sampler.generate([problem("q" * 30)], None, 4, 20, 1.0, (0,))[0]
    batch = common.make_batch(group, dist)
    logprobs, _ = common.token_logprobs(policy, batch, 1.0)
    assert (logprobs - batch.sampler_logprobs)[batch.completion_mask].abs().max() < 1e-4
    ids = torch.arange(1, 60)[None]
    sampler.model.save_pretrained(tmp_path / "final")
    monkeypatch.setattr(common, "CONTEXT", {"rope_theta": 0.0, "max_positions": 0})
    saved = common.load_model(str(tmp_path / "final"), torch.float32, "sdpa")
    assert saved.config.rope_parameters["rope_theta"] == 40000 and saved.config.max_position_embeddings == 16384
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, sampler.model(ids).logits) and not torch.allclose(
            saved(ids).logits, plain(ids).logits
        )


def test_a_model_without_rotary_positions_is_refused(monkeypatch):
    monkeypatch.setattr(common, "CONTEXT", {"rope_theta": 1e4, "max_positions": 0})
    with pytest.raises(SystemExit, match="gpt2 has no rotary position embedding"):
        common.stretch(transformers.GPT2Config())
