"""DeiT-III: the names of its authors, and timm's."""

from jaxdg.conversion import vit
from jaxdg.conversion.mapping import SAME, Layout, Row
from jaxdg.conversion.names import renamed

SCALES = tuple(
    Row((f"blocks.*.{scale}.gamma",), f"blocks.*.{scale}.gamma", SAME) for scale in ("ls1", "ls2")
)


def layouts() -> tuple[Layout, ...]:
    """Both layouts; the first is that of the files its authors publish."""
    timm = vit.timm()
    rows = (*timm.rows, *SCALES)
    authors = renamed(
        rows, "DeiT", (("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")), timm.left_out
    )
    return authors, Layout("timm", rows, timm.left_out)
