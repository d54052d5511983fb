"""One page of a run that opens from disk: curves, config, steps, and rollouts token by token.

python view.py runs/bread-map-*
python view.py runs/bread-map-1 runs/grpo-map-1 --out comparison.html

The second compares two runs. Packages: pip install -r requirements-view.txt
"""

import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jinja2
import tyro

from core.model import load_tokenizer
from plot import PANELS, caption, read_lines, read_metrics

COLUMNS = "reward groups_mixed groups_solved groups_failed guided_reward completion_tokens truncated loss entropy"
COLUMNS = (*COLUMNS.split(), "grad_norm", "test_accuracy")  # of the table of steps, in the order of the log


@dataclass
class Config:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # a run's folder, or two to be compared
    out: Path = Path("")  # the page; empty: view.html in the first run's folder
    steps: int = 12  # at most so many, evenly spaced, are in the page with their rollouts


def spaced(steps: list[int], most: int) -> list[int]:
    """At most so many of the steps, evenly spaced, with the first and the last."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / max(1, most - 1))] for i in range(most)]


def group(rows: list[dict]) -> list[dict]:
    """The rows of a step's samples by problem: those of an update, then others that it left out."""
    groups, trained = {}, {(row["id"], row["completion"]) for row in rows if "row" in row}
    for row in sorted(rows, key=lambda row: row.get("row", math.inf)):
        if "row" in row or (row["id"], row["completion"]) not in trained:
            groups.setdefault(row["id"], {"id": row["id"], "problem": row["problem"], "rows": []})["rows"].append(row)
    return list(groups.values())


def read_run(folder: Path, most: int) -> dict:
    """What the page shows of a run; the ids of its rollouts become text by its tokenizer."""
    if not folder.is_dir():
        raise SystemExit(f"error: there is no run's folder {folder}")
    metrics, path, samples = read_metrics(folder), folder / "samples.jsonl", []
    if path.is_file():
        samples = read_lines(path, "id", "problem", "completion", "reward", "expert_tokens")
    try:
        config = json.loads((folder / "config.json").read_bytes())
        flags = config["flags"]
    except (OSError, ValueError, TypeError, KeyError):
        raise SystemExit(f"error: {folder / 'config.json'} is missing or damaged") from None
    shown = spaced(sorted({row["step"] for row in samples}), most)
    steps = {step: group([row for row in samples if row["step"] == step]) for step in shown}
    ids = {int(i) for gs in steps.values() for g in gs for row in g["rows"] for i in row.get("ids", "").split()}
    model = str(folder / "final") if (folder / "final/tokenizer_config.json").is_file() else flags["model"]
    tokenizer = load_tokenizer(model) if ids else None
    found = {"name": folder.resolve().name, "caption": caption(folder), "metrics": metrics, "steps": steps}
    found["config"] = {k: v for k, v in config.items() if k not in ("flags", "argv")} | flags
    found["clip"] = [flags.get("clip_low", -1), flags.get("clip_high", -1)]
    return found | {"pieces": {i: tokenizer.decode([i]) for i in sorted(ids)}}


def main(cfg: Config) -> None:
    if len(cfg.runs) not in (1, 2) or cfg.steps < 1:
        raise SystemExit("error: name one run's folder, or two to compare, and --steps of 1 or more")
    try:
        plotly = importlib.import_module("plotly.offline")
    except ModuleNotFoundError:
        raise SystemExit("error: plotly is missing: pip install -r requirements-view.txt") from None
    runs = [read_run(folder, cfg.steps) for folder in cfg.runs]
    present = {k for run in runs for row in run["metrics"] for k, v in row.items() if isinstance(v, (int, float))}
    keys = [key for key in [*PANELS, *sorted(present - {"step"} - PANELS.keys())] if key in present]
    by_step = [{row["step"]: row for row in run["metrics"]} for run in runs]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("view.html")
    flags = list(dict.fromkeys(flag for run in runs for flag in run["config"]))
    tables = {"columns": [key for key in COLUMNS if key in present], "flags": flags}
    tables["lines"] = [(step, [rows.get(step, {}) for rows in by_step]) for step in sorted(set().union(*by_step))]
    text = page.render(runs=runs, keys=keys, **tables, plotly=plotly.get_plotlyjs())
    out = cfg.out if cfg.out.name else cfg.runs[0] / "view.html"
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"error: {out} cannot be written ({error.strerror})") from None
    print(f"wrote {out} ({len(text) / 2**20:.1f} MB)")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
