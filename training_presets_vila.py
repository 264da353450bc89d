"""The stages that the released models were trained in, as plain data.

Sources: the release scripts of NVILA-Lite, NVILA and VILA-1.5. All trained for one epoch in bfloat16 with a cosine
schedule, a warm-up over 3 % of the steps and gradient checkpointing.
"""

from dataclasses import dataclass
from typing import Any

LORA = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none"}
# sizes that one process can be expected to take at once where nothing else is said
MAX_DEVICE_BATCH = 16


@dataclass(frozen=True)
class TrainingPreset:
    """One stage.

    Attributes:
        tuned: parts that are trained, as `train_only` names them.
        learning_rate: at the end of the warm-up.
        global_batch_size: rows per step over all processes; None where the scripts fix `device_batch_size` and
            `accumulation` instead and leave the number of processes open.
        accumulation: forward passes per step. Only without a global batch size: with one it follows from the sizes.
        max_length: ids per row.
        expected: what the released checkpoint of this stage has, by option of `VilaConfig` or of the image processor;
            another one trains as well, but is not that recipe.
    """

    tuned: tuple[str, ...]
    learning_rate: float
    global_batch_size: int | None
    max_length: int = 4096
    device_batch_size: int | None = None
    accumulation: int = 1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    lr_scheduler_type: str = "cosine"
    num_train_epochs: float = 1.0
    expected: tuple[tuple[str, Any], ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Arguments of `transformers.TrainingArguments`, without the batch sizes."""
        return {
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "lr_scheduler_type": self.lr_scheduler_type,
            "warmup_steps": self.warmup_ratio,  # below 1 it is a share of all steps
            "num_train_epochs": self.num_train_epochs,
            "bf16": True,
            "activation_checkpointing": True,
            "optim": "adamw_torch",
        }


PROJECTOR, VISION, LANGUAGE = "projector", "vision_tower", "language_model"
EVERYTHING = (VISION, PROJECTOR, LANGUAGE)
LITE = (("projector_type", "mlp_downsample_3x3_fix"), ("image_mode", "dynamic"))
NVILA = (("projector_type", "mlp_downsample"), ("image_mode", "dynamic_s2"), ("s2_scales", [448, 896, 1344]))
VIDEO = (("projector_type", "mlp_downsample_2x2_fix"), ("image_mode", "resize"), ("video_pool_sizes", [[8, 1, 1]]))
VILA15 = (("projector_type", "mlp_downsample"), ("image_mode", "resize"))

PRESETS = {
    "nvila-lite/align": TrainingPreset((PROJECTOR,), 1e-3, 2048, expected=LITE),
    "nvila-lite/stage1.5": TrainingPreset((VISION, PROJECTOR), 5e-5, 1024, expected=LITE),
    "nvila-lite/pretrain": TrainingPreset((PROJECTOR, LANGUAGE), 5e-5, 1024, expected=LITE),
    "nvila-lite/sft": TrainingPreset(EVERYTHING, 2e-5, 2048, expected=LITE),
    "nvila/align": TrainingPreset((PROJECTOR,), 1e-3, 512, 8192, expected=NVILA),
    "nvila/stage1.5": TrainingPreset((VISION, PROJECTOR), 2e-5, 1024, 8192, max_grad_norm=5.0, expected=NVILA),
    "nvila/pretrain": TrainingPreset((PROJECTOR, LANGUAGE), 2e-5, 1024, 8192, expected=NVILA),
    "nvila/sft": TrainingPreset(EVERYTHING, 1.5e-5, 1024, 8192, max_grad_norm=5.0, expected=NVILA),
    "nvila/video": TrainingPreset(EVERYTHING, 2e-5, 2048, 16384, expected=VIDEO),
    "vila1.5/align": TrainingPreset((PROJECTOR,), 1e-3, None, expected=VILA15),
    "vila1.5/sft": TrainingPreset(EVERYTHING, 1e-4, None, device_batch_size=16, accumulation=2, expected=VILA15),
    "vila1.5-40b/align": TrainingPreset((PROJECTOR,), 1e-3, None, expected=VILA15),
    "vila1.5-40b/sft": TrainingPreset(
        EVERYTHING, 2e-5, None, device_batch_size=16, weight_decay=0.05, expected=VILA15
    ),
}


def split_batch(
    global_batch_size: int, processes: int, device_batch_size: int | None = None, accumulation: int | None = None
) -> tuple[int, int]:
    """Rows per process and forward passes per step that together make a global batch.

    Args:
        global_batch_size: rows per step over all processes.
        processes: number of them.
        device_batch_size, accumulation: one of them may be fixed. Where none is, the largest device batch of at most
            `MAX_DEVICE_BATCH` rows that divides the work.

    Returns:
        `(device_batch_size, accumulation)`.

    Raises:
        ValueError: if the parts do not multiply to the global batch size.
    """
    per_process, rest = divmod(global_batch_size, processes)
    if global_batch_size < 1 or processes < 1 or rest:
        raise ValueError(f"a global batch of {global_batch_size} rows does not divide by {processes} processes")
    if device_batch_size is None:
        if accumulation is not None:
            device_batch_size = max(per_process // accumulation, 1)
        else:
            sizes = range(1, min(MAX_DEVICE_BATCH, per_process) + 1)
            device_batch_size = max(size for size in sizes if per_process % size == 0)
    if accumulation is None:
        accumulation = max(per_process // device_batch_size, 1)
    if device_batch_size * accumulation != per_process:
        raise ValueError(
            f"{processes} processes with {device_batch_size} rows and {accumulation} passes each make "
            f"{processes * device_batch_size * accumulation} rows, not the global batch of {global_batch_size}"
        )
    return device_batch_size, accumulation


__all__ = ["LORA", "PRESETS", "TrainingPreset", "split_batch"]
