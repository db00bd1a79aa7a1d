"""Names that onnxruntime gives to operators, and what is asked of it; imports nothing."""

from __future__ import annotations

PRODUCTS = ("Conv", "MatMul", "Gemm")
INT8_PRODUCTS = (
    "QLinearConv",
    "ConvInteger",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QGemm",
)
DISABLED_OPTIMIZERS = ("WeightBiasQuantization",)
"""As in ``serve.py``: it puts in int8 what was kept float but stands between int8 layers."""
