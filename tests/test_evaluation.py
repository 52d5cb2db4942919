"""Evaluation: which targets are scored with which context, the scores and what is learnt from them against direct computations, and the rules."""

from __future__ import annotations

import itertools
import math
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from conftest import Ended, Finished, clean_environment, lively_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Config, Evaluator, Ledger, Phase, Score, Stretch, ValData, Violation

Start = Callable[..., Config]

EVALUATIONS = ("chunked", "sliding", "ttt_sgd", "ttt_lora", "ttt_phased")
ADAPTING = EVALUATIONS[2:]
BOS, FILLER, WINDOW, STRIDE = 1, 2, 16, 8
# Scores are float32; a model in float64 leaves their own rounding, half a unit in the last place, as the only difference.
FLOAT32 = {"rtol": 1.2e-7, "atol": 0}
# Adaptation that moves the scores of a model of two layers on a short text, and has several chunks, phases, batches and streams there.
LEARNING: dict[str, Any] = {
    "num_layers": 2, "eval_stride": STRIDE, "ttt_lr": 0.1, "ttt_epochs": 2, "ttt_chunk_tokens": 40, "ttt_grad_clip": 0.5, "ttt_prefix_docs": 6, "ttt_phases": 2,
    "ttt_lora_rank": 3, "ttt_lora_alpha": 4.0, "ttt_lora_lr": 0.02, "ttt_lora_beta2": 0.9, "ttt_lora_chunk_tokens": 4, "ttt_lora_batch_docs": 3,
    "ttt_lora_targets": "q,out,down,head",
}  # fmt: skip
TILT: dict[str, Any] = {"tilt_orders": "1,2"}
# Of documents: one token alone, also twice running; whole chunks; about a window; several windows.
LENGTHS = (9, 1, 40, 17, 16, 1, 1, 30, 8, 2, 5, 3)
INPUTS = sum(LENGTHS)
STARTS = [0, *itertools.accumulate(LENGTHS)][:-1]
SPANS = list(zip(STARTS, [*STARTS[1:], INPUTS], strict=True))


def configured(name: str = "sliding", **settings: Any) -> Config:
    """A configuration of a model of two layers under the evaluation `name`."""
    return small_config(final_eval=name, **{**LEARNING, **settings})


def text(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> ValData:
    """Documents of these lengths with their BOS, and a last target; words come again, so that there is something to learn and to hint at."""
    generator = np.random.default_rng(seed)
    words = [generator.integers(2, 24, size=3) for _ in range(4)]
    documents = [np.concatenate([[BOS], *(words[word] for word in generator.integers(4, size=-(-length // 3)))])[:length] for length in lengths]
    tokens = np.concatenate([*documents, [BOS]]).astype(np.uint16)
    return ValData(tokens, generator.integers(1, 6, size=len(tokens) - 1))


def with_tokens(val: ValData, where: Any, tokens: Any) -> ValData:
    """Returns the split with some tokens replaced."""
    edited = val.tokens.copy()
    edited[where] = tokens
    return ValData(edited, val.target_bytes)


def edited_document(val: ValData, number: int) -> ValData:
    """Returns the split with every token of a document but its BOS replaced by another."""
    first, end = SPANS[number]
    return with_tokens(val, slice(first + 1, end), 2 + (val.tokens[first + 1 : end].astype(np.int64) - 2 + 7) % 22)


def new_run(config: Config, folder: Path = Path()) -> train_gpt.Run:
    """Returns what an evaluation needs, on one rank."""
    return train_gpt.Run(config, train_gpt.World("cpu"), train_gpt.Log(None), folder, train_gpt.StopSignals(), source="")


def new_evaluator(
    config: Config, model: Any, val: ValData, kind: type[Evaluator] = Evaluator, forward: Any = None, plain_seconds: float = 0.0, spent: float = 0.0
) -> Evaluator:
    """Returns the evaluation that `config` names; all its passes go through `forward`, where one is given."""
    phase = train_gpt.Schedule(config).scored_phase
    evaluator = kind(new_run(config), model, model if forward is None else forward, val, config.final_eval, phase, plain_seconds, spent)
    if evaluator.by_document and forward is not None:
        evaluator.adapters = train_gpt.DocumentAdapters(model, phase, config, config.ttt_lora_batch_docs)
        evaluator.adapters.network = forward
    return evaluator


def score(config: Config, model: train_gpt.GPT, val: ValData) -> np.ndarray:
    """Returns the nats of every target."""
    evaluator = new_evaluator(config, model, val)
    evaluator.score()
    return evaluator.scores


def losses(model: Any, tokens: np.ndarray, phase: Phase | None = None) -> torch.Tensor:
    """Returns the nats of tokens[1:], each from the tokens before it, by the definition of cross-entropy."""
    row = torch.from_numpy(tokens.astype(np.int64))
    logits = model.logits(row[None, :-1], phase or Phase(tuple(range(len(model.blocks))), len(row) - 1))[0]
    return logits.logsumexp(dim=-1) - logits[torch.arange(len(row) - 1), row[1:]]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adapters in float64, and the angles of RoPE, so that tokens score alike at another place of a row."""

    def table(config: Config, length: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.outer(torch.arange(length, dtype=torch.float64), train_gpt.rotary_frequencies(config, length).double())
        return angles.cos(), angles.sin()

    monkeypatch.setattr(train_gpt, "rotary_table", table)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


with_exact_numbers = pytest.mark.usefixtures("exact")
with_and_without_documents = pytest.mark.parametrize("doc_mask", [True, False], ids=["documents", "no documents"])


# ----------------------------------------------------------------------------------------------------------------------
# Windows


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, int, np.ndarray]:
    """Returns (first, end, window, stride, starts)."""
    window = draw(st.integers(1, 40))
    end = draw(st.integers(0, 250))
    starts = sorted({0, *draw(st.lists(st.integers(0, 260), max_size=20))})
    return draw(st.integers(0, end)), end, window, draw(st.integers(1, window)), np.array(starts)


@settings(max_examples=300, deadline=None)
@given(plans())
def test_windows_score_every_input_once_in_order_with_its_document_or_what_the_stride_leaves_before_it(plan: tuple[int, int, int, int, np.ndarray]) -> None:
    first, end, window, stride, starts = plan
    rows = train_gpt.plan_windows(*plan)
    assert rows.dtype == np.int64 and rows.shape == (len(rows), 3)
    assert [index for _, position, stop in rows for index in range(position, stop)] == list(range(first, end))
    for start, position, stop in rows.tolist():
        assert 0 <= start <= position < stop == min(start + window, end), "a window scores all that it holds from its first scored input on"
        for index in range(position, stop):
            assert start <= starts[starts <= index][-1] or index - start >= window - stride
    for document, following in itertools.pairwise([*starts[(starts >= first) & (starts < end)].tolist(), end]):
        serving = sum(position < min(document + window, following) and stop > document for _, position, stop in rows)
        assert serving <= 2 - (document in rows[:, 1]), "one forward serves the beginning of a document, besides one that began before it"


@settings(max_examples=100, deadline=None)
@given(plans())
def test_without_documents_windows_are_plain_strides_and_at_the_full_stride_chunks(plan: tuple[int, int, int, int, np.ndarray]) -> None:
    first, end, window, stride, starts = plan
    chunks = [[position, position, min(position + window, end)] for position in range(first, end, window)]
    assert train_gpt.plan_windows(first, end, window, window, starts).tolist() == chunks
    strides = [[0, 0, min(window, end)]] * (end > 0) + [[stop - window, stop - stride, min(stop, end)] for stop in range(window + stride, end + stride, stride)]
    assert train_gpt.plan_windows(0, end, window, stride, np.zeros(1, dtype=np.int64)).tolist() == strides


@pytest.mark.parametrize(
    ("span", "stride", "starts", "expected"),
    [
        ((0, 8), 8, [0], [(0, 0, 8)]),
        ((0, 17), 8, [0], [(0, 0, 8), (8, 8, 16), (16, 16, 17)]),
        ((0, 15), 4, [0], [(0, 0, 8), (4, 8, 12), (8, 12, 15)]),
        ((0, 11), 1, [0], [(0, 0, 8), (1, 8, 9), (2, 9, 10), (3, 10, 11)]),
        ((0, 20), 4, [0, 3, 6], [(0, 0, 8), (6, 8, 14), (10, 14, 18), (14, 18, 20)]),  # the third document begins near enough, once
        ((0, 20), 4, [0, 8, 16], [(0, 0, 8), (8, 8, 16), (16, 16, 20)]),
        ((10, 20), 4, [0, 9], [(9, 10, 17), (13, 17, 20)]),  # inside a document
        ((10, 20), 4, [0], [(6, 10, 14), (10, 14, 18), (14, 18, 20)]),
        ((5, 5), 4, [0], []),
    ],
)
def test_windows_of_small_texts(span: tuple[int, int], stride: int, starts: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert train_gpt.plan_windows(*span, 8, stride, np.array(starts)).tolist() == [list(row) for row in expected]


@pytest.mark.parametrize(("tokens", "expected"), [([1, 5, 1, 1, 6, 1], [0, 2, 3]), ([7, 5, 1, 6], [0, 2]), ([7, 5], [0]), ([1, 1], [0])])
def test_a_document_starts_at_each_bos_that_is_an_input_and_at_the_first_input(tokens: list[int], expected: list[int]) -> None:
    assert train_gpt.document_starts(np.array(tokens), BOS).tolist() == expected


def test_rows_hold_the_text_of_their_windows_and_nothing_after_the_last_target() -> None:
    config, val = configured(**TILT), text()
    windows = np.array([(0, 0, 16), (20, 28, 33), (INPUTS - 3, INPUTS - 2, INPUTS)])
    evaluator = new_evaluator(config, lively_model(config), val)
    batch = evaluator.read(windows, WINDOW)
    for row, (start, _, end) in enumerate(windows):
        for side, there in zip(batch[:3], (val.tokens[:-1], val.tokens[1:], evaluator.hints.tokens), strict=True):
            assert side[row].tolist() == [*there[start:end], *[FILLER] * (WINDOW - (end - start))]
        later = np.arange(len(val.tokens)) > end
        other = new_evaluator(config, lively_model(config), with_tokens(val, later, 5)).read(windows[row : row + 1], WINDOW)
        assert all(torch.equal(one[0], two[row]) for one, two in zip(other[:3], batch[:3], strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Stretches


def test_evaluations_without_global_sgd_go_through_one_stretch() -> None:
    for name in ("chunked", "sliding", "ttt_lora"):
        assert train_gpt.plan_stretches(configured(name), name, INPUTS, np.array(STARTS)) == [Stretch(0, INPUTS)]


def test_sgd_learns_from_every_chunk_but_the_last_at_a_rate_that_falls_as_a_cosine() -> None:
    config = configured("ttt_sgd", ttt_chunk_tokens=10)
    assert train_gpt.plan_stretches(config, "ttt_sgd", 10, np.array([0])) == [Stretch(0, 10)]
    first, second, third, last = train_gpt.plan_stretches(config, "ttt_sgd", 31, np.array([0, 4]))
    assert [(first.first, first.end), (second.first, second.end), (third.first, third.end)] == [(0, 10), (10, 20), (20, 30)] and last == Stretch(30, 31)
    assert [*first.lr_scales, *second.lr_scales, *third.lr_scales] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5], rel=1e-15)


def test_phased_learns_from_whole_documents_of_the_prefix_at_rates_that_fall_within_each_phase() -> None:
    config = configured("ttt_phased", ttt_chunk_tokens=10, ttt_prefix_docs=4, ttt_phases=2)
    starts = np.array([0, 3, 25, 30, 31, 40])
    learnt = [Stretch(0, 25, (1.0, pytest.approx(0.75), pytest.approx(0.25))), Stretch(25, 31, (1.0,))]
    assert train_gpt.plan_stretches(config, "ttt_phased", 60, starts) == [*learnt, Stretch(31, 60)]
    # The last document is never learnt from, and there are no more phases than documents.
    short = [Stretch(0, 3, (1.0,)), Stretch(3, 25, learnt[0].lr_scales), Stretch(25, 30)]
    assert train_gpt.plan_stretches(replace(config, ttt_phases=9), "ttt_phased", 30, starts[:3]) == short
    assert train_gpt.plan_stretches(config, "ttt_phased", 30, np.array([0])) == [Stretch(0, 30)]


# ----------------------------------------------------------------------------------------------------------------------
# Scores against direct computations


@with_exact_numbers
@with_and_without_documents
def test_sliding_by_one_token_is_scoring_each_token_with_a_window_of_context(doc_mask: bool) -> None:
    config, val = configured(doc_mask=doc_mask, eval_stride=1), text()
    model = lively_model(config)
    with torch.no_grad():
        expected = [losses(model, val.tokens[max(0, target - WINDOW) : target + 1])[-1].item() for target in range(1, INPUTS + 1)]
    np.testing.assert_allclose(score(config, model, val), expected, **FLOAT32)


@with_and_without_documents
def test_chunked_is_scoring_each_token_with_its_chunk_up_to_it(doc_mask: bool) -> None:
    config, val = configured("chunked", doc_mask=doc_mask), text()
    model = lively_model(config)
    with torch.no_grad():
        expected = [losses(model, val.tokens[WINDOW * (target // WINDOW) : target + 2])[-1].item() for target in range(INPUTS)]
    assert INPUTS % WINDOW, "the last chunk is shorter"
    np.testing.assert_allclose(score(config, model, val), expected, **FLOAT32)


def test_the_window_and_the_stride_are_settings() -> None:
    config, val = configured(eval_seq_len=24, eval_stride=5, doc_mask=False), text()
    model = lively_model(config)
    with torch.no_grad():
        expected = [*losses(model, val.tokens[:25]), *losses(model, val.tokens[5:30])[-5:]]
    np.testing.assert_allclose(score(config, model, val)[:29], expected, **FLOAT32)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_totals_are_sums_in_float64_over_all_targets_and_all_bytes(name: str) -> None:
    config, val = configured(name, **TILT), text()
    evaluator = new_evaluator(config, lively_model(config), val)
    found = evaluator.score()
    total, text_bytes = math.fsum(map(float, evaluator.scores)), int(val.target_bytes.sum())
    assert evaluator.scores.dtype == np.float32 and (found.targets, found.bytes) == (INPUTS, text_bytes)
    assert found.val_loss == pytest.approx(total / INPUTS, rel=1e-14)
    assert found.val_bpb == pytest.approx(total / math.log(2) / text_bytes, rel=1e-14)
    again = train_gpt.evaluate(new_run(config), evaluator.model, evaluator.model, val, name, evaluator.phase)
    assert again._replace(seconds=found.seconds) == found and found.adapted_frac == 1


@with_exact_numbers
@pytest.mark.parametrize("val_batch_size", [1, 100])
@pytest.mark.parametrize("name", ["chunked", "sliding", "ttt_sgd"])
def test_scores_do_not_depend_on_the_batch_size(name: str, val_batch_size: int) -> None:
    config, val = configured(name), text()
    model = lively_model(config)
    np.testing.assert_allclose(score(replace(config, val_batch_size=val_batch_size), model, val), score(config, model, val), **FLOAT32)


# ----------------------------------------------------------------------------------------------------------------------
# Ledger


def test_a_target_is_scored_once() -> None:
    ledger = Ledger(10)
    ledger.write(2, np.array([1.5, 2.5]))
    ledger.write(4, np.array([3.5]))
    assert ledger.nats.tolist() == [0, 0, 1.5, 2.5, 3.5, 0, 0, 0, 0, 0] and ledger.nats.dtype == np.float32
    for first, count in ((2, 1), (3, 1), (1, 3), (4, 5), (0, 10)):
        with pytest.raises(Violation, match=f"inputs {first} to {first + count} would be scored twice"):
            ledger.write(first, np.zeros(count))
    assert ledger.nats.tolist() == [0, 0, 1.5, 2.5, 3.5, 0, 0, 0, 0, 0]


def test_nothing_is_learnt_from_before_all_of_it_is_scored() -> None:
    ledger = Ledger(10)
    ledger.write(2, np.ones(5))
    ledger.allow_learning(2, 7)
    for first, end in ((1, 7), (2, 8), (0, 1), (0, 10)):
        with pytest.raises(Violation, match=f"learning from inputs {first} to {end} before all of their targets are scored"):
            ledger.allow_learning(first, end)


def test_settling_refuses_targets_without_a_score() -> None:
    ledger, world = Ledger(10), train_gpt.World("cpu")
    ledger.write(2, np.arange(5.0))
    ledger.settle(2, 7, world)
    with pytest.raises(Violation, match="2 targets of inputs 2 to 9 are not scored exactly once"):
        ledger.settle(2, 9, world)
    assert ledger.nats.tolist() == [0, 0, *range(5), 0, 0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Ranks

# What every rank does with the cases in a file: scores them, and settles ledgers of which it has filled some spans.
RANKS = """
import pickle, sys
from pathlib import Path
import torch
import train_gpt

world = train_gpt.World("cpu")
evaluations, ledgers, val = pickle.loads(Path(sys.argv[1]).read_bytes())
found = {}
for label, (config, weights) in evaluations.items():
    model = train_gpt.GPT(config, torch.float64).double()
    model.load_state_dict(weights)
    run = train_gpt.Run(config, world, train_gpt.Log(None), Path(), train_gpt.StopSignals(), "")
    phase, made = train_gpt.Schedule(config).scored_phase, []

    def new_evaluator(text):
        made.append(train_gpt.Evaluator(run, model, model, text, config.final_eval, phase))
        return made[-1]

    try:
        if config.audit:
            found[label] = train_gpt.audit(run, new_evaluator, val)
        else:
            total = new_evaluator(val).score()
            found[label] = made[0].scores, total, all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    except Exception as error:
        found[label] = repr(error)
for label, shares in ledgers.items():
    ledger = train_gpt.Ledger(10)
    for first, end in shares[world.rank]:
        ledger.write(first, torch.arange(first, end).numpy() + 0.5)
    try:
        ledger.settle(1, 9, world)
        found[label] = ledger.nats.tolist(), ledger.written.tolist()
    except train_gpt.Violation as error:
        found[label] = str(error)
Path(sys.argv[1] + f".{world.rank}").write_bytes(pickle.dumps(found))
world.close()
"""


# A forward of one row each, and at most two rows a chunk: two ranks then add up the same gradients in the same order.
ROW_BY_ROW: dict[str, Any] = {"val_batch_size": 1, "micro_batch_tokens": 16, "train_batch_tokens": 16, "ttt_chunk_tokens": 32, "ttt_epochs": 1}
ON_RANKS = {
    "sliding": configured(**ROW_BY_ROW, **TILT),
    "ttt_sgd": configured("ttt_sgd", **ROW_BY_ROW, **TILT),
    "ttt_lora": configured("ttt_lora", **TILT),
    "ttt_lora, warm": configured("ttt_lora", ttt_lora_warm_a=True, ttt_lora_batch_docs=1),
    "ttt_phased": configured("ttt_phased", **ROW_BY_ROW, **TILT, ttt_phases=3),
}
AUDITED_ON_RANKS = {
    f"audit {name}": configured(name, audit=True, audit_tokens=64, ttt_lora_batch_docs=64, **TILT) for name in ("ttt_lora", "ttt_phased")
}  # fmt: skip
SETTLED = {
    "shared": ([(0, 3), (8, 9)], [(3, 8)]),
    "scored by none": ([(1, 3)], [(4, 9)]),
    "scored by two": ([(1, 4)], [(3, 9)]),
    "scored by none and by two": ([(1, 5)], [(2, 4), (6, 9)]),
}


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks finds for these cases: scores of a lively model and audits under each configuration, and ledgers as they settle."""
    folder, configs = tmp_path_factory.mktemp("ranks"), {**ON_RANKS, **AUDITED_ON_RANKS}
    script, work = folder / "ranks.py", folder / "work"
    script.write_text(RANKS, encoding="utf-8")
    cases = {label: (config, lively_model(config).state_dict()) for label, config in configs.items()}
    work.write_bytes(pickle.dumps((cases, SETTLED, text())))
    outcome = forked.start(script, [str(work)], clean_environment(), folder, ranks=2).finish()
    assert outcome.codes == [0, 0], outcome.output
    return [pickle.loads(work.with_name(f"work.{rank}").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("label", ON_RANKS)
def test_two_ranks_give_the_scores_of_one(on_two_ranks: list[dict[str, Any]], label: str) -> None:
    """Bit for bit, as rows and the order of sums are the same. Some chunks have one row, and so nothing for the second rank."""
    config = ON_RANKS[label]
    evaluator = new_evaluator(config, lively_model(config), text())
    total = evaluator.score()
    for found in on_two_ranks:
        nats, other_total, is_restored = found[label]
        assert is_restored and other_total.adapted_frac == 1
        assert (nats == evaluator.scores).all() and other_total._replace(seconds=total.seconds) == total


@pytest.mark.parametrize("label", AUDITED_ON_RANKS)
def test_an_audit_on_two_ranks_finds_nothing_wrong(on_two_ranks: list[dict[str, Any]], label: str) -> None:
    """Also where one of them has nothing to score."""
    assert [found[label] for found in on_two_ranks] == [None, None]


def test_settling_brings_every_score_to_every_rank_and_refuses_targets_scored_by_none_or_by_two(on_two_ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(on_two_ranks):
        nats, written = found["shared"]
        assert nats == [0.5 if rank == 0 else 0, *(index + 0.5 for index in range(1, 9)), 0] and written == [rank == 0, *[True] * 8, False]
        for label, wrong in (("scored by none", 1), ("scored by two", 1), ("scored by none and by two", 3)):
            assert found[label] == f"{wrong} targets of inputs 1 to 9 are not scored exactly once"


@pytest.mark.parametrize("costs", [[5, 3, 3, 2, 2, 1], [1] * 10, [9, 1, 1], [4]])
def test_ranks_share_work_once_dearest_first_and_evenly(costs: list[float]) -> None:
    world = train_gpt.World("cpu")
    assert world.share_of(costs) == sorted(range(len(costs)), key=lambda number: -costs[number])
    for size in (2, 3, 4):
        shares = []
        for rank in range(size):
            world.rank, world.size = rank, size
            shares.append(world.share_of(costs))
        assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
        assert all(costs[one] >= costs[two] for share in shares for one, two in itertools.pairwise(share))
        loads = [sum(costs[number] for number in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs)


# ----------------------------------------------------------------------------------------------------------------------
# A LoRA per document


def unrolled(model: train_gpt.GPT, phase: Phase) -> train_gpt.GPT:
    """Returns the same network with a block for every executed layer and a head of its own."""
    twin = train_gpt.GPT(replace(model.config, num_layers=len(phase.order), num_loops=0, tie_embeddings=False), torch.float64).double()
    weights = model.state_dict()
    for name in twin.state_dict():
        top, _, rest = name.partition(".")
        if top == "blocks":
            slot, _, inner = rest.partition(".")
            weights[name] = model.state_dict()[f"blocks.{phase.order[int(slot)]}.{inner}"]
    twin.load_state_dict({name: weights[name] for name in twin.state_dict()})
    return twin


def adapted_matrices(twin: train_gpt.GPT, slots: Sequence[Any]) -> list[tuple[str, Any]]:
    """Returns (name of a matrix, its LowRank), in the order of slots."""
    found = []
    for slot, parts in enumerate(slots):
        for projection, part in parts.items():
            block = f"blocks.{slot}." if slot + 1 < len(slots) else ""
            (name,) = (name for name in train_gpt.weight_parts(twin) if name.startswith(block) and projection in name.split("."))
            found.append((name, part))
    return found


def adapt_one_by_one(
    config: Config, model: train_gpt.GPT, val: ValData, spans: Sequence[tuple[int, int]], kept: dict[int, Any] | None = None
) -> dict[int, list[float]]:
    """Returns first input -> nats of documents, each alone, with W + alpha / rank B A in place of each matrix W; a step of AdamW after each chunk.

    `kept`: number of a stream -> the A that its last document left, where documents go round as many streams as it has keys.
    """
    phase, size = train_gpt.Schedule(config).scored_phase, config.ttt_lora_chunk_tokens
    twin = unrolled(model, phase)
    adapters = train_gpt.DocumentAdapters(model, phase, config, 1)
    adapters.reset(None)
    places = adapted_matrices(twin, adapters.slots(adapters.values))
    plain, scores = dict(twin.named_parameters()), {}
    for number, (first, end) in enumerate(spans):
        factors = []
        for place, (name, part) in enumerate(places):
            start = kept[number % len(kept)][place] if kept and kept[number % len(kept)] else part.a[0]
            factors += [start.double().clone().requires_grad_(), torch.zeros(len(plain[name]), config.ttt_lora_rank, requires_grad=True)]
        second = [torch.zeros_like(factor) for factor in factors]
        scores[first] = []
        for step, begin in enumerate(range(first, end, size), start=1):
            stop, start = min(begin + size, end), max(first, begin + size - config.window)
            changed = {
                name: plain[name].detach() + config.ttt_lora_alpha / config.ttt_lora_rank * b @ a
                for (name, _), a, b in zip(places, factors[::2], factors[1::2], strict=True)
            }
            row = torch.from_numpy(val.tokens[start : stop + 1].astype(np.int64))[None]
            own = torch.func.functional_call(twin, changed, (row[:, :-1], row[:, 1:], Phase(tuple(range(len(phase.order))), stop - start)))[0, begin - start :]
            scores[first] += own.tolist()
            if stop < end:
                for factor, square, gradient in zip(factors, second, torch.autograd.grad(own.mean(), factors), strict=True):
                    with torch.no_grad():
                        square.mul_(config.ttt_lora_beta2).add_((1 - config.ttt_lora_beta2) * gradient.square())
                        factor.mul_(1 - config.ttt_lora_lr * config.ttt_lora_weight_decay)
                        factor.sub_(config.ttt_lora_lr * gradient / ((square / (1 - config.ttt_lora_beta2**step)).sqrt() + 1e-10))
        if kept is not None:
            kept[number % len(kept)] = [factor.detach() for factor in factors[::2]]
    return scores


def in_text_order(scores: dict[int, list[float]]) -> list[float]:
    """Returns the nats of documents one after another."""
    return list(itertools.chain(*(scores[first] for first in sorted(scores))))


@with_exact_numbers
@pytest.mark.parametrize(
    "features",
    [{}, {"num_loops": 1, "loop_start": 0, "loop_end": 1}, {"tie_embeddings": False, "swiglu": True, "ttt_lora_weight_decay": 3.0}],
    ids=["tied", "looped", "untied"],
)  # fmt: skip
def test_each_document_is_scored_with_adapters_that_follow_a_reference_of_its_own(features: dict[str, Any]) -> None:
    """Where a layer runs twice, each pass has adapters of its own; the head's do not change the embedding."""
    config, val = configured("ttt_lora", ttt_lora_targets=Config.ttt_lora_targets, **features), text()
    model = lively_model(config)
    found = score(config, model, val)
    np.testing.assert_allclose(found, in_text_order(adapt_one_by_one(config, model, val, SPANS)), **FLOAT32)
    assert np.abs(found - score(replace(config, final_eval="sliding"), model, val)).mean() > 0.01


@with_exact_numbers
@pytest.mark.parametrize("target", Config.ttt_lora_targets.split(","))
def test_each_target_alone_has_the_effect_of_the_reference(target: str) -> None:
    config = configured("ttt_lora", swiglu=True, ttt_lora_targets=target)
    model, val = lively_model(config), text([23, 6])
    found = score(config, model, val)
    np.testing.assert_allclose(found, in_text_order(adapt_one_by_one(config, model, val, [(0, 23), (23, 29)])), **FLOAT32)
    assert np.abs(found[4:23] - score(replace(config, final_eval="sliding"), model, val)[4:23]).min() > 1e-5


@pytest.mark.parametrize("compute", ["float64", "float32"])
def test_adapters_whose_b_is_zero_change_no_score_by_a_bit(compute: str) -> None:
    config, tokens = configured("ttt_lora", num_loops=1, loop_end=1), torch.randint(24, (3, WINDOW + 1), generator=torch.Generator().manual_seed(0))
    model, phase = lively_model(config, getattr(torch, compute)), train_gpt.Schedule(config).scored_phase
    adapters = train_gpt.DocumentAdapters(model, phase, config, 3)
    adapters.reset(None)
    with torch.no_grad():
        plain, adapted = (model(tokens[:, :-1], tokens[:, 1:], phase, given) for given in (None, adapters.slots(adapters.values)))
        assert torch.equal(plain, adapted)
        adapters.values[2, len(adapters.start) :] = 0.1
        moved = model(tokens[:, :-1], tokens[:, 1:], phase, adapters.slots(adapters.values))
    assert torch.equal(moved[:2], plain[:2]) and not torch.equal(moved[2], plain[2])


def test_adapters_start_alike_for_every_document_and_as_linear_layers_do() -> None:
    config = configured("ttt_lora", ttt_lora_rank=40, ttt_lora_targets=Config.ttt_lora_targets)
    model, phase = lively_model(config), train_gpt.Schedule(config).scored_phase
    adapters = train_gpt.DocumentAdapters(model, phase, config, 5)
    adapters.reset(None)
    slots = adapters.slots(adapters.values)
    assert [sorted(slot) for slot in slots] == [sorted(["q", "k", "v", "out", "up", "down"])] * 2 + [["head"]]
    parts = [part for slot in slots for part in slot.values()]
    for part in parts:
        assert torch.equal(part.a[0], part.a[4]) and not part.b.any()
        bound = 1 / math.sqrt(part.a.shape[-1])
        assert 0.95 * bound < part.a.abs().max() <= bound and abs(part.a[0].mean()) < 0.1 * bound
    assert not torch.equal(parts[0].a, parts[1].a[:, :, :16])
    before = adapters.values.clone()
    adapters.serve(1, 3)
    adapters.served.sum().backward()
    adapters.learn(1, 2, 1)
    assert torch.equal(adapters.values[[0, 3, 4]], before[[0, 3, 4]]) and (adapters.values[1:3] != before[1:3]).all()
    adapters.reset(None)
    assert torch.equal(adapters.values, before) and not adapters.squares.any()


def test_adapters_learn_as_adamw_without_a_first_moment_does() -> None:
    config = configured("ttt_lora", ttt_lora_weight_decay=3.0, ttt_lora_beta2=0.9)
    adapters, generator = train_gpt.DocumentAdapters(lively_model(config), train_gpt.Schedule(config).scored_phase, config, 4), torch.Generator().manual_seed(0)
    adapters.values, adapters.squares = torch.randn(adapters.values.shape, generator=generator).double(), adapters.squares.double()
    reference = adapters.values[1:3].clone().requires_grad_()
    optimizer = torch.optim.AdamW([reference], config.ttt_lora_lr, (0.0, 0.9), eps=1e-10, weight_decay=3.0)
    for step in range(1, 5):
        reference.grad = torch.randn(reference.shape, generator=generator, dtype=torch.float64)
        adapters.serve(1, 2)
        adapters.served.grad = reference.grad.clone()
        adapters.learn(1, 2, step)
        optimizer.step()
    torch.testing.assert_close(adapters.values[1:3], reference.detach(), rtol=1e-12, atol=1e-13)


@with_exact_numbers
def test_the_first_chunk_of_every_document_scores_as_without_adapters() -> None:
    config, val = configured("ttt_lora"), text()
    model = lively_model(config)
    found, plain = score(config, model, val), score(replace(config, final_eval="sliding"), model, val)
    first = np.concatenate([np.arange(start, min(start + 4, end)) for start, end in SPANS])
    np.testing.assert_allclose(found[first], plain[first], **FLOAT32)
    assert (np.delete(found, first) != np.delete(plain, first)).mean() > 0.99


@with_exact_numbers
@pytest.mark.parametrize("batch_docs", [1, 2, 64])
def test_a_document_scores_alone_as_in_a_batch_of_others(batch_docs: int) -> None:
    config, val = configured("ttt_lora"), text()
    model = lively_model(config)
    np.testing.assert_allclose(score(replace(config, ttt_lora_batch_docs=batch_docs), model, val), score(config, model, val), **FLOAT32)


@with_exact_numbers
@pytest.mark.parametrize(("chunk", "targets"), [(1, "v,out,up,down,head"), (5, Config.ttt_lora_targets), (16, Config.ttt_lora_targets)])
def test_chunks_of_any_size_up_to_the_window_follow_the_reference(chunk: int, targets: str) -> None:
    """A first chunk of one token attends to itself alone, so queries and keys have no gradient but rounding errors, which Adam would make large."""
    config, val = configured("ttt_lora", ttt_lora_chunk_tokens=chunk, ttt_lora_targets=targets), text([37, 16, 6, 1])
    model = lively_model(config)
    expected = in_text_order(adapt_one_by_one(config, model, val, [(0, 37), (37, 53), (53, 59), (59, 60)]))
    np.testing.assert_allclose(score(config, model, val), expected, **FLOAT32)


@with_exact_numbers
def test_documents_of_one_token_are_scored_without_learning() -> None:
    config, val = configured("ttt_lora"), text([1] * 20)
    model = lively_model(config)
    np.testing.assert_allclose(score(config, model, val), score(replace(config, final_eval="sliding"), model, val), **FLOAT32)


@with_exact_numbers
def test_warm_a_goes_on_within_streams_in_text_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "STREAMS", 3)
    config, val = configured("ttt_lora", ttt_lora_warm_a=True, ttt_lora_batch_docs=1), text()
    model = lively_model(config)
    expected = in_text_order(adapt_one_by_one(config, model, val, SPANS, {0: None, 1: None, 2: None}))
    found = score(config, model, val)
    np.testing.assert_allclose(found, expected, **FLOAT32)
    cold = score(replace(config, ttt_lora_warm_a=False), model, val)
    # The fifth document follows one of a single token.
    assert [bool((found[first:end] != cold[first:end]).any()) for first, end in SPANS[:5]] == [False, False, False, True, False]


def test_warm_a_goes_on_when_a_phase_has_fewer_documents_than_a_batch() -> None:
    config, val = configured("ttt_phased", ttt_lora_warm_a=True, ttt_lora_batch_docs=4, ttt_prefix_docs=3, ttt_phases=1), text()
    assert score(config, lively_model(config), val).all()


def attend_in_one_sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, longest: int) -> torch.Tensor:
    """Attention over documents laid end to end, (N, heads, C), as a GPU's kernels take them."""
    places = torch.arange(len(q))
    ids = torch.bucketize(places, offsets, right=True)
    mask = (ids[:, None] == ids) & (places[:, None] >= places)
    return train_gpt.attention_reference(*(side.transpose(0, 1)[None] for side in (q, k, v)), mask)[0].transpose(0, 1)


@pytest.mark.parametrize("is_ragged", [False, True])
def test_compiled_adaptation_scores_as_an_eager_one_with_two_graphs_for_all_documents(monkeypatch: pytest.MonkeyPatch, is_ragged: bool) -> None:
    """By a back end that takes seconds: documents of all lengths, alone and in company, share graphs, and an evaluation after a rehearsal makes none."""
    torch._dynamo.reset()
    compile_, graphs = torch.compile, []
    monkeypatch.setattr(torch, "compile", partial(compile_, backend=lambda graph, inputs: graphs.append(graph) or graph.forward))
    config = configured("ttt_lora", compile=True, ttt_lora_targets="q,head", ttt_lora_batch_docs=3, tilt_orders="2", val_batch_size=64)
    val = text([6, 8, 27, 1, 12, 31, 2, 16])
    model, phase = lively_model(config), train_gpt.Schedule(config).scored_phase
    run, forward, expected = new_run(config), train_gpt.compiled(model, config), score(replace(config, compile=False), model, val)
    if is_ragged:
        model.kernels = train_gpt.Kernels(train_gpt.ragged(attend_in_one_sequence))
    rehearsed = train_gpt.rehearse(run, model, forward, "ttt_lora", phase)
    made = len(graphs)
    assert made == 5, "without adapters; forward and update, for one document and for several"
    evaluator = train_gpt.Evaluator(run, model, forward, val, "ttt_lora", phase, rehearsed=rehearsed)
    evaluator.score()
    assert len(graphs) == made
    np.testing.assert_allclose(evaluator.scores, expected, **FLOAT32)
    rehearsed = train_gpt.rehearse(run, model, forward, "sliding", phase)
    assert len(graphs) == made + 1, "without hints, which the final evaluation alone has"
    train_gpt.Evaluator(run, model, forward, val, "sliding", phase, rehearsed=rehearsed).score()
    assert len(graphs) == made + 1


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["sliding", *ADAPTING])
def test_what_an_evaluation_reads_is_what_its_clock_was_told(name: str, compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled passes are filled up, and that takes time too. A pass that is learnt from counts three times."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    config = configured(name, compile=compile, ttt_lora_chunk_tokens=3, ttt_lora_batch_docs=4, ttt_lora_targets="q", val_batch_size=100, ttt_phases=2)
    model, val, read = lively_model(config), text(range(1, 31)), [0]
    forward = model.forward

    def noted(tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        read[0] += tokens.numel() * (3 if torch.is_grad_enabled() else 1)
        return forward(tokens, *others)

    monkeypatch.setattr(model, "forward", noted)
    evaluator = new_evaluator(config, model, val)
    evaluator.score()
    assert evaluator.done == read[0]
    assert evaluator.total == read[0]


@pytest.mark.parametrize("seed", range(6))
def test_the_audit_of_ragged_attention_looks_at_rows_more_crowded_than_their_batch(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_gpt.ATTENTION, "sdpa", lambda: train_gpt.ragged(attend_in_one_sequence))
    config = configured("sliding", audit_tokens=300, seed=seed)
    audited(config, lively_model(config), text([*[2] * 20, *[40] * 6]))


@pytest.mark.parametrize("name", ["sliding", *ADAPTING])
def test_a_rehearsal_meets_every_shape_that_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents have all lengths, and a window many chunks. A pass with adapters is compiled for one row and for any other number."""
    config = configured(name, compile=True, tilt_orders="2", ttt_lora_chunk_tokens=3, ttt_lora_batch_docs=4, ttt_lora_targets="q", val_batch_size=100)
    model, val, shapes = lively_model(config), text(range(1, 31)), set[Any]()
    forward = model.forward

    def noted(tokens: torch.Tensor, targets: torch.Tensor, phase: Phase, adapters: Any = None) -> torch.Tensor:
        trained = torch.is_grad_enabled(), all(parameter.requires_grad for parameter in model.parameters())
        shapes.add((trained, targets.dim(), tokens.shape if adapters is None else min(len(tokens), 2), phase))
        return forward(tokens, targets, phase, adapters)

    monkeypatch.setattr(model, "forward", noted)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    phase, run = train_gpt.Schedule(config).scored_phase, new_run(config)
    before = [parameter.clone() for parameter in model.parameters()]
    for each in ("chunked", name):
        train_gpt.rehearse(run, model, model, each, phase)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    rehearsed = shapes.copy()
    assert len(rehearsed) <= 5
    for each, seconds in (("chunked", 0.0), (name, 0.0), (name, 1e-6)):  # the last one has no time to adapt
        train_gpt.Evaluator(new_run(replace(config, eval_seconds=seconds)), model, model, val, each, phase, plain_seconds=1.0).score()
    assert shapes == rehearsed


# ----------------------------------------------------------------------------------------------------------------------
# Global SGD


def descend(config: Config, model: train_gpt.GPT, val: ValData, stretch: Stretch, momenta: list[torch.Tensor]) -> None:
    """Takes the steps of SGD on `model` that a stretch asks for, by their formula."""
    parameters = list(model.parameters())
    for first, scale in zip(range(stretch.first, stretch.end, config.ttt_chunk_tokens), stretch.lr_scales, strict=True):
        end = min(first + config.ttt_chunk_tokens, stretch.end)
        for _ in range(config.ttt_epochs):
            rows = [losses(model, val.tokens[start : min(start + config.train_seq_len, end) + 1]) for start in range(first, end, config.train_seq_len)]
            gradients = torch.autograd.grad(torch.cat(rows).mean(), parameters)
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
            for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
                momentum.mul_(config.ttt_momentum).add_(gradient * min(1.0, config.ttt_grad_clip / (norm + 1e-6)))
                parameter.data.sub_(config.ttt_lr * scale * momentum)


@with_exact_numbers
@with_and_without_documents
@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_sgd_scores_each_chunk_with_what_a_reference_learnt_from_those_before_it(doc_mask: bool, clip: float) -> None:
    config, val = configured("ttt_sgd", doc_mask=doc_mask, ttt_grad_clip=clip, ttt_lr=0.1 if clip < 1 else 0.01), text()
    model, twin = lively_model(config), lively_model(config)
    momenta = [torch.zeros_like(parameter) for parameter in twin.parameters()]
    starts = np.array(STARTS if doc_mask else [0])
    expected: list[float] = []
    for stretch in train_gpt.plan_stretches(config, "ttt_sgd", INPUTS, starts):
        with torch.no_grad():
            for start, position, stop in train_gpt.plan_windows(stretch.first, stretch.end, WINDOW, STRIDE, starts):
                expected += losses(twin, val.tokens[start : stop + 1])[position - start :].tolist()
        if stretch.lr_scales:
            descend(config, twin, val, stretch, momenta)
    found = score(config, model, val)
    np.testing.assert_allclose(found, expected, **FLOAT32)
    assert np.abs(found - score(replace(config, ttt_lr=0.0), model, val))[40:].mean() > 0.01
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), lively_model(config).parameters(), strict=True)), "the weights are restored"


@with_exact_numbers
@pytest.mark.parametrize("phases", [1, 2, 6])
def test_phased_is_sgd_between_phases_and_adapters_within(phases: int) -> None:
    config, val = configured("ttt_phased", ttt_phases=phases, ttt_chunk_tokens=20), text()
    model, twin = lively_model(config), lively_model(config)
    momenta = [torch.zeros_like(parameter) for parameter in twin.parameters()]
    expected: list[float] = []
    stretches = train_gpt.plan_stretches(config, "ttt_phased", INPUTS, np.array(STARTS))
    assert len(stretches) == phases + 1
    for stretch in stretches:
        spans = [(first, end) for first, end in SPANS if stretch.first <= first < stretch.end]
        expected += in_text_order(adapt_one_by_one(config, twin, val, spans))
        if stretch.lr_scales:
            descend(config, twin, val, stretch, momenta)
    np.testing.assert_allclose(score(config, model, val), expected, **FLOAT32)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), lively_model(config).parameters(), strict=True)), "the weights are restored"


@pytest.mark.parametrize("name", ["ttt_sgd", "ttt_phased"])
def test_weights_change_only_between_stretches_and_all_but_the_last_is_learnt_from(name: str) -> None:
    """Every token but BOS is its own place, so that rows tell which text they hold."""
    config = configured(name, vocab_size=INPUTS + 3, val_batch_size=1, ttt_lora_batch_docs=1)
    tokens = np.arange(2, INPUTS + 3)
    tokens[STARTS] = BOS
    model, scoring, learnt = lively_model(config), list[tuple[float, int]](), set[int]()

    def forward(tokens: torch.Tensor, targets: torch.Tensor, phase: Phase, adapters: Any = None) -> torch.Tensor:
        if torch.is_grad_enabled() and adapters is None:
            learnt.update(targets.flatten().tolist())
        else:
            scoring.append((float(sum(parameter.sum() for parameter in model.parameters())), int(tokens.max())))
        return model(tokens, targets, phase, adapters)

    evaluator = new_evaluator(config, model, ValData(tokens, np.ones(INPUTS, dtype=np.int64)), forward=forward)
    evaluator.score()
    weights = list(dict.fromkeys(digest for digest, _ in scoring))
    assert len(weights) == len(evaluator.stretches) == {"ttt_sgd": 4, "ttt_phased": 3}[name]
    assert [digest for digest, _ in scoring] == sorted((digest for digest, _ in scoring), key=weights.index), "weights never go back before the end"
    for digest, place in scoring:
        stretch = evaluator.stretches[weights.index(digest)]
        assert place == FILLER or stretch.first <= place - 2 <= stretch.end
    assert learnt == {BOS, FILLER, *tokens[1 : evaluator.stretches[-1].first + 1].tolist()}


# ----------------------------------------------------------------------------------------------------------------------
# Token tilt


def hints_by_dictionary(tokens: np.ndarray, order: int) -> list[tuple[int, int]]:
    """Returns (what came last after the `order` tokens before it, times running) at every target; (0, 0) where nothing has."""
    followers: dict[tuple[int, ...], list[int]] = {}
    hints = []
    for target in range(1, len(tokens)):
        context = tuple(tokens[max(target - order, 0) : target].tolist())
        past = followers.setdefault(context, []) if len(context) == order else []
        running = next((count for count, token in enumerate(reversed(past)) if token != past[-1]), len(past))
        hints.append((past[-1], min(running, train_gpt.MOST_RUNNING)) if past else (0, 0))
        past.append(int(tokens[target]))
    return hints


def pairs(found: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    """Returns both arrays as one list."""
    return list(zip(found[0].tolist(), found[1].tolist(), strict=True))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(2, 400), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_hints_are_what_came_last_and_depend_only_on_the_text_before(alphabet: int, length: int, order: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(alphabet, size=length).astype(np.uint16)
    if generator.random() < 0.5:
        tokens[length // 2 :] = tokens[: length - length // 2]  # the first half again
    found = pairs(train_gpt.hints_of_order(tokens, order))
    assert found == hints_by_dictionary(tokens, order)
    cut = int(generator.integers(1, length))
    tokens[cut:] = generator.integers(alphabet, size=length - cut)
    assert pairs(train_gpt.hints_of_order(tokens, order))[:cut] == found[:cut], "also the hint at the first target that is another"
    assert pairs(train_gpt.hints_of_order(tokens[: cut + 1], order)) == found[:cut]


@pytest.mark.parametrize(("alphabet", "order"), [(5, 4), (20, 3), (60_000, 1)])
def test_hints_of_a_long_text_with_many_contexts_are_what_came_last(alphabet: int, order: int) -> None:
    tokens = np.random.default_rng(0).integers(alphabet, size=20_000).astype(np.uint16)
    expected = hints_by_dictionary(tokens, order)
    assert sum(runs > 0 for _, runs in expected) > 2000
    assert pairs(train_gpt.hints_of_order(tokens, order)) == expected


def test_the_longest_context_that_came_before_hints() -> None:
    tokens = np.random.default_rng(0).geometric(0.6, size=3000).astype(np.uint16)
    hints = train_gpt.hints_of(tokens, [1, 3, 5], train_gpt.World("cpu"))
    by_order = [hints_by_dictionary(tokens, order) for order in (1, 3, 5)]
    for target, choices in enumerate(zip(*by_order, strict=True)):
        number = max((number for number, (_, runs) in enumerate(choices) if runs), default=None)
        expected = (0, 0) if number is None else (choices[number][0], number * train_gpt.MOST_RUNNING + choices[number][1])
        assert (hints.tokens[target], hints.kinds[target]) == expected
    assert len(set(hints.kinds.tolist())) == 10, "every kind, and none"


def tilted_by_formula(nats: list[float], hint_nats: list[float], kinds: list[int], hits: list[bool]) -> tuple[list[float], list[float]]:
    """Returns (scores, shares) by the definition: a logistic regression for each kind, by AdaGrad."""
    learnt: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    scores, shares = [], []
    for nat, hint_nat, kind, hit in zip(nats, hint_nats, kinds, hits, strict=True):
        share = 0.0
        if kind and hint_nat >= train_gpt.SURE_NATS:
            weights, squares = learnt.setdefault(kind, (np.array([0.0, 1.0]), np.ones(2)))
            p = math.exp(-hint_nat)
            features = np.array([1.0, math.log(p / (1 - p))])
            share = 1 / (1 + math.exp(-(weights @ features)))
            nat = -math.log(share) if hit else nat - math.log((1 - share) / (1 - p))
            slopes = (hit - share) * features
            squares += slopes**2
            weights += train_gpt.TILT_RATE * slopes / np.sqrt(squares)
        scores.append(nat)
        shares.append(share)
    return scores, shares


def random_hints(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, train_gpt.Hints, np.ndarray]:
    """Returns arguments of `tilt`: nats of targets and hints, hints of which some come true, targets."""
    generator = np.random.default_rng(seed)
    targets, kinds = generator.integers(9, size=count), generator.integers(4, size=count).astype(np.uint8)
    tokens = np.where(kinds == 0, 0, np.where(generator.random(count) < kinds / 4, targets, (targets + 1) % 9)).astype(np.uint16)
    nats, hint_nats = generator.exponential(2, count).astype(np.float32), (generator.exponential(2, count) ** 3).clip(max=12).astype(np.float32)
    hint_nats = np.where(tokens == targets, nats, hint_nats)
    return nats, hint_nats, train_gpt.Hints(tokens, kinds), targets


def test_a_tilt_is_a_regression_on_which_hints_came_true() -> None:
    nats, hint_nats, hints, targets = random_hints(3000)
    scores, shares = train_gpt.tilt(nats, hint_nats, hints, targets)
    expected = tilted_by_formula(nats.tolist(), hint_nats.tolist(), hints.kinds.tolist(), (hints.tokens == targets).tolist())
    np.testing.assert_allclose(scores, expected[0], rtol=1e-6)
    np.testing.assert_allclose(shares, expected[1], rtol=1e-9)
    assert scores.dtype == np.float32 and scores.sum() < 0.8 * nats.sum()
    sure = (hint_nats < train_gpt.SURE_NATS) & (hints.kinds > 0)
    assert sure.any() and (shares[sure] == 0).all() and (scores[sure] == nats[sure]).all()
    for kind in (1, 2, 3):
        late = np.flatnonzero((hints.kinds == kind) & (shares > 0))[-300:]
        assert shares[late].mean() == pytest.approx((hints.tokens == targets)[late].mean(), abs=0.1), "what hints of a kind are trusted is what they are worth"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 299))
def test_a_tilt_depends_only_on_the_text_before(seed: int, cut: int) -> None:
    nats, hint_nats, hints, targets = random_hints(300, seed)
    scores, shares = train_gpt.tilt(nats, hint_nats, hints, targets)
    other = random_hints(300, seed + 1)
    later = np.arange(300) > cut

    def mixed(now: np.ndarray, then: np.ndarray, *, at: bool = False) -> np.ndarray:
        return np.where(later | (at & (np.arange(300) == cut)), then, now)

    changed = train_gpt.Hints(mixed(hints.tokens, other[2].tokens), mixed(hints.kinds, other[2].kinds))
    again, others = train_gpt.tilt(mixed(nats, other[0]), mixed(hint_nats, other[1]), changed, mixed(targets, other[3], at=True))
    assert (again[:cut] == scores[:cut]).all() and (others[: cut + 1] == shares[: cut + 1]).all(), "the share of a hint also not on the target"


@pytest.mark.parametrize("worth", [0.0, 0.6, 1.0])
def test_tilted_probabilities_sum_to_one_whatever_has_been_learnt(worth: float) -> None:
    """Every token in turn is the last of a text whose hints come true in this share."""
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.full(9, 0.3), size=2000).clip(1e-9)
    hints = train_gpt.Hints(generator.integers(9, size=2000).astype(np.uint16), generator.integers(1, 4, size=2000).astype(np.uint8))
    rows, truth = np.arange(2000), np.where(generator.random(2000) < worth, hints.tokens, generator.integers(9, size=2000))
    for end in (20, 500, 1999, 2000):
        total, shares = 0.0, set()
        for token in range(9):
            targets = np.append(truth[: end - 1], token)
            nats, hint_nats = (-np.log(p[rows[:end], chosen]).astype(np.float32) for chosen in (targets, hints.tokens[:end]))
            scores, share = train_gpt.tilt(nats, hint_nats, train_gpt.Hints(hints.tokens[:end], hints.kinds[:end]), targets)
            total += math.exp(-float(scores[-1]))
            shares.add(float(share[-1]))
        assert len(shares) == 1 and total == pytest.approx(p[end - 1].sum(), abs=2e-6)


def test_scores_stay_finite_where_hints_are_certain_impossible_or_always_wrong() -> None:
    hint_nats = np.array([0.0, 1e-9, 2e-3, 50.0, 200.0, np.inf] * 2000, dtype=np.float32)
    hints = train_gpt.Hints(np.ones(12_000, np.uint16), np.ones(12_000, np.uint8))
    for targets in (np.ones(12_000, np.int64), np.append(np.ones(11_999, np.int64), 5), np.full(12_000, 5)):
        scores, shares = train_gpt.tilt(np.where(targets == 1, hint_nats.clip(max=300), 9.0), hint_nats, hints, targets)
        assert np.isfinite(scores).all() and (scores >= 0).all() and (shares < 1).all()


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_tilt_changes_the_scores_at_hints_alone_and_nothing_that_is_learnt(name: str) -> None:
    config, val = configured(name), text()
    model = lively_model(config)
    plain, evaluator = score(config, model, val), new_evaluator(replace(config, tilt_orders="2,3"), model, val)
    evaluator.score()
    tilted = evaluator.scores
    if name == "chunked":
        assert (tilted == plain).all(), "the evaluation that others are compared with has no tilt"
        return
    hints = train_gpt.hints_of(val.tokens, [2, 3], train_gpt.World("cpu"))
    assert 10 < (hints.kinds > 0).sum() < len(plain) - 10
    np.testing.assert_allclose(tilted[hints.kinds == 0], plain[hints.kinds == 0], **FLOAT32)
    expected, shares = train_gpt.tilt(plain, evaluator.ledger.hint_nats, hints, val.tokens[1:])
    np.testing.assert_allclose(tilted, expected, rtol=1e-6)
    np.testing.assert_allclose(evaluator.shares, shares, rtol=1e-6)
    np.testing.assert_allclose(evaluator.ledger.nats, plain, **FLOAT32)
    hit = (hints.tokens == val.tokens[1:]) & (hints.kinds > 0)
    np.testing.assert_allclose(evaluator.ledger.hint_nats[hit], plain[hit], rtol=1e-6)


def test_adaptation_leaves_time_for_the_tilt(monkeypatch: pytest.MonkeyPatch) -> None:
    config, val = configured("ttt_lora", eval_seconds=1000.0), text()
    model = lively_model(config)
    for seconds, adapts in ((0.1, True), (1000.0, False)):
        monkeypatch.setattr(train_gpt, "TILT_SECONDS", seconds)
        assert (new_evaluator(replace(config, **TILT), model, val).score().adapted_frac > 0) == adapts
        assert new_evaluator(config, model, val).score().adapted_frac > 0


def test_losses_of_several_targets_at_a_position_are_those_of_each() -> None:
    model, tokens = lively_model(configured()), torch.randint(24, (2, WINDOW), generator=torch.Generator().manual_seed(0))
    targets, phase = torch.randint(24, (2, WINDOW, 3), generator=torch.Generator().manual_seed(1)), Phase((0, 1), WINDOW)
    expected = torch.stack([model(tokens, targets[..., k], phase) for k in range(3)], dim=-1)
    torch.testing.assert_close(model(tokens, targets, phase), expected, rtol=1e-13, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# EVAL_SECONDS


class Meter:
    """A clock that a forward moves on by one second for every token that it reads, by three for one that will be learnt from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: self.now)

    def metered(self, model: train_gpt.GPT) -> Callable[..., torch.Tensor]:
        """Returns the forward of `model`."""

        def forward(tokens: torch.Tensor, *others: Any) -> torch.Tensor:
            self.now += tokens.numel() * (3 if torch.is_grad_enabled() else 1)
            return model(tokens, *others)

        return forward


def score_documents_alone(config: Config, model: train_gpt.GPT, val: ValData, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns what windows give each document as if it were all of the text."""
    alone = [ValData(val.tokens[first : end + 1], val.target_bytes[first:end]) for first, end in spans]
    return np.concatenate([score(replace(config, final_eval="sliding", eval_seconds=0.0), model, document) for document in alone])


@with_exact_numbers
@pytest.mark.parametrize("name", ADAPTING)
def test_without_time_nothing_is_learnt_and_every_target_scores_as_without_adaptation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, val = configured(name, eval_seconds=1e-6), text()
    model, meter = lively_model(config), Meter(monkeypatch)
    if name == "ttt_sgd":
        expected = score(replace(config, eval_seconds=0.0, ttt_lr=0.0), model, val)
    else:
        expected = score_documents_alone(config, model, val, SPANS)
    evaluator = new_evaluator(config, model, val, forward=meter.metered(model), plain_seconds=1.0)
    meter.now = 1.0  # what little has been done took time
    found = evaluator.score()
    np.testing.assert_allclose(evaluator.ledger.nats, expected, **FLOAT32)
    assert found.targets == INPUTS and found.adapted_frac == (40 / INPUTS if name == "ttt_sgd" else 0), "the first chunk comes before all learning"


@pytest.mark.parametrize(("spent", "adapted"), [(0.0, 1.0), (5000.0, 0.0)])
def test_the_time_of_evaluations_before_counts_too(monkeypatch: pytest.MonkeyPatch, spent: float, adapted: float) -> None:
    config, val = configured("ttt_lora", eval_seconds=5000.0), text()
    model, meter = lively_model(config), Meter(monkeypatch)
    assert new_evaluator(config, model, val, forward=meter.metered(model), plain_seconds=1e-3, spent=spent).score().adapted_frac == adapted


@with_exact_numbers
@pytest.mark.parametrize("name", ADAPTING)
def test_adaptation_ends_in_time_for_the_rest_to_be_scored_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [40] * 2 + [24] * 10
    config, val = configured(name, ttt_prefix_docs=2, ttt_phases=1, ttt_epochs=1, ttt_lora_batch_docs=1), text(lengths)
    model, meter = lively_model(config), Meter(monkeypatch)

    def timed(config: Config) -> tuple[Score, np.ndarray]:
        """As `score_artifact` does, after a chunked evaluation, which reads the text once."""
        evaluator = new_evaluator(config, model, val, forward=meter.metered(model), plain_seconds=1.0)
        meter.now += 1.0
        return evaluator.score(), evaluator.scores

    whole, adapted = timed(config)
    least, _ = timed(replace(config, eval_seconds=1e-6))
    fracs = [least.adapted_frac]
    for share in (0.02, 0.8):
        limit = least.seconds + share * (whole.seconds - least.seconds)
        limited, nats = timed(replace(config, eval_seconds=limit))
        assert limited.targets == sum(lengths) and nats.all()
        assert limited.seconds <= 1.05 * limit, "the pace is an estimate"
        fracs.append(limited.adapted_frac)
    assert fracs == sorted(fracs) and fracs[0] < fracs[-1] < 1
    enough, nats = timed(replace(config, eval_seconds=2 * whole.seconds))
    assert enough.adapted_frac == whole.adapted_frac == 1 and (nats == adapted).all()


@with_exact_numbers
def test_documents_that_come_after_learning_was_refused_do_not_count_as_adapted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    config, val = configured("ttt_phased", ttt_epochs=100), text()
    model, meter = lively_model(config), Meter(monkeypatch)
    evaluator = new_evaluator(replace(config, eval_seconds=5000.0), model, val, forward=meter.metered(model), plain_seconds=1.0)
    found = evaluator.score()
    np.testing.assert_allclose(evaluator.ledger.nats, score(replace(config, ttt_lr=0.0, ttt_epochs=1), model, val), **FLOAT32)
    assert found.adapted_frac == evaluator.stretches[0].end / INPUTS and found.seconds < 5000


@with_exact_numbers
def test_where_time_ends_each_document_is_adapted_to_wholly_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    config, val = configured("ttt_lora", ttt_lora_batch_docs=2), text()
    model, meter = lively_model(config), Meter(monkeypatch)
    adapted, plain = score(config, model, val), score_documents_alone(config, model, val, SPANS)
    evaluator = new_evaluator(replace(config, eval_seconds=800.0), model, val, forward=meter.metered(model), plain_seconds=1.0)
    found = evaluator.score()
    taken = untold = 0
    for first, end in SPANS:
        is_adapted, is_plain = (np.allclose(evaluator.ledger.nats[first:end], nats[first:end], **FLOAT32) for nats in (adapted, plain))
        assert is_adapted != is_plain or (is_adapted and end - first <= 4), "one chunk is the same with and without"
        taken += (end - first) * (is_adapted and not is_plain)
        untold += (end - first) * (is_adapted and is_plain)
    assert 0 < taken <= round(found.adapted_frac * INPUTS) <= taken + untold < INPUTS


# Runs, and the files of scores


@pytest.fixture(scope="module")
def phased(run_here: Callable[..., Ended], reference: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that scores the reference's artifact with everything that an evaluation can do."""
    place = tmp_path_factory.mktemp("phased")
    ended = run_here(place, **everything(reference, place))
    assert ended.code == 0, ended.errors
    return Finished(place / "runs" / "run", place / "scores.npy", ended.output)


def everything(reference: Finished, place: Path) -> dict[str, Any]:
    """Settings of a run with everything that an evaluation can do."""
    adapting = {name.upper(): value for name, value in LEARNING.items() if name.startswith("ttt_")}
    files = {"SCORES_FILE": place / "scores.npy", "DOCUMENTS_FILE": place / "documents.csv"}
    return {
        **adapting, **files, "STAGES": "eval", "ARTIFACT": reference.folder / "artifact.bin", "FINAL_EVAL": "ttt_phased", "AUDIT": 1, "AUDIT_TOKENS": 256,
        "TTT_CHUNK_TOKENS": 64, "TTT_LORA_CHUNK_TOKENS": 8, "TTT_LORA_BATCH_DOCS": 8, "EVAL_SOFTCAP": 20,
    }  # fmt: skip


@pytest.fixture(scope="module")
def val(tiny: Start) -> ValData:
    """The validation split of the corpus."""
    return train_gpt.load_val(tiny())


def test_the_result_is_that_of_the_final_evaluation_beside_the_others(phased: Finished) -> None:
    result = phased.result()
    assert list(result["scores"]) == ["chunked", "sliding", "ttt_phased"] == [event["name"] for event in phased.events("eval")]
    assert (result["val_bpb"], result["quant_val_bpb"]) == tuple(result["scores"][name]["val_bpb"] for name in ("ttt_phased", "chunked"))
    assert result["adapted_frac"] == 1 and len({score["val_bpb"] for score in result["scores"].values()}) == 3
    assert [line.partition(" holds")[0] for line in phased.output.splitlines() if line.startswith("audit: ")][:2] == ["audit: C1", "audit: C2"]


def test_the_scores_file_holds_every_score_of_the_final_evaluation(phased: Finished, reference: Finished, tiny: Start, val: ValData) -> None:
    scores, result = np.load(phased.scores), phased.result()
    assert scores.dtype == np.float32 and scores.shape == (len(val.tokens) - 1,)
    assert result["val_loss"] == pytest.approx(float(scores.mean(dtype=np.float64)), rel=1e-12)
    assert result["val_bpb"] == pytest.approx(float(scores.sum(dtype=np.float64)) / math.log(2) / val.target_bytes.sum(), rel=1e-12)
    settings = {name: value for name, value in everything(reference, Path()).items() if name not in ("STAGES", "ARTIFACT", "AUDIT")}
    config = tiny(**settings)
    model = train_gpt.read_artifact((reference.folder / "artifact.bin").read_bytes(), config, "artifact.bin")
    model.config = replace(model.config, logit_softcap=20.0)
    assert (scores == score(config, model, val)).all()


def test_the_documents_file_has_a_line_for_each_document_that_adds_up_to_the_scores(phased: Finished, val: ValData, corpus: Path) -> None:
    header, *lines = (phased.scores.parent / "documents.csv").read_text(encoding="utf-8").splitlines()
    documents = (corpus / "val.txt").read_text(encoding="utf-8").split("\x00")
    assert header == "document,tokens,bytes,bpb_before,bpb"
    numbers, tokens, text_bytes, before, after = np.array([line.split(",") for line in lines], dtype=np.float64).T
    assert numbers.tolist() == list(range(len(documents))) and tokens.sum() == len(val.tokens) - 1
    assert text_bytes.tolist() == [len(document.encode()) for document in documents]
    scores = phased.result()["scores"]
    for bits, name in ((before, "sliding"), (after, "ttt_phased")):
        assert (bits * text_bytes).sum() / text_bytes.sum() == pytest.approx(scores[name]["val_bpb"], abs=1e-6)
    nats, first = np.load(phased.scores), int(tokens[:7].sum())
    assert after[7] == pytest.approx(nats[first : first + int(tokens[7])].sum(dtype=np.float64) / math.log(2) / text_bytes[7], abs=1e-6)


def test_a_run_on_two_ranks_gives_the_scores_and_files_of_one(
    launch: Callable[..., forked.Ranks], phased: Finished, reference: Finished, tmp_path: Path
) -> None:
    """A model in float32, in batches of other sizes."""
    outcome = launch(tmp_path, ranks=2, **{**everything(reference, tmp_path), "AUDIT": 0}).finish()
    assert outcome.codes == [0, 0], outcome.output
    found = Finished(tmp_path / "runs" / "run", tmp_path / "scores.npy", outcome.output)
    for name, expected in phased.result()["scores"].items():
        assert found.result()["scores"][name]["val_bpb"] == pytest.approx(expected["val_bpb"], rel=1e-5)
    np.testing.assert_allclose(np.load(found.scores), np.load(phased.scores), rtol=1e-3, atol=1e-4)
    assert (tmp_path / "documents.csv").read_text(encoding="utf-8").count("\n") == 41


def test_a_scores_file_appears_whole_or_not_at_all(val: ValData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.npy"
    path.write_bytes(b"the scores of before")
    nats, starts = np.ones(len(val.tokens) - 1, dtype=np.float32), train_gpt.document_starts(val.tokens, BOS)

    def full_disk(file: Any, array: np.ndarray) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            train_gpt.write_scores(configured(scores_file=str(path)), val, nats, nats, starts)
    assert path.read_bytes() == b"the scores of before"
    train_gpt.write_scores(configured(), val, nats, nats, starts)
    assert list(tmp_path.iterdir()) == [path]
    train_gpt.write_scores(configured(scores_file=str(path)), val, nats, nats, starts)
    assert (np.load(path) == nats).all()


@pytest.mark.parametrize("setting", ["SCORES_FILE", "DOCUMENTS_FILE"])
def test_a_file_in_a_folder_that_does_not_exist_is_refused_before_the_run(
    run_here: Callable[..., Ended], reference: Finished, tmp_path: Path, setting: str
) -> None:
    path = tmp_path / "none" / ("scores.npy" if setting == "SCORES_FILE" else "documents.csv")
    ended = run_here(tmp_path, STAGES="eval", ARTIFACT=reference.folder / "artifact.bin", FINAL_EVAL="chunked", **{setting: path})
    assert ended.code == 1 and f"{setting}={path}: there is no folder {path.parent}" in ended.errors
    assert not (tmp_path / "runs").exists()


def test_a_score_stands_without_its_details(run_here: Callable[..., Ended], reference: Finished, tmp_path: Path) -> None:
    """Where a folder has the name of the file."""
    (tmp_path / "scores.npy").mkdir()
    ended = run_here(tmp_path, STAGES="eval", ARTIFACT=reference.folder / "artifact.bin", FINAL_EVAL="chunked", SCORES_FILE=tmp_path / "scores.npy")
    assert ended.code == 0 and "SCORES_FILE or DOCUMENTS_FILE cannot be written" in ended.output
    assert Finished(tmp_path / "runs" / "run", Path(), "").result()["val_bpb"] > 0


def test_a_missing_artifact_is_named(run_here: Callable[..., Ended], tmp_path: Path) -> None:
    ended = run_here(tmp_path, STAGES="eval", ARTIFACT=tmp_path / "none.bin")
    assert ended.code == 1 and f"error: {tmp_path / 'none.bin'}: no such artifact" in ended.errors


@pytest.mark.parametrize("stages", ["eval", "train,export,eval"])
def test_a_stop_during_the_evaluation_says_how_to_go_on(
    run_here: Callable[..., Ended], reference: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: str
) -> None:
    def stopped(*_: Any) -> None:
        raise SystemExit(130)

    monkeypatch.setattr(train_gpt, "score_artifact", stopped)
    ended = run_here(tmp_path, STAGES=stages, ITERATIONS=1, WARMUP_STEPS=0, **({"ARTIFACT": reference.folder / "artifact.bin"} if stages == "eval" else {}))
    folder = tmp_path / "runs" / "run"
    assert ended.code == 130 and f"goes on with: python train_gpt.py @{folder}/config.env RESUME=1" in ended.output
    assert (folder / "artifact.bin").exists() == (stages != "eval")


# ----------------------------------------------------------------------------------------------------------------------
# What a score may not depend on


@pytest.mark.parametrize("doc_mask", [True, False], ids=["documents", "no documents"])
@pytest.mark.parametrize("name", EVALUATIONS)
def test_no_score_depends_on_a_later_token(name: str, doc_mask: bool) -> None:
    """Tokens at which windows and chunks begin and end, and others."""
    if name in ("ttt_lora", "ttt_phased") and not doc_mask:
        return  # refused by `validate`
    config, val = configured(name, doc_mask=doc_mask, **TILT), text()
    model = lively_model(config)
    before = score(config, model, val)
    for at in (1, 21, 40, 41, INPUTS):
        after = score(config, model, with_tokens(val, at, 5 if val.tokens[at] != 5 else 6))
        assert (before[: at - 1] == after[: at - 1]).all(), "scores of earlier tokens are the same, bit for bit"
        assert before[at - 1] != after[at - 1], "the edited token itself is scored anew"
        if at < INPUTS and (at not in STARTS or not doc_mask):
            assert before[at] != after[at], "and is the context of the next one"


@pytest.mark.parametrize("name", EVALUATIONS)
def test_editing_a_document_leaves_the_scores_of_earlier_ones_and_without_learning_from_it_those_of_later_ones(name: str) -> None:
    config, val = configured(name, ttt_prefix_docs=3), text()
    model = lively_model(config)
    before = score(config, model, val)
    for number in (0, 2, 7):
        first, end = SPANS[number]
        after = score(config, model, edited_document(val, number))
        assert (before[:first] == after[:first]).all()
        assert (before[first:end] != after[first:end]).all()
        learnt_from = {"ttt_sgd": first < INPUTS // 40 * 40, "ttt_phased": number < 3}.get(name, False)
        if learnt_from:
            assert (before[end:] != after[end:]).any()
        else:
            np.testing.assert_allclose(after[end:], before[end:], **FLOAT32)


@pytest.mark.parametrize("name", ["chunked", "sliding"])
def test_without_document_mask_a_document_is_the_context_of_the_next(name: str) -> None:
    config, val = configured(name, doc_mask=False), text()
    model = lively_model(config)
    assert (score(config, model, edited_document(val, 2))[49:52] != score(config, model, val)[49:52]).any()


# ----------------------------------------------------------------------------------------------------------------------
# The rules, checked by AUDIT


AUDITED: dict[str, Any] = {"audit_tokens": 70, "ttt_prefix_docs": 2}


def audited(config: Config, model: train_gpt.GPT, val: ValData, kind: type[Evaluator] = Evaluator, forward: Any = None) -> list[str]:
    """Returns what an audit notes."""
    run, notes = new_run(config), list[str]()
    run.log.note = notes.append  # type: ignore[method-assign]
    train_gpt.audit(run, lambda text: new_evaluator(config, model, text, kind, forward), val)
    return notes


@pytest.mark.parametrize(("name", "tilt"), [*((name, TILT) for name in EVALUATIONS), ("sliding", {}), ("ttt_phased", {})])
def test_the_audit_finds_nothing_wrong_with_an_evaluation(name: str, tilt: dict[str, Any]) -> None:
    config = configured(name, **AUDITED, **tilt)
    c1, c2, c34 = audited(config, lively_model(config), text())
    assert c1.startswith("audit: C1 holds: at 4 cuts of 70 targets") and c34.startswith("audit: C3 and C4 hold")
    assert c2.startswith("audit: C2 holds") and "all 24 tokens sum to 1" in c2


class LearnsFirst(Evaluator):
    """Learns from a chunk, then scores it."""

    def score_windows(self, windows: np.ndarray) -> None:
        first, end = int(windows[0, 1]), int(windows[-1, 2])
        if end < self.inputs:
            self.learn(Stretch(first, end, (1.0,)))
        super().score_windows(windows)


class LearnsFirstInSilence(LearnsFirst):
    """The same, with a ledger that allows it."""

    def learn(self, stretch: Stretch) -> None:
        self.ledger.allow_learning = lambda first, end: None  # type: ignore[method-assign]
        with torch.enable_grad():
            super().learn(stretch)


class ScoresTwice(Evaluator):
    """Goes through the text a second time, after it has learnt."""

    def score(self) -> Score:
        super().score()
        return super().score()


class Unnormalised(Evaluator):
    """Raises the hinted token and takes nothing from the others."""

    def tilt(self) -> None:
        assert self.hints is not None
        hits = (self.hints.tokens == self.val.tokens[1:]) & (self.hints.kinds > 0)
        self.scores, self.shares = np.where(hits, self.ledger.nats / 2, self.ledger.nats), np.zeros(self.inputs)


class TakesANatOff(Evaluator):
    """Makes every score better by a nat, whatever the target is."""

    def losses(self, batch: train_gpt.Batch, targets: torch.Tensor, adapters: Any) -> torch.Tensor:
        return super().losses(batch, targets, adapters) - 1


class TakesANatOffInSilence(Evaluator):
    """The same, but where it is asked for all tokens."""

    def nats(self, batch: train_gpt.Batch, adapters: Any = None) -> torch.Tensor:
        return super().nats(batch, adapters) - 1


class OpensTrainingText(Evaluator):
    """Reads a training shard."""

    shard = Path()

    def score(self) -> Score:
        np.fromfile(self.shard, dtype=np.uint8)
        return super().score()


class Connects(Evaluator):
    """Connects a socket; a datagram's needs nobody at the other end."""

    def score(self) -> Score:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
            link.connect(("127.0.0.1", 9))
        return super().score()


@pytest.mark.parametrize(
    ("name", "kind", "rule"),
    [
        ("ttt_sgd", LearnsFirst, "learning from inputs 0 to 40 before all of their targets are scored"),
        ("ttt_sgd", LearnsFirstInSilence, "C1, causality"),
        ("sliding", ScoresTwice, "would be scored twice; a target is scored once, in one pass"),
        ("ttt_lora", ScoresTwice, "would be scored twice"),
        ("sliding", Unnormalised, "C2, normalisation"),
        ("chunked", TakesANatOff, "C2, normalisation: the probabilities of all tokens sum to 2"),
        ("ttt_lora", TakesANatOffInSilence, "C2, normalisation: the score of target .* nats, and that of its probability"),
        ("sliding", Connects, "the evaluation touched socket.connect"),
    ],
)
def test_the_audit_names_the_rule_that_an_evaluation_breaks(name: str, kind: type[Evaluator], rule: str) -> None:
    config = configured(name, **AUDITED, **TILT)
    model = lively_model(config)
    with pytest.raises(Violation, match=rule):
        audited(config, model, text(), kind)


@pytest.mark.parametrize("name", ["sliding", "ttt_sgd", "ttt_lora"])
@pytest.mark.parametrize("peek", ["next token", "target"])
def test_the_audit_finds_a_forward_that_sees_what_it_may_not(name: str, peek: str) -> None:
    config = configured(name, **AUDITED)
    model = lively_model(config)

    def forward(tokens: torch.Tensor, targets: torch.Tensor, phase: Phase, adapters: Any = None) -> torch.Tensor:
        loss = model(tokens, targets, phase, adapters)
        later = torch.roll(targets, -1, dims=1) if peek == "next token" else targets
        return loss * (1 - 0.01 * later)

    with pytest.raises(Violation, match="C1, causality" if peek == "next token" else "C2, normalisation"):
        audited(config, model, text(), forward=forward)


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_audit_finds_hints_that_look_at_the_target_or_beyond(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(**AUDITED, **TILT)
    model = lively_model(config)

    def hints_of(tokens: np.ndarray, orders: Any, world: Any) -> train_gpt.Hints:
        return train_gpt.Hints(np.roll(tokens, -1 - ahead)[:-1], np.ones(len(tokens) - 1, np.uint8))

    monkeypatch.setattr(train_gpt, "hints_of", hints_of)
    with pytest.raises(Violation, match="C1, causality"):
        audited(config, model, text())


def test_the_audit_finds_that_a_training_shard_is_opened(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(**AUDITED)
    monkeypatch.setattr(OpensTrainingText, "shard", corpus / "fineweb_train_000001.bin")
    with pytest.raises(Violation, match=r"the evaluation touched open .*fineweb_train_000001\.bin"):
        audited(config, lively_model(config), text(), OpensTrainingText)
    monkeypatch.setattr(OpensTrainingText, "shard", corpus / "fineweb_val_000000.bin")
    assert len(audited(config, lively_model(config), text(), OpensTrainingText)) == 3
