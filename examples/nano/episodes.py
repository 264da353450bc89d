"""What a task draws: media with questions and answers, in the form of messages."""

from dataclasses import dataclass, field, replace
from typing import Any

from drawing import Thing

Block = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A question and what counts as its answer.

    Attributes:
        answer: what a model is taught to say.
        check: how an answer is judged, a key of `judge.CHECKS`.
        chance: share of right answers of who reads the question, but sees nothing.
        held_out: what about it was never trained on (`"pair"`, `"phrasing"`, `"string"`); set in the test only.
    """

    question: str
    answer: str
    check: str = "words"
    chance: float = 0.0
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Episode:
    """A conversation about pictures or a clip.

    Attributes:
        task: name of the task.
        turns: the last one is what the test asks; those before it are part of the conversation.
        media: blocks of every turn that stand before its question, as many as there are turns.
        things: what is drawn in every picture, where that is known: a label for training, see `grounding.py`.
    """

    task: str
    turns: tuple[Turn, ...]
    media: tuple[tuple[Block, ...], ...] = field(default=())
    things: tuple[tuple[Thing, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        if len(self.media) < len(self.turns):
            missing = len(self.turns) - len(self.media)
            object.__setattr__(self, "media", (*self.media, *((),) * missing))

    @property
    def target(self) -> Turn:
        return self.turns[-1]

    @property
    def prompt(self) -> list[Message]:
        """The conversation up to the last question."""
        return self.messages[:-1]

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, as `apply_chat_template` and `VilaDataCollator` take it."""
        chat: list[Message] = []
        for turn, blocks in zip(self.turns, self.media):
            chat.append({"role": "user", "content": [*blocks, text_block(turn.question)]})
            chat.append({"role": "assistant", "content": [text_block(turn.answer)]})
        return chat

    def with_media(self, *media: tuple[Block, ...]) -> "Episode":
        """The same questions about other media, or the same in another order."""
        return replace(self, media=media)


def text_block(text: str) -> Block:
    return {"type": "text", "text": text}


def image_block(picture: Any) -> Block:
    return {"type": "image", "image": picture}


def video_block(frames: list[Any]) -> Block:
    return {"type": "video", "video": frames}
