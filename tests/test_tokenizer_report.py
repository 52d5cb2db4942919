"""data/tokenizer_report.py: every number against its definition, on plain, normalising, CaseOps and byte tokenizers; the tables; every refusal."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

import caseops
import tokenize_docs
import tokenizer_report

TRAINING = ["the cat sat on the mat, The Cat sat on THE mat. " * 40, "a dog and a log in the fog, A Dog AND a log. " * 40]


def train(path: Path, texts: Sequence[str] = TRAINING, **options: Any) -> Path:
    """A small SentencePiece model written to `path`, lossless unless `options` say otherwise."""
    base = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True, "vocab_size": 290}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", bos_id=1, eos_id=2, unk_id=3, pad_id=0, minloglevel=2, **base | options
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers: plain, one that normalises and has no bytes, CaseOps as trained and fused, and the bytes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train(folder / "plain.model")
    train(folder / "nfkc.model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True, byte_fallback=False, vocab_size=40)
    train(folder / "case.model", [caseops.encode(text) for text in TRAINING], user_defined_symbols=list(caseops.MARKERS))
    (folder / "fused.model").write_bytes(caseops.fuse((folder / "case.model").read_bytes()))
    (folder / "bytes").mkdir()
    (folder / "bytes" / "tokenizer.model").write_bytes(tokenize_docs.byte_tokenizer())
    return folder


def examine(path: Path, texts: list[str]) -> tokenizer_report.Report:
    return tokenizer_report.examine(path, iter([texts[:1], texts[1:]]))


TEXTS = ["The cat sat on THE mat.", "", "é and a dog", "in the fog é" * 9, "q"]


@pytest.mark.parametrize("name", ["plain.model", "case.model", "fused.model", "bytes/tokenizer.model"])
def test_counts_of_lossless_tokenizers(name: str, folder: Path) -> None:
    report = examine(folder / name, TEXTS)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
    marked = name in ("case.model", "fused.model")
    ids = [tokenizer.encode(caseops.encode(text) if marked else text) for text in TEXTS]
    pieces = [[tokenizer.id_to_piece(token) for token in document] for document in ids]
    byte_like = re.compile("<0x[0-9A-F]{2}>")
    vocabulary = {tokenizer.id_to_piece(token) for token in range(tokenizer.vocab_size())}
    learnt = {piece for piece in vocabulary - {"<pad>", "<s>", "</s>", "<unk>"} if not byte_like.fullmatch(piece)}
    assert report.document_tokens.tolist() == [len(document) for document in ids] and report.tokens == sum(map(len, ids))
    assert (report.documents, report.text_bytes) == (5, sum(len(text.encode()) for text in TEXTS))
    assert (report.vocab_size, report.is_caseops) == (tokenizer.vocab_size(), marked)
    assert report.learnt_pieces == len(learnt) and report.absent_pieces == len(learnt.difference(*pieces))
    assert report.byte_tokens == sum(bool(byte_like.fullmatch(piece)) for document in pieces for piece in document) > 0
    assert (report.unknown_tokens, report.lossy_documents, report.lost_bytes) == (0, 0, 0)


def test_case_markers_cost_tokens_that_fusion_saves(folder: Path) -> None:
    case, fused = (examine(folder / name, TRAINING) for name in ("case.model", "fused.model"))
    assert fused.tokens < case.tokens and fused.text_bytes == case.text_bytes


def test_what_is_lost_is_counted_in_bytes_of_the_original(folder: Path) -> None:
    # kept; one space of two; a ligature of 3 bytes becomes two letters; no piece for 3 and 2 bytes; a line end becomes a space
    texts = ["the cat", "the  cat", "ﬁ", "the 語 é cat", "the\ncat"]
    report = examine(folder / "nfkc.model", texts)
    assert report.lossy_documents == 4
    assert report.lost_bytes == 0 + 1 + 3 + (3 + 2) + 1
    assert report.unknown_tokens >= 1 and report.byte_tokens == 0


@given(content=st.text(), decoded=st.text())
def test_missing_bytes_is_what_must_be_added_at_least(content: str, decoded: str) -> None:
    content, decoded = (text.encode("utf-8", "ignore").decode() for text in (content, decoded))
    lost = tokenizer_report.missing_bytes(content, decoded)
    assert max(0, len(content.encode()) - len(decoded.encode())) <= lost + 3 * sum(map(content.count, caseops.MARKERS)) <= 4 * len(content)
    assert tokenizer_report.missing_bytes(content, content + decoded) == 0
    assert tokenizer_report.missing_bytes("".join(caseops.MARKERS) + "aé", "") == 3


def table(*arguments: object, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Runs the tool with --markdown and returns the cells by label."""
    assert tokenizer_report.main(["--markdown", *map(str, arguments)]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert len({len(row) for row in rows}) == 1 and rows[1] == ["---"] + ["---:"] * (len(rows[0]) - 1)
    return {row[0]: row[1:] for row in rows}


def jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_markdown_holds_every_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["aé"] * 2 + ["a" * 40] * 17 + ["a" * 100])
    cells = table("--input", source, folder / "bytes" / "tokenizer.model", folder / "nfkc.model", "--dim", 100, "--bits", 4, capsys=capsys)
    assert cells[""] == ["bytes/tokenizer.model", "nfkc.model"], "a folder tells tokenizers of tokenize_docs.py apart"
    first = {label: values[0] for label, values in cells.items()}
    assert first["bytes per token"] == first["tokens per byte"] == "1.0000" and first["byte-fallback tokens"] == "100.000%"
    assert first["tokens"] == "786"
    means = [first[f"tokens per document, {name}"] for name in ("mean", "median", "95%")]
    assert means == ["39", "40", f"{np.percentile([3] * 2 + [40] * 17 + [100], 95):,.0f}"] and means[2] == "43"
    assert first["learnt pieces never met"] == "0 (0.0%)"
    assert first["embedding, 100 x 4 bits"] == "13,000 bytes" and first["of 16,000,000 bytes"] == "0.1%"
    assert (cells["unknown tokens"][0], cells["bytes of text lost"][0], cells["documents that do not round-trip"]) == ("0.000%", "0.000%", ["0", "2"])
    assert cells["bytes of text lost"][1] == f"{2 * 2 / 786:.3%}"


def test_several_inputs_are_one_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = jsonl(tmp_path / "a.jsonl", ["one"]), jsonl(tmp_path / "b.jsonl", ["two", "three"])
    assert table("--input", one, "--input", two, folder / "bytes" / "tokenizer.model", capsys=capsys)["tokens"] == ["11"]


def test_a_terminal_gets_the_same_cells(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    arguments = ("--input", source, folder / "plain.model", folder / "case.model")
    cells = table(*arguments, capsys=capsys)
    assert tokenizer_report.main([*map(str, arguments)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"5 documents, {sum(len(text.encode()) for text in TEXTS)} bytes\n")
    assert shown.err.splitlines() == [f"reading the text with {path}" for path in arguments[2:]]
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in shown.out.splitlines() if "│" in line]
    assert {line[0]: line[1:] for line in lines} == {label: values for label, values in cells.items() if label.strip("-")}
    assert cells["CaseOps"] == ["no", "yes"]


def test_the_default_embedding_is_512_wide_at_three_and_a_half_bits(folder: Path) -> None:
    report = examine(folder / "bytes" / "tokenizer.model", ["a"])
    assert report.embedding_bytes(tokenizer_report.DIM, tokenizer_report.BITS_PER_WEIGHT) == 260 * 512 * 7 // 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.model"], "missing.model: No such file or directory"),
        (["{folder}/a.jsonl"], "{folder}/a.jsonl: not a SentencePiece model"),
        (["{model}", "--bits", "0"], "argument --bits: expected a number above 0, got '0'"),
        (["{model}", "--bits", "nan"], "argument --bits: expected a number above 0, got 'nan'"),
        (["{model}", "--dim", "x"], "argument --dim: expected an integer from 1, got 'x'"),
        (["{model}", "--input", "{folder}/none.jsonl"], "{folder}/none.jsonl: no such file"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"folder": tmp_path, "model": folder / "plain.model"}
    source = jsonl(tmp_path / "a.jsonl", ["one"])
    assert tokenizer_report.main(["--markdown", "--input", str(source), *(argument.format(**names) for argument in arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {message.format(**names)}"), lines


def test_no_documents_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", [])
    assert tokenizer_report.main(["--markdown", "--input", str(source), str(folder / "plain.model")]) == 2
    assert capsys.readouterr().err == f"error: no documents in {source}\n"
