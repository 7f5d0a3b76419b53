"""The kinds of features that an index may hold."""

FEATURES = ("pixels", "latents", "sscd", "clip")
SIZED = ("pixels", "latents")  # compared by l2, at one size; the others by their cosine
NETWORKED = ("latents", "clip")  # made by a checkpoint, which has to be named
IMPORTED = ("clip", "sscd")  # whose features are unit vectors, as other programs make them
