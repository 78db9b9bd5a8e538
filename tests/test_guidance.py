"""Guidance against its own algebra: convention, orthogonality, and that it commutes with the parametrisation."""

import torch

from sds3d.diffusion.guidance import cfg, cfg_rescale, perp_neg
from sds3d.diffusion.noise import KINDS, Prediction, Schedule


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_cfg_convention():
    uncond, cond = some(2, 3, 4, 4), some(2, 3, 4, 4, seed=1)
    assert torch.equal(cfg(uncond, cond, 0.0), uncond)
    assert torch.allclose(cfg(uncond, cond, 1.0), cond, atol=1e-15)
    w = 6.5  # a paper's eps_cond + w (eps_cond - eps_uncond)
    assert torch.allclose(cfg(uncond, cond, w + 1), cond + w * (cond - uncond), atol=1e-13)


def test_perp_neg_takes_only_the_perpendicular_part():
    uncond, cond, negatives = some(3, 2, 4, 4), some(3, 2, 4, 4, seed=1), some(2, 3, 2, 4, 4, seed=2)
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.3, 2.0, 0.0]], dtype=torch.float64)
    taken = cfg(uncond, cond, 5.0) - perp_neg(uncond, cond, negatives, weights, 5.0)
    positive = (cond - uncond).flatten(1)
    assert (taken.flatten(1) * positive).sum(1).abs().max() < 1e-10  # sample by sample
    # by Gram-Schmidt on one sample, with the projection matrix written out
    p = positive[1][:, None]
    projector = torch.eye(len(p), dtype=torch.float64) - p @ p.T / (p.T @ p)
    n = (negatives - uncond)[:, 1].flatten(1)
    expected = 5.0 * projector @ (0.5 * n[0] + 2.0 * n[1])
    assert torch.allclose(taken[1].flatten(), expected, atol=1e-12)
    assert float(taken[2].abs().max()) < 1e-14  # weights 0: plain CFG


def test_perp_neg_ignores_parallel_negatives_and_survives_no_direction():
    uncond, cond = some(2, 3, 4, 4), some(2, 3, 4, 4, seed=1)
    parallel = (uncond - 3 * (cond - uncond))[None]
    ones = torch.ones(1, 2, dtype=torch.float64)
    assert torch.allclose(perp_neg(uncond, cond, parallel, ones, 4.0), cfg(uncond, cond, 4.0), atol=1e-12)
    assert bool(perp_neg(uncond, uncond, parallel, ones, 4.0).isfinite().all())


def test_perp_neg_keeps_samples_apart():
    uncond, cond, negatives = some(4, 3, 2, 2), some(4, 3, 2, 2, seed=1), some(2, 4, 3, 2, 2, seed=2)
    weights, order = some(2, 4, seed=3).abs(), torch.tensor([2, 0, 3, 1])
    whole = perp_neg(uncond, cond, negatives, weights, 7.5)
    permuted = perp_neg(uncond[order], cond[order], negatives[:, order], weights[:, order], 7.5)
    assert torch.allclose(permuted, whole[order], atol=1e-14)
    alone = perp_neg(uncond[:1], cond[:1], negatives[:, :1], weights[:, :1], 7.5)
    assert torch.allclose(alone, whole[:1], atol=1e-14)


def test_guidance_commutes_with_the_parametrisation():
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    schedule = Schedule.ve()
    alpha, sigma = schedule.alpha_sigma(t)
    x_t = some(2, 3, 4, 4)
    answers = [Prediction(some(2, 3, 4, 4, seed=i), x_t, alpha, sigma, "eps", schedule.rates(t)) for i in (1, 2, 3)]
    weights = torch.full((1, 2), 0.7, dtype=torch.float64)

    def guided(kind: str, perpendicular: bool) -> torch.Tensor:
        uncond, cond, negative = (getattr(a, kind) for a in answers)
        return perp_neg(uncond, cond, negative[None], weights, 5.0) if perpendicular else cfg(uncond, cond, 5.0)

    for perpendicular in (False, True):
        eps = guided("eps", perpendicular)
        for kind in KINDS:
            back = Prediction(guided(kind, perpendicular), x_t, alpha, sigma, kind, schedule.rates(t)).eps
            assert (back - eps).abs().max() < 1e-10, kind


def test_rescale_gives_the_guided_image_the_spread_of_the_prompt_alone():
    g = torch.Generator().manual_seed(0)
    cond, guided = torch.randn((2, 4, 3, 8, 8), generator=g, dtype=torch.float64)
    guided = guided * torch.tensor([0.5, 2.0, 3.0, 7.0]).view(4, 1, 1, 1)
    full, half = cfg_rescale(guided, cond, 1.0), cfg_rescale(guided, cond, 0.5)
    assert torch.allclose(full.flatten(1).std(1), cond.flatten(1).std(1))
    assert torch.allclose(half, 0.5 * guided + 0.5 * full)
    assert torch.equal(cfg_rescale(guided, cond, 0.0), guided)
