"""The families of checkpoints: the classes that each is loaded with, and the code that lies beside its weights."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_vila import VilaConfig
from .configuration_vila_u import VilaUConfig
from .modeling_vila import VilaForConditionalGeneration
from .modeling_vila_u import VilaUForConditionalGeneration
from .processing_vila import VilaProcessor
from .processing_vila_u import VilaUProcessor
from .weight_files_vila import Shard
from .weight_names_vila import with_module_names
from .weight_names_vila_u import unused_names, with_module_names_u


class Family(NamedTuple):
    """Classes of one family.

    with_module_names: a state dict under the original's names -> under the model's.
    unused_names: a config -> patterns of the tensors of an original that are left out by name.
    """

    config_class: type[VilaConfig]
    model_class: type[VilaForConditionalGeneration]
    processor_class: type[VilaProcessor]
    with_module_names: Callable[[Any], dict[str, Any]]
    unused_names: Callable[[Any], list[str]]

    @property
    def model_type(self) -> str:
        return self.config_class.model_type

    @property
    def auto_map(self) -> dict[str, str]:
        """Where `trust_remote_code` finds the classes."""
        model = remote_name(self.model_class)
        return {
            "AutoConfig": remote_name(self.config_class),
            "AutoModel": model,
            "AutoModelForCausalLM": model,
            "AutoModelForImageTextToText": model,
            "AutoModelForMultimodalLM": model,
        }

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
VILA_U = Family(VilaUConfig, VilaUForConditionalGeneration, VilaUProcessor, with_module_names_u, unused_names)
# model_type of an original's or a converted root config
FAMILIES = {"llava_llama": VILA, "vila": VILA, "vila_u_llama": VILA_U, "vila_u": VILA_U}


def family_of(root: dict[str, Any]) -> Family:
    """The family of a root config that `FAMILIES` knows."""
    return FAMILIES[root["model_type"]]
