"""CLIP's ResNets: the names of OpenAI's archives, which open_clip shares."""

from jaxdg.conversion.clip import BESIDE
from jaxdg.conversion.mapping import CONV, LINEAR, SAME, Layout, Row

COUNTER = "how many batches made the statistics"


def layouts() -> tuple[Layout, ...]:
    """The one layout: an image tower below `visual.`, the text tower beside it or, in newer
    open_clip files, below `text.`.
    """
    convolutions = [f"{place}conv{i}" for place in ("", "layer*.*.") for i in (1, 2, 3)] + [
        "layer*.*.downsample.0"
    ]
    norms = [f"{place}bn{i}" for place in ("", "layer*.*.") for i in (1, 2, 3)] + [
        "layer*.*.downsample.1"
    ]
    kinds = (
        ("weight", "scale"),
        ("bias", "bias"),
        ("running_mean", "mean"),
        ("running_var", "var"),
    )
    linears = [f"attnpool.{part}_proj" for part in "qkvc"]
    return (
        Layout(
            "CLIP",
            (
                *(Row((f"visual.{name}.weight",), f"{name}.kernel", CONV) for name in convolutions),
                *(
                    Row((f"visual.{name}.{theirs}",), f"{name}.{ours}", SAME)
                    for name in norms
                    for theirs, ours in kinds
                ),
                Row(
                    ("visual.attnpool.positional_embedding",), "attnpool.positional_embedding", SAME
                ),
                *(Row((f"visual.{name}.weight",), f"{name}.kernel", LINEAR) for name in linears),
                *(Row((f"visual.{name}.bias",), f"{name}.bias", SAME) for name in linears),
            ),
            left_out=((r"visual\..+\.num_batches_tracked", COUNTER), *BESIDE),
        ),
    )
