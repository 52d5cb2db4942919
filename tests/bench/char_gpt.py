"""The demo's opponent: a plain character-level GPT in nanoGPT's documented configuration for a CPU, trained and scored on the demo's own text.

    python tests/bench/char_gpt.py --seconds 300
    python tests/bench/char_gpt.py --iterations 2000

The configuration is documented by https://github.com/karpathy/nanoGPT: the command under "I only have a macbook" in its README, whose flags
replace values of `config/train_shakespeare_char.py`, over the defaults of `train.py` (weight decay, clipping, beta1, no bias). That command runs
2000 iterations. The code is our own. Deviations: `--seconds` ends the cosine when the time ends; the text and its split are our demo's; the score
covers the whole validation text, where nanoGPT estimates it from random batches.

Progress goes to standard error; the last line, on standard output, is one JSON object. Shape letters: B batch, T time, D model, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample" / "shakespeare.jsonl.xz"

NUM_LAYERS = 4
NUM_HEADS = 4
MODEL_DIM = 128
CONTEXT = 64
BATCH = 12
LEARNING_RATE = 1e-3
FINAL_LR_FRAC = 0.1
WARMUP_ITERATIONS = 100
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1
GRAD_CLIP = 1.0
INIT_STD = 0.02

REPORT_SECONDS = 5.0
SLIDING_STRIDE = 16
EVAL_BATCH = 256
# The byte before the first of a text, so that this one has something to be predicted from; nanoGPT's samples start from it too.
START = b"\n"


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Text


class Corpus(NamedTuple):
    """Both parts of the text as character numbers, int64; the validation part starts with `START`, which is context only."""

    train: Tensor
    val: Tensor
    vocab_size: int


def read_documents(path: Path) -> list[bytes]:
    """Returns the UTF-8 bytes of every document of a JSONL file, xz-compressed if its name ends in `.xz`. Raises ValueError for a bad line."""
    documents = []
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8") as file:
        for position, line in enumerate(file, start=1):
            try:
                documents.append(str(json.loads(line)["text"]).encode("utf-8"))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {position}: expected a JSON object with a "text", got {line[:40]!r}') from error
    return documents


def build_corpus(documents: list[bytes], val_docs: int) -> Corpus:
    """Returns the documents joined into two streams, as nanoGPT joins its text; characters are bytes, and the vocabulary is those that occur.

    Raises ValueError where either stream would be shorter than one window.
    """
    val, train = b"".join(documents[:val_docs]), b"".join(documents[val_docs:])
    if min(len(val), len(train)) <= CONTEXT:
        raise ValueError(f"{len(documents)} documents with {val_docs} for validation leave too little text on one side of the split")
    vocabulary = sorted(set(START + val + train))
    index = np.zeros(256, dtype=np.int64)
    index[vocabulary] = np.arange(len(vocabulary))
    train_stream, val_stream = (torch.from_numpy(index[np.frombuffer(text, dtype=np.uint8)]) for text in (train, START + val))
    return Corpus(train_stream, val_stream, len(vocabulary))


def sample_batch(stream: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets (B, T) at random places of `stream`."""
    starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1), generator=generator)
    places = starts + torch.arange(CONTEXT)
    return stream[places], stream[places + 1]


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Model


class Block(nn.Module):
    """GPT-2's pre-norm block without biases: causal attention, then an MLP four times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(MODEL_DIM, bias=False)
        self.qkv = nn.Linear(MODEL_DIM, 3 * MODEL_DIM, bias=False)
        self.attention_out = nn.Linear(MODEL_DIM, MODEL_DIM, bias=False)
        self.mlp_norm = nn.LayerNorm(MODEL_DIM, bias=False)
        self.mlp_in = nn.Linear(MODEL_DIM, 4 * MODEL_DIM, bias=False)
        self.mlp_out = nn.Linear(4 * MODEL_DIM, MODEL_DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)"""
        x = x + self._attend(self.attention_norm(x))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention_out(y.transpose(1, 2).flatten(2))


class CharGPT(nn.Module):
    """GPT-2 with learned positions and the output tied to the token table."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.token_table = nn.Embedding(vocab_size, MODEL_DIM)
        self.position_table = nn.Embedding(CONTEXT, MODEL_DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_LAYERS)))
        self.final_norm = nn.LayerNorm(MODEL_DIM, bias=False)
        # GPT-2's initialisation: what adds to the residual stream starts smaller, by the number of additions.
        residual_std = INIT_STD / math.sqrt(2 * NUM_LAYERS)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=residual_std if name.endswith(("attention_out.weight", "mlp_out.weight")) else INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) → logits (B, T, V)"""
        x = self.token_table(tokens) + self.position_table.weight[: tokens.size(1)]
        return F.linear(self.final_norm(self.blocks(x)), self.token_table.weight)


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Budget:
    """How much training there is and how much is done, in iterations or in seconds, so that one schedule serves both."""

    iterations: int | None = None
    seconds: float | None = None
    done: int = 0
    warmup_spent: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def total(self) -> float:
        return float(self.iterations) if self.iterations is not None else self.seconds or 0.0

    @property
    def spent(self) -> float:
        return float(self.done) if self.iterations is not None else self.elapsed

    @property
    def remaining_seconds(self) -> float:
        return self.elapsed * max(0.0, self.total / self.spent - 1) if self.spent else math.nan

    def lr_scale(self) -> float:
        """Returns the next iteration's multiplier: a linear warm-up of fixed length, then a cosine to `FINAL_LR_FRAC` when the budget ends."""
        if self.done < WARMUP_ITERATIONS:
            self.warmup_spent = self.spent
            return (self.done + 1) / (WARMUP_ITERATIONS + 1)
        progress = min(1.0, (self.spent - self.warmup_spent) / max(self.total - self.warmup_spent, 1e-9))
        return FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: CharGPT) -> torch.optim.AdamW:
    """Returns AdamW that decays matrices and tables but no norm."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def warm_up(model: CharGPT, stream: Tensor) -> None:
    """Pays what only the first pass costs (threads, kernels, memory) before the clock starts; the weights stay as they are."""
    inputs, targets = sample_batch(stream, torch.Generator())
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    model.zero_grad()


def train(model: CharGPT, stream: Tensor, budget: Budget, generator: torch.Generator) -> None:
    """Trains `model` until `budget` is spent, with a line of progress every few seconds."""
    optimizer = build_optimizer(model)
    next_report = 0.0
    while budget.spent < budget.total:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * budget.lr_scale()
        inputs, targets = sample_batch(stream, generator)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        budget.done += 1
        if budget.elapsed >= next_report:
            next_report = budget.elapsed + REPORT_SECONDS
            note(f"iteration {budget.done:6,d}  loss {loss.item():.4f}  {budget.elapsed:6.0f} s  {budget.remaining_seconds:6.0f} s left")


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Evaluation


class Window(NamedTuple):
    """A stretch of the stream that one forward reads, of which only the targets from `first` on are scored."""

    start: int
    length: int
    first: int


def windows(num_targets: int, stride: int) -> Iterator[Window]:
    """Yields windows of at most `CONTEXT` that score every target once, each new one at most `stride` of them.

    With `stride == CONTEXT` they do not overlap, which is nanoGPT's way; a smaller one gives every target at least `CONTEXT - stride + 1`
    characters of context once there are that many.
    """
    scored = min(CONTEXT, num_targets)
    yield Window(0, scored, 0)
    while scored < num_targets:
        end = min(scored + stride, num_targets)
        start = max(0, end - CONTEXT) if stride < CONTEXT else scored
        yield Window(start, end - start, scored - start)
        scored = end


@torch.inference_mode()
def bits_per_byte(model: CharGPT, stream: Tensor, stride: int) -> float:
    """Returns the mean bits of `stream[1:]`, whose characters are bytes, summed in float64."""
    nats, scored, total = torch.zeros((), dtype=torch.float64), 0, len(stream) - 1
    started = reported = time.perf_counter()
    for batch in batches_of_equal_length(windows(total, stride)):
        places = torch.tensor([window.start for window in batch])[:, None] + torch.arange(batch[0].length)
        logits = model(stream[places])
        nll = F.cross_entropy(logits.flatten(0, 1), stream[places + 1].flatten(), reduction="none").view(places.shape)
        counted = torch.arange(batch[0].length) >= torch.tensor([window.first for window in batch])[:, None]
        nats += nll[counted].double().sum()
        scored += int(counted.sum())
        if time.perf_counter() - reported >= REPORT_SECONDS:
            reported = time.perf_counter()
            note(f"scoring, stride {stride:2}  {scored / total:4.0%}  {(reported - started) * (total / scored - 1):6.0f} s left")
    assert scored == total, f"{scored} targets scored, expected {total}"
    return float(nats) / scored / math.log(2)


def batches_of_equal_length(source: Iterator[Window]) -> Iterator[list[Window]]:
    """Yields the windows in order, as batches that need no padding."""
    batch: list[Window] = []
    for window in source:
        if batch and (window.length != batch[0].length or len(batch) == EVAL_BATCH):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Command


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and score nanoGPT's documented CPU configuration on the demo's text.")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, help="training time; evaluation comes on top")
    length.add_argument("--iterations", type=int, help="training iterations (nanoGPT's CPU command: 2000)")
    parser.add_argument("--input", type=Path, default=SAMPLE, help="JSONL with a text per line, plain or .xz (default: the demo's)")
    parser.add_argument("--val-docs", type=int, default=4, help="how many documents at the start are validation (default: 4)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="seed of weights and batches (default: %(default)s, nanoGPT's)")
    options = parser.parse_args()
    for name in ("seconds", "iterations", "val_docs", "threads"):
        if getattr(options, name) is not None and not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected more than 0")
    return options


def main() -> int:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    try:
        corpus = build_corpus(read_documents(options.input), options.val_docs)
    except (OSError, ValueError, lzma.LZMAError, EOFError) as error:
        print(f"char_gpt.py: {error}", file=sys.stderr)
        return 2
    model = CharGPT(corpus.vocab_size)
    params = sum(weight.numel() for weight in model.parameters())
    note(f"{params:,} parameters, {corpus.vocab_size} characters, {len(corpus.train):,} training and {len(corpus.val) - 1:,} validation bytes")
    warm_up(model, corpus.train)
    budget = Budget(options.iterations, options.seconds)
    train(model, corpus.train, budget, torch.Generator().manual_seed(options.seed))
    train_seconds = budget.elapsed
    results = {
        "iterations": budget.done,
        "train_seconds": round(train_seconds, 2),
        "val_bpb_chunked": bits_per_byte(model, corpus.val, CONTEXT),
        "val_bpb_sliding": bits_per_byte(model, corpus.val, SLIDING_STRIDE),
        "params": params,
        "vocab_size": corpus.vocab_size,
        "train_bytes": len(corpus.train),
        "val_bytes": len(corpus.val) - 1,
        "threads": options.threads,
        "seed": options.seed,
        "torch": torch.__version__,
    }
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
