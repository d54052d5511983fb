"""--lora_rank: adapters alone are trained, and whoever takes the weights gets them merged."""

import functools
import json
import shutil

import peft
import pytest
import torch
import transformers
from conftest import ROOT, easy_problems, problem, random_model, read_metrics, run_script, train
from safetensors.torch import load_file, save_file
from test_methods import FLAGS, small
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

import bridge
import common
import core.model
from core.records import complete_checkpoints
from results.architectures import small_model

RANK, SCALE = 4, 32 / 4


def rows() -> list[common.Rollout]:
    """Six ragged rows of random tokens."""
    torch.manual_seed(5)
    return [common.Rollout(problem("q" * n), torch.randint(1, 257, (3 + 2 * n,)).tolist()) for n in range(1, 7)]


def load(folder: str, world: common.World, **flags: object) -> common.Policy:
    """A policy as main loads it."""
    return common.load_policy(common.RunConfig(model=folder, lora_rank=RANK, **flags), world)


def fill(policy: common.Policy) -> common.Policy:
    """The policy with a B that is not 0, as later in training."""
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.named_parameters():
        if ".lora_B." in name:
            value = 0.3 * torch.randn(p.shape, generator=generator)
            p.data.copy_(distribute_tensor(value, p.device_mesh, p.placements))
    return policy


def logprobs(policy, world: common.World) -> torch.Tensor:
    """log pi of all tokens of the rows, in one micro-batch."""
    (batch,) = common.microbatches(rows(), 0, world)
    return common.token_logprobs(policy, batch, 1.0)[0]


def plain(architecture: str, weights: dict[str, torch.Tensor] | None = None) -> common.Policy:
    """transformers' own model of that architecture, with other weights if given."""
    model = random_model(architecture)
    mine = dict(model.named_parameters())
    if weights is not None:
        assert mine.keys() == weights.keys()
        model.load_state_dict(weights, strict=False)
    return common.Policy(model)


# The model ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3", "gemma"])
def test_merged_weights(architecture, model_folder, world):
    """They are the model's own, by name and shape, and give the policy's log-probabilities."""
    policy = fill(load(model_folder(architecture), world))
    merged = dict(common.named_weights(policy))
    mine, base = logprobs(policy, world), logprobs(plain(architecture), world)
    assert (mine - logprobs(plain(architecture, merged), world)).abs().max() < 1e-4
    assert (mine - base).abs().mean() > 0.1


def test_merged_weights_are_a_sum_and_nothing_else_moves(model_folder, world):
    """W + (32 / rank) B A in every linear layer but the head; the rest is the base to the bit."""
    policy, base = fill(load(model_folder("llama"), world)), dict(random_model("llama").named_parameters())
    parts = {name: common.full_tensor(p) for name, p in policy.model.named_parameters()}
    changed = []
    for name, weight in common.named_weights(policy):
        a, b = (parts.get(name.replace("weight", f"lora_{x}.default.weight")) for x in "AB")
        assert torch.equal(weight, base[name]) if a is None else torch.allclose(weight, base[name] + SCALE * b @ a)
        changed += [] if a is None else [name]
    assert len(changed) == 2 * 7 and all("proj" in name for name in changed)


def test_gradient_is_that_of_w_plus_s_b_a(model_folder, world):
    """By autograd through the sum written out; the base has no gradient."""
    policy, base = fill(load(model_folder("qwen2"), world)), plain("qwen2")
    logprobs(policy, world).sum().backward()
    leaves = {name: common.full_tensor(p).requires_grad_() for name, p in policy.named_parameters() if p.requires_grad}
    weights = dict(base.named_parameters())
    for name in [name for name in leaves if "lora_A" in name]:
        place = name.partition(".lora_A")[0]
        a, b = leaves[name], leaves[name.replace("lora_A", "lora_B")]
        weights[f"{place}.weight"] = weights[f"{place}.weight"].detach() + SCALE * b @ a
    summed = functools.partial(torch.func.functional_call, base, weights)
    wanted = torch.autograd.grad(logprobs(lambda *line: summed(line), world).sum(), list(leaves.values()))
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert found.keys() == leaves.keys() and len(found) == 2 * 7 * 2
    for mine, theirs in zip(found.values(), wanted, strict=True):
        size = theirs.abs().max()
        assert size > 1e-2 and (common.full_tensor(mine) - theirs).abs().max() < 1e-4 * size


def test_what_a_card_holds(model_folder, world):
    """Gradients and two moments for rank x (in + out) numbers of each layer, for nothing else."""
    policy = load(model_folder("llama"), world)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.5)
    before = {name: common.full_tensor(p).clone() for name, p in policy.named_parameters()}
    for _ in range(2):  # at the first B is 0, so that A has no gradient
        logprobs(policy, world).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    trained = sum(2 * RANK * (i + o) for i, o in sizes)
    held = [p for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
    assert sum(p.numel() for p in held) == trained == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in optimizer.state.values()) == 2 * trained
    for name, p in policy.named_parameters():  # no decay either
        assert torch.equal(common.full_tensor(p), before[name]) == (".lora_" not in name), name


@pytest.mark.parametrize("checkpoint_activations", [True, False])
def test_on_cuda_the_base_is_bf16_and_the_adapter_fp32(checkpoint_activations, model_folder, world, monkeypatch):
    """FSDP takes both; gradients and merged weights are fp32, and bf16's rounding near fp32's."""
    exact, run = fill(load(model_folder("llama"), world)), common.RunConfig(model=model_folder("llama"), lora_rank=RANK)
    mixed = functools.partial(core.model.MixedPrecisionPolicy, torch.bfloat16, torch.float32)
    monkeypatch.setattr(core.model, "MixedPrecisionPolicy", lambda *dtypes: mixed())
    monkeypatch.setattr(core.model, "init_device_mesh", lambda *args: init_device_mesh("cpu", (1,)))
    cuda = common.World(0, 1, torch.device("cuda"))
    rounded = fill(common.shard(common.load_model(run), cuda, checkpoint_activations))
    for name, p in rounded.named_parameters():
        assert (p.dtype, p.requires_grad) == ((torch.float32, True) if ".lora_" in name else (torch.bfloat16, False))
    for policy in (exact, rounded):
        logprobs(policy, world).sum().backward()
    norms = []
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        if ".lora_" in name:
            assert q.grad.dtype == torch.float32
            norms.append([p.grad.to_local().norm(), (p.grad.to_local() - q.grad.to_local()).norm()])
    whole, far = torch.tensor(norms).norm(dim=0)
    assert far < 0.3 * whole
    merged = dict(common.named_weights(rounded))
    assert {w.dtype for name, w in merged.items() if "proj" in name} == {torch.float32}


def test_bridge_has_its_own_adapter_on_top(model_folder, world):
    """w is trained beside LoRA, which is then theta; both are merged into what is sampled."""
    run = common.RunConfig(model=model_folder("llama"), lora_rank=RANK)
    policy = fill(common.shard(bridge.add_adapter(common.load_model(run), 2, 8.0, 0), world))
    alone = logprobs(policy, world)
    theta, w = bridge.split_parameters(policy)
    assert len(theta) == len(w) == 2 * 7 * 2 and sum(p.requires_grad for p in policy.parameters()) == 2 * len(w)
    for p in w[1::2]:
        p.data.copy_(distribute_tensor(0.3 * torch.randn(p.shape), p.device_mesh, p.placements))
    mine, merged = logprobs(policy, world), plain("llama", dict(bridge.merged_weights(policy)))
    assert (mine - logprobs(merged, world)).abs().max() < 1e-4 < (mine - alone).abs().mean()
    assert isinstance(common.load_reference(run, policy, world), common.Policy)  # w is in policy, not in the reference


# The reference ------------------------------------------------------------------------------------
@pytest.mark.parametrize("checkpoint_activations", [True, False])
def test_the_reference_is_the_policy_without_adapter(checkpoint_activations, model_folder, world):
    """The base to the bit, no second copy; between forward and backward it disturbs nothing."""
    flags = {"checkpoint_activations": checkpoint_activations}
    policy = fill(load(model_folder("qwen2"), world, **flags))
    run = common.RunConfig(model=model_folder("qwen2"), lora_rank=RANK, **flags)
    reference = common.load_reference(run, policy, world)
    assert reference.args == (policy,)
    (batch,) = common.microbatches(rows(), 0, world)
    base = common.load_policy(common.RunConfig(model=model_folder("qwen2")), world)
    wanted = common.reference_logprobs(base, batch, 1.0)
    gradients = []
    for between in (False, True):
        found = logprobs(policy, world)
        if between:
            assert torch.equal(common.reference_logprobs(reference, batch, 1.0), wanted)
        found.sum().backward()
        gradients.append([p.grad.to_local().clone() for p in policy.parameters() if p.grad is not None])
        policy.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not torch.equal(logprobs(policy, world), wanted)
    start = load(model_folder("qwen2"), world)
    assert torch.equal(logprobs(start, world), wanted)


def test_another_reference_is_a_copy(model_folder, world):
    """Of another model (iw_sft.py --reference), or where more than LoRA is trained."""
    run = common.RunConfig(model=model_folder("qwen2"), lora_rank=RANK)
    policy = fill(load(model_folder("llama"), world))
    other, whole = common.load_reference(run, policy, world), common.load_policy(common.RunConfig(model="tiny"), world)
    assert torch.equal(logprobs(other, world), logprobs(plain("qwen2"), world))
    copy = common.load_reference(common.RunConfig(model="tiny"), whole, world)
    for model in (other, copy):
        assert isinstance(model, common.Policy) and not any(p.requires_grad for p in model.parameters())


# Ranks --------------------------------------------------------------------------------------------
def updates() -> dict[str, torch.Tensor]:
    """Gradients, merged weights and the reference of this world's share of the rows."""
    world = common.World(torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device("cpu"))
    policy = fill(load("tiny", world, checkpoint_activations=True))
    reference = common.load_reference(common.RunConfig(model="tiny", lora_rank=RANK), policy, world)
    total = torch.zeros(())
    for batch in common.microbatches(rows()[world.rank :: world.size], 20, world):
        found = common.token_logprobs(policy, batch, 1.0)[0]
        total += torch.where(batch.completion_mask, common.reference_logprobs(reference, batch, 1.0), 0.0).sum()
        torch.where(batch.completion_mask, found, 0.0).sum().backward()
    norm = common.clip_gradients(policy.parameters(), 1.0)
    grads = {f"grad {name}": common.full_tensor(p.grad) for name, p in policy.named_parameters() if p.grad is not None}
    frozen = torch.tensor(core.model.frozen_bits(policy, world))
    found = {"norm": norm, "reference": common.all_sum(total, world), "frozen": frozen}
    return found | grads | dict(common.named_weights(policy))


def test_two_ranks_are_one(world, tmp_path):
    """Sums in another order; frozen weights have the same bits on any number of ranks."""
    run_script("tests/update_worker.py", "test_lora", str(tmp_path / "two.pt"), nproc=2, timeout=200)
    one, two = updates(), torch.load(tmp_path / "two.pt")
    assert one.keys() == two.keys() and one["frozen"] == two["frozen"] != 0
    for name, value in one.items():
        assert torch.allclose(value.double(), two[name].double(), rtol=1e-4, atol=1e-5), name


# Runs ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Problems that the bundled model solves sometimes, so that groups are mixed."""
    path = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    easy_problems(path)
    return path


def run_twice(method: str, folder, *flags: object) -> None:
    """Train four steps, and again from the checkpoint of the second: equal, bit for bit."""
    train(method, *flags, "--lora_rank", RANK, "--out", folder)
    straight, weights = read_metrics(folder), load_file(folder / "final/model.safetensors")
    first, last = complete_checkpoints(folder)
    saved = FileSystemReader(first).read_metadata().state_dict_metadata
    models = [key for key in saved if not key.partition(".")[0].endswith("optimizer")]
    assert models and all("lora_" in key for key in models)
    assert not any("base_layer.weight" in key for key in saved if ".exp_avg" in key)
    shutil.rmtree(last)
    shutil.rmtree(folder / "final")
    train(method, "--resume", folder)
    again = load_file(folder / "final/model.safetensors")
    assert read_metrics(folder) == straight and all(torch.equal(weights[k], again[k]) for k in weights)
    start = load_file(ROOT / "tiny/model.safetensors")
    assert start.keys() == weights.keys() and max((weights[k] - start[k]).abs().max() for k in start) > 1e-3
    assert len({row["grad_norm"] for row in straight[:-1]}) > 1


@pytest.mark.parametrize("method", FLAGS)
def test_every_method_trains_adapters(method, easy, tmp_path, world):
    """Checkpoints hold adapters alone; what is exported is merged, and where LoRA is all that was
    trained, base and adapter are the same model by peft.
    """
    kl = [] if method in ("sft", "iw_sft", "bridge", "trapo") else ["--kl_coef", 0.1]
    run_twice(method, tmp_path / "run", *small(easy, tmp_path / "run", *FLAGS[method], *kl))
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/final").eval()
    assert (tmp_path / "run/final/adapter").exists() == (method != "bridge")
    if method != "bridge":
        base = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny").eval()
        ids, plain = torch.arange(3, 40)[None], base(torch.arange(3, 40)[None]).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run/final/adapter").eval()
        assert (adapted(ids).logits - final(ids).logits).abs().max() < 1e-4
        assert (plain - final(ids).logits).abs().max() > 1e-2


def test_sft_learns(easy, tmp_path, world):
    """The loss falls on rows that come again and again."""
    flags = small(easy, tmp_path, "--warmup", 0, "--final_lr", 1, "--lora_rank", RANK)
    train("sft", *[24 if flag == "6" else flag for flag in flags], "--steps", 12, "--lr", 3e-3)
    losses = [row["loss"] for row in read_metrics(tmp_path)[:-1]]
    assert losses[-1] < 0.7 * losses[0]


# What is refused ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "qwen3_moe"])
def test_experts_are_refused(name, tmp_path, world):
    """Their weights are in no linear layer; peft leaves them out, or sync would."""
    small_model(name).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="is in no linear layer, so that LoRA would leave it out"):
        load(str(tmp_path), world)


def test_a_rank_below_0_is_refused(world):
    with pytest.raises(SystemExit, match="--lora_rank -1: peft cannot put it on tiny"):
        common.load_policy(common.RunConfig(model="tiny", lora_rank=-1), world)


def test_resume_wants_the_same_rank_and_the_same_base(easy, tmp_path, world):
    """A checkpoint is of one shape, and means nothing on other weights."""
    shutil.copytree(ROOT / "tiny", tmp_path / "base")
    run = [*small(easy, tmp_path / "run")[2:], "--model", tmp_path / "base", "--lora_rank", RANK]
    train("sft", *run)
    with pytest.raises(SystemExit, match="--lora_rank 8 instead of 4; another lora_rank needs a run of its own"):
        train("sft", "--resume", tmp_path / "run", "--lora_rank", 8)
    weights = load_file(tmp_path / "base/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.01
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=r"is an adapter of other weights than --model \S+ now has"):
        train("sft", "--resume", tmp_path / "run", "--steps", 5)
    state = json.loads((complete_checkpoints(tmp_path / "run")[-1] / "state.json").read_text())
    assert state["frozen"] != 0
