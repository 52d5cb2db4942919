"""What the Triton kernels take of an H100, by compiling them for it; that needs no GPU.

    python tests/bench/hopper.py            a table: registers a thread, bytes spilled, shared memory, blocks side by side on a multiprocessor
    python tests/bench/hopper.py --json     the same for machines

Each is compiled as it is launched, at the sizes of the presets: pointers and sizes are multiples of 16. Times need a GPU: step.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import train_gpt

REGISTERS, SHARED_BYTES, THREADS = 65536, 228 * 1024, 2048  # of a multiprocessor
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", int: "i32", float: "fp32"}


class Launched(Exception):
    """Stops a wrapper where it would launch its kernel; says how."""


class Recorder:
    """Stands in for a kernel: kernel[grid](arguments, options)."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            raise Launched(arguments, options)

        return launch


def launch_of(name: str, call: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Returns (kernel, arguments, options) of the launch that `call` makes of the kernel `name`."""
    kernel = getattr(train_gpt, name)
    with mock.patch.object(train_gpt, name, Recorder(kernel)):
        try:
            call()
        except Launched as launched:
            return kernel, *launched.args
    raise AssertionError(f"{name} was not launched")


def resources(name: str, call: Any) -> dict[str, Any]:
    """Returns what the kernel `name` takes of an H100 when it is launched as `call` does."""
    kernel, arguments, options = launch_of(name, call)
    constants = {key: options[key] for key in kernel.arg_names if key in options}
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    signature = {key: TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)] for key, value in given.items()}
    multiples = {(number,): [["tt.divisibility", 16]] for number, value in enumerate(given.values()) if not isinstance(value, float)}
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, multiples)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={key: value for key, value in options.items() if key not in constants})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listing = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.findall(rf"{key}:(\d+)", listing)[0]) for key in ("REG", "STACK"))
    threads, shared = 32 * options["num_warps"], compiled.metadata.shared
    blocks = min(REGISTERS // (-(-registers // 8) * 8 * threads), SHARED_BYTES // (shared + 1024), THREADS // threads)
    return {
        "registers": registers, "spilled_bytes": spilled, "shared_bytes": shared, "threads": threads, "blocks": blocks,
        "tensor_cores": "wgmma" in compiled.asm["ptx"], "is_pipelined": "cp.async" in compiled.asm["ptx"],
    }  # fmt: skip


def table() -> dict[str, dict[str, Any]]:
    """Returns the resources of every kernel, at the sizes of the presets."""
    rows = {}
    for vocabulary in (1024, 8192):
        logits, targets = torch.empty(16, vocabulary, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.int64)
        call = partial(train_gpt.fused_cross_entropy, logits, targets, 30.0, 30.0)
        rows[f"cross_entropy, {vocabulary} tokens"] = resources("cross_entropy_kernel", call)
    x = torch.empty(2, 512, 512, dtype=torch.bfloat16)
    rows["symmetric"] = resources("symmetric_kernel", partial(train_gpt.fused_symmetric, x, None, 1.0, 1.0))
    rows["symmetric, with a second term"] = resources("symmetric_kernel", partial(train_gpt.fused_symmetric, x, x, 1.0, 1.0))
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    rows = table()
    if parser.parse_args().json:
        print(json.dumps(rows))
        return
    print(f"Triton {triton.__version__}, compute capability 9.0")
    for name, row in rows.items():
        print(f"{name:32}" + "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
