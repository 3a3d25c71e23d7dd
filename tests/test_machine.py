""" What a measurement is said to be made on. """
from contextlib import suppress

import pytest
import torch

from splitmixer_timm import machine


@pytest.mark.parametrize(('vectors', 'has_bfloat16', 'end'), [
    ('AVX2', False, ', AVX2'),
    ('AVX512', True, ', AVX512, bf16'),
    ('DEFAULT', False, ''),  # torch has no word for it
    ('DEFAULT', True, ', bf16'),
    ('NO AVX', False, ''),
])
def test_processors_of_one_name(monkeypatch, vectors, has_bfloat16, end):
    """ Results of one must not stand for another of the same name that has other instructions."""
    monkeypatch.setattr(machine, 'Path', lambda name: FakeFile(name))
    monkeypatch.setattr(machine.os, 'cpu_count', lambda: 4)
    monkeypatch.setattr(machine, 'has_bfloat16', lambda: has_bfloat16)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: vectors)
    assert machine.device_name('cpu') == 'CPU, 4 cores, Fast Chip 9000' + end


@pytest.mark.parametrize('is_file', [True, False])
def test_processors_without_a_name(monkeypatch, is_file):
    """ Of other kinds, and on other systems: by the architecture, not by the host."""
    monkeypatch.setattr(FakeFile, 'is_file', lambda self: is_file)
    monkeypatch.setattr(FakeFile, 'read_text', lambda self: 'processor\t: 0\n' if is_file else pytest.fail('no file'))
    monkeypatch.setattr(machine, 'Path', FakeFile)
    monkeypatch.setattr(machine.platform, 'machine', lambda: 'riscv64')
    monkeypatch.setattr(machine.platform, 'node', lambda: 'host')
    assert machine.device_name('cpu').split(', ')[2] == 'riscv64'


class FakeFile:
    def __init__(self, name):
        assert name == '/proc/cpuinfo'

    def is_file(self):
        return True

    def read_text(self):
        return 'processor\t: 0\nmodel name\t: Fast Chip 9000\nflags\t\t: fpu vme\n' * 2


@pytest.mark.parametrize('device', ['xpu', 'meta', 'warp'])
def test_a_device_of_another_kind_is_no_cpu(device):
    with pytest.raises(ValueError, match=f"device must be 'cuda', 'cuda:N', 'cpu' or 'mps', got '{device}'"):
        machine.device_name(device)


@pytest.mark.parametrize(('device', 'count', 'words'), [
    ('cuda', 0, 'no CUDA'), ('cuda:1', 0, 'no CUDA'), ('cuda:1', 1, 'but there are 1 CUDA devices'),
    ('cuda:2', 2, 'but there are 2 CUDA devices'), ('cuda', 1, None), ('cuda:0', 1, None), ('cuda:1', 2, None)])
def test_cuda(monkeypatch, device, count, words):
    """ Each device by its own name, those that are not there told."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: f'GPU {device}')
    if words is None:
        assert machine.device_name(device) == f'GPU {device}'
    else:
        with pytest.raises(ValueError, match=words):
            machine.device_name(device)


def test_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert machine.device_name('mps') == 'Apple GPU'
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    with pytest.raises(ValueError, match='no MPS'):
        machine.device_name('mps')


def test_full_precision_ends_with_an_error():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('high')
        with suppress(KeyError), machine.full_precision():
            now = torch.backends.mkldnn.matmul.fp32_precision
            raise KeyError
        assert now == 'ieee'
        assert torch.backends.mkldnn.matmul.fp32_precision != 'ieee'
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(('fp16', 'bf16'), [(True, False), (False, True)])
def test_half_precisions(monkeypatch, fp16, bf16):
    """ Processors have one, the other or both."""
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: True)
    for name, is_supported in (('fp16', fp16), ('bf16', bf16)):
        monkeypatch.setattr(torch.ops.mkldnn, f'_is_mkldnn_{name}_supported', lambda answer=is_supported: answer)
    assert [machine.has_precision(name) for name in ('fp32', 'fp16', 'bf16')] == [True, fp16, bf16]


def test_bfloat16(monkeypatch):
    """ Either oneDNN computes in it, or torch has no oneDNN."""
    assert machine.has_bfloat16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert machine.has_precision('bf16') == machine.has_bfloat16()
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    assert machine.has_bfloat16() is False
    assert [machine.has_precision(name) for name in ('fp32', 'fp16', 'bf16')] == [True, False, False]
