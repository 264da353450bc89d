"""The one table of weight names: original checkpoints <-> this package.

The original stores three folders and knows two spellings of a weight:

    folder          name in the folder's files       name in the whole model
    llm/            model.layers.0...  lm_head...    llm.model.layers.0...  llm.lm_head...
    vision_tower/   vision_model.encoder...          vision_tower.vision_tower.vision_model.encoder...
    mm_projector/   layers.1...                      mm_projector.layers.1...

Both load. `save_pretrained` writes whole-model names, which other engines read as well; with
`save_original_format=False` it writes the module names of this package.
"""

import re

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

# folder of an original checkpoint -> prefix of its weights in the whole model
PART_PREFIXES = {"llm": "llm.", "vision_tower": "vision_tower.vision_tower.", "mm_projector": "mm_projector."}

# prefix in the whole model -> prefix in `VilaForConditionalGeneration`
MODULE_PREFIXES = {
    "llm.model.": "model.language_model.",
    "llm.lm_head.": "lm_head.",
    "vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "mm_projector.": "model.multi_modal_projector.",
}

# names inside a folder -> prefix in `VilaForConditionalGeneration`
FOLDER_NAMES = {
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    r"^vision_model\.": "model.vision_tower.",
    r"^layers\.": "model.multi_modal_projector.layers.",
}


class LoadOnlyRenaming(WeightRenaming):
    """A spelling that is understood on load and never written."""

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("(?!)", "(?!)")


def weight_renamings() -> list[WeightRenaming]:
    """The table in the form that transformers applies on load and, reversed, on save."""
    renamings = [WeightRenaming("^" + re.escape(whole), module) for whole, module in MODULE_PREFIXES.items()]
    return renamings + [LoadOnlyRenaming(pattern, module) for pattern, module in FOLDER_NAMES.items()]


def original_name(name: str) -> tuple[str, str]:
    """Any spelling of a weight's name in a root shard -> `(folder, name in the folder's files)`.

    Raises:
        KeyError: if the name belongs to no part of a VILA model.
    """
    for whole, module in MODULE_PREFIXES.items():
        if name.startswith(module):
            name = whole + name.removeprefix(module)
            break
    for folder, prefix in PART_PREFIXES.items():
        if name.startswith(prefix):
            return folder, name.removeprefix(prefix)
    raise KeyError(name)


register_checkpoint_conversion_mapping("vila", weight_renamings(), overwrite=True)
