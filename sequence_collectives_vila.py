"""What sequence parallelism sends between processes: feature rows, heads for tokens, and softmax sums.

Shapes have one row, as packed batches have: `(1, heads, tokens, channels)`.
"""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .sequence_sharding_vila import Shard

# queries whose scores are held at a time while decoding
QUERIES_AT_A_TIME = 16


def new_groups(size: int | None, timeout: float) -> dist.ProcessGroup:
    """The group of this process; all processes must call it."""
    if not dist.is_initialized():
        raise RuntimeError("sequence parallelism needs torch.distributed.init_process_group, or torchrun with Trainer")
    world = dist.get_world_size()
    size = world if size is None else size
    if size < 1 or world % size:
        raise ValueError(f"{world} processes do not divide into groups of {size}")
    limit = timedelta(seconds=timeout)
    groups = [dist.new_group(list(range(start, start + size)), timeout=limit) for start in range(0, world, size)]
    return groups[dist.get_rank() // size]


def check_heads(heads: int, size: int) -> None:
    if heads % size:
        raise ValueError(f"{heads} attention heads do not divide by a group of {size} processes")


def key_repeats(heads: int, key_heads: int, size: int) -> int:
    """How often every key head must be there so that each process gets equally many, beside their query heads."""
    repeats = math.lcm(key_heads, size) // key_heads
    return repeats if heads % (key_heads * repeats) == 0 else heads // key_heads


class AllToAll(torch.autograd.Function):
    """`torch.distributed.all_to_all_single` along the first dimension; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
        """
        Args:
            rows: those for the first process of the group before those for the second, and so on.
            sent, received: how many for, and from, every process.
        """
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return AllToAll.apply(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def exchange_rows(encoded: torch.Tensor, shard: Shard, group: dist.ProcessGroup) -> torch.Tensor:
    """Feature rows from where they were encoded to where their tokens are.

    Args:
        encoded: `(rows, hidden_size)` in the order of `shard.encoded_rows`.

    Returns:
        `(needed rows, hidden_size)`, those of pictures before those of videos; differentiable.
    """
    own, needed = shard.encoded_rows(shard.rank), [shard.needed_rows(rank) for rank in range(shard.size)]
    sent = [pick(own, ranges) for ranges in needed]
    received = []
    for rank in range(shard.size):
        rows = shard.encoded_rows(rank)
        received.append(rows[pick(rows, needed[shard.rank])])
    outgoing = encoded[torch.cat(sent).to(encoded.device)]
    incoming = AllToAll.apply(outgoing, list(map(len, sent)), list(map(len, received)), group)
    return incoming[torch.cat(received).argsort().to(encoded.device)]


def pick(rows: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Where in `rows` the indices lie that fall into one of the ranges."""
    inside = torch.zeros_like(rows, dtype=torch.bool)
    for start, end in ranges:
        inside |= (rows >= start) & (rows < end)
    return inside.nonzero().flatten()


def heads_for_tokens(states: list[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Each `(1, heads, own tokens, channels) -> (1, own heads, tokens, channels)`, all in one exchange."""
    size = dist.get_world_size(group)
    tokens, channels = states[0].shape[2:]
    heads = [part.shape[1] // size for part in states]
    mixed = torch.cat([part[0].unflatten(0, (size, -1)) for part in states], dim=1)
    received = AllToAll.apply(mixed, [1] * size, [1] * size, group)
    received = received.transpose(0, 1).reshape(1, sum(heads), size * tokens, channels)
    return list(received.split(heads, dim=1))


def tokens_for_heads(states: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`(1, own heads, tokens, channels) -> (1, heads, own tokens, channels)`."""
    size = dist.get_world_size(group)
    parts = states[0].unflatten(1, (size, -1)).transpose(0, 1)
    return AllToAll.apply(parts, [1] * size, [1] * size, group).flatten(0, 1).unsqueeze(0)


def attend_to_shares(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    new_tokens: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """New tokens over keys and values of which every process holds a share.

    Args:
        query: `(1, heads, tokens, channels)`, the same in all processes.
        key, value: `(1, key heads, own keys, channels)`.
        new_tokens: how many keys at the end are those of the queries, of which each sees those up to itself.

    Returns:
        `(1, tokens, heads, channels)`.
    """
    heads, _, channels = query.shape[1:]
    key, value, key_heads = key[0], value[0], key.shape[1]
    sums, largest = list[torch.Tensor](), list[torch.Tensor]()
    seen = key.shape[1] - new_tokens
    # the heads that share a key head are rows of one product
    for some in query[0].unflatten(0, (key_heads, -1)).split(QUERIES_AT_A_TIME, dim=2):
        start, count = sum(part.shape[1] for part in sums), some.shape[2]
        scores = (some.flatten(1, 2) @ key.transpose(1, 2)).float().unflatten(1, (-1, count)) * scale
        if new_tokens:
            positions = torch.arange(start, start + count, device=query.device).unsqueeze(1)
            future = torch.arange(key.shape[1], device=query.device) - seen > positions
            scores = scores.masked_fill(future, -torch.inf)
        scores = scores.flatten(0, 1)
        lowest = scores.new_full((heads, count, 1), torch.finfo(torch.float32).min)
        highest = torch.cat([scores, lowest], dim=-1).amax(-1, keepdim=True)
        weights = (scores - highest).exp()
        weighted = weights.to(value.dtype).unflatten(0, (key_heads, -1)).flatten(1, 2) @ value
        sums.append(torch.cat([weighted.float().reshape(heads, count, -1), weights.sum(-1, keepdim=True)], dim=-1))
        largest.append(highest)
    total, own_highest = torch.cat(sums, dim=1), torch.cat(largest, dim=1)
    highest = own_highest.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    total = total * (own_highest - highest).exp()
    dist.all_reduce(total, group=group)
    attended = total[..., :channels] / total[..., channels:]
    return attended.to(query.dtype).transpose(0, 1).unsqueeze(0)
