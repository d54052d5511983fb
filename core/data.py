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
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import datasets
import jinja2

from core.answers import is_words
from core.config import BOX_REQUEST, RunConfig
from core.model import Tokenizer
from core.processes import fail, first_line, print0
from core.rewards import COMPARED, VERIFIER, Grader, grade
from core.verifier import answer_part, boxed, completion_text, golds_parse, last_box, opens


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
    system: str | None = None  # the row's own system turn, where it is asked with one
    prompt: str = ""  # the text of prompt_ids, with a CUT in each control token that is mere text
    grader: Grader = VERIFIER  # what its completions earn
    row: dict = field(default_factory=dict, compare=False, repr=False)  # as the data has it, for one's own rewards


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
            if not text:
                continue
            if not isinstance(row, dict):
                fail(f"{path}:{i + 1} is not a JSON object")
            rows.append((i + 1, row))
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
    """A chat: the trace is its last turn, where that is the assistant's. `system` is a turn too."""
    *said, last = turns(messages) if is_chat(messages) else [None]
    if last is None:
        return {}
    if isinstance(row.get("system"), str) and all(m["role"] != "system" for m in said):
        said = [*turns(row["system"], "system"), *said]
    spoken = last["role"] == "assistant"
    return {"problem": said, "solution": last["content"] or ""} if spoken else {"problem": [*said, last]}


def completion(row: dict, prompt: object, answer: object) -> dict:
    """TRL: a prompt and its completion, each a text or messages, where no other column has them."""
    named = any(row.get(column) for column in (*FIELDS["problem"][:2], *FIELDS["solution"][:3]))
    said = [turns(prompt), turns(answer, "assistant")]
    return conversation(row, sum(said, [])) if all(said) and not named else {}


def instruction(row: dict, asked: object, output: object) -> dict:
    """Alpaca: the instruction, with its input if it has one, and the output."""
    named = any(row.get(column) for column in FIELDS["problem"])
    text = f"{asked}\n\n{row['input']}" if row.get("input") else asked
    return {} if named else conversation(row, [*turns(text), *turns(output, "assistant")])


def first_message(row: dict, target: object) -> dict:
    """LUFFY: the trace is the first of the target's messages, where no column has it."""
    named = any(row.get(column) is not None for column in FIELDS["solution"])
    return {"solution": turns(target)[0]["content"]} if is_chat(target) and not named else {}


SCHEMAS = [  # columns that tell a schema, and what makes fields of row and columns; the first that makes some
    (("generations",), right_generation),  # OpenR1
    (("deepseek_thinking_trajectory", "deepseek_attempt"), thought),  # s1K-1.1
    (("thinking_trajectories", "attempt"), thought),  # s1K
    (("messages",), conversation),  # OpenAI, TRL
    (("conversations",), conversation),  # ShareGPT
    (("prompt", "completion"), completion),  # TRL
    (("instruction", "output"), instruction),  # Alpaca
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
    places = (found["answer"] or row, row.get("meta")) if "answer" not in names else ()
    for held in places:  # Countdown
        numbers = (held.get("nums") or held.get("numbers")) if isinstance(held, dict) else None
        if numbers and "target" in held:
            found["answer"] = {"target": held["target"], "nums": [*numbers]}
    if is_chat(found["solution"]):
        found["solution"] = turns(found["solution"])[-1]["content"]
    found = plain_answer(found, "solution" in names)
    return {field: value for field, value in found.items() if value not in (None, "", [])}


def try_fields(row: dict, names: dict[str, str]) -> dict[str, object]:
    """read_fields; of a row whose columns have other types than its schema says only the reason."""
    try:
        return read_fields(row, names)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return {"unreadable": f"columns of other types than their schema has ({first_line(error)})"}


def plain_answer(found: dict[str, object], solution_named: bool) -> dict[str, object]:
    """The answer as a string: out of `#### n`, of the solution's box, of a list of its parts."""
    answer, solution = found["answer"], found["solution"]
    if "####" in str(answer):  # GSM8K as its authors ship it
        solution = solution if solution_named else answer
        answer = str(answer).split("####")[-1].strip().replace(",", "")
    answer = None if answer != answer else answer  # JSON's NaN
    if answer is None and isinstance(solution, str):  # MATH
        answer = last_box(solution)
    if isinstance(answer, list):  # OlympiadBench
        answer = ", ".join(map(str, answer))
    answer = answer if answer is None or isinstance(answer, (str, dict)) else str(answer)
    return found | {"answer": answer, "solution": solution}


# Prompts ------------------------------------------------------------------------------------------

THINK_REQUEST = (
    "Reason step by step before you answer. Write the reasoning between <think> and </think>, where you may explore, "
    "verify and correct yourself, and after it the solution, with the final answer within \\boxed{}."
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant{{ '\n' }}"
)
TEMPLATES = {  # chat is the tokenizer's own; think is chat, else this, and ends with an open <think>
    "plain": "{% for m in messages %}{{ m.content }}{{ '\n' }}{% endfor %}",
    "qwen_math": CHATML,
    "think": CHATML,
}
SYSTEMS = {"qwen_math": BOX_REQUEST.strip(), "think": THINK_REQUEST}  # their own system turn
CUT = "\ufdd0"  # no character of any text


@dataclass(frozen=True)
class Asking:
    """How a question becomes a prompt."""

    tokenizer: Tokenizer
    template: str  # not auto
    system: str | None  # in place of every system turn, empty: no such turn; None: the row's own
    request: str  # for a box, where no turn asks for one
    args: dict[str, object]  # of the chat template
    folds: bool = False  # the template has no system turn: its text goes into the first user turn


def choose_template(template: str, tokenizer: Tokenizer) -> str:
    """What auto means for a tokenizer. An unknown or missing template ends the run."""
    if template == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if template != "chat" and template not in TEMPLATES:
        fail(f"--template {template} is not one of chat, {', '.join(TEMPLATES)}")
    if template == "chat" and not tokenizer.chat_template:
        fail("--template chat: this tokenizer has no chat template")
    return template


def choose_asking(tokenizer: Tokenizer, template: str, system: str | None, request: str, args: str) -> Asking:
    """What the flags mean for a tokenizer."""
    template, options = choose_template(template, tokenizer), read_args(args, tokenizer)
    if template != "chat" and not (template == "think" and tokenizer.chat_template):
        options = {"chat_template": TEMPLATES[template]}
        system = SYSTEMS.get(template, "") if system is None else system
    asking = Asking(tokenizer, template, system, request, options)
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
        return args | {"strftime_now": datetime.date.fromisoformat(str(args.pop("date"))).strftime}
    except ValueError as error:
        fail(f"--template_args {text}: {error}")


def fill(messages: list[dict], asking: Asking) -> str:
    """The text of a prompt. jinja2.TemplateError where the template refuses the turns."""
    options = {"tokenize": False, "add_generation_prompt": True} | asking.args
    text = asking.tokenizer.apply_chat_template(messages, **options)
    if asking.template == "think":  # one open thought, whatever the template ends with
        text = re.sub(r"(<think>\s*(</think>\s*)?)?\Z", "", text, count=1) + "<think>\n"
    return text


def ask(problem: str | list[dict], asking: Asking) -> list[dict]:
    """The turns of a question: its system turn, and the request where no turn asks for a box."""
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
    return said


def render(problem: str | list[dict], asking: Asking) -> tuple[str, list[int]]:
    """A question's prompt as text with CUTs, and as ids."""
    said = [m | {"content": cut_control(m["content"], asking.tokenizer)} for m in ask(problem, asking)]
    text = fill(said, asking)
    return text, encode(text, asking.tokenizer)


@functools.lru_cache(8)
def control_tokens(tokenizer: Tokenizer) -> re.Pattern:
    """The texts of special tokens, but those of a pair of tags such as <think> and </think>."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    tags = {"<think>", "</think>"} | {
        t for tag in texts - named if {tag, f"</{tag[1:]}"} <= texts for t in (tag, f"</{tag[1:]}")
    }
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
    default = tokenizer("a").input_ids
    if tokenizer.bos_token_id is not None and default[:1] == [tokenizer.bos_token_id] and ids[:1] != default[:1]:
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def with_hint(problem: Problem, hint_ids: list[int], tokenizer: Tokenizer) -> Problem:
    """The problem with the beginning of its trace behind the question, in the user's turn."""
    prompt = problem.prompt or tokenizer.decode(problem.prompt_ids)
    question = cut_control(problem.text.strip(), tokenizer)
    if question not in prompt:
        fail(f"problem {problem.id}: its prompt does not hold the question as it is, so that no hint can follow it")
    before, question, after = prompt.rpartition(question)
    text = f"{before}{question}\n\nThe solution begins like this:\n{tokenizer.decode(hint_ids)}\n{after}"
    return replace(problem, prompt=text, prompt_ids=encode(text, tokenizer), hinted=True)


def alike(run: RunConfig, problems: list[Problem]) -> RunConfig:
    """The flags by which test questions are asked in the training rows' words: the system turn
    that all of these share, and what all questions begin or end with to ask for the box.
    """
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


def bare_trace(solution: str, tokenizer: Tokenizer, thinks: bool) -> str:
    """A trace without control tokens at its end, GSM8K's marks of a calculator, and the <think> of
    a prompt that opens it.
    """
    while (found := list(control_tokens(tokenizer).finditer(solution))) and not solution[found[-1].end() :].strip():
        solution = solution[: found[-1].start()]
    solution = CALCULATOR.sub("", solution)
    return re.sub(r"\s*<think>\n*", "", solution, count=1) if thinks and opens(solution) else solution


def with_box(solution: str, answer: str | dict, row: dict, thinks: bool) -> str:
    """The expert trace with its answer in a box: `#### n` becomes the box, a trace without one gets
    it as its last line.

    After an open <think>, a trace that never closes it is the thought, but for a last line with the
    box.
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
    system: str | None = None,  # in place of every system turn, empty: no such turn; None: the data's own
    request: str = BOX_REQUEST,  # behind a question that asks for no box, or around its {problem}
    template_args: str = "",  # "name=value ..." of the tokenizer's own template
    check_traces: bool = True,  # else a trace is kept as it is
    need_answers: bool = True,  # False: not where traces are not checked
    grader: Grader = VERIFIER,  # one's own needs no answers and no boxes
) -> list[Problem]:
    """Read, render and check a data set. A row is kept, or counted with the reason it is not."""
    rows, asking = read_rows(name, split), choose_asking(tokenizer, template, system, request, template_args)
    graded = not grader.source and (check_traces or need_answers or not require_expert)
    needed = ("problem", *["answer"] * graded, *["solution"] * require_expert)
    names = dict(pair.split("=", 1) for pair in columns.replace("expert=", "solution=").split())
    for column in names.values():
        if rows and column not in rows[0][1]:
            fail(f"--columns: {rows[0][0]} has no column {column!r}; it has {', '.join(rows[0][1])}")
    fields = [try_fields(row, names) for _, row in rows]
    answers = [found["answer"] for found in fields if "answer" in found and "answer" in needed]
    readable = iter(golds_parse(answers, right=COMPARED.get(grader.kind)))
    if spoken := sum(map(is_words, answers)):
        print0(f"data {name}: {spoken} of {len(rows)} answers are words, and compared as words")
    kept, dropped, seen = [], defaultdict(list), set()
    for number, ((where, row), found) in enumerate(zip(rows, fields, strict=True), 1):
        answer_ok = "answer" not in needed or ("answer" in found and next(readable))
        boxes = check_traces and not grader.source  # one's own reward says what a right trace looks like
        problem = make_problem(row, found, answer_ok, asking, max_prompt_tokens, needed, boxes)
        if isinstance(problem, Problem) and len(problem.expert_ids or ()) > max_completion_tokens:
            problem = f"expert trace over {max_completion_tokens} tokens"
        if isinstance(problem, str):
            dropped[problem].append(where)
            continue
        name_of_row = str(row.get("id", where.rsplit(":", 1)[-1]))
        problem = replace(problem, id=name_of_row if name_of_row not in seen else f"{name_of_row}#{number}")
        problem = replace(problem, grader=grader, row=row if grader.source else {})  # it would only take memory
        seen.add(problem.id)
        kept.append((where, row, found, problem))
    kept = right_traces(kept, tokenizer, dropped) if require_expert and check_traces else kept
    drops = "; ".join(f"{len(places)} dropped: {reason} (first {places[0]})" for reason, places in dropped.items())
    print0(f"data {name}: {len(kept)} of {len(rows)} rows kept, template {asking.template}{drops and f'; {drops}'}")
    if not kept:
        seen = f"; the columns of {rows[0][0]} are {', '.join(rows[0][1])}" if rows else ""
        fail(f"{name}: no usable row among {len(rows)}{drops and f' ({drops})'}{seen}")
    if grader.source and grade([kept[0][-1]], [""])[1]:
        fail(f"--reward {grader.source} fails on problem {kept[0][-1].id} and an empty completion, as said above")
    print0(f"first prompt: {tokenizer.decode(kept[0][-1].prompt_ids)!r}")
    replaced = sum(any(m["role"] == "system" for m in turns(found["problem"])) for _, _, found, _ in kept)
    if replaced and asking.system is not None:
        print0(f"data {name}: --system or --template takes the place of the system turns of {replaced} rows")
    if require_expert:
        describe_traces(name, kept, tokenizer, check_traces and not grader.source)
    return [problem for *_, problem in kept]


def make_problem(
    row: dict, found: dict, answer_ok: bool, asking: Asking, longest: int, needed: tuple[str, ...], checked: bool
) -> Problem | str:
    """The problem of a row, with its trace if that is needed; or the reason why it is dropped."""
    if "unreadable" in found:
        return found["unreadable"]
    if missing := [field for field in needed if field not in found]:
        return f"no {' and no '.join(missing)}"
    if not answer_ok:
        return "answer that the verifier cannot read"
    said, tokenizer, solution = turns(found["problem"]), asking.tokenizer, found.get("solution")
    if not said or not (said[-1]["content"] or "").strip() or any(m["content"] is None for m in said):
        return "problem with no text or with more than text"
    try:
        prompt, prompt_ids = render(said, asking)
    except jinja2.TemplateError as error:
        return f"turns that the chat template refuses: {first_line(error)}"
    if len(prompt_ids) > longest:
        return f"prompt over {longest} tokens"
    thinks, expert_ids, ends = prompt.rstrip().endswith("<think>"), None, ()
    if "solution" in needed:
        if not isinstance(solution, str):
            return "expert trace that is more than text"
        if checked and opens(solution) and "</think>" not in solution:
            return "expert trace that never closes its thought"
        solution = bare_trace(solution, tokenizer, thinks)
        solution = with_box(solution, found["answer"], row, thinks) if checked else solution
        if control := control_tokens(tokenizer).search(solution):
            return f"expert trace with the control token {control[0]} inside"
        encoded = tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True)
        expert_ids = [*encoded.input_ids, tokenizer.eos_token_id]
        ends = step_ends(steps_of(row), solution, encoded.offset_mapping)
    own = [m["content"] for m in said if m["role"] == "system" and asking.system is None]
    fields = {"thinks": thinks, "step_ends": ends, "prompt": prompt, "system": "\n\n".join(own) if own else None}
    fields["score"] = found["score"] if isinstance(found.get("score"), (int, float)) else None
    return Problem("", said[-1]["content"], prompt_ids, found.get("answer", ""), expert_ids, **fields)


def right_traces(kept: list[tuple], tokenizer: Tokenizer, dropped: dict[str, list[str]]) -> list[tuple]:
    """Those entries whose expert trace solves its problem."""
    problems = [problem for *_, problem in kept]
    texts = [completion_text(p.expert_ids, tokenizer) for p in problems]
    grades, _ = grade(problems, texts, progress="checking expert traces")
    right = [found.reward >= p.grader.solved for p, found in zip(problems, grades, strict=True)]
    for (where, *_), solved in zip(kept, right, strict=True):
        if not solved:
            dropped["expert trace that the verifier rejects"].append(where)
    return [entry for entry, solved in zip(kept, right, strict=True) if solved]


def describe_traces(name: str, kept: list[tuple], tokenizer: Tokenizer, checked: bool) -> None:
    """Print what was done to traces, and the first one as the model sees it."""
    boxes_added = sum(not boxed(found["solution"]) for _, _, found, _ in kept)
    steps_unused = sum(bool(steps_of(row)) and not problem.step_ends for _, row, _, problem in kept)
    if boxes_added and checked:
        print0(f"data {name}: {boxes_added} expert traces had no \\boxed{{}}; their answer was added in one")
    if steps_unused:
        print0(f"data {name}: the steps of {steps_unused} rows do not cut their traces; lines are taken there")
    ids = kept[0][-1].expert_ids
    print0(f"first expert trace ({len(ids)} tokens): {tokenizer.decode(ids)!r}")
