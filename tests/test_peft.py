"""LoRA critics on diffusers pipelines: the teacher as it was, no second copy of it, a file that diffusers loads."""

import copy
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import torch
from conftest import TINY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sds3d.cameras import orbit
from sds3d.config import load as config
from sds3d.distill.critics import CriticConfig, TrainedCritic
from sds3d.networks.lora import LoRA
from sds3d.runs import launch
from sds3d.runs.folder import Run
from sds3d.runtime.distributed import Processes, join
from sds3d.students.base import Draw
from sds3d.teachers import small
from sds3d.teachers.base import HFConfig, TeacherConfig
from sds3d.teachers.hf.adapter import ATTENTION, FILE, Adapter
from sds3d.teachers.load import load_teacher

FAMILIES = ("sd", "sdxl", "if", "sd3", "flux", "ddpm")
every_family = pytest.mark.parametrize("name", FAMILIES)
PROMPTS = ["a red mug", "a blue ball, side view"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folder of a family's pipeline by name, made once."""
    return cache(lambda name: tiny_pipelines.build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def load(pipelines, tmp_path_factory):
    """A family's teacher, with view words."""
    kept = str(tmp_path_factory.mktemp("prompts"))

    def make_teacher(name, dtype="float32", compiled=False):
        hf = HFConfig(cache=kept, **tiny_pipelines.SETTINGS.get(name, {}))
        return load_teacher(TeacherConfig(str(pipelines(name)), "words", dtype, compiled, hf), "cpu")

    return cache(make_teacher)


def draw(count: int = 2) -> Draw:
    images = torch.rand((count, 3, 16, 16), generator=seeded(2))
    return Draw(images, ["a red mug"] * count, orbit(count), torch.zeros(count, dtype=torch.long))


def question(teacher) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    return torch.randn((2, *teacher.shape), generator=seeded()), torch.tensor([0.3, 0.8]), PROMPTS


def answer(critic) -> torch.Tensor:
    with torch.no_grad():
        return critic.predict(*question(critic.teacher), None, None).output


def stirred(critic: TrainedCritic) -> TrainedCritic:
    """With a B that is not zero."""
    with torch.no_grad():
        for up in critic.network.up:
            up.weight.normal_(0, 0.3, generator=seeded(3))
    return critic


# the same weights


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_off_is_the_teacher_and_on_is_the_critic(name, dtype, load):
    """To the last bit: before the critic is made, before it learns, and after."""
    teacher = load(name, dtype)
    weights = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    theirs, chance = teacher.predict(*question(teacher)).output, torch.get_rng_state()
    critic = TrainedCritic(teacher, CriticConfig(rank=2, lr=1e-2), seeded())
    assert torch.equal(torch.get_rng_state(), chance)  # peft's first weights are drawn elsewhere
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    assert {name.endswith(ATTENTION) for name in critic.network.names} == {True}
    assert torch.equal(teacher.predict(*question(teacher)).output, theirs)
    assert torch.equal(answer(critic), theirs)
    losses = [critic.fit(draw(), seeded(1)) for _ in range(3)]  # one t and noise again and again
    assert losses[-1] < losses[0]
    assert (answer(critic) - theirs).norm() > 0.01 * theirs.norm()
    assert torch.equal(teacher.predict(*question(teacher)).output, theirs)
    now = teacher.network.state_dict()
    assert list(now) == list(weights) and all(torch.equal(now[k], v) for k, v in weights.items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())
    assert not hasattr(teacher.network, "peft_config")


def test_several_critics_share_a_teacher(load):
    teacher = load("sd")
    one, two = (TrainedCritic(teacher, CriticConfig(rank=2, lr=1e-2), seeded(i)) for i in range(2))
    other = answer(stirred(two))
    one.fit(draw(), seeded(1))
    assert torch.equal(answer(two), other) and not torch.equal(answer(one), other)
    with two.network.changed():
        inside = answer(one)
        assert torch.equal(teacher.predict(*question(teacher)).output, other)  # it is still in its place
    assert torch.equal(inside, answer(one))


def test_an_error_leaves_the_network_as_it_was(load):
    teacher = load("sd")
    critic, modules = stirred(TrainedCritic(teacher, CriticConfig(rank=2), seeded())), list(teacher.network.modules())
    theirs = teacher.predict(*question(teacher)).output
    critic.network.checkpointing = True
    x, t, prompts = question(teacher)
    with pytest.raises(RuntimeError):
        critic.predict(x[:, :3], t, prompts, None, None)
    assert all(a is b for a, b in zip(modules, teacher.network.modules(), strict=True))
    assert not teacher.network.is_gradient_checkpointing
    assert torch.equal(teacher.predict(*question(teacher)).output, theirs)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_step_is_that_of_our_own_lora(name, load):
    """In float64, with the same A and B: on every matrix and convolution, which is what ours changes."""
    teacher = load(name)
    network = copy.deepcopy(teacher.network).double()
    ours = LoRA(network, 2, 2.0).double()
    layers = [n.removesuffix(".weight") for n in ours.names]
    theirs = Adapter(network, 2, seeded(), tuple(layers), torch.float64)
    assert theirs.names == layers and len(layers) > 20
    x, t, prompts = question(teacher)
    condition = {k: v.double() for k, v in teacher.embedder(prompts).items()}
    losses = []
    for down, up, a, b in zip(ours.down, ours.up, theirs.down, theirs.up, strict=True):
        up.data.normal_(0, 0.1, generator=seeded(5))
        down.data.copy_(a.weight.data.flatten(1))
        b.weight.data.copy_(up.data.view_as(b.weight))
    for lora in (ours, theirs):
        optimiser = torch.optim.AdamW(lora.parameters(), 1e-2)
        output = teacher.family.answer(lora, x.double(), 1000 * t.double(), condition)
        losses.append((output - 1).square().mean())
        losses[-1].backward()
        optimiser.step()
    assert torch.allclose(*losses, rtol=1e-5)
    for mine, theirs_ in ((ours.down, theirs.down), (ours.up, theirs.up)):
        for p, layer in zip(mine, theirs_, strict=True):
            assert torch.allclose(p.grad, layer.weight.grad.view_as(p), rtol=1e-5, atol=1e-12)
            assert torch.allclose(p, layer.weight.view_as(p), rtol=0, atol=1e-5)


class Sizes(TorchDispatchMode):
    """Remembers how many numbers each new tensor holds."""

    def __init__(self):
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = (t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        self.seen += [t.numel() for t in made if t.untyped_storage().data_ptr() not in known]
        return out


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_there_is_no_second_copy_of_a_weight(kind):
    """Forward, backward and step make no tensor of a weight's size; ours, which adds B A to it, does."""
    wide, x = (nn.Linear(256, 256), torch.randn((3, 256), generator=seeded()))
    if kind == "convolution":
        wide, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn((1, 64, 4, 4), generator=seeded())
    network, most = nn.Sequential(wide, nn.SiLU()).requires_grad_(False), {}
    for lora in (Adapter(network, 2, seeded(), ("0",)), LoRA(network, 2, 2.0, seeded())):
        optimiser = torch.optim.AdamW(lora.parameters(), 1e-3)
        with Sizes() as sizes:
            lora(x).square().mean().backward()
            optimiser.step()
        most[type(lora)] = max(sizes.seen)
        assert sum(p.numel() for p in lora.parameters()) <= wide.weight.numel() / 8
    assert most[LoRA] >= wide.weight.numel() > 8 * most[Adapter]


@pytest.mark.parametrize("name", ["sd", "if", "sd3", "flux"])  # diffusers recomputes no attention of DDPM's
def test_recomputed_blocks_find_the_changed_layers(name, load):
    """The backward pass runs them again, when teacher and other critics have answered meanwhile."""
    teacher, grads, counts = load(name), [], []
    other = stirred(TrainedCritic(teacher, CriticConfig(rank=2), seeded(7)))
    for checkpointing in (False, True):
        critic = stirred(TrainedCritic(teacher, CriticConfig(rank=2, checkpointing=checkpointing), seeded()))
        count = []
        hook = critic.network.down[0].register_forward_hook(lambda *_, count=count: count.append(1))
        loss = critic.predict(*question(teacher), None, None).output.square().mean()
        assert not teacher.network.is_gradient_checkpointing
        answer(other)
        teacher.predict(*question(teacher))
        loss.backward()
        hook.remove()
        grads.append([p.grad for p in critic.parameters()])
        counts.append(len(count))
    assert counts == [1, 2]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
def test_a_compiled_teacher_is_compiled_once(load, monkeypatch):
    """Changed layers that come and go are no reason to compile again."""
    compiled, real = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda network: real(network, backend=backend))
    teacher, plain = load.__wrapped__("sd", compiled=True), load("sd")
    theirs = teacher.predict(*question(teacher)).output
    first = len(compiled)
    critic = TrainedCritic(teacher, CriticConfig(rank=2, lr=1e-2), seeded())
    for _ in range(2):
        critic.fit(draw(), seeded(1))
        answer(critic)
        assert torch.equal(teacher.predict(*question(teacher)).output, theirs)
    assert len(compiled) == first > 0
    assert torch.allclose(theirs, plain.predict(*question(plain)).output, atol=1e-5)


# precision


@pytest.mark.parametrize("kind", ["lora", "copy"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_the_gradient(kind, dtype, load):
    """Of a mean over so many numbers that float16 would lose most of it (in some layers its very direction)."""
    grads = []
    for one in ("float32", dtype):
        critic = TrainedCritic(load("sd3", one), CriticConfig(kind, rank=2), seeded())
        critic.fit(draw(64), seeded(1))
        grads.append([p.grad.flatten() for p in critic.parameters() if p.grad is not None])
    for exact, rough in zip(*grads, strict=True):
        assert rough.dtype == torch.float32
        if exact.any():
            assert torch.cosine_similarity(exact, rough, 0) > 0.99
            assert 0.9 < exact.norm() / rough.norm() < 1.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_changes_compute_in_their_own_precision(dtype, load):
    """The network in its own, as when the teacher answers: autocast, which a copy needs, is off."""
    critic, seen = stirred(TrainedCritic(load("sd", dtype), CriticConfig(rank=2), seeded())), []
    parts = (critic.network.down[0], critic.teacher.network.conv_in)
    note = lambda _, __, out: seen.append((out.dtype, torch.is_autocast_enabled("cpu")))  # noqa: E731
    hooks = [part.register_forward_hook(note) for part in parts]
    answer(critic)
    for hook in hooks:
        hook.remove()
    assert seen == [(getattr(torch, dtype), False), (torch.float32, False)]


def test_the_changes_may_be_in_another_precision(load):
    teacher = load("sd")
    critic = TrainedCritic(teacher, CriticConfig(rank=2, lr=1e-2, dtype="bfloat16"), seeded())
    critic.fit(draw(), seeded(1))
    assert {p.dtype for p in critic.parameters()} == {torch.bfloat16}
    assert answer(critic).dtype == torch.float32 == next(teacher.network.parameters()).dtype


# the file


@pytest.mark.parametrize("name", ["sd", "sdxl", "if", "sd3", "flux"])
@pytest.mark.parametrize("targets", [(), ("to_v", "proj_out")], ids=["attention", "others"])
def test_plain_diffusers_loads_the_file(name, targets, pipelines, load, tmp_path):
    teacher = load(name)
    critic = stirred(TrainedCritic(teacher, CriticConfig(rank=3, targets=targets), seeded()))
    assert critic.save_adapter(tmp_path) == tmp_path / FILE and [p.name for p in tmp_path.iterdir()] == [FILE]
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines(name))
    pipe.load_lora_weights(tmp_path)
    network = getattr(pipe, "unet", None) or pipe.transformer
    x, t, prompts = question(teacher)
    with torch.no_grad():
        loaded = teacher.family.answer(network, x, teacher.levels.network_timesteps(t), teacher.embedder(prompts))
    ours, theirs = answer(critic), teacher.predict(x, t, prompts).output
    assert (loaded - ours).abs().max() < 1e-5 * ours.abs().max()
    assert (theirs - ours).norm() > 0.01 * ours.norm()
    pipe.unload_lora_weights()
    with torch.no_grad():
        assert torch.equal(
            teacher.family.answer(network, x, teacher.levels.network_timesteps(t), teacher.embedder(prompts)), theirs
        )


def test_what_nobody_could_load_is_not_written(load, tmp_path):
    assert TrainedCritic(load("ddpm"), CriticConfig(rank=2), seeded()).save_adapter(tmp_path) is None
    assert TrainedCritic(load("sd"), CriticConfig("copy"), seeded()).save_adapter(tmp_path) is None
    assert TrainedCritic(small.load(), CriticConfig(rank=2), seeded()).save_adapter(tmp_path) is None
    assert not list(tmp_path.iterdir())


@dataclass
class Layer:
    """A run's settings, as the command line has them."""

    folder: Path
    out: Path

    def config(self, steps: int):
        told = {**config.parse_overrides(TINY), "steps": steps, "method": "vsd", "device": "cpu", "out": str(self.out)}
        told |= {"critic.rank": 2, "critic.lr": 1e-2, "log.save_every": 100, "log.picture_every": 0}
        told |= {"teacher.name": str(self.folder), "teacher.views": "words", "teacher.hf.cache": str(self.out / "kept")}
        return config.load("a red mug", told)


@pytest.mark.network
def test_a_run_goes_on_with_its_adapter_and_leaves_it_to_diffusers(pipelines, tmp_path):
    """Six steps at once, and three, a stop and three more: the same checkpoint, bit for bit, of changes alone."""
    ends = []
    for name, stop in (("whole", None), ("parted", 3)):
        layer = Layer(pipelines("sd"), tmp_path / name)
        made, steps = launch.start(layer.config(6))
        for step in steps:
            if step.step == stop:
                steps.close()
                assert not (made.path / FILE).exists()
                made, steps = launch.resume(made.path)
                assert sum(1 for _ in steps) == 3
                break
        ends.append(made.path)
    one, two = (Run(path).load_checkpoint()["companions"]["critic"] for path in ends)
    assert one["network"].keys() == two["network"].keys()
    assert all(torch.equal(v, two["network"][k]) for k, v in one["network"].items())
    for i, moments in one["optimiser"]["state"].items():
        assert all(torch.equal(v, two["optimiser"]["state"][i][k]) for k, v in moments.items())
    held = sum(v.numel() for v in one["network"].values())
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines("sd"))
    assert held < 0.1 * sum(p.numel() for p in pipe.unet.parameters())
    pipe.load_lora_weights(ends[0])
    weights = pipe.unet.state_dict()
    found = [v for k, v in weights.items() if ".lora_A." in k or ".lora_B." in k]
    assert sum(v.numel() for v in found) == held
    assert (ends[0] / FILE).read_bytes() == (ends[1] / FILE).read_bytes()


@pytest.mark.slow
def test_the_packaged_teacher_needs_no_peft():
    program = (
        "import sys; from sds3d.config import load as config; from sds3d.runs import build;"
        "told = config.load('a red mug', {'method': 'vsd', 'device': 'cpu'});"
        "build.build_critic(told, build.build_teacher(told));"
        "print(*{'peft', 'transformers', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not done.stdout.split()


# several processes


def by(processes: Processes, folder: Path) -> list[torch.Tensor]:
    """Three fits of a batch of four, in float64; what each layer has become."""
    hf = HFConfig(cache=str(folder.parent / "kept"))
    teacher = load_teacher(TeacherConfig(str(folder), "words", "float32", hf=hf), "cpu")
    teacher.network.double()
    teacher.dtype = torch.float64
    critic = TrainedCritic(teacher, CriticConfig(rank=2, lr=1e-2), seeded(), processes)
    critic.network.double()
    whole = torch.rand((4, 3, 16, 16), generator=seeded(2), dtype=torch.float64)
    own, chance = processes.rows(whole), seeded(1)
    for _ in range(3):
        critic.fit(Draw(own, [""] * len(own), None, torch.zeros(len(own), dtype=torch.long)), chance)
    return [p.detach() for p in critic.parameters()]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(pipelines, tmp_path):
    """Whether or not other weights are sharded: an adapter is small, and each process keeps all of it."""
    folder = pipelines("ddpm")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, str(folder), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    wanted = by(Processes(), folder)
    for name in ("averaged", "sharded"):
        for p, q in zip(wanted, torch.load(tmp_path / f"{name}.pt", weights_only=True), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-9)


# what is refused


def test_targets_that_match_nothing_name_what_there_is(load):
    with pytest.raises(ValueError, match=r"critic.targets is attn9.to_q; no layer of this UNet2D.*to_q, .*to_out\.0, "):
        TrainedCritic(load("sd"), CriticConfig(targets=("to_q", "attn9.to_q")), seeded())
    with pytest.raises(ValueError, match="critic.targets is attn1; no layer"):  # a block of layers, not a layer
        TrainedCritic(load("sd"), CriticConfig(targets=("attn1",)), seeded())
    with pytest.raises(ValueError, match="left out, which is attention's projections; .*such as 0, 1"):
        Adapter(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 1, seeded())
    one = TrainedCritic(load("sd"), CriticConfig(rank=2, targets=("attn1.to_q", "conv_in")), seeded()).network.names
    assert one[0] == "conv_in" and len(one) == 5 and all(n.endswith("attn1.to_q") for n in one[1:])


@pytest.mark.parametrize("told", [{"targets": ("to_q",)}, {"dtype": "bfloat16"}, {"checkpointing": True}])
def test_settings_of_pipelines_are_for_pipelines(told):
    with pytest.raises(ValueError, match=f"critic.{next(iter(told))}.* for diffusers pipelines"):
        TrainedCritic(small.load(), CriticConfig(**told), seeded())


def test_a_copy_has_no_targets(load):
    for told in ({"targets": ("to_q",)}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="critic.kind=lora"):
            CriticConfig("copy", **told)
    with pytest.raises(ValueError, match="critic.dtype is 'float8'"):
        config.load("a red mug", {"critic.dtype": "float8"})
    assert config.load("a red mug", {"critic.targets": ["to_q"]}).critic.targets == ("to_q",)
    copied = TrainedCritic(load("sd"), CriticConfig("copy", checkpointing=True), seeded())
    assert copied.network.is_gradient_checkpointing and not load("sd").network.is_gradient_checkpointing
    assert replace(copied.config, checkpointing=False) == CriticConfig("copy")


if __name__ == "__main__":  # one of two processes
    for sharded, name in ((False, "averaged"), (True, "sharded")):
        found = by(join(sharded), Path(sys.argv[1]))
        if os.environ["RANK"] == "0":
            torch.save(found, Path(sys.argv[2]) / f"{name}.pt")
