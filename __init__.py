"""The VILA family of visual language models for transformers.

Importing this package registers its classes, so that converted checkpoints load without `trust_remote_code`.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_ps3 import Ps3Config
from .configuration_vila import VilaConfig
from .configuration_vila_hd import VilaHDConfig
from .configuration_vila_u import VilaUConfig
from .image_processing_ps3 import Ps3ImageProcessor
from .image_processing_vila import VilaImageProcessor
from .media_policy_vila import MediaPolicy
from .modeling_ps3 import Ps3Model
from .modeling_vila import VilaForConditionalGeneration, VilaModel, VilaPreTrainedModel
from .modeling_vila_hd import VilaHDForConditionalGeneration, VilaHDModel
from .modeling_vila_u import VilaUForConditionalGeneration, VilaUModel, VilaUPreTrainedModel
from .processing_vila import VilaProcessor
from .processing_vila_hd import VilaHDProcessor
from .processing_vila_u import VilaUProcessor

AutoConfig.register("vila", VilaConfig, exist_ok=True)
AutoImageProcessor.register(VilaConfig, image_processor_classes={"pil": VilaImageProcessor}, exist_ok=True)
AutoProcessor.register(VilaConfig, VilaProcessor, exist_ok=True)
AutoConfig.register("vila_u", VilaUConfig, exist_ok=True)
AutoImageProcessor.register(VilaUConfig, image_processor_classes={"pil": VilaImageProcessor}, exist_ok=True)
AutoProcessor.register(VilaUConfig, VilaUProcessor, exist_ok=True)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(VilaConfig, VilaForConditionalGeneration, exist_ok=True)
    auto_class.register(VilaHDConfig, VilaHDForConditionalGeneration, exist_ok=True)
    auto_class.register(VilaUConfig, VilaUForConditionalGeneration, exist_ok=True)

AutoConfig.register("vila_hd", VilaHDConfig, exist_ok=True)
AutoConfig.register("ps3", Ps3Config, exist_ok=True)
AutoModel.register(Ps3Config, Ps3Model, exist_ok=True)
AutoProcessor.register(VilaHDConfig, VilaHDProcessor, exist_ok=True)
AutoImageProcessor.register(VilaHDConfig, image_processor_classes={"pil": VilaImageProcessor}, exist_ok=True)
AutoImageProcessor.register(Ps3Config, image_processor_classes={"pil": Ps3ImageProcessor}, exist_ok=True)

# a saved model or processor carries its own code, so that it loads where this package is not installed
VilaConfig.register_for_auto_class()
VilaForConditionalGeneration.register_for_auto_class("AutoModel")
VilaImageProcessor.register_for_auto_class("AutoImageProcessor")
VilaProcessor.register_for_auto_class("AutoProcessor")
VilaHDConfig.register_for_auto_class()
VilaHDForConditionalGeneration.register_for_auto_class("AutoModel")
VilaHDProcessor.register_for_auto_class("AutoProcessor")
Ps3Config.register_for_auto_class()
Ps3ImageProcessor.register_for_auto_class("AutoImageProcessor")
Ps3Model.register_for_auto_class("AutoModel")
VilaUConfig.register_for_auto_class()
VilaUForConditionalGeneration.register_for_auto_class("AutoModel")
VilaUProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "MediaPolicy",
    "Ps3Config",
    "Ps3ImageProcessor",
    "Ps3Model",
    "VilaConfig",
    "VilaForConditionalGeneration",
    "VilaHDConfig",
    "VilaHDForConditionalGeneration",
    "VilaHDModel",
    "VilaHDProcessor",
    "VilaImageProcessor",
    "VilaModel",
    "VilaPreTrainedModel",
    "VilaProcessor",
    "VilaUConfig",
    "VilaUForConditionalGeneration",
    "VilaUModel",
    "VilaUPreTrainedModel",
    "VilaUProcessor",
]
