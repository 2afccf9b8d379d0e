"""The composition root: from a configuration to running pools."""

from shoal.cluster.graph import Replicas, build
from shoal.cluster.progress import Progress
from shoal.cluster.start import Cluster, running

__all__ = ["Cluster", "Progress", "Replicas", "build", "running"]
