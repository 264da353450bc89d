"""The families of checkpoints: the classes that each is loaded with, and the code that lies beside its weights."""

import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from .configuration_vila import VilaConfig
from .configuration_vila_u import VilaUConfig
from .modeling_vila import VilaForConditionalGeneration
from .modeling_vila_u import VilaUForConditionalGeneration
from .processing_vila import VilaProcessor
from .processing_vila_u import VilaUProcessor
from .weight_files_vila import Shard
from .weight_names_vila import with_module_names
from .weight_names_vila_u import UNUSED, with_module_names_u


class Family(NamedTuple):
    """Classes of one family.

    with_module_names: a state dict under the original's names -> under the model's.
    unused: pattern of tensors of an original that no model of the family has a place for.
    """

    config_class: type[VilaConfig]
    model_class: type[VilaForConditionalGeneration]
    processor_class: type[VilaProcessor]
    with_module_names: Callable[[Any], dict[str, Any]]
    unused: str | None = None

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

    @property
    def code_files(self) -> list[str]:
        """Modules that hold the classes."""
        classes: list[type] = [self.model_class, self.processor_class, self.config_class]
        return [str(sys.modules[cls.__module__].__file__) for cls in classes]

    def used_shards(self, shards: dict[str, list[Shard]]) -> dict[str, list[Shard]]:
        """The same files without the tensors that no model of the family has a place for."""
        if self.unused is None:
            return shards
        pattern = re.compile(self.unused)

        def used(shard: Shard) -> Shard:
            return shard._replace(shapes={name: s for name, s in shard.shapes.items() if not pattern.search(name)})

        return {part: [used(shard) for shard in files] for part, files in shards.items()}


def remote_name(cls: type) -> str:
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"


VILA = Family(VilaConfig, VilaForConditionalGeneration, VilaProcessor, with_module_names)
VILA_U = Family(VilaUConfig, VilaUForConditionalGeneration, VilaUProcessor, with_module_names_u, "|".join(UNUSED))
# model_type of an original's or a converted root config
FAMILIES = {"llava_llama": VILA, "vila": VILA, "vila_u_llama": VILA_U, "vila_u": VILA_U}


def family_of(root: dict[str, Any]) -> Family:
    """The family of a root config that `FAMILIES` knows."""
    return FAMILIES[root["model_type"]]
