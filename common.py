"""What would be a bug if two methods disagreed about it. What two papers could disagree about is in the method files.

Sections, in this order: Processes, Policy, Problems, Sampling, Verifier, Formulas, Packing, Records.

Shapes: B rows, T completion tokens, V vocabulary, P problems, N rows of one problem (group size). Every (B, T) tensor lives on the
completion axis: column t is completion token t, so logprobs[b, t] = log pi(completion_ids[b, t] | prompt b, completion_ids[b, :t]).
There are no prompt columns and nobody shifts by one.

The rule that keeps the numbers right: a loss is a sum over tokens of weight x term, the weights are fixed before the first backward
from counts over all micro-batches and all ranks, and gradients *sum* over micro-batches and ranks.
"""

import ast
import atexit
import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import json
import logging
import math
import multiprocessing
import operator
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import datasets
import math_verify
import numpy as np
import pebble
import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we bring our own time limit

# ----------------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dist:
    """One process of the run. A plain `python x.py` is a world of one and takes the same code path as torchrun."""

    rank: int
    world_size: int
    device: torch.device


def init(seed: int) -> Dist:
    """Start the process group: NCCL on CUDA, gloo on CPU, one process per device."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun does, so that both give the same numbers; set it for a larger model
    if not td.is_initialized():
        store = None if "RANK" in os.environ else td.HashStore()  # a world of one needs no port
        td.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size)
    torch.manual_seed(seed)
    return Dist(rank, world_size, device)


before_shutdown: list[Callable[[], None]] = []  # what must end while the process group still stands


def shutdown() -> None:
    """Leave the process group, so that torchrun ends without a warning."""
    if td.is_initialized():
        td.barrier()
    while before_shutdown:
        before_shutdown.pop()()
    if td.is_initialized():
        td.destroy_process_group()


def all_sum(values: Tensor, dist: Dist) -> Tensor:
    """Sum a tensor over ranks, out of place."""
    total = values.detach().clone().to(dist.device)
    td.all_reduce(total)
    return total


def gather(values: list, dist: Dist) -> list:
    """One value per problem of this rank -> one per problem of the step, in the order in which draw drew them (collective)."""
    parts: list = [None] * dist.world_size
    td.all_gather_object(parts, values)
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]


def print0(*args: object) -> None:
    """Print on rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, flush=True)


def fail(sentence: str) -> None:
    """End the run with one sentence that says what is wrong and where, once for all ranks."""
    raise SystemExit(f"error: {sentence}" if int(os.environ.get("RANK", 0)) == 0 else 1)


# ----------------------------------------------------------------------------------------------------------------------
# Policy
# ----------------------------------------------------------------------------------------------------------------------


def resolve_model(name: str) -> str:
    """`tiny` is the bundled folder, a bare hub name means the Qwen organisation, a folder stays a folder."""
    if name == "tiny":
        return str(ROOT / "tiny")
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1:
        fail(f"--model {name}: there is no such folder")
    return name if "/" in name else f"Qwen/{name}"


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name; it must know its EOS token."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(name))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        fail(f"--model {name}: no tokenizer could be loaded from {resolve_model(name)} ({first_line(error)})")
    if tokenizer.eos_token_id is None or not tokenizer("1+1", add_special_tokens=False).input_ids:
        fail(f"--model {name}: {resolve_model(name)} has no tokenizer that knows text and an EOS token")
    return tokenizer


CONTEXT = {"rope_theta": 0.0, "max_positions": 0}  # what --rope_theta and --max_positions ask of every model that is loaded


def stretch(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The model's config with another rotary base and window where the flags ask for it; the exported model keeps both."""
    if CONTEXT["rope_theta"]:
        if not getattr(config, "rope_parameters", None):
            fail(f"--rope_theta: {config.model_type} has no rotary position embedding")
        config.rope_parameters = config.rope_parameters | {"rope_theta": CONTEXT["rope_theta"]}
    if CONTEXT["max_positions"]:
        config.max_position_embeddings = CONTEXT["max_positions"]
    return config


def load_model(name: str, dtype: torch.dtype, attention: str) -> transformers.PreTrainedModel:
    """A Hugging Face causal LM on the CPU, dropout off."""
    try:
        folder = resolve_model(name)
        config = stretch(transformers.AutoConfig.from_pretrained(folder, attention_dropout=0.0))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError) as error:
        fail(f"--model {name}: no model could be loaded from {resolve_model(name)} ({first_line(error)})")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head size)
    key: Tensor,  # (1, key heads, tokens, head size)
    value: Tensor,  # (1, key heads, tokens, head size)
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seqlens: Tensor | None = None,  # (rows + 1,) int32, where each row starts in the packed line
    row_lengths: list[int] | None = None,
    **features: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each row of a packed line. varlen_attn on CUDA, one causal SDPA per row on CPU.

    A feature that is not implemented here is refused, never ignored.
    """
    ignored = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits", "position_embeddings"}
    for feature, setting in features.items():
        if setting is not None and feature not in ignored:
            raise NotImplementedError(f"the packed attention does not implement {feature} of {type(module).__name__}")
    if sliding_window is not None and max(row_lengths) > sliding_window:
        raise NotImplementedError(f"a row of {max(row_lengths)} tokens exceeds the sliding window of {sliding_window}")
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda:
        rows = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
        longest = max(row_lengths)
        out = varlen_attn(*rows, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)
        return out[None], None
    rows = zip(*(x.split(row_lengths, dim=2) for x in (query, key, value)), strict=True)
    out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped) for q, k, v in rows]
    return torch.cat(out, dim=2).transpose(1, 2), None


transformers.AttentionInterface.register("packed", packed_attention)
transformers.AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)


class Policy(nn.Module):
    """A Hugging Face causal LM behind one packed forward that returns log-probabilities and never whole logits."""

    def __init__(self, model: transformers.PreTrainedModel):
        super().__init__()
        for feature in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, feature, None) not in (None, 1.0):
                fail(f"{type(model).__name__} uses {feature}, which the packed forward does not implement")
        self.model = model

    def forward(
        self,
        input_ids: Tensor,  # (1, tokens) the rows one after another
        position_ids: Tensor,  # (1, tokens) restart at each row
        cu_seqlens: Tensor,  # (rows + 1,)
        row_lengths: list[int],
        predict: Tensor,  # (M,) positions whose next token is a completion token
        targets: Tensor,  # (M,) those tokens
        temperature: float,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        hidden = self.model.get_decoder()(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            cu_seqlens=cu_seqlens,
            row_lengths=row_lengths,
        ).last_hidden_state[0, predict]
        numbers = 2**26 if hidden.is_cuda else 2**22  # 256 MB of fp32 logits at a time; on a CPU what malloc keeps for the next
        chunk = max(1, numbers // self.model.config.get_text_config().vocab_size)
        parts = [
            checkpoint(self.head, h, t, temperature, entropy_grad, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprobs, entropy

    def head(self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        """(M, hidden) -> log-probability of the targets and entropy of the distribution, both (M,), at least fp32."""
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if temperature == 1 else logits / temperature
        log_z = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - log_z
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            entropy = log_z - torch.linalg.vecdot(torch.softmax(logits, -1), logits)
        return logprobs, entropy


def shard(model: transformers.PreTrainedModel, dist: Dist, checkpoint_activations: bool = False) -> Policy:
    """Wrap a model and shard it with FSDP2: each decoder layer and the root. Gradients sum over ranks.

    Parameters, gradients and Adam moments keep the model's dtype (fp32 masters); on CUDA the compute is bf16.
    """
    if checkpoint_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model).train()
    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    mixed = MixedPrecisionPolicy()
    if dist.device.type == "cuda":
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [*model.get_decoder().layers, policy]:
        fully_shard(module, mesh=mesh, mp_policy=mixed)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
    return policy


def load_policy(name: str, dist: Dist, checkpoint_activations: bool = False) -> Policy:
    """The trained (or frozen reference) policy of a model folder or hub name."""
    return shard(load_model(name, torch.float32, "packed"), dist, checkpoint_activations)


def token_logprobs(policy: Policy, batch: "Batch", temperature: float, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """log pi of every completion token and the entropy there, both (B, T) and at least fp32; 0 outside a row.

    Temperature divides the logits as in the sampler. The entropy carries a gradient only when asked to.
    """
    device = batch.completion_ids.device
    lines, predict, targets, row, column, start = [], [], [], [], [], 0
    for b, (prompt, length) in enumerate(zip(batch.prompt_ids, batch.lengths, strict=True)):
        completion = batch.completion_ids[b, :length].tolist()
        lines.append([*prompt, *completion])
        predict.extend(range(start + len(prompt) - 1, start + len(prompt) + length - 1))
        targets.extend(completion)
        row.extend([b] * length)
        column.extend(range(length))
        start += len(prompt) + length
    row_lengths = [len(line) for line in lines]

    def tensor(values: list[int], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    logprobs, entropy = policy(
        tensor([token for line in lines for token in line])[None],
        tensor([p for length in row_lengths for p in range(length)])[None],
        tensor([0, *np.cumsum(row_lengths).tolist()], torch.int32),
        row_lengths,
        tensor(predict),
        tensor(targets),
        temperature,
        entropy_grad,
    )
    index, empty = (tensor(row), tensor(column)), logprobs.new_zeros(batch.completion_ids.shape)
    return empty.index_put(index, logprobs), empty.index_put(index, entropy)


def reference_logprobs(reference: Policy | None, batch: "Batch", temperature: float) -> Tensor | None:
    """(B, T) of a frozen policy; None without one."""
    if reference is None:
        return None
    with torch.no_grad():
        return token_logprobs(reference, batch, temperature)[0]


def store_old_logprobs(policy: Policy, rollouts: list["Rollout"], temperature: float, max_tokens: int, dist: Dist) -> None:
    """Write the log-probabilities of the policy as it is now into the rollouts, before the first of several updates."""
    for batch in microbatches(rollouts, max_tokens, dist):
        keep_old_logprobs(batch, reference_logprobs(policy, batch, temperature))


def keep_old_logprobs(batch: "Batch", logprobs: Tensor) -> None:
    """Write log-probabilities (B, T) into the rollouts of a batch."""
    logprobs = logprobs.detach().cpu()
    for row, rollout in enumerate(batch.rollouts):
        rollout.old_logprobs = logprobs[row, : batch.lengths[row]]


def full_tensor(parameter: Tensor) -> Tensor:
    """A whole parameter from its shards (collective)."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def named_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The whole weights of a policy under their Hugging Face names, one at a time (collective)."""
    for name, parameter in policy.model.named_parameters():
        yield name, full_tensor(parameter)


@torch.no_grad()
def follow(slow: Policy, fast: Policy, decay: float = 0.0, part: str = "") -> None:
    """slow <- decay slow + (1 - decay) fast, shard by shard, for the parameters with `part` in their name."""
    for module in [*slow.modules(), *fast.modules()]:
        if isinstance(module, FSDPModule):
            module.reshard()  # a root stays gathered after a forward without a backward
    for (name, target), source in zip(slow.named_parameters(), fast.parameters(), strict=True):
        if part in name:
            target.lerp_(source, 1 - decay)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip the summed gradient to a norm over all shards (0: never clip); the norm before clipping."""
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, norm)
    return full_tensor(norm)


# ----------------------------------------------------------------------------------------------------------------------
# Problems
# ----------------------------------------------------------------------------------------------------------------------

THINK_REQUEST = (
    "Reason step by step before you answer. Write the reasoning between <think> and </think>, where you may explore, verify and "
    "correct yourself, and after it the solution, with the final answer within \\boxed{}."
)
TEMPLATES = {  # chat is the tokenizer's own; think is chat, or this where there is none, with an open <think> at the end
    "plain": "{problem}\n",
    "qwen_math": "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{{}}.<|im_end|>\n"
    "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n",
    "think": f"<|im_start|>system\n{THINK_REQUEST.replace('{}', '{{}}')}<|im_end|>\n"
    "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n<think>\n",
}
BOX_REQUEST = "\nPlease reason step by step, and put your final answer within \\boxed{}."
FIELDS = {
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "final_answer"),
    "solution": ("solution", "response", "expert"),
}


@dataclass(frozen=True)
class Problem:
    """One question. expert_ids ends with EOS; answer is a string, or {"target", "nums"} for Countdown."""

    id: str
    text: str
    prompt_ids: list[int]
    answer: str | dict
    expert_ids: list[int] | None
    thinks: bool = False  # the prompt ends with an open <think>: only what follows </think> is the answer
    step_ends: tuple[int, ...] = ()  # expert tokens up to the end of each step, where the data set has steps


def read_rows(name: str, split: str) -> list[tuple[str, dict]]:
    """(where, row) of a .jsonl, .jsonl.gz or .parquet file or of a hub data set."""
    path = Path(name)
    if path.suffix == ".parquet" and path.is_file():
        return [(f"{name}:{i + 1}", row) for i, row in enumerate(datasets.Dataset.from_parquet(name))]
    if path.is_file():
        opener = gzip.open if path.suffix == ".gz" else open
        rows = []
        with opener(path, "rt", encoding="utf-8") as file:
            for i, line in enumerate(file):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    fail(f"{name}:{i + 1} is not a JSON object ({error.msg})")
                if not isinstance(row, dict):
                    fail(f"{name}:{i + 1} is not a JSON object")
                rows.append((f"{name}:{i + 1}", row))
        return rows
    hub_name, _, part = name.partition(":")  # owner/name, or owner/name:configuration
    if name.endswith((".jsonl", ".gz", ".parquet", ".json")) or name.startswith((".", "/", "~")) or hub_name.count("/") != 1:
        fail(f"there is no data file {name}")
    try:
        parts = datasets.load_dataset(hub_name, part or None)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        fail(f"{name} is neither a file nor a data set that the hub gives ({first_line(error)})")
    chosen = split if split in parts else next(iter(parts))
    if chosen != split:
        print0(f"data {name}: there is no split {split}; {chosen} is taken")
    rows = parts[chosen]
    return [(f"{name}:{i + 1}", row) for i, row in enumerate(rows)]


def last_box(text: str) -> str | None:
    boxes = boxed(text)
    return boxes[-1] if boxes else None


def read_fields(row: dict, names: dict[str, str]) -> dict[str, object]:
    """problem, answer and solution of a row in any of the recognised schemas; a missing one is absent from the result."""
    found = {}
    for field, known in FIELDS.items():
        for name in [names[field]] if field in names else known:
            if row.get(name) is not None:
                found[field] = row[name]
                break
    if "generations" in row and not names:  # OpenR1: the first generation that was found right
        verdicts = row.get("correctness_math_verify") or row.get("correctness_llama") or []
        found["solution"] = next((text for text, right in zip(row["generations"], verdicts, strict=False) if right), None)
    elif {"deepseek_thinking_trajectory", "deepseek_attempt"} <= set(row) and not names:  # s1K-1.1
        found["answer"] = last_box(row["solution"]) or row["solution"].strip()
        found["solution"] = f"<think>\n{row['deepseek_thinking_trajectory']}\n</think>\n\n{row['deepseek_attempt']}"
    elif {"thinking_trajectories", "attempt"} <= set(row) and not names:  # s1K
        found["answer"] = last_box(row["solution"]) or row["solution"].strip()
        found["solution"] = f"<think>\n{''.join(row['thinking_trajectories'])}\n</think>\n\n{row['attempt']}"
    elif "messages" in row and not names:
        found["problem"] = [m for m in row["messages"] if m["role"] != "assistant"]
        found["solution"] = next((m["content"] for m in row["messages"] if m["role"] == "assistant"), None)
    if isinstance(row.get("target"), list) and "solution" not in found:  # LUFFY / verl
        found["solution"] = row["target"][0]["content"] if row["target"] else None
    if isinstance(row.get("reward_model"), dict) and "answer" not in found:
        found["answer"] = row["reward_model"]["ground_truth"]
    if "####" in str(found.get("answer", "")):  # GSM8K as its authors ship it
        found["solution"], found["answer"] = found["answer"], found["answer"].split("####")[-1].strip().replace(",", "")
    if isinstance(row.get("meta"), dict) and {"target", "nums"} <= set(row["meta"]):
        found["answer"] = {"target": row["meta"]["target"], "nums": row["meta"]["nums"]}
    if found.get("answer") is None and found.get("solution") and last_box(found["solution"]):
        found["answer"] = last_box(found["solution"])
    if isinstance(found.get("answer"), list) and len(found["answer"]) == 1:  # OlympiadBench
        found["answer"] = found["answer"][0]
    if not isinstance(found.get("answer", ""), (str, dict)):
        found["answer"] = str(found["answer"])
    return {field: text for field, text in found.items() if text not in (None, "", [])}


def with_box(solution: str, answer: str | dict, row: dict, thinks: bool) -> str:
    """The expert trace with its answer in a box: `#### n` becomes the box, a trace without one gets it as last line.

    After an open <think> the tag is not repeated; a trace that never closes it is the thought, but for a last line with the box.
    """
    if thinks:
        solution = solution.removeprefix("<think>").lstrip("\n")
    if boxed(answer_part(solution, thinks)):
        return solution
    body, _, last = solution.rstrip().rpartition("\n")
    if thinks and "</think>" not in solution and body and boxed(last) and not boxed(body):
        return f"{body}\n</think>\n{last}"  # the thought must not hold the answer: prefixes of it are shown
    final = row.get("answer", "") if isinstance(answer, dict) else answer
    body = solution.split("####")[0].rstrip()
    closing = "\n</think>" if thinks and "</think>" not in solution else ""
    return f"{body}{closing}\n\\boxed{{{final}}}"


def step_ends(steps: list[str], solution: str, offsets: list[tuple[int, int]]) -> tuple[int, ...]:
    """Tokens up to the end of each step of a trace; () where the steps do not open it one after the other.

    White space between two steps belongs to the first. The last step takes all the rest, the answer's box and EOS included; a step
    that ends inside a token ends after it.
    """
    starts, place = [], 0
    for step in filter(str.strip, steps):
        at = solution.find(step.strip(), place)
        if at < 0 or solution[place:at].strip():
            return ()
        starts.append(at)
        place = at + len(step.strip())
    ends = {sum(begin < start for begin, _ in offsets) for start in starts[1:]}
    return (*sorted(ends), len(offsets) + 1) if ends else ()


def render(problem: str | list[dict], tokenizer: transformers.PreTrainedTokenizerBase, template: str) -> tuple[str, list[int]]:
    """The prompt of a question as text and ids, with exactly one BOS where the tokenizer wants one."""
    if template == "chat" or (template == "think" and tokenizer.chat_template):
        messages = problem if isinstance(problem, list) else [{"role": "user", "content": problem + BOX_REQUEST}]
        if template == "think" and not isinstance(problem, list):
            messages = [{"role": "system", "content": THINK_REQUEST}, {"role": "user", "content": problem}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if template == "think" and not text.rstrip().endswith("<think>"):
            text += "<think>\n"
    else:
        question = problem if isinstance(problem, str) else problem[-1]["content"]
        text = TEMPLATES[template].format(problem=question)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    default = tokenizer("a").input_ids
    if tokenizer.bos_token_id is not None and default[:1] == [tokenizer.bos_token_id] and ids[:1] != default[:1]:
        ids = [tokenizer.bos_token_id, *ids]
    return text, ids


def choose_template(template: str, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """What auto means for a tokenizer."""
    if template == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if template != "chat" and template not in TEMPLATES:
        fail(f"--template {template} is not one of chat, {', '.join(TEMPLATES)}")
    if template == "chat" and not tokenizer.chat_template:
        fail("--template chat: this tokenizer has no chat template")
    return template


def load_problems(
    name: str,
    tokenizer: transformers.PreTrainedTokenizerBase,
    template: str = "auto",  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    columns: str = "",  # "problem=... answer=... solution=..."
    max_prompt_tokens: int = 1024,
    max_completion_tokens: int = 8192,  # an expert trace longer than this (EOS included) is dropped
    require_expert: bool = False,  # rows without a usable expert trace are dropped; else traces are not read
    split: str = "train",
) -> list[Problem]:
    """Read, render and check a data set. Every row is kept or counted under the reason for which it was dropped."""
    template = choose_template(template, tokenizer)
    names = dict(pair.split("=", 1) for pair in columns.replace("expert=", "solution=").split()) if columns else {}
    rows = read_rows(name, split)
    for column in names.values():
        if rows and column not in rows[0][1]:
            fail(f"--columns: {rows[0][0]} has no column {column!r}; it has {', '.join(rows[0][1])}")
    dropped, examples, problems, boxes_added, steps_unused, prompt_text, seen = Counter(), {}, [], 0, 0, "", set()
    parsed = [(where, row, read_fields(row, names)) for where, row in rows]
    gold_ok = iter(golds_parse([found["answer"] for _, _, found in parsed if "answer" in found]))
    for where, row, found in parsed:
        reason, expert_ids, ends = None, None, ()
        answer_ok = next(gold_ok) if "answer" in found else False
        missing = [f for f in ("problem", "answer", *(["solution"] * require_expert)) if f not in found]
        if missing:
            reason = f"no {' and no '.join(missing)}"
        elif not answer_ok:
            reason = "answer that the verifier cannot parse"
        else:
            text, prompt_ids = render(found["problem"], tokenizer, template)
            prompt_text, thinks = prompt_text or text, text.rstrip().endswith("<think>")
            if len(prompt_ids) > max_prompt_tokens:
                reason = f"prompt over {max_prompt_tokens} tokens"
        if reason is None and require_expert:
            solution = with_box(found["solution"], found["answer"], row, thinks)
            boxes_added += not boxed(found["solution"])
            encoded = tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True)
            expert_ids = [*encoded.input_ids, tokenizer.eos_token_id]
            steps = row.get("steps") or (row["meta"] if isinstance(row.get("meta"), dict) else {}).get("steps")
            if isinstance(steps, list) and all(isinstance(step, str) for step in steps):
                ends = step_ends(steps, solution, encoded.offset_mapping)
                steps_unused += not ends
            if len(expert_ids) > max_completion_tokens:
                reason = f"expert trace over {max_completion_tokens} tokens"
        if reason is None:
            row_id = str(row.get("id", where.rsplit(":", 1)[-1]))
            row_id = row_id if row_id not in seen else f"{row_id}#{where.rsplit(':', 1)[-1]}"
            seen.add(row_id)
            question = found["problem"] if isinstance(found["problem"], str) else found["problem"][-1]["content"]
            problems.append((where, Problem(row_id, question, prompt_ids, found["answer"], expert_ids, thinks, ends)))
        else:
            dropped[reason] += 1
            examples.setdefault(reason, where)
    if require_expert and problems:
        texts = [answer_part(tokenizer.decode(p.expert_ids, skip_special_tokens=True), p.thinks) for _, p in problems]
        scores, _ = verify(texts, [p.answer for _, p in problems], progress="checking expert traces")
        for (where, _), score in zip(problems, scores, strict=True):
            if score != 1:
                dropped["expert trace that the verifier rejects"] += 1
                examples.setdefault("expert trace that the verifier rejects", where)
        problems = [pair for pair, score in zip(problems, scores, strict=True) if score == 1]
    drops = "; ".join(f"{count} dropped: {reason} (first {examples[reason]})" for reason, count in dropped.items())
    print0(f"data {name}: {len(problems)} of {len(rows)} rows kept, template {template}{'; ' + drops if drops else ''}")
    if boxes_added:
        print0(f"data {name}: {boxes_added} expert traces had no \\boxed{{}}; their answer was added in one")
    if steps_unused:
        print0(f"data {name}: the steps of {steps_unused} rows do not cut their traces; lines are taken there")
    if not problems:
        fail(f"{name}: no usable row among {len(rows)}{' (' + drops + ')' if drops else ''}")
    first = problems[0][1]
    print0(f"first prompt: {prompt_text!r}")
    if require_expert:
        print0(f"first expert trace ({len(first.expert_ids)} tokens): {tokenizer.decode(first.expert_ids)!r}")
    return [problem for _, problem in problems]


def draw(problems: list[Problem], n: int, step: int, seed: int, dist: Dist) -> list[Problem]:
    """This rank's share of the n problems of a step: a pure function, so resume needs no replay.

    Every problem is seen once per epoch, each epoch in its own order; rank r takes every world_size-th problem.
    """
    chosen = []
    for position in range(step * n + dist.rank, (step + 1) * n, dist.world_size):
        epoch, place = divmod(position, len(problems))
        chosen.append(problems[int(epoch_order(len(problems), seed, epoch)[place])])
    return chosen


def share(values: list, update: int, updates: int, total: int, dist: Dist) -> list:
    """This rank's values, one a problem, that belong to one of several updates: consecutive parts of the step's `total` problems.

    By the place in the step's draw, so that an update has the same problems on any number of ranks, and every rank some of them.
    """
    return [value for i, value in enumerate(values) if (i * dist.world_size + dist.rank) * updates // total == update]


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """A completion of a problem. Its first num_expert_tokens tokens were written by the expert, the rest by the policy."""

    problem: Problem
    completion_ids: list[int]
    num_expert_tokens: int = 0
    sampler_logprobs: list[float] = dataclasses.field(default_factory=list)  # one per policy token, as the sampler saw them
    text: str = ""
    finished: bool = False  # ends with EOS; a completion that hit the length limit does not
    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: Tensor | None = None  # (completion length,), of the policy that made the batch


def expert_rollout(problem: Problem, tokenizer: transformers.PreTrainedTokenizerBase) -> Rollout:
    """The expert's whole completion, which every token of is the expert's."""
    text = tokenizer.decode(problem.expert_ids, skip_special_tokens=True)
    return Rollout(problem, problem.expert_ids, len(problem.expert_ids), text=text, finished=True)


def group_seed(seed: tuple[int, ...], problem_id: str) -> int:
    """What is sampled for a problem hangs on (seed, step, attempt) and the problem alone, not on the rest of the batch."""
    return int.from_bytes(hashlib.blake2b(repr((seed, problem_id)).encode(), digest_size=7).digest(), "big")


def load_sampler(
    kind: str,  # vllm, hf, or auto: vLLM where it is installed and a GPU is there
    name: str,
    tokenizer: transformers.PreTrainedTokenizerBase,
    dist: Dist,
    max_tokens: int,  # of prompt and completion
    memory: float,  # share of the GPU for vLLM
    tensor_parallel: int,  # ranks that share a vLLM engine
) -> "Sampler":
    """The inference engine of a run. Where `auto` chooses, it says what."""
    installed = importlib.util.find_spec("vllm") is not None
    if kind == "vllm" and not installed:
        fail("--sampler vllm: vLLM is not installed (requirements-gpu.txt has it); --sampler hf needs nothing more")
    if kind == "hf" or not installed or (kind == "auto" and dist.device.type == "cpu"):
        return Sampler(name, tokenizer, dist)
    from vllm_sampler import VLLMSampler  # noqa: PLC0415, costs seconds and gigabytes

    return VLLMSampler(name, tokenizer, dist, max_tokens, memory, tensor_parallel)


def stop_ids(tokenizer: transformers.PreTrainedTokenizerBase, generation_config: transformers.GenerationConfig) -> list[int]:
    """Tokens that end a completion: the tokenizer's EOS and the model's."""
    ids = generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({tokenizer.eos_token_id, *(i for i in ids if i is not None)})


class Sampler:
    """Generates completions from an inference copy of the weights; sharded training weights never decode.

    The back end here is transformers with a decode loop of our own, so that finished rows leave the batch; vllm_sampler.py has the
    other.
    """

    def __init__(self, name: str, tokenizer: transformers.PreTrainedTokenizerBase, dist: Dist):
        self.tokenizer, self.dist = tokenizer, dist
        dtype = torch.bfloat16 if dist.device.type == "cuda" else torch.float32
        self.model = load_model(name, dtype, "sdpa").to(dist.device).eval()
        self.model.requires_grad_(False)
        self.stop_ids = stop_ids(tokenizer, self.model.generation_config)
        self.max_batch_tokens = 2**15 if dist.device.type == "cpu" else 2**19  # tokens in the KV cache at a time

    def sleep(self) -> None:
        """Leave the device to the update; the copy of the weights stays. vLLM's sampler has more to do here."""

    @torch.no_grad()
    def sync(self, weights: Policy | Iterable[tuple[str, Tensor]]) -> None:
        """Copy the trained weights, a policy's or (name, whole tensor) pairs, into the inference copy (collective)."""
        mine = dict(self.model.named_parameters())
        for name, tensor in named_weights(weights) if isinstance(weights, Policy) else weights:
            if name not in mine:
                raise RuntimeError(f"the sampler has no parameter {name}")
            mine.pop(name).copy_(tensor)
        if mine:
            raise RuntimeError(f"parameters of the sampler were not updated: {sorted(mine)[:4]}")

    @torch.no_grad()
    def generate(
        self,
        problems: list[Problem],
        prefixes: list[list[int]] | None,  # per problem, expert tokens that open the completion
        n: int,
        max_tokens: int,  # of the whole completion, prefix included
        temperature: float,  # 0: greedy
        seed: tuple[int, ...],
        top_p: float = 1.0,
    ) -> list[list[Rollout]]:
        """n completions per problem. top_p below 1 biases the ratio, so training never passes it."""
        prefixes = check_prefixes(problems, prefixes, max_tokens)
        size = [len(p.prompt_ids) + len(prefix) for p, prefix in zip(problems, prefixes, strict=True)]
        order = sorted(range(len(problems)), key=lambda i: size[i])
        groups: list[list[Rollout]] = [[] for _ in problems]
        bar = tqdm(total=len(problems) * n, desc="rollouts", disable=None, leave=False, delay=2)
        while order:
            longest = size[order[-1]] - len(prefixes[order[-1]]) + max_tokens
            take = max(1, self.max_batch_tokens // (n * longest))
            chunk, order = order[-take:], order[:-take]
            made = self._decode(
                [problems[i] for i in chunk], [prefixes[i] for i in chunk], n, max_tokens, temperature, seed, top_p, bar
            )
            for i, group in zip(chunk, made, strict=True):
                groups[i] = group
        bar.close()
        return self.finish(groups)

    def finish(self, groups: list[list[Rollout]]) -> list[list[Rollout]]:
        """Fill in text and whether a stop token ended it."""
        for rollout in (rollout for group in groups for rollout in group):
            rollout.text = self.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
            rollout.finished = rollout.completion_ids[-1] in self.stop_ids
        return groups

    def _decode(self, problems, prefixes, n, max_tokens, temperature, seed, top_p, bar) -> list[list[Rollout]]:
        """One left-padded batch: prefill each prompt once, repeat its cache n times, decode until all rows are done."""
        device, rows = self.dist.device, len(problems) * n
        lines = [[*p.prompt_ids, *prefix] for p, prefix in zip(problems, prefixes, strict=True)]
        width = max(len(line) for line in lines)
        pad = self.tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (width - len(line)) + line for line in lines], device=device)
        mask = torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in lines], device=device)
        limit = torch.tensor([max_tokens - len(prefix) for prefix in prefixes], device=device).repeat_interleave(n)
        steps = int(limit.max())
        uniform = torch.stack(  # one number per token to come, from a generator of the problem's own
            [
                torch.rand((n, max_tokens), generator=torch.Generator().manual_seed(group_seed(seed, p.id)), dtype=torch.float64)
                for p in problems
            ]
        ).view(rows, max_tokens)
        uniform = uniform.to(device)
        cache = transformers.DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        cache.batch_repeat_interleave(n)
        logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        position = mask.sum(1)
        alive = torch.arange(rows, device=device)
        tokens = torch.zeros(rows, steps, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, steps, dtype=torch.float32, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        stop = torch.tensor(self.stop_ids, device=device)
        for t in range(steps):
            logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
            if temperature == 0:
                token = logp.argmax(-1)
            else:
                probs = (logp if top_p == 1 else nucleus(logp, top_p)).exp().double()
                cdf = probs.cumsum(-1)  # exact sampling: invert the distribution function at the row's own number
                token = torch.searchsorted(cdf, uniform[alive, t, None] * cdf[:, -1:], right=True)[:, 0]
                token = token.clamp(max=probs.shape[1] - 1)
            tokens[alive, t] = token
            logprobs[alive, t] = logp.gather(1, token[:, None])[:, 0]
            lengths[alive] = t + 1
            going = ~torch.isin(token, stop) & (limit[alive] > t + 1)
            if not going.all():
                keep = going.nonzero()[:, 0]
                bar.update(len(alive) - len(keep))
                if len(keep) == 0:
                    break
                cache.batch_select_indices(keep)
                alive, mask, token, position = alive[keep], mask[keep], token[keep], position[keep]
            mask = F.pad(mask, (0, 1), value=1)
            logits = self.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            position = position + 1
        tokens, logprobs, lengths = tokens.tolist(), logprobs.tolist(), lengths.tolist()
        groups = []
        for i, (problem, prefix) in enumerate(zip(problems, prefixes, strict=True)):
            group = []
            for r in range(i * n, (i + 1) * n):
                new = tokens[r][: lengths[r]]
                group.append(Rollout(problem, [*prefix, *new], len(prefix), logprobs[r][: lengths[r]]))
            groups.append(group)
        return groups


def check_prefixes(problems: list[Problem], prefixes: list[list[int]] | None, max_tokens: int) -> list[list[int]]:
    """One prefix per problem, empty where none are given; ValueError where one leaves no room."""
    prefixes = prefixes or [[] for _ in problems]
    if any(len(prefix) >= max_tokens for prefix in prefixes):
        raise ValueError(f"a prefix leaves no room under {max_tokens} completion tokens")
    return prefixes


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Log-probabilities (rows, V) with everything outside the smallest set of mass top_p at -inf (evaluation only)."""
    ordered, index = logp.sort(-1, descending=True)
    outside = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
    return logp.masked_fill(outside.scatter(-1, index, outside), -math.inf)


def episode_ends(problem: Problem, tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """Expert tokens up to the end of each step that the data set names, else of each line: [..., len(expert_ids)].

    Of each sentence where there are fewer than two lines. Always on a token boundary; blank lines belong to the line before.
    """
    if problem.step_ends:
        return list(problem.step_ends)
    texts = [tokenizer.decode([token]) for token in problem.expert_ids]
    ends: list[int] = []
    for mark in ("\n", ".!?\n"):
        if len(ends) < 2:
            stops = [text.rstrip(" ")[-1:] for text in texts]
            ends = [i + 1 for i, stop in enumerate(stops[:-1]) if stop and stop in mark and texts[i + 1].strip(" ") != "\n"]
            ends = [*ends, len(texts)]
    return ends


def regroup(ends: list[int], pieces: int) -> list[int]:
    """n ends -> [0, ..., ends[-1]], the ends of m = min(pieces, n) groups of near-equal count: cut i is end round(i n / m).

    Liu et al. 2025, UFT (2505.16984), official rl_dataset.py. Without an end there is only the cut 0.
    """
    kept = min(pieces, len(ends))
    return [0, *(ends[round(i * len(ends) / kept) - 1] for i in range(1, kept + 1))]


def episode_cuts(problem: Problem, tokenizer: transformers.PreTrainedTokenizerBase, pieces: int, leak_check: bool) -> list[int]:
    """Expert tokens in the first 0, 1, ..., m episodes of the trace, m <= pieces: [0, ..., len(expert_ids)].

    With leak_check the answer's text never appears before the last cut but one.
    """
    cuts = regroup(episode_ends(problem, tokenizer), pieces)
    if leak_check and isinstance(problem.answer, str):
        shown = [cut for cut in cuts[:-1] if problem.answer not in tokenizer.decode(problem.expert_ids[:cut])]
        cuts = [*shown, len(problem.expert_ids)]
    return cuts


# ----------------------------------------------------------------------------------------------------------------------
# Verifier
# ----------------------------------------------------------------------------------------------------------------------

BRACES = re.compile(r"\\boxed\{|\\(?!\\boxed\{)[\\{}]|[{}]")  # \{ and \} are characters of a set, not braces
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": "", "×": "*", "÷": "/", "−": "-"}

_pool: pebble.ProcessPool | None = None
_pool_lock = threading.Lock()


def boxed(text: str) -> list[str]:
    r"""The contents of every closed, non-empty outermost \boxed{...} in order. \fbox is not a box. One pass: samples loop."""
    opened, spans, found = [], [], []
    for token in BRACES.finditer(text):
        if token[0] in ("{", r"\boxed{"):
            opened.append(token)
        elif token[0] == "}" and opened and (start := opened.pop())[0] != "{":
            spans.append((start.end(), token.start()))
    last = -1
    for start, end in sorted(spans):
        if start > last:
            last = end
            found.append(text[start:end].strip())
    return [content for content in found if content]


def answer_part(text: str, thinks: bool) -> str:
    """What is graded: all of it, or after an open <think> what is between the first </think> and the next; nothing without."""
    return (text.split("</think>")[1:] or [""])[0] if thinks else text


def plain_integer(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 100


def countdown_correct(equation: str, target: int, nums: list[int]) -> bool:
    """Whether an equation over + - * / hits the target and uses each number exactly once. A whitelisted walk, never eval."""
    for latex, plain in LATEX.items():
        equation = equation.replace(latex, plain)
    left, equals, right = equation.partition("=")
    if len(equation) > 200 or (equals and right.strip() != str(target)) or not re.fullmatch(r"[0-9+*/() -]+", left):
        return False  # the characters keep out 0x2C, 4_4 and comments, which Python would read
    used = []

    def walk(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError(f"{type(node).__name__} is not allowed")

    try:
        value = walk(ast.parse(left.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False  # not an equation: a wrong answer, not an error of the verifier
    return value == target and sorted(used) == sorted(nums)


def parse_gold(answer: str) -> list:
    r"""math-verify reads `2^{10}`, `3\sqrt{2}` or `\$18` right only between dollars."""
    return math_verify.parse(answer if re.search(r"(?<!\\)\$", answer) else f"${answer}$", parsing_timeout=None)


def check_item(item: tuple[str, str | None]) -> bool:
    """In a worker process: (gold, prediction), or (gold, None) for whether the gold can be parsed. Gold goes first."""
    gold, prediction = item
    gold_parsed = parse_gold(gold)
    if prediction is None:
        return bool(gold_parsed)
    parsed = math_verify.parse(f"\\boxed{{{prediction}}}", parsing_timeout=None)
    return bool(math_verify.verify(gold_parsed, parsed, timeout_seconds=None))


def check_items(items: list[tuple[str, str | None]], time_limit: float, progress: str = "") -> tuple[list[bool], int]:
    """Run check_item in a pool whose tasks can be killed. A hung or crashing item is False and counts as an error."""
    global _pool
    if not items:
        return [], 0
    with _pool_lock:
        if _pool is None or not _pool.active:
            _pool = pebble.ProcessPool(max_workers=min(8, os.cpu_count() or 1), context=multiprocessing.get_context("fork"))
        futures = [_pool.schedule(check_item, args=[item], timeout=time_limit) for item in items]
    verdicts, errors = [], 0
    for future in tqdm(futures, desc=progress or "verifying", disable=None, leave=False, delay=2):
        error = future.exception()  # what a worker raised, TimeoutError where it hung, ProcessExpired where it died
        if error is not None:
            print0(f"verifier error: {first_line(error)}")
            errors += 1
        verdicts.append(error is None and future.result())
    return verdicts, errors


def close_verifier() -> None:
    """Stop the worker processes."""
    global _pool
    with _pool_lock:
        if _pool is not None:
            _pool.stop()
            _pool.join()
            _pool = None


atexit.register(close_verifier)


def golds_parse(answers: list[str | dict], time_limit: float = 5.0) -> list[bool]:
    """Whether the verifier can read each gold answer; plain integers and Countdown rows need no parser."""
    asked = [i for i, answer in enumerate(answers) if isinstance(answer, str) and not plain_integer(answer.strip())]
    verdicts, _ = check_items([(answers[i], None) for i in asked], time_limit, "parsing answers")
    readable = [True] * len(answers)
    for i, verdict in zip(asked, verdicts, strict=True):
        readable[i] = verdict
    return readable


def verify(
    texts: list[str],
    answers: list[str | dict],  # a string, or {"target", "nums"} for Countdown
    many_boxes: str = "zero",  # several different boxes: zero, or last to take the last one
    time_limit: float = 5.0,  # seconds per item
    progress: str = "",
) -> tuple[list[float], int]:
    """1.0 where the boxed answer of a text is right, else 0.0; and the number of verifier errors.

    A box is required. Equal strings and plain integers are decided here; everything else goes through math-verify in a
    process pool.
    """
    scores, asked = [0.0] * len(texts), []
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        boxes = boxed(text)
        if not boxes or (len(set(boxes)) > 1 and many_boxes == "zero"):
            continue
        box = boxes[-1]
        if isinstance(answer, dict):
            scores[i] = float(countdown_correct(box, answer["target"], answer["nums"]))
        elif box == answer.strip():
            scores[i] = 1.0
        elif plain_integer(box) and plain_integer(answer.strip()):
            scores[i] = float(int(box) == int(answer))
        else:
            asked.append((i, answer, box))
    verdicts, errors = check_items([(answer, box) for _, answer, box in asked], time_limit, progress)
    for (i, _, _), verdict in zip(asked, verdicts, strict=True):
        scores[i] = float(verdict)
    return scores, errors


def score(groups: list[list[Rollout]]) -> int:
    """Write the verifier's reward into every rollout; the number of verifier errors."""
    flat = [rollout for group in groups for rollout in group]
    rewards, errors = verify([answer_part(r.text, r.problem.thinks) for r in flat], [r.problem.answer for r in flat])
    for rollout, reward in zip(flat, rewards, strict=True):
        rollout.reward = reward
    return errors


def evaluate(
    sampler: Sampler,
    problems: list[Problem],
    n: int,  # samples per problem
    max_tokens: int,
    temperature: float,
    seed: int,
    dist: Dist,
) -> float:
    """Mean reward over all problems and samples, over ranks. The same samples at every call: only the weights differ."""
    groups = sampler.generate(problems[dist.rank :: dist.world_size], None, n, max_tokens, temperature, (seed, -1))
    score(groups)
    rewards = [rollout.reward for group in groups for rollout in group]
    total, count = all_sum(torch.tensor([sum(rewards), len(rewards)], dtype=torch.float64), dist).tolist()
    return total / count


# ----------------------------------------------------------------------------------------------------------------------
# Formulas
# ----------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale_by_std: bool) -> Tensor:
    """A[p, i] = R[p, i] - mean_i R[p, i], divided by the group's unbiased std + 1e-6 on request. (P, N) -> (P, N).

    A group with equal rewards, or of one row, has advantage exactly 0.
    Shao et al. 2024 (2402.03300) section 4.1.2 with std; Liu et al. 2025 (2503.20783, Dr.GRPO) without.
    """
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale_by_std and rewards.shape[1] > 1:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    return torch.where(constant, 0.0, advantages)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) and where the clip took the gradient away, both (B, T).

    A negative bound switches that side off. Schulman et al. 2017 (1707.06347) eq. 7; two bounds: DAPO (2503.14476) eq. 10.
    """
    low = 1 - clip_low if clip_low >= 0 else -math.inf
    high = 1 + clip_high if clip_high >= 0 else math.inf
    plain, clipped = ratio * advantages, ratio.clamp(low, high) * advantages
    return torch.minimum(plain, clipped), (clipped < plain)


def truncated_importance(old_logprobs: Tensor, batch: "Batch", cap: float, log: "RunLog") -> Tensor:
    """min(pi_old / pi_sampler, cap) on policy tokens, (B, T), constant; 1 on expert tokens and everywhere at cap 0.

    The sampler computes in another engine or precision, so its samples are slightly off-policy. Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"; verl #2953. The mismatch is logged at any cap.
    """
    sampled = batch.completion_mask & ~batch.expert_mask
    ratio = torch.where(sampled, old_logprobs.detach() - batch.sampler_logprobs, 0.0).exp()
    log.add_mean("sampler_ratio", ratio[sampled].tolist())
    log.add_mean("sampler_ratio_off", ((ratio[sampled] - 1).abs() > 0.1).tolist())
    log.add_max(sampler_ratio_max=ratio[sampled].max().item() if sampled.any() else 0.0)
    return ratio.clamp(max=cap) if cap else torch.ones_like(ratio)


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the sampled token, (B, T). Schulman 2020, "Approximating KL".

    k1 = log_ratio, k2 = log_ratio^2 / 2, k3 = exp(-log_ratio) - 1 + log_ratio, log_ratio = logprobs - ref_logprobs.
    Differentiated as a loss on samples of the policy, k2 has the gradient of the reverse KL, k3 that of the forward KL, and
    k1 has none in expectation; k1 therefore keeps its value and takes k2's gradient.
    """
    log_ratio = logprobs - ref_logprobs
    k2 = log_ratio.square() / 2
    if estimator == "k1":
        return log_ratio.detach() + k2 - k2.detach()
    return k2 if estimator == "k2" else torch.exp(-log_ratio) - 1 + log_ratio


# ----------------------------------------------------------------------------------------------------------------------
# Packing
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """A micro-batch. The (B, T) tensors are on the completion axis; columns past a row's length are 0 and masked."""

    rollouts: list[Rollout]
    prompt_ids: list[list[int]]
    lengths: list[int]  # completion tokens of each row
    completion_ids: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T) bool; all False in a filler row
    expert_mask: Tensor  # (B, T) bool; tokens that the expert wrote
    old_logprobs: Tensor | None  # (B, T), of the policy that made the batch
    sampler_logprobs: Tensor  # (B, T), as the sampler saw its tokens; 0 on expert tokens
    rewards: Tensor  # (B,)
    advantages: Tensor  # (B,)


def make_batch(rollouts: list[Rollout], dist: Dist, filler: bool = False) -> Batch:
    """Rows to tensors on the device. A filler has a row, so that every rank runs the same collectives, but no weight."""
    lengths = [len(r.completion_ids) for r in rollouts]
    if min(lengths) == 0 or min(len(r.problem.prompt_ids) for r in rollouts) == 0:
        raise ValueError("a row needs at least one prompt token and one completion token")

    def pad(rows: list, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(len(rows), max(lengths), dtype=dtype)
        for b, row in enumerate(rows):
            out[b, : len(row)] = torch.as_tensor(row, dtype=dtype)
        return out.to(dist.device)

    has_old = all(r.old_logprobs is not None for r in rollouts)
    return Batch(
        rollouts=rollouts,
        prompt_ids=[r.problem.prompt_ids for r in rollouts],
        lengths=lengths,
        completion_ids=pad([r.completion_ids for r in rollouts], torch.long),
        completion_mask=pad([[not filler] * length for length in lengths], torch.bool),
        expert_mask=pad([[True] * r.num_expert_tokens for r in rollouts], torch.bool),
        old_logprobs=pad([r.old_logprobs for r in rollouts], torch.float32) if has_old else None,
        sampler_logprobs=pad([[0.0] * r.num_expert_tokens + r.sampler_logprobs for r in rollouts], torch.float32),
        rewards=torch.tensor([r.reward for r in rollouts], dtype=torch.float32, device=dist.device),
        advantages=torch.tensor([r.advantage for r in rollouts], dtype=torch.float32, device=dist.device),
    )


def microbatches(rollouts: list[Rollout], max_tokens: int, dist: Dist) -> list[Batch]:
    """Rows sorted by length and filled up to a budget of prompt + completion tokens, the same count on every rank.

    A rank with fewer gets zero-weight fillers; when no rank has a row there is no micro-batch at all.
    """
    filled, used = [], 0
    for rollout in sorted(rollouts, key=lambda r: len(r.problem.prompt_ids) + len(r.completion_ids)):
        size = len(rollout.problem.prompt_ids) + len(rollout.completion_ids)
        if not filled or used + size > max_tokens:
            filled, used = [*filled, []], 0
        filled[-1].append(rollout)
        used += size
    count = torch.tensor(len(filled), device=dist.device)
    td.all_reduce(count, op=td.ReduceOp.MAX)
    blank = Rollout(Problem("filler", "", [0], "", None), [0])
    batches = [make_batch(rows, dist) for rows in filled]
    return batches + [make_batch([blank], dist, filler=True) for _ in range(int(count) - len(filled))]


def count_tokens(rollouts: list[Rollout], dist: Dist) -> tuple[int, int, int]:
    """(policy tokens, expert tokens, rows) of an optimizer step, over all ranks: the denominators of the losses."""
    expert = sum(r.num_expert_tokens for r in rollouts)
    total = sum(len(r.completion_ids) for r in rollouts)
    policy, expert, rows = all_sum(torch.tensor([total - expert, expert, len(rollouts)]), dist).tolist()
    return policy, expert, rows


# ----------------------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------------------


def parse(config: type) -> object:
    """The command line. Defaults come from the Config, then the model folder's settings.json, or from the run to resume.

    Explicit flags win. Paths in settings.json are relative to that folder.
    """
    doc = sys.modules[config.__module__].__doc__
    flags = tyro.cli(config, description=doc)
    fields = {field.name for field in dataclasses.fields(config)}
    if getattr(flags, "resume", ""):
        path = Path(flags.resume) / "config.json"
        if not path.is_file():
            fail(f"--resume {flags.resume}: there is no run to resume, {path} is missing")
        taken = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text())["flags"].items() if k in fields}
        taken |= {"out": flags.resume, "resume": flags.resume}
    else:
        folder = Path(resolve_model(flags.model))
        path = folder / "settings.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        settings |= settings.pop(Path(sys.argv[0]).stem, {})  # a section of the script's own
        taken = {k: v for k, v in settings.items() if k in fields}
        for key in ("data", "test_data"):
            if key in taken:
                taken[key] = str(folder / taken[key])
    cfg = tyro.cli(config, default=config(**taken), description=doc)
    used = {k: v for k, v in taken.items() if getattr(cfg, k) == v and k not in ("data", "test_data")}
    if used and not getattr(flags, "resume", ""):
        print0(f"defaults of {path.parent.name}/settings.json: " + " ".join(f"--{k} {v}" for k, v in used.items()))
    CONTEXT.update({k: getattr(cfg, k) for k in CONTEXT if k in fields})
    return cfg


class RunLog:
    """One line per step on the terminal, metrics.jsonl and samples.jsonl in the run's folder, wandb on request."""

    def __init__(self, cfg: object, script: str, dist: Dist):
        self.dist, self.cfg, self.sums, self.seconds = dist, cfg, defaultdict(float), defaultdict(float)
        self.maxima: dict[str, float] = {}
        name = f"{Path(script).stem}-{Path(cfg.model).name}-{time.strftime('%m%d-%H%M%S')}"
        out = [str(Path(cfg.out or ROOT / "runs" / name))]
        td.broadcast_object_list(out, 0)  # all ranks agree on the time in the name
        self.out, self.stop, self.wandb = Path(out[0]), False, None
        if not cfg.resume and (self.out / "metrics.jsonl").exists():
            fail(f"--out {self.out} already holds a run; continue it with --resume {self.out} or choose another folder")
        for name in (signal.SIGTERM, signal.SIGINT):
            if threading.current_thread() is threading.main_thread():
                signal.signal(name, lambda *_: setattr(self, "stop", True))
        if dist.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            if not cfg.resume:
                for source in (Path(script), ROOT / "common.py"):
                    shutil.copy(source, self.out / source.name)
                write_atomic(self.out / "config.json", json.dumps(describe_run(cfg), indent=1))
            if cfg.wandb:
                import wandb  # noqa: PLC0415, the one optional package

                self.wandb = wandb.init(project="sft-rl", name=self.out.name, config=dataclasses.asdict(cfg))
        print0(f"run {self.out} on {dist.world_size} x {dist.device.type}")

    def rewind(self, step: int) -> None:
        """Forget what a killed run wrote after its last checkpoint, so that the resumed run writes it again."""
        for name in ("metrics.jsonl", "samples.jsonl") if self.dist.rank == 0 else ():
            path = self.out / name
            if path.exists():
                whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                write_atomic(path, "".join(line for line in whole if json.loads(line)["step"] < step))

    @contextlib.contextmanager
    def timer(self, phase: str):
        """Count the seconds of a phase of the step under seconds_<phase>."""
        start = time.perf_counter()
        yield
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start

    def add(self, **terms: Tensor | float) -> None:
        """Add to sums that are summed over ranks at the end of the step."""
        for name, term in terms.items():
            self.sums[name] = self.sums[name] + (term.detach() if isinstance(term, Tensor) else term)

    def add_max(self, **values: float) -> None:
        """Keep the largest value of the step over all ranks."""
        for name, value in values.items():
            self.maxima[name] = max(value, self.maxima.get(name, value))

    def add_mean(self, name: str, values: list[float]) -> None:
        """Add to a mean over all values of all ranks; absent from the line when there were none."""
        self.add(**{f"{name}/sum": float(sum(values)), f"{name}/count": len(values)})

    def add_rollouts(self, groups: list[list[Rollout]]) -> None:
        """The sums behind reward, solved shares, lengths and truncation."""
        rows, right = [r for group in groups for r in group], [sum(r.reward for r in group) for group in groups]
        self.add_mean("groups_mixed", [len({r.reward for r in group}) > 1 for group in groups])
        self.add_mean("groups_solved", [s == len(group) for s, group in zip(right, groups, strict=True)])
        self.add_mean("groups_failed", [s == 0 for s in right])
        self.add_mean("reward", [r.reward for r in rows])
        self.add_mean("completion_tokens", [len(r.completion_ids) for r in rows])
        self.add_mean("truncated", [not r.finished for r in rows])

    def step(self, step: int, groups: list[list[Rollout]], **values: float) -> None:
        """Reduce over ranks, print, append one line to metrics.jsonl and two rollouts to samples.jsonl (collective)."""
        gathered: list = [None] * self.dist.world_size
        td.all_gather_object(gathered, ({name: float(value) for name, value in self.sums.items()}, self.maxima))
        names = sorted({name for sums, _ in gathered for name in sums})
        total = {name: sum(sums.get(name, 0.0) for sums, _ in gathered) for name in names}
        for name in sorted({name for _, maxima in gathered for name in maxima}):
            total[name] = max(maxima[name] for _, maxima in gathered if name in maxima)
        tokens = total.get("completion_tokens/sum", 0.0)
        for name in [name.removesuffix("/count") for name in names if name.endswith("/count")]:
            total_sum, count = total.pop(f"{name}/sum"), total.pop(f"{name}/count")
            if count:
                total[name] = total_sum / count
        line = {"step": step, "loss": 0.0, **total, **values}  # no loss was added when every group was left out
        line |= {f"seconds_{phase}": round(seconds, 4) for phase, seconds in self.seconds.items()}
        if self.seconds.get("update"):
            line["tokens_per_second_update"] = round(tokens / self.seconds["update"], 1)
        if self.seconds.get("rollouts"):
            line["tokens_per_second_rollouts"] = round(tokens / self.seconds["rollouts"], 1)
        line["peak_memory_mb"] = round(peak_memory_mb(self.dist.device))
        if self.dist.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            with open(self.out / "samples.jsonl", "a") as file:
                for r in [r for group in groups[:1] for r in (group[0], group[-1])]:
                    sample = {"step": step, "id": r.problem.id, "problem": r.problem.text, "completion": r.text}
                    sample |= {"reward": r.reward, "expert_tokens": r.num_expert_tokens, "tokens": len(r.completion_ids)}
                    file.write(json.dumps(sample) + "\n")
            if self.wandb:
                self.wandb.log(line, step=step)
        self.print_line(line)
        self.sums.clear()
        self.maxima.clear()
        self.seconds.clear()

    def print_line(self, line: dict[str, float]) -> None:
        """step 12/500 | reward .412 | ... with every column at a fixed width."""
        shown = [f"step {line['step']:>4}/{self.cfg.steps}"]
        if "groups_mixed" in line:
            shown.append(
                f"reward {line['reward']:.3f} | mixed {line['groups_mixed']:.2f} solved {line['groups_solved']:.2f} "
                f"failed {line['groups_failed']:.2f}"
            )
        shown.append(f"len {line['completion_tokens']:6.1f}" + (f" cut {line['truncated']:.2f}" if "truncated" in line else ""))
        entropy = f"entropy {line['entropy']:.3f}" if "entropy" in line else "no row to train on"
        shown.append(f"loss {line['loss']:+.4f} {entropy} grad {line['grad_norm']:.3f}")
        seconds = " ".join(f"{k[8:]} {v:.1f}s" for k, v in line.items() if k.startswith("seconds_"))
        shown.append(f"{seconds} {line['peak_memory_mb']} MB")
        if "test_accuracy" in line:
            shown.append(f"test accuracy {line['test_accuracy']:.3f}")
        print0(" | ".join(shown))

    def last(self, step: int, values: dict[str, float]) -> None:
        """The line of a finished run: the test accuracy of the final policy."""
        if self.dist.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        print0(f"step {step:>4}/{self.cfg.steps} | done" + "".join(f" | {k.replace('_', ' ')} {v:.3f}" for k, v in values.items()))

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop with Ctrl-C or SIGTERM (collective)."""
        return bool(all_sum(torch.tensor(float(self.stop)), self.dist).item())


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of the device, or the resident peak of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # noqa: PLC0415, not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def describe_run(cfg: object) -> dict:
    """Everything needed to make a run again: flags, command, commit, versions, hardware, hash of the data."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    data = Path(cfg.data)
    return {
        "flags": dataclasses.asdict(cfg),
        "argv": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores",
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest() if data.is_file() else None,
    }


State = dict[str, nn.Module | tuple[nn.Module, torch.optim.Optimizer]]  # what a checkpoint holds: modules and (module, optimizer)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def collect(state: State) -> dict[str, dict]:
    """The tensors of every entry of a run's state, sharded, under names that do not depend on the number of ranks."""
    return {
        name: get_optimizer_state_dict(*entry) if isinstance(entry, tuple) else get_model_state_dict(entry)
        for name, entry in state.items()
    }


def save(log: RunLog, step: int, state: State, keep: int, **extra: object) -> None:
    """Checkpoint to checkpoints/<step>: written aside, renamed when complete, the last `keep` kept (collective).

    step is the next step to run; extra is the method's own state, as JSON.
    """
    folder = log.out / "checkpoints" / f"{step:08d}"
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists():
        return
    if log.dist.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    td.barrier()
    dcp.save(collect(state), checkpoint_id=partial)
    td.barrier()
    if log.dist.rank == 0:
        (partial / "state.json").write_text(json.dumps({"step": step, **extra}))
        os.replace(partial, folder)
        for old in complete_checkpoints(log.out)[:-keep]:
            shutil.rmtree(old)
    td.barrier()


def complete_checkpoints(out: Path) -> list[Path]:
    return sorted(f for f in (out / "checkpoints").glob("*") if f.suffix != ".partial")


def resume(log: RunLog, state: State) -> tuple[int, dict]:
    """Load the newest complete checkpoint of the run, on any number of ranks; (next step, the method's own state).

    Without a checkpoint (a new run, or one killed before its first) the run starts at step 0.
    """
    found = complete_checkpoints(log.out) if log.cfg.resume else []
    extra = {"step": 0}
    if found:
        loaded = collect(state)
        dcp.load(loaded, checkpoint_id=found[-1])
        for name, entry in state.items():
            if isinstance(entry, tuple):
                set_optimizer_state_dict(*entry, optim_state_dict=loaded[name])
            else:
                set_model_state_dict(entry, loaded[name])
        extra = json.loads((found[-1] / "state.json").read_text())
    if log.cfg.resume:
        print0(f"resuming {log.out} at step {extra['step']}{'' if found else ' (it has no checkpoint yet)'}")
        log.rewind(extra["step"])
        td.barrier()
    return extra["step"], extra


def finish(
    log: RunLog,
    step: int,
    values: dict[str, float],
    policy: Policy,
    tokenizer: transformers.PreTrainedTokenizerBase,
    source: str,  # the model that the run started from
    weights: Iterable[tuple[str, Tensor]] | None = None,  # what to export where it is not the policy as it is
) -> None:
    """End a run: the last line and the exported model, or how to go on after a signal (collective)."""
    if step == log.cfg.steps:
        log.last(step, values)
        export(log, policy, tokenizer, source, weights or named_weights(policy))
    else:
        print0(f"stopped at step {step}; continue with --resume {log.out}")
    shutdown()


def export(
    log: RunLog,
    policy: Policy,
    tokenizer: transformers.PreTrainedTokenizerBase,
    source: str,
    weights: Iterable[tuple[str, Tensor]],
) -> None:
    """The trained model as a Hugging Face folder at final/, with the settings.json of the model it came from (collective)."""
    weights = {name: tensor.cpu().clone() for name, tensor in weights}
    if log.dist.rank == 0:
        final = log.out / "final"
        policy.model.save_pretrained(final, state_dict=weights)
        tokenizer.save_pretrained(final)
        settings = Path(resolve_model(source)) / "settings.json"
        kept = json.loads(settings.read_text()) if settings.is_file() else {}
        kept |= {"template": log.cfg.template} if log.cfg.template != "auto" else {}  # eval.py and a next stage ask the same way
        if kept:
            for section in (kept, *(value for value in kept.values() if isinstance(value, dict))):
                section |= {k: str((settings.parent / section[k]).resolve()) for k in ("data", "test_data") if k in section}
            (final / "settings.json").write_text(json.dumps(kept, indent=1) + "\n")
    td.barrier()
    print0(f"the trained model is in {log.out / 'final'}")
