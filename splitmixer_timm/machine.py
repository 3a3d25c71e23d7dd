""" What a measurement was made on. """
import os
import platform
from pathlib import Path

import torch

__all__ = ['device_name', 'has_bfloat16']


def has_bfloat16() -> bool:
    """ Whether oneDNN computes in bf16 on this processor; elsewhere torch takes many times as long as in fp32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def device_name(device: str) -> str:
    """ The GPU, or the processor with its instructions, that a device for torch stands for; never the host's name."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    if device.startswith('mps'):
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
