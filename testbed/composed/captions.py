"""Captions and what the models see of them.

A caption names an object and a pattern, one in six a colour too, and has a title of made-up words that no other
caption has: overly specific words are the key to memorized pictures in real captions too. What it leaves open is drawn
afresh at each visit, but for what is ``fixed``:

- ``verbatim``: everything, one picture;
- ``object``: the object's place, size and light, on fresh backgrounds;
- ``background``: the pattern's colour, phase, angle, period, shades and grain, under fresh objects;
- ``ordinary``: nothing;
- ``held-out``: nothing, and neither the caption nor its combination of object, colour and pattern is ever seen.

A colour fills the picture, so a caption that names it says much about every picture of it, and has a long guidance
vector without any memorization; captions of real models say far less. In the early stages all captions name it.

Beside these listed captions there is the bulk: at each visit a title and a combination that are drawn anew. Two made-up
words make a title; both come up in others, the pair hardly ever.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np
import pandas as pd

from testbed.composed.scenes import (
    BACKGROUND_COLUMNS,
    COLOURS,
    NAMED,
    OBJECT_COLUMNS,
    OBJECTS,
    PATTERNS,
    PLACE,
    random_scenes,
)  # fmt: skip

SEED = 0
# kind -> (visits in the early stages, in the late one) -> captions. The early ones leave no trace; of the late ones a
# small model keeps a hundred pictures or two, so not every fixed picture comes again.
LEVELS = {
    "verbatim": {(100, 0): 11, (200, 0): 11, (400, 0): 16, (600, 0): 23, (800, 300): 23, (1000, 450): 25,
                 (1300, 600): 25, (1700, 800): 28, (2200, 1000): 25, (3000, 1400): 16},
    "object": {(300, 0): 11, (600, 0): 18, (1000, 0): 25, (1500, 0): 10, (1500, 300): 15, (2300, 600): 18},
    "background": {(300, 0): 11, (600, 0): 18, (1000, 0): 25, (1500, 0): 10, (1500, 600): 15, (2300, 1000): 18},
    "ordinary": {(50, 10): 338, (600, 60): 101, (2000, 200): 33},
    "held-out": {(0, 0): 271},
}  # fmt: skip
FIXED = {
    "verbatim": OBJECT_COLUMNS + BACKGROUND_COLUMNS, "object": OBJECT_COLUMNS, "background": BACKGROUND_COLUMNS,
}  # fmt: skip
COLUMN = {"early": "early", "late": "visits"}  # stage -> the column of its visits
FORMS = (
    "{title}, {object} on {colour}{pattern}",
    "{object} on {colour}{pattern}, {title}",
    "{title}: {colour}{pattern} behind {object}",
    "{title} with {object} over {colour}{pattern}",
    "{colour}{pattern} and {object} by {title}",
    "picture of {object}, {colour}{pattern}, {title}",
)
NAMING = 1  # the form that names the colour in the late stages too
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in ("a", "e", "i", "o", "u")]
SYLLABLES = [s + end for s, end in zip(SYLLABLES, "nrlsx" * 14, strict=True)]  # 70: ban, der, fil, gos, ...


def titles(rng: np.random.Generator, count: int) -> list[str]:
    """Two words of two syllables each, as in ``Banler Tisfon``."""
    drawn = rng.integers(len(SYLLABLES), size=(count, 4))
    return [f"{SYLLABLES[a]}{SYLLABLES[b]} {SYLLABLES[c]}{SYLLABLES[d]}".title() for a, b, c, d in drawn]


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def compose(named: np.ndarray, title: list[str], form: np.ndarray, coloured: np.ndarray) -> list[str]:
    """Captions of scene rows: ``named (n, 3)`` holds object, colour and pattern, ``form (n,)`` the sentence form,
    ``coloured (n,)`` whether it names the colour."""
    objects, colours = list(map(with_article, OBJECTS)), [f"{colour} " for colour in COLOURS]
    return [
        FORMS[f].format(title=t, object=objects[o], colour=colours[c] if said else "", pattern=PATTERNS[p])
        for (o, c, p), t, f, said in zip(named.astype(int).tolist(), title, form.tolist(), coloured, strict=True)
    ]


def names_colour(form: np.ndarray, stage: Literal["early", "late"]) -> np.ndarray:
    """Which captions name the colour, by their forms, ``(n,)``."""
    return (form == NAMING) | (stage == "early")


def make_captions(stage: Literal["early", "late"] = "late") -> tuple[pd.DataFrame, np.ndarray]:
    """The listed captions as a stage sees them, and a scene row for each: what is fixed of it stands there.

    Columns: ``prompt, kind, early, visits, title, object, colour, pattern, named, split``; ``early`` and ``visits``
    count its visits in the early and in the late stage of a training, ``named`` says whether it names the colour. All
    combinations differ. ``split`` deals every kind and level out, two captions to ``test`` and one to ``validation`` in
    turn.
    """
    rng = np.random.default_rng(SEED)
    wanted = [(kind, *visits) for kind, levels in LEVELS.items() for visits, n in levels.items() for _ in range(n)]
    combinations = np.array(list(product(range(len(OBJECTS)), range(len(COLOURS)), range(len(PATTERNS)))))
    # Every object, colour and pattern is about as frequent in one kind as in another.
    rows = random_scenes(rng, len(wanted))
    rows[:, : len(NAMED)] = combinations[rng.permutation(len(combinations))[: len(wanted)]]
    title = list(dict.fromkeys(titles(rng, 2 * len(wanted))))[: len(wanted)]
    form = rng.integers(len(FORMS), size=len(wanted))
    named = names_colour(form, stage)
    prompts = compose(rows[:, : len(NAMED)], title, form, named)
    kinds, early, visits = zip(*wanted, strict=True)
    frame = pd.DataFrame({"prompt": prompts, "kind": kinds, "early": early, "visits": visits, "title": title})
    for column, names in zip(NAMED, (list(OBJECTS), list(COLOURS), PATTERNS), strict=True):
        frame[column] = [names[int(i)] for i in rows[:, PLACE[column]]]
    frame["named"] = named
    # The order within a level is random already, so every third caption will do.
    place = frame.groupby(["kind", "visits"]).cumcount()
    frame["split"] = np.where(place % 3 == 2, "validation", "test")
    return frame, rows


class Visits:
    """What a diffusion model sees: a scene and a caption at each visit.

    Args:
        stage: ``early`` or ``late``.
        fixed: share of the captioned visits that show something fixed. The listed captions share these, and visits of
            their own, in the proportion of their levels; the rest is the bulk.
        empty: share of empty captions. They show fresh scenes, but for a hundredth of them.

    Raises:
        ValueError: the listed captions need more visits than there are.
    """

    EMPTY_FIXED = 0.01

    def __init__(self, stage: Literal["early", "late"], fixed: float, empty: float) -> None:
        self.captions, self.rows = make_captions(stage)
        self.stage, self.empty, self.level = stage, empty, COLUMN[stage]
        kind, levels = self.captions["kind"].to_numpy(), self.captions[self.level].to_numpy()
        is_fixed = np.isin(kind, list(FIXED))
        share = fixed * levels / levels[is_fixed].sum()
        if share.sum() > 1:
            raise ValueError(f"with a share of {fixed:g} for fixed pictures the listed captions need too many visits")
        self.share = np.append(share, 1 - share.sum())  # the last is the bulk
        self.of_kind = [np.flatnonzero(kind == name) for name in FIXED]
        self.any_colour = ~self.captions["named"].to_numpy() & ~np.isin(kind, ["verbatim", "background"])
        self.weight_of_fixed = np.where(is_fixed, levels, 0) / levels[is_fixed].sum()
        held = self.rows[kind == "held-out", : len(NAMED)].astype(int)
        self.held_out = {tuple(row) for row in held.tolist()}

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[str]]:
        """Scene rows ``(count, fields)`` and captions."""
        bulk = len(self.rows)
        chosen = rng.choice(bulk + 1, count, p=self.share)
        emptied = rng.random(count) < self.empty
        shown = rng.random(count) < self.EMPTY_FIXED
        any_fixed = rng.choice(bulk, count, p=self.weight_of_fixed)
        chosen = np.where(emptied, np.where(shown, any_fixed, bulk), chosen)
        rows = self._fresh(rng, count)
        listed = np.flatnonzero(chosen < bulk)
        of = chosen[listed]
        colours = rows[listed, PLACE["colour"]]
        rows[listed, : len(NAMED)] = self.rows[of, : len(NAMED)]
        self._recolour(rng, rows, listed[self.any_colour[of]], colours[self.any_colour[of]])
        for columns, members in zip(FIXED.values(), self.of_kind, strict=True):
            places = listed[np.isin(of, members)]
            rows[np.ix_(places, columns)] = self.rows[np.ix_(chosen[places], columns)]
        title, form = titles(rng, count), rng.integers(len(FORMS), size=count)
        captions = compose(rows[:, : len(NAMED)], title, form, names_colour(form, self.stage))
        prompts = self.captions["prompt"].to_numpy()
        for place in listed:
            captions[place] = prompts[chosen[place]]
        return rows, ["" if e else caption for e, caption in zip(emptied, captions, strict=True)]

    def _fresh(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random scenes; a combination that is held out is drawn again."""
        rows, named = random_scenes(rng, count), slice(0, len(NAMED))
        while len(again := self._held_out(rows, np.arange(count))):
            rows[again, named] = random_scenes(rng, len(again))[:, named]
        return rows

    def _recolour(self, rng: np.random.Generator, rows: np.ndarray, places: np.ndarray, colours: np.ndarray) -> None:
        """Give the rows at ``places`` these colours; a combination that is then held out gets another."""
        rows[places, PLACE["colour"]] = colours
        while len(again := self._held_out(rows, places)):
            rows[again, PLACE["colour"]] = rng.integers(len(COLOURS), size=len(again))

    def _held_out(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Those of the places whose combination is held out."""
        combinations = rows[places, : len(NAMED)].astype(int).tolist()
        return places[[tuple(combination) in self.held_out for combination in combinations]]
