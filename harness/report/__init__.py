"""Tables from run records: what the paper prints, what was measured, the difference, and the bits that were stored.

Everything here reads records, a plan and the claims, and nothing else: no model is loaded and torch is not imported.
"""
