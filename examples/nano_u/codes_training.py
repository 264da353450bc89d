"""Pre-training of what is between pixels and codes: tower, codebooks and pixel decoder of vila-u-nano.

- Codebooks follow the mean of what they stand for (VQ-VAE, appendix A.1); a code that nothing is near to is moved to
  a residual of the batch. At first nothing is quantised, so that there are features to begin with.
- Of some pictures only the first codes of every position are decoded: each depth makes the picture better.
- At the end features are moved and scaled to mean 0 and deviation 1: codes and pixels stay what they are, and what
  reads the features next learns them far sooner, and still tells them apart in bfloat16.
- A linear head names the shape and the colour of every patch from the quantised features, in place of the contrastive
  loss on captions that the family has there (VILA-U §3.1).
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from drawn_scenes import SIDE, around, draw_picture, draw_scene, label_patches
from streams import row_numbers
from torch import nn
from torch.utils.data import IterableDataset
from vocabulary import COLOURS, SHAPES, Split

DECAY, REVIVED_BELOW = 0.98, 0.05  # of the running counts, in rows per batch
COMMITMENT, LABELS_WEIGHT, THINGS_WEIGHT = 0.25, 0.05, 4.0
PARTIAL = 0.3  # share of batches of which only some depths are decoded
WARM_UP = 300  # batches before anything is quantised
KINDS = (len(SHAPES) + 1, len(COLOURS) + 1)


class LabelledScenes(IterableDataset):
    """Endless pictures with what every patch shows; row number n is the same wherever one starts."""

    def __init__(self, patch: int, seed: int = 0, start: int = 0, split: Split = "train"):
        self.patch, self.seed, self.start, self.split = patch, seed, start, split

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in row_numbers(self.start):
            yield self.row(random.Random(f"codes/{self.split}/{self.seed}/{number}"))

    def row(self, rng: random.Random) -> dict[str, torch.Tensor]:
        """`pixel_values`, `(3, SIDE, SIDE)` in -1 to 1, `things`, `(SIDE, SIDE)`, and `labels`, `(2, patches)`."""
        scene = draw_scene(rng, self.split)
        pixels = np.asarray(draw_picture(rng, scene)).transpose(2, 0, 1).astype(np.float32)
        things = np.zeros((SIDE, SIDE), np.float32)
        for thing in scene.things:
            things[around(np.arange(SIDE) + 0.5, thing)] = 1
        return {
            "pixel_values": torch.from_numpy(pixels / 127.5 - 1),
            "things": torch.from_numpy(things),
            "labels": torch.from_numpy(label_patches(scene, self.patch)),
        }


class CodesTraining(nn.Module):
    """Trains the parts of a `VilaUModel` in place.

    Args:
        model: its quantiser has a codebook per depth.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vision_tower, self.quantizer, self.pixel_decoder = (
            model.vision_tower, model.quantizer, model.pixel_decoder,
        )  # fmt: skip
        self.pixel_decoder.requires_grad_(True)
        self.grid = model.config.code_grid
        size, channels = model.config.codebook_size, model.config.vision_config.hidden_size
        self.head = nn.Linear(channels, sum(KINDS))
        self.register_buffer("counts", torch.zeros(self.quantizer.depth, size))
        self.register_buffer("sums", torch.zeros(self.quantizer.depth, size, channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(N, positions, channels)`, as the model sees them."""
        return self.vision_tower(pixel_values=pixel_values).last_hidden_state

    def forward(
        self, pixel_values: torch.Tensor, things: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        features = self.encode(pixel_values)
        loss = features.new_zeros((), dtype=torch.float32)
        quantised = features
        if self.batches >= WARM_UP or not self.training:
            codes = self.quantizer(features)[1]
            if self.training:
                self._follow(features.detach().float().flatten(0, 1), codes.flatten(0, 1))
            embedded = self.quantizer.embed(codes).float()
            depth = self.quantizer.depth
            if self.training and torch.rand(()) < PARTIAL:
                depth = int(torch.randint(1, depth, ()))
            chosen = embedded[..., :depth, :].sum(-2)
            loss = loss + COMMITMENT * F.mse_loss(features.float(), embedded.sum(-2))
            quantised = features + (chosen - features).detach()
        if self.training:
            self.batches += 1
        pixels = self.pixel_decoder(quantised.unflatten(1, self.grid))
        weights = 1 + (THINGS_WEIGHT - 1) * things.unsqueeze(1)
        difference = (pixels.float() - pixel_values).abs()
        reconstruction = (weights * (difference + difference.square())).mean()
        named = self.head(quantised).float().split(KINDS, dim=-1)
        naming = sum(F.cross_entropy(own.flatten(0, 1), labels[:, kind].flatten()) for kind, own in enumerate(named))
        return {"loss": loss + reconstruction + LABELS_WEIGHT * naming, "reconstruction": reconstruction.detach()}

    @torch.no_grad()
    def _follow(self, features: torch.Tensor, codes: torch.Tensor) -> None:
        """Moves the codebooks towards the means of the residuals that chose their codes."""
        residual = features
        for depth in range(self.quantizer.depth):
            table: Any = self.quantizer.codebooks[depth].weight
            if self.batches == WARM_UP:  # codes to begin with: residuals of this batch
                table[:-1] = residual[torch.randint(len(residual), (len(table) - 1,))]
                self.counts[depth], self.sums[depth] = 1, table[:-1]
            own = self.quantizer.codebooks[depth](features=residual)
            size = self.counts.shape[1]
            count = torch.bincount(own, minlength=size).float()
            total = torch.zeros(size, residual.shape[1]).index_add_(0, own, residual)
            self.counts[depth].lerp_(count, 1 - DECAY)
            self.sums[depth].lerp_(total, 1 - DECAY)
            dead = self.counts[depth] < REVIVED_BELOW
            fresh = residual[torch.randint(len(residual), (int(dead.sum()),))]
            self.sums[depth][dead], self.counts[depth][dead] = fresh, 1.0
            table[:-1] = self.sums[depth] / self.counts[depth].clamp(min=1e-6).unsqueeze(1)
            residual = residual - table[own]


@torch.no_grad()
def normalise(model: Any, pixel_values: torch.Tensor) -> None:
    """Gives the features of some pictures mean 0, per channel, and deviation 1, in place; codes and pixels stay.

    Blocks of the tower normalise what they read, so that everything that is added to their residual stream can be
    scaled; what is moved is made up for where the pixel decoder begins.

    Args:
        model: `VilaUModel` whose quantiser has a codebook per depth.
    """
    features = model.vision_tower(pixel_values=pixel_values).last_hidden_state
    mean = features.mean((0, 1))
    scale = (features - mean).square().mean().sqrt()
    added = [
        part
        for name, module in model.vision_tower.named_modules()
        if name.endswith(("patch_embedding", "position_embedding", "out_proj", "fc2"))
        for part in module.parameters()
    ]
    for part in added:
        part.div_(scale)
    last: Any = [module for name, module in model.vision_tower.named_modules() if name.endswith("fc2")][-1]
    last.bias.sub_(mean / scale)
    for depth, codebook in enumerate(model.quantizer.codebooks):
        codebook.weight[:-1].sub_(0 if depth else mean).div_(scale)
    first = model.pixel_decoder.post_quant_conv
    first.bias.add_(first.weight.flatten(1) @ mean)
    first.weight.mul_(scale)


@torch.no_grad()
def quality(model: Any, pictures: int = 128, split: Split = "validation") -> dict[str, float]:
    """PSNR in dB on the pixels of things: of the mean picture, and of reconstructions by the depth that is decoded."""
    rows = iter(LabelledScenes(1, split=split))
    batch = torch.utils.data.default_collate([next(rows) for _ in range(pictures)])
    true, things = batch["pixel_values"], batch["things"].unsqueeze(1).bool().expand(-1, 3, -1, -1)
    codes = model.encode_image(true.to(model.device))
    found = {"mean picture": psnr(true.mean(0).expand_as(true)[things], true[things])}
    for depth in range(1, codes.shape[-1] + 1):
        features = model.quantizer.embed(codes)[..., :depth, :].sum(-2)
        pixels = torch.cat([model.decode_features(chunk).float().cpu() for chunk in features.split(32)])
        found[f"depth {depth}"] = psnr(pixels.clamp(-1, 1)[things], true[things])
    return found


def psnr(pixels: torch.Tensor, true: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / F.mse_loss(pixels, true)))
