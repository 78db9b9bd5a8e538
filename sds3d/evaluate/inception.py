"""FID: the Frechet distance between features of Inception-v3 (Heusel et al., arXiv 1706.08500).

The network and its standard weights are those of the package torch-fidelity; the weights are downloaded (91 MB) when
they are first needed. The tests use a stand-in with the same interface, not the real network. All images are resized to
299 pixels. With fewer images than the 2,048 features, FID is biased upwards: compare only figures of equal numbers.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from sds3d.evaluate import features

BATCH = 64


class Inception:
    """The network, with a cache of the features of the last real images.

    Args:
        device: the device that it runs on.

    Raises:
        ValueError: the package is missing, or its weights cannot be downloaded.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as package
        except ImportError as error:
            raise ValueError("FID needs torch-fidelity; pip install sds3d[fid], or leave --fid out") from error
        path = _weights(package.URL_INCEPTION_V3)
        network = package.FeatureExtractorInceptionV3("fid", ["2048"], feature_extractor_weights_path=str(path))
        self._network, self._device = network.to(device).eval(), torch.device(device)
        self._real: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the features of images (B, 3, H, W) in [0, 1]: (B, 2048), on the CPU."""
        levels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        return torch.cat([self._network(part.to(self._device))[0].cpu() for part in levels.split(BATCH)])

    def distance(self, images: Tensor, real: Tensor) -> float:
        """Return the FID of images (B, 3, H, W) in [0, 1] from real ones (N, 3, H, W); B and N are above 1."""
        if self._real is None or self._real[0] is not real:
            self._real = real, self.features(real)
        return features.frechet(self.features(images), self._real[1])


def _weights(url: str) -> Path:
    """The file of weights in torch's cache, downloaded if it is missing. Raises ValueError."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot download {url}: {error}; put that file at {path}, or leave --fid out") from error
    try:
        torch.load(path, weights_only=True)  # refuses all but tensors; the package itself would unpickle anything
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, UnpicklingError) as error:
        raise ValueError(f"{path} is damaged; remove it, and it is downloaded again") from error
    return path
