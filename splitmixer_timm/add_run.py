""" Add the model of a finished run of timm's train.py to the zoo.

Converts the run's last checkpoint (its EMA where it kept one) to safetensors, measures it on the whole official test
set by timm's own validate.py, and writes the manifest entry; the run's arguments and log are kept beside the weights.
Nothing of the zoo is touched before all of that succeeded.

    python -m splitmixer_timm.add_run RUN_DIR splitmixer_i_256_8.cifar10 --dataset cifar10 \\
        --data-dir DATA --scripts TIMM_CHECKOUT --recipe 'four epochs, flips only'

Run it on the machine, and in the environment, that trained: those are what the entry names.
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
from typing import Any, Dict, List, Optional

import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.models import load_state_dict
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from . import manifest

# what in a run's arguments is a place on the machine it ran on
PATH_ARGS = {
    'config': '<CONFIG>', 'data': '<DATA_DIR>', 'data_dir': '<DATA_DIR>', 'output': '<OUTPUT_DIR>',
    'resume': '<RESUME>', 'initial_checkpoint': '<CHECKPOINT>', 'pretrained_path': '<CHECKPOINT>',
    'class_map': '<CLASS_MAP>',
}
BUFFERS = ('running_mean', 'running_var', 'num_batches_tracked')


def machine(device: str) -> str:
    """ The GPU or the processor that a run's device stands for; never the host's name."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return f'CPU, {os.cpu_count()} cores, {names[0] if names else platform.machine()}'


def planned_epochs(run_args: Dict[str, Any]) -> int:
    """ Epochs of a run to its end, warm-up, cycles and cool-down included, as train.py has them from its scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=run_args['lr'] or 1.)
    kwargs = scheduler_kwargs(argparse.Namespace(**run_args))
    return create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=1000)[1]


def validate(model: str, weights: Path, args: argparse.Namespace) -> Dict[str, Any]:
    """ Result of timm's validate.py on the official test set."""
    results = weights.with_suffix('.json')
    subprocess.run([
        sys.executable, '-m', 'splitmixer_timm.run', str(args.scripts / 'validate.py'),
        '--model', model, '--checkpoint', str(weights), '--data-dir', str(args.data_dir), '--split', args.split,
        '--device', args.device, '--batch-size', str(args.batch_size), '--workers', '1', '--no-prefetcher',
        '--results-file', str(results), '--results-format', 'json',
    ], check=True)
    return json.loads(results.read_text())


def replace_file(path: Path, content: bytes) -> None:
    """ Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_bytes(content)
    temporary.replace(path)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='splitmixer_timm.add_run', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run_dir', type=Path, help='output folder of train.py: last.pth.tar, args.yaml, summary.csv')
    parser.add_argument('name', help="'arch.tag' to add")
    parser.add_argument('--dataset', required=True, help='data set of the tag, as in splitmixer_timm/labels')
    parser.add_argument('--data-dir', type=Path, required=True, help='image folders of the data set')
    parser.add_argument('--split', default='validation', help='folder of the official test set (default: %(default)s)')
    parser.add_argument('--scripts', type=Path, required=True, help="folder with timm's validate.py")
    parser.add_argument('--recipe', required=True, help='one line that says how it was trained')
    parser.add_argument('--device', default='cpu', help='device to measure on (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=200, help='to measure with (default: %(default)s)')
    args = parser.parse_args(argv)

    arch = args.name.partition('.')[0]
    run_args = yaml.safe_load((args.run_dir / 'args.yaml').read_text())
    summary = (args.run_dir / 'summary.csv').read_bytes()
    checkpoint = args.run_dir / 'last.pth.tar'
    epochs, planned = len(list(csv.DictReader(summary.decode().splitlines()))), planned_epochs(run_args)
    if epochs != planned:
        parser.error(f'{args.run_dir} has {epochs} of {planned} epochs: train it to the end first')
    if arch != run_args['model'].partition('.')[0]:
        parser.error(f'{args.run_dir} trained {run_args["model"]}, not {args.name}')

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / f'{args.name}.safetensors'
        state_dict = {k: v.contiguous() for k, v in load_state_dict(str(checkpoint)).items()}
        save_file(state_dict, weights, metadata={'format': 'pt', 'model': args.name})
        # by the data set's own tag: a new one is registered only once the manifest has it
        result = validate(f'{arch}.{args.dataset}', weights, args)
        content = weights.read_bytes()

    finished = checkpoint.stat().st_mtime
    entry = {
        'file': weights.name,
        'bytes': len(content),
        'sha256': hashlib.sha256(content).hexdigest(),
        'params': sum(v.numel() for k, v in state_dict.items() if not k.endswith(BUFFERS)),
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
            'hours': round((finished - (args.run_dir / 'args.yaml').stat().st_mtime) / 3600, 2),
            'machine': machine(run_args['device']),
            'torch': torch.__version__,
            'timm': timm.__version__,
            'date': datetime.date.fromtimestamp(finished).isoformat(),
        },
        'license': 'apache-2.0',
    }
    public_args = {k: PATH_ARGS[k] if k in PATH_ARGS and v else v for k, v in run_args.items()}
    models = dict(sorted({**manifest.entries(), args.name: entry}.items()))
    zoo = {**manifest.load_manifest(), 'models': models}

    folder = manifest.WEIGHTS_DIR
    replace_file(folder / entry['training']['args'], yaml.safe_dump(public_args).encode())
    replace_file(folder / entry['training']['summary'], summary)
    replace_file(folder / entry['file'], content)
    replace_file(folder / 'manifest.json', (json.dumps(zoo, indent=2) + '\n').encode())
    print(f'{args.name}: top-1 {entry["metrics"]["top1"]:.2f} %, {entry["bytes"]:,} bytes')


if __name__ == '__main__':
    main()
