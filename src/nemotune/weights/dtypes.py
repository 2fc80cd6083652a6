"""The dtypes of safetensors headers beside torch's, and whether values of one are numbers."""

from __future__ import annotations

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
BYTES: dict[str, int] = {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()}


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is Inf or NaN: the least and the most would be."""
    if values.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = values.float()  # torch does not compare them
    return not values.is_floating_point() or not values.numel() or all(bound.isfinite() for bound in values.aminmax())
