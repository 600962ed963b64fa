"""bfloat16 matrix products on CPUs that have no instructions for them: in float32, and rounded once.

torch falls back to a plain loop there, five to eighty times as slow as its float32 kernels. Both sum up in float32 and
round the sum, so that nothing but the order of the sum is another. GPUs, and CPUs with AVX-512 BF16 or AMX, are left
alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Operator -> the arguments of which none may be a single row or column: of those torch's product is quick.
PRODUCTS: dict[str, tuple[tuple[int, int], ...]] = {
    "mm": ((0, 0), (1, 1)),
    "addmm": ((1, 0), (2, 1)),
    "bmm": ((0, 1), (1, 2)),
    "baddbmm": ((1, 1), (2, 2)),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (),
}
# Kept for the life of the process: torch takes back what a library registered when it goes.
_library: list[Any] = []


def needed() -> bool:
    """Whether this CPU computes bfloat16 products in torch's plain loop."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def install(dtype: str) -> bool:
    """Replace torch's products where a model is to run in `dtype` on a CPU that needs it. Returns whether they are."""
    if dtype == "bfloat16" and not _library and not torch.cuda.is_available() and needed():
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced, which is the purpose
            for name, rows in PRODUCTS.items():
                kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
                library.impl(name, _in_float32(kernel, rows), "CPU", with_keyset=True)
        _library.append(library)
    return bool(_library)


def _in_float32(kernel: Any, rows: tuple[tuple[int, int], ...]) -> Callable[..., Any]:
    """The kernel itself for other types; for bfloat16 the kernel of float32."""

    def product(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if tensors[-1].dtype != torch.bfloat16 and tensors[0].dtype != torch.bfloat16:
            return kernel.call_boxed(keyset, *args, **kwargs)
        if any(args[place].shape[dim] == 1 for place, dim in rows):
            return kernel.call_boxed(keyset, *args, **kwargs)
        found = kernel.call_boxed(
            keyset, *(_wide(a) for a in args), **{name: _wide(a) for name, a in kwargs.items()}
        )
        return found.bfloat16() if isinstance(found, Tensor) else tuple(t.bfloat16() for t in found)

    return product


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
