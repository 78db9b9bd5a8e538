"""What a teacher draws by itself, against exact answers."""

import pytest
import torch

from sds3d.cameras import orbit
from sds3d.diffusion.noise import Schedule
from sds3d.diffusion.samplers import SAMPLERS
from sds3d.teachers.drawing import draw, guided_predictor, sample
from sds3d.teachers.mixture import Mixture, MixtureTeacher


@pytest.fixture
def teacher(monkeypatch) -> MixtureTeacher:
    """Two pictures of 3 x 2 x 2, dark and light; ``asked`` holds the prompts, cameras and mask of every call."""
    means = torch.stack([torch.full((3, 2, 2), v, dtype=torch.float64) for v in (-0.5, 0.5)])
    found = MixtureTeacher(
        Mixture(torch.ones(2), means, 0.1), {"dark": [1, 0], "light": [0, 1]}, Schedule.cosine(), "v", pixels=True
    )
    asked, predict = [], found.predict

    def note(x_t, t, prompts, cameras=None, mask=None):
        asked.append((prompts, cameras, mask))
        return predict(x_t, t, prompts, cameras, mask)

    monkeypatch.setattr(found, "predict", note)
    found.asked = asked
    return found


def test_guidance_goes_from_the_null_prompt_past_the_prompt(teacher):
    x = torch.randn((2, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, prompts = torch.tensor([0.3, 0.7], dtype=torch.float64), ["dark", "light"]
    told, null = (teacher.predict(x, t, p) for p in (prompts, ["", ""]))
    teacher.asked.clear()
    answer = guided_predictor(teacher, prompts, 2.5)(x, t)
    assert torch.allclose(answer.eps, null.eps + 2.5 * (told.eps - null.eps), atol=1e-12)
    assert [prompts for prompts, _, _ in teacher.asked] == [["dark", "light", "", ""]]  # one forward for both
    assert torch.equal(guided_predictor(teacher, prompts, 1.0)(x, t).output, told.output)
    assert teacher.asked[-1][0] == prompts  # and at scale 1 nobody asks the null prompt


def test_the_null_prompt_is_told_no_camera(teacher):
    guided_predictor(teacher, ["dark", "light"], 2.0, orbit(2))(torch.zeros(2, 3, 2, 2), torch.tensor([0.3, 0.7]))
    prompts, cameras, mask = teacher.asked[-1]
    assert len(prompts) == len(cameras) == 4 and mask.tolist() == [True, True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_what_the_prompt_says(teacher, name):
    """Each is one of two normal pictures, in [0, 1] at 0.25 and 0.75 with a deviation of 0.05."""
    first_order = name in ("ddim", "ddpm")
    steps, prompts = 100 if first_order else 20, ["dark", "light"] * 50
    images = sample(teacher, prompts, seed=3, guidance=1.0, steps=steps, sampler=name)
    dark, light = images[::2], images[1::2]
    # 600 numbers each: standard errors of 0.002 (mean) and 0.0015 (deviation), four of which are allowed; 100 steps of
    # first order leave the deviation short by 0.003 to 0.004
    for drawn, mean in ((dark, 0.25), (light, 0.75)):
        assert float(drawn.mean()) == pytest.approx(mean, abs=0.008)
        assert float(drawn.std()) == pytest.approx(0.05, abs=0.006 + 0.004 * first_order)
    assert torch.equal(images, sample(teacher, prompts, 3, 1.0, None, steps, name))
    assert not torch.equal(images, sample(teacher, prompts, 4, 1.0, None, steps, name))


def test_noise_of_another_shape_is_no_teachers(teacher):
    with pytest.raises(AssertionError, match="2, 2"):
        draw(teacher, torch.zeros(1, 3, 4, 4), ["dark"])
