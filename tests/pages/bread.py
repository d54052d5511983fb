"""BREAD, from Zhang et al. 2025: the search of the docstring for one problem at a time."""

import math

from conftest import byte_tokenizer

import common
from pages import grpo, kit

BASE = grpo.BASE | {"num_episodes": 5}
SCENARIOS = {
    "shortest": BASE | {"steps": 4, "num_episodes": 10, "temperature": 0.7, "warmup_steps": 2, "seed": 5},
    "first": BASE | {"stop_on_first": True, "updates_per_step": 2, "loss_norm": "sequence", "tis_cap": 0.5},
    "everywhere": BASE
    | {"trigger": "always", "band_low": 0.3, "band_high": 0.6, "clip_low": 0.05, "clip_high": 0.1}
    | {"updates_per_step": 2, "scale_by_std": False},
    "everywhere, first": BASE | {"trigger": "always", "stop_on_first": True, "loss_norm": "constant", "tis_cap": 0.0},
    "narrow": BASE | {"band_low": 0.5, "band_high": 0.8, "group_size": 5, "seed": 2, "max_completion_tokens": 70},
    "low band": BASE | {"band_low": 0.25, "band_high": 0.5, "stop_on_first": True, "group_size": 3},
    "empty band": BASE | {"trigger": "always", "band_low": 0.5, "band_high": 0.6, "group_size": 2, "temperature": 1.3},
    "question": BASE | {"prefix_site": "user", "zero_variance": "drop", "clip_low": -1.0, "updates_per_step": 2},
    "no anchor": BASE | {"num_episodes": 1, "trigger": "always", "steps": 2},
    "wide draw": BASE | {"problems_per_step": 9, "num_episodes": 3, "zero_variance": "drop", "seed": 1},
}


def rate(group: list[kit.Row]) -> float:
    return sum(row.reward for row in group) / len(group)


def in_band(cfg, group: list[kit.Row]) -> bool:
    return cfg.band_low < rate(group) < cfg.band_high


def search(cfg, question, step: int, ask, tokenizer) -> list[kit.Row]:
    """The group to train: of the plain one and the probes the best, with the shortest prefix."""

    def probe(shown: int, attempt: int) -> list[kit.Row]:
        prefix, asked = question.expert_ids[:shown], question
        if shown and cfg.prefix_site == "user":
            prefix, asked = [], common.with_hint(question, prefix, tokenizer)
        return ask((cfg.seed, step, attempt), [(asked, prefix)], cfg.group_size)[0]

    plain = probe(0, 0)
    if rate(plain) > (cfg.band_low if cfg.trigger == "always" else 0):
        return plain  # in the band it has the shortest prefix, above it a prefix is no help
    found = [(0, plain)]  # (tokens shown, group), in the order in which they are drawn
    pieces = [*common.shown_ends(question, tokenizer)[0], len(question.expert_ids)]
    ends = common.regroup(pieces, cfg.num_episodes)[:-1]
    lo, hi = 0, len(ends) - 1
    while lo < hi:
        mid = math.ceil((lo + hi) / 2)
        group = probe(ends[mid], len(found))
        found.append((ends[mid], group))
        if cfg.stop_on_first and in_band(cfg, group):
            break
        lo, hi = (mid, hi) if rate(group) <= cfg.band_low else (lo, mid - 1)
    for good in (lambda g: in_band(cfg, g), lambda g: 0 < rate(g) < 1, lambda g: rate(g) > 0):
        fitting = [(shown, group) for shown, group in found if good(group)]
        if fitting:
            return min(fitting, key=lambda one: one[0])[1]
    return plain


def page(cfg, problems, ask):
    """GRPO on the groups that the search takes; the expert's tokens have no part in the loss."""
    tokenizer = byte_tokenizer()
    for step in range(cfg.steps):
        drawn = kit.draw(problems, cfg.problems_per_step, step, cfg.seed)
        groups = [search(cfg, question, step, ask, tokenizer) for question in drawn]
        advantage, updates = {}, []
        for group in groups:
            values = grpo.advantages([row.reward for row in group], cfg.scale_by_std)
            advantage |= {id(row): a for row, a in zip(group, values, strict=True)}
        if cfg.zero_variance == "drop":
            groups = [group if any(advantage[id(row)] for row in group) else [] for group in groups]
        for u in range(cfg.updates_per_step):
            rows = [row for group in kit.part(groups, u, cfg.updates_per_step) for row in group]

            def coefficient(row, t, seen, rows=rows, advantage=advantage):
                if t < row.expert:
                    return 0.0
                gain = grpo.slope(cfg, advantage[id(row)], row.sampler[t - row.expert], seen.before[t], seen.lp[t])
                return -grpo.weight(cfg, rows, row) * gain

            updates.append(kit.Update(rows, coefficient, cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))))
        yield updates
