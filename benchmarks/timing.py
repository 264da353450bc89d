"""What several benchmarks measure with."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resident(name: str, process: int | str = "self") -> float:
    """`VmRSS` or `VmHWM` of a process in MiB; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0) / 1024
