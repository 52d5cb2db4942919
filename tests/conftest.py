"""Shared by all tests: the script as a module, small token data, and how to run the script as a user would."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # of every process that a test starts, too: threads beyond the cores, which tests side by side fill, wait for each other

import numpy as np
import pytest
import sentencepiece
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "data", ROOT / "records"):
    sys.path.insert(0, str(folder))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels run on the CPU; it is read when they are defined

import forked  # noqa: E402
import shards  # noqa: E402

import train_gpt  # noqa: E402

# What the script itself takes of BYTES_CAP: caps of tiny runs are given beyond it.
CODE_BYTES = train_gpt.code_bytes((ROOT / "train_gpt.py").read_text(encoding="utf-8"))

SENTENCES = ["the cat sat on the mat", "a dog, a log\nand a frog", "Größe und Maß: 12 %", "naïve café ☕", "  two  spaces  ", "to be or not to be"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Takes back what a test before has set for its whole process: a `World` on the CPU lets it round denormal numbers to zero."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a lossless tokenizer of 384 pieces, two train shards and one val shard: many short documents."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(SENTENCES, size=rng.integers(1, 12))) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=384, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = [np.array([1, *model.encode(document)], dtype=np.uint16) for document in documents]
    shards.write_shard(folder / "fineweb_train_000000.bin", np.concatenate(tokens[:200]))
    shards.write_shard(folder / "fineweb_train_000001.bin", np.concatenate(tokens[200:360]))
    shards.write_shard(folder / "fineweb_val_000000.bin", np.concatenate(tokens[360:]))
    (folder / "val.txt").write_text("\x00".join(documents[360:]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> Callable[..., train_gpt.Config]:
    """A function from settings to a tiny configuration on the corpus: tiny(NUM_LAYERS=2)."""
    vocab = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model")).vocab_size()

    def make(**settings: Any) -> train_gpt.Config:
        return train_gpt.parse_config(tiny_arguments(corpus, vocab, **settings), {})

    return make


def tiny_arguments(corpus: Path, vocab: int, **settings: Any) -> list[str]:
    """Arguments of a run that takes a second on a CPU; `settings` are laid over it."""
    base = {
        "PRESET": "baseline", "SCALE": "tiny", "DEVICE": "cpu", "DATA_PATH": corpus, "TOKENIZER_PATH": corpus / "tokenizer.model", "VOCAB_SIZE": vocab,
        "DOC_MASK": 1, "DATA_SHUFFLE": 1, "MATRIX_INIT": "orthogonal", "MUON_COEFFICIENTS": "polar_express", "MLP_MULT": 3, "TIED_EMBED_LR": 0.03,
        "WARMDOWN_FRAC": 0.9, "QAT_START_FRAC": 0.8, "FINAL_EVAL": "sliding",
        "NUM_LAYERS": 3, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "TRAIN_SEQ_LEN": 32, "TRAIN_BATCH_TOKENS": 256,
        "MICRO_BATCH_TOKENS": 256, "VAL_BATCH_SIZE": 2048, "EVAL_STRIDE": 16, "ITERATIONS": 8, "TRAIN_LOG_EVERY": 1, "CHECKPOINT_EVERY": 0,
    }  # fmt: skip
    return [f"{name}={value}" for name, value in {**base, **settings}.items()]


def small_config(**settings: Any) -> train_gpt.Config:
    """A valid configuration of a model of a few thousand weights that needs no files: small_config(num_layers=2)."""
    base = {
        "vocab_size": 24, "num_layers": 4, "model_dim": 16, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 2, "logit_softcap": 5.0,
        "train_seq_len": 16, "train_batch_tokens": 64, "micro_batch_tokens": 64, "eval_stride": 8, "compile": False, "device": "cpu",
        "quant_scheme": "rowmax", "coder": "zlib",
    }  # fmt: skip
    config = train_gpt.Config(**{**base, **settings})
    assert train_gpt.validate(config) == []
    return config


def lively_model(config: train_gpt.Config, dtype: torch.dtype = torch.float64, seed: int = 0) -> train_gpt.GPT:
    """A model whose every parameter is random and matters: fresh weights would hide most of it behind zero output projections."""
    torch.manual_seed(seed)
    model = train_gpt.GPT(config, dtype)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.to(dtype)


@pytest.fixture(scope="session")
def run_script(corpus: Path, tiny: Callable[..., train_gpt.Config]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the script as a user would: run_script(tmp_path, ranks=2, RUN_ID="a"); its runs go to tmp_path/runs."""
    vocab = tiny().vocab_size

    def run(folder: Path, *flags: str, ranks: int = 1, script: Path = ROOT / "train_gpt.py", **settings: Any) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        arguments = tiny_arguments(corpus, vocab, **{"RUNS_DIR": folder / "runs", "RUN_ID": "run", **settings})
        environment = {name: value for name, value in os.environ.items() if name not in train_gpt.SETTINGS}
        return subprocess.run([*launcher, str(script), *arguments, *flags], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    return run


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of the script or a launcher, for scripts that a test runs."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return {name: value for name, value in os.environ.items() if name not in (*train_gpt.SETTINGS, *launcher)}


class Ended(NamedTuple):
    """How a run inside this process ended."""

    code: int
    output: str
    errors: str


@pytest.fixture(scope="session")
def run_here(corpus: Path, tiny: Callable[..., train_gpt.Config]) -> Callable[..., Ended]:
    """A function that calls `main` in this process, where a test can patch it: run_here(tmp_path, RUN_ID="a"); its runs go to tmp_path/runs."""
    vocab = tiny().vocab_size
    pack = functools.cache(train_gpt.pack_script)  # half the time of a tiny run, and always the same

    def run(folder: Path, *flags: str, bare: bool = False, **settings: Any) -> Ended:
        """With `bare`, `flags` are all the arguments."""
        arguments = [] if bare else tiny_arguments(corpus, vocab, **{"RUNS_DIR": folder / "runs", "RUN_ID": "run", **settings})
        output, errors = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        patches = mock.patch.dict(os.environ, clean_environment(), clear=True), mock.patch.object(train_gpt, "pack_script", pack)
        try:
            with patches[0], patches[1], contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                try:
                    code = train_gpt.main([*arguments, *flags])
                except SystemExit as stop:
                    code = int(stop.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Ended(code, output.getvalue(), errors.getvalue())

    return run


@pytest.fixture(scope="session")
def launch(corpus: Path, tiny: Callable[..., train_gpt.Config]) -> Callable[..., forked.Ranks]:
    """A function that starts the script in processes of its own and does not wait: launch(tmp_path, ranks=2, RUN_ID="a").finish()."""
    vocab = tiny().vocab_size

    def start(folder: Path, *flags: str, ranks: int = 1, script: Path = ROOT / "train_gpt.py", **settings: Any) -> forked.Ranks:
        arguments = tiny_arguments(corpus, vocab, **{"RUNS_DIR": folder / "runs", "RUN_ID": "run", **settings})
        return forked.start(script, [*arguments, *flags], clean_environment(), folder, ranks)

    return start


class Finished(NamedTuple):
    """A run that went through every stage."""

    folder: Path  # the run folder
    scores: Path  # its SCORES_FILE
    output: str  # what it printed

    def result(self) -> dict[str, Any]:
        """Returns result.json."""
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Returns the events of run.jsonl, of these kinds if any are given."""
        events = [json.loads(line) for line in (self.folder / "run.jsonl").read_text(encoding="utf-8").splitlines()]
        return [event for event in events if not kinds or event["event"] in kinds]

    def checkpoint(self) -> dict[str, Any]:
        """Returns checkpoint.pt."""
        return train_gpt.read_checkpoint(self.folder / "checkpoint.pt")


# The run that others are compared with. CHECKPOINT_EVERY, VAL_LOSS_EVERY and SCORES_FILE do not reach its weights. A micro-batch is half a batch,
# so that two ranks add up what one rank adds up, in the same order.
REFERENCE = {"ITERATIONS": 12, "VAL_LOSS_EVERY": 5, "MICRO_BATCH_TOKENS": 128}


@pytest.fixture(scope="session")
def reference(run_here: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run with the settings REFERENCE on one process."""
    place = tmp_path_factory.mktemp("reference")
    ended = run_here(place, **REFERENCE, SCORES_FILE=place / "scores.npy")
    assert ended.code == 0, ended.errors
    return Finished(place / "runs" / "run", place / "scores.npy", ended.output)


@pytest.fixture(scope="session")
def two_ranks(launch: Callable[..., forked.Ranks], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same run on two ranks, by the packed script."""
    place = tmp_path_factory.mktemp("two_ranks")
    packed = place / "packed.py"
    packed.write_bytes(train_gpt.pack_script((ROOT / "train_gpt.py").read_text(encoding="utf-8")))
    outcome = launch(place, ranks=2, script=packed, **REFERENCE, SCORES_FILE=place / "scores.npy").finish()
    assert outcome.codes == [0, 0], outcome.output
    return Finished(place / "runs" / "run", place / "scores.npy", outcome.output)
