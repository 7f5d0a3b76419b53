"""Exact intervals of a share."""

from __future__ import annotations

from math import sqrt

from scipy.stats import beta


def upper_end(hits: float, trials: float, confidence: float = 0.95) -> float:
    """The one-sided upper end of a share of which ``hits`` of ``trials`` were seen (Clopper and Pearson, 1934).

    The largest share under which so few hits are seen with a probability of at least 1 - ``confidence``. With no hits
    it is 1 - (1 - confidence) ** (1 / trials). It also holds where the trials' shares differ and the mean of them is
    asked for: a sum of such trials varies less than a binomial one (Hoeffding, 1956). ``hits`` may be a fraction, as of
    a share that is carried over to other trials.
    """
    return 1.0 if hits >= trials else float(beta.ppf(confidence, hits + 1, trials - hits))


def lower_end(hits: float, trials: float, confidence: float = 0.95) -> float:
    """The one-sided lower end, likewise."""
    return 0.0 if hits <= 0 else float(beta.ppf(1 - confidence, hits, trials - hits + 1))


def share_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """(share, low, high), two-sided; ``trials`` of at least 1.

    Of a threshold between the ``hits``-th and the next score of ordinary cases it holds for the rate of new ones too,
    whatever their distribution.
    """
    each = (1 + confidence) / 2
    return hits / trials, lower_end(hits, trials, each), upper_end(hits, trials, each)


def upper_end_of_difference(gained: float, lost: float, trials: float, confidence: float = 0.95) -> float:
    """The one-sided upper end of the share of ``gained`` less that of ``lost`` pairs among as many ``trials``.

    How far the exact end of each share lies from it, added as standard errors are, with the correlation of two shares
    of one sample: the method of variance estimates recovery (Zou and Donner, Statistics in Medicine 27, 2008; Newcombe,
    Statistics in Medicine 17, 1998, method 10, with the ends of Clopper and Pearson instead of Wilson's). With nothing
    lost it is the exact end of ``gained``. A test counts how often it fails.
    """
    up, down = gained / trials, lost / trials
    above = upper_end(gained, trials, confidence) - up
    below = down - lower_end(lost, trials, confidence)
    correlation = -sqrt(up * down / ((1 - up) * (1 - down))) if up and down else 0.0
    return up - down + sqrt(above**2 + below**2 - 2 * correlation * above * below)
