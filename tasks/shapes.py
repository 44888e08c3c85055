"""Shapes: what is to be seen in a drawn picture of up to six of them.

A scene is a grid of three columns and two rows whose cells are empty or hold a shape of one kind
and colour; sizes, places inside the cells, shades and the background vary from picture to picture.
One of each variant:

    --dataset_name shapes/count      How many stars are there?                                   2
    --dataset_name shapes/colour     Which colour is the circle?                               red
    --dataset_name shapes/position   Which kind of shape is right of the blue square?       circle

Scenes, not pictures, are split: no scene of the test occurs in training, however it is drawn. The
answers to one kind of question are about equally frequent, so that one who does not look is right
in a third of the cases at most. The worked solution of a colour is one sentence: which it is has to
be looked up in the picture, and that is what reward teaches. Those of count and position read the
scene row by row first.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from evaluator import correctness, soft_format, strict_format, tag_count
from rldatasets import Problem, is_held_out

REWARD_FUNCTIONS = [correctness, strict_format, soft_format, tag_count]
VARIANTS = ("count", "colour", "position")
SIZES = {"train": 4096, "test": 1024}
SIDE, COLUMNS, ROWS = 128, 3, 2  # pixels, cells
KINDS = ("circle", "square", "triangle", "star")
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220),
           "yellow": (235, 205, 50)}  # fmt: skip
FEWEST = 3  # shapes; the most is a full grid
MOST_COUNTED = 4
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
# A star's points, and those between them, on two circles around its middle.
STAR = [((0.45 if i % 2 else 1.0), i) for i in range(10)]


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and the seed of all that does not matter: calling it draws the picture.

    cells: row by row, (colour, kind) or None.
    """

    cells: tuple
    seed: int
    size = (SIDE, SIDE)

    def __call__(self):
        rng = random.Random(self.seed)
        background = tuple(rng.randint(225, 255) for _ in range(3))
        image = Image.new("RGB", (SIDE, SIDE), background)
        pen, width, height = ImageDraw.Draw(image), SIDE / COLUMNS, SIDE / ROWS
        for number, cell in enumerate(self.cells):
            if cell is None:
                continue
            colour, kind = cell
            radius = rng.uniform(0.3, 0.44) * width
            x = width * (number % COLUMNS + 0.5) + rng.uniform(-0.06, 0.06) * width
            y = height * (number // COLUMNS + 0.5) + rng.uniform(-0.12, 0.12) * height
            shade = tuple(min(255, max(0, v + rng.randint(-20, 20))) for v in COLOURS[colour])
            _draw(pen, kind, x, y, radius, shade)
        return image

    def rows(self):
        """The shapes as they are read: ROWS lists of (colour, kind)."""
        rows = (self.cells[row * COLUMNS : (row + 1) * COLUMNS] for row in range(ROWS))
        return [[cell for cell in row if cell] for row in rows]


def _draw(pen, kind, x, y, r, fill):
    if kind == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif kind == "square":
        r *= 0.88
        pen.rectangle([x - r, y - r, x + r, y + r], fill=fill)
    elif kind == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=fill)
    else:
        turn = complex(0, 1) ** 0.4  # a tenth of a circle
        points = [reach * r * complex(0, -1) * turn**i for reach, i in STAR]
        pen.polygon([(x + point.real, y + point.imag) for point in points], fill=fill)


def random_scene(rng):
    """A scene of FEWEST shapes or more."""
    count = rng.randint(FEWEST, ROWS * COLUMNS)
    filled = set(rng.sample(range(ROWS * COLUMNS), count))
    shapes = ((rng.choice(list(COLOURS)), rng.choice(KINDS)) for _ in filled)
    cells = tuple(next(shapes) if cell in filled else None for cell in range(ROWS * COLUMNS))
    return Scene(cells, rng.getrandbits(32))


def in_words(scene, with_colours=True):
    """The scene, a line for each row: "red circle, blue square"."""
    names = ([f"{c} {k}" if with_colours else k for c, k in row] for row in scene.rows())
    return "\n".join(", ".join(row) or "nothing" for row in names)


# --- questions -----------------------------------------------------------------------------------


def problems(split, seed, variant):
    """Distinct scenes, each with one question of this variant; the test split is the same for every
    seed."""
    rng = random.Random(f"test {variant}" if split == "test" else f"{seed} {variant}")
    found = {}
    while len(found) < SIZES[split]:
        problem = ASK[variant](rng)
        if problem is None:
            continue
        [scene] = problem.images
        if is_held_out(repr(scene.cells)) == (split == "test"):
            found.setdefault((problem.question, scene.cells), problem)
    return list(found.values())


def _count(rng):
    """The number is drawn first, and the scene until it fits: each is as likely as any other."""
    kind, count = rng.choice(KINDS), rng.randint(1, MOST_COUNTED)
    while True:
        scene = random_scene(rng)
        kinds = [cell[1] for cell in scene.cells if cell]
        if kinds.count(kind) == count:
            question = f"How many {kind}s are there?"
            worked = f"{in_words(scene, with_colours=False)}\nThe number of {kind}s is {count}."
            return Problem(question, str(count), worked, {}, (scene,))


def _colour(rng):
    """Of a kind that is there once."""
    scene = random_scene(rng)
    kinds = [cell[1] for cell in scene.cells if cell]
    single = [cell for cell in scene.cells if cell and kinds.count(cell[1]) == 1]
    if not single:
        return None
    colour, kind = rng.choice(single)
    worked = f"The {kind} is {colour}."
    return Problem(f"Which colour is the {kind}?", colour, worked, {}, (scene,))


def _position(rng):
    """Of a shape that looks as no other does."""
    scene, (side, (down, right)) = random_scene(rng), rng.choice(list(SIDES.items()))
    number = rng.randrange(ROWS * COLUMNS)
    row, column = number // COLUMNS + down, number % COLUMNS + right
    shape = scene.cells[number]
    if shape is None or scene.cells.count(shape) > 1:
        return None
    if not (0 <= row < ROWS and 0 <= column < COLUMNS):
        return None
    beside = scene.cells[row * COLUMNS + column]
    if beside is None:
        return None
    question = f"Which kind of shape is {side} the {' '.join(shape)}?"
    worked = f"{in_words(scene)}\nWhat is {side} it is a {beside[1]}."
    return Problem(question, beside[1], worked, {}, (scene,))


ASK = {"count": _count, "colour": _colour, "position": _position}
