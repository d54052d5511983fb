"""SFT, the baseline of Limozin et al. 2026: App. A for the schedule, App. D for the denominator."""

import math

from pages import kit

BASE = {"problems_per_step": 4, "max_completion_tokens": 60, "steps": 6, "lr": 0.01}
WORLDS = ("mixed",)  # nothing is sampled
SCENARIOS = {
    "warm-up": BASE | {"warmup": 0.45, "temperature": 0.7, "grad_clip": 0.5},  # 2.7 steps
    "no warm-up": BASE | {"warmup": 0.0, "final_lr": 0.0, "seed": 3, "weight_decay": 0.2},
    "warm-up alone": BASE | {"warmup": 1.0, "steps": 3},
    "wide draw": BASE | {"problems_per_step": 10, "steps": 4, "final_lr": 0.5},  # six problems: some are drawn twice
    "one trace": BASE | {"problems_per_step": 1, "warmup": 0.2, "seed": 2},  # nothing for a second rank
}


def rate(cfg, step: int) -> float:
    """Linear to the peak over the first steps, then half a cosine to final_lr of it."""
    warm = math.ceil(cfg.warmup * cfg.steps)
    if step < warm:
        return cfg.lr * (step + 1) / warm
    done = (step - warm) / (cfg.steps - warm)
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def page(cfg, problems, ask):
    """Whole traces, each token of the step with the same weight; nothing is sampled."""
    for step in range(cfg.steps):
        rows = [kit.trace(question) for question in kit.draw(problems, cfg.problems_per_step, step, cfg.seed)]
        tokens = sum(len(row.ids) for row in rows)
        yield [kit.Update(rows, lambda row, t, seen, n=tokens: -1 / n, rate(cfg, step), temperature=1.0)]
