"""The composition root: from a configuration to running pools."""

from shoal.app.cluster import Cluster, running
from shoal.app.graph import Replicas, build
from shoal.app.progress import Progress

__all__ = ["Cluster", "Progress", "Replicas", "build", "running"]
