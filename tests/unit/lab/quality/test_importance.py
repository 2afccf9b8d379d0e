"""What is made of the gates' gradients."""

from __future__ import annotations

import numpy as np
import pytest

from shoal_lab.quality.importance import GateGradients, Importance

SAMPLES = [GateGradients((1.0, 2.0, 0.0), (3.0, -1.0, 5.0)), GateGradients((-1.0, 4.0, 0.0), (1.0, 1.0, -5.0))]


def test_each_response_is_squared_before_the_average():
    found = Importance.of(SAMPLES)
    assert found.prefill.mean == (1.0, 10.0, 0.0)
    assert found.decode.mean == (5.0, 1.0, 25.0)
    # The square of the batch's gradient would have let opposite responses cancel.
    assert np.mean([sample.prefill[0] for sample in SAMPLES]) ** 2 == 0 != found.prefill.mean[0]


def test_the_standard_error_is_that_of_the_mean_of_squares():
    found = Importance.of(SAMPLES)
    assert found.prefill.standard_error == pytest.approx((0.0, 6.0, 0.0))


def test_the_predicted_loss_is_half_the_sum_over_the_last_layers():
    found = Importance.of(SAMPLES)
    assert [found.predicted_loss(count) for count in range(4)] == [0.0, 0.0, 5.0, 5.5]
