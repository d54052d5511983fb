"""The runs of claims.py as tables, figures and verdicts, all of them made from claims.jsonl.

python results/verdicts.py                                      tables and figures: make results
python results/verdicts.py --add runs/claims/records.jsonl      first claims.jsonl from raw records
python eval.py --model map --out runs/claims/base --samples 16 --k 1 16       the base, for --add
python results/verdicts.py --add_later runs/more/records.jsonl   cells that claims.jsonl lacks

An interval is Student's, 95 %, over seeds. A claim of claims.toml is one number for each seed,
above 0 where the claim holds: as a rule a's accuracy minus b's with the same seed. It is *seen*
where the interval is above 0, else *not seen*; where it is below 0, the reverse is seen.
"""

import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script: the methods are one folder up
from results import claims  # noqa: E402
from results.compared import add, add_later, interval, load, pairs, spent, verdict  # noqa: E402
from results.methods import write  # noqa: E402
from results.verdicts_pictures import draw  # noqa: E402

CLAIMS = tomllib.loads((ROOT / "results/claims.toml").read_text())["claim"]
ARMS, SPLITS = ("controlled", "paper"), ("test", "hard", "long", "easy")
METHODS = [*claims.METHODS[:3], "sft_then_grpo", *claims.METHODS[3:]]
MIXED = [m for m in METHODS if m not in ("grpo", "dapo", "sft", "iw_sft", "sft_then_grpo")]


@dataclass
class Config:
    add: tuple[Path, ...] = ()  # raw records of one commit, from one machine or several
    partial: bool = False  # add them though runs are missing
    add_later: tuple[Path, ...] = ()  # of a later commit, and of a run of every file at the first one


# Tables of runs -----------------------------------------------------------------------------------
def table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def between(mean: float, half: float, sign: str = "", digits: int = 3) -> str:
    """The interval, of one seed the value."""
    return f"{mean:{sign},.{digits}f}" + (f" ± {half:,.{digits}f}" if np.isfinite(half) else " (one seed)")


def known(arm: str, cells: dict) -> dict[str, tuple[dict, list[dict]]]:
    """{method: (its cell, its runs)} of an arm."""
    there = {name: cells[f"{arm}/{name}"] for name in METHODS if f"{arm}/{name}" in cells}
    return {name: (cell, list(cell["seeds"].values())) for name, cell in there.items()}


def accuracy_table(arm: str, cells: dict, ks: tuple[str, ...]) -> str:
    """Mean and half of the interval of every split."""
    columns = [(split, k) for k in ks for split in SPLITS]
    rows = [["before training", *(f"{cells['base']['splits'][split][k]:.3f}" for split, k in columns)]]
    for name, (_, runs) in known(arm, cells).items():
        found = [interval([run["splits"][split][k] for run in runs]) for split, k in columns]
        rows.append([name, *(between(*each) for each in found)])
    return table(["", *(split + (f", {k}" if len(ks) > 1 else "") for split, k in columns)], rows)


def traces_seen(name: str, cell: dict, runs: list[dict]) -> str:
    """By the flags; BREAD's from its log."""
    _, flags = cell["stages"][0]
    if name in ("grpo", "dapo"):
        return "0"
    if name == "bread":
        return f"{np.mean([run['curves']['traces_opened'][-1] for run in runs]):.0f} different prefixes"
    count = flags["steps"] * flags.get("sft_problems_per_step", flags["problems_per_step"])
    most = "at most " if name in ("relift", "hpt", "trapo") else ""
    return f"{most}{count:,}{' prefixes' if name in ('uft', 'prefix_rft', 'trapo') else ''}"


def verifier_calls(name: str, cell: dict, runs: list[dict]) -> str:
    """Rows sampled: by the flags; where groups are sampled again, by their tokens."""
    if name in ("bread", "dapo"):
        tokens = np.mean([run["curves"]["sampled_tokens"][-1] for run in runs])
        lengths = [n for run in runs for n in run["curves"]["completion_tokens"] if n]
        return f"{'at least' if name == 'bread' else 'about'} {tokens / np.mean(lengths):,.0f}"
    online = [flags for script, flags in cell["stages"] if script not in ("sft", "iw_sft")]
    expert = 1 if name in ("luffy", "srft") else 0
    rows = sum(f["steps"] * f["problems_per_step"] * (f["group_size"] - expert) for f in online)
    return f"{'at most ' if name == 'trapo' else ''}{rows:,}"


def budget_table(arm: str, cells: dict) -> str:
    rows = []
    for name, (cell, runs) in known(arm, cells).items():
        means = [np.mean([spent(cell, run, unit)[-1] for run in runs]) for unit in ("tokens", "trained", "FLOPs")]
        rates = ", ".join(f"{flags['lr']:g}" for _, flags in cell["stages"])
        costs = [f"{means[0] / 1e3:,.0f}", f"{means[1] / 1e3:,.0f}", f"{means[2] / 1e12:.2f}"]
        rows.append([name, rates, *costs, traces_seen(name, cell, runs), verifier_calls(name, cell, runs)])
    head = ["", "learning rate", "sampled tokens, 1e3", "trained tokens, 1e3", "FLOPs, 1e12"]
    return table([*head, "traces seen", "verifier calls"], rows)


def rates_table(cells: dict) -> str:
    """Of the grid: what claims.best_rates goes by."""

    def score(arm: str, name: str, rate: float) -> str:
        line = cells.get(f"rate/{arm}/{name}/{rate:g}")
        return f"{np.mean([np.mean(run['accuracy'][-3:]) for run in line['seeds'].values()]):.3f}" if line else ""

    columns = [(arm, rate) for arm in ARMS for rate in claims.RATES]
    rows = [[name, *(score(arm, name, rate) for arm, rate in columns)] for name in claims.METHODS]
    return table(["", *(f"{arm}, {rate:g}" for arm, rate in columns)], rows)


def threads_line(cells: dict) -> str:
    """The run that was repeated on two threads, beside the same on one."""
    if "threads/grpo" not in cells:
        return "The run on two threads is missing."
    (two,), one = cells["threads/grpo"]["seeds"].values(), cells["controlled/grpo"]["seeds"]["0"]
    found = [f"{s} {one['splits'][s]['pass@1']:.3f} and {two['splits'][s]['pass@1']:.3f}" for s in SPLITS]
    return f"GRPO with seed 0 on one thread and on two, which sums in another order: {', '.join(found)}."


def origin(cells: dict) -> str:
    """Commits, versions and machines of the runs."""
    lines = [line for name, line in cells.items() if name != "base"]
    commits = Counter()
    for line in lines:
        commits[line["commit"][:7]] += len(line["seeds"])
    versions = sorted({", ".join(f"{k} {v}" for k, v in made.items()) for line in lines for made in line["versions"]})
    machines = sorted({machine for line in lines for machine in line["hardware"]})
    missing, repeated = cells["base"]["missing"], cells["base"].get("repeated")
    text = ", ".join(f"{count} runs of commit {commit}" for commit, count in commits.items())
    text += f" ({'; '.join(versions)}; {'; '.join(machines)})"
    if repeated:
        text += f"; {len(repeated)} runs were made at both, on one machine, and are the same in every number"
    kinds = Counter("/".join(name.split(" (")[0].split("/")[: 1 + name.startswith("rate")]) for name in missing)
    return text + (f"; **not run yet**: {', '.join(f'{n} of {kind}' for kind, n in kinds.items())}" if missing else "")


# Claims -------------------------------------------------------------------------------------------
def there(claim: dict, cells: dict) -> bool:
    return all(claim[side] in cells for side in ("a", "b") if side in claim)


def measured(claim: dict, cells: dict) -> tuple[str, str]:
    """(our figure, verdict); no figure where nothing could be run or was."""
    if "cannot" in claim or not there(claim, cells):
        return "", f"*cannot be tested here*: {claim['cannot']}" if "cannot" in claim else "not run"
    a, b, differences = (np.array(values) for values in zip(*pairs(claim, cells), strict=True))
    unit, digits = (1e3, 0) if claim.get("what") == "tokens to" else (1, 1 if claim.get("what") == "steps to" else 3)
    mean, half = interval(differences / unit)
    sides = " against ".join(f"{side.mean() / unit:,.{digits}f}" for side in (a, b))
    figure = f"{sides}: {between(mean, half, '+', digits)}" + (f" ({len(a)} seeds)" if len(a) > 1 else "")
    limit = {"share", "bound"} & set(claim)
    return figure, verdict(differences, *(["it takes more"] if limit else []))


def in_papers_arm(claim: dict, cells: dict) -> str:
    """The verdict with both cells from the other arm, where there are such."""
    other = claim | {side: claim[side].replace("controlled/", "paper/") for side in ("a", "b") if side in claim}
    sides = {claim[side].split("/")[0] for side in ("a", "b") if side in claim}
    if not sides or not sides <= {"controlled", "base"} or not there(other, cells):
        return ""
    figure, found = measured(other, cells)
    return f"{figure.split(': ')[1].split(' (')[0]}: {found}"


def quantity(claim: dict) -> str:
    what, split = claim.get("what", "pass@1"), claim.get("split", "test")
    if what in ("steps to", "tokens to"):
        return f"{what[:-3]}{', 1e3,' if what == 'tokens to' else ''} to b's accuracy; {claim['share']:.2f} b - a"
    names = {"traces": "share of traces used", "anchor": "share shown, first ten steps and last"}
    return "" if "cannot" in claim else names.get(what, f"{split}, {what}")


def claims_tables(cells: dict) -> str:
    """For each method its commands and its claims."""
    parts = []
    for method in dict.fromkeys(claim["method"] for claim in CLAIMS):
        mine = [claim for claim in CLAIMS if claim["method"] == method]
        names = dict.fromkeys(claim[side] for claim in mine for side in ("a", "b") if side in claim)
        words = " ".join(f'"{name}"' for name in names if name != "base")
        rows = []
        for claim in mine:
            compared = " > ".join(f"{claim[side]}" for side in ("a", "b") if side in claim)
            figure, found = measured(claim, cells)
            figures = [figure, f"{found}, but {claim['but']}" if "but" in claim else found, in_papers_arm(claim, cells)]
            rows.append([claim["says"], compared, quantity(claim), *figures])
        head = ["claimed", "a > b", "of what", "here", "verdict", "paper arm"]
        parts.append(f"**{method}**: `python results/claims.py --only {words}`\n\n{table(head, rows)}")
    return "\n".join(parts)


def audit_table(cells: dict) -> str:
    """How much of each mixed method's advantage over SFT then RL repairing a bug brings."""
    rows, bugs = [], [f"audit/sft then grpo, {bug}" for bug in claims.BUGS[1:]]
    for what in ("pass@1", "equal FLOPs"):
        for name in MIXED:
            row = [f"{name}, {'equal steps' if what == 'pass@1' else what}"]
            for b in ("controlled/sft_then_grpo", *bugs):
                claim = {"a": f"controlled/{name}", "b": b, "what": what}
                if not there(claim, cells):
                    return "not run\n"
                gains = [d for _, _, d in pairs(claim, cells)]
                mean, half = interval(gains)
                row.append(between(mean, half, "+"))
                if b in bugs:
                    repaired = [d for _, _, d in pairs(claim | {"a": "controlled/sft_then_grpo"}, cells)]
                    row.append(f"{np.mean(repaired) / mean:.0%}" if mean - half > 0 else "no advantage")
            rows.append(row)
    parts = [part for bug in claims.BUGS[1:] for part in (f"minus {bug}", "of it the bug")]
    return table(["", "minus correct SFT then GRPO", *parts], rows)


def kept_table(cells: dict) -> str:
    """Every method against the base: forgetting, and what 16 samples find."""
    columns = [("easy", "pass@1"), ("test", "pass@1"), *((split, "pass@16") for split in SPLITS[:3])]
    rows = []
    for name in known("controlled", cells):
        claim, row = {"a": f"controlled/{name}", "b": "base"}, [name]
        for split, k in columns:
            gains = [d for _, _, d in pairs(claim | {"split": split, "what": k}, cells)]
            row.append(between(*interval(gains), "+"))
        rows.append(row)
    return table(["minus the base", *(f"{split}, {k}" for split, k in columns)], rows)


# Pages --------------------------------------------------------------------------------------------
SHORT = """\
The bundled map, 60 steps of 32 problems; what is not the method's own is the same in all, and each has the best of
three learning rates. Accuracy on four splits, mean of {seeds} seeds ± half of the 95 % interval (`make results`):

{table}
![accuracy over steps, sampled tokens and FLOPs](results/accuracy.png)
"""

PAGE = """\
### All methods at equal steps

{origin}. Mean over seeds ± half of the 95 % interval; 128 problems a split, 16 samples each.

**Controlled**: what is not the method's own is the same in all.

{controlled}
**Paper**: each file's own defaults.

{paper}
{threads}

![accuracy over steps, sampled tokens and FLOPs](accuracy.png)
![entropy, length, share of groups with signal](signals.png)

The length of SFT's completions is that of its traces.

### What they cost

Means of a run. FLOPs: 2 a parameter for a sampled token, 6 for a trained one; prompts, hints that are read and passes
without a gradient are left out. BRIDGE's shadow trains on the policy's rows again: they count twice. The tokens of
ReLIFT's SFT steps are not in its log and not here. A trace seen twice counts twice.

**Controlled**

{controlled_cost}
**Paper**

{paper_cost}
Tuned was the learning rate alone, on seed 100, by the mean test accuracy of the last three evaluations:

{rates}
### Claims and verdicts

Paired by seed, a minus b ± half of the 95 % interval. *Seen*: the interval is above 0. Of forty claims that are not
so, one is seen by chance. With three seeds an interval is wide. *Steps to*, *tokens to*: where the test accuracy,
straight between evaluations, first is what the worst run of b ends with; a run that is never there counts whole.

{claims}
### How much of it the bugs explain

Test accuracy of each mixed method minus that of SFT then GRPO, whose SFT is correct or has one of the two bugs; of an
advantage over the bug, the share that repairing the bug alone brings.

{audit}
### Forgetting and diversity

Minus the base: what it can do already (easy), and what is found in 16 samples.

{kept}"""


def short_page(cells: dict) -> str:
    """What README.md has between its markers."""
    counts = [len(runs) for _, runs in known("controlled", cells).values()] or [0]
    seeds = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else max(counts)
    return SHORT.format(seeds=seeds, table=accuracy_table("controlled", cells, ("pass@1",)))


def page(cells: dict) -> str:
    """What results/README.md has between its markers."""
    arms = {arm: accuracy_table(arm, cells, ("pass@1", "pass@16")) for arm in ARMS}
    costs = {f"{arm}_cost": budget_table(arm, cells) for arm in ARMS}
    texts = {"origin": origin(cells), "threads": threads_line(cells), "rates": rates_table(cells)}
    texts |= {"claims": claims_tables(cells), "audit": audit_table(cells), "kept": kept_table(cells)}
    return PAGE.format(**arms, **costs, **texts)


def main(cfg: Config) -> None:
    if cfg.add:
        add(cfg.add, cfg.partial)
    if cfg.add_later:
        add_later(cfg.add_later)
    cells = load()
    write("results/README.md", "claims", page(cells))
    write("README.md", "results", short_page(cells))
    draw(cells)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
