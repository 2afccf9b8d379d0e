"""Our own CPU kernels, where torch's are slow. Nothing needs them: where they can't run, torch computes the same.

They are C++ (src/) for AVX-512 and, where there is one, AMX: compiled into the wheel, or at the first start where a
compiler is at hand (build.py). kernels.py loads them, native.py runs a model by them.
"""
