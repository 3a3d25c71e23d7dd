""" What is published of a model: its files and what is known of it.

A release is made from a model at hand, one of the zoo, a run of timm's train.py, or a local folder.
"""
import copy
import inspect
import json
import logging
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Optional, Sequence, Tuple

import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save
from timm.data import create_dataset, resolve_data_config
from timm.data.dataset_factory import _TRAIN_SYNONYM
from timm.layers import SelectAdaptivePool2d
from timm.layers.create_act import _ACT_LAYER_DEFAULT
from timm.models import ConvMixer, get_model_args, is_model, load_state_dict, model_entrypoint
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import nn

from . import manifest
from .card import DATASETS, model_card
from .hub_errors import HubError, explained, explained_model, one_line
from .machine import full_precision
from .paper import top1 as paper_top1
from .pretrained import HUB_FILENAME, weights_file
from .runs import (
    HUB_SCHEMES,
    checkpoint_epoch,
    is_local_dataset,
    is_place,
    public_args,
    read_args,
    read_summary,
    sorted_classes,
    split_dataset,
    summary_content,
)
from .splitmixer import _NORM_LAYERS, SplitMixer, thawed

_logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, CARD, ARGS, SUMMARY = 'config.json', HUB_FILENAME, 'README.md', 'args.yaml', 'summary.csv'
_METRICS = ('top1', 'top5')
_DATA = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')


def _is_ours(arch: Any) -> bool:
    return isinstance(arch, str) and is_model(arch) and model_entrypoint(arch).__module__.startswith(f'{__package__}.')


def _named_args(model_args: Dict[str, Any]) -> Dict[str, Any]:
    """ Arguments of a model as JSON has them: classes of layers by timm's name."""
    names = {
        nn.GELU: 'gelu', **{layer: name for name, layer in reversed(_ACT_LAYER_DEFAULT.items())},
        **{layer: name for name, layer in _NORM_LAYERS.items()},
    }
    named = {}
    for key, value in model_args.items():
        if key.endswith('_layer') and not isinstance(value, str):
            if value not in names:
                raise ValueError(f'{key} of the model must be one that timm has a name for, got {value!r}.')
            value = names[value]
        named[key] = value
    return named


def _is_percentage(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 100


def _checked_metrics(metrics: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    metrics = dict(metrics or {})
    for key, value in metrics.items():
        if key in _METRICS:
            if not _is_percentage(value):
                raise ValueError(f'metrics[{key!r}] must be a number from 0 to 100 (percent), got {value!r}.')
            metrics[key] = float(value)  # YAML knows no numbers of NumPy's
        elif key == 'images':
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"metrics['images'] must be a number of images, got {value!r}.")
            metrics[key] = int(value)
        elif key in ('split', 'measured_by'):
            if not isinstance(value, str):
                raise ValueError(f'metrics[{key!r}] must be text, got {value!r}.')
        elif key == 'seeds':
            if not isinstance(value, dict) or len(value) < 2 or not all(map(_is_percentage, value.values())):
                raise ValueError(
                    f"metrics['seeds'] must map two seeds or more to their top-1 in percent, got {value!r}.")
            metrics[key] = {seed: float(top1) for seed, top1 in value.items()}
        else:
            raise ValueError(
                "metrics must have 'top1', 'top5', 'images', 'split', 'seeds', 'measured_by' and no other, got "
                f'{key!r}.')
    return metrics


def _checked_data_config(data_config: Optional[Dict[str, Any]], in_chans: int) -> Dict[str, Any]:
    """ Preprocessing in the terms of a pretrained cfg, as JSON has them."""
    given = dict(data_config or {})
    for key, value in given.items():
        if key not in _DATA:
            raise ValueError(f'data_config must have {", ".join(map(repr, _DATA))} and no other, got {key!r}.')
        if key in ('input_size', 'mean', 'std'):
            length, kind = (3, int) if key == 'input_size' else (in_chans, (int, float))
            if not isinstance(value, (tuple, list)) or len(value) != length or \
                    any(isinstance(v, bool) or not isinstance(v, kind) for v in value):
                raise ValueError(f'data_config[{key!r}] must be {length} numbers, got {value!r}.')
            if key == 'input_size' and min(value) < 1:
                raise ValueError(f"data_config['input_size'] must be numbers of at least 1, got {value!r}.")
        elif key == 'crop_pct':
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"data_config['crop_pct'] must be a number above 0, got {value!r}.")
        elif not isinstance(value, str):
            raise ValueError(f'data_config[{key!r}] must be text, got {value!r}.')
        elif key == 'crop_mode' and value not in ('center', 'squash', 'border'):
            raise ValueError(f"data_config['crop_mode'] must be 'center', 'squash' or 'border', got {value!r}.")
    return given


def _is_same(state_dict: Dict[str, torch.Tensor], other: Dict[str, torch.Tensor]) -> bool:
    """ Whether weights are the same, whatever number of batches the norms counted."""
    return state_dict.keys() == other.keys() and all(
        key.endswith('num_batches_tracked') or value.dtype == other[key].dtype and torch.equal(value, other[key].cpu())
        for key, value in state_dict.items())


def _model_args(model: nn.Module) -> Dict[str, Any]:
    """ Arguments that make a model again, but for its classes and what is of training alone, as JSON has them."""
    known = inspect.signature(type(model)).parameters.keys() - {'num_classes'}
    args = {**get_model_args(model), 'in_chans': model.stem[0].in_channels}
    return _named_args({name: value for name, value in args.items() if name in known})


def _computation(model: nn.Module) -> Dict[str, Any]:
    """ What a model computes in eval mode, but for its weights: every argument of its class, defaults included."""
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(type(model)).parameters.items()
        if name not in ('num_classes', 'drop_rate', 'drop_path_rate', 'device', 'dtype')}
    return {**_named_args(defaults), **_model_args(model)}


def _run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """ Output in eval mode, without what was compiled; the model is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    is_compiled = any(getattr(module, '_compiled_call_impl', None) for module, _ in modes)
    try:
        with torch.compiler.set_stance('force_eager') if is_compiled else nullcontext():
            return model.eval()(images)
    finally:
        for module, mode in modes:
            module.training = mode


@full_precision()
@torch.no_grad()
def _computes_the_same(model: nn.Module, twin: nn.Module) -> bool:
    """ Whether a model made on device 'meta' gives in eval mode what another does, whose weights it gets."""
    if len({value.dtype for value in model.state_dict().values() if value.is_floating_point()}) > 1:
        model = copy.deepcopy(model).float()
    twin.load_state_dict(model.state_dict(), assign=True)
    weight = model.stem[0].weight
    size = 4 * model.stem[0].kernel_size[0]
    noise = torch.randn(
        1, weight.shape[1], size, size, device='cpu', dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    # a copy for each: whoever changes its input must not change the other's
    own, other = (_run(m, noise.to(weight, copy=True)).float() for m in (model, twin))
    bound = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    finite = other[other.isfinite()].abs()
    return own.shape == other.shape and torch.allclose(
        own, other, rtol=0., atol=bound * (finite.max().item() if len(finite) else 0.), equal_nan=True)


def _zoo_name(model: nn.Module) -> Optional[str]:
    """ 'arch.tag' of a model that is still the zoo's, in its weights and in what it does with them, else None."""
    cfg, model = model.pretrained_cfg, thawed(model)
    name = f'{cfg.get("architecture")}.{cfg.get("tag")}'
    file = manifest.bundled_file(name)
    if file is None or not _is_same(load_file(file), model.state_dict()):
        return None
    if not _computes_the_same(model, timm.create_model(name, device='meta')):
        _logger.warning(f'the weights are those of {name}, the arguments are not: what is known of it is left out')
        return None
    return name


@dataclass
class Release:
    """ A model and what is known of it, ready to be published.

    Attributes:
        model: Model from `timm.create_model`.
        metrics: Measured 'top1' and 'top5' in percent, on how many 'images' of which 'split', 'measured_by' what, and
            'seeds', from at least two seeds to the top-1 of each.
        dataset: What it was trained on: a name of `splitmixer_timm.card.DATASETS`, an id of the Hub, or any other name.
        label_names: Class names in label order.
        data_config: Preprocessing: input_size, interpolation, mean, std, crop_pct, crop_mode.
        training: How it was trained, in the manifest's terms.
        extra: Further files, and those that are to be published as they are.
        name: 'arch.tag' where it is a model of the zoo.
        license: Licence, as the Hub names it; that of the pretrained cfg if None, which gives way to the repository's.

    Raises:
        ValueError: If the model or what is said of it cannot be published.
    """
    model: nn.Module
    metrics: Optional[Dict[str, Any]] = None
    dataset: Optional[str] = None
    label_names: Optional[Sequence[str]] = None
    data_config: Optional[Dict[str, Any]] = None
    training: Dict[str, Any] = field(default_factory=dict)
    extra: Dict[str, bytes] = field(default_factory=dict)
    name: Optional[str] = None
    license: Optional[str] = None

    def __post_init__(self):
        self.model = unwrap_model(self.model)  # compiled; DDP, EMA
        cfg = getattr(self.model, 'pretrained_cfg', None)
        if not cfg or not _is_ours(cfg.get('architecture')) or type(self.model) not in (SplitMixer, ConvMixer):
            raise ValueError(
                'model must be a SplitMixer or ConvMixer of this package made by timm.create_model, got '
                f'{type(self.model).__name__}.')
        self.model = thawed(self.model)  # as what is created from config.json is
        if not isinstance(self.model.global_pool, SelectAdaptivePool2d):
            raise ValueError(
                'global_pool of the model must be the one it was made with, got '
                f"{type(self.model.global_pool).__name__}; for no pooling call reset_classifier(0, '').")
        if any(value.is_meta for value in self.model.state_dict().values()):
            raise ValueError("model must have its weights, got one on device 'meta'.")
        self.metrics = _checked_metrics(self.metrics)
        if self.dataset is not None and (not isinstance(self.dataset, str) or not self.dataset.strip()):
            raise ValueError(f'dataset must be the name of one, got {self.dataset!r}.')
        self.dataset = next((key for key, data in DATASETS.items() if data.hub_id == self.dataset), self.dataset)
        classes = self.model.num_classes
        if self.label_names is not None:
            names = self.label_names
            if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
                raise ValueError(f'label_names must be a list of names in label order, got {names!r}.')
            if len(names) != classes:
                raise ValueError(f'label_names must have a name for each of {classes} classes, got {len(names)}.')

        in_chans = self.model.stem[0].in_channels
        data_config = _checked_data_config(self.data_config, in_chans)
        self.model_args = _model_args(self.model)
        # class names are those of what this was made from
        dropped = {'label_names', 'label_descriptions'}
        if in_chans != 3:
            dropped.add('first_conv')  # timm would convert weights of that name from three channels
        self.cfg = {key: value for key, value in copy.deepcopy(dict(cfg)).items() if key not in dropped}
        self.cfg.update(data_config, num_classes=classes)
        if self.license is not None:
            if not isinstance(self.license, str) or not self.license.strip():
                raise ValueError(
                    f"license must be the Hub's name of one ('apache-2.0', 'mit', ...), got {self.license!r}.")
            self.cfg['license'] = self.license
        self.cfg['input_size'] = (in_chans, *self.cfg['input_size'][1:])
        if self.cfg['input_size'][1:] != tuple(cfg['input_size'][1:]):
            self.cfg.pop('pool_size', None)

        twin = timm.create_model(
            cfg['architecture'], num_classes=classes, device='meta', **self.model_args)
        shapes = {key: value.shape for key, value in self.model.state_dict().items()}
        if shapes != {key: value.shape for key, value in twin.state_dict().items()}:
            raise ValueError(
                f'model must have the layers that {cfg["architecture"]} has with its arguments; this one was changed '
                'after it was made.')
        if not _computes_the_same(self.model, twin):
            raise ValueError(
                f'model must compute what {cfg["architecture"]} with its arguments and weights does, which is what '
                'whoever downloads it gets; this one was changed after it was made.')

    def config(self, license: Optional[str] = None) -> bytes:
        """ config.json as timm and transformers read it, with another licence if one is given."""
        stand_in = SimpleNamespace(
            pretrained_cfg={**self.cfg, 'license': license or self.cfg.get('license')},
            num_classes=self.model.num_classes, num_features=self.model.num_features)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CONFIG
            names = self.label_names and list(self.label_names)
            dataset = next((name for name in DATASETS if names == list(manifest.label_names(name))), None)
            descriptions = manifest.label_descriptions(dataset) if dataset else None
            save_config_for_hf(
                stand_in, path, model_config=dict(label_names=names, label_descriptions=descriptions),
                model_args=self.model_args)
            config = json.loads(path.read_bytes())
        # timm puts it there too, but transformers passes the number of classes beside these
        config['model_args'].pop('num_classes', None)
        return json.dumps(config, indent=2).encode()

    def weights(self) -> bytes:
        """ model.safetensors."""
        state_dict = {key: value.detach().cpu().contiguous() for key, value in self.model.state_dict().items()}
        # one entry alone: safetensors writes several in any order, and the same model must be the same file
        return save(state_dict, metadata={'format': 'pt'})

    def card(self, title: str, source: str) -> str:
        """ README.md, see `model_card`."""
        config = json.loads(self.config())
        # as whoever loads it will have it
        above = ('architecture', 'label_names', 'label_descriptions')
        cfg = {**config['pretrained_cfg'], **{key: config[key] for key in above if key in config}}
        if self.dataset is None and any(key in self.metrics for key in _METRICS):
            _logger.warning('no data set is given: the Hub will not list the metrics')
        is_papers = self.name is not None and self.dataset == manifest.entries()[self.name]['dataset']
        own, registered = map(
            _computation, (self.model, timm.create_model(config['architecture'], device='meta')))
        return model_card(
            self.model, title, source, cfg, self.metrics, self.dataset, self.training,
            arguments={key: value for key, value in own.items() if value != registered[key]},
            paper=paper_top1(self.name) if is_papers else None)

    def files(self, repo_id: str) -> Dict[str, bytes]:
        """ Every file of its repository."""
        weights = {} if WEIGHTS in self.extra else {WEIGHTS: self.weights()}
        return {CONFIG: self.config(), **weights, CARD: self.repo_card(repo_id), **self.extra}

    def repo_card(self, repo_id: str) -> bytes:
        """ README.md of a repository."""
        return self.card(repo_id.rpartition('/')[2], f'hf-hub:{repo_id}').encode()


def zoo_release(name: str) -> Release:
    """ A model of the zoo by its 'arch.tag', with what the manifest says of it.

    Raises:
        ValueError: If the zoo has no weights of that name.
    """
    if name not in manifest.entries():
        raise ValueError(f'{name!r} has no weights in the zoo; {", ".join(sorted(manifest.entries()))} have.')
    return _of_the_zoo(name, timm.create_model(name, pretrained=True))


def _of_the_zoo(name: str, model: nn.Module, **given) -> Release:
    entry = manifest.entries()[name]
    training, dataset = entry['training'], entry['dataset']
    is_test = entry['metrics']['images'] == DATASETS[dataset].test
    files = {
        # the very file, so that the manifest's sha256 is that of what is published
        WEIGHTS: weights_file(name),
        ARGS: manifest.WEIGHTS_DIR / training['args'], SUMMARY: manifest.WEIGHTS_DIR / training['summary'],
    }
    release = Release(**{
        'model': model, 'metrics': {**({'split': 'test'} if is_test else {}), **entry['metrics']}, 'dataset': dataset,
        'label_names': manifest.label_names(dataset), 'training': training, 'name': name,
        'extra': {key: path.read_bytes() for key, path in files.items() if path.is_file()},
        **{key: value for key, value in given.items() if value is not None},
    })
    zoo, own = (
        json.loads(json.dumps(resolve_data_config(pretrained_cfg=cfg)))  # lists and tuples alike
        for cfg in (timm.get_pretrained_cfg(name).to_dict(), release.cfg))
    if (zoo != own or release.dataset != dataset) and given.get('metrics') is None:
        release.metrics = {}  # the zoo's were measured on other images, or on images prepared otherwise
    return release


def describe(model: nn.Module, **given) -> Release:
    """ What is given of a model, and where its weights are still the zoo's, what the zoo knows of it besides."""
    release = Release(model, **given)
    name = _zoo_name(release.model)
    if name is None:
        return release
    return _of_the_zoo(name, release.model, **given)


def _dataset_of(name: str) -> Optional[str]:
    """ Data set behind train.py's `--dataset`, None for folders and unknown ones."""
    scheme, rest = split_dataset(name)
    if scheme in HUB_SCHEMES:
        return None if is_local_dataset(name) else rest
    return rest if scheme in ('torch', 'tfds') and rest in DATASETS else None


def _measured_split(dataset: str, split: str) -> Tuple[str, str]:
    """ What train.py's `--dataset` and `--val-split` make it measure on: the split's name, and what to call it."""
    if split_dataset(dataset)[0] == 'torch' and _dataset_of(dataset):  # torchvision has these two of it and no other
        return ('train', 'the official train split') if split in _TRAIN_SYNONYM else ('test', 'the official test set')
    if is_place(split):
        split = 'validation'
    return split, f'its {split} split'


def run_release(
        path: Path,
        dataset: Optional[str] = None,
        label_names: Optional[Sequence[str]] = None,
) -> Release:
    """ The model of a run of timm's train.py, from its output folder or one of its checkpoints.

    Preprocessing is that of the run's arguments, class names are its class folders' where they are at hand, metrics
    those that train.py measured of the checkpoint on its validation split (of an average of checkpoints: none, nor of
    one for recovery, from within an epoch, nor of an EMA that it kept on the CPU).

    Raises:
        ValueError: If it is not a run, or of another architecture.
    """
    checkpoint = path / 'last.pth.tar' if path.is_dir() else path
    folder = checkpoint.parent
    args = read_args(folder)
    of_another = f'{folder} trained {args["model"]}, which is no model of this package.'
    if ':' not in str(args['model']) and not _is_ours(str(args['model']).partition('.')[0]):
        raise ValueError(of_another)
    if not checkpoint.is_file():
        raise ValueError(f'{folder} has no {checkpoint.name}: train at least one epoch.')
    input_size = args.get('input_size')
    in_chans = args.get('in_chans') or (input_size[0] if input_size else None)  # as train.py has it
    try:  # 'hf-hub:' and 'local-dir:' name a configuration, of which that folder or the Hub may have none any more
        with explained_model(str(args['model'])):
            model = timm.create_model(
                args['model'], in_chans=in_chans, num_classes=args.get('num_classes'), global_pool=args.get('gp'),
                **(args.get('model_kwargs') or {}))
    except Exception as e:
        raise ValueError(
            f'{folder} trained {args["model"]}, which cannot be made here '
            f'({type(e).__name__}: {one_line(e)}).') from e
    if not _is_ours(model.pretrained_cfg.get('architecture')):
        raise ValueError(of_another)
    try:
        model.load_state_dict(load_state_dict(str(checkpoint)))
        # one for recovery was written within the epoch that it names, which was measured at its end
        epoch = None if checkpoint.name.startswith('recovery-') else checkpoint_epoch(checkpoint)
    except Exception as e:  # whatever a file that is none, is damaged, or is of another model has amiss
        raise ValueError(
            f'{checkpoint} is not a checkpoint of {args["model"]} that can be read '
            f'({type(e).__name__}: {" ".join(str(e).split())[:300]}).') from e

    name = str(args.get('dataset') or '')
    known = _dataset_of(name)
    root = args.get('data_dir') or args.get('data')
    if label_names is None and known in DATASETS and split_dataset(name)[0] not in HUB_SCHEMES:
        label_names = manifest.label_names(known)
        if len(label_names) != model.num_classes:  # --num-classes may have been left out
            label_names = None
    elif label_names is None and not name and root:
        label_names = _class_folders(root, args, model.num_classes)
    if label_names is None:
        _logger.warning(f'{folder}: names of its classes are not at hand, published without class names')
    summary = read_summary(folder)
    rows = [row for row in summary if int(row['epoch']) == epoch]
    if args.get('model_ema') and args.get('model_ema_force_cpu'):
        rows = []  # the checkpoint's weights are the EMA's, and train.py did not measure that one
    metrics = {key: float(rows[-1][f'eval_{key}']) for key in _METRICS if rows and rows[-1].get(f'eval_{key}')}
    if metrics:
        metrics['split'], measured_on = _measured_split(name, args['val_split'])
        metrics['measured_by'] = f"timm's train.py on {measured_on}, after epoch {epoch + 1}"
        if rows[-1] is not summary[-1]:
            metrics['measured_by'] += f' of a run of {int(summary[-1]["epoch"]) + 1}'
            if metrics.get('top1') == max(float(row.get('eval_top1') or 0) for row in summary):
                metrics['measured_by'] += f', the best of {len(summary)} measured so'
    in_chans = model.stem[0].in_channels
    data_config = resolve_data_config({**args, 'in_chans': in_chans}, pretrained_cfg=model.pretrained_cfg)
    for key in ('mean', 'std'):
        if len(data_config[key]) != in_chans:
            del data_config[key]  # the pretrained cfg's, of another number of channels, which timm converts
    files = {ARGS: yaml.safe_dump(public_args(args)).encode()}
    if summary:
        files[SUMMARY] = summary_content(summary)
    training = {'seed': args.get('seed'), 'epochs': epoch if epoch is None else epoch + 1, **_told_by(files)}
    if args.get('model_ema'):
        training['checkpoint'] = 'EMA'  # which timm loads where there is one
    if args.get('kd_model_name'):
        source = args.get('kd_distill_type', 'logit')
        training['teacher'] = f'`{public_args(args)["kd_model_name"]}`, distilled from its {source}s'
    if args.get('initial_checkpoint') or args.get('pretrained') and args.get('pretrained_path'):
        training['started_from'] = 'a checkpoint'
    elif args.get('pretrained'):
        training['started_from'] = f'the pretrained weights of `{public_args(args)["model"]}`'
    return Release(model, metrics, dataset or known, label_names, data_config, training, files)


def _class_folders(root: str, args: Dict[str, Any], num_classes: int) -> Optional[Tuple[str, ...]]:
    """ Names of a run's class folders in label order, None where there are none such any more."""
    try:
        reader = create_dataset('', root=root, split=args['train_split'], class_map=args.get('class_map') or '').reader
        names = sorted_classes(reader)
    except Exception:  # whatever lies there now
        return None
    return names if len(names) == num_classes else None


def _told_by(files: Dict[str, bytes]) -> Dict[str, str]:
    """ How a model was trained, in the manifest's terms, as far as files beside it tell."""
    return {key: name for key, name in (('args', ARGS), ('summary', SUMMARY)) if name in files}


def load_folder(folder: Path, name: str) -> nn.Module:
    """ Model of a folder with config.json and model.safetensors."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise HubError(f'{name}: no {file}.')
    try:
        arch = json.loads((folder / CONFIG).read_text(encoding='utf-8'))['architecture']
    except (ValueError, KeyError, TypeError) as e:
        raise HubError(f'{name}: {CONFIG} is not a config of timm ({type(e).__name__}: {one_line(e)}).') from e
    if not _is_ours(arch):
        raise HubError(f'{name}: architecture {arch!r} is none of this package; use timm.create_model for others.')
    with explained(name), safe_open(folder / WEIGHTS, framework='pt'):
        pass
    try:
        return timm.create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as e:  # whatever a config from elsewhere has amiss
        raise HubError(f'{name}: {CONFIG} does not fit {WEIGHTS}: {one_line(e)}') from e


def folder_release(
        folder: Path,
        dataset: Optional[str] = None,
        label_names: Optional[Sequence[str]] = None,
) -> Release:
    """ The model of a local folder as `pull` leaves it and timm's 'local-dir:' reads it."""
    model = load_folder(folder, str(folder))
    name = _zoo_name(model)
    if name is not None:
        return _of_the_zoo(name, model, dataset=dataset, label_names=label_names)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    extra = {name: (folder / name).read_bytes() for name in (ARGS, SUMMARY) if (folder / name).is_file()}
    return Release(
        model, dataset=dataset, label_names=label_names or config.get('label_names'), training=_told_by(extra),
        extra=extra)
