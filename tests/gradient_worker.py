"""One optimizer step's gradient of grpo.py, bread.py or sft.py on fixed ragged rows, on any number of ranks.

torchrun --nproc_per_node 2 tests/gradient_worker.py OUT SPLIT BUDGET OPTIONS_JSON
"""

import json
import sys
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from conftest import problem, random_model  # noqa: E402

import bread  # noqa: E402
import common  # noqa: E402
import grpo  # noqa: E402
import sft  # noqa: E402

DEFAULTS = {
    "loss_norm": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "tis_cap": 0.0,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "entropy_coef": 0.0,
    "architecture": "qwen2",
    "method": "grpo",
    "shuffle": 0,
}
LENGTHS = [(3, 9, 0), (5, 1, 0), (2, 17, 4), (7, 4, 0), (1, 3, 2), (4, 12, 11), (2, 6, 0), (6, 2, 0)]  # prompt, completion, expert


def fixed_rows() -> list[common.Rollout]:
    torch.manual_seed(3)
    rows = []
    for i, (prompt, completion, expert) in enumerate(LENGTHS):
        ids = [*torch.randint(1, 257, (completion - 1,)).tolist(), 0]
        row = common.Rollout(problem("q" * prompt, id=str(i)), ids, expert, advantage=(-1.0) ** i * (0.5 + 0.1 * i))
        row.old_logprobs = -3 - 3 * torch.rand(completion)
        row.sampler_logprobs = (row.old_logprobs + torch.randn(completion))[expert:].tolist()
        rows.append(row)
    return rows


def split_rows(rows: list[common.Rollout], split: str, dist: common.Dist) -> list[common.Rollout]:
    """even: every second row; uneven: rank 1 has one row; empty: rank 1 has none."""
    if dist.world_size == 1:
        return rows
    parts = {"even": (rows[0::2], rows[1::2]), "uneven": (rows[1:], rows[:1]), "empty": (rows, [])}
    return parts[split][dist.rank]


def gradient(rows: list[common.Rollout], budget: int, options: dict, dist: common.Dist) -> dict[str, torch.Tensor]:
    """Gradient by parameter name (and the metrics), accumulated as the method's main does it."""
    o = DEFAULTS | options
    dtype = torch.float64
    policy = common.shard(random_model(o["architecture"], 0, dtype), dist)
    reference = common.shard(random_model(o["architecture"], 1, dtype), dist) if o["kl_coef"] else None
    if o["shuffle"]:
        rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(o["shuffle"]))]
    policy_tokens, expert_tokens, num_rows = common.count_tokens(rows, dist)
    total, log = {}, mock.Mock()
    for batch in common.microbatches(rows, budget, dist):
        logprobs, entropy = common.token_logprobs(policy, batch, 0.7, o["entropy_coef"] != 0)
        if o["method"] == "sft":
            loss, metrics = sft.loss_fn(logprobs, entropy, batch.completion_mask, policy_tokens + expert_tokens)
        else:
            module = {"grpo": grpo, "bread": bread}[o["method"]]
            mask, tokens = batch.completion_mask, policy_tokens + expert_tokens
            if o["method"] == "bread":
                mask, tokens = mask & ~batch.expert_mask, policy_tokens
            old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
            loss, metrics = module.loss_fn(
                logprobs,
                old_logprobs,
                batch.advantages,
                common.truncated_importance(old_logprobs, batch, o["tis_cap"], log),
                entropy,
                common.reference_logprobs(reference, batch, 0.7),
                mask,
                tokens,
                num_rows,
                32,
                *(o[k] for k in ("loss_norm", "clip_low", "clip_high", "kl_coef", "kl_estimator", "entropy_coef")),
            )
        loss.backward()
        total = {k: total.get(k, 0.0) + v.item() for k, v in metrics.items()}
    norm = common.clip_gradients(policy.parameters(), 0.0)
    found = {name: common.full_tensor(p.grad) for name, p in policy.model.named_parameters()}
    metrics = {f"metric/{k}": common.all_sum(torch.tensor(v, dtype=torch.float64), dist) for k, v in total.items()}
    return found | metrics | {"norm": norm}


if __name__ == "__main__":
    out, split, budget, options = sys.argv[1:]
    world = common.init(0)
    torch.set_num_threads(1)
    results = {
        name: gradient(split_rows(fixed_rows(), split, world), int(budget), chosen, world)
        for name, chosen in json.loads(options).items()
    }
    if world.rank == 0:
        torch.save(results, out)
    common.shutdown()
