"""One check of the vLLM sampler, in processes of its own: `vllm_worker.py tied|untied|parallel|stops|methods FOLDER`."""

import importlib
import json
import sys
from pathlib import Path

import torch
import transformers
from conftest import byte_tokenizer, problem
from torch.distributed.tensor import DTensor, distribute_tensor

import bridge
import common

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"max_position_embeddings": 512, "initializer_range": 0.3, "vocab_size": 257, "bos_token_id": None, "pad_token_id": 0}


def model(tied: bool, seed: int = 0, attention: str = "packed") -> transformers.PreTrainedModel:
    """Qwen2, tied, or Llama, untied; head size 32, the smallest of vLLM's attention on a CPU."""
    torch.manual_seed(seed)
    kind = transformers.Qwen2Config if tied else transformers.LlamaConfig
    config = common.stretch(kind(**SIZES, eos_token_id=0, tie_word_embeddings=tied))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


def start(folder: Path, tied: bool, dist: common.Dist, tensor_parallel: int = 1, eos: int | list[int] = 0) -> common.Sampler:
    if dist.rank == 0:
        saved = model(tied)
        saved.generation_config.eos_token_id = eos
        saved.save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
    torch.distributed.barrier()
    if not tied:  # the flags for a longer context reach the engine too
        common.CONTEXT.update(rope_theta=40000.0, max_positions=1024)
    return common.load_sampler("vllm", str(folder / "model"), byte_tokenizer(), dist, 400, 0.3, tensor_parallel)


def questions(dist: common.Dist, n: int = 5, length: int = 150) -> list[common.Problem]:
    """Different on each rank; long enough to fill a block of the prefix cache (128 tokens on a CPU)."""
    return [problem("q" * (length + i) + "abc"[i % 3], id=f"{dist.rank}-{i}") for i in range(n + dist.rank)]


def gap(policy: common.Policy, groups: list[list[common.Rollout]], temperature: float, dist: common.Dist) -> float:
    """Largest difference between trainer and engine on the policy's tokens, over ranks."""
    batch = common.make_batch([r for group in groups for r in group], dist)
    with torch.no_grad():
        logprobs, _ = common.token_logprobs(policy, batch, temperature)
    written = batch.completion_mask & ~batch.expert_mask
    return max(common.gather([(logprobs - batch.sampler_logprobs)[written].abs().max().item()], dist))


def greedy_agreement(policy: common.Policy, sampler: common.Sampler, asked: list[common.Problem]) -> float:
    """Share of greedy completions that are the argmax of the policy's stock forward."""
    whole = model("lm_head.weight" not in dict(common.named_weights(policy)), attention="sdpa")
    whole.load_state_dict(dict(common.named_weights(policy)), strict=False)
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
    try:
        function(*args)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "accepted"


def engine(tied: bool, folder: Path, dist: common.Dist) -> dict:
    sampler, found = start(folder, tied, dist), {}
    policy = common.load_policy(str(folder / "model"), dist)
    asked, prefixes = questions(dist), [[], [5, 6], [7] * 9, [], [8], [9] * 3][: 5 + dist.rank]

    def ids(*args):
        return [[r.completion_ids for r in group] for group in sampler.generate(*args)]

    def sample():
        return sampler.generate(asked, prefixes, 3, 24, 0.7, (0, 0, 0))

    found["gap"], found["greedy_agreement"] = [gap(policy, sample(), 0.7, dist)], [greedy_agreement(policy, sampler, asked)]
    for _ in range(3):
        perturb(policy, 0.05)
        found["stale_gap"] = gap(policy, sample(), 0.7, dist)
        sampler.sleep()
        sampler.sync(policy)
        found["gap"].append(gap(policy, sample(), 0.7, dist))
        found["greedy_agreement"].append(greedy_agreement(policy, sampler, asked))
    reset, sampler.engine.reset_prefix_cache = sampler.engine.reset_prefix_cache, lambda: True
    perturb(policy, 0.05)
    sampler.sync(policy)
    found["stale_cache_gap"] = gap(policy, sample(), 0.7, dist)
    sampler.engine.reset_prefix_cache = reset
    sampler.sync(policy)

    together = ids(asked, None, 4, 12, 1.0, (0, 3, 0))
    found["same_seed"] = together == ids(asked, None, 4, 12, 1.0, (0, 3, 0))
    found["other_seed_differs"] = together != ids(asked, None, 4, 12, 1.0, (0, 4, 0))
    found["alone_equals_together"] = together == [ids([q], None, 4, 12, 1.0, (0, 3, 0))[0] for q in asked]

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


def parallel(folder: Path, dist: common.Dist) -> dict:
    """Rank 1 asks twice, rank 0 once; then both sleep and sync."""
    sampler = start(folder, True, dist, 2)
    policy = common.load_policy(str(folder / "model"), dist)
    perturb(policy, 0.05)
    sampler.sync(policy)
    gaps, made = [], []
    for _ in range(2):
        groups = sampler.generate(questions(dist), None, 3, 20, 1.0, (0,))
        if dist.rank:
            groups += sampler.generate(questions(dist, 2, 20), None, 3, 20, 1.0, (1,))
        sampler.sleep()
        gaps.append(gap(policy, groups, 1.0, dist))
        made.append([[r.completion_ids for r in group] for group in groups])
        sampler.sync(policy)
    return {"gap": gaps, "same": all(common.gather([made[0] == made[1]], dist))}


def stops(folder: Path, dist: common.Dist) -> dict:
    sampler = start(folder, True, dist, eos=[0, 5])
    rows = [r for group in sampler.generate(questions(dist, 40, 10), None, 8, 200, 1.0, (0,)) for r in group]
    assert all(r.finished == (r.completion_ids[-1] in (0, 5)) and not {0, 5} & set(r.completion_ids[:-1]) for r in rows)
    adapted = bridge.add_adapter(model(True), 4, 8.0, 0)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    policy = common.shard(adapted, dist)
    sampler.sync(bridge.merged_weights(policy))
    groups, plain = sampler.generate(questions(dist), None, 3, 20, 1.0, (0,)), common.shard(model(True), dist)
    return {
        "stopped_by": sorted({r.completion_ids[-1] for r in rows if r.finished}),
        "adapter_gap": gap(policy, groups, 1.0, dist),
        "without_adapter_gap": gap(plain, groups, 1.0, dist),
    }


def methods(folder: Path, dist: common.Dist) -> dict:
    """Two steps of every other online method, one after the other on one engine: its start would take most of the time."""
    sampler = common.load_sampler("vllm", "tiny", common.load_tokenizer("tiny"), dist, 400, 0.3, 1)
    found, common.load_sampler, end, common.shutdown = {}, lambda *args: sampler, common.shutdown, lambda: None
    for method in "grpo luffy srft relift prefix_rft uft bridge chord hpt trapo".split():
        sys.argv = [f"{method}.py", "--model", "tiny", "--steps", "2", "--problems_per_step", "4", "--out", str(folder / method)]
        module = importlib.import_module(method)
        module.main(common.parse(module.Config))
        found[method] = [json.loads(line) for line in (folder / method / "metrics.jsonl").read_text().splitlines()]
    common.shutdown = end
    return found


def main() -> None:
    check, folder, dist = sys.argv[1], Path(sys.argv[2]), common.init(0)
    found = (
        engine(check == "tied", folder, dist)
        if check.endswith("tied")
        else {"parallel": parallel, "stops": stops, "methods": methods}[check](folder, dist)
    )
    if dist.rank == 0:
        (folder / f"{check}.json").write_text(json.dumps(found))
    common.shutdown()


if __name__ == "__main__":
    main()
