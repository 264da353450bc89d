"""Sequence parallelism: one long row over several processes, for training, for prefill and for decoding.

- Attention by exchanging heads for tokens (DeepSpeed-Ulysses, arXiv:2309.14509): every process has all tokens of
  some heads while it attends, and all heads of some tokens otherwise. Packed rows are attended to one by one.
- Tiles and frames are encoded where `sequence_sharding_vila.py` puts them; each row then moves once, with its
  gradient, to the process that holds its token.
- While decoding, keys and values stay where prefill put them; each process attends to its own, and softmax sums are
  added up.
- Weights and gradients are left to DDP, FSDP or ZeRO, to which these are data-parallel processes like any others.

Why the layer between torch's collectives and transformers' attention interface is ours: DeepSpeed's
`UlyssesSPAttentionHF` takes no cache, refuses groups that do not go with the key heads (the release has 4 of them in
groups of 14), mixes packed rows under `sdpa`, and compiles an extension before it runs on a CPU; the loader that comes
with it refuses pixels.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .cache_vila import GrowingLayer
from .generation_vila import MEDIA_INPUTS
from .sequence_collectives_vila import (
    attend_to_shares,
    check_heads,
    exchange_rows,
    heads_for_tokens,
    key_repeats,
    new_groups,
    tokens_for_heads,
)
from .sequence_sharding_vila import BatchSharder, Shard, pad_packed

# names of registered attentions: every group attends in its own way
ATTENTIONS = (f"sequence_parallel_{number}" for number in itertools.count())
# seconds until a process that waits for another gives up
TIMEOUT = 600


class SequenceParallel:
    """Makes a model take one part of every row in each process of a group; `stop()` undoes it.

    Args:
        model: a `VilaForConditionalGeneration`, before it is wrapped (DDP, FSDP, PEFT). Changed in place.
        size: processes that share a row; by default all. Neighbours by rank form a group.
        group: the group itself, if it exists already: with tensor parallelism that of another mesh dimension.
        timeout: seconds after which waiting for a process of the group is an error; a `group` has its own.

    Attributes:
        sharder: cuts batches, see `BatchSharder`.

    Raises:
        ValueError: if the processes do not divide into groups, or the attention heads do not divide by one; for a
            language model whose attention does not reach all tokens before.
        RuntimeError: without `torch.distributed.init_process_group`; in any later call, if a process of the group has
            died or does not answer in time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        size: int | None = None,
        group: dist.ProcessGroup | None = None,
        timeout: float = TIMEOUT,
    ):
        check_attention(model.config.get_text_config())
        self.group = group if group is not None else new_groups(size, timeout)
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        heads = model.config.get_text_config().num_attention_heads
        check_heads(heads, self.size)
        self.sharder = BatchSharder(model.config, self.size, self.rank)
        self.model, self.language_model = model, model.model.language_model
        self._attention_before = self.language_model.config._attn_implementation
        attention = next(ATTENTIONS)
        AttentionInterface.register(attention, self.attend)
        self.language_model.set_attn_implementation(attention)
        self._forward = model.forward
        model.divides_prompt = True  # type: ignore[assignment]
        model.forward = functools.wraps(self._forward)(functools.partial(self.forward))

    def stop(self) -> None:
        """The model takes whole batches again."""
        del self.model.forward, self.model.divides_prompt
        self.language_model.set_attn_implementation(self._attention_before)

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(self, *args: Any, sequence_shard: Shard | None = None, **kwargs: Any) -> Any:
        """In place of the model's forward: the part of a batch that `sharder` made, or a step of `generate()`.

        With labels, the mean over the processes of the returned losses is the loss of the whole batch, and so is the
        mean of their gradients, as DDP and FSDP take it. Logits are those of the own part; in `generate()` all
        processes have those of the last token.
        """
        if args:
            kwargs["input_ids"], *rest = args
            if rest:
                raise ValueError("under sequence parallelism all arguments but input_ids go by name")
        if sequence_shard is not None:
            return self.forward_part(sequence_shard, kwargs)
        cache = kwargs.get("past_key_values")
        if cache is None:
            raise ValueError(
                "under sequence parallelism forward takes the part of a batch that SequenceParallel.sharder made, "
                "or a cache"
            )
        self.check_same_prompt(kwargs.get("input_ids"), cache.get_seq_length())
        return self.prefill(kwargs) if not cache.get_seq_length() else self._forward(**kwargs)

    def forward_part(self, shard: Shard, kwargs: dict[str, Any]) -> Any:
        """Encodes the own media, and runs the language model over the own ids."""
        self.check_same_batch(shard)
        if kwargs.get("labels") is not None and kwargs.get("num_items_in_batch") is None:
            kwargs["num_items_in_batch"] = torch.tensor(shard.num_labels / self.size)
        if any(shard.units):
            kwargs["mm_encoder_outputs"] = self.encode(shard, kwargs)
        for names in MEDIA_INPUTS.values():
            for name in names:
                kwargs.pop(name, None)
        kwargs["attention_mask"] = None
        return self._forward(**kwargs, sequence_rows=shard.row_lengths)

    def check_same_batch(self, shard: Shard) -> None:
        """Raises in all processes alike if they do not hold parts of the same batch."""
        own = torch.tensor([shard.fingerprint, shard.length, shard.rank], device=self.model.device)
        found = torch.stack(self.gather(own)).tolist()
        if len({(fingerprint, length) for fingerprint, length, _ in found}) > 1:
            raise ValueError(
                "the processes of a group hold different batches: all of them must read the same rows "
                "(SequenceParallelTrainer sees to that)"
            )
        if [rank for _, _, rank in found] != list(range(self.size)):
            raise ValueError("these parts of a batch were made for other processes: use SequenceParallel.sharder")

    def check_same_prompt(self, ids: torch.Tensor | None, cached: int) -> None:
        """Raises in all processes alike if they do not go on with the same ids behind equally long caches."""
        length, fingerprint = (0, 0) if ids is None else (ids.shape[1], zlib.crc32(ids.cpu().numpy().tobytes()))
        # as many numbers as `check_same_batch` sends: one process may prepare media that another does not have
        own = torch.tensor([fingerprint, length, cached], device=self.model.device)
        if any(not found.equal(own) for found in self.gather(own)):
            raise ValueError(
                "the processes of a group were given different prompts, or drew different tokens: generate() takes "
                "the same inputs in all of them, and sampling the same seed"
            )

    def gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own, group=self.group)
        return gathered

    # -------------------------------------------------------------------------------------------------------- media

    def encode(self, shard: Shard, pixels: dict[str, Any]) -> dict[str, BaseModelOutputWithPooling]:
        """The feature rows of the own ids: own units are encoded, and rows exchanged.

        Args:
            pixels: what `sharder` kept of pictures and videos.

        Returns:
            What the model takes as `mm_encoder_outputs`; every `pooler_output` holds one `(rows, hidden_size)`.
        """
        encoder = self.model.model
        dtype: Any = self.model.dtype
        parts: list[torch.Tensor] = []
        for modality, (values, grid) in MEDIA_INPUTS.items():
            if pixels.get(values) is not None:
                get_features = getattr(encoder, f"get_{modality}_features")
                own = pixels[values].to(self.model.device)
                parts += get_features(own, pixels.get(grid), return_dict=True).pooler_output
        if parts:
            encoded = torch.cat(parts).to(dtype)
        else:
            hidden_size = self.model.config.get_text_config().hidden_size
            encoded = torch.zeros(0, hidden_size, dtype=dtype, device=self.model.device)
            if self.must_run_tower():
                encoded = encoded + encoder._encode_zero_tile().to(dtype)
        rows = exchange_rows(encoded, shard, self.group).split(shard.placeholders[self.rank])
        totals = [sum(counts) for counts in zip(*shard.placeholders)]
        return {
            modality: BaseModelOutputWithPooling(pooler_output=[own_rows])  # type: ignore[arg-type]
            for modality, own_rows, total in zip(MEDIA_INPUTS, rows, totals)
            if total
        }

    def must_run_tower(self) -> bool:
        """Whether the other processes wait for the gradients of this one, even where it encodes nothing."""
        encoder = self.model.model
        weights = (*encoder.vision_tower.parameters(), *encoder.multi_modal_projector.parameters())
        is_trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        return is_trained or encoder._must_run_tower()

    def prepare(self, **inputs: Any) -> dict[str, Any]:
        """What the processor returns -> what `generate()` takes, with the frames encoded by all processes together.

        Without it, `generate()` gives the same answer, but every process encodes all frames. For the first question of
        a chat; media of later ones go to `generate()` as they are.

        Args:
            inputs: `input_ids`, `(1, sequence)`, and the tensors of its media; the same in all processes.

        Returns:
            The same without pixels, and `mm_encoder_outputs` with the rows of the own part.
        """
        media = {name: inputs.pop(name) for names in MEDIA_INPUTS.values() for name in names if name in inputs}
        if not media:
            return inputs
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, -100)
        whole = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(ids.shape[1]).unsqueeze(0)}
        part = self.sharder(pad_packed(whole, self.size, self.filler_id()) | media)
        self.check_same_batch(part["sequence_shard"])
        with torch.no_grad():
            return inputs | {"mm_encoder_outputs": self.encode(part["sequence_shard"], part)}

    # ---------------------------------------------------------------------------------------------------- inference

    def prefill(self, kwargs: dict[str, Any]) -> Any:
        """The whole prompt, the same in all processes -> logits of its last token in all of them."""
        ids, cache = kwargs["input_ids"], kwargs["past_key_values"]
        if ids is None or ids.shape[0] != 1:
            raise ValueError("under sequence parallelism generate() takes one prompt of input_ids, without beams")
        mask = kwargs.pop("attention_mask", None)
        if mask is not None and not (mask.ndim == 2 and mask.all()):
            raise ValueError("under sequence parallelism generate() takes a prompt without padding")
        length = ids.shape[1]
        per_process = math.ceil(length / self.size)
        padded = F.pad(ids, (0, per_process * self.size - length), value=self.filler_id())
        part = slice(self.rank * per_process, (self.rank + 1) * per_process)
        counts = [self.sharder.count_placeholders(run) for run in padded[0].split(per_process)]
        kwargs["mm_encoder_outputs"] = self.own_rows(kwargs.get("mm_encoder_outputs"), counts)
        kwargs["input_ids"] = padded[:, part]
        kwargs["position_ids"] = torch.arange(part.start, part.stop, device=ids.device).unsqueeze(0)
        share_cache(cache, length, self.rank, self.size)
        owner, last = divmod(length - 1, per_process)
        kwargs["logits_to_keep"] = torch.tensor([last], device=ids.device)
        output = self._forward(**kwargs, sequence_rows=(padded.shape[1],))
        output.logits = output.logits.contiguous()
        dist.broadcast(output.logits, dist.get_global_rank(self.group, owner), group=self.group)
        return output

    def own_rows(self, encoded: Any, counts: list[tuple[int, int]]) -> dict[str, BaseModelOutputWithPooling]:
        """Of features that `prepare` did not divide, those of the own part."""
        own: dict[str, BaseModelOutputWithPooling] = {}
        for index, modality in enumerate(MEDIA_INPUTS):
            if (encoded or {}).get(modality) is None:
                continue
            rows = torch.cat(list(encoded[modality].pooler_output))
            before, mine = sum(count[index] for count in counts[: self.rank]), counts[self.rank][index]
            if len(rows) == sum(count[index] for count in counts):
                rows = rows[before : before + mine]
            own[modality] = BaseModelOutputWithPooling(pooler_output=[rows])  # type: ignore[arg-type]
        return own

    def filler_id(self) -> int:
        """An id that stands for no medium."""
        taken = (self.model.config.image_token_id, self.model.config.video_token_id)
        return next(i for i in range(3) if i not in taken)

    # ---------------------------------------------------------------------------------------------------- attention

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sequence_rows: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Registered with transformers.

        Args:
            query: `(1, heads, tokens, channels)` of the own part, or of new tokens that all processes hold.
            key, value: `(1, key heads, keys, channels)`.
            sequence_rows: lengths of the packed rows, all processes' together; None for new tokens.

        Returns:
            `(1, tokens, heads, channels)` and None.
        """
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if sequence_rows is None:
            new_tokens = query.shape[2] if self.rank == self.size - 1 else 0
            return attend_to_shares(query, key, value, scale, new_tokens, self.group), None
        check_heads(query.shape[1], self.size)
        repeats = key_repeats(query.shape[1], key.shape[1], self.size)
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
        query, key, value = heads_for_tokens([query, key, value], self.group)
        groups = query.shape[1] // key.shape[1]
        rows = []
        for q, k, v in zip(*(states.split(list(sequence_rows), dim=2) for states in (query, key, value))):
            k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
            rows.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale))
        return tokens_for_heads(torch.cat(rows, dim=2), self.group).transpose(1, 2), None


def check_attention(text_config: Any) -> None:
    """Refuses sliding windows, of which `attend` knows nothing."""
    kinds = getattr(text_config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(text_config, "sliding_window", None) is None else "sliding_attention"]
    if others := sorted(set(kinds) - {"full_attention"}):
        raise ValueError(
            f"sequence parallelism takes language models with full attention in every layer, not {', '.join(others)}"
        )


class SharedLayer(GrowingLayer):
    """The keys and values of one process: its part of the prompt, and in the last process all that comes behind.

    Args:
        prompt: tokens of the whole prompt.
        rank, size: of the process in its group.
    """

    def __init__(self, prompt: int, rank: int, size: int):
        super().__init__()
        self.prompt, self.is_last = prompt, rank == size - 1
        per_process = math.ceil(prompt / size)
        # what is behind the prompt only fills up the last parts
        self.share = min(max(prompt - rank * per_process, 0), per_process)
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DynamicLayer.update`; prefill gets its own states back, new tokens all that this process keeps."""
        if not self.length:
            self.length = self.prompt
            super().update(key_states[:, :, : self.share], value_states[:, :, : self.share])
            return key_states, value_states
        self.length += key_states.shape[-2]
        kept = slice(None) if self.is_last else slice(0)
        return super().update(key_states[:, :, kept], value_states[:, :, kept])

    def get_seq_length(self) -> int:
        """Tokens of all processes."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back tokens behind the prompt."""
        if self.length + tokens_to_remove < self.prompt:
            raise ValueError("a cache over several processes cannot be cropped into its prompt")
        self.length += tokens_to_remove
        if self.is_last:
            super().crop(tokens_to_remove)


def share_cache(cache: Any, prompt: int, rank: int, size: int) -> None:
    """Replaces the layers of an empty `DynamicCache` by those that keep the share of one process."""
    if type(cache) is not DynamicCache or cache.offloading:
        raise ValueError("under sequence parallelism generate() takes transformers' plain DynamicCache")
    if any(not isinstance(layer, DynamicLayer) or layer.is_sliding for layer in cache.layers):
        raise ValueError("sequence parallelism takes language models with full attention in every layer")
    cache.layers = [SharedLayer(prompt, rank, size) for _ in cache.layers]
    if not cache.layers:
        layer: Any = functools.partial(SharedLayer, prompt, rank, size)
        cache.layer_class_to_replicate = layer


__all__ = ["SequenceParallel"]
