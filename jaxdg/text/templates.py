"""Sentences that class names or prompts are put into, with {} in their place."""

_ARTICLES = ("a", "the")


def _imagenet() -> tuple[str, ...]:
    """The 80 templates, by their patterns."""
    photos = (
        "bad", "black and white", "blurry", "bright", "close-up", "cropped", "dark", "good",
        "jpeg corrupted", "low resolution", "pixelated",
    )  # fmt: skip
    things = ("clean", "cool", "dirty", "hard to see", "large", "nice", "small", "weird")
    kinds = ("cartoon", "embroidered", "origami", "plastic", "plushie", "toy")
    works = (
        "doodle", "drawing", "painting", "rendering", "rendition", "sculpture", "sketch", "tattoo",
    )  # fmt: skip
    found = ["a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."]
    for article in _ARTICLES:
        found += [f"a photo of {article} {{}}.", f"{article} {{}} in a video game."]
        found += [f"a {photo} photo of {article} {{}}." for photo in photos]
        found += [f"a photo of {article} {thing} {{}}." for thing in things]
        found += [f"{article} {kind} {{}}." for kind in kinds]
        found += [f"a {work} of {article} {{}}." for work in works]
        found += [f"{work} of {article} {{}}." for work in ("art", "graffiti", "itap")]
    return tuple(found)


# Those with which CLIP's authors classify ImageNet (openai/CLIP, MIT licence), in another order.
IMAGENET = _imagenet()
