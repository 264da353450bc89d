"""Numbers of the rows of an endless, seeded dataset."""

from collections.abc import Iterator
from itertools import count

from torch.utils.data import get_worker_info


def row_numbers(start: int) -> Iterator[int]:
    """From `start` on; each data worker has its own share of them."""
    worker = get_worker_info()
    return count(start + worker.id, worker.num_workers) if worker else count(start)
