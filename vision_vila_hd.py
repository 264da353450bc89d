"""From PS3's tokens to the language model: the projector of kept cells, the prompt head and the selection loss.

Shape letters: B pictures, D encoder channels, H channels of the language model, R patches per side of a merged cell.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_vila_hd import VilaHDConfig
from .selection_ps3 import resize_map
from .vision_ps3 import Ps3Mlp
from .vision_vila import VilaMultiModalProjector


class VilaHDProjector(VilaMultiModalProjector):
    """VILA's projector, with positions for cells of every scale and the head that makes the encoder's prompt."""

    def __init__(self, config: VilaHDConfig):
        super().__init__(config)
        vision, hidden = config.vision_config, config.text_config.hidden_size
        self.factor = config.downsample_factor
        self.low_side = vision.image_size // vision.patch_size
        if config.top_down_prompt_head_type == "linear":
            self.top_down_prompt_head: nn.Module = nn.Linear(hidden, vision.hidden_size)
        elif config.top_down_prompt_head_type == "mlp":
            size = vision.hidden_size
            self.top_down_prompt_head = Ps3Mlp(hidden, 2 * size, size, norm_eps=1e-5)
        self.has_positions = config.high_res_pos_embed
        if self.has_positions:
            self.high_res_pos_embed = nn.Parameter(torch.zeros(1, self.low_side**2, hidden))
            self.high_res_scale_embed = nn.ParameterList(torch.zeros(1, 1, hidden) for _ in vision.ps3_scales)

    def forward(self, features_BLD: torch.Tensor) -> torch.Tensor:
        """The low-resolution view: `(B, low_side**2, D) -> (B, cells, H)`."""
        projected = super().forward(features_BLD)
        if not self.has_positions:
            return projected
        side = -(-self.low_side // self.factor)
        return projected + self._positions(side, side, 0)

    def project_chosen(self, tokens: torch.Tensor, maps: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """Chosen patches of one picture: only cells of which all patches were chosen are kept.

        Args:
            tokens: `(patches, D)`, sorted by scale, then row by row.
            maps: `(h, w)` of each high-resolution scale, 1 where a patch was chosen.

        Returns:
            `(kept cells, H)`, sorted likewise, and how many are of each scale.
        """
        cells: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        start = 0
        for number, chosen in enumerate(maps):
            height, width = (-(-side // self.factor) for side in chosen.shape)
            is_kept = resize_map(chosen.unsqueeze(0), (height, width), "area").flatten() == 1
            cells.append(self._cell_members(chosen, start, len(tokens))[is_kept])
            # counted, not summed: sums in half precision are rounded
            start += int((chosen > 0).sum())
            if self.has_positions:
                positions.append(self._positions(height, width, number + 1)[0, is_kept])
        # what is not chosen, or beyond the map's edge, counts as zeros
        padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
        merged = padded[torch.cat(cells)].flatten(1)
        projected = self.layers[1:](merged) if self.factor > 1 else self.layers(merged)  # type: ignore[index]
        if self.has_positions:
            projected = projected + torch.cat(positions)
        return projected, [len(own) for own in cells]

    def _cell_members(self, chosen: torch.Tensor, start: int, nothing: int) -> torch.Tensor:
        """`(cells, R * R)`: which token every patch of every cell is; `nothing` for a patch that is none."""
        is_chosen = chosen.flatten() > 0
        numbers = torch.where(is_chosen, is_chosen.cumsum(0) - 1 + start, nothing).view(chosen.shape)
        below, right = (-side % self.factor for side in chosen.shape)
        numbers = F.pad(numbers, (0, right, 0, below), value=nothing)
        blocks = numbers.unflatten(1, (-1, self.factor)).unflatten(0, (-1, self.factor))
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1)

    def _positions(self, height: int, width: int, scale: int) -> torch.Tensor:
        """Positions of a grid of cells and the mark of their scale, `(1, height * width, H)`."""
        table = self.high_res_pos_embed.unflatten(1, (self.low_side, self.low_side)).permute(0, 3, 1, 2)
        resized = F.interpolate(table.float(), size=(height, width), mode="area").to(table.dtype)
        return resized.flatten(2).transpose(1, 2) + self.high_res_scale_embed[scale]


def check_selection_maps(maps: torch.Tensor, pictures: int) -> None:
    """Raises: ValueError: if there is not one map for every picture."""
    if maps.ndim != 3 or len(maps) != pictures or not maps.numel():
        raise ValueError(
            f"gt_selection_maps must be ({pictures}, height, width), a map for every picture, got {tuple(maps.shape)}"
        )


def selection_loss(probs: list[torch.Tensor], gt_selection_maps: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy and dice loss of where the model would look, the mean over scales (VILA-HD training).

    Args:
        probs: for each high-resolution scale `(B, h, w)`.
        gt_selection_maps: `(B, height, width)`, above 0 where it should look; a picture whose map has a sum of 0 or
            less has no target.

    Returns:
        Scalar in float32; 0 if no picture has a target.
    """
    has_target = gt_selection_maps.flatten(1).float().sum(1) > 0
    if not has_target.any():
        return probs[0].float().sum() * 0
    losses = []
    for scale in probs:
        chance = scale[has_target].float().flatten(1)
        target = (resize_map(gt_selection_maps[has_target].float(), scale.shape[1:], "area") > 0).float().flatten(1)
        entropy = F.binary_cross_entropy(chance, target)
        # divided by 100, sums over large maps stay small in half precision, for which this was written
        overlap = (chance / 100 * target).sum(1)
        dice = 1 - (2 * overlap + 1e-6) / ((chance / 100).sum(1) + (target / 100).sum(1) + 1e-6)
        losses.append(entropy + dice.mean())
    return torch.stack(losses).mean()
