"""What the code costs: the update phase against a plain padded loop, and the memory of every method by arithmetic.

python bench.py                            tokens a second, share of the matmul roofline, peak memory, beside the plain loop
python bench.py --what memory              GiB per GPU of the recipes, on 1, 2, 4 and 8 GPUs
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro

import common

RECIPES = {  # model of the paper's experiment; bytes a parameter besides weights, gradients, moments (16) and the sampler (2)
    "grpo sft luffy srft prefix_rft hpt trapo chord": ("Qwen2.5-7B", 0),
    "bread": ("Qwen2.5-1.5B", 0),
    "uft (with a reference)": ("Qwen2.5-0.5B", 4),
    "relift (a second Adam)": ("Qwen2.5-7B", 8),
    "bridge (a shadow with its Adam)": ("Qwen2.5-3B", 16),
    "iw_sft (with a reference)": ("Qwen2.5-32B", 4),
}
MODELS = {  # layers, hidden, vocabulary, parameters in billions
    "Qwen2.5-0.5B": (24, 896, 151936, 0.494),
    "Qwen2.5-1.5B": (28, 1536, 151936, 1.544),
    "Qwen2.5-3B": (36, 2048, 151936, 3.086),
    "Qwen2.5-7B": (28, 3584, 152064, 7.616),
    "Qwen2.5-32B": (64, 5120, 152064, 32.76),
}


@dataclass
class Config:
    what: Literal["update", "memory"] = "update"
    way: Literal["both", "packed", "padded"] = "both"  # one of them: in this process, as a JSON line
    layers: int = 4
    hidden: int = 256
    vocab: int = 32768
    rows: int = 16  # of an update
    longest: int = 256  # completion tokens, lengths uniform from an eighth of it
    tokens_per_microbatch: int = 16384  # memory: of the recipes; update: 4096 of it on a CPU
    rounds: int = 2  # timed; the fastest counts
    checkpoint_activations: bool = True  # memory only
    tensor_parallel: int = 1  # memory only: ranks that share a sampler's copy of the weights


def memory_per_gpu(model: str, extra: int, gpus: int, tokens: int, checkpointed: bool, tensor_parallel: int = 1) -> float:
    """GiB: shards of weights, gradients and moments, the sampler's whole copy, activations of one micro-batch, head, gathers.

    Activations: one bf16 vector a token and layer with checkpointing, about 34 without (Korthikanti et al. 2022, 2205.05198,
    without attention scores); one layer is recomputed. The KV cache takes what is left.
    """
    layers, hidden, vocab, billions = MODELS[model]
    parameters = billions * 1e9
    sharded = parameters * (16 + extra) / gpus
    gathered = 2 * 2 * (parameters / layers + vocab * hidden)  # one layer ahead, and the root with the embedding, in bf16
    activations = tokens * hidden * ((2 * layers + 34) if checkpointed else 34 * layers)
    return (sharded + 2 * parameters / min(tensor_parallel, gpus) + gathered + activations + 3 * 2**28) / 2**30


def print_memory(cfg: Config) -> None:
    """The table of the README."""
    print(f"| method | model | {' | '.join(f'{n} GPU' for n in (1, 2, 4, 8))} |\n|---|---|---|---|---|---|")
    rest = (cfg.tokens_per_microbatch, cfg.checkpoint_activations, cfg.tensor_parallel)
    for methods, (model, extra) in RECIPES.items():
        cells = [memory_per_gpu(model, extra, n, *rest) for n in (1, 2, 4, 8)]
        print(f"| {methods} | {model} | {' | '.join(f'{c:.0f}' for c in cells)} |")


def ragged_rows(cfg: Config) -> list[common.Rollout]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(cfg.rows):
        prompt, length = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((16, 64), (cfg.longest // 8, cfg.longest))
        )
        ids = torch.randint(0, cfg.vocab, (prompt + length,), generator=generator).tolist()
        rows.append(common.Rollout(common.Problem(str(i), "", ids[:prompt], "", None), ids[prompt:]))
    return rows


def build(cfg: Config, attention: str) -> transformers.PreTrainedModel:
    heads = max(1, cfg.hidden // 64)
    config = transformers.Qwen2Config(
        vocab_size=cfg.vocab,
        hidden_size=cfg.hidden,
        intermediate_size=int(cfg.hidden * 5.5) // 64 * 64,
        num_hidden_layers=cfg.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 6),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def packed_update(policy: common.Policy, rows: list[common.Rollout], budget: int, dist: common.Dist) -> None:
    """What grpo.py does between rewards and optimizer.step, with the simplest loss."""
    total = sum(len(r.completion_ids) for r in rows)
    for batch in common.microbatches(rows, budget, dist):
        logprobs, _ = common.token_logprobs(policy, batch, 1.0)
        (-torch.where(batch.completion_mask, logprobs, 0.0).sum() / total).backward()


def padded_update(model: transformers.PreTrainedModel, rows: list[common.Rollout], budget: int, dist: common.Dist) -> None:
    """The plain loop: rows in their order, padded to the longest, logits of the whole line."""
    total, longest = sum(len(r.completion_ids) for r in rows), max(len(r.problem.prompt_ids) + len(r.completion_ids) for r in rows)
    size = max(1, budget // longest)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        lines = [[*r.problem.prompt_ids, *r.completion_ids] for r in part]
        width = max(map(len, lines))
        ids = torch.tensor([line + [0] * (width - len(line)) for line in lines], device=dist.device)
        mask = torch.tensor([[1] * len(line) + [0] * (width - len(line)) for line in lines], device=dist.device)
        trained = mask.bool().clone()
        for row, r in zip(trained, part, strict=True):
            row[: len(r.problem.prompt_ids)] = False
        with torch.autocast(dist.device.type, torch.bfloat16, enabled=dist.device.type == "cuda"):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logprobs = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        (-torch.where(trained[:, 1:], logprobs, 0.0).sum() / total).backward()


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of one large matrix product, in the precision of the compute."""
    dtype, size = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 1024)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(cfg: Config) -> None:
    """One way of the update in this process; a JSON line with tokens a second, share of the roofline and peak memory."""
    dist = common.init(0)
    rows, budget = ragged_rows(cfg), cfg.tokens_per_microbatch // (4 if dist.device.type == "cpu" else 1)
    model = build(cfg, "packed" if cfg.way == "packed" else "sdpa")
    weights = sum(p.numel() for p in model.parameters())  # tied: the embedding is the head and multiplies once a token
    module = common.shard(model, dist) if cfg.way == "packed" else model.to(dist.device).train()
    update = packed_update if cfg.way == "packed" else padded_update
    before, best = common.peak_memory_mb(dist.device), float("inf")
    for _ in range(cfg.rounds + 1):  # the first warms up
        start = time.perf_counter()
        update(module, rows, budget, dist)
        if dist.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        module.zero_grad()
    tokens = sum(len(r.problem.prompt_ids) + len(r.completion_ids) for r in rows)
    result = {"way": cfg.way, "seconds": best, "tokens_per_second": tokens / best, "parameters": weights}
    result["roofline"] = 6 * weights * tokens / best / matmul_flops(dist.device)  # attention's own products not counted
    result["peak_mb_above_start"] = common.peak_memory_mb(dist.device) - before
    print(json.dumps(result))
    common.shutdown()


def main(cfg: Config) -> None:
    if cfg.what == "memory":
        return print_memory(cfg)
    if cfg.way != "both":
        return measure(cfg)
    found = {}
    for way in ("packed", "padded"):  # a process each: the peak memory is the process's
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--way", way]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        found[way] = json.loads(done.stdout.splitlines()[-1])
        print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found[way].items()), flush=True)
    packed, padded = found["packed"], found["padded"]
    print(
        f"packed / padded: {padded['seconds'] / packed['seconds']:.2f} x the speed, "
        f"{packed['peak_mb_above_start'] / padded['peak_mb_above_start']:.2f} x the peak memory"
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
