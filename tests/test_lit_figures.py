"""The PSNR of assets under the toybox's light, on toys put where a scene has its field."""

import json

import pytest
import torch
from PIL import Image
from solids import AnalyticField, solid

from sds3d.cli.scenes import score_lines
from sds3d.config import load as configs
from sds3d.data import toybox
from sds3d.data.tracing import NORMAL, normals, part_distances, relit, shade
from sds3d.evaluate.truth import MEANS, unseen_views
from sds3d.prompts import COLOURS
from sds3d.runs import scene, scene_parts
from sds3d.runs.folder import Run
from sds3d.runs.scene import Asset
from sds3d.runtime.distributed import Processes

PROMPT = "a grey ball on a grey background"  # whose outline is hardly seen: the figures are those of the surface


class ToyField(AnalyticField):
    """A toy as a density, with its colours, lit or not, and with its normals or wrong ones."""

    def __init__(self, toy, lit, turn=None):
        def colour(points):
            part = part_distances(toy.kind, points).argmin(-1)
            names = {"main": toy.main, "second": toy.second}
            albedo = torch.tensor([COLOURS[names.get(slot, slot)] for _, slot in toy.kind.parts])[part]
            return albedo * shade(self.true_normals(points))[:, None] if lit else albedo

        super().__init__(solid(lambda points: -toy.sdf(points), edge=0.005), colour)
        self.kind, self.turn = toy.kind, torch.eye(3) if turn is None else turn

    def true_normals(self, points):
        return normals(self.kind, points)

    def normals(self, points):
        return self.true_normals(points) @ self.turn


def asset(folder, field, *overrides):
    """An asset whose scene has this field."""
    layer = configs.parse_overrides(["device=cpu", "backend=torch", "render.fine_samples=64", *overrides])
    config = configs.load(PROMPT, layer | {"export.mesh.resolution": 32, "out": str(folder)})
    student = scene_parts.build_student(config, None, Processes())
    field.backend = student.field.backend
    del student.field
    student.field = field
    student.occupancy.update(field, 0, torch.Generator().manual_seed(0))
    return Asset(Run.create(config.out, PROMPT, configs.to_yaml(config)), config, student)


def no_mesh():
    raise ValueError("no mesh")


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Four assets and their scores."""
    toy, folder = toybox.parse(PROMPT), tmp_path_factory.mktemp("lit")
    opposite = torch.diag(torch.tensor([-1.0, -1.0, -1.0]))
    made = {
        "albedo": asset(folder, ToyField(toy, lit=False), "domains.colours=albedo"),
        "wrong normals": asset(folder, ToyField(toy, lit=False, turn=opposite), "domains.colours=albedo"),
        "baked, as albedo": asset(folder, ToyField(toy, lit=True), "domains.colours=albedo"),
        "baked": asset(folder, ToyField(toy, lit=True)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene, "EVAL_SIZE", 32)  # a quarter of the time
        for name in ("wrong normals", "baked, as albedo", "baked"):
            made[name].mesh = no_mesh  # half of the rest
        return {name: (one, one.evaluate()) for name, one in made.items()}


def test_the_toys_own_layers_under_its_light_are_its_lit_views():
    """Within a pixel of two normals, the mean of the brightness is not the brightness of the mean: at edges only."""
    toy, cameras = toybox.parse("a green cube on a yellow cylinder"), unseen_views()[torch.arange(4)]
    lit, coverage = toy.render(cameras, 64)
    normal = toy._layers(cameras, 64, 2)[:, NORMAL]
    found = relit(toy.albedo(cameras, 64), coverage, 0.3 * normal, torch.ones(3))
    error = (found - lit).abs()
    assert error.mean() < 5e-4 and error.max() < 0.15
    assert (toy.albedo(cameras, 64) - lit).abs().max() > 0.3


def test_albedo_is_lit_before_it_is_compared_and_wrong_normals_are_seen(assets):
    found = {name: scores for name, (_, scores) in assets.items()}
    print({name: (scores.iou, scores.psnr, scores.psnr_albedo) for name, scores in found.items()})
    assert all(scores.iou > 0.97 for scores in found.values())
    assert found["albedo"].psnr > 26 and found["albedo"].psnr_albedo > 26
    assert found["wrong normals"].psnr < found["albedo"].psnr - 8
    assert found["wrong normals"].psnr_albedo == pytest.approx(found["albedo"].psnr_albedo)
    assert found["baked"].psnr > 26 and found["baked"].psnr_albedo is None and found["baked"].albedo is None
    for score in ("psnr", "psnr_albedo"):  # baked colours are no albedo
        assert getattr(found["baked, as albedo"], score) < found["albedo"].psnr - 8


def test_both_figures_are_in_the_files_and_on_the_page(assets):
    heights = {}
    for name in ("albedo", "baked"):
        made, _ = assets[name]
        stored, page = json.loads(made.file("eval.json").read_text()), (made.path / "index.html").read_text()
        assert ("PSNR of the albedo, dB" in page) == (name == "albedo") == (stored["psnr_albedo"] is not None)
        assert made.light_baked == (name == "baked")
        heights[name] = Image.open(made.file("eval.png")).height
    assert heights["albedo"] > heights["baked"] + 2 * 96


def test_scores_fit_a_terminal_of_80_columns(assets):
    numbers = assets["albedo"][1].numbers()
    text = score_lines(PROMPT, numbers)
    assert max(map(len, text.splitlines())) <= 80 and "(albedo " in text and "pieces 1, genus 0" in text, text
    mean = score_lines("mean of 2", {name: numbers[name] for name in MEANS})
    assert max(map(len, mean.splitlines())) <= 80 and "as the truth's" in mean, mean
    worst = numbers | {"components": 123, "true_components": 10, "true_genus": 10, "psnr": 60.0, "genus": 1000}
    assert max(map(len, score_lines("x", worst).splitlines())) <= 80
