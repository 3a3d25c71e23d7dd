""" benchmarks/complexity.py: what it counts is the paper's, and what is committed is what it counts. """
import csv
import sys
from fractions import Fraction

import complexity
import pytest
import report
import timm
import torch
from torch import nn

from splitmixer_timm.benchmark import build_model
from splitmixer_timm.complexity import measure_activation_bytes, measure_complexity
from splitmixer_timm.paper import TABLE3

with open(complexity.PATH, encoding='utf-8', newline='') as f:
    ROWS = list(csv.DictReader(f))


def test_results_are_fresh(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['complexity.py', '--check'])
    assert complexity.main() == 0, 'run benchmarks/complexity.py, then benchmarks/report.py'


def test_stale_results(tmp_path, monkeypatch, capsys):
    rows = [next(complexity.rows())]
    monkeypatch.setattr(complexity, 'rows', lambda: rows)
    monkeypatch.setattr(complexity, 'PATH', tmp_path / 'complexity.csv')
    for argv, status, answer in ((['--check'], 1, 'stale: complexity.csv'), ([], 0, 'rewritten: complexity.csv'),
                                 (['--check'], 0, 'stale: none')):
        monkeypatch.setattr(sys, 'argv', ['complexity.py', *argv])
        assert complexity.main() == status
        assert capsys.readouterr().out.strip() == answer


def test_sweeps_are_the_papers():
    """ Parameters and MACs (M) as the paper has them."""
    expected = {
        'I, α = 2/3': (342_230, 304.670), 'I, α = 3/5': (298_166, 259.688), 'I, α = 4/7': (281_366, 242.542),
        'I, α = 5/9': (272_118, 233.105), 'I, α = 6/11': (265_350, 226.199), 'II, s = 2': (241_766, 202.139),
        'II, s = 3': (168_494, 127.459), 'II, s = 4': (142_950, 101.476), 'II, s = 5': (130_990, 89.334),
        'II, s = 6': (124_474, 82.733), 'III, s = 2': (241_766, 336.357), 'III, s = 4': (142_950, 202.139),
        'III, s = 8': (118_118, 135.030), 'IV, s = 2': (373_862, 336.357), 'IV, s = 3': (286_486, 246.884),
        'IV, s = 4': (242_790, 202.139), 'IV, s = 5': (216_582, 175.302), 'ConvMixer': (701_542, 678.193)}
    counted = {
        TABLE3[row['model'], row['arguments']][0]: (int(row['params']), round(int(row['macs']) / 1e6, 3))
        for row in ROWS if row['table'] == 'sweep'}
    assert counted == expected


def test_closed_forms():
    """ The paper's savings, in the first places where segments are whole shares of the channels."""
    forms = {TABLE3[row][0]: report.closed_form(row) for row in list(TABLE3)[1:]}
    assert forms['I, α = 6/11'] == (Fraction(85, 121),) * 2
    assert forms['II, s = 4'] == (Fraction(15, 16),) * 2
    assert forms['III, s = 8'] == (Fraction(63, 64), Fraction(7, 8))
    assert forms['IV, s = 5'] == (Fraction(4, 5),) * 2
    rows = {TABLE3[row['model'], row['arguments']][0]: row for row in ROWS if row['table'] == 'sweep'}
    for label, (weights, macs) in forms.items():
        for form, name in ((weights, 'channel_weights'), (macs, 'channel_macs')):
            saved = 1 - Fraction(int(rows[label][name]), int(rows['ConvMixer'][name]))
            exact = label.startswith(('II', 'IV')) and label[-1] in '248'
            assert saved == form if exact else abs(saved - form) < Fraction(4, 1000)
        assert int(rows['ConvMixer']['spatial_macs']) / int(rows[label]['spatial_macs']) == 7 / 2


def test_mixing_is_all_but_stem_and_head():
    for row in ROWS:
        if row['channel_weights']:
            model = complexity.build((row['model'], row['arguments']), int(row['img_size']), int(row['num_classes']))
            mixing = int(row['spatial_weights']) + int(row['channel_weights'])
            rest = [p for name, p in model.named_parameters() if p.ndim == 1 or not name.startswith('blocks')]
            assert mixing + sum(p.numel() for p in rest) == int(row['params'])


def test_peers_at_32_are_timms():
    """ Our arguments of the MLPs build timm's networks, and with small patches those of the paper's comparison."""
    for name, args in complexity.MLPS.items():
        with torch.device('meta'):
            ours = complexity.MlpMixer(**args)
        theirs = timm.create_model(name, device='meta')
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()}
    millions = {row['model']: int(row['params']) / 1e6 for row in ROWS if row['table'] == 'peers 32'}
    assert millions['mixer_s16_224'] == pytest.approx(17.10, abs=0.02)
    assert millions['resmlp_12_224'] == pytest.approx(14.30, abs=0.03)
    assert millions['gmlp_ti16_224'] == pytest.approx(4.61, abs=0.01)


class TestActivations:
    @pytest.mark.parametrize(('model', 'expected'), [
        (nn.Conv2d(3, 8, 3), 3 * 64),  # its input
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU()), (3 + 8) * 64),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), (3 + 8) * 64),  # its output
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)), (3 + 8) * 64),  # one tensor, kept by two
        # by one of them as seen in another shape
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 7)), (3 + 8) * 64),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), (3 + 8) * 64),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 7)), 3 * 64),
    ])
    def test_by_hand(self, model, expected):
        assert measure_activation_bytes(model, (3, 8, 8)) == 4 * expected
        assert measure_activation_bytes(model.half(), (3, 8, 8)) == 2 * expected

    def test_in_eval_mode(self):
        """ It is training that is counted, whatever mode the model is in: dropout keeps what it dropped."""
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5))
        expected = measure_activation_bytes(model, (3, 8, 8))
        assert expected > 4 * 3 * 64
        assert measure_activation_bytes(model.eval(), (3, 8, 8)) == expected

    def test_splitmixer(self):
        """ Each of three convolutions a block, and the stem's, keeps the inputs of itself, its activation, its norm."""
        model = build_model(('splitmixer_i_256_8', ''), 32, 10)
        training = model.training
        position = 256 * 16 * 16
        expected = 3 * 32 * 32 + 2 * position + 8 * 3 * 3 * position + 256
        assert measure_activation_bytes(model, (3, 32, 32)) == 4 * expected
        assert model.training == training
        assert not any(p.is_meta for p in model.parameters())

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')
    def test_on_the_gpu(self):
        """ What a forward leaves allocated grows by that for each image, up to the allocator's rounding."""
        model = build_model(('splitmixer_i_256_8', ''), 32, 10).cuda()

        def left(count):
            images = torch.randn(count, 3, 32, 32, device='cuda')
            before = torch.cuda.memory_allocated()
            output = model(images)
            return torch.cuda.memory_allocated() - before + images.nbytes - output.nbytes

        left(8)
        expected = measure_activation_bytes(model, (3, 32, 32))
        assert (left(40) - left(8)) / 32 == pytest.approx(expected, rel=0.02)


def test_models_without_a_pooling_module():
    """ Of timm's own: MACs of attention and of token mixing are counted."""
    for name, macs in (('vit_tiny_patch16_224', 1.25e9), ('mixer_s16_224', 3.78e9), ('resnet18', 1.81e9)):
        assert measure_complexity(timm.create_model(name, device='meta'), (3, 224, 224)).macs == pytest.approx(
            macs, rel=0.02)
