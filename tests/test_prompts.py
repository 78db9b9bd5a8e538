"""View words against a table of cameras."""

import time

import pytest
import torch

from sds3d.cameras import Cameras, orbit
from sds3d.prompts import (
    VIEW_WORDS,
    named_view,
    view_blend,
    view_negatives,
    view_word,
    warn_of_weights,
    weighted,
    with_view,
    words,
)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "word"),
    [
        (0, 0, "front view"),
        (45, 0, "front view"),
        (-45, 20, "front view"),
        (315, 0, "front view"),
        (46, 0, "side view"),
        (90, -20, "side view"),
        (-90, 0, "side view"),
        (270, 0, "side view"),
        (134, 0, "side view"),
        (135, 0, "back view"),
        (180, 60, "back view"),
        (-180, 0, "back view"),
        (225, 0, "back view"),
        (226, 0, "side view"),
        (720, 0, "front view"),
        (0, 61, "overhead view"),
        (180, 90, "overhead view"),
    ],
)
def test_view_word(azimuth, elevation, word):
    assert view_word(azimuth, elevation) == word
    assert word in VIEW_WORDS


def test_with_view():
    cameras = orbit(4)
    words = ["front view", "side view", "back view", "side view"]
    assert with_view("a red mug", cameras) == [f"a red mug, {w}" for w in words]
    assert with_view(["a cat", "", "a dog", "a cow"], cameras) == [
        "a cat, front view",
        "",
        "a dog, back view",
        "a cow, side view",
    ]


def test_the_word_names_the_side_the_camera_stands_on():
    """The front faces +z: a camera in front has the largest z, whatever the turn."""
    azimuth = torch.arange(-360.0, 720.0, 10.0)
    same = torch.full_like(azimuth, 3.0)
    cameras = Cameras(azimuth, torch.zeros_like(azimuth), same, same * 10)
    for (x, _, z), prompt in zip(cameras.positions().tolist(), with_view("a car", cameras), strict=True):
        if z > abs(x) + 1e-3:
            assert prompt.endswith("front view")
        elif z < -abs(x) - 1e-3:
            assert prompt.endswith("back view")
        elif abs(x) > abs(z) + 1e-3:
            assert prompt.endswith("side view")


def test_view_words_are_avoided_the_more_the_farther_they_are():
    for azimuth in (0, 30, 90, 135, 180, 200, 270, 359, -90, 720):
        away = min(azimuth % 360, 360 - azimuth % 360)
        weights = view_negatives(azimuth, 60)
        assert weights["front view"] == pytest.approx(away / 180) and 0 <= min(weights.values())
        assert weights["back view"] == pytest.approx(1 - weights["front view"])
        assert weights["side view"] == pytest.approx(abs(away - 90) / 90)
    assert view_negatives(0, 0) == {"front view": 0, "side view": 1, "back view": 1}
    assert view_negatives(90, 0)["side view"] == 0
    assert all(set(view_negatives(azimuth, 61).values()) == {0} for azimuth in range(-180, 180, 30))


def test_view_blend_is_smooth_and_agrees_with_the_words():
    for elevation in range(-90, 91, 10):
        shares = [view_blend(azimuth, elevation) for azimuth in range(-180, 540)]
        for azimuth, (share, after) in enumerate(zip(shares, shares[1:]), start=-180):
            assert tuple(share) == VIEW_WORDS and min(share.values()) >= 0
            assert sum(share.values()) == pytest.approx(1)
            assert max(abs(share[v] - after[v]) for v in VIEW_WORDS) <= 1 / 90 + 1e-9
            assert share == view_blend(-azimuth, elevation)
            if (azimuth - 45) % 90 and elevation != 60:  # at the turning points two views share
                assert max(share, key=share.get) == view_word(azimuth, elevation)


@pytest.mark.parametrize(
    ("prompt", "found"),
    {
        "A red mug,  with a (white) handle!": "a red mug with a white handle",
        "digit 3": "digit 3",
        "don't co-op a_b": "don t co op a b",
        "a red mug 红色 №7": "a red mug 红 色 № 7",
        "красная Кружка": "красная кружка",
        "Straße": "strasse",
        "e\u0301te\u0301": "\xe9t\xe9",  # composed
        "हिन्दी में कप": "हिन्दी में कप",  # whose vowels are marks
        "مِيم": "مِيم",
        "한국어 컵": "한국어 컵",
        "赤いコップ": "赤 い コ ッ プ",
        "1.5 cm, 3d v2, 1,000.": "1.5 cm 3d v2 1,000",
        "salt & pepper, 100 %": "salt & pepper 100 %",
        "\ufeffa soft\xadhyphen": "a softhyphen",
        "❤\ufe0f mug": "❤\ufe0f mug",
        "..., ()": "",
    }.items(),
)
def test_words_are_letters_and_digits_of_any_script(prompt, found):
    assert " ".join(words(prompt)) == found


@pytest.mark.parametrize(
    ("prompt", "piece"),
    {
        "a (red:1.3) mug": "(red:1.3)",
        "a ((red)) mug": "((red))",
        "[deformed], blurry": "[deformed]",
        "a (red)1.3 mug": "(red)1.3",
        "a red++ mug": "red++",
        "a mug (small), 3:4": "",
        "(a mug: red), well-made": "",
    }.items(),
)
def test_what_looks_like_a_weight(prompt, piece, recwarn):
    assert weighted(prompt) == piece
    warn_of_weights(prompt)
    assert [str(w.message).startswith(f"{piece!r} looks like a weighted word") for w in recwarn] == [True] * bool(piece)


@pytest.mark.parametrize(
    ("prompt", "view"),
    {
        "a mug, side view": "side view",
        "A mug, Side-View, a photo": "side view",
        "a mug in side view": "side view",
        "side view": "side view",
        "a side view of a car": "side view",
        "overhead view of a mug": "overhead view",
        "a red mug front view on a blue background": "front view",
        "a mug. Back view.": "back view",
        "a car with side view mirrors": "",
        "a side view mirror": "",
        "a postcard with a front view of a castle": "",
        "an inside view": "",
        "a mug": "",
    }.items(),
)
def test_a_view_is_named_at_the_end_of_a_part_or_before_of(prompt, view):
    assert named_view(prompt) == view


@pytest.mark.parametrize("character", ["a", "(", "[", "((", "+", "(a:", "a-", "-"])
def test_a_long_text_takes_no_longer_than_its_length(character):
    begun = time.process_time()
    weighted(character * 100_000)
    assert time.process_time() - begun < 10  # it took minutes, in proportion to the square
