#!/usr/bin/env python3
""" Add the model of a finished run of timm's train.py to the zoo.

Converts the run's last checkpoint (its EMA where it kept one) to safetensors, measures it on the whole official test
set by timm's own validate.py, and writes the manifest entry; the run's arguments and log are kept beside the weights.

    python weights/add_run.py RUN_DIR splitmixer_i_256_8.cifar10 --dataset cifar10 \\
        --data-dir DATA --scripts TIMM_CHECKOUT --recipe 'four epochs, flips only'

The manifest is replaced last and at once: a run that fails on the way leaves the zoo as it was.
"""
import argparse
import csv
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict

import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.models import load_state_dict
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from splitmixer_timm import manifest

WEIGHTS_DIR = Path(__file__).resolve().parent
# what in a run's arguments is a place on the machine it ran on
PATH_ARGS = {
    'config': '<CONFIG>', 'data': '<DATA_DIR>', 'data_dir': '<DATA_DIR>', 'output': '<OUTPUT_DIR>',
    'resume': '<RESUME>', 'initial_checkpoint': '<CHECKPOINT>', 'pretrained_path': '<CHECKPOINT>',
    'class_map': '<CLASS_MAP>',
}


def machine() -> str:
    """ The processor and, where there is one, the GPU; never the host's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return f'CPU, {os.cpu_count()} cores, {names[0] if names else platform.machine()}'


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + '.tmp')
    temporary.write_text(text, encoding='utf-8')
    temporary.replace(path)


def planned_epochs(run_args: Dict[str, Any]) -> int:
    """ Epochs of a run to its end, warm-up, cycles and cool-down included, as train.py has them from its scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=run_args['lr'] or 1.)
    kwargs = scheduler_kwargs(argparse.Namespace(**run_args))
    return create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=1000)[1]


def convert(checkpoint: Path, target: Path, metadata: Dict[str, str]) -> Dict[str, torch.Tensor]:
    """ Weights of a training checkpoint as a safetensors file."""
    state_dict = {k: v.contiguous() for k, v in load_state_dict(str(checkpoint)).items()}
    save_file(state_dict, str(target), metadata={'format': 'pt', **metadata})
    return state_dict


def validate(name: str, weights: Path, args: argparse.Namespace) -> Dict[str, Any]:
    """ Result of timm's validate.py on the official test set."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / 'results.json'
        subprocess.run([
            sys.executable, '-m', 'splitmixer_timm.run', str(args.scripts / 'validate.py'),
            '--model', name, '--checkpoint', str(weights), '--data-dir', str(args.data_dir), '--split', args.split,
            '--device', args.device, '--batch-size', str(args.batch_size), '--workers', '1', '--no-prefetcher',
            '--results-file', str(results), '--results-format', 'json',
        ], check=True)
        return json.loads(results.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run_dir', type=Path, help='output folder of train.py: last.pth.tar, args.yaml, summary.csv')
    parser.add_argument('name', help="'arch.tag' to add")
    parser.add_argument('--dataset', required=True, help='data set of the tag, as in splitmixer_timm/labels')
    parser.add_argument('--data-dir', type=Path, required=True, help='image folders of the data set')
    parser.add_argument('--split', default='validation', help='folder of the official test set (default: %(default)s)')
    parser.add_argument('--scripts', type=Path, required=True, help="folder with timm's validate.py")
    parser.add_argument('--recipe', required=True, help='one line that says how it was trained')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--batch-size', type=int, default=200)
    args = parser.parse_args()

    run_args = yaml.safe_load((args.run_dir / 'args.yaml').read_text())
    summary = (args.run_dir / 'summary.csv').read_text()
    epochs = len(list(csv.DictReader(summary.splitlines())))
    checkpoint = args.run_dir / 'last.pth.tar'
    planned = planned_epochs(run_args)
    if epochs != planned:
        parser.error(f'{args.run_dir} has {epochs} of {planned} epochs: train it to the end first')
    if args.name.partition('.')[0] != run_args['model'].partition('.')[0]:
        parser.error(f'{args.run_dir} trained {run_args["model"]}, not {args.name}')

    weights = WEIGHTS_DIR / f'{args.name}.safetensors'
    temporary = weights.with_suffix('.tmp.safetensors')
    try:
        state_dict = convert(checkpoint, temporary, {'model': args.name})
        result = validate(args.name, temporary, args)
        temporary.replace(weights)
    finally:
        temporary.unlink(missing_ok=True)

    run_dir = WEIGHTS_DIR / 'runs' / args.name
    run_dir.mkdir(parents=True, exist_ok=True)
    public_args = {k: PATH_ARGS[k] if k in PATH_ARGS and v else v for k, v in run_args.items()}
    write_atomically(run_dir / 'args.yaml', yaml.safe_dump(public_args))
    write_atomically(run_dir / 'summary.csv', summary)

    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    content = weights.read_bytes()
    entry = {
        'file': weights.name,
        'bytes': len(content),
        'sha256': hashlib.sha256(content).hexdigest(),
        'params': sum(v.numel() for k, v in state_dict.items() if not k.endswith(buffers)),
        'dataset': args.dataset,
        'metrics': {
            'top1': result['top1'],
            'top5': result['top5'],
            'images': sum(1 for f in (args.data_dir / args.split).rglob('*') if f.is_file()),
            'measured_by': f"timm's validate.py on the official test set, fp32, {args.device}",
        },
        'training': {
            'recipe': args.recipe,
            'args': f'runs/{args.name}/args.yaml',
            'summary': f'runs/{args.name}/summary.csv',
            'checkpoint': 'last',
            'epochs': epochs,
            'seed': run_args['seed'],
            'hours': round((checkpoint.stat().st_mtime - (args.run_dir / 'args.yaml').stat().st_mtime) / 3600, 2),
            'machine': machine(),
            'torch': torch.__version__,
            'timm': timm.__version__,
            'date': datetime.date.fromtimestamp(checkpoint.stat().st_mtime).isoformat(),
        },
        'license': 'apache-2.0',
    }
    content = dict(manifest.load_manifest())
    content['models'] = dict(sorted({**content['models'], args.name: entry}.items()))
    write_atomically(WEIGHTS_DIR / 'manifest.json', json.dumps(content, indent=2) + '\n')
    print(f'{args.name}: top-1 {entry["metrics"]["top1"]:.2f} %, {entry["bytes"]:,} bytes')


if __name__ == '__main__':
    main()
