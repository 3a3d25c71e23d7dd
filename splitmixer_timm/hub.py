""" Models to and from the Hugging Face Hub.

A repository holds what plain timm reads (config.json and model.safetensors, never a pickle), the model's card, and the
arguments and log of its run where they are known.
"""
import copy
import inspect
import json
import logging
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import timm
import torch
import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
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

from . import __version__, manifest
from .card import DATASETS, card_licence, merge_cards, model_card
from .hub_errors import HubError, TransportError, checked_token, explained, explained_model, one_line, within
from .machine import full_precision
from .paper import top1 as paper_top1
from .pretrained import HUB_FILENAME, check_download, weights_file
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

__all__ = ['HubError', 'Release', 'pull_from_hub', 'push_to_hub']

_logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, CARD, ARGS, SUMMARY = 'config.json', HUB_FILENAME, 'README.md', 'args.yaml', 'summary.csv'
_LIBRARY = dict(library_name='splitmixer_timm', library_version=__version__)
_REACH_SECONDS = 10.  # before the Hub counts as out of reach
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
        """ config.json as timm writes it, with another licence if one is given."""
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
            return path.read_bytes()

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


def _describe(model: nn.Module, **given) -> Release:
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


def folder_release(
        folder: Path,
        dataset: Optional[str] = None,
        label_names: Optional[Sequence[str]] = None,
) -> Release:
    """ The model of a local folder as `pull` leaves it and timm's 'local-dir:' reads it."""
    model = _load(folder, str(folder))
    name = _zoo_name(model)
    if name is not None:
        return _of_the_zoo(name, model, dataset=dataset, label_names=label_names)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    extra = {name: (folder / name).read_bytes() for name in (ARGS, SUMMARY) if (folder / name).is_file()}
    return Release(
        model, dataset=dataset, label_names=label_names or config.get('label_names'), training=_told_by(extra),
        extra=extra)


@contextmanager
def _new_branch(api: HfApi, repo_id: str, branch: str) -> Iterator[ModelInfo]:
    """ Make a branch and yield its info; it is deleted if the body fails and nobody else has committed to it."""
    api.create_branch(repo_id, branch=branch)
    made_from = None
    try:
        made_from = api.model_info(repo_id, revision=branch)
        yield made_from
    except BaseException:
        with suppress(TransportError):
            if made_from is None or api.model_info(repo_id, revision=branch).sha == made_from.sha:
                api.delete_branch(repo_id, branch=branch)
        raise


def upload(
        release: Release,
        repo_id: str,
        *,
        private: Optional[bool] = None,
        token: Optional[Union[str, bool]] = None,
        revision: Optional[str] = None,
        commit_message: str = 'Add model',
        create_pr: bool = False,
        parent_commit: Optional[str] = None,
) -> CommitInfo:
    """ Publish a release in one commit, see `push_to_hub`."""
    token = checked_token(token)
    api = HfApi(token=token, **_LIBRARY)
    files = release.files(repo_id)
    with explained(repo_id, revision), ExitStack() as stack:
        asked, repo_id = repo_id, api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if repo_id != asked:  # a name without its user's was completed
            files[CARD] = release.repo_card(repo_id)
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            if create_pr:
                raise
            info = stack.enter_context(_new_branch(api, repo_id, revision))
        with tempfile.TemporaryDirectory() as folder:
            try:
                existing = hf_hub_download(repo_id, CARD, revision=info.sha, local_dir=folder, token=token, **_LIBRARY)
            except RemoteEntryNotFoundError:  # not its base class, which an answer that failed to come has too
                pass
            else:
                card = merge_cards(
                    Path(existing).read_text(encoding='utf-8-sig'), files[CARD].decode(),
                    release.license is None)
                files[CARD] = card.encode()
                files[CONFIG] = release.config(card_licence(card))  # the two must not contradict each other
        # of the run of earlier weights: nothing would tell that they are not of these
        stale = {file.rfilename for file in info.siblings or ()} & {ARGS, SUMMARY} - files.keys()
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            # the card was merged with that of this commit: whatever came in between must not be overwritten
            parent_commit=parent_commit or info.sha,
        )


def push_to_hub(
        model: nn.Module,
        repo_id: str,
        *,
        metrics: Optional[Dict[str, Any]] = None,
        dataset: Optional[str] = None,
        private: Optional[bool] = None,
        token: Optional[Union[str, bool]] = None,
        revision: Optional[str] = None,
        commit_message: str = 'Add model',
        create_pr: bool = False,
        parent_commit: Optional[str] = None,
        label_names: Optional[Sequence[str]] = None,
        data_config: Optional[Dict[str, Any]] = None,
        license: Optional[str] = None,
) -> str:
    """ Publish a model on the Hub, for `timm.create_model('hf-hub:USER/NAME', pretrained=True)`.

    One commit with config.json, model.safetensors and the card. Nothing is guessed of a model that was trained further:
    its metrics, data set and class names are those given here, or none; only a model with the zoo's own weights has
    the zoo's. A card that is there already is made anew but for what others wrote in it and the licence that they
    chose; its datasets, model-index, library_name and pipeline_tag are always this push's. The arguments and log of an
    earlier model's run are removed. Pushing the same again makes no new commit. The model is run once on noise, in eval
    mode, to see that its arguments and weights make it again.

    Args:
        model: Model of this package from `timm.create_model`, as it is or wrapped (compiled, DDP, EMA).
        repo_id: 'USER/NAME', made if it does not exist.
        metrics: 'top1' and 'top5' in percent, on how many 'images' of which 'split', 'measured_by' what, and 'seeds',
            from at least two seeds to the top-1 of each.
        dataset: What it was trained on: a name of `splitmixer_timm.card.DATASETS`, an id of the Hub, or any other name.
        private: Whether a new repository is private; if None as the Hub has it: public, but for organisations that
            have chosen otherwise.
        token: Token of the Hub, the one that is logged in if None.
        revision: Branch, made if it does not exist; 'main' if None.
        commit_message: Message of the commit.
        create_pr: Open a pull request in place of committing to the branch.
        parent_commit: Commit that must be the last one; a later one makes the push fail.
        label_names: Class names in label order.
        data_config: Preprocessing, as `timm.data.resolve_data_config` gives it; the model's pretrained cfg's if None.
        license: Licence, as the Hub names it ('mit'); if None the one of the repository's card, else of the pretrained
            cfg.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        ValueError: If the model or what is said of it cannot be published, or `token` cannot be sent.
        HubError: If the Hub refuses or cannot be reached; the repository is then as it was (one that did not exist may
            be there, empty).
    """
    given = dict(
        metrics=metrics, dataset=dataset, label_names=label_names, data_config=data_config, license=license)
    info = upload(
        _describe(model, **given), repo_id, private=private, token=token, revision=revision,
        commit_message=commit_message, create_pr=create_pr, parent_commit=parent_commit)
    return info.pr_url or info.commit_url


def _load(folder: Path, name: str) -> nn.Module:
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


def download(
        repo_id: str,
        *,
        revision: Optional[str] = None,
        token: Optional[Union[str, bool]] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        local_files_only: bool = False,
        optional: Sequence[str] = (),
) -> Path:
    """ Folder of the cache with config.json and model.safetensors of one commit, and what there is of `optional`."""
    token = checked_token(token, is_sent=not local_files_only)
    kwargs = dict(cache_dir=cache_dir, token=token, **_LIBRARY)
    with explained(repo_id, revision):
        if not local_files_only and not constants.HF_HUB_OFFLINE:
            try:
                # one request that fails at once, where a download would try for half a minute
                api = HfApi(token=token, **_LIBRARY)
                within(_REACH_SECONDS, partial(api.model_info, repo_id, revision=revision, timeout=_REACH_SECONDS))
            except (TransportError, json.JSONDecodeError) as e:
                if isinstance(e, HfHubHTTPError) and e.response.status_code < 500:
                    raise
                local_files_only = True
                try:
                    for name in (CONFIG, WEIGHTS):  # timm may have cached the one, by hf_hub_id, without the other
                        hf_hub_download(repo_id, name, revision=revision, cache_dir=cache_dir, local_files_only=True)
                except EntryNotFoundError:
                    raise e from None
                _logger.warning(f'{repo_id}: the Hub cannot be reached, taken from the cache')
        kwargs['local_files_only'] = local_files_only
        config = hf_hub_download(repo_id, CONFIG, revision=revision, **kwargs)
        check_download(config)
        folder = Path(config).parent
        kwargs['revision'] = folder.name  # the commit, so that the files are of one
        check_download(hf_hub_download(repo_id, WEIGHTS, **kwargs))
        for name in optional:
            try:
                check_download(hf_hub_download(repo_id, name, **kwargs))
            except RemoteEntryNotFoundError:
                pass
            except LocalEntryNotFoundError:
                if not local_files_only and not constants.HF_HUB_OFFLINE:
                    raise
    return folder


def pull_from_hub(
        repo_id: str,
        *,
        revision: Optional[str] = None,
        token: Optional[Union[str, bool]] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        local_files_only: bool = False,
) -> nn.Module:
    """ A model of this package from the Hub.

    Both files are of one commit; weights are read from safetensors only. Without a network the cache is used.

    Args:
        repo_id: 'USER/NAME', or 'USER/NAME@REVISION'.
        revision: Branch, tag or commit; 'main' if None.
        token: Token of the Hub, the one that is logged in if None.
        cache_dir: Where to keep downloads, huggingface_hub's own cache if None.
        local_files_only: Ask no network.

    Returns:
        The model, in train mode as `timm.create_model` gives it.

    Raises:
        HubError: If it cannot be had (no such repository or revision, no permission, no network and not in the cache)
            or cannot be used (another architecture, weights that do not fit its config, damaged files).
        ValueError: If `token` cannot be sent, or two revisions are given.
    """
    repo_id, revision = split_revision(repo_id, revision)
    folder = download(
        repo_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    return _load(folder, repo_id)


def split_revision(repo_id: str, revision: Optional[str]) -> Tuple[str, Optional[str]]:
    """ 'USER/NAME@REVISION' as timm takes it, in its two parts."""
    name, at, own = repo_id.partition('@')
    if at and revision is not None:
        raise ValueError(f'revision must be given once, got {repo_id!r} and revision={revision!r}.')
    return name, own if at else revision


def pull_to_folder(
        repo_id: str,
        folder: Path,
        *,
        revision: Optional[str] = None,
        token: Optional[Union[str, bool]] = None,
) -> List[str]:
    """ Leave a model of the Hub in a new folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` reads.

    Returns:
        Names of the files in it.

    Raises:
        ValueError: If the folder exists and has something in it, or is the current one.
        HubError: As `pull_from_hub`; the folder is then not made.
    """
    repo_id, revision = split_revision(repo_id, revision)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.resolve() == Path.cwd()):
        raise ValueError(f'{folder} exists already: name another folder.')
    cached = download(repo_id, revision=revision, token=token, optional=(CARD, ARGS, SUMMARY))
    _load(cached, repo_id)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{folder.name}-', dir=folder.parent))
    try:
        names = [name for name in (CONFIG, WEIGHTS, CARD, ARGS, SUMMARY) if (cached / name).is_file()]
        for name in names:
            shutil.copyfile(cached / name, temporary / name)
        temporary.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()  # Windows replaces no folder, not even an empty one
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return names
