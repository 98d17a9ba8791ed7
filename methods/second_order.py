"""What every method that looks at second-order information shares: its options, and the factor with its log entries.

Source of the defaults: 1 % damping and blocks of 128 columns in every released code of the GPTQ family.
"""

from __future__ import annotations

from pydantic import Field

from methods.base import LayerContext, MethodConfig
from methods.hessian import InverseFactor
from methods.statistics import LayerStatistics


class DampingConfig(MethodConfig):
    """The option of methods that factorize a Hessian."""

    damping: float = Field(0.01, gt=0, le=10, description="share of the mean Hessian diagonal added to the diagonal")


class CompensationConfig(DampingConfig):
    """The options of methods that move errors between columns by GPTQ's loop."""

    block_size: int = Field(128, ge=1, description="columns compensated at once before the rest is updated")


def logged_factor(statistics: LayerStatistics, damping: float, context: LayerContext) -> InverseFactor:
    """The damped factor of the inverse Hessian; dead inputs, and damping that had to be raised, go into the log."""
    factor = statistics.inverse_factor(damping)
    if factor.damping != damping:
        context.facts["damping"] = factor.damping
    context.facts["dead_columns"] = int(factor.dead.sum())
    return factor


def aligned_block_size(block_size: int, group_size: int) -> int:
    """`block_size`, or the group size where groups would straddle blocks: their fit would miss a block's updates.

    The result of GPTQ's loop depends on the block size in no other way.
    """
    aligned = block_size % group_size == 0 or group_size % block_size == 0
    return block_size if aligned else group_size
