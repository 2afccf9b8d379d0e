"""Which (token, layer) cells of a prompt's K/V have arrived."""

from __future__ import annotations

from bisect import bisect_right

from shoal.errors import ProtocolViolation


class Coverage:
    """The cells ``[token_start, token_end)`` x ``[0, num_layers)``, filled by rectangles that must not overlap.

    Since none may overlap, the rectangles tile the whole exactly when as many cells are covered as there are.
    Each layer keeps the bounds of its covered runs in one ascending list, ``[start, end, start, end, …]``, in which
    neighbours are merged: a prompt that arrives in order is one run a layer, however many chunks it came in.
    """

    def __init__(self, token_start: int, token_end: int, num_layers: int) -> None:
        self._token_start = token_start
        self._token_end = token_end
        self._bounds: list[list[int]] = [[] for _ in range(num_layers)]
        self.num_cells = (token_end - token_start) * num_layers
        self.num_covered = 0

    @property
    def is_complete(self) -> bool:
        return self.num_covered == self.num_cells

    def add(self, token_start: int, token_end: int, layer_start: int, layer_end: int) -> None:
        """Cover a rectangle, or raise ProtocolViolation and cover nothing of it."""
        tokens_fit = self._token_start <= token_start < token_end <= self._token_end
        layers_fit = 0 <= layer_start < layer_end <= len(self._bounds)
        what = f"tokens [{token_start}, {token_end}) of layers [{layer_start}, {layer_end})"
        if not (tokens_fit and layers_fit):
            raise ProtocolViolation(
                f"{what} lie outside of what was asked for: tokens [{self._token_start}, {self._token_end})"
                f" of layers [0, {len(self._bounds)})"
            )
        layers = self._bounds[layer_start:layer_end]
        if not all(_is_free(bounds, token_start, token_end) for bounds in layers):
            raise ProtocolViolation(f"{what} overlap what another chunk brought")
        for bounds in layers:
            _insert(bounds, token_start, token_end)
        self.num_covered += (token_end - token_start) * len(layers)

    def remove(self, token_start: int, token_end: int, layer_start: int, layer_end: int) -> None:
        """Uncover a rectangle that was added."""
        layers = self._bounds[layer_start:layer_end]
        for bounds in layers:
            _erase(bounds, token_start, token_end)
        self.num_covered -= (token_end - token_start) * len(layers)


def _is_free(bounds: list[int], start: int, end: int) -> bool:
    after = bisect_right(bounds, start)  # even: start lies between two runs
    return after % 2 == 0 and (after == len(bounds) or end <= bounds[after])


def _insert(bounds: list[int], start: int, end: int) -> None:
    after = bisect_right(bounds, start)
    joins_left = after > 0 and bounds[after - 1] == start
    joins_right = after < len(bounds) and bounds[after] == end
    bounds[after - joins_left : after + joins_right] = [start] * (not joins_left) + [end] * (not joins_right)


def _erase(bounds: list[int], start: int, end: int) -> None:
    after = bisect_right(bounds, start)  # odd: start lies in a run
    left, right = bounds[after - 1], bounds[after]
    bounds[after - 1 : after + 1] = [left, start] * (left < start) + [end, right] * (end < right)
