"""What only a CUDA device shows: varlen attention, bf16 compute over fp32 masters, NCCL."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import warm
from conftest import ROOT, byte_tokenizer, problem, random_model, read_metrics, run_script

import common
from results import gpu

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="NO CUDA DEVICE: the GPU path is not tested on this machine")
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
QWEN_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}


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
    run_script("bread.py", *"--model tiny --steps 2 --problems_per_step 4 --out".split(), str(tmp_path / "run"))


def one_online_step(folder: Path, sizes: dict[str, int], vocab: int, tokens: int) -> dict:
    """GRPO on real problems with random weights of a real architecture: the step's metrics."""
    special = {"vocab_size": vocab, "eos_token_id": 0, "bos_token_id": None, "tie_word_embeddings": True}
    config = transformers.Qwen2Config(**sizes, **special)
    with torch.device("cuda" if CUDA else "cpu"):
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    flags = "--problems_per_step 8 --group_size 4 --steps 1 --sampler hf --checkpoint_activations --test_data=".split()
    flags += ["--max_completion_tokens", str(tokens), "--data", str(ROOT / "tests/data/gsm8k_sample.jsonl")]
    run_script("grpo.py", "--model", str(folder / "model"), *flags, "--out", str(folder / "run"), timeout=550)
    return read_metrics(folder / "run", clocks=True)[0]


@pytest.mark.gpu
@needs_gpu
def test_one_online_step_at_1_5b(tmp_path):
    """A step at the size of Qwen2.5-1.5B fits the card, and sampler and trainer agree in bf16."""
    row = one_online_step(tmp_path, QWEN_1_5B, 151936, 512)
    print({k: v for k, v in row.items() if k.startswith(("seconds", "tokens_per", "peak", "sampler"))})
    assert row["completion_tokens"] > 100 and 0.8 < row["sampler_ratio"] < 1.2


def test_the_same_step_small(tmp_path):
    """What the test above does, on any machine."""
    row = one_online_step(tmp_path, SMALL, 1000, 40)
    assert row["completion_tokens"] > 10 and abs(row["sampler_ratio"] - 1) < (0.2 if CUDA else 1e-3)


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
