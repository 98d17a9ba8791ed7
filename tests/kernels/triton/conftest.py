"""Without a GPU the kernels run in Triton's interpreter; tests/conftest.py asks for it."""

import pytest

pytest.importorskip("triton")
