"""Training of what chooses the patches, and of the language model that reads what was seen.

One pass over a canvas says where a question makes the model look (top-down), where it looks without one (bottom-up),
and what it answers; each is a loss. It differs from training with `VilaHDForConditionalGeneration.forward` in this:

- The selection loss reaches the language model. The original's has learned from much text to sum up a question; this
  small one learns it here.
- A canvas is asked about several of its codes at once, which are looked at by their true places, until in the last
  stage the model looks for one itself. All these questions say where to look, not only the first.
- The encoder's blocks are frozen, and run without gradients.
- What is shown from close by is spelled: linear heads name the characters in it and whose code it is, of what the
  projector gives and of the language model's states halfway. From the answers alone, a few hundred characters a step,
  it learned slowly which character stands where, and went on to mix the codes of several things.
- What a question looks for, and what lies at a place, are first led to the same directions, one for every colour. From
  the selection loss alone both would have to find each other: after 170 steps it still chose any code.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from build_hd import LOOK_CELLS, PATCH
from canvases import CELLS, CODE_LENGTH, SIDE, Spot, cells_of, draw_canvas, question_of
from encoder_training import CHARACTERS, COLOUR_NUMBERS, LARGE_KINDS, QUARTERS, Labels, patches_of
from episodes import image_block, text_block
from running import Trainee, weighed_loss
from streams import row_numbers
from torch import nn
from torch.utils.data import IterableDataset
from vila import VilaForConditionalGeneration
from vila.chat_templates_vila import user_end_ids
from vila.generation_vila_hd import as_encoded
from vila.looking_vila_hd import read_questions
from vila.prompts_vila_hd import pad_rows, read_rows
from vila.training_vila import IGNORED
from vila.vision_vila_hd import selection_loss
from vocabulary import COLOURS, Split

SHOWN_CELLS = 12  # that hold the codes of the questions, where these are not looked for
MAX_TURNS = 6
TOP_DOWN_WEIGHT, BOTTOM_UP_WEIGHT, COLOUR_WEIGHT, SPELLING_WEIGHT = 0.5, 0.5, 0.5, 1.0
MERGED = 2  # patches per side of what the projector makes one feature
SPELLED = (0, 3)  # states of the language model that are spelled: before its first layer, and after its third
SHARPNESS = 10.0  # of the choice of a direction


@dataclass(frozen=True)
class Asked:
    """A canvas and questions about it.

    Attributes:
        pixels: `(3, SIDE, SIDE)` of 0 to 255.
        turns: questions and answers.
        colours: of the things that the questions ask about.
        cells: what holds the codes of each question.
        shown: cells of the codes of all questions, filled up with others; none where the model looks for itself.
        codes: cells of all codes, and the colours of their things.
        spelling: of `spelling_of`.
    """

    pixels: torch.Tensor
    turns: tuple[tuple[str, str], ...]
    colours: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]
    shown: tuple[int, ...]
    codes: dict[int, str]
    spelling: torch.Tensor

    @property
    def messages(self) -> list[dict[str, Any]]:
        chat, media = [], [image_block(self.pixels.permute(1, 2, 0).numpy())]
        for question, answer in self.turns:
            chat.append({"role": "user", "content": [*media, text_block(question)]})
            chat.append({"role": "assistant", "content": [text_block(answer)]})
            media = []
        return chat


class AskedCanvases(IterableDataset):
    """Rows `Asked` without end; row n is the same wherever one starts.

    Args:
        is_shown: several questions, and where to look for all of them; else one question alone.
        start: number of the first row.
    """

    def __init__(self, is_shown: bool, seed: int = 0, start: int = 0, split: Split = "train"):
        self.is_shown, self.seed, self.start, self.split = is_shown, seed, start, split

    def __iter__(self) -> Iterator[Asked]:
        for number in row_numbers(self.start):
            yield self.row(random.Random(f"asked/{self.is_shown}/{self.split}/{self.seed}/{number}"))

    def row(self, rng: random.Random) -> Asked:
        canvas = draw_canvas(rng, self.split)
        pixels = torch.from_numpy(np.array(canvas.picture)).permute(2, 0, 1)
        spots = rng.sample(canvas.spots, len(canvas.spots))
        asked, shown = spots[:1], dict.fromkeys(cells_of(spots[0].box))
        for spot in spots[1:MAX_TURNS] if self.is_shown else ():
            more = shown | dict.fromkeys(cells_of(spot.box))
            if len(more) <= SHOWN_CELLS:
                asked, shown = [*asked, spot], more
        others = dict.fromkeys(rng.sample(range(CELLS**2), SHOWN_CELLS))
        codes = {cell: spot.thing.colour for spot in spots for cell in cells_of(spot.box)}
        return Asked(
            pixels,
            tuple((question_of(rng, spot), spot.code) for spot in asked),
            tuple(spot.thing.colour for spot in asked),
            tuple(tuple(cells_of(spot.box)) for spot in asked),
            tuple(shown | others)[:SHOWN_CELLS] if self.is_shown else (),
            codes,
            spelling_of(canvas.spots),
        )


class AskedCollator:
    """Rows `Asked` -> what `LookingTraining.forward` takes.

    `VilaDataCollator` gives the same ids, labels and pixels, in five times the time.
    """

    def __init__(self, processor: Any):
        self.tokenizer = processor.tokenizer
        self.user_end = user_end_ids(str(processor.chat_template), processor.tokenizer)
        images = processor.image_processor
        self.mean, self.std = images.image_mean[0], images.image_std[0]
        self.picture = processor.image_token * processor.num_tile_tokens + (processor.image_end_tokens or "")

    def __call__(self, rows: Sequence[Asked]) -> dict[str, torch.Tensor]:
        encoded = [self.encode(row.turns) for row in rows]
        longest = max(len(ids) for ids, _ in encoded)
        padded = [(ids, labels, longest - len(ids)) for ids, labels in encoded]
        filler = self.tokenizer.pad_token_id
        pixels = torch.stack([row.pixels for row in rows]).float()
        pixels.mul_(1 / (255 * self.std)).sub_(self.mean / self.std)
        batch = {
            "pixel_values": pixels,
            "input_ids": torch.tensor([[filler] * pad + ids for ids, _, pad in padded]),
            "attention_mask": torch.tensor([[0] * pad + [1] * len(ids) for ids, _, pad in padded]),
            "labels": torch.tensor([[IGNORED] * pad + labels for _, labels, pad in padded]),
            "asked_maps": torch.stack([cell_maps(row.cells) for row in rows]),
            "question_ends": torch.stack([self.question_ends(ids, pad) for ids, _, pad in padded]),
            "asked_colours": torch.tensor([colour_numbers(row.colours) for row in rows]),
            "owners": torch.stack([owner_map(row.codes) for row in rows]),
        }
        if rows[0].shown:
            batch["shown"] = torch.tensor([row.shown for row in rows])
            batch["spelling"] = torch.stack([row.spelling for row in rows])
        return batch

    def encode(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Ids and labels of a chat."""
        ids, labels, media, between = [], [], self.picture, ""
        for question, answer in turns:
            asked = f"{between}<|im_start|>user\n{media}{question}<|im_end|>\n<|im_start|>assistant\n"
            for text, is_target in ((asked, False), (f"{answer}<|im_end|>", True)):
                own = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += own
                labels += own if is_target else [IGNORED] * len(own)
            media, between = "", "\n"
        end = self.tokenizer(between, add_special_tokens=False)["input_ids"]
        return ids + end, labels + [IGNORED] * len(end)

    def question_ends(self, ids: list[int], pad: int) -> torch.Tensor:
        """`(MAX_TURNS,)`: columns of the last tokens of all questions, -2 for those that there are not."""
        count = len(self.user_end)
        found = [at - 1 + pad for at in range(len(ids)) if ids[at : at + count] == self.user_end]
        return torch.tensor((found + [-2] * MAX_TURNS)[:MAX_TURNS])


def spelling_of(spots: Sequence[Spot]) -> torch.Tensor:
    """`(CODE_LENGTH + 1, side, side)`: for every of the projector's features of the canvas the number of the n-th
    character of a code, where that is in it, and of the colour of the thing that a code belongs to; else 0."""
    labels, side = Labels(LARGE_KINDS, PATCH / QUARTERS), SIDE // (PATCH * MERGED)
    for spot in spots:
        labels.add_code(spot.code, spot.box[1], spot.box[3], spot.edges, COLOUR_NUMBERS[spot.thing.colour])
    characters, places, owners = (labels.maps[labels.kinds.index(kind)] for kind in ("character", "place", "owner"))
    each = [np.where(places == n + 1, characters, 0) for n in range(CODE_LENGTH)]
    maps = torch.from_numpy(np.stack([*each, owners]))
    return maps.unflatten(2, (side, -1)).unflatten(1, (side, -1)).amax((2, 4))


def colour_numbers(colours: Sequence[str]) -> list[int]:
    """`MAX_TURNS` numbers of colours, `IGNORED` for questions that there are not."""
    return [*map(list(COLOURS).index, colours), *[IGNORED] * (MAX_TURNS - len(colours))]


def owner_map(codes: dict[int, str]) -> torch.Tensor:
    """`(CELLS, CELLS)`: at codes the numbers of their things' colours, `IGNORED` elsewhere."""
    flat = torch.full((CELLS**2,), IGNORED)
    flat[list(codes)] = torch.tensor([list(COLOURS).index(colour) for colour in codes.values()])
    return flat.view(CELLS, CELLS)


def cell_maps(cells: Sequence[Sequence[int]]) -> torch.Tensor:
    """`(MAX_TURNS, CELLS, CELLS)`, 1 at the cells of every question; 0 for those that there are not."""
    return torch.stack([cell_map(own) for own in (*cells, *[()] * (MAX_TURNS - len(cells)))])


def cell_map(cells: Sequence[int]) -> torch.Tensor:
    """`(CELLS, CELLS)`, 1 at the cells."""
    flat = torch.zeros(CELLS**2)
    flat[list(cells)] = 1
    return flat.view(CELLS, CELLS)


class LookingTraining(Trainee):
    """A VILA-HD whose weights but those of the encoder's blocks are changed in place."""

    def __init__(self, model: Any):
        super().__init__(model)
        # thrown away after training; always the same, so that a stage goes on with those of the one before
        generator = torch.Generator().manual_seed(0)
        width = model.config.vision_config.hidden_size
        self.directions = nn.Parameter(torch.randn(len(COLOURS), width, generator=generator))
        width, names = model.config.text_config.hidden_size, (CODE_LENGTH + 1) * (len(CHARACTERS) + 1)
        self.spelling_heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, names)) for _ in SPELLED
        )
        model.model.vision_tower.trunk.requires_grad_(False)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        asked_maps: torch.Tensor,
        question_ends: torch.Tensor,
        asked_colours: torch.Tensor,
        owners: torch.Tensor,
        shown: torch.Tensor | None = None,
        spelling: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """`loss`, whose parts are in `parts` afterwards, and `cells`, what was looked at.

        Args:
            pixel_values: `(B, 3, SIDE, SIDE)`.
            input_ids, attention_mask, labels: `(B, sequence)`, with one picture each.
            asked_maps: `(B, MAX_TURNS, CELLS, CELLS)`, 1 where the code of every question lies.
            question_ends: `(B, MAX_TURNS)`, columns of the last token of every question.
            asked_colours: `(B, MAX_TURNS)`, numbers of the colours that the questions name.
            owners: `(B, CELLS, CELLS)`, where codes lie the numbers of their things' colours.
            shown: `(B, cells)` to look at; by default those that the first question makes it choose. Where these do
                not hold the code, the answer is not a target.
            spelling: `(B, CODE_LENGTH + 1, side, side)` of `spelling_of`; by default nothing is spelled.
        """
        body = self.model.model
        tower = body.vision_tower
        with torch.no_grad():
            view = tower.see_low_res(pixel_values)
        low = body.project_low_res(view)
        rows = read_rows(input_ids, attention_mask, self.model.config, len(pixel_values))
        to_prompts, wanted = body.multi_modal_projector.top_down_prompt_head, asked_maps[:, 0].flatten(1)
        bottom_up = where_loss(tower.score(view), (owners != IGNORED).float())
        if shown is not None:
            # what reads the patches too sums up a question alike, and all of them in one pass
            answer, spelled, states = self.answer(view, rows, low, shown, labels, question_ends, spelling)
        else:
            states = self.read(rows, low).unsqueeze(1)
            with torch.no_grad():
                shown = tower.score(view, to_prompts(states[:, 0])).flatten(1).topk(LOOK_CELLS).indices
            is_missed = wanted.sum(1) > wanted.gather(1, shown).sum(1)
            labels = labels.masked_fill(is_missed.unsqueeze(1), IGNORED)
            answer, spelled, _ = self.answer(view, rows, low, shown, labels, question_ends, None)
        prompts = to_prompts(states)
        each = [where_loss(tower.score(view, own), asked_maps[:, i]) for i, own in enumerate(prompts.unbind(1))]
        top_down = torch.stack(each).sum()
        named = self.colour_loss(view.place_features, owners)
        named = named + self.colour_loss(prompts.transpose(1, 2), asked_colours[:, : len(each)])
        loss = answer + TOP_DOWN_WEIGHT * top_down + BOTTOM_UP_WEIGHT * bottom_up + COLOUR_WEIGHT * named
        loss = loss + SPELLING_WEIGHT * spelled
        parts = {"answer": answer, "top_down": top_down, "bottom_up": bottom_up, "colour": named, "spelling": spelled}
        self.parts = {name: part.item() for name, part in parts.items()}
        return {"loss": loss, "cells": shown}

    def colour_loss(self, features: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        """Which direction features, `(B, D, ...)`, point to, against the numbers `(B, ...)`, and how exactly."""
        directions = F.normalize(self.directions, dim=1)
        cosines = torch.einsum("bd...,cd->bc...", F.normalize(features.float(), dim=1), directions).float()
        is_given = colours != IGNORED
        right = cosines.gather(1, colours.clamp(min=0).unsqueeze(1)).squeeze(1)[is_given]
        return F.cross_entropy(SHARPNESS * cosines, colours) + (1 - right).mean()

    def read(self, rows: list[Any], low: torch.Tensor) -> torch.Tensor:
        """The language model's state at the end of every first question, `(B, H)`."""
        embeds = []
        for row, features in zip(rows, low):
            own = self.model.model.embed_text(row.ids[None])[0]
            is_picture = (row.ids == self.model.config.image_token_id).unsqueeze(-1)
            embeds.append(own.masked_scatter(is_picture, features.to(own.dtype)))
        return read_questions(self.model.model.language_model, embeds, rows, [0] * len(rows), None)

    def answer(
        self,
        view: Any,
        rows: list[Any],
        low: torch.Tensor,
        cells: torch.Tensor,
        labels: torch.Tensor,
        question_ends: torch.Tensor,
        spelling: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the language model that sees the view and the patches of these cells: the losses of its answers and of
        what it spells, and its states at the ends of all questions, `(B, MAX_TURNS, H)`."""
        body = self.model.model
        indices, side = patches_of(cells), view.pyramid.grids[0]
        with torch.no_grad():
            tokens = body.vision_tower.look(view, [indices])[-1]
        maps = torch.zeros(len(cells), side[0] * side[1], device=cells.device).scatter_(1, indices, 1.0)
        project = body.multi_modal_projector.project_chosen
        close = [project(own, [chosen.view(side)])[0] for own, chosen in zip(tokens, maps)]
        rows = [row.with_inserted([len(own)]) for row, own in zip(rows, close)]
        batch = pad_rows(rows, [0] * len(rows))
        targets = labels.gather(1, batch.columns.clamp(min=0)).masked_fill(batch.columns < 0, IGNORED)
        output = VilaForConditionalGeneration.forward(
            self.model,
            batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_encoder_outputs=as_encoded([torch.cat(both) for both in zip(low, close)]),
            output_hidden_states=True,
        )
        states = output.hidden_states[-1]
        at = (batch.columns.unsqueeze(1) == question_ends.unsqueeze(2)).int().argmax(-1)
        ends = states.gather(1, at.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        spelled = output.logits.new_zeros(())
        if spelling is not None:
            is_close = (batch.columns < 0) & batch.attention_mask.bool()
            spelled = self.spelling_loss([output.hidden_states[at][is_close] for at in SPELLED], maps, spelling)
        is_target = targets[:, 1:] != IGNORED
        if not is_target.any():
            return output.logits.sum() * 0, spelled, ends
        answer = F.cross_entropy(output.logits[:, :-1][is_target].float(), targets[:, 1:][is_target])
        return answer, spelled, ends

    def spelling_loss(
        self, states: Sequence[torch.Tensor], maps: torch.Tensor, spelling: torch.Tensor
    ) -> torch.Tensor:
        """Args: states: of what is shown, `(cells, H)` each, in the order of the maps, `(B, patches)`."""
        side = spelling.shape[-1]
        merged = maps.unflatten(1, (side, MERGED, side, MERGED)).amin((2, 4)).flatten(1) > 0
        wanted = spelling.flatten(2).transpose(1, 2)[merged]
        losses = [
            weighed_loss(head(own.float()).unflatten(1, (CODE_LENGTH + 1, -1)).transpose(1, 2), wanted)
            for head, own in zip(self.spelling_heads, states)
        ]
        return torch.stack(losses).sum()


def where_loss(chances: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The selection loss of chances and maps, both `(B, CELLS, CELLS)`; maps of zeros are no target."""
    with torch.autocast(chances.device.type, enabled=False):
        return selection_loss([chances], wanted)


@torch.no_grad()
def success(trainee: LookingTraining, processor: Any, rows: int = 32, seed: int = 0) -> dict[str, float]:
    """Share of the codes of the validation split that lie wholly in the cells that the model looks at, with the
    question and without."""
    collator, counted = AskedCollator(processor), {"top_down": 0, "bottom_up": 0}
    trainee.eval()
    for _, row in zip(range(rows), AskedCanvases(False, seed, split="validation")):
        batch = collator([row])
        tower, body = trainee.model.model.vision_tower, trainee.model.model
        view = tower.see_low_res(batch["pixel_values"])
        prompts = read_rows(batch["input_ids"], batch["attention_mask"], trainee.model.config, 1)
        state = trainee.read(prompts, body.project_low_res(view))
        prompt = body.multi_modal_projector.top_down_prompt_head(state)
        for name, own in (("top_down", prompt), ("bottom_up", None)):
            chosen = set(tower.score(view, own).flatten().topk(LOOK_CELLS).indices.tolist())
            counted[name] += chosen >= set(row.cells[0])
    return {name: count / rows for name, count in counted.items()}
