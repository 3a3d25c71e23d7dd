""" What a measurement was made on. """
import os
import platform
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch

__all__ = ['check_device', 'device_name', 'full_precision', 'has_bfloat16', 'has_precision']


@contextmanager
def full_precision() -> Iterator[None]:
    """ Products of fp32 in fp32: torch allows convolutions on CUDA TF32 by itself, and more where it is told to."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    backends = cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv
    before = [(backend, precision) for backend in backends if (precision := backend.fp32_precision) != 'ieee']
    for backend, _ in before:
        backend.fp32_precision = 'ieee'
    try:
        yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision


def has_bfloat16() -> bool:
    """ Whether oneDNN computes in bf16 on this processor; elsewhere torch is much slower than in fp32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_precision(precision: str) -> bool:
    """ Whether this processor computes in 'fp32', 'fp16' or 'bf16', as the benchmarks name them."""
    if precision == 'fp16':
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return precision != 'bf16' or has_bfloat16()


def check_device(name: str, any_kind: bool = False) -> torch.device:
    """ Device of that name.

    Args:
        name: Its name for torch.
        any_kind: Whether kinds that are not measured ('xpu', ...) will do; whether one is there, torch tells.

    Raises:
        ValueError: If there is none, or it is of no kind that can be measured.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cuda', 'cpu', 'mps') and not any_kind:
        raise ValueError(f"device must be 'cuda', 'cuda:N', 'cpu' or 'mps', got {name!r}")
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} asked for, but this machine or this torch has no CUDA; 'cpu' works anywhere")
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'device {name!r} asked for, but there are {torch.cuda.device_count()} CUDA devices')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise ValueError(f"device {name!r} asked for, but this machine or this torch has no MPS; 'cpu' works anywhere")
    return device


def device_name(device: str) -> str:
    """ The GPU, or the processor with its instructions, that a device for torch stands for; never the host's name.

    Raises:
        ValueError: As `check_device`.
    """
    kind = check_device(device).type
    if kind == 'cuda':
        return torch.cuda.get_device_name(device)
    if kind == 'mps':
        return 'Apple GPU'
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    parts = ['CPU', f'{os.cpu_count()} cores', names[0] if names else platform.machine()]
    # processors of very different speed may have one name, above all in virtual machines
    vectors = torch.backends.cpu.get_cpu_capability()
    if vectors not in ('DEFAULT', 'NO AVX'):
        parts.append(vectors)
    if has_bfloat16():
        parts.append('bf16')
    return ', '.join(parts)
