"""What rnp_kernels needs from C++ that involves no tensor (csrc/python.cpp)."""

from collections.abc import Sequence
from typing import Any

def build_info() -> dict[str, str | None]: ...
def cpu_features() -> dict[str, bool]: ...
def available_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def fma_peak(rounds: int) -> int: ...
def bfloat16_peak(rounds: int) -> int: ...
def processor() -> list[bool]: ...
def set_processor(processor: Sequence[bool]) -> None: ...
def set_stock_dtypes(float32: bool, bfloat16: int, float16: bool) -> None: ...
def stock_path(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: str,
    channels_last: bool,
) -> int: ...
def describe_kernel(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: str,
) -> str: ...
def algorithm() -> str: ...
def set_algorithm(name: str) -> None: ...
def training_path(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> int: ...
def onednn_is_right(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: str,
) -> bool: ...
def our_gradients(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> tuple[bool, bool]: ...
def winograd_can(weight: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool: ...
def winograd_tile(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: str,
) -> int: ...
def transforms_in_call(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: str,
) -> bool: ...
def choose_algorithm(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: str,
    in_prefix: int,
    out_prefix: int,
) -> int: ...

class LayerCall:
    def __init__(
        self,
        input: Sequence[int],
        weight: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        input_stride: Sequence[int],
        weight_stride: Sequence[int],
        output_stride: Sequence[int],
        tile: int,
    ) -> None: ...
    @property
    def pools_output(self) -> bool: ...
    def new_output(self) -> Any: ...  # a DLPack capsule
    def __call__(
        self,
        input: int,
        output: int,
        in_prefix: int,
        out_prefix: int,
        weight: int,
        bias: int,
        packed: int,
        transformed: int,
    ) -> int: ...

def output_pool_bytes() -> int: ...
def describe_cuda_kernel(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: str,
    channels_last: bool,
    tf32: bool,
    multiprocessors: int,
    hopper: bool = ...,
) -> str: ...
def macs(
    in_prefix: Sequence[int],
    out_prefix: Sequence[int],
    *,
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    output_size: tuple[int, int],
    groups: int = 1,
) -> list[int]: ...
