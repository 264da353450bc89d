"""Muon for the matrices of layers, AdamW for everything else.

Muon (K. Jordan et al., 2024; J. Liu et al., "Muon is Scalable for LLM Training", 2025) makes every update a matrix of
equal singular values. Here it needs about half the samples that AdamW needs.
"""

from typing import Any

import torch
from torch import nn

MATRICES = (".encoder.layers.", ".language_model.layers.", ".depth_transformer.layers.")


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer to schedulers and checkpoints, two inside.

    Args:
        model: its parameters that need gradients are trained.
        lr: of both; Muon's updates are scaled to the size of AdamW's.
        matrix_names: parts of the names of Muon's matrices.
    """

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float, beta2: float, matrix_names: tuple[str, ...] = MATRICES
    ):
        named = [(f".{name}", weight) for name, weight in model.named_parameters() if weight.requires_grad]
        matrices = [weight for name, weight in named if is_matrix_of_layer(name, weight, matrix_names)]
        others = [weight for name, weight in named if not is_matrix_of_layer(name, weight, matrix_names)]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        if others:
            adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
            self.parts.append(adamw)
        super().__init__([{"params": matrices + others}], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """What a scheduler changes are the parts' own groups."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"]):
            part.load_state_dict(state)
        self._share_groups()


def is_matrix_of_layer(name: str, weight: torch.Tensor, matrix_names: tuple[str, ...] = MATRICES) -> bool:
    return weight.ndim == 2 and any(part in name for part in matrix_names)
