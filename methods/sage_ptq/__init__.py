"""SAGE-PTQ (Abdalla et al. 2026, arXiv 2606.05429): one file a component of the paper.

saliency.py (3.1.1, eq. 2), grouping.py (3.1.2, eq. 3-4, algorithm 1), quantizer.py (3.2, eq. 5-10, algorithm 2),
threshold.py (3.3, eq. 11), method.py (options, presets, the order of the steps). The authors released no code.
"""

from methods.sage_ptq.method import SagePtq, SagePtqConfig

__all__ = ["SagePtq", "SagePtqConfig"]
