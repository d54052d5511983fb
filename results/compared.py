"""Records of claims.py in one line a cell, and numbers made of them: costs, differences, the rule.

A line of claims.jsonl is a cell: the flags of its stages, and by seed the accuracy on the test
split after so many steps, pass@k on every split at the end, and curves of ten steps a point.
"""

import json
import sys
from pathlib import Path

import numpy as np

from results import claims

RECORDS = Path(__file__).resolve().parent / "claims.jsonl"
PARAMETERS, PROBLEMS, TRACE = 329_216, 512, 41.3  # of the map: the model, training problems, mean tokens of a trace
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # seeds: 97.5 % quantile of t with one degree of freedom less


# Raw records to claims.jsonl ----------------------------------------------------------------------
def check(records: list[dict], partial: bool) -> list[str]:
    """Runs that are missing; exit with a sentence where a table would say what is not so."""
    refuse(records)
    steps, there = sum(flags["steps"] for _, flags in records[0]["stages"]), {r["cell"] for r in records}
    grid = claims.cells([], steps) if partial else []  # a rate that has not been tried is no arm's best
    untried = [{"cell": cell.name, "accuracy": {"0": 0.0}} for cell in grid if cell.name not in there]
    wanted = claims.cells(records + untried, steps)
    same_flags(records, wanted)
    missing = absent({(r["cell"], r["seed"]) for r in records}, wanted)
    if missing and not partial:
        sys.exit(f"{len(missing)} runs are missing (--partial goes on): {', '.join(missing)}.")
    return missing


def refuse(records: list[dict]) -> None:
    """Exit where they are not of one clean commit, or one run is there twice."""
    runs, commits = [(r["cell"], r["seed"]) for r in records], sorted({r["commit"] for r in records})
    if len(commits) != 1:
        sys.exit(f"The records come from {len(commits)} commits: {', '.join(c[:7] for c in commits)}.")
    if dirty := [run for run, r in zip(runs, records, strict=True) if r["dirty"]]:
        sys.exit(f"The working tree had changes in {len(dirty)} runs, the first of them {dirty[0]}.")
    if twice := sorted({run for run in runs if runs.count(run) > 1}):
        sys.exit(f"{len(twice)} runs have several records, the first of them {twice[0]}.")


def same_flags(records: list[dict], wanted: list[claims.Cell]) -> None:
    """Exit where a record's are not those of claims.py."""
    known = {c.name: (json.loads(json.dumps(c.stages)), c.bug) for c in wanted}
    for r in records:
        if known.get(r["cell"]) != (r["stages"], r["bug"]):
            sys.exit(f"The record of {r['cell']} has other flags than results/claims.py gives it.")


def absent(runs: set[tuple[str, int]], wanted: list[claims.Cell]) -> list[str]:
    return [f"{c.name} (seed {seed})" for c in wanted for seed in c.seeds if (c.name, seed) not in runs]


def compact(records: list[dict], report: dict, partial: bool = False) -> list[dict]:
    """One line for each cell, after the base's, whose splits are those of eval.py's report."""
    missing = check(records, partial)
    found = {Path(name).stem: entry["result"] for name, entry in report.items()}
    base = {split: {k: round(v, 4) for k, v in result.items() if k[:5] == "pass@"} for split, result in found.items()}
    return [{"cell": "base", "splits": base, "missing": missing}, *by_cell(records).values()]


def by_cell(records: list[dict], lines: dict[str, dict] | None = None) -> dict[str, dict]:
    """{name: the line of a cell}, beside lines that are there already."""
    lines = {} if lines is None else lines
    for r in records:
        same = {k: r[k] for k in ("cell", "stages", "bug", "threads", "commit", "dirty")}
        line = lines.setdefault(r["cell"], same | {"versions": [], "hardware": [], "seeds": {}})
        for name in ("versions", "hardware"):
            line[name] += [r[name]] if r[name] not in line[name] else []
        accuracy = [round(v, 3) for v in r["accuracy"].values()]
        curves = {k: [round(v, 3) if v else v for v in values] for k, values in r["curves"].items()}
        run = {"steps": [int(step) for step in r["accuracy"]], "accuracy": accuracy, "splits": r["splits"]}
        line["seeds"][str(r["seed"])] = run | {"curves": curves}
    return lines


def add(paths: tuple[Path, ...], partial: bool) -> None:
    """Write claims.jsonl; of a record that several files have, one is taken."""
    report = paths[0].parent / "base/report.json"
    if not report.exists():
        sys.exit(f"{report} is missing: python eval.py --model map --out {report.parent} --samples 16 --k 1 16")
    keep(compact(read(paths), json.loads(report.read_text()), partial))


def add_later(paths: tuple[Path, ...]) -> None:
    """Write cells of a later commit beside those of claims.jsonl. Of every file that they train one
    run is there of the first commit too, made on the same machine and equal in every number.
    """
    lines, records = load(), read(paths)
    first, stages = next((line["commit"], line["stages"]) for line in lines.values() if "commit" in line)
    again, later = ([r for r in records if (r["commit"] == first) == old] for old in (True, False))
    wanted = claims.cells(claims.recorded(), sum(flags["steps"] for _, flags in stages))
    for part in (again, later):
        refuse(part)
        same_flags(part, wanted)
    found, proven, repeated = by_cell(later), set(), []
    for name, line in by_cell(again).items():
        for seed, run in line["seeds"].items():
            if found.get(name, {"seeds": {}})["seeds"].get(seed) != run:
                sys.exit(f"{name} (seed {seed}) is not what it is at {first[:7]}: the methods differ, or the machines.")
            repeated.append(f"{name} (seed {seed})")
        proven |= {script for script, _ in line["stages"]}
    there = {
        name: old["commit"] for name, old in lines.items() if name in found and old["commit"] != later[0]["commit"]
    }
    new = [r for r in later if r["cell"] not in there]
    if unknown := {script for r in new for script, _ in r["stages"]} - proven:
        sys.exit(f"No run of {', '.join(sorted(unknown))} is there of {first[:7]} too: the method may be another one.")
    for name, commit in there.items():
        print(f"{name}: claims.jsonl has it of {commit[:7]}, which stays")
    by_cell(new, lines)
    runs = {(name, int(seed)) for name, line in lines.items() for seed in line.get("seeds", ())}
    repeated = sorted({*lines["base"].get("repeated", ()), *repeated})
    lines["base"] |= {"missing": absent(runs, wanted), "repeated": repeated}
    keep([*lines.values()])


def read(paths: tuple[Path, ...]) -> list[dict]:
    """Their records, one that several have once."""
    return [json.loads(line) for line in dict.fromkeys(line for p in paths for line in p.read_text().splitlines())]


def keep(lines: list[dict]) -> None:
    RECORDS.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def load() -> dict[str, dict]:
    """{name of the cell: its line}"""
    return {line["cell"]: line for line in map(json.loads, RECORDS.read_text().splitlines())}


# Numbers of a cell --------------------------------------------------------------------------------
def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of the 95 % interval); one value has no end."""
    n = len(values)
    return float(np.mean(values)), STUDENT[n] * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("inf")


def ends(cell: dict) -> list[int]:
    """Steps done at the end of each part of the curves: ten lines, a step's or a stage's end's."""
    lines, done = [], 0
    for _, flags in cell["stages"]:
        lines += [*range(done + 1, done + flags["steps"] + 1), done + flags["steps"]]
        done += flags["steps"]
    return [lines[min(i + 10, len(lines)) - 1] for i in range(0, len(lines) - 1, 10)]


def spent(cell: dict, run: dict, unit: str) -> np.ndarray:
    """Steps, tokens sampled or trained, or FLOPs, up to each evaluation of a run."""
    steps = np.array(run["steps"], float)

    def tokens(name: str) -> np.ndarray:
        return np.interp(steps, [0, *ends(cell)], [0, *run["curves"].get(name, [0] * len(ends(cell)))])

    if unit == "steps":
        return steps
    if unit == "tokens":
        return tokens("sampled_tokens")
    (script, flags), trained = cell["stages"][0], tokens("trained_tokens")
    if script == "bridge":  # its shadow has the policy's rows again, and its traces are not in the log
        trained = trained * (1 + flags.get("meta", True)) + steps * flags["sft_problems_per_step"] * TRACE
    return trained if unit == "trained" else PARAMETERS * (2 * tokens("sampled_tokens") + 6 * trained)


def reached(x: np.ndarray, accuracy: list[float], target: float) -> float:
    """Where the curve first is at the target, straight between evaluations; else its end."""
    for i, value in enumerate(accuracy):
        if value >= target:
            left = i - 1 if i else 0
            return float(np.interp(target, accuracy[left : i + 1], x[left : i + 1]))
    return float(x[-1])


def pairs(claim: dict, cells: dict[str, dict]) -> list[tuple[float, float, float]]:
    """(a's number, b's, what is above 0 where the claim holds) of every seed that both have."""
    a, b, what, found = cells[claim["a"]], cells[claim.get("b", claim["a"])], claim.get("what", "pass@1"), []
    for seed in sorted(set(a["seeds"]) & set(b.get("seeds", a["seeds"]))):
        one, two = a["seeds"][seed], b["seeds"][seed] if "seeds" in b else b
        if what in ("pass@1", "pass@16"):
            x, y = (run["splits"][claim.get("split", "test")][what] for run in (one, two))
            found.append((x, y, x - y))
        elif what in ("steps to", "tokens to"):
            target = min(run["accuracy"][-1] for run in b["seeds"].values())  # which every run of b reaches
            x, y = (reached(spent(c, r, what[:-3]), r["accuracy"], target) for c, r in ((a, one), (b, two)))
            found.append((x, y, claim["share"] * y - x))
        elif what == "equal FLOPs":
            costs = [spent(c, r, "FLOPs") for c, r in ((a, one), (b, two))]
            equal = min(cost[-1] for cost in costs)
            x, y = (np.interp(equal, c, r["accuracy"]) for c, r in zip(costs, (one, two), strict=True))
            found.append((float(x), float(y), float(x - y)))
        elif what == "traces":
            share = one["curves"]["traces_opened"][-1] / PROBLEMS
            found.append((share, claim["bound"], claim["bound"] - share))
        elif what == "anchor":
            depths = [d for d in one["curves"]["anchor_depth"] if d is not None]
            found.append((depths[0], depths[-1], depths[0] - depths[-1]))
    return found


def verdict(differences: list[float], reverse: str = "the reverse is seen") -> str:
    """The one rule."""
    mean, half = interval(differences)
    if len(differences) == 1:
        return "one seed, no interval"
    return "*seen*" if mean - half > 0 else f"*not seen*; {reverse}" if mean + half < 0 else "*not seen*"
