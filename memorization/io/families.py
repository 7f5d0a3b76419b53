"""Families of near-copies among the prompts of a list, exact, for millions of prompts.

Two prompts are near-copies where they share at least half of their distinct words: ``shared / all >= 1/2``, which is
``3 shared >= a + b`` for ``a`` and ``b`` distinct words. Families are the chains of near-copies.

Comparing every pair is out of the question. Words are ordered from rare to common, and as in prefix filtering
(Chaudhuri et al., ICDE 2006; Bayardo et al., WWW 2007) a pair that shares enough has its first shared word early in
both: prompts are put into a **bucket** for each of their early words. A bucket that is still large is split by the
second shared word, and so on: all prompts of a bucket share its ``depth`` words. Since only chains matter, a bucket
whose prompts are of one family already is let go, and every prompt is first compared with the shortest of its bucket,
which joins what is alike. A million prompts like those of LAION take minutes; a million of ten words each from a
vocabulary of a hundred would still be slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SMALL = 48  # prompts of a bucket whose pairs are compared
AT_ONCE = 2**21  # entries of buckets, or pairs, that are in memory at once


def near_copy_families(prompts: list[str]) -> list[str]:
    """The family of each prompt, ``f0``, ``f1``, ... in the order of their first prompts.

    Words are lower-cased and parted by white space; blank prompts are copies of each other.
    """
    words, which = _word_sets(prompts)
    return [f"f{family}" for family in _numbered(_Families(words).found()[which])]


def _word_sets(prompts: list[str]) -> tuple[coo_array, np.ndarray]:
    """The different sets of words, ``(sets, words)`` in CSR, and each prompt's number among them."""
    from sklearn.feature_extraction.text import CountVectorizer

    texts = [prompt if prompt.strip() else "(blank)" for prompt in prompts]
    words = CountVectorizer(binary=True, token_pattern=r"\S+", dtype=np.int8).fit_transform(texts)
    words.sort_indices()
    known: dict[bytes, int] = {}
    ends, which = words.indptr.tolist(), np.empty(len(texts), dtype=np.int64)
    for i in range(len(texts)):
        which[i] = known.setdefault(words.indices[ends[i] : ends[i + 1]].tobytes(), len(known))
    return words[np.unique(which, return_index=True)[1]], which


def _numbered(families: np.ndarray) -> list[int]:
    """The same families, numbered as they first occur."""
    _, first, which = np.unique(families, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[which].tolist()


class _Entries(NamedTuple):
    """Prompts in their buckets, sorted by bucket and then by size: the bucket, the prompt, and the place of the
    bucket's last word among the prompt's, which are ordered from rare to common."""

    bucket: np.ndarray
    row: np.ndarray
    place: np.ndarray

    def take(self, chosen: np.ndarray | slice) -> _Entries:
        """Some of them."""
        return _Entries(*(column[chosen] for column in (self.bucket, self.row, self.place)))


class _Families:
    """Joins the rows of ``words`` (CSR, a set of words a row) that are near-copies."""

    def __init__(self, words) -> None:
        rarity = np.empty(words.shape[1], dtype=np.int32)
        rarity[np.argsort(np.bincount(words.indices, minlength=words.shape[1]), kind="stable")] = np.arange(
            words.shape[1], dtype=np.int32
        )
        self.size = np.diff(words.indptr).astype(np.int64)
        self.start = words.indptr.astype(np.int64)
        row = np.repeat(np.arange(len(self.size)), self.size)
        word = rarity[words.indices]
        self.words = word[np.lexsort((word, row))]  # of each row, from rare to common
        self.sketch = _sketches(row, self.words, len(self.size))
        self.family = np.arange(len(self.size))

    def found(self) -> np.ndarray:
        """A number of its family for each row."""
        row = np.repeat(np.arange(len(self.size)), self.size)
        place = np.arange(len(row)) - self.start[row]
        self._join(self._sorted(self.words, row, place, 1), 1)
        return self.family

    def _sorted(self, bucket: np.ndarray, row: np.ndarray, place: np.ndarray, depth: int) -> _Entries:
        """Entries that may have a near-copy in their bucket, in buckets of two or more.

        With ``depth`` words shared up to ``place``, a row shares ``depth - 1 + size - place`` at most; with a
        near-copy, which has at least half as many words, it shares at least half of its own.
        """
        early = 2 * (depth - 1 + self.size[row] - place) >= self.size[row]
        bucket, row, place = bucket[early], row[early], place[early]
        order = np.lexsort((self.size[row], bucket))
        entries = _Entries(bucket[order], row[order], place[order])
        return entries.take(_bucket_sizes(entries.bucket) > 1)

    def _join(self, entries: _Entries, depth: int) -> None:
        for part in _parts(entries):
            first = part.row[_bucket_starts(part.bucket)]
            self._link_copies(first, part.row)
            part = part.take(self._undecided(part))
            small = _bucket_sizes(part.bucket) <= SMALL
            compared = part.take(small)
            for left, right in _pairs(compared):
                self._link_copies(compared.row[left], compared.row[right])
            if not small.all():
                self._split(part.take(~small), depth)

    def _undecided(self, entries: _Entries) -> np.ndarray:
        """Which entries lie in a bucket of more than one family."""
        family = self.family[entries.row]
        starts = _bucket_starts(entries.bucket)
        differs = (family != family[starts]).astype(np.int64)
        return np.bincount(starts, differs, len(starts))[starts] > 0 if len(starts) else differs > 0

    def _split(self, entries: _Entries, depth: int) -> None:
        """Join within buckets that share one more word, after the last one that they share."""
        number = np.unique(_bucket_starts(entries.bucket), return_inverse=True)[1]
        further = self.size[entries.row] - entries.place - 1
        for chosen in _by_cost(number, further):
            which = np.repeat(chosen, further[chosen])
            ahead = np.arange(len(which)) - np.repeat(np.cumsum(further[chosen]) - further[chosen], further[chosen])
            row, place = entries.row[which], entries.place[which] + 1 + ahead
            word = self.words[self.start[row] + place].astype(np.int64)
            self._join(self._sorted(number[which] * (self.words.max() + 1) + word, row, place, depth + 1), depth + 1)

    def _link_copies(self, left: np.ndarray, right: np.ndarray) -> None:
        """Join the families of the pairs of rows that are near-copies."""
        total = self.size[left] + self.size[right]
        possible = (self.family[left] != self.family[right]) & (
            3 * np.minimum(self.size[left], self.size[right]) >= total
        )
        left, right, total = left[possible], right[possible], total[possible]
        # Each bit in which two sketches differ is a word that one of the two lacks; near-copies lack a third at most.
        apart = sum(np.bitwise_count(sketch[left] ^ sketch[right]).astype(np.int64) for sketch in self.sketch)
        likely = 3 * apart <= total
        left, right, total = left[likely], right[likely], total[likely]
        linked = 3 * self._shared(left, right) >= total
        if linked.any():
            ends = self.family[left[linked]], self.family[right[linked]]
            graph = coo_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(len(self.size),) * 2)
            self.family = connected_components(graph, directed=False)[1][self.family]

    def _shared(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """How many words each pair of rows shares."""
        shared = np.zeros(len(left), dtype=np.int64)
        for start in range(0, len(left), AT_ONCE // 16):
            chunk = slice(start, start + AT_ONCE // 16)
            pair, word = [], []
            for rows in (left[chunk], right[chunk]):
                size = self.size[rows]
                which = np.repeat(np.arange(len(rows)), size)
                ahead = np.arange(len(which)) - np.repeat(np.cumsum(size) - size, size)
                pair.append(which)
                word.append(self.words[self.start[rows][which] + ahead])
            key = np.sort(np.concatenate(pair) * (self.words.max() + 1) + np.concatenate(word).astype(np.int64))
            twice = key[1:][key[1:] == key[:-1]] // (self.words.max() + 1)
            shared[chunk] = np.bincount(twice, minlength=len(left[chunk]))
        return shared


def _sketches(row: np.ndarray, word: np.ndarray, rows: int) -> list[np.ndarray]:
    """Four times 64 bits a row: one is set for each of its words."""
    bit = (word.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)  # a multiplicative hash, 0 to 255
    found = []
    for part in range(4):
        own = bit // np.uint64(64) == part
        sketch = np.zeros(rows, dtype=np.uint64)
        np.bitwise_or.at(sketch, row[own], np.uint64(1) << bit[own] % np.uint64(64))
        found.append(sketch)
    return found


def _bucket_starts(bucket: np.ndarray) -> np.ndarray:
    """Where each entry's bucket begins."""
    new = np.append(True, bucket[1:] != bucket[:-1])[: len(bucket)]
    return np.flatnonzero(new)[np.cumsum(new) - 1] if len(bucket) else np.zeros(0, dtype=np.int64)


def _bucket_sizes(bucket: np.ndarray) -> np.ndarray:
    """How many entries each entry's bucket has."""
    starts = _bucket_starts(bucket)
    return np.bincount(starts, minlength=len(bucket))[starts]


def _parts(entries: _Entries) -> Iterator[_Entries]:
    """Whole buckets, about ``AT_ONCE`` entries of them at a time."""
    starts, begin = np.unique(_bucket_starts(entries.bucket)), 0
    while begin < len(entries.bucket):
        later = starts[np.searchsorted(starts, begin + AT_ONCE) :]
        end = int(later[0]) if len(later) else len(entries.bucket)
        yield entries.take(slice(begin, end))
        begin = end


def _by_cost(number: np.ndarray, cost: np.ndarray) -> Iterator[np.ndarray]:
    """Entries of whole buckets, whose costs sum to about ``AT_ONCE``; ``number`` of the bucket does not fall."""
    total = np.cumsum(np.bincount(number, cost))[number]
    group = (total - 1) // AT_ONCE
    for one in np.unique(group):
        yield np.flatnonzero(group == one)


def _pairs(entries: _Entries) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of entries of one bucket, about ``AT_ONCE`` at a time."""
    starts = _bucket_starts(entries.bucket)
    later = starts + _bucket_sizes(entries.bucket) - np.arange(len(starts)) - 1
    group = (np.cumsum(later) - 1) // AT_ONCE
    for one in np.unique(group):
        left = np.flatnonzero(group == one)
        which = np.repeat(left, later[left])
        ahead = np.arange(len(which)) - np.repeat(np.cumsum(later[left]) - later[left], later[left])
        yield which, which + 1 + ahead
