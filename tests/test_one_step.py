"""A one-step generator: its start, its times, the steps it simulates, and the running means of its weights."""

import pytest
import torch

from sds3d.diffusion.noise import Schedule
from sds3d.diffusion.seeded_noise import ImageNoise
from sds3d.students.generator import FewStepGenerator, GeneratorConfig, paint, times
from sds3d.teachers import small

PROMPTS = ["a handwritten six"]


@pytest.fixture(scope="module")
def teacher():
    return small.load(small.packaged("digits"), "words")


def test_it_starts_as_the_teacher_s_denoised_image(teacher):
    config = GeneratorConfig(batch=4)
    student = FewStepGenerator(teacher, config, teacher.prompts)
    alpha, sigma = teacher.schedule.alpha_sigma(student.times)
    assert float(sigma / alpha) == pytest.approx(2.5)
    z = torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    prompts = ["a handwritten six"] * 4
    x = paint(teacher, student.network, student.times, [z], prompts).detach()
    t = student.times.float().expand(4)
    assert torch.allclose(x, teacher.predict(float(sigma) * z, t, prompts).x0, atol=1e-5)


def test_larger_images_start_from_more_noise_as_far_as_the_schedule_goes(teacher):
    def first(side: int, schedule: Schedule = teacher.schedule, **layer) -> float:
        alpha, sigma = schedule.alpha_sigma(times(schedule, GeneratorConfig(**layer), side))
        return float(sigma / alpha)

    assert [first(8), first(64), first(64, sigma_init=3.0)] == pytest.approx([2.5, 20, 3])
    linear = Schedule.linear()
    alpha, sigma = linear.alpha_sigma(torch.ones((), dtype=torch.float64))
    assert first(8, linear) == pytest.approx(2.5) and first(64, linear) == pytest.approx(float(sigma / alpha))


def test_several_steps_renoise_between_them_and_learn_through_the_last_alone(teacher):
    config = GeneratorConfig(sigma_init=4.0, steps=3, batch=2)
    when, asked = times(teacher.schedule, config, 8), []
    assert when.tolist() == pytest.approx([float(when[0]), float(when[0]) * 2 / 3, float(when[0]) / 3])

    class Watched:
        schedule, shape = teacher.schedule, teacher.shape

        def answer(self, network, x_t, t, prompts):
            asked.append((x_t.detach(), float(t[0]), torch.is_grad_enabled()))
            return teacher.answer(network, x_t, t, prompts)

    noise = [torch.full((2, 1, 8, 8), float(i + 1)) for i in range(3)]
    network = FewStepGenerator(teacher, config, teacher.prompts).network
    x = paint(Watched(), network, when, noise, ["a handwritten one"] * 2)
    assert [t for _, t, _ in asked] == pytest.approx(when.tolist()) and [g for *_, g in asked] == [False, False, True]
    alpha, sigma = teacher.schedule.alpha_sigma(when)
    first = teacher.answer(network, asked[0][0], when[:1].float().expand(2), ["a handwritten one"] * 2).x0.detach()
    assert torch.allclose(asked[1][0], float(alpha[1]) * first + float(sigma[1]) * noise[1], atol=1e-5)
    x.sum().backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in network.parameters() if p.grad is not None)


def test_running_means_follow_with_their_half_lives(teacher):
    student = FewStepGenerator(teacher, GeneratorConfig(batch=10, half_lives=(10, 1000)), teacher.prompts)
    before = student.network.last.bias.detach().clone()
    with torch.no_grad():
        student.network.last.bias += 1.0
    student.after_step(5000, torch.Generator())  # old enough: (1 + step) / (10 + step) is above both
    moved = [float((mean.module.last.bias - before).mean()) for mean in student.means]
    assert moved == pytest.approx([0.5, 1 - 0.5**0.01], rel=1e-3)


def test_training_draws_every_step_as_often_by_its_own_earlier_steps(teacher, monkeypatch):
    """Backward simulation: a step's input is made by the generator itself, never from data."""
    student = FewStepGenerator(teacher, GeneratorConfig(steps=3, batch=1), teacher.prompts[:2])
    levels, answer, told = [], teacher.answer, []

    def watched(network, x_t, t, prompts):
        assert network is student.network
        levels.append(float(t[0]))
        return answer(network, x_t, t, prompts)

    monkeypatch.setattr(teacher, "answer", watched)
    counts, generator = [0, 0, 0], torch.Generator().manual_seed(0)
    for step in range(120):
        levels.clear()
        draw = student.draw(step, generator)
        assert levels == pytest.approx(student.times[: len(levels)].tolist())
        assert draw.encoded and draw.images.shape == (1, 1, 8, 8) and draw.images.requires_grad
        counts[len(levels) - 1] += 1
        told += draw.prompts
    # 120 draws of chance 1/3 (1/2): four standard errors are 21 (22)
    assert counts == pytest.approx([40, 40, 40], abs=21)
    assert told.count(teacher.prompts[0]) == pytest.approx(60, abs=22)


def test_images_are_of_the_first_running_mean_in_all_its_steps(teacher):
    student = FewStepGenerator(teacher, GeneratorConfig(steps=2, half_lives=(1000, 10)), teacher.prompts)
    with torch.no_grad():
        student.network.last.bias += 1.0
        student.means[1].module.last.bias -= 1.0
    prompts = ["a handwritten four"] * 3
    fresh = ImageNoise(4, range(3), (1, 8, 8))
    noise = [fresh() for _ in range(2)]
    x = paint(teacher, teacher.network, student.times, noise, prompts).detach()  # the first mean is the teacher still
    found = student.images(prompts, 4)
    assert found.shape == (3, 3, 8, 8) and torch.allclose(found, teacher.decode(x), atol=1e-5)


def test_times_begin_at_sigma_init_and_leave_out_0(teacher):
    for steps in (1, 2, 4):
        found = times(teacher.schedule, GeneratorConfig(sigma_init=3.0, steps=steps), 8)
        alpha, sigma = teacher.schedule.alpha_sigma(found)
        assert float(sigma[0] / alpha[0]) == pytest.approx(3.0)
        assert found.tolist() == pytest.approx([float(found[0]) * (steps - k) / steps for k in range(steps)])


def test_a_phase_makes_the_first_running_mean_the_teacher_and_a_checkpoint_keeps_it():
    def start() -> FewStepGenerator:
        return FewStepGenerator(small.load(small.packaged("digits"), "words"), GeneratorConfig(), PROMPTS, "digits")

    student, untouched = start(), start()
    assert "teacher_network" not in student.state_dict()
    with torch.no_grad():
        for i, module in enumerate((student.means[0].module, student.network, student.means[1].module)):
            module.last.bias += i + 1.0
    mean = {name: value.clone() for name, value in student.means[0].module.state_dict().items()}
    student.begin_phase()
    for module in (student.teacher.network, student.network, *(mean.module for mean in student.means)):
        assert all(torch.equal(value, mean[name]) for name, value in module.state_dict().items())
    again = start()
    again.load_state_dict(student.state_dict())
    x, t = torch.ones(1, 1, 8, 8), torch.tensor([0.5])
    ours, theirs, first = (one.teacher.predict(x, t, PROMPTS).v for one in (again, student, untouched))
    assert torch.equal(ours, theirs) and torch.allclose(ours, first + 1, atol=1e-5)
    assert "teacher_network" in again.state_dict()  # a run that is resumed twice
    assert all(p.requires_grad for p in student.network.parameters())
    assert not any(p.requires_grad for p in student.teacher.network.parameters())
