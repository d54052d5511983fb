"""What an expert prefix may show: no answer, whatever the trace looks like and whoever shows it."""

import dataclasses
import importlib
import json

import pytest
import torch
from conftest import ROOT, byte_tokenizer, problem, random_model
from one_step import one_step

import common
import core.data
from core.verifier import last_box

TOKENIZER = byte_tokenizer()
TRACES = {  # a trace, and the pieces that may be shown of it
    "One. Two! So \\boxed{1}.": ["One.", " Two!"],
    "One. Two! So $\\boxed{1}$.": ["One.", " Two!"],
    "One. Two! So \\boxed{1}.\n": ["One.", " Two!"],
    "One. Two! So \\boxed{1}": ["One.", " Two!"],
    "a\nb\n\\boxed{1}\n": ["a\n", "b\n"],
    "a\n\n\nb\n\n\\boxed{1}\n\n": ["a\n\n\n", "b\n\n"],
    "\n\na\n \t\nb\n\\boxed{1}": ["\n\na\n \t\n", "b\n"],
    "a\nso \\boxed{1}\nwhich we check\nand again": ["a\n"],
    "a\nso \\fbox{1}\nb\n\\boxed{1}": ["a\n"],
    "\\boxed{1} it is.\nb\nc": [],
    "nothing to cut \\boxed{1}": [],
    "the answer is 1.\nb\n\\boxed{1}": ["the answer is 1.\n", "b\n"],  # a statement counts where the trace thinks
    "a\nthe answer is 1.\nb\n</think>\n\\boxed{1}": ["a\n"],  # and it thinks where it closes a thought
    "a\n#### 1\n\\boxed{1}": ["a\n"],
}
THOUGHTS = {  # a thought with the answer 42, and what may be shown of it
    "Let x = 6.\nSo 6*7 = 42.\nThe answer is 42.\nWait.\n</think>\nIt is \\boxed{42}": "Let x = 6.\nSo 6*7 = 42.\n",
    "So 6*7 = 42.\n\n**Final Answer**\n42\n</think>\n\\boxed{42}": "So 6*7 = 42.\n",
    "6*7 = 42, so 42 is the final answer. Right.\n</think>\n\\boxed{42}": "",
    "Try 41? The answer is 41. No.\nIt is 42.\n</think>\nSo \\boxed{42}": "Try 41? The answer is 41. No.\nIt is 42.\n",
    "The result is 142 or 42.5.\nfine\n</think>\n\\boxed{42}": "The result is 142 or 42.5.\nfine\n",
    "Finally, x = 42 follows.\nCheck: \\boxed{42}\n</think>\n\\boxed{42}": "",
    "I must put my final answer within \\boxed{}.\na\n</think>\n\\boxed{42}": (
        "I must put my final answer within \\boxed{}.\na\n"
    ),
    "a\nSo the answer is:\n42\n</think>\n\\boxed{42}": "a\n",
    "a\nThe final result is\n\\[\n42\n\\]\n</think>\n\\boxed{42}": "a\n",
    "a\nThe solution is 42%.\n</think>\n\\boxed{42}": "a\n",
    "a\nSo 42 must be the answer.\n</think>\n\\boxed{42}": "a\n",
    "a\nThe result is 42.\n</think>\n\\boxed{42}": "a\n",
    "a\nSo 42 is the result.\n</think>\n\\boxed{42}": "a\n",
    "In conclusion we get 42\n</think>\n\\boxed{42}": "",
    "fine\n</think>\nThe sum is 42.\n\\boxed{42}": "fine\n",
}


@pytest.mark.parametrize("trace", TRACES)
def test_pieces(trace):
    """No piece is EOS or white space alone; none that is shown holds a box, or is the last."""
    question = problem("q", expert=trace)
    ends = core.data.episode_ends(question, TOKENIZER)
    assert ends == sorted(set(ends)) and ends[-1] == len(question.expert_ids)
    pieces = [TOKENIZER.decode(question.expert_ids[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert all(piece.replace("<eos>", "").strip() for piece in pieces) and "".join(pieces) == trace + "<eos>"
    shown, cut_short = common.shown_ends(question, TOKENIZER)
    assert [TOKENIZER.decode(question.expert_ids[a:b]) for a, b in zip([0, *shown], shown, strict=False)] == TRACES[
        trace
    ]
    assert cut_short == (len(shown) < len(ends) - 1)


@pytest.mark.parametrize("trace", THOUGHTS)
def test_a_trace_that_thinks_ends_where_it_states_its_answer(trace):
    """At the sentence that first states it as final, at the box, or where the thought is closed."""
    question = dataclasses.replace(problem("q", answer="42", expert=trace), thinks=True)
    limit = common.tokens_before_answer(question, TOKENIZER)
    assert TOKENIZER.decode(question.expert_ids[:limit]) == THOUGHTS[trace]
    assert all(end <= limit for end in common.shown_ends(question, TOKENIZER)[0])


def test_the_answer_is_that_of_the_data_or_that_of_the_box():
    """A decimal is no end of a sentence; a Countdown row's answer is the equation in its box."""
    kinds = [("3.5", "3.5"), ("1/2", "0.5"), ({"target": 42, "nums": [6, 7]}, "6 * 7"), ("1000", "1,000")]
    kinds += [("x=5", "x = 5"), ("\\text{Paris}", "Paris"), ("42\\%", "42")]
    for answer, said in kinds:
        trace = f"Well.\nAt last the answer is {said} here.\n</think>\n\\boxed{{{said}}}"
        question = dataclasses.replace(problem("q", answer=answer, expert=trace), thinks=True)
        limit = common.tokens_before_answer(question, TOKENIZER)
        assert TOKENIZER.decode(question.expert_ids[:limit]) == "Well.\n"


def test_a_trace_is_never_shown_whole():
    """Not even one that gives no answer: EOS is left to the policy."""
    question = problem("q", expert="nothing here")
    assert common.tokens_before_answer(question, TOKENIZER) == len(question.expert_ids) - 1


def test_trapo_counts_the_prefixes_that_were_cut(world):
    """Of the rows that had a prefix, not of those that needed none."""

    def solve_all_but_one(problems, prefixes, n, *rest):
        opens = prefixes or [[]] * len(problems)
        pairs = zip(problems, opens, strict=True)
        return [
            [common.Rollout(p, [*x, 2], len(x), [-1.0], reward=float(p.id != "0")) for _ in range(n)] for p, x in pairs
        ]

    questions = [problem("q", expert="1\n2\n\\boxed{1}", id=str(i)) for i in range(4)]
    flags = {"problems_per_step": 4, "max_completion_tokens": 64, "shares": (0.0, 0.2, 0.9, 0.9)}
    model = random_model("qwen2", 0, torch.float64)
    _, (line,) = one_step(importlib.import_module("trapo"), [model], solve_all_but_one, questions, **flags)
    assert line["traces_cut_short"] == pytest.approx(2 / 3)


def test_characters_of_several_tokens():
    """The limit is in tokens also where a character takes several of them."""
    question = problem("q", expert="π ≈ 3.14159 — naïve\n\\boxed{1}")
    limit = common.tokens_before_answer(question, TOKENIZER)
    assert TOKENIZER.decode(question.expert_ids[:limit]) == "π ≈ 3.14159 — naïve\n"


def real_traces() -> list[common.Problem]:
    """GSM8K and Countdown; and each trace with text after its box, as in MATH."""
    found = []
    for name in ("gsm8k", "countdown"):
        path = str(ROOT / f"tests/data/{name}_sample.jsonl")
        found += common.load_problems(path, TOKENIZER, max_prompt_tokens=2000, require_expert=True)
    for question in list(found):
        text = TOKENIZER.decode(question.expert_ids[:-1]) + ".\nThis was to be shown.\n"
        ids = [*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id]
        found.append(dataclasses.replace(question, id=question.id + "+", expert_ids=ids))
    return found


FLAGS = {
    "bread": {"trigger": "always", "band_high": 1.1, "stop_on_first": False},
    "uft": {"hint_high": 1.0, "hint_low": 1.0},
    "prefix_rft": {"low_start": 0.95, "min_prefix_tokens": 1},
    "trapo": {"shares": (0.0, 0.5, 0.9, 0.95), "thresholds": (-1.0, 9.0, 9.0, 9.0)},
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_policy_that_can_only_stop_earns_nothing(name, world):
    """EOS after the longest prefix of real traces: nothing is right, no box was shown."""
    questions, prefixed = real_traces(), []

    def stop(problems, prefixes, n, *rest):
        groups = []
        for question, prefix in zip(problems, prefixes or [[]] * len(problems), strict=True):
            text = TOKENIZER.decode(prefix)
            prefixed.append(text)
            right = float(last_box(text) is not None)
            row = {"num_expert_tokens": len(prefix), "sampler_logprobs": [0.0], "text": text, "reward": right}
            groups.append([common.Rollout(question, [*prefix, TOKENIZER.eos_token_id], **row) for _ in range(n)])
        return groups

    method = importlib.import_module(name)
    flags = FLAGS[name] | {"problems_per_step": len(questions), "kl_coef": 0.0, "max_completion_tokens": 2000}
    _, (line,) = one_step(method, [random_model("qwen2", 0, torch.float64)], stop, questions, **flags)
    assert not any("\\boxed" in text for text in prefixed) and sum(map(bool, prefixed)) > len(questions) / 2
    assert line["guided_reward" if "guided_reward" in line else "reward"] == 0
    assert 0.2 < line["traces_cut_short"] <= 1, "no trace of this test would have given its answer away"


def test_the_files_of_the_tiny_world_lose_nothing():
    """Its traces have the box in their last line: all lines before it can be shown."""
    tokenizer = common.load_tokenizer("tiny")
    rows = [json.loads(line) for line in (ROOT / "tiny/train.jsonl").read_text().splitlines()]
    for row, question in zip(rows, common.load_problems(str(ROOT / "tiny/train.jsonl"), tokenizer), strict=True):
        trace = dataclasses.replace(question, expert_ids=[*tokenizer(row["solution"]).input_ids, 0])
        ends, cut_short = common.shown_ends(trace, tokenizer)
        assert len(ends) == row["solution"].count("\n") and not cut_short
