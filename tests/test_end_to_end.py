"""The main job, from prompt to mesh, scored against the truth."""

import pytest
import trimesh

import sds3d

# Held out, and written down (commit 7c538b1) before any teacher was trained.
PROMPT = "a green rocket"


@pytest.fixture(scope="module")
def rocket(tmp_path_factory):
    return sds3d.generate(PROMPT, out=str(tmp_path_factory.mktemp("runs")), steps=300)


def test_a_held_out_prompt_becomes_a_mesh(rocket):
    files = {p.name for p in rocket.path.iterdir()}
    assert {"mesh.glb", "turntable.mp4", "preview.png", "metrics.jsonl", "config.yaml"} <= files
    mesh = trimesh.load(rocket.path / "mesh.glb", force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # they part where the texture does
    assert mesh.is_watertight and mesh.volume > 0.01
    assert mesh.bounds[:, 1].tolist() == pytest.approx([0, 1], abs=1e-3)  # stands on the ground, one high


def test_it_looks_like_the_truth(rocket):
    scores = rocket.evaluate()
    assert scores.iou >= 0.75, scores.numbers()
