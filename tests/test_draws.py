"""Image i of a seed is the same whatever is drawn with it: its noise, and what networks make of it, to the last bit."""

import pytest
import tiny_pipelines
import torch

import sds3d
from sds3d.cameras import orbit
from sds3d.diffusion.samplers import SAMPLERS
from sds3d.diffusion.seeded_noise import ImageNoise, image_seed, in_order, piece_size, pieces
from sds3d.students.generator import FewStepGenerator, GeneratorConfig
from sds3d.teachers import small
from sds3d.teachers.base import HFConfig, TeacherConfig
from sds3d.teachers.drawing import sample
from sds3d.teachers.load import load_teacher
from sds3d.teachers.mixture import Mixture, MixtureTeacher

DTYPES = ("float32", "bfloat16")
WORDS = ["two", "a handwritten one", "digit seven", "a handwritten six", "a handwritten nine", "zero", "four", "one"]


def test_every_image_has_a_stream_of_its_own_that_begins_with_the_seed_s():
    noise = ImageNoise(3, range(5), (2, 4, 4))
    first, second = noise(), noise()
    for i in range(5):
        stream = torch.Generator().manual_seed(image_seed(3, i))
        assert torch.equal(first[i], torch.randn((2, 4, 4), generator=stream))
        assert torch.equal(second[i], torch.randn((2, 4, 4), generator=stream))
    assert torch.equal(first[0], torch.randn((2, 4, 4), generator=torch.Generator().manual_seed(3)))
    assert torch.equal(ImageNoise(3, [4, 2], (2, 4, 4))(), first[[4, 2]])
    assert ImageNoise(3, [0], (1, 2, 2), dtype=torch.float64)().dtype == torch.float64


def test_no_two_images_share_a_stream():
    """Of 40 seeds with 5,000 images each, as torch's CPU generator sees them: 32 bits."""
    found = [image_seed(seed, i) & 0xFFFFFFFF for seed in (*range(39), 0x9A125) for i in range(5000)]
    # by chance 200,000 of 2^32 would meet five times
    assert len(set(found)) >= len(found) - 15
    for seed in (0, 1, -1, 2**40):
        assert len({image_seed(seed, i) for i in range(20_000)}) == 20_000


def test_the_noise_of_all_images_is_normal_and_unrelated():
    noise = ImageNoise(0, range(4000), (16,))()
    assert abs(float(noise.mean())) < 4 / 64_000**0.5
    assert float(noise.var()) == pytest.approx(1, abs=4 * (2 / 64_000) ** 0.5)
    assert float(noise.pow(4).mean()) == pytest.approx(3, abs=4 * (96 / 64_000) ** 0.5)
    neighbours = (noise[1:] * noise[:-1]).mean()  # a correlation of 64,000 products: standard error 0.004
    assert abs(float(neighbours)) < 0.016
    between = (noise * ImageNoise(1, range(4000), (16,))()).mean()
    assert abs(float(between)) < 0.016


def test_pieces_are_all_of_one_size():
    assert list(pieces(["mug"] * 5, 2)) == [([0, 1], 2), ([2, 3], 2), ([4, 4], 1)] and not list(pieces([], 3))
    found = list(pieces(["mug", "a mug", "ball", "a ball", "cup"], 2))
    assert found == [([0, 2], 2), ([4, 4], 1), ([1, 3], 2)]  # of as many words each
    made = [torch.tensor(rows[:count]) for rows, count in found]
    assert in_order(torch.cat(made).tolist(), made).tolist() == [0, 1, 2, 3, 4]
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [piece_size(side, cpu) for side in (8, 64, 128, 512, 1024)] == [16, 8, 2, 1, 1]
    assert [piece_size(side, gpu) for side in (8, 64, 512, 1024)] == [256, 64, 1, 1]
    assert piece_size(256, cpu, 4) == 4 and piece_size(64, cpu, 6) == 12


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """Generators of digits in four steps, barely trained, by dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("digits"))
        made = sds3d.train_generator(steps=2, **{"generator.batch": 8, "critic.steps": 1, "generator.steps": 4})
        return {dtype: sds3d.load_generator(made.path.absolute(), "cpu", dtype) for dtype in DTYPES}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_generator_s_images_are_the_same_for_every_count_and_batch(generators, dtype, steps):
    draw = generators[dtype]
    whole = draw(WORDS * 3, seed=7, steps=steps)
    for count in (1, 4, 8, 17):
        for batch in (1, 2, 8):
            assert torch.equal(draw((WORDS * 3)[:count], seed=7, steps=steps, batch=batch), whole[:count])
    others = [*WORDS[:3], "a handwritten zero", *["seven"] * 13]
    assert torch.equal(draw(others, seed=7, steps=steps)[:3], whole[:3])  # prompts of other lengths beside them
    assert len(draw([], seed=7)) == 0
    with pytest.raises(ValueError, match="batch is -1; give a number of images, or 0"):
        draw(WORDS, batch=-1)


def test_a_generator_s_first_noise_is_the_same_for_any_number_of_steps(generators):
    draw = generators["float32"]
    teacher = draw._teacher
    z = ImageNoise(7, [0], teacher.shape)()
    sigma = float(teacher.schedule.alpha_sigma(draw.times[:1])[1])
    x0 = teacher.answer(teacher.network, sigma * z, draw.times[:1].float(), ["two"]).x0
    assert torch.allclose(draw(["two"], seed=7, steps=1), teacher.decode(x0), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_teacher_s_images_are_the_same_for_every_count(dtype, name):
    teacher = small.load(small.packaged("digits"), dtype=getattr(torch, dtype))
    draw = [sample(teacher, WORDS[:count], 5, 2.0, None, 2, name) for count in (8, 1, 4)]
    assert torch.equal(draw[1], draw[0][:1]) and torch.equal(draw[2], draw[0][:4])


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """Loads a tiny Stable Diffusion, whose images a VAE decodes."""
    folder = tmp_path_factory.mktemp("sd")
    pipeline, kept = tiny_pipelines.build("sd", folder), HFConfig(cache=str(folder / "kept"))
    return lambda dtype: load_teacher(TeacherConfig(str(pipeline), "words", dtype, hf=kept), "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_latent_teacher_s_images_are_the_same_for_every_count(latent, dtype):
    """Its VAE, too, is given whole pieces: cut before, one image was 4e-7 off in float32 and 1e-3 in bfloat16."""
    teacher = latent(dtype)
    draw = [sample(teacher, ["a red mug"] * count, 0, 2.0, None, 2) for count in (3, 1, 2)]
    assert torch.equal(draw[1], draw[0][:1]) and torch.equal(draw[2], draw[0][:2])


def test_no_prompts_give_no_images(latent):
    pixels = small.load(small.packaged("digits"), dtype=torch.float32)
    made = FewStepGenerator(pixels, GeneratorConfig(batch=2), ["zero"])
    assert sample(pixels, []).shape == made.images([], 0).shape == (0, 3, 8, 8)
    assert sample(latent("float32"), []).shape == (0, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_toys_are_the_same_beside_prompts_of_other_lengths(dtype):
    """Attention's sums over a longer list of words are in another order, and were 0.02 off in bfloat16."""
    teacher = small.load(dtype=getattr(torch, dtype))
    alone = sample(teacher, ["a red mug"], 1, 2.0, orbit(2)[:1], 1)
    beside = sample(teacher, ["a red mug", "a blue mug with a white handle, front view"], 1, 2.0, orbit(2), 1)
    assert torch.equal(alone, beside[:1])


def test_a_teacher_of_several_views_at_once_is_given_whole_sets():
    teacher = MixtureTeacher(Mixture(torch.ones(1), torch.zeros(1, 3, 256, 256), 0.1), pixels=True)
    teacher.views_per_set, asked, predict = 4, [], teacher.predict

    def note(x_t, t, prompts, cameras=None, mask=None):
        asked.append((len(x_t), cameras.azimuth.tolist()))
        return predict(x_t, t, prompts, cameras, mask)

    teacher.predict = note
    turn = orbit(8)
    assert sample(teacher, [""] * 8, 0, 1.0, turn, 1).shape[0] == 8
    assert asked == [(4, turn.azimuth[:4].tolist()), (4, turn.azimuth[4:].tolist())]
    with pytest.raises(ValueError, match="sees 4 views of a scene at once and got 6; give a multiple"):
        sample(teacher, [""] * 6, 0, 1.0, orbit(6), 1)
