""" What a measurement is said to be made on. """
import pytest
import torch

from splitmixer_timm import machine


@pytest.mark.parametrize(('vectors', 'has_bfloat16', 'end'), [
    ('AVX2', False, ', AVX2'),
    ('AVX512', True, ', AVX512, bf16'),
    ('DEFAULT', False, ''),  # torch has no word for it
    ('DEFAULT', True, ', bf16'),
])
def test_processors_of_one_name(monkeypatch, vectors, has_bfloat16, end):
    """ Results of one must not stand for another of the same name that has other instructions."""
    monkeypatch.setattr(machine, 'Path', lambda name: FakeFile(name))
    monkeypatch.setattr(machine.os, 'cpu_count', lambda: 4)
    monkeypatch.setattr(machine, 'has_bfloat16', lambda: has_bfloat16)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: vectors)
    assert machine.device_name('cpu') == 'CPU, 4 cores, Fast Chip 9000' + end


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


def test_bfloat16(monkeypatch):
    """ Either oneDNN computes in it, or torch has no oneDNN."""
    assert machine.has_bfloat16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert machine.has_precision('bf16') == machine.has_bfloat16()
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    assert machine.has_bfloat16() is False
    assert [machine.has_precision(name) for name in ('fp32', 'fp16', 'bf16')] == [True, False, False]
