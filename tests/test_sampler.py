"""The sampler against the trainer: same log-probabilities, same weights, randomness per problem."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from conftest import ROOT, byte_tokenizer, problem, random_model, run_script, train
from safetensors.torch import load_file

import common
from core.engines import longest_row
from core.sampler import TransformersEngine, pick, stop_ids
from results.methods import METHODS


def new_sampler(folder: str, tokenizer, world) -> common.Sampler:
    """Of the transformers engine, also where there is vLLM."""
    return common.load_sampler(common.RunConfig(model=folder, sampler="hf"), tokenizer, world, 100)


@pytest.fixture(scope="module")
def sampler(model_folder, tokenizer, world):
    """One for all tests that leave its weights as they are."""
    return new_sampler(model_folder("qwen2"), tokenizer, world)


def questions(n: int) -> list[common.Problem]:
    """Problems of four different lengths."""
    return [problem("q" * (1 + 3 * (i % 4)), id=f"id{i}") for i in range(n)]


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_trainers(architecture, temperature, model_folder, world):
    """The log-probabilities of the policy, at temperature 0.7 too, and rows as they must be.

    Prefixes have unequal lengths, and rows finish at different times.
    """
    tokenizer = common.load_tokenizer(model_folder(architecture))
    sampler = new_sampler(model_folder(architecture), tokenizer, world)
    policy = common.load_policy(common.RunConfig(model=model_folder(architecture)), world)
    asked = questions(6)
    prefixes = [[], [5, 6], [7] * 9, [], [8], [9] * 3]
    groups = sampler.generate(asked, prefixes, 3, 24, temperature, (0, 0, 0))
    for group, prefix, question in zip(groups, prefixes, asked, strict=True):
        assert all(r.completion_ids[: len(prefix)] == prefix and r.num_expert_tokens == len(prefix) for r in group)
        assert all(r.problem is question and len(r.completion_ids) <= 24 for r in group)
        assert all(r.finished == (r.completion_ids[-1] in sampler.engine.stop_ids) for r in group)
        assert all(stop not in r.completion_ids[len(prefix) : -1] for r in group for stop in sampler.engine.stop_ids)
    batch = common.make_batch([r for group in groups for r in group], world.device)
    with torch.no_grad():
        logprobs, _ = common.token_logprobs(policy, batch, temperature)
    assert (logprobs - batch.sampler_logprobs)[batch.policy_mask].abs().max() < 1e-4
    if temperature != 1.0:
        with torch.no_grad():
            plain, _ = common.token_logprobs(policy, batch, 1.0)
        assert (plain - batch.sampler_logprobs)[batch.policy_mask].abs().max() > 1e-2


def test_the_limit_is_the_completions(sampler):
    """max_tokens counts a completion with its prefix, and no token of the prompt; EOS is kept."""
    rows = [r for group in sampler.generate(questions(4), [[], [5], [6] * 3, []], 40, 4, 1.0, (0,)) for r in group]
    assert all(r.finished or len(r.completion_ids) == 4 for r in rows) and any(not r.finished for r in rows)
    late = [r for group in sampler.generate(questions(4), None, 40, 60, 1.0, (0,)) for r in group]
    assert any(r.finished for r in late) and any(not r.finished for r in late)


def test_greedy_is_argmax(sampler, model_folder):
    """Temperature 0 takes the stock model's likeliest token, one after the other."""
    question = questions(1)[0]
    rollout = sampler.generate([question], None, 1, 10, 0.0, (0,))[0][0]
    model = common.load_model(common.RunConfig(model=model_folder("qwen2")), torch.float32, "sdpa")
    ids = list(question.prompt_ids)
    for token in rollout.completion_ids:
        assert model(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == token
        ids.append(token)


def test_what_is_sampled_depends_on_the_problem_alone(sampler):
    """A problem gets the same completions alone, among others, and in another order."""
    asked = questions(6)
    together = [[r.completion_ids for r in group] for group in sampler.generate(asked, None, 4, 12, 1.0, (0, 3, 0))]
    alone = [[r.completion_ids for r in sampler.generate([q], None, 4, 12, 1.0, (0, 3, 0))[0]] for q in asked]
    assert together == alone
    backwards = sampler.generate(asked[::-1], None, 4, 12, 1.0, (0, 3, 0))[::-1]
    assert [[r.completion_ids for r in group] for group in backwards] == together


def test_small_batches_change_nothing(sampler, monkeypatch):
    """The same completions where the cache holds a few rows at a time."""
    asked = questions(6)
    wide = [[r.completion_ids for r in g] for g in sampler.generate(asked, None, 4, 12, 1.0, (0, 3, 0))]
    monkeypatch.setattr(sampler.engine.made, "max_batch_tokens", 100)
    assert [[r.completion_ids for r in g] for g in sampler.generate(asked, None, 4, 12, 1.0, (0, 3, 0))] == wide


@pytest.mark.parametrize("other", [(1, 3, 0), (0, 4, 0), (0, 3, 1)])
def test_seed_step_and_attempt_differ(sampler, other):
    """Each of the three numbers of the seed gives other completions, and a group's rows differ."""
    asked = questions(3)
    first = [r.completion_ids for g in sampler.generate(asked, None, 4, 12, 1.0, (0, 3, 0)) for r in g]
    assert [r.completion_ids for g in sampler.generate(asked, None, 4, 12, 1.0, other) for r in g] != first
    assert len({tuple(ids) for ids in first}) > 9  # rows of a group differ too


def test_samples_follow_the_distribution(sampler, model_folder):
    """First tokens of many samples against the model's probabilities."""
    question = questions(1)[0]
    model = common.load_model(common.RunConfig(model=model_folder("qwen2")), torch.float32, "sdpa")
    probs = torch.softmax(model(input_ids=torch.tensor([question.prompt_ids])).logits[0, -1], -1)
    rows = sampler.generate([question], None, 4000, 1, 1.0, (0,))[0]
    counts = torch.bincount(torch.tensor([r.completion_ids[0] for r in rows]), minlength=len(probs)) / len(rows)
    assert (counts - probs).abs().max() < 4 * (0.25 / len(rows)) ** 0.5


@pytest.mark.parametrize(
    ("top_p", "shares"), [(1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0, 0]), (0.1, [1, 0, 0, 0])]
)
def test_top_p_keeps_the_nucleus(top_p, shares):
    """The smallest set of tokens with that mass, in its own proportions, in any order."""
    probs, uniform = torch.tensor([0.5, 0.3, 0.15, 0.05]), ((torch.arange(1000.0) + 0.5) / 1000).double()[:, None]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        logp = torch.log(probs[order]).expand(1000, 4)
        counts = torch.bincount(pick(logp, uniform, 1.0, top_p), minlength=4)
        assert (counts / 1000 - torch.tensor(shares)[order]).abs().max() <= 1e-3


def test_sync_brings_every_weight(model_folder, tokenizer, world):
    """After a sync the engine has the policy's weights; one too few or too many is an error."""
    sampler = new_sampler(model_folder("qwen2"), tokenizer, world)
    policy = common.shard(random_model("qwen2", seed=5), world)
    before = sampler.generate(questions(2), None, 1, 10, 0.0, (0,))
    sampler.sync(policy)
    after = sampler.generate(questions(2), None, 1, 10, 0.0, (0,))
    assert [r.completion_ids for g in before for r in g] != [r.completion_ids for g in after for r in g]
    theirs = dict(policy.model.named_parameters())
    assert all(torch.equal(p, common.full_tensor(theirs[name])) for name, p in sampler.engine.model.named_parameters())
    weights = list(common.named_weights(policy))
    with pytest.raises(RuntimeError, match="sampler were not updated: \\['model.embed_tokens.weight'\\]"):
        sampler.sync((name, weight) for name, weight in weights if "embed" not in name)
    with pytest.raises(RuntimeError, match="the sampler has no parameter other.weight"):
        sampler.sync([*weights, ("other.weight", weights[0][1])])


def test_a_prefix_without_room_is_refused(sampler):
    """A prefix as long as the completion may be leaves no token to sample."""
    with pytest.raises(ValueError, match="no room"):
        sampler.generate(questions(1), [[1] * 12], 1, 12, 1.0, (0,))


def test_draw_sees_every_problem_once_per_epoch_on_any_number_of_ranks():
    """Five steps of four are two epochs of ten; the ranks together have what one process has."""
    problems = questions(10)
    one = common.World(0, 1, torch.device("cpu"))
    single = [{p.id for p in common.draw(problems, 4, step, 7, one)} for step in range(5)]
    for size in (1, 2, 3):
        ranks = [common.World(rank, size, torch.device("cpu")) for rank in range(size)]
        steps = [[p.id for rank in ranks for p in common.draw(problems, 4, step, 7, rank)] for step in range(5)]
        assert sorted(sum(steps, [])) == sorted([p.id for p in problems] * 2)
        assert all(len(set(step)) == 4 for step in steps[:2])
        assert [set(step) for step in steps] == single
    orders = [[p.id for p in common.draw(problems, 10, 0, seed, one)] for seed in (7, 8)]
    assert orders[0] != orders[1]


def test_the_first_draw_keeps_its_seed():
    """Samples go by (seed, step, attempt) and id; only those of a second draw by its number."""
    (question,) = questions(1)
    digest = hashlib.blake2b(repr(((0, 3, 1), "id0")).encode(), digest_size=7).digest()
    assert common.group_seed((0, 3, 1), question) == int.from_bytes(digest, "big")
    seeds = [common.group_seed((0, 3, 1), dataclasses.replace(question, occurrence=k)) for k in range(9)]
    assert len(set(seeds)) == 9 and seeds[0] == common.group_seed((0, 3, 1), question)


@pytest.mark.parametrize(("rows", "n", "step"), [(1, 4, 0), (3, 8, 0), (3, 4, 2), (5, 7, 3)])
def test_a_problem_drawn_twice_is_sampled_twice(rows, n, step, sampler):
    """Few problems, or an epoch's border in the step: as many different groups as draws."""
    problems, groups = questions(rows), {}
    for size in (1, 2, 3):
        ranks = [common.World(rank, size, torch.device("cpu")) for rank in range(size)]
        drawn = [common.draw(problems, n, step, 7, rank) for rank in ranks]
        made = [sampler.generate(mine, None, 2, 12, 1.0, (7, step, 0)) for mine in drawn]
        groups[size] = sorted((g[0].problem.id, *(tuple(r.completion_ids) for r in g)) for part in made for g in part)
    assert len(set(groups[1])) == n > len({group[0] for group in groups[1]})
    assert groups[1] == groups[2] == groups[3]


def test_auto_is_transformers_on_a_cpu(model_folder, tokenizer, world):
    """--sampler auto takes vLLM where there is a GPU alone."""
    sampler = common.load_sampler(common.RunConfig(model=model_folder("qwen2")), tokenizer, world, 100)
    assert type(sampler.engine.made) is TransformersEngine or world.device.type == "cuda"


# Where it stops -----------------------------------------------------------------------------------
TALK = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}END\n{% endfor %}"
TURN_ENDS = [  # a chat template, and which tokens end a turn beside EOS
    ("ChatML", TALK.replace("END", "<|im_end|>"), ["<|im_end|>"]),
    ("another token", TALK.replace("END", "<|end|>"), ["<|end|>"]),
    ("no special token, but an added one", TALK.replace("END", "<turn>"), ["<turn>"]),
    ("then EOS too", TALK.replace("END", "<|end|>") + "{{ eos_token }}", ["<|end|>"]),
    ("EOS alone", TALK.replace("END", "{{ eos_token }}"), []),
    ("a blank and EOS", TALK.replace("END", " {{ eos_token }}"), []),
    ("words before it", TALK.replace("END", "\n### over <|end|>"), ["<|end|>"]),
    ("words alone", TALK.replace("END", "\n### over"), []),
    ("nothing, then white space that is a token", TALK.replace("END", "\n\n"), []),
    (
        "an empty thought before the answer",
        TALK.replace("{{ m.c", "<|end|>{{ m.c").replace("END", "<turn>"),
        ["<turn>"],
    ),
    ("a prompt that is always opened", TALK.replace("END", "<|end|>") + "<|start|>assistant\n", ["<|end|>"]),
    ("an answer is refused", "{{ raise_exception('only questions') }}", []),
    ("content in parts", "{% for m in messages %}{{ m.content[0]['text'] + 'x' }}<|end|>{% endfor %}", []),
    ("the answer is left out", "{{ messages[0].content }}<|end|>", []),
    ("none", None, []),
]


@pytest.mark.parametrize(("name", "template", "ends"), TURN_ENDS, ids=[row[0] for row in TURN_ENDS])
@pytest.mark.parametrize("model_eos", [0, 7, [0, 7], None])
def test_the_end_of_a_turn_stops(name, template, ends, model_eos):
    """EOS of tokenizer and model, what the template writes after an answer, and ChatML's own."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<turn>", "\n\n"])
    tokenizer.add_tokens(["<|start|>", "<|end|>"] + ["<|im_end|>"] * (name == "ChatML"), special_tokens=True)
    tokenizer.chat_template = template
    own = {0, *(model_eos if isinstance(model_eos, list) else [model_eos])} - {None}
    wanted = sorted(own | {tokenizer.convert_tokens_to_ids(end) for end in ends})
    assert stop_ids(tokenizer, transformers.GenerationConfig(eos_token_id=model_eos)) == wanted
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)  # --template think and qwen_math write it
    found = stop_ids(tokenizer, transformers.GenerationConfig(eos_token_id=model_eos))
    assert found == sorted({*wanted, tokenizer.convert_tokens_to_ids("<|im_end|>")})


def bf16_folder(folder, eos: int | list[int], **generation: object) -> str:
    """A random model in bfloat16 with a ChatML tokenizer, and settings for a short run."""
    tokenizer, model = byte_tokenizer(), random_model("qwen2")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = TURN_ENDS[0][1]
    model.resize_token_embeddings(len(tokenizer))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, **generation}))
    settings = {"template": "plain", "request": "", "max_prompt_tokens": 64, "max_completion_tokens": 80, "steps": 2}
    settings |= {"problems_per_step": 2, "bridge": {"group_size": 2}, "data": str(ROOT / "tiny/train.jsonl")}
    (folder / "settings.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("method", ["sft", "bridge"])
def test_final_has_the_dtype_of_the_source_and_stops_where_it_was_trained(method, tmp_path, world):
    """The masters stay fp32, what is exported is bf16, readable by all, and stops as the sampler.

    A generation config that transformers loads but refuses to save is kept as it is.
    """
    source = bf16_folder(tmp_path / "model", 7, temperature=0.6, top_p=0.9, do_sample=False)
    train(method, "--model", source, "--test_data", "", "--out", tmp_path / "run")
    final, stops = tmp_path / "run/final", [0, 7, 258]
    weights, before = load_file(final / "model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    assert weights.keys() == before.keys() and {w.dtype for w in weights.values()} == {torch.bfloat16}
    generation = json.loads((final / "generation_config.json").read_text())
    assert generation["eos_token_id"] == stops and (generation["temperature"], generation["top_p"]) == (0.6, 0.9)
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in final.iterdir())
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(final)
    assert reloaded.dtype == torch.bfloat16 and reloaded.generation_config.eos_token_id == stops
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert transformers.AutoTokenizer.from_pretrained(final).chat_template == TURN_ENDS[0][1]
    sampler = common.load_sampler(common.RunConfig(model=str(final)), common.load_tokenizer(str(final)), world, 100)
    assert sampler.engine.stop_ids == stops


def test_masters_do_not_go_through_the_export(tmp_path, world):
    """A checkpoint holds fp32, of which the export is the rounding; a resume takes the former."""
    source = bf16_folder(tmp_path / "model", 0)
    flags = ["--model", source, "--test_data", "", "--save_every", 1, "--lr", 1e-4]
    train("sft", *flags, "--out", tmp_path / "whole")
    torn = shutil.copytree(tmp_path / "whole", tmp_path / "torn", ignore=shutil.ignore_patterns("final", "00000002"))
    train("sft", "--resume", torn)
    one, two = (load_file(folder / "final/model.safetensors") for folder in (tmp_path / "whole", torn))
    assert all(torch.equal(one[name], two[name]) for name in one)
    names = [f"model.{name}" for name in one]
    masters = {"model": {name: torch.empty(one[name.removeprefix("model.")].shape) for name in names}}
    dcp.load(masters, checkpoint_id=tmp_path / "whole/checkpoints/00000002")
    learned = {name.removeprefix("model."): tensor for name, tensor in masters["model"].items()}
    assert all(torch.equal(learned[name].bfloat16(), one[name]) for name in one)
    assert any(not torch.equal(learned[name].bfloat16().float(), learned[name]) for name in one)


# What fits ----------------------------------------------------------------------------------------
def short_folder(folder, positions: int) -> str:
    """The tiny model with another window."""
    shutil.copytree(ROOT / "tiny", folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("method", [method.name for method in METHODS])
def test_a_window_that_is_too_small_is_one_sentence(method, tmp_path, world):
    """In every script, before anything is sampled or written; the longest that fits runs."""
    model, flags = short_folder(tmp_path / "model", 143), ["--steps", 0, "--test_data", ""]
    said = "prompt and completion have up to 144 tokens, the window of .* is 143; lower --max_completion_tokens"
    if method == "bread":
        flags += ["--prefix_site", "assistant"]
    with pytest.raises(SystemExit, match=said + " or --max_prompt_tokens, or .* --rope_theta and --max_positions"):
        train(method, "--model", model, *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(method, "--model", model, *flags, "--max_positions", 144, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run/final/config.json").read_text())["max_position_embeddings"] == 144


def test_a_model_without_a_window_has_no_limit(tmp_path):
    """Bloom's config does not say how far it reaches."""
    transformers.BloomConfig().save_pretrained(tmp_path)
    assert longest_row(common.RunConfig(model=str(tmp_path), max_prompt_tokens=7), 10**6) == 10**6 + 7


@pytest.mark.parametrize(("positions", "room"), [(4096, 80), (60, None), (9, 0)])
def test_eval_cuts_to_the_room(positions, room, tmp_path):
    """Up to the window behind the longest prompt, said and in the protocol; no room is an error."""
    model = short_folder(tmp_path / "model", positions)
    flags = [
        "--model",
        model,
        "--data",
        str(ROOT / "tiny/test.jsonl"),
        "--samples",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    done = run_script("eval.py", *flags, check=False)
    tokenizer, problems = common.load_tokenizer("tiny"), (tmp_path / "out/test.protocol.json")
    longest = max(
        len(p.prompt_ids) for p in common.load_problems(str(ROOT / "tiny/test.jsonl"), tokenizer, "plain", request="")
    )
    said = f"the longest prompt has {longest} tokens, the window of {model} is {positions}"
    if room == 0:
        assert done.returncode == 1 and f"error: test: {said}; lower --max_prompt_tokens, or" in done.stderr
        assert not problems.exists()
        return
    cut = room or positions - longest
    assert done.returncode == 0 and json.loads(problems.read_text())["max_tokens"] == cut
    assert (f"test: --max_tokens 80 is cut to {cut}: {said}" in done.stdout) == (room is None)
    samples = [json.loads(line) for line in (tmp_path / "out/test.samples.jsonl").read_text().splitlines()]
    assert max(sample["tokens"] for sample in samples) <= cut
