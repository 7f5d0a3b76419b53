"""Real words that may stand for others, and which of them a text encoder takes for the nearest.

A vocabulary's whole-word tokens hold ends of words too ("ssom" of "blossom"); those that the word list beside this file
holds are words. A list of the user's own is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from memorization.errors import InputError
from memorization.io.files import read_file
from memorization.mitigations.perturbation import whole_words
from memorization.models.base import TextToImage

ENGLISH = Path(__file__).with_suffix(".txt")
ENDINGS = ("ing", "ed", "ly", "s")  # a word is replaced by one of the same ending, so that the sentence stays one
GRAMMAR = """
    a an the this that these those and or but nor of in on at to by for from with without into onto over under as
    than is are was were be been being am has have had do does did not no its it he she his her him they their them
    we our us you your my me who whom whose which what when where while if then so very there here up down out off
    near
"""  # words that hold a sentence together, and stay


@cache
def read_words(path: Path) -> tuple[str, ...]:
    """The words of a file, one a line, without those that begin with ``#``.

    Raises:
        InputError: it cannot be read, or holds no word.
    """
    lines = read_file(path).decode("utf-8", "replace").splitlines()
    words = tuple(dict.fromkeys(word for line in lines if (word := line.strip()) and not word.startswith("#")))
    if not words:
        raise InputError(f"{path}: holds no word")
    return words


def real_words(tokenizer, path: Path | None = None) -> tuple[str, ...]:
    """Those of a list, else the vocabulary's whole-word tokens that are English words (all where none is)."""
    if path is not None:
        return read_words(path)
    known, tokens = frozenset(read_words(ENGLISH)), whole_words(tokenizer)
    return tuple(word for word in tokens if word.lower() in known) or tokens


@torch.no_grad()
def encoded(pipe: TextToImage, words: Sequence[str], at_once: int = 256) -> Tensor:
    """The text encoder's state at the end of each word alone, ``(words, width)``, float32.

    The encoder looks back alone, so a word needs no padding to the model's length.
    """
    found = []
    for start in range(0, len(words), at_once):
        tokens = pipe.tokenizer(list(words[start : start + at_once]), padding=True, return_tensors="pt").input_ids
        states = pipe.text_encoder(tokens.to(pipe.device))[0].float()
        ends = (tokens == pipe.tokenizer.eos_token_id).int().argmax(1)
        found.append(states[torch.arange(len(ends)), ends.to(states.device)])
    return torch.cat(found)


@lru_cache(maxsize=1)  # of one model and list: thousands of words are not encoded for every prompt
def _table(pipe: TextToImage, words: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    states = encoded(pipe, words)
    centre = states.mean(0)  # what all words share says nothing of their nearness
    return normalize(states - centre, dim=1), centre


def nearest_words(pipe: TextToImage, word: str, words: tuple[str, ...], count: int) -> list[str]:
    """The ``count`` of ``words`` nearest to ``word`` by the text encoder, nearest first, of its ending, not itself."""
    table, centre = _table(pipe, words)
    near = table @ normalize(encoded(pipe, [word])[0] - centre, dim=0)
    same = [i for i in near.argsort(descending=True).tolist()
            if words[i].lower() != word.lower() and ending(words[i]) == ending(word)]  # fmt: skip
    return [words[i] for i in same[:count]]


def ending(word: str) -> str:
    """Which of ``ENDINGS`` a word has; empty where none, as for "glass"."""
    word = word.lower()
    return "" if word.endswith("ss") else next((end for end in ENDINGS if word.endswith(end)), "")


def with_articles(words: Sequence[str], place: int) -> list[str]:
    """The words, with "a" or "an" before ``place`` as its word's first letter wants it."""
    found = list(words)
    if place and found[place - 1].lower() in ("a", "an"):
        article = "an" if found[place].lstrip("\"'(")[:1].lower() in tuple("aeiou") else "a"
        found[place - 1] = article.capitalize() if found[place - 1][0].isupper() else article
    return found
