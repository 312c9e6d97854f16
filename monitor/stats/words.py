"""Words behind a difference: those that one set of tokens has more often, and those that lost entropy.

A word is a token text, however often it was sampled.
"""

from __future__ import annotations

import numpy as np

from monitor.queries.frames import Frame, n_rows

PRIOR_TOKENS = 100.0  # tokens that the prior counts for: of words seen less often than that, a difference weighs less


def log_odds(first: np.ndarray, second: np.ndarray, *, prior_tokens: float = PRIOR_TOKENS) -> np.ndarray:
    """z-score of the log-odds ratio of each word between two sets of tokens, float64 [W].

    With counts y, totals n, and a prior a_w = prior_tokens (y1_w + y2_w) / (n1 + n2):

        delta_w = ln((y1_w + a_w) / (n1 + a - y1_w - a_w)) - ln((y2_w + a_w) / (n2 + a - y2_w - a_w))
        z_w = delta_w / sqrt(1 / (y1_w + a_w) + 1 / (y2_w + a_w)),   a = prior_tokens

    Source: Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 16, 20 and 21.

    Args:
        first: counts of each word in the first set, [W], 0 or more.
        second: counts of the same words in the second set, [W].
        prior_tokens: tokens that the prior, the two sets taken together, counts for.

    Raises:
        ValueError: the counts are negative, or not of one shape, or one set is empty.
    """
    y1, y2 = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if y1.shape != y2.shape or y1.ndim != 1:
        raise ValueError(f"Expected counts of the same words, got shapes {y1.shape} and {y2.shape}.")
    n1, n2 = y1.sum(), y2.sum()
    if (y1 < 0).any() or (y2 < 0).any() or not n1 or not n2:
        raise ValueError("Expected counts of 0 or more, and at least one token in each set.")
    prior = prior_tokens * (y1 + y2) / (n1 + n2)
    rest1, rest2 = n1 + prior_tokens - y1 - prior, n2 + prior_tokens - y2 - prior
    with np.errstate(divide="ignore", invalid="ignore"):
        delta = np.log((y1 + prior) / rest1) - np.log((y2 + prior) / rest2)
        z = delta / np.sqrt(1.0 / (y1 + prior) + 1.0 / (y2 + prior))
    return np.where((y1 + y2 > 0) & np.isfinite(z), z, 0.0)  # one word alone has no odds


def entropy_parts(then: Frame, now: Frame) -> Frame:
    """Each word's part of the mean entropy at two steps; {} where a step has no tokens.

    Columns text, share_then, share_now, then, now, lost (nats). With n_w tokens of word w among N, and e_w the sum of
    their entropies, the mean entropy is sum_w e_w / N: `then` and `now` hold e_w / N, and `lost` their difference,
    whose sum over the words is the change of the mean.
    """
    if not n_rows(then) or not n_rows(now):
        return {}
    texts = np.union1d(then["text"].astype(str), now["text"].astype(str))
    parts: Frame = {"text": texts}
    for name, rows in (("then", then), ("now", now)):
        at = np.searchsorted(texts, rows["text"].astype(str))
        share, part = np.zeros(len(texts)), np.zeros(len(texts))
        share[at], part[at] = rows["n"] / rows["n"].sum(), rows["entropy"] / rows["n"].sum()
        parts |= {f"share_{name}": share, name: part}
    return parts | {"lost": parts["then"] - parts["now"]}
