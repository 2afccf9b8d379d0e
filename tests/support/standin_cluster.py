"""A program that serves the stand-ins until a signal ends it, as ``shoal serve`` does.

``standin_cluster.py FOLDER [PORT [GRPC_PORT]]`` prints ``starting``, then ``ready URL``, and ``stopped`` at the end.
FOLDER gets the stand-ins' diary.
"""

from __future__ import annotations

import sys

from shoal.cluster import Replicas, running
from shoal.config import ShoalConfig


def stand_ins() -> Replicas:
    from standins import StandInDecode, StandInGateway, StandInPrefill

    return Replicas(StandInGateway, StandInDecode, StandInPrefill)


def small_config(folder: str, port: int = 0, grpc_port: int = 0) -> ShoalConfig:
    return ShoalConfig(model={"name": folder}, gateway={"port": port, "grpc_port": grpc_port}, handoff={"drain_s": 1})


def main() -> None:
    try:
        print("starting", flush=True)
        with running(small_config(*sys.argv[1:2], *map(int, sys.argv[2:])), replicas=stand_ins()) as cluster:
            print("ready", cluster.url, flush=True)
            cluster.wait()
    except KeyboardInterrupt:
        print("stopped", flush=True)


if __name__ == "__main__":
    main()
