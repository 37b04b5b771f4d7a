"""What Stable Diffusion's UNet attends to: token states of CLIP's text towers.

Version 1.x has the tower of OpenAI's CLIP L/14, and 2.x that of OpenCLIP H/14 without its last
block. Each token's state is normalised by `ln_final`; nothing is projected into the joint space
with images. In 1.x the end token fills a text up to 77 tokens, in 2.x zeros do.
"""

from collections.abc import Callable, Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32
import numpy as np

from jaxdg.text import tokenizer
from jaxdg.text.clip_text import TEMPLATES, ClipTextConfig, TokenTransformer


@dataclasses.dataclass(frozen=True)
class ConditionConfig(ClipTextConfig):
    """A text tower of a diffusion model; fields of `ClipTextConfig`, and:

    Attributes:
        fills_with_end: whether the end token fills up a text, and not zeros.
    """

    fills_with_end: bool = True


# By the version of Stable Diffusion.
CONDITIONS: dict[str, ConditionConfig] = {
    "1.x": ConditionConfig(768, 12, 768, "quick_gelu", None),
    "2.x": ConditionConfig(1024, 16, 1024, "gelu", None, depth=23, fills_with_end=False),
}


class Condition(TokenTransformer):
    """Token ids to normalised states; all in float32."""

    config: ConditionConfig

    def __init__(self, config: ConditionConfig, *, rngs: nnx.Rngs):
        """Builds the tower with random parameters."""
        init = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Param(init(rngs.params(), (tokenizer.VOCABULARY, config.width)))
        super().__init__(config, tokenizer.LENGTH, rngs=rngs)

    def __call__(self, ids: Int32[Array, "b n"]) -> Float[Array, "b n c"]:
        """Normalised states of tokens."""
        return self.ln_final(self.states(self.token_embedding[...][ids]))

    def empty_prompt(self) -> Float32[np.ndarray, "n c"]:
        """The states of a text without words: start, end, and what fills it up."""
        ids = tokenizer.tokenize([""])
        if self.config.fills_with_end:
            ids[0, 2:] = ids[0, 1]
        return self._run()(ids)[0]

    def class_names(
        self, names: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> Float32[np.ndarray, "k c"]:
        """A row for each class, as in VPD: the end token's state, not made of length 1.

        Args:
            names: such as "traffic light".
            templates: sentences with {} in place of the name, of whose states the mean is taken;
                VPD has the 80 of CLIP's authors.
        """
        texts = [template.replace("{}", name) for template in templates for name in names]
        ids = tokenizer.tokenize(texts)
        # No state depends on what follows it, so all are cut where the longest one ends.
        ids = ids[:, : ids.argmax(1).max() + 1].reshape(len(templates), len(names), -1)
        run = self._run()
        ends = [run(some)[np.arange(len(some)), some.argmax(1)] for some in ids]
        return np.mean(ends, axis=0)

    def _run(self) -> Callable[[np.ndarray], np.ndarray]:
        """From token ids [b, n] to states [b, n, c], compiled once for each size."""
        graph, state = nnx.split(self)
        run = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))
        return lambda ids: np.asarray(run(state, jnp.asarray(ids)))
