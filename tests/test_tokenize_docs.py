"""Documents to tokenizer and shards: losslessness, formats, splits, independence of workers, and every refusal."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

import shards
import tokenize_docs

import train_gpt

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
SAMPLE = ROOT / "data" / "sample" / "shakespeare.jsonl.xz"
BOS = 1
WHITE_SPACE = ["", " ", "  two", " one", "tail ", "\n", "\n\n x", "\t", "a\tb\t", "\r\n", "a\r\nb"]
AWKWARD = [*WHITE_SPACE, "\0", "a\0b", "<s></s>", "<0x41>", "\ufeffx", "ﬁ ½ é 😀", "\u2585"]
ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\r\0\u2581<s>0the")), max_size=60)


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    with lzma.open(SAMPLE) as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(tokenize_docs.train_tokenizer(tokenize_docs.cut_sentences(sample_texts[4] + sample_texts[8]), 400))
    return path


def train_other(path: Path, text: str, **options: Any) -> Path:
    """A SentencePiece model that differs from ours by `options`, written to `path`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text]), model_writer=model, model_type="bpe", max_sentence_length=1 << 20, minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return path


def jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tokenize(output: Path, inputs: Sequence[Path], *options: object) -> dict[str, Any]:
    """Runs the tool in this process, which must succeed, and returns the manifest."""
    files = [str(path) for path in inputs]
    assert tokenize_docs.main(["--input", *files, "--output", str(output), "--workers", "1", *map(str, options)]) == 0
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return manifest


def read_tokens(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([shards.read_shard(path) for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))])


def read_texts(folder: Path, split: str) -> list[str]:
    """The texts that the tokens of `split` spell, by the tokenizer beside them."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = read_tokens(folder, split)
    assert tokens[0] == BOS
    return [processor.decode(document[1:].tolist()) for document in np.split(tokens, np.flatnonzero(tokens == BOS)[1:])]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the bundled sample and the challenge's tokens


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the script made of the sample with two workers, and what it printed."""
    folder = tmp_path_factory.mktemp("sample")
    command = [sys.executable, str(ROOT / "data" / "tokenize_docs.py"), "--input", str(SAMPLE), "--output", "out", "--vocab-size", "1024"]
    done = subprocess.run([*command, "--workers", "2"], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


@pytest.fixture(scope="session")
def sample_output(sample_run: tuple[Path, str]) -> Path:
    return sample_run[0]


def test_sample_round_trips_with_its_default_split(sample_output: Path, sample_texts: list[str]) -> None:
    assert read_texts(sample_output, "val") == sample_texts[:4]
    assert read_texts(sample_output, "train") == sample_texts[4:]
    splits = json.loads((sample_output / "manifest.json").read_text())["splits"]
    for split, texts in (("val", sample_texts[:4]), ("train", sample_texts[4:])):
        size = sum(len(text.encode()) for text in texts)
        expected = {"documents": len(texts), "bytes": size, "decoded_bytes": size, "lossy_documents": 0, "unknown_tokens": 0}
        assert splits[split].items() >= expected.items()


def test_sample_tokenizer_has_pieces_with_newlines_and_without_a_control_token_in_text(sample_output: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sample_output / "tokenizer.model"))
    pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
    assert {".\n", ",\n", "\n\n", "▁▁"} <= set(pieces)
    assert [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()] == [0, 1, 2, 3]
    assert not any(re.search(r"\d.*\d", piece) for piece in pieces if not piece.startswith("<0x"))
    assert not set(processor.encode("<s> </s> <unk> <pad>")) & {0, 1, 2, 3}


def test_sample_report_says_what_was_made(sample_run: tuple[Path, str]) -> None:
    table, counts = r"split +documents +tokens +bytes +bytes/token +shards\n", r" +[\d,]+ +[\d,]+ +2\.\d{4} +1\n"
    expected = rf"{table}val +4{counts}train +38{counts}all 42 documents round-trip\nwrote out in [\d.]+ s \([\d.]+ MB/s\)\n"
    assert re.fullmatch(expected, sample_run[1])


def test_challenge_tokens_are_reproduced(tmp_path: Path) -> None:
    documents, model = SHARED / "fineweb_val_head.jsonl.xz", SHARED / "tokenizers" / "fineweb_1024_bpe.model"
    if not documents.exists() or not model.exists():
        pytest.skip("needs the challenge's validation documents and tokenizer in ../shared/data, which are not part of the project")
    output = tmp_path / "out"
    manifest = tokenize(output, [documents], "--tokenizer", model, "--val-docs", "all")
    tokens = read_tokens(output, "val")
    assert list(manifest["splits"]) == ["val"]
    assert (tokens.size, int((tokens == BOS).sum())) == (1_040_298, 902)
    payload = (output / "fineweb_val_000000.bin").read_bytes()[shards.HEADER_BYTES :]
    assert tokenize_docs.hashlib.sha256(payload).hexdigest() == "3fad60f7e717550f18ba7aa3a9f1d0cb14ded3e3823714488ecb1e2a7f6630df"
    assert (output / "tokenizer.model").read_bytes() == model.read_bytes()


# ---- bytes


@pytest.mark.parametrize("vocab_size", [256, 260])
def test_a_vocabulary_of_bytes_is_that_of_the_published_byte_export(vocab_size: int, tmp_path: Path) -> None:
    texts = [*AWKWARD, "a\u2581b"]
    manifest = tokenize(tmp_path / "out", [jsonl(tmp_path / "a.jsonl", texts)], "--vocab-size", vocab_size, "--val-docs", "all")
    expected = [token for text in texts for token in (BOS, *(4 + byte for byte in text.encode()))]
    assert read_tokens(tmp_path / "out", "val").tolist() == expected
    assert manifest["splits"]["val"]["lossy_documents"] == 0
    config = train_gpt.Config(data_path=str(tmp_path / "out"), tokenizer_path=str(tmp_path / "out" / "tokenizer.model"), vocab_size=260, train_seq_len=32)
    assert train_gpt.load_val(config).target_bytes.sum() == sum(len(text.encode()) for text in texts)


@settings(max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_its_bytes(text: str) -> None:
    tokenizer = tokenize_docs.load_tokenizer(tokenize_docs.byte_tokenizer(), "")
    assert tokenizer.encode(text) == [4 + byte for byte in text.encode()]
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- losslessness


def test_awkward_documents_round_trip(tmp_path: Path, tokenizer: Path) -> None:
    manifest = tokenize(tmp_path / "out", [jsonl(tmp_path / "a.jsonl", AWKWARD)], "--tokenizer", tokenizer, "--val-docs", 1)
    assert read_texts(tmp_path / "out", "val") + read_texts(tmp_path / "out", "train") == AWKWARD
    assert read_tokens(tmp_path / "out", "val").tolist() == [BOS], "an empty document is a lone BOS"
    assert manifest["splits"]["train"]["lossy_documents"] == 0


def test_a_literal_space_mark_is_counted_as_lost(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tokenize(tmp_path / "out", [jsonl(tmp_path / "a.jsonl", ["ok", "a\u2581b", "ok"])], "--tokenizer", tokenizer, "--val-docs", 1)
    assert read_texts(tmp_path / "out", "train") == ["a b", "ok"]
    expected = {"documents": 2, "bytes": 7, "decoded_bytes": 5, "lossy_documents": 1, "unknown_tokens": 0}
    assert manifest["splits"]["train"].items() >= expected.items()
    assert "1 of 3 documents do not round-trip: the tokens spell 7 of 9 bytes, with 0 unknown tokens" in capsys.readouterr().out


def test_what_normalisation_and_unknown_tokens_lose_is_counted(tmp_path: Path, sample_texts: list[str]) -> None:
    model = train_other(tmp_path / "nfkc.model", sample_texts[4], vocab_size=200, bos_id=1, eos_id=2, unk_id=3, pad_id=0)
    texts = ["the urn", "the  urn", "the ﬁre", "the 語 urn"]  # kept, a space collapsed, a ligature split (3 bytes to 2), no piece (3 bytes)
    manifest = tokenize(tmp_path / "out", [jsonl(tmp_path / "a.jsonl", texts)], "--tokenizer", model, "--val-docs", "all")
    totals = manifest["splits"]["val"]
    assert (totals["lossy_documents"], totals["unknown_tokens"]) == (3, 1)
    assert totals["bytes"] - totals["decoded_bytes"] == 1 + 1 + 3


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=2))
def test_any_text_round_trips_or_is_counted(texts: list[str], tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> None:
    folder = tmp_path_factory.mktemp("property")
    manifest = tokenize(folder / "out", [jsonl(folder / "a.jsonl", texts)], "--tokenizer", tokenizer, "--val-docs", 1)
    spelt = read_texts(folder / "out", "val") + read_texts(folder / "out", "train")
    assert spelt == [text.replace("\u2581", " ") for text in texts]
    lossy = sum(split["lossy_documents"] for split in manifest["splits"].values())
    assert lossy == sum("\u2581" in text for text in texts)


# ---- tokenizer training


@given(text=st.text(st.sampled_from("ab \n\0é"), max_size=80), limit=st.integers(1, 9))
def test_cut_sentences_keep_all_text_below_the_limit(text: str, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_docs, "SENTENCE_CHARS", limit)
        pieces = list(tokenize_docs.cut_sentences(text))
    assert "".join(pieces) == text.replace("\0", "")
    assert all(0 < len(piece) <= limit for piece in pieces)
    for piece, following in itertools.pairwise(pieces):
        assert piece.endswith("\n") or "\n" not in piece, "cut at the last newline that fits"
        assert piece.endswith("\n") or following.startswith(" ") or " " not in piece[1:], "else before the last space"


@pytest.mark.parametrize(("filler", "lost"), [("\n", ""), (" ", ""), ("", ""), (" ", "\0"), (" ", "\u2585")])
def test_long_and_marked_texts_still_train(filler: str, lost: str) -> None:
    text = lost + filler.join(["quux"] * 30_000)  # SentencePiece alone drops it silently
    processor = tokenize_docs.load_tokenizer(tokenize_docs.train_tokenizer(tokenize_docs.cut_sentences(text), 266), "")
    assert any("qu" in processor.id_to_piece(token) or "ux" in processor.id_to_piece(token) for token in range(260, 266))


def test_a_tokenizer_as_in_the_challenge_normalises_and_ours_keeps_every_character(sample_texts: list[str]) -> None:
    pieces = list(tokenize_docs.cut_sentences(sample_texts[4]))
    ours, theirs = (tokenize_docs.load_tokenizer(tokenize_docs.train_tokenizer(pieces, 400, as_in_challenge=lossy), "") for lossy in (False, True))
    text = "  speak \u2160\n\n  \ufb01rst"
    assert ours.decode(ours.encode(text)) == text
    assert theirs.decode(theirs.encode(text)) == "speak I first"


@pytest.mark.parametrize("others", [["--caseops"], ["--vocab-size", 260], ["--tokenizer", "a.model"]])
def test_the_challenges_options_are_refused_where_they_cannot_hold(others: list[object]) -> None:
    with pytest.raises(tokenize_docs.InputError, match="--as-in-challenge"):
        tokenize_docs.parse_arguments(["--input", "a", "--output", "b", "--as-in-challenge", *map(str, others)])


def test_tokenizer_never_sees_validation_documents(tmp_path: Path, sample_texts: list[str]) -> None:
    training = sample_texts[4:6]
    for name, held_out in (("a", "zyx " * 5000), ("b", "qqq")):
        tokenize(tmp_path / name, [jsonl(tmp_path / f"{name}.jsonl", [held_out, *training])], "--vocab-size", 350, "--val-docs", 1)
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (tmp_path / "b" / "tokenizer.model").read_bytes()
    tokenize(tmp_path / "c", [jsonl(tmp_path / "c.jsonl", ["qqq", *training[::-1]])], "--vocab-size", 350, "--val-docs", 2)
    assert (tmp_path / "c" / "tokenizer.model").read_bytes() != (tmp_path / "a" / "tokenizer.model").read_bytes()


def test_training_sample_ends_with_the_document_that_reaches_its_size() -> None:
    reads = iter(["ééé", "bb", "never read"])
    sample = tokenize_docs.sample_documents(reads, 7)
    assert sample == (["ééé", "bb"], 2, 8)
    assert next(reads) == "never read"


# ---- formats and order


def zstd_frames(content: bytes) -> bytes:
    half = len(content) // 2
    return zstandard.compress(content[:half]) + zstandard.compress(content[half:])


FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".frames.zst": zstd_frames,
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats_and_file_order(suffix: str, tmp_path: Path, tokenizer: Path) -> None:
    lines = b'{"text": "one\\r\\n"}\n\n  \n{"id": 2, "text": "tw\xc3\xb6"}'  # blank lines and a last line without a newline
    suffix_of_json = f".jsonl{suffix}" if suffix != ".frames.zst" else ".jsonl.zst"
    plain = "three\r\nlines\n\nünd"
    second = tmp_path / f"a{suffix_of_json}"
    second.write_bytes(FORMATS[suffix](lines))
    first = tmp_path / f"b.txt{suffix.removeprefix('.frames')}"
    first.write_bytes(FORMATS[suffix](plain.encode()))
    tokenize(tmp_path / "out", [first, second], "--tokenizer", tokenizer, "--val-docs", 1)
    assert read_texts(tmp_path / "out", "val") == [plain]
    assert read_texts(tmp_path / "out", "train") == ["one\r\n", "twö"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_compressed_files_are_refused(suffix: str, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = b'{"text": "some text"}\n'
    whole = FORMATS[suffix](line * 1000)
    for name, content in (("truncated", whole[:-6]), ("foreign", line)):
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.write_bytes(content)
        assert tokenize_docs.main(["--input", str(path), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]) == 2
        assert f"{path}: cannot be decompressed as {suffix}" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


# ---- splits, shards, workers


@pytest.mark.parametrize(
    ("documents", "wanted", "expected"), [(2, None, 1), (19, None, 1), (20, None, 2), (70, None, 5), (6, "5", 5), (6, "all", None)]
)
def test_number_of_held_out_documents(
    documents: int, wanted: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_docs, "MAX_DEFAULT_VAL_DOCS", 5)
    corpus = tokenize_docs.Corpus([jsonl(tmp_path / "a.jsonl", ["x"] * documents)])
    assert tokenize_docs.count_val_documents(corpus, wanted) == expected


@pytest.mark.parametrize("shard_tokens", [1, 7, 50, 10_000])
def test_shards_cut_the_stream_at_their_size(shard_tokens: int, tmp_path: Path, tokenizer: Path) -> None:
    texts = ["a rose by any other name"] * 9 + ["", "exeunt"]
    source = jsonl(tmp_path / "a.jsonl", texts)
    manifest = tokenize(tmp_path / "out", [source], "--tokenizer", tokenizer, "--val-docs", 2, "--shard-tokens", shard_tokens)
    for split, expected in (("val", texts[:2]), ("train", texts[2:])):
        entry = manifest["splits"][split]
        assert [shard["file"] for shard in entry["shards"]] == [f"fineweb_{split}_{number:06d}.bin" for number in range(len(entry["shards"]))]
        sizes = [shards.check_shard(tmp_path / "out" / shard["file"]) for shard in entry["shards"]]
        assert sizes == [shard["tokens"] for shard in entry["shards"]]
        assert sum(sizes) == entry["tokens"]
        assert all(size == shard_tokens for size in sizes[:-1])
        assert 0 < sizes[-1] <= shard_tokens
        assert all(shard["sha256"] == tokenize_docs.file_sha256(tmp_path / "out" / shard["file"]) for shard in entry["shards"])
        assert read_texts(tmp_path / "out", split) == expected


def test_batches_do_not_change_the_output(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", [f"document {number} " * number for number in range(40)])
    tokenize(tmp_path / "large", [source], "--tokenizer", tokenizer)
    monkeypatch.setattr(tokenize_docs, "BATCH_CHARS", 100)
    tokenize(tmp_path / "small", [source], "--tokenizer", tokenizer)
    tokenize(tmp_path / "spread", [source], "--tokenizer", tokenizer, "--workers", 2)
    assert contents(tmp_path / "large") == contents(tmp_path / "small") == contents(tmp_path / "spread")


def test_batches_are_bounded_in_characters_and_in_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_docs, "BATCH_CHARS", 4)
    assert list(tokenize_docs.batch_documents(["abcdef", "a", "b", "", "", "", "", "c"])) == [["abcdef"], ["a", "b"], ["", "", "", ""], ["c"]]


def batch_of(text: str) -> tokenize_docs.Batch:
    return tokenize_docs.Batch("train", [text], tokenize_docs.START, tokenize_docs.START)


def test_reading_stays_a_bounded_way_ahead(tokenizer: Path) -> None:
    taken = itertools.count()

    def work() -> Iterator[tokenize_docs.Batch]:
        for _ in range(100):
            yield batch_of(f"document {next(taken)}")

    encoded = tokenize_docs.encode_in_order(work(), tokenizer.read_bytes(), workers=2)
    next(encoded)
    assert next(taken) <= 2 * tokenize_docs.BATCHES_PER_WORKER
    encoded.close()  # type: ignore[attr-defined]


def test_a_dead_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(tokenize_docs.InputError, match="fewer --workers"):
        list(tokenize_docs.encode_in_order([batch_of("text")], b"a model that no worker can load", workers=2))


def test_workers_end_when_the_tool_is_killed(tokenizer: Path) -> None:
    program = f"""
import itertools, pathlib, sys, tokenize_docs
work = itertools.repeat(tokenize_docs.Batch("train", ["text"], tokenize_docs.START, tokenize_docs.START))
for _ in tokenize_docs.encode_in_order(work, pathlib.Path({str(tokenizer)!r}).read_bytes(), workers=2):
    print("encoded", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT / "data", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"encoded\n"
    process.kill()
    process.communicate(timeout=30)  # the workers hold the pipe open, so this returns when the last of them has ended


def peak_memory(source: Path, output: Path) -> int:
    """The kilobytes of memory that the tool needed at most, with one worker, in a process of its own."""
    program = "import sys, tokenize_docs; assert tokenize_docs.main(sys.argv[1:]) == 0; print(open('/proc/self/status').read())"
    options = ["--input", str(source), "--output", str(output), "--vocab-size", "260", "--shard-tokens", "500000", "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", program, *options], cwd=ROOT / "data", capture_output=True, text=True, check=True)
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert found
    return int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (2, 12):
        source = jsonl(tmp_path / f"{megabytes}.jsonl", ["a line of some text\n" * 500] * (100 * megabytes))
        peaks.append(peak_memory(source, tmp_path / f"out{megabytes}"))
    assert peaks[1] - peaks[0] < 4000, f"10 MB more of text must not be held: {peaks}"


def test_progress_without_a_terminal_is_plain_lines(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenize_docs, "PLAIN_REPORT_SECONDS", 0.0)
    tokenize(tmp_path / "out", [jsonl(tmp_path / "a.jsonl", ["one", "two"])], "--tokenizer", tokenizer)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"tokenising  100%  0\.0 MB  [\d.]+ MB/s  0:00 left", lines[-1])


# ---- refusals: one line, exit code 2, nothing left behind


def refuse(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """Runs the tool, which must refuse and leave `folder` as it was, and returns its message."""
    before = sorted(folder.rglob("*"))
    code = tokenize_docs.main(["--workers", "1", *map(str, arguments)])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("training a tokenizer", "going on after"))]
    assert (code, len(lines)) == (2, 1), lines
    assert sorted(folder.rglob("*")) == before
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"title": "b"}\n', '{path}:2: expected an object with a string field "text"'),
        (b'{"text": "a"}\n{"text": 5}\n', '{path}:2: expected an object with a string field "text"'),
        (b'{"text": "a"}\n["b"]\n', '{path}:2: expected an object with a string field "text"'),
        (b'{"text": "a"}\n\n{"text": \n', "{path}:3: not valid JSON (Expecting value"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "{path}:2: not valid UTF-8 (byte 0xff at offset 10"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "{path}:2: the text holds half a surrogate pair ('\\ud800')"),
        (b"", "no documents in {path}"),
        (b'{"text": "a"}\n', "--val-docs 1 leaves no document to train on: the input holds 1"),
    ],
)
def test_bad_documents_are_refused(content: bytes, message: str, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    said = refuse(capsys, tmp_path, "--input", path, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert said.startswith(message.format(path=path))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_loses_no_finished_shard(
    workers: int, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_docs, "BATCH_CHARS", 1)
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"text": "good"}\n' * 30 + "bad\n")
    options = ["--tokenizer", str(tokenizer), "--val-docs", "1", "--shard-tokens", "5"]
    arguments = ["--input", str(path), "--output", str(output), *options, "--workers", str(workers)]
    assert tokenize_docs.main(arguments) == 2
    said = capsys.readouterr().err
    assert f"error: {path}:31: not valid JSON" in said and f"; the finished shards are kept in {output}.partial, and the same command goes on" in said
    assert not output.exists()
    jsonl(path, ["good"] * 30 + ["mended"])
    assert tokenize_docs.main(arguments) == 0
    assert re.search(r"going on after \d+ documents, which are in finished shards", capsys.readouterr().err)
    tokenize(tmp_path / "fresh", [path], *options)
    assert contents(output) == contents(tmp_path / "fresh") and not (tmp_path / "out.partial").exists()


def test_plain_text_must_be_utf8_and_empty_input_is_refused(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latin, nothing = tmp_path / "latin.txt", tmp_path / "nothing.jsonl"
    latin.write_bytes(b"caf\xe9")
    nothing.write_bytes(b"\n")
    options = ("--output", tmp_path / "out", "--tokenizer", tokenizer, "--val-docs", "all")
    assert f"{latin}: not valid UTF-8 (byte 0xe9 at offset 3" in refuse(capsys, tmp_path, "--input", latin, *options)
    assert f"no documents in {nothing}" in refuse(capsys, tmp_path, "--input", nothing, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "9000"], "--vocab-size 9000 is more than the training documents support; use at most "),
        (["--vocab-size", "261"], "--vocab-size 261 is too small; the 256 bytes, 4 control tokens and the text's characters need "),
        (["--vocab-size", "65537"], "--vocab-size 65537 does not fit the shards' uint16"),
        (["--vocab-size", "0"], "argument --vocab-size: expected an integer from 1, got '0'"),
        (["--shard-tokens", "x"], "argument --shard-tokens: expected an integer from 1, got 'x'"),
        (["--val-docs", "0"], '--val-docs=0: expected a number of documents from 1, or "all"'),
        (["--val-docs", "-1"], '--val-docs=-1: expected a number of documents from 1, or "all"'),
        (["--val-docs", "3"], "--val-docs 3 leaves no document to train on: the input holds 3"),
        (["--vocab-size", "256", "--caseops"], "--vocab-size 256 is a vocabulary of bytes, which have no case markers"),
        (["--val-docs", "all"], "--val-docs all leaves no document to train a tokenizer on"),
        (["--tokenizer", "missing.model"], "missing.model: No such file or directory"),
        (["--tokenizer", "a", "--vocab-size", "300"], "argument --vocab-size: not allowed with argument --tokenizer"),
        (["--vocabulary", "300"], "unrecognized arguments: --vocabulary 300"),
        (["--input", "missing.jsonl"], "missing.jsonl: no such file"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, tmp_path: Path, sample_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "a.jsonl", sample_texts[4:5] * 3)
    assert refuse(capsys, tmp_path, "--input", source, "--output", tmp_path / "out", *options).startswith(message)


def test_training_on_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["text", "", "\0"])
    assert "hold no text to train a tokenizer on" in refuse(capsys, tmp_path, "--input", source, "--output", tmp_path / "out")


def test_unusable_tokenizers_are_refused(tmp_path: Path, sample_texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["one", "two"])
    damaged, empty, headless = tmp_path / "damaged.model", tmp_path / "empty.model", tmp_path / "headless.model"
    damaged.write_bytes(b"not a model")
    empty.write_bytes(b"")
    train_other(headless, sample_texts[4], vocab_size=200, bos_id=-1)
    for model, message in ((damaged, "not a SentencePiece model"), (empty, "not a SentencePiece model"), (headless, "has no BOS token")):
        said = refuse(capsys, tmp_path, "--input", source, "--output", tmp_path / "out", "--tokenizer", model)
        assert said.startswith(f"{model}: ")
        assert message in said


def test_tokens_that_uint16_cannot_hold_are_refused(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_docs, "MAX_VOCAB_SIZE", 399)
    with pytest.raises(tokenize_docs.InputError, match="400 tokens do not fit"):
        tokenize_docs.load_tokenizer(tokenizer.read_bytes(), "small.model")


# ---- the output folder


def test_existing_output_is_kept_unless_forced(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, source = tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["one", "two"])
    arguments = ("--input", source, "--output", output, "--tokenizer", tokenizer)
    tokenize(output, [source], "--tokenizer", tokenizer, "--shard-tokens", 1)
    capsys.readouterr()
    before = contents(output)
    assert "exists; name another --output, or replace it with --force" in refuse(capsys, tmp_path, *arguments)
    assert contents(output) == before
    tokenize(output, [source], "--tokenizer", tokenizer, "--force")
    assert sorted(contents(output)) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json", "tokenizer.model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_force_deletes_nothing_that_the_tool_did_not_write(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, source = tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["one", "two"])
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    arguments = ("--input", source, "--output", output, "--tokenizer", tokenizer, "--force")
    assert "holds files that this tool did not write (thesis.tex)" in refuse(capsys, tmp_path, *arguments)
    assert "is not a folder" in refuse(capsys, tmp_path, *arguments, "--output", source)


def test_what_a_killed_run_left_without_a_finished_shard_is_replaced(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial, source = tmp_path / "out.partial", jsonl(tmp_path / "a.jsonl", ["one", "two"])
    partial.mkdir()
    for name in ("tokenizer.model", "fineweb_val_000000.bin.partial", "fineweb_train_000007.bin"):
        (partial / name).write_text("half")
    (partial / "thesis.tex").write_text("precious")
    said = refuse(capsys, tmp_path, "--input", source, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert said.startswith(f"{partial / 'thesis.tex'}: this tool needs the folder but did not write that file")
    (partial / "thesis.tex").unlink()
    tokenize(tmp_path / "out", [source], "--tokenizer", tokenizer)
    assert sorted(contents(tmp_path / "out")) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json", "tokenizer.model"]


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["one", "two"])
    arguments = ("--input", source, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    (tmp_path / "out.partial").mkdir()
    with tokenize_docs.locked(tmp_path / "out.partial"):
        assert "out.partial: another run is writing there" in refuse(capsys, tmp_path, *arguments)
    (tmp_path / "out.partial").rmdir()
    (tmp_path / "out.replaced").mkdir()
    assert "out.replaced exists: another run is replacing" in refuse(capsys, tmp_path, *arguments)


# ---- interrupted runs

RESUMED = ["".join(f"Document {number} of MANY. " for _ in range(number % 7)) for number in range(60)]


class Interrupted:
    """Stands in for `write_shard` and interrupts the run instead of writing for the `times`th time."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self, path: Path, tokens: np.ndarray) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        shards.write_shard(path, tokens)


@pytest.mark.parametrize(("batch_chars", "workers"), [(1, 1), (100, 1), (1000, 1), (1 << 18, 1), (1000, 2)])
@pytest.mark.parametrize("cased", [False, True])
def test_interrupted_runs_end_as_if_they_had_not_been(
    cased: bool, batch_chars: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenize_docs, "BATCH_CHARS", batch_chars)
    source, output = jsonl(tmp_path / "a.jsonl", RESUMED), tmp_path / "out"
    options = ["--vocab-size", "300", "--val-docs", "20", "--shard-tokens", "100", *(["--caseops"] if cased else [])]
    tokenize(tmp_path / "fresh", [source], *options)
    arguments = ["--input", str(source), "--output", str(output), *options, "--workers", str(workers)]
    capsys.readouterr()
    ends = []
    for writes in itertools.count(1):  # a run gets a little further than the one before: a batch of many shards is finished as a whole
        monkeypatch.setattr(tokenize_docs, "write_shard", Interrupted(writes))
        if tokenize_docs.main(arguments) == 0:
            break
        ends.append(capsys.readouterr().err.splitlines()[-1])
    kept = f"interrupted; the finished shards are kept in {output}.partial, and the same command goes on after them"
    assert set(ends) == {"interrupted; nothing was written", kept} and ends[-1] == kept
    assert contents(output) == contents(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "fresh", "out"]


def test_an_interrupt_before_the_first_shard_leaves_nothing(tmp_path: Path, tokenizer: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["one", "two"])
    monkeypatch.setattr(tokenize_docs, "write_shard", Interrupted(1))
    assert tokenize_docs.main(["--input", str(source), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer), "--workers", "1"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_killed_run_is_continued(tmp_path: Path, tokenizer: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", RESUMED * 200)
    options = ["--tokenizer", str(tokenizer), "--val-docs", "20", "--shard-tokens", "2000"]
    arguments = ["--input", str(source), "--output", str(tmp_path / "out"), *options, "--workers", "2"]
    process = subprocess.Popen([sys.executable, str(ROOT / "data" / "tokenize_docs.py"), *arguments], stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "out.partial").glob("*_train_*"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "journal.json").exists()
    assert tokenize_docs.main(arguments) == 0
    tokenize(tmp_path / "fresh", [source], *options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.fixture
def half_done(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a run that was interrupted in its training split."""
    source = jsonl(tmp_path / "a.jsonl", RESUMED)
    options = ["--tokenizer", str(tokenizer), "--val-docs", "8", "--shard-tokens", "100", "--workers", "1"]
    arguments = ["--input", str(source), "--output", str(tmp_path / "out"), *options]
    monkeypatch.setattr(tokenize_docs, "BATCH_CHARS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_docs, "write_shard", Interrupted(12))
        assert tokenize_docs.main(arguments) == 130
    return arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: ["--shard-tokens", "99"], "was begun otherwise (shard_tokens 100 there, 99 here); give that run's input and options again"),
        (lambda folder: ["--val-docs", "19"], "was begun otherwise (val_docs 8 there, 19 here)"),
        (lambda folder: jsonl(folder / "a.jsonl", ["other", *RESUMED[1:]]), "documents that are not those at the head of the input, which has changed"),
        (lambda folder: jsonl(folder / "a.jsonl", [RESUMED[0], RESUMED[1][:-1], RESUMED[1][-1] + RESUMED[2], *RESUMED[3:]]), "which has changed"),
        (lambda folder: flip_last_bit(folder / "out.partial" / "fineweb_train_000000.bin"), "fineweb_train_000000.bin is not what was written); delete it"),
        (lambda folder: (folder / "out.partial" / "fineweb_train_000000.bin").unlink(), "but it is damaged ("),
        (lambda folder: (folder / "out.partial" / "journal.json").write_text("{}"), "but it is damaged ('position'); delete it"),
    ],
)
def test_another_run_does_not_go_on_with_these_shards(
    change: Callable[[Path], object], message: str, half_done: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = change(tmp_path)
    capsys.readouterr()
    said = refuse(capsys, tmp_path, *half_done, *(changed if isinstance(changed, list) else []))
    assert message in said and "kept" not in said


def flip_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_another_tokenizer_does_not_go_on_with_these_shards(
    half_done: list[str], tmp_path: Path, sample_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.model").write_bytes(tokenize_docs.train_tokenizer(tokenize_docs.cut_sentences(sample_texts[5]), 400))
    capsys.readouterr()
    assert "was begun otherwise (tokenizer " in refuse(capsys, tmp_path, *half_done, "--tokenizer", tmp_path / "other.model")


def test_text_added_after_the_end_does_not_follow_a_short_shard(
    half_done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_docs, "write_json", fail_for_manifest)
        assert tokenize_docs.main(half_done) == 2
    jsonl(tmp_path / "a.jsonl", [*RESUMED, "more"])
    capsys.readouterr()
    assert "its last train shard ends with the text, but the input now goes on" in refuse(capsys, tmp_path, *half_done)
    jsonl(tmp_path / "a.jsonl", RESUMED)
    assert tokenize_docs.main(half_done) == 0, "all shards were finished, only the last step was missing"
    assert "(0.00 MB/s)" in capsys.readouterr().out, "nothing was tokenised again"


def fail_for_manifest(path: Path, content: dict[str, Any]) -> None:
    if path.name == "manifest.json":
        raise OSError(28, "No space left on device")
    shards.write_json(path, content)


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [(KeyboardInterrupt(), 130, "interrupted; nothing was written"), (OSError(28, "No space left on device"), 2, "No space left on device")],
)
def test_failure_while_writing_leaves_the_earlier_output(
    failure: BaseException,
    code: int,
    message: str,
    tmp_path: Path,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, source = tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["one", "two"])
    tokenize(output, [source], "--tokenizer", tokenizer)
    before = contents(output)

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(tokenize_docs, "write_shard", fail)
    arguments = ["--input", str(source), "--output", str(output), "--tokenizer", str(tokenizer), "--workers", "1", "--force"]
    assert tokenize_docs.main(arguments) == code
    assert message in capsys.readouterr().err
    assert contents(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
