"""Which architectures of transformers can be trained: a small random model of each is loaded as a
training script would, beside transformers' own forward. tests/test_architectures.py trains them.

python results/architectures.py      the table of MANUAL.md
"""

import contextlib
import io
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # far from uniform, so that a wrong position or mask shows
    "vocab_size": 257,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": 0,
}
HEAD = {"head_dim": 16}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
MLA |= {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GEMMA = HEAD | SLIDING | {"query_pre_attn_scalar": 16}
NTK = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1}
MODELS = {  # name: (type in transformers, settings besides the sizes)
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 (dynamic NTK)": ("qwen2", {"rope_parameters": NTK, "max_position_embeddings": 64}),
    "qwen2_moe": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3": ("qwen3", HEAD | {"tie_word_embeddings": False}),
    "qwen3_moe": ("qwen3_moe", HEAD | MOE),
    "mistral": ("mistral", {"sliding_window": 6}),
    "mixtral": ("mixtral", MOE),
    "gemma": ("gemma", HEAD),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", GEMMA | {"final_logit_softcapping": 3.0}),
    "gpt_oss": ("gpt_oss", HEAD | SLIDING | MOE),
    "granite": ("granite", {"logits_scaling": 3.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", SLIDING | {"logit_scale": 0.25}),
    "phi3": ("phi3", {}),
    "phi3 (longrope)": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", SLIDING),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {"sliding_window": 6}),
    "glm4": ("glm4", HEAD),
    "deepseek_v3": ("deepseek_v3", MLA | {"first_k_dense_replace": 1}),
    "gpt_neox": ("gpt_neox", {}),
    "exaone4": ("exaone4", SLIDING),
    "seed_oss": ("seed_oss", HEAD | {"residual_dropout": 0.1}),
    "ernie4_5": ("ernie4_5", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", HEAD),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": ("gpt2", {}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {}),
    "stablelm": ("stablelm", {}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 3.0}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}),
    "falcon_h1": ("falcon_h1", MAMBA),
    "rwkv": ("rwkv", {"attention_hidden_size": 32}),
    "qwen3_next": ("qwen3_next", HEAD | MOE | {"layer_types": ["linear_attention", "full_attention"]}),
    "llama4": ("llama4_text", HEAD | MOE),
}


def small_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str | None = None):
    """A model of the table with random weights."""
    torch.manual_seed(seed)
    kind, settings = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def outcome(name: str, folder: Path, world: common.World) -> str:
    """runs, or the sentence with which a training script refuses the model."""
    small_model(name).save_pretrained(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            common.load_policy(common.RunConfig(model=str(folder)), world)
    except SystemExit as refused:
        said = str(refused).replace(str(folder), name).removeprefix("error: ").removeprefix(f"--model {name}: ")
        said = re.sub(r"^\w+ cannot be trained here[: ]*", "", said)
        return "refused: " + re.sub(r"are [\d.]+ nats apart.*", "are not the same", said)
    return "runs"


def table(world: common.World) -> str:
    """Architectures of the same outcome share a line."""
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            found.setdefault(outcome(name, Path(folder) / name, world), []).append(name)
    lines = [f"| {', '.join(names)} | {said} |" for said, names in found.items()]
    return "\n".join(["| architecture | |", "|---|---|", *lines])


if __name__ == "__main__":
    print(table(common.init(0)))
    common.shutdown()
