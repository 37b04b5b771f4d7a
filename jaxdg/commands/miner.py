"""Mining of edits on one device, from the images of a run's source; `mine` is the command."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
from pathlib import Path
import time
from typing import Any

import cv2
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
import numpy as np

from jaxdg import files, weights
from jaxdg.commands import command_line as cli
from jaxdg.config import Config
from jaxdg.data.augment.corruptions import Corrupted
from jaxdg.data.augment.transforms import Augmentation, random_crop
from jaxdg.data.datasets import Dataset
from jaxdg.methods import edits as edits_lib
from jaxdg.methods import mining
from jaxdg.tasks.run_state import make_task
from jaxdg.training import photometric

STEP, IMAGE, OTHER, PICTURE = range(4)  # streams of crops: of steps, of images, held out, targets
STREAM = 2**31  # apart from those of training, whose second number is small
HELD_OUT = 32  # crops that tell losses and alignment
SAVE_EVERY = 60.0  # seconds
JOB = "jaxdg_mining"  # among the metadata of an unfinished file

Pixels = UInt8[np.ndarray, "b h w 3"]
Show = Callable[[int, Any], None]  # takes how much is done, and the prompts' losses


class Unfinished:
    """What a mining has found so far, in a file beside the one that it will write."""

    def __init__(self, out: Path, job: Mapping[str, Any], interrupt: cli.Interrupt):
        """Args:
        out: the file to be.
        job: what is mined; another one's file is refused.
        interrupt: asks to save and stop.
        """
        self.path = out.with_name(out.name + ".unfinished")
        self.job = json.loads(json.dumps(job))
        self.interrupt = interrupt
        self.saved = time.monotonic()

    def read(self) -> tuple[int, dict[str, np.ndarray]]:
        """How much is done, and the arrays; 0 and none at the beginning.

        Raises:
            ValueError: the file is of another mining.
        """
        if not self.path.exists():
            return 0, {}
        said = json.loads(weights.metadata(self.path).get(JOB, "{}"))
        done = said.pop("done", 0)
        if said != self.job:
            differ = [k for k in sorted({*said, *self.job}) if said.get(k) != self.job.get(k)]
            raise ValueError(
                f"{self.path} is of another mining, which differs in {', '.join(differ)}; delete"
                " it, or choose another --out"
            )
        return done, {name: np.array(x) for name, x in weights.read(self.path).items()}

    def pass_by(self, done: int, tensors: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Saves from time to time, and before it stops if that was asked for.

        Raises:
            Stop: it was.
        """
        asked = self.interrupt.asked
        if asked or time.monotonic() - self.saved > SAVE_EVERY:
            about = {JOB: json.dumps({**self.job, "done": done})}
            weights.save(tensors(), self.path, about)
            self.saved = time.monotonic()
        if asked:
            raise cli.Stop

    def forget(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)


class Crops:
    """Square crops of a dataset's images; what is drawn depends on (seed, stream, number) alone."""

    def __init__(self, dataset: Dataset, config: Config):
        """Args:
        dataset: of the source.
        config: of the run: how images are resized before, and the size of crops.
        """
        m = config.edits.mining
        d = config.data
        self.dataset = dataset
        self.seed = config.seed
        self.side = m.size
        self.augmentation = Augmentation(
            crop=(m.crop, m.crop), resize=d.resize, keep_ratio=d.keep_ratio, flip=d.flip
        )

    def rng(self, *place: int) -> np.random.Generator:
        """The draws at (stream, number)."""
        return np.random.default_rng((self.seed, STREAM, *place))

    def cut(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A crop of an image, uint8 [side, side, 3]."""
        crop = random_crop({"image": image}, self.augmentation, rng)["image"]
        return cv2.resize(crop, (self.side, self.side), interpolation=cv2.INTER_LINEAR)

    def drawn(self, stream: int, number: int, images: int, crops: int) -> Pixels:
        """So many crops of each of so many random images."""
        rng = self.rng(stream, number)
        found = []
        for i in rng.integers(len(self.dataset), size=images):
            image = self.dataset[int(i)]["image"]
            found += [self.cut(image, rng) for _ in range(crops)]
        return np.stack(found)

    def of(self, stream: int, indices: Sequence[int], dataset: Dataset | None = None) -> Pixels:
        """A crop of each of these images; the same part of any dataset like this one."""
        dataset = dataset or self.dataset
        return np.stack([self.cut(dataset[i]["image"], self.rng(stream, i)) for i in indices])

    def spread(self, count: int) -> list[int]:
        """So many images, evenly spread; all of them if there are not more, or for 0."""
        total = len(self.dataset)
        count = min(count, total) or total
        return [i * total // count for i in range(count)]


class Miner:
    """One mining, on one device."""

    def __init__(self, config: Config):
        """Reads the encoder, opens the images and computes the targets.

        Raises:
            FileNotFoundError: weights or images are not there.
            ValueError: they do not fit, or a prompt is no other than the source.
        """
        self.config = config
        self.options = o = config.edits
        m = config.model
        self.text_weights = o.mining.text_weights or m.text_weights
        if o.guide == "text" and self.text_weights is None:
            raise ValueError(
                "edits.guide is text; allowed: images without model.text_weights or"
                " edits.mining.text_weights, which reads the prompts"
            )
        self.crops = Crops(make_task(config).open(config.data.source, train=True), config)
        encoder = str(m.weights)
        tower = mining.load_tower(m.encoder, encoder, o, self.text_weights)
        self.kind = tower.kind
        self.graph, self.state = nnx.split(tower)
        size = tower.backbone.config
        self.normalize = functools.partial(photometric.normalize, mean=size.mean, std=size.std)
        self.embed = jax.jit(self._embed)
        self.toward = self._toward()

    def tower(self, state: nnx.State) -> mining.Tower:
        """The encoder in a jitted function."""
        return nnx.merge(self.graph, state)

    def input(self, images: Array) -> Float[Array, "b h w 3"]:
        """Crops as the encoder takes them."""
        return self.normalize(images.astype(jnp.float32))

    def _embed(self, state: nnx.State, images: Array) -> Float[Array, "b e"]:
        tower = self.tower(state)
        return tower.embed(tower.held(self.input(images)))

    def _toward(self) -> np.ndarray:
        """Directions of offsets, or targets of statistics, [p, e] of unit length."""
        o = self.options
        if o.guide == "text":
            names = (*o.prompts, *filter(None, [o.source]))
            found = mining.text_targets(names, o.mining.templates, str(self.text_weights))
        else:
            found = np.stack([self._mean(kind) for kind in (*o.prompts, None)])
        if o.form == "statistics":
            targets = found[: len(o.prompts)]
            return targets / np.linalg.norm(targets, axis=-1, keepdims=True)
        return mining.directions(found[:-1], found[-1], o.prompts)

    def _mean(self, kind: str | None) -> Float[np.ndarray, " e"]:
        """The mean embedding of pictures, corrupted or as they are."""
        indices = self.crops.spread(self.options.mining.pictures)
        total = 0.0
        for first in range(0, len(indices), HELD_OUT):
            crops = self._corrupted(PICTURE, indices[first : first + HELD_OUT], kind)
            total = total + np.asarray(self.embed(self.state, crops), np.float64).sum(axis=0)
        return np.asarray(total / len(indices))

    def _corrupted(self, stream: int, indices: Sequence[int], kind: str | None) -> Pixels:
        """Crops of images, which are corrupted first."""
        dataset = self.crops.dataset
        if kind is not None:
            dataset = Corrupted(dataset, kind, self.options.mining.severity)
        return self.crops.of(stream, indices, dataset)

    def job(self, control: str | None = None) -> dict[str, Any]:
        """What edits are mined from: what the file says, but for the results."""
        c = self.config
        o = self.options
        fields = dataclasses.asdict(o.mining)
        del fields["text_weights"]
        said = {
            "form": o.form,
            "place": o.place,
            "guide": o.guide,
            "prompts": list(o.prompts),
            "source": o.source,
            "encoder": c.model.encoder,
            "encoder_sha256": files.sha256(Path(str(c.model.weights))),
            "embedding": self.kind,
            "images_of": c.data.source,
            "seed": c.seed,
            "control": control,
            "mining": {**fields, "templates": list(o.mining.templates)},
        }
        if o.guide == "text":
            said["text_sha256"] = files.sha256(Path(str(self.text_weights)))
        return said

    # --- Offsets ----------------------------------------------------------------------------------

    def offsets(self, kept: Unfinished, show: Show) -> tuple[np.ndarray, dict[str, Any]]:
        """Offsets [p, h, w, c] and what is told of them."""
        o = self.options
        m = o.mining

        def step(state: Any, tower: nnx.State, images: Array) -> tuple[Any, Array]:
            return mining.offset_step(self.tower(tower), state, self.input(images), toward, m)

        def losses(tower: nnx.State, offsets: Array, images: Array) -> Array:
            found = self.tower(tower), offsets, self.input(images), toward, m.pull
            return mining.offset_losses(*found)[0]

        toward = jnp.asarray(self.toward)
        step = jax.jit(step, donate_argnums=0)
        shape = jax.eval_shape(
            lambda state: self._map(state, jnp.zeros((1, m.size, m.size, 3))), self.state
        ).shape[1:]
        zeros = jnp.zeros((len(o.prompts), *shape))
        start = zeros, mining.offset_optimizer(m).init(zeros)
        leaves, tree = jax.tree.flatten(start)
        done, arrays = kept.read()
        state = start
        if done:
            state = jax.tree.unflatten(
                tree, [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]
            )

        def tensors() -> dict[str, np.ndarray]:
            return {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}

        for number in range(done, m.steps):
            images = self.crops.drawn(STEP, number, m.batch, m.crops)
            state, found = step(state, self.state, images)
            show(number + 1, found)
            kept.pass_by(number + 1, tensors)
        offsets = state[0]
        others = self.crops.drawn(OTHER, 0, HELD_OUT, 1)
        measure = jax.jit(losses)
        return np.asarray(offsets), self.told(
            measure(self.state, jnp.zeros_like(offsets), others),
            measure(self.state, offsets, others),
            self.aligned(offsets.mean((1, 2)), others),
        )

    def _map(self, state: nnx.State, images: Array) -> Float[Array, "b h w c"]:
        """The map at the place, of normalised images."""
        tower = self.tower(state)
        return tower.backbone.map_of(tower.held(images))

    # --- Statistics -------------------------------------------------------------------------------

    def styles(self, kept: Unfinished, show: Show) -> tuple[np.ndarray, dict[str, Any]]:
        """Statistics [p, n, 2, c] of n images and what is told of them."""
        m = self.options.mining
        indices = self.crops.spread(m.images)
        toward = jnp.asarray(self.toward)

        @jax.jit
        def mine(tower: nnx.State, images: Array) -> tuple[Array, Array]:
            return mining.mine_styles(self.tower(tower), self.input(images), toward, m)

        done, arrays = kept.read()
        found = [arrays["styles"]] if done else []
        losses = [arrays["losses"]] if done else []

        def tensors() -> dict[str, np.ndarray]:
            return {
                "styles": np.concatenate(found, axis=1),
                "losses": np.concatenate(losses, axis=2),
            }

        for first in range(done, len(indices), m.batch):
            chunk = indices[first : first + m.batch]
            rows = [*chunk, *[chunk[-1]] * (m.batch - len(chunk))]  # one shape for the last too
            styles, both = jax.device_get(mine(self.state, self.crops.of(IMAGE, rows)))
            found.append(styles[:, : len(chunk)])
            losses.append(both[..., : len(chunk)])
            show(first + len(chunk), both[1].mean(axis=-1))
            kept.pass_by(first + len(chunk), tensors)
        before, after = tensors()["losses"].mean(axis=-1)
        return self._with_alignment(tensors()["styles"], before, after)

    def pictures(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The control of statistics: those of corrupted pictures, as they are."""
        o = self.options
        indices = self.crops.spread(o.mining.images)
        own = jax.jit(lambda tower, images: edits_lib.own_statistics(
            self._map(tower, self.input(images))
        ))  # fmt: skip
        found = [
            np.concatenate([
                np.asarray(own(self.state, self._corrupted(IMAGE, indices[i : i + HELD_OUT], kind)))
                for i in range(0, len(indices), HELD_OUT)
            ])
            for kind in o.prompts
        ]  # fmt: skip
        return self._with_alignment(np.stack(found), None, None)

    def _with_alignment(self, styles: np.ndarray, before: Any, after: Any) -> Any:
        """Statistics, and what is told of them."""
        others = self.crops.drawn(OTHER, 0, HELD_OUT, 1)
        shown = np.arange(HELD_OUT) % styles.shape[1]
        return styles, self.told(before, after, self.aligned(styles[:, shown], others))

    # --- What is told -----------------------------------------------------------------------------

    def aligned(self, drawn: Any, others: Pixels) -> Float[Array, "p p"]:
        """See `mining.alignment`, on crops that nothing was mined from."""

        @jax.jit
        def cosines(state: nnx.State, edits: Array, images: Array) -> Array:
            toward = jnp.asarray(self.toward)
            images = self.input(images)
            return mining.alignment(self.tower(state), images, edits, toward, self.options)

        return cosines(self.state, jnp.asarray(drawn), others)

    def told(self, before: Any, after: Any, alignment: Any) -> dict[str, Any]:
        """Results by prompt."""
        prompts = self.options.prompts

        def by_prompt(values: Any) -> dict[str, float] | None:
            if values is None:
                return None
            return {p: float(v) for p, v in zip(prompts, np.asarray(values), strict=True)}

        return {
            "loss_before": by_prompt(before),
            "loss_after": by_prompt(after),
            "alignment": np.asarray(alignment).round(4).tolist(),
        }
