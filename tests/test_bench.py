"""The two ways of bench.py do the same work; memory is what fake tensors, real ones, sums say."""

import json

import pytest
import torch
import transformers
from conftest import run_script

import bench
import common
from core.memory import GIB, announce, step_bytes
from results import memory
from results.methods import METHODS


def test_both_ways_have_the_same_gradient(world):
    """The packed and the padded update of the same rows."""
    cfg = bench.Config(rows=6, longest=40, vocab=300, layers=2, hidden=128)
    rows, gradients = bench.ragged_rows(cfg), []
    for attention, update in (("packed", bench.packed_update), ("sdpa", bench.padded_update)):
        model = bench.build(cfg, attention, world.device)
        module = common.shard(model, world) if attention == "packed" else model.train()
        update(module, rows, 100, world)
        gradients.append([common.full_tensor(p.grad) for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_update_prints_a_ratio():
    """A line for each way, and how they compare."""
    printed = run_script("bench.py", *"--rows 4 --longest 32 --vocab 300 --layers 1 --rounds 1".split()).stdout
    assert "way packed" in printed and "way padded" in printed
    assert "x the speed" in printed and "x the peak memory" in printed


def update_gib(*flags: str) -> tuple[float, float]:
    """(GiB of the update, of the peak) that --what memory prints."""
    printed = run_script("bench.py", "--what", "memory", *flags).stdout.splitlines()
    (update,) = [line for line in printed if line.startswith("update")]
    return float(update.split()[-1]), float(printed[-1].removeprefix("peak ").removesuffix(" GiB"))


@pytest.mark.parametrize("method,gpus", [("bread", 4), ("uft", 2)])
def test_records_are_what_is_measured(method, gpus):
    """A case of the README's table, measured again."""
    known = [json.loads(line) for line in memory.RECORDS.read_text().splitlines()]
    (record,) = [line for line in known if (line["method"], line["gpus"]) == (method, gpus)]
    _, peak = update_gib("--method", method, "--model", record["model"], "--gpus", str(gpus))
    assert peak == pytest.approx(record["peak"], rel=0.02, abs=0.06)


@pytest.mark.parametrize(
    "model,gpus,flags",
    [
        ("Qwen2.5-0.5B", 2, ["--checkpoint_activations"]),
        ("Qwen2.5-1.5B", 1, ["--no-checkpoint_activations"]),
        ("Qwen3-0.6B", 4, ["--checkpoint_activations", "--tokens_per_microbatch", "4096"]),
        ("Llama-3.2-1B", 8, ["--no-checkpoint_activations"]),
        ("Qwen2.5-1.5B", 1, ["--checkpoint_activations", "--lora_rank", "32"]),
    ],
)
def test_start_up_arithmetic_is_what_is_measured(model, gpus, flags):
    """core/memory.py beside the real update of sft.py under fake tensors."""
    update, _ = update_gib("--method", "sft", "--model", model, "--gpus", str(gpus), *flags)
    tokens, checkpointed = (4096 if "4096" in flags else 16384), flags[0] == "--checkpoint_activations"
    rank = 32 if "--lora_rank" in flags else 0
    states, needs = step_bytes(empty_model(model), gpus, tokens, checkpointed, rank)
    assert needs / GIB == pytest.approx(update, rel=0.12 if rank else 0.06) and states < needs


def empty_model(name: str) -> transformers.PreTrainedModel:
    """A model of the bundled shapes, without weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(memory.model_config(common.RunConfig(model=name)))


@pytest.mark.parametrize("method", ["grpo", "relift", "bridge"])
def test_fake_tensors_take_what_real_ones_take(method):
    """The same step of a small model with both, counted by the same tracker."""
    fake, real = json.loads(run_script("tests/memory_worker.py", method).stdout.splitlines()[-1])
    assert set(fake) == set(real) and real["update"] > 2**20
    for phase in ("rollouts", "update", "sync"):
        assert fake[phase] == pytest.approx(real[phase], rel=0.03), phase


def test_memory_table_has_every_method():
    """Each method once, with its model, at four numbers of GPUs."""
    printed = run_script("bench.py", "--what", "memory").stdout
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    listed = {(name, model) for names, model, *_ in cells for name in names.split()}
    assert listed == {(method.name, method.model) for method in METHODS}
    assert all(len(row) == 6 and all(int(cell.split()[0]) > 0 for cell in row[2:]) for row in cells)


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--method", "gpro"], "--method gpro: there is no such file"),
        (["--method", "grpo", "--model", "GPT-9"], "--model GPT-9: no such folder"),
        (["--method", "grpo", "--ranks", "3"], "--ranks"),
    ],
)
def test_bad_flags_of_memory(flags, said):
    """A sentence, not a traceback."""
    done = run_script("bench.py", "--what", "memory", *flags, check=False)
    assert done.returncode and said in done.stdout + done.stderr and "Traceback" not in done.stderr


# The line at the start ----------------------------------------------------------------------------
def said_at_start(monkeypatch, capsys, model: str, gpus: int, gib: float, **flags: object) -> str:
    """What announce prints on a GPU of that size."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, int(gib * GIB)))
    run = common.RunConfig(model=model, **flags)
    announce(run, memory.model_config(run), common.World(0, gpus, torch.device("cuda")))
    return capsys.readouterr().out


def test_start_says_what_an_update_needs(monkeypatch, capsys):
    """The need and the device; where it does not fit, a warning with the flag that helps."""
    fits = said_at_start(monkeypatch, capsys, "Qwen2.5-7B", 8, 80)
    assert fits.startswith("memory: an update of Qwen2.5-7B on 8 GPU needs about 27 GiB of each (14 for")
    warned = said_at_start(monkeypatch, capsys, "Qwen2.5-7B", 8, 80, checkpoint_activations=False)
    assert (
        warned.startswith("WARNING")
        and "about 117 GiB" in warned
        and warned.endswith("; it fits with --checkpoint_activations\n")
    )
    fewer = said_at_start(monkeypatch, capsys, "Qwen2.5-1.5B", 1, 28.5)
    assert fewer.startswith("WARNING") and fewer.endswith(
        "; it fits with --tokens_per_microbatch 8192 or --lora_rank 32 or 2 GPU\n"
    )


def test_start_refuses_what_cannot_fit(monkeypatch, capsys):
    """Only where weights, gradients and Adam alone are more than the device."""
    with pytest.raises(
        SystemExit,
        match="113 for weights, gradients and Adam.*, and 78 are there; it fits with --lora_rank 32 or 2 GPU",
    ):
        said_at_start(monkeypatch, capsys, "Qwen2.5-7B", 1, 80)


def test_start_says_nothing_on_a_cpu(capsys):
    """There memory has no such limit."""
    run = common.RunConfig(model="Qwen2.5-32B")
    announce(run, memory.model_config(run), common.World(0, 1, torch.device("cpu")))
    assert capsys.readouterr().out == ""


def test_an_adapter_is_counted_apart():
    """LoRA: two bytes of a frozen number, sixteen of a trained one."""
    model = empty_model("Qwen2.5-7B")
    whole, (states, needs) = sum(p.numel() for p in model.parameters()), step_bytes(model, 1, 2**14, True, 32)
    linear = 28 * 32 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))  # q and o, k and v, the MLP
    assert states == 2 * whole + 16 * linear and needs < 40 * GIB
