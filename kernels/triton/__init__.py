"""Products on a GPU by Triton kernels that read the resident form; under TRITON_INTERPRET=1 the same kernels run on a
CPU."""
