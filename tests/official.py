"""Our functions on the recorded inputs of the published ones: tests/data/official, numbers only.

python tests/official.py     the table of tests/README.md
"""

import gzip
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
from core.config import flat, with_flags  # noqa: E402

FILE = Path(__file__).parent / "data/official/official.json.gz"
OFF = {
    "clip_low": -1.0,
    "clip_high": -1.0,
    "kl_coef": 0.0,
    "entropy_coef": 0.0,
    "loss_norm": "constant",
    "tis_cap": 0.0,
}
MASKS, INDICES = ("completion_mask", "expert_mask", "taught"), ("group",)
Numbers = dict[str, torch.Tensor]


def tensors(values: dict) -> SimpleNamespace:
    """Lists as tensors, numbers in double precision."""

    def kind(name: str) -> torch.dtype:
        return torch.bool if name in MASKS else torch.long if name in INDICES else torch.float64

    return SimpleNamespace(**{name: torch.tensor(value, dtype=kind(name)) for name, value in values.items()})


def loss_of(method: str, case: dict, x: SimpleNamespace, settings: dict) -> torch.Tensor:
    """Our loss of these rows."""
    module, known = importlib.import_module(method), flat(importlib.import_module(method).Config())
    cfg = with_flags(module.Config(), {name: value for name, value in (OFF | settings).items() if name in known})
    rows, expert = len(x.logprobs), x.completion_mask & x.expert_mask
    advantages = getattr(x, "advantages", torch.zeros(rows))
    last = x.completion_mask.sum(1, keepdim=True) - 1
    batch = SimpleNamespace(
        completion_mask=x.completion_mask,
        expert_mask=expert,
        policy_mask=x.completion_mask & ~expert,
        old_logprobs=getattr(x, "old_logprobs", torch.full_like(x.logprobs, torch.nan)),
        sampler_logprobs=getattr(x, "sampler_logprobs", torch.zeros_like(x.logprobs)),
        rewards=getattr(x, "rewards", torch.zeros(rows)),
        advantages=advantages if advantages.dim() == 1 else advantages.gather(1, last)[:, 0],
        token_advantages=advantages if advantages.dim() == 2 else advantages[:, None].expand(x.logprobs.shape),
        taught=getattr(x, "taught", torch.ones(rows, dtype=torch.bool)),
    )
    counts = common.Counts(**case["counts"])
    if case["case"].startswith("sft_step"):
        return module.sft_loss_fn(cfg, batch, x.logprobs, x.entropy, counts)[0]
    rest = (settings["mu"],) if method == "chord" else ()
    return module.loss_fn(cfg, batch, x.logprobs, x.entropy, getattr(x, "ref_logprobs", None), counts, *rest)[0]


def loss(method: str, case: dict, x: SimpleNamespace) -> Numbers:
    """The sum of factor x our loss with each term's settings, and its gradients."""
    x.logprobs.requires_grad_(), x.entropy.requires_grad_()
    split = case["settings"].get("keep_scope") == "microbatch"  # elsewhere a sum over rows needs no split
    parts = [SimpleNamespace(**{k: v[p] for k, v in vars(x).items()}) for p in case["microbatches"]] if split else [x]
    terms = [(factor, case["settings"] | changes) for factor, changes in case["terms"]]
    value = sum(factor * loss_of(method, case, part, settings) for factor, settings in terms for part in parts)
    found = torch.autograd.grad(value, [x.logprobs, x.entropy], allow_unused=True)
    by_logprobs, by_entropy = (torch.zeros_like(x.logprobs) if g is None else g for g in found)
    return {"value": value.detach(), "grad_logprobs": by_logprobs, "grad_entropy": by_entropy}


def advantages(method: str, case: dict, x: SimpleNamespace) -> Numbers:
    """Of a row; with split advantages (prefix_rft.py) of a token."""
    split = case["settings"].get("advantages") == "split"
    found = torch.zeros_like(x.completion_mask if split else x.rewards, dtype=torch.float64)
    for group in x.group.unique():
        own = (x.group == group).nonzero()[:, 0]
        if split:  # the last row of a group is the hybrid
            plain, hybrid = own[:-1], own[-1]
            found[plain] = common.group_advantages(x.rewards[plain][None], False)[0][:, None]
            above = x.rewards[hybrid] - x.rewards[plain].mean()
            found[hybrid] = torch.where(x.expert_mask[hybrid], above, x.rewards[hybrid])
        else:
            found[own] = common.group_advantages(x.rewards[own][None], case["settings"]["scale_by_std"])[0]
    return {"advantages": found * x.completion_mask if split else found}


def importance(method: str, case: dict, x: SimpleNamespace) -> Numbers:
    """v of every token."""
    batch = SimpleNamespace(policy_mask=x.completion_mask & ~x.expert_mask, sampler_logprobs=x.sampler_logprobs)
    weights = common.importance_weights(batch, x.old_logprobs, case["settings"]["tis_cap"])
    return {"values": weights * x.completion_mask}


def kl(method: str, case: dict, x: SimpleNamespace) -> Numbers:
    """The estimate of every token, and the gradient of their sum."""
    x.logprobs.requires_grad_()
    values = common.kl_divergence(x.logprobs, x.ref_logprobs, case["settings"]["kl_estimator"]) * x.completion_mask
    return {"values": values.detach(), "grad_logprobs": torch.autograd.grad(values.sum(), x.logprobs)[0]}


def hint_chunks(m, s: dict, segments: list[int], drawn: list[int], step: int = 0) -> list[int]:
    """Segments of a hint, when the draw is k of its chunks."""
    share, found = m.hint_share(step, s["hint_high"], s["hint_low"], s["hint_steps"]), []
    for n, k in zip(segments, drawn, strict=True):
        rng = SimpleNamespace(binomial=lambda n, p, k=k: k, integers=lambda low, high, k=k: k)
        cuts = m.hint_cuts(list(range(1, n + 2)), "chunk", s["hint_chunks"])
        found.append(m.draw_hint(cuts, share, s.get("schedule", "cosine"), rng))
    return found


def low(m, s: dict, steps: list[int]) -> list[float]:
    return [m.lowest_share(t, s["low_start"], s["low_final"], s["prefix_steps"]) for t in steps]


def share_drawn(m, s: dict, u: list[float], steps: list[int]) -> list[float]:
    """In whole tokens of a trace of 10^12."""
    n, draws = 10**12, zip(u, low(m, s, steps), strict=True)
    return [m.draw_prefix(n, at, s["prefix_high"], 1, SimpleNamespace(random=lambda v=v: v)) / n for v, at in draws]


def kept_tokens(m, s: dict, tokens: list[int]) -> list[int]:
    masks = [torch.ones(1, n) > 0 for n in tokens]
    return [int(m.most_uncertain(mask.cumsum(1).double(), mask, s["keep_share"], "microbatch").sum()) for mask in masks]


TABLES = {  # schedules, counts and gates: our function at every entry of the inputs
    "hint_share": lambda m, s, steps: [m.hint_share(t, s["hint_high"], s["hint_low"], s["hint_steps"]) for t in steps],
    "hint_chunks": hint_chunks,
    "hint_uniform_late": hint_chunks,
    "lowest_share": low,
    "share_drawn": share_drawn,
    "kept_tokens": kept_tokens,
    "prefix_tokens": lambda m, s, trace_tokens, share: [
        m.prefix_tokens(n, r, 1.0, [0.0]) for n, r in zip(trace_tokens, share, strict=True)
    ],
    "gate": lambda m, s, gate, right: [r <= g for g, r in zip(gate, right, strict=True)],  # a line of hpt.py's main
    "mu_schedule": lambda m, s, steps, argument: [
        m.sft_share(t, s["mu_peak"], s["mu_valley"], s["mu_warmup"], s["mu_decay"]) for t in steps
    ],
}


def table(method: str, case: dict, x: SimpleNamespace) -> Numbers:
    """Our function at every entry of a case's inputs."""
    name = "mu_schedule" if case["case"].startswith("mu_schedule") else case["case"]
    values = TABLES[name](importlib.import_module(method), case.get("settings", {}), **case["inputs"])
    return {"values": torch.tensor(values, dtype=torch.float64)}


def compare(method: str, case: dict, rows: dict) -> float:
    """The largest difference of value and gradients."""
    kinds = {"loss": loss, "advantages": advantages, "importance": importance, "kl": kl}
    x = tensors(rows.get(case.get("rows"), {}) | case["inputs"])
    mine = kinds.get(case["kind"], table)(method, case, x)
    official = {name: torch.tensor(value, dtype=torch.float64) for name, value in case["official"].items()}
    return max((mine[name] - value).abs().max().item() for name, value in official.items())


def cases() -> Iterator[tuple[str, dict, dict]]:
    """(method, case, its rows) of the record."""
    for method, found in json.loads(gzip.decompress(FILE.read_bytes())).items():
        for case in found["cases"]:
            yield method, case, found["rows"]


def print_table() -> None:
    """A line per method and published function: cases, largest difference, what differs and why."""
    lines: dict[tuple[str, str], list] = {}
    for method, case, rows in cases():
        up = case["upstream"]
        where = f"{up['repository']}@{up['commit'][:7]} `{up['function']}`"
        lines.setdefault((f"{method}.py", where), []).append((case, compare(method, case, rows)))
    print("| ours | published function | equal | largest difference | differs by | why |\n|---|---|---|---|---|---|")
    for (ours, where), found in lines.items():
        same = [gap for case, gap in found if case["expected"] == "equal"]
        other = [
            (gap, case["expected"].removeprefix("differs: ")) for case, gap in found if case["expected"] != "equal"
        ]
        largest = f"{'below 1e-9' if max(same) < 1e-9 else f'{max(same):.0e}'}" if same else ""
        whys = dict.fromkeys(why for _, why in other)
        differs = f"{max(gap for gap, _ in other):.1g}" if other else ""
        print(f"| {ours} | {where} | {len(same)} of {len(found)} | {largest} | {differs} | {'; '.join(whys)} |")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    print_table()
