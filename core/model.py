"""The policy: any Hugging Face causal LM behind one packed forward, sharded with FSDP2."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from core.config import RunConfig, resolve_model
from core.processes import World, fail, first_line

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
        config = transformers.AutoConfig.from_pretrained(folder, attention_dropout=0.0, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"--model {run.model}: no model could be loaded from {folder} ({first_line(error)})")
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
    return next(filter(None, known), float("inf"))


def load_model(run: RunConfig, dtype=torch.float32, attention: str = "packed") -> transformers.PreTrainedModel:
    """A Hugging Face causal LM on the CPU, dropout off."""
    folder = resolve_model(run.model)  # of which nothing is run, neither pickle nor code
    options = {"dtype": dtype, "attn_implementation": attention, "use_safetensors": True, "trust_remote_code": False}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=load_config(run), **options)
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"--model {run.model}: no model could be loaded from {folder} ({first_line(error)})")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if broken := broken_weight(model):
        fail(f"--model {run.model}: the weight {broken} in {folder} holds a number that is not finite")
    return model


def broken_weight(model: nn.Module) -> str:
    """The first weight with a number that is not finite, as far as this rank holds it, or ""."""
    local = ((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in model.named_parameters())
    return next((name for name, p in local if not p.isfinite().all()), "")


def load_policy(run: RunConfig, world: World) -> "Policy":
    """The model of a run, sharded: the policy, or a copy that the caller freezes (collective)."""
    return shard(load_model(run), world, run.checkpoint_activations)


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
    cu_seqlens: Tensor | None = None,  # (rows + 1,) int32, where each row starts in the packed line
    row_lengths: list[int] | None = None,
    **features: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each row of a packed line: varlen_attn on CUDA, one causal SDPA per
    row on a CPU.

    varlen_attn needs an Ampere card or newer. A feature that is not implemented here is refused,
    never ignored.
    """
    ignored = "position_ids use_cache cache_position position_embeddings output_attentions output_router_logits"
    for feature, setting in features.items():
        if setting is not None and feature not in ignored.split():
            raise NotImplementedError(f"the packed attention does not implement {feature} of {type(module).__name__}")
    longest, grouped = max(row_lengths), query.shape[1] != key.shape[1]
    if sliding_window is not None and longest > sliding_window:
        raise NotImplementedError(f"a row of {longest} tokens exceeds the sliding window of {sliding_window}")
    if query.is_cuda:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        ends = (cu_seqlens, cu_seqlens, longest, longest)
        return varlen_attn(q, k, v, *ends, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)[None], None
    rows = zip(*(x.split(row_lengths, dim=2) for x in (query, key, value)), strict=True)
    flags = {"is_causal": True, "scale": scaling, "enable_gqa": grouped}
    out = [F.scaled_dot_product_attention(q, k, v, **flags) for q, k, v in rows]
    return torch.cat(out, dim=2).transpose(1, 2), None


transformers.AttentionInterface.register("packed", packed_attention)
transformers.AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)


class Policy(nn.Module):
    """A Hugging Face causal LM that returns log-probabilities and never holds the whole logits."""

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
        """(log-probability of each target, entropy of its distribution), both (M,)."""
        rows = {"cu_seqlens": cu_seqlens, "row_lengths": row_lengths, "use_cache": False}
        output = self.model.get_decoder()(input_ids=input_ids, position_ids=position_ids, **rows)
        hidden = output.last_hidden_state[0, predict]
        numbers = 2**26 if hidden.is_cuda else 2**22  # of logits at a time; a CPU is slow to allocate more
        chunk = max(1, numbers // self.model.config.get_text_config().vocab_size)
        parts = [
            checkpoint(self.head, h, t, temperature, entropy_grad, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprobs, entropy

    def head(self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        """(M, hidden size) -> as forward, at least in fp32."""
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if temperature == 1 else logits / temperature
        log_z = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - log_z
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            entropy = log_z - torch.linalg.vecdot(torch.softmax(logits, -1), logits)
        return logprobs, entropy


# Sharding -----------------------------------------------------------------------------------------
def shard(model: transformers.PreTrainedModel, world: World, checkpoint_activations: bool = False) -> Policy:
    """Wrap a model and shard it with FSDP2, each decoder layer and the root. Gradients are summed
    over ranks.

    Parameters, gradients and Adam moments keep the model's dtype (fp32 masters); on CUDA the
    compute is bf16.
    """
    if checkpoint_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model).train()
    mesh = init_device_mesh(world.device.type, (world.size,))
    mixed = MixedPrecisionPolicy()
    if world.device.type == "cuda":
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [*model.get_decoder().layers, policy]:
        fully_shard(module, mesh=mesh, mp_policy=mixed)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by counts over ranks: gradients add up
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
    return policy


def full_tensor(parameter: Tensor) -> Tensor:
    """A whole parameter from its shards (collective)."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def named_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The whole weights of a policy under their Hugging Face names, one at a time (collective)."""
    for name, parameter in policy.model.named_parameters():
        yield name, full_tensor(parameter)


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
    parameters = [p for p in parameters if p.grad is not None]
    if max_norm > 0:
        return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters]))


def set_lr(lr: float, *optimizers: torch.optim.Optimizer) -> float:
    """Give every parameter of the optimizers the learning rate of this step, and return it."""
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["lr"] = lr
    return lr
