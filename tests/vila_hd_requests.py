"""What the tests of VILA-HD ask a model for."""

from conftest import VILA_HD_CASE

CASE = VILA_HD_CASE


def picture(number=0):
    return {"type": "image", "path": str(CASE / f"input_{number}.png")}


def text(content):
    return {"type": "text", "text": content}


def user(*content):
    return {"role": "user", "content": list(content)}


ONE = [user(picture(0), text("what is the color of the big sign?"))]
TWO = [user(picture(0), picture(1), text("what is in the picture?"))]
NONE = [user(text("where does the exit lead to?"))]
