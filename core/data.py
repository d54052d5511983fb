"""Problems: rows of a file or hub data set, recognised, rendered, tokenised and checked at load."""

import datetime
import functools
import gzip
import hashlib
import json
import os
import re
import shlex
from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import datasets
import jinja2

from core.answers import is_words
from core.config import BOX_REQUEST, RunConfig
from core.model import Tokenizer
from core.processes import fail, first_line, once, print0
from core.rewards import COMPARED, VERIFIER, Grader, grade
from core.verifier import answer_part, boxed, completion_text, golds_parse, last_box, opens


@dataclass(frozen=True)
class Problem:
    """One question. expert_ids ends with EOS; a Countdown answer is {"target", "nums"}."""

    id: str
    text: str
    prompt_ids: list[int]
    answer: str | dict
    expert_ids: list[int] | None  # None: not read; []: there is no trace that can be used
    thinks: bool = False  # the prompt ends with an open <think>: only what follows </think> is the answer
    step_ends: tuple[int, ...] = ()  # expert tokens up to the end of each step, where the data set has steps
    score: float | None = None  # how good the trace is, where the data set says so
    occurrence: int = 0  # how often the step has drawn this problem before
    hinted: bool = False  # the prompt shows a part of the trace
    system: str | None = None  # the row's own system turn, where it is asked with one
    prompt: str = ""  # the text of prompt_ids, with a CUT in each control token that is mere text
    grader: Grader = VERIFIER  # what its completions earn
    row: dict = field(default_factory=dict, compare=False, repr=False)  # as the data has it, for one's own rewards
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)  # what was done to the row; %d: to how many


def group_seed(seed: tuple[int, ...], problem: Problem) -> int:
    """A problem's samples depend on (seed, step, attempt), its id and its occurrence alone."""
    key = (seed, problem.id, problem.occurrence) if problem.occurrence else (seed, problem.id)
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


# Rows ---------------------------------------------------------------------------------------------
def read_rows(names: str, split: str) -> list[tuple[str, dict]]:
    """(where, row) of .jsonl, .jsonl.gz or .parquet files or hub data sets, one after the other."""
    found = []
    for name in [names] if Path(names).is_file() else filter(None, names.split(",")):
        path = Path(name)
        if path.suffix == ".parquet" and path.is_file():
            rows = enumerate(datasets.Dataset.from_parquet(name), 1)
        elif path.is_file():
            rows = read_json_lines(path)
        else:
            rows = enumerate(read_hub(name, split), 1)
        found += [(f"{name}:{i}", row) for i, row in rows]
    return found


def read_json_lines(path: Path) -> list[tuple[int, dict]]:
    """(line, object) of a .jsonl or .jsonl.gz file. A line that holds anything else ends the run.

    Half of a surrogate pair, which no tokenizer takes, becomes the sign for a lost character.
    """
    rows = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for i, line in enumerate(file):
            try:
                text = line.decode("utf-8-sig").strip()  # without a byte-order mark
                row = json.loads(text or "null")
                if "\\ud" in text.lower():
                    row = json.loads(re.sub("[\ud800-\udfff]", "\ufffd", json.dumps(row, ensure_ascii=False)))
            except ValueError as error:  # of the bytes or of the JSON
                fail(f"{path}:{i + 1} is not a JSON object in UTF-8 ({first_line(error)})")
            if text and not isinstance(row, dict):
                fail(f"{path}:{i + 1} is not a JSON object")
            rows += [(i + 1, row)] if text else []
    return rows


def read_hub(name: str, split: str) -> datasets.Dataset:
    """A split, else the first one, of the hub's owner/name or owner/name:configuration."""
    hub_name, _, part = name.partition(":")
    if re.search(r"\A[./~]|\.(jsonl?|gz|parquet)\Z", name) or hub_name.count("/") != 1:  # like a file
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
    "problem": ("problem", "question", "prompt", "instruction"),
    "answer": ("answer", "final_answer"),
    "solution": ("solution", "response", "expert", "completion", "output"),
    "score": ("score",),  # of the trace; can be missing
}
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages, not empty: role and content, or from and value."""
    keys = [set(m) if isinstance(m, dict) else set() for m in value] if isinstance(value, list) else []
    return bool(keys) and all({"role", "content"} <= k or {"from", "value"} <= k for k in keys)


def turns(value: object, role: str = "user") -> list[dict]:
    """The messages of a chat, or a text as one; [] of anything else. A turn's content is None where
    it is more than text (an image, a tool call); a thought in a field of its own leads it.
    """
    found = []
    for m in value if is_chat(value) else [{"role": role, "content": value}] if isinstance(value, str) else []:
        speaker, content = (m["role"], m["content"]) if "content" in m else (m["from"], m["value"])
        if isinstance(content, list):
            parts = [part if isinstance(part, dict) else {"text": part} for part in content]
            texts = [p.get("text") if "text" in str(p.get("type", "text")) else None for p in parts]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        content = content if isinstance(content, str) and not m.get("tool_calls") else None
        thinking = m.get("reasoning_content") or m.get("thinking")
        content = f"<think>\n{thinking}\n</think>\n\n{content}" if thinking and content else content
        found.append({"role": ROLES.get(str(speaker).lower(), str(speaker).lower()), "content": content})
    return found


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
    """A chat: the trace is its last turn if that is the assistant's, the question all before."""
    if not is_chat(messages):
        return {}
    *said, last = turns(messages)
    spoken = last["role"] == "assistant"
    return {"problem": said, "solution": last["content"] or ""} if spoken else {"problem": [*said, last]}


SCHEMAS = [  # columns that tell a schema, and what makes fields of row and columns; the first that makes some
    (("generations",), right_generation),  # OpenR1
    (("deepseek_thinking_trajectory", "deepseek_attempt"), thought),  # s1K-1.1
    (("thinking_trajectories", "attempt"), thought),  # s1K
    (("messages",), conversation),  # OpenAI, TRL
    (("conversations",), conversation),  # ShareGPT
]


def read_fields(row: dict, names: dict[str, str]) -> dict[str, object]:
    """problem, answer, solution, score, steps of a row, as far as it has them, in any known schema.

    `names` maps a field to the user's own column and wins over every schema.
    """
    found = {field: next((row[c] for c in known if row.get(c) is not None), None) for field, known in FIELDS.items()}
    fits = ((read, [row[c] for c in columns]) for columns, read in SCHEMAS if set(columns) <= set(row))
    schema = next(filter(None, (read(row, *values) for read, values in fits)), {})
    if row.get("input") and found["problem"] == (row.get("instruction") or ""):  # Alpaca
        found["problem"] = f"{row['instruction']}\n\n{row['input']}"
    found |= {field: value for field, value in schema.items() if value is not None}
    if is_chat(row.get("target")) and found["solution"] is None:  # LUFFY
        found["solution"] = row["target"]
    found |= {field: row.get(column) for field, column in names.items()}
    if isinstance(row.get("reward_model"), dict) and found["answer"] is None:  # verl
        found["answer"] = row["reward_model"].get("ground_truth")
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    for held in (found["answer"] or row, meta) if "answer" not in names else ():  # Countdown
        numbers = (held.get("nums") or held.get("numbers")) if isinstance(held, dict) else None
        if numbers and "target" in held:
            found["answer"] = {"target": held["target"], "nums": [*numbers]}
    steps = row.get("steps") or meta.get("steps")
    found["steps"] = steps if isinstance(steps, list) and all(isinstance(step, str) for step in steps) else None
    if is_chat(found["solution"]):  # TRL: turns before its last one belong to the question
        answered = turns(found["solution"])
        begun = turns(found["problem"]) if answered[0]["role"] == "assistant" else []
        found |= conversation(row, [*begun, *answered])
    said, system = turns(found["problem"]), turns(row.get("system") or None, "system")
    if said and all(m["role"] != "system" for m in said):
        found["problem"] = [*system, *said]
    answer = found["answer"]
    if "####" in str(answer):  # GSM8K as its authors ship it
        found["solution"] = found["solution"] if "solution" in names else answer
        answer = str(answer).split("####")[-1].strip().replace(",", "")
    answer = None if answer != answer else answer  # JSON's NaN
    if answer is None and isinstance(found["solution"], str):  # MATH
        answer = last_box(found["solution"])
    if isinstance(answer, list):  # OlympiadBench
        answer = ", ".join(map(str, answer))
    found["answer"] = answer if answer is None or isinstance(answer, (str, dict)) else str(answer)
    return {field: value for field, value in found.items() if value not in (None, "", [])}


# Prompts ------------------------------------------------------------------------------------------
THINK_REQUEST = (
    "Reason step by step before you answer. Write the reasoning between <think> and </think>, where you may explore, "
    "verify and correct yourself, and after it the solution, with the final answer within \\boxed{}."
)
PLAIN = "{% for m in messages %}{{ m.content }}{{ '\n' }}{% endfor %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "<|im_start|>assistant{{ '\n' }}"
# chat is the tokenizer's own; think is chat, else this, and ends with an open <think>
TEMPLATES = {"plain": PLAIN, "qwen_math": CHATML, "think": CHATML}
SYSTEMS = {"qwen_math": BOX_REQUEST.strip(), "think": THINK_REQUEST}  # their own system turn
CUT = "\ufdd0"  # no character of any text


@dataclass(frozen=True)
class Asking:
    """How rows become problems: the flags of load_problems, and what a tokenizer makes of them."""

    tokenizer: Tokenizer
    template: str = "auto"  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    system: str | None = None  # in place of every system turn, empty: no such turn; None: the row's own
    request: str = BOX_REQUEST  # behind a question that asks for no box, or around its {problem}
    template_args: str = ""  # "name=value ..." of the tokenizer's own template
    columns: str = ""  # "problem=... answer=... expert=..."
    max_prompt_tokens: int = 1024
    max_completion_tokens: int = 8192  # an expert trace longer than this (EOS included) is dropped
    require_expert: bool = False  # rows without a usable expert trace are dropped; else traces are not read
    optional: bool = False  # such rows stay, and have the trace []
    check_traces: bool = True  # else a trace is kept as it is
    need_answers: bool = True  # False: not where traces are not checked
    grader: Grader = VERIFIER  # one's own needs no answers and no boxes
    keep_rows: bool = False  # in the problems, also where the verifier grades
    args: dict[str, object] = field(default_factory=dict)  # of the chat template
    folds: bool = False  # the template has no system turn: its text goes into the first user turn


def choose_asking(tokenizer: Tokenizer, template: str = "auto", **flags: object) -> Asking:
    """What the flags mean for a tokenizer. An unknown or missing template ends the run."""
    known = [*["chat"] * bool(tokenizer.chat_template), *TEMPLATES]
    if template not in ("auto", *known):
        lacks = "" if tokenizer.chat_template else "; this tokenizer has no chat template"
        fail(f"--template {template} is not one of {', '.join(known)}{lacks}")
    asking = Asking(tokenizer, known[0] if template == "auto" else template, **flags)
    args, system = read_args(asking.template_args, tokenizer), asking.system
    if asking.template != "chat" and not (asking.template == "think" and tokenizer.chat_template):
        args = {"chat_template": TEMPLATES[asking.template]}
        system = SYSTEMS.get(asking.template, "") if system is None else system
    asking = replace(asking, system=system, args=args)
    probe = [{"role": "system", "content": "the system turn"}, {"role": "user", "content": "the question"}]
    try:
        return replace(asking, folds="the system turn" not in fill(probe, asking))
    except jinja2.TemplateError:
        return replace(asking, folds=True)


def read_args(text: str, tokenizer: Tokenizer) -> dict[str, object]:
    """Values of the chat template's own variables; `date` is the day that it takes for today."""
    args, words = {"date": "2024-07-26"}, {"true": True, "false": False}
    try:
        for name, equals, value in (pair.partition("=") for pair in shlex.split(text)):
            if not equals or not re.search(rf"\b{name}\b", f"date {tokenizer.chat_template}"):
                fail(f"--template_args: {name!r} has no value, or the chat template has no such variable")
            args[name] = int(value) if value.isdecimal() else words.get(value.lower(), value)
        day, clock = datetime.date.fromisoformat(str(args.pop("date"))), r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
        if tokenizer.chat_template:
            args["chat_template"] = re.sub(clock, lambda m: repr(day.strftime(m[2])), tokenizer.get_chat_template())
        return args
    except ValueError as error:
        fail(f"--template_args {text}: {error}")


def fill(messages: list[dict], asking: Asking) -> str:
    """The text of a prompt. jinja2.TemplateError where the template refuses the turns."""
    options = {"tokenize": False, "add_generation_prompt": True} | asking.args
    text = asking.tokenizer.apply_chat_template(messages, **options)
    if asking.template == "think":  # one open thought, whatever the template ends with
        text = re.sub(r"(<think>\s*(</think>\s*)?)?\Z", "", text, count=1) + "<think>\n"
    return text


def render(problem: str | list[dict], asking: Asking) -> tuple[str, list[int]]:
    """A question's prompt, with its system turn and request for a box: text with CUTs, and ids."""
    said, system = turns(problem), asking.system
    if system is None and asking.template == "think" and all(m["role"] != "system" for m in said):
        system = THINK_REQUEST
    if system is not None:
        said = [{"role": "system", "content": system}] * bool(system) + [m for m in said if m["role"] != "system"]
    users = [i for i, m in enumerate(said) if m["role"] == "user"]
    if users and not any("boxed" in m["content"] for m in said if m["role"] in ("system", "user")):
        request = asking.request if "{problem}" in asking.request else "{problem}" + asking.request
        said[users[-1]] = {"role": "user", "content": request.replace("{problem}", said[users[-1]]["content"])}
    if asking.folds and len(said) > 1 and said[0]["role"] == "system" and said[1]["role"] == "user":
        said[:2] = [{"role": "user", "content": f"{said[0]['content']}\n\n{said[1]['content']}"}]
    text = fill([m | {"content": cut_control(m["content"], asking.tokenizer)} for m in said], asking)
    return text, encode(text, asking.tokenizer)


@functools.lru_cache(8)
def control_tokens(tokenizer: Tokenizer) -> re.Pattern:
    """The texts of special tokens, but those of a pair of tags such as <think> and </think>."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    pairs = texts - {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    tags = {"<think>", "</think>"} | {tag for tag in pairs if {f"</{tag[1:]}", f"<{tag[2:]}"} & pairs}
    return re.compile("|".join(map(re.escape, sorted((texts - tags) | {tokenizer.eos_token}, key=len, reverse=True))))


def cut_control(text: str, tokenizer: Tokenizer) -> str:
    """The text with a CUT in each control token, which is text then."""
    return control_tokens(tokenizer).sub(lambda m: m[0][0] + CUT + m[0][1:], text.replace(CUT, ""))


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt with CUTs, with exactly one BOS where the tokenizer wants one."""
    first, *others = text.split(CUT)
    ids = tokenizer(first, add_special_tokens=False).input_ids
    for part in others:  # behind EOS, since a tokenizer may put a blank before the beginning of a text
        ids += tokenizer(tokenizer.eos_token + part, add_special_tokens=False).input_ids[1:]
    bos = [tokenizer.bos_token_id]  # no text begins with [None]
    return [*bos, *ids] if tokenizer("a").input_ids[:1] == bos != ids[:1] else ids


def with_hint(problem: Problem, hint_ids: list[int], tokenizer: Tokenizer) -> Problem:
    """The problem with the beginning of its trace behind the question, in the user's turn."""
    prompt = problem.prompt or tokenizer.decode(problem.prompt_ids)
    question = cut_control(problem.text.strip(), tokenizer)
    before, found, after = prompt.rpartition(question)
    if not found:
        fail(f"problem {problem.id}: its prompt does not hold the question as it is, so that no hint can follow it")
    text = f"{before}{question}\n\nThe solution begins like this:\n{tokenizer.decode(hint_ids)}\n{after}"
    return replace(problem, prompt=text, prompt_ids=encode(text, tokenizer), hinted=True)


def alike(run: RunConfig, problems: list[Problem]) -> RunConfig:
    """The flags that give test questions the training rows' system turn and words for the box."""
    systems, texts = {p.system for p in problems}, {p.text for p in problems}
    if len(systems) > 1:
        print0(f"the system turns of the training rows differ ({len(systems)}), so test questions keep their own")
    before = re.match(r"(.*boxed.*\s)?", os.path.commonprefix([*texts]), re.DOTALL)[0]
    after = re.search(r"(\s.*boxed.*)?\Z", os.path.commonprefix([text[::-1] for text in texts])[::-1], re.DOTALL)[0]
    request = f"{before}{{problem}}{after}" if len(texts) > 1 and before + after else run.request
    system = systems.pop() if run.system is None and len(systems) == 1 else run.system
    return replace(run, system=system, request=request)


# Traces -------------------------------------------------------------------------------------------
CALCULATOR = re.compile(r"<<[-+*/=().,%$^x\d\s]+>>")  # GSM8K's marks: 48/2 = <<48/2=24>>24


def with_box(solution: str, answer: str | dict, row: dict, thinks: bool) -> str:
    """The trace with its answer in a box: `#### n` becomes the box, else it is one more line.

    After an open <think>, a trace that never closes it is the thought, but for a last line with it.
    """
    if boxed(answer_part(solution, thinks)):
        return solution
    body, _, last = solution.rstrip().rpartition("\n")
    if thinks and "</think>" not in solution and body and boxed(last) and not boxed(body):
        return f"{body}\n</think>\n{last}"  # the thought must not hold the answer: prefixes of it are shown
    final = row.get("answer", "") if isinstance(answer, dict) else answer
    body = solution.split("####")[0].rstrip()
    closing = "\n</think>" if thinks and "</think>" not in solution else ""
    return f"{body}{closing}\n\\boxed{{{final}}}"


def step_ends(steps: list[str], solution: str, offsets: list[tuple[int, int]]) -> tuple[int, ...]:
    """Tokens up to the end of each step of a trace; () where the steps do not follow each other.

    White space after a step belongs to it. What stands after the last one, the answer's box and
    EOS, is one more; EOS alone belongs to the last. A step that ends inside a token ends before it.
    """
    starts, rest = [], solution
    for step in [*filter(str.strip, steps), ""]:
        rest = rest.lstrip()
        if not rest.startswith(step.strip()):
            return ()
        starts.append(len(solution) - len(rest))
        rest = rest[len(step.strip()) :]
    ends = {sum(end <= start for _, end in offsets) for start in starts[1:]} - {0, len(offsets)}
    return (*sorted(ends), len(offsets) + 1) if ends else ()


def episode_ends(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """[..., len(expert_ids)]: tokens up to the end of each step of the data set, else of each line.

    Sentences take the place of fewer than two lines. No piece is white space or EOS alone: it
    belongs to the piece before, at the start to the one after.
    """
    if problem.step_ends:
        return list(problem.step_ends)
    texts = [*(tokenizer.decode([token]) for token in problem.expert_ids[:-1]), ""]
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
AS_FINAL = r"\b(?:answers?|results?|solution|conclu\w+|finally)\b(?:[^.!?]|[.](?=\w)){{0,80}}?{said}"
AS_FINAL += r"|{said} (?:is|must be) the (?:final |right |correct )?(?:answer|result)\b"


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
def load_problems(name: str, tokenizer: Tokenizer, template="auto", split="train", **flags) -> list[Problem]:
    """Read, render and check a data set by the fields of Asking; drops are counted by reason."""
    rows, asking = read_rows(name, split), choose_asking(tokenizer, template, **flags)
    names = dict(pair.split("=", 1) for pair in asking.columns.replace("expert=", "solution=").split())
    if rows and (lacking := [column for column in names.values() if column not in rows[0][1]]):
        fail(f"--columns: {rows[0][0]} has no column {lacking[0]!r}; it has {', '.join(rows[0][1])}")
    graded = not asking.grader.source and (asking.check_traces or asking.need_answers or not asking.require_expert)
    plainly = replace(asking, require_expert=asking.require_expert and not asking.optional)
    needed = ["problem", *["answer"] * graded, *["solution"] * plainly.require_expert]
    fields = []
    for _, row in rows:
        try:
            fields.append(read_fields(row, names))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            fields.append({"unreadable": f"columns of other types than their schema has ({first_line(error)})"})
    answers = [found.get("answer", "0") if graded else "0" for found in fields]  # 0: nothing to read
    golds = once(lambda: golds_parse(answers, right=COMPARED.get(asking.grader.kind)), len(answers))
    if spoken := sum(map(is_words, answers)):
        print0(f"data {name}: {spoken} of {len(rows)} answers are words, and compared as words")
    kept, dropped = {}, defaultdict(list)  # id: (where, problem), and reason: where
    for number, ((where, row), found, readable) in enumerate(zip(rows, fields, golds, strict=True), 1):
        own = str(row.get("id", where.rsplit(":", 1)[-1]))
        if missing := [field for field in needed if field not in found]:
            problem = found.get("unreadable") or f"no {' and no '.join(missing)}"
        elif not readable:
            problem = "answer that the verifier cannot read"
        else:
            found["id"] = own if own not in kept else f"{own}#{number}"
            problem = make_problem(row, found, asking)
            if isinstance(problem, str) and isinstance(plain := make_problem(row, found, plainly), Problem):
                dropped[f"kept without a trace: {problem}"].append(where)
                problem = plain
        if isinstance(problem, str):
            dropped[f"dropped: {problem}"].append(where)
        else:
            kept[problem.id] = where, problem
    if asking.require_expert and asking.check_traces:
        traced = [problem for _, problem in kept.values() if problem.expert_ids]
        texts = [completion_text(problem.expert_ids, tokenizer) for problem in traced]
        grades, _ = once(lambda: grade(traced, texts, progress="checking expert traces"), len(texts))
        for problem, found in zip(traced, grades, strict=True):
            if not problem.grader.solves(found.reward):
                where, fate = kept[problem.id][0], "kept without a trace" if asking.optional else "dropped"
                dropped[f"{fate}: expert trace that the verifier rejects"].append(where)
                kept[problem.id] = where, replace(problem, expert_ids=[], step_ends=())
    problems = [problem for _, problem in kept.values() if problem.expert_ids != [] or asking.optional]
    drops = "; ".join(f"{len(places)} {reason} (first {places[0]})" for reason, places in dropped.items())
    print0(f"data {name}: {len(problems)} of {len(rows)} rows kept, template {asking.template}{drops and f'; {drops}'}")
    first = next((p for p in problems if p.expert_ids or not asking.require_expert), None)
    if not first:
        seen = f"; the columns of {rows[0][0]} are {', '.join(rows[0][1])}" if rows else ""
        fail(f"{name}: no usable row among {len(rows)}{drops and f' ({drops})'}{seen}")
    if asking.grader.source and once(lambda: grade([first], [""])[1]):
        fail(f"--reward {asking.grader.source} fails on problem {first.id} and an empty completion, as said above")
    for note, count in Counter(note for problem in problems for note in problem.notes).items():
        print0(f"data {name}: {note % count}")
    print0(f"first prompt: {tokenizer.decode(first.prompt_ids)!r}")
    if asking.require_expert:
        print0(f"first expert trace ({len(first.expert_ids)} tokens): {tokenizer.decode(first.expert_ids)!r}")
    return problems


def make_problem(row: dict, found: dict, asking: Asking) -> Problem | str:
    """The problem of a row, with its trace if that is needed; or the reason why it is dropped."""
    said = turns(found["problem"])
    if not said or not (said[-1]["content"] or "").strip() or any(m["content"] is None for m in said):
        return "problem with no text or with more than text"
    try:
        prompt, prompt_ids = render(said, asking)
    except jinja2.TemplateError as error:
        return f"turns that the chat template refuses: {first_line(error)}"
    if len(prompt_ids) > asking.max_prompt_tokens:
        return f"prompt over {asking.max_prompt_tokens} tokens"
    thinks, expert_ids, ends, notes = prompt.rstrip().endswith("<think>"), [] if asking.optional else None, (), []
    own = [m["content"] for m in said if m["role"] == "system"]
    if own and asking.system is not None:
        notes.append("--system or --template takes the place of the system turns of %d rows")
    if asking.require_expert:
        checked = asking.check_traces and not asking.grader.source  # one's own reward says what a right trace is
        solution = found.get("solution")
        if not isinstance(solution, str):
            return "expert trace that is more than text" if solution else "no solution"
        if checked and opens(solution) and "</think>" not in solution:
            return "expert trace that never closes its thought"
        if checked and not boxed(solution):
            notes.append("%d expert traces had no \\boxed{}; their answer was added in one")
        control = control_tokens(asking.tokenizer)
        solution = CALCULATOR.sub("", re.sub(rf"(({control.pattern})\s*)+\Z", "", solution))
        if thinks and opens(solution):  # as its prompt does
            solution = solution.lstrip().removeprefix("<think>").removeprefix(prompt[len(prompt.rstrip()) :])
        solution = with_box(solution, found["answer"], row, thinks) if checked else solution
        if inside := control.search(solution):
            return f"expert trace with the control token {inside[0]} inside"
        encoded = asking.tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True)
        expert_ids = [*encoded.input_ids, asking.tokenizer.eos_token_id]
        if len(expert_ids) > asking.max_completion_tokens:
            return f"expert trace over {asking.max_completion_tokens} tokens"
        ends = step_ends(found.get("steps", []), solution, encoded.offset_mapping)
        if "steps" in found and not ends:
            notes.append("the steps of %d rows do not cut their traces; lines are taken there")
    fields = {"thinks": thinks, "step_ends": ends, "prompt": prompt, "grader": asking.grader, "notes": tuple(notes)}
    fields["score"] = found["score"] if isinstance(found.get("score"), (int, float)) else None
    fields["system"] = "\n\n".join(own) if own and asking.system is None else None
    fields["row"] = row if asking.grader.source or asking.keep_rows else {}  # it would only take memory
    return Problem(found["id"], said[-1]["content"], prompt_ids, found.get("answer", ""), expert_ids, **fields)
