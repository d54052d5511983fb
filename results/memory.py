"""Memory of a training step without a GPU: the real main of a method file, with fake tensors.

FakeTensorMode computes shapes and storages but no numbers, a fake process group stands for the
other ranks, and what is alive is counted. Dtypes, attention and chunks of logits are as on CUDA.
Not in it: what CUDA itself and the allocator's fragments take, one to two GiB.

python results/memory.py             measure the table of MANUAL.md anew: results/memory.jsonl
python results/memory.py uft iw_sft  those methods alone
"""

import importlib
import json
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

import common  # noqa: E402
import core.config  # noqa: E402
import core.model  # noqa: E402
from results.methods import METHODS  # noqa: E402

GIB, CPU = 2**30, torch.device("cpu")
RECORDS = ROOT / "results/memory.jsonl"
SHAPES = {  # layers, hidden, intermediate, heads, key heads, vocabulary, tied, head size
    "Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 151936, True, 64),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 151936, True, 128),
    "Qwen2.5-3B": (36, 2048, 11008, 16, 2, 151936, True, 128),
    "Qwen2.5-7B": (28, 3584, 18944, 28, 4, 152064, False, 128),
    "Qwen2.5-14B": (48, 5120, 13824, 40, 8, 152064, False, 128),
    "Qwen2.5-32B": (64, 5120, 27648, 40, 8, 152064, False, 128),
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 128256, True, 64),
    "Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128256, True, 128),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128256, False, 128),
    "Llama-3.3-70B": (80, 8192, 28672, 64, 8, 128256, False, 128),
    "Qwen3-0.6B": (28, 1024, 3072, 16, 8, 151936, True, 128),
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, 151936, True, 128),
    "Qwen3-4B": (36, 2560, 9728, 32, 8, 151936, True, 128),
    "Qwen3-8B": (36, 4096, 12288, 32, 8, 151936, False, 128),
    "Qwen3-14B": (40, 5120, 17408, 40, 8, 151936, False, 128),
    "Qwen3-32B": (64, 5120, 25600, 64, 8, 151936, False, 128),
}
GPUS = (1, 2, 4, 8)
KINDS = ["weights", "gradients", "Adam", "reference", "gathered", "activations", "logits", "sampler"]


def model_config(run: common.RunConfig) -> transformers.PretrainedConfig:
    """The config of a model whose shapes are bundled, else of a folder; nothing is downloaded."""
    name = run.model.rpartition("/")[2].removesuffix("-Instruct").replace("-Math", "")
    if name not in SHAPES and (run.model == "tiny" or Path(run.model).is_dir()):
        return core.model.load_config(run)
    if name not in SHAPES:
        common.fail(f"--model {run.model}: no such folder, and the shapes known here are of {', '.join(SHAPES)}")
    return model_of(name)


def model_of(name: str, *sizes: int) -> transformers.PretrainedConfig:
    """The config of a bundled model, or of its kind with other sizes in the order of SHAPES."""
    known = SHAPES[name]
    layers, hidden, intermediate, heads, key_heads, vocab, tied, head = (*sizes, *known[len(sizes) :])
    kinds = {"Qwen2.5": transformers.Qwen2Config, "Qwen3": transformers.Qwen3Config}
    return kinds.get(name.split("-")[0], transformers.LlamaConfig)(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        head_dim=head,
        max_position_embeddings=2**17,
        eos_token_id=0,
        bos_token_id=None,
    )


# What is alive ------------------------------------------------------------------------------------
class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, by kind, and the most there were in each phase."""

    def __init__(self, kind_of_tensor: type):
        super().__init__()
        self.type, self.label, self.phase = kind_of_tensor, "activations", "loading"
        self.size: dict[int, int] = {}
        self.kind: dict[int, str] = {}
        self.bytes: dict[str, int] = defaultdict(int)  # of each kind, now
        self.now, self.peaks = 0, {}  # phase: (bytes, bytes of each kind)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, self.type):
                self.see(tensor.untyped_storage(), self.label)
        return out

    def see(self, storage: torch.UntypedStorage, label: str, move: bool = False) -> None:
        """Count a storage that is new, or has another size or kind."""
        key = storage._cdata
        if key not in self.size:
            self.size[key], self.kind[key] = 0, label
            weakref.finalize(storage, self.gone, key)
        size, kind = storage.size(), label if move else self.kind[key]
        if size != self.size[key] or kind != self.kind[key]:
            self.bytes[self.kind[key]] -= self.size[key]
            self.bytes[kind] += size
            self.now += size - self.size[key]
            self.size[key], self.kind[key] = size, kind
        self.note()

    def note(self) -> None:
        """Keep what is alive if it is the phase's most."""
        if self.now > self.peaks.get(self.phase, (0,))[0]:
            self.peaks[self.phase] = (self.now, dict(self.bytes))

    def gone(self, key: int) -> None:
        size = self.size.pop(key)
        self.bytes[self.kind.pop(key)] -= size
        self.now -= size

    def enter(self, phase: str) -> None:
        """Another phase, which begins with what is alive."""
        self.phase = phase
        self.note()

    @contextmanager
    def called(self, label: str) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before


class OnCpu(TorchFunctionMode):
    """Whatever is asked for on another device is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [CPU if isinstance(value, torch.device) else value for value in args]
        return func(*args, **{name: CPU if name == "device" else value for name, value in (kwargs or {}).items()})


def chosen(tensor: torch.Tensor, index: object) -> torch.Tensor:
    """tensor[index]; all of it where a mask would need numbers."""
    masked = isinstance(index, torch.Tensor) and index.dtype == torch.bool
    return tensor.flatten() if masked else torch.Tensor.__getitem__(tensor, index)


ANSWERS = {  # of a fake tensor to a program that asks for a number
    "item": lambda self: 1.0,
    "tolist": lambda self: [1.0] * self.numel(),
    "__float__": lambda self: 1.0,
    "__int__": lambda self: 1,
    "__bool__": lambda self: True,
    "__array__": lambda self, *_, **__: np.ones(self.shape),
    "__getitem__": chosen,
}


# One case -----------------------------------------------------------------------------------------
def small_run(cfg, gpus: int) -> tuple[object, list[common.Problem]]:
    """(cfg of one step, its problems): each rank's update has two full micro-batches."""
    group, tokens = getattr(cfg, "group_size", 4), cfg.run.tokens_per_microbatch or 2**14
    updates, buffered = min(getattr(cfg, "updates_per_step", 1), 2), hasattr(cfg, "buffer_size")
    length = min(tokens, 2 * tokens // group)  # of every row, so that none is padded
    prompt = min(128, length // 2)
    problems = (updates + buffered if hasattr(cfg, "group_size") else group) * gpus
    flags = {"steps": 1, "problems_per_step": problems, "sft_problems_per_step": group * gpus, "quality": False}
    flags |= {"buffer_size": gpus, "updates_per_step": updates, "max_completion_tokens": length - prompt}
    flags = {name: flag for name, flag in flags.items() if hasattr(cfg, name)}
    trace = [5] * (length - prompt)
    made = [common.Problem(str(i), "", [i, *[5] * (prompt - 1)], "1", trace) for i in range(8 * problems)]
    return core.config.with_flags(cfg, flags | {"test_data": "", "tokens_per_microbatch": tokens}), made


def score(groups: list[list[common.Rollout]]) -> dict[str, int]:
    """In place of the verifier: groups are mixed, but of several the first fails."""
    for place, group in enumerate(groups):
        for i, row in enumerate(group):
            row.reward = float(i % 2 == 0 and (place > 0 or len(groups) == 1))
    return {"verifier_errors": 0, "sampled_tokens": 1}


def generate(problems, prefixes, n: int, max_tokens: int, *_: object) -> list[list[common.Rollout]]:
    """Completions up to the limit."""
    prefixes = prefixes or [[] for _ in problems]
    groups = []
    for problem, prefix in zip(problems, prefixes, strict=True):
        own = max_tokens - len(prefix)
        groups.append([common.Rollout(problem, [*prefix, *[5] * own], len(prefix), [0.0] * own) for _ in range(n)])
    return groups


@contextmanager
def in_place_of_a_device(config, problems: list, live: Live, gpus: int, fake: bool, cuda: bool) -> Iterator[None]:
    """What a method's main would load, read and write is made here; the rest of it is real."""
    mode, models = FakeTensorMode(allow_non_fake_inputs=True), []

    @contextmanager
    def ground(label: str) -> Iterator[None]:
        with mode if fake else nullcontext(), live, live.called(label):
            yield

    def labelled(label: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            with ground(label):
                return function(*args, **kwargs)

        return call

    def load_model(run, dtype=torch.float32, *_: object, **__: object) -> transformers.PreTrainedModel:
        with ground("weights"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="packed")
            model.name_or_path = run.model
            if run.lora_rank:
                with mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self):  # no fake tensor moves
                    core.model.add_lora(model, run)
        models.append(model)
        return model

    def shard(model: transformers.PreTrainedModel, world: common.World, *flags: object) -> common.Policy:
        with ground("weights"):  # over all ranks, by the mesh below; nothing is handed out
            return true_shard(model, replace(world, size=1), *flags)

    def resume(log, state: dict) -> tuple[int, dict]:
        for _, optimizer in (part for part in state.values() if isinstance(part, tuple)):
            with ground("Adam"):  # its moments, as a checkpoint brings them
                for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                optimizer.zero_grad()
        for parameter in (p for model in models for p in model.parameters()):
            live.see(local(parameter), "weights" if parameter.requires_grad else "reference", move=True)
        live.peaks.clear()  # loading is on the host
        return 0, {}

    def sync(weights) -> None:
        live.enter("sync")
        with ground("gathered"):
            for _ in common.named_weights(weights, torch.bfloat16) if isinstance(weights, common.Policy) else weights:
                pass

    def backward(loss: torch.Tensor) -> None:
        with ground("activations"):
            torch.autograd.backward(loss)
        for parameter in (p for model in models for p in model.parameters() if p.grad is not None):
            live.see(local(parameter.grad), "gradients", move=True)

    def resize(storage: torch.UntypedStorage, size: int) -> None:
        true_resize(storage, size)
        if storage._cdata in live.size:
            live.see(storage, "gathered", move=True)

    def microbatches(rows: list, budget: int, world: common.World) -> list[common.Batch]:
        return true_microbatches(rows, budget, replace(world, size=1))  # as if every rank had rows of these lengths

    true_resize, true_shard, true_microbatches = torch.UntypedStorage.resize_, core.model.shard, common.microbatches
    engine = mock.Mock(generate=generate, sync=sync, sleep=lambda: None)
    world = common.World(0, gpus, torch.device("cuda" if cuda else "cpu"))
    mesh, tokenizer = init_device_mesh("cpu", (gpus,)), common.load_tokenizer("tiny")
    replaced = [
        (common, "init", lambda seed: world),
        (common, "StopSignal", lambda: mock.Mock(asked=lambda world: False)),
        (common, "load_tokenizer", lambda name: tokenizer),
        (common, "load_data", lambda *args, **kwargs: (problems, [])),
        (common, "load_model", load_model),
        (core.model, "load_model", load_model),
        (common, "microbatches", microbatches),
        (common, "shard", shard),
        (core.model, "shard", shard),
        (core.model, "announce", lambda *args: None),
        (core.model, "resolve_model", lambda name: name),
        (core.model, "load_config", lambda run: config),
        (core.model, "check_packing", lambda *args: None),
        (core.model, "init_device_mesh", lambda *args, **kwargs: mesh),
        (common, "load_sampler", lambda *args: engine),
        (common, "score", score),
        (common, "log_rollouts", lambda *args: None),
        (common, "RunLog", lambda *args: mock.Mock(phase=live.enter)),
        (common, "resume", resume),
        (common, "save", lambda *args, **kwargs: None),
        (common, "finish", lambda *args: None),
        (dist, "all_gather_object", lambda parts, value, *_: parts.__setitem__(slice(None), [value] * len(parts))),
        (torch.Tensor, "backward", backward),
        (torch.UntypedStorage, "resize_", resize),
        (torch.optim.AdamW, "step", labelled("Adam", torch.optim.AdamW.step)),
        (common, "clip_gradients", labelled("gradients", common.clip_gradients)),
        (common.Policy, "forward", labelled("activations", common.Policy.forward)),
        (common.Policy, "head", labelled("logits", common.Policy.head)),
        (FSDPParamGroup, "unshard", labelled("gathered", FSDPParamGroup.unshard)),
        (FSDPParamGroup, "wait_for_unshard", labelled("gathered", FSDPParamGroup.wait_for_unshard)),
        (FSDPParamGroup, "post_backward", labelled("gradients", FSDPParamGroup.post_backward)),
    ]
    with ExitStack() as stack:
        for place, name, new in replaced:
            stack.enter_context(mock.patch.object(place, name, new))
        for name, answer in (ANSWERS | {"is_cuda": cuda}).items():
            stack.enter_context(mock.patch.object(FakeTensor, name, answer, create=True))
        stack.enter_context(OnCpu())
        stack.enter_context(live)
        yield


def local(tensor: torch.Tensor) -> torch.UntypedStorage:
    """The storage of a tensor, or of this rank's part of it."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


@dataclass
class Found:
    """The most that one GPU holds in each phase of a step: phase -> kind -> bytes."""

    method: str
    model: str
    gpus: int
    phases: dict[str, dict[str, int]]
    seconds: float  # of a CPU
    cacheless: bool  # the engine's cache is not in it

    @property
    def phase(self) -> str:
        """Of the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> float:
        """GiB."""
        return sum(self.phases[self.phase].values()) / GIB


def run_step(method: str, cfg, config: transformers.PretrainedConfig, gpus: int, fake=True, cuda=True) -> dict:
    """A step of a method's main, with fake or real tensors: phase -> kind -> bytes."""
    module, live = importlib.import_module(method), Live(FakeTensor if fake else torch.Tensor)
    cfg, problems = small_run(cfg, gpus)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        with in_place_of_a_device(config, problems, live, gpus, fake, cuda):
            module.main(cfg)
    finally:
        dist.destroy_process_group()
    return {phase: kinds for phase, (_, kinds) in live.peaks.items()}


def sampler_bytes(cfg, config: transformers.PretrainedConfig, gpus: int) -> tuple[int, int]:
    """(weights, KV cache) of the inference engine; vLLM's cache takes what is left: 0."""
    with torch.device("meta"):
        weights = 2 * sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if cfg.run.sampler != "hf":
        return weights // min(cfg.run.tensor_parallel, gpus), 0
    heads, rows = config.num_key_value_heads, getattr(cfg, "group_size", cfg.run.eval_samples)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    longest = cfg.run.max_prompt_tokens + cfg.max_completion_tokens
    tokens = min(cfg.problems_per_step * rows * longest // gpus, max(2**19, rows * longest))
    return weights, 4 * config.num_hidden_layers * heads * head * tokens  # keys and values in bf16


def measure(method: str, cfg, gpus: int) -> Found:
    """What a step of a method needs with these flags, measured as this file's docstring says."""
    start, config = time.process_time(), model_config(cfg.run)
    phases, (weights, cache) = run_step(method, cfg, config, gpus), sampler_bytes(cfg, config, gpus)
    found = {name: phases[name] for name in ("update", "sft", "sync") if name in phases}
    found |= {"rollouts" if hasattr(cfg, "group_size") else "evaluation": phases.get("rollouts", phases.get("rows"))}
    for name, kinds in found.items():
        asleep = cfg.run.sampler != "hf" and name in ("update", "sft")
        kinds["sampler"] = 0 if asleep else weights + (0 if name in ("update", "sft", "sync") else cache)
    model = cfg.run.model.removesuffix("-Instruct")
    return Found(method, model, gpus, found, time.process_time() - start, cfg.run.sampler != "hf")


# The table ----------------------------------------------------------------------------------------
def lines(found: Found) -> Iterator[str]:
    """A table of phases and kinds in GiB, and the peak."""
    yield f"{found.method} with {found.model} on {found.gpus} GPU, GiB on each ({found.seconds:.0f} s of one CPU core):"
    yield f"{'':12}" + "".join(f"{kind:>12}" for kind in [*KINDS, "all"])
    for phase, kinds in found.phases.items():
        numbers = [*(kinds.get(kind, 0) / GIB for kind in KINDS), sum(kinds.values()) / GIB]
        yield f"{phase:12}" + "".join(f"{number:12.2f}" for number in numbers)
    yield f"the most is in: {found.phase}" + ("; vLLM's KV cache takes what is left" if found.cacheless else "")
    yield f"peak {found.peak:.1f} GiB"


def table() -> str:
    """The records as Markdown: a line for methods that need the same."""
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    cells, names = defaultdict(dict), defaultdict(list)
    for record in records:
        cells[record["method"], record["model"]][record["gpus"]] = f"{record['peak']:.0f} ({record['phase']})"
    for (method, model), row in cells.items():
        names[model, tuple(row[n] for n in GPUS)].append(method)
    rows = [f"| method | model | {' | '.join(f'{n} GPU' for n in GPUS)} |", "|---|---|" + "---|" * len(GPUS)]
    return "\n".join(rows + [f"| {' '.join(n)} | {model} | {' | '.join(row)} |" for (model, row), n in names.items()])


def record(method: str, model: str, gpus: int) -> dict:
    """A line of the records: a method with its defaults, and what it was measured with."""
    flags = {"model": model, "checkpoint_activations": True}
    cfg = core.config.with_flags(importlib.import_module(method).Config(), flags)
    found = measure(method, cfg, gpus)
    parts = {kind: round(size / GIB, 2) for kind, size in found.phases[found.phase].items() if size}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    said = {"method": method, "model": model, "gpus": gpus, "peak": round(found.peak, 2), "phase": found.phase}
    return said | {"parts": parts, "seconds": round(found.seconds, 1)} | versions


def main() -> None:
    torch.set_num_threads(1)
    asked = sys.argv[1:] or [method.name for method in METHODS]
    old = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    for method in (method for method in METHODS if method.name in asked):
        old = [line for line in old if line["method"] != method.name]
        old += [record(method.name, method.model, gpus) for gpus in GPUS]
        order = [method.name for method in METHODS]
        old.sort(key=lambda line: (order.index(line["method"]), line["gpus"]))
        RECORDS.write_text("".join(json.dumps(line) + "\n" for line in old))
        print(method.name, flush=True)


if __name__ == "__main__":
    main()
