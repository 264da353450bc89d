"""`Trainer` for processes that share rows: which rows they read, and the part of each that they take."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer
from transformers.utils import logging

from .sequence_parallel_vila import SequenceParallel
from .sequence_sharding_vila import BatchSharder, pad_packed
from .training_vila import VilaDataCollator

logger = logging.get_logger(__name__)


class ShardingCollator:
    """`VilaDataCollator` for processes that share their rows: the part of this process of every batch.

    Args:
        collator: packs; `VilaDataCollator(processor, packing=True)`.
        sharder: `SequenceParallel.sharder`.

    Raises:
        ValueError: if the collator does not pack.
    """

    def __init__(self, collator: VilaDataCollator, sharder: BatchSharder):
        if not collator.packing:
            raise ValueError("sequence parallelism takes packed rows: VilaDataCollator(processor, packing=True)")
        self.collator, self.sharder = collator, sharder

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Rows of a batch, the same in all processes of the group -> see `BatchSharder`."""
        pad_token_id = self.collator.processor.tokenizer.pad_token_id
        return self.sharder(pad_packed(self.collator(rows), self.sharder.size, pad_token_id))


class RepeatingSampler(Sampler[int]):
    """Every batch of another sampler `times` times in succession.

    accelerate deals out batches in turn: of each turn, process `r` gets the one with number `r`. Neighbours by rank,
    which form a group, so get the same.
    """

    def __init__(self, sampler: Any, batch_size: int, times: int):
        self.sampler, self.batch_size, self.times = sampler, batch_size, times

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """A batch that is not full is left out: its repetitions would make the others slip to other processes."""
        return len(self.sampler) // self.batch_size * self.batch_size * self.times

    def __iter__(self) -> Iterator[int]:
        batch: list[int] = []
        for index in self.sampler:
            batch.append(index)
            if len(batch) == self.batch_size:
                for _ in range(self.times):
                    yield from batch
                batch = []


class SequenceParallelTrainer(Trainer):
    """`transformers.Trainer` with every row divided over a group of processes.

    `per_device_train_batch_size` is what a group packs into one row. The number of groups is what is otherwise the
    number of processes: of the global batch, and of the steps of an epoch. DDP and FSDP work as without it.

    Args:
        model, args, kwargs: as of `Trainer`.
        sequence_parallel: made of the same model, before this.
        data_collator: a `VilaDataCollator` that packs; the part of each process is cut from its batches.

    Raises:
        ValueError: for another collator, data without a length, or an order of rows by their lengths.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        sequence_parallel: SequenceParallel,
        data_collator: VilaDataCollator,
        **kwargs: Any,
    ):
        self.sequence_parallel = sequence_parallel
        sharding: Any = ShardingCollator(data_collator, sequence_parallel.sharder)
        super().__init__(model, args, sharding, **kwargs)
        if not self.args.average_tokens_across_devices:
            raise ValueError("sequence parallelism needs average_tokens_across_devices: processes have unequal labels")
        if self.args.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"sequence parallelism takes rows in random or sequential order, not by "
                f"train_sampling_strategy={self.args.train_sampling_strategy!r}: they are packed, not padded"
            )
        # logits are those of a part of the tokens
        self.args.prediction_loss_only = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        from accelerate.data_loader import SeedableRandomSampler

        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "sequential":
            return self._repeat(SequentialSampler(check_length(dataset)), self._train_batch_size)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # the order must be the same in all processes, whatever else they have drawn
        sampler = SeedableRandomSampler(check_length(dataset), data_seed=seed)
        return self._repeat(sampler, self._train_batch_size)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return self._repeat(SequentialSampler(check_length(eval_dataset)), self.args.eval_batch_size)

    def _repeat(self, sampler: Any, batch_size: int) -> RepeatingSampler:
        if len(sampler) < batch_size:
            raise ValueError(f"{len(sampler)} rows do not fill a batch of {batch_size}")
        if left_out := len(sampler) % batch_size:
            logger.warning("The last %d rows of an epoch do not fill a batch and are left out.", left_out)
        return RepeatingSampler(sampler, batch_size, self.sequence_parallel.size)


def check_length(dataset: Any) -> Any:
    if not hasattr(dataset, "__len__"):
        raise ValueError("SequenceParallelTrainer takes datasets with a length, not streams")
    return dataset


__all__ = ["RepeatingSampler", "SequenceParallelTrainer", "ShardingCollator"]
