"""Makes tests/golden/corruptions.npz: a picture, corrupted by imagecorruptions (Michaelis 2019).

Run by hand where its source lies (github bethgelab/imagecorruptions) and numpy, scipy, scikit-image
and OpenCV are installed:

    PYTHONPATH=. python tests/oracles/golden_corruptions.py --reference FOLDER

The package does not run with current versions of these: what they dropped is put back here, its
compiled loop is run as plain Python, and it draws from a generator with a known seed, so that not
only means can be compared. Frost is left out, as its pictures are not ours.
"""

import argparse
import functools
from pathlib import Path
import sys
import types

import numpy as np
from PIL import Image
import scipy.ndimage
import skimage  # pyright: ignore[reportMissingImports]

from jaxdg.streets.render import render

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "corruptions.npz"
SIZE = (97, 144)
EVERY = 5
SEED = 7  # of the picture; rows and columns that are kept of results; of the generator


def module(name: str, **content: object) -> None:
    """Something that can be imported."""
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)


class Instead(types.SimpleNamespace):
    """A module with some of its names replaced."""

    def __getattr__(self, name: str) -> object:
        return getattr(self.original, name)


def main() -> None:
    """Corrupts the picture and writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reference", required=True, help="folder with the source of imagecorruptions"
    )
    sys.path.insert(0, parser.parse_args().reference)
    module("scipy.ndimage.interpolation", map_coordinates=scipy.ndimage.map_coordinates)
    module("pkg_resources", resource_filename=None)
    module("numba", njit=lambda: lambda function: function)
    from imagecorruptions import (  # pyright: ignore[reportMissingImports]
        corruptions,
        get_corruption_names,
    )

    image = render(0, 3, "clear", SIZE).image
    results = {}
    for kind in get_corruption_names():
        for severity in range(1, 6) if kind != "frost" else ():
            rng = np.random.default_rng(SEED)
            draws = types.SimpleNamespace(
                normal=rng.normal, uniform=rng.uniform, poisson=rng.poisson, randint=rng.integers
            )
            corruptions.np = Instead(original=np, random=draws)
            impulses = functools.partial(skimage.util.random_noise, rng=rng)
            corruptions.sk = Instead(
                original=skimage, util=types.SimpleNamespace(random_noise=impulses)
            )
            corrupted = np.asarray(
                getattr(corruptions, kind)(Image.fromarray(image), severity)
            ).astype(np.uint8)
            results[f"{kind}_{severity}"] = corrupted[::EVERY, ::EVERY]
    np.savez_compressed(OUT, image=image, seed=SEED, every=EVERY, **results)


if __name__ == "__main__":
    main()
