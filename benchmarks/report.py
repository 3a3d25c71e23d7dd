#!/usr/bin/env python3
""" Write the tables of README.md and MODEL_CARD.md from what they report: the table of variants, the manifest, and what
the card of each model says.

    python benchmarks/report.py            # rewrite the tables in place
    python benchmarks/report.py --check    # exit status 1 if one is stale

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; all else in a document is left as it is.
"""
import argparse
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Callable, Dict, List

import timm

from splitmixer_timm import convmixer, manifest, splitmixer
from splitmixer_timm.card import DATASETS, LIMITS
from splitmixer_timm.complexity import measure_complexity

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ('README.md', 'MODEL_CARD.md')

# Table 1 of the paper (arXiv 2207.10255), top-1 in percent
PAPER_TOP1 = {
    'cifar10': dict(conv=94.17, i=93.91, ii=92.25, iii=92.52, iv=93.38),
    'cifar100': dict(conv=73.92, i=72.88, ii=70.44, iii=70.89, iv=71.75),
    'flowers102': dict(conv=60.47, i=62.03, ii=59.33, iii=59.00, iv=61.51),
    'food101': dict(conv=74.59, i=73.56, ii=71.74, iii=72.78, iv=72.92),
}


def table(header: List[str], rows: List[List[str]]) -> str:
    """ Markdown table, the first column to the left and the others to the right."""
    lines = [header, [':--'] + ['--:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def models_table() -> str:
    """ Size and work of every variant at its default tag."""
    rows = []
    for arch, (_, tags) in {**convmixer.VARIANTS, **splitmixer.VARIANTS}.items():
        model = timm.create_model(arch, device='meta')
        cfg = model.pretrained_cfg
        counts = measure_complexity(model, cfg['input_size'])
        rows.append([
            f'`{arch}`', ', '.join(f'`{tag}`' for tag in tags), ' x '.join(map(str, cfg['input_size'][1:])),
            f'{counts.params:,}', f'{counts.macs / 1e6:,.1f}', f'{counts.paper_flops / 1e6:,.1f}'])
    return table(['model', 'tags (first: default)', 'input', 'parameters', 'MACs (M)', 'paper FLOPS (M)'], rows)


def seeds_cell(entry: Dict[str, Any]) -> str:
    """ Seed of a model, and over several runs the mean and the standard deviation of their top-1."""
    seeds = entry['metrics'].get('seeds')
    if not seeds:
        return str(entry['training']['seed'])
    return f'{", ".join(seeds)}: {mean(seeds.values()):.2f} +- {stdev(seeds.values()):.2f}'


def weights_table() -> str:
    """ What each pretrained model measured, beside the paper's figure."""
    rows = []
    for name, entry in sorted(manifest.entries().items()):
        kind = name.split('_')[1] if name.startswith('splitmixer') else 'conv'
        paper = PAPER_TOP1.get(entry['dataset'], {}).get(kind)
        model = timm.create_model(name, device='meta')
        counts = measure_complexity(model, model.pretrained_cfg['input_size'])
        metrics, training = entry['metrics'], entry['training']
        rows.append([
            f'`{name}`', f'{metrics["top1"]:.2f}', f'{metrics["top5"]:.2f}', f'{paper:.2f}' if paper else '-',
            f'{counts.params:,}', f'{counts.paper_flops / 1e6:,.1f}', f'{metrics["images"]:,}', str(training['epochs']),
            seeds_cell(entry), f'[log](weights/{training["summary"]})'])
    header = [
        'weights', 'top-1 %', 'top-5 %', "paper's top-1 %", 'parameters', 'paper FLOPS (M)', 'test images', 'epochs',
        'seeds', 'log']
    return table(header, rows)


def training_table() -> str:
    """ How each pretrained model was made."""
    rows = []
    for name, entry in sorted(manifest.entries().items()):
        training = entry['training']
        rows.append([
            f'`{name}`', training['recipe'], training['machine'], f'{training["hours"]:.1f} h',
            f'torch {training["torch"]}, timm {training["timm"]}', training['date'],
            f'[`args.yaml`](weights/{training["args"]})', f'[curves](weights/{training["curves"]})'])
    return table(['weights', 'recipe', 'machine', 'time', 'versions', 'date', 'arguments', 'curves'], rows)


def data_table() -> str:
    """ The data sets, as the card of each model tells of its own."""
    rows = [[data.name, f'[{data.hub_id}](https://huggingface.co/datasets/{data.hub_id})', data.content, data.source]
            for data in DATASETS.values()]
    return table(['data set', 'on the Hub', 'images', 'source'], rows)


def limits() -> str:
    """ What the card of each model says of its limits, and of the bias of its data set."""
    return '\n'.join([LIMITS, *(f'- {data.name}: {data.bias}.' for data in DATASETS.values())])


TABLES: Dict[str, Callable[[], str]] = {
    'models': models_table,
    'weights': weights_table,
    'training': training_table,
    'data': data_table,
    'limits': limits,
}


def render(text: str) -> str:
    """ A document with every table in it made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf'(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)', re.DOTALL)
        if pattern.search(text):
            content = make()
            text = pattern.sub(lambda match, content=content: f'{match[1]}{content}\n{match[2]}', text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, fail if a table is stale')
    args = parser.parse_args()
    stale = []
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text(encoding='utf-8')
        rendered = render(text)
        if rendered != text:
            stale.append(document)
            if not args.check:
                temporary = path.with_suffix('.tmp')
                temporary.write_text(rendered, encoding='utf-8')
                temporary.replace(path)
    print(f'{"stale" if args.check else "rewritten"}: {", ".join(stale) or "none"}')
    return 1 if args.check and stale else 0


if __name__ == '__main__':
    sys.exit(main())
