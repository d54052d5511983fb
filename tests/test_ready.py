"""What a run on GPUs rests on, as far as a machine without one can show it."""

import time
from unittest import mock

import pytest
import torch
from conftest import byte_tokenizer, random_model, run_script, train
from safetensors.torch import load_file

import common
import core.model
from core import engines, processes


# Ranks --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma"])
def test_rank_0_alone_reads_the_weights(architecture, tmp_path):
    """The others get weights, buffers and ties from it, and hold their shards alone."""
    random_model(architecture).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    done = run_script("tests/ready_worker.py", "weights", str(tmp_path), nproc=2)
    assert "rank 1 is done" in done.stdout


def test_a_slow_rank_is_named():
    done = run_script("tests/ready_worker.py", "slow", nproc=2)
    assert "no new phase for 1 s: rank 0 in update since" in done.stdout and "rank 1 in rollouts since" in done.stdout


def test_a_dead_rank_ends_the_others():
    """Under torchrun, within a minute, with a sentence that names it."""
    start = time.perf_counter()
    done = run_script("tests/ready_worker.py", "dead", nproc=2, check=False, fresh=True)
    assert done.returncode and time.perf_counter() - start < 60
    assert "SIGKILL" in done.stderr and "is done" not in done.stdout


def test_an_old_card_is_refused(monkeypatch):
    """Turing has no bf16; the sentence comes before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(SystemExit, match="Tesla T4 is older than Ampere"):
        processes.init(0)


# The engine ---------------------------------------------------------------------------------------
def test_the_engine_is_made_at_its_first_use(world):
    """Behind Adam's moments and a checkpoint; what cannot be is said before."""
    make = mock.Mock()
    engine = engines.LateEngine(make)
    engine.sleep()
    assert not make.called
    engine.sync([])
    engine.sleep()
    assert make.call_count == 1 and make().sync.called and make().sleep.called
    with pytest.raises(SystemExit, match="window"):
        common.load_sampler(common.RunConfig(model="tiny"), common.load_tokenizer("tiny"), world, 10**6)


@pytest.mark.parametrize("method", ["sft", "iw_sft"])
def test_an_offline_method_evaluates_the_policy_as_it_is(method, tmp_path, monkeypatch):
    """It syncs when it evaluates, and has no engine before, none at all without test problems."""
    seen, made = [], []

    def evaluate(sampler, *_):
        seen.append(sampler.engine.made.model.get_input_embeddings().weight.clone())
        return {"test_accuracy": 0.0}

    engine = engines.TransformersEngine
    monkeypatch.setattr(engines, "TransformersEngine", lambda *args: made.append(1) or engine(*args))
    monkeypatch.setattr(common, "evaluate", evaluate)
    flags = ["--model", "tiny", "--steps", 2, "--eval_every", 1, "--problems_per_step", 2, "--lr", 1e-3]
    train(method, *flags, "--out", tmp_path / "run")
    final = load_file(tmp_path / "run/final/model.safetensors")["model.embed_tokens.weight"]
    assert len(seen) == 3 and len(made) == 1 and torch.allclose(seen[-1], final.float(), atol=1e-2)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    train(method, *flags, "--test_data", "", "--out", tmp_path / "untested")
    assert len(made) == 1


def test_a_model_that_cannot_recompute_is_one_sentence(world):
    model = random_model("qwen2")
    model.supports_gradient_checkpointing = False
    with pytest.raises(SystemExit, match="Qwen2ForCausalLM cannot recompute its layers: --no-checkpoint_activations"):
        common.shard(model, world, True)


# The forward --------------------------------------------------------------------------------------
def test_bf16_logits_are_summed_in_fp32():
    """Log-probabilities from bf16 numbers as exact as fp32 has them, gradients as bf16 has them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 256, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(4000, 256, generator=generator) / 8).bfloat16().requires_grad_()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    logits = core.model.Fp32Logits.apply(hidden, weight)
    assert logits.dtype == torch.float32 and (logits.log_softmax(-1) - exact).abs().max() < 1e-5
    assert ((hidden @ weight.T).float().log_softmax(-1) - exact).abs().mean() > 2e-3
    found = torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), (hidden, weight))
    for gradient, wanted in zip(found, torch.autograd.grad(exact[:, 7].sum(), (hidden, weight)), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - wanted.float()).norm() < 0.01 * wanted.float().norm()


def test_a_bf16_policy_takes_them(world, monkeypatch):
    """As on CUDA: bf16 compute over fp32 masters, whose log-probabilities are fp32."""
    policy, taken = common.shard(random_model("qwen2", dtype=torch.bfloat16), world), []
    whole = core.model.Fp32Logits.forward
    monkeypatch.setattr(core.model.Fp32Logits, "forward", lambda ctx, *a: taken.append(a[0].dtype) or whole(ctx, *a))
    logprobs = core.model.packed_logprobs(policy, [[*range(9)]], world.device)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32 and set(taken) == {torch.bfloat16}


@pytest.mark.parametrize("torch_has_gqa", [True, False])
def test_varlen_attention_is_asked_as_this_torch_has_it(torch_has_gqa, monkeypatch):
    """torch 2.11 has no enable_gqa: the key heads are repeated there."""
    seen = []

    def new(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        seen.append((key.shape[1], value.shape[1], enable_gqa, window_size, max_q))
        return query.clone()

    def old(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return new(query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setattr(core.model, "varlen_attn", new if torch_has_gqa else old)
    on_cuda = type("OnCuda", (torch.Tensor,), {"is_cuda": True})
    q, k = torch.randn(1, 8, 12, 16).as_subclass(on_cuda), torch.randn(1, 2, 12, 16)
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    rows = core.model.Rows([5, 7], [5, 7], borders, borders, None)
    out, _ = core.model.packed_attention(None, q, k, k, None, 0.25, rows=rows)
    assert out.shape == (1, 12, 8, 16)
    assert seen == [(2, 2, True, (-1, 0), 7) if torch_has_gqa else (8, 8, False, (-1, 0), 7)]
