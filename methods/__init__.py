"""Quantization methods behind one interface, and the registry that finds them by name.

from methods import LayerStatistics, create_method
packed = create_method("gptq", bits=4, group_size=128).quantize_linear(weight, LayerStatistics.from_inputs(x))
"""

from methods.base import LayerContext, LayerSurvey, MethodConfig, NominalBits, Provenance, QuantizationMethod
from methods.block import BlockResult, BlockView
from methods.model import ModelView, QuantizedView, Refinement
from methods.registry import MethodInfo, create_method, list_methods, method_class, register_method
from methods.statistics import LayerStatistics

__all__ = [
    "BlockResult",
    "BlockView",
    "LayerContext",
    "LayerStatistics",
    "LayerSurvey",
    "MethodConfig",
    "MethodInfo",
    "ModelView",
    "NominalBits",
    "Provenance",
    "QuantizationMethod",
    "QuantizedView",
    "Refinement",
    "create_method",
    "list_methods",
    "method_class",
    "register_method",
]
