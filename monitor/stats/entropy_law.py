"""The entropy-reward law of a run, R = -a exp(H) + b: how much more reward a run can gain by losing entropy.

Source: arXiv 2505.22617 ("The Entropy Mechanism of RL for Reasoning LMs"), fitted there to held-out accuracy against
the policy's entropy. The law describes a run whose settings stay the same. After a change that acts on the entropy
(bonus, clip-higher, another weighting or temperature) another law holds, so fit the steps before and after separately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class EntropyLaw:
    """R = -a exp(H) + b fitted to n points, H in nats.

    r2: share of the variance that the law explains. spread: standard deviation of the residuals, with n - 2 degrees of
    freedom. mean_x, sxx: the mean of x = exp(H) and the sum of (x - mean_x)^2, from which `forecast` takes its band.
    Example: a = 0.2, b = 1.0 has the ceiling 0.8, reached when no entropy is left.
    """

    a: float
    b: float
    r2: float
    spread: float
    n: int
    mean_x: float
    sxx: float

    @property
    def ceiling(self) -> float:
        """The reward at H = 0, b - a: what the run can reach by spending all of its entropy."""
        return self.b - self.a

    def forecast(self, entropy: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(mean, low, high), float64 [m] each: the reward at entropies [m], nats, and the band for a new point.

        The band is mean -+ t spread sqrt(1 + 1/n + (x - mean_x)^2 / sxx), with x = exp(entropy) and t of n - 2 degrees
        of freedom. A new point falls into it with probability `level` if steps are independent. Steps of one run are
        not, so the true band is wider.
        """
        from scipy.stats import t  # imported here: a second that only a forecast needs

        x = np.exp(np.asarray(entropy, np.float64))
        mean = self.b - self.a * x
        leverage = 1 + 1 / self.n + (x - self.mean_x) ** 2 / self.sxx
        half = t.ppf(0.5 + level / 2, self.n - 2) * self.spread * np.sqrt(leverage)
        return mean, mean - half, mean + half


def fit_entropy_law(entropy: np.ndarray, reward: np.ndarray) -> EntropyLaw:
    """Least squares of reward [n] on exp(entropy [n], nats); points with a non-finite value are left out.

    Source: scipy.stats.linregress.

    Raises: ValueError with fewer than 4 points, or when all entropies are equal.
    """
    entropy, reward = np.asarray(entropy, np.float64), np.asarray(reward, np.float64)
    keep = np.isfinite(entropy) & np.isfinite(reward)
    x, y = np.exp(entropy[keep]), reward[keep]
    if len(x) < 4:
        raise ValueError(f"The entropy-reward law got {len(x)} finite points, expected at least 4 steps.")
    if np.ptp(x) <= 1e-12 * x.mean():
        raise ValueError(f"All {len(x)} entropies are {entropy[keep][0]:.4g}: no law can be fitted to one entropy.")
    from scipy.stats import linregress  # imported here: a second that only a fit needs

    line = linregress(x, y)
    sxx = float(((x - x.mean()) ** 2).sum())
    return EntropyLaw(
        a=-float(line.slope),
        b=float(line.intercept),
        r2=float(line.rvalue**2) if np.ptp(y) > 0 else 0.0,
        spread=float(line.stderr) * math.sqrt(sxx),  # stderr of a slope is the residuals' deviation over sqrt(sxx)
        n=len(x),
        mean_x=float(x.mean()),
        sxx=sxx,
    )
