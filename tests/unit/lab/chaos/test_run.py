"""What a run of ``shoal chaos`` needs of its machine."""

from __future__ import annotations

import pytest

from shoal.errors import ConfigError
from shoal_lab.chaos import run
from shoal_lab.chaos.proxy import PROXY_HOST


def test_ports_that_are_not_free_for_the_proxy_as_well_are_no_ports_for_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    def require_free(host: str, port: int) -> None:
        if host == PROXY_HOST:
            raise ConfigError("taken")

    monkeypatch.setattr(run, "require_free", require_free)
    with pytest.raises(ConfigError, match=f"chaos needs {run._NUM_PORTS} ports that are free on both"):
        run._free_ports()
