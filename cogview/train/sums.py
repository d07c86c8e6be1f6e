"""Checksums of what a checkpoint holds."""

import json
import zlib
from typing import Any

import torch
from torch import Tensor


def tensor_sum(name: str, value: Tensor) -> int:
    """CRC-32 of a tensor: name, dtype, shape and bytes."""
    head = json.dumps([name, str(value.dtype), list(value.shape)]).encode()
    return zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(head))


def json_sum(value: Any) -> int:
    """CRC-32 of what JSON can hold."""
    return zlib.crc32(json.dumps(value).encode())
