"""What two models answer to the same examples, and what that shows.

`bounds` is statistics and knows no model.
"""

from .bounds import proportion_upper_bound, statistic_upper_bound
from .certificate import CERTIFIED, accuracy_difference, certify, certify_together, demoted, loss_difference
from .outcomes import PairedOutcomes, paired_outcomes

__all__ = [
    "CERTIFIED",
    "PairedOutcomes",
    "accuracy_difference",
    "certify",
    "certify_together",
    "demoted",
    "loss_difference",
    "paired_outcomes",
    "proportion_upper_bound",
    "statistic_upper_bound",
]
