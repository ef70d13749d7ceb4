"""Ready-made kernels, written only in the public language.

``ag_gemm`` is an all-gather and a matrix product, ``gemm_rs`` a product and a reduce-scatter,
``gemm_ar`` a product and an all-reduce. ``ag_gemm_swiglu`` multiplies by two weights and gates one
with the other; ``gemm_rs_add`` and ``gemm_ar_add`` add a bias and a residual after the sum. ``gemm`` is
the product alone, on every rank by itself.
"""

from tilelink.kernels.ag_gemm import ag_gemm, ag_gemm_swiglu
from tilelink.kernels.gemm import gemm
from tilelink.kernels.gemm_ar import gemm_ar, gemm_ar_add
from tilelink.kernels.gemm_rs import gemm_rs, gemm_rs_add

__all__ = [
    "ag_gemm",
    "ag_gemm_swiglu",
    "gemm",
    "gemm_ar",
    "gemm_ar_add",
    "gemm_rs",
    "gemm_rs_add",
]
