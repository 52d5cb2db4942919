"""The artifact: what is written is what was simulated, what is read back is what was written, and nothing else is accepted; the packed script.

Run as a script with a folder of artifacts and two numbers, it alters each artifact in as many ways as the second says (test_altered_artifacts_...).
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import json
import math
import random
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
import zstandard
from conftest import CODE_BYTES, REFERENCE, ROOT, Ended, Finished, clean_environment, lively_model, small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Curvature, Layout, Role, Stored

NAME = "some/folder/artifact.bin"
FIXED = struct.Struct("<5sBI")  # magic, version, length of the header
DIGEST = 16
BYTE_CODERS = ("zlib", "zstd", "brotli")
CODERS = (*BYTE_CODERS, "range")
ORDERS = ("rows", "columns", "sorted")
RATE: dict[str, Any] = {"quant_scheme": "rate", "coder": "range"}
LQER: dict[str, Any] = {"quant_scheme": "gptq", "lqer_rank": 2, "lqer_top_k": 3, "lqer_asym_group": 5, "matrix_bits": 5}
# What can be told apart in an artifact: every coder, and what else changes its layout.
KINDS: dict[str, dict[str, Any]] = {
    **{coder: {"coder": coder} for coder in CODERS},
    "rate": RATE,
    "columns": {"coder": "zlib", "code_order": "columns", "byte_shuffle": True, "layer_bits": "1:4", "embed_bits": 16},
    "sorted": {"coder": "brotli", "code_order": "sorted", "byte_shuffle": True},
    "corrected": {**LQER, "coder": "zstd"},
    "corrected range": {**LQER, "coder": "range", "layer_bits": "0:16"},
}


def artifact_config(**settings: Any) -> train_gpt.Config:
    """A model of 2,000 weights."""
    return small_config(**{"num_layers": 2, "model_dim": 8, "num_heads": 2, "num_kv_heads": 1, **settings})


def random_curvatures(model: train_gpt.GPT, seed: int = 0) -> dict[str, Curvature]:
    """Returns random positive definite statistics of every weight; independent rows for every other one."""
    generator, curvatures = torch.Generator().manual_seed(seed), {}
    for number, (name, part) in enumerate(train_gpt.weight_parts(model).items()):
        inputs, outputs = (torch.randn(side, 2 * side, generator=generator) for side in reversed(part.weight.shape))
        squares = [sample @ sample.T / sample.shape[1] for sample in (inputs, outputs)]
        curvatures[name] = Curvature(squares[0], squares[1].diagonal().clone() if number % 2 else squares[1])
    return curvatures


def quantised(model: train_gpt.GPT, step: float = 0.1) -> tuple[dict[str, Stored], float]:
    """Returns a model's weights by its QUANT_SCHEME, and the global step that goes with them."""
    world, curvatures = train_gpt.World("cpu"), random_curvatures(model)
    if model.config.quant_scheme != "rate":
        return train_gpt.quantise(model, curvatures, world), 0.0
    return train_gpt.quantise_rate(model, {name: train_gpt.allocate(curvature) for name, curvature in curvatures.items()}, step, world), step


def pack(model: train_gpt.GPT) -> train_gpt.Packed:
    """Returns a model's artifact and the table of its sizes."""
    return train_gpt.pack(model, *quantised(model))


def build(config: train_gpt.Config, seed: int = 0) -> tuple[train_gpt.GPT, bytes]:
    """Returns a float32 model of random weights, and its artifact."""
    model = lively_model(config, torch.float32, seed)
    return model, pack(model).data


def parse(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Returns the header of an artifact, and its coded roles and corrections, read by the layout that the file's section promises."""
    magic, version, length = FIXED.unpack_from(data)
    assert (magic, version) == (b"PGOLF", train_gpt.ARTIFACT_VERSION)
    assert hashlib.blake2b(data[:-DIGEST], digest_size=DIGEST).digest() == data[-DIGEST:]
    header = json.loads(data[FIXED.size : FIXED.size + length])
    offset, blobs = FIXED.size + length, []
    for entry in (*header["roles"].values(), header["lqer"]):
        blobs.append(data[offset : offset + entry["bytes"]])
        offset += entry["bytes"]
    assert offset == len(data) - DIGEST, "roles and corrections fill the file"
    return header, blobs


def seal(header: Any, blobs: list[bytes], *, version: int = train_gpt.ARTIFACT_VERSION, length: int | None = None) -> bytes:
    """Returns an artifact of any header and any coded roles, with a digest that matches."""
    coded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return sign(FIXED.pack(b"PGOLF", version, len(coded) if length is None else length) + coded + b"".join(blobs))


def sign(body: bytes) -> bytes:
    """Returns `body` and its digest."""
    return body + hashlib.blake2b(body, digest_size=DIGEST).digest()


def unpacked(coder: str, data: bytes) -> bytes:
    """Returns what a byte coder was given, by that coder's own library."""
    return {"zlib": zlib.decompress, "zstd": zstandard.ZstdDecompressor().decompress, "brotli": brotli.decompress}[coder](data)


def take_blocks(data: bytes) -> list[bytes]:
    """Returns the blocks that `data` consists of, each after its length."""
    blocks = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        blocks.append(data[4 : 4 + length])
        assert len(blocks[-1]) == length
        data = data[4 + length :]
    return blocks


def raw_roles(data: bytes) -> dict[str, bytes]:
    """Returns the bytes of every role before the byte coder; what the entropy coder has made stays as it is."""
    header, blobs = parse(data)
    raw = {}
    for role, blob in zip((*header["roles"], "lqer"), blobs, strict=True):
        if role == "lqer":
            raw |= {role: unpacked("zstd", blob)} if blob else {}
        elif header["layout"][0] == "range":
            plain, *matrices = take_blocks(blob)
            raw[role] = unpacked("zstd", plain) + b"".join(matrices)
        else:
            raw[role] = unpacked(header["layout"][0], blob)
    return raw


def on_the_grid(model: train_gpt.GPT) -> dict[str, torch.Tensor]:
    """Returns the weights that QAT with `rowmax` simulates for a model; others as float16 holds them."""
    parts, weights = train_gpt.weight_parts(model), {}
    for name, parameter in model.named_parameters():
        bits = parts[name].bits if name in parts else 16
        grid = train_gpt.rowmax_grid(parameter, bits) if bits < 16 else None
        weights[name] = grid.dequantise(grid.round(parameter)).detach() if grid else parameter.detach().half().float()
    return weights


def plain_and_quantised(config: train_gpt.Config) -> list[train_gpt.Phase]:
    """Returns the phase at the end of training, without and with QAT."""
    return [replace(train_gpt.Schedule(config).scored_phase, qat=qat) for qat in (False, True)]


# ----------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_stored_weight_is_the_point_of_the_grid_that_training_simulated(bits: int, tied: bool) -> None:
    config = artifact_config(matrix_bits=bits, embed_bits=10 - bits, tie_embeddings=tied, coder=CODERS[(bits + tied) % 4])
    model, data = build(config)
    expected = on_the_grid(model)
    restored = train_gpt.read_artifact(data, config, NAME)
    assert [name for name, _ in restored.named_parameters()] == list(expected)
    for name, parameter in restored.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[name]), name

    tokens, plain, quantised = torch.randint(config.vocab_size, (2, 16)), *plain_and_quantised(config)
    with torch.no_grad():
        logits = restored.logits(tokens, plain)
        train_gpt.load_weights(model, expected)
        assert torch.equal(logits, model.logits(tokens, plain))
        # Points of the grid are their own nearest points, so what QAT computes from them is the same, up to float32 rounding.
        torch.testing.assert_close(logits, model.logits(tokens, quantised), rtol=0, atol=1e-5)


def test_what_qat_computes_is_what_the_artifact_computes() -> None:
    config = artifact_config(matrix_bits=4, embed_bits=5)
    model, data = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if train_gpt.parameter_roles(model)[name] == Role.GAIN:
                parameter.copy_(parameter.half())  # QAT leaves the gains alone
    tokens = torch.randint(config.vocab_size, (2, 16))
    with torch.no_grad():
        plain, simulated = (model.logits(tokens, phase) for phase in plain_and_quantised(config))
        stored = train_gpt.read_artifact(data, config, NAME).logits(tokens, train_gpt.Schedule(config).scored_phase)
    torch.testing.assert_close(stored, simulated, rtol=0, atol=1e-5)  # fake() adds and subtracts the weight: float32 rounding
    assert (stored - plain).abs().max() > 0.01, "without the grid the logits are others"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_back_as_they_were_stored_bit_for_bit(kind: str) -> None:
    config = artifact_config(**KINDS[kind], tie_embeddings=False, bigram_hash_buckets=6, value_embed_layers="1", value_embed_dim=4)
    model = lively_model(config, torch.float32)
    stored, step = quantised(model)
    data = train_gpt.pack(model, stored, step).data
    restored = train_gpt.read_artifact(data, small_config(), NAME)
    for name, parameter in restored.named_parameters():
        assert torch.equal(parameter, stored[name].weight() if name in stored else model.get_parameter(name).half().float()), name
    header, _ = parse(data)
    assert (header["scheme"], header["layout"], header["step"]) == (config.quant_scheme, [config.coder, config.code_order, config.byte_shuffle], step)
    corrected = {name for name, entry in stored.items() if entry.factors is not None}
    assert set(header["lqer"]["names"]) == corrected and len(corrected) == (3 if kind.startswith("corrected") else 0)
    for name in corrected:
        points = stored[name]._replace(factors=None).weight()
        miss = [(approximation - model.get_parameter(name)).norm() for approximation in (points, stored[name].weight())]
        assert miss[1] < 0.9 * miss[0], "what was left over is smaller now"


def test_bits_of_roles_and_of_layers_are_in_the_header_and_in_the_weights() -> None:
    config = artifact_config(num_layers=3, matrix_bits=6, mlp_bits=5, embed_bits=7, layer_bits="1:3,2:16", tie_embeddings=False)
    model, data = build(config)
    header, _ = parse(data)
    names = {role.value: list(group) for role, group in train_gpt.parameters_by_role(model).items()}
    assert {role: entry["bits"] for role, entry in header["roles"].items()} == {
        "embed": [7], "head": [6], "attention": [6] * 4 + [3] * 4 + [16] * 4, "mlp": [5] * 2 + [3] * 2 + [16] * 2, "gain": [16] * len(names["gain"]),
    }  # fmt: skip
    restored = train_gpt.read_artifact(data, small_config(), NAME)
    for role, entry in header["roles"].items():
        for name, bits in zip(names[role], entry["bits"], strict=True):
            weight, original = restored.get_parameter(name).detach(), model.get_parameter(name).detach()
            if bits == 16:
                assert torch.equal(weight, original.half().float()), name
            else:
                rows = [len(row.abs().unique()) for row in weight]
                assert max(rows) <= 2 ** (bits - 1) and torch.equal(weight, train_gpt.rowmax_grid(original, bits).fake(original)), name


@pytest.mark.parametrize("coder", CODERS)
def test_embeddings_of_16_bits_are_stored_as_float16(coder: str) -> None:
    config = artifact_config(embed_bits=16, coder=coder, tie_embeddings=False, bigram_hash_buckets=6)
    model, data = build(config)
    header, raw = parse(data)[0], raw_roles(data)
    restored = train_gpt.read_artifact(data, small_config(), NAME)
    for role, name in (("embed", "embedding.table.weight"), ("table", "stages.0.table.weight")):
        halves = model.get_parameter(name).detach().half()
        assert header["roles"][role]["bits"] == [16]
        assert raw[role] == halves.numpy().astype("<f2").tobytes()
        assert torch.equal(restored.get_parameter(name), halves.float())
    assert header["roles"]["head"]["bits"] == [8], "the head is a matrix"


def expected_content(model: train_gpt.GPT, stored: dict[str, Stored], role: Role, layout: Layout) -> bytes:
    """Returns the content of a role for a byte coder, number by number: first numbers of two bytes, then codes."""
    shorts, codes = [], []
    for name, parameter in train_gpt.parameters_by_role(model)[role].items():
        if name not in stored:
            shorts += [struct.unpack("<H", struct.pack("<e", value))[0] for value in parameter.detach().flatten().tolist()]
            continue
        matrix = stored[name].codes
        shorts += [struct.unpack("<I", struct.pack("<f", step))[0] >> 16 for step in stored[name].grid.row_step.flatten().tolist()]
        if layout.code_order == "sorted":
            order = [int(row) for row in train_gpt.similar_rows(matrix)]
            shorts += order
            matrix = matrix[order]
        codes += [int(code) for code in (matrix if layout.code_order == "rows" else matrix.T).flatten()]
    low, high = [short & 255 for short in shorts], [short >> 8 for short in shorts]
    pairs = low + high if layout.byte_shuffle else [byte for pair in zip(low, high, strict=True) for byte in pair]
    return bytes(pairs) + struct.pack(f"<{len(codes)}b", *codes)


@pytest.mark.parametrize("shuffle", [False, True], ids=["plain", "shuffled"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("coder", BYTE_CODERS)
def test_byte_coders_are_given_the_promised_layout_and_give_back_the_same_model(coder: str, order: str, shuffle: bool) -> None:
    config = artifact_config(coder=coder, code_order=order, byte_shuffle=shuffle, matrix_bits=5, layer_bits="1:16", tie_embeddings=False)
    model = lively_model(config, torch.float32)
    stored, _ = quantised(model)
    data = train_gpt.pack(model, stored, 0.0).data
    layout, raw = Layout(coder, order, shuffle), raw_roles(data)
    for role in train_gpt.parameters_by_role(model):
        assert raw[role.value] == expected_content(model, stored, role, layout), role
    restored = train_gpt.read_artifact(data, small_config(), NAME)
    for (name, weight), expected in zip(restored.named_parameters(), on_the_grid(model).values(), strict=True):
        assert torch.equal(weight, expected), name


def test_sorted_rows_go_from_each_to_the_nearest_that_is_left() -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (40, 9)).astype(np.int8)
    order = [int(row) for row in train_gpt.similar_rows(codes)]
    assert order[0] == 0 and sorted(order) == list(range(40)) and order != list(range(40))
    for place, row in enumerate(order[:-1]):
        distances = {left: sum(abs(int(a) - int(b)) for a, b in zip(codes[row], codes[left], strict=True)) for left in order[place + 1 :]}
        assert distances[order[place + 1]] == min(distances.values())


@pytest.mark.parametrize("coder", CODERS)
def test_fewer_bits_make_a_smaller_artifact(coder: str) -> None:
    sizes = [len(build(artifact_config(model_dim=32, matrix_bits=bits, embed_bits=bits, coder=coder))[1]) for bits in range(2, 9)]
    assert sizes == sorted(sizes) and sizes[0] < 0.5 * sizes[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_tiny_weights_are_stored(kind: str) -> None:
    config = artifact_config(**KINDS[kind])
    model = lively_model(config, torch.float32)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0] = 0
        model.blocks[0].mlp.up.weight[1] *= 1e-30
    restored = train_gpt.read_artifact(pack(model).data, config, NAME)
    assert all(parameter.isfinite().all() for parameter in restored.parameters())
    if config.quant_scheme == "rowmax":
        assert restored.blocks[0].mlp.up.weight[0].count_nonzero() == 0
        assert restored.blocks[0].mlp.up.weight[1].abs().max() < 1e-29
        torch.testing.assert_close(restored.blocks[0].mlp.up.weight[2:], model.blocks[0].mlp.up.weight[2:], rtol=0, atol=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 65504.0])
@pytest.mark.parametrize("name", ["embedding.table.weight", "blocks.1.mix", "blocks.0.attention.q.weight"])
@pytest.mark.parametrize("coder", ["zlib", "range"])
def test_weights_that_float16_cannot_hold_are_not_written(name: str, value: float, coder: str) -> None:
    config = artifact_config(coder=coder)
    model = lively_model(config, torch.float32)
    with torch.no_grad():
        model.get_parameter(name)[-1, -1] = value
    role = train_gpt.parameter_roles(model)[name].value
    with pytest.raises(ValueError, match=f"weights of role {role} are not finite or too large"):
        train_gpt.pack(model, {}, 0.0)


@pytest.mark.parametrize("kind", ["zlib", "rate", "corrected"])
def test_the_table_of_sizes_adds_up_to_the_file(kind: str) -> None:
    config = artifact_config(**KINDS[kind], tie_embeddings=False, bigram_hash_buckets=6)
    model = lively_model(config, torch.float32)
    data, table = pack(model)
    assert sum(row["bytes"] for row in table) == len(data)
    assert sum(row["params"] for row in table) == sum(parameter.numel() for parameter in model.parameters())
    header, blobs = parse(data)
    by_role = {row["role"]: row for row in table}
    roles = {"embed", "table", "head", "attention", "mlp", "matrix", "gain"}
    assert set(header["roles"]) == roles and set(by_role) == {*roles, "header", *(["lqer"] if kind == "corrected" else [])}
    for (role, entry), blob in zip(header["roles"].items(), blobs, strict=False):
        assert by_role[role]["bytes"] == entry["bytes"] == len(blob)
        assert by_role[role]["bits_per_weight"] == 8 * len(blob) / by_role[role]["params"]
    if kind == "corrected":
        assert by_role["lqer"]["bytes"] == header["lqer"]["bytes"] == len(blobs[-1]) > 0


def test_the_sizes_of_a_run_are_those_of_its_files(reference: Finished) -> None:
    result, (event,) = reference.result(), reference.events("export")
    source = (reference.folder / "train_gpt.py").read_text(encoding="utf-8")
    assert result["bytes_model"] == (reference.folder / "artifact.bin").stat().st_size == sum(row["bytes"] for row in event["roles"])
    assert result["bytes_code"] == len(train_gpt.pack_script(source))
    assert result["bytes_total"] == result["bytes_model"] + result["bytes_code"] <= result["bytes_cap"] == 16_000_000
    assert all(event[key] == result[key] for key in ("bytes_model", "bytes_code", "bytes_total", "bytes_cap"))


# Digests of an artifact's header, and of its roles before the byte coder, because that may code the same content in other bytes in another version; what
# the entropy coder makes is its own format. To change them on purpose: take the new digests from the failure of the test, and say in the commit message
# why artifacts written before cannot be read any more.
GOLDEN: dict[str, dict[str, str]] = {
    "rows": {
        "header": "ce618c6579271c86", "embed": "3cc9dd70efaec099", "table": "1b952c0cef9bad8f", "head": "ccf14f813cb7e88e",
        "attention": "fc369e5352b997de", "mlp": "70117964a5ed7421", "matrix": "102b8a30f58eb73b", "gain": "7e605ba42672e79b",
    },
    "range": {
        "header": "ce618c6579271c86", "embed": "77a39c4da667cd26", "table": "e09cee161459c12c", "head": "11a84ca8317e1364",
        "attention": "a9f38db2f93fec2e", "mlp": "1419868a6577de77", "matrix": "d327c03e4854462c", "gain": "7e605ba42672e79b",
    },
    "columns": {
        "header": "da6525c4841626fb", "embed": "b0fcc618a4b20625", "table": "5b70e18204de6a42", "head": "4d6a282cd7c44be4",
        "attention": "6824b849197f0e61", "mlp": "19de437e03c0d4b8", "matrix": "262ac3b26a38b3d3", "gain": "acd17159af7507e9",
    },
    "sorted": {
        "header": "060518ade62f8416", "embed": "c6db78eb49b105ca", "table": "0208d8b493e819cb", "head": "3849a701b01f0f77",
        "attention": "7f377877a2fd887c", "mlp": "81c6a6d4b3fdd7ea", "matrix": "f1c9e0bf93565a68", "gain": "acd17159af7507e9",
    },
}  # fmt: skip


def golden_model(config: train_gpt.Config) -> train_gpt.GPT:
    """Returns a model whose weights are made of integers, the same on every machine and with every version of PyTorch."""
    model, start = train_gpt.GPT(config), 0
    with torch.no_grad():
        for parameter in model.parameters():
            count = parameter.numel()
            numbers = (np.arange(start, start + count, dtype=np.int64) * 2654435761 + 12345) % 65536
            parameter.copy_(torch.from_numpy(numbers.astype(np.float32) / 32768 - 1).view_as(parameter))
            start += count
    return model


def golden_artifact(coder: str, order: str = "rows") -> bytes:
    """Returns the artifact of a model with every feature."""
    config = artifact_config(
        tie_embeddings=False, matrix_bits=6, embed_bits=7, embed_rank=4, use_smeargate=True, smeargate_kind="add", gate_window=3, bigram_hash_buckets=6,
        bigram_hash_dim=5, bigram_hash_scale=0.5, value_embed_layers="1", value_embed_dim=3, attention_gate_window=2, skip_connections="gated",
        parallel_residuals="lanes", parallel_start_layer=1, num_loops=1, loop_end=0, loop_embedding=True,
        coder=coder, code_order=order, byte_shuffle=order != "rows",
    )  # fmt: skip
    return pack(golden_model(config)).data


def short_digest(data: bytes) -> str:
    """Returns a digest of 16 letters."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@pytest.mark.parametrize("order", ORDERS)
def test_the_content_of_an_artifact_is_what_it_was(order: str) -> None:
    for coder in CODERS if order == "rows" else BYTE_CODERS:
        data = golden_artifact(coder, order)
        header, _ = parse(data)
        coded = {role: entry.pop("bytes") for role, entry in header["roles"].items()}
        found = {"header": short_digest(json.dumps(header | {"layout": header["layout"][1:]}).encode())}
        found |= {role: short_digest(raw) for role, raw in raw_roles(data).items()}
        assert min(coded.values()) > 0 and found == GOLDEN["range" if coder == "range" else order], coder


# The file itself, for these versions of the coders' libraries.
GOLDEN_FILES: dict[str, tuple[str, str]] = {
    "zlib": ("1.2.13", "fb8d657aa95aa5d6"),
    "zstd": ("0.25.0", "dc3484d82c5c0c41"),
    "brotli": ("1.2.1", "1d52c2f4459b8b57"),
    "range": ("0.25.0", "19ec6f95168c9d8a"),
}
VERSIONS = {"zlib": zlib.ZLIB_RUNTIME_VERSION, "zstd": zstandard.__version__, "brotli": brotli.__version__, "range": zstandard.__version__}


@pytest.mark.parametrize("coder", CODERS)
def test_an_artifact_is_the_same_file_wherever_it_is_made(coder: str) -> None:
    version, digest = GOLDEN_FILES[coder]
    if VERSIONS[coder] != version:
        pytest.skip(f"this is {coder} {VERSIONS[coder]}; the digest was taken with {version}")
    assert short_digest(golden_artifact(coder)) == digest


@pytest.mark.parametrize("coder", CODERS)
def test_the_coder_does_not_change_the_content(coder: str) -> None:
    model, data = build(artifact_config())
    other = build(artifact_config(coder=coder))[1]
    assert (raw_roles(other) == raw_roles(data)) == (coder != "range")
    for (name, weight), expected in zip(train_gpt.read_artifact(other, small_config(), NAME).named_parameters(), on_the_grid(model).values(), strict=True):
        assert torch.equal(weight, expected), name


# Coded matrices as they were when this format was made: states, bound, mean and spread of every vector of exponents, then the words of the range coder.
GOLDEN_RATE = (
    "084e00fcff0effff0a110008feff0856a1ef1284bc2e6dfa83817a712964460247309c6c64afd267f288a2bf9759b2bce56bda6368b30caff38973363b7981b9"
    "03fa278aa235d448a5e08ced7774f38d7b35a5758d9a33dfe945a4e1bd16ef9e3664af6f2a06460e74adee25acfb272f302f8cdbed3f8e"
)
GOLDEN_PLAIN = (
    "014e00110008feff085c0a620212faf211a6103d3d6d1e584a0879762b99f9b48f1fd249c370739739b0706a88fa929251c049608701dc1ffe4b8cfe62db6204"
    "428729df34a936e1804da9a8bcf7ff5285b526aac1cb81d76da219c754bb3620843224e3fa"
)


def golden_codes(rows: int, columns: int) -> np.ndarray:
    """Returns codes on half steps that a trellis of 8 states allows, of sizes that rise along rows and fall along columns."""
    next_state = ((0, 2), (5, 7), (1, 3), (4, 6), (2, 0), (7, 5), (3, 1), (6, 4))
    codes = np.zeros((rows, columns), np.int16)
    for column in range(columns):
        state = 0
        for row in range(rows):
            wanted = ((row * 7 + column * 13) % 17 - 8) * (row + 1) * (columns - column) // 8
            codes[row, column] = 2 * wanted + state % 2
            state = next_state[state][wanted % 2]
    return codes


def test_a_coded_matrix_of_rate_is_decoded_to_what_it_was() -> None:
    codes, states, exponents = train_gpt.decode_matrix(bytes.fromhex(GOLDEN_RATE), (12, 9), 2, (12, 9))
    assert np.array_equal(codes, golden_codes(12, 9)) and states == 8 and codes.dtype == np.int16
    assert [list(side) for side in exponents] == [[3 * row - 20 for row in range(12)], [7 - 2 * column for column in range(9)]]


def test_a_coded_matrix_of_whole_steps_is_decoded_to_what_it_was() -> None:
    codes, states, exponents = train_gpt.decode_matrix(bytes.fromhex(GOLDEN_PLAIN), (12, 9), 1)
    assert np.array_equal(codes, golden_codes(12, 9) >> 1) and (states, exponents) == (1, [])


def test_points_of_rate_are_products_of_powers_of_two_and_the_step() -> None:
    """In float64, rounded to float32 once a side and once where they meet: every machine must get the same bits."""
    rows, columns = np.array([-7, 0, 5], np.int16), np.array([2, -3], np.int16)
    quarters = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
    row_steps, column_steps = ([np.float32(factor * quarters[k % 4] * 2.0 ** (k // 4)) for k in side] for factor, side in ((0.3 / 2, rows), (1, columns)))
    codes = np.array([[1, -2], [3, 32766], [-32766, 0]], np.int16)
    points = Stored(codes, train_gpt.rate_grid(0.3, rows, columns), 0, 8, (rows, columns)).weight().numpy()
    for i, j in np.ndindex(3, 2):
        assert points[i, j] == np.float32(codes[i, j]) * (row_steps[i] * column_steps[j])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300) | st.builds(lambda pattern, times: pattern * times, st.binary(min_size=1, max_size=5), st.integers(1, 500)), st.data())
def test_coders_give_back_exactly_what_they_were_given(data: bytes, choice: st.DataObject) -> None:
    coder = choice.draw(st.sampled_from(BYTE_CODERS))
    coded = train_gpt.compress(data, coder)
    assert train_gpt.decompress(coded, coder, len(data)) == data
    for wrong in {len(data) - 1, len(data) + 1} - {-1}:
        with pytest.raises(ValueError, match=coder):
            train_gpt.decompress(coded, coder, wrong)


# ----------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.fixture(scope="module")
def whole() -> bytes:
    """A valid artifact."""
    return build(artifact_config(coder="zstd"))[1]


@functools.cache
def artifact_of(kind: str) -> bytes:
    """Returns a valid artifact of one of KINDS."""
    return build(artifact_config(**KINDS[kind]))[1]


@pytest.fixture(scope="module", params=KINDS)
def either(request: pytest.FixtureRequest) -> bytes:
    """A valid artifact of any kind."""
    return artifact_of(request.param)


def refused(data: bytes, reason: str | None = None) -> None:
    """The reader must refuse `data` with a ValueError of one line that begins with the file's name."""
    with pytest.raises(ValueError, match=reason) as caught:
        train_gpt.read_artifact(data, artifact_config(), NAME)
    assert str(caught.value).startswith(f"{NAME}: "), str(caught.value)


def test_an_artifact_says_how_to_rebuild_its_model() -> None:
    config = artifact_config(matrix_bits=3, logit_softcap=7.5, doc_mask=False, mlp_mult=1.5, coder="brotli")
    model, data = build(config)
    restored = train_gpt.read_artifact(data, small_config(coder="zstd"), NAME)
    assert {name: getattr(restored.config, name) for name in train_gpt.MODEL_SETTINGS} == {name: getattr(config, name) for name in train_gpt.MODEL_SETTINGS}
    assert restored.config.coder == "zstd", "settings that do not shape the model stay those of the reader"
    for (name, weight), (other, expected) in zip(restored.named_parameters(), on_the_grid(model).items(), strict=True):
        assert name == other and torch.equal(weight, expected)


def test_an_artifact_cut_anywhere_is_refused(either: bytes) -> None:
    for length in (*range(40), *range(40, len(either), 97), len(either) - DIGEST, len(either) - 1):
        refused(either[:length], "not an artifact|altered or truncated")


def test_an_artifact_with_any_bit_flipped_is_refused(either: bytes) -> None:
    bits = random.Random(0).sample(range(8 * len(either)), 300)
    for bit in {*bits, *range(8 * FIXED.size), 8 * len(either) - 1}:
        altered = bytearray(either)
        altered[bit // 8] ^= 1 << bit % 8
        refused(bytes(altered), "not an artifact|artifact version|altered or truncated")


@pytest.mark.parametrize("extra", [b"\0", b"x" * 1000])
def test_bytes_after_the_digest_are_refused(whole: bytes, extra: bytes) -> None:
    refused(whole + extra, "altered or truncated")


@pytest.mark.parametrize("data", [b"", b"PGOLF", b"\x89PNG\r\n\x1a\n" + bytes(1000), b"text\n" * 100, zlib.compress(b"x" * 1000)])
def test_foreign_files_are_refused(data: bytes) -> None:
    refused(data, "not an artifact of this script")


def test_another_version_is_refused(whole: bytes) -> None:
    header, blobs = parse(whole)
    ours = train_gpt.ARTIFACT_VERSION
    for other in (ours - 1, ours + 1, 255):
        refused(seal(header, blobs, version=other), f"artifact version {other}, but this script reads version {ours}")


@pytest.mark.parametrize("where", ["between", "end", "last role", "first role"])
def test_bytes_that_no_role_claims_are_refused_even_with_a_valid_digest(either: bytes, where: str) -> None:
    header, blobs = parse(either)
    if where == "between":
        blobs.insert(1, b"x")
    elif where == "end":
        blobs.append(b"x")
    else:
        index = len(header["roles"]) - 1 if where == "last role" else 0
        role = list(header["roles"])[index]
        header["roles"][role]["bytes"] += 3
        blobs[index] += b"xyz"
    refused(seal(header, blobs))


def test_bytes_after_the_corrections_are_refused_even_when_they_are_claimed() -> None:
    header, blobs = parse(artifact_of("corrected"))
    header["lqer"]["bytes"] += 3
    refused(seal(header, [*blobs, b"xyz"]))


@pytest.mark.parametrize("length", [0, 1, 1 << 16, (1 << 16) + 1, 2**32 - 1])
def test_a_header_of_the_wrong_length_is_refused_even_with_a_valid_digest(whole: bytes, length: int) -> None:
    refused(seal(*parse(whole), length=length))


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"7", b'"text"', b"{}", b'{"settings": {}}', b"[" * 60000, b'{"a":' * 10000, b"9" * 5000, b'{"settings": NaN}'],
    ids=lambda header: repr(header[:12]),
)
def test_a_header_of_other_json_is_refused_even_with_a_valid_digest(whole: bytes, header: bytes) -> None:
    refused(seal(header, parse(whole)[1]))


ABSURD = [
    *[(("settings", "num_layers"), value) for value in (0, -1, 1, 3, 257, 10**30, 2.0, 2.5, "two", None, [2], {}, math.nan)],
    *[(("settings", "model_dim"), value) for value in (7, 16384, 2**40, math.inf)],
    *[(("settings", "vocab_size"), value) for value in (1, 25, 65536, 2**63)],
    *[(("settings", "num_heads"), value) for value in (0, 3, 1024)],
    *[(("settings", "num_kv_heads"), value) for value in (0, 2, 3)],
    *[(("settings", "mlp_mult"), value) for value in (0.01, 64, -1.0, math.nan, "wide")],
    *[(("settings", "bos_id"), value) for value in (-1, 24, 65536)],
    *[(("settings", "tie_embeddings"), value) for value in (False, 2, "yes", None)],
    *[(("settings", "rope_dims"), value) for value in (-2, 1, 6)],
    *[(("settings", "embed_rank"), value) for value in (-1, 4, 10**12, 10**30)],
    *[(("settings", "bigram_hash_buckets"), value) for value in (-1, 7, 10**12, 10**30)],
    *[(("settings", "value_embed_layers"), value) for value in ("0", "2", "x", "9" * 5000, None, [0])],
    *[(("settings", "attention_gate_window"), value) for value in (1, 9, 10**30)],
    *[(("settings", "input_stages"), value) for value in ("", "norm", "norm,norm,norm", None)],
    *[(("settings", "skip_connections"), value) for value in ("none", "gated", "all", None)],
    *[(("settings", "parallel_residuals"), value) for value in ("lanes", "both")],
    *[(("settings", "num_loops"), value) for value in (-1, 2, 65, 10**30)],
    *[(("settings", name), value) for name in ("swiglu", "use_smeargate", "loop_embedding") for value in (True, "yes")],
    (("settings", "a_setting_of_the_future"), 1),
    (("settings",), []),
    (("settings",), None),
    *[(("roles", "attention", "bits"), [value] * 8) for value in (0, 1, 9, 15, 17, -8, 8.5, 8.0, "8", None, [8], math.nan, True, 10**30)],
    *[(("roles", "attention", "bits"), value) for value in ([], [8] * 7, [8] * 9, [8] * 7 + [16], 8, "88888888", None, {"8": 8}, math.nan)],
    (("roles", "gain", "bits"), [8] * 9),
    *[(("roles", "attention", "bytes"), value) for value in (-1, 0, 1, 10**12, 10**30, 1.5, "1", None, [], True)],
    (("roles", "attention"), None),
    (("roles", "attention"), {}),
    (("roles", "stranger"), {"bits": [8], "bytes": 1}),
    (("roles",), []),
    (("roles",), None),
    *[(("layout",), [value, "rows", False]) for value in ("lzma", "", None, ["zlib"], 7)],
    *[(("layout",), ["zstd", value, False]) for value in ("spiral", "", None, ["rows"], 7)],
    *[(("layout",), ["zstd", "rows", value]) for value in ("maybe", "", None, [False], 7)],
    *[(("layout",), value) for value in ("zstd", [], ["zstd", "rows"], ["zstd", "rows", False, False], {}, None, 3, ["zlib", "rows", False])],
    *[(("scheme",), value) for value in ("a_scheme_of_the_future", "", None, ["rowmax"], 3)],
    *[(("step",), value) for value in (-1.0, math.nan, math.inf, 2.0**64, 10**30, 1, True, "1", None, [0.0])],
    *[(("lqer",), value) for value in (None, [], {}, 0)],
    *[(("lqer", "names"), value) for value in (["embedding.table.weight"], ["blocks.0.mix"], ["stranger"], "text", 7, [["a"]], [None], {"a": 1})],
]


@pytest.mark.parametrize(("path", "value"), ABSURD, ids=lambda part: ".".join(part) if isinstance(part, tuple) else repr(part))
def test_a_header_that_asks_for_the_absurd_is_refused_at_once(whole: bytes, path: tuple[str, ...], value: Any) -> None:
    header, blobs = parse(whole)
    place = header
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    began = time.perf_counter()
    refused(seal(header, blobs))
    assert time.perf_counter() - began < 5


# Of an artifact that holds corrections of rank 2, in groups of 5 columns.
ABSURD_CORRECTIONS = [
    *[("rank", value) for value in (0, -1, 1, 3, 9, 2**32 - 1, 10**30, 2.0, "2", None, True, [2])],
    *[("group", value) for value in (0, -1, 3, 2**40, 10**30, 5.0, "5", None, True)],
    *[("bytes", value) for value in (0, -1, 10**12, 10**30, 1.5, None)],
    *[("names", value) for value in ([], ["embedding.table.weight"], ["embedding.table.weight"] * 3, ["blocks.0.mix"] * 3, None, 3, {})],
]


@pytest.mark.parametrize(("key", "value"), ABSURD_CORRECTIONS, ids=repr)
@pytest.mark.parametrize("kind", ["corrected", "corrected range"])
def test_corrections_that_ask_for_the_absurd_are_refused_at_once(kind: str, key: str, value: Any) -> None:
    header, blobs = parse(artifact_of(kind))
    header["lqer"][key] = value
    began = time.perf_counter()
    refused(seal(header, blobs))
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("rank", [0, 9, 1000, 2**20])
def test_corrections_of_an_impossible_rank_are_refused_at_once_even_when_there_is_data_for_them(rank: int) -> None:
    """The last one is hundreds of megabytes, and a loop of a million turns."""
    header, blobs = parse(artifact_of("corrected"))
    shapes = {name: parameter.shape for name, parameter in train_gpt.GPT(artifact_config()).named_parameters()}
    size = sum(2 * rank * (1 + math.ceil(columns / 5)) + rank * (rows + columns) for rows, columns in (shapes[name] for name in header["lqer"]["names"]))
    blobs[-1] = zstandard.compress(bytes(size))
    header["lqer"].update(rank=rank, bytes=len(blobs[-1]))
    refused_without_unpacking(seal(header, blobs), f"rank {rank}")


@pytest.mark.parametrize("group", [24, 1000, 2**20, 2**27, 2**32 - 1])
def test_a_group_wider_than_every_matrix_is_one_group_and_takes_no_memory(group: int) -> None:
    """Groups of 24 columns and of four thousand million have the same number of steps, so both files are whole."""
    model = lively_model(artifact_config(**{**KINDS["corrected"], "lqer_asym_group": 24}), torch.float32)
    header, blobs = parse(pack(model).data)
    header["lqer"]["group"] = group
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        restored = train_gpt.read_artifact(seal(header, blobs), artifact_config(), NAME)
    except ValueError as error:
        assert str(error).startswith(f"{NAME}: ") and group > 24
    else:
        expected = train_gpt.read_artifact(pack(model).data, artifact_config(), NAME)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(restored.parameters(), expected.parameters(), strict=True))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


@pytest.mark.parametrize("kind", ["zstd", "rate"])
def test_a_small_file_that_asks_for_the_largest_model_of_all_is_refused_at_once(kind: str) -> None:
    header, blobs = parse(artifact_of(kind))
    header["settings"].update(num_layers=256, model_dim=16384, num_heads=1024, num_kv_heads=1024, mlp_mult=64.0, vocab_size=65536)
    for role, count in (("attention", 4), ("mlp", 2)):
        header["roles"][role]["bits"] = header["roles"][role]["bits"][:1] * (256 * count)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refused(seal(header, blobs), "cannot hold the 9,072,063,807,488 weights that its settings ask for")
    assert time.perf_counter() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


@pytest.mark.parametrize("name", ["embed_rank", "bigram_hash_buckets"])
def test_a_header_that_asks_for_more_weights_than_can_be_counted_is_refused(whole: bytes, name: str) -> None:
    header, blobs = parse(whole)
    header["settings"][name] = 10**18
    refused(seal(header, blobs))


@pytest.mark.parametrize(
    "missing",
    ["settings", "scheme", "layout", "step", "roles", "lqer", ("settings", "num_layers"), ("roles", "gain"), ("roles", "gain", "bits"), ("lqer", "names")],
)
def test_a_header_that_lacks_something_is_refused(whole: bytes, missing: str | tuple[str, ...]) -> None:
    header, blobs = parse(whole)
    path = (missing,) if isinstance(missing, str) else missing
    place = header
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    refused(seal(header, blobs))


@pytest.mark.parametrize("where", [(), ("settings",), ("roles",)])
def test_a_header_with_an_entry_of_another_version_is_refused(whole: bytes, where: tuple[str, ...]) -> None:
    header, blobs = parse(whole)
    place = header
    for key in where:
        place = place[key]
    place["matrix_bits"] = 8
    refused(seal(header, blobs))


@pytest.mark.parametrize("rows", [lambda order: order[:1] * len(order), lambda order: [1, *order[1:]], lambda order: [len(order), *order[1:]]])
def test_an_order_of_rows_that_is_not_one_is_refused(rows: Callable[[list[int]], list[int]]) -> None:
    header, blobs = parse(build(artifact_config(coder="zlib", code_order="sorted"))[1])
    raw, count = bytearray(zlib.decompress(blobs[0])), header["settings"]["vocab_size"]
    order = list(struct.unpack_from(f"<{count}H", raw, 2 * count))
    assert sorted(order) == list(range(count)) and order[0] == 0
    struct.pack_into(f"<{count}H", raw, 2 * count, *rows(order))
    blobs[0] = zlib.compress(bytes(raw))
    header["roles"]["embed"]["bytes"] = len(blobs[0])
    refused(seal(header, blobs), "order of rows")


@pytest.mark.parametrize("kind", ["range", "rate"])
def test_a_coded_matrix_of_words_or_bounds_that_no_coder_writes_is_refused(kind: str) -> None:
    """The library answers these words with an AssertionError, and a bound of 0 with a panic."""
    header, blobs = parse(artifact_of(kind))
    steps, matrix = take_blocks(blobs[0])
    fixed = 3 + 3 * (4 if kind == "rate" else 2)
    outward = bytes([matrix[0]]) + struct.pack("<H", 32767) + matrix[3:]
    for damaged in (matrix[:fixed] + b"\xff" * (len(matrix) - fixed), matrix[:1] + b"\0\0" + matrix[3:], b"\2" + matrix[1:], outward, matrix[:fixed - 1]):
        blobs[0] = b"".join(struct.pack("<I", len(block)) + block for block in (steps, damaged))
        header["roles"]["embed"]["bytes"] = len(blobs[0])
        refused(seal(header, blobs), "a coded matrix ")


def test_codes_of_rate_outside_the_entropy_coder_are_refused() -> None:
    header, blobs = parse(artifact_of("zlib"))
    header["roles"]["embed"]["bits"] = [0]
    blobs[0] = zlib.compress(zlib.decompress(blobs[0])[2 * header["settings"]["vocab_size"] :])  # a matrix without steps
    header["roles"]["embed"]["bytes"] = len(blobs[0])
    refused(seal(header, blobs))


def zlib_bomb(size: int) -> bytes:
    """Returns `size` zeros coded by zlib, made of one block again and again so that nobody has to code them all."""
    coder = zlib.compressobj(9)
    first = coder.compress(bytes(1 << 20)) + coder.flush(zlib.Z_FULL_FLUSH)
    again = coder.compress(bytes(1 << 20)) + coder.flush(zlib.Z_FULL_FLUSH)
    return first + again * ((size >> 20) - 1) + coder.flush()


@functools.cache
def coded_zeros(size: int, write_content_size: bool) -> bytes:
    """Returns `size` zeros coded by zstd."""
    return zstandard.ZstdCompressor(write_content_size=write_content_size).compress(bytes(size))


@functools.cache
def brotli_bomb(size: int) -> bytes:
    """Returns `size` zeros coded by brotli."""
    coder = brotli.Compressor(quality=1)
    return b"".join(coder.process(bytes(1 << 24)) for _ in range(size >> 24)) + coder.finish()


def zstd_bomb(size: int, promised: int) -> bytes:
    """Returns `size` zeros coded by zstd, whose frame promises `promised` bytes; 0 = says nothing."""
    coded = coded_zeros(size, bool(promised))
    if not promised:
        return coded
    frame = bytearray(coded)  # magic, descriptor, window, four bytes of content size: zstd's format, section 3.1.1.1
    assert zstandard.frame_content_size(coded) == size and coded[4] >> 6 == 2
    at = 5 if coded[4] >> 5 & 1 else 6
    frame[at : at + 4] = struct.pack("<I", promised)
    assert zstandard.frame_content_size(bytes(frame)) == promised
    return bytes(frame)


def bomb_of(kind: str, size: int, wanted: int) -> bytes:
    """Returns `size` zeros coded by what `kind` says; `wanted` bytes would be right."""
    if kind in ("zlib", "brotli"):
        return {"zlib": zlib_bomb, "brotli": brotli_bomb}[kind](size)
    return zstd_bomb(size, {"so": size, "nothing": 0, "lies": wanted}[kind.split()[-1]])


def refused_without_unpacking(data: bytes, reason: str) -> None:
    """The reader must refuse `data`, and take no more memory than a few copies of it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        refused(data, reason)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(data) + 1_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes, of all libraries; brotli's window is 16 MB"


@pytest.mark.parametrize("kind", ["zlib", "brotli", "zstd that says so", "zstd that says nothing", "zstd that lies"])
def test_a_role_that_would_unpack_to_more_than_it_should_is_refused_without_unpacking_it(kind: str) -> None:
    size = 1 << 30 if kind == "zlib" else 1 << 28
    header, blobs = parse(artifact_of(kind.split()[0]))
    raw = len(raw_roles(seal(header, blobs))["attention"])
    bomb = bomb_of(kind, size, raw)
    header["roles"]["attention"]["bytes"], blobs[list(header["roles"]).index("attention")] = len(bomb), bomb
    refused_without_unpacking(seal(header, blobs), "bytes that its settings ask for|damaged")


@pytest.mark.parametrize("kind", ["zstd that says so", "zstd that says nothing", "zstd that lies"])
@pytest.mark.parametrize("where", ["steps", "corrections"])
def test_what_accompanies_coded_matrices_is_refused_without_unpacking_it_when_it_is_too_much(where: str, kind: str) -> None:
    header, blobs = parse(artifact_of("corrected range"))
    plain, *matrices = take_blocks(blobs[0])
    bomb = bomb_of(kind, 1 << 28, len(unpacked("zstd", plain if where == "steps" else blobs[-1])))
    if where == "steps":
        blobs[0] = b"".join(struct.pack("<I", len(block)) + block for block in (bomb, *matrices))
        header["roles"]["embed"]["bytes"] = len(blobs[0])
    else:
        header["lqer"]["bytes"], blobs[-1] = len(bomb), bomb
    refused_without_unpacking(seal(header, blobs), "bytes that its settings ask for|damaged")


@pytest.mark.parametrize("promised", [1 << 10, 1 << 17, 1 << 20, 10_000_000])  # the last is more than zstd's window
def test_zstd_data_that_lies_about_its_size_takes_no_more_memory_than_it_promises(promised: int) -> None:
    bomb = zstd_bomb(1 << 28, promised)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="zstd data"):
            train_gpt.decompress(bomb, "zstd", promised)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * promised + 1_000_000


@pytest.mark.parametrize("limit", [0, 1, 1 << 10, 1 << 20])
def test_brotli_data_of_any_length_takes_no_more_memory_than_was_asked_for(limit: int) -> None:
    bomb = brotli_bomb(1 << 28)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="brotli data"):
            train_gpt.decompress(bomb, "brotli", limit)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * limit + 1_000_000


def test_an_artifact_of_a_model_that_no_machine_holds_is_refused_without_unpacking_it() -> None:
    """Its settings, sizes and data agree with each other."""
    header, blobs = parse(artifact_of("zlib"))
    header["settings"]["model_dim"] = 16384
    with torch.device("meta"):
        groups = train_gpt.parameters_by_role(train_gpt.GPT(artifact_config(**header["settings"])))
    sizes = {role.value: sum(p.numel() + 2 * p.shape[0] for p in groups[role].values()) for role in (Role.EMBED, Role.ATTENTION, Role.MLP)}
    assert sum(sizes.values()) > 1 << 31
    for number, (role, size) in enumerate(sizes.items()):
        blobs[number] = zlib_bomb(size) if size > 1 << 20 else zlib.compress(bytes(size))
        header["roles"][role]["bytes"] = len(blobs[number])
    refused_without_unpacking(seal(header, blobs), "cannot hold the 3,758,637,060 weights that its settings ask for")


@pytest.mark.parametrize("kind", ["zlib", "range"])
def test_a_file_too_small_for_its_weights_is_refused_before_anything_is_unpacked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 million weights in 3 thousand bytes: no coder does better than 512 weights a byte on anything but a bomb."""
    header, blobs = parse(artifact_of(kind))
    header["settings"]["bigram_hash_buckets"] = 40_000
    header["roles"]["table"] = {"bits": [8], "bytes": 0}
    monkeypatch.setattr(train_gpt, "decode_role", None)
    refused(seal(header, blobs), "cannot hold the 5,[0-9,]* weights")


def test_more_weights_than_any_model_of_the_challenge_has_are_refused_whatever_the_size_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    data = artifact_of("zlib")
    count = sum(parameter.numel() for parameter in train_gpt.read_artifact(data, artifact_config(), NAME).parameters())
    assert train_gpt.MAX_WEIGHTS <= 1 << 29, "two gigabytes of float32"
    monkeypatch.setattr(train_gpt, "MAX_WEIGHTS", count)
    train_gpt.read_artifact(data, artifact_config(), NAME)
    monkeypatch.setattr(train_gpt, "MAX_WEIGHTS", count - 1)
    refused(data, f"cannot hold the {count:,} weights")


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Returns the paths of everything inside nested dictionaries."""
    inner = [place for key, item in value.items() for place in places(item, (*path, key))] if isinstance(value, dict) else []
    return ([path] if path else []) + inner


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["zlib", "zstd", "rowmax"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_forged_artifact_with_a_valid_digest_is_read_or_refused_and_nothing_else(choice: st.DataObject) -> None:
    either = artifact_of(choice.draw(st.sampled_from(list(KINDS)), label="kind"))
    header, blobs = parse(either)
    if choice.draw(st.booleans(), label="forge the header"):
        for path in choice.draw(st.lists(st.sampled_from(places(header)), min_size=1, max_size=2), label="where"):
            place = header
            for key in path[:-1]:
                place = place.get(key) if isinstance(place, dict) else None
            if isinstance(place, dict):
                place[path[-1]] = choice.draw(ANYTHING, label="what")
        data = seal(header, blobs)
    else:
        body = bytearray(either[:-DIGEST])
        for _ in range(choice.draw(st.integers(1, 3), label="edits")):
            start = choice.draw(st.integers(0, min(len(body), 700)) | st.integers(0, len(body)), label="where")
            body[start : start + choice.draw(st.integers(0, 4), label="removed")] = choice.draw(st.binary(max_size=4), label="added")
        data = sign(bytes(body))
    try:
        model = train_gpt.read_artifact(data, artifact_config(), NAME)
    except ValueError as error:
        assert str(error).startswith(f"{NAME}: ")
    else:
        assert sum(parameter.numel() for parameter in model.parameters()) < 10_000


EXTREMES = (0, 1, -1, 2, 3, 255, 256, 2**15, 2**16, 2**31, 2**32 - 1, 2**32, 10**9, 10**18, 0.0, -0.5, 1e-300, 1e300, "", "0", "range", True, None, [], {})


def altered_bytes(data: bytes, chance: random.Random) -> bytes:
    """Returns `data` with some bits, bytes or slices changed, removed, repeated or moved."""
    altered = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        start = chance.randrange(len(altered) + 1)
        length = chance.choice((0, 1, 1, 2, 4, 4, 8, 64))
        piece = altered[start : start + length]
        change = chance.randrange(6)
        if change == 0 and start < len(altered):
            altered[start] ^= 1 << chance.randrange(8)
        elif change == 1:
            altered[start : start + length] = chance.randbytes(length)
        elif change == 2:
            altered[start : start + length] = bytes([chance.choice((0, 255, 127, 128))]) * length
        elif change == 3:
            del altered[start : start + length]
        elif change == 4:
            altered[start:start] = piece * chance.choice((1, 2, 50))
        else:
            elsewhere = chance.randrange(len(altered) + 1)
            altered[elsewhere : elsewhere + length] = piece
    return bytes(altered)


def altered_block(blob: bytes, coder: str, chance: random.Random) -> bytes:
    """Returns a coded role whose content is altered while what surrounds it is whole, so that the reader gets as far as that content."""
    if coder != "range":
        return train_gpt.compress(altered_bytes(unpacked(coder, blob), chance), coder)
    blocks = take_blocks(blob)
    number = chance.randrange(len(blocks))
    if number == 0:
        blocks[0] = train_gpt.compress(altered_bytes(unpacked("zstd", blocks[0]), chance), "zstd")
    elif (kind := chance.random()) < 0.4:
        start = bytearray(blocks[number])
        start[chance.randrange(10)] = chance.choice((0, 0, 1, 8, 255, chance.randrange(256)))  # states, bound, means, spreads
        blocks[number] = bytes(start)
    elif kind < 0.6:
        size = len(blocks[number]) // 4 * 4
        cut = len(blocks[number]) - chance.choice([*range(4, min(size, 60), 4), size // 8 * 4])
        blocks[number] = blocks[number][:cut] + chance.choice((b"", b"\0", b"\xff", b"\xff", b"\x7f")) * (len(blocks[number]) - cut)  # words of the coder
    else:
        blocks[number] = altered_bytes(blocks[number], chance)
    return b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def altered_artifact(data: bytes, chance: random.Random, resealed: bool) -> bytes:
    """Returns an altered artifact; a resealed one has a digest that matches."""
    if not resealed:
        while (altered := altered_bytes(data, chance)) == data:
            pass
        return altered
    header, blobs = copy.deepcopy(parse(data))
    where = chance.random()
    if where < 0.25:
        return sign(altered_bytes(data[:-DIGEST], chance))
    if where < 0.5:
        for section in chance.sample(list(header), chance.choice((1, 1, 2))):
            path = chance.choice([path for path in places(header) if path[0] == section])
            place = header
            for key in path[:-1]:
                place = place.get(key) if isinstance(place, dict) else None
            if isinstance(place, dict):
                old = place.get(path[-1])
                if isinstance(old, list) and old and chance.random() < 0.8:
                    old[chance.randrange(len(old))] = chance.choice((*EXTREMES, *range(17)))
                else:
                    place[path[-1]] = chance.choice((*EXTREMES, old * 2 if isinstance(old, int) else old, [old], {str(old): old}))
        return seal(header, blobs)
    entries = [*header["roles"].values(), header["lqer"]]
    number = chance.choice([number for number, blob in enumerate(blobs) if blob])
    coder = header["layout"][0] if number < len(header["roles"]) else "zstd"
    blobs[number] = altered_bytes(blobs[number], chance) if where < 0.65 else altered_block(blobs[number], coder, chance)
    entries[number]["bytes"] = len(blobs[number])
    return seal(header, blobs)


def read_altered(folder: Path, first: int, count: int) -> None:
    """Reads `count` altered forms of every artifact in `folder`, every other one resealed, and prints what came of them as JSON.

    Ends with the exception that escaped, if one did, and leaves what it was reading in the folder as `altered`.
    """
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for path in sorted(folder.glob("*.bin")):
        whole = path.read_bytes()
        train_gpt.read_artifact(whole, artifact_config(), NAME)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(first, first + count):
            resealed = bool(number % 2)
            data = altered_artifact(whole, random.Random(f"{path.stem} {number}"), resealed)
            (folder / "altered").write_bytes(data)
            began = time.perf_counter()
            try:
                model = train_gpt.read_artifact(data, artifact_config(), NAME)
            except ValueError as error:
                assert str(error).startswith(f"{NAME}: "), f"{path.stem} {number}: {error}"
                outcomes[f"{path.stem} {'resealed ' * resealed}refused"] += 1
            except BaseException as error:
                raise AssertionError(f"{path.stem} {number}: {type(error).__name__}: {error}") from error
            else:
                assert resealed or data == whole, f"{path.stem} {number}: read in spite of its digest"
                assert sum(parameter.numel() for parameter in model.parameters()) < 512 * len(data), f"{path.stem} {number}"
                outcomes[f"{path.stem} resealed read"] += 1
            slowest = max(slowest, time.perf_counter() - began)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
            assert grown < 300_000, f"{path.stem} {number}: took {grown:,} KB"
    print(json.dumps({"outcomes": outcomes, "slowest": slowest}))


ALTERATIONS = 140  # of each kind; `make soak` tries thousands


def test_altered_artifacts_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    """In a process of its own, whose memory is limited, because an exception of a coder's library need not be one that a test survives."""
    for kind in KINDS:
        (tmp_path / f"{kind}.bin").write_bytes(artifact_of(kind))
    command = [sys.executable, __file__, str(tmp_path), "0", str(ALTERATIONS)]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads(ended.stdout)
    outcomes = Counter(report["outcomes"])
    assert sum(outcomes.values()) == len(KINDS) * ALTERATIONS > 1000 and report["slowest"] < 5
    for kind in KINDS:
        assert outcomes[f"{kind} refused"] == ALTERATIONS // 2, "the digest"
        assert outcomes[f"{kind} resealed refused"] + outcomes[f"{kind} resealed read"] == ALTERATIONS // 2
        assert min(outcomes[f"{kind} resealed refused"], outcomes[f"{kind} resealed read"]) >= 10, "some get past every check, and some do not"


# ----------------------------------------------------------------------------------------------------------------------
# Stages


FILLING: dict[str, Any] = {"ITERATIONS": 6, "QUANT_SCHEME": "rate", "CODER": "range", "BYTES_CAP": CODE_BYTES + 9_000, "CALIBRATION_TOKENS": 512}


@pytest.fixture(scope="module", params=[1, 0.5], ids=["no qat", "qat"])
def filling(request: pytest.FixtureRequest, run_here: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with QUANT_SCHEME=rate under a cap that it has to squeeze into, without QAT or with it."""
    place = tmp_path_factory.mktemp("filling")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_gpt, "HELD_OUT_TOKENS", 1024)
        ended = run_here(place, **FILLING, QAT_START_FRAC=request.param)
    assert ended.code == 0, ended.errors
    return Finished(place / "runs" / "run", Path(), ended.output)


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that schemes are compared on is as short as that of `filling`."""
    monkeypatch.setattr(train_gpt, "HELD_OUT_TOKENS", 1024)


def test_rate_fills_what_the_cap_leaves_and_never_exceeds_it(filling: Finished) -> None:
    (event,), result = filling.events("export"), filling.result()
    assert 0.99 * FILLING["BYTES_CAP"] < result["bytes_total"] <= FILLING["BYTES_CAP"] == result["bytes_cap"]
    assert (event["scheme"], event["coder"]) == ("rate", "range") and 0 < event["kl"] < 1
    artifact = (filling.folder / "artifact.bin").read_bytes()
    header, _ = parse(artifact)
    assert (header["scheme"], header["layout"][0]) == ("rate", "range") and header["step"] > 0
    assert all(set(entry["bits"]) == ({16} if role == "gain" else {0}) for role, entry in header["roles"].items())
    assert result["bytes_model"] == len(artifact) == sum(row["bytes"] for row in event["roles"])


def test_export_alone_makes_the_same_artifact(run_here: Callable[..., Ended], reference: Finished, tmp_path: Path) -> None:
    # Other model settings than the checkpoint's: the checkpoint's are used.
    ended = run_here(tmp_path, STAGES="export", CHECKPOINT=reference.folder / "checkpoint.pt", NUM_LAYERS=2, MODEL_DIM=64)
    assert ended.code == 0, ended.errors
    assert (tmp_path / "runs" / "run" / "artifact.bin").read_bytes() == (reference.folder / "artifact.bin").read_bytes()


@pytest.mark.usefixtures("few_tokens")
def test_export_alone_takes_the_same_statistics_and_makes_the_same_artifact(run_here: Callable[..., Ended], filling: Finished, tmp_path: Path) -> None:
    ended = run_here(tmp_path, f"@{filling.folder / 'config.env'}", "STAGES=export", f"CHECKPOINT={filling.folder / 'checkpoint.pt'}", f"RUNS_DIR={tmp_path}",
                     "RUN_ID=again", bare=True)  # fmt: skip
    assert ended.code == 0, ended.errors
    assert (tmp_path / "again" / "artifact.bin").read_bytes() == (filling.folder / "artifact.bin").read_bytes()


def test_export_alone_can_code_in_another_way(run_here: Callable[..., Ended], reference: Finished, tmp_path: Path) -> None:
    ended = run_here(tmp_path, STAGES="export", CHECKPOINT=reference.folder / "checkpoint.pt", CODER="zstd")
    assert ended.code == 0, ended.errors
    exported, original = (tmp_path / "runs" / "run" / "artifact.bin").read_bytes(), (reference.folder / "artifact.bin").read_bytes()
    assert parse(exported)[0]["layout"][0] == "zstd" and raw_roles(exported) == raw_roles(original)


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("scheme", ["gptq_lite", "gptq", "adaptive", "rate"])
def test_export_alone_can_quantise_in_another_way(run_here: Callable[..., Ended], reference: Finished, tmp_path: Path, scheme: str) -> None:
    changed = {"QUANT_SCHEME": scheme, "CODER": "range" if scheme == "rate" else "brotli", "QAT_START_FRAC": 1, "CALIBRATION_TOKENS": 512, "EMBED_BITS": 7}
    ended = run_here(tmp_path, STAGES="export", CHECKPOINT=reference.folder / "checkpoint.pt", **changed)
    assert ended.code == 0, ended.errors
    header, _ = parse((tmp_path / "runs" / "run" / "artifact.bin").read_bytes())
    assert (header["scheme"], header["layout"][0]) == (scheme, changed["CODER"])
    assert header["roles"]["embed"]["bits"] == [0 if scheme == "rate" else 7]


@pytest.mark.parametrize("stages", ["eval", "export,eval"])
def test_scoring_alone_gives_the_score_of_the_run(run_here: Callable[..., Ended], reference: Finished, tmp_path: Path, stages: str) -> None:
    source = {"ARTIFACT": reference.folder / "artifact.bin"} if stages == "eval" else {"CHECKPOINT": reference.folder / "checkpoint.pt"}
    ended = run_here(tmp_path, STAGES=stages, **source, NUM_LAYERS=2, MODEL_DIM=64)
    assert ended.code == 0, ended.errors
    result, expected = Finished(tmp_path / "runs" / "run", Path(), "").result(), reference.result()
    assert (result["val_loss"], result["val_bpb"], result["quant_val_bpb"]) == (expected["val_loss"], expected["val_bpb"], expected["quant_val_bpb"])
    assert all(result[key] == expected[key] for key in ("params", "bytes_model", "bytes_code", "bytes_total"))
    assert result["steps"] is None and result["pre_quant_val_bpb"] is None


def test_scoring_alone_an_artifact_of_rate_gives_the_score_of_the_run(run_here: Callable[..., Ended], filling: Finished, tmp_path: Path) -> None:
    """Whatever the scheme of the run that scores it."""
    ended = run_here(tmp_path, STAGES="eval", ARTIFACT=filling.folder / "artifact.bin", NUM_LAYERS=2, MODEL_DIM=64)
    assert ended.code == 0, ended.errors
    result, expected = Finished(tmp_path / "runs" / "run", Path(), "").result(), filling.result()
    assert (result["val_loss"], result["val_bpb"], result["quant_val_bpb"]) == (expected["val_loss"], expected["val_bpb"], expected["quant_val_bpb"])
    assert result["bytes_model"] == expected["bytes_model"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "header"])
def test_scoring_a_bad_artifact_ends_in_one_line_with_its_name(run_here: Callable[..., Ended], reference: Finished, tmp_path: Path, damage: str) -> None:
    data, path = (reference.folder / "artifact.bin").read_bytes(), tmp_path / "the.bin"
    if damage != "missing":
        path.write_bytes({"truncated": data[:1000], "foreign": b"hello" * 100, "header": seal({"roles": {}}, [])}[damage])
    ended = run_here(tmp_path, STAGES="eval", ARTIFACT=path)
    assert ended.code == 1 and ended.errors.startswith("error: ") and "the.bin" in ended.errors and len(ended.errors.splitlines()) == 1


@pytest.mark.parametrize(("name", "value"), [("num_layers", 1), ("num_heads", 3), ("rope_base", "wide")])
def test_scoring_an_artifact_with_impossible_settings_ends_in_one_line_with_its_name(
    run_here: Callable[..., Ended], reference: Finished, tmp_path: Path, name: str, value: Any
) -> None:
    header, blobs = parse((reference.folder / "artifact.bin").read_bytes())
    header["settings"][name] = value
    (tmp_path / "the.bin").write_bytes(seal(header, blobs))
    ended = run_here(tmp_path, STAGES="eval", ARTIFACT=tmp_path / "the.bin")
    assert ended.code == 1 and ended.errors.startswith("error: ") and "the.bin" in ended.errors and len(ended.errors.splitlines()) == 1


@pytest.mark.usefixtures("few_tokens")
def test_a_cap_that_leaves_next_to_nothing_is_reported_with_what_would_fit_and_the_exit_code_is_3(run_here: Callable[..., Ended], tmp_path: Path) -> None:
    ended = run_here(tmp_path, **{**FILLING, "ITERATIONS": 1, "BYTES_CAP": CODE_BYTES - 8_000}, WARMUP_STEPS=0)
    assert ended.code == 3, ended.errors
    assert "do not fit" in ended.output and f"over BYTES_CAP={CODE_BYTES - 8_000:,}" in ended.output
    assert f"more than BYTES_CAP={CODE_BYTES - 8_000:,}: the run will end with exit code 3" in ended.output.partition("trained 1 steps")[0], "said before"
    assert Finished(tmp_path / "runs" / "run", Path(), "").result()["val_bpb"] > 0


def test_an_artifact_over_the_cap_is_kept_and_scored_and_the_exit_code_is_3(run_here: Callable[..., Ended], tmp_path: Path) -> None:
    ended = run_here(tmp_path, ITERATIONS=1, WARMUP_STEPS=0, BYTES_CAP=50_000)
    assert ended.code == 3, ended.errors
    folder = tmp_path / "runs" / "run"
    result = Finished(folder, Path(), "").result()
    over = result["bytes_total"] - 50_000
    assert f"over BYTES_CAP=50,000 by {over:,}" in ended.output
    assert (folder / "artifact.bin").stat().st_size == result["bytes_model"]
    assert result["bytes_cap"] == 50_000 < result["bytes_total"] and result["val_bpb"] > 0
    fits = run_here(tmp_path, RUN_ID="fits", ITERATIONS=1, WARMUP_STEPS=0, BYTES_CAP=result["bytes_total"])
    assert fits.code == 0 and "over BYTES_CAP" not in fits.output, "the cap itself is allowed"
    rescored = run_here(tmp_path, RUN_ID="rescored", STAGES="eval", ARTIFACT=folder / "artifact.bin", MODEL_DIM=128)
    assert rescored.code == 0 and "the artifact brings its own MODEL_DIM=" in rescored.output, "settings that the artifact overrules are named"


# ----------------------------------------------------------------------------------------------------------------------
# The packed script


def without_docstrings(source: str) -> str:
    """Returns the syntax tree of a script, its docstrings taken out, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and isinstance(body, list):
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                node.body = body[1:] or [ast.Pass()]
    return ast.dump(tree)


def test_the_packed_script_is_the_script_without_docstrings(two_ranks: Finished) -> None:
    """`two_ranks` ran packed, and every run keeps a copy of what ran."""
    source, ran = (ROOT / "train_gpt.py").read_text(encoding="utf-8"), (two_ranks.folder / "train_gpt.py").read_text(encoding="utf-8")
    assert ast.dump(ast.parse(ran)) == without_docstrings(source) != ast.dump(ast.parse(source))


def test_a_run_of_the_packed_script_on_two_ranks_counts_its_own_file(two_ranks: Finished, reference: Finished) -> None:
    size = (two_ranks.folder.parents[1] / "packed.py").stat().st_size
    assert two_ranks.result()["bytes_code"] == size == reference.result()["bytes_code"]
    assert two_ranks.result()["steps"] == REFERENCE["ITERATIONS"]


def test_the_packed_script_runs_from_another_folder(tmp_path: Path) -> None:
    packed, temporary = tmp_path / "submission.py", tmp_path / "temporary"
    packed.write_bytes(train_gpt.pack_script((ROOT / "train_gpt.py").read_text(encoding="utf-8")) + b"# a longer file\n")
    temporary.mkdir()
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, str(packed), "--plan", "PRESET=baseline", "--json"]
    environment = {**clean_environment(), "TMPDIR": str(temporary)}
    ended = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["predicted_bytes_code"] == packed.stat().st_size
    assert list(temporary.iterdir()) == [] and list((tmp_path / "elsewhere").iterdir()) == []


def test_packing_keeps_functions_that_are_only_a_docstring() -> None:
    source = 'class Empty(ValueError):\n    """Only words."""\n\n\ndef wait():\n    """Words."""\n    return "not a docstring"\n'
    packed = train_gpt.pack_script(source)
    unpack = ast.parse(packed).body[:2]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(unpack, []), "packed", "exec"), names)
    assert ast.dump(ast.parse(names["s"])) == without_docstrings(source)


if __name__ == "__main__":
    room = 1 << 30  # above what the libraries have reserved
    reserved = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (reserved + room, reserved + room))
    read_altered(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
