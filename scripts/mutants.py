"""Plant bugs in the methods and the core, one at a time, and report which test catches each.

    python scripts/mutants.py                              prints a line a bug; exit code 1 if one survives
    python scripts/mutants.py distill/score/dds.py diffusion/noise.py      only the bugs of these files

The script works on a copy of the checkout.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (  # the fastest first: a run stops at the first failure
    "guidance prompts timesteps one_step discriminators pairs methods distill answers samplers critics hf_generators"
).split()
MUTANTS = (  # file under sds3d/, text to replace, replacement
    ("distill/score/sds.py", ") - q.noise", ") + q.noise"),
    (
        "distill/score/sds.py",
        "q.guided(scale_of(self.scale, q.step)) - q.noise",
        "q.noise - q.guided(scale_of(self.scale, q.step))",
    ),
    ("distill/score/nfsd.py", "torch.where(low, 0.0, negative)", "torch.where(low, negative, 0.0)"),
    ("distill/score/nfsd.py", "(cond - uncond)", "(uncond - cond)"),
    ("distill/score/nfsd.py", "per_sample(q.sigma < self.switch * q.alpha, q.x)", "q.sigma < self.switch * q.alpha"),
    (
        "distill/score/nfsd.py",
        'cond, uncond, negative = q.eps("cond", "uncond", "negative")',
        'cond, negative, uncond = q.eps("cond", "uncond", "negative")',
    ),
    ("distill/score/csd.py", "return cond - uncond", "return uncond - cond"),
    ("distill/score/csd.py", "share * (negative - uncond)", "share * (uncond - negative)"),
    ("distill/score/sdi.py", "- kappa", "+ kappa"),
    ("distill/score/sdi.py", "per_sample(q.alpha, q.x) * q.x", "q.x"),
    ("distill/score/sdi.py", 'WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),
    ("distill/score/sdi.py", "self.inversion_scale, self.eta", "-self.inversion_scale, self.eta"),
    ("distill/score/ism.py", "- uncond.eps", "+ uncond.eps"),
    ("distill/score/ism.py", "scale=0.0", "scale=1.0"),
    ("distill/score/ism.py", "(q.t - self.gap)", "(q.t + self.gap)"),
    (
        "distill/score/ism.py",
        "noised(uncond.x0, uncond.eps, q.alpha, q.sigma)",
        "noised(q.x, uncond.eps, q.alpha, q.sigma)",
    ),
    ("distill/score/bridge.py", "(cond - spoilt)", "(spoilt - cond)"),
    ("distill/score/bridge.py", "q.step < self.second", "q.step > self.second"),
    ("distill/score/bridge.py", "- q.noise", "+ q.noise"),
    ("distill/score/dds.py", "q.guided(scale) - q.guided_at(source_t", "q.guided(scale) + q.guided_at(source_t"),
    ("distill/score/dds.py", "noised(source, q.noise", "noised(q.x, q.noise"),
    ("distill/score/dds.py", "scale, away, prompt)", "scale, away)"),
    ("distill/core.py", "- q.critic_eps()", "+ q.critic_eps()"),
    (
        "distill/core.py",
        "q.guided(scale_of(self.scale, q.step)) - q.critic_eps()",
        "q.critic_eps() - q.guided(scale_of(self.scale, q.step))",
    ),
    ("distill/core.py", " * self.method.normaliser(q)", ""),
    ("distill/core.py", "return 1 / (q.x - x0)", "return (q.x - x0)"),
    ("distill/core.py", "(q.x - x0).abs()", "(q.x_t - x0).abs()"),
    ("distill/core.py", "(q.x - x0).abs()", "(q.x - x0).square()"),
    ("distill/core.py", ".abs().flatten(1).mean(1)", ".abs().mean()"),
    ("distill/core.py", ".clamp_min(floor)", ""),
    ("distill/core.py", "q.guided(scale), q.x_t", "q.guided(1.0), q.x_t"),
    ("distill/score/diffinstruct.py", 'WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),
    ("distill/score/dmd.py", 'WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),
    ("distill/score/dmd.py", "image_normaliser(q, scale_of(self.scale, q.step), self.floor)", "1.0"),
    ("distill/score/dmd.py", "scale_of(self.scale, q.step), self.floor", "scale_of(self.scale, 0), self.floor"),
    ("distill/score/dmd.py", "q.step), self.floor)", "q.step), 1e-2)"),
    ("distill/score/dmd2.py", 'WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),
    ("distill/score/dmd2.py", "image_normaliser(q, scale_of(self.scale, q.step), self.floor)", "1.0"),
    ("distill/score/dmd2.py", "scale_of(self.scale, q.step), self.floor", "scale_of(self.scale, 0), self.floor"),
    ("distill/score/dmd2.py", "q.step), self.floor)", "q.step), 1e-2)"),
    ("distill/adversarial/generator_loss.py", "F.softplus(-verdict)", "F.softplus(verdict)"),
    ("distill/adversarial/generator_loss.py", "* x[0].numel() *", "*"),
    ("distill/adversarial/generator_loss.py", "(-verdict).mean()", "(-verdict).sum()"),
    ("distill/adversarial/generator_loss.py", "(slope * (x", "(-slope * (x"),
    ("distill/adversarial/generator_loss.py", "loss.detach() + (slope", "loss + (slope"),
    ("distill/adversarial/generator_loss.py", "(x - x.detach())", "x"),
    ("distill/regression.py", "self.weight * chosen.x[0].numel()", "self.weight"),
    ("distill/regression.py", "self.paint(chosen.noise,", "self.paint(chosen.x,"),
    ("distill/regression.py", "chosen.x).mean()", "chosen.x).sum()"),
    ("distill/regression.py", "chosen.prompts), chosen.x)", "chosen.prompts), chosen.noise)"),
    ("distill/regression.py", "self.processes.randint(len(self.pairs.prompts)", "self.processes.randint(self.batch"),
    ("distill/regression.py", "self.processes.local_batch(self.batch), rng", "self.batch, rng"),
    ("distill/discriminators.py", "F.softplus(-self.verdict(real", "F.softplus(self.verdict(real"),
    ("distill/discriminators.py", "F.softplus(self.verdict(x", "F.softplus(-self.verdict(x"),
    ("distill/discriminators.py", "self.verdict(real, prompts", "self.verdict(real, draw.prompts"),
    ("distill/discriminators.py", " + self.weight * (told + missed)", ""),
    ("distill/discriminators.py", "self.weight * (told", "(told"),
    ("distill/discriminators.py", "[*super().parts(), self.head]", "super().parts()"),
    ("distill/discriminators.py", "self.network, x_t, t", "self.network, x, t"),
    ("distill/discriminators.py", "self.shown.features(self.network", "self.shown.features(self.teacher.network"),
    ("distill/discriminators.py", 'self.head.load_state_dict(state["head"])', "pass"),
    ("distill/discriminators.py", "torch.manual_seed(rng.initial_seed())", "pass"),
    ("students/generator.py", "(1 - torch.arange", "(1 + torch.arange"),
    ("students/generator.py", "/ config.steps)", "/ (config.steps + 1))"),
    ("students/generator.py", "noised(x, fresh, a, s)", "noised(torch.zeros_like(x), fresh, a, s)"),
    ("students/generator.py", "noised(x, fresh, a, s)", "noised(x, noise[0], a, s)"),
    ("students/generator.py", "t_k, prompts).x0", "t_k, prompts).eps"),
    ("students/generator.py", " and i == len(noise) - 1", ""),
    ("students/generator.py", "torch.randint(self.config.steps, (), generator=rng)", "self.config.steps - 1"),
    ("students/generator.py", "torch.randint(self.config.steps, (), generator=rng)", "0"),
    ("students/generator.py", "self.processes.randint(len(self.prompts)", "self.processes.randint(1"),
    ("students/generator.py", "config.batch / half_life", "half_life / config.batch"),
    ("students/generator.py", "images(self.teacher, self.means[0].module", "images(self.teacher, self.network"),
    ("students/generator.py", "if size is not None:", "if False:"),
    ("teachers/hf/generator_scheduler.py", "* levels.count + 1) / steps", "* levels.count) / steps"),
    ("teachers/hf/generator_scheduler.py", '"stochastic_sampling": True', '"stochastic_sampling": False'),
    ("teachers/hf/generator_scheduler.py", "alpha**2", "alpha"),
    ("teachers/hf/families.py", ', "time_cond_proj_dim": 256', ""),
    ("diffusion/samplers.py", "2 * self.steps - 1 if", "2 * self.steps if"),
    ("diffusion/samplers.py", "(evaluations + 1) // 2", "evaluations // 2"),
    ("diffusion/samplers.py", 'float(self.name == "ddpm")', "0.0"),
    ("diffusion/samplers.py", "float(torch.hypot(*schedule.alpha_sigma(times[:1]))) * noise", "noise"),
    ("diffusion/samplers.py", "r ** (1 / rho)", "r"),
    ("diffusion/samplers.py", "first, last = scale(ends)", "first, last = ends"),
    ("diffusion/samplers.py", "at.sigma / at.alpha) / 2", "at.sigma / at.alpha)"),
    (
        "diffusion/samplers.py",
        "noised(x_t, here.eps, to.alpha / at.alpha",
        "noised(x_t, there.eps, to.alpha / at.alpha",
    ),
    ("diffusion/samplers.py", "h / (2 * before[1])", "before[1] / (2 * h)"),
    ("diffusion/samplers.py", "1 + share, -share", "1 - share, share"),
    ("diffusion/samplers.py", "torch.expm1(-h)", "torch.expm1(h)"),
    ("diffusion/samplers.py", "(1 - ratio**2)", "(1 - ratio)"),
    ("diffusion/samplers.py", "(to.sigma**2 - fresh**2)", "(to.sigma**2)"),
    ("distill/core.py", "(per_sample(w, d) * d)", "d"),
    ("distill/core.py", "(x - (x - g).detach())", "(x - (x + g).detach())"),
    ("distill/core.py", ".square().sum() / len(x)", ".square().sum()"),
    ("distill/query.py", '"negative" if self.negative else "uncond"', '"uncond"'),
    ("distill/weights.py", "return sigma**2 / (alpha**2 + sigma**2)", "return sigma**2"),
    ("distill/weights.py", "return sigma / alpha", "return alpha / sigma"),
    ("diffusion/guidance.py", "uncond + scale * (cond - uncond)", "cond + scale * (cond - uncond)"),
    ("diffusion/guidance.py", "uncond + scale * (positive - subtracted)", "uncond + scale * (positive + subtracted)"),
    ("diffusion/guidance.py", "n - along[..., None] * p", "n + along[..., None] * p"),
    ("diffusion/guidance.py", "share * wanted / has", "share * has / wanted"),
    ("prompts.py", '"front view": away / 180', '"front view": 1 - away / 180'),
    ("distill/query.py", "self.guidance.perp_neg * each, scale", "self.guidance.perp_neg * each[[1, 0, 2]], scale"),
    ("distill/query.py", "rescaled(getattr(guided, kind), getattr(cond, kind), self.guidance.rescale)", "guided.x0"),
    ("distill/critics.py", "teacher.network.eval()", "teacher.network"),
    ("distill/critics.py", "target(answer.kind, x, noise", "target(answer.kind, noise, x"),
)


def catcher(copy: Path, file: str, old: str, new: str) -> str:
    """Return the name of the test that catches a bug, "" if none does."""
    path = copy / "sds3d" / file
    text = path.read_text()
    assert text.count(old) >= 1, f"{file} no longer says {old!r}; bring the list up to date"
    path.write_text(text.replace(old, new))
    tests = [f"tests/test_{name}.py" for name in TESTS]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    path.write_text(text)
    failure = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return failure[1] if failure else ""


def main() -> None:
    mutants = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant[0] in sys.argv[1:]]
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("sds3d", "tests", "configs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for file, old, new in mutants:
            caught = catcher(copy, file, old, new)
            alive += not caught
            print(f"{file}: {old}  ->  {new or '(nothing)'}\n    {caught or 'SURVIVES'}", flush=True)
    print(f"{len(mutants) - alive} of {len(mutants)} bugs were caught")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
