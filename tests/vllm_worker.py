"""A check of the vLLM sampler: `vllm_worker.py tied|untied|parallel|stops|methods|real FOLDER`."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, byte_tokenizer, problem, read_metrics, train
from real_model import real_model
from torch.distributed.tensor import DTensor, distribute_tensor

import bridge
import common
from results.methods import METHODS

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # head size 32, the smallest of vLLM's attention on a CPU
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "vocab_size": 257,
    "bos_token_id": None,
    "pad_token_id": 0,
}
LONGER = {"rope_theta": 40000.0, "max_positions": 1024}  # flags for a longer context, which reach the engine too


def model(tied: bool, seed: int = 0, attention: str = "packed", rope_theta: float = 0.0):
    """Qwen2, tied, or Llama, untied, with random weights."""
    torch.manual_seed(seed)
    kind = transformers.Qwen2Config if tied else transformers.LlamaConfig
    config = kind(**SIZES, eos_token_id=0, tie_word_embeddings=tied)
    if rope_theta:
        config.rope_parameters = config.rope_parameters | {"rope_theta": rope_theta}
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


def start(
    folder: Path, tied: bool, world: common.World, tensor_parallel: int = 1, eos: int | list[int] = 0
) -> tuple[common.RunConfig, common.Sampler]:
    """A saved model, as a run would name it, and the engine on it."""
    if world.rank == 0:
        saved = model(tied)
        saved.generation_config.eos_token_id = eos
        saved.save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
    torch.distributed.barrier()
    engine = {"sampler": "vllm", "sampler_memory": 0.3, "tensor_parallel": tensor_parallel, "max_prompt_tokens": 200}
    run = common.RunConfig(model=str(folder / "model"), **engine, **({} if tied else LONGER))
    return run, common.load_sampler(run, byte_tokenizer(), world, 200)


def questions(world: common.World, n: int = 5, length: int = 150) -> list[common.Problem]:
    """Different on each rank; long enough to fill a block of the prefix cache, 128 tokens."""
    return [problem("q" * (length + i) + "abc"[i % 3], id=f"{world.rank}-{i}") for i in range(n + world.rank)]


def gap(policy: common.Policy, groups: list[list[common.Rollout]], temperature: float, world: common.World) -> float:
    """Largest difference between trainer and engine on the policy's tokens, over ranks."""
    batch = common.make_batch([r for group in groups for r in group], world.device)
    with torch.no_grad():
        logprobs, _ = common.token_logprobs(policy, batch, temperature)
    return max(common.gather([(logprobs - batch.sampler_logprobs)[batch.policy_mask].abs().max().item()], world))


def greedy_agreement(policy: common.Policy, sampler: common.Sampler, asked: list[common.Problem]) -> float:
    """Share of greedy completions that are the argmax of the policy's stock forward."""
    weights, rope = dict(common.named_weights(policy)), policy.model.config.rope_parameters["rope_theta"]
    whole = model("lm_head.weight" not in weights, attention="sdpa", rope_theta=rope)
    whole.load_state_dict(weights, strict=False)
    right = 0
    for (rollout,) in sampler.generate(asked, None, 1, 12, 0.0, (0,)):
        ids = torch.tensor([rollout.problem.prompt_ids + rollout.completion_ids])
        best = whole(input_ids=ids, use_cache=False).logits[0].argmax(-1)[len(rollout.problem.prompt_ids) - 1 : -1]
        right += best.tolist() == rollout.completion_ids
    return right / len(asked)


def perturb(policy: common.Policy, scale: float) -> None:
    """The same whole noise on any number of ranks."""
    with torch.no_grad():
        for i, parameter in enumerate(policy.parameters()):
            value = common.full_tensor(parameter)
            value = value + scale * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
            sharded = isinstance(parameter, DTensor)
            parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements) if sharded else value)


def refusal(function, *args) -> str:
    """The message of the error, or that there was none."""
    try:
        function(*args)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "accepted"


def engine(tied: bool, folder: Path, world: common.World) -> dict:
    """Log-probabilities, greedy tokens, syncs, seeds and refusals of one engine."""
    (run, sampler), found = start(folder, tied, world), {}
    policy, llm = common.load_policy(run, world), sampler.engine.engine
    asked, prefixes = questions(world), [[], [5, 6], [7] * 9, [], [8], [9] * 3][: 5 + world.rank]

    def ids(*args):
        return [[r.completion_ids for r in group] for group in sampler.generate(*args)]

    def sample():
        return sampler.generate(asked, prefixes, 3, 24, 0.7, (0, 0, 0))

    found["gap"] = [gap(policy, sample(), 0.7, world)]
    found["greedy_agreement"] = [greedy_agreement(policy, sampler, asked)]
    for _ in range(3):
        perturb(policy, 0.05)
        found["stale_gap"] = gap(policy, sample(), 0.7, world)
        sampler.sleep()
        sampler.sync(policy)
        found["gap"].append(gap(policy, sample(), 0.7, world))
        found["greedy_agreement"].append(greedy_agreement(policy, sampler, asked))
    reset, llm.reset_prefix_cache = llm.reset_prefix_cache, lambda: True
    perturb(policy, 0.05)
    sampler.sync(policy)
    found["stale_cache_gap"] = gap(policy, sample(), 0.7, world)
    llm.reset_prefix_cache = reset
    sampler.sync(policy)  # without a sleep before it, which drops the cache too
    found["gap"].append(gap(policy, sample(), 0.7, world))

    together = ids(asked, None, 4, 12, 1.0, (0, 3, 0))
    found["same_seed"] = together == ids(asked, None, 4, 12, 1.0, (0, 3, 0))
    found["other_seed_differs"] = together != ids(asked, None, 4, 12, 1.0, (0, 4, 0))
    found["alone_equals_together"] = together == [ids([q], None, 4, 12, 1.0, (0, 3, 0))[0] for q in asked]

    sampler.engine.made.seeded = False  # as on a GPU without --deterministic
    together = ids(asked, None, 4, 12, 1.0, (0, 3, 0))
    found["one_seed"] = together == ids(asked, None, 4, 12, 1.0, (0, 3, 0)) != ids(asked, None, 4, 12, 1.0, (0, 4, 0))
    sampler.engine.made.seeded = True
    sampler.sleep()  # at level 2
    found["lost"] = refusal(sample)
    sampler.sync(policy)
    found["gap"].append(gap(policy, sample(), 0.7, world))

    weights = list(common.named_weights(policy))
    wanted = {
        "missing": ("were not updated", sampler.sync, [w for w in weights if "embed" not in w[0]]),
        "unknown": ("no parameter other", sampler.sync, [*weights, ("other", weights[0][1])]),
        "shape": ("of shape (3,)", sampler.sync, [(weights[0][0], torch.zeros(3))]),
        "room": ("no room", sampler.generate, asked[:1], [[1] * 9], 1, 9, 1.0, (0,)),
        "too long": ("over the engine's", sampler.generate, asked[:1], None, 1, 300, 1.0, (0,)),
    }
    found["refused"] = [name for name, (text, *call) in wanted.items() if text in refusal(*call)]
    return found


def parallel(folder: Path, world: common.World) -> dict:
    """Rank 1 asks twice, rank 0 once; then both sleep and sync."""
    run, sampler = start(folder, True, world, 2)
    policy = common.load_policy(run, world)
    perturb(policy, 0.05)
    sampler.sync(policy)
    gaps, made = [], []
    for _ in range(2):
        groups = sampler.generate(questions(world), None, 3, 20, 1.0, (0,))
        if world.rank:
            groups += sampler.generate(questions(world, 2, 20), None, 3, 20, 1.0, (1,))
        sampler.sleep()
        gaps.append(gap(policy, groups, 1.0, world))
        made.append([[r.completion_ids for r in group] for group in groups])
        sampler.sync(policy)
    return {"gap": gaps, "same": all(common.gather([made[0] == made[1]], world))}


def stops(folder: Path, world: common.World) -> dict:
    """Two EOS ids, and the merged weights of BRIDGE's adapter."""
    _, sampler = start(folder, True, world, eos=[0, 5])
    rows = [r for group in sampler.generate(questions(world, 40, 10), None, 8, 200, 1.0, (0,)) for r in group]
    assert all(r.finished == (r.completion_ids[-1] in (0, 5)) for r in rows)
    assert not any({0, 5} & set(r.completion_ids[:-1]) for r in rows)
    adapted = bridge.add_adapter(model(True), 4, 8.0, 0)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    policy = common.shard(adapted, world)
    sampler.sync(bridge.merged_weights(policy))
    groups, plain = sampler.generate(questions(world), None, 3, 20, 1.0, (0,)), common.shard(model(True), world)
    return {
        "stopped_by": sorted({r.completion_ids[-1] for r in rows if r.finished}),
        "adapter_gap": gap(policy, groups, 1.0, world),
        "without_adapter_gap": gap(plain, groups, 1.0, world),
    }


def methods(folder: Path, world: common.World) -> dict:
    """Two steps of each online method but bread on one engine: its start takes most of the time."""
    run = common.RunConfig(model="tiny", sampler="vllm", sampler_memory=0.3, max_prompt_tokens=200)
    sampler = common.load_sampler(run, common.load_tokenizer("tiny"), world, 200)
    found, flags = {}, "--model tiny --steps 2 --problems_per_step 4".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_sampler", lambda *args: sampler)
        for method in (m.name for m in METHODS if m.name != "bread" and "sft" not in (m.name, m.parent)):
            train(method, *flags, "--out", folder / method)
            found[method] = read_metrics(folder / method)
    return found


def real(folder: Path, world: common.World) -> dict:
    """Greedy ids of both engines on a real model, and a step of grpo.py, three problems each."""
    name, data, greedy = str(real_model()), str(ROOT / "tests/data/gsm8k_sample.jsonl"), {}
    tokenizer = common.load_tokenizer(name)
    asked = common.load_problems(data, tokenizer, max_prompt_tokens=160)[:3]
    for kind in ("hf", "vllm"):
        run = common.RunConfig(model=name, sampler=kind, sampler_memory=0.3, max_prompt_tokens=160)
        sampler = common.load_sampler(run, tokenizer, world, 40)
        greedy[kind] = [r.completion_ids for (r,) in sampler.generate(asked, None, 1, 24, 0.0, (0,))]
    flags = "--steps 1 --problems_per_step 3 --group_size 2 --max_completion_tokens 24 --max_prompt_tokens 160".split()
    flags += [
        "--model",
        name,
        "--data",
        data,
        "--test_data",
        "",
        "--tokens_per_microbatch",
        "1024",
        "--sampler",
        "vllm",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_sampler", lambda *args: sampler)
        train("grpo", *flags, "--out", folder / "grpo")
    return {"greedy": greedy, "stop_ids": sampler.engine.stop_ids, "metrics": read_metrics(folder / "grpo")[:1]}


def main() -> None:
    """The findings of a check, as JSON in the folder."""
    check, folder, world = sys.argv[1], Path(sys.argv[2]), common.init(0)
    if check in ("tied", "untied"):
        found = engine(check == "tied", folder, world)
    else:
        found = {"parallel": parallel, "stops": stops, "methods": methods, "real": real}[check](folder, world)
    if world.rank == 0:
        (folder / f"{check}.json").write_text(json.dumps(found))
    common.shutdown()


if __name__ == "__main__":
    main()
