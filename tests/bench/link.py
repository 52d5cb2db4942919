"""What GRADIENT_BUCKETS hides of a slow link between ranks, on one machine: a simulated link, on which transfers take turns and last bytes / bandwidth.

    python tests/bench/link.py --megabytes 117    gigabit Ethernet; the last phase of PRESET=demo, compiled

The processor is free while a transfer lasts. Buckets take turns, with the link and without.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import step
import torch
from torch import Tensor

import train_gpt


class Late:
    """Stands in for the work of a collective: is done at a given time."""

    def __init__(self, done: float) -> None:
        self.done = done

    def wait(self) -> None:
        time.sleep(max(self.done - time.perf_counter(), 0.0))


class SlowWorld(train_gpt.World):
    """One rank whose sums over ranks take as long as a link of `bandwidth` bytes a second would; 0 = no time."""

    bandwidth = 0.0
    free = 0.0  # when the link has done all that was given to it

    def late(self, tensor: Tensor) -> train_gpt.Transfer:
        """Returns the transfer of `tensor`, after those before it."""
        if not self.bandwidth:
            return train_gpt.Transfer(tensor, None)
        self.free = max(self.free, time.perf_counter()) + tensor.numel() * tensor.element_size() / self.bandwidth
        work: Any = Late(self.free)
        return train_gpt.Transfer(tensor, work)

    def start_sum(self, tensor: Tensor) -> train_gpt.Transfer:
        return self.late(tensor)

    def start_scatter_sum(self, stacked: Tensor) -> train_gpt.Transfer:
        return self.late(stacked)


def main() -> None:
    """Prints milliseconds a step for every number of buckets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=117, help="of the link, a second")
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arms = {}
    for buckets in options.buckets:
        config, world = train_gpt.parse_config(["PRESET=demo", "COMPILE=1", f"GRADIENT_BUCKETS={buckets}"], {}), SlowWorld("cpu")
        run = step.our_step(config, train_gpt.Schedule(config).phases()[-1], train_gpt.choose_fast_forms(config, world)[0], world)
        for _ in range(6):
            run()
        arms[buckets] = run, world
    seconds: dict[tuple[int, float], list[float]] = {(buckets, rate): [] for buckets in arms for rate in (1e6 * options.megabytes, 0.0)}
    for _ in range(options.steps):
        for (buckets, rate), times in seconds.items():
            run, world = arms[buckets]
            world.bandwidth, began = rate, time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    for (buckets, rate), times in seconds.items():
        low, middle, high = (1000 * quartile for quartile in statistics.quantiles(times, n=4))
        print(f"{buckets} buckets, {f'{rate / 1e6:g} MB/s' if rate else 'no link':<12} {middle:7.1f} ms ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
