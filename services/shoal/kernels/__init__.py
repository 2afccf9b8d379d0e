"""Our own compute kernels, where torch's are slow. Nothing needs them: where they can't be, torch computes the same.

For CPUs with AVX-512 (and AMX where it is there) they are C++ (src/), compiled ahead, or once where a compiler is at
hand (build.py): attention, products of bfloat16, and what happens to rows between the products. For GPUs they are
Triton: attention of single rows (paged_attention.py), and what happens to rows (gpu_rows.py).
"""
