"""iw-SFT, from Qin and Springenberg 2025, and the other weights of the docstring's table."""

import math

import numpy as np

from pages import kit
from pages.sft import BASE as SFT
from pages.sft import rate

BASE = SFT | {"lr": 0.02, "warmup": 0.3}
WORLDS = ("mixed",)  # nothing is sampled
STEP, EMA = {"weight": "iw_step"}, {"q": "ema", "q_decay": 0.6}
SCENARIOS = {
    "iw": BASE,
    "iw bent": BASE | {"power": 0.5, "weight_high": 3.5, "loss_norm": "sequence", "temperature": 0.7, "beta2": 0.9},
    "iw normalized": BASE | {"normalize": True, "seed": 3, "warmup": 0.0, "final_lr": 0.3, "grad_clip": 0.5},
    "iw ema": BASE | EMA | {"problems_per_step": 10},  # six problems: some are drawn twice
    "iw reference": BASE | {"q": "reference", "loss_norm": "sequence", "warmup": 1.0, "steps": 3},
    "step": BASE | STEP | {"weight_decay": 0.1},
    "step ema": BASE | STEP | {"q": "ema", "step_low": 0.7, "step_high": 3.0, "normalize": True},
    "step reference": BASE | STEP | {"q": "reference", "steps": 3, "normalize": True},
    "dft": BASE | {"weight": "dft", "q": "ema", "normalize": True, "loss_norm": "sequence"},
    "trsft": BASE | {"weight": "trsft"},
    "trsft high": BASE | {"weight": "trsft", "trsft_alpha": 0.5, "q": "reference"},
    "phi": BASE | {"weight": "chord_phi", "loss_norm": "sequence"},
    "pear": BASE | {"weight": "pear", "q": "reference"},
    "pear short": BASE | {"weight": "pear", "pear_gamma": 0.6, "normalize": True},
    "quality": BASE | {"quality": True, "seed": 3, "problems_per_step": 9},
    "quality alone": BASE | {"quality": True, "q": "reference", "problems_per_step": 1},
}


def other(cfg, history: list[dict]) -> dict:
    """The moving average of the policy's parameters, which begins with the start of the run."""
    average = history[0]
    for weights in history[1:]:
        average = {key: cfg.q_decay * average[key] + (1 - cfg.q_decay) * weights[key] for key in weights}
    return average


def weight(cfg, seen: kit.Seen, t: int) -> float:
    """The table of the docstring; PEAR's ranges are those of its section, both of logarithms."""
    p, ratios = math.exp(seen.lp[t]), [lp - start for lp, start in zip(seen.lp, seen.start, strict=True)]
    q = {"policy": seen.lp, "ema": seen.other, "reference": seen.start}[cfg.q]
    gains = [lq - start for lq, start in zip(q, seen.start, strict=True)]
    later = [math.log(cfg.pear_gamma) + min(max(x, -0.08), 0.3) for x in ratios[t + 1 :]]
    return {
        "iw": min(math.exp(cfg.power * sum(gains) / len(gains)), cfg.weight_high),
        "iw_step": min(max(math.exp(gains[t]), cfg.step_low), cfg.step_high),
        "dft": p,
        "trsft": min(1.0, p / cfg.trsft_alpha),
        "chord_phi": p * (1 - p),
        "pear": math.exp(min(max(sum(later), -10.0), 5.0)),
    }[cfg.weight]


def by_score(problems: list, n: int, step: int, seed: int) -> list:
    """n draws with replacement, each trace as often as its share of all scores."""
    chances = [question.score / sum(other.score for other in problems) for question in problems]
    return [problems[i] for i in np.random.default_rng([seed, step]).choice(len(problems), size=n, p=chances)]


def page(cfg, problems, ask):
    """Every token of the step's traces with its weight; the denominators are SFT's."""
    for step in range(cfg.steps):
        drawn = (by_score if cfg.quality else kit.draw)(problems, cfg.problems_per_step, step, cfg.seed)
        rows = [kit.trace(question) for question in drawn]
        tokens = sum(len(row.ids) for row in rows)

        def coefficient(row, t, seen, rows=rows, tokens=tokens):
            every = [weight(cfg, one, i) for one in seen.update for i in range(len(one.lp))] if cfg.normalize else [1.0]
            share = 1 / tokens if cfg.loss_norm == "token" else 1 / (len(rows) * len(row.ids))
            return -share * weight(cfg, seen, t) * len(every) / sum(every)

        yield [kit.Update(rows, coefficient, rate(cfg, step), temperature=1.0, beta2=cfg.beta2)]
