"""BiLLM: structural salient columns, a split of the rest, residual binarization, block-wise compensation.

`search` chooses a block's masks, `block` fits its constants, `method` walks the blocks.
Source: Huang et al. 2024, arXiv 2402.04291; Aaronhuang-778/BiLLM dc137eb.
"""

from methods.billm.method import Billm, BillmConfig

__all__ = ["Billm", "BillmConfig"]
