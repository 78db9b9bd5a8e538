"""Muon: orthogonal steps."""

import pytest
import torch

from sds3d.networks.muon import Muon, matrix, orthogonal


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_orthogonal_keeps_singular_vectors_and_evens_out_singular_values():
    x = random(3, 20, 50)
    y = orthogonal(x)
    assert torch.linalg.svdvals(x).amax() / torch.linalg.svdvals(x).amin() > 4
    values = torch.linalg.svdvals(y)
    assert 0.65 < values.amin() and values.amax() < 1.25
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ v.mT  # diagonal in the singular vectors of x
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().amax() < 1e-9


def test_orthogonal_is_the_quintic_iteration_written_plainly():
    x = random(1, 6, 9)
    y = x / x.norm()
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    assert torch.allclose(orthogonal(x), y, atol=1e-10)


def test_matrix_is_a_view_with_the_short_side_first():
    conv = random(4, 8, 3, 3).to(memory_format=torch.channels_last)
    assert matrix(conv).shape == (4, 72) and matrix(conv).data_ptr() == conv.data_ptr()
    assert matrix(random(7, 3)).shape == (3, 7)
    assert torch.equal(matrix(conv)[1, :8], conv[1, :, 0, 0])


def test_a_step_has_the_size_that_adam_would_give():
    weights = [random(16, 64).requires_grad_(), random(64, 16, seed=1).requires_grad_()]
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = 1e-5 * random(*w.shape, seed=2)
    Muon(weights, lr=1e-2).step()
    for w, old in zip(weights, before):
        assert (w.detach() - old).square().mean().sqrt().item() == pytest.approx(0.2e-2, rel=0.15)
        assert ((w.detach() - old) * w.grad).sum() < 0


def test_it_descends_and_goes_on_from_its_state():
    goal = random(8, 4, 3, 3)

    def run(steps, w, state=None):
        muon = Muon([w], lr=0.05)
        if state is not None:
            muon.load_state_dict(state)
        for _ in range(steps):
            muon.zero_grad()
            (w - goal).square().sum().backward()
            muon.step()
        return muon.state_dict()

    def fresh():
        return torch.zeros_like(goal).to(memory_format=torch.channels_last).requires_grad_()

    whole, parts = fresh(), fresh()
    run(300, whole)
    state = run(25, parts)
    run(275, parts, state)
    assert torch.equal(whole, parts)
    assert (whole - goal).square().mean() < 0.05 * goal.square().mean()
