"""Products on a CPU by a small C++ library that is compiled on demand; without a compiler there is none, and callers
fall back to decoding."""

from kernels.cpu.library import CpuMatrix, cpu_matrix

__all__ = ["CpuMatrix", "cpu_matrix"]
