"""Training of what draws: the model's own loss, and linear heads that say what the next patch of a picture shows.

Most of the loss of codes is how exactly a patch looks. Which of the things that were asked for it belongs to is 9 of
its 290 nats per picture; from these alone the model learned late not to mix up the things. The heads are thrown away.
"""

from collections.abc import Sequence
from typing import Any

import torch
from codes_training import KINDS
from drawn_scenes import label_patches
from running import Trainee, weighed_loss
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from vila.training_vila_u import VilaUDataCollator

NAMING_WEIGHT = 0.5


class DrawingCollator:
    """Rows of `DrawnScenes` -> a batch of `VilaUDataCollator` and `patch_labels`, `(pictures that are drawn, 2,
    patches)`."""

    def __init__(self, processor: Any, patch: int, caption_dropout: float):
        self.collator = VilaUDataCollator(processor, caption_dropout=caption_dropout)
        self.patch = patch

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator([{"messages": row["messages"]} for row in rows])
        labels = [torch.from_numpy(label_patches(row["scene"], self.patch)) for row in rows if "scene" in row]
        patches = (batch["pixel_values"].shape[-1] // self.patch) ** 2
        batch["patch_labels"] = torch.stack(labels) if labels else torch.zeros(0, 2, patches, dtype=torch.long)
        return batch


class DrawingTraining(Trainee):
    """Answers and codes, and names of patches."""

    def __init__(self, model: Any):
        super().__init__(model)
        config = model.config.text_config
        self.states = (-(-config.num_hidden_layers // 2), -1)  # halfway, and the last
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, sum(KINDS)))
            for _ in self.states
        )

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, patch_labels: torch.Tensor, **inputs: Any) -> Any:
        """Args: patch_labels: `(pictures that are drawn, 2, patches)`, see `label_patches`."""
        # the fused kernel's backward pass is slower than plain products of so short rows
        with sdpa_kernel(SDPBackend.MATH):
            output = self.model(input_ids=input_ids, labels=labels, output_hidden_states=True, **inputs)
        is_target = (labels == self.model.config.image_token_id)[:, 1:]
        wanted = patch_labels.transpose(1, 2).flatten(0, 1)
        naming = output.loss.new_zeros(())
        if len(wanted):
            states = [output.hidden_states[at][:, :-1][is_target] for at in self.states]
            naming = sum((naming_loss(head(own), wanted) for head, own in zip(self.heads, states)), naming)
        losses = {"text": output.text_loss, "image": output.image_loss, "naming": naming}
        self.parts = {name: loss.item() for name, loss in losses.items()}
        return {"loss": output.loss + NAMING_WEIGHT * naming}


def naming_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Losses of the shapes and of the colours, `(positions, classes)` and `(positions, 2)`."""
    each = [weighed_loss(own, numbers) for own, numbers in zip(logits.split(KINDS, dim=-1), wanted.unbind(-1))]
    return torch.stack(each).sum()
