"""Config: how settings are parsed, which mistakes are caught, and that every setting is read."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import PRESETS, SETTINGS, Config, ConfigError, config_lines, parse_config

SCRIPT = Path(train_gpt.__file__)
TREE = ast.parse(SCRIPT.read_text(encoding="utf-8"))

# Variables of shells, CI, torch, NCCL, Hugging Face, SLURM and clouds: none may be taken for a misspelt setting.
SYSTEM_NAMES = """
    PATH HOME SHELL USER LOGNAME LANG LC_ALL TERM TERM_PROGRAM COLORTERM PWD OLDPWD SHLVL TZ EDITOR PAGER DISPLAY HOSTNAME MAIL TMPDIR TEMP UID
    XDG_RUNTIME_DIR XDG_SESSION_ID DBUS_SESSION_BUS_ADDRESS SSH_CLIENT SSH_TTY SSH_AUTH_SOCK SUDO_USER DEBIAN_FRONTEND LD_LIBRARY_PATH LD_PRELOAD
    LIBRARY_PATH MANPATH CC CXX CFLAGS MAKEFLAGS MAKELEVEL MFLAGS LOG_LEVEL DEBUG VERBOSE DATA_DIR OUTPUT_DIR CACHE_DIR MODEL_NAME PYTHONPATH
    PYTHONHASHSEED PYTHONUNBUFFERED VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PIP_INDEX_URL UV_CACHE_DIR PYTEST_CURRENT_TEST COVERAGE_FILE CI
    GITHUB_ACTIONS GITHUB_RUN_ID GITHUB_SHA GITHUB_WORKSPACE RUNNER_OS GITLAB_CI CI_COMMIT_SHA CI_JOB_ID BUILD_ID JOB_NAME WORKSPACE NODE_NAME RANK
    LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT NODE_RANK NNODES
    NPROC_PER_NODE NUM_GPUS NUM_NODES TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE TORCH_HOME
    TORCH_LOGS TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_DISTRIBUTED_DEBUG TORCH_CUDA_ARCH_LIST TORCHINDUCTOR_CACHE_DIR TORCH_COMPILE_DEBUG
    PYTORCH_CUDA_ALLOC_CONF PYTORCH_ENABLE_MPS_FALLBACK TRITON_CACHE_DIR TRITON_INTERPRET CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_DEVICE_ORDER
    CUDA_DEVICE_MAX_CONNECTIONS CUDA_LAUNCH_BLOCKING CUBLAS_WORKSPACE_CONFIG NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES OMP_NUM_THREADS
    MKL_NUM_THREADS OPENBLAS_NUM_THREADS KMP_AFFINITY NCCL_DEBUG NCCL_IB_DISABLE NCCL_SOCKET_IFNAME NCCL_P2P_DISABLE NCCL_NVLS_ENABLE NCCL_VERSION
    GLOO_SOCKET_IFNAME HF_HOME HF_TOKEN HF_HUB_CACHE HF_DATASETS_CACHE HF_HUB_OFFLINE HF_HUB_ENABLE_HF_TRANSFER TRANSFORMERS_CACHE
    TOKENIZERS_PARALLELISM WANDB_API_KEY WANDB_PROJECT WANDB_MODE WANDB_RUN_ID MLFLOW_TRACKING_URI SLURM_JOB_ID SLURM_PROCID SLURM_LOCALID
    SLURM_NTASKS SLURM_NNODES SLURM_NODELIST SLURM_JOB_NAME SLURM_CPUS_PER_TASK SLURM_GPUS_ON_NODE SLURM_SUBMIT_DIR SLURM_ARRAY_TASK_ID SLURM_STEP_ID
    SLURM_TASKS_PER_NODE SLURM_RESTART_COUNT KUBERNETES_SERVICE_HOST AWS_REGION AWS_ACCESS_KEY_ID RUNPOD_POD_ID RUNPOD_GPU_COUNT SM_MODEL_DIR
    MODAL_TASK_ID VSCODE_PID CODER_AGENT_URL CODER_WORKSPACE_NAME
"""


def problems_of(*arguments: str, **environment: str) -> list[str]:
    """Returns the lines of the ConfigError that these settings raise over PRESET=plain; none when they are accepted."""
    try:
        parse_config(arguments, {"PRESET": "plain", **environment})
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, 17),
        (["PRESET=looped"], {}, 11),
        (["PRESET=plain"], {}, 9),
        (["PRESET=demo"], {}, 4),
        ([], {"PRESET": "demo"}, 4),
        (["PRESET=baseline"], {"PRESET": "demo"}, 9),
        (["PRESET=baseline", "SCALE=tiny"], {}, 4),
        (["PRESET=demo"], {"SCALE": "tiny", "NUM_LAYERS": "5"}, 5),
        (["PRESET=demo", "NUM_LAYERS=6"], {"SCALE": "tiny", "NUM_LAYERS": "5"}, 6),
        (["PRESET=plain", "NUM_LAYERS=6", "NUM_LAYERS=7"], {}, 7),
    ],
)
def test_precedence_is_default_preset_tiny_environment_argument(arguments: list[str], environment: dict[str, str], expected: int) -> None:
    assert parse_config(arguments, environment).num_layers == expected


def test_tiny_keeps_what_the_preset_says_about_other_settings() -> None:
    config = parse_config(["PRESET=demo", "SCALE=tiny"], {})
    assert (config.muon_weight_decay, config.mlp_mult, config.train_seq_len) == (0.1, 3.0, 64)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("ITERATIONS", "1_000", 1000),
        ("SEED", "0", 0),
        ("SEED", str(2**31 - 1), 2**31 - 1),
        ("MATRIX_BITS", "2", 2),
        ("MATRIX_LR", "3e-2", 0.03),
        ("MATRIX_LR", "0", 0.0),
        ("QAT_START_FRAC", "1", 1.0),
        ("COMPILE", "1", True),
        ("COMPILE", "true", True),
        ("COMPILE", "TRUE", True),
        ("COMPILE", "0", False),
        ("COMPILE", "False", False),
        ("CODER", "zstd", "zstd"),
        ("QUANT_SCHEME", "gptq", "gptq"),
        ("EMBED_BITS", "16", 16),
        ("LAYER_BITS", "0-2:8,8:16", "0-2:8,8:16"),
        ("TTT_LORA_TARGETS", "head,q", "head,q"),
        ("RUN_ID", "größe = 3", "größe = 3"),
        ("RUN_ID", "", ""),
    ],
)
def test_good_value(name: str, text: str, value: Any) -> None:
    parsed = getattr(parse_config(["QUANT_SCHEME=rowmax", f"{name}={text}"], {}), name.lower())  # the default scheme has one coder
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("ITERATIONS", "", "a whole number"),
        ("ITERATIONS", "many", "a whole number"),
        ("ITERATIONS", "1e3", "a whole number"),
        ("ITERATIONS", "10.0", "a whole number"),
        ("ITERATIONS", "0", "at least 1"),
        ("ITERATIONS", "-5", "at least 1"),
        ("SEED", str(2**31), "0 to "),
        ("SEED", "9" * 400, "0 to "),
        ("ITERATIONS", "9" * 400, ""),
        ("MATRIX_BITS", "1", "2 to 16"),
        ("MATRIX_BITS", "17", "2 to 16"),
        ("MATRIX_LR", "", "a number"),
        ("MATRIX_LR", "0,04", "a number"),
        ("MATRIX_LR", "-0.1", "at least 0"),
        ("MATRIX_LR", "nan", "a finite number"),
        ("MATRIX_LR", "inf", "a finite number"),
        ("MATRIX_LR", "1e999", "a finite number"),
        ("QAT_START_FRAC", "1.01", "0 to 1"),
        ("COMPILE", "", "0, 1, true or false"),
        ("COMPILE", "yes", "0, 1, true or false"),
        ("COMPILE", "2", "0, 1, true or false"),
        ("CODER", "gzip", "one of: zlib zstd brotli range"),
        ("CODER", "ZLIB", "one of: zlib zstd brotli range"),
        ("QUANT_SCHEME", "int8", "one of: rowmax gptq_lite gptq adaptive rate"),
        ("CODE_ORDER", "", "one of: rows columns sorted"),
        ("LAYER_BITS", "0:9", "LAYERS:BITS with 2 to 8 or 16 bits, as 0-2:8,10:8"),
        ("FINAL_EVAL", "ttt", "one of: chunked sliding ttt_sgd ttt_lora ttt_phased"),
        ("TTT_LORA_TARGETS", "", "some of q,k,v,out,up,gate,down,head, each once"),
        ("TTT_LORA_TARGETS", "q,o", "some of q,k,v,out,up,gate,down,head, each once"),
        ("TTT_LORA_TARGETS", "q,v,q", "some of q,k,v,out,up,gate,down,head, each once"),
        ("TILT_ORDERS", "1,8,4", "rising numbers of tokens"),
        ("TILT_ORDERS", "0,8", "from 1 to 64"),
        ("TILT_ORDERS", "8,65", "from 1 to 64"),
        ("AUDIT_TOKENS", "63", "at least 64"),
        ("RUN_ID", "a\nSEED=3", "printable"),
        ("RUN_ID", "\x1b[31m", "printable"),
        ("PRESET", "dmeo", "did you mean demo?"),
    ],
)
def test_bad_value_says_name_value_and_what_was_expected(name: str, text: str, expected: str) -> None:
    for report in (problems_of(f"{name}={text}"), problems_of(**{name: text})):
        assert "\n".join(report).startswith(f"{name}={text}: expected ")
        assert expected in report[-1]


@pytest.mark.parametrize("declared", fields(Config), ids=lambda declared: declared.name)
def test_declared_default_has_the_declared_type_and_lies_in_its_own_range(declared: Any) -> None:
    name = declared.name.upper()
    value = train_gpt.parse_value(name, train_gpt.format_value(declared.default))
    assert value == declared.default
    assert declared.type == type(value).__name__ == type(declared.default).__name__


@pytest.mark.parametrize("row", [*PRESETS, "tiny"])
def test_every_preset_value_has_the_declared_type_and_lies_in_its_range(row: str) -> None:
    values = {**train_gpt.TINY, **train_gpt.TINY_FEATURES} if row == "tiny" else PRESETS[row]
    for name, value in [*values.items(), *train_gpt.TINY_OF_PRESET.get(row, {}).items()]:
        assert train_gpt.parse_value(name.upper(), train_gpt.format_value(value)) == value
        assert type(value).__name__ == SETTINGS[name.upper()].type


def test_all_problems_are_reported_at_once() -> None:
    report = problems_of("SEED=x", "CODER=gzip", "NUM_LAYRS=3", "EVAL_STRIDE=4096", "--fast", ITERATIONS="0", MUON_MOMENTM="0.9", BOS_ID="1024")
    starts = ["SEED=x:", "CODER=gzip:", "NUM_LAYRS=3:", "--fast:", "ITERATIONS=0:", "MUON_MOMENTM in the", "BOS_ID=1024 must", "EVAL_STRIDE=4096 must"]
    assert len(report) == len(starts)
    for start in starts:
        assert sum(line.startswith(start) for line in report) == 1, start


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("NUM_LAYER=3", "; did you mean NUM_LAYERS?"),
        ("num_layers=3", "; did you mean NUM_LAYERS?"),
        ("SEQ_LEN=3", "; did you mean EVAL_SEQ_LEN?"),
        ("NUM_LAYERS", "; did you mean NUM_LAYERS?"),
        ("XYZZY=3", "a setting's name"),
        ("=3", "a setting's name"),
        ("", "a setting's name"),
    ],
)
def test_unknown_argument_is_refused_with_the_nearest_name(argument: str, hint: str) -> None:
    [problem] = problems_of(argument)
    assert problem.startswith(f"{argument}: expected NAME=value")
    assert problem.endswith(hint)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("NUM_LAYER", "Did you mean NUM_LAYERS?"),
        ("WARM_UP_STEPS", "Did you mean WARMUP_STEPS?"),
        ("MUON_NESTEROV", "unset it, or IGNORE_ENV=MUON_NESTEROV"),  # nothing is near, but the family is ours
        ("TTT_FREEZE_BLOCKS", "unset it, or IGNORE_ENV=TTT_FREEZE_BLOCKS"),
    ],
)
def test_near_miss_in_the_environment_is_refused(name: str, hint: str) -> None:
    [problem] = problems_of(**{name: "3"})
    assert problem.startswith(f"{name} in the environment is not a setting. ")
    assert hint in problem
    assert problems_of(**{name: "3", "IGNORE_ENV": name}) == []


def one_edit_typos(name: str) -> Iterator[str]:
    """Yields every deletion, doubling, swap of neighbours, and one substitution and insertion at every place of `name`."""
    for i in range(len(name)):
        yield name[:i] + name[i + 1 :]
        yield name[:i] + name[i] + name[i:]
        yield name[:i] + "X" + name[i + 1 :]
        yield name[:i] + "X" + name[i:]
        if i:
            yield name[: i - 1] + name[i] + name[i - 1] + name[i + 1 :]


def test_one_edit_typos_of_setting_names_are_caught_in_the_environment() -> None:
    every_typo = {typo for name in SETTINGS for typo in one_edit_typos(name)} - set(SETTINGS)
    typos = set(sorted(every_typo)[::2])  # all of them take seconds
    problems: list[str] = []
    train_gpt.read_environment(dict.fromkeys(typos, "1"), [], problems)
    assert len(typos) > 3000
    assert len(problems) >= 0.99 * len(typos), sorted(typos - {problem.partition(" ")[0] for problem in problems})


def test_common_system_variables_give_no_false_alarm() -> None:
    names = SYSTEM_NAMES.split()
    assert len(names) > 100
    assert problems_of(**dict.fromkeys(names, "x")) == []


def test_ignore_env_silences_only_the_names_it_lists() -> None:
    environment = {"MODEL_DIR": "/m", "BATCH_SIZE": "8", "DEVICE_ID": "0"}
    assert len(problems_of(**environment)) == 3
    assert problems_of("IGNORE_ENV=MODEL_DIR,BATCH_SIZE,DEVICE_ID", **environment) == []
    [left] = problems_of(**environment, IGNORE_ENV="MODEL_DIR,DEVICE_ID")
    assert left.startswith("BATCH_SIZE in the environment")


@pytest.mark.parametrize("name", train_gpt.RENAMED)
def test_a_name_of_the_public_records_is_answered_with_ours(name: str) -> None:
    here = train_gpt.RENAMED[name]
    for value in ("0", "1"):
        [refused] = problems_of(**{name: value})
        assert refused.startswith(f"{name} in the environment is not a setting. Here this is {here}. ")
        [refused] = problems_of(f"{name}={value}")
        assert refused == f"{name}={value}: expected NAME=value with a setting's name; here this is {here}"
    assert problems_of(**{name: "1", "IGNORE_ENV": name}) == []


def test_every_answer_names_a_setting_that_exists_and_no_setting_is_renamed() -> None:
    assert not set(train_gpt.RENAMED) & set(SETTINGS)
    for name, here in train_gpt.RENAMED.items():
        assignments = [word.partition("=") for word in here.partition(" (")[0].split()]
        if here.startswith("nothing: "):
            continue
        for setting, equals, value in assignments:
            assert setting in SETTINGS, f"{name}: {here}"
            if equals:
                train_gpt.parse_value(setting, value)


# Launch commands of public records, whole (paths apart), as their authors would have them in the environment.
RECORD_COMMANDS = {
    "2026-03-17_NaiveBaseline": """
        NCCL_IB_DISABLE=1 RUN_ID=hf_verify_sp1024_8gpu DATA_PATH=d TOKENIZER_PATH=t.model VOCAB_SIZE=1024 MAX_WALLCLOCK_SECONDS=600
        TRAIN_LOG_EVERY=50 VAL_LOSS_EVERY=200
    """,
    "2026-03-19_smeargate_orthoinit_muonwd": """
        RUN_ID=smeargate VOCAB_SIZE=1024 NUM_LAYERS=9 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 TIE_EMBEDDINGS=1 USE_SMEARGATE=1
        TRAIN_SEQ_LEN=1024 TRAIN_BATCH_TOKENS=524288 LOGIT_SOFTCAP=30.0 ROPE_BASE=10000.0 QK_GAIN_INIT=1.5 BIGRAM_HASH_BUCKETS=4096 BIGRAM_HASH_DIM=128
        TIED_EMBED_LR=0.030 MATRIX_LR=0.020 SCALAR_LR=0.020 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500
        MUON_WEIGHT_DECAY=0.01 MUON_BACKEND_STEPS=5 WARMDOWN_ITERS=3000 WARMUP_STEPS=20 EVAL_STRIDE=64 MAX_WALLCLOCK_SECONDS=600 SEED=1337
    """,
    # The names of PR #1855 and PR #2014 for what shapes and trains the model.
    "PR #2014": """
        NUM_LOOPS=2 LOOP_START=3 LOOP_END=5 ENABLE_LOOPING_AT=0.35 PARALLEL_START_LAYER=8 XSA_LAST_N=11 LN_SCALE=1 ROPE_DIMS=16
        MUON_ROW_NORMALIZE=1 EMA_DECAY=0.9965 TRAIN_SEQ_SCHEDULE=1024@0.100,2048@0.700,3072@1.000 TRAIN_SEQ_LEN=3072 NUM_LAYERS=11
        TRAIN_BATCH_TOKENS=786432 GRAD_CLIP_NORM=0.3 MATRIX_LR=0.026 BETA2=0.99 WARMDOWN_FRAC=0.85 WARMDOWN_ITERS=0
    """,
}


@pytest.mark.parametrize("record", RECORD_COMMANDS)
def test_the_launch_command_of_a_record_is_accepted_as_a_whole(record: str) -> None:
    environment = dict(word.split("=", 1) for word in RECORD_COMMANDS[record].split())
    config = parse_config(["PRESET=plain"], environment)
    for name in set(environment) - {"NCCL_IB_DISABLE"}:
        assert getattr(config, name.lower()) == train_gpt.parse_value(name, environment[name]), name


# The command of the record 2026-04-27 (PR #1855), in three parts: what is set here too, what is answered, and what belongs to parts of that system
# (other text, kernels) that this script does not have: its names resemble none of ours, so nothing can tell them from the system's.
COMMAND_1855 = """
    DATA_PATH=d TOKENIZER_PATH=t.model VOCAB_SIZE=8192 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 EMBED_BITS=7 MATRIX_LR=0.026 GRAD_CLIP_NORM=0.3
    WARMUP_STEPS=20 MUON_BACKEND_STEPS=5 WARMDOWN_FRAC=0.85 BETA2=0.99 VAL_LOSS_EVERY=0 GATE_WINDOW=12 SEED=42
    MATRIX_CLIP_SIGMAS=12.85 MLP_CLIP_SIGMAS=11.5 ATTN_CLIP_SIGMAS=13.0 EMBED_CLIP_SIGMAS=14.0
    LQER_RANK=4 LQER_FACTOR_BITS=4 LQER_ASYM_GROUP=64 LQER_TOP_K=3 TTT_LORA_RANK=80
"""
ANSWERED_1855 = """
    MIN_LR=0.1 SPARSE_ATTN_GATE_SCALE=0.5 SPARSE_ATTN_GATE_ENABLED=1 SMEAR_GATE_ENABLED=1 TTT_CHUNK_SIZE=48 TTT_BETA2=0.99 TTT_WEIGHT_DECAY=0.5
    GPTQ_RESERVE_SECONDS=0.5 GPTQ_CALIBRATION_BATCHES=16 CASEOPS_ENABLED=1 PHASED_TTT_ENABLED=1 PHASED_TTT_PREFIX_DOCS=2500
    PHASED_TTT_NUM_PHASES=3 GLOBAL_TTT_MOMENTUM=0.9 LQER_ENABLED=1 LQER_ASYM_ENABLED=1 COMPRESSOR=pergroup
"""
UNKNOWN_1855 = """
    DATA_DIR=./data GATED_ATTN_QUANT_GATE=1 FUSED_CE_ENABLED=1 NCCL_NET=Socket
"""


def test_the_launch_command_of_the_best_record_is_answered_name_by_name() -> None:
    answered = dict(word.split("=", 1) for word in ANSWERED_1855.split())
    environment = {**dict(word.split("=", 1) for word in (COMMAND_1855 + UNKNOWN_1855).split()), **answered}
    *names, rule = problems_of(**environment)
    assert {problem.partition(" in the environment is not a setting")[0] for problem in names} == set(answered)
    assert rule.startswith("WARMDOWN_ITERS and WARMDOWN_FRAC are two ways to say one thing"), "theirs is 0 by default"
    theirs = [word.split("=", 1) for word in COMMAND_1855.split() if word.startswith(("LQER_", "EMBED_")) or "_CLIP_SIGMAS" in word]
    assert len(theirs) == 9
    for preset in ("adaptive_clip", "frontier"):
        for name, value in theirs:
            assert getattr(parse_config([f"PRESET={preset}"], {}), name.lower()) == float(value), name


def test_names_of_the_quantisers_of_the_records_are_answered_with_where_they_went() -> None:
    answers = {
        "GPTQ_RESERVE_SECONDS": "nothing: ", "GPTQ_CALIBRATION_BATCHES": "CALIBRATION_TOKENS", "LQER_ENABLED": "LQER_RANK",
        "LQER_ASYM_ENABLED": "LQER_LEFT_BITS", "COMPRESSOR": "CODER",
    }  # fmt: skip
    assert {name: here for name, here in answers.items() if not train_gpt.RENAMED[name].startswith(here)} == {}


def test_names_of_the_adaptation_of_the_best_record_are_settings_or_answered_with_where_they_went() -> None:
    names = [word.partition("=")[0] for word in (COMMAND_1855 + ANSWERED_1855).split()]
    adaptation = {name for name in names if name.startswith(("TTT_", "PHASED_TTT_", "GLOBAL_TTT_"))}
    assert adaptation & set(SETTINGS) == {"TTT_LORA_RANK"} and len(adaptation) == 8
    assert adaptation <= {*SETTINGS, *train_gpt.RENAMED}


# One case for every rule of `validate`: settings that break this rule and no other.
BROKEN_RULES = {
    "STAGES=export,train": "STAGES=export,train: expected some of train,export,eval",
    "STAGES=": "STAGES=: expected some of train,export,eval",
    "STAGES=train,train": "STAGES=train,train: expected some of",
    "STAGES=train,eval ARTIFACT=a.bin": "STAGES=train,eval would score something else than what it trained",
    "STAGES=export": "name what to export with CHECKPOINT=path",
    "STAGES=eval": "name what to score with ARTIFACT=path",
    "CHECKPOINT=c.pt": "CHECKPOINT is what STAGES without train exports",
    "ARTIFACT=a.bin": "ARTIFACT is what STAGES without export scores",
    "RESUME=1": "say which run to continue with RUN_ID=name",
    "RUN_ID=a/b": "RUN_ID=a/b: expected a plain folder name",
    "RUN_ID=..": "RUN_ID=..: expected a plain folder name",
    "GRADIENT_BUCKETS=10": "GRADIENT_BUCKETS=10: expected at most NUM_LAYERS=9",
    "MODEL_DIM=516": "NUM_HEADS=8 must divide MODEL_DIM=516",
    "NUM_KV_HEADS=3": "NUM_KV_HEADS=3 must divide NUM_HEADS=8",
    "NUM_KV_HEADS=16": "NUM_KV_HEADS=16 must divide NUM_HEADS=8",
    "ROPE_DIMS=15": "ROPE_DIMS=15 must be even and at most 64",
    "ROPE_DIMS=66": "ROPE_DIMS=66 must be even and at most 64",
    "MODEL_DIM=8 ROPE_DIMS=0": "ROPE_DIMS=1 must be even and at most 1",
    "MODEL_DIM=32 MLP_MULT=0.01": "MLP_MULT=0.01 leaves no hidden width at MODEL_DIM=32",
    "BOS_ID=1024": "BOS_ID=1024 must be below VOCAB_SIZE=1024",
    "SWIGLU=1 LEAKY_RELU_SLOPE=0.5": "SWIGLU=1 has no squared relu: leave LEAKY_RELU_SLOPE at 0",
    "SWIGLU=1 MLP_POST_ONLY=1": "SWIGLU=1 has no squared relu: leave MLP_POST_ONLY at 0",
    "FP8=head COMPUTE_DTYPE=float64": "MLP_POST_ONLY and FP8 have no form in COMPUTE_DTYPE=float64: leave them off",
    "FP8=mlp MLP_MULT=1.03": "FP8=mlp: the sizes of its products, [512, 527], must be multiples of 16",
    "INPUT_STAGES=bigram,norm": "INPUT_STAGES=bigram,norm: expected bigram, norm and smear in some order",
    "INPUT_STAGES=bigram,norm,smear,norm": "INPUT_STAGES=bigram,norm,smear,norm: expected bigram, norm and smear",
    "VALUE_EMBED_LAYERS=8,9": "VALUE_EMBED_LAYERS=8,9 must name layers below NUM_LAYERS=9",
    "ATTENTION_GATE_WINDOW=513": "ATTENTION_GATE_WINDOW=513 and GATE_WINDOW=12 must be at most MODEL_DIM=512",
    "USE_SMEARGATE=1 GATE_WINDOW=513": "ATTENTION_GATE_WINDOW=0 and GATE_WINDOW=513 must be at most MODEL_DIM=512",
    "PARALLEL_RESIDUALS=gptj PARALLEL_START_LAYER=9": "PARALLEL_START_LAYER=9 must be below NUM_LAYERS=9",
    "NUM_LOOPS=1 LOOP_START=2 LOOP_END=1": "LOOP_START=2 and LOOP_END=1 must name layers in order, below NUM_LAYERS=9",
    "NUM_LOOPS=1 LOOP_START=2 LOOP_END=9": "LOOP_START=2 and LOOP_END=9 must name layers in order, below NUM_LAYERS=9",
    "NUM_LOOPS=1 LOOP_END=4 PARALLEL_RESIDUALS=lanes PARALLEL_START_LAYER=4": "LOOP_END=4 must be below PARALLEL_START_LAYER=4: two lanes",
    "TRAIN_SEQ_SCHEDULE=512@1": "TRAIN_SEQ_LEN=1024 must be the longest row of TRAIN_SEQ_SCHEDULE, 512",
    "TRAIN_SEQ_SCHEDULE=1024@0.5,2048@1": "TRAIN_SEQ_LEN=1024 must be the longest row of TRAIN_SEQ_SCHEDULE, 2048",
    "TRAIN_SEQ_SCHEDULE=1000@0.5,1024@1": "TRAIN_BATCH_TOKENS=524288 must be a multiple of TRAIN_SEQ_LEN=1000 wherever their schedules meet",
    "TRAIN_BATCH_TOKENS=2048 TRAIN_BATCH_SCHEDULE=1536@0.5,2048@1": "TRAIN_BATCH_TOKENS=1536 must be a multiple of TRAIN_SEQ_LEN=1024",
    "TRAIN_BATCH_SCHEDULE=1024@1": "TRAIN_BATCH_TOKENS=524288 must be the largest batch of TRAIN_BATCH_SCHEDULE, 1024",
    "WARMDOWN_ENDS=0.5,1": "WARMDOWN_ENDS=0.5,1 needs WARMDOWN_FRAC, and WARMDOWN_ITERS=0",
    "WARMDOWN_ITERS=0 WARMDOWN_FRAC=0.5 WARMDOWN_ENDS=0.6,1": "WARMDOWN_FRAC=0.5 is longer than the gap between two of WARMDOWN_ENDS=0.6,1",
    "WARMDOWN_ITERS=0 WARMDOWN_FRAC=0.5 WARMDOWN_ENDS=0.4,1": "WARMDOWN_FRAC=0.5 is longer than the gap",
    "TRAIN_BATCH_TOKENS=524289": "TRAIN_BATCH_TOKENS=524289 must be a multiple of TRAIN_SEQ_LEN=1024",
    "TRAIN_BATCH_TOKENS=512": "TRAIN_BATCH_TOKENS=512 must be a multiple of TRAIN_SEQ_LEN=1024",
    "MICRO_BATCH_TOKENS=1023": "MICRO_BATCH_TOKENS=1023 must hold one row of TRAIN_SEQ_LEN=1024",
    "WARMDOWN_FRAC=0.5": "WARMDOWN_ITERS and WARMDOWN_FRAC are two ways to say one thing",
    "EVAL_STRIDE=1025": "EVAL_STRIDE=1025 must be at most the window, 1024",
    "EVAL_SEQ_LEN=32": "EVAL_STRIDE=64 must be at most the window, 32",
    "CODER=zlib": "QUANT_SCHEME=rate needs CODER=range, not zlib",
    "CODER=zstd": "QUANT_SCHEME=rate needs CODER=range, not zstd",
    "QUANT_SCHEME=rate CODER=brotli": "QUANT_SCHEME=rate needs CODER=range, not brotli",
    "MATRIX_BITS=9": "MATRIX_BITS, MLP_BITS and EMBED_BITS are (9, 9, 8): expected 2 to 8, or 16 = float16",
    "MLP_BITS=1": "MATRIX_BITS, MLP_BITS and EMBED_BITS are (8, 1, 8): expected 2 to 8, or 16",
    "EMBED_BITS=15": "MATRIX_BITS, MLP_BITS and EMBED_BITS are (8, 8, 15): expected 2 to 8, or 16",
    "LAYER_BITS=8-9:4": "LAYER_BITS=8-9:4 must name layers below NUM_LAYERS=9",
    "SCORES_FILE=scores.txt": "SCORES_FILE=scores.txt: expected a name that ends in .npy",
    "DOCUMENTS_FILE=documents.npy": "DOCUMENTS_FILE=documents.npy: expected a name that ends in .csv",
    "FINAL_EVAL=ttt_sgd EVAL_STRIDE=1025": "EVAL_STRIDE=1025 must be at most the window, 1024",
    "TTT_LORA_TARGETS=gate": "TTT_LORA_TARGETS=gate: without SWIGLU there is no such projection",
    "FINAL_EVAL=ttt_lora DOC_MASK=0": "FINAL_EVAL=ttt_lora needs DOC_MASK=1, and TTT_LORA_CHUNK_TOKENS=48 of at most the window, 1024",
    "FINAL_EVAL=ttt_phased TTT_LORA_CHUNK_TOKENS=1025": "FINAL_EVAL=ttt_phased needs DOC_MASK=1, and TTT_LORA_CHUNK_TOKENS=1025 of at most the window",
}


@pytest.mark.parametrize("broken", BROKEN_RULES)
def test_each_rule_between_settings_triggers_alone(broken: str) -> None:
    [problem] = problems_of(*broken.split())
    assert BROKEN_RULES[broken] in problem


def test_every_rule_between_settings_has_a_case() -> None:
    """A rule is known by the constant parts of its message."""
    reports = [" ".join(problems_of(*broken.split())) for broken in BROKEN_RULES]
    groups = [node for node in TREE.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_rules") and node.name != "role_rules"]
    rules = [node.value.elts[1] for group in groups for node in ast.walk(group) if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple)]
    assert len(rules) >= 35
    for message in rules:
        parts = [part.value for part in ast.walk(message) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        assert any(all(part in report for part in parts) for report in reports), parts


@pytest.mark.parametrize(
    "allowed",
    [
        "STAGES=train", "STAGES=export CHECKPOINT=c.pt", "STAGES=export RESUME=1 RUN_ID=a", "STAGES=eval ARTIFACT=a.bin",
        "STAGES=export,eval CHECKPOINT=c.pt", "RUN_ID=a.b", "ROPE_DIMS=64", "ROPE_DIMS=2", "BOS_ID=1023", "EVAL_STRIDE=1024",
        "FINAL_EVAL=chunked EVAL_STRIDE=4096",
        "EVAL_SEQ_LEN=2048 EVAL_STRIDE=2048", "TRAIN_BATCH_TOKENS=1024", "MICRO_BATCH_TOKENS=1024", "WARMDOWN_ITERS=0 WARMDOWN_FRAC=0.5",
        "NUM_KV_HEADS=8", "SCORES_FILE=scores.npy", "SWIGLU=1", "INPUT_STAGES=norm,smear,bigram", "VALUE_EMBED_LAYERS=0,8", "ATTENTION_GATE_WINDOW=512",
        "GATE_WINDOW=513", "PARALLEL_RESIDUALS=lanes PARALLEL_START_LAYER=8", "PARALLEL_START_LAYER=9", "NUM_LOOPS=1 LOOP_START=8 LOOP_END=8",
        "NUM_LOOPS=1 LOOP_END=3 PARALLEL_RESIDUALS=lanes PARALLEL_START_LAYER=4", "NUM_LOOPS=1 LOOP_END=4 PARALLEL_RESIDUALS=gptj PARALLEL_START_LAYER=4",
        "TRAIN_SEQ_SCHEDULE=1024@1", "TRAIN_SEQ_SCHEDULE=1024@0.5,512@1",
        "TRAIN_SEQ_SCHEDULE=96@0.5,1024@1 TRAIN_BATCH_TOKENS=3072 TRAIN_BATCH_SCHEDULE=3072@0.5,1024@1",
        "WARMDOWN_ITERS=0 WARMDOWN_FRAC=0.5 WARMDOWN_ENDS=0.5,1",
        "QUANT_SCHEME=rowmax CODER=zlib", "QUANT_SCHEME=gptq CODER=brotli", "QUANT_SCHEME=adaptive CODER=zstd", "QUANT_SCHEME=gptq_lite CODER=range",
        "MATRIX_BITS=16", "MLP_BITS=0", "MLP_BITS=2 EMBED_BITS=16", "LAYER_BITS=0-8:16", "DOCUMENTS_FILE=documents.csv", "FINAL_EVAL=ttt_sgd DOC_MASK=0",
        "TTT_LORA_CHUNK_TOKENS=1025", "FINAL_EVAL=ttt_lora TTT_LORA_CHUNK_TOKENS=1024", "FINAL_EVAL=ttt_phased EVAL_SEQ_LEN=2048 TTT_LORA_CHUNK_TOKENS=2048",
    ],
)  # fmt: skip
def test_edge_that_the_rules_allow(allowed: str) -> None:
    assert problems_of(*allowed.split()) == []


@pytest.mark.parametrize("name", ["TRAIN_SEQ_SCHEDULE", "TRAIN_BATCH_SCHEDULE"])
@pytest.mark.parametrize("text", ["1024", "1024@0.5", "@1", "1024@", "1024@1,", "0@0.5,1024@1", "-64@0.5,1024@1", "1e3@1", "1024@2", "1024@0,1024@1",
                                  "512@0.6,512@0.6,1024@1", "512@1,1024@0.5", "1024@nan", "1024 until 1"])  # fmt: skip
def test_a_schedule_that_cannot_be_read_is_refused_with_an_example(name: str, text: str) -> None:
    [problem] = problems_of(f"{name}={text}")
    assert problem == f"{name}={text}: expected VALUE@UNTIL with rising fractions of the run that end with 1, as 1024@0.5,2048@1"


@pytest.mark.parametrize("text", ["last", "1,,2", "-1", "1, 2", "9" * 5000])
def test_layers_that_cannot_be_read_are_refused_with_an_example(text: str) -> None:
    assert problems_of(f"VALUE_EMBED_LAYERS={text}") == [f"VALUE_EMBED_LAYERS={text}: expected layers, as 9,10"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", {}), ("3:2", {3: 2}), ("0-2:8,10:6", {0: 8, 1: 8, 2: 8, 10: 6}), ("4-4:16", {4: 16}), ("0-3:8,2:3,3:16", {0: 8, 1: 8, 2: 3, 3: 16})],
)
def test_bits_of_layers_are_read_and_the_last_word_counts(text: str, expected: dict[int, int]) -> None:
    assert train_gpt.parse_layer_bits(text) == expected


@pytest.mark.parametrize(
    "text", ["8", "0", ":8", "0:", "0:1", "0:9", "0:12", "0:17", "a:8", "0:b", "-1:8", "0-:8", "0-1-2:8", "3-1:8", "0:8,", ",0:8", "0:8:8", "0 :8", "0:8 1:8",
             "9" * 5000 + ":8", "1.0:8", "0:-8", "0-2"],
    ids=lambda text: text[:9],
)  # fmt: skip
def test_bits_of_layers_that_cannot_be_read_are_refused_with_an_example(text: str) -> None:
    assert problems_of(f"LAYER_BITS={text}") == [f"LAYER_BITS={text}: expected LAYERS:BITS with 2 to 8 or 16 bits, as 0-2:8,10:8"]


@pytest.mark.parametrize("text", ["", "0", "0.7", "1.1", "0.5,0.5,1", "1,0.5", "half", "nan", "-0.5,1", "0.5,"])
def test_ends_of_decays_must_rise_and_lie_in_the_run(text: str) -> None:
    [problem] = problems_of(f"WARMDOWN_ENDS={text}", "WARMDOWN_ITERS=0", "WARMDOWN_FRAC=0.1")
    assert problem == f"WARMDOWN_ENDS={text}: expected rising fractions of the run that end with 1, as 0.5,1"


@pytest.mark.parametrize("preset", PRESETS)
def test_config_env_reads_back_as_the_same_configuration(preset: str, tmp_path: Path) -> None:
    config = replace(parse_config([f"PRESET={preset}"], {}), run_id="# größe = 3", adam_eps=1e-12, matrix_lr=0.1 + 0.2, resume=True, scores_file="a b.npy")
    (tmp_path / "config.env").write_text(config_lines(config), encoding="utf-8")
    assert parse_config([f"@{tmp_path / 'config.env'}"], {}) == config
    assert parse_config([f"@{tmp_path / 'config.env'}"], {"SEED": "5"}) == config, "a file counts as arguments"
    assert parse_config([f"@{tmp_path / 'config.env'}", "SEED=5"], {}) == replace(config, seed=5)


def test_config_env_has_one_line_for_every_setting() -> None:
    assert [line.partition("=")[0] for line in config_lines(Config()).splitlines()] == [declared.name.upper() for declared in fields(Config)]


def test_settings_file_may_hold_comments_and_its_mistakes_are_reported_with_the_others(tmp_path: Path) -> None:
    file = tmp_path / "config.env"
    file.write_text("# a comment\n\nSEED=3\nITERATIONS=none\nNUM_LAYER=2\n")
    report = problems_of(f"@{file}", "CODER=gzip", f"@{tmp_path / 'missing'}")
    assert len(report) == 4
    assert {line.split(":")[0] for line in report} == {"ITERATIONS=none", "NUM_LAYER=2", "CODER=gzip", f"@{tmp_path / 'missing'}"}


def test_settings_file_that_names_itself_is_a_config_error(tmp_path: Path) -> None:
    file = tmp_path / "config.env"
    file.write_text(f"SEED=3\n@{file}\n")
    assert problems_of(f"@{file}") != []


words = st.sampled_from([*SETTINGS, *(name.lower() for name in list(SETTINGS)[:5]), "SED", "", "@", "@.", "#", "--plan", "MUON_X"])
texts = st.one_of(
    st.sampled_from(["", "0", "1", "-1", "2", "7", "1e9", "nan", "-inf", "1_0", "true", "demo", "tiny", "train", "a/b", "..", "x.npy", "\n", "\x00", "９"]),
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(words, st.sampled_from(["=", "=", "=", "", "=="]), texts), max_size=6), st.dictionaries(words, texts, max_size=4))
@example([("ITERATIONS", "=", "9" * 400)], {})
@example([("@", "", "a\x00b")], {})
def test_mutated_settings_are_accepted_or_raise_config_error(parts: list[tuple[str, str, str]], environment: dict[str, str]) -> None:
    try:
        config = parse_config(["".join(part) for part in parts], environment)
    except ConfigError as error:
        assert str(error)
    else:
        assert train_gpt.validate(config) == []
        assert parse_config(config_lines(config).splitlines(), {}) == config


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Returns the finished script, run in `folder` without any setting in its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_help_lists_every_setting_and_every_preset(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for declared in fields(Config):
        [line] = [line for line in lines if line.startswith(f"  {declared.name.upper()} ")]
        assert line.split()[1] == declared.type
        assert train_gpt.format_value(declared.default) in line
        assert declared.metadata["meaning"] in line
        assert all(choice in line for choice in declared.metadata["choices"])
    for preset, row in PRESETS.items():
        after = lines[lines.index(f"preset {preset}") + 1 :]
        assert not row or after[0].split() == [f"{name.upper()}={train_gpt.format_value(value)}" for name, value in row.items()]


def test_bad_settings_exit_with_2_and_leave_no_trace(tmp_path: Path) -> None:
    done = run(tmp_path, "SEED=x", "NUM_HEADS=7", "DEVICE=cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert "SEED=x: expected a whole number\nNUM_HEADS=7 must divide MODEL_DIM=512" in done.stderr
    assert "--help" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


PACK = functools.cache(train_gpt.pack_script)  # always the same, and most of the time of a plan


@pytest.fixture
def main_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that runs `main` in this process, without World, and returns (exit code, standard output, standard error)."""
    for name in (*SETTINGS, "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)

    def no_world(*_: Any) -> None:
        raise AssertionError("a process group was about to start")

    monkeypatch.setattr(train_gpt, "World", no_world)
    monkeypatch.setattr(train_gpt, "pack_script", PACK)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = train_gpt.main(arguments)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("arguments", [("--plann",), ("-x", "SEED=1"), ("--help", "--verbose"), ("SEED=x", "--plan"), ("SEED",), ("PRESET=none",)])
def test_command_line_mistake_exits_with_2(arguments: tuple[str, ...], main_output: Any) -> None:
    code, out, err = main_output(*arguments)
    assert (code, out) == (2, "")
    assert err.strip()


# Presets whose widths are forecast to take more than the cap, for Gaussian weights.
TOO_LARGE = {"smeargate", "xsa_swiglu_lora_ttt", "gptq_lite"}


@pytest.mark.parametrize("scale", ["full", "tiny"])
@pytest.mark.parametrize("preset", PRESETS)
def test_plan_says_which_presets_fit_the_cap(preset: str, scale: str, main_output: Any) -> None:
    began = time.process_time()
    code, out, err = main_output("--plan", "--json", f"PRESET={preset}", f"SCALE={scale}")
    assert time.process_time() - began < 10
    planned = json.loads(out)
    assert (code, err, planned["preset"]) == (0, "", preset)
    assert planned["params"] == sum(row["params"] for row in planned["roles"])
    assert planned["predicted_bytes_total"] == sum(row["predicted_bytes"] for row in planned["roles"]) + planned["predicted_bytes_code"]
    cap = 500_000 if preset == "demo" else 16_000_000
    assert planned["bytes_cap"] == cap
    assert planned["fits"] is (scale == "tiny" or preset not in TOO_LARGE) is (0 < planned["predicted_bytes_total"] <= cap)


# Preset -> parameters that the public system logs, and where it does.
PUBLISHED_PARAMETERS = {
    "baseline": (17_059_912, "record 2026-03-17_NaiveBaseline, train.log"),
    "smeargate": (22_368_840, "record 2026-03-19_smeargate_orthoinit_muonwd, train.log"),
    "xsa_swiglu_lora_ttt": (27_092_057, "PR #1090, train.log"),
    "sp8192_ttt": (35_944_536, "PR #1809"),
    "adaptive_clip": (35_945_671, "PR #1962"),
    "gptq_lite": (26_993_756, "PR #379"),
    "frontier": (35_945_671, "PR #1855; PR #2014 logs 2 more, its softcaps"),
}


def planned_by(config: Config) -> dict[str, Any]:
    """Returns the plan of a configuration on eight ranks, with a script of no size."""
    return train_gpt.plan(config, "", 8)


@pytest.mark.parametrize("preset", PUBLISHED_PARAMETERS)
def test_a_preset_has_exactly_the_parameters_of_the_public_system(preset: str) -> None:
    count, source = PUBLISHED_PARAMETERS[preset]
    assert planned_by(parse_config([f"PRESET={preset}"], {}))["params"] == count, source


def test_json_without_plan_is_refused(main_output: Any) -> None:
    assert main_output("--json", "PRESET=demo") == (2, "", "--json is the form of --plan's answer; use: --plan --json\n")


NINE, ELEVEN, SEVENTEEN, LOOPED = [*range(9)], [*range(11)], [*range(17)], [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
HALF_LOOPED = [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
RAMP = [(ELEVEN, 1024, False), (ELEVEN, 2048, False), (LOOPED, 2048, False), (LOOPED, 3072, False)]
# Preset -> executed layers, tokens a row and QAT of every phase.
PHASES = {
    "plain": [(NINE, 1024, False)],
    "default": [(SEVENTEEN, seq_len, False) for seq_len in (1024, 2048, 3072)],
    "unique": [(SEVENTEEN, seq_len, False) for seq_len in (1024, 2048, 3072)],
    "half_looped": [([*range(14)], 1024, False), ([*range(14)], 2048, False), (HALF_LOOPED, 2048, False), (HALF_LOOPED, 3072, False)],
    "looped": RAMP,
    "baseline": [(NINE, 1024, False)],
    "recurrent": [([0, 1, 2] * 3, 1024, False), ([0, 1, 2] * 3, 1024, True)],
    "smeargate": [(NINE, 1024, True)],
    "xsa_swiglu_lora_ttt": [(ELEVEN, 2048, False)],
    "sp8192_ttt": [(ELEVEN, 2048, False), (LOOPED, 2048, False)],
    "adaptive_clip": [(ELEVEN, 2048, False), (LOOPED, 2048, False)],
    "gptq_lite": [(ELEVEN, 2048, False), (ELEVEN, 2048, True)],
    "frontier": RAMP,
    "demo": [([0, 1, 2, 3], 64, False), ([0, 1, 2, 3], 128, False), ([0, 1, 1, 2, 3], 128, False)],
}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_phases_of_a_preset_run_the_layers_of_its_system(preset: str) -> None:
    config = parse_config([f"PRESET={preset}"], {})
    phases = planned_by(config)["phases"]
    assert [(list(phase["order"]), phase["seq_len"], phase["qat"]) for phase in phases] == PHASES[preset]
    assert all(phase["batch_tokens"] == config.train_batch_tokens for phase in phases)


TINY_CUTS = {"scale", "compile", "max_wallclock_seconds", "val_loss_every", "warmdown_iters", "warmdown_frac"}  # what tiny does without, on purpose


@pytest.mark.parametrize("preset", PRESETS)
def test_tiny_switches_nothing_on_or_off(preset: str) -> None:
    """A bool or a choice is a switch; so is a number at 0 or at 1 (as a fraction of the run), and a list that is empty."""
    full, tiny = (parse_config([f"PRESET={preset}", f"SCALE={scale}"], {}) for scale in ("full", "tiny"))

    def switch(declared: Any, value: Any) -> Any:
        if declared.type == "bool" or declared.metadata["choices"]:
            return value
        return value == "" if declared.type == "str" else (value == 0, value == declared.metadata["high"] == 1)

    changed = {d.name for d in fields(Config) if switch(d, getattr(full, d.name)) != switch(d, getattr(tiny, d.name))}
    assert changed <= TINY_CUTS
    assert bool(full.warmdown_iters or full.warmdown_frac) == bool(tiny.warmdown_frac) and full.warmdown_ends == tiny.warmdown_ends


@pytest.mark.parametrize("preset", PRESETS)
def test_tiny_has_the_modules_and_the_phases_of_the_full_preset(preset: str) -> None:
    shapes = []
    for scale in ("full", "tiny"):
        config = parse_config([f"PRESET={preset}", f"SCALE={scale}"], {})
        with torch.device("meta"):
            model = train_gpt.GPT(config)
        parameters = {re.sub(r"\d+", "#", name) for name, _ in model.named_parameters()}
        phases = train_gpt.Schedule(config).phases()
        rows, orders = (sorted({getattr(phase, key) for phase in phases}) for key in ("seq_len", "order"))
        changes = [(rows.index(phase.seq_len), len(phase.order) > len(set(phase.order)), phase.qat) for phase in phases]
        shapes.append(({type(module).__name__ for module in model.modules()}, parameters, changes, len(orders)))
    assert shapes[0] == shapes[1]


# A network small enough to count by hand.
COUNTED = {
    "vocab_size": 24, "num_layers": 3, "model_dim": 16, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 2, "mlp_mult": 2.0,
    "bigram_hash_buckets": 7, "bigram_hash_dim": 5, "value_embed_layers": "1", "value_embed_dim": 3,
    "num_loops": 2, "loop_start": 1, "loop_end": 1, "enable_looping_at": 0.5, "micro_batch_tokens": 64,
    "train_seq_len": 16, "train_seq_schedule": "8@0.25,16@1", "train_batch_tokens": 64, "train_batch_schedule": "32@0.75,64@1", "eval_stride": 8,
}  # fmt: skip
COUNTED_BLOCK = 16 * 16 + 16 * 8 + 16 * 8 + 16 * 16 + 16 * 32 + 32 * 16  # q, k, v, out, up, down
COUNTED_ONCE = 5 * 16 + 3 * 8  # the projections of the hashed pairs and of the value embedding


@pytest.mark.parametrize(
    ("embedding", "weights"),
    [
        ({}, 24 * 16),  # the head is the embedding; looking a row up is no multiplication
        ({"embed_rank": 4}, 4 * 16 + 16 * 4 + 4 * 24),  # widened on the way in, narrowed on the way out
        ({"tie_embeddings": False}, 16 * 24),
    ],
    ids=["tied", "factored", "untied"],
)
def test_planned_flops_are_those_counted_by_hand(embedding: dict[str, Any], weights: int) -> None:
    config = Config(**{**COUNTED, **embedding})
    assert train_gpt.validate(config) == []
    phases = planned_by(config)["phases"]
    assert [(len(phase["order"]), phase["seq_len"], phase["batch_tokens"]) for phase in phases] == [(3, 8, 32), (3, 16, 32), (5, 16, 32), (5, 16, 64)]
    for phase in phases:
        layers, row = len(phase["order"]), phase["seq_len"]
        looked_at = sum(range(1, row + 1)) / row  # positions up to the own one, on average
        products = weights + COUNTED_ONCE + layers * (COUNTED_BLOCK + 2 * looked_at * 16)  # of scores and of the mix
        assert phase["train_flops_per_token"] == 3 * 2 * products
        step = phase["train_flops_per_token"] * phase["batch_tokens"] / (8 * train_gpt.H100_PEAK_FLOPS * train_gpt.PUBLIC_MFU)
        assert phase["estimated_step_ms"] == pytest.approx(1000 * step, rel=1e-12)
        assert phase["estimated_steps"] == min(config.iterations, int(config.max_wallclock_seconds / step))


def test_plan_for_people_counts_the_tokens_of_each_phase() -> None:
    planned = planned_by(Config(**COUNTED, max_wallclock_seconds=0, iterations=1_000_000))
    lines = [line for line in train_gpt.plan_text(planned).splitlines() if "(estimate)" in line]
    assert [line.rpartition(", ")[2] for line in lines] == ["32 M tokens", "32 M tokens", "32 M tokens", "64 M tokens"]


@pytest.mark.parametrize(("preset", "cap", "fits"), [("baseline", 1_000_000, False), ("plain", 1_000_000, True), ("default", 60_000, False)])
def test_plan_for_people_agrees_with_plan_for_machines(preset: str, cap: int, fits: bool, main_output: Any) -> None:
    """The default scheme takes what the cap leaves, if it leaves anything."""
    planned = json.loads(main_output("--plan", "--json", f"PRESET={preset}", f"BYTES_CAP={cap}")[1])
    code, text, _ = main_output("--plan", f"PRESET={preset}", f"BYTES_CAP={cap}")
    assert (code, planned["fits"], planned["bytes_cap"]) == (0, fits, cap)
    assert f"{planned['predicted_bytes_total']:,} bytes {'fits' if fits else 'does NOT fit'} BYTES_CAP={cap:,}" in text
    assert f"{planned['params']:,} parameters" in text
    for row in planned["roles"]:
        assert f"{row['params']:,} weights" in text
        assert row["predicted_bytes"] > 0
    for row in planned["fitting"]:
        assert f"at {row['bits_per_weight']} bits a weight" in text
        [line] = [line for line in text.splitlines() if f"at {row['bits_per_weight']} bits a weight" in line]
        said = dict(part.split(" (")[0].split("=") for part in line.partition("filled by ")[2].split(" or ")) if "=" in line else {}
        assert {name.lower(): float(value) for name, value in said.items()} == {
            name: round(value, 2) for name, value in row.items() if name != "bits_per_weight"
        }
    assert f"the whole run: about {planned['estimated_steps']:,} steps" in text
    for phase in planned["phases"]:
        assert ",".join(map(str, phase["order"])) in text


def test_the_default_scheme_is_planned_to_fill_the_cap_or_to_reach_its_finest_step() -> None:
    """The last entry: more than the model can use."""
    totals = []
    for cap in (2_000_000, 8_000_000, 16_000_000, 64_000_000):
        planned = planned_by(Config(bytes_cap=cap))
        assert planned["fits"]
        totals.append(planned["predicted_bytes_total"] / cap)
    assert all(0.995 < total <= 1 for total in totals[:3]) and totals[3] < 0.5


def stored_bits(config: Config, bits_per_weight: float) -> float:
    """Returns what a model takes: so many bits for each weight of a matrix or table, and what an artifact takes besides."""
    with torch.device("meta"):
        model = train_gpt.GPT(config)
    quantised = [parameter.numel() for name, parameter in model.named_parameters() if name in train_gpt.weight_parts(model)]
    return bits_per_weight * sum(quantised) + train_gpt.overhead_bits(model)


@pytest.mark.parametrize("preset", ["default", "recurrent", "xsa_swiglu_lora_ttt", "sp8192_ttt", "frontier", "demo"])
def test_what_is_said_to_fill_the_cap_fits_it_and_one_unit_more_does_not(preset: str) -> None:
    """A unit is a layer, a hidden dimension of the MLP, or 64 tokens."""
    config = parse_config([f"PRESET={preset}"], {})
    planned, code = train_gpt.plan(config, SCRIPT.read_text(encoding="utf-8"), 8), PACK(SCRIPT.read_text(encoding="utf-8"))
    units = {"num_layers": 1, "mlp_mult": (1.5 if config.swiglu else 1) / config.model_dim, "vocab_size": 64}
    budget = 8 * (config.bytes_cap - len(code))
    assert planned["predicted_bytes_code"] == len(code) and len(planned["fitting"]) >= 3
    for row in planned["fitting"]:
        for name, unit in units.items():
            value, declared = row.get(name), SETTINGS[name.upper()]
            if value is None:
                assert stored_bits(replace(config, **{name: declared.metadata["low"]}), row["bits_per_weight"]) > budget, f"{name} is left out for no reason"
                continue
            assert declared.metadata["low"] <= value <= declared.metadata["high"], f"{name}={value} is no setting"
            assert stored_bits(replace(config, **{name: value}), row["bits_per_weight"]) <= budget, row
            if value + unit <= declared.metadata["high"]:
                assert stored_bits(replace(config, **{name: value + unit}), row["bits_per_weight"]) > budget, row


def settings_read(nodes: list[ast.stmt], owners: tuple[str, ...]) -> set[str]:
    """Returns the attributes that `nodes` read from a configuration: a variable or a `.config` whose name is in `owners`."""
    found = set()
    for node in (child for top in nodes for child in ast.walk(top)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name in owners:
                found.add(node.attr)
    return found


def test_every_setting_is_read_outside_its_declaration_and_validation() -> None:
    outside = [node for node in TREE.body if getattr(node, "name", "") not in ("Config", "validate")]
    read = settings_read(outside, ("config", "c", "Config"))
    [declaration] = [node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    properties = {node.name: node for node in declaration.body if isinstance(node, ast.FunctionDef)}
    assert set(properties) <= read, "a derived number that nothing reads"
    for node in properties.values():
        read |= settings_read([node], ("self",))
    # IGNORE_ENV is needed before there is a Config; test_ignore_env_silences_only_the_names_it_lists shows its effect.
    assert {declared.name for declared in fields(Config)} - read == {"ignore_env"}


def test_only_world_and_main_read_the_environment() -> None:
    names = ("environ", "environb", "getenv")
    readers = set()
    for node in TREE.body:
        for child in ast.walk(node):
            if (isinstance(child, ast.Attribute) and child.attr in names) or (isinstance(child, ast.Name) and child.id in names):
                readers.add(getattr(node, "name", "module level"))
    assert readers == {"World", "main"}
