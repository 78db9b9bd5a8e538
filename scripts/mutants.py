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
TESTS = ["guidance", "prompts", "distill", "methods", "answers", "samplers", "times", "critics"]
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
    ("distill/vsd.py", "- q.critic_eps()", "+ q.critic_eps()"),
    (
        "distill/vsd.py",
        "q.guided(scale_of(self.scale, q.step)) - q.critic_eps()",
        "q.critic_eps() - q.guided(scale_of(self.scale, q.step))",
    ),
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
    ("distill/core.py", "(w.view(-1, *[1] * (d.dim() - 1)) * d)", "d"),
    ("distill/core.py", "(x - (x - g).detach())", "(x - (x + g).detach())"),
    ("distill/core.py", ".square().sum() / len(x)", ".square().sum()"),
    ("distill/core.py", '"negative" if self.negative else "uncond"', '"uncond"'),
    ("noise.py", "return sigma**2 / (alpha**2 + sigma**2)", "return sigma**2"),
    ("noise.py", "return sigma / alpha", "return alpha / sigma"),
    ("guidance.py", "uncond + scale * (cond - uncond)", "cond + scale * (cond - uncond)"),
    ("guidance.py", "uncond + scale * (positive - subtracted)", "uncond + scale * (positive + subtracted)"),
    ("guidance.py", "n - along[..., None] * p", "n + along[..., None] * p"),
    ("guidance.py", "share * wanted / has", "share * has / wanted"),
    ("prompts.py", '"front view": away / 180', '"front view": 1 - away / 180'),
    ("distill/core.py", "self.guidance.perp_neg * each, scale", "self.guidance.perp_neg * each[[1, 0, 2]], scale"),
    ("distill/core.py", "rescaled(guided.x0, cond.x0, self.guidance.rescale)", "guided.x0"),
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
