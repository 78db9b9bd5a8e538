"""The loop: against a hand-written Adam, its schedules, and bit-for-bit resume."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from conftest import TINY, BallTeacher

from sds3d.cameras import orbit
from sds3d.config import load as configs
from sds3d.config.load import Config, DistillConfig, PaintConfig
from sds3d.distill.core import NonFiniteGradient
from sds3d.runs import build, kinds
from sds3d.runs.folder import Run
from sds3d.runtime.distributed import Processes
from sds3d.runtime.ramp import Ramp
from sds3d.students.base import Draw
from sds3d.teachers.load import load_teacher
from sds3d.train import Diverged, OptimConfig, Plan, make_optimiser, train


class Pixels:
    """Its own image, (1, 3, 2, 2), in two groups of parameters; remembers what the loop did."""

    def __init__(self):
        self.upper = torch.nn.Parameter(torch.linspace(0, 1, 6).reshape(1, 3, 1, 2))
        self.lower = torch.nn.Parameter(torch.linspace(1, 0, 6).reshape(1, 3, 1, 2))
        self.extra: dict[str, torch.Tensor] = {}
        self.after: list[int] = []

    def draw(self, step, generator):
        noise = 0.01 * torch.randn(1, 3, 2, 2, generator=generator)
        return Draw(torch.cat([self.upper, self.lower], -2) + noise, ["x"], None, torch.zeros(1, dtype=torch.long))

    def regularisers(self):
        return {"size": self.upper.square().sum(), "seen": torch.tensor(0.25), **self.extra}

    def param_groups(self):
        return {"upper": [self.upper], "lower": [self.lower], "none": []}

    def after_step(self, step, generator):
        self.after.append(step)

    def state_dict(self):
        return {"upper": self.upper.detach(), "lower": self.lower.detach()}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.upper.copy_(state["upper"])
            self.lower.copy_(state["lower"])


@dataclass
class Judged:
    loss: torch.Tensor
    metrics: dict = field(default_factory=lambda: {"g_norm": 1.0})


def to_zero(draw, step, generator):
    return Judged(draw.images.square().sum())


OPTIM = OptimConfig(lr={"upper": Ramp(2, 0.1, 0.01, 6), "lower": Ramp.constant(0.05)}, clip={"lower": 0.5}, eps=1e-8)
PLAN = Plan(steps=8, seed=3, lambdas={"size": Ramp(0, 0.0, 2.0, 4)}, optim=OPTIM, save_every=3)


def by_hand(steps: int) -> Pixels:
    """The same, with Adam written out (Kingma and Ba, arXiv 1412.6980, algorithm 1) in float64."""
    student, generator = Pixels(), torch.Generator().manual_seed(3)
    moments = {id(p): [torch.zeros_like(p, dtype=torch.float64)] * 2 for p in (student.upper, student.lower)}
    for step in range(steps):
        draw = student.draw(step, generator)
        weight = 2.0 * min(step / 4, 1)
        grads = torch.autograd.grad(
            draw.images.square().sum() + weight * student.upper.square().sum(), (student.upper, student.lower)
        )
        for p, g, name in zip((student.upper, student.lower), grads, ("upper", "lower")):
            g = g.double()
            if name == "lower":
                g = g * min(1, 0.5 / (g.norm() + 1e-6))
            lr = 0.05 if name == "lower" else OPTIM.lr["upper"](step)
            m, v = moments[id(p)]
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            moments[id(p)] = [m, v]
            hat_m, hat_v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.99 ** (step + 1))
            with torch.no_grad():
                p -= (lr * hat_m / (hat_v.sqrt() + 1e-8)).float()
    return student


def test_the_loop_is_adam_with_ramps_clipping_and_weighted_regularisers():
    student = Pixels()
    steps = list(train(student, {"zero": to_zero}, PLAN))
    expected = by_hand(8)
    torch.testing.assert_close(student.upper, expected.upper, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.lower, expected.lower, rtol=1e-5, atol=1e-6)
    assert [s.step for s in steps] == list(range(1, 9))
    assert student.after == list(range(8))
    assert steps[0].metrics["seen"] == 0.25  # no gradient, no weight: only reported
    assert {"size", "g_norm", "grad/upper", "grad/lower"} <= steps[0].metrics.keys()


def test_losses_of_several_objectives_add_up_and_keep_their_names():
    student = Pixels()
    pixels = torch.cat([student.upper, student.lower], -2).detach()
    (step, *_) = train(student, {"a": to_zero, "b": to_zero}, replace(PLAN, lambdas={}))
    assert step.loss == pytest.approx(2 * pixels.square().sum().item(), rel=0.05)
    assert {"a/g_norm", "b/g_norm"} <= step.metrics.keys()


def test_groups_and_learning_rates_must_match():
    with pytest.raises(ValueError, match="'lower' have no learning rate; give optim.lr.lower"):
        make_optimiser(Pixels(), OptimConfig(lr={"upper": Ramp.constant(1.0)}))
    with pytest.raises(ValueError, match="optim.clip.grid: there is no such group; there are upper, lower"):
        make_optimiser(Pixels(), replace(OPTIM, clip={"grid": 1.0}))
    with pytest.raises(ValueError, match="optim.lr.gird: there is no such group"):
        make_optimiser(Pixels(), replace(OPTIM, lr=OPTIM.lr | {"gird": Ramp.constant(0.5)}))
    for bad in ({"betas": (0.9, 1.0)}, {"eps": 0.0}, {"clip": {"upper": 0.0}}, {"lr": {"upper": Ramp.constant(-1)}}):
        with pytest.raises(ValueError, match="optim."):
            replace(OPTIM, **bad)
    for bad in ({"steps": 0}, {"save_every": 0}, {"picture_every": -1}):
        with pytest.raises(ValueError, match="give"):
            Plan(**bad)


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_closing_saves_and_resuming_ends_bit_for_bit_where_an_uninterrupted_run_does(tmp_path, stop):
    whole, parted = (Run.create(tmp_path, "x", "") for _ in range(2))
    straight = Pixels()
    list(train(straight, {"zero": to_zero}, PLAN, whole))
    first = Pixels()
    steps = train(first, {"zero": to_zero}, PLAN, parted)
    for _ in range(stop):
        next(steps)
    steps.close()
    second = Pixels()
    rest = list(train(second, {"zero": to_zero}, PLAN, parted, resume=True))
    assert [s.step for s in rest] == list(range(stop + 1, 9))
    assert torch.equal(second.upper, straight.upper)
    assert torch.equal(second.lower, straight.lower)
    timed = ("seconds", "memory")
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in run.rows()] for run in (whole, parted)]
    assert rows[0] == rows[1]
    done = Pixels()
    assert list(train(done, {"zero": to_zero}, PLAN, parted, resume=True)) == []
    assert torch.equal(done.upper, straight.upper)
    with pytest.raises(ValueError, match="has done 8 steps; steps=7 is less"):
        train(Pixels(), {"zero": to_zero}, replace(PLAN, steps=7), parted, resume=True)


def test_a_crash_between_checkpoints_goes_back_to_the_last_one(tmp_path):
    run = Run.create(tmp_path, "x", "")

    def stumbles(draw, step, generator):
        if step == 5:
            raise ZeroDivisionError
        return to_zero(draw, step, generator)

    with pytest.raises(ZeroDivisionError):
        list(train(Pixels(), {"zero": stumbles}, PLAN, run))
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5]
    assert [s.step for s in train(Pixels(), {"zero": to_zero}, PLAN, run, resume=True)] == [4, 5, 6, 7, 8]
    assert [row["step"] for row in run.rows()] == list(range(1, 9))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    run = Run.create(tmp_path, "x", "")
    run.save_checkpoint({"step": 1, "seconds": 0.0, "student": {}, "optimiser": {}})
    with pytest.raises(ValueError, match="does not fit this run's config.yaml"):
        train(Pixels(), {"zero": to_zero}, PLAN, run, resume=True)


def test_what_is_not_finite_stops_the_run_before_it_reaches_the_parameters(tmp_path):
    run = Run.create(tmp_path, "x", "")
    student = Pixels()
    steps = train(student, {"zero": to_zero}, replace(PLAN, save_every=1), run)
    next(steps)
    before = student.upper.clone()
    student.extra = {"bad": torch.tensor(math.inf)}
    with pytest.raises(Diverged, match="the regulariser 'bad' is not finite at step 1"):
        next(steps)
    assert torch.equal(student.upper, before)
    assert run.load_checkpoint()["step"] == 1
    with pytest.raises(Diverged, match="the loss 'nan' is not finite at step 0"):
        next(train(Pixels(), {"nan": lambda d, s, g: Judged(d.images.sum() * math.nan)}, PLAN))
    with pytest.raises(Diverged, match="the gradient of 'upper' is not finite"):
        next(train(Pixels(), {"sqrt": lambda d, s, g: Judged((d.images - d.images).abs().sqrt().sum())}, PLAN))


def scene(*overrides: str) -> tuple:
    """A tiny scene, its objective and its plan, with a teacher that sees a ball."""
    config = configs.load("a ball", configs.parse_overrides([*TINY, *overrides]))
    config = kinds.of(config).for_teacher(config, BallTeacher())
    objective = build.build_objective(config, BallTeacher())
    return build.build_student(config), {"sds": objective}, config.plan()


def run_scene(*overrides: str, run=None, stop=None, resume=False) -> dict:
    student, objectives, plan = scene(*overrides)
    steps = train(student, objectives, plan, run, resume=resume)
    for step in steps:
        if step.step == stop:
            break
    steps.close()
    return {name: value.clone() for name, value in student.state_dict().items()}


def test_the_same_seed_gives_the_same_scene_and_resume_does_too(tmp_path):
    one, two, other = run_scene("steps=10"), run_scene("steps=10"), run_scene("steps=10", "seed=1")
    run = Run.create(tmp_path, "a ball", "")
    run_scene("steps=10", run=run, stop=5)
    resumed = run_scene("steps=10", run=run, resume=True)
    assert one.keys() == two.keys() == resumed.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
        assert torch.equal(value, resumed[name]), name
    assert not torch.equal(one["field.table"], other["field.table"])


def test_a_ball_is_learnt_from_a_teacher_that_knows_it():
    free = ("regularise.lambda_sparsity=0", "regularise.lambda_opacity_entropy=0")  # their weights are for 64 pixels
    student, objectives, plan = scene("steps=60", "optim.lr.grid=0.03", "optim.lr.mlp=0.01", *free)
    cameras = orbit(6, elevation=25, start=20)
    last = list(train(student, objectives, plan))[-1]
    out = student.render_view(cameras, 16)
    true = BallTeacher().image(cameras)[:, 1:2] < 0.5
    ours = out.opacity > 0.5
    assert (ours & true).sum() / (ours | true).sum() > 0.9
    red, green, _ = out.rgb.permute(1, 0, 2, 3)[:, (ours & true)[:, 0]].mean(1)
    assert red > 0.75
    assert green < 0.3
    assert last.metrics["opacity"] == pytest.approx(float(true.float().mean()), abs=0.08)


def test_a_teacher_that_answers_nan_is_named_with_its_step():
    student, objectives, plan = scene()
    objectives["sds"].teacher.colour = (math.nan, 0.0, 0.0)
    with pytest.raises(NonFiniteGradient, match="SDS: non-finite gradient at step 0"):
        list(train(student, objectives, plan))


class Follower:
    """A companion with one weight, moved to half of what the student draws; counts its draws."""

    def __init__(self, steps: int, weight: float = 0.0):
        self.steps, self.weight, self.drawn = steps, torch.tensor(weight), 0

    def fit(self, draw, rng):
        self.drawn += 1
        assert not draw.images.requires_grad
        self.weight = self.weight + 0.5 * (draw.images.mean() - self.weight)
        return self.weight + 0.1 * torch.randn((), generator=rng)

    def state_dict(self):
        return {"network": {"weight": self.weight}}

    def load_state_dict(self, state):
        self.weight = state["network"]["weight"]


def followers() -> dict[str, Follower]:
    return {"critic": Follower(2), "discriminator": Follower(1, 4.0), "resting": Follower(0)}


def test_companions_are_fitted_on_fresh_draws_in_their_order_before_each_step():
    student, companions = Pixels(), followers()
    (step, *rest) = train(student, {"zero": to_zero}, replace(PLAN, steps=3), companions=companions)
    assert [companion.drawn for companion in companions.values()] == [6, 3, 0]
    twin, rng, weights = Pixels(), torch.Generator().manual_seed(3), {"critic": 0.0, "discriminator": 4.0}
    for name, fits in (("critic", 2), ("discriminator", 1)):
        losses = []
        for _ in range(fits):
            weights[name] += 0.5 * (twin.draw(0, rng).images.mean().item() - weights[name])
            losses.append(weights[name] + 0.1 * torch.randn((), generator=rng).item())
        assert step.metrics[name] == pytest.approx(sum(losses) / fits, rel=1e-5)
    loss = twin.draw(0, rng).images.square().sum().item()  # lambda of "size" is 0 at step 0
    assert step.loss == pytest.approx(loss, rel=1e-6)
    assert "resting" not in step.metrics and len(rest) == 2


def test_companions_resume_bit_for_bit_and_must_be_the_run_s(tmp_path):
    whole, parted = (Run.create(tmp_path, "x", "") for _ in range(2))
    straight, companions = Pixels(), followers()
    list(train(straight, {"zero": to_zero}, PLAN, whole, companions=companions))
    steps = train(Pixels(), {"zero": to_zero}, PLAN, parted, companions=followers())
    assert [next(steps).step for _ in range(4)] == [1, 2, 3, 4]
    steps.close()
    resumed, again = Pixels(), followers()
    list(train(resumed, {"zero": to_zero}, PLAN, parted, resume=True, companions=again))
    assert torch.equal(resumed.upper, straight.upper)
    assert all(torch.equal(again[name].weight, one.weight) for name, one in companions.items())
    for wrong, has in (({}, "nothing"), ({"critic": Follower(1)}, "critic")):
        said = f"holds critic, discriminator, resting beside the student, and the run has {has}"
        with pytest.raises(ValueError, match=said):
            train(Pixels(), {"zero": to_zero}, PLAN, parted, resume=True, companions=wrong)


@pytest.mark.parametrize("companions", [{}, {"critic": Follower(1)}], ids=["none", "critic"])
def test_a_checkpoint_of_when_there_was_one_critic_goes_on(tmp_path, companions):
    run = Run.create(tmp_path, "x", "")
    steps = train(Pixels(), {"zero": to_zero}, PLAN, run, companions=companions)
    assert [next(steps).step for _ in range(3)] == [1, 2, 3]
    steps.close()
    state = run.load_checkpoint()
    of_old = {"critic": None, **state.pop("companions")}  # what it was called, and None where there was none
    run.save_checkpoint(state | of_old)
    again = {name: Follower(1) for name in companions}
    assert [s.step for s in train(Pixels(), {"zero": to_zero}, PLAN, run, resume=True, companions=again)][0] == 4
    with pytest.raises(ValueError, match="beside the student, and the run has"):
        run.save_checkpoint(state | of_old)
        train(Pixels(), {"zero": to_zero}, PLAN, run, resume=True, companions={"other": Follower(1)})


def test_a_companion_that_diverged_is_not_saved(tmp_path):
    class Nested(Pixels):
        def state_dict(self):
            return {"particles": [super().state_dict()]}

    run, companions = Run.create(tmp_path, "x", ""), {"discriminator": Follower(1)}
    steps = train(Pixels(), {"zero": to_zero}, PLAN, run, companions=companions)
    next(steps)
    companions["discriminator"].weight = torch.tensor(math.nan)
    with pytest.raises(Diverged, match="network.weight of the discriminator is not finite.*: lower discriminator.lr"):
        steps.close()
    student = Nested()
    steps = train(student, {"zero": to_zero}, PLAN, run)
    next(steps)
    with torch.no_grad():
        student.lower.fill_(math.inf)
    with pytest.raises(Diverged, match="particles.0.lower of the student is not finite after step 1: lower optim.lr"):
        steps.close()
    assert not run.checkpoint.is_file()


class Counting(Pixels):
    """Counts its draws."""

    draws = 0

    def draw(self, step, generator):
        self.draws += 1
        return super().draw(step, generator)


class ToZero:
    """`to_zero` for a student's parameters, without a draw."""

    def __init__(self, student):
        self.student = student

    def evaluate_without_draw(self, step, generator):
        return Judged(self.student.upper.square().sum() + self.student.lower.square().sum(), {"step": step})


class Target:
    """A companion that remembers the student's weights of the step before."""

    def __init__(self, student):
        self.student, self.seen = student, []

    def update(self, step):
        self.seen.append((step, self.student.upper.detach().clone()))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_objectives_and_companions_that_need_no_draw_cause_none():
    student = Counting()
    target, start = Target(student), student.upper.detach().clone()
    plan = replace(PLAN, steps=3)
    steps = list(train(student, {"zero": ToZero(student)}, plan, companions={"target": target, "idle": Follower(0)}))
    assert student.draws == 0 and student.after == [0, 1, 2]
    assert [step.metrics["step"] for step in steps] == [0, 1, 2] and "size" not in steps[0].metrics
    assert steps[0].loss == pytest.approx(2 * 2.2, rel=1e-6)  # of 0, 0.2 ... 1 twice, squared
    assert [step for step, _ in target.seen] == [0, 1, 2]
    assert torch.equal(target.seen[0][1], start) and not torch.equal(target.seen[1][1], start)


@pytest.mark.parametrize("fits", [0, 2])
def test_one_draw_serves_all_objectives_that_need_one(fits):
    student = Counting()
    goals = {"alone": ToZero(student), "a": to_zero, "b": to_zero}
    (step,) = train(student, goals, replace(PLAN, steps=1), companions={"critic": Follower(fits)})
    assert student.draws == 1 + fits and "size" in step.metrics
    student = Counting()
    list(train(student, {"alone": ToZero(student)}, replace(PLAN, steps=1), companions={"critic": Follower(fits)}))
    assert student.draws == fits


@pytest.mark.parametrize(
    ("kind", "groups"),
    [(Config, "grid, mlp"), (PaintConfig, "pixels"), (DistillConfig, "generator")],
    ids=["scene", "image", "generator"],
)
def test_each_kind_of_student_has_learning_rates_for_its_own_groups_and_no_others(kind, groups):
    layer = {"generator.batch": 2} if kind is DistillConfig else {}
    config = configs.load("" if kind is DistillConfig else "a red mug", layer, kind=kind)
    student = build.build_student(config, load_teacher(config.teacher) if kind is DistillConfig else None)
    assert ", ".join(group["name"] for group in make_optimiser(student, config.optim).param_groups) == groups
    assert student.OPTIM.lr.keys() == student.param_groups().keys()
    for name in {"grid", "pixels", "generator", "background"} - student.param_groups().keys():
        stranger = configs.load(config.prompt, {f"optim.lr.{name}": 0.1}, layer, kind=kind)
        with pytest.raises(ValueError, match=f"optim.lr.{name}: there is no such group; there are {groups}"):
            make_optimiser(student, stranger.optim)


def test_a_background_has_a_learning_rate_before_it_is_learned():
    def groups(*overrides: str) -> dict[str, float]:
        config = configs.load("a ball", configs.parse_overrides([*TINY, "optim.lr.background=0.5", *overrides]))
        optimiser = make_optimiser(build.build_student(config), config.optim)
        return {group["name"]: group["lr"] for group in optimiser.param_groups}

    assert "background" not in groups()
    assert groups("render.background=learned")["background"] == 0.5


@pytest.mark.parametrize("steps", [1, 7, 2000])
def test_usual_learning_rates_follow_the_number_of_steps(steps):
    half = round(steps / 2)
    assert configs.load("x", {"steps": steps}, kind=PaintConfig).optim.lr == {"pixels": Ramp(half, 0.05, 0.005, steps)}
    assert configs.load("", {"steps": steps}, kind=DistillConfig).optim.lr == {"generator": Ramp(half, 2e-4, 0, steps)}


class SelfTaught:
    """Two numbers that are pulled to half of their teacher's, and at each phase become their own teacher."""

    def __init__(self):
        self.w, self.taught = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)), []
        self.teacher, self.mean = torch.tensor([4.0, -2.0], dtype=torch.float64), self.w.detach().clone()

    def draw(self, step, generator):
        noise = 0.1 * torch.randn(2, generator=generator, dtype=torch.float64)
        return Draw((self.w + noise).view(1, 2, 1, 1), ["x"], None, torch.zeros(1, dtype=torch.long))

    def pull(self, draw, step, generator):
        return Judged((draw.images.flatten() - self.teacher / 2).square().sum(), {"at": step})

    def regularisers(self):
        return {"size": self.w.square().sum()}

    def param_groups(self):
        return {"w": [self.w]}

    def after_step(self, step, generator):
        self.mean = 0.5 * (self.mean + self.w.detach())

    def begin_phase(self):
        self.teacher = self.mean.clone()
        self.taught.append(self.teacher)
        with torch.no_grad():
            self.w.copy_(self.mean)

    def state_dict(self):
        return {"w": self.w.detach(), "mean": self.mean, "teacher": self.teacher}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.w.copy_(state["w"])
        self.mean, self.teacher = state["mean"], state["teacher"]


IN_PHASES = Plan(
    steps=11,
    seed=5,
    lambdas={"size": Ramp(0, 0.0, 1.0, 3)},
    optim=OptimConfig(lr={"w": Ramp(1, 0.2, 0.05, 3)}, eps=1e-8),
    save_every=100,
    phase_steps=4,
)


def phases_by_hand() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Weights, running mean and teachers after three phases, with Adam written out anew for each."""
    rng, mean = torch.Generator().manual_seed(5), torch.zeros(2, dtype=torch.float64)
    teacher, teachers = torch.tensor([4.0, -2.0], dtype=torch.float64), []
    for steps in (4, 4, 3):
        w, m, v = mean.clone(), torch.zeros_like(mean), torch.zeros_like(mean)
        for step in range(steps):
            noise = 0.1 * torch.randn(2, generator=rng, dtype=torch.float64)
            grad = 2 * (w + noise - teacher / 2) + 2 * min(step / 3, 1) * w
            m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad**2
            lr = 0.2 - 0.15 * min(max(step - 1, 0) / 2, 1)
            w = w - lr * m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
            mean = 0.5 * (mean + w)
        teacher = mean.clone()
        teachers.append(teacher)
    return w, mean, teachers[:2]


def test_each_phase_is_a_run_from_the_running_mean_with_a_new_optimiser():
    student = SelfTaught()
    steps = list(train(student, {"pull": student.pull}, IN_PHASES))
    w, mean, teachers = phases_by_hand()
    assert len(student.taught) == 2
    for found, expected in zip((student.w.detach(), student.mean, *student.taught), (w, mean, *teachers), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert [step.step for step in steps] == list(range(1, 12))
    assert [step.metrics["at"] for step in steps] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("stop", [3, 4, 6, 8, 9])
def test_a_run_of_several_phases_resumes_bit_for_bit(tmp_path, stop):
    straight, first, second = SelfTaught(), SelfTaught(), SelfTaught()
    list(train(straight, {"pull": straight.pull}, IN_PHASES))
    run = Run.create(tmp_path, "x", "")
    steps = train(first, {"pull": first.pull}, IN_PHASES, run)
    for _ in range(stop):
        next(steps)
    steps.close()
    list(train(second, {"pull": second.pull}, IN_PHASES, run, resume=True))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_phases_need_a_student_with_a_running_mean():
    for bad, said in ((Processes(sharded=True), "which fsdp keeps in parts"), (Processes(), "a Pixels does not have")):
        student = SelfTaught() if bad.sharded else Pixels()
        with pytest.raises(ValueError, match=f"{said}: leave phase_steps at 0"):
            train(student, {"zero": to_zero}, replace(PLAN, phase_steps=2), processes=bad)
    with pytest.raises(ValueError, match="phase_steps is -1"):
        replace(PLAN, phase_steps=-1)
