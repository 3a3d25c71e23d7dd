""" What a measurement was made on. """
import os
import platform
from pathlib import Path

import torch

__all__ = ['device_name']


def device_name(device: str) -> str:
    """ The GPU or the processor that a device for torch stands for; never the host's name."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    if device.startswith('mps'):
        return 'Apple GPU'
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return f'CPU, {os.cpu_count()} cores, {names[0] if names else platform.machine()}'
