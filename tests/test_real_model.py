"""The model of tests/real_model.py through sampler, trainer, three scripts and the export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, read_metrics, run_script, train
from safetensors.torch import load_file

import common
from core.data import BOX_REQUEST

SMALL = ["--steps", 1, "--max_prompt_tokens", 160, "--tokens_per_microbatch", 1024, "--sampler", "hf"]
STEPS = {
    "sft": ["--problems_per_step", 2, "--max_completion_tokens", 112],
    "grpo": ["--problems_per_step", 2, "--max_completion_tokens", 24, "--group_size", 2],
    "bread": ["--problems_per_step", 1, "--max_completion_tokens", 72, "--group_size", 2],
}
END, END_OF_TEXT = 2, 0  # <|im_end|>, <|endoftext|>
FRANCE = "Answer with one word: what is the capital of France?"


@pytest.fixture(scope="module")
def folder(real_model_folder) -> Path:
    """The model's folder."""
    return real_model_folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    """Its own."""
    return common.load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def stock(folder):
    """transformers' model in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Ten rows of GSM8K, the shortest traces of its sample."""
    found = [json.loads(line) for line in (ROOT / "tests/data/gsm8k_sample.jsonl").read_text().splitlines()]
    path = tmp_path_factory.mktemp("rows") / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in sorted(found, key=lambda r: len(r["solution"]))[:10]))
    return path


@pytest.fixture(scope="module")
def sampler(folder, tokenizer, world):
    """The engine on transformers, fp32."""
    run = common.RunConfig(model=str(folder), sampler="hf")
    return common.load_sampler(run, tokenizer, world, 64)


def variant(folder: Path, target: Path, eos: str, generation: dict) -> str:
    """The model with another EOS of its tokenizer and other settings of generation."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    for name, changed in (("tokenizer_config.json", {"eos_token": eos}), ("generation_config.json", generation)):
        (target / name).write_text(json.dumps(json.loads((target / name).read_text()) | changed))
    return str(target)


def question(text: str, tokenizer: common.Tokenizer) -> common.Problem:
    """A problem that is asked as the tokenizer's template has it."""
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
    return common.Problem(text, text, ids, "", None)


def greedy(sampler: common.Sampler, problems: list[common.Problem], tokens: int) -> list[list[int]]:
    """The completion of each problem at temperature 0."""
    return [rollout.completion_ids for (rollout,) in sampler.generate(problems, None, 1, tokens, 0.0, (0,))]


def generated(model, problem: common.Problem, tokens: int) -> list[int]:
    """The same by transformers' generate, which stops where generation_config.json says."""
    ids = torch.tensor([problem.prompt_ids])
    flags = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": tokens, "pad_token_id": END}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **flags)[0, ids.shape[1] :].tolist()


def test_prompt_ids_are_the_templates(rows, tokenizer, tmp_path):
    """A question and a conversation are asked as apply_chat_template says."""
    texts = [json.loads(line)["problem"] for line in rows.read_text().splitlines()]
    talks = [[{"role": "user", "content": text + BOX_REQUEST}] for text in texts]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": talk, "answer": "1"}) + "\n" for talk in talks))
    wanted = [tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] for talk in talks]
    for path in (rows, chats):
        assert [problem.prompt_ids for problem in common.load_problems(str(path), tokenizer)] == wanted


def test_greedy_is_generate(rows, tokenizer, sampler, stock):
    """The text of transformers' generate, in one batch and row by row; one of them ends early."""
    problems = common.load_problems(str(rows), tokenizer)[:3] + [question(FRANCE, tokenizer)]
    wanted = [generated(stock, problem, 24) for problem in problems]
    assert greedy(sampler, problems, 24) == wanted and wanted[-1][-1] == END and len(wanted[-1]) < 24
    assert [greedy(sampler, [problem], 24)[0] for problem in problems] == wanted


def test_packed_logprobs_are_those_of_a_plain_forward(rows, folder, tokenizer, stock, world):
    """Of expert traces in one packed line, beside each row alone through transformers' model."""
    problems = common.load_problems(str(rows), tokenizer, require_expert=True)[:4]
    batch = common.make_batch([common.expert_rollout(problem, tokenizer) for problem in problems])
    policy = common.load_policy(common.RunConfig(model=str(folder)), world)
    with torch.no_grad():
        packed, _ = common.token_logprobs(policy, batch, 1.0)
        for row, (problem, length) in enumerate(zip(problems, batch.lengths, strict=True)):
            line = torch.tensor([problem.prompt_ids + problem.expert_ids])
            logp = F.log_softmax(stock(line).logits[0, -length - 1 : -1], -1)
            plain = logp.gather(1, line[0, -length:, None])[:, 0]
            assert (packed[row, :length] - plain).abs().max() < 1e-3


def test_memory_does_not_grow_over_steps(rows, folder, tmp_path):
    """The peak of a whole run is that of its second step, the first with Adam's moments."""
    flags = ["--data", rows, "--test_data", "", "--steps", 5, "--problems_per_step", 3, "--tokens_per_microbatch", 400]
    flags += ["--max_completion_tokens", 112, "--sampler", "hf", "--out", tmp_path / "run"]
    run_script("sft.py", "--model", *map(str, [folder, *flags]), timeout=900)
    lines = read_metrics(tmp_path / "run", clocks=True)
    peaks = [line["peak_memory_mb"] for line in lines if "loss" in line]
    assert len(peaks) == 5 and peaks[-1] < 1.05 * peaks[1], peaks


def test_a_base_model_ends_its_turn(folder, tmp_path, world):
    """With EOS <|endoftext|> everywhere it stops where its template ends a turn."""
    base = variant(folder, tmp_path / "base", "<|endoftext|>", {"eos_token_id": END_OF_TEXT})
    tokenizer = common.load_tokenizer(base)
    sampler = common.load_sampler(common.RunConfig(model=base, sampler="hf"), tokenizer, world, 64)
    ((rollout,),) = sampler.generate([question(FRANCE, tokenizer)], None, 1, 24, 0.0, (0,))
    assert tokenizer.eos_token_id == END_OF_TEXT and sampler.engine.stop_ids == [END_OF_TEXT, END]
    assert rollout.finished and rollout.completion_ids[-1] == END and rollout.text.startswith("The capital of France")


@pytest.mark.parametrize("method", STEPS)
def test_a_step_of_each(method, rows, folder, tokenizer, tmp_path, world):
    """One step, and what it leaves: readable, in bf16, tied, with the stops it was trained with.

    The source's generation config would bias what is sampled, and lacks the tokenizer's EOS.
    """
    odd = {"eos_token_id": END_OF_TEXT, "repetition_penalty": 1.5, "top_k": 1, "temperature": 0.01, "do_sample": True}
    model = variant(folder, tmp_path / "model", "<|im_end|>", odd)
    flags = ["--model", model, "--data", rows, "--test_data", "", *SMALL, *STEPS[method], "--lr", 1e-5]
    train(method, *flags, "--out", tmp_path / "run")
    line, final = read_metrics(tmp_path / "run")[0], tmp_path / "run/final"
    if method == "sft":
        assert line["loss"] > 0 and line["grad_norm"] > 0
    else:
        assert abs(line["sampler_ratio"] - 1) < 1e-4 and abs(line["sampler_ratio_max"] - 1) < 1e-3
        assert method == "grpo" or line["traces_opened"] == 1

    weights, before = load_file(final / "model.safetensors"), load_file(folder / "model.safetensors")
    assert weights.keys() == before.keys() and {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert method != "sft" or any(not torch.equal(weights[name], before[name]) for name in weights)
    assert (final / "model.safetensors").stat().st_mode & 0o777 == 0o644
    generation = json.loads((final / "generation_config.json").read_text())
    source = json.loads((Path(model) / "generation_config.json").read_text())
    same = {"eos_token_id": [0, 2], "transformers_version": generation["transformers_version"]}
    assert generation == source | same
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(final)
    assert reloaded.dtype == torch.bfloat16 and reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert transformers.AutoTokenizer.from_pretrained(final).chat_template == tokenizer.chat_template
    assert generated(reloaded.float(), question(FRANCE, tokenizer), 24)[-1] == END
