#!/usr/bin/env python3
""" Count parameters, operations and activation memory of every variant, the paper's sweeps and timm's peers.

    python benchmarks/complexity.py            # rewrite benchmarks/results/complexity.csv
    python benchmarks/complexity.py --check    # exit status 1 if it is stale

Nothing is computed, so the counts are the same on every machine. `benchmarks/report.py` makes tables of them.
"""
import argparse
import csv
import io
import sys
from typing import Dict, Iterator, Tuple

import torch
from timm.layers import GatedMlp
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from splitmixer_timm import convmixer, splitmixer
from splitmixer_timm.benchmark import RESULTS_DIR, Row, build_model
from splitmixer_timm.complexity import measure_activation_bytes, measure_complexity
from splitmixer_timm.files import replace_file
from splitmixer_timm.paper import TABLE3

PATH = RESULTS_DIR / 'complexity.csv'
COLUMNS = (
    'table', 'model', 'arguments', 'img_size', 'num_classes', 'params', 'macs', 'paper_flops', 'activation_bytes',
    'spatial_weights', 'spatial_macs', 'channel_weights', 'channel_macs')

DEPTHS = (2, 4, 8, 16, 32)
KINDS = ('convmixer', 'splitmixer_i', 'splitmixer_ii', 'splitmixer_iii', 'splitmixer_iv')
PEERS = (
    'resnet18', 'resnet50', 'mobilenetv3_small_100', 'vit_tiny_patch16_224', 'mixer_s16_224', 'resmlp_12_224',
    'gmlp_ti16_224')
# timm's arguments of those whose patch size timm does not let one choose
MLPS = {
    'mixer_s16_224': dict(num_blocks=8, embed_dim=512),
    'resmlp_12_224': dict(num_blocks=12, embed_dim=384, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine),
    'gmlp_ti16_224': dict(
        num_blocks=30, embed_dim=128, mlp_ratio=6, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp),
}
CONVMIXERS = ('convmixer_1536_20', 'convmixer_768_32', 'convmixer_1024_20_ks9_p14')


def rows() -> Iterator[Tuple[str, Row, int, int]]:
    """ What to count: table, model and arguments, image size, number of classes."""
    for name, (_, tags) in {**convmixer.VARIANTS, **splitmixer.VARIANTS}.items():
        data = splitmixer._DATASETS[tags[0]]
        yield 'variants', (name, ''), data['input_size'][1], data['num_classes']
    for row in TABLE3:
        yield 'sweep', row, 224, 102
    for kind in KINDS:
        for depth in DEPTHS:
            yield 'depth', (f'{kind}_256_8', f'depth={depth}'), 32, 10
    for name in PEERS:
        # in patches of 16 x 16 an image of 32 x 32 would be but four
        yield 'peers 32', (name, 'patch_size=4' if name.endswith('16_224') or name in MLPS else ''), 32, 10
    for name in PEERS:
        yield 'peers 224', (name, ''), 224, 102
    for name in CONVMIXERS:
        yield 'peers in1k', (name, ''), 224, 1000


def build(row: Row, img_size: int, num_classes: int) -> nn.Module:
    """ Model of a row, without its data."""
    name, arguments = row
    with torch.device('meta'):
        if name in MLPS and arguments:
            return MlpMixer(num_classes, img_size, patch_size=int(arguments.partition('=')[2]), **MLPS[name])
        return build_model(row, img_size, num_classes)


class ConvolutionCounter(TorchDispatchMode):
    """ Counts the MACs of depthwise (spatial) and of pointwise (channel) convolutions under it."""

    def __init__(self):
        super().__init__()
        self.macs = dict(spatial=0, channel=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            weight = args[1]
            self.macs['channel' if weight.shape[2:].numel() == 1 else 'spatial'] += weight.numel() * out[:, 0].numel()
        return out


def count_mixing(model: nn.Module, img_size: int) -> Dict[str, int]:
    """ Weights, without biases, and MACs of the spatial and the channel convolutions of a SplitMixer or ConvMixer."""
    counts = dict.fromkeys(COLUMNS[-4:], 0)
    for module in model.blocks.modules():
        if isinstance(module, nn.Conv2d):
            counts[f'{"spatial" if module.groups > 1 else "channel"}_weights'] += module.weight.numel()
    model = model.eval()
    with torch.no_grad():
        features = model.stem(torch.empty(1, 3, img_size, img_size, device='meta'))
        with ConvolutionCounter() as counter:
            model.blocks(features)
    counts.update({f'{kind}_macs': macs for kind, macs in counter.macs.items()})
    return counts


def make() -> str:
    """ The results file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    writer.writeheader()
    for table, row, img_size, num_classes in tqdm([*rows()], unit='model', disable=None):
        model = build(row, img_size, num_classes)
        size = (3, img_size, img_size)
        counts = measure_complexity(model, size)
        writer.writerow(dict(
            table=table, model=row[0], arguments=row[1], img_size=img_size, num_classes=num_classes,
            params=counts.params, macs=counts.macs, paper_flops='' if table.startswith('peers') else counts.paper_flops,
            activation_bytes=measure_activation_bytes(model, size),
            **(count_mixing(model, img_size) if table == 'sweep' else {})))
    return text.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, fail if the file is stale')
    args = parser.parse_args()
    text = make()
    is_stale = not PATH.is_file() or PATH.read_text(encoding='utf-8') != text
    if is_stale and not args.check:
        replace_file(PATH, text.encode())
    print(f'{"stale" if args.check else "rewritten"}: {PATH.name if is_stale else "none"}')
    return 1 if args.check and is_stale else 0


if __name__ == '__main__':
    sys.exit(main())
