"""CaseOps: the transform and its inverse on every kind of string, the bytes behind each token, fused markers, and the tool with --caseops."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import lzma
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

import caseops
import download
import shards
import tokenize_docs
from caseops import ALLCAPS, CAPNEXT, ESC, TITLE

import train_gpt

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
PUBLISHED = SHARED / "tokenizers" / "fineweb_8192_caseops_v1_reserved.model"
SAMPLE = ROOT / "data" / "sample" / "shakespeare.jsonl.xz"
BOS = 1
# Words, what they are made of, and every character for which lower and upper case are not each other's inverse.
AWKWARD = "aAbBzZ 'é\n.3" + "".join(caseops.MARKERS) + "\ue000\ue005\u2581\0" + "ßẞıİſKÅǅǄﬁﬀŉǰΣςΐᾳͅ\u0301\u0307ÉÀÄЖжΩ中😀𐐀"
ANY_STRING = st.text(st.one_of(st.characters(), st.sampled_from(AWKWARD + "\ud800\udfff")), max_size=60)
ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(AWKWARD)), max_size=60)


def readable(encoded: str) -> str:
    """`encoded` with its markers as the letters TACE in angle brackets."""
    return encoded.translate({ord(marker): f"<{letter}>" for marker, letter in zip(caseops.MARKERS, "TACE", strict=True)})


def reference(text: str) -> str:
    """The transform as its definition reads: one run of letters, or one other character, after another."""
    result = ""
    for is_word, run in itertools.groupby(text, key=lambda character: character.isascii() and character.isalpha()):
        word = "".join(run)
        if not is_word:
            result += "".join(ESC + character if character in caseops.MARKERS else character for character in word)
        elif len(word) > 1 and word.isupper():
            result += ALLCAPS + word.lower()
        else:
            for index, letter in enumerate(word):
                result += (CAPNEXT if index else TITLE) + letter.lower() if letter.isupper() else letter
    return result


def utf8(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


# ---- the transform


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("lower case, 12 %", "lower case, 12 %"),
        ("The NASA Launch", "<T>the <A>nasa <T>launch"),
        ("OpenAI iPhone", "<T>open<C>a<C>i i<C>phone"),
        ("I A-B U.S. USA", "<T>i <T>a-<T>b <T>u.<T>s. <A>usa"),
        ("ABc aBC aB", "<T>a<C>bc a<C>b<C>c a<C>b"),
        ("A1B2 R2D2 3D", "<T>a1<T>b2 <T>r2<T>d2 3<T>d"),
        ("Don't O'NEIL", "<T>don't <T>o'<A>neil"),
        ("A\nB\tCD", "<T>a\n<T>b\t<A>cd"),
        ("ÉCOLE École NAÏVE", "É<A>cole École <A>naÏ<A>ve"),  # only ASCII letters make words
        ("Straße STRASSE ẞ ß", "<T>straße <A>strasse ẞ ß"),
        ("İstanbul Isparta ısı ISI", "İstanbul <T>isparta ısı <A>isi"),
        ("ŉA ǰB ΐC ﬃD ẖE", "ŉ<T>a ǰ<T>b ΐ<T>c ﬃ<T>d ẖ<T>e"),  # their title or upper case is more than one character
        ("ǅ Ǆ ǆ \ufb01 \ufb00A", "ǅ Ǆ ǆ \ufb01 \ufb00<T>a"),
        ("E\u0301A\u0301 \u212a", "<T>e\u0301<T>a\u0301 \u212a"),
        ("Ａ\ud800A\udc00", "Ａ\ud800<T>a\udc00"),
        (TITLE, "<E><T>"),
        (f"{TITLE}aB", "<E><T>a<C>b"),  # the text's own marker is no head of a word of capitals
        (f"A{ESC}{TITLE}BC{CAPNEXT}d", "<T>a<E><E><E><T><A>bc<E><C>d"),
        (f"{ALLCAPS}ab", "<E><A>ab"),
        ("\ue000\ue005", "\ue000\ue005"),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert readable(caseops.encode(text)) == expected
    assert caseops.decode(caseops.encode(text)) == text


def test_all_short_strings() -> None:
    short = (itertools.product(f"aAé {TITLE}{ALLCAPS}{CAPNEXT}{ESC}", repeat=length) for length in range(5))
    words = (itertools.product("aA ", repeat=length) for length in range(5, 9))
    for text in map("".join, itertools.chain(*short, *words)):
        encoded = caseops.encode(text)
        assert encoded == reference(text), ascii(text)
        assert caseops.decode(encoded) == text, ascii(text)


@given(text=ANY_STRING)
def test_any_string_comes_back_and_has_the_encoding_of_the_definition(text: str) -> None:
    encoded = caseops.encode(text)
    assert encoded == reference(text)
    assert caseops.decode(encoded) == text
    assert not re.search("[A-Z]", encoded)
    assert caseops.original_bytes(encoded) == utf8(text)


@functools.cache
def expanding() -> list[str]:
    """Returns every character with a case of several characters."""
    return [character for character in map(chr, range(0x110000)) if max(map(len, (character.title(), character.upper(), character.lower()))) > 1]


@pytest.mark.parametrize("before", ["", "a", "A", TITLE])
def test_characters_whose_case_is_several_characters_stay(before: str) -> None:
    assert {"ß", "İ", "ŉ", "ﬃ", "ǰ"} <= set(expanding())
    for character in [*expanding(), *"ıſKÅẞςΣǅ"]:
        text = f"{before}{character}A{character}bC"
        assert caseops.encode(text) == reference(text) and caseops.decode(caseops.encode(text)) == text


@given(encoded=st.text(st.sampled_from("".join(caseops.MARKERS) + "abA é"), max_size=12))
def test_decode_accepts_exactly_what_encode_writes(encoded: str) -> None:
    try:
        text = caseops.decode(encoded)
    except ValueError:
        return
    assert caseops.encode(text) == encoded


@pytest.mark.parametrize(
    ("encoded", "position"),
    [
        ("A", 0),
        (TITLE, 0),
        (f"ab {ESC}", 4),
        (f"ab {TITLE} cd", 3),
        (f"{TITLE}É", 0),
        (f"{ALLCAPS}a", 0),
        (f"{TITLE}a{CAPNEXT}b", 0),
        (f"{ALLCAPS}a{CAPNEXT}b", 2),
        (f"{CAPNEXT}a", 0),
        (f"a{TITLE}b", 1),
        (f"x {ESC}a", 3),
        (f"{TITLE}{ESC}{TITLE}", 0),
    ],
)
def test_other_strings_are_refused_with_their_place(encoded: str, position: int) -> None:
    with pytest.raises(ValueError, match=f"not the CaseOps encoding of any text; from character {position} on"):
        caseops.decode(encoded)


def test_time_grows_in_proportion_to_the_text() -> None:
    for text in ("A" * 200_000, "aB" * 100_000, "a" * 200_000, ESC * 100_000, "A" * 200_000 + "a"):
        assert caseops.decode(caseops.encode(text)) == text  # a quadratic step would take minutes


# ---- bytes of the original


def slow_token_bytes(encoded: str, ends: Sequence[int]) -> list[int]:
    """The bytes of tokens that end at `ends`, counted one character after another."""
    sizes, escaped = [], False
    for character in encoded:
        acting = character in caseops.MARKERS and not escaped
        sizes.append(0 if acting else utf8(character))
        escaped = acting and character == ESC
    return [sum(sizes[start:end]) for start, end in itertools.pairwise([0, *ends])]


@pytest.mark.parametrize(
    ("text", "parts", "expected"),
    [
        ("The NASA", [TITLE, "the", " ", ALLCAPS, "na", "sa"], [0, 3, 1, 0, 2, 2]),
        ("The NASA", [TITLE + "the", " " + ALLCAPS, "nasa"], [3, 1, 4]),
        ("aB", ["a" + CAPNEXT, "b"], [1, 1]),
        (f"é{TITLE}A", ["é", ESC, TITLE, TITLE, "a"], [2, 0, 3, 0, 1]),
        ("😀é", ["", "", "", "😀", "", "é"], [0, 0, 0, 4, 0, 2]),  # the bytes of one character: the last one counts it
        (" \u200bThe ", [None, TITLE, "the", None], [4, 4]),  # dropped by the tokenizer: the nearest token counts it
        ("  ", [None], []),
        ("", [], []),
    ],
)
def test_bytes_of_tokens(text: str, parts: list[str | None], expected: list[int]) -> None:
    encoded = caseops.encode(text)
    offsets, start = [], encoded.index(next((part for part in parts if part), ""))
    for part in parts:
        if part is not None:
            offsets.append((start, start := start + len(part)))
    assert caseops.token_bytes(encoded, offsets) == expected


@given(text=ANY_STRING, data=st.data())
def test_bytes_of_any_tokens_sum_to_those_of_the_text(text: str, data: st.DataObject) -> None:
    encoded = caseops.encode(text)
    ends = sorted(data.draw(st.lists(st.integers(0, len(encoded)), min_size=1, max_size=8)))
    counts = caseops.token_bytes(encoded, list(itertools.pairwise([0, *ends])))
    assert sum(counts) == utf8(text)
    assert counts == slow_token_bytes(encoded, [*ends[:-1], len(encoded)])


# ---- with tokenizers


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    with lzma.open(SAMPLE) as file:
        return [json.loads(line)["text"] for line in file]


def train(texts: Sequence[str], vocab_size: int, *symbols: str) -> bytes:
    return tokenize_docs.train_tokenizer((part for text in texts for part in tokenize_docs.cut_sentences(caseops.encode(text))), vocab_size, symbols)


@pytest.fixture(scope="session")
def models(sample_texts: list[str]) -> dict[str, bytes]:
    """Small CaseOps tokenizers: as trained, trained with fused markers, and fused afterwards."""
    texts = [sample_texts[4], sample_texts[8]]
    plain = train(texts, 500, *caseops.MARKERS)
    return {"plain": plain, "trained": train(texts, 500, *caseops.MARKERS, *caseops.FUSED), "fused": caseops.fuse(plain)}


@functools.cache
def load(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def pieces(model: bytes) -> list[str]:
    tokenizer = load(model)
    return [tokenizer.id_to_piece(token) for token in range(tokenizer.vocab_size())]


def published() -> bytes:
    """The challenge's own CaseOps tokenizer."""
    if not PUBLISHED.exists():
        pytest.skip("needs the challenge's CaseOps tokenizer in ../shared/data, which is not part of the project")
    return PUBLISHED.read_bytes()


def validation_texts() -> list[str]:
    path = SHARED / "fineweb_val_head.jsonl.xz"
    if not path.exists():
        pytest.skip("needs the challenge's validation documents in ../shared/data, which are not part of the project")
    with lzma.open(path) as file:
        return [json.loads(line)["text"] for line in file]


def check_bytes(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """The tokens of `text`, after a check that their bytes sum to those of the text."""
    encoded = caseops.encode(text)
    mapping = tokenizer.encode(encoded, return_type="offset_mapping")
    ids: list[int] = tokenizer.encode(encoded)
    assert mapping["ids"] == ids
    counts = caseops.token_bytes(encoded, mapping["offsets"])
    assert len(counts) == len(ids)
    assert sum(counts) == (utf8(text) if ids else 0)
    return ids


@pytest.mark.parametrize("kind", ["plain", "trained", "fused"])
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
@example(text=" The  NASA\n\nA B")
@example(text="A")
@example(text=f" {TITLE}a {ESC}{ALLCAPS} B")
def test_tokens_spell_the_text_and_count_its_bytes(kind: str, models: dict[str, bytes], text: str) -> None:
    tokenizer = load(models[kind])
    ids = check_bytes(tokenizer, text)
    spelt = tokenizer.decode(ids)
    assert spelt == caseops.encode(text).replace("\u2581", " ")  # SentencePiece's own mark for a space, the one loss
    assert caseops.decode(spelt) == text.replace("\u2581", " ")


NORMALISED = [example(text="  The  \u200b ﬁ ½ A\u030a "), example(text=" \n ")]  # spaces dropped and collapsed, letters split and joined; all dropped


@pytest.fixture(scope="session")
def normalising(sample_texts: list[str]) -> bytes:
    """A small CaseOps tokenizer that normalises as the challenge's does."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenize_docs.cut_sentences(caseops.encode(sample_texts[4])), model_writer=model, model_type="bpe", vocab_size=400,
        normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, byte_fallback=True, max_sentence_length=1 << 20,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, user_defined_symbols=list(caseops.MARKERS),
    )  # fmt: skip
    return model.getvalue()


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
@NORMALISED[0]
@NORMALISED[1]
def test_bytes_count_the_original_with_a_tokenizer_that_normalises(normalising: bytes, text: str) -> None:
    for model in (normalising, caseops.fuse(normalising)):
        check_bytes(load(model), text)


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
@NORMALISED[0]
@NORMALISED[1]
def test_bytes_count_the_original_with_the_published_tokenizer(text: str) -> None:
    for model in (published(), caseops.fuse(published())):
        check_bytes(load(model), text)


def test_a_caseops_tokenizer_is_known_by_its_pieces(models: dict[str, bytes], sample_texts: list[str]) -> None:
    assert all(caseops.is_caseops(load(model)) for model in models.values())
    assert not caseops.is_caseops(load(tokenize_docs.train_tokenizer(tokenize_docs.cut_sentences(sample_texts[4]), 400)))
    assert not caseops.is_caseops(load(train(sample_texts[4:5], 400, *caseops.MARKERS[:3])))
    assert [pieces(model)[4:8] for model in models.values()] == [list(caseops.MARKERS)] * 3
    assert pieces(models["trained"])[8:10] == list(caseops.FUSED)
    assert caseops.is_caseops(load(published()))
    assert pieces(published())[4:8] == list(caseops.MARKERS)


def fuse_pairs(tokens: list[str]) -> list[str]:
    """`tokens`, as pieces, with each pair that makes a fused piece replaced by it."""
    fused: list[str] = []
    for piece in tokens:
        if fused and fused[-1] + piece in caseops.FUSED:
            fused[-1] += piece
        else:
            fused.append(piece)
    return fused


def test_fusing_changes_as_many_pieces_as_there_are_pairs(models: dict[str, bytes]) -> None:
    before, after = pieces(models["plain"]), pieces(models["fused"])
    changed = [token for token, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert [after[token] for token in changed] == list(caseops.FUSED)
    learnt = [token for token, piece in enumerate(before) if len(piece) > 1 and not piece.startswith("<")]
    assert changed == learnt[-2:], "the last merges, on which none is built"
    assert caseops.fuse(models["fused"]) == models["fused"]
    assert b"".join(caseops._fields(models["plain"])) == models["plain"]


def test_fusing_replaces_pairs_and_nothing_else(models: dict[str, bytes], sample_texts: list[str]) -> None:
    plain, fused = load(models["plain"]), load(models["fused"])
    given_up = set(pieces(models["plain"])) - set(pieces(models["fused"]))
    for part in caseops.encode(sample_texts[0]).split("\n"):
        tokens = plain.encode(part, return_type=str)
        if not given_up & set(tokens):
            assert fused.encode(part, return_type=str) == fuse_pairs(tokens)


def test_fusing_the_published_tokenizer_saves_one_in_twelve_tokens() -> None:
    plain, fused = load(published()), load(caseops.fuse(published()))
    given_up = set(pieces(published())) - set(pieces(caseops.fuse(published())))
    before = after = expected = 0
    for text in validation_texts()[:200]:
        encoded = caseops.encode(text)
        tokens = plain.encode(encoded, return_type=str)
        ids = check_bytes(fused, text)
        assert fused.decode(ids) == plain.decode(plain.encode(encoded))
        assert ("▁", CAPNEXT) not in itertools.pairwise(tokens)
        if not given_up & set(tokens):
            assert fused.encode(encoded, return_type=str) == fuse_pairs(tokens)
        before, after, expected = before + len(tokens), after + len(ids), expected + len(fuse_pairs(tokens))
    assert (before, after, expected) == (179_107, 163_623, 163_616)


# ---- documents to shards


def jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tokenize(output: Path, source: Path, *options: object) -> dict[str, Any]:
    """Runs the tool in this process, which must succeed, and returns the manifest."""
    assert tokenize_docs.main(["--input", str(source), "--output", str(output), "--workers", "1", *map(str, options)]) == 0
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return manifest


def read(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([shards.read_shard(path) for path in sorted(folder.glob(f"fineweb_{split}_0*.bin"))])


def by_document(tokens: np.ndarray, values: np.ndarray) -> list[list[int]]:
    """`values`, one for each of `tokens`, cut where the documents begin, the value of BOS first."""
    return [part.tolist() for part in np.split(values, np.flatnonzero(tokens == BOS)[1:])]


def spell(folder: Path, tokens: np.ndarray) -> list[str]:
    """The documents that `tokens` spell, by the tokenizer in `folder`."""
    tokenizer = load((folder / "tokenizer.model").read_bytes())
    return [caseops.decode(tokenizer.decode(ids[1:])) for ids in by_document(tokens, tokens)]


TEXTS = ["The NASA launch", "", "  two  Spaces\n\nAnd LINES ", f"own {TITLE}marks {ESC}", "ÉCOLE Straße ﬁ İı ǅ 😀 e\u0301", "I", "\0\t\r\n"]


@pytest.mark.parametrize("fused", [False, True])
def test_tool_with_a_given_tokenizer(fused: bool, tmp_path: Path, models: dict[str, bytes]) -> None:
    (tmp_path / "given.model").write_bytes(models["plain"])
    source = jsonl(tmp_path / "a.jsonl", [*TEXTS, *TEXTS])
    options = ("--tokenizer", tmp_path / "given.model", "--caseops", *(["--fuse-markers"] if fused else []))
    manifest = tokenize(tmp_path / "out", source, *options, "--val-docs", len(TEXTS), "--shard-tokens", 20)
    out = tmp_path / "out"
    tokens, counts = read(out, "val"), read(out, "val_bytes")
    assert spell(out, tokens) == spell(out, read(out, "train")) == TEXTS
    assert [sum(document) for document in by_document(tokens, counts)] == [utf8(text) for text in TEXTS]
    assert all(document[0] == 0 for document in by_document(tokens, counts)), "BOS stands for no text"
    assert (out / "tokenizer.model").read_bytes() == models["fused" if fused else "plain"]
    assert not list(out.glob("fineweb_train_bytes*"))
    val, train = manifest["splits"]["val"], manifest["splits"]["train"]
    for shard, side in zip(val["shards"], val["byte_shards"], strict=True):
        assert side["file"] == shard["file"].replace("_val_", "_val_bytes_")
        assert side["tokens"] == shard["tokens"] == shards.check_shard(out / side["file"])
        assert side["sha256"] == tokenize_docs.file_sha256(out / side["file"])
    assert "byte_shards" not in train
    assert manifest["tokenizer"]["caseops"] is True
    for split in (val, train):
        assert split["lossy_documents"] == split["unknown_tokens"] == 0
        assert split["decoded_bytes"] == split["bytes"] == sum(map(utf8, TEXTS))


@pytest.mark.parametrize("fused", [False, True])
def test_tool_trains_a_tokenizer(fused: bool, tmp_path: Path, sample_texts: list[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", sample_texts[:6])
    manifest = tokenize(tmp_path / "out", source, "--vocab-size", 600, "--caseops", *(["--fuse-markers"] if fused else []), "--val-docs", 2)
    tokens, counts = read(tmp_path / "out", "val"), read(tmp_path / "out", "val_bytes")
    assert spell(tmp_path / "out", tokens) == sample_texts[:2]
    assert [sum(document) for document in by_document(tokens, counts)] == [utf8(text) for text in sample_texts[:2]]
    assert manifest["splits"]["train"]["lossy_documents"] == 0
    assert manifest["tokenizer"]["trained_on"] == {"documents": 4, "bytes": sum(map(utf8, sample_texts[2:6]))}
    vocabulary = pieces((tmp_path / "out" / "tokenizer.model").read_bytes())
    assert len(vocabulary) == 600
    assert (set(caseops.FUSED) <= set(vocabulary)) == fused
    assert not any(re.search("[A-Z]", piece) for piece in vocabulary if not piece.startswith("<0x"))


def test_workers_and_batches_do_not_change_the_output(tmp_path: Path, models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given.model").write_bytes(models["plain"])
    source = jsonl(tmp_path / "a.jsonl", [f"Document {number} OF many " * number for number in range(40)])
    options = ("--tokenizer", tmp_path / "given.model", "--caseops", "--val-docs", 20, "--shard-tokens", 1000)
    tokenize(tmp_path / "large", source, *options)
    monkeypatch.setattr(tokenize_docs, "BATCH_CHARS", 100)
    tokenize(tmp_path / "spread", source, *options, "--workers", 2)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("large", "spread")]
    assert contents[0] == contents[1]
    tokenize(tmp_path / "large", source, *options, "--force")  # byte shards are the tool's own files


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1))
def test_any_documents_count_their_bytes(texts: list[str], models: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("property")
    (folder / "given.model").write_bytes(models["trained"])
    manifest = tokenize(folder / "out", jsonl(folder / "a.jsonl", texts), "--tokenizer", folder / "given.model", "--caseops", "--val-docs", "all")
    tokens, counts = read(folder / "out", "val"), read(folder / "out", "val_bytes")
    assert [sum(document) for document in by_document(tokens, counts)] == [utf8(text) for text in texts]
    assert spell(folder / "out", tokens) == [text.replace("\u2581", " ") for text in texts]
    assert manifest["splits"]["val"]["lossy_documents"] == sum("\u2581" in text for text in texts)


def test_published_data_is_reproduced(tmp_path: Path) -> None:
    validation_texts(), published()
    documents = SHARED / "fineweb_val_head.jsonl.xz"
    manifest = tokenize(tmp_path / "out", documents, "--tokenizer", PUBLISHED, "--caseops", "--val-docs", "all")
    digests = []
    for name in ("fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"):
        assert shards.check_shard(tmp_path / "out" / name) == 808_827
        digests.append(hashlib.sha256((tmp_path / "out" / name).read_bytes()[shards.HEADER_BYTES :]).hexdigest())
    # Of what the export tool of #1729 makes of these documents with the same tokenizer: tokens, then bytes.
    assert digests == [
        "ebf0470c03768efd316751a604416e201b3da5ab2bed631fb8ca5d6095c5b9b3",
        "34ef87bcd2b57b100418b6eb81b8451764e87876cc24a5dd91edef4d22e0eba4",
    ]
    assert int(read(tmp_path / "out", "val_bytes").sum()) == manifest["splits"]["val"]["bytes"] == 2_504_867


def test_what_normalisation_loses_is_counted(tmp_path: Path) -> None:
    published()
    texts = ["The NASA", "The  NASA", " The", "A\u030a"]  # kept, a space collapsed, one dropped, marker and letter parted: the accent makes another letter
    source = jsonl(tmp_path / "a.jsonl", texts)
    manifest = tokenize(tmp_path / "out", source, "--tokenizer", PUBLISHED, "--caseops", "--val-docs", "all")
    totals = manifest["splits"]["val"]
    assert (totals["lossy_documents"], totals["bytes"] - totals["decoded_bytes"]) == (3, 1 + 1 + 1)
    assert int(read(tmp_path / "out", "val_bytes").sum()) == totals["bytes"]


def refuse(capsys: pytest.CaptureFixture[str], folder: Path, *options: object) -> str:
    """Runs the tool, which must refuse in one line and write nothing, and returns the message."""
    code = tokenize_docs.main(["--output", str(folder / "out"), "--workers", "1", *map(str, options)])
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1), lines
    assert not (folder / "out").exists()
    return lines[0].removeprefix("error: ")


def test_mismatched_options_and_tokenizers_are_refused(
    tmp_path: Path, models: dict[str, bytes], sample_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    marked, plain = tmp_path / "marked.model", tmp_path / "plain.model"
    marked.write_bytes(models["plain"])
    plain.write_bytes(tokenize_docs.train_tokenizer(tokenize_docs.cut_sentences(sample_texts[4]), 400))
    assert refuse(capsys, tmp_path, "--input", source, "--fuse-markers") == "--fuse-markers fuses the markers of CaseOps; add --caseops"
    said = refuse(capsys, tmp_path, "--input", source, "--tokenizer", plain, "--caseops")
    assert said.startswith(f"{plain}: without the markers of CaseOps")
    said = refuse(capsys, tmp_path, "--input", source, "--tokenizer", marked)
    assert said.startswith(f"{marked}: has the markers of CaseOps")


def test_more_bytes_than_uint16_holds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published()
    source = jsonl(tmp_path / "a.jsonl", ["a" + " " * 70_000 + "b"])
    said = refuse(capsys, tmp_path, "--input", source, "--tokenizer", PUBLISHED, "--caseops", "--val-docs", "all")
    assert said.startswith("one token stands for 70,001 bytes")


def test_download_fetches_the_byte_shards_that_the_manifest_names(tmp_path: Path) -> None:
    variant, tokenizer = "sp8192_lossless_caps_caseops_v1_reserved", {"name": "t", "model_path": "tokenizers/t.model"}
    dataset = {"name": f"fineweb10B_{variant}", "tokenizer_name": "t", "stats": {"files_train": 9, "files_val": 2}}
    for extra in ({}, {"val_bytes_glob": "fineweb_val_bytes_*.bin"}):
        (tmp_path / "manifest.json").write_text(json.dumps({"datasets": [dataset | extra], "tokenizers": [tokenizer]}))
        wanted = download.plan(download.read_export(tmp_path / "manifest.json", variant), 1, False, "datasets", tmp_path)
        folder = f"datasets/fineweb10B_{variant}"
        sides = [f"{folder}/fineweb_val_bytes_{number:06d}.bin" for number in range(2)] if extra else []
        val = [f"{folder}/fineweb_val_{number:06d}.bin" for number in range(2)]
        files = ["tokenizers/t.model", *val, *sides, f"{folder}/fineweb_train_000000.bin"]
        assert [(item.remote, item.local) for item in wanted] == [(f"datasets/{file}", tmp_path / file) for file in files]


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str]) -> train_gpt.Config:
    """The settings that score two documents of a tokenised corpus."""
    folder = tmp_path_factory.mktemp("scored")
    source = jsonl(folder / "a.jsonl", sample_texts[:6])
    tokenize(folder / "out", source, "--vocab-size", 600, "--caseops", "--val-docs", 2)
    return train_gpt.Config(data_path=str(folder / "out"), tokenizer_path=str(folder / "out" / "tokenizer.model"), vocab_size=600, train_seq_len=32)


def test_scores_count_the_bytes_of_the_original(scored: train_gpt.Config, sample_texts: list[str]) -> None:
    val = train_gpt.load_val(scored)
    assert val.target_bytes.sum() == sum(len(text.encode()) for text in sample_texts[:2])
    assert train_gpt.token_bytes(scored).of_targets(val.tokens).sum() != val.target_bytes.sum(), "pieces do not tell"
    assert all(val.target_bytes[val.tokens[1:] == token].sum() == 0 for token in [1, 4, 5, 6, 7])


def test_nothing_is_scored_without_its_side_file_or_with_another(scored: train_gpt.Config, tmp_path: Path) -> None:
    for path in Path(scored.data_path).glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    [side] = tmp_path.glob("*_val_bytes_*")
    shard = train_gpt.find_shards(replace(scored, data_path=str(tmp_path)), "val")
    assert [train_gpt.side_file(path) for path in shard] == [side]
    shards.write_shard(side, np.zeros(3, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"3 entries for the .* tokens of .*; they belong to different data"):
        train_gpt.load_val(replace(scored, data_path=str(tmp_path)))
    side.unlink()
    with pytest.raises(FileNotFoundError, match=r"only it knows the bytes behind CaseOps tokens; build it with: python data/tokenize_docs.py"):
        train_gpt.load_val(replace(scored, data_path=str(tmp_path)))
