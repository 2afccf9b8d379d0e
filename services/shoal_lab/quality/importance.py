"""How much each layer matters to the answer, by its work on the prompt and by its work on the answer.

A response is drawn from the model itself, so the loss is flat in the gates on average, and its curvature is the
Fisher information (POP, arXiv 2602.03295, section 3): ``I_l = E[(dL/dg_l)^2]``, the gradient of each response squared
first and averaged then. ``L`` is the response's summed negative log-likelihood, so ``I_l`` is in nats a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Curve:
    """One number a layer, with the standard error of its mean over the responses."""

    mean: tuple[float, ...]
    standard_error: tuple[float, ...]

    def last_third(self) -> float:
        """Mean over the last third of the layers."""
        return float(np.mean(self.mean[-max(1, len(self.mean) // 3) :]))


@dataclass(frozen=True, slots=True)
class GateGradients:
    """The derivatives of one response's loss by both gate vectors, ``num_layers`` numbers each."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Importance:
    """``I_l`` (nats a response) of every layer at both stages."""

    prefill: Curve
    decode: Curve

    @classmethod
    def of(cls, samples: Sequence[GateGradients]) -> Importance:
        """Raises ConfigError for fewer than two samples: one has no error to tell."""
        if len(samples) < 2:
            raise ConfigError(f"{len(samples)} samples are too few for a standard error: ask for 2 or more")
        return cls(
            _mean_of_squares(np.array([sample.prefill for sample in samples])),
            _mean_of_squares(np.array([sample.decode for sample in samples])),
        )

    def predicted_loss(self, num_skipped: int) -> float:
        """Nats a response that a shallow prompt is expected to cost: half the sum over the skipped layers.

        The second-order estimate of setting those prefill gates to 0, which is what the shallow plan computes, as if
        each layer were skipped alone: how two layers' effects meet is left out, and so is all beyond second order.
        """
        return 0.5 * sum(self.prefill.mean[len(self.prefill.mean) - num_skipped :])


def _mean_of_squares(gradients: NDArray[np.float64]) -> Curve:
    """``gradients`` is ``[samples, layers]``."""
    squares = gradients**2
    error = squares.std(axis=0, ddof=1) / len(squares) ** 0.5
    return Curve(tuple(squares.mean(axis=0).tolist()), tuple(error.tolist()))
