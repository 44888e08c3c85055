"""Clock: read the time from a drawn clock with two hands. One of them:

    question  What time does the clock show? Answer as H:MM.
    answer    4:37

Accuracy counts the exact minute; a reward falls with the distance on the dial, so that a near miss
is worth more than a guess. Times, not pictures, are split: a minute of the test never occurs in
training, however the clock is drawn. There are 720 times, so that guessing is right in 0.14 %.
"""

import math
import random
import re
from dataclasses import dataclass

from PIL import Image, ImageDraw

from evaluator import extract_answer, soft_format, strict_format, tag_count
from rldatasets import Problem, is_held_out

SIZES = {"train": 4096, "test": 1024}
SIDE = 224  # pixels
TIMES = 12 * 60  # minutes around the dial
TIME = re.compile(r"([0-9]{1,2})\s?[:.]\s?([0-9]{2})")
QUESTION = "What time does the clock show? Answer as H:MM."
NEAR = 30  # minutes by which an answer may be off and still earn something


@dataclass(frozen=True)
class Clock:
    """A time in minutes from 12:00, and the seed of all that does not matter; calling it draws."""

    minutes: int
    seed: int
    size = (SIDE, SIDE)

    def __call__(self):
        rng = random.Random(self.seed)
        image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(190, 255) for _ in range(3)))
        pen, ink = ImageDraw.Draw(image), tuple(rng.randint(0, 90) for _ in range(3))
        radius = SIDE * rng.uniform(0.36, 0.47)
        x, y = (SIDE / 2 + rng.uniform(-1, 1) * (SIDE / 2 - radius - 2) for _ in range(2))

        def at(turn, length):
            """A point at this share of a turn from the top, and of the radius from the middle."""
            angle = 2 * math.pi * turn
            return x + radius * length * math.sin(angle), y - radius * length * math.cos(angle)

        dial = tuple(rng.randint(235, 255) for _ in range(3))
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], dial, ink, rng.randint(2, 4))
        for tick in range(60):
            inner = 0.86 if tick % 5 == 0 else 0.94
            width = 3 if tick % 5 == 0 else 1
            pen.line([at(tick / 60, inner), at(tick / 60, 0.98)], ink, width)
        for hour in range(1, 13):
            pen.text(at(hour / 12, 0.74), str(hour), ink, anchor="mm")
        pen.line([(x, y), at(self.minutes / TIMES, rng.uniform(0.42, 0.52))], ink, 6)
        pen.line([(x, y), at(self.minutes % 60 / 60, rng.uniform(0.72, 0.84))], ink, 3)
        return image


def problems(split, seed):
    """Clocks whose times are in this split alone, again and again as other pictures."""
    rng = random.Random("test" if split == "test" else seed)
    times = [time for time in range(TIMES) if is_held_out(_written(time)) == (split == "test")]
    drawn = (Clock(rng.choice(times), rng.getrandbits(32)) for _ in range(SIZES[split]))
    return [Problem(QUESTION, _written(clock.minutes), "", {}, (clock,)) for clock in drawn]


def _written(minutes):
    return f"{minutes // 60 or 12}:{minutes % 60:02d}"


def minutes_of(text):
    """A time as minutes from 12:00, 0 to 719; None where the text is none."""
    found = TIME.fullmatch((text or "").strip())
    if not found or not (hour := int(found[1])) <= 12 or not (minute := int(found[2])) < 60:
        return None
    return None if hour == 0 else hour % 12 * 60 + minute


def distance(completion, problem):
    """Minutes between the answer and the time, the shorter way round; None without an answer."""
    answered = minutes_of(extract_answer(completion))
    if answered is None:
        return None
    apart = abs(answered - minutes_of(problem.answer))
    return min(apart, TIMES - apart)


def is_correct(completion, problem):
    """Whether the answer in the tags is the time, to the minute."""
    return distance(completion, problem) == 0


def correctness(completion, problem):
    """2.0 for the exact minute, else 0."""
    return 2.0 if is_correct(completion, problem) else 0.0


def nearness(completion, problem):
    """1.0 for the exact minute, falling in a straight line to 0 at NEAR minutes' distance."""
    apart = distance(completion, problem)
    return 0.0 if apart is None else max(0.0, 1 - apart / NEAR)


REWARD_FUNCTIONS = [correctness, nearness, strict_format, soft_format, tag_count]
