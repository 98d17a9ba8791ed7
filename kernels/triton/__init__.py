"""Products on a GPU by Triton kernels that read the resident form; under TRITON_INTERPRET=1 the same kernels run on a
CPU."""

import os

# Multiply-adds stay fused: Triton 3.10 stops doing so by default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
