"""The name that `jaxdg convert` had before: `python conversion/torch_to_flax.py`.

See `jaxdg/conversion/convert.py`.
"""

import os
from pathlib import Path
import sys

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, and not this folder
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxdg.conversion.convert import main  # noqa: E402  after the path is right

if __name__ == "__main__":
    sys.exit(main())
