"""What only a CUDA device shows: varlen attention, bf16 compute over fp32 masters, NCCL."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import warm
from conftest import problem, random_model, run_script

import common
from results import gpu

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="NO CUDA DEVICE: the GPU path is not tested; with one: pytest -m gpu")


@pytest.mark.gpu
@needs_gpu
def test_packed_logprobs_on_cuda(world):
    """bf16 varlen attention against fp32 SDPA of each row alone, and gradients in fp32."""
    policy = common.shard(random_model("qwen2"), world)
    rows = [common.Rollout(problem("p" * n), [token] * n + [0]) for n, token in ((1, 5), (9, 5), (9, 6), (30, 5))]
    batch = common.make_batch(rows, world.device, shared=[0, 0, 9, 0])  # of two rows the prompt stands once
    logprobs, _ = common.token_logprobs(policy, batch, 1.0)
    stock = random_model("qwen2", attention="sdpa")
    for b, row in enumerate(rows):
        line, start = torch.tensor([row.problem.prompt_ids + row.completion_ids]), len(row.problem.prompt_ids)
        alone = torch.log_softmax(stock(input_ids=line, use_cache=False).logits[0, start - 1 : -1], -1)
        wanted = alone.gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0]
        assert torch.allclose(logprobs[b, : len(wanted)].cpu(), wanted, atol=0.3)
    logprobs.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters())


@pytest.mark.gpu
@needs_gpu
def test_bread_on_cuda(tmp_path):
    """Two steps of the README's first command, with the sampler that auto takes there."""
    run_script("bread.py", *"--model map --steps 2 --problems_per_step 4 --out".split(), str(tmp_path / "run"))


@pytest.mark.gpu
@needs_gpu
def test_one_online_step_at_1_5b(tmp_path):
    """A step at the size of Qwen2.5-1.5B fits the card, and sampler and trainer agree in bf16."""
    cfg = gpu.Config("cuda")
    gpu.random_model(cfg, tmp_path / "model")
    line = gpu.step(cfg, tmp_path, "grpo", 280)
    assert "failed" not in line and 0.8 < float(line.split("|")[-2]) < 1.2, line


@pytest.mark.timeout(900)
def test_make_gpu_at_toy_size(tmp_path, monkeypatch):
    """Every part of the page is there, of four methods each."""

    def popen(command, **options):
        return (subprocess.Popen if "-m" in command else warm.Popen)(command, **options)

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))
    gpu.main(gpu.Config("cpu", out=str(tmp_path / "gpu.md")))
    page = (tmp_path / "gpu.md").read_text()
    assert "FAILED" not in page and "left out" not in page and "commit " in page and "MFU" in page, page
    for method in gpu.METHODS:
        assert f"| {method}, hf | " in page and f"\n{method}: peak " in page, page
    assert page.count(" | 1.000 |\n") == 4, page  # sampler and trainer agree


def test_make_gpu_out_of_time(tmp_path):
    """What there is no time for is named, and nothing else stops."""
    run_script("results/gpu.py", "--device", "cpu", "--seconds", "1", "--out", str(tmp_path / "gpu.md"))
    assert (tmp_path / "gpu.md").read_text().count("left out, the time is up") == 10


@pytest.mark.parametrize(
    "program,seconds,said",
    [
        ("print(1); assert False", 60, "exit code 1"),
        ("print(1, flush=True); import time; time.sleep(60)", 8, "not done"),
    ],
)
def test_what_fails_in_make_gpu_is_written_down(program, seconds, said):
    """The error and what was printed before it."""
    printed, wrong = gpu.run([sys.executable, "-c", program], seconds)
    assert printed.startswith("1") and said in wrong and "```\n1" in wrong


def test_make_gpu_ends_what_has_done_enough():
    """Not an error: the line of the step is there."""
    _, wrong = gpu.run([sys.executable, "-c", "import time; time.sleep(60)"], 30, lambda: True)
    assert wrong == ""
