"""The search along a path by measurement, against brute force over all points."""

from dataclasses import dataclass

import numpy as np
import pytest

from hf_lossless_lr.ranks.search import MAX_TRIALS, RESOLUTION, lowest_loss, most_compressed

MARGIN = 0.01


@dataclass(frozen=True)
class Point:
    increase: float


class Path:
    """A path whose true losses grow along it; the predicted costs are wrong by a factor."""

    def __init__(self, count, power=2.0, total=0.1, factor=1.0, seed=0):
        steps = np.random.default_rng(seed).uniform(0.5, 1.5, count)
        removed = 0.95 * np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
        self.kept = list(1 - removed)
        self.losses = total * removed**power
        self.costs = list(self.losses * factor)
        self.visited = []

    def measure(self, point):
        self.visited.append(point)
        return Point(float(self.losses[point]))

    def search(self, margin=MARGIN):
        return most_compressed(self.costs, self.kept, self.measure, lambda trial: trial.increase <= margin, margin)

    def best(self, margin=MARGIN):
        return max(point for point in range(len(self.kept)) if self.losses[point] <= margin)


PATHS = [
    {"count": count, "power": power, "total": total, "factor": factor, "seed": seed}
    for seed, (count, power, total, factor) in enumerate(
        (count, power, total, factor)
        for count in (300, 5000)
        for power in (1.5, 4.0)
        for total in (0.02, 0.5)
        for factor in (0.1, 1.0, 10.0)
    )
]


class TestMostCompressed:
    @pytest.mark.parametrize("options", PATHS, ids=str)
    def test_finds_the_last_accepted_point_within_the_resolution_in_few_trials(self, options):
        path = Path(**options)
        point, trial = path.search()
        assert trial == Point(float(path.losses[point]))
        assert trial.increase <= MARGIN
        assert 0 <= path.kept[point] - path.kept[path.best()] <= 2 * RESOLUTION
        assert len(path.visited) <= MAX_TRIALS
        assert len(set(path.visited)) == len(path.visited)

    def test_measures_no_more_than_the_most_trials_when_the_costs_mislead(self):
        path = Path(100_000, total=50.0)
        path.costs = [0.0] * len(path.kept)
        found = path.search()
        assert len(path.visited) == MAX_TRIALS
        assert found is None or found[1].increase <= MARGIN

    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_finds_the_very_point_on_a_short_path(self, count):
        for last in range(1, count + 1):
            path = Path(count)
            path.losses = np.where(np.arange(count + 1) <= last, 0.001, 1.0)
            path.costs = list(np.arange(count + 1) * 1e-3)
            assert path.search()[0] == last

    def test_goes_to_the_end_when_everything_is_accepted(self):
        path = Path(50, total=1e-6)
        assert path.search()[0] == 50

    def test_finds_nothing_when_nothing_is_accepted(self):
        path = Path(500)
        accept = lambda trial: False  # noqa: E731
        assert most_compressed(path.costs, path.kept, path.measure, accept, MARGIN) is None
        assert 0 < len(path.visited) <= MAX_TRIALS

    def test_measures_nothing_on_a_path_of_the_dense_model_alone(self):
        path = Path(1)
        assert most_compressed([0.0], [1.0], path.measure, lambda trial: True, MARGIN) is None
        assert path.visited == []

    def test_never_measures_the_dense_model(self):
        path = Path(500, total=5.0)
        path.search()
        assert 0 not in path.visited


class TestLowestLoss:
    def test_is_the_lowest_of_the_points_next_to_the_shares(self):
        path = Path(1000)
        path.losses = np.abs(np.array(path.kept) - 0.72)
        shares = (0.95, 0.9, 0.8, 0.7, 0.6)
        point, trial = lowest_loss(path.kept, path.measure, shares)
        expected = [int(np.argmin(np.abs(np.array(path.kept) - share))) for share in shares]
        assert path.visited == sorted(expected)
        assert point == expected[3]
        assert trial.increase == path.losses[point]

    def test_measures_a_point_once_where_shares_share_it(self):
        path = Path(1)
        assert lowest_loss(path.kept, path.measure, (0.9, 0.8, 0.1))[0] == 1
        assert path.visited == [1]

    def test_finds_nothing_on_a_path_of_the_dense_model_alone(self):
        path = Path(1)
        assert lowest_loss([1.0], path.measure, (0.9,)) is None
        assert path.visited == []
