"""The servers that are compared: how each is started, what it is asked, and which of its ways to use cores it has."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from exported import Model

from shoal.process.machine import multiplies_bfloat16

_HERE = Path(__file__).parent
MODEL_NAME = "smollm2"
_VERSION = "from importlib.metadata import version"
# A build for any processor may use less of this one, so what it was built for belongs to its release.
_XLLAMACPP = f"{_VERSION}; from xllamacpp import get_system_info; print(version('xllamacpp'), get_system_info())"
# All streams' prompts and answers fit; its K/V is one pool for all.
_MAX_STREAMS, _CONTEXT_TOKENS = 64, 32_768
# More than any prompt has: then decode computes them all itself.
_NEVER_HAND_OFF = "1000000"


class Mode(enum.StrEnum):
    """How a peer uses the cores. Which is quickest depends on the machine, and the client needs them, too."""

    ONE_THREAD = "one thread"
    PASSIVE = "passive wait"
    SPINNING = "all cores"
    INTEL_OPENMP = "Intel's OpenMP"
    """All cores, by the library that vLLM asks for, and sets up to wait as it likes."""
    OWN = "its own"
    """Shoal decides for itself."""

    @property
    def threads(self) -> int:
        return 1 if self is Mode.ONE_THREAD else len(os.sched_getaffinity(0))

    @property
    def environment(self) -> dict[str, str]:
        if self is Mode.OWN:
            return {}
        passive = {"OMP_WAIT_POLICY": "passive"} if self is Mode.PASSIVE else {}
        return {"OMP_NUM_THREADS": str(self.threads), **passive}


PEER_MODES = (Mode.ONE_THREAD, Mode.PASSIVE, Mode.SPINNING)


@dataclass(frozen=True, slots=True)
class Arm:
    """``command`` makes the command line for a mode and a port; ``missing`` says why it can't run here, if so.

    ``num_skipped`` layers are left out of its prefill. ``is_handed_off`` is what Shoal's own metrics must confirm
    (``None``: it has none). ``weights`` is how it holds them: bfloat16, float32, int8, or as they are in the GGUF that
    it reads. ``batch_field``: it must be told how many requests belong together. ``about`` is the command that says
    which release of a peer it is.
    """

    name: str
    what: str
    command: Callable[[Mode, int], list[str]]
    modes: tuple[Mode, ...] = PEER_MODES
    environment: Callable[[Mode], Mapping[str, str]] = lambda mode: mode.environment
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    health: str = "/health"
    num_skipped: int = 0
    is_handed_off: bool | None = None
    weights: str = "bfloat16"
    batch_field: str | None = None
    about: tuple[str, ...] = ()
    missing: str | None = None


def arms(
    model: Model, scratch: Path, *, vllm: Path | None, llamacpp: Path | None, llama_server: Path | None,
    num_skipped: int, stream_interval: int = 1,
) -> tuple[Arm, ...]:  # fmt: skip
    """All of them, peers first. ``scratch`` is a folder for what a server wants to write. Who can send several steps'
    tokens in one message sends ``stream_interval``."""
    vllm_command = partial(_vllm_command, model, vllm, stream_interval)
    shoal = partial(_shoal, model=model, stream_interval=stream_interval)
    return (
        _transformers(model),
        _in_float32(_transformers(model, "float32")),
        _vllm(vllm_command, scratch, vllm),
        _in_float32(_vllm(partial(vllm_command, "float32"), scratch, vllm, "float32")),
        replace(
            _vllm(partial(vllm_command, folder=model.int8_folder), scratch, vllm, "weights and inputs in int8"),
            name="vllm-int8",
            weights="int8",
        ),
        _vllm_pair(vllm_command, scratch, vllm),
        _llamacpp("llama.cpp", "Q4_1", model.gguf, llamacpp, llama_server),
        _llamacpp("llama.cpp-int8", "Q8_0", model.int8_gguf, llamacpp, llama_server),
        shoal("shoal-full", "decode does all", num_skipped=0, is_handed_off=False),
        shoal("shoal-handed-off", "prefill and decode apart", num_skipped=0, is_handed_off=True),
        shoal(
            "shoal-shallow", f"handed off, {num_skipped} layers skipped", num_skipped=num_skipped, is_handed_off=True
        ),
        shoal(
            "shoal-torch",
            f"handed off, {num_skipped} layers skipped, torch's kernels",
            num_skipped=num_skipped,
            is_handed_off=True,
            kernels="torch",
            weights="bfloat16" if multiplies_bfloat16() else "float32",  # as dtype auto is without Shoal's kernels
        ),
        shoal("shoal-int8", "handed off, decode's weights in int8", num_skipped=0, is_handed_off=True, weights="int8"),
        shoal(
            "shoal-shallow-int8",
            f"handed off, {num_skipped} layers skipped, weights in int8",
            num_skipped=num_skipped,
            is_handed_off=True,
            weights="int8",
            is_int8_throughout=True,
        ),
    )


def find(known: Sequence[Arm], name: str) -> Arm:
    """That of this name. Ends the program if there is none, or it can't run here."""
    found = {arm.name: arm for arm in known}
    if name not in found:
        sys.exit(f"error: there is no arm {name}: choose of {', '.join(found)}")
    if (missing := found[name].missing) is not None:
        sys.exit(f"error: {name}: {missing}")
    return found[name]


def _in_float32(arm: Arm) -> Arm:
    """An arm of its own where bfloat16 is emulated: of prompts and many streams it's that peer's best there."""
    missing = "this processor multiplies bfloat16, which is quicker" if multiplies_bfloat16() else arm.missing
    return replace(arm, name=f"{arm.name}-float32", weights="float32", missing=missing)


def _transformers(model: Model, dtype: str = "bfloat16") -> Arm:
    def command(mode: Mode, port: int) -> list[str]:
        script = str(_HERE / "transformers_server.py")
        return [
            sys.executable, script, str(model.folder), "--port", str(port), "--threads", str(mode.threads),
            "--dtype", dtype,
        ]  # fmt: skip

    return Arm("transformers", f"SDPA, {dtype}, static batches", command, batch_field="batch")


def _vllm(base: Callable[[], list[str]], scratch: Path, python: Path | None, numbers: str = "bfloat16") -> Arm:
    def command(mode: Mode, port: int) -> list[str]:
        return [*base(), "--port", str(port)]

    def environment(mode: Mode) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))[-mode.threads :]
        return {**_vllm_environment(scratch, python, mode), "VLLM_CPU_OMP_THREADS_BIND": _bound(cores)}

    modes = PEER_MODES if _intel_openmp(python) is None else (*PEER_MODES, Mode.INTEL_OPENMP)
    return Arm(
        "vllm", f"vLLM on the CPU, {numbers}, torch.compile", command, modes=modes, environment=environment,
        about=(str(python), "-c", f"{_VERSION}; print(version('vllm-cpu'))"), missing=_missing(python, "--vllm-python"),
    )  # fmt: skip


def _vllm_pair(base: Callable[[], list[str]], scratch: Path, python: Path | None) -> Arm:
    """Its waiting threads must not spin: two processes of them starve one another."""

    def command(mode: Mode, port: int) -> list[str]:
        cores = sorted(os.sched_getaffinity(0))
        prefill, decode = (cores[:1], cores[-1:]) if mode is Mode.ONE_THREAD else (cores, cores)
        return [
            sys.executable, str(_HERE / "vllm_pair.py"), "--port", str(port), "--prefill-cores", _bound(prefill),
            "--decode-cores", _bound(decode), "--", *base(),
        ]  # fmt: skip

    return Arm(
        "vllm-pair", "its own prefill and decode apart, by NixlConnector", command,
        modes=(Mode.ONE_THREAD, Mode.PASSIVE), environment=lambda mode: _vllm_environment(scratch, python, mode),
        about=(str(python), "-c", f"{_VERSION}; print(version('vllm-cpu'), 'nixl', version('nixl'))"),
        missing=_missing(python, "--vllm-python"),
    )  # fmt: skip


def _vllm_command(
    model: Model, python: Path | None, stream_interval: int, dtype: str = "bfloat16", folder: Path | None = None
) -> list[str]:
    # Not the console script: that of the CPU build looks for a GPU.
    return [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder or model.folder),
        "--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--dtype", dtype,
        "--max-model-len", str(model.max_context_tokens), "--no-enable-prefix-caching",
        *(() if stream_interval == 1 else ("--stream-interval", str(stream_interval))),
    ]  # fmt: skip


def _bound(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))


def _intel_openmp(python: Path | None) -> Path | None:
    """What vllm-cpu's package installs along, and recommends to load first."""
    found = None if python is None else python.parent.parent / "lib" / "libiomp5.so"
    return found if found is not None and found.is_file() else None


def _vllm_environment(scratch: Path, python: Path | None, mode: Mode) -> dict[str, str]:
    """Without a number of OpenMP's threads: vLLM gives each of its processes what it needs, unless it's told."""
    temporary = scratch / "tmp"  # its sockets and files, which it leaves behind
    temporary.mkdir(exist_ok=True)
    openmp = _intel_openmp(python) if mode is Mode.INTEL_OPENMP else None
    return {
        **({} if openmp is None else {"LD_PRELOAD": str(openmp)}),
        **({"OMP_WAIT_POLICY": "passive"} if mode is Mode.PASSIVE else {}),
        "TMPDIR": str(temporary),
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CACHE_ROOT": str(scratch / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def _llamacpp(name: str, kind: str, gguf: Path, python: Path | None, server: Path | None) -> Arm:
    """Either its ``llama-server``, or a Python with xllamacpp, which is the same server."""

    def command(mode: Mode, port: int) -> list[str]:
        threads, poll = str(mode.threads), "0" if mode is Mode.PASSIVE else "50"
        if server is None:
            script = str(_HERE / "llamacpp_server.py")
            return [
                str(python), script, str(gguf), "--port", str(port), "--threads", threads, "--poll", poll,
                "--parallel", str(_MAX_STREAMS), "--context", str(_CONTEXT_TOKENS),
            ]  # fmt: skip
        return [
            str(server), "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port), "--threads", threads,
            "--poll", poll, "--parallel", str(_MAX_STREAMS), "--ctx-size", str(_CONTEXT_TOKENS), "--kv-unified",
            "--no-cache-prompt", "--cache-ram", "0",
        ]  # fmt: skip

    about = (str(python), "-c", _XLLAMACPP) if server is None else (str(server), "--version")
    return Arm(
        name, f"its own server, {kind}", command, extra_body={"cache_prompt": False}, weights="gguf",
        about=about, missing=_missing(server or python, "--llama-server or --llamacpp-python"),
    )  # fmt: skip


def _shoal(
    name: str, what: str, *, model: Model, stream_interval: int, num_skipped: int, is_handed_off: bool,
    weights: str = "bfloat16", kernels: str = "auto", is_int8_throughout: bool = False,
) -> Arm:  # fmt: skip
    dtype = "float32" if weights == "float32" else "bfloat16"

    def command(mode: Mode, port: int) -> list[str]:
        return [
            sys.executable, "-c", "from shoal.cli.command import main; main()", "serve", "--dtype", dtype,
            "--skip-layers", str(num_skipped), "--port", str(port), "--grpc-port", "0",
            *(("--decode-weights", weights) if weights == "int8" else ()),
            *(("--prefill-weights", weights) if is_int8_throughout else ()),
        ]  # fmt: skip

    environment = {
        "SHOAL_DECODE__STREAM_INTERVAL": str(stream_interval),
        "SHOAL_PREFILL__KERNELS": kernels,
        "SHOAL_DECODE__KERNELS": kernels,
    }
    if not is_handed_off:
        environment["SHOAL_HANDOFF__MIN_TOKENS"] = _NEVER_HAND_OFF
    return Arm(
        name, what, command, modes=(Mode.OWN,), environment=lambda mode: environment, health="/readyz",
        num_skipped=num_skipped, is_handed_off=is_handed_off, weights=weights,
    )  # fmt: skip


def _missing(program: Path | None, flag: str) -> str | None:
    if program is None:
        return f"not asked for: name it by {flag}"
    return None if program.is_file() else f"{program} isn't there: see docs/performance.md"
