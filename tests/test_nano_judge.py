"""The judge of examples/nano: frozen pictures and questions, disjoint splits, checkers, intervals."""

import hashlib
import random

import clips
import judge
import matplotlib
import PIL
import pytest
import vocabulary
from episodes import Episode, Turn
from fonts import NAMES, font
from PIL import features
from vocabulary import HELD_OUT_PAIRS, LEXICON, split_of

COUNT = 20
FROZEN_TEXTS = "676e091e585e36fc4dd2748603507c5b64933319821d63d3ea184ceb8e28c47c"
FROZEN_PIXELS = "b1ae2afb3a35ae8a4eeb6d02d961d50693f8e71d4cc8382736ad6480e7f329a4"
# what draws the glyphs
FROZEN_WITH = ("13.0.0", "2.14.3", "3.11.2")


def pictures(episode):
    for blocks in episode.media:
        for block in blocks:
            yield from [block["image"]] if block["type"] == "image" else block["video"]


def digests(split="test", seed=0, count=COUNT):
    texts, pixels = hashlib.sha256(), hashlib.sha256()
    for task in judge.TASKS:
        for index in range(count):
            episode = judge.episode_of(task, split, seed, index)
            texts.update(repr(episode.turns).encode())
            for picture in pictures(episode):
                pixels.update(repr(picture.size).encode() + picture.tobytes())
    return texts.hexdigest(), pixels.hexdigest()


def test_the_test_split_is_frozen():
    texts, pixels = digests()
    assert texts == FROZEN_TEXTS
    if (PIL.__version__, features.version("freetype2"), matplotlib.__version__) == FROZEN_WITH:
        assert pixels == FROZEN_PIXELS


def test_same_seed_same_bytes_and_another_seed_others():
    assert digests(count=3) == digests(count=3)
    assert digests(count=3)[0] != digests(count=3, seed=1)[0]
    assert digests(count=3)[1] != digests(count=3, seed=1)[1]


def test_lexicon_is_large_and_never_trained_on():
    assert len(set(LEXICON)) >= 500
    assert {split_of(text) for text in LEXICON} == {"test"}
    rng = random.Random(0)
    for split in ("train", "validation"):
        assert not {vocabulary.draw_string(rng, split) for _ in range(3000)} & set(LEXICON)
        names = {name for _ in range(500) for name in vocabulary.draw_names(rng, split, 4)}
        assert {split_of(name) for name in names} == {split}
    assert {vocabulary.draw_string(rng, "test") for _ in range(3000)} <= set(LEXICON)


def test_lexicon_has_words_and_numbers_of_all_lengths():
    assert {len(text) for text in LEXICON if text.isalpha()} == {3, 4, 5, 6}
    assert {len(text) for text in LEXICON if text.isdigit()} == {2, 3, 4}


def test_fonts_are_several_and_draw_differently():
    masks = {bytes(font(name, 20).getmask("Rag70")) for name in NAMES}
    assert len(masks) == len(NAMES) >= 3


@pytest.mark.parametrize("task", judge.TASKS)
def test_what_is_held_out_is_seen_in_the_test_only(task):
    def seen(split):
        turns = [turn for index in range(150) for turn in judge.episode_of(task, split, 0, index).turns]
        return {tag for turn in turns for tag in turn.held_out}, [turn.question for turn in turns]

    tags, _ = seen("test")
    for split in ("train", "validation"):
        own_tags, own_questions = seen(split)
        assert not own_tags
        names = [" ".join(pair) for pair in HELD_OUT_PAIRS]
        assert not [question for question in own_questions if any(name in question for name in names)]
    if task.startswith(("naming", "yes_no", "count", "compare", "direction", "order", "fewshot")):
        assert {"pair", "phrasing"} <= tags
    else:
        assert "phrasing" in tags
    if task in ("read", "tiles"):
        assert "string" in tags


def test_held_out_things_are_not_drawn_in_training():
    import scenes

    rng = random.Random(0)
    for _ in range(300):
        things = scenes.draw_scene(rng, "train", 3)
        things += scenes.counted_scene(rng, scenes.draw_counts(rng, "train", "circle", 5))
        assert not {(thing.colour, thing.shape) for thing in things} & HELD_OUT_PAIRS


def test_receipts_have_three_items_and_belong_to_one_split():
    import reading

    rng = random.Random(0)
    receipts = {
        split: {repr(sorted(reading.draw_items(rng, split))) for _ in range(300)} for split in vocabulary.SPLITS
    }
    assert not receipts["train"] & receipts["test"] and not receipts["validation"] & receipts["test"]
    assert min(text.count("(") for text in receipts["test"]) == 3


def test_sums_of_the_test_are_not_trained():
    import language

    rng = random.Random(0)
    asked = {
        split: {tuple(sorted(judge.numbers(language.sum_turn(rng, split).question))) for _ in range(500)}
        for split in ("train", "test")
    }
    ordered = {split: {language.sum_turn(rng, split).question.replace("?", "") for _ in range(500)} for split in asked}
    assert asked["train"] and not ordered["train"] & ordered["test"]


@pytest.mark.parametrize(
    "check, expected, right, wrong",
    [
        (
            "words",
            "red circle",
            ["Red circle.", "It is a RED circle!", "a red circle", "The picture shows a red circle."],
            [
                "red",
                "circle",
                "blue circle",
                "red circle blue square",
                "red square",
                "circle red",
                "",
                "reddish circle",
            ],
        ),
        ("words", "KLOP", ["klop", 'The word is "KLOP".', "KLOP"], ["KLO", "KLOPS", "KLOP KLOP", "K L O P", "CLOP"]),
        ("words", "HAS", ["HAS", "It is HAS."], ["MOH", "", "it"]),
        ("words", "TEN", ["Ten"], ["10"]),
        ("words", "first", ["the first picture", "First."], ["second", "first or second", "the second"]),
        ("yes_no", "yes", ["Yes.", "yes, there is", "YES"], ["no", "no, yes", "yes and no", "", "maybe yes"]),
        ("yes_no", "no", ["No", "no, it is not there"], ["yes", "nothing", "not"]),
        ("number", "3", ["3", "Three.", "There are 3 circles."], ["4", "13", "3 or 4", "30", "", "three 4"]),
        (
            "last_number",
            "tea 4 = 4, milk 7 = 11. Total 11",
            ["11", "4 + 7 = 11", "Total: 11."],
            ["4", "11, no, 12", "total 111", "", "1 1"],
        ),
    ],
)
def test_checkers_tell_right_from_wrong(check, expected, right, wrong):
    episode = Episode("any", (Turn("?", expected, check),))
    assert [answer for answer in right if not judge.is_right(episode, answer)] == []
    assert [answer for answer in wrong if judge.is_right(episode, answer)] == []


@pytest.mark.parametrize("trial", judge.TRIALS)
def test_reference_answers_are_right_and_chances_make_sense(trial):
    for episode in judge.TRIALS[trial].episodes(20):
        assert judge.is_right(episode, episode.target.answer)
        assert 0 <= episode.target.chance <= 0.5
        assert not judge.is_right(episode, "nonsense")


def test_swapped_pictures_swap_the_answer():
    for plain, other in zip(judge.TRIALS["compare"].episodes(10), judge.TRIALS["compare_swapped"].episodes(10)):
        assert list(pictures(other)) == list(pictures(plain))[::-1]
        assert {plain.target.answer, other.target.answer} == {"first", "second"}
        assert plain.target.question == other.target.question


def test_answers_are_balanced():
    answers = [episode.target.answer for episode in judge.TRIALS["count"].episodes(400)]
    assert set(answers) == {str(number) for number in range(10)}
    assert max(map(answers.count, set(answers))) < 70
    for task, options in (("yes_no", 2), ("compare", 2), ("flashes", 3)):
        answers = [episode.target.answer for episode in judge.TRIALS[task].episodes(400)]
        assert all(abs(answers.count(answer) / 400 - 1 / options) < 0.08 for answer in set(answers))


@pytest.mark.parametrize("task", ["direction", "order", "flashes"])
def test_shuffled_clips_keep_their_frames(task):
    plain = next(judge.TRIALS[task].episodes(1))
    other = next(judge.TRIALS[f"{task}_shuffled"].episodes(1))
    one, two = ([frame.tobytes() for frame in pictures(episode)] for episode in (plain, other))
    assert one != two and sorted(one) == sorted(two) and len(one) == clips.FRAMES
    assert plain.target == other.target


def test_the_lamp_is_on_equally_long_whatever_the_count():
    rng = random.Random(0)
    for flashes in (1, 2, 3):
        patterns = [clips.flash_pattern(rng, flashes) for _ in range(50)]
        assert {sum(pattern) for pattern in patterns} == {clips.LIT_STEPS}


def test_wilson_intervals():
    assert judge.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert judge.wilson(0, 10)[0] == 0 and judge.wilson(10, 10)[1] == 1
    assert 0 < judge.wilson(0, 10)[1] < judge.wilson(0, 5)[1] < 1
    with pytest.raises(ValueError, match="total"):
        judge.wilson(1, 0)
