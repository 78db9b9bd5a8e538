"""FID with a stand-in of torch-fidelity's interface: the package brings torchvision, and downloads its weights."""

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from sds3d.evaluate import generator as evaluation
from sds3d.evaluate.inception import Inception

WEIGHTS = {"weight": torch.eye(3)}


class FeatureExtractorInceptionV3(nn.Module):
    """Features "2048": the mean of each channel, in levels from 0 to 255."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__()
        assert isinstance(name, str) and features_list == ["2048"], features_list
        self.weight = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.dim() == 4 and x.shape[1] == 3, (x.dtype, x.shape)
        return (x.float().mean((2, 3)) @ self.weight,)


@pytest.fixture
def package(monkeypatch, tmp_path) -> ModuleType:
    """The stand-in, its weights on a server that is a folder, and an empty cache."""
    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    package.feature_extractor_inceptionv3 = module
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    torch.save(WEIGHTS, tmp_path / "weights.pth")
    mark = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    served = (tmp_path / "weights.pth").rename(tmp_path / f"weights-{mark}.pth")
    module.URL_INCEPTION_V3 = served.as_uri()
    return module


def pictures(count: int = 100) -> torch.Tensor:
    """(N, 3, 8, 8) in whole levels, as real ones are."""
    shape, generator = (count, 3, 8, 8), torch.Generator().manual_seed(0)
    return torch.randint(0, 200, shape, generator=generator) / 255


def test_fid_is_the_frechet_distance_of_the_features(package):
    real, inception = pictures(), Inception()
    assert inception.distance(real.clone(), real) == pytest.approx(0, abs=1e-3)
    brighter = real + torch.tensor([10, 0, 20]).view(3, 1, 1) / 255  # the same covariance, other means
    assert inception.distance(brighter, real) == pytest.approx(10**2 + 20**2, rel=1e-4)
    assert inception.distance(real, brighter.clone()) == pytest.approx(10**2 + 20**2, rel=1e-4)
    assert inception.features(torch.full((1, 3, 8, 8), 2.0)).tolist() == [[255, 255, 255]]


def test_the_weights_are_downloaded_once(package, tmp_path):
    Inception()
    served = Path(package.URL_INCEPTION_V3.removeprefix("file://"))
    served.unlink()
    Inception()
    (tmp_path / "cache/checkpoints" / served.name).unlink()
    with pytest.raises(ValueError, match=f"cannot download file.*; put that file at .*{served.name}, or leave --fid"):
        Inception()
    served.write_bytes(b"something else")
    with pytest.raises(ValueError, match="cannot download .* invalid hash value"):
        Inception()
    assert not any((tmp_path / "cache/checkpoints").iterdir())


def test_what_is_more_than_weights_is_refused(package, tmp_path):
    cached = tmp_path / "cache/checkpoints" / package.URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save({"weight": Path("x")}, cached)  # an object, which only code can make
    with pytest.raises(ValueError, match="is damaged; remove it"):
        Inception()
    cached.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="is damaged; remove it"):
        Inception()


@pytest.mark.slow
def test_eval_reports_fid_where_it_is_asked_for(call_packaged, in_folder, monkeypatch, request):
    monkeypatch.setattr(evaluation, "BEST", ("ddim", 2))
    settings = ["steps=2", "generator.batch=8", "log.picture_every=0"]
    assert call_packaged("distill", "-o", "toy", *settings)[0] == 0
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    code, _, err = call_packaged("eval", "toy", "-n", "600", "--seeds", "1", "--fid")
    assert code == 2 and "FID needs torch-fidelity; pip install sds3d[fid], or leave --fid out" in err
    request.getfixturevalue("package")
    code, out, err = call_packaged("eval", "toy", "-n", "600", "--seeds", "1", "--json", "--fid")
    assert code == 0, err
    report = json.loads((in_folder / "toy/00001-digits-diffinstruct/eval.json").read_text())
    assert json.loads(out)["fid"] == report["fid"] and report["command"].endswith("--fid")
    assert report["fid"]["mean"] > report["teacher"]["fid"]["mean"] > 0  # two steps teach nothing
    assert "| fid |" in (in_folder / "toy/00001-digits-diffinstruct/README.md").read_text()
