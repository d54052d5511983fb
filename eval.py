"""Accuracy of a model on benchmarks: avg@n with an interval over problems, unbiased pass@k.

python eval.py --model runs/x/final                   the test problems of its settings.json
python eval.py --model runs/x/final --data aime24,aime25,amc23,math500,minerva,olympiad,gsm8k
torchrun --nproc_per_node 8 eval.py --model Qwen2.5-Math-7B --data math500 --data_dir benchmarks
python eval.py --compare runs/x/eval runs/y/eval      paired difference, problems that flipped
python eval.py --table runs/x/eval runs/y/eval        a Markdown table
python eval.py --model Qwen3-8B --data openai/gsm8k:main --samples 4 --traces gsm8k.jsonl
                                                      its right answers, as traces for --data

Every finished problem is on disk, beside the protocol that made it; the same command goes on after
a kill. Another protocol needs another --out.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import math_verify
import numpy as np
import torch.distributed as dist
import tyro
from tqdm import tqdm

import common
from core.config import BOX_REQUEST, resolve_model
from core.data import FIELDS, SCHEMAS, choose_asking, control_tokens, is_chat, read_fields
from core.model import window
from core.records import write_atomic
from core.rewards import Grader, load_grader
from core.verifier import in_pool

BENCHMARKS = {  # name: hub data set (owner/name or owner/name:configuration), samples per problem
    "aime24": ("HuggingFaceH4/aime_2024", 32),
    "aime25": ("math-ai/aime25", 32),
    "amc23": ("math-ai/amc23", 32),  # the 40 questions, not the 83 of AIMO's validation set
    "math500": ("HuggingFaceH4/MATH-500", 4),
    "minerva": ("math-ai/minervamath", 4),
    "olympiad": ("math-ai/olympiadbench", 4),
    "gsm8k": ("openai/gsm8k:main", 1),
}


@dataclass
class Config:
    model: str = "tiny"  # model folder, hub name, or map or tiny (bundled)
    data: str = "math500"  # names of benchmarks, files or hub names, separated by commas
    data_dir: str = ""  # folder with NAME or NAME_test as .jsonl, .jsonl.gz or .parquet; empty: names are the hub's
    out: str = ""  # folder of the report; empty: eval or traces in the model's, for a hub name eval-<model> here
    samples: int = 0  # per problem, the n of avg@n (torchrun reads --n as its own); 0: the benchmark's, 8 for others
    k: tuple[int, ...] = (1, 8, 32)  # of pass@k; those above samples are left out
    temperature: float = 0.6
    top_p: float = 1.0
    greedy: bool = False  # temperature 0 and one sample
    max_prompt_tokens: int = 1024  # longer prompts are dropped and counted
    max_tokens: int = 8192  # of a completion; cut to the room behind the longest prompt
    template: str = "auto"  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    template_args: str = "date=2024-07-26"  # of the tokenizer's own: "enable_thinking=false", the day it prints
    system: str | None = None  # in place of every system turn, empty: no such turn; None: the data's own
    request: str = BOX_REQUEST  # behind a question that asks for no box, or around its {problem}; empty: never
    columns: str = ""  # "problem=... answer=..." where the data set's names are not recognised
    reward: str = ""  # FILE.py:FUNCTION of your own, or words_reward and the like; empty: the verifier
    solved: float = 1.0  # a reward from here on is a solved problem
    reward_seconds: float = 5.0  # time limit of one completion
    many_boxes: Literal["zero", "last"] = "zero"  # several different boxes: wrong, or the last one counts
    traces: str = ""  # a .jsonl to write, with the right completions as expert traces of the problems
    keep: Literal["shortest", "all"] = "shortest"  # of a problem's traces; all: a row for each
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # inference engine; auto: vLLM where there is one and a GPU
    sampler_memory: float = 0.8  # share of the GPU for vLLM
    tensor_parallel: int = 1  # ranks that share a vLLM engine
    rope_theta: float = 0.0  # rotary base for a longer context, with max_positions; 0: the model's own
    max_positions: int = 0  # window of the model; 0: its own
    seed: int = 0
    compare: tuple[Path, ...] = ()  # two folders of reports
    table: tuple[Path, ...] = ()  # folders of reports


# Statistics ---------------------------------------------------------------------------------------
def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from c right ones of n.

    1 - C(n - c, k) / C(n, k), as a product. Chen et al. 2021, arXiv 2107.03374, eq. 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 0 <= {c} right <= {n} samples and 1 <= k <= n")
    return 1.0 if n - c < k else float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def bootstrap_interval(scores: list[float], seed: int = 0, rounds: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of per-problem scores (P,).

    Problems are resampled: they, not the samples, are what is drawn.
    """
    values = np.asarray(scores)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(rounds)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarize(groups: list[list[dict]], ks: tuple[int, ...], seed: int) -> dict[str, object]:
    """Table of results from samples grouped by problem.

    A sample has reward, solved, finished, tokens, boxes and verifier_error, and math_verify where
    its gold is one for it. avg@n and pass@k are of what is solved, mean_reward is of rewards that
    are more than 0 and 1; `differ` counts samples to which math-verify gives another verdict.
    """
    right = [sum(s["solved"] for s in group) for group in groups]
    flat = [s for group in groups for s in group]
    n, earned = len(groups[0]), [s["reward"] for s in flat]
    means = [r / n for r in right]
    plain = [(s["math_verify"], s["solved"]) for s in flat if s.get("math_verify") is not None]
    return {
        "problems": len(groups),
        f"avg@{n}": float(np.mean(means)),
        "interval_95": bootstrap_interval(means, seed),
        **{f"pass@{k}": float(np.mean([pass_at_k(n, int(r), k) for r in right])) for k in ks if k <= n},
        **({"mean_reward": float(np.mean(earned))} if {*earned} - {0, 1} else {}),
        **({"math_verify": float(np.mean([p for p, _ in plain]))} if plain else {}),
        **({"differ": sum(p != solved for p, solved in plain)} if plain else {}),
        "truncated": float(np.mean([not s["finished"] for s in flat])),
        "several_boxes": float(np.mean([s["boxes"] > 1 for s in flat])),
        "mean_tokens": float(np.mean([s["tokens"] for s in flat])),
        "verifier_errors": sum(s["verifier_error"] for s in flat),
    }


# One benchmark ------------------------------------------------------------------------------------
def locate(name: str, data_dir: str) -> str:
    """A file, or the hub's name of a benchmark."""
    if data_dir and not Path(name).suffix:
        kinds = (".jsonl", ".jsonl.gz", ".parquet")
        tried = [Path(data_dir) / f"{stem}{kind}" for stem in (name, f"{name}_test") for kind in kinds]
        found = next((str(path) for path in tried if path.is_file()), None)
        return found or common.fail(f"--data {name}: none of {', '.join(p.name for p in tried)} is in {data_dir}")
    if name not in BENCHMARKS and not Path(name).suffix and "/" not in name:
        common.fail(f"--data {name} is neither a file nor one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name][0] if name in BENCHMARKS else name


def label(name: str, names: list[str]) -> str:
    """What a set is called in the report: its file's name, with the folder's if it has a twin."""
    stems = {n: re.sub(r"(\.jsonl|\.parquet|\.gz)+$", "", Path(n).name) for n in (name, *names)}
    twins = list(stems.values()).count(stems[name]) > 1
    return f"{Path(name).resolve().parent.name}-{stems[name]}" if twins else stems[name]


def describe_reward(grader: Grader) -> str:
    """verifier, one of its kinds, or the name of a function with the hash of its file."""
    path, _, name = grader.source.rpartition(":")
    return f"{name} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}" if path else grader.kind or "verifier"


def fingerprint(folder: Path) -> str:
    """Of a model folder's weights: names, sizes and first megabytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
    return digest.hexdigest()


def describe(
    cfg: Config,
    name: str,
    source: str,
    problems: list[common.Problem],
    tokenizer: common.Tokenizer,
    stop_ids: list[int],
) -> dict[str, object]:
    """Everything that the numbers depend on."""
    folder = Path(resolve_model(cfg.model))
    texts = json.dumps([[p.text, p.answer] for p in problems])
    n = cfg.samples or BENCHMARKS.get(name, ("", 8))[1]
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "math-verify")}
    if "vllm" in sys.modules:
        versions["vllm"] = sys.modules["vllm"].__version__
    fields = "template_args system request max_prompt_tokens max_tokens rope_theta max_positions many_boxes solved"
    return {
        "benchmark": name,
        "source": Path(source).name if Path(source).is_file() else source,
        "problems": len(problems),
        "data_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "model": cfg.model,
        "weights_sha256": fingerprint(folder) if folder.is_dir() else "",
        "samples": 1 if cfg.greedy else n,
        "temperature": 0.0 if cfg.greedy else cfg.temperature,
        "top_p": 1.0 if cfg.greedy else cfg.top_p,
        "template": choose_asking(tokenizer, cfg.template).template,
        "first_prompt": tokenizer.decode(problems[0].prompt_ids),
        "stop_ids": stop_ids,
        **{field: getattr(cfg, field) for field in f"{fields} sampler tensor_parallel seed".split()},
        "reward": describe_reward(problems[0].grader),
        "versions": versions,
    }


def stored(out: Path, protocol: dict[str, object]) -> dict[str, list[dict]]:
    """Finished problems of an earlier start with the same protocol, by id.

    What a kill tore is cut off; another protocol ends the run.
    """
    notes, samples = (out / f"{protocol['benchmark']}.{kind}" for kind in ("protocol.json", "samples.jsonl"))
    if not notes.is_file():
        write_atomic(notes, json.dumps(protocol, indent=1) + "\n")
        write_atomic(samples, "")
        return {}
    before = json.loads(notes.read_text())
    if before != protocol:
        changed = ", ".join(key for key in protocol if before.get(key) != protocol[key])
        common.fail(f"{notes} is of another protocol ({changed} differ); choose another --out")
    groups: dict[str, list[dict]] = {}
    for line in samples.read_text().splitlines():
        try:
            sample = json.loads(line)
        except json.JSONDecodeError:
            print(f"{samples}: a torn line is left out")
            break
        groups.setdefault(sample["id"], []).append(sample)
    groups = {key: group for key, group in groups.items() if len(group) == protocol["samples"]}
    write_atomic(samples, "".join(json.dumps(s) + "\n" for group in groups.values() for s in group))
    return groups


def check_plainly(gold: str, text: str) -> bool:
    """In a worker: what math-verify says with its defaults, without a rule of ours.

    A gold that brings no dollars is read as LaTeX only between dollars.
    """
    golds = math_verify.parse(gold if "$" in gold else f"${gold}$", parsing_timeout=None)
    return bool(math_verify.verify(golds, math_verify.parse(text, parsing_timeout=None), timeout_seconds=None))


def verify_plainly(texts: list[str], golds: list[str | dict]) -> list[float | None]:
    """The second score, for comparison with others; None where the gold is no string."""
    asked = [i for i, gold in enumerate(golds) if isinstance(gold, str)]
    verdicts, _ = in_pool(check_plainly, [(golds[i], texts[i]) for i in asked], 5.0, "math-verify", hostile=True)
    given = {i: float(bool(verdict)) for i, verdict in zip(asked, verdicts, strict=True)}
    return [given.get(i) for i in range(len(golds))]


def grade(groups: list[list[common.Rollout]], many_boxes: str) -> list[list[dict]]:
    """The lines of the samples file, per problem, with math-verify's own verdict beside ours."""
    flat = [r for group in groups for r in group]
    texts = [common.answer_part(r.text, r.problem.thinks) for r in flat]
    grades, failed = common.grade([r.problem for r in flat], [r.text for r in flat], "", many_boxes)
    errors = [False] * len(flat)
    if failed:  # which ones: each that earned nothing alone again
        pairs = zip(flat, grades, strict=True)
        errors = [g.reward == 0 and common.grade([r.problem], [r.text], "", many_boxes)[1] > 0 for r, g in pairs]
    for r, found in zip(flat, grades, strict=True):
        r.reward, r.parts = found
    plain = verify_plainly(texts, [r.problem.answer for r in flat])
    lines = iter(
        {
            "id": r.problem.id,
            "text": r.text,
            "reward": r.reward,
            "solved": r.solved,
            **{f"reward_{part}": value for part, value in r.parts.items()},
            "math_verify": other,
            "finished": r.finished,
            "tokens": len(r.completion_ids),
            "boxes": len(set(common.boxed(text))),
            "verifier_error": error,
        }
        for r, text, other, error in zip(flat, texts, plain, errors, strict=True)
    )
    return [[next(lines) for _ in group] for group in groups]


def fit(cfg: Config, name: str, problems: list[common.Problem], positions: float) -> Config:
    """max_tokens cut to the room that the model's window leaves behind the longest prompt."""
    longest = max(len(problem.prompt_ids) for problem in problems)
    said = f"the longest prompt has {longest} tokens, the window of {cfg.model} is {positions}"
    if longest >= positions:
        common.fail(f"{name}: {said}; lower --max_prompt_tokens, or stretch it with --rope_theta and --max_positions")
    if cfg.max_tokens > positions - longest:
        common.print0(f"{name}: --max_tokens {cfg.max_tokens} is cut to {positions - longest}: {said}")
    return replace(cfg, max_tokens=min(cfg.max_tokens, positions - longest))


def run(
    cfg: Config,
    name: str,
    tokenizer: common.Tokenizer,
    sampler: common.Sampler,
    world: common.World,
    out: Path,
    positions: float,  # of the model
) -> dict | None:
    """Sample and grade one benchmark, 64 problems a rank at a time; rank 0 has the result.

    Each part is on disk before the next one is sampled (collective).
    """
    source = locate(name, cfg.data_dir)
    name = name if name in BENCHMARKS or cfg.data_dir else label(name, cfg.data.split(","))
    grader = load_grader(cfg, common.math_reward)
    names = "template template_args system request columns max_prompt_tokens"
    asked = {field: getattr(cfg, field) for field in names.split()}
    asked |= {"split": "train" if cfg.traces else "test", "keep_rows": bool(cfg.traces)}
    problems = common.load_problems(source, tokenizer, grader=grader, **asked)
    cfg = fit(cfg, name, problems, positions)
    protocol = describe(cfg, name, source, problems, tokenizer, sampler.engine.stop_ids)
    done = [stored(out, protocol) if world.rank == 0 else {}]
    dist.broadcast_object_list(done, 0)
    groups = done[0]
    left = [p for p in problems if p.id not in groups]
    if groups:
        common.print0(f"{name}: {len(groups)} of {len(problems)} problems are done already")
    size = 64 * world.size
    for start in tqdm(range(0, len(left), size), desc=name, disable=None if world.rank == 0 else True):
        asked = left[start : start + size][world.rank :: world.size]
        args = (protocol["samples"], cfg.max_tokens, protocol["temperature"], (cfg.seed,), protocol["top_p"])
        made = common.gather(grade(sampler.generate(asked, None, *args), cfg.many_boxes), world)
        groups |= {group[0]["id"]: group for group in made}
        if world.rank == 0:
            with (out / f"{name}.samples.jsonl").open("a") as file:
                file.write("".join(json.dumps(sample) + "\n" for group in made for sample in group))
                file.flush()
                os.fsync(file.fileno())
    sampler.sleep()
    if world.rank != 0:
        return None
    found = {"result": summarize([groups[p.id] for p in problems], cfg.k, cfg.seed), "protocol": protocol}
    return found | ({"traces": make_traces(cfg, problems, groups, tokenizer)} if cfg.traces else {})


# Traces -------------------------------------------------------------------------------------------
def make_traces(
    cfg: Config, problems: list[common.Problem], groups: dict[str, list[dict]], tokenizer: common.Tokenizer
) -> tuple[list[dict], Counter]:
    """(rows for --data of the training files, what became of problems and samples).

    A row is the problem's own with a right completion in place of its trace, opened by the <think>
    with which the prompt ends. A problem without one has a row too: grpo.py and --traces optional
    train on it, all else drops and counts it.
    """
    names = dict(pair.split("=", 1) for pair in cfg.columns.replace("expert=", "solution=").split())
    old = {"score", "steps", names.get("solution"), *FIELDS["solution"]}.union(*(columns for columns, _ in SCHEMAS))
    control, rows, counts = control_tokens(tokenizer), [], Counter()
    for problem in problems:
        texts: list[str] = []
        for sample in sorted(groups[problem.id], key=lambda sample: sample["tokens"]):
            fates = {
                "cut": not sample["finished"],
                "wrong": not sample["solved"],
                "duplicate": sample["text"] in texts,
                "longer": bool(texts) and cfg.keep == "shortest",
                "with a control token inside": control.search(sample["text"]) is not None,
                "kept": True,
            }
            fate = next(name for name, so in fates.items() if so)
            texts += [sample["text"]] * (fate == "kept")
            counts[fate] += 1
        row = {k: v for k, v in problem.row.items() if k not in old and not (k == "target" and is_chat(v))}
        found, again = read_fields(problem.row, names), read_fields(row, {})
        changed = [k for k in ("problem", "answer") if found.get(k) != again.get(k) or "solution" in again]
        row |= {k: found[k] for k in changed if k in found} | {"id": problem.id}
        opening = problem.prompt[problem.prompt.rindex("<think>") :] if problem.thinks else ""
        rows += [row | {"solution": opening + text} for text in texts] or [row]
        counts["with a trace" if texts else "without"] += 1
    return rows, counts


def write_traces(path: Path, parts: list[tuple[list[dict], Counter]]) -> None:
    """All rows into one file, and the counts on the terminal."""
    write_atomic(path, "".join(json.dumps(row, default=str) + "\n" for rows, _ in parts for row in rows))
    n = sum((counts for _, counts in parts), Counter())
    of = " ".join(f"{n[fate]} {fate}," for fate in ("kept", "wrong", "cut", "duplicate", "longer"))
    print(f"wrote {path}: {n['with a trace'] + n['without']} problems, {n['with a trace']} with a trace, ", end="")
    print(f"{n['without']} without; samples: {of} {n['with a control token inside']} with a control token inside")


# Reports ------------------------------------------------------------------------------------------
def read_report(folder: Path) -> dict[str, dict]:
    """Result and protocol of each benchmark of a finished run."""
    path = folder / "report.json"
    if not path.is_file():
        common.fail(f"there is no {path}: not a folder of eval.py, or one that it has not finished")
    try:
        report = json.loads(path.read_bytes())
        for entry in report.values():
            average_key(entry["result"]), entry["protocol"]["data_sha256"]
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        common.fail(f"{path} is no report of eval.py ({error!r}); remove it and run eval.py again: samples are kept")
    return report


def average_key(result: dict) -> str:
    """The name of the score: avg@n."""
    return next(key for key in result if key.startswith("avg@"))


def show(report: dict[str, dict]) -> None:
    """One table: a benchmark a line."""
    passes = dict.fromkeys(k for entry in report.values() for k in entry["result"] if k.startswith("pass@"))
    keys = ["problems", "score", "interval 95 %", *passes]
    keys += [
        key for key in ("mean_reward", "math_verify", "differ") if any(key in e["result"] for e in report.values())
    ]
    keys += ["truncated", "several_boxes", "mean_tokens", "verifier_errors"]
    rows = [["benchmark", *keys]]
    for name, entry in report.items():
        result = entry["result"]
        score = average_key(result)
        low, high = result["interval_95"]
        known = result | {"score": f"{score} {result[score]:.4f}", "interval 95 %": f"{low:.4f} to {high:.4f}"}
        cells = [known.get(key, "") for key in keys]
        rows.append([name, *(f"{c:.4f}".rstrip("0").rstrip(".") if isinstance(c, float) else str(c) for c in cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def compare(one: Path, two: Path, seed: int) -> None:
    """Paired over problems: mean of (two - one) with its interval, and the problems that flipped.

    Those are the ones whose means lie on two sides of one half.
    """
    reports = read_report(one), read_report(two)
    shared = [name for name in reports[0] if name in reports[1]]
    if not shared:
        common.fail(f"{one} and {two} have no benchmark in common")
    for name in shared:
        if len({report[name]["protocol"]["data_sha256"] for report in reports}) > 1:
            common.fail(f"{name}: {one} and {two} were made on different problems")
        differ = [k for k, v in reports[0][name]["protocol"].items() if reports[1][name]["protocol"][k] != v]
        means = []
        for folder in (one, two):
            rewards: dict[str, list[float]] = {}
            for line in (folder / f"{name}.samples.jsonl").read_text().splitlines():
                sample = json.loads(line)
                rewards.setdefault(sample["id"], []).append(sample["solved"])
            means.append({key: sum(r) / len(r) for key, r in rewards.items()})
        gains = [means[1][key] - means[0][key] for key in means[0]]
        low, high = bootstrap_interval(gains, seed)
        print(f"{name}: {np.mean(list(means[0].values())):.4f} -> {np.mean(list(means[1].values())):.4f}, ", end="")
        print(f"difference {np.mean(gains):+.4f} ({low:+.4f} to {high:+.4f}, 95 % over {len(gains)} problems)")
        for word, sign in (("gained", 1), ("lost", -1)):
            ids = [key for key in means[0] if sign * (means[1][key] - 0.5) > 0 >= sign * (means[0][key] - 0.5)]
            print(f"  {word} {len(ids)}: {' '.join(ids[:20])}{' ...' if len(ids) > 20 else ''}")
        print(f"  protocols differ in: {', '.join(differ) or 'nothing'}")


def markdown(folders: tuple[Path, ...]) -> None:
    """A run a row, a benchmark a column, and the unweighted mean where a run has all of them."""
    reports = {folder: read_report(folder) for folder in folders}
    names = list(dict.fromkeys(name for report in reports.values() for name in report))
    print(f"| run | {' | '.join(names)} | mean |\n|---|{'---|' * (len(names) + 1)}")
    for folder, report in reports.items():
        cells = []
        for name in names:
            result = report[name]["result"] if name in report else None
            half = (result["interval_95"][1] - result["interval_95"][0]) / 2 if result else 0.0
            cells.append(f"{100 * result[average_key(result)]:.1f} ± {100 * half:.1f}" if result else "")
        scores = [entry["result"][average_key(entry["result"])] for entry in report.values()]
        label = folder.parent.parent.name if folder.parent.name == "final" else folder.name
        mean = f"{100 * np.mean(scores):.1f}" if len(scores) == len(names) else ""
        print(f"| {label} | {' | '.join(cells)} | {mean} |")


# Main ---------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    if cfg.table:
        return markdown(cfg.table)
    if cfg.compare:
        if len(cfg.compare) != 2:
            common.fail("--compare takes two folders")
        return compare(*cfg.compare, cfg.seed)
    world = common.init(cfg.seed)
    tokenizer = common.load_tokenizer(cfg.model)
    folder = Path(resolve_model(cfg.model))
    kind = "traces" if cfg.traces else "eval"  # the samples of both are of other protocols as a rule
    out = Path(cfg.out or (folder / kind if folder.is_dir() else f"{kind}-{folder.name}"))
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in cfg.data.split(",") if name]
    if cfg.traces and (not cfg.traces.endswith(".jsonl") or cfg.traces in names or cfg.many_boxes != "zero"):
        common.fail(f"--traces {cfg.traces}: it needs a .jsonl file that is not --data, and --many_boxes zero")
    Path(cfg.traces).parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        locate(name, cfg.data_dir)  # before a model is loaded
    if (path := out / "report.json").exists():
        read_report(out)  # a broken one is said now, not after hours
    shared = "model sampler sampler_memory tensor_parallel max_prompt_tokens rope_theta max_positions".split()
    run_config = common.RunConfig(**{field: getattr(cfg, field) for field in shared})
    positions = window(run_config)
    room = min(cfg.max_tokens, positions - cfg.max_prompt_tokens)  # at least: prompts can be shorter
    sampler = common.load_sampler(run_config, tokenizer, world, room)
    report, traces = {}, []
    for name in names:
        entry = run(cfg, name, tokenizer, sampler, world, out, positions)
        if entry is not None:
            traces += [entry.pop("traces")] if cfg.traces else []
            report[entry["protocol"]["benchmark"]] = entry
            print("protocol: " + " ".join(f"{k}={v!r}" for k, v in entry["protocol"].items() if v not in ("", None)))
    if world.rank == 0:
        before = read_report(out) if path.exists() else {}  # again: another evaluation may have ended meanwhile
        write_atomic(path, json.dumps(before | report, indent=1) + "\n")
        show(report)
        print(f"wrote {path}, with the samples of every benchmark beside it")
        if cfg.traces:
            write_traces(Path(cfg.traces), traces)
    common.shutdown()


if __name__ == "__main__":
    reports_only = {"--compare", "--table"} & set(sys.argv)
    main(tyro.cli(Config, description=__doc__) if reports_only else common.parse(Config))
