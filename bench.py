"""What the code costs: the update phase beside a plain padded loop, and the memory of a method.

python bench.py                  tokens a second, share of the matmul roofline, peak memory
python bench.py --what memory    GiB per GPU of the papers' experiments: the table of MANUAL.md
python bench.py --what memory --method bread --model Qwen2.5-7B --gpus 8
                                 measured now, in seconds, without a GPU and without weights; any
                                 flag of the method may follow (results/memory.py says how)
"""

import importlib
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
from core.config import with_flags
from core.records import peak_memory_mb
from results import memory
from results.methods import METHODS


@dataclass
class Config:
    what: Literal["update", "memory"] = "update"
    way: Literal["both", "packed", "padded"] = "both"  # one of them: in this process, as a JSON line
    layers: int = 4
    hidden: int = 256
    vocab: int = 32768
    rows: int = 16  # of an update
    longest: int = 256  # completion tokens, lengths uniform from an eighth of it
    tokens_per_microbatch: int = 16384  # memory: as it is; update: a quarter of it on a CPU
    rounds: int = 2  # timed; the fastest counts
    method: str = ""  # memory only: a method file; empty: the table of the records
    gpus: int = 8  # memory only


def print_memory(cfg: Config, flags: list[str]) -> None:
    """The records as a table, or what one method needs with its flags."""
    if not cfg.method:
        return print(memory.table())
    names = [method.name for method in METHODS]
    if cfg.method not in names:
        common.fail(f"--method {cfg.method}: there is no such file; the methods are {', '.join(names)}")
    config = importlib.import_module(cfg.method).Config
    asked = tyro.cli(config, args=flags, prog=f"{cfg.method}.py", config=(tyro.conf.OmitArgPrefixes,))
    asked = with_flags(asked, {"tokens_per_microbatch": cfg.tokens_per_microbatch})
    print("\n".join(memory.lines(memory.measure(cfg.method, asked, cfg.gpus))))


def ragged_rows(cfg: Config) -> list[common.Rollout]:
    """Rows of random tokens of random lengths, prompts of 16 to 63."""
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(cfg.rows):
        prompt = int(torch.randint(16, 64, (), generator=generator))
        length = int(torch.randint(cfg.longest // 8, cfg.longest, (), generator=generator))
        ids = torch.randint(0, cfg.vocab, (prompt + length,), generator=generator).tolist()
        rows.append(common.Rollout(common.Problem(str(i), "", ids[:prompt], "", None), ids[prompt:]))
    return rows


def build(cfg: Config, attention: str, device: torch.device) -> transformers.PreTrainedModel:
    """A Qwen2 of the size that was asked for, with random weights."""
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
    with device:  # random numbers for 1.5 B weights take one core a minute
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def packed_update(policy: common.Policy, rows: list[common.Rollout], budget: int, world: common.World) -> None:
    """What grpo.py does between rewards and optimizer.step, with the simplest loss."""
    total = sum(len(r.completion_ids) for r in rows)
    for batch in common.microbatches(rows, budget, world):
        logprobs, _ = common.token_logprobs(policy, batch, 1.0)
        (-torch.where(batch.completion_mask, logprobs, 0.0).sum() / total).backward()


def padded_update(
    model: transformers.PreTrainedModel, rows: list[common.Rollout], budget: int, world: common.World
) -> None:
    """The plain loop: rows in their order, padded to the longest, logits of the whole line."""
    device, total = world.device, sum(len(r.completion_ids) for r in rows)
    longest = max(len(r.problem.prompt_ids) + len(r.completion_ids) for r in rows)
    size = max(1, budget // longest)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        lines = [[*r.problem.prompt_ids, *r.completion_ids] for r in part]
        width = max(map(len, lines))
        ids = torch.tensor([line + [0] * (width - len(line)) for line in lines], device=device)
        mask = torch.tensor([[1] * len(line) + [0] * (width - len(line)) for line in lines], device=device)
        trained = mask.bool().clone()
        for row, r in zip(trained, part, strict=True):
            row[: len(r.problem.prompt_ids)] = False
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
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
    """One way of the update in this process.

    A JSON line with tokens a second, share of the roofline and peak memory.
    """
    world = common.init(0)
    rows, budget = ragged_rows(cfg), cfg.tokens_per_microbatch // (4 if world.device.type == "cpu" else 1)
    model = build(cfg, "packed" if cfg.way == "packed" else "sdpa", world.device)
    weights = sum(p.numel() for p in model.parameters())  # tied: the embedding is the head and multiplies once a token
    module = common.shard(model, world) if cfg.way == "packed" else model.train()
    update = packed_update if cfg.way == "packed" else padded_update
    before, best = peak_memory_mb(world.device), float("inf")
    for _ in range(cfg.rounds + 1):  # the first warms up
        start = time.perf_counter()
        update(module, rows, budget, world)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        module.zero_grad()
    tokens = sum(len(r.problem.prompt_ids) + len(r.completion_ids) for r in rows)
    flops = 6 * weights * tokens / best  # attention's own products not counted
    result = {"way": cfg.way, "seconds": best, "tokens_per_second": tokens / best, "parameters": weights}
    result["roofline"] = flops / matmul_flops(world.device)
    result["peak_mb_above_start"] = peak_memory_mb(world.device) - before
    print(json.dumps(result))
    common.shutdown()


def main(cfg: Config, flags: list[str]) -> None:
    if cfg.what == "memory":
        return print_memory(cfg, flags)
    if flags:
        common.fail(f"{' '.join(flags)}: python bench.py knows no such flag")
    if cfg.way != "both":
        return measure(cfg)
    found, environment = {}, {"OMP_NUM_THREADS": "1"} | os.environ
    for way in ("packed", "padded"):  # a process each: the peak memory is the process's
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found[way].items())
        print(" ".join(shown), flush=True)
    packed, padded = found["packed"], found["padded"]
    print(
        f"packed / padded: {padded['seconds'] / packed['seconds']:.2f} x the speed, "
        f"{packed['peak_mb_above_start'] / padded['peak_mb_above_start']:.2f} x the peak memory"
    )


if __name__ == "__main__":
    main(*tyro.cli(Config, description=__doc__, return_unknown_args=True))
