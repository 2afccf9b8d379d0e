"""Where a step is computed: by our CPU kernels (cpu/), by torch, or on a GPU (gpu/)."""
