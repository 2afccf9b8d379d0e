"""Ridge regression towards a given matrix, from sums alone: text streams through, activations are never kept.

For inputs ``X`` ``[n, d]`` and outputs ``Y`` ``[n, m]`` only ``XᵀX`` ``[d, d]`` and ``XᵀY`` ``[d, m]`` are held, in
float64: ``8 d (d + m)`` bytes, whatever ``n`` is (Llama-3.1-8B with ten skipped layers: 0.8 GB).
"""

from __future__ import annotations

import torch

from shoal.errors import CalibrationError


class NormalEquations:
    """The sums of a least-squares problem with ``num_inputs`` (d) inputs and ``num_outputs`` (m) outputs."""

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device | None = None) -> None:
        self.inputs = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.products = torch.zeros(num_inputs, num_outputs, dtype=torch.float64, device=device)
        self.num_rows = 0

    def add_inputs(self, x: torch.Tensor) -> None:
        """Rows ``[n, d]``. Their outputs come by ``add_outputs``, as many columns at a time as one likes."""
        wide = x.double()
        self.inputs.addmm_(wide.T, wide)
        self.num_rows += x.shape[0]

    def add_outputs(self, x: torch.Tensor, first: int, y: torch.Tensor) -> None:
        """Columns ``[first, first + y.shape[1])`` of the same rows' outputs, ``[n, columns]``."""
        self.products[:, first : first + y.shape[1]].addmm_(x.double().T, y.double())

    def solve(self, prior: torch.Tensor, ridge: float) -> torch.Tensor:
        """``A`` ``[m, d]`` that minimises ``|X Aᵀ - Y|² + λ |A - prior|²``, with ``λ = ridge · tr(XᵀX) / d``.

        Raises CalibrationError where the sums hold numbers that aren't finite, or can't be solved.
        """
        if not (bool(torch.isfinite(self.inputs).all()) and bool(torch.isfinite(self.products).all())):
            raise CalibrationError("the model's activations on this text aren't finite: are its weights damaged?")
        weight = ridge * self.inputs.diagonal().mean()
        system = self.inputs.clone()
        system.diagonal().add_(weight)
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed):
            raise CalibrationError("too little text, or too little ridge, to tell the inputs apart: give more text")
        right = self.products + weight * prior.to(self.inputs).T
        return torch.cholesky_solve(right, factor).T
