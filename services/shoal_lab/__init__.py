"""What measures Shoal: quality, benchmarks, faults. Commands load it when they need it; serving never does."""
