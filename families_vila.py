"""The families of checkpoints: the classes that each is loaded with, and the code that lies beside its weights."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_ps3 import Ps3Config
from .configuration_vila import VilaConfig
from .configuration_vila_hd import VilaHDConfig
from .configuration_vila_u import VilaUConfig
from .image_processing_ps3 import Ps3ImageProcessor
from .modeling_ps3 import Ps3Model
from .modeling_vila import VilaForConditionalGeneration
from .modeling_vila_hd import VilaHDForConditionalGeneration
from .modeling_vila_u import VilaUForConditionalGeneration
from .processing_vila import VilaProcessor
from .processing_vila_hd import VilaHDProcessor
from .processing_vila_u import VilaUProcessor
from .weight_files_vila import Shard
from .weight_names_vila import with_module_names
from .weight_names_vila_u import unused_names, with_module_names_u


class Family(NamedTuple):
    """Classes of one family.

    with_module_names: a state dict under the original's names -> under the model's.
    unused_names: a config -> patterns of the tensors of an original that are left out by name.
    """

    config_class: type[Any]
    model_class: type[Any]
    processor_class: type[Any]
    with_module_names: Callable[[Any], dict[str, Any]]
    unused_names: Callable[[Any], list[str]]

    @property
    def model_type(self) -> str:
        return self.config_class.model_type

    @property
    def auto_map(self) -> dict[str, str]:
        """Where `trust_remote_code` finds the classes."""
        model = remote_name(self.model_class)
        names = ["AutoModel"]
        if self.model_class.can_generate():
            names += ["AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"]
        return {"AutoConfig": remote_name(self.config_class), **dict.fromkeys(names, model)}

    def copy_code(self, target: Path) -> None:
        """Puts the modules that `auto_map` reaches beside the weights: they load where the package is missing."""
        classes: list[type] = [self.model_class, self.processor_class, self.config_class]
        for module in (sys.modules[cls.__module__] for cls in classes):
            path = str(module.__file__)
            for file in [path, *get_relative_import_files(path)]:
                shutil.copy(file, target)

    def used_shards(self, shards: dict[str, list[Shard]], config: Any) -> dict[str, list[Shard]]:
        """The same files without the tensors that a model of this config has no place for."""
        pattern = re.compile("|".join(self.unused_names(config)) or "(?!)")

        def used(shard: Shard) -> Shard:
            return shard._replace(shapes={name: s for name, s in shard.shapes.items() if not pattern.search(name)})

        return {part: [used(shard) for shard in files] for part, files in shards.items()}


def nothing_unused(config: Any) -> list[str]:
    return []


def remote_name(cls: type) -> str:
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"


VILA = Family(VilaConfig, VilaForConditionalGeneration, VilaProcessor, with_module_names, nothing_unused)
VILA_HD = Family(VilaHDConfig, VilaHDForConditionalGeneration, VilaHDProcessor, with_module_names, nothing_unused)
VILA_U = Family(VilaUConfig, VilaUForConditionalGeneration, VilaUProcessor, with_module_names_u, unused_names)
# an encoder alone: its weights have the names that they load by
PS3 = Family(Ps3Config, Ps3Model, Ps3ImageProcessor, dict, nothing_unused)
# model_type of an original's or a converted root config
FAMILIES = {
    "llava_llama": VILA,
    "vila": VILA,
    "llava_topdown_llama": VILA_HD,
    "vila_hd": VILA_HD,
    "vila_u_llama": VILA_U,
    "vila_u": VILA_U,
    "ps3": PS3,
    "ps3_vision_model": PS3,
}


def family_of(root: dict[str, Any]) -> Family:
    """The family of a root config that `FAMILIES` knows."""
    return FAMILIES[root["model_type"]]
