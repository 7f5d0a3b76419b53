"""What is asked of a fine-tune: captions, other words for them, the trigger word, and prompts of the user's."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from memorization.audit.training import Training

KINDS = ("caption", "paraphrase", "trigger", "own")


class Try(NamedTuple):
    """A prompt to try.

    Attributes:
        place: of the training picture whose caption it is or paraphrases; None where it is nobody's.
        seed: of its noises: they are its own, so that what comes of two tries is independent.
    """

    prompt: str
    kind: str
    place: int | None
    seed: int


def tries_of(
    training: Training, trigger: str | None, own: Sequence[str], paraphrases: int, seed: int
) -> list[Try]:  # fmt: skip
    """All tries of an audit.

    Args:
        trigger: the trigger word; None for the words that all captions begin with, if there are any.
        own: prompts of the user's.
        paraphrases: of each caption, 0 to 2.
        seed: of the run.
    """
    captions = training.captions
    listed: list[tuple[str, str, int | None]] = [(caption, "caption", i) for i, caption in enumerate(captions)]
    listed += [
        (other, "paraphrase", i) for i, caption in enumerate(captions) for other in paraphrased(caption)[:paraphrases]
    ]
    trigger = beginning(captions) if trigger is None else trigger
    listed += [(trigger, "trigger", None)] * bool(trigger) + [(prompt, "own", None) for prompt in own]
    times: Counter[str] = Counter()
    found = []
    for prompt, kind, place in listed:
        times[prompt] += 1
        found.append(Try(prompt, kind, place, seed_of(seed, prompt, times[prompt])))
    return found


def seed_of(seed: int, prompt: str, time: int) -> int:
    """The seed of the noises of a prompt that is tried for the ``time``-th time."""
    digest = hashlib.sha256(f"{seed} {time} {prompt}".encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:7], "big")


def paraphrased(caption: str) -> list[str]:
    """Two other ways to say it, made by rule: its parts in reverse order (tags) or in a frame, and in a frame."""
    parts = [part for piece in re.split(r"[,;.]", caption) if (part := piece.strip())]
    framed = [f"an image that shows {caption}", f"{caption}, seen again"]
    return ([", ".join(reversed(parts))] if len(parts) > 1 else framed[:1]) + framed[1:]


def beginning(captions: Sequence[str]) -> str:
    """The words that all captions begin with."""
    places = zip(*(caption.split() for caption in captions), strict=False)
    shared = takewhile(lambda words: len(set(words)) == 1, places)
    return " ".join(words[0] for words in shared).strip(" ,;.")
