"""What the file beside an exported program says of the model, whatever the program's form."""

from typing import Any

import jax

import jaxdg
from jaxdg.tasks.loading import Model


def of_model(model: Model) -> dict[str, Any]:
    """The task, classes, windows and origin of a model, of JSON types."""
    c = model.task.config
    labels = model.labels
    return {
        "task": c.task,
        "classes": list(labels.names),
        "colors": [list(color) for color in labels.colors],
        "source": c.data.source,
        "protocol": c.evaluation.protocol,
        "window": list(model.task.window),
        "stride": list(c.evaluation.stride) if c.task == "segmentation" else None,
        "encoder": c.model.encoder,
        "decoder": c.model.decoder,
        "step": model.step,
        "versions": {"jaxdg": jaxdg.__version__, "jax": jax.__version__},
    }
