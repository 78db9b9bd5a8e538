"""Plant a bug in every method and in the core, one at a time, and see which test fails.

    python scripts/mutants.py                              prints a line a bug; exit code 1 if one survives
    python scripts/mutants.py distill/dds.py noise.py      only the bugs of these files

Works on a copy: the checkout stays as it is.
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
TESTS = (  # the quickest first: a run stops at the first that fails
    "guidance prompts times one_step adversary pairs methods distill answers samplers critics hf_generators"
).split()
MUTANTS = (  # file under sds3d/, what stands there, what is put there
    ("distill/sds.py", ") - q.noise", ") + q.noise"),
    (
        "distill/sds.py",
        "q.guided(scale_of(self.scale, q.step)) - q.noise",
        "q.noise - q.guided(scale_of(self.scale, q.step))",
    ),
    ("distill/nfsd.py", "torch.where(low, 0.0, negative)", "torch.where(low, negative, 0.0)"),
    ("distill/nfsd.py", "(cond - uncond)", "(uncond - cond)"),
    ("distill/nfsd.py", ".view(-1, *[1] * (q.x.dim() - 1))", ""),
    (
        "distill/nfsd.py",
        'cond, uncond, negative = q.eps("cond", "uncond", "negative")',
        'cond, negative, uncond = q.eps("cond", "uncond", "negative")',
    ),
    ("distill/csd.py", "return cond - uncond", "return uncond - cond"),
    ("distill/csd.py", "share * (negative - uncond)", "share * (uncond - negative)"),
    ("distill/sdi.py", "- kappa", "+ kappa"),
    ("distill/sdi.py", "alpha * q.x) / sigma", "q.x) / sigma"),
    ("distill/sdi.py", 'WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),
    ("distill/sdi.py", "self.inversion_scale, self.eta", "-self.inversion_scale, self.eta"),
    ("distill/ism.py", "- uncond.eps", "+ uncond.eps"),
    ("distill/ism.py", "scale=0.0", "scale=1.0"),
    ("distill/ism.py", "(q.t - self.gap)", "(q.t + self.gap)"),
    ("distill/ism.py", "noised(uncond.x0, uncond.eps, q.alpha, q.sigma)", "noised(q.x, uncond.eps, q.alpha, q.sigma)"),
    ("distill/bridge.py", "(cond - spoilt)", "(spoilt - cond)"),
    ("distill/bridge.py", "q.step < self.second", "q.step > self.second"),
    ("distill/bridge.py", "- q.noise", "+ q.noise"),
    ("distill/dds.py", "q.guided(scale) - q.guided_at(source_t", "q.guided(scale) + q.guided_at(source_t"),
    ("distill/dds.py", "noised(source, q.noise", "noised(q.x, q.noise"),
    ("distill/dds.py", "scale, away, prompt)", "scale, away)"),
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
    ("distill/diffinstruct.py", 'WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),
    ("distill/dmd.py", 'WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),
    ("distill/dmd.py", "image_normaliser(q, scale_of(self.scale, q.step), self.floor)", "1.0"),
    ("distill/dmd.py", "scale_of(self.scale, q.step), self.floor", "scale_of(self.scale, 0), self.floor"),
    ("distill/dmd.py", "q.step), self.floor)", "q.step), 1e-2)"),
    ("distill/dmd2.py", 'WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),
    ("distill/dmd2.py", "image_normaliser(q, scale_of(self.scale, q.step), self.floor)", "1.0"),
    ("distill/dmd2.py", "scale_of(self.scale, q.step), self.floor", "scale_of(self.scale, 0), self.floor"),
    ("distill/dmd2.py", "q.step), self.floor)", "q.step), 1e-2)"),
    ("distill/adversarial.py", "F.softplus(-verdict)", "F.softplus(verdict)"),
    ("distill/adversarial.py", "* x[0].numel() *", "*"),
    ("distill/adversarial.py", "(-verdict).mean()", "(-verdict).sum()"),
    ("distill/adversarial.py", "(slope * (x", "(-slope * (x"),
    ("distill/adversarial.py", "loss.detach() + (slope", "loss + (slope"),
    ("distill/adversarial.py", "(x - x.detach())", "x"),
    ("distill/regression.py", "self.weight * chosen.x[0].numel()", "self.weight"),
    ("distill/regression.py", "self.paint(chosen.noise,", "self.paint(chosen.x,"),
    ("distill/regression.py", "chosen.x).mean()", "chosen.x).sum()"),
    ("distill/regression.py", "chosen.prompts), chosen.x)", "chosen.prompts), chosen.noise)"),
    ("distill/regression.py", "self.share.randint(len(self.pairs.prompts)", "self.share.randint(self.batch"),
    ("distill/regression.py", "self.share.of(self.batch), generator", "self.batch, generator"),
    ("adversary.py", "F.softplus(-self.verdict(real", "F.softplus(self.verdict(real"),
    ("adversary.py", "F.softplus(self.verdict(x", "F.softplus(-self.verdict(x"),
    ("adversary.py", "self.verdict(real, prompts", "self.verdict(real, draw.prompts"),
    ("adversary.py", " + self.weight * (told + missed)", ""),
    ("adversary.py", "self.weight * (told", "(told"),
    ("adversary.py", "[*super().parts(), self.head]", "super().parts()"),
    ("adversary.py", "self.network, x_t, t", "self.network, x, t"),
    ("adversary.py", "self.teacher.features(self.network", "self.teacher.features(self.teacher.network"),
    ("adversary.py", 'self.head.load_state_dict(state["head"])', "pass"),
    ("adversary.py", "torch.manual_seed(generator.initial_seed())", "pass"),
    ("generators/one_step.py", "(1 - torch.arange", "(1 + torch.arange"),
    ("generators/one_step.py", "/ config.steps)", "/ (config.steps + 1))"),
    ("generators/one_step.py", "noised(x, fresh, a, s)", "noised(torch.zeros_like(x), fresh, a, s)"),
    ("generators/one_step.py", "noised(x, fresh, a, s)", "noised(x, noise[0], a, s)"),
    ("generators/one_step.py", "when, prompts).x0", "when, prompts).eps"),
    ("generators/one_step.py", " and i == len(noise) - 1", ""),
    ("generators/one_step.py", "torch.randint(self.config.steps, (), generator=generator)", "self.config.steps - 1"),
    ("generators/one_step.py", "torch.randint(self.config.steps, (), generator=generator)", "0"),
    ("generators/one_step.py", "self.share.randint(len(self.prompts)", "self.share.randint(1"),
    ("generators/one_step.py", "config.batch / half_life", "half_life / config.batch"),
    ("generators/one_step.py", "images(self.teacher, self.means[0].module", "images(self.teacher, self.network"),
    ("generators/one_step.py", "if size is not None:", "if False:"),
    ("teachers/hf/generator.py", "* levels.count + 1) / steps", "* levels.count) / steps"),
    ("teachers/hf/generator.py", "stochastic_sampling=True", "stochastic_sampling=False"),
    ("teachers/hf/generator.py", "alpha**2", "alpha"),
    ("teachers/hf/families.py", ', "time_cond_proj_dim": 256', ""),
    ("samplers.py", "2 * self.steps - 1 if", "2 * self.steps if"),
    ("samplers.py", "(evaluations + 1) // 2", "evaluations // 2"),
    ("samplers.py", 'float(self.name == "ddpm")', "0.0"),
    ("samplers.py", "float(torch.hypot(*schedule.alpha_sigma(times[:1]))) * noise", "noise"),
    ("samplers.py", "r ** (1 / rho)", "r"),
    ("samplers.py", "back(torch.lerp(*scale(ends)", "(torch.lerp(*(ends)"),
    ("samplers.py", "at.sigma / at.alpha) / 2", "at.sigma / at.alpha)"),
    ("samplers.py", "noised(x_t, here.eps, to.alpha / at.alpha", "noised(x_t, there.eps, to.alpha / at.alpha"),
    ("samplers.py", "h / (2 * length)", "length / (2 * h)"),
    ("samplers.py", "1 + share, -share", "1 - share, share"),
    ("samplers.py", "torch.expm1(-h)", "torch.expm1(h)"),
    ("samplers.py", "(1 - ratio**2)", "(1 - ratio)"),
    ("samplers.py", "(to.sigma**2 - fresh**2)", "(to.sigma**2)"),
    ("distill/core.py", "(w.view(-1, *[1] * (d.dim() - 1)) * d)", "d"),
    ("distill/core.py", "(x - (x - g).detach())", "(x - (x + g).detach())"),
    ("distill/core.py", ".square().sum() / len(x)", ".square().sum()"),
    ("query.py", '"negative" if self.negative else "uncond"', '"uncond"'),
    ("noise.py", "return sigma**2 / (alpha**2 + sigma**2)", "return sigma**2"),
    ("noise.py", "return sigma / alpha", "return alpha / sigma"),
    ("guidance.py", "uncond + scale * (cond - uncond)", "cond + scale * (cond - uncond)"),
    ("guidance.py", "uncond + scale * (positive - subtracted)", "uncond + scale * (positive + subtracted)"),
    ("guidance.py", "n - along[..., None] * p", "n + along[..., None] * p"),
    ("guidance.py", "share * wanted / has", "share * has / wanted"),
    ("prompts.py", '"front view": away / 180', '"front view": 1 - away / 180'),
    ("query.py", "self.guidance.perp_neg * each, scale", "self.guidance.perp_neg * each[[1, 0, 2]], scale"),
    ("query.py", "rescaled(getattr(guided, kind), getattr(cond, kind), self.guidance.rescale)", "guided.x0"),
    ("critics.py", "teacher.network.eval()", "teacher.network"),
    ("critics.py", "target(answer.kind, x, noise", "target(answer.kind, noise, x"),
)


def catcher(copy: Path, file: str, old: str, new: str) -> str:
    """The test that caught a bug, or "" where none did."""
    path = copy / "sds3d" / file
    text = path.read_text()
    assert text.count(old) >= 1, f"{file} no longer says {old!r}; bring the list up to date"
    path.write_text(text.replace(old, new))
    tests = [f"tests/test_{name}.py" for name in TESTS]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    path.write_text(text)
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return found[1] if found else ""


def main() -> None:
    wanted = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant[0] in sys.argv[1:]]
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("sds3d", "tests", "configs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for file, old, new in wanted:
            caught = catcher(copy, file, old, new)
            alive += not caught
            print(f"{file}: {old}  ->  {new or '(nothing)'}\n    {caught or 'SURVIVES'}", flush=True)
    print(f"{len(wanted) - alive} of {len(wanted)} bugs were caught")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
