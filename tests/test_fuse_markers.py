"""data/fuse_markers.py: shards fused from shards are those that the fused tokenizer makes of the documents, and every misuse is one line."""

from __future__ import annotations

import json
import lzma
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

import caseops
import fuse_markers
import shards
import tokenize_docs

import train_gpt

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
PUBLISHED = SHARED / "tokenizers" / "fineweb_8192_caseops_v1_reserved.model"
# Capitals after spaces, line ends and other things, words that the pieces which go are part of, and a character that is a marker.
TEXTS = ["The NASA launch of OpenAI", "", "Two\nLines A\tB (The) I AM", "ÉCOLE Straße", f"own {caseops.TITLE}marks {caseops.ESC}x", "I", "e"]


@pytest.fixture(scope="module")
def sample() -> list[str]:
    with lzma.open(ROOT / "data" / "sample" / "shakespeare.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sample: list[str]) -> Path:
    """A CaseOps tokenizer without fused markers."""
    sentences = [piece for text in sample[6:9] for piece in tokenize_docs.cut_sentences(caseops.encode(text))]
    path = tmp_path_factory.mktemp("model") / "caseops.model"
    path.write_bytes(tokenize_docs.train_tokenizer(sentences, 700, caseops.MARKERS))
    return path


def tokenize(output: Path, texts: Sequence[str], tokenizer: Path, *options: object, val_docs: int) -> Path:
    """Shards of `texts`."""
    source = output.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    arguments = ["--input", source, "--output", output, "--tokenizer", tokenizer, "--caseops", "--val-docs", val_docs, "--workers", 1, *options]
    tokenize_docs.run([str(argument) for argument in arguments])
    return output


def fuse(*arguments: object) -> int:
    return fuse_markers.main([str(argument) for argument in arguments])


def contents(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([shards.read_shard(path) for path in shards.split_files(folder, split)])


def without_runs_of_spaces(text: str) -> str:
    while "  " in text:
        text = text.replace("  ", " ")
    return text


def test_shards_fused_from_shards_are_those_of_the_fused_tokenizer(tmp_path: Path, sample: list[str], model: Path) -> None:
    texts = [without_runs_of_spaces(text) for text in (*TEXTS, *sample[:3], *TEXTS)]
    source = tokenize(tmp_path / "source", texts, model, "--shard-tokens", 50_000, val_docs=9)
    expected = tokenize(tmp_path / "expected", texts, model, "--fuse-markers", val_docs=9)
    assert fuse(source) == 0
    found = tmp_path / "source_fused"
    assert (found / "tokenizer.model").read_bytes() == (expected / "tokenizer.model").read_bytes()
    for split in ("val", "train"):
        ours, theirs = contents(found, split), contents(expected, split)
        # A pair of tokens that a shard's end cuts stays a pair.
        assert len(theirs) <= len(ours) <= len(theirs) + len(shards.split_files(source, split))
    one = tokenize(tmp_path / "one", texts, model, val_docs=9)
    assert fuse(one, "--output", tmp_path / "other", "--workers", 1) == 0
    for split in ("val", "train", "val_bytes"):
        np.testing.assert_array_equal(contents(tmp_path / "other", split), contents(expected, split))
    assert len(contents(expected, "val")) < 0.98 * len(contents(one, "val")), "there was something to fuse"


def test_a_fused_folder_is_whole(tmp_path: Path, sample: list[str], model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tokenize(tmp_path / "source", [*sample[:3], *TEXTS], model, "--shard-tokens", 40_000, val_docs=2)
    assert fuse(source) == 0
    found = tmp_path / "source_fused"
    assert f"TOKENIZER_PATH={found}/tokenizer.model" in capsys.readouterr().out
    report = shards.check_folder(found, lambda _: None)
    assert not report.problems
    assert report.hashed_files == 1 + sum(1 for path in found.glob("*.bin"))
    before, after = (json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in (source, found))
    assert after["source"]["fused_from"] == "source"
    for split in ("val", "train"):
        for key in ("documents", "bytes", "decoded_bytes", "lossy_documents", "unknown_tokens"):
            assert after["splits"][split][key] == before["splits"][split][key]
        assert after["splits"][split]["tokens"] == len(contents(found, split)) < len(contents(source, split))
    data = [f"DATA_PATH={found}", f"TOKENIZER_PATH={found / 'tokenizer.model'}", "VOCAB_SIZE=700"]
    config = train_gpt.parse_config(["PRESET=plain", "TRAIN_SEQ_LEN=64", *data], {})
    assert train_gpt.load_val(config).target_bytes.sum() == sum(len(text.encode()) for text in sample[:2])
    assert len(train_gpt.TrainLoader(config).shards) == len(shards.split_files(source, "train"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_spell_the_same_text_and_keep_their_bytes(data: st.DataObject, model: Path) -> None:
    """Also where runs of spaces stand before markers, which the tokenizer would not write so."""
    fused_model, fusion = fuse_markers.plan_fusion(model.read_bytes(), "model")
    old, new = (tokenize_docs.load_tokenizer(each, "") for each in (model.read_bytes(), fused_model))
    likely = [fusion.space, *(marker for marker, _ in fusion.fused), *(gone for gone, *_ in fusion.split)]
    token = st.one_of(st.sampled_from(likely), st.integers(260, 699))
    tokens = np.array(data.draw(st.lists(token, min_size=1, max_size=40)), dtype=np.uint16)
    counts = np.array([fuse_markers.text_bytes(old.id_to_piece(int(each))) for each in tokens], dtype=np.uint16)
    found, found_counts = fuse_markers.fuse_tokens(tokens, counts, fusion)
    assert found_counts is not None
    spelt = ["".join(tokenizer.id_to_piece(int(each)) for each in ids) for tokenizer, ids in ((old, tokens), (new, found))]
    assert spelt[0] == spelt[1]
    assert len(found) == len(found_counts)
    assert found_counts.sum() == counts.sum()
    pairs = set(zip(found[:-1].tolist(), found[1:].tolist(), strict=True))
    assert not pairs & {(fusion.space, marker) for marker, _ in fusion.fused}
    assert found_counts.tolist() == [fuse_markers.text_bytes(new.id_to_piece(int(each))) for each in found]


def test_pieces_that_go_are_cut_as_the_tokenizer_had_made_them(model: Path) -> None:
    _, fusion = fuse_markers.plan_fusion(model.read_bytes(), "model")
    tokenizer = tokenize_docs.load_tokenizer(model.read_bytes(), "")
    assert len(fusion.split) == len(caseops.FUSED)
    gone = [token for token, *_ in fusion.split]
    assert sorted(gone, key=tokenizer.get_score) == gone, "the last learnt first"
    learnt = [token for token in range(700) if not (tokenizer.is_control(token) or tokenizer.is_byte(token) or tokenizer.is_unknown(token))]
    assert set(gone) == set(sorted((token for token in learnt if len(tokenizer.id_to_piece(token)) > 1), key=tokenizer.get_score)[:2])
    for token, *halves in fusion.split:
        assert "".join(map(tokenizer.id_to_piece, halves)) == tokenizer.id_to_piece(token)


def test_a_piece_that_is_not_made_of_two_others_is_refused() -> None:
    class Unigrams:
        pieces = ("<unk>", "a", "b", "c", "abc")

        def piece_to_id(self, piece: str) -> int:
            return self.pieces.index(piece) if piece in self.pieces else 0

        def unk_id(self) -> int:
            return 0

        def get_score(self, token: int) -> float:
            return -float(token)

    with pytest.raises(tokenize_docs.InputError, match="no BPE tokenizer: its piece 'abc'"):
        fuse_markers.halves_of("abc", Unigrams())  # type: ignore[arg-type]


def test_data_of_the_download_tool(tmp_path: Path, sample: list[str], model: Path) -> None:
    """Its manifest lies beside the shards, its tokenizer elsewhere, and it says how much is published."""
    (tmp_path / "datasets").mkdir()
    source = tokenize(tmp_path / "datasets" / "source", sample[:3], model, val_docs=1)
    manifest: dict[str, Any] = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
    for split in manifest["splits"].values():
        for key in set(split) - {"shards", "byte_shards"}:
            del split[key]
    manifest["tokenizer"]["file"] = "../../tokenizers/a.model"
    published = {"train": {"shards": 80}, "val": {"shards": 1, "tokens": 7}}
    manifest["source"] = {"repo_id": "some/where", "commit": "0" * 40, "variant": "x", "published": published}
    (source / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (source / "tokenizer.model").unlink()
    assert fuse(source) == 2, "its tokenizer is not there"
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "a.model").write_bytes(model.read_bytes())
    assert fuse(source) == 0
    report = shards.check_folder(source.with_name("source_fused"), lambda _: None)
    assert not report.problems, "the published number of validation tokens is of other tokens"
    assert report.notes == ["1 of the 80 published training shards are here; longer training would repeat them"]


def break_nothing(source: Path, model: Path) -> list[object]:
    return [source.with_name("missing")]


def lose_bytes(source: Path, model: Path) -> list[object]:
    next(source.glob("*_val_bytes_*")).unlink()
    (source / "manifest.json").unlink()
    return [source, "--tokenizer", model]


def cut_bytes(source: Path, model: Path) -> list[object]:
    path = next(source.glob("*_val_bytes_*"))
    shards.write_shard(path, np.array(shards.read_shard(path))[:-1])
    (source / "manifest.json").unlink()
    return [source, "--tokenizer", model]


def damage(source: Path, model: Path) -> list[object]:
    path = next(source.glob("*_train_*"))
    path.write_bytes(path.read_bytes()[:-1])
    return [source]


def use_another_tokenizer(source: Path, model: Path) -> list[object]:
    other = source.with_name("other.model")
    other.write_bytes(caseops.fuse(model.read_bytes()))
    return [source, "--tokenizer", other]


def forget_the_tokenizer(source: Path, model: Path) -> list[object]:
    (source / "manifest.json").unlink()
    return [source]


def fuse_twice(source: Path, model: Path) -> list[object]:
    assert fuse(source) == 0
    return [source.with_name("source_fused")]


def name_a_folder_that_exists(source: Path, model: Path) -> list[object]:
    (source.with_name("source_fused")).mkdir()
    return [source]


def lose_a_shard(source: Path, model: Path) -> list[object]:
    next(source.glob("*_train_*")).unlink()
    return [source]


def change_a_token(source: Path, model: Path) -> list[object]:
    path = next(source.glob("*_train_*"))
    tokens = np.array(shards.read_shard(path))
    tokens[3] += 1
    shards.write_shard(path, tokens)
    return [source]


def name_the_folder_itself(source: Path, model: Path) -> list[object]:
    return [source, "--output", source.parent / "." / source.name, "--force"]


def leave_an_interrupted_run(source: Path, model: Path) -> list[object]:
    partial = source.with_name("source_fused.partial")
    partial.mkdir()
    (partial / tokenize_docs.JOURNAL_FILE).write_text("{}", encoding="utf-8")
    return [source]


def use_strange_names(source: Path, model: Path) -> list[object]:
    next(source.glob("*_train_*")).rename(source / "a_train_0.bin")
    (source / "manifest.json").unlink()
    return [source, "--tokenizer", model]


def name_a_small_vocabulary(source: Path, model: Path) -> list[object]:
    (source / "manifest.json").unlink()
    path = next(source.glob("*_train_*"))
    shards.write_shard(path, np.array([1, 60_000]))
    return [source, "--tokenizer", model]


def name_plain_shards(source: Path, model: Path) -> list[object]:
    (source / "manifest.json").unlink()
    plain = source.with_name("plain.model")
    plain.write_bytes(tokenize_docs.byte_tokenizer())
    return [source, "--tokenizer", plain]


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        (break_nothing, "name a folder of shards"),
        (lose_bytes, "fineweb_val_bytes_000000.bin: No such file"),
        (cut_bytes, "they belong to different data"),
        (damage, "truncated or damaged"),
        (use_another_tokenizer, "is not the tokenizer that made these shards"),
        (forget_the_tokenizer, "say which made these shards with --tokenizer"),
        (fuse_twice, "spaces and markers are fused already"),
        (name_a_folder_that_exists, "exists; name another --output, or replace it with --force"),
        (lose_a_shard, "no such file, but the manifest lists it"),
        (change_a_token, "which the manifest states; fetch or make it again"),
        (name_the_folder_itself, "is the folder itself"),
        (leave_an_interrupted_run, "holds what an interrupted run of tokenize_docs.py has finished"),
        (use_strange_names, "expected the names of the data tools"),
        (name_a_small_vocabulary, "token 60000 is outside the tokenizer's vocabulary of 700"),
        (name_plain_shards, "only CaseOps shards have what is to be fused"),
    ],
)
def test_misuse_is_one_line_and_leaves_nothing(mishap: Any, message: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tokenize(tmp_path / "source", TEXTS, model, val_docs=3)
    arguments = mishap(source, model)
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    assert fuse(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    if mishap is name_a_folder_that_exists:
        assert fuse(*arguments, "--force") == 0


def test_a_folder_named_by_a_dot(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = tokenize(tmp_path / "source", TEXTS, model, val_docs=3)
    monkeypatch.chdir(source)
    assert fuse(".") == 0
    assert f"DATA_PATH={tmp_path / 'source_fused'} " in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert fuse("source/", "--force") == 0
    assert "DATA_PATH=source_fused " in capsys.readouterr().out


def test_dropped_text_counts_with_the_last_token_of_a_document(model: Path) -> None:
    _, fusion = fuse_markers.plan_fusion(model.read_bytes(), "model")
    (gone, left, right), (left_bytes, right_bytes) = fusion.split[0], fusion.split_bytes[0]
    tokens = np.array([1, gone, 1, gone, gone], dtype=np.uint16)
    whole = left_bytes + right_bytes
    before = np.array([0, whole + 3, 0, whole + 2, whole + 4], dtype=np.uint16)
    found, counts = fuse_markers.fuse_tokens(tokens, before, fusion)
    assert found.tolist() == [1, left, right, 1, left, right, left, right]
    assert counts is not None
    assert counts.tolist() == [0, left_bytes, right_bytes + 3, 0, left_bytes + 2, right_bytes, left_bytes, right_bytes + 4]


def test_the_published_tokenizer(tmp_path: Path) -> None:
    """The one that the default preset's shards are made with, on text with everything that its normalisation touches."""
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED} is not here: it is not part of the project")
    with lzma.open(SHARED / "web.jsonl.xz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(60), strict=False)]
    texts += ["Two  Spaces   Before\n\n Capitals ", "The A involving   ", *TEXTS]
    source = tokenize(tmp_path / "source", texts, PUBLISHED, val_docs=30)
    expected = tokenize(tmp_path / "expected", texts, PUBLISHED, "--fuse-markers", val_docs=30)
    assert fuse(source) == 0
    for split in ("val", "train", "val_bytes"):
        np.testing.assert_array_equal(contents(tmp_path / "source_fused", split), contents(expected, split))
