"""Write the digits that ship in the package, from scikit-learn's copy of UCI's optical recognition set.

pip install scikit-learn && python scripts/pack_digits.py
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

FILE = Path(__file__).parents[1] / "sds3d" / "data" / "digits.npz"


def main() -> None:
    pixels, digits = load_digits(return_X_y=True)  # (N, 64) in [0, 16], (N,)
    np.savez_compressed(FILE, ink=pixels.reshape(-1, 8, 8).astype(np.uint8), digits=digits.astype(np.uint8))
    print(f"{FILE}: {len(digits)} images, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
