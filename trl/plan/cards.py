"""Accelerators that are rented: memory, speed of matrix products, speed of memory."""

from typing import NamedTuple


class Card(NamedTuple):
    """`memory` in GiB as the driver reports it; `tflops` of dense 16-bit products that add up in float32; `bandwidth`
    in GB/s. From the makers' data sheets; boards of one name differ by a few per cent."""

    memory: float
    tflops: float
    bandwidth: float
    bf16: bool = True


CARDS = {
    "t4": Card(15.0, 65, 320, bf16=False),
    "v100-16": Card(16.0, 125, 900, bf16=False),
    "v100-32": Card(32.0, 125, 900, bf16=False),
    "l4": Card(22.5, 121, 300),
    "a10": Card(22.5, 125, 600),
    "rtx-3090": Card(24.0, 71, 936),
    "rtx-4090": Card(24.0, 165, 1008),
    "rtx-5090": Card(31.8, 210, 1792),
    "rtx-a6000": Card(48.0, 155, 768),
    "l40s": Card(45.0, 362, 864),
    "a100-40": Card(40.0, 312, 1555),
    "a100-80": Card(80.0, 312, 2039),
    "h100": Card(79.6, 989, 3350),
    "h200": Card(140.4, 989, 4800),
    "b200": Card(179.0, 2250, 8000),
    "mi300x": Card(192.0, 1307, 5300),
}
