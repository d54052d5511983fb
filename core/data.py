"""Problems: rows of a file or hub data set, recognised, rendered, tokenised and checked at load."""

import gzip
import hashlib
import json
import re
import unicodedata
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import datasets

from core.answers import is_words
from core.model import Tokenizer
from core.processes import fail, first_line, print0
from core.verifier import answer_part, boxed, golds_parse, last_box, verify


@dataclass(frozen=True)
class Problem:
    """One question. expert_ids ends with EOS; a Countdown answer is {"target", "nums"}."""

    id: str
    text: str
    prompt_ids: list[int]
    answer: str | dict
    expert_ids: list[int] | None
    thinks: bool = False  # the prompt ends with an open <think>: only what follows </think> is the answer
    step_ends: tuple[int, ...] = ()  # expert tokens up to the end of each step, where the data set has steps
    score: float | None = None  # how good the trace is, where the data set says so
    occurrence: int = 0  # how often the step has drawn this problem before
    hinted: bool = False  # the prompt shows a part of the trace


def group_seed(seed: tuple[int, ...], problem: Problem) -> int:
    """A problem's samples depend on (seed, step, attempt), its id and its occurrence alone."""
    key = (seed, problem.id, problem.occurrence) if problem.occurrence else (seed, problem.id)
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


# Rows ---------------------------------------------------------------------------------------------
def read_rows(name: str, split: str) -> list[tuple[str, dict]]:
    """(where, row) of a .jsonl, .jsonl.gz or .parquet file or of a hub data set."""
    path = Path(name)
    if path.suffix == ".parquet" and path.is_file():
        rows = datasets.Dataset.from_parquet(name)
    elif path.is_file():
        rows = read_json_lines(path)
    else:
        rows = read_hub(name, split)
    return [(f"{name}:{i + 1}", row) for i, row in enumerate(rows)]


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl or .jsonl.gz file. Any other line ends the run with its number."""
    rows = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for i, line in enumerate(file):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fail(f"{path}:{i + 1} is not a JSON object ({error.msg})")
            if not isinstance(row, dict):
                fail(f"{path}:{i + 1} is not a JSON object")
            rows.append(row)
    return rows


def read_hub(name: str, split: str) -> datasets.Dataset:
    """A split, else the first one, of the hub's owner/name or owner/name:configuration."""
    hub_name, _, part = name.partition(":")
    file_like = name.endswith((".jsonl", ".gz", ".parquet", ".json")) or name.startswith((".", "/", "~"))
    if file_like or hub_name.count("/") != 1:
        fail(f"there is no data file {name}")
    try:
        parts = datasets.load_dataset(hub_name, part or None)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        fail(f"{name} is neither a file nor a data set that the hub gives ({first_line(error)})")
    chosen = split if split in parts else next(iter(parts))
    if chosen != split:
        print0(f"data {name}: there is no split {split}; {chosen} is taken")
    return parts[chosen]


# Columns ------------------------------------------------------------------------------------------

FIELDS = {  # what a problem needs: the column names under which it is found
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "final_answer"),
    "solution": ("solution", "response", "expert"),
    "score": ("score",),  # of the trace; can be missing
}


def right_generation(row: dict, generations: object) -> dict:
    """OpenR1: the first generation found right; else empty, so that no column replaces it."""
    verdicts = row.get("correctness_math_verify") or row.get("correctness_llama") or []
    if not isinstance(generations, list):
        return {}
    return {"solution": next((text for text, right in zip(generations, verdicts, strict=False) if right), "")}


def thought(row: dict, thinking: str | list[str] | None, attempt: str | None) -> dict:
    """s1K: the answer is the solution's box, or all of it; the trace is thought and attempt."""
    answer = last_box(row["solution"]) or row["solution"].strip()
    trace = f"<think>\n{''.join(thinking)}\n</think>\n\n{attempt}" if thinking and attempt else ""
    return {"answer": answer, "solution": trace}


def conversation(row: dict, messages: object) -> dict:
    """A chat: what comes before the answer of the assistant, and that answer."""
    if not is_chat(messages):
        return {}
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    return {"problem": [m for m in messages if m["role"] != "assistant"], "solution": said[0] if said else None}


def first_message(row: dict, target: object) -> dict:
    """LUFFY: the trace is the first of the target's messages, where no column has it."""
    named = any(row.get(column) is not None for column in FIELDS["solution"])
    return {"solution": target[0]["content"]} if is_chat(target) and not named else {}


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "content" in m for m in value)


SCHEMAS = [  # columns that tell a schema, and what makes fields of row and columns; the first that makes some
    (("generations",), right_generation),  # OpenR1
    (("deepseek_thinking_trajectory", "deepseek_attempt"), thought),  # s1K-1.1
    (("thinking_trajectories", "attempt"), thought),  # s1K
    (("messages",), conversation),
    (("target",), first_message),  # LUFFY
]


def read_fields(row: dict, names: dict[str, str]) -> dict[str, object]:
    """problem, answer and solution of a row, as far as it has them, in any recognised schema.

    `names` maps a field to the user's own column and wins over every schema.
    """
    found = {field: next((row[c] for c in known if row.get(c) is not None), None) for field, known in FIELDS.items()}
    fits = ((read, [row[c] for c in columns]) for columns, read in SCHEMAS if set(columns) <= set(row))
    schema = next(filter(None, (read(row, *values) for read, values in fits)), {})
    found |= {field: value for field, value in schema.items() if value is not None}
    found |= {field: row.get(column) for field, column in names.items()}
    if isinstance(row.get("reward_model"), dict) and found["answer"] is None:  # verl
        found["answer"] = row["reward_model"].get("ground_truth")
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    if {"target", "nums"} <= set(meta) and "answer" not in names:  # Countdown
        found["answer"] = {"target": meta["target"], "nums": meta["nums"]}
    found = plain_answer(found, "solution" in names)
    return {field: value for field, value in found.items() if value not in (None, "", [])}


def plain_answer(found: dict[str, object], solution_named: bool) -> dict[str, object]:
    """The answer as a string: out of `#### n`, of the solution's box, of a list of its parts."""
    answer, solution = found["answer"], found["solution"]
    if "####" in str(answer):  # GSM8K as its authors ship it
        solution = solution if solution_named else answer
        answer = str(answer).split("####")[-1].strip().replace(",", "")
    if answer is None and isinstance(solution, str):  # MATH
        answer = last_box(solution)
    if isinstance(answer, list):  # OlympiadBench
        answer = ", ".join(map(str, answer))
    answer = answer if answer is None or isinstance(answer, (str, dict)) else str(answer)
    return found | {"answer": answer, "solution": solution}


# Prompts ------------------------------------------------------------------------------------------

BOX_REQUEST = "\nPlease reason step by step, and put your final answer within \\boxed{}."
THINK_REQUEST = (
    "Reason step by step before you answer. Write the reasoning between <think> and </think>, where you may explore, "
    "verify and correct yourself, and after it the solution, with the final answer within \\boxed{}."
)
CHATML = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{{problem}}<|im_end|>\n<|im_start|>assistant\n{opening}"
)
TEMPLATES = {  # chat is the tokenizer's own; think is chat, else this, and ends with an open <think>
    "plain": "{problem}\n",
    "qwen_math": CHATML.format(system=BOX_REQUEST.strip().replace("{}", "{{}}"), opening=""),
    "think": CHATML.format(system=THINK_REQUEST.replace("{}", "{{}}"), opening="<think>\n"),
}


def choose_template(template: str, tokenizer: Tokenizer) -> str:
    """What auto means for a tokenizer. An unknown or missing template ends the run."""
    if template == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if template != "chat" and template not in TEMPLATES:
        fail(f"--template {template} is not one of chat, {', '.join(TEMPLATES)}")
    if template == "chat" and not tokenizer.chat_template:
        fail("--template chat: this tokenizer has no chat template")
    return template


def question_text(problem: str | list[dict]) -> str:
    """The question itself, of a string or of a conversation that ends with it."""
    return problem if isinstance(problem, str) else problem[-1]["content"]


def render(problem: str | list[dict], tokenizer: Tokenizer, template: str) -> tuple[str, list[int]]:
    """A question's prompt as text and ids, with exactly one BOS where the tokenizer wants one."""
    if template == "chat" or (template == "think" and tokenizer.chat_template):
        messages = problem if isinstance(problem, list) else [{"role": "user", "content": problem + BOX_REQUEST}]
        if template == "think" and not isinstance(problem, list):
            messages = [{"role": "system", "content": THINK_REQUEST}, {"role": "user", "content": problem}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if template == "think" and not text.rstrip().endswith("<think>"):
            text += "<think>\n"
    else:
        text = TEMPLATES[template].format(problem=question_text(problem))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    default = tokenizer("a").input_ids
    if tokenizer.bos_token_id is not None and default[:1] == [tokenizer.bos_token_id] and ids[:1] != default[:1]:
        ids = [tokenizer.bos_token_id, *ids]
    return text, ids


def with_hint(problem: Problem, hint_ids: list[int], tokenizer: Tokenizer) -> Problem:
    """The problem with the beginning of its trace behind the question, in the user's turn."""
    prompt, question = tokenizer.decode(problem.prompt_ids), problem.text.strip()
    found = [way for way in (question, unicodedata.normalize("NFC", question)) if way in prompt]
    if not found:
        fail(f"problem {problem.id}: its prompt does not hold the question as it is, so that no hint can follow it")
    before, question, after = prompt.rpartition(found[0])
    text = f"{before}{question}\n\nThe solution begins like this:\n{tokenizer.decode(hint_ids)}\n{after}"
    return replace(problem, prompt_ids=tokenizer(text, add_special_tokens=False).input_ids, hinted=True)


# Traces -------------------------------------------------------------------------------------------
def with_box(solution: str, answer: str | dict, row: dict, thinks: bool) -> str:
    """The expert trace with its answer in a box: `#### n` becomes the box, a trace without one gets
    it as its last line.

    After an open <think> the tag is not repeated; a trace that never closes it is the thought, but
    for a last line with the box.
    """
    if thinks:
        solution = solution.removeprefix("<think>").lstrip("\n")
    if boxed(answer_part(solution, thinks)):
        return solution
    body, _, last = solution.rstrip().rpartition("\n")
    if thinks and "</think>" not in solution and body and boxed(last) and not boxed(body):
        return f"{body}\n</think>\n{last}"  # the thought must not hold the answer: prefixes of it are shown
    final = row.get("answer", "") if isinstance(answer, dict) else answer
    body = solution.split("####")[0].rstrip()
    closing = "\n</think>" if thinks and "</think>" not in solution else ""
    return f"{body}{closing}\n\\boxed{{{final}}}"


def steps_of(row: dict) -> list[str]:
    """The steps of a trace where the data set names them, in `steps` or `meta.steps`."""
    steps = row.get("steps") or (row["meta"] if isinstance(row.get("meta"), dict) else {}).get("steps")
    return steps if isinstance(steps, list) and all(isinstance(step, str) for step in steps) else []


def step_ends(steps: list[str], solution: str, offsets: list[tuple[int, int]]) -> tuple[int, ...]:
    """Tokens up to the end of each step of a trace; () where the steps do not follow each other.

    White space after a step belongs to it. What stands after the last one, the answer's box and
    EOS, is one more; EOS alone belongs to the last. A step that ends inside a token ends before it.
    """
    starts, place = [], 0
    for step in filter(str.strip, steps):
        at = solution.find(step.strip(), place)
        if at < 0 or solution[place:at].strip():
            return ()
        starts.append(at)
        place = at + len(step.strip())
    rest = solution[place:].lstrip()
    starts += [len(solution) - len(rest)] if rest else []
    ends = {sum(end <= start for _, end in offsets) for start in starts[1:]} - {0}
    return (*sorted(ends), len(offsets) + 1) if ends else ()


def episode_ends(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """[..., len(expert_ids)]: tokens up to the end of each step of the data set, else of each line.

    Sentences take the place of fewer than two lines. No piece is white space or EOS alone: it
    belongs to the piece before, at the start to the one after.
    """
    if problem.step_ends:
        return list(problem.step_ends)
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in problem.expert_ids]
    first = next((i for i, text in enumerate(texts) if text.strip()), len(texts))
    for marks in (("\n",), (".", "!", "?", "\n")):
        ends = [i for i, text in enumerate(texts, 1) if text.rstrip(" ").endswith(marks) and i > first]
        ends = [a for a, b in pairwise([*ends, len(texts)]) if "".join(texts[a:b]).strip()]
        if ends:
            break
    return [*ends, len(texts)]


BOX = r"\\boxed(?!\{\s*\})|\\fbox|####"  # an empty one is the task's own words
GIVEN = {False: re.compile(BOX), True: re.compile(BOX + r"|</think>|^\W*final answer\b", re.IGNORECASE | re.MULTILINE)}
BREAK = re.compile(r"[\n!?]|[.](?!\w)")  # the end of a sentence, not of a decimal
AS_FINAL = (
    r"\b(?:answers?|results?|solution|conclu\w+|finally)\b(?:[^.!?]|[.](?=\w)){{0,80}}?{said}"
    r"|{said} (?:is|must be) the (?:final |right |correct )?(?:answer|result)\b"
)


def written(answer: str) -> set[str]:
    """Patterns of the ways in which a text may write an answer: bare, its right side, 1,000."""
    bare = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}|\\[$!,; ]|\\?%|\$", r"\1", answer).strip()
    ways = {re.escape(way) for way in (answer, bare, bare.rpartition("=")[2].strip()) if way}
    ways = {re.sub(r"(?<=\d)(?=\d)", ",?", way).replace(r"\-", "[-−]") for way in ways}
    return {rf"(?<![\w.]){way}(?!\w|[.]\d)" for way in ways}


def tokens_before_answer(problem: Problem, tokenizer: Tokenizer) -> int:
    """How many expert tokens can be shown: those before the trace's first box, never all.

    A trace that thinks gives its answer away earlier: where a sentence calls it answer, result,
    solution or conclusion, at the latest where the thought is closed. Other words are not seen.
    """
    ids = problem.expert_ids[:-1]
    text = tokenizer.decode(ids)
    thinks = problem.thinks or "</think>" in text
    given = [match.start() for match in GIVEN[thinks].finditer(text)]
    answers = {problem.answer, last_box(text)} if isinstance(problem.answer, str) else {last_box(text)}
    for said in {way for answer in filter(None, answers if thinks else ()) for way in written(answer)}:
        for match in re.compile(AS_FINAL.format(said=said), re.IGNORECASE).finditer(text):
            given.append(max((end.end() for end in BREAK.finditer(text, 0, match.start())), default=0))
    place = min(given, default=len(text))
    return bisect_right(range(len(ids) + 1), place, key=lambda n: len(tokenizer.decode(ids[:n]))) - 1


def shown_ends(problem: Problem, tokenizer: Tokenizer) -> tuple[list[int], bool]:
    """(episode_ends but the last, as far as they do not give the answer away; whether some do)."""
    *ends, _ = episode_ends(problem, tokenizer)
    limit = tokens_before_answer(problem, tokenizer)
    return [end for end in ends if end <= limit], bool(ends) and ends[-1] > limit


def regroup(ends: list[int], pieces: int) -> list[int]:
    """n ends -> [0, ..., ends[-1]], the ends of m = min(pieces, n) pieces: cut i is round(i n / m).

    Liu et al. 2025, UFT (2505.16984), official rl_dataset.py. Without an end only the cut 0.
    """
    kept = min(pieces, len(ends))
    return [0, *(ends[round(i * len(ends) / kept) - 1] for i in range(1, kept + 1))]


# Loading ------------------------------------------------------------------------------------------
def load_problems(
    name: str,
    tokenizer: Tokenizer,
    template: str = "auto",  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    columns: str = "",  # "problem=... answer=... expert=..."
    max_prompt_tokens: int = 1024,
    max_completion_tokens: int = 8192,  # an expert trace longer than this (EOS included) is dropped
    require_expert: bool = False,  # rows without a usable expert trace are dropped; else traces are not read
    split: str = "train",
) -> list[Problem]:
    """Read, render and check a data set. A row is kept, or counted with the reason it is not."""
    template, rows = choose_template(template, tokenizer), read_rows(name, split)
    names = dict(pair.split("=", 1) for pair in columns.replace("expert=", "solution=").split())
    for column in names.values():
        if rows and column not in rows[0][1]:
            fail(f"--columns: {rows[0][0]} has no column {column!r}; it has {', '.join(rows[0][1])}")
    fields = [read_fields(row, names) for _, row in rows]
    answers = [found["answer"] for found in fields if "answer" in found]
    readable = iter(golds_parse(answers))
    if spoken := sum(map(is_words, answers)):
        print0(f"data {name}: {spoken} of {len(rows)} answers are words, and compared as words")
    kept, dropped, seen = [], defaultdict(list), set()
    for (where, row), found in zip(rows, fields, strict=True):
        answer_ok, number = "answer" in found and next(readable), where.rsplit(":", 1)[-1]
        problem = make_problem(row, found, answer_ok, tokenizer, template, max_prompt_tokens, require_expert)
        if isinstance(problem, Problem) and len(problem.expert_ids or ()) > max_completion_tokens:
            problem = f"expert trace over {max_completion_tokens} tokens"
        if isinstance(problem, str):
            dropped[problem].append(where)
            continue
        name_of_row = str(row.get("id", number))
        problem = replace(problem, id=name_of_row if name_of_row not in seen else f"{name_of_row}#{number}")
        seen.add(problem.id)
        kept.append((where, row, found, problem))
    kept = right_traces(kept, tokenizer, dropped) if require_expert else kept
    drops = "; ".join(f"{len(places)} dropped: {reason} (first {places[0]})" for reason, places in dropped.items())
    print0(f"data {name}: {len(kept)} of {len(rows)} rows kept, template {template}{drops and f'; {drops}'}")
    if not kept:
        fail(f"{name}: no usable row among {len(rows)}{drops and f' ({drops})'}")
    print0(f"first prompt: {tokenizer.decode(kept[0][-1].prompt_ids)!r}")
    if require_expert:
        describe_traces(name, kept, tokenizer)
    return [problem for *_, problem in kept]


def make_problem(
    row, found, answer_ok: bool, tokenizer: Tokenizer, template: str, longest: int, expert: bool
) -> Problem | str:
    """The problem of a row, on request with its trace; or the reason for which it is dropped."""
    missing = [f for f in ("problem", "answer", *(["solution"] if expert else [])) if f not in found]
    if missing:
        return f"no {' and no '.join(missing)}"
    if not answer_ok:
        return "answer that the verifier cannot read"
    prompt, prompt_ids = render(found["problem"], tokenizer, template)
    if len(prompt_ids) > longest:
        return f"prompt over {longest} tokens"
    thinks, expert_ids, ends = prompt.rstrip().endswith("<think>"), None, ()
    if expert:
        solution = with_box(found["solution"], found["answer"], row, thinks)
        encoded = tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True)
        expert_ids = [*encoded.input_ids, tokenizer.eos_token_id]
        ends = step_ends(steps_of(row), solution, encoded.offset_mapping)
    score = found["score"] if isinstance(found.get("score"), (int, float)) else None
    return Problem("", question_text(found["problem"]), prompt_ids, found["answer"], expert_ids, thinks, ends, score)


def right_traces(kept: list[tuple], tokenizer: Tokenizer, dropped: dict[str, list[str]]) -> list[tuple]:
    """Those entries whose expert trace the verifier calls right."""
    problems = [problem for *_, problem in kept]
    texts = [answer_part(tokenizer.decode(p.expert_ids, skip_special_tokens=True), p.thinks) for p in problems]
    scores, _ = verify(texts, [p.answer for p in problems], progress="checking expert traces")
    for (where, *_), score in zip(kept, scores, strict=True):
        if score != 1:
            dropped["expert trace that the verifier rejects"].append(where)
    return [entry for entry, score in zip(kept, scores, strict=True) if score == 1]


def describe_traces(name: str, kept: list[tuple], tokenizer: Tokenizer) -> None:
    """Print what was done to traces, and the first one as the model sees it."""
    boxes_added = sum(not boxed(found["solution"]) for _, _, found, _ in kept)
    steps_unused = sum(bool(steps_of(row)) and not problem.step_ends for _, row, _, problem in kept)
    if boxes_added:
        print0(f"data {name}: {boxes_added} expert traces had no \\boxed{{}}; their answer was added in one")
    if steps_unused:
        print0(f"data {name}: the steps of {steps_unused} rows do not cut their traces; lines are taken there")
    ids = kept[0][-1].expert_ids
    print0(f"first expert trace ({len(ids)} tokens): {tokenizer.decode(ids)!r}")
