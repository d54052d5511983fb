"""The policy: any Hugging Face causal LM behind one packed forward, sharded with FSDP2."""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import peft
import torch
import torch.distributed as dist
import transformers
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from core.config import RunConfig, resolve_model
from core.memory import announce
from core.packing import Rows, lay_out
from core.processes import World, all_sum, fail, first_line, print0

Tokenizer = transformers.PreTrainedTokenizerBase
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# Loading ------------------------------------------------------------------------------------------
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model folder or hub name; it must know its EOS token."""
    folder = resolve_model(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        fail(f"--model {name}: no tokenizer could be loaded from {folder} ({first_line(error)})")
    if tokenizer.eos_token_id is None or not tokenizer("1+1", add_special_tokens=False).input_ids:
        fail(f"--model {name}: {folder} has no tokenizer that knows text and an EOS token")
    return tokenizer


def load_config(run: RunConfig) -> transformers.PretrainedConfig:
    """The model's config, with the rotary base and window of the flags; `final/` keeps both."""
    folder = resolve_model(run.model)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"--model {run.model}: no model could be loaded from {folder} ({first_line(error)})")
    for part in (config, config.get_text_config()):  # nothing is random but the sampling
        noise = [k for k, v in vars(part).items() if isinstance(v, float) and ("drop" in k or "jitter" in k)]
        vars(part).update(dict.fromkeys(noise, 0.0))
    if run.rope_theta:
        if not getattr(config, "rope_parameters", None):
            fail(f"--rope_theta: {config.model_type} has no rotary position embedding")
        config.rope_parameters = config.rope_parameters | {"rope_theta": run.rope_theta}
    if run.max_positions:
        config.max_position_embeddings = run.max_positions
    return config


def window(run: RunConfig) -> float:
    """Positions of the model, by the flags or its config; infinite where it names none."""
    config = load_config(run)
    known = (getattr(part, "max_position_embeddings", None) for part in (config, config.get_text_config()))
    positions, rope = next(filter(None, known), float("inf")), getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # further on the longest row chooses the table of those beside it
        return min(positions, rope["original_max_position_embeddings"])
    return positions


def load_model(run: RunConfig, dtype=torch.float32, attention="packed", empty=False) -> transformers.PreTrainedModel:
    """A Hugging Face causal LM on the CPU; empty: its shapes alone, on the meta device. packed: to
    be trained, with --lora_rank. sdpa: or eager, where it has no other that is right.
    """
    folder, config = resolve_model(run.model), load_config(run)
    if attention == "sdpa":  # which would leave out a soft cap without a word
        attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
    options = {"config": config, "dtype": dtype, "attn_implementation": attention}
    try:
        if empty:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(**options)
        else:
            options |= {"use_safetensors": True, "trust_remote_code": False}  # nothing of a folder is run
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"--model {run.model}: no model could be loaded from {folder} ({first_line(error)})")
    except KeyError:  # of a table of its own
        fail(f"--model {run.model}: {config.model_type} lets nobody replace its attention, so rows cannot be packed")
    if broken := "" if empty else broken_weight(model):
        fail(f"--model {run.model}: the weight {broken} in {folder} holds a number that is not finite")
    return add_lora(model, run) if attention == "packed" and run.lora_rank else model


def broken_weight(model: nn.Module) -> str:
    """The first weight with a number that is not finite, as far as this rank holds it, or ""."""
    local = ((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in model.named_parameters())
    return next((name for name, p in local if not p.isfinite().all()), "")


def frozen_bits(model: nn.Module, world: World) -> int:
    """The sum of the bits of all frozen weights, alike on any number of ranks (collective)."""
    frozen = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if not p.requires_grad)
    bits = (local.float().view(torch.int32).sum(dtype=torch.int64) for local in frozen)
    return int(all_sum(sum(bits, torch.zeros((), dtype=torch.int64, device=world.device)), world))


def load_policy(run: RunConfig, world: World, dtype=torch.float32) -> "Policy":
    """The model of a run, sharded; rank 0 alone reads its files and holds it whole (collective)."""
    if dtype == torch.float32:  # what is trained
        announce(run, load_config(run), world)
    policy = shard(load_model(run, dtype, empty=world.rank > 0), world, run.checkpoint_activations)
    check_packing(policy, run.model, world.device)
    return policy


def load_reference(run: RunConfig, policy: "Policy", world: World) -> Callable:
    """What is called as the policy, but frozen at the model of a run: the policy itself with LoRA
    off where no more is trained, else a copy, on CUDA in bf16, as which it computes (collective).
    """
    if lora_weights(policy) and policy.model.name_or_path == resolve_model(run.model):
        return partial(without_lora, policy)
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    return load_policy(replace(run, lora_rank=0), world, dtype).requires_grad_(False)


LIMITS = {"cpu": 1e-3, "cuda": 0.25}  # nats a token in fp32 and bf16, ten and three times what rounding makes


def judge(found: Tensor, wanted: Tensor, what: str) -> None:
    """Print the mean distance of log-probabilities, or end the run where it is not rounding."""
    gap, limit = (found - wanted).abs().mean().item(), LIMITS[found.device.type]
    print0(f"log-probability check: {gap:.0e} between {what}")
    if not gap <= limit:  # NaN too
        fail(f"log-probabilities of {what} are {gap:.2g} nats apart, more than {limit:g}: it cannot be trained here")


def packed_logprobs(policy: "Policy", rows: list[list[int]], device: torch.device, shared: list[int] = ()) -> Tensor:
    """log pi of every token of each row but its first, from one packed line (collective)."""
    return policy(*lay_out([(row[:1], row[1:]) for row in rows], device, shared)[0], 1.0, False)[0]


@torch.no_grad()
def check_packing(policy: "Policy", name: str, device: torch.device) -> None:
    """Three short rows packed, of which one shares its first tokens with another, beside each alone
    by transformers' own forward (collective).
    """
    model, alone = policy.model, []
    ids = [i % model.config.get_text_config().vocab_size for i in range(5, 173, 7)]
    rows = [ids[:9], ids[9:], ids[9:16] + ids[:5]]
    try:
        packed = packed_logprobs(policy, rows, device, [0, 0, 7])
        policy.eval().unshard()
        model.set_attn_implementation("eager")
        for row in (torch.tensor(ids, device=device) for ids in rows):
            logp = model(input_ids=row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            alone.append(logp.gather(1, row[1:, None])[:, 0])
        model.set_attn_implementation("packed")
        policy.train().reshard()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        fail(f"--model {name}: {type(model).__name__} cannot be trained here ({first_line(error)})")
    judge(packed, torch.cat(alone), f"rows of {name} packed and alone")


# The packed forward -------------------------------------------------------------------------------
def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head size)
    key: Tensor,  # (1, key heads, tokens, head size)
    value: Tensor,  # (1, key heads, tokens, head size)
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    rows: Rows | None = None,
    **features: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each row, whose last tokens are the queries: varlen_attn on CUDA
    (Ampere or newer), SDPA on a CPU, and where a model asks for more (soft caps, sinks) its own
    eager function; else NotImplementedError.
    """
    ignored = "position_ids use_cache cache_position position_embeddings output_attentions output_router_logits"
    more = [name for name, setting in features.items() if setting is not None and name not in ignored.split()]
    kind, grouped = type(module), query.shape[1] != key.shape[1]
    kernel = getattr(sys.modules[kind.__module__], "eager_attention_forward", None) if more else sdpa_attention_forward
    if rows is None or attention_mask is not None or kernel is None:
        lacks = " or ".join(["a mask of its own", "no borders of rows", *more])
        raise NotImplementedError(f"{kind.__name__} has {lacks}, which the packed attention cannot do")
    if rows.seen is not None:
        key, value = key[:, :, rows.seen], value[:, :, rows.seen]
    longest = max(rows.keys)
    window = min(sliding_window or longest, longest)
    if query.is_cuda and not more:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        ends, seen = (*rows[2:4], max(rows.queries), longest), (window - 1 if window < longest else -1, 0)
        if grouped and "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
            k, v, grouped = *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)), False
        more = {"enable_gqa": True} if grouped else {}
        return varlen_attn(q, k, v, *ends, scale=scaling, window_size=seen, **more)[None], None
    out = []
    parts = (query.split(rows.queries, dim=2), key.split(rows.keys, dim=2), value.split(rows.keys, dim=2))
    for q, k, v in zip(*parts, strict=True):
        before = k.shape[2] - q.shape[2]
        full = q.new_full((q.shape[2], k.shape[2]), -torch.inf) if more or before or k.shape[2] > window else None
        hidden = None if full is None else (full.triu(before + 1) + full.tril(before - window))[None, None]
        out.append(kernel(module, q, k, v, hidden, scaling=scaling, dropout=0.0, **features)[0])
    return torch.cat(out, dim=1), None


transformers.AttentionInterface.register("packed", packed_attention)  # without a mask function: none is made


class Fp32Logits(torch.autograd.Function):
    """hidden @ weight.T of bf16 numbers, whose sums are not rounded to bf16: that alone moves a
    log-probability by 0.01 nat, and as much the ratio between sampler and trainer.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        """(M, hidden size), (V, hidden size) -> (M, V) fp32."""
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T  # torch has the product above on CUDA alone

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of both, from products of bf16 as those of the other layers."""
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        return grad @ weight, grad.T @ hidden if ctx.needs_input_grad[1] else None


class Policy(nn.Module):
    """A Hugging Face causal LM that returns log-probabilities and never holds the whole logits."""

    def __init__(self, model: transformers.PreTrainedModel):
        super().__init__()
        name, config = type(model).__name__, model.config.get_text_config()
        if not hasattr(model.get_decoder(), "layers"):
            fail(f"{name} cannot be trained here: its layers are not in a list, by which it could be sharded")
        if other := {*(getattr(config, "layer_types", None) or [])} - {"full_attention", "sliding_attention"}:
            fail(f"{name} cannot be trained here: {' and '.join(sorted(other))} looks over the borders of packed rows")
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.model, self.scale, self.cap = model, scale, getattr(config, "final_logit_softcapping", None)

    def forward(
        self,
        input_ids: Tensor,  # (1, tokens) the rows one after another
        position_ids: Tensor,  # (1, tokens) those of each row
        rows: Rows,
        predict: Tensor,  # (K,) positions whose next token is a completion token
        targets: Tensor,  # (K,) those tokens
        source: Tensor,  # (M,) which of the K a completion token is; one may be of several rows
        temperature: float,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """(log-probability of each completion token, entropy of its distribution), both (M,)."""
        output = self.model.get_decoder()(input_ids=input_ids, position_ids=position_ids, rows=rows, use_cache=False)
        hidden = output.last_hidden_state[0, predict]
        numbers = 2**26 if hidden.is_cuda else 2**22  # of logits at a time; a CPU is slow to allocate more
        chunk = max(1, numbers // self.model.config.get_text_config().vocab_size)
        chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        parts = [checkpoint(self.head, *some, temperature, entropy_grad, use_reentrant=False) for some in chunks]
        return tuple(torch.cat(part)[source] for part in zip(*parts, strict=True))

    def head(self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        """(M, hidden size) -> as forward, at least in fp32."""
        output = self.model.get_output_embeddings()
        exact = hidden.dtype == torch.bfloat16 and type(output) is nn.Linear and output.bias is None
        logits = Fp32Logits.apply(hidden, output.weight) if exact else output(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if self.scale == 1 else logits * self.scale
        logits = self.cap * torch.tanh(logits / self.cap) if self.cap else logits
        logits = logits if temperature == 1 else logits / temperature
        log_z = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - log_z
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            entropy = log_z - torch.linalg.vecdot(torch.softmax(logits, -1), logits)
        return logprobs, entropy


# LoRA ---------------------------------------------------------------------------------------------
def add_lora(model: transformers.PreTrainedModel, run: RunConfig) -> transformers.PreTrainedModel:
    """W + (32 / rank) B A in every linear layer but the head, B = 0 at first. Hu et al. 2021
    (2106.09685), by peft; the 32 of Schulman et al. 2025, with which no rank needs its own lr.
    What is not LoRA's is frozen.
    """
    config = peft.LoraConfig("CAUSAL_LM", r=run.lora_rank, lora_alpha=32, target_modules="all-linear")
    config.base_model_name_or_path = resolve_model(run.model)
    torch.manual_seed(run.seed)  # of A: the same on every rank and in every copy
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        fail(f"--lora_rank {run.lora_rank}: peft cannot put it on {run.model} ({first_line(error)})")
    matrices = (name for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1)
    if left := [n.replace(".base_layer", "") for n in matrices if not re.search(r"\.lora_|\.base_layer\.weight$", n)]:
        fail(f"--lora_rank: {left[0]} of {run.model} is in no linear layer, so that LoRA would leave it out")
    return model


def lora_weights(policy: "Policy") -> dict[str, Tensor]:
    """What is trained, under the names of peft's files, where that is LoRA alone; else nothing."""
    trained = {name: p.detach() for name, p in policy.model.named_parameters() if p.requires_grad}
    named = {f"base_model.model.{name.replace('.default', '')}": p for name, p in trained.items()}
    return named if all(".lora_" in name for name in trained) else {}


def without_lora(policy: "Policy", *rows: object) -> tuple[Tensor, Tensor]:
    """What the policy gives with its adapter off: what it gave before the first update."""
    with rescale_adapter_scale(policy.model, 0.0):
        return policy(*rows)


# Sharding -----------------------------------------------------------------------------------------
def shard(model: transformers.PreTrainedModel, world: World, checkpoint_activations: bool = False) -> Policy:
    """Wrap a model and shard it with FSDP2, each decoder layer and the root. Gradients are summed
    over ranks. All weights and buffers are rank 0's, which hands them out one by one (collective).

    Parameters, gradients and Adam moments keep the model's dtype (fp32 masters); on CUDA the
    compute is bf16, and so is what is frozen: FSDP asks one dtype of what is trained alone.
    """
    dtypes = (torch.bfloat16, torch.float32) if world.device.type == "cuda" else ()  # of the forward, of reductions
    for parameter in (p for p in model.parameters() if dtypes and not p.requires_grad):
        parameter.data = parameter.data.to(torch.bfloat16)
    weights, buffers = model.state_dict(), dict(model.named_buffers())
    policy = Policy(model).train()
    if checkpoint_activations:
        if not model.supports_gradient_checkpointing:
            fail(f"{type(model).__name__} cannot recompute its layers: --no-checkpoint_activations")
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its new name
        enable({"use_reentrant": False})
    if world.size > 1:
        model.to("meta").tie_weights()
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in [*model.get_decoder().layers, policy]:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(*dtypes))
        module.set_gradient_divide_factor(1.0)  # losses are divided by counts over ranks: gradients add up
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
    if world.size > 1:
        policy.to_empty(device=world.device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights if world.rank == 0 else {}, options=options)
        for name, buffer in model.named_buffers():
            dist.broadcast(buffer.copy_(buffers[name]) if world.rank == 0 else buffer, 0)
    return policy


def full_tensor(parameter: Tensor) -> Tensor:
    """A whole parameter from its shards (collective)."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def named_weights(policy: Policy, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The whole weights of a policy, LoRA added, under their Hugging Face names, one at a time,
    gathered in a dtype or their own (collective).
    """
    layers = {f"{n}.base_layer.weight": m for n, m in policy.model.named_modules() if isinstance(m, LoraLayer)}
    for name, parameter in policy.model.named_parameters():
        weight = full_tensor(parameter.detach().to(dtype or parameter.dtype))
        if layer := layers.get(name):
            a, b = (full_tensor(part["default"].weight) for part in (layer.lora_A, layer.lora_B))
            weight = torch.addmm(weight.to(b.dtype), b, a, alpha=layer.scaling["default"]).to(dtype or b.dtype)
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), weight


@torch.no_grad()
def follow(slow: Policy, fast: Policy, decay: float = 0.0, part: str = "") -> None:
    """slow <- decay slow + (1 - decay) fast, for the parameters with `part` in their name."""
    for module in [*slow.modules(), *fast.modules()]:
        if isinstance(module, FSDPModule):
            module.reshard()  # a root stays gathered after a forward without a backward
    for (name, target), source in zip(slow.named_parameters(), fast.parameters(), strict=True):
        if part in name:
            target.lerp_(source, 1 - decay)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip the gradients' norm over all shards (0: never). Returns the norm before (collective)."""
    return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else torch.inf))


def set_lr(lr: float, *optimizers: torch.optim.Optimizer) -> float:
    """Give every parameter of the optimizers the learning rate of this step, and return it."""
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["lr"] = lr
    return lr
