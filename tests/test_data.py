"""Data: the shard format, the order of training rows, and the bytes of text that tokens stand for."""

from __future__ import annotations

import json
import lzma
import re
import struct
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import download
import numpy as np
import pytest
import sentencepiece
import shards
import tokenize_docs
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Config, TokenBytes, TrainLoader, load_val, parse_config, read_shard, token_bytes

MAGIC, VERSION = 20240520, 1
CHALLENGE = ROOT.parent / "shared" / "data"


# ---- shards


def shard_bytes(tokens: list[int], magic: int = MAGIC, version: int = VERSION, count: int | None = None) -> bytes:
    """Returns a shard as the challenge describes it, built without numpy; `count` overrides the header's."""
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count)
    return header + bytes(1024 - len(header)) + b"".join(struct.pack("<H", token) for token in tokens)


@pytest.mark.parametrize("tokens", [[7], [0, 1, 255, 256, 65535], list(range(3000, 0, -1))], ids=["one", "extremes", "many"])
def test_writer_and_both_readers_agree_with_the_format_byte_for_byte(tokens: list[int], tmp_path: Path) -> None:
    path = tmp_path / "shard.bin"
    shards.write_shard(path, np.array(tokens))
    assert path.read_bytes() == shard_bytes(tokens)
    for reader in (read_shard, shards.read_shard):
        assert reader(path).dtype == np.uint16
        assert reader(path).tolist() == tokens


# Damage -> the file's content, and what the error must say besides the file's name.
DAMAGED = {
    "empty": (b"", "0 bytes"),
    "cut inside the first number": (shard_bytes([1, 2, 3])[:3], "3 bytes"),
    "cut inside the header": (shard_bytes([1, 2, 3])[:100], "100 bytes"),
    "cut after the header": (shard_bytes([1, 2, 3])[:1024], "1,024 bytes, but its header promises 3 tokens = 1,030 bytes"),
    "cut inside a token": (shard_bytes([1, 2, 3])[:-1], "1,029 bytes, but its header promises 3 tokens = 1,030 bytes"),
    "too long": (shard_bytes([1, 2, 3], count=2), "1,030 bytes, but its header promises 2 tokens = 1,028 bytes"),
    "wrong magic": (shard_bytes([1, 2, 3], magic=20240521), "magic 20240521, version 1 is not a token shard's; expected magic 20240520, version 1"),
    "wrong byte order": (shard_bytes([1, 2], magic=struct.unpack(">i", struct.pack("<i", MAGIC))[0]), "expected magic 20240520, version 1"),
    "wrong version": (shard_bytes([1, 2, 3], version=2), "magic 20240520, version 2 is not a token shard's; expected magic 20240520, version 1"),
    "negative count": (shard_bytes([1, 2, 3], count=-3), "promises -3 tokens"),
    "no tokens": (shard_bytes([]), "0 tokens"),
    "a text file": (b"some text that is not a shard\n" * 100, "not a token shard"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_shard_is_refused_with_its_name_and_what_was_expected(damage: str, tmp_path: Path) -> None:
    content, expected = DAMAGED[damage]
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        read_shard(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("damage", ["too long", "no tokens"])
def test_only_a_shard_that_is_too_short_is_called_truncated(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.bin"
    path.write_bytes(DAMAGED[damage][0])
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_shard(path)
    assert "truncated" not in str(error.value)


# ---- what is missing or does not fit


CASEOPS_REPOSITORY = "romeerp/parameter-golf-caseops-v1"


@pytest.mark.parametrize("preset", ["default", "baseline", "sp8192_ttt", "frontier"])
def test_missing_challenge_data_names_a_download_that_the_tool_understands(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 8192-piece exports lie in other repositories than the 1024-piece one."""
    monkeypatch.chdir(tmp_path)
    config = train_gpt.parse_config([f"PRESET={preset}"], {})
    export = Path(config.data_path).name.removesuffix("_fused")
    for read in (TrainLoader, load_val):
        with pytest.raises(FileNotFoundError, match=r"fineweb10B_sp|fineweb_\d+_bpe") as error:
            read(config)
        fetch, _, then = str(error.value).partition("python data/download.py ")[2].partition(" && ")
        chosen = download.parse_arguments(fetch.split())
        assert f"fineweb10B_{chosen.variant}" == export
        assert then == (f"python data/fuse_markers.py data/datasets/{export}" if preset == "default" else "")
        assert chosen.repo_id == {"baseline": "willdepueoai/parameter-golf", "sp8192_ttt": "kevclark/parameter-golf"}.get(preset, CASEOPS_REPOSITORY)


@pytest.mark.parametrize(
    ("arguments", "source"), [(["PRESET=demo"], "data/sample/shakespeare.jsonl.xz"), (["DATA_PATH=data/datasets/mine", "VOCAB_SIZE=4096"], "YOUR_TEXT.jsonl")]
)
def test_missing_text_data_names_a_conversion_that_the_tool_understands(
    arguments: list[str], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config(arguments, {})
    for read in (TrainLoader, load_val):
        with pytest.raises(FileNotFoundError) as error:
            read(config)
        options = tokenize_docs.parse_arguments(str(error.value).partition("python data/tokenize_docs.py ")[2].split())
        assert (options.input, options.output, options.vocab_size) == ([Path(source)], Path(config.data_path), config.vocab_size)
    assert source == "YOUR_TEXT.jsonl" or (ROOT / source).is_file()


def test_missing_split_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "fineweb_train_000000.bin").write_bytes((corpus / "fineweb_train_000000.bin").read_bytes())
    config = parse_config([f"DATA_PATH={tmp_path}"], {})
    assert [path.name for path in train_gpt.find_shards(config, "train")] == ["fineweb_train_000000.bin"]
    with pytest.raises(FileNotFoundError, match=re.escape(f"DATA_PATH={tmp_path}: no *_val_*.bin there")):
        train_gpt.find_shards(config, "val")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"VOCAB_SIZE": 385}, r"VOCAB_SIZE=385, but TOKENIZER_PATH=.*tokenizer\.model has 384 tokens; set VOCAB_SIZE=384"),
        ({"BOS_ID": 2}, r"BOS_ID=2, but TOKENIZER_PATH=.*tokenizer\.model says 1; set BOS_ID=1"),
    ],
)
def test_tokenizer_that_does_not_fit_the_settings_names_both_numbers(changed: dict[str, int], expected: str, tiny: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match=expected):
        token_bytes(tiny(**changed))


def test_file_that_is_no_tokenizer_is_named(tiny: Callable[..., Config], tmp_path: Path) -> None:
    for content in (b"", b"not a model", bytes(range(256))):
        (tmp_path / "t.model").write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"TOKENIZER_PATH={tmp_path / 't.model'}: not a SentencePiece model")):
            token_bytes(tiny(TOKENIZER_PATH=tmp_path / "t.model"))
    for missing in (tmp_path / "none.model", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"TOKENIZER_PATH={missing}: no such file")):
            token_bytes(tiny(TOKENIZER_PATH=missing))


def test_validation_split_is_its_shards_in_order_and_must_fill_a_window(tiny: Callable[..., Config], tmp_path: Path) -> None:
    for name, tokens in [("b_val_1", [1, 300]), ("a_val_1", [1, 200, 201]), ("a_val_0", [1, 100])]:
        shards.write_shard(tmp_path / f"{name}.bin", np.array(tokens))
    assert load_val(tiny(DATA_PATH=tmp_path, EVAL_SEQ_LEN=6, EVAL_STRIDE=1)).tokens.tolist() == [1, 100, 1, 200, 201, 1, 300]
    with pytest.raises(ValueError, match=re.escape(f"DATA_PATH={tmp_path}: 7 validation tokens do not fill one window of 7")):
        load_val(tiny(DATA_PATH=tmp_path, EVAL_SEQ_LEN=7, EVAL_STRIDE=1))


def test_validation_split_without_any_text_is_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "a_val_0.bin", np.ones(100, dtype=np.uint16))
    with pytest.raises(ValueError, match=re.escape(f"DATA_PATH={tmp_path}: the validation tokens stand for no text")):
        load_val(tiny(DATA_PATH=tmp_path))


def test_validation_token_outside_the_vocabulary_is_named_with_its_shard(tiny: Callable[..., Config], tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "a_val_0.bin", np.full(100, 383))
    shards.write_shard(tmp_path / "a_val_1.bin", np.array([1, 384]))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'a_val_1.bin'}: token 384 is outside VOCAB_SIZE=384")):
        load_val(tiny(DATA_PATH=tmp_path))


# ---- training rows. Token i of the split is the number i, so that a row shows where it was cut.

SHARD_TOKENS = (1000, 20, 333, 640)
SHARD_STARTS = np.cumsum((0, *SHARD_TOKENS))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four train shards (one of them shorter than a row) that hold the numbers from 0 on."""
    folder = tmp_path_factory.mktemp("numbered")
    for index, (first, end) in enumerate(pairwise(SHARD_STARTS)):
        shards.write_shard(folder / f"fineweb_train_{index:06d}.bin", np.arange(first, end))
    return folder


def loader_of(folder: Path, **changed: Any) -> TrainLoader:
    """Returns a loader of rows of 32 tokens."""
    base = {"PRESET": "plain", "DATA_PATH": folder, "VOCAB_SIZE": 2048, "SEED": 1, "TRAIN_SEQ_LEN": 32, "EVAL_STRIDE": 32}
    return TrainLoader(parse_config([f"{name}={value}" for name, value in {**base, **changed}.items()], {}))


def rank_of(rank: int, size: int) -> Any:
    """Returns as much of a World as the loader needs."""
    return SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"))


ALONE = rank_of(0, 1)


def starts_of_pass(loader: TrainLoader) -> list[int]:
    """Returns where the rows of the next pass begin and leaves the loader at its end. A pass is over when the next row belongs to another one."""
    starts: list[int] = []
    while True:
        before = dict(loader.state)
        start = int(loader.next_rows(1, 32, ALONE)[0, 0])
        if starts and loader.state["passes"] > before["passes"]:
            loader.state = before
            return starts
        starts.append(start)


def assert_spans(rows: torch.Tensor, seq_len: int) -> None:
    """Asserts that each row is seq_len + 1 consecutive tokens of one shard."""
    assert rows.dtype == torch.int64
    assert rows.shape[1] == seq_len + 1
    assert torch.equal(rows, rows[:, :1] + torch.arange(seq_len + 1))
    first, last = rows[:, 0].numpy(), rows[:, -1].numpy()
    assert (np.searchsorted(SHARD_STARTS, first, "right") == np.searchsorted(SHARD_STARTS, last, "right")).all()
    assert last.max() < SHARD_STARTS[-1]


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize(("num_rows", "seq_len"), [(1, 32), (7, 32), (4, 2), (3, 333), (5, 639), (2, 999)])
def test_every_row_is_a_span_of_one_shard(shuffle: int, num_rows: int, seq_len: int, numbered: Path) -> None:
    loader = loader_of(numbered, DATA_SHUFFLE=shuffle)
    for _ in range(40):
        rows = loader.next_rows(num_rows, seq_len, ALONE)
        assert len(rows) == num_rows
        assert_spans(rows, seq_len)


def test_shuffled_pass_visits_each_row_once_without_overlap(numbered: Path) -> None:
    loader = loader_of(numbered)
    for _ in range(4):
        starts = np.array(starts_of_pass(loader))
        shard_of = np.searchsorted(SHARD_STARTS, starts, "right") - 1
        assert (np.diff(shard_of) >= 0).all(), "shards come in order"
        for shard in (0, 2, 3):
            mine = starts[shard_of == shard] - SHARD_STARTS[shard]
            assert sorted(mine) == list(range(min(mine), max(mine) + 1, 32)), "rows follow one another"
            assert list(mine) != sorted(mine), "in a random order"
            assert min(mine) < 32, "nothing but the phase is left out before the first row"
            assert max(mine) + 2 * 32 + 1 > SHARD_TOKENS[shard], "no whole row is left out after the last one"


@pytest.mark.parametrize("num_shards", [1, 4])
def test_new_pass_has_another_order_and_another_phase(num_shards: int, numbered: Path, tmp_path: Path) -> None:
    for path in train_gpt.find_shards(parse_config([f"DATA_PATH={numbered}"], {}), "train")[:num_shards]:
        (tmp_path / path.name).symlink_to(path)
    loader = loader_of(tmp_path)
    passes = [[start for start in starts_of_pass(loader) if start < 1000] for _ in range(6)]
    phases = [min(starts) for starts in passes]
    orders = [tuple(np.argsort(starts)[:25]) for starts in passes]
    assert len(set(orders)) == 6
    assert len(set(phases)) >= 4
    assert max(phases) > 1000 % 32, "the phase ranges over a whole row, so that over passes every token is a target"


def test_each_shard_has_its_own_phase(tmp_path: Path) -> None:
    for index in range(6):
        shards.write_shard(tmp_path / f"a_train_{index}.bin", np.arange(256))
    starts = np.array(starts_of_pass(loader_of(tmp_path)))
    assert len(set((starts % 32).tolist())) >= 4


def test_without_shuffle_rows_come_in_order_from_the_first_token(numbered: Path) -> None:
    loader = loader_of(numbered, DATA_SHUFFLE=0)
    expected = [int(first) + i for first, size in zip(SHARD_STARTS, SHARD_TOKENS, strict=False) for i in range(0, size - 32, 32)]
    assert starts_of_pass(loader) == expected
    assert starts_of_pass(loader) == expected


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_get_the_batches_of_one_rank(ranks: int, shuffle: int, numbered: Path) -> None:
    alone, *loaders = (loader_of(numbered, DATA_SHUFFLE=shuffle) for _ in range(1 + ranks))
    for _ in range(12):
        shares = [loader.next_rows(12, 32, rank_of(rank, ranks)) for rank, loader in enumerate(loaders)]
        assert {len(share) for share in shares} == {12 // ranks}
        assert torch.equal(torch.cat(shares), alone.next_rows(12, 32, ALONE))
    assert alone.state["passes"] > 1


@pytest.mark.parametrize("shuffle", [0, 1])
def test_restored_state_continues_exactly(shuffle: int, numbered: Path) -> None:
    loader = loader_of(numbered, DATA_SHUFFLE=shuffle)
    for _ in range(30):
        loader.next_rows(5, 32, ALONE)
        saved = dict(loader.state)
        ahead = [loader.next_rows(5, 32, ALONE) for _ in range(3)]
        fresh = loader_of(numbered, DATA_SHUFFLE=shuffle)
        for resumed in (fresh, loader):
            resumed.state = dict(saved)
            assert all(torch.equal(rows, resumed.next_rows(5, 32, ALONE)) for rows in ahead)
        loader.state = dict(saved)
    assert loader.state["passes"] > 0


def test_row_length_may_change_between_batches(numbered: Path) -> None:
    loader, again = loader_of(numbered), loader_of(numbered)
    for seq_len in (32, 64, 32, 100, 16, 16):
        saved = dict(loader.state)
        rows = loader.next_rows(6, seq_len, ALONE)
        assert_spans(rows, seq_len)
        again.state = saved
        assert torch.equal(rows, again.next_rows(6, seq_len, ALONE)), "a change of length is a function of the state"


def test_another_row_length_goes_on_with_the_next_shard(numbered: Path) -> None:
    loader = loader_of(numbered, DATA_SHUFFLE=0)
    firsts = [loader.next_rows(4, seq_len, ALONE)[:, 0].tolist() for seq_len in (32, 32, 100, 100, 16)]
    assert firsts[:2] == [[0, 32, 64, 96], [128, 160, 192, 224]]
    assert firsts[2:4] == [[1020, 1120, 1220, 1353], [1453, 1553, 1653, 1753]], "the second shard has no row of 100; a batch may span two shards"
    assert firsts[4] == [0, 16, 32, 48] and loader.state["passes"] == 1, "after the last shard comes the first, in a new pass"


@pytest.mark.parametrize("shuffle", [0, 1])
def test_another_row_length_is_a_new_pass_where_there_is_one_shard(shuffle: int, tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "a_train_0.bin", np.arange(1000))
    loader, passes = loader_of(tmp_path, DATA_SHUFFLE=shuffle), []
    for seq_len in (32, 32, 64, 64, 32):
        assert loader.next_rows(4, seq_len, ALONE).shape == (4, seq_len + 1)
        passes.append((loader.state["passes"], loader.state["row"]))
    assert passes == [(0, 4), (0, 8), (1, 4), (1, 8), (2, 4)]


@pytest.mark.parametrize("shuffle", [0, 1])
def test_no_row_length_sees_the_rows_of_a_shard_twice_in_a_pass(shuffle: int, tmp_path: Path) -> None:
    for index in range(6):
        shards.write_shard(tmp_path / f"a_train_{index}.bin", np.arange(300 * index, 300 * (index + 1)))
    loader = loader_of(tmp_path, DATA_SHUFFLE=shuffle)
    rows = [loader.next_rows(count, seq_len, ALONE)[:, :-1].flatten() for count, seq_len in ((5, 32), (7, 64), (10, 16))]
    assert loader.state["passes"] == 0
    seen = torch.cat(rows).tolist()
    assert len(seen) == len(set(seen)) == loader.state["tokens"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_changes_the_row_length_and_counts_tokens_alike(ranks: int, numbered: Path) -> None:
    alone, *loaders = (loader_of(numbered) for _ in range(1 + ranks))
    counted = 0
    for num_rows, seq_len in ((8, 32), (4, 64), (12, 64), (4, 100), (8, 16), (8, 32)) * 3:
        shares = [loader.next_rows(num_rows, seq_len, rank_of(rank, ranks)) for rank, loader in enumerate(loaders)]
        assert torch.equal(torch.cat(shares), alone.next_rows(num_rows, seq_len, ALONE))
        counted += num_rows * seq_len
        assert all(loader.state == alone.state for loader in loaders) and alone.state["tokens"] == counted
    assert alone.state["passes"] > 1


@pytest.mark.parametrize("shuffle", [0, 1])
def test_batch_may_be_larger_than_the_whole_split(shuffle: int, numbered: Path) -> None:
    large, small = loader_of(numbered, DATA_SHUFFLE=shuffle), loader_of(numbered, DATA_SHUFFLE=shuffle)
    rows = large.next_rows(200, 32, ALONE)
    assert_spans(rows, 32)
    assert large.state["passes"] == 3
    assert torch.equal(rows, torch.cat([small.next_rows(1, 32, ALONE) for _ in range(200)])), "the batch size does not change the order of rows"


def test_order_of_rows_is_a_function_of_the_seed(numbered: Path) -> None:
    def first_rows(**changed: Any) -> list[int]:
        return loader_of(numbered, **changed).next_rows(20, 32, ALONE)[:, 0].tolist()

    assert first_rows(SEED=1) == first_rows(SEED=1)
    assert first_rows(SEED=1) != first_rows(SEED=2)
    assert first_rows(SEED=1, DATA_SHUFFLE=0) == first_rows(SEED=2, DATA_SHUFFLE=0)


@pytest.mark.parametrize("shuffle", [0, 1])
def test_shard_of_one_row_is_enough_and_a_shorter_one_is_not(shuffle: int, tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "a_train_0.bin", np.arange(33))
    loader = loader_of(tmp_path, DATA_SHUFFLE=shuffle)
    assert loader.next_rows(3, 32, ALONE).tolist() == [list(range(33))] * 3
    assert loader.state["passes"] == 2, "no pass may go by without a row"
    shards.write_shard(tmp_path / "a_train_0.bin", np.arange(32))
    with pytest.raises(ValueError, match=re.escape(f"DATA_PATH={tmp_path}: the longest train shard has 32 tokens, too short for TRAIN_SEQ_LEN=32")):
        loader_of(tmp_path)


def test_training_token_outside_the_vocabulary_is_named_with_its_shard(tmp_path: Path) -> None:
    for index, token in enumerate((2047, 2048)):
        shards.write_shard(tmp_path / f"a_train_{index}.bin", np.full(65, token))
    loader = loader_of(tmp_path, DATA_SHUFFLE=0)
    assert loader.next_rows(1, 32, ALONE).max() == 2047
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'a_train_1.bin'}: token 2048 is outside VOCAB_SIZE=2048")):
        loader.next_rows(2, 32, ALONE)  # the last row of the good shard and the first of the bad one


# ---- bytes of text

DOCUMENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=20)
SNIPPET = st.sampled_from(
    ["the cat", "  two  spaces  ", "    ", "    \n", "        x", "\n", " ", "\t", "ß", "☕", "😀", "\x00", "", "\u3000", "\r\n", "é", "<s>", "<0x41>", "<unk>"]
)


# Text whose tokenizer has pieces of several spaces, of newlines only, and of spaces before a newline.
INDENTED = ["def f(x):\n    if x:\n        return x  # two  spaces\n" * 3, "the  cat    sat\n\n\n    on   the mat    \n"] * 20


@pytest.fixture(scope="module", params=["words", "spaces"])
def lossless(
    request: pytest.FixtureRequest, corpus: Path, tiny: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> tuple[sentencepiece.SentencePieceProcessor, TokenBytes]:
    """A lossless tokenizer and its byte table: that of the corpus, and one as data/tokenize_docs.py trains them."""
    path, size = corpus / "tokenizer.model", tiny().vocab_size
    if request.param == "spaces":
        path, size = tmp_path_factory.mktemp("tokenizer") / "spaces.model", 320
        path.write_bytes(tokenize_docs.train_tokenizer(INDENTED, size))
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), token_bytes(tiny(TOKENIZER_PATH=path, VOCAB_SIZE=size))


def split_of(model: sentencepiece.SentencePieceProcessor, documents: list[str]) -> np.ndarray:
    """Returns the documents' tokens as a split holds them: each after a BOS."""
    return np.concatenate([np.array([model.bos_id(), *tokens], dtype=np.uint16) for tokens in model.encode(documents)])


@settings(max_examples=150, deadline=None)
@given(documents=st.lists(st.one_of(DOCUMENT, st.lists(SNIPPET, max_size=5).map("".join)), min_size=1, max_size=6))
@example(documents=[""])
@example(documents=["", "", "a", ""])
@example(documents=[" ", "  ", "   ", "\n", " \n ", "\n\n"])
@example(documents=[" leading", "trailing ", "  two  spaces  ", "naïve café ☕", "\x00\x00", "a\x00b"])
@example(documents=["<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0xE2>", "⁇", "\ufeff", "\ufffd", "\uffff"])
def test_bytes_of_targets_sum_to_the_utf8_length_of_the_text(documents: list[str], lossless: tuple[sentencepiece.SentencePieceProcessor, TokenBytes]) -> None:
    model, table = lossless
    counted = table.of_targets(split_of(model, documents))
    assert counted.dtype == np.int64
    assert counted.sum() == sum(len(document.encode()) for document in documents)


def test_bytes_belong_to_their_document_and_bos_has_none(lossless: tuple[sentencepiece.SentencePieceProcessor, TokenBytes]) -> None:
    model, table = lossless
    documents = ["the cat", "", " ", "a dog\n", "☕ é"]
    tokens = split_of(model, documents)
    targets = np.concatenate([[0], table.of_targets(tokens)])
    begins = np.flatnonzero(tokens == model.bos_id())
    assert (targets[begins] == 0).all()
    assert np.add.reduceat(targets, begins).tolist() == [7, 0, 1, 6, 6]


@pytest.mark.parametrize("lossless", ["words"], indirect=True)
def test_bytes_of_each_kind_of_piece(lossless: tuple[sentencepiece.SentencePieceProcessor, TokenBytes]) -> None:
    model, table = lossless
    for text, after_bos, later in [("▁", 0, 1), ("▁the", 3, 4), ("a", 1, 1), ("▁☕", 3, 4), ("<0xE2>", 1, 1), ("<0x00>", 1, 1), ("<s>", 0, 0), ("<unk>", 0, 0)]:
        token = model.piece_to_id(text)
        assert model.id_to_piece(token) == text, f"the corpus tokenizer has no {text}"
        assert table.of_targets(np.array([model.bos_id(), token, token])).tolist() == [after_bos, later], text


def test_a_leading_space_counts_after_an_unknown_token_and_not_after_a_control_token(
    lossless: tuple[sentencepiece.SentencePieceProcessor, TokenBytes],
) -> None:
    model, table = lossless
    the = model.piece_to_id("▁the")
    counted = {previous: int(table.of_targets(np.array([previous, the]))[0]) for previous in (model.pad_id(), model.bos_id(), model.eos_id(), model.unk_id())}
    assert list(counted.values()) == [3, 3, 3, 4]


@pytest.mark.parametrize("lossless", ["spaces"], indirect=True)
def test_every_space_of_a_piece_counts_but_one_at_the_start_of_a_document(lossless: tuple[sentencepiece.SentencePieceProcessor, TokenBytes]) -> None:
    model, table = lossless
    for text, after_bos, later in [("▁▁", 1, 2), ("▁▁▁▁", 3, 4), ("\n\n", 2, 2)]:
        token = model.piece_to_id(text)
        assert model.id_to_piece(token) == text, f"the tokenizer has no {text!r}"
        assert table.of_targets(np.array([model.bos_id(), token, token])).tolist() == [after_bos, later], text


def test_every_piece_counts_the_bytes_that_it_adds_to_decoded_text(lossless: tuple[sentencepiece.SentencePieceProcessor, TokenBytes]) -> None:
    model, table = lossless
    word = model.piece_to_id("▁the")
    spelt = [token for token in range(model.vocab_size()) if not (model.is_control(token) or model.is_unknown(token))]
    spelt = [token for token in spelt if not model.is_byte(token) or int(model.id_to_piece(token)[1:-1], 16) < 128]  # others decode only together
    assert len(spelt) > 150
    for token in spelt:
        first, later = len(model.decode([token]).encode()), len(model.decode([word, token]).encode()) - 3
        assert table.of_targets(np.array([model.bos_id(), token, token])).tolist() == [first, later], model.id_to_piece(token)


def test_validation_bytes_of_the_corpus_are_those_of_its_text(corpus: Path, tiny: Callable[..., Config]) -> None:
    val = load_val(tiny())
    documents = (corpus / "val.txt").read_text(encoding="utf-8").split("\x00")
    assert len(val.target_bytes) == len(val.tokens) - 1
    assert val.target_bytes.sum() == sum(len(document.encode()) for document in documents)


@pytest.mark.skipif(not CHALLENGE.is_dir(), reason="shared/ with the challenge's tokenizers and validation text is not beside the repository")
@pytest.mark.parametrize("size", [1024, 4096, 8192])
def test_challenge_tokenizers_count_the_bytes_of_what_they_decode_to(size: int) -> None:
    path = CHALLENGE / "tokenizers" / f"fineweb_{size}_bpe.model"
    table = token_bytes(parse_config([f"TOKENIZER_PATH={path}", f"VOCAB_SIZE={size}"], {}))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    with lzma.open(CHALLENGE / "fineweb_val_head.jsonl.xz", "rt", encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in islice(file, 200)]
    known = [document for document in documents if model.unk_id() not in model.encode(document)]
    assert len(known) >= 100
    counted = table.of_targets(split_of(model, known))
    assert counted.sum() == sum(len(model.decode(model.encode(document)).encode()) for document in known)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"tokenizer": {"sha256": "0"}}', "own"])
def test_shards_of_another_tokenizer_are_refused_where_their_manifest_says_so(manifest: str, corpus: Path, tiny: Callable[..., Config], tmp_path: Path) -> None:
    """A manifest of another kind says nothing."""
    for path in corpus.glob("*.bin"):
        (tmp_path / path.name).symlink_to(path)
    own = train_gpt.hashlib.sha256((corpus / "tokenizer.model").read_bytes()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": own}}) if manifest == "own" else manifest, encoding="utf-8")
    config = tiny(DATA_PATH=tmp_path)
    if "sha256" in manifest:
        with pytest.raises(ValueError, match=r"TOKENIZER_PATH=.* is not the tokenizer that made these shards, by .*manifest\.json; name that one"):
            load_val(config)
    else:
        assert np.array_equal(load_val(config).target_bytes, load_val(tiny()).target_bytes)
