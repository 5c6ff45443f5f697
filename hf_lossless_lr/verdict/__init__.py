"""What two models answer to the same examples, and what that shows.

`bounds` is statistics and knows no model.
"""

from .answers import MAX_KEPT_BYTES, KeptAnswers
from .bounds import (
    examples_needed,
    mean_upper_bound,
    proportion_p_value,
    proportion_upper_bound,
    statistic_upper_bound,
)
from .certificate import (
    CERTIFIED,
    MIN_EXAMPLES,
    accuracy_difference,
    certify,
    certify_together,
    demoted,
    loss_difference,
    not_improved,
)
from .outcomes import PairedOutcomes, paired_outcomes
from .temperatures import at_fitted_temperatures

__all__ = [
    "CERTIFIED",
    "MAX_KEPT_BYTES",
    "MIN_EXAMPLES",
    "KeptAnswers",
    "PairedOutcomes",
    "accuracy_difference",
    "at_fitted_temperatures",
    "certify",
    "certify_together",
    "demoted",
    "examples_needed",
    "loss_difference",
    "mean_upper_bound",
    "not_improved",
    "paired_outcomes",
    "proportion_p_value",
    "proportion_upper_bound",
    "statistic_upper_bound",
]
