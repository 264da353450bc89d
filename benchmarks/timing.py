"""What several benchmarks measure with."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, new_tokens: int, **inputs: Any) -> list[float]:
    """Seconds from token to token, of greedy generation that does not end before."""
    clock = Clock()
    model.generate(
        **inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, streamer=clock, pad_token_id=0
    )
    return [after - before for before, after in zip(clock.times[1:], clock.times[2:])]


class Watch:
    """What `seconds_of` reads: the wall, or where other jobs share the core the processor time of the one thread."""

    read = staticmethod(time.perf_counter)

    @classmethod
    def count_processor_time(cls) -> None:
        """From now on.

        Raises:
            ValueError: if torch has several threads, whose times would be added.
        """
        if torch.get_num_threads() != 1:
            raise ValueError("processor time needs OMP_NUM_THREADS=1")
        cls.read = staticmethod(time.process_time)


def seconds_of(work: Callable[[], Any]) -> float:
    start = Watch.read()
    work()
    return Watch.read() - start


def resident(name: str, process: int | str = "self") -> float:
    """`VmRSS` or `VmHWM` of a process in MiB; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0) / 1024


def limits(device: str = "cpu") -> tuple[float, float]:
    """bfloat16 FLOP/s of a large matrix product, and bytes/s: of reading a large array on a CPU, of copying on a GPU.

    The best of several.
    """
    side = 2048 if device == "cpu" else 8192
    a, data = torch.randn(side, side, dtype=torch.bfloat16, device=device), torch.ones(2**28, device=device)
    other = torch.empty_like(data if device != "cpu" else data[:1])

    def move() -> None:
        data.sum() if device == "cpu" else other.copy_(data)
        wait(device)

    def multiply() -> None:
        a @ a
        wait(device)

    moved = data.nbytes * (1 if device == "cpu" else 2)
    return max(2 * side**3 / seconds_of(multiply) for _ in range(8)), max(moved / seconds_of(move) for _ in range(8))


def wait(device: str) -> None:
    """Until a GPU, which only takes orders, has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(works: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, over and over; every other round backwards."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats):
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(works[name]())
    return seconds
