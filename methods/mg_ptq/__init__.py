"""MG-PTQ: a graph neural network over the columns of a matrix allots their bits; GPTQ quantizes with them.

A reconstruction: the abstract names the parts, no code is public, and the rest is this project's choice. `allocation`
has the error model and the allocators without a network, `graph` the network, `method` the quantization.
Source: Liu et al. 2025, arXiv 2501.18154.
"""

from methods.mg_ptq.method import MgPtq, MgPtqConfig

__all__ = ["MgPtq", "MgPtqConfig"]
