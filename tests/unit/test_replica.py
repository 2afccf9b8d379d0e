"""What a failed call to another replica means."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from shoal.errors import InternalError, InvalidRequest, PeerGone
from shoal.replica import known_error


def raised(cause: Exception) -> RayTaskError:
    """As a caller gets it from Ray."""
    return RayTaskError("generate", "Traceback: secret", cause)


def test_a_replica_s_own_error_is_passed_on():
    error = InvalidRequest("no such field", param="stop")
    assert known_error(raised(error), "decode") is error


@pytest.mark.parametrize("error", [ActorDiedError(), BackPressureError(1, 1), raised(ActorDiedError())], ids=repr)
def test_what_ray_says_itself_means_that_the_replica_went_away(error: Exception):
    assert isinstance(known_error(error, "decode"), PeerGone)


def test_a_defect_is_nothing_that_another_replica_could_mend():
    found = known_error(raised(ValueError("secret")), "decode")
    assert isinstance(found, InternalError) and "secret" not in found.message
