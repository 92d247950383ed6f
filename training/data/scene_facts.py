"""What a generated scene shows, decided before anything is drawn: the words for it, and where things stand.

All lengths are shares of the picture's side, so that one set of facts can be drawn at any size.
"""

from dataclasses import dataclass, replace
from random import Random
from typing import Literal

SceneKind = Literal[
    "shapes", "count", "position", "size", "word", "digits", "chart", "small word", "small shape", "page"
]
# Reading is the slowest to learn at 160 pixels and helps least with photographs, so it gets the smaller shares.
# Small words and shapes are drawn where they are asked for and nowhere else: 160 pixels hardly show them. So are pages.
KIND_WEIGHTS: dict[SceneKind, int] = {
    "shapes": 20,
    "count": 22,
    "position": 20,
    "size": 12,
    "word": 9,
    "digits": 7,
    "chart": 10,
}
SCENE_KINDS: tuple[SceneKind, ...] = tuple(KIND_WEIGHTS)  # those that a seed may have by itself

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLOURS = {
    "red": (220, 25, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "yellow": (250, 220, 25),
    "orange": (250, 130, 10),
    "purple": (125, 35, 165),
    "pink": (250, 125, 190),
    "brown": (120, 70, 30),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "grey": (128, 128, 128),
}
BACKGROUNDS = {
    "white": (249, 249, 249),
    "black": (14, 14, 14),
    "light grey": (212, 212, 212),
    "dark grey": (62, 62, 64),
    "light blue": (200, 224, 248),
    "light green": (208, 242, 208),
    "light yellow": (252, 244, 200),
    "light pink": (252, 220, 232),
    "dark blue": (18, 26, 84),
    "dark green": (12, 62, 34),
}
# Object colours that a person could overlook or misname on that background.
TOO_CLOSE = {
    "white": ("white",),
    "black": ("black",),
    "light grey": ("white", "grey"),
    "dark grey": ("black", "grey", "brown"),
    "light blue": ("white", "grey"),
    "light green": ("white",),
    "light yellow": ("white", "yellow"),
    "light pink": ("white", "pink"),
    "dark blue": ("black", "blue", "purple"),
    "dark green": ("black", "green", "brown"),
}
# A ring is a circle to some people and a diamond a turned square, so the two never meet in one scene or question.
LOOKALIKE = {"circle": "ring", "ring": "circle", "square": "diamond", "diamond": "square"}

WORDS = """
    no go up sun sky sea cat dog cow pig hen bee ant fox car bus bed hat cup map key red one two box egg
    tree fish bird milk book door fire rain snow star moon king ball cake hand foot lion bear wolf goat
    ship road apple bread chair house horse table water green music river plant happy beach school
    garden window
""".split()  # noqa: SIM905, a list literal of these takes 64 lines

SMALL_WORDS = ("fish", "bird", "bear", "lion", "wolf", "goat")  # of one length: how long it is tells no word
SMALL_TEXT = 0.07  # letters of 22 pixels in 320, and of 11 in 160
PAGE_TEXT = 2 * SMALL_TEXT  # what a tile, a quarter of the picture, shows of a small word
SMALL_SHAPE = (0.085, 0.1)  # of 27 to 32 pixels in 320, as the smallest of other scenes in 160

Place = Literal["", "left", "right", "top", "bottom", "middle", "top left", "top right", "bottom left", "bottom right"]
CENTRES: dict[Place, tuple[float, float]] = {
    "left": (0.2, 0.5),
    "right": (0.8, 0.5),
    "top": (0.5, 0.2),
    "bottom": (0.5, 0.8),
    "middle": (0.5, 0.5),
    "top left": (0.2, 0.2),
    "top right": (0.8, 0.2),
    "bottom left": (0.2, 0.8),
    "bottom right": (0.8, 0.8),
}
CORNERS: tuple[Place, ...] = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Item:
    """One drawn shape. `x`, `y` (its centre) and `diameter` are shares of the side; `tilt` is in degrees.

    `place` is set only where the object stands clearly in that part of the picture, `size` only where large and
    small differ by 1.8 times or more.
    """

    shape: str
    colour: str
    x: float = 0.5
    y: float = 0.5
    diameter: float = 0.3
    tilt: float = 0.0
    place: Place = ""
    size: Literal["", "large", "small"] = ""


@dataclass(frozen=True)
class Written:
    """One of several words, somewhere in the corner that `place` names."""

    word: str
    colour: str
    place: Place


@dataclass(frozen=True)
class Facts:
    """Everything that a scene's picture, captions and questions are made from.

    `text` is a word or a number, drawn in `text_colour`, in capitals if `capitals`, and as high as `text_height` says
    or, where it is 0, as large as fits. `page` are several words, all as high as `text_height` says. `bars` are
    (colour, height), from left to right.
    """

    kind: SceneKind
    background: str
    items: tuple[Item, ...] = ()
    text: str = ""
    text_colour: str = ""
    capitals: bool = False
    text_height: float = 0.0
    page: tuple[Written, ...] = ()
    bars: tuple[tuple[str, int], ...] = ()


def decide(kind: SceneKind, random: Random) -> Facts:
    """Draws the facts of one scene of `kind`."""
    background = random.choice(list(BACKGROUNDS)) if random.random() < 0.7 else "white"
    colours = [colour for colour in COLOURS if colour not in TOO_CLOSE[background]]
    if kind == "word":
        return Facts(kind, background, (), random.choice(WORDS), random.choice(colours), capitals=random.random() < 0.3)
    if kind == "small word":
        word, colour = random.choice(SMALL_WORDS), random.choice(colours)
        return Facts(kind, background, (), word, colour, text_height=SMALL_TEXT)
    if kind == "page":
        page = (Written(random.choice(SMALL_WORDS), random.choice(colours), corner) for corner in CORNERS)
        return Facts(kind, background, page=tuple(page), text_height=PAGE_TEXT)
    if kind == "small shape":
        small = Item(random.choice(SHAPES), random.choice(colours), diameter=random.uniform(*SMALL_SHAPE))
        return Facts(kind, background, tuple(_scatter([small], random)))
    if kind == "digits":
        low, high = random.choice(((0, 9), (10, 99), (100, 999)))
        return Facts(kind, background, (), str(random.randint(low, high)), random.choice(colours))
    if kind == "chart":
        vivid = [colour for colour in colours if colour not in ("black", "white", "grey")]
        number = random.randint(2, 4)
        heights = random.sample(range(1, 6), number)
        return Facts(kind, background, bars=tuple(zip(random.sample(vivid, number), heights, strict=True)))
    arrange = {"shapes": _shapes, "count": _count, "position": _position, "size": _size}[kind]
    items = [replace(item, tilt=random.uniform(-9, 9)) for item in arrange(colours, random)]
    random.shuffle(items)  # the order in which things are mentioned must not tell where they stand
    return Facts(kind, background, tuple(items))


def _different_shapes(number: int, random: Random) -> list[str]:
    """Draws `number` (at most six) shapes, none of which passes for another."""
    chosen: list[str] = []
    for shape in random.sample(SHAPES, len(SHAPES)):
        if LOOKALIKE.get(shape) not in chosen:
            chosen.append(shape)
    return chosen[:number]


def _shapes(colours: list[str], random: Random) -> list[Item]:
    """One to four objects, no two of them with both shape and colour in common."""
    number = random.choices((1, 2, 3, 4), (35, 35, 20, 10))[0]
    shapes = _different_shapes(number, random)
    tints = random.sample(colours, number)
    if number > 1 and random.random() < 0.25:
        if random.random() < 0.5:
            shapes = [shapes[0]] * number
        else:
            tints = [tints[0]] * number
    smallest, largest = {1: (0.3, 0.62), 2: (0.24, 0.4), 3: (0.2, 0.34), 4: (0.19, 0.28)}[number]
    items = [
        Item(shape, tint, diameter=random.uniform(smallest, largest)) for shape, tint in zip(shapes, tints, strict=True)
    ]
    return _scatter(items, random)


def _count(colours: list[str], random: Random) -> list[Item]:
    """One to five objects: mostly all alike, else of one shape, of one colour, or one sort among another."""
    number = random.choices((1, 2, 3, 4, 5), (14, 19, 21, 23, 23))[0]  # ones also come from every other kind
    shape, other_shape = _different_shapes(2, random)
    colour, other_colour = random.sample(colours, 2)
    diameter = random.uniform(0.19, {1: 0.3, 2: 0.3, 3: 0.27, 4: 0.25, 5: 0.23}[number])
    mode = random.choices(("alike", "one shape", "one colour", "two sorts"), (55, 15, 10, 20))[0]
    pairs = [(shape, colour)] * number
    if mode == "one shape":
        pairs = [(shape, random.choice(colours)) for _ in range(number)]
    elif mode == "one colour":
        pairs = [(random.choice((shape, other_shape)), colour) for _ in range(number)]
    elif mode == "two sorts" and number > 1:
        others = random.randint(1, number - 1)
        pairs = [(shape, colour)] * (number - others) + [(other_shape, other_colour)] * others
    return _scatter([Item(shape, tint, diameter=diameter) for shape, tint in pairs], random)


def _position(colours: list[str], random: Random) -> list[Item]:
    """One object in a clear part of the picture, or two or three in a row or a column."""
    number = random.choices((1, 2, 3), (45, 40, 15))[0]
    line: tuple[Place, Place, Place] = ("left", "middle", "right")
    if random.random() < 0.5:
        line = ("top", "middle", "bottom")
    places: list[Place]
    if number == 1:
        corner = random.random() < 0.2
        places = [random.choice([place for place in CENTRES if (" " in place) == corner])]
    else:
        places = list(line) if number == 3 else [line[0], line[2]]
    shapes, tints = _different_shapes(number, random), random.sample(colours, number)
    stray, largest = (0.02, 0.21) if number == 3 else (0.04, 0.25)  # three in a row must not touch
    items = []
    for place, shape, tint in zip(places, shapes, tints, strict=True):
        x, y = CENTRES[place]
        x, y = x + random.uniform(-stray, stray), y + random.uniform(-stray, stray)
        items.append(Item(shape, tint, x, y, random.uniform(0.19, largest), place=place))
    return items


def _size(colours: list[str], random: Random) -> list[Item]:
    """One large and one small object; shape or colour may be shared, never both."""
    shapes, tints = _different_shapes(2, random), random.sample(colours, 2)
    if random.random() < 0.25:
        shapes = [shapes[0]] * 2
    large = Item(shapes[0], tints[0], diameter=random.uniform(0.4, 0.5), size="large")
    small = Item(shapes[1], tints[1], diameter=random.uniform(0.17, 0.21), size="small")
    return _scatter([large, small], random)


def _scatter(items: list[Item], random: Random) -> list[Item]:
    """Gives every item a place inside the picture with a gap to all others.

    Starts over when a draw leaves no room; every arrangement asked for above fits within a few attempts.
    """
    while True:
        placed: list[Item] = []
        for item in sorted(items, key=lambda item: -item.diameter):
            # A tilted square reaches out by up to 1.15 of its half side.
            margin = item.diameter * 0.58 + 0.02
            for _ in range(30):
                x, y = random.uniform(margin, 1 - margin), random.uniform(margin, 1 - margin)
                if all(_apart(x, y, item.diameter, other) for other in placed):
                    placed.append(replace(item, x=x, y=y))
                    break
        if len(placed) == len(items):
            return placed


def _apart(x: float, y: float, diameter: float, other: Item) -> bool:
    """Whether bounding boxes around the two, tilted a little, leave at least 3 % of the side between them."""
    reach = (diameter + other.diameter) * 0.58 + 0.03
    return max(abs(x - other.x), abs(y - other.y)) >= reach
