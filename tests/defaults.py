"""Every default and where it is from: paper, official script, or ours and why.

A line is `field = value | source`. A method that does not name a field has its parent's value, and
no source that says otherwise; RUN is of all methods.
"""

RUN = """
model = 'Qwen2.5-1.5B-Instruct' | ours: one GPU is enough for it
data = 'Elliott/Openr1-Math-46k-8192' | LUFFY, ReLIFT, SRFT, HPT, Prefix-RFT, TRAPO train on it
test_data = 'HuggingFaceH4/MATH-500' | ours: in every paper's table
template = 'auto' | ours
template_args = 'date=2024-07-26' | ours: the day that Llama 3.2's template has where there is no clock
system = None | ours: the rows' own
request = '\\nPlease reason step by step, and put your final answer within \\\\boxed{}.' | Qwen2.5-Math's words
check_traces = True | ours
traces = 'required' | ours: a file that needs traces says so
columns = '' | ours
max_prompt_tokens = 1024 | train.sh of LUFFY, ReLIFT, HPT: data.max_prompt_length
seed = 0 | ours
reward = '' | ours: the verifier
solved = 1.0 | the papers' rewards are 0 and 1
reward_seconds = 5.0 | math-verify's own
sampler = 'auto' | ours
sampler_memory = 0.4 | ours: the trainer needs the rest
tensor_parallel = 1 | ours
deterministic = False | ours: with a seed a request vLLM may draw row by row
rope_theta = 0.0 | ours: the model's own
max_positions = 0 | ours: the model's own
tokens_per_microbatch = 0 | ours: 16384, half of the forks' 32768, and on a CPU 2048; no number depends on it
lora_rank = 0 | ours: all weights are trained
checkpoint_activations = True | without it 7B on 8 GPUs needs 116 GiB each
weight_decay = 0.01 | AdamW of torch and of verl
grad_clip = 1.0 | verl's actor.yaml; on another scale there, see the docstrings
out = '' | ours
resume = '' | ours
eval_every = 10 | ours
eval_samples = 1 | ours
save_every = 50 | ours
keep = 2 | ours: a torn disk leaves one
wandb_project = '' | ours
skip_nonfinite = 0 | an update that is not finite ends the run
data_hash = '' | no flag: what load_data finds
"""

GRPO = """
steps = 500 | ours: the papers' step counts are near it
problems_per_step = 128 | train.sh of LUFFY, ReLIFT, HPT
group_size = 8 | train.sh of LUFFY, ReLIFT, HPT; TRL
max_completion_tokens = 8192 | train.sh of LUFFY, ReLIFT, HPT
temperature = 1.0 | Shao 2024 and all scripts
scale_by_std = True | Shao 2024 section 4.1.2
zero_variance = 'keep' | Shao 2024: none is dropped
loss_norm = 'token' | DAPO eq. 8; Shao's sequence mean is a flag
clip_low = 0.2 | verl, TRL; Shao 2024 does not say
clip_high = 0.2 | the same
tis_cap = 2.0 | verl's threshold (off there), TRL: on; ours: on, since two engines never agree
kl_coef = 0.0 | TRL, DAPO; Shao 2024: 0.04
kl_estimator = 'k3' | Shao 2024 eq. 4
entropy_coef = 0.0 | verl's actor.yaml, TRL
lr = 1e-06 | Shao 2024; TRL
warmup_steps = 0 | train.sh of the forks
updates_per_step = 1 | Shao 2024: one update per sampling
"""

VERL = """
scale_by_std = False | {script}: algorithm.grpo_use_std False
loss_norm = 'constant' | {script}: sum / max_response_length; here also / rows
clip_low = -1.0 | {script}: the clip is off
clip_high = -1.0 | {script}: the clip is off
entropy_coef = 0.001 | {script}: entropy_coeff; on our scale 0.00026
updates_per_step = 2 | {script}: 128 questions, ppo_mini_batch_size 64
"""

METHODS = {
    "grpo": GRPO,
    "dapo": """
problems_per_step = 512 | paper section 4.1
group_size = 16 | paper section 4.1
max_completion_tokens = 20480 | paper: 16384 and a cache of 4096
resample_rounds = 10 | script: max_num_gen_batches
overlong_cache = 0.2 | paper: 4096 of 20480
overlong_coef = 0.5 | paper: 1 beside rewards of -1 and 1
zero_variance = 'drop' | paper eq. 11
clip_high = 0.28 | paper section 4.1
warmup_steps = 10 | script; paper section 4.1: 20
weight_decay = 0.1 | script
updates_per_step = 16 | paper section 4.1: 16 updates a rollout step
""",
    "sft": """
steps = 2100 | 2604.23747: three epochs of the data at 64
problems_per_step = 64 | 2604.23747
max_completion_tokens = 8192 | 2604.23747
temperature = 1.0 | ours: of the evaluation alone
lr = 5e-05 | 2604.23747
warmup = 0.1 | 2604.23747
final_lr = 0.1 | 2604.23747
model = 'Qwen2.5-1.5B' | ours: SFT starts from a base model
eval_every = 100 | ours: a step is a tenth of an online one
save_every = 500 | ours: the same
""",
    "bread": """
num_episodes = 10 | reported for the paper: K = 10
band_low = 0.0 | ours: any mixed group has a gradient; the paper's band is not known
band_high = 1.0 | the same
trigger = 'all_fail' | abstract: "when self-generated traces fail"
stop_on_first = False | readers of the paper: the shortest prefix
prefix_site = 'assistant' | ours: abstract, "complete the rest of the reasoning path"; most readers: the question
""",
    "luffy": VERL.format(script="train.sh")
    + """
expert_rows = 1 | train.sh: n_prefix 1 of 8
gamma = 0.1 | train.sh: p_div_p_0.1; paper
""",
    "srft": VERL.format(script="train_srft.sh of HPT")
    + """
expert_rows = 1 | train_srft.sh: n_prefix 1 of 8
rollouts = 'adv' | the authors' code as reported; HPT and paper: pm1
positive_coef = 0.1 | paper eq. 12
positive_entropy_sign = 1 | paper eq. 12
sft_coef = 0.5 | paper eq. 8
sft_entropy_sign = -1 | paper, HPT; the authors' code as reported: 1
entropy_scope = 'row' | mix_actor.py of HPT
gamma = 0.1 | train_srft.sh: p_div_p_0.1
""",
    "relift": VERL.format(script="train.sh")
    + """
buffer_size = 128 | train.sh: sft.train_batch_size
buffer_order = 'newest' | relift's trainer
sft_lr = 1e-06 | relift_trainer.yaml
sft_grad_clip = 1.0 | relift_trainer.yaml; on our scale 8
sft_entropy_coef = 0.001 | relift_trainer.yaml; paper's best 1e-4
shared_optimizer = False | relift's actor: two AdamW
""",
    "prefix_rft": """
hybrid_rows = 1 | paper: one of the group
prefix_high = 0.95 | paper
low_start = 0.95 | paper
low_final = 0.05 | paper
prefix_steps = 500 | paper
min_prefix_tokens = 1 | ours: not published
keep_share = 0.2 | paper: the top fifth
keep_scope = 'row' | ours: the official one depends on the packing
advantages = 'group' | paper eq. 3
scale_by_std = False | paper: dr_grpo
loss_norm = 'constant' | paper: dr_grpo
dual_clip = 3.0 | prefix_rft_trainer.yaml
entropy_coef = 0.001 | prefix_rft_trainer.yaml
updates_per_step = 2 | ours: as LUFFY's, whose data it has; not published
""",
    "uft": """
problems_per_step = 256 | train.sh
group_size = 4 | train.sh
max_completion_tokens = 1024 | train.sh: response 1024
hint_high = 0.95 | run.py; paper table 1
hint_low = 0.05 | run.py; paper table 1
hint_steps = 300 | run.py; paper table 1
hint_chunks = 5 | rl_dataset.py; paper table 1
hint_unit = 'chunk' | rl_dataset.py
schedule = 'cosine' | rl_dataset.py; paper
format_reward = 0.1 | the reward functions of the code
hint_coef = 0.001 | train.sh: sft_loss_coef
hint_norm = 'mean' | dp_actor.py; paper: sum
kl_coef = 0.001 | train.sh: kl_loss_coef
entropy_coef = 0.001 | ppo_trainer.yaml; paper: none
updates_per_step = 4 | train.sh: mini-batches of 64
""",
    "bridge": """
max_completion_tokens = 3072 | appendix as reported: about 3k
lam = 0.5 | appendix as reported
lam_schedule = 'constant' | appendix as reported; method text: linear
sft_problems_per_step = 64 | ours: not known
meta = True | paper
adapter_rank = 16 | ours: not known
adapter_alpha = 32.0 | ours: not known
adapter_lr = 0.0 | a reviewer: one rate for everything
shadow = 'one_step' | reviewers of v1 and v2
shadow_dual_clip = 3.0 | ours: without a bound the shadow runs away; verl's clip_ratio_c
lr = 5e-07 | appendix as reported
""",
    "chord": """
problems_per_step = 32 | mix_chord.yaml: 32 x 8 rows
sft_problems_per_step = 64 | mix_chord.yaml: 64 expert rows
mu_peak = 0.9 | mix_chord.yaml, comments on CHORD-mu
mu_valley = 0.05 | the same
mu_warmup = 0 | the same
mu_decay = 200 | the same
phi = False | the same
""",
    "hpt": VERL.format(script="train.sh")
    + """
gate = 0 | train.sh; 2 for Llama
sft_coef = 1.0 | train.sh; 0.3 at 1.5B
lr = 5e-06 | train.sh
skip_above = 80.0 | train.sh: max_grad_norm; on our scale 1.25
""",
    "trapo": VERL.format(script="train_trapo.sh")
    + """
problems_per_step = 8 | train_trapo.sh; paper 128
updates_per_step = 1 | train_trapo.sh: mini-batches of 8
sizes = (4, 2, 1, 1) | paper and code
shares = (0.0, 0.25, 0.5, 1.0) | mix_vllm_rollout.py; paper 0, 0.2, 0.5, 1
thresholds = (-1.0, 0.5, 0.6666666666666666, 1.0) | mix_trainer.py; paper -1, 0.5, 0.7, 0.9
sft_coef = 1.0 | paper and code
trsft_alpha = 0.1 | paper; clip_low of the code
""",
    "iw_sft": """
steps = 625 | iw_sft.sh: five epochs of 1000
problems_per_step = 8 | iw_sft.sh: one row on each of 8 GPUs
max_completion_tokens = 20000 | iw_sft.sh: block_size 22000 with the prompt
quality = False | ours: the paper's language runs have no scores
weight = 'iw' | bounding_trainers.py: sum_over_time
q = 'policy' | bounding_trainers.py
q_decay = 0.9 | main.py of the control half
reference = '' | main.py: the start model
power = 1.0 | bounding_trainers.py
weight_high = 16.0 | bounding_trainers.py
step_low = 0.2 | bounding_trainers.py
step_high = 1.8 | bounding_trainers.py
trsft_alpha = 0.1 | TRAPO
pear_gamma = 0.999 | PEAR as reported
normalize = False | bounding_trainers.py; the control half does
loss_norm = 'token' | ours: sft.py's; the official run's is sequence
lr = 1e-05 | iw_sft.sh
warmup = 0.05 | iw_sft.sh
final_lr = 0.0 | iw_sft.sh
beta2 = 0.95 | iw_sft.sh
weight_decay = 0.0001 | iw_sft.sh
""",
}


def read(text: str) -> dict[str, tuple[str, str]]:
    """field: (value as it is written, source); a later line of a field replaces an earlier one."""
    found = {}
    for line in filter(None, text.splitlines()):
        setting, _, source = line.partition(" | ")
        field, _, value = setting.partition(" = ")
        found[field] = (value, source)
    return found
