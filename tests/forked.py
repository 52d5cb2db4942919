"""Runs a script as `python script ...` would, without the seconds that importing PyTorch takes: in a fork of a process that has imported it.

The process that forks is the standard library's fork server. It has imported `train_gpt` and nothing has run in it, so that a fork of it is
what a fresh interpreter would be after its imports.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.context
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

FOLDERS = (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent)


class Outcome(NamedTuple):
    """How every rank of a run ended, and what they printed together."""

    codes: list[int]  # exit codes in rank order; -9 = killed
    output: str


class Ranks:
    """A run of a script on one process, or on several that `torchrun` would have started."""

    def __init__(self, processes: Sequence[multiprocessing.context.ForkServerProcess], output: Path) -> None:
        self.processes = processes
        self.output = output

    def kill(self) -> None:
        """Sends SIGKILL to every rank."""
        for process in self.processes:
            process.kill()

    def finish(self, seconds: float = 60) -> Outcome:
        """Waits for every rank. One that is still there after `seconds` is killed, and counts as killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        self.kill()
        for process in self.processes:
            process.join()
        return Outcome([process.exitcode if process.exitcode is not None else -9 for process in self.processes], self.output.read_text(encoding="utf-8"))


def become_script(script: str, arguments: Sequence[str], environment: Mapping[str, str], folder: str, output: str) -> None:
    """Makes this process what `cd folder; environment python script arguments >>output 2>&1` would be."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of `multiprocessing` leaves without them


def start(script: Path, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, ranks: int = 1) -> Ranks:
    """Returns the running script; what it prints goes to a new file in `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_gpt", "forked"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    output = folder / f"output-{time.monotonic_ns()}.txt"
    output.touch()
    processes = []
    for rank in range(ranks):
        launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
        place = (str(script), list(arguments), {**environment, **launcher}, str(folder), str(output))
        processes.append(context.Process(target=become_script, args=place, daemon=True))
        with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS))}):  # for the server, at its start
            processes[-1].start()
    return Ranks(processes, output)
