"""Plant bugs in the methods and the core, one at a time, and report which test catches each.

    python scripts/mutants.py                              prints a line a bug; exit code 1 if one survives
    python scripts/mutants.py distill/score/dds.py diffusion/noise.py      only the bugs of these files

The script works on a copy of the checkout.
"""

from __future__ import annotations

import ast
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
BUGS = {  # file under sds3d/ -> function or class -> an expression or statement in it, and what is put there
    "distill/score/sds.py": {
        "SDS.__call__": (
            ("q.guided(scale_of(self.scale, q.step)) - q.noise", "q.guided(scale_of(self.scale, q.step)) + q.noise"),
            ("q.guided(scale_of(self.scale, q.step)) - q.noise", "q.noise - q.guided(scale_of(self.scale, q.step))"),
        ),
    },
    "distill/score/nfsd.py": {
        "NFSD.__call__": (
            ("torch.where(low, 0.0, negative)", "torch.where(low, negative, 0.0)"),
            ("cond - uncond", "uncond - cond"),
            ("per_sample(q.sigma < self.switch * q.alpha, q.x)", "q.sigma < self.switch * q.alpha"),
            ("(cond, uncond, negative)", "(cond, negative, uncond)"),
        ),
    },
    "distill/score/csd.py": {
        "CSD.__call__": (
            ("cond - uncond", "uncond - cond"),
            ("negative - uncond", "uncond - negative"),
        ),
    },
    "distill/score/sdi.py": {
        "SDI.__call__": (
            (
                "q.at(x_t).guided(scale_of(self.scale, q.step)) - kappa",
                "q.at(x_t).guided(scale_of(self.scale, q.step)) + kappa",
            ),
            ("per_sample(q.alpha, q.x) * q.x", "q.x"),
            (
                "q.inverted(q.t, self.steps, self.inversion_scale, self.eta)",
                "q.inverted(q.t, self.steps, -self.inversion_scale, self.eta)",
            ),
        ),
        "SDI": (('WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),),
    },
    "distill/score/ism.py": {
        "ISM.__call__": (
            (
                "q.at(x_t).guided(scale_of(self.scale, q.step)) - uncond.eps",
                "q.at(x_t).guided(scale_of(self.scale, q.step)) + uncond.eps",
            ),
            ("q.inverted(s, self.steps, scale=0.0)", "q.inverted(s, self.steps, scale=1.0)"),
            ("q.t - self.gap", "q.t + self.gap"),
            ("noised(uncond.x0, uncond.eps, q.alpha, q.sigma)", "noised(q.x, uncond.eps, q.alpha, q.sigma)"),
        ),
    },
    "distill/score/bridge.py": {
        "Bridge.__call__": (
            ("cond - spoilt", "spoilt - cond"),
            ("q.step < self.second", "q.step > self.second"),
            (
                "q.guided_at(q.x_t, q.t, q.scale(scale_of(self.scale, q.step)), cached=True) - q.noise",
                "q.guided_at(q.x_t, q.t, q.scale(scale_of(self.scale, q.step)), cached=True) + q.noise",
            ),
        ),
    },
    "distill/score/dds.py": {
        "DDS.__call__": (
            (
                "q.guided(scale) - q.guided_at(source_t, q.t, scale, base, prompt)",
                "q.guided(scale) + q.guided_at(source_t, q.t, scale, base, prompt)",
            ),
            ("noised(source, q.noise, q.alpha, q.sigma)", "noised(q.x, q.noise, q.alpha, q.sigma)"),
            ("q.guided_at(source_t, q.t, scale, base, prompt)", "q.guided_at(source_t, q.t, scale, base)"),
        ),
    },
    "distill/core.py": {
        "ScoreDifference.__call__": (
            (
                "q.guided(scale_of(self.scale, q.step)) - q.critic_eps()",
                "q.guided(scale_of(self.scale, q.step)) + q.critic_eps()",
            ),
            (
                "q.guided(scale_of(self.scale, q.step)) - q.critic_eps()",
                "q.critic_eps() - q.guided(scale_of(self.scale, q.step))",
            ),
        ),
        "ScoreObjective.gradient": (
            (
                "weight(self.weight, q.alpha, q.sigma) * self.method.normaliser(q)",
                "weight(self.weight, q.alpha, q.sigma)",
            ),
            ("per_sample(w, d) * d", "d"),
        ),
        "image_normaliser": (
            (
                "1 / (q.x - x0).abs().flatten(1).mean(1).clamp_min(floor)",
                "(q.x - x0).abs().flatten(1).mean(1).clamp_min(floor)",
            ),
            ("q.x - x0", "q.x_t - x0"),
            ("(q.x - x0).abs()", "(q.x - x0).square()"),
            ("(q.x - x0).abs().flatten(1).mean(1)", "(q.x - x0).abs().mean()"),
            ("(q.x - x0).abs().flatten(1).mean(1).clamp_min(floor)", "(q.x - x0).abs().flatten(1).mean(1)"),
            ("q.guided(scale)", "q.guided(1.0)"),
        ),
        "surrogate": (
            ("x - g", "x + g"),
            ("0.5 * (x - (x - g).detach()).square().sum() / len(x)", "0.5 * (x - (x - g).detach()).square().sum()"),
        ),
    },
    "distill/score/diffinstruct.py": {
        "DiffInstruct": (('WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),),
    },
    "distill/score/dmd.py": {
        "DMD": (('WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),),
        "DMD.normaliser": (
            ("image_normaliser(q, scale_of(self.scale, q.step), self.floor)", "1.0"),
            ("scale_of(self.scale, q.step)", "scale_of(self.scale, 0)"),
            (
                "image_normaliser(q, scale_of(self.scale, q.step), self.floor)",
                "image_normaliser(q, scale_of(self.scale, q.step), 0.01)",
            ),
        ),
    },
    "distill/score/dmd2.py": {
        "DMD2": (('WEIGHT: ClassVar[str] = "x0"', 'WEIGHT: ClassVar[str] = "sigma2"'),),
        "DMD2.normaliser": (
            ("image_normaliser(q, scale_of(self.scale, q.step), self.floor)", "1.0"),
            ("scale_of(self.scale, q.step)", "scale_of(self.scale, 0)"),
            (
                "image_normaliser(q, scale_of(self.scale, q.step), self.floor)",
                "image_normaliser(q, scale_of(self.scale, q.step), 0.01)",
            ),
        ),
    },
    "distill/adversarial/generator_loss.py": {
        "Adversarial.__call__": (
            ("-logits", "logits"),
            ("self.weight * x[0].numel()", "self.weight"),
            ("F.softplus(-logits).mean()", "F.softplus(-logits).sum()"),
            ("slope * (x - x.detach())", "-slope * (x - x.detach())"),
            ("loss.detach()", "loss"),
            ("x - x.detach()", "x"),
        ),
    },
    "distill/regression.py": {
        "Regression.evaluate_without_draw": (
            ("self.weight * chosen.x[0].numel()", "self.weight"),
            ("self.paint(chosen.noise, chosen.prompts)", "self.paint(chosen.x, chosen.prompts)"),
            (
                "self.distance(self.paint(chosen.noise, chosen.prompts), chosen.x).mean()",
                "self.distance(self.paint(chosen.noise, chosen.prompts), chosen.x).sum()",
            ),
            (
                "self.distance(self.paint(chosen.noise, chosen.prompts), chosen.x)",
                "self.distance(self.paint(chosen.noise, chosen.prompts), chosen.noise)",
            ),
            ("len(self.pairs.prompts)", "self.batch"),
            ("self.processes.local_batch(self.batch)", "self.batch"),
        ),
    },
    "distill/discriminators.py": {
        "TrainedDiscriminator.loss": (
            ("-self.logits(real, prompts, rng)", "self.logits(real, prompts, rng)"),
            ("self.logits(x, draw.prompts, rng)", "-self.logits(x, draw.prompts, rng)"),
            ("self.logits(real, prompts, rng)", "self.logits(real, draw.prompts, rng)"),
            ("super().loss(draw, x, rng) + self.weight * (on_real + on_drawn)", "super().loss(draw, x, rng)"),
            ("self.weight * (on_real + on_drawn)", "on_real + on_drawn"),
        ),
        "TrainedDiscriminator.parts": (("[*super().parts(), self.head]", "super().parts()"),),
        "TrainedDiscriminator.logits": (
            (
                "self.featured.features(self.network, x_t, t, prompts)",
                "self.featured.features(self.network, x, t, prompts)",
            ),
            (
                "self.featured.features(self.network, x_t, t, prompts)",
                "self.featured.features(self.teacher.network, x_t, t, prompts)",
            ),
        ),
        "TrainedDiscriminator.load_state_dict": (('self.head.load_state_dict(state["head"])', "pass"),),
        "TrainedDiscriminator.__init__": (("torch.manual_seed(rng.initial_seed())", "pass"),),
    },
    "students/generator.py": {
        "times": (
            (
                "1 - torch.arange(config.steps, dtype=torch.float64) / config.steps",
                "1 + torch.arange(config.steps, dtype=torch.float64) / config.steps",
            ),
            (
                "torch.arange(config.steps, dtype=torch.float64) / config.steps",
                "torch.arange(config.steps, dtype=torch.float64) / (config.steps + 1)",
            ),
        ),
        "paint": (
            ("noised(x, fresh, a, s)", "noised(torch.zeros_like(x), fresh, a, s)"),
            ("noised(x, fresh, a, s)", "noised(x, noise[0], a, s)"),
            (
                "teacher.answer(network, noised(x, fresh, a, s), t_k, prompts).x0",
                "teacher.answer(network, noised(x, fresh, a, s), t_k, prompts).eps",
            ),
            ("torch.is_grad_enabled() and i == len(noise) - 1", "torch.is_grad_enabled()"),
            ("size is not None", "False"),
        ),
        "FewStepGenerator.draw": (
            ("torch.randint(self.config.steps, (), generator=rng)", "self.config.steps - 1"),
            ("torch.randint(self.config.steps, (), generator=rng)", "0"),
            ("len(self.prompts)", "1"),
        ),
        "FewStepGenerator.__init__": (("config.batch / half_life", "half_life / config.batch"),),
        "FewStepGenerator.images": (
            (
                "images(self.teacher, self.means[0].module, self.times, prompts, seed, self.size)",
                "images(self.teacher, self.network, self.times, prompts, seed, self.size)",
            ),
        ),
    },
    "teachers/hf/generator_scheduler.py": {
        "build_scheduler": (
            ("first * levels.count + 1", "first * levels.count"),
            (
                '{"shift_terminal": last, "stochastic_sampling": True}',
                '{"shift_terminal": last, "stochastic_sampling": False}',
            ),
            ("alpha ** 2", "alpha"),
        ),
    },
    "teachers/hf/families.py": {
        "Family.adapt": (('{"sample_size": side, "time_cond_proj_dim": 256}', '{"sample_size": side}'),),
    },
    "diffusion/samplers/__init__.py": {
        "Sampler.evaluations": (("self.steps - 1", "self.steps"),),
        "Sampler.within": (("evaluations + extra", "evaluations"),),
        "": (("ddim.walk(predict, x_t, levels, 1.0, rng)", "ddim.walk(predict, x_t, levels, 0.0, rng)"),),
        "Sampler.__call__": (("float(torch.hypot(*schedule.alpha_sigma(times[:1]))) * noise", "noise"),),
    },
    "diffusion/samplers/levels.py": {
        "edm_times": (("r ** (1 / rho)", "r"),),
        "_times": (("scale(ends)", "ends"),),
    },
    "diffusion/samplers/heun.py": {
        "walk": (
            (
                "to.alpha * (to.sigma / to.alpha - at.sigma / at.alpha) / 2",
                "to.alpha * (to.sigma / to.alpha - at.sigma / at.alpha)",
            ),
            (
                "noised(x_t, first.eps, to.alpha / at.alpha, half_step)",
                "noised(x_t, second.eps, to.alpha / at.alpha, half_step)",
            ),
        ),
    },
    "diffusion/samplers/dpm_solver.py": {
        "walk": (
            ("h / (2 * previous[1])", "previous[1] / (2 * h)"),
            ("noised(x0, previous[0], 1 + ratio, -ratio)", "noised(x0, previous[0], 1 - ratio, ratio)"),
            ("-h", "h"),
        ),
    },
    "diffusion/samplers/ddim.py": {
        "walk": (
            ("ratio ** 2", "ratio"),
            ("to.sigma ** 2 - fresh ** 2", "to.sigma ** 2"),
        ),
    },
    "distill/query.py": {
        "Query.guided": (('"negative" if self.negative else "uncond"', '"uncond"'),),
        "Query.guided_at": (
            ("self.guidance.perp_neg * weights", "self.guidance.perp_neg * weights[[1, 0, 2]]"),
            ("cfg_rescale(getattr(guided, kind), getattr(cond, kind), self.guidance.rescale)", "guided.x0"),
        ),
    },
    "distill/weights.py": {
        "weight": (
            ("sigma ** 2 / (alpha ** 2 + sigma ** 2)", "sigma ** 2"),
            ("return sigma / alpha", "return alpha / sigma"),
        ),
    },
    "diffusion/guidance.py": {
        "cfg": (("uncond + scale * (cond - uncond)", "cond + scale * (cond - uncond)"),),
        "perp_neg": (
            ("positive - subtracted", "positive + subtracted"),
            ("n - along[..., None] * p", "n + along[..., None] * p"),
        ),
        "cfg_rescale": (
            ("fraction * std_cond / std_guided.clamp_min(1e-12)", "fraction * std_guided / std_cond.clamp_min(1e-12)"),
        ),
    },
    "prompts.py": {
        "view_negatives": (
            (
                '{"front view": away / 180, "side view": abs(away - 90) / 90, "back view": 1 - away / 180}',
                '{"front view": 1 - away / 180, "side view": abs(away - 90) / 90, "back view": 1 - away / 180}',
            ),
        ),
    },
    "distill/critics.py": {
        "_network": (("teacher.network.eval()", "teacher.network"),),
        "TrainedCritic.loss": (
            (
                "target(prediction.kind, x, noise, alpha, sigma, prediction.rates)",
                "target(prediction.kind, noise, x, alpha, sigma, prediction.rates)",
            ),
        ),
    },
}
MUTANTS = [(file, place, *bug) for file, places in BUGS.items() for place, bugs in places.items() for bug in bugs]


def planted(source: str, file: str, function: str, old: str, new: str) -> str:
    """A file's source with a bug in it. What is replaced is found by the syntax tree, however it is laid out.

    Raises:
        ValueError: there is no such function, or ``old`` is not exactly one of its expressions or statements.
    """
    tree = ast.parse(source)
    scope: list[ast.AST] = [tree]
    for name in filter(None, function.split(".")):
        inside = [node for above in scope for node in getattr(above, "body", [])]
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        scope = [node for node in inside if isinstance(node, kinds) and node.name == name]
    mutant = f"the mutant {old!r} -> {new!r} in {function} of sds3d/{file}"
    if len(scope) != 1:
        raise ValueError(f"{mutant}: there are {len(scope)} of that name; bring the list up to date")
    (expected,), (put,) = ast.parse(old).body, ast.parse(new).body
    if isinstance(expected, ast.Expr) and isinstance(put, ast.Expr):
        expected, put = expected.value, put.value
    found = [node for node in ast.walk(scope[0]) if _same(node, expected)]
    if len(found) != 1:
        raise ValueError(f"{mutant}: it stands there {len(found)} times; bring the list up to date")
    return ast.unparse(_Replaced(found[0], put).visit(tree))


def _same(node: ast.AST, expected: ast.AST) -> bool:
    """Whether two parts of programs say the same, whether they are read or, as the left of ``=``, written."""
    plain = (ast.dump(part).replace("ctx=Store()", "ctx=Load()") for part in (node, expected))
    return type(node) is type(expected) and len(set(plain)) == 1


class _Replaced(ast.NodeTransformer):
    """One node for another."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        """The new node in the old one's place."""
        return self.new if node is self.old else self.generic_visit(node)


def catcher(copy: Path, mutant: tuple[str, str, str, str]) -> str:
    """The test that caught a bug, or "" where none did."""
    path = copy / "sds3d" / mutant[0]
    text = path.read_text()
    path.write_text(planted(text, *mutant))
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
        for mutant in mutants:
            caught = catcher(copy, mutant)
            alive += not caught
            file, function, old, new = mutant
            print(f"{file}, {function}: {old}  ->  {new}\n    {caught or 'SURVIVES'}", flush=True)
    print(f"{len(mutants) - alive} of {len(mutants)} bugs were caught")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
