"""Our own compute kernels for CPUs that multiply bfloat16 (AVX-512, and AMX where it is there), where torch's are slow:
attention, products, and what happens to rows between the products.

They are C++ (src/), compiled ahead, or once where a compiler is at hand (build.py). Nothing needs them: without
a compiler, on another CPU, or in another dtype, torch computes the same.
"""
