"""A teacher that judges several views of a scene in one forward, and the rings of cameras it wants."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import TINY

from sds3d.cameras import CameraRanges, cat, orbit
from sds3d.cli.machine_report import examine_memory
from sds3d.config.load import load as load_config
from sds3d.distill.critics import CriticConfig, TrainedCritic
from sds3d.distill.query import Query
from sds3d.runs import kinds
from sds3d.runs.memory_estimate import find_machine
from sds3d.students.base import Draw
from sds3d.teachers.base import HFConfig, TeacherConfig
from sds3d.teachers.hf.multi_view import MultiView, camera_numbers
from sds3d.teachers.load import load_teacher

PROMPTS = ["a red mug"] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_pipelines.build("multi_view", tmp_path_factory.mktemp("multi-view"))


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    told = HFConfig(cache=str(tmp_path_factory.mktemp("prompts")))
    return load_teacher(TeacherConfig(str(folder), "camera", "float32", hf=told), "cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mvdreams_matrix(azimuth: float, elevation: float) -> np.ndarray:
    """As its paper's code defines it: looking at the origin from a unit away, OpenGL's axes, then z up."""
    a, e = np.radians(azimuth), np.radians(elevation)
    position = np.array([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)])
    right = np.cross(-position, [0, 1, 0])
    right /= np.linalg.norm(right)
    up = np.cross(right, -position)
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, up, position, position], axis=1)
    return np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]) @ matrix


def test_cameras_are_told_as_mvdream_was_trained():
    cameras = cat([orbit(4, elevation=15.0, start=30.0), orbit(3, elevation=-40.0, distance=2.0)])
    wanted = [mvdreams_matrix(*place) for place in zip(cameras.azimuth.tolist(), cameras.elevation.tolist())]
    np.testing.assert_allclose(camera_numbers(cameras), np.stack(wanted).reshape(-1, 16), atol=1e-6)


def test_views_of_a_set_see_one_another_and_no_other_set(teacher):
    assert isinstance(teacher.family, MultiView) and teacher.views_per_set == 4
    x_t, t = randn(8, 4, 8, 8), torch.full((8,), 0.5)
    cameras, prompts = cat([orbit(4, start=10.0), orbit(4, start=50.0)]), ["a red mug"] * 4 + ["a blue ball"] * 4
    whole = teacher.predict(x_t, t, prompts, cameras).eps
    other = x_t.clone()
    other[5] += 1
    moved = (teacher.predict(other, t, prompts, cameras).eps - whole).flatten(1).abs().amax(1)
    assert (moved[4:] > 1e-4).all() and (moved[:4] < 1e-6).all()
    order = torch.tensor([2, 0, 3, 1])  # nothing hangs on which of its set a view is
    found = teacher.predict(x_t[order], t[:4], prompts[:4], cameras[order]).eps
    assert torch.allclose(found, whole[order], atol=1e-5)


def test_four_times_the_same_view_is_that_view_alone(teacher):
    """Attention over four copies of every key is attention over one: the only difference left is none."""
    x_t, t = randn(1, 4, 8, 8).expand(4, -1, -1, -1), torch.full((4,), 0.4)
    cameras = orbit(1, start=70.0)[torch.zeros(4, dtype=torch.long)]
    together = teacher.predict(x_t, t, PROMPTS, cameras).eps
    told, network = teacher.levels.network_timesteps(t[:1]).float(), teacher.family.network
    words = teacher.embedder(PROMPTS[:1])["words"]
    alone = network(x_t[:1], told, words, class_labels=camera_numbers(cameras[:1])).sample
    assert torch.allclose(together, alone.expand(4, -1, -1, -1), atol=1e-5)
    turned = orbit(1, start=250.0)[torch.zeros(4, dtype=torch.long)]
    assert (teacher.predict(x_t, t, PROMPTS, turned).eps - together).abs().max() > 1e-4


def test_without_cameras_every_image_stands_alone(teacher):
    x_t, t = randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 0.8])
    whole = teacher.predict(x_t, t, ["a red mug", "a blue ball", ""]).eps
    parts = [
        teacher.predict(x_t[i : i + 1], t[i : i + 1], [p]).eps for i, p in enumerate(["a red mug", "a blue ball", ""])
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    with pytest.raises(ValueError, match="sees 4 views of a scene at once and got 3"):
        teacher.predict(x_t, t, ["a red mug"] * 3, orbit(3))


def test_a_querys_branches_are_sets_of_their_own(teacher):
    """Guidance asks for prompt and null prompt in one forward, in which each has its four views."""
    x_t, t, cameras = randn(4, 4, 8, 8), torch.full((4,), 0.6), orbit(4, start=15.0)
    alpha, sigma = teacher.schedule.alpha_sigma(t)
    query = Query(teacher, x_t, x_t, x_t, t, alpha, sigma, PROMPTS, cameras, uncond_camera=True)
    cond, uncond = query.eps("cond", "uncond")
    assert query.teacher_images == [8]
    assert torch.allclose(cond, teacher.predict(x_t, t, PROMPTS, cameras).eps, atol=1e-5)
    assert torch.allclose(uncond, teacher.predict(x_t, t, [""] * 4, cameras).eps, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_a_critic_of_it_starts_as_it_is_and_learns_sets(kind, teacher):
    critic = TrainedCritic(teacher, CriticConfig(kind, rank=2, lr=1e-2), torch.Generator().manual_seed(0))
    x, t, cameras = randn(4, 4, 8, 8), torch.full((4,), 0.5), orbit(4)
    before = teacher.predict(x, t, PROMPTS, cameras)
    assert torch.allclose(critic.predict(x, t, PROMPTS, cameras, None).eps, before.eps, atol=1e-5)
    seen = []
    teacher.answer, answer = lambda *a, **k: seen.append(a[2]) or answer(*a, **k), teacher.answer
    try:
        critic.fit(Draw(x, PROMPTS, cameras, torch.zeros(4, dtype=torch.long), encoded=True), torch.Generator())
    finally:
        del teacher.answer
    assert len(seen) == 1 and len(seen[0].unique()) == 1  # one level for the four
    assert (critic.predict(x, t, PROMPTS, cameras, None).eps - before.eps).abs().max() > 1e-4
    assert torch.equal(teacher.predict(x, t, PROMPTS, cameras).eps, before.eps)


@pytest.mark.parametrize("views", [1, 2, 6])
def test_told_in_words_a_critic_learns_views_one_by_one(views, folder, tmp_path):
    teacher = load_teacher(TeacherConfig(str(folder), "words", "float32", hf=HFConfig(cache=str(tmp_path))), "cpu")
    critic = TrainedCritic(teacher, CriticConfig(rank=2), torch.Generator().manual_seed(0))
    draw = Draw(randn(views, 4, 8, 8), ["a red mug"] * views, orbit(views), torch.zeros(views), encoded=True)
    assert critic.fit(draw, torch.Generator().manual_seed(0)) > 0


def test_rings_stand_evenly_at_one_height():
    ranges = CameraRanges(ring=4)
    cameras = ranges.sample(12, torch.Generator().manual_seed(3))
    azimuth = cameras.azimuth.view(3, 4)
    steps = (azimuth.roll(-1, 1) - azimuth) % 360
    assert torch.allclose(steps, torch.full((3, 4), 90.0), atol=1e-3)
    for values in (cameras.elevation, cameras.distance, cameras.fov):
        assert (values.view(3, 4) == values.view(3, 4)[:, :1]).all() and len(values.unique()) == 3
    with pytest.raises(ValueError, match="camera.ring is 0"):
        CameraRanges(ring=0)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("method", ["sds", "vsd"])
def test_generate_in_rings_of_four(method, folder, call_packaged, in_folder):
    asked = ["generate", "a red mug", "--teacher", str(folder), "--method", method, "--json", *TINY]
    asked += ["steps=3", "device=cpu", f"teacher.hf.cache={in_folder / 'kept'}"]
    code, _, err = call_packaged(*asked)
    assert code == 2 and "judges 4 views of a scene at once: give camera.ring=4 and render.views=4" in err
    code, out, err = call_packaged(*asked, "camera.ring=4", "render.views=4", "uncond_camera=true")
    assert code == 0, err
    assert (Path(json.loads(out)["run"]) / "mesh.glb").is_file()
    with pytest.raises(ValueError, match="render.views is 6 and camera.ring 4; give a multiple"):
        load_config("a mug", {"camera.ring": 4, "render.views": 6})


@pytest.mark.slow
def test_doctor_keeps_rings_whole(folder):
    """What it advises can be given, and where views stand alone it says what a run would."""
    ringed = load_config("a mug", {"teacher.name": str(folder), "camera.ring": 4, "render.views": 8})
    report = examine_memory(ringed, find_machine("cuda", 0.7))
    assert not report["fits"] and "render.views=4" in [one["setting"] for one in report["settings"]]
    packaged = load_config("a mug", {"camera.ring": 4, "render.views": 12})
    assert "render.views=4" in [one.setting for one in kinds.of(packaged).savings(packaged, 0)]
    with pytest.raises(ValueError, match="give camera.ring=4 and render.views=4, or a multiple"):
        examine_memory(load_config("a mug", {"teacher.name": str(folder)}), find_machine("cuda", 12))
