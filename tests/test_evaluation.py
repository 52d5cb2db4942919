"""Evaluation: which targets are scored with which context, the scores themselves against direct computations, and what they may depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from conftest import Ended, Finished, lively_model
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt

Start = Callable[..., train_gpt.Config]
Model = Callable[..., torch.Tensor]

WINDOW = 32
# Scores are float32; a model in float64 leaves their own rounding, half a unit in the last place, as the only difference.
FLOAT32 = {"rtol": 1.2e-7, "atol": 0}


def new_run(config: train_gpt.Config, folder: Path, rank: int = 0, ranks: int = 1) -> train_gpt.Run:
    """Returns what an evaluation needs, as one of `ranks` ranks that nobody else belongs to."""
    world = train_gpt.World("cpu")
    world.rank, world.size = rank, ranks
    return train_gpt.Run(config, world, train_gpt.Log(None), folder, train_gpt.StopSignals(), source="")


def score(config: train_gpt.Config, model: Model, val: train_gpt.ValData, stride: int) -> np.ndarray:
    """Returns the nats of every target, from one rank."""
    with torch.inference_mode():
        return train_gpt.score_windows(new_run(config, Path()), model, val, stride, train_gpt.Schedule(config).scored_phase, "test")


def beginning(val: train_gpt.ValData, tokens: int) -> train_gpt.ValData:
    """Returns the first tokens of the split."""
    return train_gpt.ValData(val.tokens[:tokens], val.target_bytes[: tokens - 1])


def with_tokens(val: train_gpt.ValData, where: Any, tokens: Any) -> train_gpt.ValData:
    """Returns the split with some tokens replaced."""
    edited = val.tokens.copy()
    edited[where] = tokens
    return train_gpt.ValData(edited, val.target_bytes)


def direct_nats(model: train_gpt.GPT, tokens: np.ndarray, first: int, last: int) -> float:
    """Returns the nats of token `last`, from inputs `first` to last - 1 alone, by the definition of cross-entropy."""
    inputs = torch.from_numpy(tokens[first:last].astype(np.int64))[None]
    phase = train_gpt.Phase(tuple(range(len(model.blocks))), last - first)
    with torch.no_grad():
        logits = model.logits(inputs, phase)[0, -1].double().numpy()
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[int(tokens[last])])


@pytest.fixture(scope="module")
def val(tiny: Start) -> train_gpt.ValData:
    """The validation split of the corpus."""
    return train_gpt.load_val(tiny())


@pytest.fixture(scope="module", params=[True, False], ids=["documents", "no documents"])
def config(request: pytest.FixtureRequest, tiny: Start) -> train_gpt.Config:
    """A configuration with and without document mask."""
    return tiny(DOC_MASK=int(request.param), COMPUTE_DTYPE="float64", VAL_BATCH_SIZE=1024)


@pytest.fixture(scope="module")
def model(config: train_gpt.Config) -> train_gpt.GPT:
    """A model in float64 whose every weight matters."""
    return lively_model(config, torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# Windows


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 80), st.integers(0, 400), st.data())
def test_windows_score_every_input_once_in_order_with_as_much_context_as_the_stride_leaves(window: int, more: int, data: st.DataObject) -> None:
    inputs, stride = window + more, data.draw(st.integers(1, window), label="stride")
    plan = train_gpt.plan_windows(inputs, window, stride)
    scored = [index for _, first, end in plan for index in range(first, end)]
    assert scored == list(range(inputs))
    for start, first, end in plan:
        assert 0 <= start <= first < end == start + window <= inputs, "each window lies in the text, and its end is what it scores"
    assert (plan[0] == (0, 0, window)).all()
    assert all(first - start >= window - stride and end - first <= stride for start, first, end in plan[1:])
    assert all(end - first == stride for _, first, end in plan[1:-1]), "only the last window may score less"
    assert len(plan) == 1 + -(-more // stride)


@pytest.mark.parametrize(
    ("inputs", "window", "stride", "expected"),
    [
        (8, 8, 8, [(0, 0, 8)]),
        (16, 8, 8, [(0, 0, 8), (8, 8, 16)]),
        (17, 8, 8, [(0, 0, 8), (8, 8, 16), (9, 16, 17)]),
        (15, 8, 4, [(0, 0, 8), (4, 8, 12), (7, 12, 15)]),
        (11, 8, 1, [(0, 0, 8), (1, 8, 9), (2, 9, 10), (3, 10, 11)]),
    ],
)
def test_windows_of_small_texts(inputs: int, window: int, stride: int, expected: list[tuple[int, int, int]]) -> None:
    assert train_gpt.plan_windows(inputs, window, stride).tolist() == [list(row) for row in expected]


# ----------------------------------------------------------------------------------------------------------------------
# Scores against direct computations


def test_sliding_by_one_token_is_scoring_each_token_with_a_window_of_context(config: train_gpt.Config, model: train_gpt.GPT, val: train_gpt.ValData) -> None:
    text = beginning(val, 80)
    expected = [direct_nats(model, text.tokens, max(0, target - WINDOW), target) for target in range(1, 80)]
    np.testing.assert_allclose(score(config, model, text, 1), expected, **FLOAT32)


def test_chunked_is_scoring_each_token_with_its_chunk_up_to_it(config: train_gpt.Config, model: train_gpt.GPT, val: train_gpt.ValData) -> None:
    text = beginning(val, 1 + 3 * WINDOW + 5)  # three chunks, and a tail of five in a window that ends with the text
    starts = [WINDOW * (target // WINDOW) for target in range(3 * WINDOW)] + [2 * WINDOW + 5] * 5
    expected = [direct_nats(model, text.tokens, start, index + 1) for index, start in enumerate(starts)]
    np.testing.assert_allclose(score(config, model, text, WINDOW), expected, **FLOAT32)


def test_evaluations_are_called_by_name(tiny: Start, val: train_gpt.ValData, tmp_path: Path) -> None:
    config = tiny(EVAL_STRIDE=5, EVAL_SEQ_LEN=24)
    model = lively_model(config, torch.float32)
    for name, stride in (("chunked", 24), ("sliding", 5)):
        nats = score(config, model, val, stride)
        result = train_gpt.evaluate(new_run(config, tmp_path), model, val, name, train_gpt.Schedule(config).scored_phase)
        assert result.val_loss == nats.sum(dtype=np.float64) / len(nats) and result.targets == len(val.tokens) - 1


# ----------------------------------------------------------------------------------------------------------------------
# What a score may not depend on


@pytest.mark.parametrize("val_batch_size", [1, 100, 2048])
def test_scores_do_not_depend_on_the_batch_size(
    tiny: Start, config: train_gpt.Config, model: train_gpt.GPT, val: train_gpt.ValData, val_batch_size: int
) -> None:
    expected = score(config, model, val, 16)
    found = score(tiny(VAL_BATCH_SIZE=val_batch_size), model, val, 16)
    np.testing.assert_allclose(found, expected, **FLOAT32)
    assert found.sum(dtype=np.float64) == pytest.approx(expected.sum(dtype=np.float64), rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 3, 7, 200])
def test_the_shares_of_any_number_of_ranks_are_the_scores_of_one_in_order(
    config: train_gpt.Config, model: train_gpt.GPT, val: train_gpt.ValData, ranks: int
) -> None:
    """200 ranks are more than there are windows: some have nothing to do."""
    with torch.inference_mode():
        phase = train_gpt.Schedule(config).scored_phase
        shares = [train_gpt.score_windows(new_run(config, Path(), rank, ranks), model, val, 16, phase, "test") for rank in range(ranks)]
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 16 + WINDOW and (min(sizes) == 0) == (ranks == 200), "work is spread evenly"
    expected = score(config, model, val, 16)
    np.testing.assert_allclose(np.concatenate(shares), expected, **FLOAT32)


def test_two_ranks_give_the_score_of_one_rank(launch: Callable[..., forked.Ranks], reference: Finished, tmp_path: Path) -> None:
    outcome = launch(tmp_path, ranks=2, STAGES="eval", ARTIFACT=reference.folder / "artifact.bin", SCORES_FILE=tmp_path / "scores.npy").finish()
    assert outcome.codes == [0, 0], outcome.output
    found = Finished(tmp_path / "runs" / "run", tmp_path / "scores.npy", outcome.output)
    for name, expected in reference.result()["scores"].items():
        assert found.result()["scores"][name]["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-7), "a model in float32, in batches of other sizes"
        assert found.result()["scores"][name]["val_bpb"] == pytest.approx(expected["val_bpb"], rel=1e-7)
    np.testing.assert_allclose(np.load(found.scores), np.load(reference.scores), rtol=0, atol=3e-6)


# Tokens at which windows begin and end, and others.
@pytest.mark.parametrize("at", [1, 5, 31, 32, 33, 40, 64, 65, 100, 1000, -1])
@pytest.mark.parametrize("name", ["chunked", "sliding"])
def test_no_score_depends_on_a_later_token(config: train_gpt.Config, model: train_gpt.GPT, val: train_gpt.ValData, tmp_path: Path, name: str, at: int) -> None:
    run = new_run(config, tmp_path)
    at %= len(val.tokens)
    other = 5 if val.tokens[at] != 5 else 6

    def scores(data: train_gpt.ValData) -> np.ndarray:
        train_gpt.evaluate(run, model, data, name, train_gpt.Schedule(config).scored_phase, str(tmp_path / "scores.npy"))
        return np.load(tmp_path / "scores.npy")

    before, after = scores(val), scores(with_tokens(val, at, other))
    assert (before[: at - 1] == after[: at - 1]).all(), "scores of earlier tokens are the same, bit for bit"
    assert before[at - 1] != after[at - 1], "the edited token itself is scored anew"
    if at + 1 < len(val.tokens) and val.tokens[at] != config.bos_id:
        assert before[at] != after[at], "and is the context of the next one"


def test_no_score_depends_on_whether_a_document_begins_later(config: train_gpt.Config, model: train_gpt.GPT, val: train_gpt.ValData) -> None:
    begins = np.flatnonzero(val.tokens == config.bos_id)
    at = int(begins[np.diff(begins).argmax()]) + 20  # inside the longest document
    before, after = score(config, model, val, 16), score(config, model, with_tokens(val, at, config.bos_id), 16)
    assert (before[: at - 1] == after[: at - 1]).all() and (before[at - 1 : at + 3] != after[at - 1 : at + 3]).all()


@pytest.mark.parametrize("name", ["chunked", "sliding"])
def test_editing_a_document_changes_no_score_of_another(config: train_gpt.Config, model: train_gpt.GPT, val: train_gpt.ValData, name: str) -> None:
    stride = {"chunked": WINDOW, "sliding": 16}[name]
    begins = np.flatnonzero(val.tokens == config.bos_id)
    before = score(config, model, val, stride)
    leaks = 0
    for number in range(3, len(begins) - 3, 8):
        # Targets of a document: after its BOS, up to and with the next document's BOS, which its last token predicts.
        begin, end = int(begins[number]) + 1, int(begins[number + 1])
        edited = with_tokens(val, slice(begin, end), 4 + (val.tokens[begin:end].astype(np.int64) + 50) % 300)
        after = score(config, model, edited, stride)
        assert (before[: begin - 1] == after[: begin - 1]).all()
        assert (before[begin - 1 : end] != after[begin - 1 : end]).mean() > 0.9
        if config.doc_mask:
            np.testing.assert_allclose(after[end:], before[end:], **FLOAT32)
        leaks += int((before[end:] != after[end:]).sum())
    if not config.doc_mask:
        assert leaks > 50, "without document mask the edits do reach later documents, so that the comparison above can see it"


# ----------------------------------------------------------------------------------------------------------------------
# Bits per byte, and the file of scores


def test_bits_per_byte_are_all_nats_over_all_bytes_of_the_text(tiny: Start, val: train_gpt.ValData, corpus: Path, tmp_path: Path) -> None:
    config = tiny()
    text_bytes = sum(len(document.encode()) for document in (corpus / "val.txt").read_text(encoding="utf-8").split("\x00"))
    model = lively_model(config, torch.float32)
    result = train_gpt.evaluate(new_run(config, tmp_path), model, val, "chunked", train_gpt.Schedule(config).scored_phase)
    nats = score(config, model, val, WINDOW)
    assert result.bytes == text_bytes
    assert result.targets == len(nats) == len(val.tokens) - 1
    total = math.fsum(map(float, nats))
    assert result.val_loss == pytest.approx(total / len(nats), rel=1e-12)
    assert result.val_bpb == pytest.approx(total / math.log(2) / text_bytes, rel=1e-12)


def test_the_scores_file_of_a_run_holds_what_its_artifact_gives_every_target(reference: Finished, tiny: Start, val: train_gpt.ValData) -> None:
    scores, result = np.load(reference.scores), reference.result()
    assert scores.dtype == np.float32 and scores.shape == (len(val.tokens) - 1,)
    assert result["val_loss"] == pytest.approx(float(scores.mean(dtype=np.float64)), rel=1e-12)
    config = tiny()
    model = train_gpt.read_artifact((reference.folder / "artifact.bin").read_bytes(), config, "artifact.bin")
    stride, last = config.eval_stride, len(val.tokens) - 1
    for target in (1, 2, 31, 32, 33, 48, 49, 50, 500, last - 1, last):
        # A target is predicted from the end of the window that scores it, back to that window's beginning.
        end = WINDOW if target <= WINDOW else min(WINDOW + stride * -(-(target - WINDOW) // stride), last)
        assert scores[target - 1] == pytest.approx(direct_nats(model, val.tokens, end - WINDOW, target), abs=3e-6), "a model in float32"


def test_a_scores_file_appears_whole_or_not_at_all(tiny: Start, val: train_gpt.ValData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = tiny(), tmp_path / "scores.npy"
    model = lively_model(config, torch.float32)
    path.write_bytes(b"the scores of before")

    def full_disk(file: Any, array: np.ndarray) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            train_gpt.evaluate(new_run(config, tmp_path), model, val, "chunked", train_gpt.Schedule(config).scored_phase, str(path))
    assert path.read_bytes() == b"the scores of before"
    train_gpt.evaluate(new_run(config, tmp_path), model, val, "chunked", train_gpt.Schedule(config).scored_phase, str(path))
    assert (np.load(path) == score(config, model, val, WINDOW)).all()


def test_only_the_final_evaluation_writes_the_scores_file(run_here: Callable[..., Ended], reference: Finished, tmp_path: Path) -> None:
    artifact = reference.folder / "artifact.bin"
    ended = run_here(tmp_path, STAGES="eval", ARTIFACT=artifact, FINAL_EVAL="chunked", SCORES_FILE=tmp_path / "scores.npy")
    assert ended.code == 0, ended.errors
    result = Finished(tmp_path / "runs" / "run", tmp_path / "scores.npy", "").result()
    assert list(result["scores"]) == ["chunked"] and result["val_bpb"] == reference.result()["quant_val_bpb"]
    assert result["val_loss"] == pytest.approx(float(np.load(tmp_path / "scores.npy").mean(dtype=np.float64)), rel=1e-12)
