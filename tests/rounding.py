"""How far apart two right results may be on any machine, from the dtype's resolution and the length of the sums.

Kernels add in an order that depends on the processor, the number of threads and the shapes (attention above all), so a
test that compares two of them must allow for it. Each addition or product errs by up to eps / 2 of its partial sum;
such errors are as good as independent and grow like the square root of their number n. With a standard deviation of
eps / sqrt(12) each, two results differ by sqrt(2 n / 12) = 0.41 sqrt(n) eps of their scale: `rounding` is 2.4 times
that, for the steps on the way that enlarge an error. The largest of many differences is up to LARGEST times their root
mean square.

Not meant for a few terms done by hand: there pytest.approx's 1e-6, eight times the resolution of float32, is enough.
"""

from __future__ import annotations

import math
from typing import Any

import torch

LARGEST = 4.0  # with the 2.4 above 9.8 standard deviations: of a million normal differences the largest lies at 4.9


def rounding(dtype: torch.dtype, roundings: int, scale: float = 1.0) -> float:
    """eps(dtype) sqrt(roundings) scale: bounds the root mean square difference of two results of that size."""
    return float(torch.finfo(dtype).eps) * math.sqrt(roundings) * scale


def summed_terms(config: Any, width: int) -> int:
    """Terms of all sums on the way from a token to its logits; `width` positions in attention. For float32."""
    hidden = config.hidden_size
    layer = 4 * hidden + config.intermediate_size + width  # two norms, one of q, k, v, up (side by side), output; down
    return int(config.num_hidden_layers * layer + 2 * hidden)


def stored_results(config: Any) -> int:
    """Results on that way that are stored in bfloat16 under autocast: its sums are float32, and are rounded once."""
    return int(config.num_hidden_layers * 8 + 1)  # q or k, v, attention, output, gate, up, their product, down; head


def gradient_rounding(config: Any, width: int, tokens: int) -> float:
    """The rounding of a float32 gradient's norm: that of forward and backward pass, and of the sum over tokens."""
    return LARGEST * rounding(torch.float32, 2 * summed_terms(config, width) + tokens)
