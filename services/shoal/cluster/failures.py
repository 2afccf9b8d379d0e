"""What Ray says when something can't start, in our words."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shoal import errors
from shoal.errors import ShoalError, Unavailable

# Where a replica's traceback, as Serve hands it on, names one of our errors.
_OURS = re.compile(r"^(?:shoal\.errors\.)(?P<name>\w+): (?P<message>.*)\Z", re.MULTILINE | re.DOTALL)


def explain(message: str) -> ShoalError:
    """The error that a replica's constructor raised, from the text that Serve makes of it; else Unavailable."""
    for found in _OURS.finditer(message.rstrip()):
        kind = getattr(errors, found["name"], None)
        if isinstance(kind, type) and issubclass(kind, ShoalError):
            return kind(found["message"].strip())
    return Unavailable(f"a replica could not start:\n{message.strip()}")


def missing_resources(wanted: Mapping[str, float], there: Mapping[str, float]) -> str | None:
    """What a cluster lacks, and what to do about it; ``None`` if nothing."""
    missing = {name: amount - there.get(name, 0) for name, amount in wanted.items() if there.get(name, 0) < amount}
    if not missing:
        return None
    lacks = ", ".join(f"{amount:g} {name}" for name, amount in missing.items())
    advice = []
    if own := {name: int(amount) for name, amount in wanted.items() if name in missing and name.islower()}:
        pairs = ", ".join(f'"{name}": {amount}' for name, amount in own.items())
        advice.append(f"start nodes with ray start --resources '{{{pairs}}}'")
    if "CPU" in missing:
        advice.append("lower prefill.num_cpus and decode.num_cpus, or add nodes")
    if "GPU" in missing:
        advice.append("lower prefill.num_gpus and decode.num_gpus, or add nodes with GPUs")
    return f"the cluster lacks {lacks}: {'; '.join(advice)}"
