import os
from pathlib import Path

import pytest
import timm
import torch

import splitmixer_timm  # noqa: F401, registers the models
from splitmixer_timm.machine import has_bfloat16

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(os.environ.get('SPLITMIXER_DATA', ROOT.parent / 'shared' / 'data'))

workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers > 1:
    # the processes share the cores, those that tests start as well: threads that wait for a core hold up all others
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ['OMP_NUM_THREADS'] = str(torch.get_num_threads())

KINDS = ('i', 'ii', 'iii', 'iv', 'v', '3d', 'full')
SPLITMIXERS = timm.list_models(module='splitmixer')
BASELINES = ['convmixer_256_8', 'convmixer_256_8_ks7_p7']

# what takes minutes where every product in bf16 is computed one by one
BF16 = pytest.param(
    'bf16', marks=pytest.mark.skipif(not has_bfloat16(), reason='needs a processor that computes in bf16'))


@pytest.fixture(autouse=True)
def _allocator(monkeypatch):
    """ What the benchmarks ask of the allocator would stay for all tests of this process."""
    monkeypatch.setattr('splitmixer_timm.benchmark.keep_memory', lambda: True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    """ Small images whose sides differ and are no multiple of common patches."""
    return torch.randn(2, 3, 15, 18)
