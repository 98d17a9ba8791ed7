"""AWQ: activation-aware scaling and clipping, then rounding. No error compensation.

Source: Lin et al. 2023, arXiv 2306.00978; mit-han-lab/llm-awq d6e797a. Per decoder block: (a) for each operation and
the linear layers that read it, input channels are scaled by s = mean|x|^r, the exponent r searched on a grid so that
the output of an inspected module changes least; s is folded into the operation before, so the function stays the same
and nothing but the folded norm gains is left in the model; (b) each group's range is clipped where that lowers the
error of its part of the output; (c) group-wise rounding. The activations of the next block come from the unquantized
block.
"""

from methods.awq.method import Awq, AwqConfig

__all__ = ["Awq", "AwqConfig"]
