"""Accuracy of a model folder on a file of problems: avg@n with an interval, pass@k, and the protocol that made them.

python eval.py --model runs/bread-tiny-x/final                       on the test problems of its settings.json
torchrun --nproc_per_node 8 eval.py --model Qwen2.5-1.5B-Instruct --data HuggingFaceH4/MATH-500 --samples 4
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as td
from tqdm import tqdm

import common


@dataclass
class Config:
    model: str = "tiny"  # model folder, hub name, or tiny (bundled)
    data: str = "HuggingFaceH4/MATH-500"  # problems: file or hub name; a model folder's settings.json may name its own
    out: str = ""  # JSON report, samples beside it; empty: eval-<data>.json in the model's folder (or here, for a hub name)
    samples: int = 8  # per problem, the n of avg@n (torchrun reads --n as its own)
    k: tuple[int, ...] = (1, 4, 8)  # of pass@k; those above samples are left out
    temperature: float = 0.6
    top_p: float = 1.0
    greedy: bool = False  # temperature 0 and one sample
    max_prompt_tokens: int = 1024  # longer prompts are dropped and counted
    max_tokens: int = 8192  # of a completion
    template: str = "auto"  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    columns: str = ""  # "problem=... answer=..." where the data set's names are not recognised
    many_boxes: str = "zero"  # several different boxes: zero, or last to take the last one
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # inference engine; auto: vLLM where there is one and a GPU
    sampler_memory: float = 0.8  # share of the GPU for vLLM
    tensor_parallel: int = 1  # ranks that share a vLLM engine
    seed: int = 0


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from c right ones of n: 1 - C(n - c, k) / C(n, k), as a product.

    Chen et al. 2021, arXiv 2107.03374, eq. 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 0 <= {c} right <= {n} samples and 1 <= k <= n")
    return 1.0 if n - c < k else float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def bootstrap_interval(scores: list[float], seed: int = 0, rounds: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of per-problem scores (P,), resampling problems: they, not the samples, are what is drawn."""
    values = np.asarray(scores)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(rounds)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarize(groups: list[list[dict]], ks: tuple[int, ...], seed: int) -> dict:
    """Table of results from samples grouped by problem, each with reward, finished, tokens, boxes."""
    right = [sum(s["reward"] for s in group) for group in groups]
    flat = [s for group in groups for s in group]
    n = len(groups[0])
    means = [r / n for r in right]
    return {
        "problems": len(groups),
        f"avg@{n}": float(np.mean(means)),
        "interval_95": bootstrap_interval(means, seed),
        **{f"pass@{k}": float(np.mean([pass_at_k(n, int(r), k) for r in right])) for k in ks if k <= n},
        "truncated": float(np.mean([not s["finished"] for s in flat])),
        "several_boxes": float(np.mean([s["boxes"] > 1 for s in flat])),
        "mean_tokens": float(np.mean([s["tokens"] for s in flat])),
    }


def main(cfg: Config) -> None:
    dist = common.init(cfg.seed)
    n, temperature = (1, 0.0) if cfg.greedy else (cfg.samples, cfg.temperature)
    tokenizer = common.load_tokenizer(cfg.model)
    problems = common.load_problems(cfg.data, tokenizer, cfg.template, cfg.columns, cfg.max_prompt_tokens, split="test")
    longest = cfg.max_prompt_tokens + cfg.max_tokens
    sampler = common.load_sampler(cfg.sampler, cfg.model, tokenizer, dist, longest, cfg.sampler_memory, cfg.tensor_parallel)
    samples, errors = {}, 0
    mine = range(dist.rank, len(problems), dist.world_size)
    for start in tqdm(range(0, len(mine), 64), desc="problems x 64", disable=None):
        chosen = mine[start : start + 64]
        asked = [problems[i] for i in chosen]
        groups = sampler.generate(asked, None, n, cfg.max_tokens, temperature, (cfg.seed,), cfg.top_p)
        flat = [rollout for group in groups for rollout in group]
        scores, failed = common.verify([r.text for r in flat], [r.problem.answer for r in flat], cfg.many_boxes)
        errors += failed
        rewards = iter(scores)
        for i, group in zip(chosen, groups, strict=True):
            samples[i] = [
                {
                    "id": r.problem.id,
                    "text": r.text,
                    "reward": next(rewards),
                    "finished": r.finished,
                    "tokens": len(r.completion_ids),
                    "boxes": len(set(common.boxed(r.text))),
                }
                for r in group
            ]
    gathered: list = [None] * dist.world_size
    td.all_gather_object(gathered, (samples, errors))
    if dist.rank == 0:
        samples = {i: group for part, _ in gathered for i, group in part.items()}
        groups = [samples[i] for i in sorted(samples)]
        result = summarize(groups, cfg.k, cfg.seed) | {"verifier_errors": sum(failed for _, failed in gathered)}
        file = Path(cfg.data)
        protocol = dataclasses.asdict(cfg) | {
            "samples": n,
            "temperature": temperature,
            "stop_ids": sampler.stop_ids,
            "data_sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "math-verify")},
        }
        folder = Path(common.resolve_model(cfg.model))
        out = Path(cfg.out or (folder if folder.is_dir() else Path.cwd()) / f"eval-{file.name.split('.')[0]}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(sample) + "\n" for group in groups for sample in group)
        common.write_atomic(out.with_suffix(".samples.jsonl"), lines)
        common.write_atomic(out, json.dumps({"result": result, "protocol": protocol}, indent=1) + "\n")
        print("protocol: " + " ".join(f"{k}={v}" for k, v in protocol.items() if v not in ("", None)))
        for name, value in result.items():
            shown = "  ".join(f"{v:.4f}" for v in value) if isinstance(value, tuple) else f"{value:.4f}".rstrip("0").rstrip(".")
            print(f"{name:>16}  {shown}")
        print(f"wrote {out} and {out.with_suffix('.samples.jsonl').name}")
    common.shutdown()


if __name__ == "__main__":
    main(common.parse(Config))
