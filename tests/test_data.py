"""What a user brings: the recognised schemas, real rows, and bad input, a sentence or a count."""

import gzip
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
from conftest import byte_tokenizer, run_script
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

import common
import uft
from core import data
from core.verifier import verify

DATA = Path(__file__).parent / "data"
GOOD = {"problem": "1+1?", "answer": "2", "solution": "1+1\n\\boxed{2}"}
LIMITS = {"max_prompt_tokens": 100, "max_completion_tokens": 200, "request": ""}  # but for the tests of asking


def load(tmp_path, rows, tokenizer, **options):
    """The problems of these rows, read from a file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return common.load_problems(str(path), tokenizer, **(LIMITS | {"require_expert": True} | options))


def sample(name, tokenizer):
    """The real rows of tests/data."""
    path = str(DATA / f"{name}_sample.jsonl")
    return common.load_problems(path, tokenizer, max_prompt_tokens=2000, require_expert=True)


def asking(tokenizer, template="auto", system=None, request="", args=""):
    """How a question is asked by these flags."""
    return data.choose_asking(tokenizer, template, system=system, request=request, template_args=args)


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"question": "1+1?", "final_answer": "2", "response": "1+1\n\\boxed{2}"},
        {"prompt": "1+1?", "answer": 2, "expert": "1+1\n\\boxed{2}"},
        {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
        {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "1+1\n\\boxed{2}"}]},
        {
            "prompt": [{"role": "system", "content": "think"}, {"role": "user", "content": "1+1?"}],
            "target": [{"role": "assistant", "content": "1+1\n\\boxed{2}"}],
            "reward_model": {"ground_truth": "2", "style": "rule"},
        },
    ],
)
def test_recognised_columns(row, tmp_path, tokenizer):
    """Question, answer and trace under the names that data sets use for them."""
    (problem,) = load(tmp_path, [row], tokenizer)
    assert problem.text == "1+1?" and problem.answer == "2"
    assert tokenizer.decode(problem.prompt_ids) == "1+1?\n"
    text = tokenizer.decode(problem.expert_ids)
    assert text.endswith("\\boxed{2}<eos>") and "1+1" in text


THOUGHT = "<think>\n1+1 is \\boxed{3}? No.\n</think>\n\n1+1\n\\boxed{2}"
S1K = {"question": "1+1?", "cot_type": "math", "metadata": "{}"}
SCHEMAS = {
    "OpenR1": {
        "problem": "1+1?",
        "solution": "A human's.",
        "answer": "2",
        "generations": ["<think>\nno\n</think>\n\\boxed{3}", THOUGHT],
        "correctness_math_verify": [False, True],
        "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "another"}],
    },
    "s1K-1.1": S1K
    | {
        "solution": "2",
        "deepseek_thinking_trajectory": "1+1 is \\boxed{3}? No.",
        "deepseek_attempt": "1+1\n\\boxed{2}",
        "gemini_attempt": "x",
    },
    "s1K": S1K
    | {
        "solution": "$\\boxed{2}$",
        "thinking_trajectories": ["1+1 is \\boxed{3}?", " No."],
        "attempt": "1+1\n\\boxed{2}",
    },
    "LUFFY": {
        "data_source": "math",
        "prompt": [{"role": "system", "content": "Your task"}, {"role": "user", "content": "1+1?"}],
        "target": [{"role": "assistant", "content": THOUGHT}],
        "ability": "math",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": 7, "split": "train"},
    },
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant{{ '\n' }}"
)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_thinking_schemas(schema, tmp_path, tokenizer):
    """The prompt opens the tag, and the trace does not repeat it.

    Only what follows </think> is graded: box 3 is in the thought.
    """
    row = SCHEMAS[schema]
    (problem,) = load(tmp_path, [row], tokenizer, template="think", max_prompt_tokens=900)
    prompt, trace = tokenizer.decode(problem.prompt_ids), tokenizer.decode(problem.expert_ids)
    assert prompt.endswith("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert "</think>" in prompt.split("user")[0]
    assert trace == "1+1 is \\boxed{3}? No.\n</think>\n\n1+1\n\\boxed{2}<eos>"
    assert problem.thinks and problem.answer == "2" and problem.text == "1+1?"
    (problem,) = load(tmp_path, [row], tokenizer, template="plain")  # the trace opens the thought itself
    assert not problem.thinks and tokenizer.decode(problem.expert_ids) == THOUGHT + "<eos>"


def test_parquet_of_nested_columns(tmp_path, tokenizer):
    """Lists and messages survive a Parquet file, where they are no Python lists."""
    for schema in ("OpenR1", "LUFFY"):
        Dataset.from_list([SCHEMAS[schema]] * 3).to_parquet(str(tmp_path / "rows.parquet"))
        options = LIMITS | {"max_prompt_tokens": 900, "require_expert": True, "template": "think"}
        assert len(common.load_problems(str(tmp_path / "rows.parquet"), tokenizer, **options)) == 3


def test_no_right_generation_is_a_counted_drop(tmp_path, tokenizer, capsys):
    """The human's solution does not take the place of a right generation."""
    row = SCHEMAS["OpenR1"] | {"correctness_math_verify": [False, False]}
    assert len(load(tmp_path, [SCHEMAS["OpenR1"], row], tokenizer, template="think", max_prompt_tokens=900)) == 1
    assert "1 dropped: no solution" in capsys.readouterr().out


def test_a_hub_name_with_a_dot(tokenizer, monkeypatch):
    """A name whose last part looks like a suffix is asked of the hub."""
    monkeypatch.setattr(data.datasets, "load_dataset", lambda name, part=None: {"train": [SCHEMAS["s1K-1.1"]]})
    (problem,) = common.load_problems("simplescaling/s1K-1.1", tokenizer, template="think", require_expert=True)
    assert problem.answer == "2"


def test_score(tmp_path, tokenizer):
    """The number in the column `score`, or in one that --columns names; None where it is none."""
    scores = [0, 0.5, 3, -1, math.inf, None, "0.5", [1]]
    rows = [GOOD | {"score": score, "rating": 2 * i} for i, score in enumerate(scores)] + [GOOD]
    assert [p.score for p in load(tmp_path, rows, tokenizer)] == [0, 0.5, 3, -1, math.inf, None, None, None, None]
    assert [p.score for p in load(tmp_path, rows, tokenizer, columns="score=rating")][:3] == [0, 2, 4]
    path = tmp_path / "rows.parquet"
    Dataset.from_list([GOOD | {"score": score} for score in (0.5, None)]).to_parquet(str(path))
    assert [p.score for p in common.load_problems(str(path), tokenizer, **LIMITS)] == [0.5, None]


def test_math_style(tmp_path, tokenizer):
    """MATH has no column for the answer: it is in the solution's box."""
    row = {"problem": "1+1?", "level": "Level 3", "type": "Algebra", "solution": "So $1+1=\\boxed{2}$."}
    (problem,) = load(tmp_path, [row], tokenizer)
    assert problem.answer == "2" and tokenizer.decode(problem.expert_ids) == row["solution"] + "<eos>"


def test_think_template_of_a_chat_model(tmp_path, tokenizer, monkeypatch):
    """The tokenizer's template, the row's own system message if it has one, the tag opened once."""
    prompts = []
    for template in (CHAT, CHAT + "<think>{{ '\n' }}"):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        for row in (SCHEMAS["LUFFY"], GOOD):
            (problem,) = load(tmp_path, [row], tokenizer, template="think", max_prompt_tokens=900)
            prompts.append(tokenizer.decode(problem.prompt_ids))
            assert (
                problem.thinks and prompts[-1].count("<think>\n") == 1 and prompts[-1].endswith("assistant\n<think>\n")
            )
    assert prompts[:2] == prompts[2:]
    assert "system\nYour task<|im_end|>" in prompts[0] and "between <think> and </think>" in prompts[1]
    (problem,) = load(tmp_path, [GOOD], tokenizer, template="chat", max_prompt_tokens=900)
    assert problem.thinks, "a chat template that opens the tag is gated as well"


def test_a_plain_trace_becomes_the_thought(tmp_path, tokenizer, capsys):
    """A trace without the tag is the thought, and its answer is added after it."""
    row = {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
    (problem,) = load(tmp_path, [row], tokenizer, template="think", max_prompt_tokens=900)
    assert tokenizer.decode(problem.expert_ids) == "1+1=2\n</think>\n\\boxed{2}<eos>"
    assert "1 expert traces had no \\boxed{}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("a\n</think>\n\\boxed{2}", 1.0),
        ("\\boxed{2}", 0.0),
        ("\\boxed{2}</think>", 0.0),
        ("\\boxed{3}</think>\\boxed{2}", 1.0),
        ("x</think>\\boxed{3}</think>\\boxed{2}", 0.0),
        ("x</think></think>\\boxed{2}", 0.0),
    ],
)
def test_the_gate(text, reward):
    """Only what stands between the first closing tag and the next counts.

    A template without the tag has no gate.
    """
    thinking, plain = (common.Problem("a", "", [], "2", None, thinks) for thinks in (True, False))
    group = [common.Rollout(thinking, [1], text=text), common.Rollout(plain, [1], text="\\boxed{2}")]
    common.score([group])
    assert [r.reward for r in group] == [reward, 1.0]


def test_steps_of_the_data_are_episodes_and_chunks(tokenizer, tmp_path, capsys):
    """All of Countdown's own steps can be shown, as in the official hints; the box cannot."""
    problem = sample("countdown", tokenizer)[0]
    ends, cut_short = common.shown_ends(problem, tokenizer)
    shown = [tokenizer.decode(problem.expert_ids[:end]) for end in ends]
    last = "19 + 35 = 54\n44 + 54 = 98\nTherefore, the final equation is 44 + (19 + 35)\n"
    assert shown == ["19 + 35 = 54\n", "19 + 35 = 54\n44 + 54 = 98\n", last] and not cut_short
    assert uft.hint_cuts([*ends, len(problem.expert_ids)], "chunk", 5) == [0, *ends]
    lines = GOOD | {"solution": "ab cd\nef \\boxed{2}"}
    for steps, wanted in (
        (["ab ", "cd\n", "ef"], ["ab ", "ab cd\n", "ab cd\nef "]),
        (["ab", "cd", "ef \\boxed{2}"], ["ab ", "ab cd\n"]),
        (["ab", "cd"], ["ab ", "ab cd\n"]),
        (["ab cd"], ["ab cd\n"]),
    ):
        (problem,) = load(tmp_path, [lines | {"steps": steps}], tokenizer)
        assert [tokenizer.decode(problem.expert_ids[:end]) for end in problem.step_ends[:-1]] == wanted
        assert problem.step_ends[-1] == len(problem.expert_ids)
    capsys.readouterr()
    for steps, said in (
        (["ab ", "other"], True),
        (["ab ", "ef"], True),
        (["ab cd\nef \\boxed{2}"], True),
        ("ab ", False),
        (None, False),
    ):
        (problem,) = load(tmp_path, [lines | {"steps": steps}], tokenizer)
        assert problem.step_ends == () and ("the steps of 1 rows do not cut" in capsys.readouterr().out) == said


def test_a_step_that_ends_inside_a_token_ends_before_it():
    """Tokens as those of real models, which take the blank before a word along."""
    assert data.step_ends(["ab", "cd"], "ab cd", [(0, 2), (2, 5)]) == (1, 3)
    assert data.step_ends(["ab", "cd"], "ab cd ef", [(0, 2), (2, 5), (5, 8)]) == (1, 2, 4)
    assert data.step_ends(["ab", "cd"], "ab\ncd", [(0, 3), (3, 6)]) == (1, 3)
    assert data.step_ends(["ab", "cd"], "ab cd", [(0, 5)]) == ()


def test_a_box_in_the_last_line_stays_out_of_the_thought(tmp_path, tokenizer):
    """The line with the answer comes after the closing tag."""
    row = GOOD | {"solution": "First.\nSo it is \\boxed{2}."}
    (problem,) = load(tmp_path, [row], tokenizer, template="think", max_prompt_tokens=900)
    assert tokenizer.decode(problem.expert_ids) == "First.\n</think>\nSo it is \\boxed{2}.<eos>"


def test_named_columns(tmp_path, tokenizer):
    """--columns names what is not recognised; expert is another word for solution."""
    row = {"q": "1+1?", "a": "2", "e": "\\boxed{2}"}
    (problem,) = load(tmp_path, [row], tokenizer, columns="problem=q answer=a expert=e")
    assert problem.text == "1+1?" and problem.answer == "2"


@pytest.mark.parametrize(
    "others",
    [
        {"target": 2},
        {"target": 2, "nums": [1, 1]},
        {"target": 2, "reward_model": {"ground_truth": "3"}},
        {"target": [], "reward_model": {"ground_truth": "3"}},
        {"target": [{"role": "assistant", "content": "\\boxed{3}"}]},
    ],
)
def test_a_plain_row_keeps_its_own_fields(others, tmp_path, tokenizer):
    """Columns of another schema beside problem, answer and solution take none of them away."""
    (problem,) = load(tmp_path, [GOOD | others], tokenizer)
    assert (problem.text, problem.answer) == ("1+1?", "2")
    assert tokenizer.decode(problem.expert_ids) == GOOD["solution"] + "<eos>"


@pytest.mark.parametrize("schema", SCHEMAS)
def test_named_columns_win_over_a_schema(schema, tmp_path, tokenizer):
    """One field from the user's column, the others still from the recognised schema."""
    row = SCHEMAS[schema] | {"mine": "</think>My own \\boxed{2}"}
    options = {"template": "think", "max_prompt_tokens": 900}
    (problem,) = load(tmp_path, [row], tokenizer, columns="expert=mine", **options)
    assert tokenizer.decode(problem.expert_ids) == row["mine"] + "<eos>"
    assert problem.answer == "2" and problem.text == "1+1?"
    (problem,) = load(tmp_path, [row | {"other": "2+0?"}], tokenizer, columns="problem=other", **options)
    assert problem.text == "2+0?" and problem.answer == "2"
    assert tokenizer.decode(problem.expert_ids).startswith("1+1 is")
    with pytest.raises(SystemExit, match="1 dropped: expert trace that the verifier rejects"):
        load(tmp_path, [row | {"gold": "3"}], tokenizer, columns="answer=gold", **options)


def test_named_columns_win_over_gsm8k_and_countdown(tmp_path, tokenizer):
    """The user's trace beside `#### n`, the user's answer beside Countdown's numbers."""
    row = {"question": "1+1?", "answer": "1+1=2\n#### 2", "mine": "Two: \\boxed{2}"}
    (problem,) = load(tmp_path, [row], tokenizer, columns="expert=mine")
    assert problem.answer == "2" and tokenizer.decode(problem.expert_ids) == row["mine"] + "<eos>"
    row = {"question": "1+1?", "gold": "2", "meta": {"target": 5, "nums": [2, 3]}, "solution": "\\boxed{2}"}
    (problem,) = load(tmp_path, [row], tokenizer, columns="answer=gold")
    assert problem.answer == "2"


@pytest.mark.parametrize(
    "odd",
    [
        {"messages": '[{"role": "user"}]'},
        {"messages": ["1+1?", "2"]},
        {"messages": None},
        {"messages": []},
        {"generations": 16},
        {"generations": None},
        {"target": ["2"]},
        {"target": 98, "nums": [1]},
        {"target": [{"role": "assistant", "content": "another \\boxed{3}"}], "reward_model": {"ground_truth": "3"}},
    ],
)
@pytest.mark.parametrize("columns", ["", "problem=problem answer=answer"])
def test_a_column_of_a_schema_that_does_not_fit(odd, columns, tmp_path, tokenizer):
    """Columns with a schema's name but not its shape leave the plain ones as they are."""
    (problem,) = load(tmp_path, [GOOD | odd], tokenizer, columns=columns)
    assert problem.text == "1+1?" and tokenizer.decode(problem.expert_ids) == GOOD["solution"] + "<eos>"


def test_a_target_needs_no_reward_model(tmp_path, tokenizer):
    """LUFFY's trace where the answer stands in a column of its own."""
    row = {"prompt": "1+1?", "answer": "2", "target": [{"role": "assistant", "content": "so \\boxed{2}"}]}
    (problem,) = load(tmp_path, [row], tokenizer)
    assert tokenizer.decode(problem.expert_ids) == "so \\boxed{2}<eos>"


@pytest.mark.parametrize(
    ("schema", "changes"),
    [("OpenR1", {"generations": []}), ("s1K", {"attempt": None}), ("s1K-1.1", {"deepseek_attempt": ""})],
)
def test_a_schema_without_its_trace_is_a_counted_drop(schema, changes, tmp_path, tokenizer, capsys):
    """A human's solution or a chat never takes the place of the trace that the schema promises."""
    rows = [SCHEMAS[schema], SCHEMAS[schema] | changes]
    assert len(load(tmp_path, rows, tokenizer, template="think", max_prompt_tokens=900)) == 1
    assert "1 dropped: no solution" in capsys.readouterr().out


def test_parquet_and_gzip(tmp_path, tokenizer):
    """Both kinds of file hold the same row."""
    Dataset.from_list([GOOD]).to_parquet(str(tmp_path / "rows.parquet"))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(json.dumps(GOOD) + "\n")
    found = [
        common.load_problems(str(tmp_path / f"rows.{kind}"), tokenizer, **LIMITS) for kind in ("parquet", "jsonl.gz")
    ]
    assert found[0][0].text == found[1][0].text == "1+1?"


def test_gsm8k_rows(tokenizer, capsys):
    """`#### n` is the answer, and becomes the box of the trace."""
    problems = sample("gsm8k", tokenizer)
    assert len(problems) == 24 and "24 expert traces had no \\boxed{}" in capsys.readouterr().out
    assert problems[0].answer == "72"
    assert tokenizer.decode(problems[0].expert_ids).endswith("in April and May.\n\\boxed{72}<eos>")
    assert problems[0].expert_ids[-1] == tokenizer.eos_token_id


def test_countdown_rows(tokenizer):
    """The answer is a target and numbers; the verifier and the episodes read the traces."""
    problems = sample("countdown", tokenizer)
    assert len(problems) == 24 and problems[0].answer == {"target": 98, "nums": [44, 19, 35]}
    text = tokenizer.decode(problems[0].expert_ids)
    assert text.endswith("\\boxed{44 + (19 + 35)}<eos>")
    wrong = text.replace("98", "99").replace("35)}", "36)}")
    assert verify([text, wrong], [problems[0].answer] * 2)[0] == [1.0, 0.0]
    assert all(
        "boxed" not in tokenizer.decode(p.expert_ids[: common.shown_ends(p, tokenizer)[0][-1]]) for p in problems
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"problem": "1+1?", "solution": "two"}, "no answer"),
        ({"answer": "2", "solution": "\\boxed{2}"}, "no problem"),
        ({"problem": "1+1?", "answer": "2"}, "no solution"),
        (GOOD | {"problem": "x" * 300}, "prompt over 100 tokens"),
        (GOOD | {"solution": "x" * 300 + "\\boxed{2}"}, "expert trace over 200 tokens"),
        (GOOD | {"solution": "\\boxed{3}"}, "expert trace that the verifier rejects"),
        (GOOD | {"answer": "$ $", "solution": "\\boxed{3}"}, "answer that the verifier cannot read"),
    ],
)
def test_a_bad_row_is_one_counted_drop(row, reason, tmp_path, tokenizer, capsys):
    """Each reason is printed with its count and its first place."""
    problems = load(tmp_path, [GOOD, row, GOOD], tokenizer)
    out = capsys.readouterr().out
    assert len(problems) == 2 and "2 of 3 rows kept" in out
    assert f"1 dropped: {reason} (first {tmp_path / 'rows.jsonl'}:2)" in out


def test_repeated_ids_stay_apart(tmp_path, tokenizer):
    """Rows with the same id get ids of their own."""
    assert len({p.id for p in load(tmp_path, [GOOD | {"id": "a"}] * 3, tokenizer)}) == 3


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([], {}, "no usable row among 0"),
        ([{"x": 1}], {}, "1 dropped: no problem and no answer and no solution"),
        ([GOOD], {"columns": "problem=nope"}, "has no column 'nope'; it has problem, answer, solution"),
        ([GOOD], {"template": "fancy"}, "--template fancy is not one of"),
        ([GOOD], {"template": "chat"}, "no chat template"),
        ([GOOD], {"max_prompt_tokens": 2}, "no usable row among 1"),
    ],
)
def test_unusable_data_is_one_sentence(rows, options, sentence, tmp_path, tokenizer):
    """Data without a usable row, and options that do not fit it."""
    with pytest.raises(SystemExit, match="error: ") as error:
        load(tmp_path, rows, tokenizer, **options)
    assert sentence in str(error.value)


def test_broken_json_names_file_and_line(tmp_path, tokenizer):
    """A line that is no JSON is named by its number."""
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{broken\n")
    with pytest.raises(SystemExit, match=r"broken.jsonl:2 is not a JSON object"):
        common.load_problems(str(path), tokenizer)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"problem": "\xff\xfe", "answer": "2"}', "rows.jsonl:3 is not a JSON object in UTF-8"),
        (b"[1]", "rows.jsonl:3 is not a JSON object"),
        (b"", None),
        (b"   ", None),
        (b'\xef\xbb\xbf{"problem": "1+1", "answer": "2", "solution": "\\\\boxed{2}", "id": "marked"}', None),
    ],
)
def test_lines_of_a_file(line, said, tmp_path, tokenizer):
    """Blank lines and a byte-order mark are read; other bytes are a sentence with their place."""
    path = tmp_path / "rows.jsonl"
    rows = [GOOD | {"id": None}, GOOD | {"answer": ""}]
    good = [json.dumps({k: v for k, v in row.items() if v is not None}).encode() for row in rows]
    path.write_bytes(b"\n".join([*good, line, good[0], b""]))
    if said:
        with pytest.raises(SystemExit, match=said):
            common.load_problems(str(path), tokenizer)
        return
    ids = [problem.id for problem in common.load_problems(str(path), tokenizer)]
    assert ids == (["1", "marked", "4"] if b"marked" in line else ["1", "4"])


@pytest.mark.parametrize(
    "row",
    [
        *({"problem": value, "answer": "2"} for value in (5, ["a"], {"a": 1}, "  ", "")),
        *({"messages": value, "answer": "2"} for value in (5, "x", [], [1], [{"content": "a"}])),
        {"messages": [{"role": "user", "content": 5}], "answer": "2"},
        {"messages": [{"role": "assistant", "content": "a"}], "answer": "2"},
        {"conversations": [{"from": 1, "value": 2}], "answer": "2"},
        {"prompt": 5, "completion": 6, "answer": "2"},
        {"instruction": 5, "output": 6, "answer": "2"},
        {"problem": "a", "answer": "2", "generations": ["x"], "correctness_math_verify": 5},
        {"question": "a", "solution": 5, "thinking_trajectories": [1], "attempt": "x"},
        *({"problem": "a", "answer": value} for value in ({"x": 1}, math.nan, [], {"target": 1})),
        {"problem": "a", "meta": {"target": "x", "nums": [1]}},
        {"problem": "a", "meta": {"target": 5, "nums": "23"}},
        {"problem": "a", "meta": {"target": 5, "nums": [2, "3"]}},
        {"problem": "a", "reward_model": {"ground_truth": {"target": 1.5, "numbers": [1, 2]}}},
    ],
)
@pytest.mark.parametrize("expert", [False, True])
def test_rows_of_other_types_are_counted_drops(row, expert, tmp_path, tokenizer, capsys):
    """Never a traceback, never a problem that no completion solves."""
    found = load(tmp_path, [GOOD, row], tokenizer, require_expert=expert)
    said = capsys.readouterr().out
    assert len(found) == 1 and re.search(r"1 of 2 rows kept.*; 1 dropped: .* \(first .*:2\)", said), said


@pytest.mark.parametrize(
    "held",
    [
        {"meta": {"target": 98, "nums": [44, 19, 35]}},
        {"reward_model": {"ground_truth": {"target": 98, "numbers": [44, 19, 35]}}},
        {"target": 98, "nums": [44, 19, 35]},
    ],
)
def test_where_countdown_rows_hold_their_numbers(held, tmp_path, tokenizer):
    """As UFT, TinyZero and its hub data set hold them."""
    (problem,) = load(tmp_path, [{"problem": "q", **held}], tokenizer, require_expert=False)
    assert verify(["\\boxed{44 + (19 + 35)}", "\\boxed{98}"], [problem.answer] * 2)[0] == [1.0, 0.0]


def test_one_bos_at_most(tokenizer, monkeypatch):
    """One BOS for a tokenizer that wants one, however the prompt begins."""
    wants = byte_tokenizer()
    wants.add_special_tokens({"bos_token": "<s>"})
    bos = wants.bos_token_id
    wants.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    hi = [bos, *tokenizer("hi\n").input_ids]
    assert data.render("hi", asking(wants))[1] == hi
    monkeypatch.setitem(data.TEMPLATES, "plain", "<s>" + data.TEMPLATES["plain"])
    assert data.render("hi", asking(wants))[1] == hi
    assert bos not in data.render("<s>", asking(wants))[1][1:]


def test_qwen_template(tokenizer):
    """The template of Qwen2.5-Math, character for character."""
    text, _ = data.render("1+1?", asking(tokenizer, "qwen_math"))
    assert text == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "tiny", "--data", "missing.jsonl"], "error: there is no data file missing.jsonl"),
        (["--model", "./missing"], "error: --model ./missing: there is no such folder"),
        (
            ["--model", "Qwen2.5-1.5B"],
            "error: --model Qwen2.5-1.5B: no tokenizer could be loaded from Qwen/Qwen2.5-1.5B",
        ),
        (["--resume", "runs/missing"], "error: --resume runs/missing: there is no run to resume"),
        pytest.param(
            ["--model", "tiny", "--sampler", "vllm"],
            "error: --sampler vllm: vLLM is not installed",
            marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed"),
        ),
    ],
)
def test_scripts_end_with_one_sentence(arguments, sentence, tmp_path):
    """What a user gets wrong ends a run with a sentence, not with a traceback."""
    done = run_script("bread.py", *arguments, "--out", str(tmp_path / "run"), check=False)
    assert done.returncode != 0 and sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_model_without_tokenizer(model_folder, tmp_path):
    """A folder with weights alone is refused in the same way."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((Path(model_folder("qwen2")) / name).read_bytes())
    flags = ["--data", str(DATA / "gsm8k_sample.jsonl"), "--out", str(tmp_path / "run")]
    done = run_script("sft.py", "--model", str(folder), *flags, check=False)
    assert done.returncode != 0 and f"error: --model {folder}: " in done.stderr and "tokenizer" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_list_of_answers_is_one_answer_of_its_parts(tmp_path, tokenizer):
    """As OlympiadBench publishes them: one, several, numbers."""
    rows = [{"problem": "x?", "final_answer": answer} for answer in (["2"], ["4", "5"], [4, 0.5])]
    golds = [p.answer for p in load(tmp_path, rows, tokenizer, require_expert=False)]
    assert golds == ["2", "4, 5", "4, 0.5"] and verify(["\\boxed{5, 4}"], golds[1:2])[0] == [1.0]


def test_a_data_set_says_that_its_answers_are_words(tmp_path, tokenizer, capsys):
    """How many of them; numbers are not mentioned."""
    load(
        tmp_path,
        [{"problem": "x?", "answer": answer} for answer in ("Paris", "no", "5", "xy")],
        tokenizer,
        require_expert=False,
    )
    assert "2 of 4 answers are words, and compared as words" in capsys.readouterr().out
    load(tmp_path, [{"problem": "x?", "answer": "5"}], tokenizer, require_expert=False)
    assert "words" not in capsys.readouterr().out


def test_knights_and_knaves_rows_are_kept_with_their_traces(tmp_path, tokenizer):
    """The answer in lines becomes the trace's box, and is right in any order."""
    gold = "(1) Amelia is a knight\n(2) Evelyn is a knave"
    row = {"problem": "Who?", "answer": gold, "solution": f"Assume ...\nTherefore, {gold}", "meta": {"n_people": 2}}
    (problem,) = load(tmp_path, [row], tokenizer)
    assert tokenizer.decode(problem.expert_ids).endswith(f"\\boxed{{{gold}}}<eos>")
    assert verify(["\\boxed{Evelyn is a knave and Amelia is a knight}"], [problem.answer])[0] == [1.0]
