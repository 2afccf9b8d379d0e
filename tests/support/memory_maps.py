"""What the system says of the memory that this process has mapped."""

from __future__ import annotations

import re
from pathlib import Path


def mapping_of(address: int) -> str:
    """The lines of /proc/self/smaps about the mapping that holds ``address``."""
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        start, end = (int(bound, 16) for bound in mapping.split()[0].split("-"))
        if start <= address < end:
            return mapping
    raise AssertionError("nothing is mapped there")
