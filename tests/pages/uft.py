"""UFT, from Liu et al. 2025 equation 3.3 and its cosine; chunks and means as the official code."""

import math

import numpy as np
from conftest import byte_tokenizer

import common
from pages import grpo, kit

BASE = grpo.BASE | {"entropy_coef": 0.0, "hint_steps": 4, "updates_per_step": 2}
SCENARIOS = {
    "one update": BASE | {"updates_per_step": 1, "temperature": 0.7, "warmup_steps": 3, "steps": 6},
    "sum": BASE
    | {"hint_norm": "sum", "hint_coef": 0.3, "loss_norm": "sequence", "seed": 3, "lr": 0.05, "tis_cap": 0.02}
    | {"hint_high": 0.8, "hint_low": 0.3, "hint_steps": 2, "format_reward": 0.4},
    "k3": BASE | {"kl_coef": 0.1, "loss_norm": "constant", "scale_by_std": False, "tis_cap": 0.0, "lr": 0.05},
    "k2": BASE | {"kl_coef": 0.1, "kl_estimator": "k2", "hint_unit": "segment", "hint_chunks": 1, "lr": 0.05},
    "k1": BASE | {"kl_coef": 0.1, "kl_estimator": "k1", "hint_unit": "token", "temperature": 1.3, "lr": 0.05},
    "uniform": BASE | {"schedule": "uniform", "hint_steps": 1, "hint_chunks": 3, "updates_per_step": 4},
    "uniform segments": BASE
    | {"schedule": "uniform", "hint_unit": "segment", "hint_chunks": 1, "steps": 2, "clip_low": 0.1, "clip_high": 0.3}
    | {"lr": 0.05},
    "uniform tokens": BASE
    | {"schedule": "uniform", "hint_unit": "token", "steps": 2, "clip_low": -1.0, "clip_high": -1.0, "hint_coef": 0.0},
    "dropped": BASE | {"zero_variance": "drop", "format_reward": 0.0, "hint_coef": 0.1, "entropy_coef": 0.1},
    "no hints": BASE | {"hint_high": 0.0, "hint_low": 0.0, "steps": 2},
    "wide draw": BASE | {"problems_per_step": 8, "steps": 2},  # six problems: some are drawn twice
}


def hint(cfg, question, step: int) -> list[int]:
    """The first k pieces of what can be shown: k is binomial, or any number, of one draw each."""
    ends, _ = common.shown_ends(question, byte_tokenizer())
    cuts = common.regroup(ends, cfg.hint_chunks if cfg.hint_unit == "chunk" else len(ends))
    if cfg.hint_unit == "token":
        cuts = list(range(cuts[-1] + 1))
    t, random = step + 1, np.random.default_rng(common.group_seed((cfg.seed, step, 1), question))
    if cfg.schedule == "uniform":
        return question.expert_ids[: cuts[random.integers(len(cuts))]]
    p = cfg.hint_low + (cfg.hint_high - cfg.hint_low) * (1 + math.cos(math.pi * t / cfg.hint_steps)) / 2
    return question.expert_ids[: cuts[random.binomial(len(cuts) - 1, p if t <= cfg.hint_steps else 0.0)]]


def slope_of_kl(estimator: str, log_ratio: float) -> float:
    """d/d log p of KL(policy || reference) at a token; k1 has k2's, and k3 none from 10 on."""
    if estimator != "k3":
        return log_ratio
    return 1 - math.exp(-log_ratio) if math.exp(-log_ratio) - 1 + log_ratio < 10 else 0.0


def page(cfg, problems, ask):
    """A hint that all rows of a group share: GRPO on the rest, a little likelihood on the hint."""
    for step in range(cfg.steps):
        drawn = kit.draw(problems, cfg.problems_per_step, step, cfg.seed)
        groups = ask((cfg.seed, step, 0), [(q, hint(cfg, q, step)) for q in drawn], cfg.group_size)
        advantage, updates = {}, []
        for g, group in enumerate(groups):
            rewards = [row.reward or cfg.format_reward * ("\\boxed" in row.text) for row in group]
            scored = zip(group, grpo.advantages(rewards, cfg.scale_by_std), strict=True)
            advantage |= {id(row): a for row, a in scored}
            if cfg.zero_variance == "drop" and len(set(rewards)) == 1:
                groups[g] = []
        for u in range(cfg.updates_per_step):
            rows = [row for group in kit.part(groups, u, cfg.updates_per_step) for row in group]
            shared = len(rows) if cfg.hint_norm == "sum" else sum(row.expert for row in rows)

            def coefficient(row, t, seen, rows=rows, shared=shared, advantage=advantage):
                if t < row.expert:
                    return -cfg.hint_coef / shared
                sampler = row.sampler[t - row.expert]
                gain = grpo.slope(cfg, advantage[id(row)], sampler, seen.before[t], seen.lp[t])
                kl = cfg.kl_coef * slope_of_kl(cfg.kl_estimator, seen.lp[t] - seen.start[t])
                return grpo.weight(cfg, rows, row) * (kl - gain)

            def bonus(row, t, seen, rows=rows):
                return 0.0 if t < row.expert else -cfg.entropy_coef * grpo.weight(cfg, rows, row)

            lr = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
            updates.append(kit.Update(rows, coefficient, lr, bonus=bonus))
        yield updates
