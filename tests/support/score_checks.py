"""What all scores of a task must fulfil."""

import numpy as np
import pytest

from hf_lossless_lr.evaluation.scores import Scores


def check_right_answers(scores: Scores, *names: str) -> None:
    """Assert that these metrics, and no others, are shares of examples that are right or wrong, and that they fit."""
    assert {metric.name for metric in scores.metrics if metric.right is not None} == set(names)
    for metric in scores.metrics:
        if metric.right is not None:
            right = metric.right(scores.counts)
            assert right.shape == (len(scores.counts),)
            assert set(np.unique(right)) <= {0, 1}
            assert right.mean() == pytest.approx(float(metric.of_sums(scores.counts.sum(0))), rel=1e-12)
