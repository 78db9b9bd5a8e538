"""What goes over to a GPU and comes back; on a CPU, nothing waits and nothing is put off."""

from __future__ import annotations

import pytest
import torch

from sds3d.config.load import load
from sds3d.runs import build
from sds3d.runtime.transfer import StepMetrics, onto
from sds3d.teachers import small
from sds3d.train import _one_step, _State, make_optimiser


def test_figures_of_a_cpu_are_looked_at_as_they_come():
    figures = StepMetrics()
    figures.add("loss", torch.tensor(2.5, dtype=torch.float64, requires_grad=True))
    figures.add("t", 0.25)
    figures.require(torch.tensor(True), ArithmeticError("never"))
    assert figures.read() == {"loss": 2.5, "t": 0.25}
    with pytest.raises(ArithmeticError, match="now"):
        figures.require(torch.tensor(False), ArithmeticError("now"))


def test_onto_leaves_a_tensor_that_is_there():
    x = torch.arange(3)
    assert onto(x, "cpu") is x


@pytest.mark.parametrize(
    ("capability", "wanted", "given"),
    [((7, 5), None, torch.float32), ((7, 5), torch.bfloat16, torch.float32), ((8, 0), None, torch.bfloat16)],
)
def test_a_gpu_too_old_for_bf16_says_so(monkeypatch, recwarn, capability, wanted, given):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    assert small.pick_dtype(torch.device("cuda"), wanted) == given
    said = [str(w.message) for w in recwarn]
    assert (
        said == ["Old GPU (compute capability 7.5) has no bfloat16: the teacher runs in float32"][: capability < (8,)]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["sds", "vsd", "sdi"])
def test_a_step_on_a_gpu_waits_for_nothing(method: str):
    """torch raises where the host would wait for the GPU. The first steps may: they learn the number of samples."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = load("a red mug", {"method": method, "device": "cuda", "steps": 40})
    teacher, student = build.build_teacher(config), build.build_student(config)
    critic = build.build_critic(config, teacher)
    optimiser = make_optimiser(student, config.optim)
    state = _State(student, optimiser, torch.Generator().manual_seed(0), 0, 0.0, critic)
    objectives, plan = {"score": build.build_objective(config, teacher, critic)}, config.plan()
    for _ in range(20):
        _one_step(state, objectives, plan).read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = [_one_step(state, objectives, plan) for _ in range(9)]  # the occupancy's update is among them
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(each.read()["loss"] > 0 for each in figures)
