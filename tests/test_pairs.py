"""Pairs of noise and what the teacher makes of it: the right ones, made once, and safe on disk."""

import errno
import json
import random
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sds3d.diffusion.noise import Schedule
from sds3d.diffusion.samplers import Sampler
from sds3d.distill import pairs
from sds3d.distill.regression import Regression
from sds3d.runtime.distributed import Processes
from sds3d.teachers.drawing import draw
from sds3d.teachers.mixture import Mixture, MixtureTeacher

PROMPTS = ("left", "right", "any")
CONFIG = pairs.PairsConfig(count=20, batch=3, sampler="dpm++", steps=4)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """20 pairs are three parts, and no part is a whole number of batches."""
    monkeypatch.setattr(pairs, "PART", 8)


@pytest.fixture(scope="module")
def teacher() -> MixtureTeacher:
    """Two spots, each of 2 x 3 numbers; "left" has the one, "right" the other."""
    means = torch.stack([torch.full((2, 1, 3), v, dtype=torch.float64) for v in (-2.0, 3.0)])
    classes = {"left": [1, 0], "right": [0, 1], "any": [1, 1]}
    return MixtureTeacher(Mixture(torch.ones(2), means, 0.1), classes, kind="v")


def make(teacher, folder: Path, config=CONFIG, prompts=PROMPTS, identity="spots 1", guidance=1.0) -> list[int]:
    return list(pairs.make(teacher, identity, config, prompts, folder, guidance))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pair_is_noise_and_what_the_teacher_draws_of_it(teacher, tmp_path):
    assert make(teacher, tmp_path, guidance=1.5) == [8, 16, 20]
    found = pairs.load(tmp_path, CONFIG)
    assert found.noise.shape == found.x.shape == (20, 2, 1, 3) and set(found.prompts) == set(PROMPTS)
    alone = [
        draw(teacher, noise[None], [prompt], Sampler("dpm++", 4), 1.5)[0]
        for noise, prompt in zip(found.noise, found.prompts)
    ]
    # the same float32 sums in batches of another size
    assert torch.allclose(found.x, torch.stack(alone), atol=1e-5)
    left = torch.tensor([prompt == "left" for prompt in found.prompts])
    assert float(found.x[left].max()) < -1 and len(found.noise.unique()) == found.noise.numel()
    some = found[torch.tensor([7, 2])]
    assert torch.equal(some.x, found.x[[7, 2]]) and some.prompts == [found.prompts[7], found.prompts[2]]


def test_more_pairs_are_added_to_those_that_are_there(teacher, tmp_path):
    make(teacher, tmp_path, replace(CONFIG, count=8))
    first = files(tmp_path)
    more = replace(CONFIG, count=13)
    assert make(teacher, tmp_path, more) == [8, 13]
    assert first.items() <= files(tmp_path).items()
    few, many = (pairs.load(tmp_path, config) for config in (replace(CONFIG, count=8), more))
    assert torch.equal(many.x[:8], few.x) and many.prompts[:8] == few.prompts and len(many.x) == 13


def test_an_interrupted_making_goes_on_to_the_same_bits(teacher, tmp_path):
    make(teacher, tmp_path / "whole")
    begun = pairs.make(teacher, "spots 1", CONFIG, PROMPTS, tmp_path / "parts")
    assert next(begun) == 8
    begun.close()
    assert sorted(files(tmp_path / "parts")) == ["00000.safetensors", "pairs.json"]
    (tmp_path / "parts" / ".00001-x1y2.safetensors").write_bytes(b"what a killed process leaves")
    assert make(teacher, tmp_path / "parts") == [8, 16, 20]
    assert files(tmp_path / "whole").items() <= files(tmp_path / "parts").items()
    assert torch.equal(*(pairs.load(tmp_path / name, CONFIG).x for name in ("whole", "parts")))


def test_what_is_there_is_not_made_again(teacher, tmp_path, monkeypatch):
    make(teacher, tmp_path)
    monkeypatch.setattr(teacher, "predict", None)
    assert make(teacher, tmp_path) == [8, 16, 20]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identity": "spots 2"}, "made with teacher=spots 1, not spots 2"),
        ({"config": replace(CONFIG, sampler="heun")}, r"made with sampler=dpm\+\+, not heun"),
        ({"config": replace(CONFIG, steps=5)}, "made with steps=4, not 5"),
        ({"guidance": 2.0}, "made with guidance=1.0, not 2.0"),
        ({"prompts": ("left",)}, r"made with prompts=\['left', 'right', 'any'\], not \['left'\]"),
    ],
)
def test_a_folder_of_other_pairs_is_refused_with_both_values(teacher, tmp_path, change, words):
    make(teacher, tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"{words}; give another pairs.folder"):
        make(teacher, tmp_path, **change)
    assert files(tmp_path) == before


def test_pairs_of_another_precision_are_refused_with_both(teacher, tmp_path):
    make(teacher, tmp_path)
    assert json.loads((tmp_path / "pairs.json").read_text())["dtype"] == "float64"
    before, other = files(tmp_path), copy(teacher)
    other.dtype = torch.bfloat16
    with pytest.raises(ValueError, match="made with dtype=float64, not bfloat16; give another pairs.folder"):
        make(other, tmp_path)
    assert files(tmp_path) == before


def test_older_pairs_do_not_say_their_precision_and_are_refused(teacher, tmp_path):
    make(teacher, tmp_path)
    told = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps({key: told[key] for key in told if key != "dtype"}))
    before = files(tmp_path)
    with pytest.raises(
        ValueError, match="pairs.json is of an older version and does not say dtype; give another pairs"
    ):
        make(teacher, tmp_path)
    assert files(tmp_path) == before


def test_pairs_on_a_pipeline_s_levels_are_clean(tmp_path):
    """Of one known picture, whatever the noise was; 0.029 of it used to stay."""
    known = Mixture(torch.ones(1), torch.full((1, 2, 1, 3), 0.7, dtype=torch.float64), 0.0)
    for sampler in ("ddim", "heun", "dpm++"):
        make(
            MixtureTeacher(known, schedule=Schedule.linear()),
            tmp_path / sampler,
            replace(CONFIG, sampler=sampler),
            [""],
        )
        assert float((pairs.load(tmp_path / sampler, CONFIG).x - 0.7).abs().max()) < 1e-5


@pytest.mark.parametrize("data", [None, b"{", b"[1]"], ids=["missing", "cut", "other"])
def test_pairs_that_nobody_can_tell_the_origin_of_are_refused(teacher, tmp_path, data):
    make(teacher, tmp_path)
    (tmp_path / "pairs.json").unlink()
    if data is not None:
        (tmp_path / "pairs.json").write_bytes(data)
    for ask in (lambda: make(teacher, tmp_path), lambda: pairs.load(tmp_path, CONFIG)):
        with pytest.raises(ValueError, match="pairs.json is missing or damaged; remove "):
            ask()


def test_a_damaged_part_is_named_and_made_again(teacher, tmp_path):
    make(teacher, tmp_path)
    part = tmp_path / "00001.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="00001.safetensors is damaged; remove it, and it is made again"):
        pairs.load(tmp_path, CONFIG)
    part.unlink()
    with pytest.raises(ValueError, match="holds 16 pairs and 20 are wanted; make them first"):
        pairs.load(tmp_path, CONFIG)  # and does not take the third part for the second
    make(teacher, tmp_path)
    assert part.read_bytes() == whole


def test_every_bit_of_a_part_counts_and_older_parts_load(teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    make(teacher, tmp_path)
    part, good, draws = tmp_path / "00001.safetensors", pairs.load(tmp_path, CONFIG), random.Random(0)
    whole = part.read_bytes()
    for _ in range(200):
        place = draws.randrange(len(whole))
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draws.randrange(8)]) + whole[place + 1 :])
        try:
            found = pairs.load(tmp_path, CONFIG)
        except ValueError as error:
            assert "00001.safetensors is damaged" in str(error) and "remove it, and it is made again" in str(error)
            continue
        assert torch.equal(found.x, good.x) and found.prompts == good.prompts  # of the digest's own name
    save_file(load_file(part.with_name("00000.safetensors")), part.with_name("00000.safetensors"))  # without a digest
    part.write_bytes(whole)
    assert torch.equal(pairs.load(tmp_path, CONFIG).x, good.x)


def test_too_few_pairs_are_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="pairs.count is 10; give at least pairs.batch, 16"):
        pairs.PairsConfig(count=10, batch=16)
    with pytest.raises(ValueError, match="pairs.sampler is 'ddpm', which draws anew each time"):
        pairs.PairsConfig(sampler="ddpm")
    with pytest.raises(ValueError, match="sampler is 'ode'"):
        pairs.PairsConfig(sampler="ode")
    with pytest.raises(ValueError, match="holds 0 pairs and 20 are wanted"):
        pairs.load(tmp_path / "nothing", CONFIG)
    make(teacher, tmp_path)
    with pytest.raises(ValueError, match="holds 24 pairs and 30 are wanted"):
        pairs.load(tmp_path, replace(CONFIG, count=30))


def test_a_full_disk_leaves_what_was_there(teacher, tmp_path, monkeypatch):
    make(teacher, tmp_path, replace(CONFIG, count=8))
    before = files(tmp_path)

    def full(path, data):
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(ValueError, match="cannot write .*00001.safetensors: No space left on device; make room"):
            make(teacher, tmp_path)
    assert files(tmp_path) == before
    assert make(teacher, tmp_path) == [8, 16, 20]


# the regression on them


def numbered(count: int = 6) -> pairs.Pairs:
    """Pair i is told "i"."""
    noise, x = torch.randn((2, count, 2, 1, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pairs.Pairs(noise, x, [str(i) for i in range(count)])


def squares(x, y):
    return (x - y).square().flatten(1).mean(1)


def test_a_regression_is_the_weighted_distance_of_what_the_generator_makes_of_the_noise():
    """Of loss w n mean_B |k z + i - y|^2 / n, n = 6 numbers in a sample, the slope in k is 2 w mean_B <k z + i - y, z>;
    i is in the prompt."""
    made, asked = numbered(), []
    k = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def paint(noise, prompts):
        asked.append(prompts)
        return k * noise + torch.tensor([float(p) for p in prompts], dtype=torch.float64).view(-1, 1, 1, 1)

    said = Regression(made, paint, squares, 0.25, 4).evaluate_without_draw(0, torch.Generator().manual_seed(1))
    said.loss.backward()
    index = [int(p) for p in asked[0]]
    z, y = made.noise[index], made.x[index]
    off = 0.4 * z + torch.tensor(index, dtype=torch.float64).view(-1, 1, 1, 1) - y
    assert len(index) == 4
    assert said.loss.item() == pytest.approx(0.25 * float(off.square().sum()) / 4, rel=1e-12)
    assert float(said.metrics["distance"]) == pytest.approx(float(off.square().mean()), rel=1e-12)
    assert float(k.grad) == pytest.approx(0.25 * 2 * float((off * z).sum()) / 4, rel=1e-12)


def test_a_regression_s_batches_are_drawn_from_all_pairs_and_shared():
    def batches(batch, processes=Processes(), count=150):
        asked, generator = [], torch.Generator().manual_seed(2)

        def paint(noise, prompts):
            asked.append(prompts)
            return noise

        goal = Regression(numbered(), paint, squares, 1.0, batch, processes)
        for step in range(count):
            goal.evaluate_without_draw(step, generator)
        return asked

    whole = batches(4)
    for i in range(6):  # 600 draws of chance 1/6: four standard errors are 37
        assert sum(batch.count(str(i)) for batch in whole) == pytest.approx(100, abs=37)
    halves = (batches(4, Processes(i, 2)) for i in range(2))
    assert [first + second for first, second in zip(*halves)] == whole
    with pytest.raises(ValueError, match="a batch of 5 cannot be shared by 2 processes"):
        batches(5, Processes(0, 2))
