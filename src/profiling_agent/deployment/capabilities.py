"""What int8 and bf16 mean on a processor, from its record alone: no torch, no runtime.

Three facts decide. *VNNI* (or AMX, or Arm's dot product) multiplies bytes and adds in 32 bits at
once. Without it, x86 adds pairs of products in 16 bits (``vpmaddubsw``), which saturate when both
factors use eight bits; a factor of seven bits is the remedy (openvino#25342), since 2 * 255 * 64
fits. And bf16 is fast only where the
processor multiplies it itself; elsewhere it is emulated, slower than fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiling_agent.records.common import Machine

_INT8_PRODUCTS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "i8mm": "Arm i8mm",
    "asimddp": "Arm dot products",
}
_BF16_PRODUCTS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm bf16"}
_X86 = ("x86_64", "amd64", "i686")


@dataclass(frozen=True, kw_only=True)
class Support:
    """Whether a kind of arithmetic is worth offering here; ``reason`` is for the report."""

    usable: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Int8Support(Support):
    """``reduce_range``: one factor must keep to seven bits, or sums of products saturate."""

    reduce_range: bool


def int8_support(machine: Machine) -> Int8Support:
    """Int8 matrix products on this processor."""
    for feature, name in _INT8_PRODUCTS.items():
        if feature in machine.features:
            return Int8Support(
                usable=True, reduce_range=False, reason=f"{name} adds int8 products in 32 bits"
            )
    if machine.architecture.lower() not in _X86:
        return Int8Support(
            usable=False,
            reduce_range=False,
            reason="this processor has no instructions for int8 products, so int8 would be slower",
        )
    if not {"avx2", "avx512f"} & set(machine.features):
        return Int8Support(
            usable=False,
            reduce_range=False,
            reason="without AVX2 int8 is slower than fp32 on this processor",
        )
    return Int8Support(
        usable=True,
        reduce_range=True,
        reason="without VNNI sums of int8 products saturate at 16 bits",
    )


def bf16_support(machine: Machine) -> Support:
    """Bfloat16 matrix products on this processor."""
    for feature, name in _BF16_PRODUCTS.items():
        if feature in machine.features:
            return Support(usable=True, reason=f"{name} multiplies bfloat16")
    return Support(
        usable=False,
        reason="this processor has no bfloat16 products (AVX512-BF16, AMX or Arm bf16)",
    )
