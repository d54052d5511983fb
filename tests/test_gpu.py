"""What only a CUDA device shows: varlen attention, bf16 compute over fp32 masters, NCCL."""

import pytest
import torch
from conftest import problem, random_model, run_script

import common

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the GPU path is not tested on this machine"),
]


def test_packed_logprobs_on_cuda(dist):
    """bf16 varlen attention against fp32 SDPA of each row alone, and gradients in fp32."""
    policy = common.shard(random_model("qwen2"), dist)
    rows = [common.Rollout(problem("p" * n), [5] * n + [0]) for n in (1, 9, 30)]
    batch = common.make_batch(rows, dist)
    logprobs, _ = common.token_logprobs(policy, batch, 1.0)
    stock = random_model("qwen2", attention="sdpa")
    for b, row in enumerate(rows):
        line = torch.tensor([row.problem.prompt_ids + row.completion_ids])
        alone = torch.log_softmax(stock(input_ids=line, use_cache=False).logits[0, len(row.problem.prompt_ids) - 1 : -1], -1)
        wanted = alone.gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0]
        assert torch.allclose(logprobs[b, : len(wanted)].cpu(), wanted, atol=0.3)
    logprobs.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters())


def test_bread_on_cuda(tmp_path):
    run_script("bread.py", "--model", "tiny", "--steps", "2", "--problems_per_step", "4", "--out", str(tmp_path / "run"))
