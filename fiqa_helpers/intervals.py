"""Is the difference real? Paired bootstrap intervals, and what they say in words."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fiqa_helpers.metrics import METRICS

DRAWN_AT_ONCE = 10_000_000  # row numbers, 80 MB: all resamples of 648 rows, and not of 100,000
BCA_ROWS = 5000  # its jackknife grows with the square of the rows; beyond, percentiles are as good
RESAMPLES = 9999
FEW_ROWS = 30  # below this a bootstrap interval itself is too narrow to be trusted to the digit


@dataclass(frozen=True)
class Comparison:
    """Tuned minus base on the same rows. `low` and `high` bound the mean difference with 95 % confidence."""

    metric: str
    rows: int
    base: float  # mean
    tuned: float  # mean
    difference: float  # mean of the paired differences
    low: float
    high: float
    wins: int  # rows on which the tuned model is better; for a metric without better or worse, higher
    ties: int

    @property
    def win_rate(self) -> float:
        """Share of the rows that the tuned model wins; a tie counts half."""
        return (self.wins + self.ties / 2) / self.rows

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "no difference"; "changed" where more is neither better nor worse."""
        better = METRICS[self.metric].better
        if self.low <= 0 <= self.high or math.isnan(self.low):
            return "no difference"
        if better == 0:
            return "changed"
        return "better" if (self.difference > 0) == (better > 0) else "worse"

    def needed_rows(self, smallest: float) -> int:
        """Rows at which an interval of this spread would be narrower than `smallest` to each side."""
        half = (self.high - self.low) / 2
        return math.ceil(self.rows * (half / smallest) ** 2)

    def in_words(self) -> str:
        """One sentence with the figures."""
        said = {
            "no difference": "no difference is shown",
            "better": "the tuned model is better",
            "worse": "the tuned model is worse",
            "changed": "the models differ",
        }[self.verdict]
        return (
            f"{METRICS[self.metric].title}: {self.base:.3f} -> {self.tuned:.3f}, difference "
            f"{self.difference:+.3f} with 95 % interval {self.low:+.3f} to {self.high:+.3f} on {self.rows} "
            f"rows, {self.win_rate:.0%} of them won: {said}."
        )

    def as_row(self) -> dict:
        """All of it as plain values, for a table or JSON."""
        return asdict(self) | {"win_rate": self.win_rate, "verdict": self.verdict}


def compare(metric: str, base: Sequence[float], tuned: Sequence[float], seed: int = 0) -> Comparison:
    """Paired comparison of one value per row from each model, rows in the same order.

    Rows are drawn again with their pair (Efron 1987, the bias-corrected and accelerated bootstrap, by
    `scipy.stats.bootstrap`). One row has no interval: `low` and `high` are NaN.

    Raises:
        ValueError: the two lists are not of one length, or empty.
    """
    import numpy as np
    from scipy.stats import bootstrap

    pairs = np.array(list(zip(base, tuned, strict=True)), dtype=float)
    if pairs.size == 0:
        raise ValueError("nothing to compare")
    differences = pairs[:, 1] - pairs[:, 0]
    low = high = float("nan")
    if len(differences) > 1 and np.ptp(differences) == 0:
        low = high = float(differences[0])  # every resample has the same mean
    elif len(differences) > 1:
        found = bootstrap(
            (pairs[:, 0], pairs[:, 1]),
            lambda b, t, axis: (t - b).mean(axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, DRAWN_AT_ONCE // len(differences)),
            method="BCa" if len(differences) <= BCA_ROWS else "percentile",
            confidence_level=0.95,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    sign = METRICS[metric].better or 1
    return Comparison(
        metric=metric,
        rows=len(differences),
        base=float(pairs[:, 0].mean()),
        tuned=float(pairs[:, 1].mean()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        wins=int((sign * differences > 0).sum()),
        ties=int((differences == 0).sum()),
    )
