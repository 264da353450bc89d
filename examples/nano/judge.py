"""The judge: what is asked in the test, how answers are checked, and how sure the scores are.

Nothing here, and nothing that draws, depends on a model. Changing either changes what all scores mean.
"""

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import clips
import language
import reading
import scenes
import shots
from episodes import Episode
from vocabulary import Split

Z_95 = 1.959963984540054
TASKS: dict[str, Callable[[random.Random, Split], Episode]] = {
    "naming": scenes.naming,
    "yes_no": scenes.yes_no,
    "count": scenes.count,
    "read": reading.read,
    "compare": scenes.compare,
    "tiles": reading.tiles,
    "direction": clips.direction,
    "order": clips.order,
    "flashes": clips.flashes,
    "receipt_steps": reading.receipt_steps,
    "receipt_direct": reading.receipt_direct,
    "chart": reading.chart,
    "text": language.text,
    **{f"fewshot_{k}": partial(shots.few_shot, shots=k) for k in shots.SHOTS},
}

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


# what an answer may say around its content
FILLERS = frozenset(
    words(
        "a an the it is it's its this that in of on and to i see there are answer called name named thing one which "
        "picture pictures image photo shown shows colour color shape text word number says say reads read written "
        "printed bar moves moving has have more comes came appears flashes flash times total"
    )
)


def numbers(text: str) -> list[str]:
    """All numbers of a text, written in digits or, up to ten, as words."""
    found = [str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else word for word in words(text)]
    return [word for word in found if word.isdecimal()]


def check_words(answer: str, expected: str) -> bool:
    """The expected words in their order, and nothing else but fillers."""
    wanted = words(expected)
    if words(answer) == wanted:
        return True
    fillers = FILLERS - set(wanted)
    return [word for word in words(answer) if word not in fillers] == wanted


def check_yes_no(answer: str, expected: str) -> bool:
    """The first word decides; an answer that also says the opposite is none."""
    found = words(answer)
    return found[:1] == [expected] and not ({"yes", "no"} - {expected}) & set(found)


def check_number(answer: str, expected: str) -> bool:
    """Exactly one number, the expected one."""
    return numbers(answer) == numbers(expected)


def check_last_number(answer: str, expected: str) -> bool:
    """The last number is that of the expected answer, so that steps may stand before it."""
    return numbers(answer)[-1:] == numbers(expected)[-1:]


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "words": check_words,
    "yes_no": check_yes_no,
    "number": check_number,
    "last_number": check_last_number,
}


def is_right(episode: Episode, answer: str) -> bool:
    """Whether an answer to the last question of an episode is right."""
    return CHECKS[episode.target.check](answer, episode.target.answer)


def episode_of(task: str, split: Split, seed: int, index: int) -> Episode:
    """One episode; the same arguments always give the same pixels and texts."""
    return TASKS[task](random.Random(f"{split}/{task}/{seed}/{index}"), split)


def swapped(episode: Episode, rng: random.Random) -> Episode:
    """Two pictures in the other order; "first" and "second" change places in the answer."""
    (blocks,) = episode.media
    other = {"first": "second", "second": "first"}[episode.target.answer]
    return Episode(episode.task, (replace(episode.target, answer=other),), (blocks[::-1],))


@dataclass(frozen=True)
class Trial:
    """One row of the table of scores.

    Attributes:
        task: a key of `TASKS`.
        change: what is done to every episode before it is asked, if anything.
        options: `processor_kwargs` of `apply_chat_template`.
        goal: bounds on the score, `(least, most)`; None where it is only reported.
        max_new_tokens: that an answer needs at most.
    """

    task: str
    change: Callable[[Episode, random.Random], Episode] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    goal: tuple[float, float] | None = None
    max_new_tokens: int = 16

    def episodes(self, count: int, seed: int = 0, split: Split = "test") -> Iterator[Episode]:
        for index in range(count):
            episode = episode_of(self.task, split, seed, index)
            rng = random.Random(f"change/{self.task}/{seed}/{index}")
            yield self.change(episode, rng) if self.change else episode


def at_chance(level: float) -> tuple[float, float]:
    """A score that a sample of 400 cannot tell from chance."""
    return max(0.0, level - 0.06), level + 0.06


TRIALS: dict[str, Trial] = {
    "naming": Trial("naming", goal=(0.98, 1)),
    "yes_no": Trial("yes_no", goal=(0.98, 1)),
    "count": Trial("count", goal=(0.95, 1)),
    "read": Trial("read", goal=(0.95, 1)),
    "compare": Trial("compare", goal=(0.95, 1)),
    "compare_swapped": Trial("compare", swapped, goal=(0.95, 1)),
    "tiles_on": Trial("tiles", goal=(0.90, 1)),
    "tiles_off": Trial("tiles", options={"max_tiles": 1}, goal=(0, 0.30)),
    "direction": Trial("direction", goal=(0.95, 1)),
    "direction_shuffled": Trial("direction", clips.shuffled, goal=at_chance(1 / 2)),
    "order": Trial("order", goal=(0.95, 1)),
    "order_shuffled": Trial("order", clips.shuffled, goal=at_chance(1 / 2)),
    "flashes": Trial("flashes", goal=(0.95, 1)),
    "flashes_shuffled": Trial("flashes", clips.shuffled, goal=at_chance(1 / 3)),
    "receipt_steps": Trial("receipt_steps", goal=(0.85, 1), max_new_tokens=96),
    "receipt_direct": Trial("receipt_direct"),
    "fewshot_0": Trial("fewshot_0", goal=at_chance(1 / 4)),
    "fewshot_1": Trial("fewshot_1"),
    "fewshot_2": Trial("fewshot_2"),
    "fewshot_4": Trial("fewshot_4", goal=(0.90, 1)),
    "chart": Trial("chart"),
    "text": Trial("text"),
}


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, after Wilson; it stays within 0 and 1 for any count.

    Raises:
        ValueError: if nothing was counted.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"need 0 <= right <= total and total >= 1, got {right} of {total}")
    share, spread = right / total, Z_95**2 / total
    centre = (share + spread / 2) / (1 + spread)
    margin = Z_95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # rounding must not leave the share outside
    return max(0.0, min(share, centre - margin)), min(1.0, max(share, centre + margin))
