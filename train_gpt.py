"""Parameter Golf in one file: train a small GPT, quantise it into `artifact.bin`, read that file back and score it in bits per byte.

    make demo                                                 a CPU, five to eight minutes, bundled text
    python train_gpt.py PRESET=baseline                       one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py     eight GPUs
    python train_gpt.py --help | --plan [--json]              every setting | what a configuration costs, before it runs

The order of the file is the order of a run: config, runtime, data, schedule, roles and grids, model, optimiser, quantisation, training,
artifact, evaluation, main. The score is always computed from what was read back from the artifact.

Shape letters: B batch rows, T positions in a row, D model width, H query heads, K key/value heads, C head width, V vocabulary, N tokens.
"""

from __future__ import annotations

import ast
import ctypes
import difflib
import hashlib
import importlib
import inspect
import itertools
import json
import lzma
import math
import os
import platform
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from enum import Enum
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, BinaryIO, NamedTuple

import brotli
import constriction
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # only a GPU needs it
    triton = None
try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

# ------------------------------------------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns every setting: name, type, default, range and meaning. A setting is `NAME=value` in the environment or as an argument; its name
# is the field's in capitals. Precedence: default < preset < SCALE=tiny < environment < argument. All problems are reported together.


# Bits per weight that an artifact can hold: integers on a grid, or float16.
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


# Attention on a GPU, in the order of what is expected of their speed.
ATTENTION_ORDER = ("fa3", "fa4", "varlen", "flex", "sdpa")
KERNEL_NAMES = ("cross_entropy", "symmetric")


class ConfigError(ValueError):
    """Settings that cannot be run; the message lists every problem found, one a line."""


def parse_fracs(text: str) -> list[float]:
    """Returns the fractions of a run in "0.5,1": they rise and end with 1. Raises ValueError on other text."""
    try:
        fracs = [float(entry) for entry in text.split(",")]
        if fracs[-1] == 1 and all(low < high for low, high in itertools.pairwise([0.0, *fracs])):
            return fracs
    except ValueError:
        pass
    raise ValueError("expected rising fractions of the run that end with 1, as 0.5,1")


def parse_steps(text: str) -> list[tuple[int, float]]:
    """Returns (value, fraction of the run until which it holds) for "1024@0.5,2048@1"; [] for "". Raises ValueError on other text."""
    pieces = [entry.partition("@")[::2] for entry in text.split(",")] if text else []
    try:
        steps = list(zip([int(value) for value, _ in pieces], parse_fracs(",".join(until for _, until in pieces)), strict=True)) if pieces else []
        if all(value >= 1 for value, _ in steps):
            return steps
    except ValueError:
        pass
    raise ValueError("expected VALUE@UNTIL with rising fractions of the run that end with 1, as 1024@0.5,2048@1")


def parse_layers(text: str) -> list[int]:
    """Returns the layers in "9,10"; [] for "". Raises ValueError on other text."""
    layers = text.split(",") if text else []
    if not all(layer.isdecimal() and len(layer) < 4 for layer in layers):
        raise ValueError("expected layers, as 9,10")
    return [int(layer) for layer in layers]


def parse_orders(text: str) -> list[int]:
    """Returns the numbers of tokens in "1,2,4,8"; [] for "". Raises ValueError on other text."""
    orders = [int(order) if order.isdecimal() and len(order) < 3 else 0 for order in text.split(",")] if text else []
    if not all(low < high for low, high in itertools.pairwise([0, *orders, 65])):
        raise ValueError("expected rising numbers of tokens from 1 to 64, as 1,2,4,8")
    return orders


def parse_names(text: str, known: Sequence[str]) -> list[str]:
    """Returns the names in "a,b", all of them `known`; [] for "". Raises ValueError on other text."""
    names = text.split(",") if text else []
    if not set(names) <= set(known) or len(set(names)) < len(names):
        raise ValueError(f"expected some of {','.join(known)}, each once")
    return names


def parse_projections(text: str) -> list[str]:
    """Returns the projections in "q,v". Raises ValueError on other text."""
    return parse_names(text or "none", ("q", "k", "v", "out", "up", "gate", "down", "head"))


def parse_kernels(text: str) -> list[str]:
    """Returns the Triton kernels in "symmetric": none for "none", all for "auto". Raises ValueError on other text."""
    return [] if text == "none" else parse_names(",".join(KERNEL_NAMES) if text == "auto" else text, KERNEL_NAMES)


def parse_fp8(text: str) -> list[str]:
    """Returns the products in "head,mlp" that are done in float8. Raises ValueError on other text."""
    return parse_names(text, ("head", "mlp"))


def parse_layer_bits(text: str) -> dict[int, int]:
    """Returns layer -> bits for "0-2:8,10:8"; {} for "". Raises ValueError on other text."""
    bits: dict[int, int] = {}
    for entry in text.split(",") if text else []:
        layers, colon, width = entry.partition(":")
        first, dash, last = layers.partition("-")
        numbers = [first, last if dash else first, width]
        plain = bool(colon) and all(number.isdecimal() and len(number) < 4 for number in numbers)
        low, high, chosen = (int(number) for number in numbers) if plain else (0, 0, 0)
        if chosen not in WIDTHS or low > high:
            raise ValueError("expected LAYERS:BITS with 2 to 8 or 16 bits, as 0-2:8,10:8")
        bits.update(dict.fromkeys(range(low, high + 1), chosen))
    return bits


def setting(
    default: Any, meaning: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = (), form: Callable[[str], Any] = str
) -> Any:
    """Returns a dataclass field that carries what `--help`, parsing and validation need. `form` reads a text that is more than a word."""
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high, "choices": choices, "form": form})


@dataclass(frozen=True)
class Config:
    """Every setting of a run, parsed and validated. Derived numbers are properties."""

    # run
    preset: str = setting("default", "named row of settings to start from (list below)")
    scale: str = setting("full", "tiny = the preset with small numbers, for a CPU", choices=("full", "tiny"))
    run_id: str = setting("", "name of the run folder; empty = date, time and preset")
    runs_dir: str = setting("runs", "folder that holds the run folders")
    stages: str = setting("train,export,eval", "which stages to run, in this order")
    resume: bool = setting(False, "continue the interrupted run RUN_ID from its last checkpoint")
    checkpoint: str = setting("", "checkpoint.pt to export, when STAGES leaves out train")
    artifact: str = setting("", "artifact.bin to score, when STAGES leaves out export")
    checkpoint_every: int = setting(0, "steps between checkpoints; 0 = only at the end", low=0)
    train_log_every: int = setting(200, "steps between log lines", low=1)
    max_skipped_steps: int = setting(5, "steps running that may be left out because their loss or gradient is not finite; then training stops", low=0)
    ignore_env: str = setting("", "comma-separated environment variables that are not meant for this script, whatever they look like")
    attention_backend: str = setting(
        "auto", "auto = the first in this order that passes its test on this GPU; sdpa on other devices", choices=("auto", *ATTENTION_ORDER, "reference")
    )
    kernels: str = setting("auto", "Triton kernels: auto = all that pass their test on this GPU; none; or cross_entropy,symmetric", form=parse_kernels)
    device: str = setting("auto", "auto = cuda where there is one, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    compute_dtype: str = setting("auto", "dtype of activations; auto = bfloat16 on cuda, float32 elsewhere", choices=("auto", "float32", "bfloat16", "float64"))
    compile: bool = setting(True, "torch.compile the model and Muon; off is quicker for short CPU runs")
    compile_autotune: bool = setting(False, "COMPILE=1: time several kernels for every product, with what follows it, and take the fastest; minutes more")
    gradient_buckets: int = setting(
        1, "groups of layers; gradients of the later ones travel between ranks while backward is at the earlier ones. COMPILE=1: a graph for each", low=1
    )
    mlp_post_only: bool = setting(False, "squared relu: keep only its result for backward, the sign of its argument in the last bit")
    fp8: str = setting("", "forward products of training in float8 e4m3: some of head,mlp; empty = none. The artifact is scored without", form=parse_fp8)

    # data
    data_path: str = setting("data/datasets/fineweb10B_sp1024", "folder with *_train_*.bin and *_val_*.bin shards")
    tokenizer_path: str = setting("data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model that made the shards")
    data_shuffle: bool = setting(True, "visit the rows of each shard in a random order, new in every pass; off = in order")

    # model
    vocab_size: int = setting(1024, "number of tokens; must equal the tokenizer's", low=2, high=65536)
    bos_id: int = setting(1, "token that starts every document; must equal the tokenizer's", low=0, high=65535)
    num_layers: int = setting(9, "physical blocks", low=2, high=256)
    model_dim: int = setting(512, "width of the residual stream", low=2, high=16384)
    num_heads: int = setting(8, "query heads", low=1, high=1024)
    num_kv_heads: int = setting(4, "key/value heads; divides NUM_HEADS", low=1, high=1024)
    mlp_mult: float = setting(2.0, "MLP width as a multiple of MODEL_DIM (SwiGLU: two thirds of it, for the same number of weights)", low=0.01, high=64)
    leaky_relu_slope: float = setting(0.0, "MLP: slope of the squared leaky relu below zero; 0 = relu^2", low=0, high=1)
    swiglu: bool = setting(False, "MLP: SwiGLU instead of the squared relu")
    tie_embeddings: bool = setting(True, "the output head is the embedding")
    embed_rank: int = setting(0, "embedding as the product of a table of this width and a matrix; 0 = one full table", low=0, high=16384)
    input_stages: str = setting("bigram,smear,norm", "order of what happens to the embedded tokens before the first block")
    use_smeargate: bool = setting(False, "SmearGate: let some of the previous token's embedding into each token's")
    smeargate_kind: str = setting("blend", "blend: k x + (1 - k) x_previous; add: x + l sigmoid(W x[:GATE_WINDOW]) x_previous", choices=("blend", "add"))
    bigram_hash_buckets: int = setting(0, "BigramHash: rows of the table of hashed token pairs; 0 = off", low=0, high=2**24)
    bigram_hash_dim: int = setting(128, "BigramHash: width of the table", low=1, high=16384)
    bigram_hash_scale: float = setting(0.0, "BigramHash: start of a learned factor; 0 = no such factor", low=0)
    value_embed_layers: str = setting("", "layers whose values get a token embedding added, as 9,10; empty = none", form=parse_layers)
    value_embed_dim: int = setting(128, "width of that embedding's table", low=1, high=16384)
    rope_base: float = setting(10000.0, "RoPE: longest wavelength is 2 pi times this, in tokens", low=1)
    rope_dims: int = setting(0, "RoPE: rotated dimensions of each head; 0 = all", low=0)
    xsa_last_n: int = setting(0, "exclusive self-attention in this many last layers", low=0)
    attention_gate_window: int = setting(0, "attention gate per head, from this many dimensions of the layer's input; MODEL_DIM = dense, 0 = off", low=0)
    attention_gate_scale: float = setting(0.5, "attention gate: sigmoid(this * W x)", low=0)
    gate_window: int = setting(12, "SmearGate add: dimensions of x that the gate reads", low=1)
    ln_scale: bool = setting(False, "scale the normed inputs of layer l by 1 / sqrt(l + 1)")
    skip_connections: str = setting("scaled", "U-Net skips from the first half of the executed layers to the second", choices=("none", "scaled", "gated"))
    dynamic_skip_last_n: int = setting(0, "dynamic skips into this many last layers: every token chooses what to take from all layers before", low=0)
    parallel_residuals: str = setting("none", "gptj = attention and MLP read the same input; lanes = each its own", choices=("none", "gptj", "lanes"))
    parallel_start_layer: int = setting(0, "first layer of PARALLEL_RESIDUALS", low=0, high=255)
    num_loops: int = setting(0, "depth recurrence: run layers LOOP_START to LOOP_END this many times more", low=0, high=64)
    loop_start: int = setting(0, "first looped layer", low=0, high=255)
    loop_end: int = setting(0, "last looped layer", low=0, high=255)
    loop_embedding: bool = setting(False, "tell a block which pass this is, by a learned vector per pass")
    logit_softcap: float = setting(30.0, "logits become c * tanh(logits / c)", low=1e-3)
    logit_softcap_negative: float = setting(0.0, "the same for negative logits; 0 = LOGIT_SOFTCAP", low=0)
    doc_mask: bool = setting(True, "attention sees only the token's own document")

    # training
    seed: int = setting(1337, "of initial weights and data order", low=0, high=2**31 - 1)
    qk_gain_init: float = setting(1.5, "initial per-head gain on the normalised queries", low=0)
    smeargate_init: float = setting(3.0, "SmearGate blend: k starts at the sigmoid of this")
    matrix_init: str = setting("orthogonal", "start of block matrices; output projections start at zero", choices=("orthogonal", "uniform"))
    tied_embed_init_std: float = setting(0.005, "standard deviation of the initial embedding when tied (untied: 1)", low=0)
    iterations: int = setting(20000, "most training steps", low=1)
    max_wallclock_seconds: float = setting(600.0, "training stops before this; compile, warm-up and validation are not counted; 0 = no limit", low=0)
    warmup_steps: int = setting(20, "steps run per phase before the clock starts, then undone", low=0)
    train_batch_tokens: int = setting(524288, "tokens per step, over all ranks", low=1)
    train_seq_len: int = setting(1024, "tokens per row", low=2)
    micro_batch_tokens: int = setting(65536, "most tokens per forward pass and rank; the rest of the batch is accumulated", low=1)
    train_seq_schedule: str = setting("", "TRAIN_SEQ_LEN by progress, as 1024@0.1,2048@1 (each until that fraction); empty = constant", form=parse_steps)
    train_batch_schedule: str = setting("", "TRAIN_BATCH_TOKENS by progress, in the same form", form=parse_steps)
    enable_looping_at: float = setting(0.0, "fraction of the run after which the loops run", low=0, high=0.999)
    warmdown_iters: int = setting(1200, "steps of linear learning-rate decay at the end", low=0)
    warmdown_frac: float = setting(0.0, "the same as a fraction of the run; needs WARMDOWN_ITERS=0", low=0, high=1)
    warmdown_ends: str = setting("1", "fractions of the run at which a decay of WARMDOWN_FRAC ends; several = WSD-S", form=parse_fracs)
    lr_floor_frac: float = setting(0.0, "least learning rate of a decay, as a fraction of the full rate", low=0, high=1)
    qat_start_frac: float = setting(1.0, "fraction of the run after which training sees quantised weights; 1 = never", low=0, high=1)
    qat_loop_noise: float = setting(0.0, "QAT: width of uniform noise, in steps, on the weights of layers that run several times; 0 = off", low=0)
    matrix_lr: float = setting(0.04, "Muon: learning rate of block matrices", low=0)
    scalar_lr: float = setting(0.04, "Adam: of gains, scales and mixes", low=0)
    tied_embed_lr: float = setting(0.05, "Adam: of a tied embedding", low=0)
    embed_lr: float = setting(0.6, "Adam: of an untied embedding", low=0)
    head_lr: float = setting(0.008, "Adam: of an untied output head", low=0)
    muon_momentum: float = setting(0.95, "Muon: Nesterov momentum", low=0, high=0.9999)
    muon_momentum_warmup_start: float = setting(0.85, "Muon: momentum at step 0", low=0, high=0.9999)
    muon_momentum_warmup_steps: int = setting(500, "Muon: steps until MUON_MOMENTUM is reached", low=0)
    muon_backend_steps: int = setting(5, "Muon: iterations of the orthogonalisation", low=1, high=5)
    muon_coefficients: str = setting("polar_express", "Muon: polynomials of the orthogonalisation", choices=("polar_express", "classic"))
    muon_row_normalize: bool = setting(False, "Muon: bring the rows of the update to equal norm before it is orthogonalised (MuonEq-R)")
    normuon_beta2: float = setting(0.0, "NorMuon: decay of the second moment of each row of the update; 0 = off", low=0, high=0.9999)
    muon_weight_decay: float = setting(0.0, "Muon: decoupled weight decay, times the learning rate", low=0)
    embed_weight_decay: float = setting(0.0, "Adam: the same of embeddings, tables and head", low=0)
    scalar_weight_decay: float = setting(0.0, "Adam: the same of gains, scales and mixes", low=0)
    cautious_weight_decay: bool = setting(False, "decay only weights that the update makes smaller too")
    weight_decay_taper_frac: float = setting(1.0, "fraction of the run after which weight decay is multiplied by WEIGHT_DECAY_TAPER_SCALE", low=0, high=1)
    weight_decay_taper_scale: float = setting(0.5, "see WEIGHT_DECAY_TAPER_FRAC", low=0, high=1)
    beta1: float = setting(0.9, "Adam: decay of the first moment", low=0, high=0.9999)
    beta2: float = setting(0.95, "Adam: decay of the second moment", low=0, high=0.99999)
    adam_eps: float = setting(1e-8, "Adam: added to the root of the second moment", low=1e-20)
    grad_clip_norm: float = setting(0.0, "largest norm of the averaged gradient; 0 = no clipping", low=0)
    ema_decay: float = setting(0.0, "EMA: decay per step of the average of weights; 0 = off", low=0, high=0.99999)
    ema_every: int = setting(1, "steps between the weights that go into the EMA", low=1)
    lawa_k: int = setting(0, "LAWA: number of latest weights (of their EMA, if on) in the mean; 0 = off", low=0, high=100)
    lawa_every: int = setting(100, "LAWA: steps between them", low=1)
    swa_every: int = setting(0, "SWA: steps between the weights in the mean; 0 = off", low=0)
    swa_start_lr_scale: float = setting(0.2, "SWA: begins when the learning rate is at most this fraction of its full value", low=0, high=1)

    # artifact
    quant_scheme: str = setting(
        "rate",
        "steps of the grid and choice of points: rowmax, gptq_lite = round to nearest; gptq, adaptive = GPTQ; rate = fill BYTES_CAP at the least loss",
        choices=("rowmax", "gptq_lite", "gptq", "adaptive", "rate"),
    )
    matrix_bits: int = setting(8, "bits per weight of matrices and an untied head (all but rate, which finds its own): 2 to 8, or 16 = float16", low=2, high=16)
    mlp_bits: int = setting(0, "the same of the matrices of MLPs; 0 = MATRIX_BITS", low=0, high=16)
    embed_bits: int = setting(8, "the same of embeddings and tables", low=2, high=16)
    layer_bits: str = setting("", "the same of the matrices of some layers, as 0-2:8,10:8", form=parse_layer_bits)
    gptq_lite_scope: str = setting("row", "gptq_lite: what shares a clipping percentile", choices=("row", "matrix"))
    attn_clip_sigmas: float = setting(13.0, "gptq, adaptive: attention is clipped at this many standard deviations of its row", low=0.1)
    mlp_clip_sigmas: float = setting(11.5, "the same of MLPs", low=0.1)
    matrix_clip_sigmas: float = setting(12.85, "the same of other matrices", low=0.1)
    embed_clip_sigmas: float = setting(14.0, "the same of embeddings and tables", low=0.1)
    calibration_tokens: int = setting(131072, "training tokens that gptq, adaptive and rate take their statistics from, over all ranks", low=1)
    bytes_cap: int = setting(16_000_000, "most bytes of packed code plus artifact", low=1)
    gptq_damping: float = setting(0.01, "gptq, adaptive: added to the diagonal of X'X, as a fraction of its mean", low=1e-9)
    lqer_rank: int = setting(0, "LQER: rank of a correction of what gptq_lite, gptq and adaptive leave over; 0 = off", low=0, high=64)
    lqer_top_k: int = setting(3, "LQER: number of matrices, worst first, that get one", low=1)
    lqer_factor_bits: int = setting(4, "LQER: bits of the right factor, in groups of LQER_ASYM_GROUP", low=2, high=8)
    lqer_left_bits: int = setting(2, "LQER: bits of the left factor", low=2, high=8)
    lqer_asym_group: int = setting(64, "LQER: columns of the right factor that share a step", low=1)
    coder: str = setting("range", "a byte coder, or range = an entropy coder that knows rows and columns", choices=("zlib", "zstd", "brotli", "range"))
    code_order: str = setting("rows", "byte coders: codes by rows, by columns, or by columns with similar rows together", choices=("rows", "columns", "sorted"))
    byte_shuffle: bool = setting(False, "byte coders: first all low bytes of two-byte numbers, then all high ones")

    # evaluation
    val_batch_size: int = setting(524288, "tokens per forward pass of an evaluation, over all ranks", low=1)
    val_loss_every: int = setting(1000, "steps between validations; 0 = only after the last step", low=0)
    final_eval: str = setting(
        "sliding",
        "evaluation that gives the score: sliding = windows; ttt_sgd, ttt_lora, ttt_phased = and learning from what has been scored (whole model, a LoRA"
        " per document, both)",
        choices=("chunked", "sliding", "ttt_sgd", "ttt_lora", "ttt_phased"),
    )
    eval_seq_len: int = setting(0, "context of an evaluation in tokens; 0 = TRAIN_SEQ_LEN", low=0)
    rope_scaling: str = setting("none", "RoPE in rows longer than TRAIN_SEQ_LEN", choices=("none", "ntk", "yarn"))
    eval_stride: int = setting(64, "targets scored per window, where a document is longer than a window", low=1)
    eval_seconds: float = setting(0.0, "adaptation ends in time for all evaluations of the artifact to take no longer than this; 0 = no limit", low=0)
    eval_softcap: float = setting(0.0, "LOGIT_SOFTCAP of evaluations; 0 = the model's", low=0)
    eval_softcap_negative: float = setting(0.0, "LOGIT_SOFTCAP_NEGATIVE of evaluations; 0 = the model's", low=0)
    tilt_orders: str = setting(
        "", "token tilt: numbers of tokens, the longest of which that came before hints at what follows, as 1,2,4,8; empty = off", form=parse_orders
    )
    ttt_lr: float = setting(0.005, "ttt_sgd, ttt_phased: learning rate of SGD on all weights", low=0)
    ttt_momentum: float = setting(0.9, "its momentum", low=0, high=0.9999)
    ttt_epochs: int = setting(3, "its steps per chunk", low=1, high=100)
    ttt_chunk_tokens: int = setting(32768, "tokens of a chunk, which a step reads whole", low=1)
    ttt_grad_clip: float = setting(1.0, "largest norm of its gradient", low=1e-9)
    ttt_prefix_docs: int = setting(2500, "ttt_phased: documents at the beginning that it learns from", low=1)
    ttt_phases: int = setting(1, "ttt_phased: parts of them, learnt from one after another", low=1, high=1000)
    ttt_lora_rank: int = setting(80, "ttt_lora, ttt_phased: rank of a document's LoRA", low=1, high=4096)
    ttt_lora_alpha: float = setting(144.0, "its output is scaled by this / rank", low=0)
    ttt_lora_targets: str = setting("q,k,v,out,up,gate,down,head", "the projections that it is added to", form=parse_projections)
    ttt_lora_lr: float = setting(1e-4, "its learning rate, of Adam without momentum", low=0)
    ttt_lora_beta2: float = setting(0.99, "decay of Adam's second moment", low=0, high=0.99999)
    ttt_lora_weight_decay: float = setting(0.5, "its decoupled weight decay, times the learning rate", low=0)
    ttt_lora_chunk_tokens: int = setting(48, "tokens that are scored, then learnt from in one step", low=1)
    ttt_lora_batch_docs: int = setting(64, "documents that are scored side by side", low=1)
    ttt_lora_warm_a: bool = setting(False, "go on from the A of earlier documents, in text order; off = every document starts afresh")
    scores_file: str = setting("", "write the nats of every target of the final evaluation here (.npy, float32, text order)")
    documents_file: str = setting("", "write the bits per byte of every document, without and with adaptation, here (.csv)")
    audit: bool = setting(False, "after scoring, check the rules of the challenge on this artifact and evaluation")
    audit_tokens: int = setting(4096, "targets of the split that AUDIT looks at", low=64)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return round(self.mlp_mult * self.model_dim * (2 / 3 if self.swiglu else 1))

    @property
    def value_embed_layer_list(self) -> list[int]:
        """VALUE_EMBED_LAYERS as a list."""
        return parse_layers(self.value_embed_layers)

    def bucket(self, layer: int) -> int:
        """Returns which of GRADIENT_BUCKETS the gradients of a layer travel with: 0 for the first layers, never less for a later one."""
        return layer * self.gradient_buckets // self.num_layers

    @property
    def rotated_dims(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        return self.rope_dims or self.head_dim

    @property
    def softcaps(self) -> tuple[float, float]:
        """The bounds of positive and of negative logits."""
        return self.logit_softcap, self.logit_softcap_negative or self.logit_softcap

    @property
    def window(self) -> int:
        """Tokens of context in an evaluation."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def stage_list(self) -> list[str]:
        """STAGES as a list."""
        return self.stages.split(",")

    @property
    def is_calibrated(self) -> bool:
        """Whether the export of this run needs statistics from training text."""
        return "export" in self.stage_list and self.quant_scheme in CALIBRATED_SCHEMES


def settings_between(first: str, last: str) -> tuple[str, ...]:
    """Returns the names of the fields of `Config` from `first` to `last`."""
    names = [each.name for each in fields(Config)]
    return tuple(names[names.index(first) : names.index(last) + 1])


# Settings that rebuild the model: they travel inside the artifact and the checkpoint.
MODEL_SETTINGS = (*settings_between("vocab_size", "doc_mask"), "train_seq_len")
# Settings that may differ between a run and its continuation: they do not reach the trained weights, but for the rounding of kernels.
FREE_ON_RESUME = (
    *settings_between("run_id", "kernels"), *settings_between("gptq_damping", "byte_shuffle"), *settings_between("val_batch_size", "audit_tokens"),
)  # fmt: skip
# These as well, as long as training never sees the grid.
GRID_SETTINGS = (*settings_between("quant_scheme", "bytes_cap"), "qat_loop_noise")

SP8192 = {"data_path": "data/datasets/fineweb10B_sp8192", "tokenizer_path": "data/tokenizers/fineweb_8192_bpe.model", "vocab_size": 8192}
CASEOPS = {
    "data_path": "data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved", "vocab_size": 8192,
    "tokenizer_path": "data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
}
# The same with a space and the marker after it as one token (PR #2109), made from the export by data/fuse_markers.py.
FUSED = {"data_path": f"{CASEOPS['data_path']}_fused", "tokenizer_path": f"{CASEOPS['data_path']}_fused/tokenizer.model"}
# What the later public systems share: 11 x 512 with exclusive self-attention, partial RoPE, scaled norms, and Muon with weight decay.
LATE = {
    **SP8192, "num_layers": 11, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 4.0, "leaky_relu_slope": 0.5, "rope_dims": 16,
    "xsa_last_n": 11, "ln_scale": True, "skip_connections": "gated", "num_loops": 2, "loop_start": 3, "loop_end": 5, "enable_looping_at": 0.35,
    "train_seq_len": 2048, "train_batch_tokens": 786432, "micro_batch_tokens": 98304, "tied_embed_lr": 0.03, "scalar_lr": 0.02,
    "muon_momentum_warmup_start": 0.92, "muon_momentum_warmup_steps": 1500, "muon_row_normalize": True, "muon_weight_decay": 0.095,
    "embed_weight_decay": 0.085, "scalar_weight_decay": 0.02, "grad_clip_norm": 0.3, "warmdown_iters": 0, "lr_floor_frac": 0.1, "ema_decay": 0.9965,
    "quant_scheme": "gptq", "matrix_bits": 6, "matrix_clip_sigmas": 12.85, "mlp_clip_sigmas": 12.85, "attn_clip_sigmas": 12.85, "embed_clip_sigmas": 20.0,
    "coder": "brotli", "code_order": "columns", "byte_shuffle": True,
}
# The challenge's record of PR #1855, 1.0611 bpb.
RECORD_1855 = {
    **LATE, **CASEOPS, "use_smeargate": True, "smeargate_kind": "add", "attention_gate_window": 12, "qk_gain_init": 5.0,
    "parallel_residuals": "lanes", "parallel_start_layer": 8, "matrix_lr": 0.026, "muon_momentum": 0.97, "beta2": 0.99, "warmdown_frac": 0.85,
    "embed_bits": 7, "attn_clip_sigmas": 13.0, "mlp_clip_sigmas": 11.5, "embed_clip_sigmas": 14.0, "code_order": "sorted", "lqer_rank": 4,
    "final_eval": "ttt_phased", "eval_seconds": 600.0, "ttt_lr": 0.001, "ttt_epochs": 1, "ttt_phases": 3, "ttt_lora_warm_a": True,
}

# PR #2014, 1.0576 bpb: PR #1855 with rows that grow.
RECORD_2014 = {
    **RECORD_1855, "ttt_phases": 1, "qk_gain_init": 5.25, "train_seq_len": 3072, "train_seq_schedule": "1024@0.1,2048@0.7,3072@1",
}
# That record's network and schedule with the tokens, quantiser, optimiser and evaluation that our own paired runs prefer.
LOOPED = {
    **RECORD_2014, **FUSED, "quant_scheme": "rate", "coder": "range", "code_order": "rows", "byte_shuffle": False, "lqer_rank": 0,
    "normuon_beta2": 0.95, "muon_row_normalize": False, "ema_every": 5, "tilt_orders": "1,2,4,8,16",
}
# The same layers without loops, each with weights of its own.
UNIQUE = {**LOOPED, "num_layers": 17, "num_loops": 0, "xsa_last_n": 17, "parallel_start_layer": 14}

PRESETS: dict[str, dict[str, Any]] = {
    # Ours, all of 17 executed layers at 16,000,000 bytes: how many of them have weights of their own decides the bits a weight gets (records/DEFAULT.md).
    "default": {**UNIQUE, "input_stages": "bigram,norm,smear", "dynamic_skip_last_n": 2, "value_embed_layers": "15,16"},
    "unique": UNIQUE,
    "half_looped": {**LOOPED, "num_layers": 14, "num_loops": 1, "loop_start": 4, "loop_end": 6, "xsa_last_n": 14, "parallel_start_layer": 11},
    "looped": LOOPED,
    # Every setting as listed: 9 x 512 without any optional feature, to build on.
    "plain": {},
    # The challenge's starter script: 9 x 512, int8 + zlib, 1.2244 bpb on 8 H100 (its record 2026-03-17).
    "baseline": {
        "doc_mask": False, "data_shuffle": False, "matrix_init": "uniform", "muon_coefficients": "classic",
        "num_layers": 9, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 2.0, "vocab_size": 1024,
        "warmdown_iters": 1200, "matrix_lr": 0.04, "scalar_lr": 0.04, "tied_embed_lr": 0.05, "final_eval": "chunked",
        "quant_scheme": "rowmax", "coder": "zlib",
    },
    # Three blocks run three times; every idea about training with few weights and about averaging them.
    "recurrent": {
        "num_layers": 3, "model_dim": 896, "num_heads": 14, "num_kv_heads": 7, "mlp_mult": 4.25, "num_loops": 2, "loop_start": 0, "loop_end": 2,
        "loop_embedding": True, "embed_rank": 256, "use_smeargate": True, "input_stages": "smear,bigram,norm", "bigram_hash_buckets": 4096,
        "matrix_lr": 0.02, "scalar_lr": 0.02, "tied_embed_lr": 0.03, "muon_momentum_warmup_start": 0.92, "muon_momentum_warmup_steps": 1500,
        "muon_weight_decay": 0.04, "cautious_weight_decay": True, "weight_decay_taper_frac": 0.7,
        "warmdown_iters": 0, "warmdown_frac": 0.25, "warmdown_ends": "0.6,1", "ema_decay": 0.997, "lawa_k": 5, "lawa_every": 100,
        "qat_start_frac": 0.85,
    },
    # The record of 2026-03-19, 1.1556 bpb.
    "smeargate": {
        "num_layers": 9, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 3.0, "use_smeargate": True, "bigram_hash_buckets": 4096,
        "input_stages": "bigram,smear,norm", "muon_coefficients": "classic", "matrix_lr": 0.02, "scalar_lr": 0.02, "tied_embed_lr": 0.03,
        "muon_momentum": 0.99, "muon_momentum_warmup_start": 0.92, "muon_momentum_warmup_steps": 1500, "muon_weight_decay": 0.01,
        "warmdown_iters": 3000, "qat_start_frac": 0.0, "quant_scheme": "rowmax", "matrix_bits": 6, "embed_bits": 16, "coder": "zstd",
    },
    # PR #1090: 80 minutes on one H100, 1.1573 bpb.
    "xsa_swiglu_lora_ttt": {
        "num_layers": 11, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 3.0, "swiglu": True, "xsa_last_n": 4, "use_smeargate": True,
        "smeargate_init": 0.0, "input_stages": "bigram,norm,smear", "bigram_hash_buckets": 4096, "bigram_hash_scale": 0.05,
        "train_seq_len": 2048, "max_wallclock_seconds": 4850.0, "warmdown_iters": 3000, "muon_coefficients": "classic", "muon_weight_decay": 0.04,
        "swa_every": 200, "swa_start_lr_scale": 0.999, "quant_scheme": "rowmax", "matrix_bits": 6, "coder": "zstd",
        "final_eval": "ttt_lora",
    },
    # PR #1809, 1.0800 bpb.
    "sp8192_ttt": {
        **LATE, "qk_gain_init": 5.25, "parallel_residuals": "gptj", "parallel_start_layer": 7, "matrix_lr": 0.022, "muon_momentum": 0.99,
        "muon_backend_steps": 4, "warmdown_frac": 0.72, "final_eval": "ttt_sgd", "eval_seconds": 600.0,
    },
    # PR #1962, 1.0631 bpb: trained as PR #1855.
    "adaptive_clip": {**RECORD_1855, "quant_scheme": "adaptive", "ttt_lora_rank": 56},
    # PR #379, 1.1257 bpb.
    "gptq_lite": {
        "num_layers": 11, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 3.0, "rope_dims": 16, "rope_base": 22081.8, "xsa_last_n": 4,
        "ln_scale": True,
        "use_smeargate": True, "smeargate_init": 0.0, "input_stages": "bigram,norm,smear", "bigram_hash_buckets": 2048, "bigram_hash_scale": 0.05,
        "value_embed_layers": "9,10", "train_seq_len": 2048, "train_batch_tokens": 786432, "micro_batch_tokens": 98304,
        "muon_coefficients": "classic", "matrix_lr": 0.025, "scalar_lr": 0.025, "tied_embed_lr": 0.035, "muon_momentum": 0.99,
        "muon_momentum_warmup_start": 0.92, "muon_momentum_warmup_steps": 1500, "muon_weight_decay": 0.04, "embed_weight_decay": 0.04,
        "scalar_weight_decay": 0.04, "grad_clip_norm": 0.3, "warmdown_iters": 3000, "swa_every": 50, "qat_start_frac": 0.955,
        "quant_scheme": "gptq_lite", "gptq_lite_scope": "matrix", "matrix_bits": 6, "coder": "zstd",
    },
    "frontier": RECORD_2014,
    # The whole path on a laptop CPU, on the bundled text.
    "demo": {
        "data_path": "data/datasets/shakespeare_sp1024", "tokenizer_path": "data/datasets/shakespeare_sp1024/tokenizer.model",
        "num_layers": 4, "model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 3.0, "leaky_relu_slope": 0.5, "compile": False,
        "xsa_last_n": 4, "attention_gate_window": 12, "ln_scale": True, "skip_connections": "gated",
        "num_loops": 1, "loop_start": 1, "loop_end": 1, "enable_looping_at": 0.5, "loop_embedding": True,
        "parallel_residuals": "lanes", "parallel_start_layer": 3, "use_smeargate": True, "smeargate_kind": "add", "input_stages": "bigram,norm,smear",
        "bigram_hash_buckets": 2048, "bigram_hash_dim": 64, "bigram_hash_scale": 0.05, "value_embed_layers": "2,3", "value_embed_dim": 64,
        "train_seq_len": 128, "train_seq_schedule": "64@0.2,128@1", "train_batch_tokens": 2048, "micro_batch_tokens": 2048, "val_batch_size": 16384,
        "iterations": 680, "max_wallclock_seconds": 0.0, "warmup_steps": 1, "warmdown_iters": 0, "warmdown_frac": 0.9, "tied_embed_lr": 0.03,
        "muon_momentum_warmup_steps": 100, "muon_row_normalize": True, "normuon_beta2": 0.95, "muon_weight_decay": 0.1, "embed_weight_decay": 0.1,
        "cautious_weight_decay": True, "weight_decay_taper_frac": 0.7, "lr_floor_frac": 0.05, "ema_decay": 0.98, "ema_every": 5, "grad_clip_norm": 1.0,
        "checkpoint_every": 100, "val_loss_every": 340, "train_log_every": 50,
        "calibration_tokens": 32768, "bytes_cap": 500_000,
        "final_eval": "ttt_lora", "ttt_lora_rank": 16, "ttt_lora_alpha": 72.0, "ttt_lora_lr": 0.001, "ttt_lora_chunk_tokens": 64,
        "tilt_orders": "1,2,4,8,16",
    },
}
# SCALE=tiny: laid over any preset, so that the same features run in seconds on a CPU.
TINY: dict[str, Any] = {
    "num_layers": 4, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "bigram_hash_dim": 16, "value_embed_dim": 16, "gate_window": 8, "compile": False,
    "train_seq_len": 64, "train_batch_tokens": 1024, "micro_batch_tokens": 1024, "val_batch_size": 4096, "eval_stride": 32,
    "iterations": 30, "max_wallclock_seconds": 0.0, "warmup_steps": 1, "val_loss_every": 0, "train_log_every": 10,
    "muon_momentum_warmup_steps": 10, "warmdown_iters": 0, "warmdown_frac": 0.6, "lawa_every": 2, "calibration_tokens": 4096,
    "ttt_chunk_tokens": 2048, "ttt_lora_rank": 4, "ttt_lora_chunk_tokens": 32, "ttt_prefix_docs": 8,
}
# Of these, what a preset has on; then what is a preset's own.
TINY_FEATURES: dict[str, Any] = {
    "loop_start": 1, "loop_end": 1, "parallel_start_layer": 2, "value_embed_layers": "2,3", "attention_gate_window": 8, "rope_dims": 8, "embed_rank": 32,
    "bigram_hash_buckets": 256, "train_seq_schedule": "16@0.2,32@0.7,64@1", "ema_decay": 0.8, "swa_every": 2,
}
TINY_OF_PRESET: dict[str, dict[str, Any]] = {
    "recurrent": {"num_layers": 3, "loop_end": 2, "warmdown_frac": 0.25}, "demo": {"train_seq_schedule": "32@0.2,64@1"},
}  # fmt: skip

SETTINGS = {setting_field.name.upper(): setting_field for setting_field in fields(Config)}
# Names that the public records use for what is set otherwise here.
RENAMED = {
    "ADAM_WD": "SCALAR_WEIGHT_DECAY", "BIGRAM_DIM": "BIGRAM_HASH_DIM", "BIGRAM_VOCAB_SIZE": "BIGRAM_HASH_BUCKETS", "COMPRESSOR": "CODER",
    "GLOBAL_TTT_CHUNK_TOKENS": "TTT_CHUNK_TOKENS", "GLOBAL_TTT_EPOCHS": "TTT_EPOCHS", "GLOBAL_TTT_GRAD_CLIP": "TTT_GRAD_CLIP",
    "GLOBAL_TTT_LR": "TTT_LR", "GLOBAL_TTT_MOMENTUM": "TTT_MOMENTUM", "PHASED_TTT_ENABLED": "FINAL_EVAL=ttt_phased",
    "PHASED_TTT_NUM_PHASES": "TTT_PHASES", "PHASED_TTT_PREFIX_DOCS": "TTT_PREFIX_DOCS", "TTT_BATCH_SIZE": "TTT_LORA_BATCH_DOCS",
    "TTT_BETA1": "nothing: it is 0", "TTT_BETA2": "TTT_LORA_BETA2", "TTT_CHUNK_SIZE": "TTT_LORA_CHUNK_TOKENS", "TTT_ENABLED": "FINAL_EVAL=ttt_phased",
    "TTT_EVAL_SEQ_LEN": "EVAL_SEQ_LEN", "TTT_K_LORA": "TTT_LORA_TARGETS", "TTT_MLP_LORA": "TTT_LORA_TARGETS", "TTT_O_LORA": "TTT_LORA_TARGETS",
    "TTT_WEIGHT_DECAY": "TTT_LORA_WEIGHT_DECAY", "TTT_LORA_WARM_START_A": "TTT_LORA_WARM_A",
    "EMA_ENABLED": "EMA_DECAY (0 = off)", "GPTQ_CALIBRATION_BATCHES": "CALIBRATION_TOKENS",
    "GPTQ_RESERVE_SECONDS": "nothing: the time of the calibration is measured and reserved", "LQER_ENABLED": "LQER_RANK (0 = off)",
    "LQER_ASYM_ENABLED": "LQER_LEFT_BITS",
    "EMBED_WD": "EMBED_WEIGHT_DECAY", "EMBEDDING_DIM": "EMBED_RANK", "LATE_QAT_THRESHOLD": "QAT_START_FRAC (a fraction of the run)",
    "LAWA_ENABLED": "LAWA_K (0 = off)", "LAWA_FREQ": "LAWA_EVERY", "MIN_LR": "LR_FLOOR_FRAC", "MUON_WD": "MUON_WEIGHT_DECAY",
    "PARALLEL_FINAL_LANE": "nothing: the mean of both lanes leaves",
    "PARALLEL_RESIDUAL_START": "PARALLEL_RESIDUALS=gptj PARALLEL_START_LAYER", "QAT_ENABLED": "QAT_START_FRAC=0", "ROPE_TRAIN_SEQ_LEN": "TRAIN_SEQ_LEN",
    "ROPE_YARN": "ROPE_SCALING=yarn", "SKIP_GATES_ENABLED": "SKIP_CONNECTIONS=gated", "SMEAR_GATE_BOS_FIX": "nothing: it is always masked",
    "SMEAR_GATE_ENABLED": "USE_SMEARGATE=1 SMEARGATE_KIND=add", "SPARSE_ATTN_GATE_ENABLED": "ATTENTION_GATE_WINDOW=12",
    "SPARSE_ATTN_GATE_SCALE": "ATTENTION_GATE_SCALE", "SWA_ENABLED": "SWA_EVERY (0 = off)", "TRAIN_SEQ_SCHEDULE_MODE": "nothing: it follows progress",
    "TILT_BOOST": "TILT_ORDERS", "TILT_COUNT": "TILT_ORDERS", "TILT_ORDER": "TILT_ORDERS",
    "VAL_BATCH_TOKENS": "VAL_BATCH_SIZE", "VE_DIM": "VALUE_EMBED_DIM", "VE_ENABLED": "VALUE_EMBED_LAYERS", "VE_LAYERS": "VALUE_EMBED_LAYERS",
}
# A variable that starts like one of these belongs to us; if it is no setting, it is a mistake.
FAMILIES = (
    "MUON_", "NORMUON_", "SMEARGATE_", "EMA_", "LAWA_", "SWA_", "LOOP_", "PARALLEL_", "TRAIN_", "VAL_", "EVAL_", "QUANT_", "QAT_", "ROPE_",
    "WARMDOWN_", "TTT_", "PHASED_TTT_", "GLOBAL_TTT_", "GPTQ_", "LQER_", "CASEOPS_", "BIGRAM_", "CHECKPOINT_", "CALIBRATION_", "TILT_",
)  # fmt: skip


def parse_value(name: str, text: str) -> Any:
    """Returns `text` as the declared type of setting `name`. Raises ValueError saying what was expected."""
    declared = SETTINGS[name]
    low, high, choices = (declared.metadata[key] for key in ("low", "high", "choices"))
    if declared.type == "bool":
        if text.lower() not in ("0", "1", "true", "false"):
            raise ValueError("expected 0, 1, true or false")
        return text.lower() in ("1", "true")
    if declared.type == "str":
        if not text.isprintable():
            raise ValueError("expected printable characters on one line")
        if choices and text not in choices:
            raise ValueError(f"expected one of: {' '.join(choices)}")
        declared.metadata["form"](text)
        return text
    try:
        value = int(text) if declared.type == "int" else float(text)
    except ValueError:
        raise ValueError(f"expected {'a whole number' if declared.type == 'int' else 'a number'}") from None
    if declared.type == "float" and not math.isfinite(value):
        raise ValueError("expected a finite number")
    if not (low if low is not None else -sys.float_info.max) <= value <= (high if high is not None else sys.float_info.max):
        raise ValueError(f"expected {describe_range(low, high)}")
    return value


def describe_range(low: float | None, high: float | None) -> str:
    """Returns the bounds in words, e.g. "at least 1"."""
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"at least {low}" if low is not None else "a finite number"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Returns "; did you mean X?", "; here this is X" for a name that public records use, or ""."""
    if name in RENAMED:
        return f"; here this is {RENAMED[name]}"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def read_arguments(arguments: Sequence[str], problems: list[str]) -> dict[str, str]:
    """Returns NAME -> value from `NAME=value` and `@file` arguments (a file of such lines, as `config.env`), later ones winning."""
    lines: list[str] = []
    for argument in arguments:
        if not argument.startswith("@"):
            lines.append(argument)
            continue
        try:
            lines += [line for line in Path(argument[1:]).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        except (OSError, ValueError) as error:
            hint = f"; did you mean {argument}/config.env?" if Path(argument[1:]).is_dir() else ""
            problems.append(f"{argument}: cannot be read ({error}){hint}")
    pairs: dict[str, str] = {}
    for line in lines:
        name, equals, value = line.partition("=")
        if not equals or name not in SETTINGS:
            problems.append(f"{line}: expected NAME=value with a setting's name{did_you_mean(name.upper(), list(SETTINGS))}")
        else:
            pairs[name] = value
    return pairs


def read_environment(environment: Mapping[str, str], ignored: Sequence[str], problems: list[str]) -> dict[str, str]:
    """Returns NAME -> value of the settings in `environment`; a variable that looks like a misspelt setting is a problem."""
    for name in sorted(set(environment) - set(SETTINGS) - set(ignored)):
        close = difflib.get_close_matches(name, list(SETTINGS), n=1, cutoff=0.8)
        if close or name in RENAMED or name.startswith(FAMILIES):
            hint = f"Here this is {RENAMED[name]}. " if name in RENAMED else f"Did you mean {close[0]}? " if close else ""
            problems.append(f"{name} in the environment is not a setting. {hint}If it is not meant for this script: unset it, or IGNORE_ENV={name}")
    return {name: value for name, value in environment.items() if name in SETTINGS and name not in ignored}


def parse_config(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Returns the validated configuration. Raises ConfigError listing every problem."""
    problems: list[str] = []
    given = read_arguments(arguments, problems)
    ignored = [name.strip() for name in given.get("IGNORE_ENV", environment.get("IGNORE_ENV", "")).split(",")]
    given = {**read_environment(environment, ignored, problems), **given}
    values: dict[str, Any] = {}
    for name, text in given.items():
        try:
            values[name.lower()] = parse_value(name, text)
        except ValueError as error:
            problems.append(f"{name}={text}: {error}")
    preset = values.get("preset", Config.preset)
    if preset not in PRESETS:
        problems.append(f"PRESET={preset}: expected one of: {' '.join(PRESETS)}{did_you_mean(preset, list(PRESETS))}")
    row = PRESETS.get(preset, {})
    tiny = {**TINY, **{name: value for name, value in TINY_FEATURES.items() if row.get(name)}, **TINY_OF_PRESET.get(preset, {})}
    config = Config(**{**row, **(tiny if values.get("scale", Config.scale) == "tiny" else {}), **values})
    problems += validate(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


Rules = Iterator[tuple[bool, str]]  # what must hold, and what to say where it does not: the rule, the values and the remedy


def stage_rules(c: Config) -> Rules:
    """Yields the rules between stages and what they read."""
    known = [stage for stage in ("train", "export", "eval") if stage in c.stage_list]
    yield c.stage_list == known, f"STAGES={c.stages}: expected some of train,export,eval, each once, in this order"
    yield known != ["train", "eval"], "STAGES=train,eval would score something else than what it trained: the score is the artifact's; add export"
    yield "train" in known or "export" not in known or c.checkpoint != "" or c.resume, "STAGES without train: name what to export with CHECKPOINT=path"
    yield "export" in known or "eval" not in known or c.artifact != "", "STAGES without export: name what to score with ARTIFACT=path"
    yield "train" not in known or c.checkpoint == "", "CHECKPOINT is what STAGES without train exports; to continue a run use RESUME=1 RUN_ID=name"
    yield "export" not in known or c.artifact == "", "ARTIFACT is what STAGES without export scores; use STAGES=eval"
    yield not c.resume or c.run_id != "", "RESUME=1: say which run to continue with RUN_ID=name"
    yield Path(c.run_id).name == c.run_id and c.run_id not in (".", ".."), f"RUN_ID={c.run_id}: expected a plain folder name; use RUNS_DIR for its place"


def model_rules(c: Config) -> Rules:
    """Yields the rules between sizes and features of the model."""
    yield c.model_dim % c.num_heads == 0, f"NUM_HEADS={c.num_heads} must divide MODEL_DIM={c.model_dim}"
    yield c.num_heads % c.num_kv_heads == 0, f"NUM_KV_HEADS={c.num_kv_heads} must divide NUM_HEADS={c.num_heads}"
    yield c.rotated_dims % 2 == 0 and c.rotated_dims <= c.head_dim, f"ROPE_DIMS={c.rotated_dims} must be even and at most {c.head_dim}, the head's width"
    yield c.mlp_dim >= 1, f"MLP_MULT={c.mlp_mult} leaves no hidden width at MODEL_DIM={c.model_dim}"
    yield c.bos_id < c.vocab_size, f"BOS_ID={c.bos_id} must be below VOCAB_SIZE={c.vocab_size}"
    yield not (c.swiglu and c.leaky_relu_slope), "SWIGLU=1 has no squared relu: leave LEAKY_RELU_SLOPE at 0"
    yield not (c.swiglu and c.mlp_post_only), "SWIGLU=1 has no squared relu: leave MLP_POST_ONLY at 0"
    yield sorted(c.input_stages.split(",")) == ["bigram", "norm", "smear"], f"INPUT_STAGES={c.input_stages}: expected bigram, norm and smear in some order"
    highest = max(c.value_embed_layer_list, default=0)
    yield highest < c.num_layers, f"VALUE_EMBED_LAYERS={c.value_embed_layers} must name layers below NUM_LAYERS={c.num_layers}"
    widest = max(c.attention_gate_window, c.gate_window if c.use_smeargate else 0)
    yield widest <= c.model_dim, f"ATTENTION_GATE_WINDOW={c.attention_gate_window} and GATE_WINDOW={c.gate_window} must be at most MODEL_DIM={c.model_dim}"
    starts_inside = c.parallel_residuals == "none" or c.parallel_start_layer < c.num_layers
    yield starts_inside, f"PARALLEL_START_LAYER={c.parallel_start_layer} must be below NUM_LAYERS={c.num_layers}"
    in_order = not c.num_loops or c.loop_start <= c.loop_end < c.num_layers
    yield in_order, f"LOOP_START={c.loop_start} and LOOP_END={c.loop_end} must name layers in order, below NUM_LAYERS={c.num_layers}"
    before_lanes = not c.num_loops or c.parallel_residuals != "lanes" or c.loop_end < c.parallel_start_layer
    yield before_lanes, f"LOOP_END={c.loop_end} must be below PARALLEL_START_LAYER={c.parallel_start_layer}: two lanes cannot go back into one"
    yield c.compute_dtype != "float64" or not (c.mlp_post_only or c.fp8), "MLP_POST_ONLY and FP8 have no form in COMPUTE_DTYPE=float64: leave them off"
    widths = [c.model_dim, c.mlp_dim] * ("mlp" in c.fp8) + [c.vocab_size, (c.tie_embeddings and c.embed_rank) or c.model_dim] * ("head" in c.fp8)
    yield all(width % 16 == 0 for width in widths), f"FP8={c.fp8}: the sizes of its products, {widths}, must be multiples of 16"


def training_rules(c: Config) -> Rules:
    """Yields the rules between rows, batches and schedules."""
    trains = "train" in c.stage_list
    longest = max((value for value, _ in parse_steps(c.train_seq_schedule)), default=c.train_seq_len)
    yield not trains or longest == c.train_seq_len, f"TRAIN_SEQ_LEN={c.train_seq_len} must be the longest row of TRAIN_SEQ_SCHEDULE, {longest}"
    largest = max((value for value, _ in parse_steps(c.train_batch_schedule)), default=c.train_batch_tokens)
    is_largest = not trains or largest == c.train_batch_tokens
    yield is_largest, f"TRAIN_BATCH_TOKENS={c.train_batch_tokens} must be the largest batch of TRAIN_BATCH_SCHEDULE, {largest}"
    for phase in Schedule(c).phases():
        divides = not trains or phase.batch_tokens % phase.seq_len == 0
        yield divides, f"TRAIN_BATCH_TOKENS={phase.batch_tokens} must be a multiple of TRAIN_SEQ_LEN={phase.seq_len} wherever their schedules meet"
    yield c.gradient_buckets <= c.num_layers, f"GRADIENT_BUCKETS={c.gradient_buckets}: expected at most NUM_LAYERS={c.num_layers}"
    holds_a_row = not trains or c.micro_batch_tokens >= c.train_seq_len
    yield holds_a_row, f"MICRO_BATCH_TOKENS={c.micro_batch_tokens} must hold one row of TRAIN_SEQ_LEN={c.train_seq_len}"
    yield not (c.warmdown_iters and c.warmdown_frac), "WARMDOWN_ITERS and WARMDOWN_FRAC are two ways to say one thing: set one of them to 0"
    ends = parse_fracs(c.warmdown_ends)
    yield len(ends) == 1 or c.warmdown_frac > 0, f"WARMDOWN_ENDS={c.warmdown_ends} needs WARMDOWN_FRAC, and WARMDOWN_ITERS=0"
    fits_between = all(high - low >= c.warmdown_frac for low, high in itertools.pairwise([0.0, *ends]))
    yield fits_between, f"WARMDOWN_FRAC={c.warmdown_frac} is longer than the gap between two of WARMDOWN_ENDS={c.warmdown_ends}"


def artifact_rules(c: Config) -> Rules:
    """Yields the rules between quantiser, widths and coder."""
    yield c.quant_scheme != "rate" or c.coder == "range", f"QUANT_SCHEME=rate needs CODER=range, not {c.coder}: its codes do not fit bytes"
    widths = (c.matrix_bits, c.mlp_bits or c.matrix_bits, c.embed_bits)
    yield all(width in WIDTHS for width in widths), f"MATRIX_BITS, MLP_BITS and EMBED_BITS are {widths}: expected 2 to 8, or 16 = float16"
    yield max(parse_layer_bits(c.layer_bits), default=0) < c.num_layers, f"LAYER_BITS={c.layer_bits} must name layers below NUM_LAYERS={c.num_layers}"


def evaluation_rules(c: Config) -> Rules:
    """Yields the rules of windows, adaptation and what they write."""
    steps_inside = (c.final_eval == "chunked" and not c.documents_file) or c.eval_stride <= c.window
    yield steps_inside, f"EVAL_STRIDE={c.eval_stride} must be at most the window, {c.window} tokens (EVAL_SEQ_LEN or TRAIN_SEQ_LEN)"
    by_document = c.final_eval not in ("ttt_lora", "ttt_phased") or (c.ttt_lora_chunk_tokens <= c.window and c.doc_mask)
    chunk = f"TTT_LORA_CHUNK_TOKENS={c.ttt_lora_chunk_tokens} of at most the window, {c.window} tokens"
    yield by_document, f"FINAL_EVAL={c.final_eval} needs DOC_MASK=1, and {chunk}"
    yield c.swiglu or c.ttt_lora_targets != "gate", "TTT_LORA_TARGETS=gate: without SWIGLU there is no such projection"
    yield not c.scores_file or c.scores_file.endswith(".npy"), f"SCORES_FILE={c.scores_file}: expected a name that ends in .npy"
    yield not c.documents_file or c.documents_file.endswith(".csv"), f"DOCUMENTS_FILE={c.documents_file}: expected a name that ends in .csv"


def validate(config: Config) -> list[str]:
    """Returns what is wrong between settings, one string each."""
    groups = (stage_rules, model_rules, training_rules, artifact_rules, evaluation_rules)
    return [message for rules in groups for holds, message in rules(config) if not holds]


def format_value(value: Any) -> str:
    """Returns a setting's value as it is written in `config.env` and in `--help`."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def config_lines(config: Config) -> str:
    """Returns the text of `config.env`: every setting, `KEY=VALUE` a line; `train_gpt.py @config.env` reads it back."""
    return "".join(f"{name}={format_value(getattr(config, declared.name))}\n" for name, declared in SETTINGS.items())


def help_text() -> str:
    """Returns what `--help` prints: usage, every setting (name, type, default, range, meaning) and every preset."""
    lines = ["usage: [torchrun ...] train_gpt.py [NAME=value ...] [@runs/RUN_ID/config.env] [--plan [--json]]", ""]
    lines += ["NAME=value may also stand in the environment. Precedence: default < preset < SCALE=tiny < environment < argument.", "", "settings"]
    for name, declared in SETTINGS.items():
        low, high, choices = (declared.metadata[key] for key in ("low", "high", "choices"))
        allowed = " | ".join(choices) or (describe_range(low, high) if low is not None else "")
        about = f"{declared.metadata['meaning']}{f' ({allowed})' if allowed else ''}"
        lines.append(f"  {name:<27} {declared.type:<5} {format_value(declared.default) or '(empty)':<20} {about}")
    for preset, row in PRESETS.items():
        lines += ["", f"preset {preset}"] + ["  " + " ".join(f"{name.upper()}={format_value(value)}" for name, value in row.items())] * bool(row)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------------------------
# Runtime
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns ranks, clock, signals, log and files. On one process every collective is the identity, so the rest of the file never asks.

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# PyTorch 2.13 renames these two; 2.11 has the old names only.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Transfer(NamedTuple):
    """A tensor on its way between ranks, while this one does other work."""

    tensor: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """Returns the tensor once it is there."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


def keep_freed_memory() -> None:
    """Lets Linux's C library keep what is freed for the next use of it.

    Otherwise it hands activations back to the system at the end of every step and gets them again page by page: 4,000 page faults a step of
    `PRESET=demo`, some 5% of its time. Libraries without such a switch are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # of mallopt(3)
    with suppress(AttributeError, OSError, TypeError):  # not glibc; on Windows None is no library
        for option in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(option, 1 << 30)


class World:
    """The ranks of this run: the only place that calls a process group."""

    def __init__(self, device: str) -> None:
        """Joins the process group that `torchrun` announces, if any. `device` is a DEVICE setting."""
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("DEVICE=cuda: no CUDA device is visible; use DEVICE=cpu")
        if kind == "mps" and not torch.backends.mps.is_available():
            raise ValueError("DEVICE=mps: this is no Apple GPU; use DEVICE=cpu")
        self.device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
        if kind == "cpu":
            keep_freed_memory()
            # Weights that start at zero have gradients whose squares are denormal numbers, with which a CPU is slow: 5% of a step of PRESET=demo.
            torch.set_flush_denormal(True)
        self.control: dist.ProcessGroup | None = None
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            on_gpu = kind == "cuda"
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT, device_id=self.device if on_gpu else None)
            # Small host-side values travel apart from the gradients, so that reading them never waits for the GPU.
            self.control = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and files."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Returns `tensor`, replaced in place by its sum over ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def start_sum(self, tensor: Tensor) -> Transfer:
        """Starts to replace `tensor` by its sum over ranks."""
        return Transfer(tensor, dist.all_reduce(tensor, async_op=True) if self.size > 1 else None)

    def start_scatter_sum(self, stacked: Tensor) -> Transfer:
        """Starts to bring this rank's share of the sum over ranks of `stacked`, whose first dimension is a multiple of the world size."""
        if self.size == 1:
            return Transfer(stacked, None)
        share = torch.empty_like(stacked[: len(stacked) // self.size])
        return Transfer(share, reduce_scatter(share, stacked, async_op=True))

    def start_gather(self, share: Tensor) -> Transfer:
        """Starts to bring the ranks' shares, concatenated in rank order."""
        if self.size == 1:
            return Transfer(share, None)
        whole = share.new_empty((len(share) * self.size, *share.shape[1:]))
        return Transfer(whole, all_gather(whole, share.contiguous(), async_op=True))

    def gather_objects(self, value: Any) -> list[Any]:
        """Returns every rank's `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def share_of(self, costs: Sequence[float]) -> list[int]:
        """Returns which pieces of work with these costs this rank does: the dearest first, each going to the rank with the least so far."""
        loads, mine = [0.0] * self.size, list[int]()
        for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
            rank = loads.index(min(loads))
            loads[rank] += costs[number]
            if rank == self.rank:
                mine.append(number)
        return mine

    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Makes these tensors those of rank 0 on every rank."""
        for tensor in tensors if self.size > 1 else []:
            dist.broadcast(tensor, src=0)

    def from_main(self, value: Any) -> Any:
        """Returns rank 0's `value` on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def close(self) -> None:
        """Leaves the process group."""
        if self.size > 1:
            dist.destroy_process_group()


class Control(NamedTuple):
    """What all ranks agree on once a step: rank 0's training clock, and whether any rank was asked to stop."""

    seconds: float
    stop: bool


class ControlLink:
    """Carries `Control` between ranks. `exchange` returns the values of the previous step, so that no rank waits for another that is up to a step behind."""

    def __init__(self, world: World, first: Control) -> None:
        self.world = world
        self.pending: tuple[Tensor, dist.Work | None] = (torch.tensor(first, dtype=torch.float64), None)

    def exchange(self, seconds: float, stop: bool) -> Control:
        """Sends this step's values (of `seconds`, rank 0's counts) and returns the agreed values of the step before."""
        values, work = self.pending
        if work is not None:
            work.wait()
        mine = torch.tensor([seconds if self.world.is_main else 0.0, float(stop)], dtype=torch.float64)
        sent = dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self.world.control, async_op=True) if self.world.size > 1 else None
        self.pending = (mine, sent)
        return Control(float(values[0]), bool(values[1]))


class Clock:
    """Training time in seconds: runs between `start` and `pause`, so that validation does not count."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.banked = seconds
        self.started: float | None = None

    def start(self) -> None:
        """Starts counting."""
        self.started = time.perf_counter()

    def pause(self) -> None:
        """Stops counting."""
        self.banked = self.seconds()
        self.started = None

    def seconds(self) -> float:
        """Returns the seconds counted so far."""
        return self.banked + (time.perf_counter() - self.started if self.started is not None else 0.0)


class StopSignals:
    """SIGTERM and SIGINT: the first one asks the training loop to finish its step and save; outside training, or asked again, it exits."""

    # A launcher passes on the signal that the terminal has already sent to every process: that is one request, not two.
    REPEAT_SECONDS = 3.0

    def __init__(self) -> None:
        self.deferred = False
        self.received: signal.Signals | None = None
        self.received_at = 0.0

    def install(self) -> None:
        """Takes over both signals in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        again = self.received is not None and time.monotonic() > self.received_at + self.REPEAT_SECONDS
        if again or not self.deferred:
            raise SystemExit(128 + number)
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()


@contextmanager
def atomic_file(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears whole under its name or not at all, even when the machine dies. What had that name is kept as `keep`."""
    unfinished = path.with_name(path.name + ".partial")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(unfinished, path)
    except OSError as problem:
        if problem.errno and problem.filename is None:  # writing does not say to which file
            raise OSError(problem.errno, problem.strerror, str(path)) from None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes) -> None:
    """Writes `data` as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def try_lock(file: IO[Any]) -> bool:
    """Locks an open file until it is closed; returns False where another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def write_config(folder: Path, config: Config) -> None:
    """Writes `config.env`, which repeats the run, or goes on with it after RESUME=1 has been added."""
    atomic_write(folder / "config.env", config_lines(replace(config, resume=False)).encode())


def clock_text(seconds: float) -> str:
    """Returns m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def step_line(e: Mapping[str, Any]) -> str:
    """Returns the log line of a `step` event."""
    rate = e["tokens_per_second"]
    speed = f"{rate / 1e6:.2f} Mtok/s" if rate >= 1e6 else f"{rate / 1e3:.1f} ktok/s"
    return (
        f"step {e['step']}/{e['steps']}  loss {e['train_loss']:.4f}  lr {e['lr_scale']:.3f}  {e['step_ms']:.1f} ms  {speed}"
        f"  {clock_text(e['train_seconds'])} of {clock_text(e['train_seconds'] + e['remaining_seconds'])}"
    )


def export_line(e: Mapping[str, Any]) -> str:
    """Returns the size table of an `export` event."""
    rows = [f"  {role['role']:<8} {role['params']:>12,} weights {role['bytes']:>12,} bytes {role['bits_per_weight']:>8.3f} bits/weight" for role in e["roles"]]
    over = e["bytes_total"] > e["bytes_cap"]
    verdict = f"over BYTES_CAP={e['bytes_cap']:,} by {e['bytes_total'] - e['bytes_cap']:,}" if over else f"within {e['bytes_cap']:,}"
    total = f"Total submission size: artifact {e['bytes_model']:,} + code {e['bytes_code']:,} = {e['bytes_total']:,} bytes, {verdict}"
    cost = f"quantised by {e['scheme']}: KL {e['kl']:.6f}, loss {e['loss_change']:+.5f} nats per token on held-out training text" if "kl" in e else ""
    return "\n".join([*rows, *[cost] * bool(cost), total])


# What people read is formatted from what machines read, so the two cannot disagree.
LOG_LINES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "config": lambda e: f"run {e['run_id']}  preset {e['preset']}  " + " ".join(f"{name}={value}" for name, value in e["changed"].items()),
    "env": lambda e: f"commit {e['commit']}  torch {e['torch']}  {e['device_name']} x {e['world_size']}  {e['params']:,} parameters",
    "phase": lambda e: f"phase from step {e['step']}: layers {','.join(map(str, e['order']))}  {e['seq_len']} tokens a row  qat {int(e['qat'])}",
    "step": step_line,
    "val": lambda e: f"step {e['step']}  val_loss {e['val_loss']:.4f}  val_bpb {e['val_bpb']:.4f}  ({e['seconds']:.1f} s)",
    "note": lambda e: e["text"],
    "export": export_line,
    "eval": lambda e: f"{e['name']} evaluation of the artifact: val_loss {e['val_loss']:.4f}  val_bpb {e['val_bpb']:.4f}  ({e['seconds']:.1f} s)",
    "result": lambda e: "  ".join(
        text.format(**e)
        for key, text in (
            ("val_bpb", "val_bpb {val_bpb:.4f}"),
            ("bytes_total", "bytes {bytes_total:,} of {bytes_cap:,}"),
            ("train_seconds", "train {train_seconds:.1f} s"),
            ("eval_seconds", "eval {eval_seconds:.1f} s"),
        )
        if e[key] is not None  # a stage that did not run has nothing to say
    ),
}


class Log:
    """Events to `run.jsonl`, their lines to `log.txt` and standard output; silent on every rank but 0."""

    def __init__(self, folder: Path | None) -> None:
        """Appends to the files in `folder`; None = a rank that does not log."""
        self.events = open(folder / "run.jsonl", "a", encoding="utf-8") if folder else None  # noqa: SIM115
        if self.events is not None and not try_lock(self.events):
            raise ValueError(f"{self.events.name}: another process has just begun to work on this run; choose another RUN_ID")
        self.lines = open(folder / "log.txt", "a", encoding="utf-8") if folder else None  # noqa: SIM115
        self.live = folder is not None and sys.stdout.isatty()

    def event(self, kind: str, **values: Any) -> None:
        """Records one event and prints its line."""
        if self.events is None or self.lines is None:
            return
        event = {"event": kind, "time": round(time.time(), 3), **values}
        line = LOG_LINES[kind](event)
        with suppress(OSError):  # a full disk must not end a run whose weights are in memory, even where the output goes to it
            print(f"\r\033[K{line}" if self.live else line, flush=True)
        for file, text in ((self.events, json.dumps(event)), (self.lines, line)):
            try:
                file.write(text + "\n")
                file.flush()
            except OSError as problem:
                with suppress(OSError):
                    print(f"{file.name}: {problem.strerror}; a line is missing there", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Records a sentence."""
        self.event("note", text=text)

    def progress(self, line: str) -> None:
        """Shows a line that the next one overwrites; only on a terminal."""
        if self.live:
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def close(self) -> None:
        """Closes both files."""
        for file in (self.events, self.lines):
            if file is not None:
                with suppress(OSError):
                    file.close()


class Run(NamedTuple):
    """What every stage needs."""

    config: Config
    world: World
    log: Log
    folder: Path
    signals: StopSignals
    source: str  # of this script, as it was when the run started


# ------------------------------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns the shard format, the order of training rows, and how many bytes of text each token stands for. Every batch is a function of the
# seed and of how many rows came before it, whatever the number of ranks.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 256 * 4
# CaseOps text spells capitals as these characters before small letters, so its tokens do not show how many bytes of the original they stand for.
CASE_MARKERS = "\ue001\ue002\ue003\ue004"


# Published exports that lie in a repository of their own.
REPOSITORIES = {
    "sp8192": "kevclark/parameter-golf",
    "sp8192_lossless_caps_caseops_v1_reserved": "romeerp/parameter-golf-caseops-v1",
}


def how_to_get(config: Config) -> str:
    """Returns the command that makes the missing data of this configuration, or the two."""
    folder = Path(config.data_path).name
    if folder.startswith("fineweb10B_"):
        export = folder.removesuffix("_fused")
        variant = export.removeprefix("fineweb10B_")
        source = f" --repo-id {REPOSITORIES[variant]}" if variant in REPOSITORIES else ""
        then = f" && python data/fuse_markers.py {Path(config.data_path).with_name(export)}" if folder != export else ""
        return f"fetch it with: python data/download.py{source} --variant {variant}{then}"
    source = "data/sample/shakespeare.jsonl.xz" if folder.startswith("shakespeare") else "YOUR_TEXT.jsonl"
    return f"build it with: python data/tokenize_docs.py --input {source} --output {config.data_path} --vocab-size {config.vocab_size}"


def find_shards(config: Config, split: str) -> list[Path]:
    """Returns the shards of a split ("train" or "val") in order. Raises FileNotFoundError naming the command that makes them."""
    paths = sorted(path for path in Path(config.data_path).glob(f"*_{split}_*.bin") if f"_{split}_bytes_" not in path.name)
    if not paths:
        raise FileNotFoundError(f"DATA_PATH={config.data_path}: no *_{split}_*.bin there; {how_to_get(config)}")
    return paths


def read_shard(path: Path) -> np.ndarray:
    """Returns the uint16 tokens of a shard, memory-mapped. Raises ValueError when the header or the size is wrong."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256:
        raise ValueError(f"{path}: {size} bytes are less than the {SHARD_HEADER_BYTES} of a shard's header; it is truncated: make or fetch it again")
    magic, version, count = header[:3].tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise ValueError(f"{path}: magic {magic}, version {version} is not a token shard's; expected magic {SHARD_MAGIC}, version {SHARD_VERSION}")
    expected = SHARD_HEADER_BYTES + 2 * count
    if size != expected or count < 1:
        verdict = "truncated" if size < expected else "empty" if count == 0 else "damaged"
        raise ValueError(f"{path}: {size:,} bytes, but its header promises {count:,} tokens = {expected:,} bytes; it is {verdict}: make or fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES)


def check_tokens(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Raises ValueError when a token is outside the vocabulary."""
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise ValueError(f"{path}: token {int(tokens.max())} is outside VOCAB_SIZE={vocab_size}; these shards were made with another tokenizer")


class TrainLoader:
    """Endless training rows of `seq_len + 1` tokens, cut from one shard after another.

    A shard is cut into rows at a random phase and its rows are visited in a random order, both new in every pass (in order, from the first
    token, without DATA_SHUFFLE). `state` says where the next row comes from; setting it moves the loader there.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.paths = find_shards(config, "train")
        self.shards = [read_shard(path) for path in self.paths]
        longest = max(len(shard) for shard in self.shards)
        if longest <= config.train_seq_len:
            raise ValueError(f"DATA_PATH={config.data_path}: the longest train shard has {longest} tokens, too short for TRAIN_SEQ_LEN={config.train_seq_len}")
        fingerprint = zlib.crc32(repr([(path.name, len(shard)) for path, shard in zip(self.paths, self.shards, strict=True)]).encode())
        self.state = {"passes": 0, "shard": 0, "row": 0, "seq_len": 0, "tokens": 0, "shards": fingerprint}
        self.bounds = DocumentBounds(config)
        self.starts_key: tuple[int, ...] = ()
        self.starts = np.empty(0, dtype=np.int64)

    def row_starts(self) -> np.ndarray:
        """Returns where the rows of the current shard begin, in the order of this pass."""
        passes, shard, seq_len = (self.state[key] for key in ("passes", "shard", "seq_len"))
        if self.starts_key != (passes, shard, seq_len):
            spare = len(self.shards[shard]) - 1
            if self.config.data_shuffle:
                generator = np.random.default_rng([self.config.seed, passes, shard])
                phase = int(generator.integers(seq_len)) if spare >= 2 * seq_len else 0
                self.starts = generator.permutation((spare - phase) // seq_len) * seq_len + phase
            else:
                self.starts = np.arange(spare // seq_len) * seq_len
            self.starts_key = (passes, shard, seq_len)
        return self.starts

    def next_shard(self) -> None:
        """Goes to the next shard, and after the last one to the first, in a new pass."""
        last = self.state["shard"] + 1 == len(self.shards)
        self.state.update(row=0, shard=0 if last else self.state["shard"] + 1, passes=self.state["passes"] + last)

    def check_length(self, shard: int) -> None:
        """Raises ValueError when a shard has been cut since the run began: reading what it had would kill the process. One that vanished is still mapped."""
        path, expected = self.paths[shard], SHARD_HEADER_BYTES + 2 * len(self.shards[shard])
        with suppress(OSError):
            if (size := path.stat().st_size) < expected:
                raise ValueError(f"{path}: {size:,} bytes, but {expected:,} when the run began; it has been truncated: make or fetch it again")

    def next_rows(self, num_rows: int, seq_len: int, world: World) -> Tensor:
        """Returns this rank's equal share of the next `num_rows` rows: (num_rows / ranks, seq_len + 1) int64, on the CPU.

        A change of `seq_len` goes on with the next shard: cutting this one anew would repeat some of its text and never reach other parts.
        """
        state = self.state
        if seq_len != state["seq_len"]:
            if state["seq_len"]:
                self.next_shard()
            state["seq_len"] = seq_len
        state["tokens"] += num_rows * seq_len
        picked: list[tuple[int, int]] = []
        while len(picked) < num_rows:
            starts = self.row_starts()[state["row"] : state["row"] + num_rows - len(picked)]
            picked += [(state["shard"], int(start)) for start in starts]
            state["row"] += len(starts)
            if len(picked) < num_rows:
                self.next_shard()
        share = num_rows // world.size
        mine = picked[world.rank * share : (world.rank + 1) * share]
        for shard in {shard for shard, _ in mine}:
            self.check_length(shard)
        rows = [self.shards[shard][start : start + seq_len + 1] for shard, start in mine]
        for row, (shard, _) in zip(rows, mine, strict=True):
            check_tokens(row, self.config.vocab_size, self.paths[shard])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


class DocumentBounds:
    """Upper bounds on the documents of a row, so generous that a batch that needs another one, and a compiled graph, is not to be expected in a run.

    Of web pages, 32 rows of 3,072 tokens have 144 parts with a standard deviation of 13. What a bound has too much costs attention empty blocks.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.bounds: dict[tuple[int, ...], int] = {}

    def of(self, tokens: Tensor) -> int:
        """Returns no less than the mean number, over the rows of tokens (B, T) on the CPU, of documents that start in a row or go on there."""
        count = len(tokens) + int((tokens[:, 1:] == self.config.bos_id).sum()) * self.config.doc_mask
        shape = tuple(tokens.shape)
        if count > self.bounds.get(shape, 0) * len(tokens):
            self.bounds[shape] = math.ceil((1.5 * count + 64) / len(tokens))
        return self.bounds[shape]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns `tensor` on `device`; the copy to a GPU does not block the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class TokenBytes(NamedTuple):
    """How many bytes of text each token stands for: (V,) arrays."""

    own: np.ndarray  # bytes of the piece without its leading space
    leading_space: np.ndarray  # the piece starts with a space, which counts unless a document starts there
    boundary: np.ndarray  # control tokens: a document starts after them
    is_cased: bool  # a tokenizer of CaseOps text: only a side file knows the bytes

    def of_targets(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the bytes of targets tokens[1:], int64 (N - 1,)."""
        previous, targets = tokens[:-1], tokens[1:]
        return self.own[targets] + (self.leading_space[targets] & ~self.boundary[previous])


def token_bytes(config: Config) -> TokenBytes:
    """Returns the byte table of the tokenizer. Raises ValueError or FileNotFoundError when it does not fit the settings.

    Every U+2581 of a piece is one space, one byte; byte-fallback pieces are one byte; control, unknown and unused pieces none.
    """
    path = Path(config.tokenizer_path)
    if not path.is_file():
        raise FileNotFoundError(f"TOKENIZER_PATH={path}: no such file; {how_to_get(config)}")
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"TOKENIZER_PATH={path}: not a SentencePiece model ({error})") from None
    size = model.vocab_size()
    if size != config.vocab_size:
        raise ValueError(f"VOCAB_SIZE={config.vocab_size}, but TOKENIZER_PATH={path} has {size} tokens; set VOCAB_SIZE={size}, or the path of the right model")
    if model.bos_id() < 0:
        raise ValueError(f"TOKENIZER_PATH={path}: this model has no BOS token, and every document must start with one")
    if model.bos_id() != config.bos_id:
        raise ValueError(f"BOS_ID={config.bos_id}, but TOKENIZER_PATH={path} says {model.bos_id()}; set BOS_ID={model.bos_id()}")
    is_cased = all(model.piece_to_id(marker) != model.unk_id() for marker in CASE_MARKERS)
    table = TokenBytes(np.zeros(size, dtype=np.int64), np.zeros(size, dtype=bool), np.zeros(size, dtype=bool), is_cased)
    for token in range(size):
        table.boundary[token] = model.is_control(token)
        if model.is_byte(token):
            table.own[token] = 1
        elif not (model.is_control(token) or model.is_unknown(token) or model.is_unused(token)):
            text = model.id_to_piece(token).replace("\u2581", " ")
            table.leading_space[token] = text.startswith(" ")
            table.own[token] = len(text.encode()) - text.startswith(" ")
    return table


def check_manifest(config: Config) -> None:
    """Raises ValueError where the manifest beside the shards names another tokenizer than TOKENIZER_PATH, whose bytes per token would be wrong."""
    path = Path(config.data_path) / "manifest.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))["tokenizer"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # shards without a manifest, or with one of another kind
        return
    if hashlib.sha256(Path(config.tokenizer_path).read_bytes()).hexdigest() != stated:
        raise ValueError(f"TOKENIZER_PATH={config.tokenizer_path} is not the tokenizer that made these shards, by {path}; name that one")


class ValData(NamedTuple):
    """The validation split: every token, and the bytes of every target."""

    tokens: np.ndarray  # (N,) uint16
    target_bytes: np.ndarray  # (N - 1,) int64


def side_file(path: Path) -> Path:
    """Returns where the bytes of the tokens of a validation shard are kept: a shard of as many uint16. Source: PR #1729."""
    return path.with_name(path.name.replace("_val_", "_val_bytes_"))


def load_val(config: Config) -> ValData:
    """Returns the whole validation split. Raises ValueError when it is damaged or shorter than one window, FileNotFoundError without its side files."""
    paths = find_shards(config, "val")
    check_manifest(config)
    table = token_bytes(config)
    shards, sides = [np.array(read_shard(path)) for path in paths], list[np.ndarray]()
    for path, shard in zip(paths, shards, strict=True):
        check_tokens(shard, config.vocab_size, path)
        if table.is_cased and not side_file(path).is_file():
            raise FileNotFoundError(f"{side_file(path)}: no such file, and only it knows the bytes behind CaseOps tokens; {how_to_get(config)}")
        if table.is_cased:
            sides.append(read_shard(side_file(path)))
            if len(sides[-1]) != len(shard):
                raise ValueError(f"{side_file(path)}: {len(sides[-1]):,} entries for the {len(shard):,} tokens of {path.name}; they belong to different data")
    tokens = np.concatenate(shards)
    if len(tokens) <= config.window:
        raise ValueError(f"DATA_PATH={config.data_path}: {len(tokens)} validation tokens do not fill one window of {config.window} and its target")
    val = ValData(tokens, np.concatenate(sides)[1:].astype(np.int64) if sides else table.of_targets(tokens))
    if not val.target_bytes.any():
        raise ValueError(f"DATA_PATH={config.data_path}: the validation tokens stand for no text at all; these shards were made with another tokenizer")
    return val


# ------------------------------------------------------------------------------------------------------------------------------------
# Schedule
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns what changes during training. A `Phase` is everything that changes what is computed, and is an argument of forward; a `Schedule`
# is a pure function from progress to the phase and the optimiser's knobs.


@dataclass(frozen=True)
class Phase:
    """What the network computes: executed layers, tokens a row and a step, and whether weights pass through their grid."""

    order: tuple[int, ...]
    seq_len: int
    batch_tokens: int = 0  # of a training step; no evaluation reads it
    qat: bool = False
    row_documents: int = 0  # a forward has at most so many a row, in the mean; 0 = attention counts them, which a compiled graph cannot


class Progress(NamedTuple):
    """How far training has come."""

    step: int
    frac: float  # the larger of step fraction and time fraction
    remaining_steps: float


class Knobs(NamedTuple):
    """What the schedule sets for one step."""

    phase: Phase
    lr_scale: float
    momentum: float
    weight_decay_scale: float


class Schedule:
    """Learning rate: constant, then a linear decay to LR_FLOOR_FRAC over the last WARMDOWN_ITERS steps or WARMDOWN_FRAC of the run.

    With several WARMDOWN_ENDS there are as many decays (WSD-S, arXiv:2410.05192): after each the rate jumps back, and training goes on from the
    decayed weights.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.seq_lens = parse_steps(config.train_seq_schedule) or [(config.train_seq_len, 1.0)]
        self.batches = parse_steps(config.train_batch_schedule) or [(config.train_batch_tokens, 1.0)]
        self.decay_ends = parse_fracs(config.warmdown_ends)

    def order(self, frac: float) -> tuple[int, ...]:
        """Returns the executed layers: all blocks in order; from ENABLE_LOOPING_AT on, LOOP_START to LOOP_END run NUM_LOOPS times more."""
        c = self.config
        loops = c.num_loops if frac >= c.enable_looping_at else 0
        layers, after = tuple(range(c.num_layers)), c.loop_end + 1
        return layers[:after] + layers[c.loop_start : after] * loops + layers[after:]

    def phase(self, frac: float) -> Phase:
        """Returns the phase at a fraction of the run."""
        seq_len, batch_tokens = (next((value for value, until in steps if frac < until), steps[-1][0]) for steps in (self.seq_lens, self.batches))
        return Phase(self.order(frac), seq_len, batch_tokens, qat=frac >= self.config.qat_start_frac < 1)

    def phases(self) -> list[Phase]:
        """Returns every phase that a run can reach, in order."""
        changes = {0.0, self.config.enable_looping_at, self.config.qat_start_frac, *(until for _, until in self.seq_lens + self.batches)}
        return list(dict.fromkeys(self.phase(frac) for frac in sorted(changes) if frac < 1))

    @property
    def scored_phase(self) -> Phase:
        """The phase of evaluation: the last one, but weights are not passed through the grid: those of the artifact lie on it."""
        return replace(self.phase(1.0), qat=False)

    def progress(self, step: int, seconds: float, step_seconds: float) -> Progress:
        """Returns the progress after `step` steps and `seconds` of training, at an average of `step_seconds`."""
        c = self.config
        remaining = float(c.iterations - step)
        frac = step / c.iterations
        if c.max_wallclock_seconds:
            frac = max(frac, seconds / c.max_wallclock_seconds)
            if step_seconds:
                remaining = min(remaining, (c.max_wallclock_seconds - seconds) / step_seconds)
        return Progress(step, min(frac, 1.0), max(remaining, 0.0))

    def decay(self, progress: Progress) -> float:
        """Returns how much of the learning rate a decay leaves: 1 outside every decay, 0 at the end of each."""
        c = self.config
        if c.warmdown_iters:
            return min(progress.remaining_steps / c.warmdown_iters, 1.0)
        end = next((end for end in self.decay_ends if progress.frac < end), 1.0)
        return min((end - progress.frac) / c.warmdown_frac, 1.0) if c.warmdown_frac else 1.0

    def __call__(self, progress: Progress) -> Knobs:
        """Returns the knobs of the step that starts at `progress`."""
        c = self.config
        warm = min(progress.step / c.muon_momentum_warmup_steps, 1.0) if c.muon_momentum_warmup_steps else 1.0
        momentum = c.muon_momentum_warmup_start + warm * (c.muon_momentum - c.muon_momentum_warmup_start)
        weight_decay_scale = 1.0 if progress.frac < c.weight_decay_taper_frac else c.weight_decay_taper_scale
        return Knobs(self.phase(progress.frac), max(self.decay(progress), c.lr_floor_frac), momentum, weight_decay_scale)


# ------------------------------------------------------------------------------------------------------------------------------------
# Roles and grids
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns what a parameter is for, which decides its optimiser, rate and width in the artifact, and the grids that quantised weights lie on.
# Training (fake quantisation), export and the reader use the same grid, so simulation cannot differ from the artifact.


class Role(Enum):
    """What a parameter is for."""

    EMBED = "embed"
    TABLE = "table"  # embeddings that are never the head
    HEAD = "head"
    ATTENTION = "attention"
    MLP = "mlp"
    MATRIX = "matrix"  # other projections
    GAIN = "gain"


class RoleRule(NamedTuple):
    """How parameters of a role are trained and stored."""

    optimizer: str  # "muon" or "adam"
    lr: float
    weight_decay: float
    bits: int  # one of WIDTHS; LAYER_BITS may say otherwise for a layer
    clip_sigmas: float = 0.0


def role_rules(config: Config) -> dict[Role, RoleRule]:
    """Returns the one table from role to optimiser, learning rate, weight decay, bits and clipping."""
    c = config
    muon = ("muon", c.matrix_lr, c.muon_weight_decay)
    return {
        Role.EMBED: RoleRule("adam", c.tied_embed_lr if c.tie_embeddings else c.embed_lr, c.embed_weight_decay, c.embed_bits, c.embed_clip_sigmas),
        Role.TABLE: RoleRule("adam", c.tied_embed_lr, c.embed_weight_decay, c.embed_bits, c.embed_clip_sigmas),
        Role.HEAD: RoleRule("adam", c.head_lr, c.embed_weight_decay, c.matrix_bits, c.matrix_clip_sigmas),
        Role.ATTENTION: RoleRule(*muon, c.matrix_bits, c.attn_clip_sigmas),
        Role.MLP: RoleRule(*muon, c.mlp_bits or c.matrix_bits, c.mlp_clip_sigmas),
        Role.MATRIX: RoleRule(*muon, c.matrix_bits, c.matrix_clip_sigmas),
        Role.GAIN: RoleRule("adam", c.scalar_lr, c.scalar_weight_decay, 16),
    }


# Schemes whose steps come from statistics: training simulates those of the moment when QAT starts.
FROZEN_SCHEMES = ("adaptive", "rate")
CALIBRATED_SCHEMES = ("gptq", *FROZEN_SCHEMES)
RATE_LIMIT = 32766  # largest coordinate, in half steps


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Returns parameter name -> role, from the `roles` each module declares for its own parameters. A parameter without one is an error."""
    roles: dict[str, Role] = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            declared: Mapping[str, Role] = getattr(module, "roles", {})  # a module of PyTorch's declares none
            assert name in declared, f"parameter {path} has no role: name one in the `roles` of {type(module).__name__}"
            roles[path] = declared[name]
    return roles


class Grid(NamedTuple):
    """The points row_step * column_step * {-limit .. limit}. Rounding takes every `spacing`-th of them; a trellis also those in between."""

    row_step: Tensor  # (rows, 1)
    column_step: Tensor  # (1, columns) or (1, 1)
    limit: int
    spacing: int = 1

    @property
    def step(self) -> Tensor:
        """Distance between neighbouring points: (rows, columns) or (rows, 1)."""
        return self.row_step * self.column_step

    def round(self, weight: Tensor) -> Tensor:
        """Returns the integer coordinates of the nearest points, as floats: (rows, columns)."""
        codes = (weight / (self.step * self.spacing).clamp_min(1e-30)).round() * self.spacing
        return codes.clamp(-self.limit, self.limit)

    def round_towards_zero(self, weight: Tensor, bias: float) -> Tensor:
        """Returns the coordinates of the nearest points, `bias` steps in favour of the smaller ones."""
        shrunk = (weight.abs() - bias * self.spacing * self.step).clamp_min(0)
        return self.round(torch.where(weight < 0, -shrunk, shrunk)) if bias else self.round(weight)

    def dequantise(self, codes: Tensor) -> Tensor:
        """Returns the points with these coordinates."""
        return codes * self.step

    def fake(self, weight: Tensor) -> Tensor:
        """Returns the nearest points; the gradient passes straight through to `weight`."""
        return weight + (self.dequantise(self.round(weight)) - weight).detach()


def round_to_bfloat16(x: Tensor) -> Tensor:
    """Returns the bfloat16 values nearest to x >= 0, in x's dtype.

    Done on the bits: the compiler drops a cast to a narrow type and back, and then training would see another grid than the artifact has.
    """
    pattern = x.float().view(torch.int32)
    nearest = (pattern + 0x7FFF + ((pattern >> 16) & 1)) & ~0xFFFF
    return nearest.view(torch.float32).to(x.dtype)


def row_grid(clip: Tensor, bits: int) -> Grid:
    """Returns the grid of `bits` whose outermost point in each row is `clip` (rows, 1), to within half a step."""
    limit = 2 ** (bits - 1) - 1
    return Grid(round_to_bfloat16(clip / limit), clip.new_ones(1, 1), limit)


def rowmax_grid(weight: Tensor, bits: int) -> Grid:
    """Returns the grid whose outermost point is each row's absolute maximum. `weight` is (rows, columns)."""
    return row_grid(weight.detach().abs().amax(dim=1, keepdim=True), bits)


LITE_PERCENTILES = (0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999, 1.0)


def lite_grid(weight: Tensor, bits: int, scope: str) -> Grid:
    """Returns the grid clipped at the percentile of absolute values, for each row or for the whole matrix, with the least squared error. Source: PR #379."""
    weight = weight.detach()
    ordered = weight.abs().sort(dim=1).values
    ranks = [min(math.ceil(share * weight.shape[1]), weight.shape[1]) - 1 for share in LITE_PERCENTILES]
    clips = [ordered[:, rank, None] for rank in dict.fromkeys(ranks)]
    grids = [row_grid(clip, bits) for clip in clips]
    errors = torch.stack([(grid.dequantise(grid.round(weight)) - weight).square().sum(dim=1, keepdim=True) for grid in grids])
    if scope == "matrix":
        errors = errors.sum(dim=1, keepdim=True)
    best = errors.argmin(dim=0, keepdim=True).expand(1, *clips[0].shape)
    return row_grid(torch.stack(clips).gather(0, best)[0], bits)


def sdclip_grid(weight: Tensor, bits: int, sigmas: float | Tensor) -> Grid:
    """Returns the grid clipped at `sigmas` standard deviations of each row (SDClip). Source: PR #1394."""
    return row_grid(sigmas * weight.detach().std(dim=1, keepdim=True, correction=0), bits)


def gaussian_bits(scales: Tensor) -> Tensor:
    """Returns the entropy in bits of Gaussians of these standard deviations, rounded to whole numbers."""
    edges = torch.arange(-64.5, 65, device=scales.device, dtype=torch.float64) / scales.double().clamp(1e-3, 12)[:, None]
    shares = torch.special.ndtr(edges).diff(dim=1)
    return torch.where(scales > 12, 0.5 * (2 * math.pi * math.e * scales.double().square()).log2(), -torch.xlogy(shares, shares).sum(dim=1) / math.log(2))


def predicted_bits_per_weight(scheme: str, bits: int, columns: int, clip_sigmas: float) -> float:
    """Returns the entropy of a row of `columns` Gaussian weights on its grid, step included: what an ideal coder would need. Not for `rate`.

    The largest of n absolute values is taken where the expected number beyond it is one (the location of its Gumbel distribution).
    """
    if bits == 16:
        return 16.0
    root = math.sqrt(2 * math.log(2 * columns))
    largest = root - (math.log(math.log(2 * columns)) + math.log(4 * math.pi)) / (2 * root)
    clip = clip_sigmas if scheme in ("gptq", "adaptive") else largest
    limit = 2 ** (bits - 1) - 1
    edges = [(code - 0.5) * clip / limit for code in range(-limit + 1, limit + 1)]
    below = [0.0, *(0.5 + 0.5 * math.erf(edge / math.sqrt(2)) for edge in edges), 1.0]
    shares = [high - low for low, high in itertools.pairwise(below)]
    return -sum(share * math.log2(share) for share in shares if share > 0) + 16 / columns


# ------------------------------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns the operations whose speed decides a run on a GPU: attention within documents, the loss of the head, symmetric products, the MLP's
# activation, float8 products. Each has a plain form, its reference; another form serves only after it has passed its test on the GPU at hand.

# q (B, H, T, C), k and v (B, K, T, C) -> (B, H, T, C)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Backend(NamedTuple):
    """A way to compute causal attention that stays within documents."""

    plan: Callable[[Tensor, Config, Phase], Attend]  # of tokens (B, T); made once a forward, used by every layer
    is_ragged: bool = False  # takes all rows as one sequence of documents, and reads Phase.row_documents


class Kernels(NamedTuple):
    """What computes on this machine."""

    attention: Backend
    names: tuple[str, ...] = ()  # of KERNEL_NAMES, those in use


def document_ids(tokens: Tensor, bos_id: int) -> Tensor:
    """Returns the number of the document each token belongs to, counted along its row: (B, T). A document starts at its BOS."""
    return (tokens == bos_id).cumsum(dim=1)


def document_mask(tokens: Tensor, bos_id: int) -> Tensor:
    """Returns which positions each position may attend to: itself and earlier ones of its own document, (B, 1, T, T) bool."""
    ids = document_ids(tokens, bos_id)
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
    return ((ids[:, :, None] == ids[:, None, :]) & causal)[:, None]


def document_offsets(tokens: Tensor, config: Config, row_documents: int) -> Tensor:
    """Returns where documents start when rows (B, T) are laid end to end, then B T until there are B row_documents + 1 entries: int32.

    A row starts a segment of its own. `row_documents` = 0 stands for as many entries as are needed, for which the host waits.
    """
    starts = (tokens == config.bos_id) if config.doc_mask else torch.zeros_like(tokens, dtype=torch.bool)
    starts = (starts | (torch.arange(tokens.shape[1], device=tokens.device) == 0)).flatten()
    most = len(tokens) * row_documents or int(starts.sum())
    positions = torch.arange(len(starts), device=tokens.device)
    end = positions[-1:] + 1  # not F.pad: it would have a graph for each number of tokens
    return torch.cat([torch.where(starts, positions, end).sort().values, end.expand(most + 1)])[: most + 1].int()


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns attention by its definition: q (B, H, T, C), k and v (B, K, T, C), mask (B, 1, T, T) -> (B, H, T, C)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril() if mask is None else mask
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ v


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns what `attention_reference` returns, by PyTorch's fused kernels."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def dense(kernel: Callable[..., Tensor]) -> Backend:
    """Returns the backend of kernel(q, k, v, mask), which sees every pair of positions of a row."""

    def plan(tokens: Tensor, config: Config, phase: Phase) -> Attend:
        mask = document_mask(tokens, config.bos_id) if config.doc_mask else None
        return lambda q, k, v: kernel(q, k, v, mask)

    return Backend(plan)


def ragged(kernel: Callable[..., Tensor]) -> Backend:
    """Returns the backend of kernel(q (N, H, C), k, v (N, K, C), offsets, longest), which sees documents laid end to end."""

    def plan(tokens: Tensor, config: Config, phase: Phase) -> Attend:
        offsets, (rows, length) = document_offsets(tokens, config, phase.row_documents), tokens.shape

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (side.transpose(1, 2).flatten(0, 1) for side in (q, k, v))
            # Of a single row q would be a view whose strides the compiler expects of the result, which FlashAttention makes contiguous.
            return kernel(q.contiguous(), k, v, offsets, length).unflatten(0, (rows, length)).transpose(1, 2)

        return attend

    return Backend(plan, is_ragged=True)


def flex_backend() -> Backend:
    """Returns FlexAttention, which skips blocks of positions that no document has in common."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Outside a compiled model it would hold the scores of all pairs, were it not compiled itself; a CPU has no compiled backward.
    attention = torch.compile(flex_attention, dynamic=False) if torch.cuda.is_available() else flex_attention

    def plan(tokens: Tensor, config: Config, phase: Phase) -> Attend:
        (rows, length), ids = tokens.shape, document_ids(tokens, config.bos_id) * config.doc_mask

        def visible(row: Tensor, head: Tensor, at: Tensor, other: Tensor) -> Tensor:
            return (at >= other) & (ids[row, at] == ids[row, other])

        mask = create_block_mask(visible, rows, None, length, length, device=tokens.device.type)
        return lambda q, k, v: attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return Backend(plan)


def varlen_backend() -> Backend:
    """Returns PyTorch's attention over documents laid end to end: FlashAttention 2, or what has been activated in its place."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # PyTorch 2.11 takes fewer key heads unasked
        options["enable_gqa"] = True
    kernel: Callable[..., Any] = varlen_attn
    return ragged(lambda q, k, v, offsets, longest: kernel(q, k, v, offsets, offsets, longest, longest, **options))


def fa3_backend() -> Backend:
    """Returns FlashAttention 3, where its `flash_attn_interface` is installed."""
    importlib.import_module("flash_attn_interface")
    torch.nn.attention.activate_flash_attention_impl("FA3")
    return varlen_backend()


@cache
def fa4_backend() -> Backend:
    """Returns FlashAttention 4, where flash-attn-4 is installed; its releases return two to five values, of which the first are the same in all."""
    module = importlib.import_module("flash_attn.cute.interface")

    def forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        seen = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out, lse, *_ = module._flash_attn_fwd(q, k, v, causal=True, return_lse=True, **seen)
        return out, lse.contiguous()

    def backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gradient: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv, *_ = module._flash_attn_bwd(q, k, v, out, gradient, lse, causal=True, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
        return dq, dk, dv

    define: Callable[..., Any] = partial(torch.library.custom_op, mutates_args=())
    operator = define("golf::flash4", forward, schema="(Tensor q, Tensor k, Tensor v, Tensor offsets, SymInt longest) -> (Tensor, Tensor)")
    inputs = "Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor gradient, Tensor offsets"
    reverse = define("golf::flash4_backward", backward, schema=f"({inputs}) -> (Tensor, Tensor, Tensor)")
    operator.register_fake(lambda q, k, v, offsets, longest: (torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)))
    reverse.register_fake(lambda q, k, v, out, lse, gradient, offsets: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, offsets, _ = inputs
        ctx.save_for_backward(q, k, v, *output, offsets)

    def gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *kept, offsets = ctx.saved_tensors
        return (*reverse(*kept, gradient.contiguous(), offsets), None, None)

    operator.register_autograd(gradients, setup_context=setup)
    return ragged(lambda q, k, v, offsets, longest: operator(q, k, v, offsets, longest)[0])


ATTENTION: dict[str, Callable[[], Backend]] = {
    "fa3": fa3_backend, "fa4": fa4_backend, "varlen": varlen_backend, "flex": flex_backend,
    "sdpa": partial(dense, attention_sdpa), "reference": partial(dense, attention_reference),
}  # fmt: skip


MOST_ERROR = 0.03  # of a result in bfloat16, relative to its reference; gradients of attention have about 0.005


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Raises RuntimeError unless every tensor is within MOST_ERROR of the norm of the expected one."""
    pairs = [(x.flatten().double().cpu(), y.flatten().double().cpu()) for x, y in zip(found, expected, strict=True)]
    errors = [float((x - y).norm() / (y.norm() + 1e-30)) for x, y in pairs]
    if not all(error <= MOST_ERROR for error in errors):
        raise RuntimeError(f"it disagrees with {what}: relative errors {', '.join(f'{error:.2g}' for error in errors)}")


def check_attention(backend: Backend, config: Config, device: torch.device) -> None:
    """Raises RuntimeError unless a backend gives the output and gradients of the reference, on two rows of documents and on one, with this model's heads."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((2, 320), (config.bos_id + 1) % config.vocab_size)
    tokens[0, [0, 7, 136, 137]] = tokens[1, [63, 300]] = config.bos_id
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    sides = [torch.randn(2, 320, count, config.head_dim, generator=generator).transpose(1, 2) for count in heads]
    phase = Phase((), 320, row_documents=8)

    def results(backend: Backend, dtype: torch.dtype, rows: int, *, compile: bool) -> list[Tensor]:
        q, k, v, direction = (side[:rows].to(device, dtype) for side in sides)
        inputs = [side.requires_grad_() for side in (q, k, v)]
        run = compiled(lambda tokens, q, k, v: backend.plan(tokens, config, phase)(q, k, v), replace(config, compile=compile))
        y = run(tokens[:rows].to(device), *inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, direction)]

    for rows in (2, 1):
        found = results(backend, compute_dtype(config, device), rows, compile=config.compile)
        compare(found, results(dense(attention_reference), torch.float32, rows, compile=False), "the reference")


def choose_attention(config: Config, world: World) -> tuple[str, Backend]:
    """Returns the name and backend of ATTENTION_BACKEND, for auto of the first that works here; rank 0 decides. Raises ValueError where none does."""
    on_gpu = world.device.type == "cuda"
    names = (config.attention_backend,) if config.attention_backend != "auto" else ATTENTION_ORDER if on_gpu else ("sdpa",)
    chosen, problems = "", list[str]()
    for name in names if world.is_main else ():
        try:
            backend = ATTENTION[name]()
            if on_gpu or name not in ("sdpa", "reference"):
                check_attention(backend, config, world.device)
            chosen = name
            break
        except Exception as problem:  # a library that is missing or does not fit this GPU or PyTorch raises anything
            problems.append(f"{name}: {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}")
            if getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() is not None:
                torch.nn.attention.restore_flash_attention_impl()
    chosen, problems = world.from_main((chosen, problems))
    if not chosen:
        raise ValueError(f"ATTENTION_BACKEND={config.attention_backend} does not work here ({'; '.join(problems)}); choose another, or auto")
    return chosen, ATTENTION[chosen]()


if triton is not None:

    @triton.jit
    def cross_entropy_kernel(logits, targets, losses, gradients, columns, positive, negative, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """One row: its loss, and the gradient of that loss by its logits, from one read of them."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < columns
        raw = tl.load(logits + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        bound = tl.where(raw > 0, positive, negative)
        share = 2.0 * tl.sigmoid(2.0 * raw / bound) - 1.0  # tanh
        capped = tl.where(inside, bound * share, float("-inf"))
        top = tl.max(capped, 0)
        shares = tl.exp(capped - top)
        total = tl.sum(shares, 0)
        hit = column == tl.load(targets + row)
        tl.store(losses + row, top + tl.log(total) - tl.sum(tl.where(hit, capped, 0.0), 0))
        slope = (shares / total - tl.where(hit, 1.0, 0.0)) * (1.0 - share * share)
        tl.store(gradients + row * columns + column, slope, mask=inside)

    @triton.jit
    def symmetric_kernel(x, plus, out, rows, columns, alpha, beta, HAS_PLUS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
        """One block on or above the diagonal of alpha x x^T + beta plus, written to its place and, transposed, to its mirror's."""
        i, j, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        if i > j:
            return
        x += batch * rows * columns
        row, column, depth = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DEPTH)
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(0, columns, DEPTH):
            at = start + depth
            left = tl.load(x + row[:, None] * columns + at, mask=(row[:, None] < rows) & (at < columns), other=0.0)
            right = tl.load(x + column[:, None] * columns + at, mask=(column[:, None] < rows) & (at < columns), other=0.0)
            total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
        total *= alpha
        place = batch * rows * rows + row[:, None] * rows + column
        inside = (row[:, None] < rows) & (column < rows)
        if HAS_PLUS:
            total += beta * tl.load(plus + place, mask=inside, other=0.0).to(tl.float32)
        result = total.to(out.dtype.element_ty)
        tl.store(out + place, result, mask=inside)
        if i < j:
            mirror = batch * rows * rows + column[:, None] * rows + row
            tl.store(out + mirror, tl.trans(result), mask=(column[:, None] < rows) & (row < rows))


def cross_entropy(logits: Tensor, targets: Tensor, positive: float, negative: float) -> tuple[Tensor, Tensor]:
    """Returns (losses (N,), their gradients by the logits): of raw logits (N, V), softcapped in between. The plain form of `fused_cross_entropy`."""
    raw = logits if logits.dtype == torch.float64 else logits.float()
    bound = positive if positive == negative else torch.where(raw > 0, positive, negative).to(raw.dtype)
    half = torch.sigmoid(raw * (2 / bound))  # (1 + tanh(raw / bound)) / 2: the compiler keeps a sigmoid, and computes tanh anew at every use
    capped = (bound * (2 * half)).sub_(bound)
    top, hits = capped.amax(dim=1, keepdim=True), capped.gather(1, targets[:, None])
    shares = capped.sub_(top).exp_()
    total = shares.sum(dim=1, keepdim=True)
    losses = top + total.log() - hits
    slopes = half.addcmul_(half, half, value=-1)  # of the softcap, over 4
    gradients = shares.mul_(slopes).mul_(4 / total).scatter_add_(1, targets[:, None], -4 * slopes.gather(1, targets[:, None]))
    return losses[:, 0], gradients.to(logits.dtype)


@torch.library.custom_op("golf::cross_entropy", mutates_args=(), schema="(Tensor logits, Tensor targets, float positive, float negative) -> (Tensor, Tensor)")
def fused_cross_entropy(logits: Tensor, targets: Tensor, positive: float, negative: float) -> tuple[Tensor, Tensor]:
    """Returns what `cross_entropy` returns, by a kernel that reads the logits once."""
    count, columns = logits.shape
    losses, gradients = logits.new_empty(count, dtype=torch.float32), torch.empty_like(logits)
    block = triton.next_power_of_2(columns)
    # With so few registers an H100's multiprocessor works on two rows of 8,192 logits at a time, one on its way while the other is computed with.
    launch = {"num_warps": min(max(block // 512, 1), 32), "maxnreg": 64}
    cross_entropy_kernel[(count,)](logits, targets, losses, gradients, columns, positive, negative, BLOCK=block, **launch)
    return losses, gradients


fused_cross_entropy.register_fake(
    lambda logits, targets, positive, negative: (logits.new_empty(logits.shape[0], dtype=torch.float32), torch.empty_like(logits))
)


FLOAT8_MAX = 448.0  # of e4m3


def float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (x in e4m3, the factor that brings it back): scaled so that its largest value is the format's."""
    scale = x.detach().abs().amax().float().clamp_min(1e-12) / FLOAT8_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def float8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x W^T of x (N, inputs) and W (outputs, inputs), both sides rounded to float8; sizes are multiples of 16 on a GPU."""
    (left, left_scale), (right, right_scale) = float8(x), float8(weight)
    return torch._scaled_mm(left, right.T, scale_a=left_scale, scale_b=right_scale, out_dtype=x.dtype, use_fast_accum=True)


class HeadLoss(torch.autograd.Function):
    """Losses (N,) of x (N, D) through a head (V, D). The gradient by the logits, kept from forward, is for a loss of weight 1; each row's own weight
    multiplies x and its gradient instead, which are V / D times smaller. Source: modded-nanogpt record 79 does the first half."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, targets: Tensor, bounds: tuple[float, float], kernel: Callable[..., Any], fp8: bool) -> Tensor:
        losses, slopes = kernel(float8_product(x, weight) if fp8 else x @ weight.T, targets, *bounds)
        context.save_for_backward(x, weight, slopes)
        return losses

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, slopes = context.saved_tensors
        share = gradient[:, None]  # stays in float32: as bfloat16 it would scale all gradients alike by up to 0.4%
        return (share * (slopes @ weight)).to(x.dtype), slopes.T @ (share * x).to(x.dtype), None, None, None, None


@torch.library.custom_op("golf::symmetric", mutates_args=(), schema="(Tensor x, Tensor? plus=None, float alpha=1.0, float beta=0.0) -> Tensor")
def fused_symmetric(x: Tensor, plus: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Returns what `symmetric` returns, computing one triangle. Source: modded-nanogpt record 27 uses the symmetry."""
    x = x.contiguous()
    count, rows, columns = x.shape
    out = x.new_empty(count, rows, rows)
    blocks = triton.cdiv(rows, SYMMETRIC_BLOCK)
    grid = (blocks, blocks, count)
    symmetric_kernel[grid](
        x, out if plus is None else plus.contiguous(), out, rows, columns, alpha, beta, HAS_PLUS=plus is not None, BLOCK=SYMMETRIC_BLOCK, DEPTH=32, num_warps=4
    )
    return out


SYMMETRIC_BLOCK = 64
fused_symmetric.register_fake(lambda x, plus=None, alpha=1.0, beta=0.0: x.new_empty(x.shape[0], x.shape[1], x.shape[1]))


def symmetric(x: Tensor, plus: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Returns alpha x x^T + beta plus of x (n, rows, columns): (n, rows, rows). `plus` is symmetric; where x is, this is alpha x^2 + beta plus."""
    return alpha * (x @ x.transpose(1, 2)) if plus is None else torch.baddbmm(plus, x, x.transpose(1, 2), beta=beta, alpha=alpha)


def fast_symmetric(x: Tensor, plus: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Returns what `symmetric` returns: by the kernel in bfloat16, for which there are tensor cores, and plainly in other types."""
    return (fused_symmetric if x.dtype == torch.bfloat16 else symmetric)(x, plus, alpha, beta)


def check_kernel(name: str, device: torch.device) -> None:
    """Raises RuntimeError unless a Triton kernel gives the result of its plain form."""
    generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16 if device.type == "cuda" else torch.float32
    found, expected = list[Tensor](), list[Tensor]()
    if name == "cross_entropy":
        logits, targets = (20 * torch.randn(70, 1000, generator=generator)).to(dtype), torch.randint(1000, (70,), generator=generator)
        found += fused_cross_entropy(logits.to(device), targets.to(device), 30.0, 20.0)
        expected += cross_entropy(logits.double(), targets, 30.0, 20.0)
    else:
        x = (torch.randn(2, 100, 150, generator=generator) / 12).to(dtype)
        gram = fused_symmetric(x.to(device))
        found += [gram, fused_symmetric(gram, gram, 0.5, -2.0)]
        expected += [symmetric(x.double()), symmetric(gram.cpu().double(), gram.cpu().double(), 0.5, -2.0)]
    compare(found, expected, "its plain form")


def choose_kernels(config: Config, world: World) -> tuple[list[str], list[str]]:
    """Returns (the Triton kernels in use, why others are not); rank 0 decides. Raises ValueError where one that KERNELS names fails."""
    works, problems = list[str](), list[str]()
    for name in parse_kernels(config.kernels) if world.is_main and (world.device.type == "cuda" or config.kernels != "auto") else []:
        try:
            if triton is None:
                raise ImportError("Triton is not installed")
            if name == "cross_entropy" and compute_dtype(config, world.device) == torch.float64:
                raise TypeError("it computes in float32, less than COMPUTE_DTYPE=float64 promises")
            check_kernel(name, world.device)
            works.append(name)
        except Exception as problem:  # the compiler of kernels raises anything
            problems.append(f"{name}: {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}")
    works, problems = world.from_main((works, problems))
    if problems and config.kernels != "auto":
        raise ValueError(f"KERNELS={config.kernels} does not work here ({'; '.join(problems)}); use KERNELS=auto or none")
    return works, problems


def choose_fast_forms(config: Config, world: World) -> tuple[Kernels, str]:
    """Returns what this run computes with, and a line for its log. Raises ValueError where what the settings name does not work here."""
    if config.fp8 and world.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise ValueError(f"FP8={config.fp8}: this GPU has no float8 products, which need compute capability 8.9; leave FP8 empty")
    name, attention = choose_attention(config, world)
    kernels, problems = choose_kernels(config, world)
    line = f"attention by {name}; Triton kernels: {', '.join(kernels) or 'none'}" + "".join(f"; not {problem}" for problem in problems)
    return Kernels(attention, tuple(kernels)), line


def squared_leaky_relu(slope: float, x: Tensor) -> Tensor:
    """Returns leaky_relu(x)^2."""
    return F.leaky_relu(x, slope).square()


class SquaredLeakyReLU(torch.autograd.Function):
    """leaky_relu(x)^2, of which backward needs the result alone: the sign of x is in its last bit, to whose parity it is rounded.

    That makes a bfloat16 result 0.06% larger or smaller on average.
    """

    @staticmethod
    def forward(context: Any, slope: float, x: Tensor) -> Tensor:
        squared = F.leaky_relu(x.float(), slope).square()
        # Of two neighbours with the wanted last bit, one is nearer: a bfloat16 is the upper half of a float32.
        spare = 17 if x.dtype == torch.bfloat16 else 1
        below = (x < 0).int() << (spare - 1)
        pattern = (((squared.view(torch.int32) - below + (1 << (spare - 1))) >> spare) << spare) + below
        kept = pattern.view(torch.float32).to(x.dtype)
        context.save_for_backward(kept)
        context.slope = slope
        return kept

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (kept,) = context.saved_tensors
        is_negative = kept.view(torch.int16 if kept.dtype == torch.bfloat16 else torch.int32) & 1
        factor = torch.where(is_negative == 1, -context.slope, 1.0)
        return None, (gradient.float() * (2 * factor * kept.float().sqrt())).to(gradient.dtype)


class Float8Product(torch.autograd.Function):
    """x W^T with both sides in float8, x (N, inputs) and W (outputs, inputs); backward in the dtype of x."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        return float8_product(x, weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = context.saved_tensors
        return gradient @ weight, gradient.T @ x


def float8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x W^T of x (..., inputs), the product in float8."""
    return Float8Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


# ------------------------------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns the network and its initial weights. There is one forward, for training, scoring, calibration and adaptation; `phase` says what it
# computes and `adapters[slot][name]` adds to a projection when given. An optional feature is a module or `Keep`, chosen in a constructor.
# Parameters are float32 masters, cast where they are used.

# What is added to the output of projections, by name: "q", "k", "v", "out", "up", "gate", "down" of a layer, or "head". One of these per executed
# layer (slot), and a last one for the head.
SlotAdapters = Mapping[str, Callable[[Tensor], Tensor]]
Adapters = Sequence[SlotAdapters]
# The residual stream: one lane (B, T, D), or two in layers whose attention and MLP have a lane each.
Lanes = tuple[Tensor, ...]


class Rows(NamedTuple):
    """What every layer needs to know about a batch of rows; computed once per forward."""

    cos: Tensor  # (T, rotated / 2)
    sin: Tensor
    attend: Attend  # attention within the documents of these rows
    follows: Tensor  # (B, T, 1), 1 where the token has a predecessor in its row and document, else 0
    value: Tensor | None  # (B, T, K C), the value embedding of the tokens


def follows_in_document(tokens: Tensor, bos_id: int) -> Tensor:
    """Returns which tokens have a predecessor in their row and document: (B, T, 1) bool."""
    return F.pad(tokens[:, 1:] != bos_id, (1, 0))[..., None]


def previous(x: Tensor, rows: Rows) -> Tensor:
    """Returns x (B, T, ...) of the position before, zero where that is not in the same document."""
    return F.pad(x[:, :-1], (0, 0, 1, 0)) * rows.follows


def rms_norm(x: Tensor, scale: float | None = None) -> Tensor:
    """Returns x scaled to unit root mean square along its last dimension, or to one of `scale`; no learned weight."""
    normed = F.rms_norm(x, (x.shape[-1],))
    return normed if scale is None else scale * normed


def rotary_frequencies(config: Config, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns RoPE's radians per position for rows of `length`, (rotated / 2,). Source: arXiv:2104.09864.

    For rows longer than those of training: "ntk" raises the base so that the slowest frequency turns as far as it did in training; "yarn" slows
    down only the frequencies that turned few times in a training row (arXiv:2309.00071, without its temperature: queries have a learned gain).
    """
    dims, base = config.rotated_dims, config.rope_base
    stretch = 1.0 if config.rope_scaling == "none" else max(length / config.train_seq_len, 1.0)
    if config.rope_scaling == "ntk" and dims > 2:
        base *= stretch ** (dims / (dims - 2))
    frequencies = base ** -(torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    if config.rope_scaling == "yarn":
        turns = config.train_seq_len * frequencies / (2 * math.pi)
        kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / stretch)
    return frequencies


# An operator of its own, which the compiler leaves whole: it would compute the same cosines anew for every head of every layer, forward and backward.
@torch.library.custom_op("golf::cos_sin", mutates_args=(), schema="(Tensor frequencies, SymInt length) -> (Tensor, Tensor)")
def cos_sin(frequencies: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of positions (length,) times frequencies (F,) in radians per position: (length, F) each."""
    angles = torch.outer(torch.arange(length, device=frequencies.device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


cos_sin.register_fake(lambda frequencies, length: tuple(frequencies.new_empty(length, len(frequencies)) for _ in range(2)))


def rotary_table(config: Config, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of RoPE's angles, each (length, rotated / 2)."""
    cos, sin = cos_sin(rotary_frequencies(config, length, device), length)
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, rows: Rows) -> Tensor:
    """Returns x (B, heads, T, C) with its first dimensions rotated by position; the others stay as they are."""
    half = rows.cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * rows.cos + second * rows.sin, second * rows.cos - first * rows.sin, rest), dim=-1)


class Part(nn.Module):
    """A module that says of each of its own parameters what it is for and how it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.roles: dict[str, Role] = {}
        self.starts: dict[str, Callable[[Tensor], Any]] = {}

    def declare(self, name: str, role: Role, shape: Sequence[int], start: Callable[[Tensor], Any]) -> None:
        """Adds a parameter; `start` sets it in place when the weights are initialised."""
        self.register_parameter(name, nn.Parameter(torch.empty(*shape)))
        self.roles[name], self.starts[name] = role, start


class Keep(nn.Module):
    """The identity, in place of a feature that is off: returns its first argument."""

    def forward(self, x: Tensor, *context: object) -> Tensor:
        return x


def constant(value: float) -> Callable[[Tensor], Any]:
    """Returns the start that fills a parameter with `value`."""
    return partial(nn.init.constant_, val=value)


MATRIX_STARTS: dict[str, Callable[[Tensor], Any]] = {
    "orthogonal": nn.init.orthogonal_,
    "uniform": partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),  # what torch.nn.Linear does, and so the starter
}


class Weight(Part):
    """A matrix that the artifact holds on a grid, or as float16 at 16 bits."""

    weight: Tensor
    row_step: Tensor
    column_step: Tensor

    def __init__(self, shape: tuple[int, int], config: Config, role: Role, start: Callable[[Tensor], Any], layer: int | None = None) -> None:
        super().__init__()
        self.declare("weight", role, shape, start)
        self.config, self.role, self.layer = config, role, layer
        rule = role_rules(config)[role]
        override = parse_layer_bits(config.layer_bits).get(layer) if layer is not None else None
        self.bits = 0 if config.quant_scheme == "rate" else override or rule.bits
        self.clip_sigmas = rule.clip_sigmas
        if config.qat_start_frac < 1 and config.quant_scheme in FROZEN_SCHEMES:
            self.register_buffer("row_step", torch.ones(shape[0], 1))
            self.register_buffer("column_step", torch.ones(1, shape[1]))

    def grid(self) -> Grid:
        """Returns the grid of the weight as it is now, or the one that was frozen when QAT started where steps come from statistics."""
        scheme = self.config.quant_scheme
        if scheme in FROZEN_SCHEMES:
            return Grid(self.row_step, self.column_step, *((RATE_LIMIT, 2) if scheme == "rate" else (2 ** (self.bits - 1) - 1, 1)))
        if scheme == "gptq":
            return sdclip_grid(self.weight, self.bits, self.clip_sigmas)
        return rowmax_grid(self.weight, self.bits) if scheme == "rowmax" else lite_grid(self.weight, self.bits, self.config.gptq_lite_scope)

    def freeze(self, grid: Grid) -> None:
        """Makes `grid` the one that training sees from now on."""
        self.row_step.copy_(grid.row_step)
        self.column_step.copy_(grid.column_step.expand_as(self.column_step))

    def is_frozen(self) -> bool:
        """Returns whether training has a grid from statistics."""
        return "row_step" in self._buffers and bool((self.row_step != 1).any())

    def stored(self, phase: Phase) -> Tensor:
        """Returns the weight; in a QAT phase as the artifact would hold it (gradient straight through), noisier in a layer that runs several times."""
        if not phase.qat or self.bits == 16:
            return self.weight
        grid = self.grid()
        points = grid.fake(self.weight)
        if self.config.qat_loop_noise and self.layer is not None and phase.order.count(self.layer) > 1:
            points = points + self.config.qat_loop_noise * grid.spacing * grid.step * (torch.rand_like(points) - 0.5)
        return points


class Linear(Weight):
    """y = diag(scale) x W^T, W (outputs, inputs), cast to x's dtype; plus the adapter's output where one is given.

    A scale is multiplied into the weight, not the output: backward then needs no pass over activations for it.
    """

    def __init__(
        self, inputs: int, outputs: int, config: Config, role: Role = Role.MATRIX, layer: int | None = None, *, zero_init: bool = False
    ) -> None:
        super().__init__((outputs, inputs), config, role, nn.init.zeros_ if zero_init else MATRIX_STARTS[config.matrix_init], layer)
        self.product = float8_linear if role.value in parse_fp8(config.fp8) else F.linear

    def forward(self, x: Tensor, phase: Phase, adapters: SlotAdapters | None = None, name: str = "", scale: Tensor | None = None) -> Tensor:
        weight = self.stored(phase) if scale is None else scale[:, None] * self.stored(phase)
        y = self.product(x, weight.to(x.dtype))
        if adapters is None or name not in adapters:
            return y
        added = adapters[name](x)
        return y + (added if scale is None else scale.to(x.dtype) * added)


class Joined(nn.Module):
    """Several projections of one input as one product: (B, T, D) -> one output for each."""

    def __init__(self, **members: Linear) -> None:
        super().__init__()
        self.members = members  # not registered: their parameters belong to who made them

    def forward(self, x: Tensor, phase: Phase, adapters: SlotAdapters | None) -> tuple[Tensor, ...]:
        weight = torch.cat([member.stored(phase).to(x.dtype) for member in self.members.values()])
        outputs = F.linear(x, weight).split([len(member.weight) for member in self.members.values()], dim=-1)
        return tuple(y if adapters is None or name not in adapters else y + adapters[name](x) for name, y in zip(self.members, outputs, strict=True))


def weight_parts(model: nn.Module) -> dict[str, Weight]:
    """Returns the modules that hold a `Weight`, by the name of that parameter."""
    return {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, Weight)}


@torch.library.custom_op("golf::lookup_gradient", mutates_args=(), schema="(Tensor gradient, Tensor index, SymInt rows) -> Tensor")
def lookup_gradient(gradient: Tensor, index: Tensor, rows: int) -> Tensor:
    """Returns the gradient (rows, columns) of a table by that of what was looked up in it, (..., columns), at `index` (...).

    An operator of its own, for the compiler's would add up with atomic operations: slow on a CPU, and on a GPU in another order each time.
    """
    if gradient.device.type == "cpu":
        return gradient.new_zeros(rows, gradient.shape[-1]).index_add_(0, index.flatten(), gradient.flatten(0, -2))  # half the time of the other
    return torch.ops.aten.embedding_dense_backward(gradient, index, rows, -1, False)


lookup_gradient.register_fake(lambda gradient, index, rows: gradient.new_empty(rows, gradient.shape[-1]))


class Lookup(torch.autograd.Function):
    """The rows of a table (rows, columns) at `index` (...): (..., columns)."""

    @staticmethod
    def forward(context: Any, table: Tensor, index: Tensor) -> Tensor:
        context.save_for_backward(index)
        context.rows = len(table)
        return F.embedding(index, table)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return lookup_gradient(gradient, *context.saved_tensors, context.rows), None


class Table(Weight):
    """Rows of numbers to be looked up by tokens (B, T): their own ones, or those that `index` says."""

    def __init__(
        self, rows: int, columns: int, config: Config, role: Role, start: Callable[[Tensor], Any], index: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__((rows, columns), config, role, start)
        self.index = index or Keep()

    def forward(self, tokens: Tensor, phase: Phase, dtype: torch.dtype) -> Tensor:
        return Lookup.apply(self.stored(phase), self.index(tokens)).to(dtype)


class Scale(Part):
    """One learned factor."""

    scale: Tensor

    def __init__(self, start: float) -> None:
        super().__init__()
        self.declare("scale", Role.GAIN, (1,), constant(start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)


# -- What happens to the embedded tokens before the first block. Every stage: forward(x, tokens, rows, phase) -> x, all (B, T, D).


class NormStage(nn.Module):
    """x / rms(x)."""

    def forward(self, x: Tensor, tokens: Tensor, rows: Rows, phase: Phase) -> Tensor:
        return rms_norm(x)


def hashed_pairs(buckets: int, tokens: Tensor) -> Tensor:
    """Returns the bucket of each pair (previous token, token) of tokens (B, T): (B, T)."""
    return (F.pad(tokens[:, :-1], (1, 0)) * 92821 + tokens) % buckets


class BigramHash(nn.Module):
    """Adds a projected embedding of the hashed pair (previous token, token); nothing where a document starts. Source: PR #162."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config
        start, index = partial(nn.init.normal_, std=0.01), partial(hashed_pairs, c.bigram_hash_buckets)
        self.table = Table(c.bigram_hash_buckets, c.bigram_hash_dim, c, Role.TABLE, start, index)
        self.project = Linear(c.bigram_hash_dim, c.model_dim, c, zero_init=True)
        self.scale = Scale(c.bigram_hash_scale) if c.bigram_hash_scale else Keep()

    def forward(self, x: Tensor, tokens: Tensor, rows: Rows, phase: Phase) -> Tensor:
        return x + self.scale(self.project(self.table(tokens, phase, x.dtype), phase)) * rows.follows


class SmearBlend(Part):
    """k x + (1 - k) x_previous, with k = sigmoid(keep) per dimension: SmearGate of the record of 2026-03-19."""

    keep: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.declare("keep", Role.GAIN, (config.model_dim,), constant(config.smeargate_init))

    def forward(self, x: Tensor, tokens: Tensor, rows: Rows, phase: Phase) -> Tensor:
        return torch.lerp(previous(x, rows), x, self.keep.sigmoid().to(x.dtype))


class SmearAdd(Part):
    """x + strength sigmoid(W x[:window]) x_previous: SmearGate of PR #1667, strength and W starting at zero."""

    strength: Tensor
    weight: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.window = config.gate_window
        self.declare("strength", Role.GAIN, (1,), nn.init.zeros_)
        self.declare("weight", Role.GAIN, (1, config.gate_window), nn.init.zeros_)

    def forward(self, x: Tensor, tokens: Tensor, rows: Rows, phase: Phase) -> Tensor:
        gate = F.linear(x[..., : self.window], self.weight.to(x.dtype)).sigmoid()
        return x + self.strength.to(x.dtype) * gate * previous(x, rows)


def input_stages(config: Config) -> nn.ModuleList:
    """Returns the stages in the order of INPUT_STAGES, without those that are off."""
    c = config
    built: dict[str, nn.Module] = {"norm": NormStage()}
    if c.bigram_hash_buckets:
        built["bigram"] = BigramHash(c)
    if c.use_smeargate:
        built["smear"] = {"blend": SmearBlend, "add": SmearAdd}[c.smeargate_kind](c)
    return nn.ModuleList(built[name] for name in c.input_stages.split(",") if name in built)


class Embedding(nn.Module):
    """Token embedding; with EMBED_RANK the product of a thin table (V, r) and a matrix (r -> D)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config
        std = c.tied_embed_init_std if c.tie_embeddings else 1.0
        self.table = Table(c.vocab_size, c.embed_rank or c.model_dim, c, Role.EMBED, partial(nn.init.normal_, std=std))
        self.widen = Linear(c.embed_rank, c.model_dim, c) if c.embed_rank else None

    def forward(self, tokens: Tensor, phase: Phase, dtype: torch.dtype) -> Tensor:
        x = self.table(tokens, phase, dtype)
        return x if self.widen is None else self.widen(x, phase)


class Head(nn.Module):
    """The output head: x (B, T, D) times a row for every token, (B, T, V). The rows are the embedding's, or its own."""

    def __init__(self, config: Config, embedding: Embedding) -> None:
        super().__init__()
        c, is_tied = config, config.tie_embeddings
        self.table = embedding.table if is_tied else Weight((c.vocab_size, c.model_dim), c, Role.HEAD, nn.init.zeros_)
        self.widen = embedding.widen if is_tied else None
        self.product = float8_linear if "head" in parse_fp8(c.fp8) else F.linear

    def forward(self, x: Tensor, phase: Phase) -> Tensor:
        return self.product(self.thin(x, phase), self.table.stored(phase).to(x.dtype))

    def thin(self, x: Tensor, phase: Phase) -> Tensor:
        """Returns what the rows are multiplied with: x, or with a factored embedding (B, T, EMBED_RANK)."""
        return x if self.widen is None else x @ self.widen.stored(phase).to(x.dtype)


class ValueEmbedding(nn.Module):
    """A second, thin token embedding, projected to the width of the values: (B, T) -> (B, T, K C). Source: PR #379."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config
        self.table = Table(c.vocab_size, c.value_embed_dim, c, Role.TABLE, partial(nn.init.normal_, std=0.01))
        self.project = Linear(c.value_embed_dim, c.num_kv_heads * c.head_dim, c)
        self.scale = Scale(0.1)

    def forward(self, tokens: Tensor, phase: Phase, dtype: torch.dtype) -> Tensor:
        return self.scale(self.project(self.table(tokens, phase, dtype), phase))


# -- Blocks


class AddValue(nn.Module):
    """v + scale times the value embedding of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale(1.0)

    def forward(self, v: Tensor, rows: Rows) -> Tensor:
        assert rows.value is not None
        return v + self.scale(rows.value)


class ExcludeSelf(nn.Module):
    """Exclusive self-attention: takes from each head's output y (B, T, H, C) its part along the position's own value v (B, T, K, C). Source: PR #265."""

    def forward(self, y: Tensor, v: Tensor) -> Tensor:
        v = v[:, :, :, None]
        grouped = y.unflatten(2, (v.shape[2], -1))
        share = (grouped * v).sum(dim=-1, keepdim=True) / v.square().sum(dim=-1, keepdim=True).clamp_min(1e-24)
        return (grouped - share * v).flatten(2, 3)


class HeadGate(Part):
    """y_h sigmoid(s W_h x[:window]) per head h of y (B, T, H, C), W starting at zero; window = MODEL_DIM is the dense form. Source: PRs #1667, #1787."""

    weight: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.window, self.gain = config.attention_gate_window, config.attention_gate_scale
        self.declare("weight", Role.GAIN, (config.num_heads, self.window), nn.init.zeros_)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        gate = (self.gain * F.linear(x[..., : self.window], self.weight.to(x.dtype))).sigmoid()
        return y * gate[..., None]


class Attention(Part):
    """Causal self-attention with grouped key/value heads, normalised queries and keys, a learned gain per query head, and RoPE."""

    q_gain: Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        c = config
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.q = Linear(c.model_dim, c.num_heads * c.head_dim, c, Role.ATTENTION, layer)
        self.k = Linear(c.model_dim, c.num_kv_heads * c.head_dim, c, Role.ATTENTION, layer)
        self.v = Linear(c.model_dim, c.num_kv_heads * c.head_dim, c, Role.ATTENTION, layer)
        self.out = Linear(c.num_heads * c.head_dim, c.model_dim, c, Role.ATTENTION, layer, zero_init=True)
        self.qkv = Joined(q=self.q, k=self.k, v=self.v)
        self.declare("q_gain", Role.GAIN, (c.num_heads,), constant(c.qk_gain_init))
        self.add_value = AddValue() if layer in c.value_embed_layer_list else Keep()
        self.exclude_self = ExcludeSelf() if layer >= c.num_layers - c.xsa_last_n else Keep()
        self.head_gate = HeadGate(c) if c.attention_gate_window else Keep()

    def forward(self, x: Tensor, rows: Rows, phase: Phase, adapters: SlotAdapters | None, scale: Tensor) -> Tensor:
        """Returns `scale` (D,) times attention of x (B, T, D)."""

        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

        q, k, v = self.qkv(x, phase, adapters)
        q, k = rms_norm(split(q, self.heads)), rms_norm(split(k, self.kv_heads))
        v = split(self.add_value(v, rows), self.kv_heads)
        q = q * self.q_gain.to(q.dtype)[:, None, None]
        y = rows.attend(rotate(q, rows), rotate(k, rows), v)
        y = self.head_gate(self.exclude_self(y.transpose(1, 2), v.transpose(1, 2)), x)
        return self.out(y.flatten(2), phase, adapters, "out", scale)


class MLP(nn.Module):
    """f(x W_up)^2 W_down, f = relu (arXiv:2109.08668) or leaky relu."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.up = Linear(config.model_dim, config.mlp_dim, config, Role.MLP, layer)
        self.down = Linear(config.mlp_dim, config.model_dim, config, Role.MLP, layer, zero_init=True)
        self.activate = partial(SquaredLeakyReLU.apply if config.mlp_post_only else squared_leaky_relu, config.leaky_relu_slope)

    def forward(self, x: Tensor, phase: Phase, adapters: SlotAdapters | None, scale: Tensor) -> Tensor:
        """Returns `scale` (D,) times the MLP of x (B, T, D)."""
        return self.down(self.activate(self.up(x, phase, adapters, "up")), phase, adapters, "down", scale)


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down. Source: arXiv:2002.05202."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.gate = Linear(config.model_dim, config.mlp_dim, config, Role.MLP, layer)
        self.up = Linear(config.model_dim, config.mlp_dim, config, Role.MLP, layer)
        self.down = Linear(config.mlp_dim, config.model_dim, config, Role.MLP, layer, zero_init=True)

    def forward(self, x: Tensor, phase: Phase, adapters: SlotAdapters | None, scale: Tensor) -> Tensor:
        """Returns `scale` (D,) times the MLP of x (B, T, D)."""
        gated = F.silu(self.gate(x, phase, adapters, "gate")) * self.up(x, phase, adapters, "up")
        return self.down(gated, phase, adapters, "down", scale)


def stream_alone(mix: Tensor) -> None:
    """Starts a block's mix as all stream and no embedding."""
    nn.init.ones_(mix[0])
    nn.init.zeros_(mix[1])


class Block(Part):
    """Pre-norm attention, then MLP, on a learned mix of the stream and the embedding: x_in = mix0 x + mix1 x0, per dimension."""

    mix: Tensor
    attention_scale: Tensor
    mlp_scale: Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        c = config
        self.attention = Attention(c, layer)
        self.mlp = (SwiGLU if c.swiglu else MLP)(c, layer)
        self.norm = partial(rms_norm, scale=1 / math.sqrt(layer + 1)) if c.ln_scale else rms_norm
        self.declare("mix", Role.GAIN, (2, c.model_dim), stream_alone)
        self.declare("attention_scale", Role.GAIN, (c.model_dim,), nn.init.ones_)
        self.declare("mlp_scale", Role.GAIN, (c.model_dim,), nn.init.ones_)

    def enter(self, lanes: Lanes) -> Lanes:
        """Returns the lanes that this kind of block works on."""
        return lanes

    def blend(self, x: Tensor, x0: Tensor) -> Tensor:
        """Returns x_in."""
        mix = self.mix.to(x.dtype)
        return mix[0] * x + mix[1] * x0

    def attended(self, x: Tensor, rows: Rows, phase: Phase, adapters: SlotAdapters | None) -> Tensor:
        """Returns what attention adds to the stream."""
        return self.attention(self.norm(x), rows, phase, adapters, self.attention_scale)

    def transformed(self, x: Tensor, phase: Phase, adapters: SlotAdapters | None) -> Tensor:
        """Returns what the MLP adds to the stream."""
        return self.mlp(self.norm(x), phase, adapters, self.mlp_scale)

    def forward(self, lanes: Lanes, x0: Tensor, rows: Rows, phase: Phase, adapters: SlotAdapters | None) -> Lanes:
        (x,) = lanes
        x = self.blend(x, x0)
        x = x + self.attended(x, rows, phase, adapters)
        return (x + self.transformed(x, phase, adapters),)


class ParallelBlock(Block):
    """Attention and MLP read the same input, as in GPT-J."""

    def forward(self, lanes: Lanes, x0: Tensor, rows: Rows, phase: Phase, adapters: SlotAdapters | None) -> Lanes:
        (x,) = lanes
        x = self.blend(x, x0)
        return (x + self.attended(x, rows, phase, adapters) + self.transformed(x, phase, adapters),)


class Routes(Part):
    """What each layer's attention and MLP write into each lane: lane_i <- keep_i lane_i + from_attention_i attention + from_mlp_i mlp. Source: PR #1529.

    One row per physical layer, also for those before the lanes part.
    """

    keep: Tensor
    write: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.declare("keep", Role.GAIN, (config.num_layers, 2), constant(1.1))
        self.declare("write", Role.GAIN, (config.num_layers, 2, 2), nn.init.ones_)  # layer, source (attention, MLP), lane

    def forward(self, lanes: Lanes, attended: Tensor, transformed: Tensor, layer: int) -> Lanes:
        keep, write = self.keep[layer].to(attended.dtype), self.write[layer].to(attended.dtype)
        return tuple(keep[i] * lane + write[0, i] * attended + write[1, i] * transformed for i, lane in enumerate(lanes))


class LaneBlock(Block):
    """Attention reads the first of two lanes (mixed with the embedding), the MLP the second; both write to both."""

    def __init__(self, config: Config, layer: int, routes: Routes) -> None:
        super().__init__(config, layer)
        self.layer, self.routes = layer, routes

    def enter(self, lanes: Lanes) -> Lanes:
        return lanes if len(lanes) == 2 else (lanes[0], lanes[0])

    def forward(self, lanes: Lanes, x0: Tensor, rows: Rows, phase: Phase, adapters: SlotAdapters | None) -> Lanes:
        attended = self.attended(self.blend(lanes[0], x0), rows, phase, adapters)
        return self.routes(lanes, attended, self.transformed(lanes[1], phase, adapters), self.layer)


# -- Between blocks


class ScaledSkip(Part):
    """x + scale skip, a scale per dimension for every layer of the second half."""

    scale: Tensor

    def __init__(self, config: Config, skips: int) -> None:
        super().__init__()
        self.declare("scale", Role.GAIN, (skips, config.model_dim), nn.init.ones_)

    def forward(self, x: Tensor, skip: Tensor, index: int) -> Tensor:
        return x + self.scale[index].to(x.dtype) * skip


class GatedSkip(ScaledSkip):
    """lerp(scale skip, x, sigmoid(gate)), the gate starting at half and half. Source: PR #1089."""

    gate: Tensor

    def __init__(self, config: Config, skips: int) -> None:
        super().__init__(config, skips)
        self.declare("gate", Role.GAIN, (skips, config.model_dim), nn.init.zeros_)

    def forward(self, x: Tensor, skip: Tensor, index: int) -> Tensor:
        return torch.lerp(self.scale[index].to(x.dtype) * skip, x, self.gate[index].sigmoid().to(x.dtype))


class DynamicSkip(Part):
    """x plus what every token takes from the embedding and from the latest output of each layer before: x + sum_s (W_s rms(x) / D) source_s.

    W starts at zero. Source: MUDD, arXiv:2502.12170, for the stream alone and without its hidden layer.
    """

    weight: Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.declare("weight", Role.GAIN, (layer + 1, config.model_dim), nn.init.zeros_)

    def forward(self, x: Tensor, x0: Tensor, latest: Mapping[int, Tensor]) -> Tensor:
        sources = [x0, *(latest[layer] for layer in range(len(self.weight) - 1))]
        shares = F.linear(rms_norm(x, 1 / x.shape[-1]), self.weight.to(x.dtype)).split(1, dim=-1)
        return x + sum(share * source for share, source in zip(shares, sources, strict=True))


class LoopEmbedding(Part):
    """Tells a block which pass through it this is: adds a vector per pass, starting at zero."""

    vectors: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.declare("vectors", Role.GAIN, (config.num_loops + 1, config.model_dim), nn.init.zeros_)

    def forward(self, x: Tensor, passes: int) -> Tensor:
        return x + self.vectors[passes].to(x.dtype)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Returns the dtype of activations."""
    automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
    return automatic if config.compute_dtype == "auto" else getattr(torch, config.compute_dtype)


def softcap(logits: Tensor, positive: float, negative: float) -> Tensor:
    """Returns c tanh(logits / c), with a bound of its own on each side of zero."""
    bound = positive if positive == negative else torch.where(logits > 0, positive, negative)
    return bound * torch.tanh(logits / bound)


class Stream(NamedTuple):
    """What a layer finds and leaves."""

    lanes: Lanes
    x0: Tensor  # the embedding
    skips: tuple[Tensor, ...]  # from the first half, not used yet
    latest: dict[int, Tensor]  # what each layer has put out, where a dynamic skip may read it

    def merged(self) -> Tensor:
        """Returns the mean of the lanes, (B, T, D)."""
        return (self.lanes[0] + self.lanes[-1]) / 2


class GPT(nn.Module):
    """The network: embedding, blocks in the order of the phase with U-Net skips, softcapped head."""

    rate_step: Tensor

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32, kernels: Kernels | None = None) -> None:
        """Builds it with weights unset: call `init_weights`, or load them. `dtype` is that of activations; without `kernels`, plain PyTorch computes."""
        super().__init__()
        c = config
        self.config = config
        self.dtype = dtype
        self.kernels = kernels or Kernels(ATTENTION["reference" if c.attention_backend == "reference" else "sdpa"]())
        self.embedding = Embedding(c)
        self.stages = input_stages(c)
        self.value_embedding = ValueEmbedding(c) if c.value_embed_layers else None
        late: dict[str, Callable[[Config, int], Block]] = {"none": Block, "gptj": ParallelBlock, "lanes": partial(LaneBlock, routes=Routes(c))}
        kinds = [late[c.parallel_residuals] if layer >= c.parallel_start_layer else Block for layer in range(c.num_layers)]
        self.blocks = nn.ModuleList(kind(c, layer) for layer, kind in enumerate(kinds))
        skip: dict[str, Callable[[Config, int], nn.Module]] = {"none": lambda *_: Keep(), "scaled": ScaledSkip, "gated": GatedSkip}
        self.skip = skip[c.skip_connections](c, len(Schedule(c).scored_phase.order) // 2)
        dynamic = range(c.num_layers - c.dynamic_skip_last_n, c.num_layers)
        self.dynamic_skips = nn.ModuleList(DynamicSkip(c, layer) if layer in dynamic else Keep() for layer in range(c.num_layers))
        self.loop_embedding = LoopEmbedding(c) if c.loop_embedding else Keep()
        if c.qat_start_frac < 1 and c.quant_scheme == "rate":
            self.register_buffer("rate_step", torch.zeros(()))
        self.head = Head(c, self.embedding)

    @property
    def frozen_step(self) -> float:
        """The global step of `rate` that training has seen; 0 = none."""
        return float(self.rate_step) if "rate_step" in self._buffers else 0.0

    def init_weights(self) -> None:
        """Sets every parameter to its start, from the global random state."""
        for module in self.modules():
            if isinstance(module, Part):
                for name, start in module.starts.items():
                    start(module.get_parameter(name))

    def rows(self, tokens: Tensor, phase: Phase) -> Rows:
        """Returns what every layer needs to know about tokens (B, T)."""
        c = self.config
        cos, sin = rotary_table(c, tokens.shape[1], tokens.device, self.dtype)
        attend = self.kernels.attention.plan(tokens, c, phase)
        value = None if self.value_embedding is None else self.value_embedding(tokens, phase, self.dtype)
        return Rows(cos, sin, attend, follows_in_document(tokens, c.bos_id).to(self.dtype), value)

    def begin(self, tokens: Tensor, rows: Rows, phase: Phase) -> Stream:
        """Returns the stream before the first layer: tokens (B, T)."""
        x0 = self.embedding(tokens, phase, self.dtype)
        for stage in self.stages:
            x0 = stage(x0, tokens, rows, phase)
        return Stream((x0,), x0, (), {})

    def execute(self, stream: Stream, rows: Rows, phase: Phase, adapters: Adapters | None, slots: range) -> Stream:
        """Returns the stream after the layers that are executed in `slots`. The first half of all slots push, the second half pop."""
        lanes, x0, skips, latest = stream
        half = len(phase.order) // 2
        for slot in slots:
            layer = phase.order[slot]
            block: Any = self.blocks[layer]
            first, *others = block.enter(lanes)
            if skips and slot >= half:
                first, skips = self.skip(first, skips[-1], slot - half), skips[:-1]
            first = self.dynamic_skips[layer](first, x0, latest)
            first = self.loop_embedding(first, phase.order[:slot].count(layer))
            lanes = block((first, *others), x0, rows, phase, adapters[slot] if adapters else None)
            latest = {**latest, layer: lanes[0]} if self.config.dynamic_skip_last_n else latest
            if slot < half and self.config.skip_connections != "none":
                skips = (*skips, lanes[0])
        return Stream(lanes, x0, skips, latest)

    def hidden(self, tokens: Tensor, phase: Phase, adapters: Adapters | None) -> Tensor:
        """Returns the stream after the last block: tokens (B, T) -> (B, T, D)."""
        rows = self.rows(tokens, phase)
        return self.execute(self.begin(tokens, rows, phase), rows, phase, adapters, range(len(phase.order))).merged()

    def logits(self, tokens: Tensor, phase: Phase, adapters: Adapters | None = None) -> Tensor:
        """Returns softcapped logits: tokens (B, T) -> (B, T, V), at least float32."""
        x = rms_norm(self.hidden(tokens, phase, adapters))
        raw = self.head(x, phase)
        if adapters and "head" in adapters[-1]:
            raw = raw + adapters[-1]["head"](x)
        raw = raw if raw.dtype == torch.float64 else raw.float()
        return softcap(raw, *self.config.softcaps)

    def training_loss(self, hidden: Tensor, targets: Tensor, phase: Phase) -> Tensor:
        """Returns the loss of every target (B, T) in nats, from the stream after the last block (B, T, D). The logits' gradient is made with the loss."""
        x = self.head.thin(rms_norm(hidden), phase).flatten(0, 1)
        matrix, fp8 = self.head.table.stored(phase).to(x.dtype), self.head.product is float8_linear
        kernel = fused_cross_entropy if "cross_entropy" in self.kernels.names else cross_entropy
        return HeadLoss.apply(x, matrix, targets.flatten(), self.config.softcaps, kernel, fp8).view_as(targets)

    def forward(self, tokens: Tensor, targets: Tensor, phase: Phase, adapters: Adapters | None = None) -> Tensor:
        """Returns the loss of every target in nats: tokens and targets (B, T) -> (B, T); of K targets at each position, (B, T, K) -> (B, T, K)."""
        if torch.is_grad_enabled() and not adapters and targets.dim() == 2:  # training
            return self.training_loss(self.hidden(tokens, phase, None), targets, phase)
        logits = self.logits(tokens, phase, adapters)
        if targets.dim() == 3:  # the target and its hint, or, in an audit, every token
            return logits.logsumexp(dim=-1, keepdim=True) - logits.gather(2, targets)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


# ------------------------------------------------------------------------------------------------------------------------------------
# Optimiser
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns how averaged gradients become new weights. Muon's work is shared out over the ranks, Adam's is repeated on each; weights stay
# bit-equal across ranks. All state of a group lives in `state`, and is saved under the parameters' names.

POLYNOMIALS = {
    # Minimax for singular values in [0.001, 1]: arXiv:2505.16932, with its safety factor 1.02 on the norm.
    "polar_express": (
        1.02,
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
    ),
    # The Newton-Schulz quintic of Muon: https://kellerjordan.github.io/posts/muon/
    "classic": (1.0, ((3.4445, -4.7750, 2.0315),) * 5),
}


# From this ratio of the longer to the shorter side on, products of the small Gram matrix cost less than products with the matrix itself.
GRAM_ASPECT = 1.5


def orthogonalise(matrices: Tensor, steps: int, coefficients: str, product: Callable[..., Tensor] = symmetric) -> Tensor:
    """Returns matrices (n, rows, columns) with their singular values brought close to 1 and their singular vectors kept.

    Runs in bfloat16 on a GPU, where the iteration is bound by matrix products, and in the given dtype elsewhere. Each polynomial step
    is X <- (a + b G + c G^2) X with G = X X^T on the short side. All those factors are polynomials of the first G, so for long matrices
    they are multiplied together on the short side alone and applied to X once (Gram Newton-Schulz), with the same result. That product
    is kept in float32: in bfloat16 its rounding errors are amplified in the directions of small singular values until it explodes.
    `product` computes as `symmetric` does.
    """
    safety, polynomials = POLYNOMIALS[coefficients]
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) * safety + 1e-7)
    if x.shape[2] >= GRAM_ASPECT * x.shape[1]:
        precise = x if x.dtype == torch.float64 else x.float()
        x = gram_factor(product(precise), polynomials[:steps], product).to(x.dtype) @ x
    else:
        for a, b, c in polynomials[:steps]:
            gram = product(x)
            x = torch.baddbmm(x, product(gram, gram, c, b), x, beta=a)
    return x.transpose(1, 2) if tall else x


def gram_factor(gram: Tensor, polynomials: Sequence[tuple[float, float, float]], product: Callable[..., Tensor] = symmetric) -> Tensor:
    """Returns the matrix F with F X = the result of all polynomial steps on X, from gram = X X^T (n, rows, rows)."""
    (a, b, c), *rest = polynomials
    step = product(gram, gram, c, b)
    step.diagonal(dim1=1, dim2=2).add_(a)
    return gram_factor(step @ gram @ step, rest, product) @ step if rest else step


def take_gradients(names: Sequence[str], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Returns the gradients and takes them off the parameters. A parameter that backward did not reach is an error."""
    gradients = []
    for name, parameter in zip(names, parameters, strict=True):
        assert parameter.grad is not None, f"{name} has no gradient: forward does not use it"
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


def compiled(function: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """Returns `function`, compiled if COMPILE says so: one graph for every combination of shapes and phase that it meets."""
    if not config.compile:
        return function
    # Beyond the limit (8 by default) the compiler would give up on a run; every phase trains, in as many graphs as there are buckets, and is scored,
    # and Muon meets every shape of matrix.
    torch._dynamo.config.recompile_limit = max(64, (1 + config.gradient_buckets) * (len(Schedule(config).phases()) + 16))
    return torch.compile(function, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs" if config.compile_autotune else None)


class Move(NamedTuple):
    """How far some weights go in a step."""

    weights: list[Tensor]
    updates: list[Tensor]
    rate: Tensor  # what the updates are multiplied by, ()
    shrinkage: Tensor | None  # the part of the weights that weight decay takes, (); None without weight decay
    is_cautious: bool  # decay spares the weights that the update makes larger: those whose sign is not the update's (arXiv:2510.12402)


def move(moves: Sequence[Move]) -> None:
    """Moves weights in place: w <- w - shrinkage w - rate update."""
    for weights, updates, rate, shrinkage, is_cautious in moves:
        if shrinkage is not None and is_cautious:
            kept = torch._foreach_mul(weights, updates)
            torch._foreach_sign_(kept)
            torch._foreach_clamp_min_(kept, 0)  # 1 where decay works
            torch._foreach_mul_(kept, -shrinkage)
            torch._foreach_add_(kept, 1)
            torch._foreach_mul_(weights, kept)
        elif shrinkage is not None:
            torch._foreach_mul_(weights, 1 - shrinkage)
        torch._foreach_sub_(weights, torch._foreach_mul(updates, rate))


def move_of(parameters: list[nn.Parameter], updates: list[Tensor], rule: RoleRule, knobs: Knobs, ok: Tensor, config: Config) -> Move:
    """Returns the move of parameters of equal rates; where `ok` is 0 it leaves them as they are."""
    rate = ok * (knobs.lr_scale * rule.lr)
    shrinkage = rate * (knobs.weight_decay_scale * rule.weight_decay) if rule.weight_decay else None
    return Move([parameter.data for parameter in parameters], updates, rate, shrinkage, config.cautious_weight_decay)


def clean(gradient: Tensor, ok: Tensor, clip: Tensor) -> Tensor:
    """Returns the gradient times `clip`, or zeros where `ok` is 0."""
    return (gradient * clip).masked_fill_(ok == 0, 0.0)


class MuonGroup:
    """Matrices of one shape, stacked; this rank keeps the state of its share and orthogonalises it.

    Nesterov momentum, its rows brought to equal norm if asked (MuonEq-R), orthogonalised, each row divided by the running root mean square of its
    updates if asked (NorMuon, arXiv:2510.05491, at the norm that the update had before), times sqrt(max(1, rows / columns)).
    """

    def __init__(
        self, names: list[str], parameters: list[nn.Parameter], rule: RoleRule, config: Config, world: World, product: Callable[..., Tensor] = symmetric
    ) -> None:
        """`product` computes as `symmetric` does."""
        self.names, self.parameters, self.rule, self.config, self.world, self.product = names, parameters, rule, config, world, product
        self.share = -(-len(parameters) // world.size)
        like = parameters[0].data
        self.state = {"momentum": like.new_zeros(self.share, *like.shape)}
        if config.normuon_beta2:
            self.state["row_squares"] = like.new_zeros(self.share, like.shape[0], 1)

    def reduce(self) -> Callable[[], Tensor]:
        """Starts the transfer of gradients; returns what waits for those of this rank's share, summed over ranks, (share, rows, columns)."""
        gradients = take_gradients(self.names, self.parameters)
        padding = [torch.zeros_like(gradients[0])] * (self.share * self.world.size - len(gradients))
        return self.world.start_scatter_sum(torch.stack(gradients + padding)).wait

    def numbers(self, knobs: Knobs) -> list[Tensor]:
        """Returns what else `update` takes in this step."""
        return [self.state["momentum"].new_full((), knobs.momentum)]

    def update(self, gradient: Tensor, ok: Tensor, clip: Tensor, momentum: Tensor) -> Tensor:
        """Takes the gradient (n, rows, columns), as `clean` makes it, into the state; returns the update. `momentum` is a number, ()."""
        gradient, average = clean(gradient, ok, clip), self.state["momentum"]
        average.mul_(momentum).add_(gradient)
        update = self.direction(gradient + momentum * average)
        if self.config.normuon_beta2:
            update = self.equal_rows(update)
        update = update * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
        # On a GPU the iteration leaves no more digits than bfloat16 has, and half as many bytes travel.
        return update.bfloat16() if update.is_cuda else update

    def direction(self, momentum: Tensor) -> Tensor:
        """Returns the orthogonalised direction of (n, rows, columns)."""
        c = self.config
        if c.muon_row_normalize:
            momentum = momentum / momentum.norm(dim=2, keepdim=True).clamp_min(1e-7)
        return orthogonalise(momentum, c.muon_backend_steps, c.muon_coefficients, self.product).to(momentum.dtype)

    def equal_rows(self, update: Tensor) -> Tensor:
        """Returns the update with rows that have lately been large made smaller and the others larger, at the same norm per matrix."""
        squares = self.state["row_squares"]
        squares.lerp_(update.square().mean(dim=2, keepdim=True), 1 - self.config.normuon_beta2)
        scaled = update / (squares.sqrt() + 1e-8)
        return scaled * (update.norm(dim=(1, 2), keepdim=True) / scaled.norm(dim=(1, 2), keepdim=True).clamp_min(1e-8))

    def send(self, update: Tensor, ok: Tensor, knobs: Knobs) -> Callable[[], Move]:
        """Starts the transfer of the update; returns what waits for those of all ranks."""
        transfer = self.world.start_gather(update)

        def finish() -> Move:
            updates = transfer.wait()[: len(self.parameters)].to(self.state["momentum"].dtype).unbind()
            return move_of(self.parameters, list(updates), self.rule, knobs, ok, self.config)

        return finish

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns the state of every parameter by name, the same for any number of ranks. Every rank must call it."""
        whole = {key: self.world.start_gather(tensor).wait() for key, tensor in self.state.items()}
        return {name: {key: tensor[row].clone() for key, tensor in whole.items()} for row, name in enumerate(self.names)}

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores what `state_dict` returned."""
        mine = self.names[self.world.rank * self.share : (self.world.rank + 1) * self.share]
        for key, tensor in self.state.items():
            tensor.zero_()
            for row, name in zip(tensor, mine, strict=False):
                row.copy_(saved[name][key])


class AdamGroup:
    """AdamW for parameters of equal rates, laid end to end; every rank does the same work. Source: arXiv:1711.05101."""

    def __init__(self, names: list[str], parameters: list[nn.Parameter], rule: RoleRule, config: Config, world: World) -> None:
        self.names, self.parameters, self.rule, self.config, self.world = names, parameters, rule, config, world
        like, count = parameters[0].data, sum(parameter.numel() for parameter in parameters)
        self.state = {"first": like.new_zeros(count), "second": like.new_zeros(count), "steps": torch.zeros((), dtype=torch.float64)}

    def reduce(self) -> Callable[[], Tensor]:
        """Starts the one transfer of all gradients; returns what waits for them, summed over ranks."""
        return self.world.start_sum(torch.cat([gradient.flatten() for gradient in take_gradients(self.names, self.parameters)])).wait

    def numbers(self, knobs: Knobs) -> list[Tensor]:
        """Counts the step; returns what else `update` takes in it."""
        steps = float(self.state["steps"].add_(1))
        return [self.state["first"].new_full((), 1 - beta**steps) for beta in (self.config.beta1, self.config.beta2)]

    def update(self, gradient: Tensor, ok: Tensor, clip: Tensor, first_share: Tensor, second_share: Tensor) -> Tensor:
        """Takes the gradient, as `clean` makes it, into the moments; returns the update.

        The shares, (), say how much of the true moments the running ones have so far.
        """
        c, first, second = self.config, self.state["first"], self.state["second"]
        gradient = clean(gradient, ok, clip)
        first.lerp_(gradient, 1 - c.beta1)
        second.mul_(c.beta2).addcmul_(gradient, gradient, value=1 - c.beta2)
        return first / first_share / (second.sqrt() / second_share.sqrt() + c.adam_eps)

    def send(self, update: Tensor, ok: Tensor, knobs: Knobs) -> Callable[[], Move]:
        """Returns what says how the weights move."""
        return lambda: move_of(self.parameters, self.by_parameter(update), self.rule, knobs, ok, self.config)

    def by_parameter(self, flat: Tensor) -> list[Tensor]:
        """Returns the pieces of what is laid end to end, in the parameters' shapes."""
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns the state of every parameter by name."""
        moments = zip(self.names, self.by_parameter(self.state["first"]), self.by_parameter(self.state["second"]), strict=True)
        return {name: {"first": first.clone(), "second": second.clone(), "steps": self.state["steps"].clone()} for name, first, second in moments}

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores what `state_dict` returned."""
        for key in ("first", "second"):
            for name, piece in zip(self.names, self.by_parameter(self.state[key]), strict=True):
                piece.copy_(saved[name][key])
        self.state["steps"].copy_(saved[self.names[0]]["steps"])


def update_groups(groups: Sequence[MuonGroup | AdamGroup], gradients: Sequence[Tensor], ok: Tensor, clip: Tensor, numbers: list[list[Tensor]]) -> list[Tensor]:
    """Returns the update of every group."""
    return [group.update(gradient, ok, clip, *own) for group, gradient, own in zip(groups, gradients, numbers, strict=True)]


def square_sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the sum of each tensor's squares, at least float32."""
    return [(tensor if tensor.dtype == torch.float64 else tensor.float()).square().sum() for tensor in tensors]


class StepStats(NamedTuple):
    """What a step reports, as tensors that have not been waited for."""

    loss: Tensor  # nats per token, averaged over the whole batch
    grad_norm: Tensor  # of the averaged gradient, before clipping


class Optimizer:
    """All groups of a model: reduces gradients over ranks, clips the averaged gradient, steps, and leaves weights alone when it is not finite."""

    def __init__(self, model: GPT, config: Config, world: World) -> None:
        self.config, self.world, self.kernels = config, world, model.kernels
        rules, roles = role_rules(config), parameter_roles(model)
        members: dict[tuple[Any, ...], list[str]] = {}
        parameters = dict(model.named_parameters())
        for name, role in roles.items():
            kind, *rates = rules[role][:3]
            bucket = config.bucket(int(name.split(".")[1])) if name.startswith("blocks.") else 0
            members.setdefault((-bucket, kind, *rates, parameters[name].shape) if kind == "muon" else (0, kind, *rates), []).append(name)
        product = fast_symmetric if "symmetric" in model.kernels.names else symmetric
        kinds: dict[str, Callable[..., MuonGroup | AdamGroup]] = {"muon": partial(MuonGroup, product=product), "adam": AdamGroup}
        self.groups = [
            kinds[kind](names, [parameters[name] for name in names], rules[roles[names[0]]], config, world)
            for (_, kind, *_), names in sorted(members.items(), key=lambda item: item[0][0])  # in the order in which backward completes them
        ]
        self.transfers: list[Callable[[], Tensor]] = []  # of the first groups, those that have started
        self.awaited: set[Tensor] = set()  # parameters whose gradients are not complete, in the last backward of a step
        self.hooks: list[Any] = []  # on parameters, during that backward
        self.square_sums, self.update, self.move = (compiled(function, config) for function in (square_sums, update_groups, move))
        optimised = [name for group in self.groups for name in group.names]
        assert sorted(optimised) == sorted(parameters), "every parameter has exactly one optimiser"

    def expect(self) -> None:
        """Says that the next backward is the last one of a step: what it completes may travel."""
        if self.config.gradient_buckets > 1:
            self.awaited = {parameter for group in self.groups for parameter in group.parameters}
            self.hooks = [parameter.register_post_accumulate_grad_hook(self.arrived) for parameter in self.awaited]

    def arrived(self, parameter: Tensor) -> None:
        """Is called when backward has completed the gradient of `parameter`: starts the transfers of complete groups, in the same order on every rank."""
        self.awaited.remove(parameter)
        for group in self.groups[len(self.transfers) :]:
            if not self.awaited.isdisjoint(group.parameters):
                break
            self.transfers.append(group.reduce())

    def step(self, loss: Tensor, knobs: Knobs) -> StepStats:
        """Applies the gradients left by backward, already scaled to sum to the average over the batch. `loss` is this rank's part of the loss."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        transfers, self.transfers = self.transfers + [group.reduce() for group in self.groups[len(self.transfers) :]], []
        gradients = [arrived() for arrived in transfers]
        # A Muon group holds a share of the gradient, an Adam group all of it. That sum is averaged, for ranks that round it differently must not clip so.
        squares = self.square_sums(gradients)
        shared, repeated = (
            sum((square for group, square in zip(self.groups, squares, strict=True) if isinstance(group, kind)), torch.zeros_like(squares[0]))
            for kind in (MuonGroup, AdamGroup)
        )
        totals = self.world.sum_(torch.stack([loss.detach().to(shared.dtype), shared, repeated / self.world.size]))
        stats = StepStats(totals[0], (totals[1] + totals[2]).sqrt())
        ok = (stats.loss.isfinite() & stats.grad_norm.isfinite()).to(loss.dtype)
        limit = self.config.grad_clip_norm or math.inf
        clip = (limit / stats.grad_norm).nan_to_num(1.0).clamp_max(1.0)
        # Updates of one group travel while the next is worked on; where none travel, one call for all has the least overhead.
        together = len(self.groups) if self.world.size == 1 else 1
        finishes: list[Callable[[], Move]] = []
        for first in range(0, len(self.groups), together):
            groups = self.groups[first : first + together]
            updates = self.update(groups, gradients[first : first + together], ok, clip, [group.numbers(knobs) for group in groups])
            finishes += [group.send(update, ok, knobs) for group, update in zip(groups, updates, strict=True)]
        self.move([finish() for finish in finishes])
        return stats

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns the state of every parameter by name. Every rank must call it."""
        return {name: state for group in self.groups for name, state in group.state_dict().items()}

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores what `state_dict` returned."""
        for group in self.groups:
            group.load_state_dict(saved)


class Average:
    """A running average of the weights. All of its state lies in `state`, one list of tensors a key, and `count`.

    Each kind has `due`, which says whether the weights after a step go into the average, and `add`, which takes them in.
    """

    def __init__(self, weights: list[Tensor], config: Config) -> None:
        self.config = config
        self.count = 0  # weights that went into the average
        self.state: dict[str, list[Tensor]] = {"mean": [torch.zeros_like(weight) for weight in weights]}


class EMA(Average):
    """Exponential: weights w_1 .. w_n, taken every EMA_EVERY steps, count in proportion to decay^(n - i), decay being EMA_DECAY's over as many steps.

    No start from the initial weights, hence no bias to them.
    """

    def due(self, step: int, lr_scale: float) -> bool:
        return step % self.config.ema_every == 0

    def add(self, weights: list[Tensor]) -> None:
        self.count += 1
        decay = self.config.ema_decay**self.config.ema_every
        torch._foreach_lerp_(self.state["mean"], weights, (1 - decay) / (1 - decay**self.count))


class LAWA(Average):
    """Latest: the mean of the last LAWA_K weights, taken every LAWA_EVERY steps. Source: arXiv:2209.14981."""

    def __init__(self, weights: list[Tensor], config: Config) -> None:
        super().__init__(weights, config)
        self.state["kept"] = [weight.new_zeros(config.lawa_k, *weight.shape) for weight in weights]

    def due(self, step: int, lr_scale: float) -> bool:
        return step % self.config.lawa_every == 0

    def add(self, weights: list[Tensor]) -> None:
        slot = self.count % self.config.lawa_k
        self.count += 1
        filled = min(self.count, self.config.lawa_k)
        for kept, mean, weight in zip(self.state["kept"], self.state["mean"], weights, strict=True):
            kept[slot] = weight
            mean.copy_(kept[:filled].mean(dim=0))


class SWA(Average):
    """Stochastic: the mean of all weights taken every SWA_EVERY steps once the learning rate is at most SWA_START_LR_SCALE. Source: arXiv:1803.05407."""

    def due(self, step: int, lr_scale: float) -> bool:
        return lr_scale <= self.config.swa_start_lr_scale and step % self.config.swa_every == 0

    def add(self, weights: list[Tensor]) -> None:
        self.count += 1
        torch._foreach_lerp_(self.state["mean"], weights, 1 / self.count)


class Averages:
    """The averages in use, each of the one before it: EMA of the weights, LAWA of that, SWA of that."""

    def __init__(self, model: GPT, config: Config) -> None:
        self.parameters = dict(model.named_parameters())
        weights = self.weights()
        kinds: tuple[tuple[type[EMA | LAWA | SWA], float], ...] = ((EMA, config.ema_decay), (LAWA, config.lawa_k), (SWA, config.swa_every))
        self.chain = [kind(weights, config) for kind, used in kinds if used]

    def weights(self) -> list[Tensor]:
        """Returns the weights as training left them."""
        return [parameter.data for parameter in self.parameters.values()]

    def update(self, step: int, lr_scale: float) -> None:
        """Offers the weights after step `step` to every average."""
        weights = self.weights()
        for average in self.chain:
            if average.due(step, lr_scale):
                average.add(weights)
            weights = average.state["mean"] if average.count else weights

    def apply(self) -> None:
        """Replaces the weights of the model by their average, where one has begun."""
        begun = [average for average in self.chain if average.count]
        if begun:
            torch._foreach_copy_(self.weights(), begun[-1].state["mean"])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has its averaged weights inside, and its own again afterwards."""
        before = [weight.clone() for weight in self.weights()] if self.chain else []
        self.apply()
        try:
            yield
        finally:
            if before:
                torch._foreach_copy_(self.weights(), before)

    def state_dict(self) -> dict[str, Any]:
        """Returns every average's count and state, by the parameters' names."""
        saved: dict[str, Any] = {}
        for average in self.chain:
            named = {key: dict(zip(self.parameters, tensors, strict=True)) for key, tensors in average.state.items()}
            saved[type(average).__name__] = {"count": average.count, **named}
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for average in self.chain:
            entry = saved[type(average).__name__]
            average.count = entry["count"]
            for key, tensors in average.state.items():
                torch._foreach_copy_(tensors, [entry[key][name] for name in self.parameters])


# ------------------------------------------------------------------------------------------------------------------------------------
# Quantisation
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns how trained weights become points of their grids: the curvature of the loss around each weight, measured on training text; rounding,
# GPTQ and LQER; and `rate`, which spends bits where the loss feels them. Of bytes it knows only estimates.


class Curvature(NamedTuple):
    """Second moments around a weight (rows, columns): moving it by E raises the loss by about tr(G E H E^T) / 2. Source: K-FAC, arXiv:1503.05671."""

    inputs: Tensor  # H = E[x x^T] of what the weight is multiplied with: (columns, columns)
    outputs: Tensor | None  # G = E[g g^T] of the gradient of its output: (rows, rows), or its diagonal (rows,); None = not measured


def gram(x: Tensor) -> Tensor:
    """Returns the sum of x x^T over all but the last dimension, in float32."""
    flat = x.detach().flatten(0, -2).float()
    return flat.T @ flat


# How often each row of a table is looked up is counted on so many times as much text as the rest is measured on, which costs next to nothing: on that
# with which training began, for what follows is held out. Rows that no calibration token reads would pass for worthless: with 8,192 tokens they made
# KL 0.031 of 0.002 (2.3 M weights, 32,768 tokens of text, n = 1).
LOOKUP_FACTOR = 32


def count_lookups(model: GPT, num_rows: int, seq_len: int, loader: TrainLoader, world: World) -> dict[str, Tensor]:
    """Returns how often this rank's share of the first rows of training looks up each row of each table, by parameter name; the loader stays where it is."""
    now, loader.state = loader.state, {**loader.state, "passes": 0, "shard": 0, "row": 0, "seq_len": 0}
    tokens = loader.next_rows(num_rows, seq_len, world)[:, :-1]
    loader.state = now
    tables = {name: part for name, part in weight_parts(model).items() if isinstance(part, Table)}
    return {name: torch.bincount(table.index(tokens).flatten(), minlength=len(table.weight)).float().to(world.device) for name, table in tables.items()}


def calibrate(model: GPT, phase: Phase, loader: TrainLoader, world: World) -> dict[str, Curvature]:
    """Returns the curvature around every weight, by parameter name, from the next CALIBRATION_TOKENS of training text over all ranks.

    The forward is that of training, masks included. Each use of a layer that runs several times is measured alone, then `merge_uses`. Gradients
    are those of the loss on labels that the model itself draws, so that G is the Fisher information. But for `rate` there is no G, and nothing on tables
    that are only looked up.
    """
    config, head = model.config, model.head
    gradients = config.quant_scheme == "rate"
    num_rows = -(-config.calibration_tokens // (phase.seq_len * world.size)) * world.size
    tokens = to_device(loader.next_rows(num_rows, phase.seq_len, world), world.device)[:, :-1]
    draws = torch.rand(num_rows, phase.seq_len, generator=torch.Generator().manual_seed(config.seed))
    draws = draws[world.rank * len(tokens) : (world.rank + 1) * len(tokens)].to(world.device)
    sums: dict[tuple[str, str, str], Tensor] = {}  # by parameter, use and side

    def add(name: str, use: str, side: str, value: Tensor) -> None:
        sums[name, use, side] = sums[name, use, side] + value if (name, use, side) in sums else value

    calls: Counter[str] = Counter()  # of each weight in the current forward

    def on_multiply(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        calls[name] += 1
        use, scale = f"multiply {calls[name]}", arguments[4] if len(arguments) > 4 else None
        add(name, use, "inputs", gram(arguments[0]))
        if gradients:
            output.register_hook(lambda gradient: add(name, use, "outputs", gram(gradient if scale is None else gradient * scale.detach())))

    def on_multiply_joined(path: str, module: Joined, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        for name, output in zip(module.members, outputs, strict=True):
            on_multiply(f"{path.rpartition('.')[0]}.{name}.weight", module, arguments[:1], output)

    def on_lookup(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if gradients:
            output.requires_grad_().register_hook(lambda gradient: add(name, "lookup", "inputs", gram(gradient)))

    def on_score(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        x = arguments[0]
        add(scored, "score", "inputs", gram(head.thin(x, phase)))
        if gradients and head.widen is not None:
            table = head.table.weight.detach()
            add("embedding.widen.weight", "score", "outputs", gram(x))
            output.register_hook(lambda gradient: add("embedding.widen.weight", "score", "inputs", gram(gradient.float() @ table)))

    scored = "embedding.table.weight" if config.tie_embeddings else "head.table.weight"
    handles = [head.register_forward_hook(on_score)]
    for path, module in model.named_modules():
        if isinstance(module, Joined):
            handles.append(module.register_forward_hook(partial(on_multiply_joined, path)))
        elif isinstance(module, Linear | Table):
            handles.append(module.register_forward_hook(partial(on_lookup if isinstance(module, Table) else on_multiply, f"{path}.weight")))
    model.requires_grad_(False)
    try:
        step = max(config.micro_batch_tokens // (4 * phase.seq_len), 1)
        for part, draw in zip(tokens.split(step), draws.split(step), strict=True):
            calls.clear()
            with torch.set_grad_enabled(gradients):
                logits = model.logits(part, phase)
            if gradients:
                shares = F.softmax(logits.detach(), dim=-1)
                add(scored, "score", "outputs", (shares * (1 - shares)).flatten(0, -2).sum(dim=0))
                labels = (shares.cumsum(dim=-1) < draw[..., None]).sum(dim=-1).clamp_max(config.vocab_size - 1)
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    finally:
        model.requires_grad_(True)
        for handle in handles:
            handle.remove()
    for name, counts in count_lookups(model, LOOKUP_FACTOR * num_rows, phase.seq_len, loader, world).items() if gradients else ():
        add(name, "lookup", "outputs", counts / LOOKUP_FACTOR)
    uses: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, use, side in sorted(sums):
        uses.setdefault(name, {}).setdefault(use, {})[side] = world.sum_(sums[name, use, side].contiguous()) / (num_rows * phase.seq_len)
    return {name: curvature for name, used in uses.items() if (curvature := merge_uses(list(used.values()))) is not None}


def merge_uses(uses: Sequence[Mapping[str, Tensor]]) -> Curvature | None:
    """Returns one curvature for a weight that is used in several ways: H = sum of H_u tr(G_u), and G so that tr(H) tr(G) = sum of tr(H_u) tr(G_u).

    Without gradients H is the sum of H_u. Adding up H and G apart would count every pair of uses: R times too much for R equal ones.
    """
    inputs = [use["inputs"] for use in uses if "inputs" in use]
    measured = [(use["inputs"], use["outputs"]) for use in uses if len(use) == 2]
    if not measured or len(uses) == 1:
        return Curvature(torch.stack(inputs).sum(dim=0), measured[0][1] if measured else None) if inputs else None
    sizes = [(float(h.trace()), float(g.sum() if g.dim() == 1 else g.trace())) for h, g in measured]
    total = torch.stack([h * size for (h, _), (_, size) in zip(measured, sizes, strict=True)]).sum(dim=0)
    outputs = torch.stack([g * size for (_, g), (size, _) in zip(measured, sizes, strict=True)]).sum(dim=0)
    return Curvature(total, outputs / total.trace().clamp_min(1e-30))


def damped(matrix: Tensor, share: float) -> Tensor:
    """Returns the matrix in float64 with `share` of its mean diagonal added to the whole diagonal.

    A share of each entry's own diagonal does harm: feedback then moves errors to where the curvature is next to nothing, and they become so large
    there that the loss is no longer quadratic in them.
    """
    matrix = matrix.double()
    return matrix + (share * matrix.diagonal().mean() + 1e-20) * torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)


def reverse_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (M, d) with matrix = M diag(d) M^T and M unit upper triangular, float64."""
    upper = torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1)
    root = upper.diagonal()
    return upper / root, root.square()


def assign_with_feedback(weight: Tensor, grid: Grid, feedback: Tensor) -> Tensor:
    """Returns codes (rows, columns): column by column, each rounded after the errors of those before it have been added to it.

    With H = M diag(d) M^T and `feedback` M, the target of column j is v_j = w_j + sum over k < j of (w_k - q_k) M_kj, and then
    tr(E H E^T) = sum of d_j |v_j - q_j|^2 exactly: GPTQ (arXiv:2210.17323) as Babai's nearest plane (arXiv:2507.18553).
    """
    feedback, column_step = feedback.to(weight.dtype), grid.column_step.expand(1, weight.shape[1])
    codes, error = torch.empty_like(weight), torch.zeros_like(weight)
    for start in range(0, weight.shape[1], 128):
        end = min(start + 128, weight.shape[1])
        moved = weight[:, start:end] + error[:, :start] @ feedback[:start, start:end]
        for j in range(start, end):
            column = Grid(grid.row_step, column_step[:, j : j + 1], grid.limit, grid.spacing)
            target = moved[:, j - start : j - start + 1] + error[:, start:j] @ feedback[start:j, j : j + 1]
            codes[:, j : j + 1] = column.round(target)
            error[:, j : j + 1] = weight[:, j : j + 1] - column.dequantise(codes[:, j : j + 1])
    return codes


def assign_gptq(weight: Tensor, grid: Grid, inputs: Tensor | None, damping: float) -> Tensor:
    """Returns codes (rows, columns) by GPTQ: columns in falling order of activation, H damped. Without statistics: nearest points."""
    if inputs is None:
        return grid.round(weight)
    order = inputs.diagonal().argsort(descending=True, stable=True)
    feedback, _ = reverse_cholesky(damped(inputs[order][:, order], damping))
    return assign_with_feedback(weight[:, order], grid, feedback)[:, order.argsort()]


def adaptive_sigmas(weights: Mapping[str, Weight], curvatures: Mapping[str, Curvature]) -> dict[str, float]:
    """Returns the clip factor of every weight: exp(offset - 0.15 log sensitivity) in [6, 24], sensitivity = mean(diag H) times the mean variance of a row.

    The offset makes the mean of its logarithm, over all weights that have statistics, that of the constants per role; those without, and the
    embedding, keep their constant. Source: PR #1962.
    """
    sigmas = {name: part.clip_sigmas for name, part in weights.items()}
    sized = {name: part.weight.numel() for name, part in weights.items() if name in curvatures and part.role not in (Role.EMBED, Role.TABLE)}
    if not sized:
        return sigmas
    spread = {name: float(weights[name].weight.detach().var(dim=1).mean()) * float(curvatures[name].inputs.diagonal().mean()) for name in sized}
    wanted = sum(size * math.log(sigmas[name]) for name, size in sized.items())

    def at(offset: float) -> dict[str, float]:
        return {name: min(max(math.exp(offset - 0.15 * math.log(spread[name] + 1e-30)), 6.0), 24.0) for name in sized}

    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(sized[name] * math.log(sigma) for name, sigma in at(middle).items()) < wanted
        low, high = (middle, high) if below else (low, middle)
    return {**sigmas, **at(high)}


class Factors(NamedTuple):
    """A correction of rank r to a stored weight: left (rows, r) times right (r, columns), each as codes and steps."""

    left: Tensor  # codes
    left_step: Tensor  # (1, r)
    right: Tensor  # codes
    right_step: Tensor  # (r, groups)
    group: int  # columns of `right` that share a step

    def product(self) -> Tensor:
        """Returns left @ right, summed in a fixed order so that every machine gets the same bits."""
        left = self.left * self.left_step
        right = self.right * self.right_step[:, torch.arange(self.right.shape[1]) // self.group]
        total = torch.zeros(len(left), right.shape[1])
        for k in range(left.shape[1]):
            total += left[:, k : k + 1] * right[k : k + 1]
        return total


def lqer_factors(error: Tensor, rank: int, config: Config) -> Factors:
    """Returns the best correction of this rank to `error`, quantised. Source: arXiv:2402.02446, PR #1855."""
    u, s, v = torch.linalg.svd(error.float(), full_matrices=False)
    left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * v[:rank]
    group = config.lqer_asym_group
    padded = F.pad(right, (0, -right.shape[1] % group)).unflatten(1, (-1, group))
    grid = row_grid(left.T.abs().amax(dim=1, keepdim=True), config.lqer_left_bits)
    right_grid = row_grid(padded.flatten(0, 1).abs().amax(dim=1, keepdim=True), config.lqer_factor_bits)
    codes = right_grid.round(padded.flatten(0, 1)).view(rank, -1)[:, : right.shape[1]]
    return Factors(grid.round(left.T).T, grid.row_step.T, codes, right_grid.row_step.view(rank, -1), group)


# -- `rate`: steps from both sides of the curvature, errors fed back along both, points chosen by a trellis; one global step meets the byte budget.

QUARTERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
INPUT_DAMPING, OUTPUT_DAMPING, DIAGONAL_DAMPING = 0.03, 0.03, 0.01
# Taller matrices (embeddings) have their rows treated as independent: a dense G of the vocabulary costs much and was found to give nothing.
MOST_COUPLED_ROWS = 4096
# Ungerboeck's 8-state trellis (parity checks 13 and 4, octal): from state s, a coordinate n with n mod 2 = s mod 2 leads to NEXT_STATE[s][n // 2 mod 2].
NEXT_STATE = {1: ((0, 0),), 8: ((0, 2), (5, 7), (1, 3), (4, 6), (2, 0), (7, 5), (3, 1), (6, 4))}
# Rows after which the trellis settles what came before: several times the rows after which its survivors have a common past.
SETTLED_ROWS = 32


def quarter_powers(exponents: np.ndarray) -> np.ndarray:
    """Returns 2^(k / 4) of integers k in float64, the same bits on every machine."""
    return np.ldexp(np.array(QUARTERS)[exponents % 4], exponents // 4)


def rate_grid(step: float, row_exponents: np.ndarray, column_exponents: np.ndarray) -> Grid:
    """Returns the grid of `rate`; its points are half steps, of which rounding takes every second."""
    row_step = torch.from_numpy(step / 2 * quarter_powers(row_exponents)).float()[:, None]
    return Grid(row_step, torch.from_numpy(quarter_powers(column_exponents)).float()[None], RATE_LIMIT, 2)


class Allocation(NamedTuple):
    """How `rate` treats one weight (rows, columns), whatever the global step."""

    row_exponents: np.ndarray  # steps are in proportion to 2^(row / 4) 2^(column / 4)
    column_exponents: np.ndarray
    inner: Tensor  # M of H = M diag(d) M^T: feedback along columns
    outer: Tensor | None  # N of G = N^T diag(g) N: feedback along rows
    row_weight: Tensor  # g

    def grid(self, step: float) -> Grid:
        """Returns the grid for a global step."""
        return rate_grid(step, self.row_exponents, self.column_exponents)

    def reaching(self, weight: Tensor, step: float) -> Allocation:
        """Returns the allocation with wider steps in rows that could not be reached within RATE_LIMIT otherwise, with room for feedback."""
        reach = self.grid(step).step.double() * (0.8 * RATE_LIMIT)
        excess = 4 * (weight.detach().double().cpu().abs() / reach).amax(dim=1).clamp_min(1).log2()
        return self._replace(row_exponents=self.row_exponents + excess.ceil().numpy().astype(np.int16))


def allocate(curvature: Curvature) -> Allocation:
    """Returns steps in proportion to (g_i d_j)^(-1/2), at which every weight adds the same error to the loss. Sources: arXiv:2603.04956, arXiv:2505.22988."""
    assert curvature.outputs is not None, "calibrated without gradients"
    inner, d = reverse_cholesky(damped(curvature.inputs, INPUT_DAMPING))
    if curvature.outputs.dim() == 2 and len(curvature.outputs) <= MOST_COUPLED_ROWS:
        upper, g = reverse_cholesky(damped(curvature.outputs, OUTPUT_DAMPING))
        outer = upper.T.float().contiguous()
    else:
        diagonal = (curvature.outputs if curvature.outputs.dim() == 1 else curvature.outputs.diagonal()).double()
        outer, g = None, diagonal + DIAGONAL_DAMPING * diagonal.mean() + 1e-20
    row, column = ((-2 * side.log2()).round().clamp(-200, 200).cpu().numpy().astype(np.int16) for side in (g, d))
    return Allocation(row, column, inner.float(), outer, g.float())


def frozen_exponents(part: Weight, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (row exponents, column exponents) of a grid that was frozen at a global step."""
    row, column = ((4 * side.double().log2()).round().flatten().cpu().numpy().astype(np.int16) for side in (part.row_step * 2 / step, part.column_step))
    return row, column


def scale_counts(weight: Tensor, allocation: Allocation) -> Tensor:
    """Returns how many weights have a standard deviation of 2^(k / 4) steps at global step 1, k = -200 .. 200, from the sizes of rows and columns."""
    grid = allocation.grid(1.0)
    squares = (weight.double() / (grid.step.to(weight.device) * grid.spacing)).square() + 1e-30
    log_rows, log_columns = (0.5 * squares.mean(dim=side).log2() for side in (1, 0))
    exponents = 4 * (log_rows[:, None] + log_columns - 0.5 * squares.mean().log2())
    return torch.bincount(exponents.round().clamp(-200, 200).long().flatten() + 200, minlength=401).double()


def forecast_bits(counts: Tensor, step: float) -> float:
    """Returns how many bits weights with these `scale_counts` are predicted to take at a global step."""
    scales = 2 ** (torch.arange(-200, 201, dtype=torch.float64) / 4) / step
    return float((counts * gaussian_bits(scales)).sum())


def find_step(counts: Tensor, bits: float) -> float:
    """Returns the global step at which weights with these `scale_counts` are predicted to take `bits` bits in total."""
    low, high = -60.0, 60.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if forecast_bits(counts, 2**middle) > bits else (low, middle)
    return 2**high


# At steps finer than for this divergence in nats per token, the loss does not change any more; such codes take about so many bits per weight.
FINEST_DIVERGENCE, FINEST_BITS = 5e-6, 8.0


def overhead_bits(model: GPT) -> float:
    """Returns about how many bits a `rate` artifact takes besides its codes: float16 gains, exponents of rows and columns, header."""
    parts = weight_parts(model)
    gains = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in parts)
    return 15 * gains + 7 * sum(sum(part.weight.shape) for part in parts.values()) + 16000


# What codes take beyond `forecast_bits`, in bits per weight: measured at 2.2 to 3.6 bits per weight, to the nearest point and with feedback, which
# spreads what is rounded wider than the weights are.
NEAREST_EXTRA_BITS, FEEDBACK_EXTRA_BITS = 0.03, 0.1


class RatePlan(NamedTuple):
    """What `rate` is about to do with a model."""

    step: float  # the global one
    allocations: dict[str, Allocation]
    counts: Tensor  # `scale_counts` of all weights
    finest: float  # the least global step of use: the divergence is about weights * step^2 / 24 nats per token


def plan_rate(model: GPT, curvatures: Mapping[str, Curvature], budget: int, extra_bits: float = FEEDBACK_EXTRA_BITS) -> RatePlan:
    """Returns the steps at which the model is predicted to fill `budget` bytes. Where training saw frozen steps, they are those."""
    parts = weight_parts(model)
    allocations = {name: allocate(curvatures[name]) for name in parts}
    step = model.frozen_step
    if step:
        for name, part in parts.items():
            rows, columns = frozen_exponents(part, step)
            allocations[name] = allocations[name]._replace(row_exponents=rows, column_exponents=columns)
    counts = torch.stack([scale_counts(part.weight.detach(), allocations[name]).cpu() for name, part in parts.items()]).sum(dim=0)
    finest = (24 * FINEST_DIVERGENCE / float(counts.sum())) ** 0.5
    codes_bits = 8 * budget - overhead_bits(model) - extra_bits * float(counts.sum())
    step = step or float(np.float32(max(find_step(counts, codes_bits), finest)))
    return RatePlan(step, allocations, counts, finest)


@cache
def trellis_kernel() -> Callable[..., None]:
    """Returns the compiled inner loop of `assign_two_sided`: it releases the interpreter's lock, so that threads work on several matrices."""
    import numba

    def settle(weight, moved, inner, outer, row_step, column_step, row_weight, next_state, limit, codes, error):  # type: ignore[no-untyped-def]
        # weight, moved, codes, error: (rows, columns) of a block; inner: (columns, columns), transposed; outer: (rows, rows), or (0, 0) = independent rows.
        rows, columns = weight.shape
        states, window = len(next_state), 2 * SETTLED_ROWS
        coupled = outer.shape[0] > 0
        target, settled = np.empty(rows, np.float32), np.empty(rows, np.float32)
        recent, moved_on = np.zeros((states, window), np.float32), np.zeros((states, window), np.float32)
        cost, new_cost = np.empty(states), np.empty(states)
        came_from, chose = np.zeros((rows, states), np.int64), np.zeros((rows, states), np.int64)
        origin = np.empty(states, np.int64)
        for j in range(columns):
            for i in range(rows):
                fed = weight[i, j] + moved[i, j]
                for k in range(j):
                    fed += error[i, k] * inner[j, k]
                target[i] = fed
            cost[:] = np.inf
            cost[0] = 0.0
            first = 0  # rows before this one are settled, the same for all survivors
            for i in range(rows):
                step = row_step[i] * column_step[j]
                shared = target[i]
                if coupled:
                    for k in range(first):
                        shared += outer[i, k] * settled[k]
                new_cost[:] = np.inf
                for state in range(states):
                    if cost[state] == np.inf:
                        continue
                    fed = shared
                    if coupled:
                        for k in range(i - first):
                            fed += outer[i, first + k] * recent[state, k]
                    ratio = fed / step
                    for branch in range(2):
                        residue = 2 * branch + (state & 1)
                        code = residue + 4 * int(np.floor((ratio - residue) / 4 + 0.5))
                        while code > limit:
                            code -= 4
                        while code < -limit:
                            code += 4
                        miss = (ratio - code) * step
                        total = cost[state] + row_weight[i] * miss * miss
                        reached = next_state[state, branch]
                        if total < new_cost[reached]:
                            new_cost[reached], came_from[i, reached], chose[i, reached] = total, state, code
                for state in range(states):
                    if coupled and new_cost[state] < np.inf:
                        parent = came_from[i, state]
                        for k in range(i - first):
                            moved_on[state, k] = recent[parent, k]
                        moved_on[state, i - first] = target[i] - chose[i, state] * step
                recent, moved_on = moved_on, recent
                cost, new_cost = new_cost, cost
                if coupled and i - first + 1 == window:
                    best = np.argmin(cost)
                    for state in range(states):
                        origin[state] = state
                        if cost[state] < np.inf:
                            for k in range(i, first + SETTLED_ROWS - 1, -1):
                                origin[state] = came_from[k, origin[state]]
                    for k in range(SETTLED_ROWS):
                        settled[first + k] = recent[best, k]
                    for state in range(states):
                        if origin[state] != origin[best]:
                            cost[state] = np.inf
                        for k in range(SETTLED_ROWS):
                            recent[state, k] = recent[state, SETTLED_ROWS + k]
                    first += SETTLED_ROWS
            state = np.argmin(cost)
            for i in range(rows - 1, -1, -1):
                codes[i, j] = chose[i, state]
                error[i, j] = weight[i, j] - codes[i, j] * (row_step[i] * column_step[j])
                state = came_from[i, state]

    return numba.njit(settle, nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})


def assign_two_sided(weight: Tensor, grid: Grid, allocation: Allocation, states: int) -> np.ndarray:
    """Returns codes (rows, columns), int16, on half steps: errors are fed back along columns and rows, and a trellis of 1 or 8 states goes down each column.

    With c = E strict(M), the target of row i is w_i + c_i + sum over k < i of N_ik (e_k + c_k), and the sum of d_j g_i (target - point)^2 over all weights
    is tr(G E H E^T) exactly. Every survivor of the trellis carries the errors of its own path (per-survivor processing). One state: plain rounding
    to full steps. Sources: trellis-coded quantisation, Marcellin and Fischer 1990; feedback along both sides, arXiv:2505.22988.
    """
    rows, columns = weight.shape
    source = weight.float().cpu().numpy()
    inner = allocation.inner.cpu().numpy()
    outer = np.empty((0, 0), np.float32) if allocation.outer is None else allocation.outer.cpu().numpy()
    row_step, column_step = grid.row_step[:, 0].numpy(), grid.column_step[0].numpy()
    row_weight, next_state = allocation.row_weight.cpu().numpy(), np.array(NEXT_STATE[states])
    codes, error = np.zeros((rows, columns), np.int16), np.zeros((rows, columns), np.float32)
    for start in range(0, columns, 64):
        part = slice(start, min(start + 64, columns))
        moved = error[:, :start] @ inner[:start, part]
        coded, missed = np.empty(moved.shape, np.int16), np.empty(moved.shape, np.float32)
        own, within = np.ascontiguousarray(source[:, part]), np.ascontiguousarray(inner[part, part].T)
        trellis_kernel()(own, moved, within, outer, row_step, column_step[part], row_weight, next_state, grid.limit, coded, missed)
        codes[:, part], error[:, part] = coded, missed
    return codes


# ------------------------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns the loop: warm-up that leaves no trace, steps, validation and checkpoints in between, and every way to stop. It knows of
# evaluation only the callback `validate`.

CHECKPOINT_VERSION, DIGEST_BYTES = 6, 16
CHECKPOINT_FILES = ("checkpoint.pt", "checkpoint_before.pt")  # the newest, and the one before
# The decision to stop is two steps old when it is obeyed on a CPU, three on a GPU, whose queue runs a step behind the host.
STEPS_IN_FLIGHT = 3


class Score(NamedTuple):
    """An evaluation of the whole validation split."""

    val_loss: float  # nats per token
    val_bpb: float  # bits per byte of text
    seconds: float
    targets: int
    bytes: int
    adapted_frac: float  # of the targets: scored while all adaptation that was asked for went on


class Diverged(ValueError):
    """Training met a loss or gradient that is not finite."""


class TrainingState(NamedTuple):
    """Everything that training changes; `save` and `load` serve warm-up, checkpoints and resume alike."""

    model: GPT
    optimizer: Optimizer
    averages: Averages
    loader: TrainLoader

    def save(self) -> dict[str, Any]:
        """Returns a copy on the CPU. Every rank must call it."""
        live = {
            "model": {name: parameter.detach() for name, parameter in self.model.named_parameters()}, "grids": dict(self.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(), "averages": self.averages.state_dict(), "loader": self.loader.state,
        }  # fmt: skip
        return cpu_copy(live)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores what `save` returned. Raises ValueError where it was made from other shards."""
        if saved["loader"]["shards"] != self.loader.state["shards"]:
            raise ValueError(f"DATA_PATH={self.loader.config.data_path}: not the train shards of the checkpoint, by their names or lengths; put them back")
        load_weights(self.model, saved["model"])
        load_grids(self.model, saved["grids"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.averages.load_state_dict(saved["averages"])
        self.loader.state = dict(saved["loader"])


def cpu_copy(content: Any) -> Any:
    """Returns a copy of nested dictionaries, their tensors on the CPU."""
    if isinstance(content, dict):
        return {key: cpu_copy(value) for key, value in content.items()}
    return content.detach().cpu().clone() if isinstance(content, Tensor) else content


def load_weights(model: GPT, weights: Mapping[str, Tensor]) -> None:
    """Copies `weights` into the model's parameters; both must have the same names and shapes."""
    parameters = dict(model.named_parameters())
    assert {name: p.shape for name, p in parameters.items()} == {name: w.shape for name, w in weights.items()}, "weights of another model"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load_grids(model: GPT, grids: Mapping[str, Tensor]) -> None:
    """Restores the frozen grids of a checkpoint, as far as the model has such."""
    for name, buffer in model.named_buffers():
        if name in grids:
            buffer.copy_(grids[name])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Returns a checkpoint: version, settings, step, skipped, seconds, finished, state. Raises ValueError when it is not one, or damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):
            raise ValueError("it holds no settings")
        version, digest = saved["version"], saved.pop("digest")
        if version != CHECKPOINT_VERSION:
            raise ValueError(f"version {version}, this script reads version {CHECKPOINT_VERSION}")
        if digest != content_digest(saved):
            raise ValueError("its content does not match its digest")
    except Exception as error:  # torch.load raises a different type for every kind of damage
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"{path}: not a checkpoint of this script, or damaged ({reason})") from None
    return saved


def content_digest(content: Any) -> str:
    """Returns a digest of nested dictionaries of tensors and plain values.

    The checksums of a zip archive, which a checkpoint is, are not enough: 12 of 10,000 damaged files passed them and held something else.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                digest.update(repr(key).encode())
                add(entry)
        elif isinstance(value, Tensor):
            digest.update(value.contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Returns (path, content, what is wrong with newer ones) of the newest checkpoint that is whole; None where there is none at all.

    Raises ValueError where all are damaged.
    """
    problems: list[str] = []
    for path in (folder / name for name in CHECKPOINT_FILES):
        if path.exists():
            try:
                return path, read_checkpoint(path), problems
            except ValueError as problem:
                problems.append(str(problem))
    if problems:
        raise ValueError("; ".join(problems))
    return None


def check_same_settings(saved: Mapping[str, Any], config: Config) -> None:
    """Raises ValueError listing the settings in which a checkpoint differs from this run, where they reach the trained weights."""
    now = asdict(config)
    free = (*FREE_ON_RESUME, *GRID_SETTINGS) if config.qat_start_frac == 1 else FREE_ON_RESUME
    differing = [name for name in now if name not in free and saved.get(name) != now[name]]
    if differing:
        lines = [f"  {name.upper()}: checkpoint {saved.get(name)!r}, now {now[name]!r}" for name in differing]
        raise ValueError("RESUME=1: the checkpoint was made with other settings; use its config.env, or another RUN_ID:\n" + "\n".join(lines))


class HostCopy:
    """Numbers on their way from the device: `read` waits for this copy alone, not for work queued after it."""

    def __init__(self, stats: StepStats) -> None:
        values = torch.stack(list(stats))
        self.arrived = torch.cuda.Event() if values.is_cuda else None
        self.values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True) if values.is_cuda else values.cpu()
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> tuple[float, float]:
        """Returns (loss, gradient norm)."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, grad_norm = self.values.tolist()
        return loss, grad_norm


def rows_per_forward(config: Config, phase: Phase, ranks: int) -> int:
    """Returns the rows of a micro-batch: the most that MICRO_BATCH_TOKENS allows and that divide a rank's share of the batch evenly."""
    rows = phase.batch_tokens // phase.seq_len
    if rows % ranks:
        raise ValueError(f"a batch of {phase.batch_tokens} tokens is {rows} rows of {phase.seq_len} tokens, which {ranks} ranks cannot share evenly")
    share = rows // ranks
    most = min(share, config.micro_batch_tokens // phase.seq_len)
    return next(count for count in range(most, 0, -1) if share % count == 0)


def training_forward(model: GPT, config: Config) -> Callable[..., Tensor]:
    """Returns the forward of `model`, compiled if COMPILE says so; with GRADIENT_BUCKETS a graph for the layers of each.

    Backward hands over the gradients of a graph when it has left the graph.
    """
    whole = compiled(model, config)
    if not config.compile or config.gradient_buckets == 1:
        return whole

    def stretch(stream: Stream | None, tokens: Tensor, targets: Tensor, phase: Phase, slots: range) -> Stream | Tensor:
        rows = model.rows(tokens, phase)
        stream = model.execute(stream or model.begin(tokens, rows, phase), rows, phase, None, slots)
        return model.training_loss(stream.merged(), targets, phase) if slots.stop == len(phase.order) else stream

    run = compiled(stretch, config)

    def forward(tokens: Tensor, targets: Tensor, phase: Phase) -> Tensor:
        if not torch.is_grad_enabled():
            return whole(tokens, targets, phase)
        result: Any = None
        for slots in bucket_slots(config, phase):
            result = run(result, tokens, targets, phase, slots)
        return result

    return forward


def bucket_slots(config: Config, phase: Phase) -> list[range]:
    """Returns the executed layers of a phase in GRADIENT_BUCKETS stretches, each of which starts where a layer of its bucket runs for the first time.

    When backward has left a stretch it has left all layers of its bucket and of later ones.
    """
    buckets = [config.bucket(layer) for layer in phase.order]
    starts = [buckets.index(bucket) for bucket in range(config.gradient_buckets)]
    return [range(first, end) for first, end in itertools.pairwise([*starts, len(buckets)])]


def training_step(forward: Callable[..., Tensor], optimizer: Optimizer, loader: TrainLoader, knobs: Knobs) -> StepStats:
    """Returns the statistics of one step over the whole batch. Its result does not depend on how rows are spread over ranks and micro-batches."""
    world, phase = optimizer.world, knobs.phase
    rows = loader.next_rows(phase.batch_tokens // phase.seq_len, phase.seq_len, world)
    loss = torch.zeros((), device=world.device)
    parts = rows.split(rows_per_forward(loader.config, phase, world.size))
    for number, share_of_rows in enumerate(parts, 1):
        if optimizer.kernels.attention.is_ragged:
            phase = replace(phase, row_documents=loader.bounds.of(share_of_rows[:, :-1]))
        part = to_device(share_of_rows, world.device)
        if loader.config.qat_loop_noise and phase.qat:  # the same noise on every rank, in every part of the batch, and after a resume
            torch.manual_seed(loader.config.seed + loader.state["tokens"])
        nats = forward(part[:, :-1], part[:, 1:], phase)
        share = nats.sum() / phase.batch_tokens
        if number == len(parts):
            optimizer.expect()
        share.backward()
        loss += share.detach()
    return optimizer.step(loss, knobs)


def warm_up(run: Run, forward: Callable[..., Tensor], state: TrainingState, schedule: Schedule) -> None:
    """Runs and so compiles every phase, then puts weights, optimiser state and data order back, bit for bit."""
    steps = run.config.warmup_steps
    if not steps:
        return
    began = time.perf_counter()
    before = state.save()
    phases = schedule.phases()
    for number, phase in enumerate(phases, 1):
        for step in range(steps):
            run.log.progress(f"warm-up step {step + 1} of {steps}, phase {number} of {len(phases)}")
            training_step(forward, state.optimizer, state.loader, Knobs(phase, 1.0, run.config.muon_momentum, 1.0))
    state.load(before)
    synchronise(run.world)
    run.log.note(f"warm-up: steps {steps}, phases {len(phases)}, {time.perf_counter() - began:.1f} s, then undone")


def synchronise(world: World) -> None:
    """Waits until the device has done what was queued."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()


class Trained(NamedTuple):
    """What training hands on."""

    steps: int
    skipped: int  # of them, because loss or gradient was not finite
    seconds: float
    tokens: int
    score: Score  # of the trained weights, before quantisation
    curvatures: Mapping[str, Curvature]  # around them, where QUANT_SCHEME asks for it


class Moment(NamedTuple):
    """How far a run had come when a step was queued."""

    step: int
    seconds: float
    tokens: int


class Pace:
    """Seconds a step, over about the last fifty: a later phase may be slower than the mean of all before it."""

    MEMORY_STEPS = 50

    def __init__(self, step: int, seconds: float) -> None:
        """Starts from the mean of `step` steps that took `seconds`."""
        self.step, self.seconds = step, seconds
        self.count = min(step, self.MEMORY_STEPS)
        self.step_seconds = seconds / max(step, 1)

    def update(self, step: int, seconds: float) -> float:
        """Returns the pace when the clock read `seconds` after `step` steps; 0 before the first step."""
        if step > self.step:
            self.count = min(self.count + 1, self.MEMORY_STEPS)
            self.step_seconds += ((seconds - self.seconds) / (step - self.step) - self.step_seconds) / self.count
            self.step = step
        self.seconds = seconds
        return self.step_seconds


class Trainer:
    """One training run: `train` is the loop, the other methods are what happens between its steps."""

    def __init__(self, run: Run, model: GPT, loader: TrainLoader, validate: Callable[[Callable[..., Tensor], Phase], Score]) -> None:
        """`validate` scores the model it is given on the whole validation split, in the phase that it is given."""
        self.run = run
        self.forward = training_forward(model, run.config)
        self.state = TrainingState(model, Optimizer(model, run.config, run.world), Averages(model, run.config), loader)
        self.schedule = Schedule(run.config)
        self.reserve_seconds = 0.0  # of MAX_WALLCLOCK_SECONDS, for the statistics that the export needs
        self.score_now = validate
        self.phase = self.schedule.scored_phase  # of the latest step, without QAT
        self.step = 0
        self.clock = Clock()
        self.logged = Moment(0, 0.0, 0)  # at the last log line
        self.skipped = self.skipped_running = 0  # steps that were not applied: in all, and running
        self.in_flight: tuple[Moment, HostCopy, Knobs] | None = None  # the latest step, its numbers on their way

    def train(self) -> Trained:
        """Returns the outcome of training to the end. Raises Diverged, or SystemExit after a signal, with a checkpoint written."""
        config, world, signals = self.run.config, self.run.world, self.run.signals
        finished, saved = self.resume(), True
        if not finished:
            warm_up(self.run, self.forward, self.state, self.schedule)
            self.reserve()
            signals.deferred = True
            try:
                finished = self.loop()
            except Diverged:
                self.keep_last_good_state()
                raise
            if finished:
                self.state.averages.apply()
            saved = self.save(finished=finished)
            signals.deferred = False
            if any(world.gather_objects(signals.received is not None)):
                number = signals.received or signal.SIGTERM
                self.run.log.note(f"stopped by {number.name} after step {self.step}; continue with: python train_gpt.py @{self.run.folder}/config.env RESUME=1")
                raise SystemExit(128 + number)
        tokens, began = self.state.loader.state["tokens"], self.clock.seconds()
        curvatures = self.calibrate()
        if curvatures:
            spent = self.clock.seconds() - began
            self.run.log.note(f"calibration on {config.calibration_tokens:,} training tokens: {spent:.1f} s ({self.reserve_seconds:.1f} reserved)")
        peak = f", peak memory {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB" if world.device.type == "cuda" else ""
        self.run.log.note(f"trained {self.step} steps in {self.clock.seconds():.1f} s{peak}; weights {'saved in checkpoint.pt' if saved else 'not saved'}")
        return Trained(self.step, self.skipped, self.clock.seconds(), tokens, self.validate(), curvatures)

    def reserve(self) -> None:
        """Measures what the statistics of the export take, so that training ends that much earlier."""
        config = self.run.config
        if not (config.max_wallclock_seconds and config.is_calibrated):
            return
        clock, before, self.clock = self.clock, dict(self.state.loader.state), Clock()
        self.calibrate()  # the first one pays for what only the first needs
        self.clock = Clock()
        self.calibrate()
        measured = self.run.world.from_main(1.1 * self.clock.seconds())
        self.clock, self.state.loader.state, self.reserve_seconds = clock, before, measured
        self.schedule = Schedule(replace(config, max_wallclock_seconds=max(config.max_wallclock_seconds - measured, 1e-3)))
        self.run.log.note(f"{measured:.1f} s of MAX_WALLCLOCK_SECONDS are reserved for calibration")

    def calibrate(self) -> Mapping[str, Curvature]:
        """Returns the curvature around the weights as they are, measured on the training clock; nothing where the export does not need it."""
        if not self.run.config.is_calibrated:
            return {}
        self.clock.start()
        measured = calibrate(self.state.model, self.phase, self.state.loader, self.run.world)
        synchronise(self.run.world)
        self.clock.pause()
        return measured

    def freeze_grids(self) -> None:
        """Sets the grids that training sees from now on, where steps come from statistics; part of training's time."""
        model, config = self.state.model, self.run.config
        parts = {name: part for name, part in weight_parts(model).items() if part.bits < 16}
        if config.quant_scheme not in FROZEN_SCHEMES or any(part.is_frozen() for part in parts.values()):
            return
        curvatures = calibrate(model, self.phase, self.state.loader, self.run.world)
        if config.quant_scheme == "adaptive":
            sigmas = adaptive_sigmas(parts, curvatures)
            for name, part in parts.items():
                part.freeze(sdclip_grid(part.weight, part.bits, sigmas[name]))
            self.run.world.copy_from_main(list(model.buffers()))
            return
        budget = self.run.world.from_main(config.bytes_cap - code_bytes(self.run.source) if self.run.world.is_main else 0)
        planned = plan_rate(model, curvatures, budget, NEAREST_EXTRA_BITS)
        for name, part in parts.items():
            part.freeze(planned.allocations[name].reaching(part.weight, planned.step).grid(planned.step))
        model.rate_step.fill_(planned.step)
        self.run.world.copy_from_main(list(model.buffers()))
        self.run.log.note(f"rate: training sees steps frozen at global step {planned.step:.4g}, for {budget:,} bytes")

    def loop(self) -> bool:
        """Runs steps until the end, or until a signal; returns whether it was the end."""
        config, world, state = self.run.config, self.run.world, self.state
        link = ControlLink(world, Control(self.clock.seconds(), stop=False))
        phase: Phase | None = None
        pace = Pace(self.step, self.clock.seconds())
        self.logged = self.moment()
        self.clock.start()
        while True:
            control = link.exchange(self.clock.seconds(), self.run.signals.received is not None)
            step_seconds = pace.update(self.step - 1, control.seconds)  # the clock that all ranks agree on is one step late
            late = 0 < config.max_wallclock_seconds < control.seconds + self.reserve_seconds + STEPS_IN_FLIGHT * step_seconds
            if control.stop or late or self.step == config.iterations:
                break
            knobs = self.schedule(self.schedule.progress(self.step, control.seconds, step_seconds))
            if knobs.phase != phase:
                phase = knobs.phase
                self.phase = replace(phase, qat=False)
                if phase.qat:
                    self.freeze_grids()
                self.run.log.event("phase", step=self.step, **asdict(phase))
            stats = training_step(self.forward, state.optimizer, state.loader, knobs)
            self.step += 1
            state.averages.update(self.step, knobs.lr_scale)
            self.report()
            self.in_flight = (self.moment(), HostCopy(stats), knobs)
            checkpoint_due = config.checkpoint_every and self.step % config.checkpoint_every == 0
            validation_due = config.val_loss_every and self.step % config.val_loss_every == 0 and self.step < config.iterations
            if world.device.type != "cuda" or checkpoint_due or validation_due:
                self.report()  # only a GPU has reason to work on while the host reads
            if checkpoint_due:
                self.save(finished=False)
            if validation_due:
                self.validate()
        self.report()
        synchronise(world)
        self.clock.pause()
        if late and self.step < config.iterations:
            self.run.log.note(f"stopping_early: wallclock_cap after step {self.step} of {config.iterations}")
        return late or self.step == config.iterations

    def save(self, *, finished: bool) -> bool:
        """Writes `checkpoint.pt` into the run folder, atomically, and keeps the one before; returns whether it could. Every rank must call it.

        Where it cannot be written, the log says so and the run goes on: what it has learnt is still in memory.
        """
        seconds, state = self.clock.seconds(), self.state.save()
        if not self.run.world.is_main:
            return True
        counts = {"step": self.step, "skipped": self.skipped, "seconds": seconds, "finished": finished}
        content = {"version": CHECKPOINT_VERSION, "settings": asdict(self.run.config), **counts, "state": state}
        newest, before = (self.run.folder / name for name in CHECKPOINT_FILES)
        try:
            with atomic_file(newest, keep=before) as file:
                torch.save({**content, "digest": content_digest(content)}, file)
        except (OSError, RuntimeError) as problem:  # torch.save raises RuntimeError on a full disk
            self.run.log.note(f"step {self.step}: {newest} cannot be written ({str(problem).splitlines()[0]}); the run goes on without it")
            return False
        return True

    def moment(self) -> Moment:
        """Returns how far the run has come."""
        return Moment(self.step, self.clock.seconds(), self.state.loader.state["tokens"])

    def report(self) -> None:
        """Reads the numbers of the step in flight, if any, and logs them when their turn has come. Raises Diverged when they are not finite."""
        if self.in_flight is None:
            return
        (now, numbers, knobs), self.in_flight = self.in_flight, None
        step, seconds, _ = now
        loss, grad_norm = numbers.read()
        config = self.run.config
        self.skipped_running = 0 if math.isfinite(loss) and math.isfinite(grad_norm) else self.skipped_running + 1
        if self.skipped_running:
            self.skipped += 1
            problem = f"step {step}: loss {loss}, gradient norm {grad_norm}; that step was not applied"
            if self.skipped_running > config.max_skipped_steps:
                before = f", nor were the {self.skipped_running - 1} before it" if self.skipped_running > 1 else ""
                raise Diverged(f"{problem}{before}. Try a lower learning rate or GRAD_CLIP_NORM=1")
            self.run.log.note(problem)
            return
        steps, elapsed = step - self.logged.step, seconds - self.logged.seconds
        remaining = (config.iterations - step) * seconds / step
        if config.max_wallclock_seconds:
            remaining = min(remaining, max(config.max_wallclock_seconds - self.reserve_seconds - seconds, 0.0))
        event = {
            "step": step, "steps": config.iterations, "train_loss": loss, "grad_norm": grad_norm, "lr_scale": knobs.lr_scale,
            "step_ms": 1000 * elapsed / max(steps, 1), "tokens_per_second": (now.tokens - self.logged.tokens) / max(elapsed, 1e-9),
            "train_seconds": seconds, "remaining_seconds": remaining,
        }
        if step % config.train_log_every == 0 or step in (1, config.iterations):
            self.run.log.event("step", **event)
            self.logged = now
        else:
            self.run.log.progress(step_line(event))

    def validate(self) -> Score:
        """Returns the score of the weights, averaged if they are to be, with the layers of the latest step; the clock does not count it."""
        synchronise(self.run.world)
        running = self.clock.started is not None
        if running:
            self.clock.pause()
        with self.state.averages.applied():
            score = self.score_now(self.forward, self.phase)
        self.run.log.event("val", step=self.step, train_seconds=self.clock.seconds(), **score._asdict())
        if running:
            self.clock.start()
        return score

    def resume(self) -> bool:
        """Continues from the run's checkpoint when RESUME asks for it; returns whether training was already finished."""
        if not self.run.config.resume:
            return False
        found = newest_checkpoint(self.run.folder)
        if found is None:
            self.run.log.note("no checkpoint yet: training starts from step 0")
            return False
        path, saved, problems = found
        check_same_settings(saved["settings"], self.run.config)
        self.run.world.gather_objects(path.name)  # every rank has read it
        if self.run.world.is_main:
            write_config(self.run.folder, self.run.config)
            if problems:  # or the next checkpoint would push the damaged one over the one that is whole
                os.replace(self.run.folder / CHECKPOINT_FILES[0], self.run.folder / "checkpoint_damaged.pt")
        self.state.load(saved["state"])
        self.step, self.skipped, self.clock = saved["step"], saved["skipped"], Clock(saved["seconds"])
        damage = "".join(f"; not from {problem}" for problem in problems)
        self.run.log.note(f"resumed from {path.name} after step {self.step}, {saved['seconds']:.1f} s into training{damage}")
        return bool(saved["finished"])

    def keep_last_good_state(self) -> None:
        """After a divergence: keeps the checkpoint on disk; without one, saves the weights if they are finite."""
        path = self.run.folder / CHECKPOINT_FILES[0]
        finite = all(bool(parameter.isfinite().all()) for parameter in self.state.model.parameters())
        if self.run.world.from_main(not path.exists()) and finite:
            self.save(finished=False)
        self.run.log.note(f"last good state: {path if path.exists() else 'none (the weights are not finite)'}")


# ------------------------------------------------------------------------------------------------------------------------------------
# Artifact
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns the file that is scored, its coders, its reader, the size of the packed script, and the byte budget. Layout: magic, version, header length,
# header (JSON: model settings, scheme, coder, global step, per role its bits and coded bytes), coded roles, digest of all before. Nothing in it
# is executed.

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLF", 3
# A file that claims more weights than this, in all or per coded byte, is refused before anything is unpacked.
MAX_HEADER_BYTES, MAX_WEIGHTS, MAX_WEIGHTS_PER_BYTE = 1 << 16, 1 << 28, 512


class Stored(NamedTuple):
    """A weight as the artifact holds it."""

    codes: np.ndarray  # (rows, columns) int16
    grid: Grid
    bits: int  # 0 = `rate`
    states: int = 1  # of the trellis that chose the codes
    exponents: tuple[np.ndarray, ...] = ()  # of row and column steps, with `rate`
    factors: Factors | None = None

    def weight(self) -> Tensor:
        """Returns the float32 weight."""
        points = self.grid.dequantise(torch.from_numpy(self.codes.astype(np.float32)))
        return points if self.factors is None else points + self.factors.product()


def compress(data: bytes, coder: str) -> bytes:
    """Returns `data` coded by a byte coder at its highest level."""
    if coder == "brotli":
        return bytes(brotli.compress(data, quality=11, lgwin=24))
    return zlib.compress(data, 9) if coder == "zlib" else zstandard.ZstdCompressor(level=22).compress(data)


def decompress(data: bytes, coder: str, size: int) -> bytes:
    """Returns the `size` bytes that `compress` was given, never allocating much more. Raises ValueError when `data` does not hold exactly that."""
    try:
        if coder == "zlib":
            stream = zlib.decompressobj()
            raw = stream.decompress(data, size + 1)
            whole = stream.eof and not stream.unused_data
        elif coder == "brotli":
            unpacker = brotli.Decompressor()
            raw = unpacker.process(data, output_buffer_limit=size + 1)
            whole = unpacker.is_finished()
        else:
            whole = zstandard.frame_content_size(data) == size
            raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False) if whole else b""
    except (zlib.error, zstandard.ZstdError, brotli.error) as error:
        raise ValueError(f"its {coder} data is damaged ({error})") from None
    if not whole or len(raw) != size:
        raise ValueError(f"its {coder} data does not hold the {size:,} bytes that its settings ask for")
    return raw


# -- The entropy coder: a range coder that takes every code for a rounded Gaussian whose scale is that of its row times that of its column.

SCALE_EXPONENTS = (-10, 44)  # scales are 2^(k / 4) steps, within these
SIDE_LIMIT = 1023  # of the exponents that travel with a matrix


def code_scales(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns the scale of every code, in steps: float64 (rows, columns)."""
    return quarter_powers((rows.astype(np.int64)[:, None] + columns).clip(*SCALE_EXPONENTS))


def fit_scales(codes: np.ndarray, spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the exponents of rows and columns at which `codes` take few bits: from their sizes, then each side in turn moved where that helps."""
    low, high = SCALE_EXPONENTS
    sizes = np.abs(codes.astype(np.int64))
    edges = torch.arange(int(sizes.max(initial=0)) + 1, dtype=torch.float64) / spacing
    scales = torch.from_numpy(quarter_powers(np.arange(low, high + 1)))[:, None]
    shares = torch.special.ndtr((0.5 - edges) / scales) - torch.special.ndtr((-0.5 - edges) / scales)
    bits = -shares.clamp_min(2.0**-24).log2().float().numpy()
    squares = (sizes / spacing) ** 2.0
    mean = squares.mean() + 1e-3
    sides = [np.round(2 * np.log2(squares.mean(axis=1) + 1e-3)).astype(np.int64), np.round(2 * np.log2((squares.mean(axis=0) + 1e-3) / mean)).astype(np.int64)]
    for axis in (0, 1, 0, 1):
        lengths = []
        for change in (-1, 0, 1):
            moved = [side + change * (number == axis) for number, side in enumerate(sides)]
            classes = (moved[0][:, None] + moved[1]).clip(low, high) - low
            lengths.append(bits[classes, sizes].sum(axis=1 - axis))
        sides[axis] = sides[axis] + np.argmin(lengths, axis=0) - 1
    return sides[0].clip(-SIDE_LIMIT, SIDE_LIMIT), sides[1].clip(-SIDE_LIMIT, SIDE_LIMIT)


def encode_matrix(codes: np.ndarray, spacing: int, states: int, exponents: Sequence[np.ndarray] = ()) -> bytes:
    """Returns the coded matrix, preceded by vectors of `exponents` if it has any. At spacing 2 what is coded is floor(n / 2); the trellis knows the rest."""
    symbols = (codes // spacing).astype(np.int32)
    bound = int(np.abs(symbols).max(initial=0)) + 1
    rows, columns = fit_scales(codes, spacing)
    coder = constriction.stream.queue.RangeEncoder()
    head = struct.pack("<BH", states, bound)
    for side in (*exponents, rows, columns):
        mean, spread = round(float(side.mean())), round(4 * math.log2(float(side.std()) + 0.2))
        head += struct.pack("<hb", mean, spread)
        coder.encode(side.astype(np.int32), side_model(mean, spread))
    scales = code_scales(rows, columns)
    means = (codes % 2) / -2.0 if spacing == 2 else np.zeros(codes.shape)
    coder.encode(symbols.ravel(), constriction.stream.model.QuantizedGaussian(-bound, bound), means.ravel(), scales.ravel())
    return head + coder.get_compressed().astype("<u4").tobytes()


def side_model(mean: int, spread: int) -> Any:
    """Returns the model of a vector of exponents with this mean and spread."""
    return constriction.stream.model.QuantizedGaussian(-SIDE_LIMIT, SIDE_LIMIT, float(mean), float(quarter_powers(np.array(spread))))


def decode_matrix(data: bytes, shape: tuple[int, int], spacing: int, vectors: Sequence[int] = ()) -> tuple[np.ndarray, int, list[np.ndarray]]:
    """Returns (codes, states, exponents) of `encode_matrix`; `vectors` are the lengths of the exponents. Raises ValueError when `data` is damaged."""
    lengths = (*vectors, *shape)
    size = 3 + 3 * len(lengths)
    if len(data) < size or len(data) % 4 != size % 4:
        raise ValueError("a coded matrix is truncated")
    states, bound = struct.unpack_from("<BH", data)
    if states not in NEXT_STATE or not 0 < bound <= RATE_LIMIT or (states > 1 and spacing == 1):
        raise ValueError(f"a coded matrix has {states} states and codes up to {bound}")
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, dtype="<u4", offset=size).astype(np.uint32))
    try:
        sides = []
        for number, length in enumerate(lengths):
            mean, spread = struct.unpack_from("<hb", data, 3 + 3 * number)
            sides.append(coder.decode(side_model(max(min(mean, SIDE_LIMIT), -SIDE_LIMIT), max(min(spread, 40), -40)), length))
        *exponents, rows, columns = sides
        family, next_state = constriction.stream.model.QuantizedGaussian(-bound, bound), np.array(NEXT_STATE[states])
        codes, state = np.empty(shape, np.int16), np.zeros(shape[1], np.int64)
        for row in range(shape[0]):
            odd = state & 1
            symbols = coder.decode(family, odd / -2.0, code_scales(rows[row : row + 1], columns)[0])
            codes[row] = spacing * symbols + odd
            state = next_state[state, (codes[row] >> 1) & 1]
    except (AssertionError, ValueError) as error:
        raise ValueError(f"a coded matrix is damaged ({error})") from None
    return codes, states, exponents


# -- Roles: everything of one role, one after another.


def parameters_by_role(model: GPT) -> dict[Role, dict[str, nn.Parameter]]:
    """Returns the model's parameters, grouped by role in a fixed order."""
    roles = parameter_roles(model)
    groups = {role: {name: parameter for name, parameter in model.named_parameters() if roles[name] == role} for role in Role}
    return {role: parameters for role, parameters in groups.items() if parameters}


def bfloat16_bits(values: Tensor) -> np.ndarray:
    """Returns the upper halves of float32 values that bfloat16 holds, as little-endian 16-bit integers."""
    return values.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2")


def shuffle_bytes(data: bytes) -> bytes:
    """Returns two-byte numbers as all their low bytes, then all their high ones."""
    return np.frombuffer(data, dtype=np.uint8).reshape(-1, 2).T.tobytes()


def similar_rows(codes: np.ndarray) -> np.ndarray:
    """Returns an order of rows in which each is followed by the nearest (in L1) of those that are left."""
    left, order = np.arange(1, len(codes)), [0]
    while len(left):
        nearest = int(np.abs(codes[left].astype(np.int32) - codes[order[-1]]).sum(axis=1).argmin())
        order.append(int(left[nearest]))
        left = np.delete(left, nearest)
    return np.array(order)


class Layout(NamedTuple):
    """How byte coders lay out a role."""

    coder: str
    code_order: str
    byte_shuffle: bool


def encode_role(entries: Sequence[Stored | Tensor], layout: Layout) -> bytes:
    """Returns a role's coded bytes: numbers of two bytes (float16 values, bfloat16 steps, orders of rows), then the codes of every matrix."""
    plain, codes, matrices = b"", b"", b""
    for entry in entries:
        if isinstance(entry, Tensor):
            plain += entry.to(torch.float16).cpu().numpy().astype("<f2").tobytes()
            continue
        if entry.bits:
            plain += bfloat16_bits(entry.grid.row_step).tobytes()
        if layout.coder == "range":
            coded = encode_matrix(entry.codes, entry.grid.spacing, entry.states, entry.exponents)
            matrices += struct.pack("<I", len(coded)) + coded
            continue
        kept = entry.codes.astype(np.int8)
        if layout.code_order == "sorted":
            order = similar_rows(kept)
            plain, kept = plain + order.astype("<u2").tobytes(), kept[order]
        codes += (kept if layout.code_order == "rows" else kept.T).tobytes()
    plain = shuffle_bytes(plain) if layout.byte_shuffle else plain
    if layout.coder == "range":
        squeezed = compress(plain, "zstd")
        return struct.pack("<I", len(squeezed)) + squeezed + matrices
    return compress(plain + codes, layout.coder)


def decode_role(data: bytes, shapes: Sequence[torch.Size], bits: Sequence[int], layout: Layout, step: float) -> list[Stored | Tensor]:
    """Returns what `encode_role` was given, of these shapes and bits. Raises ValueError when `data` does not hold exactly that."""
    sorted_rows = layout.coder != "range" and layout.code_order == "sorted"
    shorts = [shape.numel() if width == 16 else shape[0] * ((width > 0) + sorted_rows) for shape, width in zip(shapes, bits, strict=True)]
    coded = 0 if layout.coder == "range" else sum(shape.numel() for shape, width in zip(shapes, bits, strict=True) if width < 16)
    matrices = b""
    if layout.coder == "range":
        squeezed, matrices = take_block(data)
        raw = decompress(squeezed, "zstd", 2 * sum(shorts))
    else:
        raw = decompress(data, layout.coder, 2 * sum(shorts) + coded)
    plain, codes = raw[: 2 * sum(shorts)], np.frombuffer(raw, dtype=np.int8, offset=2 * sum(shorts))
    if layout.byte_shuffle:
        plain = np.frombuffer(plain, dtype=np.uint8).reshape(2, -1).T.tobytes()
    values = np.frombuffer(plain, dtype="<u2")
    entries: list[Stored | Tensor] = []
    for shape, width, short in zip(shapes, bits, shorts, strict=True):
        mine, values = values[:short], values[short:]
        if width == 16:
            entries.append(torch.from_numpy(mine.view("<f2").astype(np.float32)).view(shape))
            continue
        rows, columns = shape
        spacing = 1 if width else 2
        states, exponents = 1, list[np.ndarray]()
        if layout.coder == "range":
            block, matrices = take_block(matrices)
            matrix, states, exponents = decode_matrix(block, (rows, columns), spacing, () if width else (rows, columns))
        else:
            matrix, codes = codes[: rows * columns], codes[rows * columns :]
            matrix = (matrix.reshape(rows, columns) if layout.code_order == "rows" else matrix.reshape(columns, rows).T).astype(np.int16)
            if sorted_rows:
                order = mine[-rows:]
                if not np.array_equal(np.sort(order), np.arange(rows)):
                    raise ValueError("an order of rows is not one")
                matrix = matrix[np.argsort(order)]
        if width:
            steps = torch.from_numpy((mine[:rows].astype(np.uint32) << 16).view(np.float32).copy())
            grid = Grid(steps[:, None], torch.ones(1, 1), 2 ** (width - 1) - 1)
        else:
            grid = rate_grid(step, *exponents)
        entries.append(Stored(matrix, grid, width, states, tuple(exponents)))
    if matrices:
        raise ValueError(f"{len(matrices)} bytes after the last matrix")
    return entries


def take_block(data: bytes) -> tuple[bytes, bytes]:
    """Returns the block at the start of `data`, which its length precedes, and what follows it."""
    length = struct.unpack_from("<I", data)[0] if len(data) >= 4 else -1
    if not 0 <= length <= len(data) - 4:
        raise ValueError("a block is truncated")
    return data[4 : 4 + length], data[4 + length :]


def encode_factors(factors: Sequence[Factors]) -> bytes:
    """Returns the raw bytes of corrections: all steps (bfloat16), then all codes (int8)."""
    steps = [bfloat16_bits(step) for entry in factors for step in (entry.left_step, entry.right_step)]
    codes = [code.to(torch.int8).numpy() for entry in factors for code in (entry.left, entry.right)]
    return b"".join(array.tobytes() for array in steps + codes)


def decode_factors(raw: bytes, shapes: Sequence[torch.Size], rank: int, group: int) -> list[Factors]:
    """Returns the corrections of rank `rank` to weights of these shapes, from the raw bytes of `encode_factors`."""
    step_shapes = [piece for _, columns in shapes for piece in ((1, rank), (rank, -(-columns // group)))]
    code_shapes = [side for rows, columns in shapes for side in ((rows, rank), (rank, columns))]
    count = sum(rows * columns for rows, columns in step_shapes)
    patterns = np.frombuffer(raw, dtype="<u2", count=count).astype(np.uint32) << 16
    steps = cut(torch.from_numpy(patterns.view(np.float32)), step_shapes)
    codes = cut(torch.from_numpy(np.frombuffer(raw, dtype=np.int8, offset=2 * count).astype(np.float32)), code_shapes)
    return [Factors(codes[k], steps[k], codes[k + 1], steps[k + 1], group) for k in range(0, len(codes), 2)]


def cut(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Returns the matrices of these shapes that lie one after another in `flat`."""
    return [piece.view(shape) for piece, shape in zip(flat.split([rows * columns for rows, columns in shapes]), shapes, strict=True)]


def factor_bytes(shapes: Sequence[torch.Size], rank: int, group: int) -> int:
    """Returns the length of `encode_factors` for weights of these shapes."""
    return sum(2 * rank * (1 + -(-columns // group)) + rank * (rows + columns) for rows, columns in shapes)


class Packed(NamedTuple):
    """An artifact that is ready to be written."""

    data: bytes
    table: list[dict[str, Any]]  # bytes by role


def pack(model: GPT, stored: Mapping[str, Stored], step: float) -> Packed:
    """Returns the artifact that holds `stored` weights and every other parameter as float16. Raises ValueError when one cannot be stored."""
    config = model.config
    layout = Layout(config.coder, config.code_order, config.byte_shuffle)
    blobs, table, roles = [], [], {}
    for role, parameters in parameters_by_role(model).items():
        if not all(bool((parameter.detach().abs() < 65504).all()) for parameter in parameters.values()):
            raise ValueError(f"weights of role {role.value} are not finite or too large for float16; training diverged")
        entries = [stored.get(name, parameter.detach()) for name, parameter in parameters.items()]
        blobs.append(encode_role(entries, layout))
        count = sum(parameter.numel() for parameter in parameters.values())
        table.append({"role": role.value, "params": count, "bytes": len(blobs[-1]), "bits_per_weight": 8 * len(blobs[-1]) / count})
        roles[role.value] = {"bits": [entry.bits if isinstance(entry, Stored) else 16 for entry in entries], "bytes": len(blobs[-1])}
    corrected = {name: entry.factors for name, entry in stored.items() if entry.factors is not None}
    lqer = {"names": list(corrected), "rank": 0, "group": 1, "bytes": 0}
    if corrected:
        first = next(iter(corrected.values()))
        blobs.append(compress(encode_factors(list(corrected.values())), "zstd"))
        lqer.update(rank=first.left.shape[1], group=first.group, bytes=len(blobs[-1]))
        table.append({"role": "lqer", "params": 0, "bytes": len(blobs[-1]), "bits_per_weight": 0.0})
    header = {
        "settings": {name: getattr(config, name) for name in MODEL_SETTINGS},
        "scheme": config.quant_scheme, "layout": list(layout), "step": step, "roles": roles, "lqer": lqer,
    }  # fmt: skip
    coded_header = json.dumps(header, separators=(",", ":")).encode()
    body = ARTIFACT_MAGIC + struct.pack("<BI", ARTIFACT_VERSION, len(coded_header)) + coded_header + b"".join(blobs)
    table.append({"role": "header", "params": 0, "bytes": len(body) + DIGEST_BYTES - sum(map(len, blobs)), "bits_per_weight": 0.0})
    return Packed(body + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest(), table)


def artifact_header(data: bytes, source: str) -> tuple[dict[str, Any], int]:
    """Returns the header of an artifact and where its coded roles begin. Raises ValueError when `data` is foreign, altered or truncated."""
    fixed = len(ARTIFACT_MAGIC) + 5
    if data[: len(ARTIFACT_MAGIC)] != ARTIFACT_MAGIC or len(data) < fixed + DIGEST_BYTES:
        raise ValueError(f"{source}: not an artifact of this script")
    version, length = struct.unpack_from("<BI", data, len(ARTIFACT_MAGIC))
    if version != ARTIFACT_VERSION:
        raise ValueError(f"{source}: artifact version {version}, but this script reads version {ARTIFACT_VERSION}")
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if length > MAX_HEADER_BYTES or hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest() != digest:
        raise ValueError(f"{source}: altered or truncated: the digest at its end does not match; copy it again from its run folder")
    try:
        header = json.loads(body[fixed : fixed + length])
        if set(header["settings"]) != set(MODEL_SETTINGS) or set(header) != {"settings", "scheme", "layout", "step", "roles", "lqer"}:
            raise ValueError("its entries are not those that this version writes")
        coder, code_order, byte_shuffle = header["layout"]
        chosen = {"QUANT_SCHEME": header["scheme"], "CODER": coder, "CODE_ORDER": code_order, "BYTE_SHUFFLE": format_value(byte_shuffle)}
        for name, value in chosen.items():
            parse_value(name, value)
        if not (isinstance(header["step"], float) and 0 <= header["step"] < 2**64):
            raise ValueError(f"step {header['step']!r} is not one")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source}: not a valid artifact: its header cannot be read ({error})") from None
    return header, fixed + length


def with_model_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Returns `config` with the model settings of an artifact or a checkpoint. Raises ConfigError when they are not possible ones."""
    values = {name: parse_value(name.upper(), format_value(settings[name])) for name in MODEL_SETTINGS}
    merged = replace(config, **values)
    problems = validate(merged)
    if problems:
        raise ConfigError("\n".join(problems))
    return merged


def read_artifact(data: bytes, config: Config, source: str, device: torch.device | str = "cpu", kernels: Kernels | None = None) -> GPT:
    """Returns the model that an artifact holds, on `device`. Raises ValueError on anything that is not a whole, unaltered artifact."""
    header, offset = artifact_header(data, source)
    try:
        config = with_model_settings(config, header["settings"])
        with torch.device("meta"):
            skeleton = GPT(config)
        groups, quantised = parameters_by_role(skeleton), weight_parts(skeleton)
        shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
        weights = sum(shape.numel() for shape in shapes.values())
        if weights > min(MAX_WEIGHTS, MAX_WEIGHTS_PER_BYTE * len(data)):
            raise ValueError(f"{len(data):,} bytes cannot hold the {weights:,} weights that its settings ask for")
        if set(header["roles"]) != {role.value for role in groups}:
            raise ValueError(f"it holds the roles {' '.join(header['roles'])}, and not those of its model")
        entries: dict[str, Tensor] = {}
        for role, parameters in groups.items():
            bits, coded = header["roles"][role.value]["bits"], take_count(header["roles"][role.value]["bytes"])
            allowed = [(0, *WIDTHS) if name in quantised else (16,) for name in parameters]
            if len(bits) != len(parameters) or not all(type(width) is int and width in known for width, known in zip(bits, allowed, strict=True)):
                raise ValueError(f"role {role.value} has bits {bits}")
            block, offset = data[offset : offset + coded], offset + coded
            read = decode_role(block, [shapes[name] for name in parameters], bits, Layout(*header["layout"]), header["step"])
            entries.update((name, entry.weight() if isinstance(entry, Stored) else entry) for name, entry in zip(parameters, read, strict=True))
        lqer = header["lqer"]
        if lqer["names"]:
            corrected = [shapes[name] for name in lqer["names"] if name in quantised]
            rank, group, coded = (take_count(lqer[key]) for key in ("rank", "group", "bytes"))
            if len(set(lqer["names"])) != len(corrected) or not 0 < rank <= min(min(shape) for shape in corrected) or not group:
                raise ValueError(f"its corrections are not possible ones: rank {rank}, groups of {group}, of {lqer['names']}")
            raw = decompress(data[offset : offset + coded], "zstd", factor_bytes(corrected, rank, group))
            for name, factors in zip(lqer["names"], decode_factors(raw, corrected, rank, group), strict=True):
                entries[name] += factors.product()
            offset += coded
        if offset != len(data) - DIGEST_BYTES:
            raise ValueError(f"it holds {len(data) - DIGEST_BYTES - offset} bytes that no role claims")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: not a valid artifact: {error}") from None
    model = GPT(config, compute_dtype(config, torch.device(device)), kernels).to(device)
    load_weights(model, entries)
    return model


def take_count(value: Any) -> int:
    """Returns `value`, a count in a header. Raises ValueError when it is not one."""
    if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError(f"{value!r} is not a count")
    return value


@cache
def pack_script(source: str) -> bytes:
    """Returns the script as it would be submitted: without comments and docstrings, compressed, and able to run itself.

    Every rank unpacks into a private folder of its own, so that ranks do not race and tools that read source files find one.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    # A string literal of Latin-1 holds any byte but these five: 3% longer than the bytes, where base 85 is 25%.
    escapes = {0: b"\\x00", 10: b"\\n", 13: b"\\r", 39: b"\\'", 92: b"\\\\"}
    compressed = lzma.compress(ast.unparse(tree).encode(), lzma.FORMAT_RAW, filters=filters)
    literal = b"".join(escapes.get(byte, bytes([byte])) for byte in compressed)
    head = "# coding: latin-1\nimport atexit,lzma,os,runpy,shutil,tempfile\ns=lzma.decompress('"
    tail = (
        f"'.encode('latin-1'),lzma.FORMAT_RAW,filters=[{{'id':{lzma.FILTER_LZMA2},'preset':9}}])\n"
        "d=tempfile.mkdtemp()\n"
        "atexit.register(shutil.rmtree,d,True)\n"
        "p=os.path.join(d,'train_gpt.py')\n"
        "with open(p,'wb') as f:f.write(s)\n"
        "runpy.run_path(p,{'PACKED_BYTES':os.path.getsize(__file__)},'__main__')\n"
    )
    return head.encode() + literal + tail.encode()


def code_bytes(source: str) -> int:
    """Returns the bytes of code that count against the cap: of the packed script; one that runs packed counts its own file."""
    return int(globals().get("PACKED_BYTES") or len(pack_script(source)))


# -- From trained weights to an artifact under the cap.


def share_work(world: World, costs: Mapping[str, int], work: Callable[[str], Any]) -> dict[str, Any]:
    """Returns name -> work(name), shared out over ranks by cost and over threads within each; the same on every rank. Every rank must call it."""
    names = sorted(costs)
    mine = [names[number] for number in world.share_of([costs[name] for name in names])]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world.local_size)) as pool:
        done = dict(zip(mine, pool.map(work, mine), strict=True))
    return {name: value for share in world.gather_objects(done) for name, value in share.items()}


def quantise(model: GPT, curvatures: Mapping[str, Curvature], world: World, scale: float = 1.0) -> dict[str, Stored]:
    """Returns every weight on the grid of QUANT_SCHEME, any but `rate`, its clip factors times `scale`. 16-bit weights are left out."""
    config, parts = model.config, {name: part for name, part in weight_parts(model).items() if part.bits < 16}
    sigmas = adaptive_sigmas(parts, curvatures) if config.quant_scheme == "adaptive" else {name: part.clip_sigmas for name, part in parts.items()}

    def work(name: str) -> tuple[Stored, float]:
        part = parts[name]
        weight, curvature = part.weight.detach(), curvatures.get(name)
        if config.quant_scheme in ("rowmax", "gptq_lite"):
            grid = part.grid()
            codes = grid.round(weight)
        else:
            grid = part.grid() if part.is_frozen() else sdclip_grid(weight, part.bits, sigmas[name])
            grid = row_grid(grid.row_step * (scale * grid.limit), part.bits)
            codes = assign_gptq(weight, grid, curvature.inputs if curvature else None, config.gptq_damping)
        missed = float((grid.dequantise(codes) - weight).square().sum())
        return Stored(codes.to(torch.int16).cpu().numpy(), Grid(grid.row_step.cpu(), grid.column_step.cpu(), grid.limit), part.bits), missed

    torch.linalg.cholesky(torch.eye(1, device=world.device))  # several threads at once must not be the first to need CUDA's solvers
    done = share_work(world, {name: part.weight.numel() for name, part in parts.items()}, work)
    stored = {name: done[name][0] for name in parts}
    if config.lqer_rank and config.quant_scheme in ("gptq_lite", "gptq", "adaptive"):
        worst = sorted(parts, key=lambda name: -done[name][1])[: config.lqer_top_k]
        rank = min(config.lqer_rank, *(min(parts[name].weight.shape) for name in worst))
        for name in worst:
            error = parts[name].weight.detach().cpu() - stored[name].weight()
            stored[name] = stored[name]._replace(factors=lqer_factors(error, rank, config))
    return stored


def quantise_rate(model: GPT, allocations: Mapping[str, Allocation], step: float, world: World) -> dict[str, Stored]:
    """Returns every weight on the grid of `rate` for a global step."""
    parts = weight_parts(model)
    trellis_kernel()  # one for all threads: each would compile its own

    def work(name: str) -> Stored:
        weight = parts[name].weight.detach()
        allocation = allocations[name].reaching(weight, step)
        grid = allocation.grid(step)
        return Stored(assign_two_sided(weight, grid, allocation, 8), grid, 0, 8, (allocation.row_exponents, allocation.column_exponents))

    return share_work(world, {name: part.weight.numel() * len(part.weight) for name, part in parts.items()}, work)


def pack_once(world: World, model: GPT, stored: Mapping[str, Stored], step: float = 0.0) -> Packed:
    """Returns the artifact that rank 0 packs, on every rank. Every rank must call it."""
    packed: Packed = world.from_main(pack(model, stored, step) if world.is_main else None)
    return packed


# Rate control aims at the first share of the byte budget and is content from the second on.
AIMED_SHARE, CONTENT_SHARE, MOST_PASSES = 0.9985, 0.9972, 6
HELD_OUT_TOKENS = 65536


def fit_of(budget: int, packed: Packed) -> tuple[bool, int]:
    """Returns how well an artifact fits `budget` bytes, the more the better: whether it does at all, then how near it comes."""
    return len(packed.data) <= budget, -abs(budget - len(packed.data))


def fill_budget(model: GPT, curvatures: Mapping[str, Curvature], budget: int, run: Run) -> Packed:
    """Returns the `rate` artifact that fills `budget` bytes, or the finest useful one. Every rank must call it.

    The global step is found on a forecast from the sizes of rows and columns, then corrected by what each pass really took. A model that was trained
    on frozen steps stays on them if it fits that way; otherwise their ratios stay.
    """
    if model.frozen_step and (nearest := fill_frozen(model, budget, run)) is not None:
        return nearest
    step, allocations, counts, finest = plan_rate(model, curvatures, int(AIMED_SHARE * budget))
    step = run.world.from_main(step)
    fit = partial(fit_of, budget)
    best: Packed | None = None
    for number in range(1, MOST_PASSES + 1):
        stored = quantise_rate(model, allocations, step, run.world)
        packed = pack_once(run.world, model, stored, step)
        size = len(packed.data)
        is_finest = step <= 1.001 * finest
        run.log.note(f"rate, pass {number}: global step {step:.4g}{', the finest of use' * is_finest}: {size:,} bytes, budget {budget:,}")
        best = packed if best is None else max(best, packed, key=fit)
        if size <= budget and (size >= CONTENT_SHARE * budget or is_finest):
            break
        step = run.world.from_main(max(find_step(counts, forecast_bits(counts, step) + 8 * (AIMED_SHARE * budget - size)), finest))
    assert best is not None
    if len(best.data) > budget:
        fitting = int(8 * budget / 1.5)
        run.log.note(f"{int(counts.sum()):,} weights do not fit {budget:,} bytes at any step; at 1.5 bits each {fitting:,} would: --plan says what to shrink")
    return best


def fill_frozen(model: GPT, budget: int, run: Run) -> Packed | None:
    """Returns the `rate` artifact on the very grid that training has seen, every weight at its nearest point, or None where that cannot fit `budget`.

    Feedback and the trellis would leave the points that the loss was trained for: at 2.3 bits per weight they cost 0.012 nats (n = 1). Where it is over
    budget, weights close to the middle between two points go to the smaller one; how close is the one number to find.
    """
    parts = weight_parts(model)

    def at(bias: float) -> Packed:
        stored = {}
        for name, part in parts.items():
            grid = part.grid()
            codes = grid.round_towards_zero(part.weight.detach(), bias).to(torch.int16).cpu().numpy()
            cpu_grid = grid._replace(row_step=grid.row_step.cpu(), column_step=grid.column_step.cpu())
            stored[name] = Stored(codes, cpu_grid, 0, 1, frozen_exponents(part, model.frozen_step))
        packed = pack_once(run.world, model, stored, model.frozen_step)
        run.log.note(f"rate: steps as trained, {bias:.3f} of a step towards zero: {len(packed.data):,} bytes, budget {budget:,}")
        return packed

    packed = at(0.0)
    if len(packed.data) <= budget:
        return packed
    over, (fits, best) = (0.0, len(packed.data)), (0.1, at(0.1))
    if len(best.data) > budget:
        return None
    for _ in range(MOST_PASSES):
        if len(best.data) >= CONTENT_SHARE * budget:
            break
        bias = over[0] + (fits - over[0]) * (over[1] - AIMED_SHARE * budget) / (over[1] - len(best.data))
        packed = at(bias)
        if len(packed.data) <= budget:
            fits, best = bias, packed
        else:
            over = (bias, len(packed.data))
    return best


def fit_clip(model: GPT, curvatures: Mapping[str, Curvature], budget: int, run: Run) -> Packed:
    """Returns the artifact of `gptq` or `adaptive`, all clip factors scaled by the least factor (1 or more, to 1%) at which it fits `budget` bytes."""
    weights = sum(part.weight.numel() for part in weight_parts(model).values())

    def at(scale: float) -> Packed:
        stored = quantise(model, curvatures, run.world, scale)
        packed = pack_once(run.world, model, stored)
        if scale > 1 or len(packed.data) > budget:
            run.log.note(f"{model.config.quant_scheme}: clip factors times {scale:.4f}: {len(packed.data):,} bytes, budget {budget:,}")
        return packed

    scale, fit = 1.0, partial(fit_of, budget)
    packed = best = at(scale)
    for _ in range(2 * MOST_PASSES):
        if len(packed.data) <= budget and (scale == 1 or len(packed.data) >= 0.99 * budget):
            break
        scale = max(scale * 2 ** (8 * (len(packed.data) - 0.996 * budget) / weights), 1.0)
        packed = at(scale)
        best = max(best, packed, key=fit)
    return best


class Prediction(NamedTuple):
    """What a configuration will take of the cap."""

    table: list[dict[str, Any]]  # by role
    bytes_total: int
    clip_scale: float  # of the clip factors, at which `gptq` and `adaptive` fit


def predict_bytes(model: GPT, code: int) -> Prediction:
    """Returns the predicted bytes of the artifact and of the script, which has `code` of them."""
    config, parts = model.config, weight_parts(model)
    weights = sum(part.weight.numel() for part in parts.values())
    # `rate` takes what the cap leaves, down to steps too fine to matter.
    rate_bits = (8 * AIMED_SHARE * (config.bytes_cap - code) - overhead_bits(model)) / weights
    rate_bits = max(min(rate_bits, FINEST_BITS), 0.0)

    def bits(name: str, parameter: nn.Parameter, clip_scale: float) -> float:
        if name not in parts:
            return 16.0 * parameter.numel()
        part, (rows, columns) = parts[name], parameter.shape
        if config.quant_scheme == "rate":
            return parameter.numel() * rate_bits + 7 * (rows + columns)
        return parameter.numel() * predicted_bits_per_weight(config.quant_scheme, part.bits, columns, clip_scale * part.clip_sigmas)

    clip_scale = 1.0
    while True:
        table = []
        for role, parameters in parameters_by_role(model).items():
            count = sum(parameter.numel() for parameter in parameters.values())
            total = sum(bits(name, parameter, clip_scale) for name, parameter in parameters.items())
            table.append({"role": role.value, "params": count, "bits": round(total / count, 2), "predicted_bytes": round(total / 8)})
        bytes_total = sum(int(row["predicted_bytes"]) for row in table) + code
        excess = bytes_total - config.bytes_cap
        if excess <= 0 or config.quant_scheme not in ("gptq", "adaptive") or clip_scale > 100:
            return Prediction(table, bytes_total, clip_scale)
        clip_scale *= 2 ** (8 * (excess + 0.001 * config.bytes_cap) / weights)


def divergence(model: GPT, other: GPT, rows: Tensor, world: World) -> tuple[float, float]:
    """Returns (KL divergence from `model` to `other`, how much higher the loss of `other` is), nats per token, on rows (B, T + 1) over all ranks."""
    phase = replace(Schedule(model.config).scored_phase, seq_len=rows.shape[1] - 1)
    totals = torch.zeros(3, dtype=torch.float64)
    with torch.inference_mode():
        for part in rows.split(max(model.config.micro_batch_tokens // (4 * phase.seq_len), 1)):
            mine, theirs = (F.log_softmax(network.logits(part[:, :-1], phase), dim=-1) for network in (model, other))
            gap = mine - theirs
            kl, change = (mine.exp() * gap).sum(dtype=torch.float64), gap.gather(2, part[:, 1:, None]).sum(dtype=torch.float64)
            totals += torch.tensor([float(kl), float(change), float(part[:, 1:].numel())], dtype=torch.float64)
    total_kl, total_change, count = np.sum(world.gather_objects(totals.tolist()), axis=0).tolist()
    return total_kl / count, total_change / count


def export(run: Run, model: GPT, loader: TrainLoader | None, curvatures: Mapping[str, Curvature]) -> dict[str, Any]:
    """Writes `artifact.bin` and returns the `export` event (bytes in total and by role, what quantisation cost). Every rank must call it.

    `rate` is measured on training text that no step has seen against `gptq` at the same bytes, and the better of the two is written.
    """
    config, world, began = model.config, run.world, time.perf_counter()
    code = world.from_main(code_bytes(run.source) if world.is_main else 0)
    budget = max(config.bytes_cap - code, 1)
    rows = None
    if loader is not None:
        count = -(-HELD_OUT_TOKENS // (config.train_seq_len * world.size)) * world.size
        rows = to_device(loader.next_rows(count, config.train_seq_len, world), world.device)

    def cost(packed: Packed) -> dict[str, float]:
        if rows is None:
            return {}
        stored = read_artifact(packed.data, config, "the artifact", world.device, model.kernels)
        kl, change = divergence(model, stored, rows, world)
        return {"kl": kl, "loss_change": change}

    scheme = config.quant_scheme
    if scheme == "rate":
        packed = fill_budget(model, curvatures, budget, run)
    elif scheme in ("gptq", "adaptive"):
        packed = fit_clip(model, curvatures, budget, run)
    else:
        packed = pack_once(world, model, quantise(model, curvatures, world))
    costs = cost(packed)
    if scheme == "rate":
        plain = GPT(replace(config, quant_scheme="gptq", qat_start_frac=1.0), model.dtype, model.kernels).to(world.device)
        load_weights(plain, dict(model.named_parameters()))
        fallback = fit_clip(plain, curvatures, len(packed.data), run)
        plain_costs = cost(fallback)
        run.log.note(
            f"on held-out training text rate costs {costs['loss_change']:+.5f} nats (KL {costs['kl']:.5f}), "
            f"gptq in {len(fallback.data):,} bytes {plain_costs['loss_change']:+.5f} (KL {plain_costs['kl']:.5f})"
        )
        measure = "loss_change" if model.frozen_step else "kl"  # weights that were trained on a grid are not what their points should imitate
        if plain_costs[measure] < costs[measure] and len(fallback.data) <= len(packed.data):
            run.log.note("rate lost to gptq on this model, so the artifact is gptq's; please report it")
            packed, costs, scheme = fallback, plain_costs, "gptq"
    if world.is_main:
        atomic_write(run.folder / "artifact.bin", packed.data)
    total, predicted = len(packed.data) + code, predict_bytes(model, code).bytes_total
    run.log.note(f"--plan predicted {predicted:,} bytes, {abs(predicted / total - 1):.2%} too {'many' if predicted > total else 'few'}")
    event = {
        "bytes_model": len(packed.data), "bytes_code": code, "bytes_total": total, "bytes_cap": config.bytes_cap, "bytes_predicted": predicted, **costs,
        "artifact_sha256": hashlib.sha256(packed.data).hexdigest(), "scheme": scheme, "coder": config.coder, "roles": packed.table,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    run.log.event("export", **event)
    return event


# ------------------------------------------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns the score. An evaluation is a list of stretches: each is scored, then perhaps learnt from, before the next. Every score goes
# through the `Ledger`, which refuses a second score of a target and learning from a target without one. Input i of the split predicts
# target i + 1; a document's inputs begin with its BOS, and the BOS after it is its last target.


class Violation(ValueError):
    """An evaluation broke a rule of the challenge."""


class Ledger:
    """What the model says of the targets of one evaluation, in text order, and the two rules about writing it. Without a tilt these are the scores."""

    def __init__(self, targets: int, *, has_hints: bool = False) -> None:
        self.nats, self.hint_nats = np.zeros(targets, dtype=np.float32), np.zeros(targets if has_hints else 0, dtype=np.float32)
        self.written = np.zeros(targets, dtype=bool)  # by this rank

    def write(self, first: int, nats: np.ndarray, hint_nats: np.ndarray | None = None) -> None:
        """Keeps the nats of the targets of inputs `first`, `first` + 1, ... and of their hints. Raises Violation when one of them has a score already."""
        span = slice(first, first + len(nats))
        if self.written[span].any():
            raise Violation(f"targets of inputs {first} to {first + len(nats)} would be scored twice; a target is scored once, in one pass")
        self.nats[span], self.written[span] = nats, True
        if hint_nats is not None:
            self.hint_nats[span] = hint_nats

    def allow_learning(self, first: int, end: int) -> None:
        """Raises Violation unless this rank has scored the targets of all inputs in [first, end)."""
        if not self.written[first:end].all():
            raise Violation(f"learning from inputs {first} to {end} before all of their targets are scored")

    def settle(self, first: int, end: int, world: World) -> None:
        """Brings the scores in [first, end) to every rank, once. Raises Violation unless exactly one rank has each. Every rank must call it."""
        span = slice(first, end)
        counts = world.sum_(torch.from_numpy(self.written[span].astype(np.int32)).to(world.device))
        for nats in (self.nats[span], self.hint_nats[span]):
            if len(nats):
                nats[:] = world.sum_(torch.from_numpy(nats * self.written[span]).to(world.device)).cpu().numpy()
        if not bool((counts == 1).all()):
            wrong = int((counts != 1).sum())
            raise Violation(f"{wrong:,} targets of inputs {first} to {end} are not scored exactly once")
        self.written[span] = True


def document_starts(tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Returns the inputs at which a document starts, the first input among them."""
    starts = np.flatnonzero(tokens[:-1] == bos_id)
    return starts if len(starts) and starts[0] == 0 else np.concatenate([[0], starts])


def plan_windows(first: int, end: int, window: int, stride: int, starts: np.ndarray) -> np.ndarray:
    """Returns one row (first input read, first scored, end) per window: (W, 3) int64; the scored spans cover [first, end) once, in order.

    Every input has its whole document before it, or at least window - stride inputs. A window starts with the document of its first scored
    input if that is near enough, and then scores all that it holds: within a document's first `window` inputs one forward serves every target,
    and that is exact. `starts` are the inputs at which a document starts (0 alone: no documents). Source of stride scoring: the record of 2026-03-19.
    """
    rows, position = [], first
    while position < end:
        document = int(starts[np.searchsorted(starts, position, side="right") - 1])
        start = max(document, position + stride - window)
        stop = min(start + window, end)
        rows.append((start, position, stop))
        position = stop
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


class Stretch(NamedTuple):
    """A stretch of text that is scored before anything later is, and what is learnt from it afterwards."""

    first: int  # of its inputs
    end: int
    lr_scales: tuple[float, ...] = ()  # of global SGD on its chunks, one after another; none = nothing is learnt


def plan_stretches(config: Config, name: str, inputs: int, starts: np.ndarray) -> list[Stretch]:
    """Returns the stretches of text that the evaluation `name` goes through.

    `ttt_sgd` learns from every chunk but the last, its rate falling as a cosine over chunks (PR #549); `ttt_phased` from the first
    TTT_PREFIX_DOCS documents, TTT_PHASES times, the rate falling within each (PRs #1610, #1626).
    """

    def cosine(count: int, of: int) -> tuple[float, ...]:
        return tuple((1 + math.cos(math.pi * number / of)) / 2 for number in range(count))

    size = config.ttt_chunk_tokens
    if name == "ttt_sgd":
        cuts = [*range(0, inputs, size), inputs]
        scales = cosine(len(cuts) - 2, len(cuts) - 1)
        return [Stretch(a, b, (scale,)) for a, b, scale in zip(cuts, cuts[1:-1], scales, strict=False)] + [Stretch(cuts[-2], inputs)]
    if name == "ttt_phased":
        documents = min(config.ttt_prefix_docs, len(starts) - 1)
        cuts = sorted({int(starts[documents * number // config.ttt_phases]) for number in range(config.ttt_phases + 1)})
        chunks = [math.ceil((b - a) / size) for a, b in itertools.pairwise(cuts)]
        return [*(Stretch(a, b, cosine(count, count)) for a, b, count in zip(cuts, cuts[1:], chunks, strict=False)), Stretch(cuts[-1], inputs)]
    return [Stretch(0, inputs)]


class LowRank:
    """What a projection gets added for each document of a batch: scale (x A^T) B^T, A (documents, rank, inputs), B (documents, outputs, rank)."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * ((x @ self.a.mT) @ self.b.mT)


class DocumentAdapters:
    """LoRA on the projections of every executed layer and on the head, apart for each document of a batch. Sources: PRs #1530, #1767.

    A document's adapters lie end to end in a row of `values`, first every A, then every B, so that an optimiser's step is one operation on all of them.
    Learning is AdamW without a first moment. Compiled, there is one graph for any number of documents from two on, and one for a single one.
    """

    def __init__(self, model: GPT, phase: Phase, config: Config, documents: int) -> None:
        self.network: Callable[..., Tensor] = model
        self.config, self.dtype, rank = config, model.dtype, config.ttt_lora_rank
        targets, generator = config.ttt_lora_targets.split(","), torch.Generator().manual_seed(config.seed)
        blocks = [weight_parts(model.blocks[layer]) for layer in phase.order]
        slots = [{name.split(".")[-2]: part.weight.shape for name, part in parts.items()} for parts in blocks]
        slots.append({"head": torch.Size([model.config.vocab_size, model.config.model_dim])})
        shapes = {(number, name): shape for number, slot in enumerate(slots) for name, shape in slot.items() if name in targets}
        self.num_slots, self.places = len(slots), list(shapes)
        self.sizes = [rank * inputs for _, inputs in shapes.values()] + [rank * outputs for outputs, _ in shapes.values()]
        starts = [(2 * torch.rand(rank * inputs, generator=generator) - 1) / math.sqrt(inputs) for _, inputs in shapes.values()]
        device = model.embedding.table.weight.device
        self.start = torch.cat(starts).to(device)  # of every A, the same for every document
        self.values, self.squares = (torch.zeros(documents, sum(self.sizes), device=device) for _ in range(2))
        self.served = self.values
        self.compiled_forward, self.compiled_update = compiled(self.eager_forward, config), compiled(self.eager_update, config)

    def reset(self, kept: Tensor | None) -> None:
        """Makes them new, for other documents: B = 0, A as at first or, if given, `kept` (documents, len(start)); the optimiser without a past."""
        self.values[:, : len(self.start)] = self.start if kept is None else kept
        self.values[:, len(self.start) :] = 0
        self.squares.zero_()

    def serve(self, first: int, count: int) -> None:
        """Lets the rows of the next pass be those of `count` documents from `first` on."""
        self.served = self.values[first : first + count].detach().requires_grad_()

    def slots(self, values: Tensor) -> Adapters:
        """Returns the adapters in rows of `values`."""
        rank, count = self.config.ttt_lora_rank, len(self.places)
        pieces = values.to(self.dtype).split(self.sizes, dim=1)
        slots: list[dict[str, Callable[[Tensor], Tensor]]] = [{} for _ in range(self.num_slots)]
        for (number, name), a, b in zip(self.places, pieces[:count], pieces[count:], strict=True):
            slots[number][name] = LowRank(a.unflatten(1, (rank, -1)), b.unflatten(1, (-1, rank)), self.config.ttt_lora_alpha / rank)
        return slots

    def eager_forward(self, tokens: Tensor, targets: Tensor, phase: Phase, values: Tensor) -> Tensor:
        """Returns what the model's forward does, adapted by `values`, one row for each of tokens."""
        return self.network(tokens, targets, phase, self.slots(values))

    def forward(self, tokens: Tensor, targets: Tensor, phase: Phase) -> Tensor:
        """Returns what the model's forward does for the documents that are served, or the first of them."""
        values = self.served[: len(tokens)]
        for tensor, dims in ((tokens, (0, 1)), (targets, (0, 1)), (values, (0,))):
            for dim in dims:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        result: Tensor = self.compiled_forward(tokens, targets, phase, values)
        return result

    def eager_update(self, values: Tensor, squares: Tensor, gradient: Tensor, share: Tensor) -> None:
        """Moves values in place by a step of AdamW; `share`, (), says how much of the true second moment the running one has so far."""
        c = self.config
        squares.lerp_(gradient.square(), 1 - c.ttt_lora_beta2)
        values.mul_(1 - c.ttt_lora_lr * c.ttt_lora_weight_decay).sub_(c.ttt_lora_lr * gradient / ((squares / share).sqrt() + 1e-10))

    def learn(self, first: int, count: int, step: int) -> None:
        """Takes step number `step` for `count` documents from `first` on, the first of those that are served, down the gradients of their own losses."""
        assert self.served.grad is not None
        rows = slice(first, first + count)
        share = self.values.new_full((), 1 - self.config.ttt_lora_beta2**step)
        parts = self.values[rows], self.squares[rows], self.served.grad[:count]
        for part in parts:
            torch._dynamo.maybe_mark_dynamic(part, 0)
        self.compiled_update(*parts, share)


# -- Token tilt: the text before hints at a token, and how far hints of a kind are to be trusted is learnt from what has been scored.

MOST_RUNNING = 3  # times running that a hint came true are told apart up to here
TILT_RATE = 0.2
TILT_SECONDS = 3e-7  # for a target, on a slow core of which others want the memory too
# A hint that the model is this sure of is left as it is: float32 does not say how little remains for other tokens.
SURE_NATS = 1e-3


@cache
def hint_kernel() -> Callable[..., None]:
    """Returns the compiled loop of `hints_of_order`."""
    import numba

    def look_up(tokens, order, keys, words, running, hints, runs):  # type: ignore[no-untyped-def]
        for i in range(order - 1, len(tokens) - 1):
            key = np.uint64(0)
            for k in range(i - order + 1, i + 1):
                key = (key ^ np.uint64(tokens[k] + 1)) * np.uint64(0x9E3779B97F4A7C15)
                key ^= key >> np.uint64(29)
            key |= np.uint64(1)  # 0 marks an empty slot
            slot = (key >> np.uint64(1)) & np.uint64(len(keys) - 1)
            while keys[slot] != 0 and keys[slot] != key:
                slot = (slot + np.uint64(1)) & np.uint64(len(keys) - 1)
            if keys[slot] == key:
                hints[i], runs[i] = words[slot], running[slot]
            # The hint is fixed; only now may the target be looked at.
            target = tokens[i + 1]
            if keys[slot] == key and words[slot] == target:
                running[slot] = min(running[slot] + 1, MOST_RUNNING)
            else:
                keys[slot], words[slot], running[slot] = key, target, 1

    return numba.njit(look_up, nogil=True)


def hints_of_order(tokens: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (hint, runs) at every target, (N - 1,) each: the token that came last after the `order` tokens before it, and how many times running it
    had come, 1 to MOST_RUNNING; 0 = never, and no hint. Both depend on the text before the target alone. Source: the token channel of PR #1514."""
    size = 2 << len(tokens).bit_length()
    hints, runs = np.zeros(len(tokens) - 1, np.uint16), np.zeros(len(tokens) - 1, np.uint8)
    hint_kernel()(tokens, order, np.zeros(size, np.uint64), np.zeros(size, np.uint16), np.zeros(size, np.uint8), hints, runs)
    return hints, runs


class Hints(NamedTuple):
    """What the text before hints at, for every target: (N - 1,) arrays."""

    tokens: np.ndarray  # uint16
    kinds: np.ndarray  # uint8: a number for each order and number of times running; 0 = no hint, whatever the token


def hints_of(tokens: np.ndarray, orders: Sequence[int], world: World) -> Hints:
    """Returns the hint of the longest of `orders` that has one. Every rank must call it."""
    hints, kinds = np.zeros(len(tokens) - 1, np.uint16), np.zeros(len(tokens) - 1, np.uint8)
    hint_kernel()  # one for all threads: each would compile its own
    found = share_work(world, {str(order): 1 for order in orders}, lambda order: hints_of_order(tokens, int(order)))
    for number, order in enumerate(orders):
        some, runs = found[str(order)]
        there = runs > 0
        hints[there], kinds[there] = some[there], number * MOST_RUNNING + runs[there]
    return Hints(hints, kinds)


@cache
def tilt_kernel() -> Callable[..., None]:
    """Returns the compiled loop of `tilt`."""
    import numba

    def pass_over(nats, hint_nats, kinds, hits, weights, squares, shares):  # type: ignore[no-untyped-def]
        for i in range(len(nats)):
            kind = kinds[i]
            if kind == 0 or hint_nats[i] < SURE_NATS:
                continue
            p = math.exp(-hint_nats[i])
            odds = math.log(max(p, 1e-7) / (1 - p))
            share = 1 / (1 + math.exp(-(weights[kind, 0] + weights[kind, 1] * odds)))
            share = min(max(share, 1e-7), 1 - 1e-7)
            nats[i] = -math.log(share) if hits[i] else nats[i] + math.log1p(-p) - math.log1p(-share)
            shares[i] = share
            # The score is fixed; only now may the target teach.
            miss = hits[i] - share
            for k, slope in enumerate((miss, miss * odds)):
                squares[kind, k] += slope * slope
                weights[kind, k] += TILT_RATE * slope / math.sqrt(squares[kind, k])

    return numba.njit(pass_over)


def tilt(nats: np.ndarray, hint_nats: np.ndarray, hints: Hints, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scores, shares): the nats of targets (N,) once their hints have been given probability `shares`, 0 where that is left as it is.

    A hint of probability p gets s with logit(s) = a + b logit(p), all other tokens (1 - s) / (1 - p) of what they had: p'(x) = e^(t [x = h]) p(x) / Z, the
    closed form of PR #1420 with a tilt t of its own for each target. a and b of each kind of hint are a logistic regression on whether hints came true,
    learnt in text order by AdaGrad (Duchi et al. 2011) from 0 and 1, which leave p as it is: s depends on the text before the target alone.
    """
    scores, shares = nats.astype(np.float64), np.zeros(len(nats))
    weights = np.tile([0.0, 1.0], (int(hints.kinds.max(initial=0)) + 1, 1))
    tilt_kernel()(scores, hint_nats.astype(np.float64), hints.kinds, hints.tokens == targets, weights, np.ones_like(weights), shares)
    return scores.astype(np.float32), shares


class Batch(NamedTuple):
    """Rows to score: (B, T) each. Where there is nothing to read they go on with some token, which no score before it sees."""

    tokens: Tensor
    targets: Tensor
    hints: Tensor | None
    row_documents: int  # a bound on their mean number in a row, where attention needs one


# Batches of documents that keep A go round this many streams, which the ranks share: 1, 2, 4 and 8 ranks give the same scores.
STREAMS = 8
AUDIT_CUTS = 4


class Evaluator:
    """One evaluation of the validation split: `score` gives every target its nats.

    Ranks share the windows or documents of a stretch; each target's score is the same for any number of ranks, up to the rounding of batches and, with
    global SGD, of gradients summed in another order. Exceptions: TTT_LORA_WARM_A with ranks that do not divide STREAMS; a hint that rounding takes across
    SURE_NATS.
    """

    def __init__(
        self, run: Run, model: GPT, forward: Callable[..., Tensor], val: ValData, name: str, phase: Phase, plain_seconds: float = 0.0, spent: float = 0.0,
        rehearsed: Evaluator | None = None,
    ) -> None:
        """`forward` is that of `model`, perhaps compiled. `plain_seconds` per input read without adaptation, and the seconds `spent` on evaluations before,
        tell when adaptation must end to meet EVAL_SECONDS. `rehearsed` is what `rehearse` returned for this evaluation, if anything."""
        self.began, self.adapted, self.is_adapting = time.perf_counter(), 0, True
        self.log, self.config, self.world, self.model, self.forward = run.log, run.config, run.world, model, forward
        self.val, self.name, self.phase, self.plain_seconds, self.spent_seconds = val, name, phase, plain_seconds, spent
        self.inputs, self.window = len(val.tokens) - 1, run.config.window
        self.bounds: DocumentBounds = rehearsed.bounds if rehearsed else DocumentBounds(run.config)
        self.stride = self.window if name == "chunked" else run.config.eval_stride
        self.starts = document_starts(val.tokens, self.config.bos_id) if self.config.doc_mask else np.zeros(1, dtype=np.int64)
        self.stretches = plan_stretches(self.config, name, self.inputs, self.starts)
        self.planned = [self.windows(stretch.first, stretch.end) for stretch in self.stretches]
        self.batch = max(self.config.val_batch_size // (self.window * run.world.size), 1)  # windows in one pass
        self.by_document = name in ("ttt_lora", "ttt_phased")
        orders = parse_orders(self.config.tilt_orders) if name == self.config.final_eval != "chunked" else []
        self.hints = hints_of(val.tokens, orders, run.world) if orders else None
        self.ledger = Ledger(self.inputs, has_hints=bool(orders))
        self.scores, self.shares = np.empty(0, np.float32), np.empty(0)  # of all targets, and what `tilt` gave their hints
        self.sgd: torch.optim.SGD | None = None
        self.adapters: DocumentAdapters | None = rehearsed.adapters if rehearsed else None
        self.most_documents = run.config.ttt_lora_batch_docs  # scored in one pass
        self.kept: dict[int, Tensor] = {}  # A of each stream
        self.done, self.total, self.is_predicted = 0.0, sum(self.cost(number) for number in range(len(self.stretches))) / run.world.size, False
        self.first_read = time.perf_counter()

    # -- What a row is, and its score

    def read(self, windows: np.ndarray, length: int) -> Batch:
        """Returns the rows of windows (first input read, first scored, end), `length` inputs long; nothing from `end` on is read."""
        texts = [self.val.tokens[:-1], self.val.tokens[1:], *([self.hints.tokens] if self.hints is not None else [])]
        sides = [np.full((len(windows), length), (self.config.bos_id + 1) % self.config.vocab_size, dtype=np.int64) for _ in texts]
        for row, (start, _, end) in enumerate(windows):
            for side, text in zip(sides, texts, strict=True):
                side[row, : end - start] = text[start:end]
        documents = self.bounds.of(torch.from_numpy(sides[0])) if self.model.kernels.attention.is_ragged else 0
        tokens, targets, *hints = (to_device(torch.from_numpy(side), self.world.device) for side in sides)
        return Batch(tokens, targets, hints[0] if hints else None, documents)

    def losses(self, batch: Batch, targets: Tensor, adapters: DocumentAdapters | None) -> Tensor:
        """Returns the nats of targets, (B, T) or K at each position, (B, T, K)."""
        if adapters is None:
            return self.forward(batch.tokens, targets, replace(self.phase, batch_tokens=0, row_documents=batch.row_documents))
        # A row is a piece of one document.
        return adapters.forward(batch.tokens, targets, replace(self.phase, batch_tokens=0, row_documents=1))

    def nats(self, batch: Batch, adapters: DocumentAdapters | None = None) -> Tensor:
        """Returns the nats of every target and, where there are hints, of its hint: (B, T, 1 or 2)."""
        if batch.hints is None:
            return self.losses(batch, batch.targets, adapters)[..., None]
        return self.losses(batch, torch.stack([batch.targets, batch.hints], dim=-1), adapters)

    def write(self, windows: np.ndarray, nats: Tensor) -> None:
        """Enters the nats (B, T, 1 or 2) of windows into the ledger."""
        for row, (start, first, end) in zip(nats.detach().float().cpu().numpy(), windows, strict=False):
            self.ledger.write(int(first), *row[first - start : end - start].T)

    # -- Time

    def windows(self, first: int, end: int) -> np.ndarray:
        """Returns the windows that score [first, end) without adapters."""
        return plan_windows(first, end, self.window, self.stride, self.starts)

    def reads(self, windows: int) -> int:
        """Returns how many inputs a rank reads to score so many windows: a compiled pass is filled up."""
        return self.window * (-(-windows // self.batch) * self.batch if self.config.compile else windows)

    def learning_cost(self, stretch: Stretch) -> float:
        """Returns about how many inputs could be read while all ranks learn from a stretch: a backward pass costs two forward ones."""
        size = self.config.ttt_chunk_tokens
        chunks = [min(size, stretch.end - first) for first in range(stretch.first, stretch.end, size)] if stretch.lr_scales else []
        rows = self.world.size * sum(math.prod(self.learning_passes(inputs)) for inputs in chunks)
        return 3.0 * self.config.ttt_epochs * rows * self.config.train_seq_len

    def learning_passes(self, inputs: int) -> tuple[int, int]:
        """Returns (passes, rows of each) in which every rank reads its share of a chunk: the same for all chunks where one compiled shape is to serve them."""
        c = self.config
        share = -(-(c.ttt_chunk_tokens if c.compile else inputs) // (c.train_seq_len * self.world.size))
        passes = -(-share // max(c.micro_batch_tokens // c.train_seq_len, 1))
        return passes, -(-share // passes)

    def cost(self, number: int) -> float:
        """Returns the same for scoring a stretch and learning from it."""
        stretch = self.stretches[number]
        if self.by_document:
            return self.learning_cost(stretch) + sum(self.document_cost(int(end - first)) for first, end in self.documents(stretch))
        return self.learning_cost(stretch) + self.plain_cost(number)

    def plain_cost(self, number: int) -> int:
        """Returns the same for scoring it without adapters."""
        return self.world.size * self.reads(-(-len(self.planned[number]) // self.world.size))

    def document_cost(self, length: int) -> float:
        """Returns the same for a document of so many inputs that is scored and learnt from chunk by chunk."""
        size = self.config.ttt_lora_chunk_tokens
        chunks = -(-length // size)
        grown = min(chunks, self.window // size)
        return 3.0 * (size * grown * (grown + 1) / 2 + self.window * (chunks - grown))

    def note_progress(self, cost: float) -> None:
        """Adds to the work that is done, shows how far it is, and says once how long all of it takes."""
        self.done += cost
        seconds, share = time.perf_counter() - self.first_read, min(self.done / self.total, 1.0)
        if seconds > 5 and not self.is_predicted:
            self.is_predicted = True
            limit = f", EVAL_SECONDS={self.config.eval_seconds:g}" if self.config.eval_seconds else ""
            self.log.note(f"the {self.name} evaluation will take about {self.first_read - self.began + seconds / share:,.0f} s{limit}")
        self.log.progress(f"{self.name} evaluation {100 * share:.0f}%  {clock_text(seconds * (1 / share - 1))} left")

    def pace(self) -> float:
        """Returns the seconds per input read; 0 before there is any."""
        return (time.perf_counter() - self.first_read) / self.done if self.done else 0.0

    def has_time(self, cost: float, reads_left: float) -> bool:
        """Returns whether adaptation of this cost leaves this rank the time for the inputs that are then to be read without any: it goes on until then."""
        seconds = self.spent_seconds + time.perf_counter() - self.began
        needed = max(self.pace(), self.plain_seconds) * cost + self.plain_seconds * reads_left + TILT_SECONDS * self.inputs * (self.hints is not None)
        return not self.config.eval_seconds or seconds + needed <= self.config.eval_seconds

    # -- Scoring

    def with_memory(self, attempt: Callable[[int], Tensor], most: int, what: str) -> tuple[Tensor, int]:
        """Returns (what attempt(n) returns, n): n is `most`, halved until it fits into memory. `what` are n things, and the setting that makes them fewer."""
        while True:
            try:
                return attempt(most), most
            except torch.OutOfMemoryError:
                if most == 1:
                    raise
            most = -(-most // 2)  # here, for what the failed pass holds is freed only after the clause
            self.log.note(f"out of memory: {self.name} evaluation goes on with {most} {what} lower")

    @torch.no_grad()
    def score_windows(self, windows: np.ndarray) -> None:
        """Scores windows without adapters."""

        def attempt(count: int) -> Tensor:
            some = windows[:count]
            rows = np.arange(count if self.config.compile else len(some)) % len(some)  # filled up with repeats, so that one compiled shape serves all
            return self.nats(self.read(some[rows], self.window))

        while len(windows):
            most = self.batch if self.config.compile else min(self.batch, len(windows))
            scores, count = self.with_memory(attempt, most, "windows at a time; set VAL_BATCH_SIZE")
            self.batch = self.batch if count == most else count
            self.write(windows[:count], scores)
            self.note_progress(self.reads(min(count, len(windows))))
            windows = windows[count:]

    def documents(self, stretch: Stretch) -> np.ndarray:
        """Returns the (first input, end) of the documents of a stretch: (D, 2)."""
        starts = self.starts[(self.starts >= stretch.first) & (self.starts < stretch.end)]
        return np.stack([starts, np.append(starts[1:], stretch.end)], axis=1)

    def score_documents(self, stretch: Stretch, reads_later: float) -> None:
        """Scores this rank's documents of a stretch, each with adapters of its own that learn from its chunks: longest first, or in text order with warm A."""
        documents, size = self.documents(stretch), self.config.ttt_lora_batch_docs
        warm = self.config.ttt_lora_warm_a
        if not warm:
            documents = documents[np.argsort(documents[:, 0] - documents[:, 1], kind="stable")]
        batches = [documents[index : index + size] for index in range(0, len(documents), size)]
        costs = [sum(self.document_cost(int(end - first)) for first, end in batch) for batch in batches]
        mine = [n for n in range(len(batches)) if n % STREAMS % self.world.size == self.world.rank] if warm else self.world.share_of(costs)
        most = size if self.config.compile else min(size, len(self.starts))
        adapters = self.adapters = self.adapters or DocumentAdapters(self.model, self.phase, self.config, most)
        plain = {number: np.concatenate([self.windows(int(first), int(end)) for first, end in batches[number]]) for number in mine}
        for number in mine:
            batch, stream = batches[number], number % STREAMS
            windows_left = sum(len(windows) for other, windows in plain.items() if other != number)
            if not self.has_time(costs[number], self.reads(windows_left) + reads_later):
                continue
            del plain[number]
            adapters.reset(self.kept.get(stream))
            self.score_adapting(batch[np.argsort(batch[:, 0] - batch[:, 1], kind="stable")], adapters)
            if warm:
                self.kept[stream] = adapters.values[:, : len(adapters.start)].clone()
            self.adapted += int((batch[:, 1] - batch[:, 0]).sum()) * self.is_adapting
        if plain:
            self.score_windows(np.concatenate(list(plain.values())))

    def score_adapting(self, documents: np.ndarray, adapters: DocumentAdapters) -> None:
        """Scores documents (D, 2), longest first, chunk by chunk; after each chunk the adapters of those that go on learn from it."""
        size, firsts, ends = self.config.ttt_lora_chunk_tokens, documents[:, 0], documents[:, 1]
        self.model.requires_grad_(False)
        for chunk in itertools.count():
            begins, stops = firsts + chunk * size, np.minimum(firsts + (chunk + 1) * size, ends)
            active, going_on = int((begins < ends).sum()), int((stops < ends).sum())
            if not active:
                break
            windows = np.stack([np.maximum(firsts, firsts + (chunk + 1) * size - self.window), begins, stops], axis=1)[:active]
            length = min((chunk + 1) * size, self.window)
            done = 0
            while done < active:
                learning = windows[done:going_on]
                attempt = partial(self.score_chunk, windows[done:], learning, length, adapters, done)
                most = min(self.most_documents, max(self.config.micro_batch_tokens // length, 1), active - done)
                scores, count = self.with_memory(attempt, most, "documents at a time; set TTT_LORA_BATCH_DOCS")
                self.most_documents = self.most_documents if count == most else count
                self.write(windows[done : done + count], scores)
                self.note_progress(3.0 * count * length)
                for _, begin, stop in learning[:count]:
                    self.ledger.allow_learning(int(begin), int(stop))
                if len(learning):
                    adapters.learn(done, min(count, len(learning)), chunk + 1)
                done += count
        adapters.served = adapters.values  # without a gradient to keep
        self.model.requires_grad_(True)  # as `learn` and compiled passes without adapters need it

    def score_chunk(self, windows: np.ndarray, learning: np.ndarray, length: int, adapters: DocumentAdapters, first: int, count: int) -> Tensor:
        """Returns the nats (B, T, 1 or 2) of `count` windows, those of documents from `first` on; adapters of those `learning` get the loss's gradient."""
        adapters.serve(first, count)
        nats = self.nats(self.read(windows[:count], length), adapters)
        if len(learning):
            spans = torch.from_numpy(learning[:count] - learning[:count, :1]).to(nats.device)
            column = torch.arange(length, device=nats.device)
            chosen = (column >= spans[:, 1:2]) & (column < spans[:, 2:])
            (nats[: len(spans), :, 0] * chosen).sum().div(self.config.ttt_lora_chunk_tokens).backward()
        return nats.detach()

    # -- Learning

    def learn(self, stretch: Stretch) -> None:
        """Takes TTT_EPOCHS steps of SGD on all weights for each chunk of a stretch, over all ranks; each step reads the whole chunk."""
        c, world, length = self.config, self.world, self.config.train_seq_len
        parameters = list(self.model.parameters())
        size = c.ttt_chunk_tokens
        for first, lr_scale in zip(range(stretch.first, stretch.end, size), stretch.lr_scales, strict=True):
            end = min(first + size, stretch.end)
            self.ledger.allow_learning(first, end)
            windows = np.array([(start, start, min(start + length, end)) for start in range(first, end, length)])[world.rank :: world.size]
            passes, rows = self.learning_passes(end - first)
            windows = np.concatenate([windows, np.full((passes * rows - len(windows), 3), first)])  # those read nothing
            self.sgd = self.sgd or torch.optim.SGD(parameters, c.ttt_lr, c.ttt_momentum)
            self.sgd.param_groups[0]["lr"] = c.ttt_lr * lr_scale
            for _ in range(c.ttt_epochs):
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                for some in np.split(windows, passes):
                    loss = self.nats(self.read(some, length)._replace(hints=None))[..., 0]
                    lengths = torch.from_numpy(some[:, 2] - some[:, 0]).to(loss.device)
                    (loss * (torch.arange(length, device=loss.device) < lengths[:, None])).sum().div(end - first).backward()
                for parameter in parameters:
                    assert parameter.grad is not None
                    world.sum_(parameter.grad)
                nn.utils.clip_grad_norm_(parameters, c.ttt_grad_clip)
                self.sgd.step()
            self.note_progress(3.0 * c.ttt_epochs * passes * rows * length)

    def tilt(self) -> None:
        """Makes scores of what the ledger holds."""
        self.scores = self.ledger.nats
        if self.hints is not None:
            self.scores, self.shares = tilt(self.ledger.nats, self.ledger.hint_nats, self.hints, self.val.tokens[1:])

    def score(self) -> Score:
        """Returns the score of the whole split. Every rank must call it. The weights are afterwards what they were."""
        world, before = self.world, [parameter.detach().clone() for parameter in self.model.parameters()] if self.name in ("ttt_sgd", "ttt_phased") else []
        reads = [self.plain_cost(number) for number in range(len(self.planned))]
        try:
            for number, stretch in enumerate(self.stretches):
                if self.by_document:
                    self.score_documents(stretch, sum(reads[number + 1 :]) / world.size)
                else:
                    self.score_windows(np.array_split(self.planned[number], world.size)[world.rank])
                    self.adapted += (stretch.end - stretch.first) * (self.is_adapting and world.is_main)
                self.ledger.settle(stretch.first, stretch.end, world)
                if stretch.lr_scales and self.is_adapting:
                    has_time = self.has_time(self.learning_cost(stretch) / world.size, sum(reads[number + 1 :]) / world.size)
                    self.is_adapting = world.from_main(has_time)
                    if self.is_adapting:
                        self.learn(stretch)
        finally:
            self.model.requires_grad_(True)
            for parameter, weight in zip(self.model.parameters(), before, strict=False):
                parameter.data.copy_(weight)
                parameter.grad = None
        self.tilt()
        total, text_bytes = float(self.scores.sum(dtype=np.float64)), int(self.val.target_bytes.sum())
        adapted = sum(world.gather_objects(self.adapted))
        seconds = time.perf_counter() - self.began
        return Score(total / self.inputs, total / math.log(2) / text_bytes, seconds, self.inputs, text_bytes, adapted / self.inputs)


def evaluate(run: Run, model: GPT, forward: Callable[..., Tensor], val: ValData, name: str, phase: Phase) -> Score:
    """Returns the score of the whole validation split under the evaluation `name`, with the layers of `phase`."""
    return Evaluator(run, model, forward, val, name, phase).score()


def rehearse(run: Run, model: GPT, forward: Callable[..., Tensor], name: str, phase: Phase) -> Evaluator:
    """Makes every kind of pass of an evaluation once, on random text, so that nothing is compiled while its clock runs; returns what made them.

    No token of the split is read, and no weight changes. Every rank must call it.
    """
    c, generator = run.config, np.random.default_rng(run.config.seed)
    # A document that outgrows the window, and after it more documents in a row than in real text: what is compiled holds for fewer.
    longest, short = c.window + c.ttt_lora_chunk_tokens, max(min(256, c.window), 2 * c.ttt_lora_chunk_tokens)
    learns = name in ("ttt_sgd", "ttt_phased")
    inputs = longest + max(c.ttt_chunk_tokens * learns, c.window, short)
    tokens = generator.integers(0, c.vocab_size, inputs + 1).astype(np.uint16)
    tokens[tokens == c.bos_id] = (c.bos_id + 1) % c.vocab_size
    tokens[[0, *range(longest, inputs, short)]] = c.bos_id
    text = ValData(tokens, np.ones(inputs, dtype=np.int64))
    evaluator = Evaluator(run._replace(log=Log(None)), model, forward, text, name, phase)
    evaluator.score_windows(evaluator.windows(0, inputs))
    if evaluator.by_document:
        evaluator.ledger, evaluator.adapters = Ledger(inputs, has_hints=evaluator.hints is not None), DocumentAdapters(model, phase, c, c.ttt_lora_batch_docs)
        evaluator.score_adapting(np.array([(0, longest), (longest, longest + short)]), evaluator.adapters)
    evaluator.tilt()
    if learns:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        evaluator.ledger.written[:] = True
        evaluator.learn(Stretch(longest, min(longest + c.ttt_chunk_tokens, inputs), (0.0,)))
        model.zero_grad()
        for parameter, weight in zip(model.parameters(), before, strict=True):
            parameter.data.copy_(weight)
    return evaluator


def write_scores(config: Config, val: ValData, nats: np.ndarray, plain: np.ndarray, starts: np.ndarray) -> None:
    """Writes SCORES_FILE, every target's nats, and DOCUMENTS_FILE, every document's tokens, bytes and bits per byte without and with adaptation."""
    if config.scores_file:
        with atomic_file(Path(config.scores_file)) as file:
            np.save(file, nats)
    if config.documents_file:
        lines = ["document,tokens,bytes,bpb_before,bpb"]
        for number, (first, end) in enumerate(itertools.pairwise([*starts.tolist(), len(nats)])):
            count = int(val.target_bytes[first:end].sum())
            bits = [float(scores[first:end].sum(dtype=np.float64)) / math.log(2) / max(count, 1) for scores in (plain, nats)]
            lines.append(f"{number},{end - first},{count},{bits[0]:.6f},{bits[1]:.6f}")
        atomic_write(Path(config.documents_file), "\n".join(lines).encode() + b"\n")


def score_artifact(run: Run, artifact: bytes, val: ValData, kernels: Kernels) -> dict[str, Score]:
    """Returns the scores of the model read back from `artifact`, by evaluation: chunked, FINAL_EVAL, and sliding where DOCUMENTS_FILE compares with it."""
    config, began = run.config, time.perf_counter()
    # Without float8: the scale of a whole batch would let scores depend on later tokens.
    model = read_artifact(artifact, replace(config, fp8=""), config.artifact or str(run.folder / "artifact.bin"), run.world.device, kernels)
    read_seconds, c = time.perf_counter() - began, model.config
    model.config = replace(
        c, logit_softcap=config.eval_softcap or c.logit_softcap, logit_softcap_negative=config.eval_softcap_negative or c.logit_softcap_negative
    )
    forward, phase = compiled(model, config), Schedule(config).scored_phase
    names = list(dict.fromkeys(["chunked", *["sliding"] * bool(config.documents_file), config.final_eval]))
    rehearsed: dict[str, Evaluator] = {}
    if config.compile:
        began = time.perf_counter()
        run.log.progress("the evaluation is compiled and rehearsed on random text")
        rehearsed = {name: rehearse(run, model, forward, name, phase) for name in names}
        run.log.note(f"the evaluation was compiled and rehearsed on random text in {time.perf_counter() - began:.1f} s, before its clock")
    silent = int(((val.target_bytes == 0) & (val.tokens[1:] != config.bos_id)).sum())
    if silent:
        run.log.note(f"{silent:,} of {len(val.target_bytes):,} targets, unknown to the tokenizer or markers of case, cost nats and count no bytes")
    scores: dict[str, Score] = {}
    evaluators: dict[str, Evaluator] = {}
    plain_seconds = 0.0
    for name in names:
        plain_seconds = plain_seconds or (evaluators["chunked"].pace() if scores else 0.0)
        spent = read_seconds + sum(score.seconds for score in scores.values())
        evaluators[name] = Evaluator(run, model, forward, val, name, phase, plain_seconds, spent, rehearsed.get(name))
        scores[name] = evaluators[name].score()
        run.log.event("eval", name=name, **scores[name]._asdict())
    final = evaluators[config.final_eval]
    if run.world.is_main:
        try:
            plain = evaluators["sliding" if config.documents_file else "chunked"].scores
            write_scores(config, val, final.scores, plain, document_starts(val.tokens, config.bos_id))
        except OSError as problem:  # the score stands without its details
            run.log.note(f"SCORES_FILE or DOCUMENTS_FILE cannot be written ({problem})")
    if config.audit:
        # Without a clock, which might decide differently each time, with chunks so short that there is something to learn from, and uncompiled, for the
        # audit looks at batches of every size.
        rehearsed.clear()
        for evaluator in evaluators.values():
            evaluator.adapters = None  # their memory
        chunk = min(config.ttt_chunk_tokens, config.audit_tokens // 4)
        audited = run._replace(config=replace(config, eval_seconds=0.0, ttt_chunk_tokens=chunk, compile=False))
        audit(run, lambda text: Evaluator(audited, model, model, text, config.final_eval, phase), val)
    return scores


# -- The rules of the challenge (its issue #1017), checked on the very artifact and evaluation that give the score.


def watched(evaluator: Evaluator, cuts: Sequence[int]) -> tuple[np.ndarray, dict[int, Tensor]]:
    """Returns (the scores of all targets, cut -> the nats of every token of the vocabulary as the target of that input, as scored on this rank)."""
    seen: dict[int, Tensor] = {}
    last: list[Any] = []
    score_rows, write = evaluator.nats, evaluator.write

    def remember(batch: Batch, adapters: DocumentAdapters | None = None) -> Tensor:
        last[:] = [batch, adapters]
        return score_rows(batch, adapters)

    @torch.no_grad()
    def look(windows: np.ndarray, nats: Tensor) -> None:
        for row, (start, first, end) in enumerate(windows.tolist()):
            for cut in (cut for cut in cuts if first <= cut < end):
                batch, adapters = last
                some = batch._replace(tokens=batch.tokens[: row + 1], row_documents=0)  # the bound is the whole batch's
                pieces = torch.arange(evaluator.config.vocab_size, device=some.tokens.device).split(64)
                targets = [piece.expand(*some.tokens.shape, -1).contiguous() for piece in pieces]
                seen[cut] = torch.cat([evaluator.losses(some, target, adapters)[row, cut - start].double() for target in targets])
        write(windows, nats)

    evaluator.nats, evaluator.write = remember, look  # type: ignore[method-assign]
    evaluator.score()
    for cut, every in seen.items():
        if evaluator.hints is not None and (share := float(evaluator.shares[cut])):
            hint = int(evaluator.hints.tokens[cut])
            every += torch.log1p(-(-every[hint]).exp()) - math.log1p(-share)
            every[hint] = -math.log(share)
    return evaluator.scores, seen


def audit(run: Run, new_evaluator: Callable[[ValData], Evaluator], val: ValData) -> None:
    """Logs what is proved of an evaluation on the first AUDIT_TOKENS of the split. Raises Violation at the first rule that is broken.

    C1: with all text after a cut replaced, neither a score before it nor the probabilities at it change by a bit; cuts fall inside chunks, so that
    learning from a target before its score (C3) would show as well. C2: at a cut, all tokens get probabilities that sum to 1, and the score is that of
    the target among them. C4, and that learning follows scores, is refused by the ledger in every evaluation. Besides: no training shard is opened and
    no connection made meanwhile.
    """
    config, touched, watching = run.config, list[str](), True
    text = ValData(val.tokens[: config.audit_tokens + 1], val.target_bytes[: config.audit_tokens])

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and (event in ("socket.connect", "socket.getaddrinfo") or (event == "open" and "_train_" in str(arguments[0]))):
            touched.append(f"{event} {arguments[0]}")

    generator = np.random.default_rng(config.seed)
    possible = np.flatnonzero(text.tokens[1:] != config.bos_id)  # documents keep their lengths, and so their batches
    cuts = sorted(generator.choice(possible, size=min(AUDIT_CUTS, len(possible)), replace=False).tolist())
    sys.addaudithook(watch)
    try:
        nats, probabilities = watched(new_evaluator(text), cuts)
        for cut in cuts:
            tokens = text.tokens.copy()
            changed = np.flatnonzero((np.arange(len(tokens)) > cut) & (tokens != config.bos_id))
            free = np.delete(np.arange(config.vocab_size), config.bos_id)
            tokens[changed] = generator.choice(free, size=len(changed))
            tokens[cut + 1] = next(token for token in free if token != text.tokens[cut + 1])
            others, other_probabilities = watched(new_evaluator(ValData(tokens, text.target_bytes)), [cut])
            differing = np.flatnonzero(others[:cut] != nats[:cut])
            if len(differing):
                raise Violation(f"C1, causality: the score of target {differing[0] + 1} depends on tokens after {cut} ({len(differing)} such scores)")
            if cut in probabilities and not torch.equal(other_probabilities[cut], probabilities[cut]):
                raise Violation(f"C1, causality: the probabilities of target {cut + 1} depend on that token or on later ones")
        furthest = 0.0
        for cut, every in probabilities.items():
            total, target = float(every.neg().exp().sum()), int(text.tokens[cut + 1])
            furthest = max(furthest, abs(total - 1))
            if not abs(total - 1) < 1e-3:
                raise Violation(f"C2, normalisation: the probabilities of all tokens sum to {total:.6f} after token {cut}")
            if not abs(float(every[target]) - nats[cut]) < 1e-3 * (1 + abs(nats[cut])):
                raise Violation(f"C2, normalisation: the score of target {cut + 1} is {nats[cut]:.4f} nats, and that of its probability {every[target]:.4f}")
    finally:
        watching = False
    if touched:
        raise Violation(f"the evaluation touched {touched[0]}")
    run.log.note(f"audit: C1 holds: at {len(cuts)} cuts of {len(nats):,} targets, no score before the cut and no probability at it depends on what follows")
    run.log.note(f"audit: C2 holds: there the probabilities of all {config.vocab_size:,} tokens sum to 1, to {furthest:.1e}, and give the scores")
    run.log.note("audit: C3 and C4 hold: each target was scored once, and learnt from only afterwards; no training shard was opened, no connection made")


# ------------------------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------------------------
# Owns the order of a run, the run folder, the budget calculator and the exit codes: 0 done, 1 failed, 2 bad settings, 3 over the cap,
# 128 + signal stopped.

H100_PEAK_FLOPS = 989e12
PUBLIC_MFU = 0.28  # share of that peak which the best public script reaches, from its log


def matrix_weights(module: nn.Module) -> int:
    """Returns how many weights of `module` every token is multiplied with: those of its matrices."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, Linear))


def plan(config: Config, source: str, ranks: int) -> dict[str, Any]:
    """Returns what a configuration costs, without allocating it: parameters, layer orders, FLOPs, predicted bytes, time."""
    with torch.device("meta"):
        model = GPT(config)
    code = code_bytes(source)
    predicted = predict_bytes(model, code)
    phases = []
    head = sum(part.weight.numel() for part in model.head.modules() if isinstance(part, Weight))  # a factored embedding's matrix is used twice
    outside = matrix_weights(model) - matrix_weights(model.blocks) + head
    for phase in Schedule(config).phases():
        matrices = outside + sum(matrix_weights(model.blocks[layer]) for layer in phase.order)
        attention = 2 * len(phase.order) * config.model_dim * (phase.seq_len + 1) // 2  # multiply-adds of scores and mix, mean causal context
        forward = 2 * (matrices + attention)
        seconds = 3 * forward * phase.batch_tokens / (ranks * H100_PEAK_FLOPS * PUBLIC_MFU)
        steps = min(config.iterations, int(config.max_wallclock_seconds / seconds)) if config.max_wallclock_seconds else config.iterations
        phases.append({**asdict(phase), "train_flops_per_token": 3 * forward, "estimated_step_ms": 1000 * seconds, "estimated_steps": steps})
    steps = whole_run_steps(config, {phase: row["estimated_step_ms"] / 1000 for phase, row in zip(Schedule(config).phases(), phases, strict=True)})
    return {
        "preset": config.preset, "params": sum(row["params"] for row in predicted.table), "roles": predicted.table, "phases": phases, "estimated_steps": steps,
        "predicted_bytes_code": code, "predicted_bytes_total": predicted.bytes_total, "bytes_cap": config.bytes_cap,
        "fits": predicted.bytes_total <= config.bytes_cap, "clip_scale": predicted.clip_scale,
        "estimate_for": f"{ranks} x H100 at {PUBLIC_MFU:.0%} of peak", "fitting": what_fits(config, config.bytes_cap - code),
    }


def whole_run_steps(config: Config, seconds: Mapping[Phase, float]) -> int:
    """Returns how many steps a run makes where a step takes so many seconds in each phase."""
    if not config.max_wallclock_seconds:
        return config.iterations
    schedule, parts = Schedule(config), 1000
    pace = statistics.fmean(1 / seconds[schedule.phase((part + 0.5) / parts)] for part in range(parts))
    return min(config.iterations, int(config.max_wallclock_seconds * pace))


def what_fits(config: Config, budget: int) -> list[dict[str, float]]:
    """Returns, for several bits per weight, the largest NUM_LAYERS, MLP_MULT and VOCAB_SIZE that `budget` bytes hold, the others as they are; those that
    would have to be less than the least are left out."""

    def size(**changes: Any) -> tuple[int, float]:
        with torch.device("meta"):
            model = GPT(replace(config, **changes))
        return sum(part.weight.numel() for part in weight_parts(model).values()), overhead_bits(model)

    # The size grows by about as much with each unit.
    units: dict[str, float] = {"num_layers": 1, "mlp_mult": (1.5 if config.swiglu else 1) / config.model_dim, "vocab_size": 64}
    weights, overhead = size()
    larger = {name: size(**{name: getattr(config, name) + unit}) for name, unit in units.items()}
    table = []
    for bits_per_weight in (2.0, 2.5, 3.0, 3.5):
        row, left = {"bits_per_weight": bits_per_weight}, 8 * budget - bits_per_weight * weights - overhead
        for name, unit in units.items():
            more_weights, more_overhead = larger[name]
            grown = getattr(config, name) + unit * (left // (bits_per_weight * (more_weights - weights) + more_overhead - overhead))
            limits = SETTINGS[name.upper()].metadata
            if grown >= limits["low"]:
                row[name] = type(unit)(min(grown, limits["high"]))
        if row.get("num_layers", math.inf) < SETTINGS["NUM_LAYERS"].metadata["high"]:  # only every second layer brings a skip: one more may fit
            more_weights, more_overhead = size(num_layers=row["num_layers"] + 1)
            row["num_layers"] += bits_per_weight * more_weights + more_overhead <= 8 * budget
        table.append(row)
    return table


def plan_text(planned: Mapping[str, Any]) -> str:
    """Returns the budget for people."""
    lines = [f"preset {planned['preset']}: {planned['params']:,} parameters"]
    lines += [f"  {row['role']:<9} {row['params']:>12,} weights at {row['bits']:>5.2f} bits  {row['predicted_bytes']:>12,} bytes" for row in planned["roles"]]
    lines.append(f"  {'code':<9} {'':>34} {planned['predicted_bytes_code']:>12,} bytes")
    verdict = "fits" if planned["fits"] else "does NOT fit"
    widened = f", clip factors times {planned['clip_scale']:.3f}" if planned["clip_scale"] > 1 else ""
    lines.append(f"predicted total {planned['predicted_bytes_total']:,} bytes {verdict} BYTES_CAP={planned['bytes_cap']:,}{widened}")
    for row in planned["fitting"]:
        sizes = " or ".join(
            f"{name.upper()}={round(value, 2)}{' (the most)' * (value == SETTINGS[name.upper()].metadata['high'])}"
            for name, value in row.items() if name != "bits_per_weight"
        )  # fmt: skip
        lines.append(f"  at {row['bits_per_weight']} bits a weight it would be filled by {sizes}")
    for phase in planned["phases"]:
        order = ",".join(map(str, phase["order"]))
        lines.append(f"layers {order}  {phase['seq_len']} tokens a row  qat {int(phase['qat'])}: {phase['train_flops_per_token'] / 1e6:,.1f} MFLOP per token")
        tokens = phase["estimated_steps"] * phase["batch_tokens"]
        pace = f"{phase['estimated_step_ms']:,.3g} ms a step, {phase['estimated_steps']:,} steps if all were such, {tokens / 1e6:,.0f} M tokens"
        lines.append(f"  {planned['estimate_for']} (estimate): {pace}")
    lines.append(f"the whole run: about {planned['estimated_steps']:,} steps")
    return "\n".join(lines)


def is_locked(path: Path) -> bool:
    """Returns whether another process has this file open as the log of its run."""
    try:
        with open(path, "ab") as file:
            return not try_lock(file)
    except FileNotFoundError:
        return False


def open_folder(config: Config, world: World, source: str) -> Path:
    """Returns the run folder, made (or, with RESUME, found) by rank 0. Raises ValueError on every rank when it cannot be used."""
    folder = Path(config.runs_dir) / config.run_id
    making = folder.with_name(f"{folder.name}.{os.getpid()}.partial")  # a run folder appears whole or not at all
    problem = ""
    if world.is_main:
        try:
            if config.resume and not (folder / "config.env").is_file():
                problem = f"RESUME=1: there is no run {folder}; start it without RESUME"
            elif config.resume and is_locked(folder / "run.jsonl"):
                problem = f"RUN_ID={config.run_id}: another process is working on it; wait for it or stop it, or choose another RUN_ID"
            elif not config.resume and folder.exists():
                problem = f"RUN_ID={config.run_id}: {folder} exists and is never overwritten; choose another RUN_ID, or continue it with RESUME=1"
            else:
                if not config.resume:
                    making.mkdir(parents=True)
                    atomic_write(making / "train_gpt.py", source.encode())
                    write_config(making, config)
                    making.rename(folder)
        except OSError as error:
            shutil.rmtree(making, ignore_errors=True)
            problem = f"RUNS_DIR={config.runs_dir}: cannot write there ({error}); choose another place with RUNS_DIR="
    problem = world.from_main(problem)
    if problem:
        raise ValueError(problem)
    return folder


def environment_event(world: World, source: str, model: GPT) -> dict[str, Any]:
    """Returns what the numbers of a run depend on besides its settings."""
    git, commit = shutil.which("git"), ""
    if git:
        commit = subprocess.run([git, "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else f"{world.device.type} ({torch.get_num_threads()} threads)"
    return {
        "commit": commit.strip()[:12] or "unknown", "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "device": world.device.type, "device_name": name, "world_size": world.size,
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }


def stage_inputs(config: Config) -> tuple[Config, dict[str, Any] | None, bytes]:
    """Returns what the first stage reads, where that is not data: the checkpoint to export, the artifact to score; and `config` with its model settings."""
    stages, checkpoint, artifact = config.stage_list, None, b""
    if "train" not in stages and "export" in stages:
        checkpoint = read_checkpoint(Path(config.checkpoint or Path(config.runs_dir) / config.run_id / CHECKPOINT_FILES[0]))
        config = with_model_settings(config, checkpoint["settings"])
    if stages == ["eval"]:
        if not Path(config.artifact).is_file():
            raise FileNotFoundError(f"{config.artifact}: no such artifact")
        artifact = Path(config.artifact).read_bytes()
        header, _ = artifact_header(artifact, config.artifact)
        try:
            config = with_model_settings(config, header["settings"])
        except ValueError as error:
            raise ValueError(f"{config.artifact}: not a valid artifact: {'; '.join(str(error).splitlines())}") from None
    for name, path in (("SCORES_FILE", config.scores_file), ("DOCUMENTS_FILE", config.documents_file)):
        if path and not Path(path).parent.is_dir():
            raise ValueError(f"{name}={path}: there is no folder {Path(path).parent}; make it first")
    return config, checkpoint, artifact


def open_run(config: Config, world: World, signals: StopSignals, source: str, model: GPT) -> Run:
    """Returns the run with its folder and log open, after logging the settings and the environment."""
    folder = open_folder(config, world, source)
    run = Run(config, world, Log(folder if world.is_main else None), folder, signals, source)
    settings = {name: getattr(config, name.lower()) for name in SETTINGS}
    changed = {name: format_value(value) for name, value in settings.items() if value != getattr(Config, name.lower())}
    run.log.event("config", run_id=config.run_id, preset=config.preset, changed=changed, settings=settings)
    run.log.event("env", **environment_event(world, source, model))
    return run


def note_surprises(run: Run, asked: Config, model: GPT) -> None:
    """Logs model settings that are not those `asked` for, because a checkpoint or an artifact brings its own, and that the run will not fit the cap."""
    config = run.config
    brought = [f"{name.upper()}={format_value(getattr(config, name))}" for name in MODEL_SETTINGS if getattr(config, name) != getattr(asked, name)]
    if brought:
        run.log.note(f"the {'checkpoint' if 'export' in config.stage_list else 'artifact'} brings its own {' '.join(brought)}")
    if "export" in config.stage_list and run.world.is_main:
        expected = predict_bytes(model, code_bytes(run.source)).bytes_total
        if expected > config.bytes_cap:
            run.log.note(f"{expected:,} bytes expected, more than BYTES_CAP={config.bytes_cap:,}: the run will end with exit code 3; see --plan")


def run_stages(config: Config, world: World, signals: StopSignals) -> int:
    """Trains, exports, reads the artifact back and scores it, as STAGES says; returns the exit code."""
    stages, source = config.stage_list, Path(__file__).read_text(encoding="utf-8")
    if not config.run_id:
        config = replace(config, run_id=world.from_main(f"{datetime.now():%Y%m%d-%H%M%S}-{config.preset}"))
    asked, (config, checkpoint, artifact) = config, stage_inputs(config)
    if "train" in stages:
        for phase in Schedule(config).phases():
            rows_per_forward(config, phase, world.size)  # refuses a batch that the ranks cannot share
    loader = TrainLoader(config) if "train" in stages or config.is_calibrated else None
    val = load_val(config) if stages != ["export"] else None

    kernels, chosen = choose_fast_forms(config, world)
    torch.manual_seed(config.seed)
    model = GPT(config, compute_dtype(config, world.device), kernels).to(world.device)
    model.init_weights()
    world.copy_from_main([parameter.data for parameter in model.parameters()])  # drawn alike on equal machines, but nothing promises it
    run = open_run(config, world, signals, source, model)
    run.log.note(chosen)
    note_surprises(run, asked, model)
    counts = {"train_shards": len(loader.shards) if loader else None, "val_tokens": len(val.tokens) - 1 if val else None}
    if any(counts.values()):
        run.log.note("  ".join(f"{name}: {count:,}" for name, count in counts.items() if count))
    inputs = len(val.tokens) if val else 0
    scoring = run._replace(config=replace(run.config, val_batch_size=min(config.val_batch_size, inputs)))  # compiled passes are filled up to that
    trained: Trained | None = None
    sizes: dict[str, Any] = {}
    scores: dict[str, Score] = {}
    curvatures: Mapping[str, Curvature] = {}
    try:
        if "train" in stages and loader is not None and val is not None:
            trained = Trainer(run, model, loader, lambda forward, phase: evaluate(scoring, model, forward, val, "chunked", phase)).train()
            curvatures = trained.curvatures
        elif checkpoint is not None:
            load_weights(model, checkpoint["state"]["model"])
            load_grids(model, checkpoint["state"]["grids"])
            if config.is_calibrated and loader is not None:
                loader.state = dict(checkpoint["state"]["loader"])
                curvatures = calibrate(model, Schedule(config).scored_phase, loader, world)
        if "export" in stages:
            sizes = export(run, model, loader if config.is_calibrated else None, curvatures)
            artifact = world.from_main((run.folder / "artifact.bin").read_bytes() if world.is_main else b"")
        if "eval" in stages and val is not None:
            scores = score_artifact(scoring, artifact, val, kernels)
        result = result_event(run, trained, sizes, scores, len(artifact), model)
        run.log.event("result", **result)
        if world.is_main:
            atomic_write(run.folder / "result.json", json.dumps(result, indent=1).encode())
    except Exception as problem:
        run.log.note(f"ended by an error: {str(problem) or type(problem).__name__}")
        raise
    except SystemExit:
        if trained or "train" not in stages:  # training says so itself
            run.log.note(f"stopped; what is finished is kept, and goes on with: python train_gpt.py @{run.folder}/config.env RESUME=1")
        raise
    finally:
        run.log.close()
    return 3 if sizes.get("bytes_total", 0) > config.bytes_cap else 0


def result_event(
    run: Run, trained: Trained | None, sizes: Mapping[str, Any], scores: Mapping[str, Score], artifact_bytes: int, model: GPT
) -> dict[str, Any]:
    """Returns the content of `result.json`; what a run without that stage cannot know is null."""
    config, world = run.config, run.world
    final = scores.get(config.final_eval)
    step_seconds = trained.seconds / trained.steps if trained else None
    model_bytes = sizes.get("bytes_model", artifact_bytes or None)
    code = sizes["bytes_code"] if sizes else code_bytes(run.source)
    return {
        "run_id": config.run_id, "preset": config.preset, "seed": config.seed, "world_size": world.size, "device": world.device.type,
        "torch": torch.__version__, "params": sum(parameter.numel() for parameter in model.parameters()),
        "steps": trained.steps if trained else None, "skipped_steps": trained.skipped if trained else None,
        "train_seconds": trained.seconds if trained else None,
        "eval_seconds": sum(score.seconds for score in scores.values()) if scores else None,
        "step_ms": 1000 * step_seconds if step_seconds else None,
        "tokens_per_second": trained.tokens / trained.seconds if trained and trained.seconds else None,
        "val_loss": final.val_loss if final else None, "val_bpb": final.val_bpb if final else None,
        "pre_quant_val_bpb": trained.score.val_bpb if trained else None,
        "quant_val_bpb": scores["chunked"].val_bpb if scores else None, "adapted_frac": final.adapted_frac if final else None,
        "scores": {
            name: {key: getattr(score, key) for key in ("val_loss", "val_bpb", "seconds", "adapted_frac")} for name, score in scores.items()
        },
        "bytes_model": model_bytes, "bytes_code": code, "bytes_total": model_bytes + code if model_bytes else None, "bytes_cap": config.bytes_cap,
    }


def show(text: str) -> None:
    """Prints `text`; a reader that has seen enough (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str]) -> int:
    """Runs the script with these arguments and returns its exit code."""
    flags = {argument for argument in arguments if argument.startswith("-")}
    unknown = flags - {"--help", "-h", "--plan", "--json"}
    if unknown:
        print(f"unknown option {' '.join(sorted(unknown))}; there are --help, --plan and --json", file=sys.stderr)
        return 2
    if flags & {"--help", "-h"}:
        show(help_text())
        return 0
    if "--json" in flags and "--plan" not in flags:
        print("--json is the form of --plan's answer; use: --plan --json", file=sys.stderr)
        return 2
    try:
        config = parse_config([argument for argument in arguments if argument not in flags], os.environ)
    except ConfigError as error:
        print(f"{error}\n(python train_gpt.py --help lists every setting)", file=sys.stderr)
        return 2
    if "--plan" in flags:
        planned = plan(config, Path(__file__).read_text(encoding="utf-8"), int(os.environ.get("WORLD_SIZE", "8")))
        show(json.dumps(planned, indent=1) if "--json" in flags else plan_text(planned))
        return 0
    signals = StopSignals()
    signals.install()
    rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
    try:
        world = World(config.device)
        code = run_stages(config, world, signals)
        world.close()
        return code
    except (ValueError, OSError) as error:
        print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        code = 1
    except torch.OutOfMemoryError as error:
        smaller = "set MICRO_BATCH_TOKENS, VAL_BATCH_SIZE or TTT_LORA_BATCH_DOCS lower"
        print(f"{rank}error: out of memory: {str(error).splitlines()[0]} What is finished is kept; {smaller}", file=sys.stderr, flush=True)
        code = 1
    except SystemExit as stop:  # a signal
        code = int(stop.code or 0)
    except Exception:
        print(f"{rank}{traceback.format_exc()}", file=sys.stderr, flush=True)
        code = 1
    if "RANK" in os.environ:
        os._exit(code)  # other ranks may wait for this one: leave at once, without the clean-up that would wait for them
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
