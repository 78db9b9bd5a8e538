"""The toybox's 24 kinds and its stacks: the solids of each object, and the colours of its parts.

A part's colour is ``main`` (the colour before the noun: "a red mug"), ``second`` (the colour of a named part: "with a
white handle"), or a fixed colour name. Every object faces +z and fits into a ball of radius 1.05 around the origin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sds3d.data.shapes import (
    Solid,
    above,
    box,
    capsule,
    cylinder,
    ellipsoid,
    frustum,
    intersect,
    roof,
    sphere,
    subtract,
    torus,
    union,
)


@dataclass(frozen=True)
class Kind:
    """One kind of toy.

    Args:
        parts: (solid, colour slot) pairs; where parts overlap, the outermost surface is visible.
        second: the word for the part with the second colour; "" if there is none.
        main_default, second_default: colours that are used if a caption does not name them; a second default of
            "main" is the main colour.
        front: whether the front looks different from the back.
    """

    parts: tuple[tuple[Solid, str], ...]
    second: str = ""
    main_default: str = "red"
    second_default: str = "main"
    front: bool = False


def _four(make: Callable[[float, float], Solid], x: float, z: float) -> Solid:
    """Four copies at (+-x, +-z)."""
    return union(*(make(sx * x, sz * z) for sx in (-1, 1) for sz in (-1, 1)))


def _mug() -> Kind:
    cup = subtract(cylinder((-0.12, 0, 0), 0.5, 0.6), cylinder((-0.12, 0.2, 0), 0.38, 0.62))
    handle = subtract(torus((0.4, 0, 0), 0.3, 0.1, "z"), cylinder((-0.12, 0, 0), 0.44, 0.7))
    return Kind(((cup, "main"), (handle, "second")), "handle", "white", "main", front=True)


def _teapot() -> Kind:
    body = ellipsoid((0, -0.1, 0), (0.5, 0.42, 0.5))
    spout = capsule((0.4, -0.1, 0), (0.76, 0.2, 0), 0.1)
    handle = torus((-0.5, -0.05, 0), 0.24, 0.08, "z")
    lid = union(ellipsoid((0, 0.27, 0), (0.28, 0.12, 0.28)), sphere((0, 0.44, 0), 0.1))
    return Kind(((union(body, spout, handle), "main"), (lid, "second")), "lid", "blue", "white", front=True)


def _snowman() -> Kind:
    body = union(sphere((0, -0.42, 0), 0.4), sphere((0, 0.12, 0), 0.3))
    eyes = union(sphere((-0.1, 0.2, 0.26), 0.055), sphere((0.1, 0.2, 0.26), 0.055))
    nose = capsule((0, 0.1, 0.28), (0, 0.08, 0.46), 0.055)
    hat = union(cylinder((0, 0.4, 0), 0.32, 0.05), cylinder((0, 0.6, 0), 0.21, 0.22))
    return Kind(((body, "main"), (hat, "second"), (eyes, "black"), (nose, "orange")), "hat", "white", "black", True)


def _house() -> Kind:
    walls = box((0, -0.32, 0), (0.5, 0.38, 0.45), 0.01)
    top = intersect(roof((0, 0.04, 0), 0.64, 0.55, 0.54), above(0.04))
    door = box((0, -0.42, 0.45), (0.14, 0.27, 0.04), 0.01)
    chimney = box((0.32, 0.42, -0.15), (0.09, 0.22, 0.09), 0.01)
    return Kind(((walls, "main"), (top, "second"), (door, "brown"), (chimney, "grey")), "roof", "yellow", "red", True)


def _chair() -> Kind:
    seat = box((0, -0.12, 0), (0.45, 0.09, 0.45))
    legs = _four(lambda x, z: box((x, -0.48, z), (0.09, 0.34, 0.09)), 0.35, 0.35)
    back = box((0, 0.36, -0.36), (0.45, 0.44, 0.09))
    return Kind(((union(seat, legs), "main"), (back, "second")), "back", "brown", "main", front=True)


def _table() -> Kind:
    top = box((0, 0.3, 0), (0.68, 0.09, 0.5))
    legs = _four(lambda x, z: box((x, -0.2, z), (0.09, 0.42, 0.09)), 0.55, 0.37)
    return Kind(((top, "main"), (legs, "second")), "legs", "brown", "main")


def _car() -> Kind:
    body = box((0, -0.15, 0), (0.36, 0.2, 0.78), 0.08)
    cabin = box((0, 0.16, -0.1), (0.3, 0.2, 0.38), 0.08)
    wheels = _four(lambda x, z: cylinder((x, -0.34, z), 0.19, 0.08, "x"), 0.34, 0.45)
    lights = union(sphere((-0.22, -0.12, 0.76), 0.08), sphere((0.22, -0.12, 0.76), 0.08))
    parts = ((body, "main"), (cabin, "second"), (wheels, "black"), (lights, "yellow"))
    return Kind(parts, "top", "red", "grey", front=True)


def _truck() -> Kind:
    cab = box((0, -0.02, 0.52), (0.34, 0.34, 0.24), 0.05)
    cargo = box((0, 0.08, -0.28), (0.38, 0.46, 0.5), 0.03)
    wheels = _four(lambda x, z: cylinder((x, -0.42, z), 0.18, 0.08, "x"), 0.32, 0.46)
    window = box((0, 0.1, 0.76), (0.26, 0.12, 0.03), 0.01)
    parts = ((cab, "main"), (cargo, "second"), (wheels, "black"), (window, "cyan"))
    return Kind(parts, "box", "blue", "white", front=True)


def _fish() -> Kind:
    body = ellipsoid((0, 0, 0.12), (0.26, 0.4, 0.6))
    tail = intersect(ellipsoid((0, 0, -0.66), (0.08, 0.42, 0.26)), lambda p: p[:, 2] + 0.42)
    fin = ellipsoid((0, 0.38, 0.05), (0.07, 0.2, 0.26))
    eyes = union(sphere((-0.17, 0.1, 0.48), 0.08), sphere((0.17, 0.1, 0.48), 0.08))
    return Kind(((body, "main"), (union(tail, fin), "second"), (eyes, "black")), "tail", "orange", "main", True)


def _robot() -> Kind:
    body = box((0, -0.1, 0), (0.36, 0.34, 0.26))
    legs = union(box((-0.18, -0.6, 0), (0.12, 0.2, 0.16)), box((0.18, -0.6, 0), (0.12, 0.2, 0.16)))
    arms = union(box((-0.5, -0.08, 0), (0.1, 0.32, 0.12)), box((0.5, -0.08, 0), (0.1, 0.32, 0.12)))
    head = box((0, 0.46, 0), (0.27, 0.22, 0.24))
    eyes = union(sphere((-0.12, 0.5, 0.23), 0.075), sphere((0.12, 0.5, 0.23), 0.075))
    return Kind(((union(body, legs, arms), "main"), (head, "second"), (eyes, "yellow")), "head", "grey", "main", True)


def _rocket() -> Kind:
    body = cylinder((0, -0.1, 0), 0.27, 0.48)
    nose = frustum((0, 0.58, 0), 0.27, 0.03, 0.22)
    fins = union(box((0, -0.52, 0), (0.55, 0.2, 0.06)), box((0, -0.52, 0), (0.06, 0.2, 0.55)))
    window = sphere((0, 0.12, 0.22), 0.12)
    parts = ((body, "main"), (union(nose, fins), "second"), (window, "cyan"))
    return Kind(parts, "nose", "white", "red", front=True)


def _duck() -> Kind:
    body = ellipsoid((0, -0.25, -0.05), (0.4, 0.36, 0.58))
    head = sphere((0, 0.3, 0.3), 0.28)
    beak = ellipsoid((0, 0.24, 0.6), (0.14, 0.07, 0.18))
    eyes = union(sphere((-0.14, 0.4, 0.5), 0.055), sphere((0.14, 0.4, 0.5), 0.055))
    wings = union(ellipsoid((-0.38, -0.18, -0.1), (0.1, 0.2, 0.34)), ellipsoid((0.38, -0.18, -0.1), (0.1, 0.2, 0.34)))
    parts = ((union(body, head), "main"), (wings, "second"), (beak, "orange"), (eyes, "black"))
    return Kind(parts, "wings", "yellow", "main", front=True)


def _boat() -> Kind:
    hull = intersect(ellipsoid((0, -0.2, 0), (0.36, 0.42, 0.8)), lambda p: p[:, 1] + 0.2)
    mast = cylinder((0, 0.25, 0.05), 0.06, 0.5)
    sail = intersect(roof((0, -0.05, 0), 0.6, 0.8, 0.6), box((0, 0.35, -0.28), (0.06, 0.4, 0.3), 0.01))
    return Kind(((hull, "main"), (sail, "second"), (mast, "brown")), "sail", "brown", "white", front=True)


def _mushroom() -> Kind:
    cap = intersect(ellipsoid((0, 0.05, 0), (0.65, 0.55, 0.65)), above(0.05))
    return Kind(((cap, "main"), (cylinder((0, -0.28, 0), 0.22, 0.36), "second")), "stem", "red", "white")


def _tree() -> Kind:
    crown = union(frustum((0, 0.05, 0), 0.56, 0.2, 0.28), frustum((0, 0.5, 0), 0.42, 0.03, 0.3))
    return Kind(((crown, "main"), (cylinder((0, -0.46, 0), 0.16, 0.32), "second")), "trunk", "green", "brown")


def _lamp() -> Kind:
    shade = frustum((0, 0.38, 0), 0.5, 0.28, 0.32)
    stand = union(cylinder((0, -0.2, 0), 0.08, 0.5), cylinder((0, -0.66, 0), 0.36, 0.08))
    return Kind(((shade, "main"), (stand, "second")), "stand", "yellow", "grey")


def _bottle() -> Kind:
    body = union(cylinder((0, -0.25, 0), 0.34, 0.5, rounding=0.1), cylinder((0, 0.35, 0), 0.14, 0.25))
    return Kind(((body, "main"), (cylinder((0, 0.66, 0), 0.18, 0.12), "second")), "cap", "green", "white")


def _hat() -> Kind:
    felt = union(cylinder((0, -0.32, 0), 0.78, 0.07), cylinder((0, 0.08, 0), 0.44, 0.42))
    return Kind(((felt, "main"), (cylinder((0, -0.14, 0), 0.47, 0.11), "second")), "band", "black", "red")


def _cake() -> Kind:
    lower, upper = cylinder((0, -0.35, 0), 0.65, 0.25), cylinder((0, 0.1, 0), 0.42, 0.22)
    candle = cylinder((0, 0.5, 0), 0.07, 0.2)
    return Kind(((lower, "main"), (upper, "second"), (candle, "red")), "top", "pink", "white")


def _donut() -> Kind:
    ring = torus((0, 0, 0), 0.46, 0.24)
    icing = intersect(torus((0, 0.02, 0), 0.46, 0.26), above(0.06))
    return Kind(((ring, "main"), (icing, "second")), "icing", "brown", "pink")


KINDS: dict[str, Kind] = {
    "ball": Kind(((sphere((0, 0, 0), 0.65), "main"),), main_default="red"),
    "cube": Kind(((box((0, 0, 0), (0.5, 0.5, 0.5)), "main"),), main_default="blue"),
    "cylinder": Kind(((cylinder((0, 0, 0), 0.45, 0.62), "main"),), main_default="yellow"),
    "cone": Kind(((frustum((0, -0.02, 0), 0.58, 0.03, 0.65), "main"),), main_default="green"),
    "donut": _donut(),
    "mug": _mug(),
    "teapot": _teapot(),
    "snowman": _snowman(),
    "house": _house(),
    "chair": _chair(),
    "table": _table(),
    "car": _car(),
    "truck": _truck(),
    "fish": _fish(),
    "robot": _robot(),
    "rocket": _rocket(),
    "duck": _duck(),
    "boat": _boat(),
    "mushroom": _mushroom(),
    "tree": _tree(),
    "lamp": _lamp(),
    "bottle": _bottle(),
    "hat": _hat(),
    "cake": _cake(),
}

_TOPS = {
    "cube": box((0, 0.36, 0), (0.34, 0.34, 0.34)),
    "ball": sphere((0, 0.36, 0), 0.36),
    "cone": frustum((0, 0.36, 0), 0.4, 0.03, 0.36),
    "cylinder": cylinder((0, 0.36, 0), 0.32, 0.36),
}
_BOTTOMS = {"cube": box((0, -0.38, 0), (0.4, 0.38, 0.4)), "cylinder": cylinder((0, -0.38, 0), 0.45, 0.38)}

# A stack is written "cube on cylinder": the main colour is the upper solid's, the second the lower one's.
STACKS: dict[str, Kind] = {
    f"{top} on {bottom}": Kind(((upper, "main"), (lower, "second")), bottom, "red", "blue")
    for top, upper in _TOPS.items()
    for bottom, lower in _BOTTOMS.items()
    if top != bottom
}
