"""The stages of training, as plain data.

The family starts from a trained tower and a trained language model, and trains: 1. the projector alone, 2. projector
and language model on interleaved documents, 3. everything on instructions, text among them. Here both start from
random weights, so that

- a stage before the first makes a tower, by labelling what is drawn where, see `tower.py`;
- another one makes a language model, of text alone;
- instructions leave the tower as it is: trained further at the rate that the rest needs it forgets letters (after
  9,000 conversations 22 % of the printed strings were read, 45 % otherwise), and a step takes twice the time;
- one behind the last practises, with labels for words, see `practice.py` and `grounding.py`.
"""

from dataclasses import dataclass, replace

BEHIND_TOWER = ("projector", "language_model")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        tuned: parts that are trained, as `vila.training_vila.train_only` names them.
        mixture: share of every task, see `dataset.TASKS`; none where the tower is trained alone.
        learning_rate: at the end of the warm-up.
        schedule: of the learning rate, as `TrainingArguments` names it.
        samples: conversations that it takes by default.
        share: of the time, where a time is given instead.
        watched: trials whose accuracy is measured on the validation split meanwhile.
        batch_size: rows of a device batch; `ACCUMULATION` of them are a step.
        grounded: whether words are labelled too, see `grounding.py`.
    """

    name: str
    tuned: tuple[str, ...]
    mixture: dict[str, float]
    learning_rate: float
    schedule: str
    samples: int
    share: float
    watched: tuple[str, ...]
    batch_size: int = 16
    grounded: bool = False


TEXT = {"text": 1.0}
PAIRS = {"caption": 2.0, "transcribe": 2.0, "pair": 4.0, "text": 0.6}
INTERLEAVED = {
    "caption": 0.8,
    "transcribe": 2.4,
    "dialogue": 1.2,
    "interleaved": 1.6,
    "fewshot": 0.9,
    "direction": 0.3,
    "order": 0.3,
    "flashes": 0.2,
    "text": 0.6,
}
INSTRUCTIONS = {
    "naming": 0.4,
    "yes_no": 3.0,
    "count": 1.2,
    "read": 0.8,
    "transcribe": 1.0,
    "dialogue": 0.2,
    "chart": 0.3,
    "compare": 1.2,
    "tiles": 0.8,
    "receipt_steps": 1.0,
    "receipt_direct": 0.1,
    "fewshot": 1.2,
    "direction": 0.25,
    "order": 0.25,
    "flashes": 0.4,
    "text": 1.5,
}
PRACTICE = {
    "look": 3.0,
    "tally": 0.9,
    "contrast": 1.5,
    "fewshot": 1.4,
    "naming": 0.4,
    "yes_no": 1.5,
    "count": 0.4,
    "compare": 0.8,
    "read": 1.0,
    "transcribe": 0.8,
    "dialogue": 0.1,
    "chart": 0.3,
    "tiles": 0.9,
    "receipt_steps": 1.2,
    "receipt_direct": 0.1,
    "direction": 0.2,
    "order": 0.3,
    "flashes": 0.3,
    "text": 1.4,
}
SEEN = ("naming", "yes_no", "count", "read")

SEVERAL_PICTURES = {"contrast", "compare", "fewshot"}
ANSWERED = (
    *SEEN,
    *("compare", "tiles_on", "direction", "order", "flashes", "receipt_steps", "fewshot_4", "text"),
)

STAGES = (
    Stage("tower", ("vision_tower",), {}, 3e-3, "cosine", 500_000, 0.35, (), batch_size=32),
    Stage("language", ("language_model",), TEXT, 2e-3, "cosine", 15_000, 0.03, ("text",)),
    Stage("align", ("projector",), {"caption": 1.0}, 1e-3, "cosine", 6_000, 0.01, ("naming", "read")),
    Stage(
        "pretrain",
        BEHIND_TOWER,
        INTERLEAVED,
        2e-3,
        "constant_with_warmup",
        60_000,
        0.12,
        (*SEEN, "fewshot_4", "text"),
    ),
    Stage("sft", BEHIND_TOWER, INSTRUCTIONS, 2e-3, "cosine", 120_000, 0.22, ANSWERED),
    Stage("practice", BEHIND_TOWER, PRACTICE, 1.5e-3, "cosine", 100_000, 0.27, ANSWERED, grounded=True),
)

WARMUP_RATIO, WEIGHT_DECAY, BETA2, MAX_GRAD_NORM = 0.03, 0.02, 0.98, 1.0
ACCUMULATION = 2


def recipe(
    frozen_language_model: bool = False, pairs: bool = False, text: bool = True, tasks: list[str] | None = None
) -> tuple[Stage, ...]:
    """The stages, or those of an ablation.

    Args:
        frozen_language_model: it stays as the first stage left it.
        pairs: pre-training, and practice, on single pictures instead of interleaved documents.
        text: whether text-only conversations are blended in behind the first stage.
        tasks: only these of every stage that has one of them.
    """
    stages = []
    for stage in STAGES:
        if pairs and stage.name == "pretrain":
            stage = replace(stage, mixture=PAIRS)
        if pairs and stage.name == "practice":
            single = {task: share for task, share in stage.mixture.items() if task not in SEVERAL_PICTURES}
            stage = replace(stage, mixture=single)
        if stage.name in ("pretrain", "sft", "practice"):
            if frozen_language_model:
                stage = replace(stage, tuned=tuple(part for part in stage.tuned if part != "language_model"))
            if not text:
                stage = replace(stage, mixture={task: s for task, s in stage.mixture.items() if task != "text"})
        if tasks and set(tasks) & set(stage.mixture):
            watched = tuple(trial for trial in stage.watched if trial in tasks)
            mixture = {task: share for task, share in stage.mixture.items() if task in tasks}
            stage = replace(stage, mixture=mixture, watched=watched)
        stages.append(stage)
    return tuple(stages)
