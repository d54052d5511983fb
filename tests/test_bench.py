"""The two ways of bench.py do the same work, and its memory table is arithmetic."""

import torch
from conftest import run_script

import bench
import common
from results.methods import METHODS


def test_both_ways_have_the_same_gradient(world):
    """The packed and the padded update of the same rows."""
    cfg = bench.Config(rows=6, longest=40, vocab=300, layers=2, hidden=128)
    rows, gradients = bench.ragged_rows(cfg), []
    for attention, update in (("packed", bench.packed_update), ("sdpa", bench.padded_update)):
        model = bench.build(cfg, attention)
        module = common.shard(model, world) if attention == "packed" else model.train()
        update(module, rows, 100, world)
        gradients.append([common.full_tensor(p.grad) for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_update_prints_a_ratio():
    """A line for each way, and how they compare."""
    printed = run_script("bench.py", *"--rows 4 --longest 32 --vocab 300 --layers 1 --rounds 1".split()).stdout
    assert "way packed" in printed and "way padded" in printed
    assert "x the speed" in printed and "x the peak memory" in printed


def test_memory_by_hand():
    """1.544 G parameters: 16 bytes each over the GPUs, 2 in the sampler; the rest is small."""
    for gpus in (1, 8):
        floor = 1.544e9 * (16 / gpus + 2) / 2**30
        assert floor < bench.memory_per_gpu("Qwen2.5-1.5B", 0, gpus, 16384, True) < floor + 6
    one, more = (bench.memory_per_gpu("Qwen2.5-1.5B", extra, 4, 16384, True) for extra in (0, 8))
    assert abs((more - one) * 2**30 - 1.544e9 * 8 / 4) < 1


def test_memory_of_every_method():
    """Each method once, with its model, its extra state, and what that weighs on one GPU."""
    printed = run_script("bench.py", "--what", "memory").stdout
    assert "| bread | Qwen2.5-1.5B |" in printed and "| relift (a second Adam) | Qwen2.5-7B |" in printed
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    listed = [(name, model, float(cell)) for names, model, cell, *_ in lines for name in names.split(" (")[0].split()]
    assert sorted(name for name, *_ in listed) == sorted(method.name for method in METHODS)
    found = {name: rest for name, *rest in listed}
    for method in METHODS:
        model, gib = found[method.name]
        floor = bench.MODELS[model][3] * 1e9 * (18 + method.extra) / 2**30
        assert model == method.model and floor - 1 < gib < floor + 20, method.name
