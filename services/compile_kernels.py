"""What hatchling does before it makes a wheel (pyproject.toml says so): compile Shoal's kernels into it.

Whoever installs that wheel needs no compiler. Without one here, or for another processor, it becomes a wheel for any
machine, and a replica compiles them at its first start, if it can. With SHOAL_REQUIRE_KERNELS set, what keeps them from
being compiled is an error.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

_TIMEOUT_S = 1800  # the image of another processor is built under emulation


class CompiledKernels(BuildHookInterface[BuilderConfig]):
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        sys.path.insert(0, str(Path(self.root, "services")))
        from shoal.backends.cpu.build import SHIPPED, TARGETS, compiled
        from shoal.errors import ConfigError

        self._folder = tempfile.TemporaryDirectory(prefix="shoal-kernels-")
        try:
            folder = Path(self._folder.name)
            libraries = [compiled(folder, target, within_s=_TIMEOUT_S) for target in TARGETS]
        except (ConfigError, OSError) as error:
            if os.environ.get("SHOAL_REQUIRE_KERNELS"):
                raise
            self.app.display_warning(f"a wheel without compiled kernels, for any machine: {error}")
            return
        for library in libraries:
            build_data["force_include"][str(library)] = f"shoal/backends/cpu/{SHIPPED}/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_this_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def _this_platform() -> str:
    """By the C library's version, too: an older one may not have what the compiled library asks for."""
    return next((tag for tag in platform_tags() if not tag.startswith("linux")), "linux_x86_64")
