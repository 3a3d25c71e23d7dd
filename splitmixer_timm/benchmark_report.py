""" Tables and pictures of benchmark results, from the results alone. """
import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Optional, Sequence, Tuple

from PIL import Image

from .benchmark import SETTING, VERSIONS, Row, Settings
from .files import replace_file
from .manifest import entries
from .paper import BASELINE, TABLE3, TOP1, kind_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    'describe', 'describe_setting', 'draw', 'group', 'is_drawn', 'label', 'markdown_table', 'measured', 'number',
    'picture_name', 'ratio', 'save', 'throughput_table']

Rows = Sequence[Dict[str, str]]

# Okabe and Ito's colours, told apart by the colour-blind, and a shape each
STYLES = {
    'ConvMixer': ('#000000', 's'), 'I': ('#D55E00', 'o'), 'II': ('#0072B2', '^'), 'III': ('#009E73', 'D'),
    'IV': ('#CC79A7', 'v'), 'V': ('#56B4E9', 'P'), 'others': ('#E69F00', 'X'),
}


def markdown_table(header: List[str], rows: List[List[str]]) -> str:
    """ Markdown table, the first column to the left and the others to the right."""
    lines = [header, [':--'] + ['--:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def group(rows: Rows) -> List[List[Dict[str, str]]]:
    """ Rows by setting, that of the paper first; in each, Table 3 in its order and then the others."""
    order = {row: i for i, row in enumerate(TABLE3)}
    groups: Dict[Tuple[str, ...], List[Dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: order.get(_row(row), len(order))):
        groups.setdefault(tuple(row[name] for name in SETTING), []).append(row)
    return [groups[key] for key in sorted(groups, key=lambda key: (not is_papers(groups[key]), key))]


def is_papers(rows: Rows) -> bool:
    """ Whether rows of one setting have the paper's precision, batch and images, whatever the protocol."""
    return Settings().columns().items() <= rows[0].items()


def _row(row: Dict[str, str]) -> Row:
    return row['model'], row['arguments']


def label(row: Row) -> str:
    """ What the paper calls a row of its Table 3, else the model and its arguments."""
    return TABLE3[row][0] if row in TABLE3 else ' '.join(filter(None, row))


def measured(rows: Rows, protocol: str) -> Dict[Row, Dict[str, str]]:
    """ Rows of one protocol that have a result, by model and arguments."""
    return {_row(row): row for row in rows if row['protocol'] == protocol and row['img_per_s']}


def ratio(results: Dict[Row, Dict[str, str]], row: Row) -> Optional[float]:
    """ Throughput relative to ConvMixer's, None where that was not measured on the same day by the same code."""
    own, baseline = results[row], results.get(BASELINE)
    if baseline is None or any(own[name] != baseline[name] for name in ('date', 'commit', *VERSIONS)):
        return None
    return float(own['img_per_s']) / float(baseline['img_per_s'])


def v100(rows: Rows) -> Dict[Row, float]:
    """ The paper's images a second, for rows of one setting that infer as the paper's did."""
    return {row: rate for row, (_, rate) in TABLE3.items()} if rows[0]['mode'] == 'infer' else {}


def papers_setting(rows: Rows) -> str:
    """ What the paper's images a second are of, where they stand beside rows of another work; else empty."""
    papers = Settings().columns()
    is_other = any(rows[0][name] != papers[name] for name in ('precision', 'batch_size', 'img_size'))
    return describe_setting([papers]) if is_other and v100(rows) else ''


def number(value: Any) -> str:
    value = float(value)
    return f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'


def _optional(value: Optional[float], spec: str) -> str:
    return '-' if value is None else format(value, spec)


def throughput_table(rows: Rows) -> str:
    """ Markdown table of one setting: the paper's images a second, by its protocol and steady, with ratios."""
    paper, steady = measured(rows, 'paper'), measured(rows, 'steady')
    paper_rates = v100(rows)
    has_memory = any(row['peak_memory_mib'] for row in rows)
    header = ['model', 'parameters']
    header += ["paper's V100", 'ratio'] if paper_rates else []
    header += ['paper protocol', 'ratio'] if paper else []
    header += ['steady', 'spread', 'ratio'] if steady else []
    header += ['peak memory'] if has_memory else []
    lines = []
    for key in dict.fromkeys(map(_row, rows)):
        own = [results[key] for results in (steady, paper) if key in results]
        line = [label(key), f'{int(own[0]["params"]):,}' if own else '-']
        if paper_rates:
            line += [number(paper_rates[key]), f'{paper_rates[key] / paper_rates[BASELINE]:.2f}'] \
                if key in paper_rates else ['-', '-']
        if paper:
            line += [number(paper[key]['img_per_s']), _optional(ratio(paper, key), '.2f')] if key in paper else \
                ['-', '-']
        if steady:
            line += [
                number(steady[key]['img_per_s']), spread(steady[key]), _optional(ratio(steady, key), '.2f'),
            ] if key in steady else ['-', '-', '-']
        if has_memory:
            line.append(f'{float(own[0]["peak_memory_mib"]):,.0f} MiB' if own else '-')
        lines.append(line)
    return markdown_table(header, lines)


def spread(row: Dict[str, str]) -> str:
    """ Width of the range of a row's repeats, relative to their median; one alone has none."""
    rates = [float(rate) for rate in row['rates'].split()]
    return f'{(max(rates) - min(rates)) / float(row["img_per_s"]):.1%}' if len(rates) > 1 else '-'


def describe_setting(rows: Rows) -> str:
    """ Mode, precision, format and images of the rows of one setting."""
    row = rows[0]
    return ', '.join([
        {'train': 'training', 'infer': 'inference'}[row['mode']],
        row['precision'],
        *(['channels last'] if row['memory_format'] == 'channels_last' else []),
        *(['compiled'] if row['compile'] == 'yes' else []),
        f'batch {row["batch_size"]}',
        f'{row["img_size"]} x {row["img_size"]}',
    ])


def _values(rows: Rows, name: str, title: str) -> List[str]:
    """ At most one phrase: the known values that rows have in a column, with its title put where the {} is."""
    values = sorted({row[name] for row in rows if row.get(name) not in (None, '', 'unknown')})
    return [title.format(' / '.join(values))] if values else []


def _extent(values: Iterable[Any]) -> str:
    low, high = min(values := [*values]), max(values)
    return f'{low}' if low == high else f'{low} to {high}'


def source(rows: Rows) -> str:
    """ Machine, versions and dates behind the rows of one device, and whether it had nothing else to do."""
    measured = ', '.join([
        *_values(rows, 'device', '{}'), *_values(rows, 'threads', '{} threads'), *_values(rows, 'driver', 'driver {}'),
        *_values(rows, 'sm_mhz_max', 'at most {} MHz'), *_values(rows, 'cuda', 'CUDA {}'),
        *_values(rows, 'cudnn', 'cuDNN {}'), *_values(rows, 'torch', 'torch {}'), *_values(rows, 'timm', 'timm {}'),
        *_values(rows, 'splitmixer_timm', 'splitmixer-timm {}'), *_values(rows, 'commit', 'commit {}'),
        'measured ' + _extent(row['date'] for row in rows),
    ])
    return '. '.join(filter(None, [measured, _other_processes(rows)]))


def _other_processes(rows: Rows) -> str:
    """ Whether a GPU had no other process while the rows were measured; nothing where there was no GPU."""
    others = [row['other_processes'] for row in rows if row['other_processes']]
    if not others:
        return ''
    alone = others.count('0')
    if alone == len(others):
        answer = 'yes'
    elif alone:
        answer = f'for {alone} of {len(others)} rows'
    else:
        answer = 'unknown' if set(others) == {'unknown'} else 'no'
    return f'Only process on the GPU: {answer}'


def describe(rows: Rows) -> str:
    """ Paragraph on how the rows of one setting were measured, and what is amiss with them."""
    sentences = [source(rows)]
    if papers := papers_setting(rows):
        sentences.append(f"The paper's V100 is another setting: {papers}")
    paper, steady = measured(rows, 'paper').values(), measured(rows, 'steady').values()
    if paper:
        differs = []
        if any(row['batches'] != '100' for row in paper):
            differs.append(f'fed {_extent(int(row["batches"]) for row in paper)} times, not 100')
        if any(row['timer'] != 'CUDA events' for row in paper):
            differs.append('a wall clock, not CUDA events')
        sentences.append(
            'Paper protocol: one batch fed 100 times, a pair of CUDA events around each forward, no eval mode, no '
            'warm-up' + (f' (**not the paper\'s protocol** here: {" and ".join(differs)})' if differs else ''))
        if missing := [label(row) for row in measured(rows, 'steady') if row not in measured(rows, 'paper')]:
            sentences.append(f'Not measured by it: {"; ".join(missing)}')
    if steady:
        repeats = _extent(len(row['rates'].split()) for row in steady)
        batches = _extent(int(row['batches']) for row in steady)
        batches = 'one batch' if batches == '1' else f'{batches} batches'
        repeats = 'one repeat' if repeats == '1' else f'median of {repeats} repeats'
        sentences.append(
            f'Steady: after warm-up, {repeats} of {batches}, the models in turn, timed by '
            f'{next(iter(steady))["timer"]}; spread is (max - min) / median')
        unstable = [label(_row(row)) for row in steady if row['stable'] == 'no']
        if unstable:
            sentences.append(f'Not yet stable when warm-up ended: {"; ".join(unstable)}')
    if any(row['memory'] == 'kept' for row in (*paper, *steady)):
        sentences.append('The allocator keeps what is freed')
    sentences += [f'{label(_row(row))} failed ({row["protocol"]}): {row["error"]}' for row in rows if row['error']]
    return '. '.join(sentences) + '.'


def picture_name(name: str, rows: Rows) -> str:
    """ File name of the picture of one setting, of the results file without its suffix."""
    if is_papers(rows):
        return f'{name}.png'
    row = rows[0]
    parts = [
        row['precision'], row['memory_format'], 'compiled' if row['compile'] == 'yes' else 'eager', row['mode'],
        row['batch_size'], row['img_size']]
    return f'{name}.{"-".join(parts)}.png'


def _accuracies() -> Dict[Row, float]:
    """ Top-1 in percent on Flowers102 of the zoo's weights for rows of Table 3."""
    names = {row: f'{row[0]}.flowers102' for row in TABLE3 if not row[1]}
    return {row: entries()[name]['metrics']['top1'] for row, name in names.items() if name in entries()}


def _digest(rows: Rows) -> str:
    shown = [sorted(row.items()) for row in rows], list(_accuracies().values()), list(TABLE3.items()), TOP1
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def is_drawn(rows: Rows, path: Path) -> bool:
    """ Whether a picture is there and shows these rows."""
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get('Source') == _digest(rows)


def _style(row: Row) -> Tuple[str, str, str]:
    """ Kind of a row, its colour and its shape."""
    kind = TABLE3[row][0].partition(',')[0] if row in TABLE3 else 'others'
    return (kind, *STYLES[kind])


def draw(rows: Rows, path: Path) -> None:
    """ Picture of one setting beside the paper's: throughput against parameters, ratio to ConvMixer, and throughput
    against accuracy, ours where the zoo has it.

    Args:
        rows: Rows of one setting.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    results = {protocol: measured(rows, protocol) for protocol in ('steady', 'paper')}
    ours = results['steady'] or results['paper']
    protocol = 'steady' if results['steady'] else 'paper protocol'
    device = rows[0]['device']
    params = {row: int(values['params']) for row, values in ours.items()}
    paper_rates = v100(rows)

    figure = Figure(figsize=(15, 6), layout='constrained')
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.1, 0.9))
    beside = f"; the paper's V100: {papers_setting(rows) or 'fp32'}" if paper_rates else ''
    figure.suptitle(f'{device}: {describe_setting(rows)}{beside}')

    def points(axes, values: Dict[Row, Tuple[float, float]], filled: bool) -> None:
        for row, (x, y) in values.items():
            _, colour, shape = _style(row)
            axes.plot(
                x, y, shape, markersize=8, color=colour, markerfacecolor=colour if filled else 'none', alpha=0.85,
                linestyle='none')

    points(left, {row: (params[row], paper_rates[row]) for row in ours if row in paper_rates}, filled=False)
    points(left, {row: (params[row], float(values['img_per_s'])) for row, values in ours.items()}, filled=True)
    for row in ours:
        if row not in TABLE3:
            left.annotate(label(row), (params[row], float(ours[row]['img_per_s'])), xytext=(6, 4),
                          textcoords='offset points', fontsize=8)
    left.set(xscale='log', yscale='log', xlabel='parameters', ylabel='images / s', title='Throughput and size')

    shown = [row for row in dict.fromkeys(map(_row, rows)) if row in TABLE3 or row in ours][::-1]
    for y, row in enumerate(shown):
        _, colour, shape = _style(row)
        if row in paper_rates:
            value = paper_rates[row] / paper_rates[BASELINE]
            middle.plot(value, y, shape, color=colour, markerfacecolor='none', markersize=8)
        for name, size in (('steady', 8), ('paper', 4)):
            if row in results[name] and (value := ratio(results[name], row)) is not None:
                middle.plot(value, y, shape, color=colour, markersize=size, alpha=0.85)
    middle.axvline(1, color='#777777', linewidth=1)
    middle.set_yticks(range(len(shown)), [label(row) for row in shown], fontsize=9)
    middle.set(xlabel='throughput / that of ConvMixer', title='Ratio to ConvMixer of the same run')
    middle.set_xlim(left=0)

    plain = [row for row in TABLE3 if not row[1]]
    papers = {row: TOP1['flowers102'][kind_of(row[0])] for row in plain}
    points(right, {row: (papers[row], paper_rates[row]) for row in plain if row in paper_rates}, filled=False)
    accuracies = _accuracies()
    points(right, {
        row: (accuracies[row], float(ours[row]['img_per_s'])) for row in plain if row in ours and row in accuracies},
        filled=True)
    right.set(yscale='log', xlabel='Flowers102 top-1 % (ours: trained on train and val)', ylabel='images / s',
              title='Throughput and accuracy')
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(EngFormatter(sep=''))
        axis.set_minor_formatter(NullFormatter())

    handles = [
        Line2D([], [], linestyle='none', marker=shape, color=colour, markersize=8, label=kind)
        for kind, (colour, shape) in STYLES.items() if any(_style(row)[0] == kind for row in ours)]
    sources = [(8, 'full', f'measured here, {protocol}')]
    if results['steady'] and results['paper']:
        sources.append((4, 'full', 'measured here, paper protocol (middle)'))
    if paper_rates:
        sources.append((8, 'none', "the paper's V100"))
    handles += [
        Line2D([], [], linestyle='none', marker='o', color='#555555', markersize=size, fillstyle=fill, label=text)
        for size, fill, text in sources]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles), frameon=False, fontsize=9)
    save(figure, rows, path)


def save(figure: 'Figure', rows: Rows, path: Path) -> None:
    """ Write a picture in the style of all of them, with a mark of the rows that it shows, for `is_drawn`."""
    for axes in figure.axes:
        axes.grid(True, which='major', color='#DDDDDD', linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format='png', dpi=110, metadata={'Source': _digest(rows)})
    replace_file(path, png.getvalue())
