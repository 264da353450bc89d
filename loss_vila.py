"""Next-token loss in which time tokens are soft targets: a neighbouring time is nearly right."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def soft_time_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    time_token_ids: Sequence[int],
    std: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    r"""Cross entropy with a Gaussian over the time tokens as the target wherever the label is one of them.

    The weight of time token `t` where `y` is the label is proportional to `exp(-(t - y)**2 / (2 * std**2))`. All
    other labels have ordinary cross entropy. This is how VILA is trained where it has time tokens.

    Args:
        logits: `(..., sequence, vocab_size)`.
        labels: `(..., sequence)`; position i is predicted by the logits of position i - 1.
        time_token_ids: ids in the order of the times they stand for, usually consecutive.
        std: width of the Gaussian, in ids.
        num_items_in_batch: what the sum is divided by, if not by the number of kept labels; `Trainer` passes the
            number over all steps that it accumulates.
        shift_labels: labels that are already aligned with the logits; then `labels` are not read.
        kwargs: what other losses take; ignored, as transformers' own losses do.

    Returns:
        Scalar in float32.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.flatten().to(logits.device)
    scores = logits.float().flatten(0, -2)
    times = torch.as_tensor(time_token_ids, device=targets.device)
    is_time = torch.isin(targets, times)

    hard = F.cross_entropy(
        scores, targets.masked_fill(is_time, ignore_index), ignore_index=ignore_index, reduction="sum"
    )
    distance = (times - targets[is_time].unsqueeze(-1)).float()
    weights = torch.softmax(-(distance**2) / (2 * std**2), dim=-1)
    soft = -(weights * scores[is_time].log_softmax(-1)[:, times]).sum()

    items: Any = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return (hard + soft) / (items.to(logits.device) if torch.is_tensor(items) else items)
