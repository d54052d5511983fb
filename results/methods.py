"""The table of all methods. Tests, Makefile, bench.py and README read it; a new method is one more
entry.

python results/methods.py diffs       every method against its parent
python results/methods.py readme      write the tables of README.md anew
"""

import ast
import difflib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Method(NamedTuple):
    """A method file and what is said of it."""

    name: str  # of the file
    parent: str  # the file that it is a diff of
    paper: str
    expert: str  # which tokens of a row the expert wrote
    idea: str
    equation: str  # the term that is the paper's
    line: str  # how the line begins that computes it
    most: int  # changed lines below the docstring, at most: a number that only falls
    model: str  # of the paper's experiment


METHODS = [
    Method(
        "grpo",
        "",
        "Shao 2024, 2402.03300",
        "none",
        "a completion is pushed by how much better it did than its group; the parent file",
        "min(ratio A, clip(ratio) A)",
        "surrogate, clipped = ",
        0,
        "Qwen2.5-7B",
    ),
    Method(
        "dapo",
        "grpo",
        "Yu 2025, 2503.14476",
        "none",
        "groups that are all right or all wrong are thrown away, and others drawn until the batch is full",
        "0 < right rows of a group < all",
        "return common.gather([cfg.zero_variance",
        70,
        "Qwen2.5-32B",
    ),
    Method(
        "sft",
        "grpo",
        "Limozin 2026, 2604.23747",
        "all",
        "maximum likelihood with one global token mean: the baseline that must be right",
        "- 1 / num_expert sum logprobs",
        "loss = -common.token_mean(",
        130,
        "Qwen2.5-7B",
    ),
    Method(
        "bread",
        "grpo",
        "Zhang 2025, 2506.17211",
        "a prefix",
        "where the whole group fails, branch from an expert prefix that lets it succeed sometimes",
        "mid = ceil((lo + hi) / 2)",
        "mids, rounds = ",
        60,
        "Qwen2.5-1.5B",
    ),
    Method(
        "luffy",
        "grpo",
        "Yan 2025, 2504.14945",
        "all, in one row of the group",
        "the trace is an off-policy sample, shaped towards its unlikely tokens",
        "A p / (p + gamma)",
        "shaped = ",
        30,
        "Qwen2.5-7B",
    ),
    Method(
        "srft",
        "luffy",
        "Fu 2025, 2506.19767",
        "all, in one row of the group",
        "LUFFY, and the trace is imitated; this and the rows pushed up are weighted by the policy's entropy",
        "sft_coef exp(-H) logprobs",
        "w_sft = cfg.sft_coef",
        35,
        "Qwen2.5-7B",
    ),
    Method(
        "relift",
        "grpo",
        "Ma 2025, 2506.07527",
        "all, in a step of its own",
        "questions that RL failed wait in a buffer for an SFT step",
        "- 1 / num_expert sum (logprobs + coef H)",
        "loss = -common.token_mean(",
        65,
        "Qwen2.5-7B",
    ),
    Method(
        "prefix_rft",
        "grpo",
        "Huang 2025, 2507.01679",
        "a prefix of one row",
        "a random prefix, trained as the policy's own where the policy is most uncertain",
        "A_t = 0 on the prefix tokens of low H",
        "A = torch.where(",
        75,
        "Qwen2.5-7B",
    ),
    Method(
        "uft",
        "grpo",
        "Liu 2025, 2505.16984",
        "a prefix of every row",
        "a hint that is shortened over the run, with a little likelihood on it",
        "- hint_coef / num_hint sum logprobs",
        "hint_loss = ",
        60,
        "Qwen2.5-0.5B",
    ),
    Method(
        "bridge",
        "grpo",
        "Chen 2025, 2509.06948",
        "all, in rows of their own",
        "SFT and RL on the base weights, an adapter that learns what helps their cooperation",
        "w += lam (grad J_RL - grad J_RL of the shadow)",
        "mine.grad = ",
        160,
        "Qwen2.5-3B",
    ),
    Method(
        "chord",
        "grpo",
        "Zhang 2025, 2508.11408",
        "all, in rows of their own",
        "(1 - mu) GRPO + mu SFT, with mu falling",
        "(1 - mu) GRPO + mu SFT",
        "loss = (1 - mu) * loss",
        40,
        "Qwen2.5-7B",
    ),
    Method(
        "hpt",
        "grpo",
        "Lv 2025, 2509.04419",
        "all, instead of a failed group",
        "SFT where the group fails, GRPO where it does not",
        "rows = trace if right <= gate",
        "failed = ",
        45,
        "Qwen2.5-7B",
    ),
    Method(
        "trapo",
        "grpo",
        "Su 2025, 2512.17636",
        "a growing prefix",
        "micro-groups with longer prefixes while they fail, trust-region SFT on the prefix",
        "p / max(p, trsft_alpha)",
        "sft_loss = ",
        85,
        "Qwen2.5-7B",
    ),
    Method(
        "iw_sft",
        "sft",
        "Qin 2025, 2507.12856",
        "all",
        "SFT weighted by how much likelier the trace is now than at the start; also dft, trsft, chord_phi, pear",
        "exp(mean(log q - log ref)) logprobs",
        "iw = ",
        95,
        "Qwen2.5-32B",
    ),
]


def body(name: str) -> list[str]:
    """The lines below a method's docstring."""
    source = (ROOT / f"{name}.py").read_text()
    return source.splitlines(keepends=True)[ast.parse(source).body[0].end_lineno :]


def body_diff(method: Method) -> list[str]:
    """Changed lines below the docstring, without blank ones."""
    lines = difflib.unified_diff(body(method.parent), body(method.name), n=0)
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---") and line[1:].strip()]


def equation_line(method: Method) -> int:
    """Number of the line that computes the method's term; ValueError unless there is just one."""
    lines = (ROOT / f"{method.name}.py").read_text().splitlines()
    (found,) = [number for number, line in enumerate(lines, 1) if line.strip().startswith(method.line)]
    return found


def readme_table() -> str:
    """The table of methods, as Markdown."""
    rows = ["| file | paper | equation | line | expert tokens | idea | diff |", "|---|---|---|---|---|---|---|"]
    for m in METHODS:
        changed = f"{len(body_diff(m))} of {m.parent}.py" if m.parent else "the parent"
        where = f"[{m.name}.py:{equation_line(m)}]({m.name}.py#L{equation_line(m)})"
        rows.append(f"| `{m.name}.py` | {m.paper} | `{m.equation}` | {where} | {m.expert} | {m.idea} | {changed} |")
    return "\n".join(rows) + "\n"


def write(page: str, name: str, text: str) -> None:
    """Put the text between the markers of that name in a page of the repository."""
    before, start, rest = (ROOT / page).read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    (ROOT / page).write_text(before + start + text + end + after)


def main() -> None:
    if sys.argv[1:] == ["readme"]:
        write("README.md", "methods", readme_table())
    elif sys.argv[1:] == ["diffs"]:
        for m in METHODS[1:]:
            print(f"=== diff {m.parent}.py {m.name}.py", flush=True)
            subprocess.run(["diff", f"{m.parent}.py", f"{m.name}.py"], cwd=ROOT, check=False)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
