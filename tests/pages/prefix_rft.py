"""Prefix-RFT, from Huang et al. 2025 equation 3; the filter and split are the official code's."""

import math

import numpy as np
from conftest import byte_tokenizer

import common
from pages import grpo, kit

BASE = grpo.BASE | {"entropy_coef": 0.0, "low_start": 0.5, "low_final": 0.05, "prefix_high": 0.55, "prefix_steps": 4}
SPLIT = BASE | {"advantages": "split"}
SCENARIOS = {
    "one update": BASE | {"updates_per_step": 1, "temperature": 0.7, "warmup_steps": 3, "steps": 6},
    "two updates": BASE
    | {"loss_norm": "token", "scale_by_std": True, "seed": 3, "lr": 0.05, "dual_clip": 1.1, "prefix_steps": 2}
    | {"clip_low": 0.1, "clip_high": 0.3, "tis_cap": 0.02, "keep_share": 0.5},
    "split": SPLIT
    | {"clip_low": -1.0, "clip_high": -1.0, "dual_clip": 0.0, "tis_cap": 0.0, "loss_norm": "sequence"}
    | {"low_start": 0.0, "low_final": 0.0, "min_prefix_tokens": 5, "keep_share": 1.0},
    "split by std": SPLIT
    | {"scale_by_std": True, "low_start": 0.95, "prefix_high": 0.95, "zero_variance": "drop", "updates_per_step": 1}
    | {"entropy_coef": 0.01, "seed": 3},  # of all right rows the continuation still has an advantage
    "micro-batch": BASE | {"keep_scope": "microbatch", "keep_share": 0.3, "lr": 0.03, "entropy_coef": 0.1},
    "no hybrid": BASE | {"hybrid_rows": 0, "lr": 0.05},
    "wide draw": BASE  # six problems: some are drawn twice
    | {"problems_per_step": 8, "group_size": 3, "steps": 2, "zero_variance": "drop", "min_prefix_tokens": 0}
    | {"low_start": 0.0, "low_final": 0.0, "prefix_high": 0.4, "keep_share": 0.0},
}


def prefix(cfg, question, step: int) -> list[int]:
    """A random share of the trace, from low(t) to prefix_high, that does not give it away."""
    fall = (1 + math.cos(math.pi * min(step / cfg.prefix_steps, 1))) / 2
    low = cfg.low_final + (cfg.low_start - cfg.low_final) * fall
    random = np.random.default_rng(common.group_seed((cfg.seed, step, 2), question))
    k = max(int(random.uniform(low, cfg.prefix_high) * len(question.expert_ids)), cfg.min_prefix_tokens)
    return question.expert_ids[: min(k, common.tokens_before_answer(question, byte_tokenizer()))]


def advantages(cfg, rewards: list[float]) -> list[tuple[float, float]]:
    """(of the prefix, of what the policy wrote) of every row; the last row is the hybrid one."""
    if cfg.advantages == "group" or not cfg.hybrid_rows:
        return [(a, a) for a in grpo.advantages(rewards, cfg.scale_by_std)]
    *plain, hybrid = rewards  # which is alone in its group: it has no std
    return [(a, a) for a in grpo.advantages(plain, cfg.scale_by_std)] + [(hybrid - sum(plain) / len(plain), hybrid)]


def kept(cfg, row: kit.Row, t: int, seen: kit.Seen) -> bool:
    """Whether a prefix token is not among the 1 - keep_share of lowest entropy."""
    rows = seen.microbatch if cfg.keep_scope == "microbatch" else [(row.expert, seen)]
    ranked = sorted(h for expert, one in rows for h in one.entropy[:expert])
    dropped = int(len(ranked) * (1 - cfg.keep_share) + 1e-9)
    return dropped < len(ranked) and seen.entropy[t] >= ranked[dropped]


def slope(cfg, a: float, ratio: float) -> float:
    """d/d log p of min(ratio A, clip(ratio) A), which is not below dual_clip A."""
    cut = a < 0 and ((cfg.clip_low >= 0 and ratio < 1 - cfg.clip_low) or 0 < cfg.dual_clip < ratio)
    return 0.0 if cut or (a > 0 and cfg.clip_high >= 0 and ratio > 1 + cfg.clip_high) else ratio * a


def weight(cfg, rows: list[kit.Row], row: kit.Row) -> float:
    """w of every token, the prefix included, by --loss_norm."""
    if cfg.loss_norm == "token":
        return 1 / sum(len(one.ids) for one in rows)
    return 1 / (len(rows) * (len(row.ids) if cfg.loss_norm == "sequence" else cfg.max_completion_tokens))


def page(cfg, problems, ask):
    """Plain rows and one that starts from a prefix; all are of one group."""
    for step in range(cfg.steps):
        drawn = kit.draw(problems, cfg.problems_per_step, step, cfg.seed)
        groups = ask((cfg.seed, step, 0), [(question, []) for question in drawn], cfg.group_size - cfg.hybrid_rows)
        if cfg.hybrid_rows:
            hybrid = ask((cfg.seed, step, 1), [(question, prefix(cfg, question, step)) for question in drawn], 1)
            groups = [a + b for a, b in zip(groups, hybrid, strict=True)]
        advantage, updates = {}, []
        for g, group in enumerate(groups):
            found = advantages(cfg, [row.reward for row in group])
            advantage |= {id(row): a for row, a in zip(group, found, strict=True)}
            if cfg.zero_variance == "drop" and not any(map(any, found)):
                groups[g] = []
        for u in range(cfg.updates_per_step):
            rows = [row for group in kit.part(groups, u, cfg.updates_per_step) for row in group]

            def coefficient(row, t, seen, rows=rows, advantage=advantage):
                mine, v = t >= row.expert, 1.0
                if mine and cfg.tis_cap:
                    v = min(math.exp(seen.before[t] - row.sampler[t - row.expert]), cfg.tis_cap)
                gain = slope(cfg, advantage[id(row)][mine], math.exp(seen.lp[t] - seen.before[t]))
                return -weight(cfg, rows, row) * v * gain if mine or kept(cfg, row, t, seen) else 0.0

            def bonus(row, t, seen, rows=rows):
                return -cfg.entropy_coef * weight(cfg, rows, row)

            lr = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
            updates.append(kit.Update(rows, coefficient, lr, bonus=bonus))
        yield updates
