"""DAPO, from Yu et al. 2025 (dynamic sampling, soft overlong punishment) and the docstring."""

import dataclasses
import math

from pages import kit
from pages.grpo import advantages, slope, weight

BASE = {"problems_per_step": 4, "group_size": 4, "max_completion_tokens": 7, "kl_coef": 0.0, "steps": 4, "lr": 0.01}
SCENARIOS = {
    "kept": BASE | {"zero_variance": "keep", "updates_per_step": 2, "overlong_cache": 0.5, "temperature": 0.7},
    "until full": BASE | {"updates_per_step": 2, "warmup_steps": 3, "steps": 6, "temperature": 0.7},
    "one round": BASE | {"resample_rounds": 0, "updates_per_step": 4, "seed": 3, "overlong_cache": 0.6, "steps": 6},
    "two rounds": BASE
    | {"resample_rounds": 1, "problems_per_step": 5, "updates_per_step": 2, "group_size": 2, "loss_norm": "sequence"}
    | {"overlong_coef": 1.0, "overlong_cache": 0.5, "warmup_steps": 0, "steps": 6, "tis_cap": 0.1, "seed": 10},
    "no penalty": BASE
    | {"overlong_cache": 0.0, "updates_per_step": 1, "loss_norm": "constant", "tis_cap": 0.0, "scale_by_std": False},
    "clips": BASE | {"updates_per_step": 2, "warmup_steps": 0, "clip_low": 0.1, "clip_high": -1.0, "seed": 1},
    "wide draw": BASE | {"problems_per_step": 8, "updates_per_step": 3, "warmup_steps": 2},  # of six problems
}


def line(problems, first: int, n: int, seed: int) -> list:
    """The n problems from a place on, in the line of shuffled epochs."""
    drawn = []
    for place in range(first, first + n):
        [found] = kit.draw(problems, 1, place, seed)
        drawn.append(dataclasses.replace(found, occurrence=sum(other.id == found.id for other in drawn)))
    return drawn


def penalized(cfg, row: kit.Row) -> float:
    """R: the reward, less what the last part of the length costs."""
    cache = cfg.overlong_cache * cfg.max_completion_tokens
    free = cfg.max_completion_tokens - cache
    return row.reward + (cfg.overlong_coef * (free - len(row.ids)) / cache if len(row.ids) > free else 0.0)


def page(cfg, problems, ask):
    """Rounds until the batch is full; a step with less makes fewer updates, with even shares."""
    wanted, place = cfg.problems_per_step, 0
    for step in range(cfg.steps):
        batch, rounds = [], 0
        while len(batch) < wanted and rounds <= cfg.resample_rounds:
            drawn = line(problems, place, wanted, cfg.seed)
            for group in ask((cfg.seed, step, rounds), [(question, []) for question in drawn], cfg.group_size):
                if len(batch) < wanted:  # what is beyond a full batch comes first in the next step
                    place += 1
                    right = sum(row.reward == 1 for row in group)
                    batch += [group] if cfg.zero_variance == "keep" or 0 < right < len(group) else []
            rounds += 1
        advantage, updates = {}, []
        for group in batch:
            values = advantages([penalized(cfg, row) for row in group], cfg.scale_by_std)
            advantage |= {id(row): a for row, a in zip(group, values, strict=True)}
        made = max(1, math.ceil(len(batch) * cfg.updates_per_step / wanted))  # without rows one changes nothing
        for u in range(made):
            rows = [row for group in kit.part(batch, u, made) for row in group]

            def coefficient(row, t, seen, rows=rows, advantage=advantage):
                gain = slope(cfg, advantage[id(row)], row.sampler[t], seen.before[t], seen.lp[t])
                return -weight(cfg, rows, row) * gain

            lr = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
            updates.append(kit.Update(rows, coefficient, lr))
        yield updates
