"""Confidence intervals of a mean whose questions come in clusters: several questions about one medium are not independent."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

Z95 = 1.959964
"""Quantile of the normal distribution for 95 %."""


def clustered_interval(values: Sequence[float], clusters: Sequence[Hashable], z: float = Z95) -> tuple[float, float]:
    """Confidence interval (low, high) of the mean of `values`, each 0 ... 1, with `clusters[i]` the medium of value i.

    The Wilson interval (Wilson, 1927) with the effective number of values n / d, as Korn and Graubard (1998) use it for clustered surveys.
    d is the design effect (Kish, 1965): the cluster-robust variance of the mean over that of independent right-or-wrong values, at least 1.
    Where it cannot be estimated, because all values are alike or there is one cluster, clusters count as single values.
    (0, 1) without values.
    """
    n = len(values)
    if n == 0:
        return 0.0, 1.0
    mean = math.fsum(values) / n
    deviations: defaultdict[Hashable, list[float]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        deviations[cluster].append(value - mean)
    groups = len(deviations)
    spread = mean * (1 - mean)
    if groups == 1 or spread <= 1e-12:
        effective = float(groups)
    else:
        variance = math.fsum(math.fsum(some) ** 2 for some in deviations.values()) * groups / (groups - 1) / n**2
        effective = n / max(1.0, variance / (spread / n))
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(spread / effective + z * z / (4 * effective**2))
    # With a mean of 0 or 1, rounding would put the bound a little beyond it.
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))
