"""sage-x: low-bit weights whose claimed bits are their stored bits. One file an ingredient.

One column: viterbi.py and viterbi.cpp (trellis search), codebook.py (its trained tables), columns.py (scales).
One matrix: rotation.py (balanced rows, Hadamard), rates.py (bits of each column), encoder.py (error feedback),
without data norms.py (sizes of inputs).
One block: moments.py (targets that make good earlier errors), block.py (order), tuning.py (short training).
The model: sensitivity.py (what an error costs), allocation.py (bits of each matrix), distillation.py (short training
at the end). method.py has the options.
The layout that decodes it all is kernels/layouts/trellis.py.
"""

from methods.sage_x.method import SageX, SageXConfig

__all__ = ["SageX", "SageXConfig"]
