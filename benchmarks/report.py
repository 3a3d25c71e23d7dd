#!/usr/bin/env python3
""" Write the tables of the documents, and the pictures, from what they report: the table of variants, the manifest,
what model cards say, and benchmarks/results/.

    python benchmarks/report.py            # rewrite them in place
    python benchmarks/report.py --check    # exit status 1 if one is stale

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; all else in a document is left as it is. Nothing
is measured here, and a picture is drawn only if its results changed.
"""
import argparse
import csv
import re
import sys
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import timm
from roofline import FORWARD, FUSED, RooflineResults
from speed import INFERENCE, TRAINING, SpeedResults

from splitmixer_timm import benchmark_report as reports
from splitmixer_timm import convmixer, manifest, splitmixer
from splitmixer_timm.benchmark import Results, Settings
from splitmixer_timm.benchmark_report import markdown_table as table
from splitmixer_timm.card import DATASETS, INTENDED_USE, LIMITS
from splitmixer_timm.complexity import Complexity, measure_complexity
from splitmixer_timm.files import replace_file
from splitmixer_timm.paper import BASELINE, PEERS, TABLE3, TOP1, kind_of, top1

ROOT = Path(__file__).resolve().parents[1]
RESULTS_DIR = ROOT / 'benchmarks' / 'results'
DOCUMENTS = ('README.md', 'MODEL_CARD.md', 'benchmarks/README.md')
NOTHING = 'No results file is in `benchmarks/results/`.'


def complexity(name: str) -> List[Dict[str, str]]:
    """ Rows of one table of `complexity.csv`."""
    with open(RESULTS_DIR / 'complexity.csv', encoding='utf-8', newline='') as f:
        return [row for row in csv.DictReader(f) if row['table'] == name]


def throughput() -> Iterator[Tuple[str, List[Dict[str, str]]]]:
    """ Each results file of throughput: its name without suffix, and the rows of each setting in it."""
    for path in sorted(RESULTS_DIR.glob('*.csv')):
        if path.name != 'complexity.csv' and not path.name.endswith(('.roofline.csv', '.speed.csv')):
            for rows in reports.group(list(Results(path).rows.values())):
                yield path.stem, rows


def speed() -> Iterator[Dict[Tuple[str, ...], Dict[str, str]]]:
    """ Rows of each results file of `speed.py`, by their key."""
    for path in sorted(RESULTS_DIR.glob('*.speed.csv')):
        yield SpeedResults(path).rows


def million(text: str) -> str:
    return f'{int(text) / 1e6:,.1f}'


def mebi(text: str) -> str:
    return f'{int(text) / 2**20:,.1f}'


def models_table() -> str:
    """ Size and work of every variant at its default tag."""
    tags = {
        arch: dict.fromkeys(datasets) for arch, (_, datasets) in {**convmixer.VARIANTS, **splitmixer.VARIANTS}.items()}
    for name in manifest.entries():
        arch, _, tag = name.partition('.')
        tags[arch].setdefault(tag)
    return table(['model', 'tags (first: default)', 'input', 'parameters', 'MACs (M)', 'paper FLOPS (M)'], [
        [
            f'`{row["model"]}`', ', '.join(f'`{tag}`' for tag in tags[row['model']]),
            f'{row["img_size"]} x {row["img_size"]}', f'{int(row["params"]):,}', million(row['macs']),
            million(row['paper_flops']),
        ]
        for row in complexity('variants')])


def speed_tables() -> str:
    """ Throughput of the paper's base models: each device's in the paper's setting beside the paper's own."""
    alike = {}
    for _, rows in throughput():
        # the paper's setting but for the memory format
        same = [{**rows[0], 'memory_format': Settings().columns()['memory_format']}]
        if rows[0]['memory_format'] == 'channels_last' and reports.is_papers(same):
            alike[rows[0]['device']] = reports.measured(rows, 'steady')
    parts = []
    for _, rows in throughput():
        results = reports.measured(rows, 'steady')
        if reports.is_papers(rows) and results:
            steady = list(results.values())
            parts += [
                speed_table(results, steady[0]['device'], alike.get(steady[0]['device'])),
                f'{reports.source(steady)}.']
    return '\n\n'.join(parts) or 'None of ours is measured yet.'


def speed_table(
        results: Dict[Tuple[str, str], Dict[str, str]],
        device: str,
        alike: Optional[Dict[Tuple[str, str], Dict[str, str]]],
) -> str:
    """ Of one device; `alike` are its results with all models in channels_last."""
    params = {(row['model'], row['arguments']): row['params'] for row in complexity('sweep')}
    header = ['model', 'parameters', "paper's V100", 'ratio', device, 'spread', 'ratio']
    header += [] if alike is None else ['ratio, all in channels_last']
    lines = []
    for row, (name, v100) in TABLE3.items():
        if row[1]:
            continue
        line = [name, f'{int(params[row]):,}', reports.number(v100), f'{v100 / TABLE3[BASELINE][1]:.2f}']
        line += ['-', '-'] if row not in results else [
            reports.number(results[row]['img_per_s']), reports.spread(results[row])]
        for own in (results, alike):
            if own is not None:
                value = reports.ratio(own, row) if row in own else None
                line.append(f'{value:.2f}' if value else '-')
        lines.append(line)
    return table(header, lines)


def throughput_tables() -> str:
    """ Every device, every setting: how it was measured, the table, the picture."""
    parts = []
    for name, rows in throughput():
        parts += [f'### {rows[0]["device"]}: {reports.describe_setting(rows)}', reports.throughput_table(rows)]
        parts.append(reports.describe(rows))
        if any(row['img_per_s'] for row in rows):
            parts.append(f'![{rows[0]["device"]} beside the paper](results/{reports.picture_name(name, rows)})')
    return '\n\n'.join(parts) or NOTHING


def roofline_tables() -> str:
    """ Every device, every setting: the limits of each model, and where its time goes."""
    parts = []
    for path in sorted(RESULTS_DIR.glob('*.roofline.csv')):
        for rows in reports.group(list(RooflineResults(path).rows.values())):
            parts += [f'### {rows[0]["device"]}: {reports.describe_setting(rows)}', roofline_table(rows)]
            ceilings = dict.fromkeys(
                f'Copy {float(row["copy_bytes_per_s"]) / 1e9:,.1f} GB/s, matrix product '
                f'{float(row["operations_per_s"]) / 1e9:,.0f} GFLOP/s' for row in rows)
            parts.append(f'{" / ".join(ceilings)}. {reports.source(rows)}.')
    return '\n\n'.join(parts) or NOTHING


def roofline_table(rows: List[Dict[str, str]]) -> str:
    models: Dict[Tuple[Tuple[str, str], str], Dict[str, Dict[str, str]]] = {}
    for row in rows:
        models.setdefault(((row['model'], row['arguments']), row['form']), {})[row['kind']] = row
    # the kinds that take most, first
    total: Dict[str, float] = {}
    for row in rows:
        if row['kind'] not in (FORWARD, FUSED):
            total[row['kind']] = total.get(row['kind'], 0) + float(row['seconds'])
    kinds = sorted(total, key=total.get, reverse=True)
    lines = []
    for (key, form), by_kind in models.items():
        label = reports.label(key) + ('' if form == 'created' else f', {form}')
        forward = by_kind[FORWARD]
        if forward['error']:
            lines.append([label, 'failed', *['-'] * (3 + len(kinds))])
            continue
        took = float(forward['seconds'])
        limits = [float(by_kind[kind]['limit_seconds']) for kind in (FORWARD, FUSED)]
        line = [label, *(reports.number(1000 * value) for value in (took, *limits)),
                f'{limits[0] / took:.0%}']
        for kind in kinds:
            cell = '-'
            if kind in by_kind:
                own = by_kind[kind]
                cell = f'{1000 * float(own["seconds"]):.3g} / {1000 * float(own["limit_seconds"]):.3g}'
            line.append(cell)
        lines.append(line)
    header = ['model', 'forward (ms)', 'limit (ms)', 'fused limit (ms)', 'limit / forward']
    return table(header + [f'{kind} / limit (ms)' for kind in kinds], lines)


def forms_tables() -> str:
    """ Every device, every task of speed.py: images a second of the plain model, and how many times that the others."""
    parts = []
    for results in speed():
        tasks: Dict[Tuple[str, ...], List[Dict[str, str]]] = {}
        measured = list(results.values())
        for row in measured:
            key = ('mode', 'precision', 'batch_size', 'memory', 'threads')
            tasks.setdefault(tuple(row[name] for name in key), []).append(row)
        for (mode, precision, batch_size, memory, threads), rows in tasks.items():
            title = f'training, {precision}' if mode == 'train' else f'inference, {precision} but where said otherwise'
            title += f', batch {batch_size}' + (f', memory {memory}' if memory else '') + of_threads(threads, measured)
            parts += [f'**{rows[0]["device"]}: {title}**', forms_table(rows)]
        parts.append(f'{reports.source(measured)}.')
    return '\n\n'.join(parts) or NOTHING


def of_threads(threads: str, rows: List[Dict[str, str]]) -> str:
    """ How many threads there were, where rows differ in that."""
    return f', {threads} threads' if len({row['threads'] for row in rows}) > 1 else ''


def gains_tables() -> str:
    """ Every device: how many times the plain model's images a second, in inference with a batch."""
    parts = []
    for results in speed():
        batches: Dict[Tuple[str, str], List[Dict[str, str]]] = {}
        measured = list(results.values())
        for row in measured:
            if row['mode'] == 'infer' and row['batch_size'] != '1':
                batches.setdefault((row['batch_size'], row['threads']), []).append(row)
        for (_, threads), rows in batches.items():
            parts += [gains_table(rows, of_threads(threads, measured)), f'{reports.source(rows)}.']
    return '\n\n'.join(parts) or NOTHING


def gains_table(rows: List[Dict[str, str]], threads: str) -> str:
    gains: Dict[str, Dict[str, Dict[str, str]]] = {}
    for row in rows:
        gains.setdefault(row['model'], {}).setdefault(row['form'], {})[row['memory']] = row
    memories = list(dict.fromkeys(row['memory'] for row in rows))
    forms = [form for form in INFERENCE if form != 'plain' and any(form in by_form for by_form in gains.values())]
    lines = []
    for model, by_form in gains.items():
        plain = [by_form.get('plain', {}).get(memory) for memory in memories]
        line = [f'`{model}`', ' / '.join(
            reports.number(int(row['batch_size']) / float(row['seconds'])) if row and not row['error'] else '-'
            for row in plain)]
        for form in forms:
            cells = []
            for memory in memories:
                row, plain = (by_form.get(name, {}).get(memory) for name in (form, 'plain'))
                known = row and plain and not row['error'] and not plain['error']
                cells.append(f'{float(plain["seconds"]) / float(row["seconds"]):.1f}' if known else '-')
            line.append(' / '.join(cells))
        lines.append(line)
    title = f'{rows[0]["device"]}, batch {rows[0]["batch_size"]}{threads}'
    title += f', memory {" / ".join(memories)}' if any(memories) else ''
    return table([title, 'plain (img/s)', *forms], lines)


def ranges_tables() -> str:
    """ Every device, single images and training: how many times the plain model's images a second SplitMixers have."""
    tables: Dict[str, Dict[str, Dict[str, List[float]]]] = {}
    sources = []
    for rows in speed():
        shown = []
        for key, row in rows.items():
            is_training = row['mode'] == 'train'
            plain = rows.get((*key[:-1], 'plain'))
            is_known = plain and not plain['error'] and not row['error']
            if row is plain or not is_known or not row['model'].startswith('splitmixer') or not (
                    is_training or row['batch_size'] == '1'):
                continue
            title = row['device'] + (f': {row["precision"]}, batch {row["batch_size"]}' if is_training else '')
            forms = tables.setdefault('a step of training' if is_training else 'single images', {}).setdefault(
                title + of_threads(row['threads'], list(rows.values())), {})
            forms.setdefault(row['form'], []).append(float(plain['seconds']) / float(row['seconds']))
            shown.append(row)
        sources += [f'{reports.source(shown)}.'] if shown else []
    parts = []
    for name, lines in tables.items():
        forms = [form for form in dict.fromkeys((*INFERENCE, *TRAINING)) if any(form in of for of in lines.values())]
        parts.append(table([name, *forms], [
            [title, *(' to '.join(dict.fromkeys(two_digits(end(of[form])) for end in (min, max))) if form in of else '-'
                      for form in forms)]
            for title, of in lines.items()]))
    return '\n\n'.join([*parts, *sources]) or NOTHING


def two_digits(value: float) -> str:
    return f'{value:.{2 if value < 0.995 else 1 if value < 9.95 else 0}f}'


def forms_table(rows: List[Dict[str, str]]) -> str:
    models: Dict[str, Dict[str, Dict[str, str]]] = {}
    for row in rows:
        models.setdefault(row['model'], {})[row['form']] = row
    forms = [form for form in (TRAINING if rows[0]['mode'] == 'train' else INFERENCE)
             if form != 'plain' and any(form in by_form for by_form in models.values())]
    lines = []
    for model, by_form in models.items():
        plain = by_form['plain']
        if plain['error']:
            lines.append([f'`{model}`', 'failed', *['-'] * len(forms)])
            continue
        # from its median, and in its slowest and its fastest turn
        rates = [int(plain['batch_size']) / float(plain[name]) for name in ('seconds', 'slowest', 'fastest')]
        line = [f'`{model}`', '{} ({} to {})'.format(*map(reports.number, rates))]
        for form in forms:
            row = by_form.get(form)
            if row is None or row['error']:
                line.append('-' if row is None else 'failed')
                continue
            # the spread is that of the form's own turns, against the median of the plain model's
            ratios = [float(plain['seconds']) / float(row[name]) for name in ('seconds', 'slowest', 'fastest')]
            cell = '{:.2f} ({:.2f} to {:.2f})'.format(*ratios)
            if rows[0]['mode'] == 'train' and plain['peak_memory_mib'] and row['peak_memory_mib']:
                cell += f', {float(row["peak_memory_mib"]) / float(plain["peak_memory_mib"]):.2f} of its memory'
            line.append(cell)
        lines.append(line)
    return table(['model', 'plain (img/s)', *forms], lines)


def complexity_table() -> str:
    """ Every variant with its activation memory."""
    header = ['model', 'input', 'parameters', 'MACs (M)', 'paper FLOPS (M)', 'activations (MiB)']
    return table(header, [
        [
            f'`{row["model"]}`', f'{row["img_size"]} x {row["img_size"]}', f'{int(row["params"]):,}',
            million(row['macs']), million(row['paper_flops']), mebi(row['activation_bytes'])]
        for row in complexity('variants')])


def closed_form(row: Tuple[str, str]) -> Tuple[Fraction, Fraction]:
    """ Share of a full channel mixing that the paper says a row of its Table 3 saves: parameters, FLOPS."""
    kind, value = TABLE3[row][0].partition(',')[0], Fraction(TABLE3[row][0].partition('= ')[2])
    if kind == 'I':
        return 1 - value**2, 1 - value**2
    square, single = 1 - 1 / value**2, 1 - 1 / value
    return {'II': (square, square), 'III': (square, single), 'IV': (single, single)}[kind]


def sweep_table() -> str:
    """ The sweeps of Table 3, and what channel mixing saves, by the paper's formulas and as counted."""
    rows = complexity('sweep')
    full = rows[0]
    lines = []
    for row in rows:
        key = row['model'], row['arguments']
        line = [reports.label(key), f'{int(row["params"]):,}', million(row['macs']), million(row['paper_flops']),
                mebi(row['activation_bytes'])]
        if key == BASELINE:
            line += ['-'] * 4
        else:
            for expected, name in zip(closed_form(key), ('channel_weights', 'channel_macs')):
                line += [f'{float(expected):.2%}', f'{1 - int(row[name]) / int(full[name]):.2%}']
        lines.append(line)
    header = ['model', 'parameters', 'MACs (M)', 'paper FLOPS (M)', 'activations (MiB)', 'weights saved, formula',
              'counted', 'MACs saved, formula', 'counted']
    spatial = [int(full[name]) / int(rows[1][name]) for name in ('spatial_weights', 'spatial_macs')]
    return table(header, lines) + (
        f'\n\nSpatial mixing by two 1D kernels of k = 7 has, by formula, k / 2 = 3.5 times fewer weights and MACs; '
        f'counted:\n{spatial[0]:.1f} and {spatial[1]:.1f} times.')


def depth_table() -> str:
    """ Parameters, MACs and activation memory of each type over the number of blocks."""
    models: Dict[str, List[Dict[str, str]]] = {}
    for row in complexity('depth'):
        models.setdefault(row['model'], []).append(row)
    depths = [row['arguments'].partition('=')[2] for row in next(iter(models.values()))]
    return table(['model'] + [f'b = {depth}' for depth in depths], [
        [
            f'`{model}`',
            *(f'{int(row["params"]) / 1e6:.2f} / {million(row["macs"])} / {mebi(row["activation_bytes"])}'
              for row in rows)]
        for model, rows in models.items()])


def peers_table() -> str:
    """ Models of timm's beside ours, at each size of image."""
    variants = complexity('variants')
    parts = []
    for name, size, classes in (('peers 32', '32', '10'), ('peers 224', '224', '102'), ('peers in1k', '224', '1000')):
        own = [row for row in variants if (row['img_size'], row['num_classes']) == (size, classes)]
        lines = [
            [
                f'`{" ".join(filter(None, (row["model"], row["arguments"])))}`', f'{int(row["params"]) / 1e6:.2f}',
                million(row['macs']), mebi(row['activation_bytes'])]
            for row in sorted([*own, *complexity(name)], key=lambda row: int(row['macs']))]
        header = [f'{size} x {size}, {classes} classes', 'parameters (M)', 'MACs (M)', 'activations (MiB)']
        parts.append(table(header, lines))
    return '\n\n'.join(parts)


def seeds_cell(entry: Dict[str, Any]) -> str:
    """ Seed of a model, and over several runs the mean and the standard deviation of their top-1."""
    seeds = entry['metrics'].get('seeds')
    if not seeds:
        return str(entry['training']['seed'])
    return f'{", ".join(seeds)}: {mean(seeds.values()):.2f} +- {stdev(seeds.values()):.2f}'


@cache
def complexity_of(name: str) -> Complexity:
    """ Of a pretrained model, which more than one document lists."""
    model = timm.create_model(name, device='meta')
    return measure_complexity(model, model.pretrained_cfg['input_size'])


def weights_table() -> str:
    """ What each pretrained model measured, beside the paper's figure."""
    rows = []
    for name, entry in sorted(manifest.entries().items()):
        paper = top1(name)
        mark = ' *' if DATASETS[entry['dataset']].paper else ''  # open what the paper's figure was measured on
        counts = complexity_of(name)
        metrics, training = entry['metrics'], entry['training']
        rows.append([
            f'`{name}`', f'{metrics["top1"]:.2f}', f'{metrics["top5"]:.2f}', f'{paper:.2f}{mark}' if paper else '-',
            f'{counts.params:,}', f'{counts.paper_flops / 1e6:,.1f}', f'{metrics["images"]:,}', str(training['epochs']),
            seeds_cell(entry), f'[log](weights/{training["summary"]})'])
    header = [
        'weights', 'top-1 %', 'top-5 %', "paper's top-1 %", 'parameters', 'paper FLOPS (M)', 'test images', 'epochs',
        'seed(s)', 'log']
    return table(header, rows)


def accuracies() -> List[Dict[str, str]]:
    """ What the picture of accuracy on CIFAR shows: the zoo's models, the paper's, and those of its comparison."""
    rows = []
    for dataset, peers in PEERS.items():
        for kind, paper in TOP1[dataset].items():
            arch = f'{"convmixer" if kind == "conv" else f"splitmixer_{kind}"}_256_8'
            model = timm.create_model(f'{arch}.{dataset}', device='meta')
            rows.append(dict(
                dataset=dataset, model=_shown(kind), source='paper', top1=f'{paper:.2f}',
                params=str(sum(parameter.numel() for parameter in model.parameters()))))
        for name, entry in sorted(manifest.entries().items()):
            arch, _, tag = name.partition('.')
            if entry['dataset'] == dataset:
                rows.append(dict(
                    dataset=dataset, model=_shown(kind_of(arch)), source='ours', params=str(entry['params']),
                    top1=f'{entry["metrics"]["top1"]:.2f}', epochs=str(entry['training']['epochs']),
                    recipe='' if tag == dataset else tag))
        for model, (millions, paper) in peers.items():
            rows.append(dict(
                dataset=dataset, model=model, params=str(round(1e6 * millions)), source='peers', top1=f'{paper:.2f}'))
    return rows


def _shown(kind: str) -> str:
    return 'ConvMixer' if kind == 'conv' else kind.upper()


def draw_accuracies(rows: List[Dict[str, str]], path: Path) -> None:
    """ Picture of top-1 against parameters.

    Args:
        rows: What `accuracies` gives.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    peers = ('#999999', 'x')
    figure = Figure(figsize=(12, 5), layout='constrained')
    for axes, dataset in zip(figure.subplots(1, len(PEERS)), PEERS):
        for row in rows:
            if row['dataset'] != dataset:
                continue
            colour, shape = reports.STYLES.get(row['model'], peers)
            x, y = float(row['params']), float(row['top1'])
            axes.plot(
                x, y, shape, color=colour, markersize=8, linestyle='none', alpha=0.85,
                markerfacecolor=colour if row['source'] == 'ours' else 'none')
            told = dict(textcoords='offset points', fontsize=9, color='#666666')
            if row['source'] == 'peers':
                axes.annotate(row['model'], (x, y), xytext=(0, -7), va='top', ha='center', **told)
            elif row.get('recipe'):
                axes.annotate(f'{row["recipe"]}, {row["epochs"]} epochs', (x, y), xytext=(8, 0), va='center', **told)
        epochs = {row['epochs'] for row in rows if row['dataset'] == dataset and row.get('recipe') == ''}
        after = f', ours after {" and ".join(sorted(epochs, key=int))} epochs' if epochs else ''
        axes.set(xscale='log', xlabel='parameters', ylabel='top-1 %', title=DATASETS[dataset].name + after)
        axes.margins(x=0.1, y=0.08)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
        axes.xaxis.set_minor_formatter(NullFormatter())
    handles = [
        Line2D([], [], linestyle='none', marker=shape, color=colour, markersize=8, label=model)
        for model, (colour, shape) in reports.STYLES.items() if any(row['model'] == model for row in rows)]
    handles += [
        Line2D([], [], linestyle='none', marker='o', color='#555555', markersize=8, label='the weights here'),
        Line2D([], [], linestyle='none', marker='o', color='#555555', markersize=8, fillstyle='none',
               label="the paper's, after 100"),
        Line2D([], [], linestyle='none', marker=peers[1], color=peers[0], markersize=8,
               label="the paper's comparison (Lv et al. 2022)")]
    figure.legend(
        handles=handles, loc='outside lower center', ncols=len(handles), frameon=False, fontsize=10, columnspacing=1.4)
    reports.save(figure, rows, path)


def training_table() -> str:
    """ How each pretrained model was made."""
    rows = []
    for name, entry in sorted(manifest.entries().items()):
        training = entry['training']
        rows.append([
            f'`{name}`', training['recipe'], training['machine'],
            f'{training["hours"]:.1f} h' if 'hours' in training else 'not known',
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
    'speed': speed_tables,
    'forms': forms_tables,
    'gains': gains_tables,
    'ranges': ranges_tables,
    'throughput': throughput_tables,
    'roofline': roofline_tables,
    'complexity': complexity_table,
    'sweep': sweep_table,
    'depth': depth_table,
    'peers': peers_table,
    'data': data_table,
    'use': lambda: INTENDED_USE,
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
                replace_file(path, rendered.encode())
    pictures = [(accuracies(), RESULTS_DIR / 'accuracy.png', draw_accuracies)]
    pictures += [
        (rows, RESULTS_DIR / reports.picture_name(name, rows), reports.draw)
        for name, rows in throughput() if any(row['img_per_s'] for row in rows)]
    for rows, picture, draw in pictures:
        if not reports.is_drawn(rows, picture):
            stale.append(picture.name)
            if not args.check:
                if find_spec('matplotlib') is None:
                    print(f"{picture.name} is stale, and to draw it needs matplotlib: pip install -e '.[bench]'",
                          file=sys.stderr)
                    return 1
                draw(rows, picture)
    print(f'{"stale" if args.check else "rewritten"}: {", ".join(stale) or "none"}')
    return 1 if args.check and stale else 0


if __name__ == '__main__':
    sys.exit(main())
