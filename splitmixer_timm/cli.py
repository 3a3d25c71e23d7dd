""" Command line: `splitmixer-timm` or `python -m splitmixer_timm`. """
import argparse
import dataclasses
import io
import json
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import timm
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg, is_model

from . import __version__, manifest
from .convmixer import ARCHITECTURES
from .files import check_folder
from .image_folders import SOURCES, write_image_folders
from .runs import RECIPES_DIR

TOLERANCE = 0.05  # points of top-1 that two measurements of the same weights may differ by
DEFAULT_MODEL = 'splitmixer_i_256_8.cifar10'


BENCHMARK_DESCRIPTION = """\
Measure images a second, by default of every row of the paper's Table 3, beside the paper's figures.

  steady  eval and inference mode, warm-up until stable, the median of several repeats, the models in turn
  paper   the paper's protocol to the letter: fp32, batch 64, 224 x 224, one batch fed 100 times, a pair of CUDA events
          around each forward, no eval mode, no warm-up; each model in a process of its own

All models have 102 classes, as the paper's. Without CUDA a wall clock times the same code; that is not the paper's
protocol, and the results say so.

Every measurement is kept in DIR/<device>.csv as soon as it is made. A second run measures only what is missing, failed,
or was measured with another --batches; an unfinished row starts again if the code has changed since, or has changes
that are not committed. Exit status 1 if a model failed (the others are measured all the same)."""


class CommandError(Exception):
    """ Something the user can put right, told in one line."""


def _list(args: argparse.Namespace) -> int:
    if args.pretrained:
        for name in sorted(manifest.entries()):
            metrics = manifest.entries()[name]['metrics']
            print(f'{name}  top-1 {metrics["top1"]:.2f} %')
    else:
        print('\n'.join(ARCHITECTURES))
    return 0


def _default_cfg(name: str) -> PretrainedCfg:
    """ Default cfg of a model of this package, of its default tag if none is named."""
    arch, _, tag = name.partition('.')
    if arch not in ARCHITECTURES:
        raise CommandError(f'unknown model {name!r}; `splitmixer-timm list` names those there are')
    try:
        return get_pretrained_cfg(name)
    except RuntimeError as e:
        tags = ', '.join(name.partition('.')[2] for name in get_arch_pretrained_cfgs(arch))
        raise CommandError(f'unknown tag {tag!r} of {arch}; it has {tags}') from e


def _zoo_name(name: str) -> str:
    """ 'arch.tag' of a model of this package that has weights."""
    cfg = _default_cfg(name)
    name = f'{cfg.architecture}.{cfg.tag}'
    if name not in manifest.entries():
        raise CommandError(f'{name} has no weights; `splitmixer-timm list --pretrained` names those that have')
    return name


def _info(args: argparse.Namespace) -> int:
    from .complexity import measure_complexity

    cfg = _default_cfg(args.model)
    arch = cfg.architecture
    counts = measure_complexity(timm.create_model(args.model, device='meta'), cfg.input_size)
    info: Dict[str, Any] = {
        'model': f'{arch}.{cfg.tag}',
        'arguments': ARCHITECTURES[arch][0],
        **dataclasses.asdict(counts),
        'input_size': cfg.input_size,
        'mean': cfg.mean,
        'std': cfg.std,
        'num_classes': cfg.num_classes,
        'tags': {
            name.partition('.')[2]: manifest.entries().get(name, {}).get('metrics')
            for name in get_arch_pretrained_cfgs(arch)
        },
    }
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    print(f'{info["model"]}: {", ".join(f"{k}={v}" for k, v in info["arguments"].items())}')
    print(f'  parameters   {counts.params:,}')
    print(f'  MACs         {counts.macs / 1e6:,.3f} M')
    print(f'  paper FLOPS  {counts.paper_flops / 1e6:,.1f} M')
    print(f'  input        {" x ".join(map(str, cfg.input_size))}, mean {cfg.mean}, std {cfg.std}')
    print(f'  classes      {cfg.num_classes}')
    for tag, metrics in info['tags'].items():
        print(f'  tag          {tag}: ' + (
            f'top-1 {metrics["top1"]:.2f} %, top-5 {metrics["top5"]:.2f} % on {metrics["images"]:,} test images'
            if metrics else 'no weights'))
    return 0


def _escape_output() -> None:
    """ Show what standard output's encoding does not have (an alpha, a file name that is no text) as errors do."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')


def _drop_output() -> None:
    """ Have the interpreter's last flush not fail on what standard output did not take."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_device(name: str) -> None:
    from .machine import check_device

    try:
        check_device(name, any_kind=True)
    except ValueError as e:
        raise CommandError(f'--device: {e}') from e


def _predict(args: argparse.Namespace) -> int:
    from itertools import chain

    from tqdm import tqdm

    from .hub_errors import HubError, one_line
    from .predict import Classifier, classify, find_images, read_stdin

    model_name = args.model
    if '' in args.images:
        raise CommandError("IMAGE must be a file, a folder or -, got ''")
    if any('://' in image and not os.path.lexists(image) for image in args.images):
        raise CommandError('IMAGE must be a file, a folder or -, not a URL')
    if '-' in args.images and sys.stdin is None:
        raise CommandError('standard input is closed')
    _check_device(args.device)
    if ':' not in model_name and (not is_model(model_name) or model_name.partition('.')[0] in ARCHITECTURES):
        _zoo_name(model_name)
    try:
        sources = list(chain.from_iterable(
            read_stdin(sys.stdin.buffer) if image == '-' else find_images([image]) for image in args.images))
    except ValueError as e:
        raise CommandError(str(e)) from e
    if not sources:
        raise CommandError(f'no image found in {", ".join(args.images)}')
    try:
        classifier = Classifier(model_name, args.device)
    except HubError as e:
        raise CommandError(str(e)) from e
    except Exception as e:  # whatever a model from elsewhere has amiss (its config, its file, its place)
        raise CommandError(f'cannot load {model_name}: {one_line(e)}') from e

    failures = 0
    answers: List[Dict[str, Any]] = []
    results = classify(classifier, sources, args.topk, args.batch_size)
    try:
        # a bar on a terminal only, and only where there is something to wait for
        for name, result in tqdm(
                results, total=len(sources), unit='image', disable=None if len(sources) > 20 else True):
            if isinstance(result, str):
                failures += 1
                answers.append({'image': name, 'error': result})
                tqdm.write(f'splitmixer-timm: {name}: {result}', file=sys.stderr)
            elif args.json:
                answers.append({'image': name, 'predictions': [dataclasses.asdict(p) for p in result]})
            else:
                tqdm.write('\n'.join([name, *(f'  {p.probability:7.2%}  {p.label}' for p in result)]), file=sys.stdout)
    except RuntimeError as e:  # of torch: out of memory, a device that cannot
        raise CommandError(f'{model_name} failed on {args.device}: {" ".join(str(e).split())}') from e
    if args.json:
        print(json.dumps({'model': classifier.name, 'images': answers}, indent=2))
    return 1 if failures else 0


def _verify(args: argparse.Namespace) -> int:
    if args.data is not None:
        _check_device(args.device)
    failures = 0
    for name, entry in sorted(manifest.entries().items()):
        path = manifest.WEIGHTS_DIR / entry['file']
        try:
            manifest.check_file(path, name)
        except FileNotFoundError:
            if manifest.published(name):
                print(f'absent  {name}  not bundled, downloaded where it is asked for')
                continue
            failures += 1
            print(f'missing {name}  {path}')
        except (OSError, RuntimeError) as e:
            failures += 1
            print(f'FAILED  {name}  {e}')
        else:
            print(f'ok      {name}  {entry["bytes"]:,} bytes  sha256 {entry["sha256"][:16]}...')
    listed = {entry['file'] for entry in manifest.entries().values()}
    for path in sorted(manifest.WEIGHTS_DIR.glob('*.safetensors')):
        if path.name not in listed:
            failures += 1
            print(f'FAILED  {path.name}  not in the manifest')
    if args.data is not None and failures:
        print('accuracy is not measured where files failed')
    elif args.data is not None:
        failures = _verify_accuracy(args)
    return 1 if failures else 0


def _data(args: argparse.Namespace) -> int:
    failures = 0
    for name in dict.fromkeys(args.names):
        try:
            folder = write_image_folders(name, args.to)
        except FileExistsError as e:
            print(e, file=sys.stderr)  # what an earlier call finished
        except ModuleNotFoundError:
            failures += 1
            print(f'FAILED  {name}  needs SciPy, by which torchvision reads its labels: pip install scipy')
        except (OSError, RuntimeError) as e:
            failures += 1
            print(f'FAILED  {name}  {" ".join(str(e).split())}')
        else:
            print(folder, flush=True)
    return 1 if failures else 0


def _verify_accuracy(args: argparse.Namespace) -> int:
    """ Measure every model of the manifest whose data set is there; the number of those that fell short of it."""
    from .evaluate import evaluate

    found = {name: args.data / entry['dataset'] / 'validation' for name, entry in sorted(manifest.entries().items())}
    if not any(folder.is_dir() for folder in found.values()):
        wanted = ', '.join(sorted({str(folder) for folder in found.values()}))
        raise CommandError(
            f'no test set found: --data must name a folder with one of {wanted}, as `splitmixer-timm data` makes them')
    failures = measured_count = 0
    for name, folder in found.items():
        if not folder.is_dir():
            print(f'skipped {name}  no {folder}')
            continue
        expected = manifest.entries()[name]['metrics']
        try:
            measured = evaluate(name, folder, args.device, args.batch_size)
        except (RuntimeError, ValueError) as e:
            failures += 1
            print(f'FAILED  {name}  not measured: {e}')
            continue
        measured_count += 1
        agrees = measured.images == expected['images'] and abs(measured.top1 - expected['top1']) <= TOLERANCE
        failures += not agrees
        status = 'ok     ' if agrees else 'FAILED '
        print(f'{status} {name}  top-1 {measured.top1:.2f} % of {measured.images:,} images, '
              f'manifest {expected["top1"]:.2f} % of {expected["images"]:,}')
    print(f'{measured_count} of {len(found)} models measured' + (f', {failures} failed' if failures else ''))
    return failures


def _release(args: argparse.Namespace):
    """ What to publish: a model of the zoo by name, a run of train.py, or a local folder of timm's."""
    from .release import CONFIG, folder_release, run_release, zoo_release

    path = Path(args.model)
    try:
        labels = args.label_names.read_text(encoding='utf-8-sig').splitlines() if args.label_names else None
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, 'strerror', None) or e
        raise CommandError(f'--label-names: {args.label_names} cannot be read: {reason}') from e
    if args.model not in manifest.entries() and path.exists():
        if (path / CONFIG).is_file():
            return folder_release(path, args.dataset, labels)
        return run_release(path, args.dataset, labels)
    if args.dataset or args.label_names:
        raise CommandError('--dataset and --label-names are for a run or a folder; a model of the zoo has its own')
    if len(path.parts) > 1:
        raise CommandError(f'no such file or folder: {path}')
    return zoo_release(_zoo_name(args.model))


def _push(args: argparse.Namespace) -> int:
    from huggingface_hub.utils import validate_repo_id

    from . import hub
    from .release import zoo_release

    if args.all != (args.model is None) or args.all != (args.org is not None):
        raise CommandError('give MODEL and REPO_ID, or --all and --org')
    if not args.all and args.repo_id is None:
        raise CommandError(f'give the REPO_ID to push {args.model} to')
    for option in ('dataset', 'label_names', 'parent_commit'):
        if args.all and getattr(args, option) is not None:
            raise CommandError(f'--{option.replace("_", "-")} is for one model, not for --all')
    try:
        jobs = [(f'{args.org}/{name}', zoo_release(name)) for name in sorted(manifest.entries())] \
            if args.all else [(args.repo_id, _release(args))]
        if args.license is not None:
            jobs = [(repo_id, dataclasses.replace(release, license=args.license)) for repo_id, release in jobs]
        if args.record and (args.create_pr or any(release.name is None for _, release in jobs)):
            raise CommandError('--record is for models of the zoo, and for commits, not pull requests')
        if args.record:
            check_folder(manifest.WEIGHTS_DIR, 'where models are published')
        for repo_id, _ in jobs:
            validate_repo_id(repo_id)
            if '/' not in repo_id:
                raise CommandError(f'REPO_ID must be USER/NAME, got {repo_id}')
        for repo_id, release in jobs:
            if args.dry_run:
                print(f'{release.name or args.model} -> {repo_id}')
                for file, content in release.files(repo_id).items():
                    print(f'  {len(content):>12,}  {file}')
                continue
            info = hub.upload(
                release, repo_id, private=args.private, token=args.token, revision=args.revision,
                commit_message=args.message, create_pr=args.create_pr, parent_commit=args.parent_commit)
            print(info.pr_url or info.commit_url, flush=True)
            if args.record:
                sha256 = manifest.entries()[release.name]['sha256']
                manifest.record(release.name, sha256, hf_hub_id=info.repo_url.repo_id, revision=info.oid)
    except BrokenPipeError:  # of our output
        raise
    except (ValueError, RuntimeError, OSError) as e:
        raise CommandError(str(e)) from e
    return 0


def _pull(args: argparse.Namespace) -> int:
    from . import hub

    folder = args.to or Path(args.repo_id.partition('@')[0].rpartition('/')[2])
    try:
        names = hub.pull_to_folder(args.repo_id, folder, revision=args.revision, token=args.token)
    except (ValueError, RuntimeError, OSError) as e:
        raise CommandError(str(e)) from e
    print(f'{folder}: {", ".join(names)}')
    print(f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)")
    return 0


def _card(args: argparse.Namespace) -> int:
    try:
        release = _release(args)
        if args.license is not None:
            release = dataclasses.replace(release, license=args.license)
    except (ValueError, RuntimeError, OSError) as e:
        raise CommandError(str(e)) from e
    # a run has a place to load it from once it is published
    name = Path(os.path.abspath(args.model)).name
    print(release.card(release.name or name, release.name or f'hf-hub:USER/{name}'), end='')
    return 0


def _recipe(args: argparse.Namespace) -> int:
    recipes = {path.stem: path for path in sorted(RECIPES_DIR.glob('*.yaml'))}
    if args.name is None:
        if args.copy is not None:
            raise CommandError(f'--copy needs the NAME of a recipe: one of {", ".join(recipes)}')
        for name, path in recipes.items():
            title = path.read_text(encoding='utf-8').partition('\n')[0].lstrip('# ')
            print(f'{name:<32}{title}')
        return 0
    if args.name not in recipes:
        raise CommandError(f'unknown recipe {args.name!r}; there are {", ".join(recipes)}')
    if args.copy is None:
        print(recipes[args.name])
        return 0
    target = Path(args.copy)
    if target.is_dir():
        target = target / f'{args.name}.yaml'
    elif args.copy.endswith(('/', os.sep)):
        raise CommandError(f'cannot write into {args.copy}: no such folder')
    is_begun = False
    try:
        with open(target, 'x', encoding='utf-8') as f:
            is_begun = True
            f.write(recipes[args.name].read_text(encoding='utf-8'))
    except OSError as e:
        if is_begun:
            target.unlink()  # part of a recipe, which would be in the way of the next attempt
        raise CommandError(f'cannot write {target}: {e.strerror}') from e
    print(target)
    return 0


def _benchmark(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    from . import benchmark, benchmark_report
    from .machine import has_precision

    axes = {name: getattr(args, name) for name in (
        'precision', 'memory_format', 'compile', 'mode', 'batch_size', 'img_size')}
    requests = []
    try:
        device = benchmark.check_device(args.device or benchmark.default_device())
        for protocol in dict.fromkeys(args.protocol):
            on_cpu = device.type == 'cpu'
            requests.append(benchmark.Settings(
                protocol, str(device), **axes,
                batches=args.batches or (1 if on_cpu and protocol == 'steady' else 100),
                repeats=args.repeats,
            ))
            benchmark.check_settings(requests[-1])
        rows = benchmark.check_models(args.models)
        if args.plot and find_spec('matplotlib') is None:
            raise ValueError("--plot needs matplotlib: pip install 'splitmixer-timm[bench]', or leave --plot out")
        folder = args.results or benchmark.RESULTS_DIR
        check_folder(folder, 'results')
        name = benchmark.results_name(str(device))
        results = benchmark.Results(folder / f'{name}.csv')
    except ValueError as e:
        raise CommandError(str(e)) from e

    if device.type == 'cpu' and not has_precision(args.precision):
        print(f'This processor does not compute in {args.precision}: it takes many times as long as fp32.',
              file=sys.stderr)
    failures = 0
    try:
        # the paper's first: its processes are to have the GPU to themselves
        for settings in sorted(requests, key=lambda settings: settings.protocol):
            failures += benchmark.run(rows, settings, results, args.overwrite)
    except KeyboardInterrupt:
        print(f'interrupted; what was measured is in {results.path}, the same command goes on', file=sys.stderr)
        raise
    wanted = {settings.key(row)[1:] for settings in requests for row in rows}
    for group in benchmark_report.group(list(results.rows.values())):
        if not any(tuple(row[name] for name in benchmark.KEY[1:]) in wanted for row in group):
            continue
        print(f'{benchmark_report.describe_setting(group)}, {benchmark.NUM_CLASSES} classes, images / s\n')
        print(f'{benchmark_report.throughput_table(group)}\n')
        print(f'{benchmark_report.describe(group)}\n')
        if args.plot is not False and find_spec('matplotlib') and any(row['img_per_s'] for row in group):
            picture = folder / benchmark_report.picture_name(name, group)
            benchmark_report.draw(group, picture)
            print(picture)
    print(results.path)
    return 1 if failures else 0


def positive(text: str) -> int:
    """ An integer of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be an integer of at least 1, got {text!r}')
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='splitmixer-timm', description='SplitMixer models for timm.')
    version = f'splitmixer-timm {__version__}, timm {timm.__version__}'
    parser.add_argument('--version', action='version', version=version)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    command = commands.add_parser('list', help='name the models')
    command.add_argument('--pretrained', action='store_true', help='those with weights, with their tags and accuracy')
    command.set_defaults(run=_list)

    command = commands.add_parser('info', help='size, work, input and accuracy of a model')
    command.add_argument('model', metavar='MODEL', help='name with or without a tag')
    command.add_argument('--json', action='store_true', help='print JSON')
    command.set_defaults(run=_info)

    command = commands.add_parser('predict', help='classify images', description=(
        'Classify images. Exit status 1 if an image could not be read (the others are classified all the same).'))
    command.add_argument(
        'images', metavar='IMAGE', nargs='+',
        help='file, folder (searched for images), or - for standard input: one image, or paths, one a line')
    command.add_argument(
        '--model', default=DEFAULT_MODEL,
        help='a pretrained model, also hf-hub:USER/NAME or local-dir:DIR (default: %(default)s)')
    command.add_argument('--topk', type=positive, default=3, metavar='K', help='classes shown (default: %(default)s)')
    command.add_argument('--json', action='store_true', help='print JSON')
    command.add_argument('--device', default='cpu', help='device to run on (default: %(default)s)')
    command.add_argument('--batch-size', type=positive, default=64, metavar='N', help='default: %(default)s')
    command.set_defaults(run=_predict)

    command = commands.add_parser('recipe', help="training recipes for timm's train.py --config", description=(
        "Without a name, list the training recipes; with one, print the file's path for timm's train.py --config."))
    command.add_argument('name', metavar='NAME', nargs='?', help='a recipe')
    command.add_argument('--copy', metavar='DEST', help='copy it to a new file, or into a folder')
    command.set_defaults(run=_recipe)

    command = commands.add_parser(
        'data', help='write data sets as image folders, downloading what is missing', description=(
            'Write data sets of torchvision as image folders DIR/NAME/train/CLASS and DIR/NAME/validation/CLASS (the '
            'official test split), which train.py, validate.py, verify and train_zoo read. The original files are kept '
            'in DIR. Photographs to train on are shrunk to 230 x 230, as the recipes of Flowers102 and Food101 want.'))
    command.add_argument(
        'names', metavar='NAME', nargs='+', choices=SOURCES, help=f'one or more of {", ".join(SOURCES)}')
    command.add_argument('--to', metavar='DIR', type=Path, required=True, help='folder to write to')
    command.set_defaults(run=_data)

    command = commands.add_parser(
        'benchmark', help="throughput, and the paper's beside it", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=BENCHMARK_DESCRIPTION)
    command.add_argument(
        '--protocol', nargs='+', choices=('steady', 'paper'), default=['steady'], help='default: steady')
    command.add_argument(
        '--models', nargs='+', default=['table3'], metavar='MODEL',
        help="models of timm's or ours; table3 (default) stands for the 18 rows of the paper's Table 3")
    command.add_argument('--device', help='cuda, cuda:N, mps or cpu (default: the first of these that is there)')
    command.add_argument('--precision', choices=('fp32', 'tf32', 'fp16', 'bf16'), default='fp32', help='default: fp32')
    command.add_argument(
        '--memory-format', choices=('contiguous', 'channels_last'), default='contiguous', help='default: contiguous')
    command.add_argument('--compile', action='store_true', help='compile the models')
    command.add_argument(
        '--mode', choices=('infer', 'train'), default='infer',
        help='forward (default), or forward, backward and a step of SGD')
    command.add_argument('--batch-size', type=positive, default=64, metavar='N', help='default: %(default)s')
    command.add_argument('--img-size', type=positive, default=224, metavar='N', help='default: %(default)s')
    command.add_argument(
        '--batches', type=positive, metavar='N',
        help='batches timed, in each repeat (default: 100; steady on a CPU, where one takes seconds: 1)')
    command.add_argument(
        '--repeats', type=positive, default=5, metavar='N', help='repeats of steady (default: %(default)s)')
    command.add_argument(
        '--results', type=Path, metavar='DIR',
        help='where results are kept (default: benchmarks/results of the checkout, or of the folder this runs in)')
    command.add_argument('--overwrite', action='store_true', help='measure anew what the results have')
    command.add_argument(
        '--plot', action=argparse.BooleanOptionalAction, help='draw a picture (default: where matplotlib is installed)')
    command.set_defaults(run=_benchmark)

    source = 'arch.tag of the zoo, a run of train.py (its folder or a checkpoint in it), or a folder that pull made'
    command = commands.add_parser('push', help='publish a model on the Hugging Face Hub', description=(
        'Publish a model with its card in one commit; prints its URL.'))
    command.add_argument('model', metavar='MODEL', nargs='?', help=source)
    command.add_argument('repo_id', metavar='REPO_ID', nargs='?', help='USER/NAME, made if it does not exist')
    command.add_argument(
        '--all', action='store_true', help='publish the whole zoo, a repository for each arch.tag (needs --org)')
    command.add_argument('--org', help='organisation or user to publish the zoo under')
    command.add_argument('--dry-run', action='store_true', help='show the files and their sizes, publish nothing')
    command.add_argument('--dataset', help='what a run was trained on: cifar10, ..., an id of the Hub, or any name')
    command.add_argument(
        '--label-names', metavar='FILE', type=Path, help="class names, a line each (default: a run's class folders)")
    command.add_argument(
        '--license', help="as the Hub names it, such as mit (default: the repository's, or else the model's)")
    command.add_argument('--private', action='store_true', default=None, help='make a new repository a private one')
    command.add_argument('--token', help='token of the Hub (default: the one that is logged in)')
    command.add_argument('--revision', metavar='BRANCH', help='branch, made if it does not exist (default: main)')
    command.add_argument('--message', default='Add model', help='message of the commit (default: %(default)s)')
    command.add_argument('--create-pr', action='store_true', help='open a pull request')
    command.add_argument('--parent-commit', metavar='COMMIT', help='fail if another commit came after this one')
    command.add_argument(
        '--record', action='store_true', help="write the repository and the commit into the zoo's manifest")
    command.set_defaults(run=_push)

    command = commands.add_parser('pull', help='get a model from the Hugging Face Hub', description=(
        "Leave a model in a folder that timm.create_model('local-dir:DIR', pretrained=True) reads without a network."))
    command.add_argument('repo_id', metavar='REPO_ID', help='USER/NAME or USER/NAME@REVISION')
    command.add_argument('--revision', help='branch, tag or commit (default: main)')
    command.add_argument(
        '--to', metavar='DIR', type=Path, help="a new folder, or an empty one (default: the repository's name)")
    command.add_argument('--token', help='token of the Hub (default: the one that is logged in)')
    command.set_defaults(run=_pull)

    command = commands.add_parser('card', help='print the model card of a model', description=(
        "Print the card that push would publish, but for the title and the model's name in the example."))
    command.add_argument('model', metavar='MODEL', help=source)
    command.add_argument('--dataset', help='what a run was trained on')
    command.add_argument('--label-names', metavar='FILE', type=Path, help='class names of a run, a line each')
    command.add_argument('--license', help='as the Hub names it')
    command.set_defaults(run=_card)

    command = commands.add_parser('verify', help='check the bundled weights against the manifest', description=(
        'Check size and sha256 of every bundled weights file, and with --data also their accuracy on the official test '
        'sets. Exit status 1 if one is missing or differs.'))
    command.add_argument(
        '--data', metavar='DIR', type=Path,
        help='folder with the official test sets as image folders, DIR/cifar10/validation/CLASS and so on')
    command.add_argument('--device', default='cpu', help='device to measure on (default: %(default)s)')
    command.add_argument('--batch-size', type=positive, default=200, metavar='N', help='default: %(default)s')
    command.set_defaults(run=_verify)
    return parser


def _end(signum: int, frame: Any) -> None:
    # a second one would cut off the tidying; SIG_IGN would pass on to what is started from now on
    signal.signal(signum, lambda *args: None)
    sys.exit(128 + signum)


@contextmanager
def ended_tidily() -> Iterator[None]:
    """ Told to end meanwhile, as by a terminal that is closed, this process removes what is half done, as on Ctrl-C."""
    signals = [getattr(signal, name) for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)]
    # nohup has the one ignored, and whoever calls this from Python may have handlers of their own
    is_main = threading.current_thread() is threading.main_thread()  # others can set none
    ours = [signum for signum in signals if is_main and signal.getsignal(signum) is signal.SIG_DFL]
    for signum in ours:
        signal.signal(signum, _end)
    try:
        yield
    finally:
        for signum in ours:
            signal.signal(signum, signal.SIG_DFL)


def main(argv: Optional[List[str]] = None) -> int:
    """ Run the command line.

    Returns:
        Exit status: 0 for success, 1 where a part of the work failed, 2 for a request that cannot be met.
    """
    args = _parser().parse_args(argv)
    _escape_output()
    try:
        with ended_tidily():
            status = args.run(args)
        if sys.stdout is not None:  # None where it was closed
            sys.stdout.flush()
        return status
    except CommandError as e:
        print(f'splitmixer-timm: error: {e}', file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away
        _drop_output()
        return 1
    except OSError as e:  # output, or results, on a full disk
        print(f'splitmixer-timm: error: {e}', file=sys.stderr)
        _drop_output()
        return 1
    except KeyboardInterrupt:
        return 130
