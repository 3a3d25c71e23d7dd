""" Model cards: what the Hub shows of a model, made from its cfg, its manifest entry and its run. """
import re
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Dict, List, Optional, Tuple

import yaml
from huggingface_hub import EvalResult, ModelCardData
from timm.data import resolve_data_config
from torch import nn

from .complexity import measure_complexity

__all__ = ['DATASETS', 'INTENDED_USE', 'LIMITS', 'Dataset', 'card_licence', 'merge_cards', 'model_card']

BEGIN = '<!-- splitmixer_timm:begin, each push makes this part anew: write above or below it -->'
END = '<!-- splitmixer_timm:end -->'
SECTIONS = (
    'Model', 'Use', 'Intended use', 'Evaluation', 'Training', 'Data', 'Limits and bias', 'Licence', 'Citation')


@dataclass(frozen=True)
class Dataset:
    """ A data set as cards tell of it.

    Attributes:
        name: Its name.
        hub_id: Where the Hub has it.
        content: Number of images and classes.
        training: What the official splits to train on are called, by their number of images.
        test: Number of images of the official test set, or of the validation set that is reported where that is usual.
        source: Who made it, and where it is described.
        bias: What is known to be one-sided in it.
        paper: What the paper leaves open of its figures on it.
    """
    name: str
    hub_id: str
    content: str
    training: Dict[int, str]
    test: int
    source: str
    bias: str
    paper: str = ''


_CIFAR_BIAS = (
    'drawn from web searches made before 2008 for English nouns, it carries the habits of those: few settings, Western '
    'objects, the object large and centred')
_CIFAR_TRAINING = {50000: 'the official train split'}
DATASETS = {
    'cifar10': Dataset(
        'CIFAR-10', 'uoft-cs/cifar10', '60,000 images of 32 x 32, 10 classes', _CIFAR_TRAINING, 10000,
        'Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"', _CIFAR_BIAS),
    'cifar100': Dataset(
        'CIFAR-100', 'uoft-cs/cifar100', '60,000 images of 32 x 32, 100 classes', _CIFAR_TRAINING, 10000,
        'Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"',
        _CIFAR_BIAS + '; five of its classes are people (baby, boy, girl, man, woman), and predicting one says '
                      'nothing about a person'),
    'flowers102': Dataset(
        'Flowers102', 'dpdl-benchmark/oxford_flowers102', '8,189 images, 102 classes',
        {1020: 'the official train split', 2040: 'the official train and val splits together'},
        6149,
        'Nilsback and Zisserman 2008, "Automated Flower Classification over a Large Number of Classes"',
        'flowers common in the United Kingdom, one kind a picture, mostly close up',
        'it does not say on which splits it trained'),
    'food101': Dataset(
        'Food101', 'ethz/food101', '101,000 images, 101 classes', {75750: 'the official train split'}, 25250,
        'Bossard et al. 2014, "Food-101: Mining Discriminative Components with Random Forests"',
        "dishes popular on an English-language site; the training images' labels are noisy by design"),
    'in1k': Dataset(
        'ImageNet-1k', 'ILSVRC/imagenet-1k', '1.28 million images, 1,000 classes',
        {1281167: 'the official train split'}, 50000,
        'Deng et al. 2009, "ImageNet: A Large-Scale Hierarchical Image Database"',
        'web images and English nouns of around 2010; many classes are breeds of dogs, few are of the Global South'),
}

INTENDED_USE = """\
Research and teaching: baselines for small mixing architectures, fine-tuning, feature extraction, measuring accuracy and
speed. A model knows the classes of its data set and nothing else."""

LIMITS = """\
- The model gives one of its classes for any picture, often with high confidence, whether or not the picture shows one.
- Photographs are shrunk to the resolution of the training images; details lost that way cannot be recognised.
- Probabilities are not calibrated.
- Not for decisions about people, nor where an error does harm."""

CITATION = """\
@article{borji2022splitmixer,
  title   = {SplitMixer: Fat Trimmed From MLP-like Models},
  author  = {Borji, Ali and Lin, Sikun},
  journal = {arXiv preprint arXiv:2207.10255},
  year    = {2022}
}"""
CONVMIXER_CITATION = """\
@article{trockman2022patches,
  title   = {Patches Are All You Need?},
  author  = {Trockman, Asher and Kolter, J. Zico},
  journal = {arXiv preprint arXiv:2201.09792},
  year    = {2022}
}"""

_METRICS = {'top1': 'top-1 accuracy, %', 'top5': 'top-5 accuracy, %'}


# metadata that the generated part answers for: never left over from an earlier model
_OWNED = {'library_name', 'pipeline_tag', 'datasets', 'model-index'}


def _snippet(source: str, cfg: Dict[str, Any], in_chans: int) -> List[str]:
    """ Python that loads the model and gives it an image."""
    create = f"model = timm.create_model('{source}', pretrained=True).eval()"
    lines = ['import timm, torch, splitmixer_timm']
    if in_chans in (1, 3):
        lines += [
            'from PIL import Image',
            create,
            'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))',
            f"images = transform(Image.open('image.png').convert('{'L' if in_chans == 1 else 'RGB'}'))[None]",
        ]
    else:
        lines += [create, "images = torch.rand(1, *timm.data.resolve_model_data_config(model)['input_size'])"]
    lines.append('with torch.inference_mode():')
    if not cfg['num_classes']:
        return [*lines, '    print(model(images).shape)']
    answer = f'probabilities.topk({min(5, cfg["num_classes"])})'
    if cfg.get('label_names'):
        label = "model.pretrained_cfg['label_names'][probabilities.argmax()]"
        if cfg.get('label_descriptions'):
            label = f"model.pretrained_cfg['label_descriptions'][{label}]"
        answer = f"{label}, f'{{probabilities.max():.0%}}'"
    return [*lines, '    probabilities = model(images).softmax(-1)', f'print({answer})']


def _metadata(
        title: str,
        cfg: Dict[str, Any],
        known: Optional[Dataset],
        dataset: Optional[str],
        metrics: Dict[str, Any],
) -> Dict[str, Any]:
    hub_id = known.hub_id if known else dataset if dataset and '/' in dataset else None
    name = known.name if known else dataset
    results = [
        EvalResult(
            task_type='image-classification', dataset_type=hub_id or name, dataset_name=name,
            dataset_split=metrics.get('split'),
            metric_type='accuracy', metric_name=label, metric_value=metrics[key])
        for key, label in _METRICS.items() if key in metrics and name
    ]
    data = ModelCardData(
        license=cfg.get('license'),
        library_name='timm',
        pipeline_tag='image-classification' if cfg['num_classes'] else 'image-feature-extraction',
        tags=['timm', 'splitmixer'],
        datasets=[hub_id] if hub_id else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return data.to_dict()


def model_card(
        model: nn.Module,
        title: str,
        source: str,
        cfg: Dict[str, Any],
        metrics: Optional[Dict[str, Any]] = None,
        dataset: Optional[str] = None,
        training: Optional[Dict[str, Any]] = None,
        arguments: Optional[Dict[str, Any]] = None,
        paper: Optional[float] = None,
) -> str:
    """ Card of a model: metadata of the Hub in YAML, then Markdown.

    Args:
        model: The model, for its size and work.
        title: What to call it.
        source: What `timm.create_model` takes to load it.
        cfg: Its pretrained cfg, with the preprocessing and number of classes that are its own.
        metrics: Measured 'top1' and 'top5' in percent, how many 'images' they were measured on and how ('split',
            'measured_by'), and 'seeds', from each seed to its top-1.
        dataset: What it was trained on: one of `DATASETS`, an id of the Hub, or any name.
        training: How it was trained, in the manifest's terms.
        arguments: Arguments in which it differs from the architecture as it is registered.
        paper: Top-1 in percent that the paper gives for it.
    """
    metrics, training, known = dict(metrics or {}), training or {}, DATASETS.get(dataset)
    if 0 < cfg['num_classes'] <= 5:
        metrics.pop('top5', None)  # it is 100 whatever the model
    data = resolve_data_config(pretrained_cfg=cfg)
    counts = measure_complexity(model, data['input_size'])
    size = ' x '.join(map(str, data['input_size'][1:]))
    trained_on = f', trained on {known.name if known else dataset}' if dataset else ''
    changes = ', '.join(f'`{key}={value}`' for key, value in (arguments or {}).items())
    crop = 'squashed to that size' if data['crop_mode'] == 'squash' else f'{data["crop_mode"]} crop of ' \
        f'{100 * data["crop_pct"]:g}%'
    lines = [
        f'# {title}', '',
        f'A SplitMixer ([arXiv 2207.10255](https://arxiv.org/abs/2207.10255)) for timm{trained_on}.'
        if cfg['architecture'].startswith('splitmixer') else
        f'A ConvMixer ([arXiv 2201.09792](https://arxiv.org/abs/2201.09792)) for timm{trained_on}, the baseline of '
        'SplitMixer.', '',
        '## Model', '',
        f'- Architecture: `{cfg["architecture"]}`' + (f', but with {changes}' if changes else ''),
        f'- Parameters: {counts.params:,}',
        f'- Multiply-accumulates: {counts.macs / 1e6:,.1f} M for one image',
        f'- Input: {data["input_size"][0]} channels, {size}, mean {tuple(data["mean"])}, standard deviation '
        f'{tuple(data["std"])}, {data["interpolation"]} interpolation, {crop}',
        f'- Classes: {cfg["num_classes"]:,}', '',
        '## Use', '',
        'Needs `timm` and `splitmixer_timm`, which registers the architecture.', '',
        '```python', *_snippet(source, cfg, data['input_size'][0]), '```', '',
        '## Intended use', '', INTENDED_USE, '',
        '## Evaluation', '',
    ]
    measured = [f'- {label}: {metrics[key]:.2f}' for key, label in _METRICS.items() if key in metrics]
    if measured:
        split = f'{metrics["split"]} split' if 'split' in metrics else None
        how = [f'{metrics["images"]:,} images' if 'images' in metrics else None, split, metrics.get('measured_by')]
        lines += [*measured, *([f'- Measured: {"; ".join(filter(None, how))}'] if any(how) else [])]
        if metrics.get('seeds'):
            values = metrics['seeds'].values()
            lines.append(
                f'- Over {len(values)} runs that differ in the seed: top-1 {mean(values):.2f} +- {stdev(values):.2f}')
    else:
        lines.append('Not measured.')
    if measured and paper and known:
        lines.append(f"- The paper's top-1 accuracy, %: {paper:.2f}, after 100 epochs with its full recipe" + (
            f'; {known.paper}' if known.paper else ''))
    lines += ['', '## Training', '']
    images = training.get('images')
    split = known.training.get(images) if known else None
    log = 'each measured epoch in `summary.csv`'
    if metrics.get('measured_by', '').startswith("timm's validate.py"):
        log += ": train.py's own figures, from which the evaluation above may differ"
    facts = [
        ('Recipe', training.get('recipe')),
        ('Started from', training.get('started_from')),
        ('Teacher', training.get('teacher')),
        ('Images', None if images is None else f'{images:,}' + (f', {split}' if split else '')),
        ('Epochs', training.get('epochs')),
        ('Checkpoint', training.get('checkpoint')),
        ('Seed', training.get('seed')),
        ('Time', f'{training["hours"]} hours on {training["machine"]}' if 'hours' in training else None),
        ('Versions', f'torch {training["torch"]}, timm {training["timm"]}' if 'torch' in training else None),
        ('Arguments', 'all of them in `args.yaml`' if training.get('args') else None),
        ('Log', log if training.get('summary') else None),
        ('Note', training.get('note')),
    ]
    told = [f'- {name}: {fact}' for name, fact in facts if fact is not None]
    lines += told or ['Not recorded.']
    if known:
        lines += ['', '## Data', '', f'{known.name}: {known.content}. {known.source}.']
    lines += ['', '## Limits and bias', '', LIMITS]
    if known:
        lines.append(f'- {known.name}: {known.bias}.')
    lines += ['', '## Licence', '', 'The one named at the head of this card. The data has terms of its own.']
    citations = [CITATION] if cfg['architecture'].startswith('splitmixer') else [CONVMIXER_CITATION, CITATION]
    lines += ['', '## Citation', '', '```bibtex', *citations, '```']
    body = '\n'.join(lines)
    metadata = _metadata(title, cfg, known, dataset, metrics)
    return _join(metadata, f'{BEGIN}\n{body}\n{END}\n')


def _dump(metadata: Dict[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000) if metadata else ''


def _join(metadata: Dict[str, Any], body: str, kept: str = '', comments: str = '') -> str:
    return f'---\n{comments}{_dump(metadata)}{kept}---\n\n{body}'


def _split(card: str) -> Tuple[str, str]:
    """ Metadata, as YAML, and Markdown of a card."""
    card = card.replace('\r\n', '\n')
    match = re.match(r'\s*---[ \t]*\n(.*?\n)??---[ \t]*(?:\n+|\Z)(.*)', card, re.DOTALL)
    return (match[1] or '', match[2]) if match else ('', card)


def _read(metadata: str) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """ Metadata that has a value, every scalar as text, and the lines of each key as they were written.

    YAML would read `language: no` as False and a version 1.10 as 1.1, and write what it has read; only keys that share
    lines or values are written so.

    Raises:
        yaml.YAMLError: If it is not YAML, or no mapping.
        ValueError: If keys that share lines or values have one that is none.
    """
    values = yaml.load(metadata, Loader=yaml.BaseLoader) or {}
    if not isinstance(values, dict):
        raise yaml.YAMLError('it is no mapping')
    node = yaml.compose(metadata, Loader=yaml.BaseLoader)
    marks = [key.start_mark for key, _ in node.value] if values else []
    if any(mark.column for mark in marks) or any(isinstance(token, yaml.AliasToken) for token in yaml.scan(metadata)):
        return values, {str(key): _dump({key: value}) for key, value in yaml.safe_load(metadata).items()}
    ends = [mark.index for mark in marks[1:]] + [len(metadata)]
    values = {key: value for key, value in values.items() if value not in ('', '~', 'null', 'Null', 'NULL')}
    return values, {
        key.value: metadata[mark.index:end] for (key, _), mark, end in zip(node.value if marks else [], marks, ends)}


def card_licence(card: str) -> Optional[str]:
    """ The licence that a card names, None where that is not one."""
    licence = _read(_split(card)[0])[0].get('license')
    return licence if isinstance(licence, str) else None


def merge_cards(existing: str, new: str, keep_licence: bool = True) -> str:
    """ A card made anew in place of the part that an earlier push made; what else the card has is kept.

    Metadata that the new card has replaces that of the same name, but a licence stays what it was (if it is to be
    kept), and tags are joined; what is kept is kept letter by letter. Of a card that timm made, which says of every
    model the same, nothing is kept but what was added.

    Raises:
        ValueError: If the existing card's metadata is not YAML.
    """
    old_text, old_body = _split(existing)
    try:
        old_metadata, lines = _read(old_text)
    except (yaml.YAMLError, ValueError) as e:
        raise ValueError(f'README.md has metadata that cannot be read: {str(e).splitlines()[0]}') from e
    text, body = _split(new)
    metadata = yaml.safe_load(text)
    tags = old_metadata.get('tags') or []
    if isinstance(tags, str):
        tags = [tags]
    # timm's tag of every model it publishes, which transformers does not load
    tags = [tag for tag in tags if tag != 'transformers']
    if old_metadata.get('library_name') == 'timm' and BEGIN not in old_body:  # as ours has it, too
        old_body = re.sub(r'\A# Model card for .*\n*', '', old_body)
    metadata['tags'] += [tag for tag in tags if tag not in metadata['tags']]
    generated = re.search(f'{re.escape(BEGIN)}.*?{re.escape(END)}\n?', old_body, re.DOTALL)
    if generated:
        # sections that somebody wrote into the generated part go below it
        sections = re.split(r'^(?=## )', generated[0].replace(END, ''), flags=re.MULTILINE)[1:]
        own = [section.rstrip() for section in sections if section.splitlines()[0][3:].strip() not in SECTIONS]
        body = ''.join([
            old_body[:generated.start()], body, *(f'\n{section}\n' for section in own), old_body[generated.end():]])
    elif old_body.strip():
        body = f'{body}\n{old_body}'
    replaced = metadata.keys() | _OWNED
    if not keep_licence:
        replaced |= {'license_name', 'license_link'}
    elif old_metadata.get('license'):
        metadata['license'] = old_metadata['license']
    kept = ''.join(line for key, line in lines.items() if key not in replaced)
    comments = re.match(r'((?:[ \t]*#.*)?\n)*', old_text)[0]  # before the first key
    return _join(metadata, body, kept, comments.lstrip('\n'))
