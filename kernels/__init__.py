"""Bottom floor: packed weight layouts, and the products that read them.

Nothing here knows about quantization methods or about the harness.
"""

__version__ = "0.1.0"
