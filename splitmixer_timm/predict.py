""" Classify images with a model of the zoo, or any of timm's. """
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterable, Iterator, List, Optional, Tuple, Union

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from timm import create_model
from timm.data import create_transform, resolve_model_data_config

from .hub_errors import explained_model

__all__ = ['IMAGE_SUFFIXES', 'Classifier', 'Prediction', 'classify', 'find_images', 'load_image', 'read_stdin']

IMAGE_SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
ImageSource = Union[Path, bytes]
_UPRIGHT = {  # by EXIF's number for how an image lies
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


@dataclass(frozen=True)
class Prediction:
    """ Class of an image: its index, its name, and its probability (0 to 1)."""
    index: int
    label: str
    probability: float


def find_images(paths: Iterable[Union[str, Path]]) -> Iterator[Path]:
    """ The files among `paths`, and every image file below the folders among them, in sorted order.

    A path that does not exist is passed on, so that opening it names it.
    """
    for path in map(Path, paths):
        if os.path.isdir(path):  # where Path.is_dir raises on a path that cannot be looked at
            yield from sorted(p for p in path.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        else:
            yield path


def read_stdin(stream: BinaryIO) -> List[ImageSource]:
    """ Image sources on standard input: the bytes of one image, or the paths of images, one a line.

    Raises:
        ValueError: If it is neither.
    """
    data = stream.read()
    is_damaged = False
    try:
        Image.open(io.BytesIO(data)).close()
        return [data]
    except UnidentifiedImageError:
        pass
    except Exception:  # an image that Pillow will not decode, or paths that begin as one does: BMW/1.jpg, BMW/2.jpg
        is_damaged = True
    try:
        # of bytes, since lines of text also end at form feeds and U+2028, which names may have
        lines = [os.fsdecode(line) for line in data.splitlines() if line.strip()]
    except UnicodeDecodeError:
        lines = []
    # names may be any bytes, but what is no text and names no file is something else
    is_text = data.decode('utf-8', 'ignore').encode() == data
    has_names = b'\0' not in data and any(map(os.path.lexists, lines))
    if is_damaged and not has_names:
        return [data]
    if not lines or b'\0' in data or not (is_text or has_names):
        raise ValueError('standard input must hold one image or the paths of images, one a line')
    return list(find_images(lines))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """ The image, one of more than 8 bits a pixel scaled down to 8, where Pillow would clip at 255."""
    if image.mode == 'F':
        raise OSError('an image of floating point numbers, of which white may be any')
    if image.mode.startswith('I'):
        lowest, highest = image.convert('I').getextrema()
        if lowest < 0 or highest > 65535:
            raise OSError(f'an image of integers from {lowest} to {highest}, more than 16 bits')
        # 16-bit PNG comes as 32 bits of older Pillows, and what is stored as such may be of 8
        if image.mode.startswith('I;16') or highest > 255:
            image = image.convert('I').point(lambda value: value * (1 / 256))
    return image


def _upright(image: Image.Image) -> Image.Image:
    """ The image turned as its EXIF data says.

    `ImageOps.exif_transpose` also writes that data anew, and fails where a field has a value of the wrong kind.
    """
    image.load()  # some formats have it after the pixels
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def load_image(source: ImageSource) -> Image.Image:
    """ RGB image from a path or from bytes, turned upright as its EXIF data says; 16 bits are made 8.

    Raises:
        OSError: If it cannot be read, is not an image, or one of floating point numbers.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _to_8_bits(_upright(image)).convert('RGB')
    except UnidentifiedImageError as e:
        raise OSError('not a readable image') from e
    except OSError:
        raise
    except Exception as e:  # a damaged file makes Pillow's decoders raise nearly anything
        raise OSError(f'not a readable image ({type(e).__name__}: {e})') from e


class Classifier:
    """ A pretrained model with its own preprocessing and class names.

    Args:
        model_name: Name for `timm.create_model`, with or without a tag, 'hf-hub:' and 'local-dir:' included.
        device: Device to run on.

    Raises:
        RuntimeError: If there is no such model or it has no weights, or the Hub does not give it.
        ValueError: If it has no classes, or does not take RGB images.
    """

    def __init__(self, model_name: str, device: Union[str, torch.device] = 'cpu'):
        self.device = torch.device(device)
        with explained_model(model_name):
            model = create_model(model_name, pretrained=True)
        self.model = model.to(self.device).eval()
        self.transform = create_transform(**resolve_model_data_config(self.model), is_training=False)
        cfg = self.model.pretrained_cfg
        if not self.model.num_classes:
            raise ValueError(f'{model_name} has no classes.')
        if cfg.get('input_size', (3,))[0] != 3:
            raise ValueError(f'{model_name} takes images of {cfg["input_size"][0]} channels, not RGB.')
        labels = cfg.get('label_names')
        # names of other classes than the model's would be worse than none
        fits = isinstance(labels, (list, tuple)) and len(labels) == self.model.num_classes
        descriptions = cfg.get('label_descriptions') or {}
        self.labels: Optional[Tuple[str, ...]] = tuple(descriptions.get(n, n) for n in labels) if fits else None
        # a model from elsewhere may carry the tag of what it was fine-tuned from
        self.name = model_name if ':' in model_name else f'{cfg["architecture"]}.{cfg["tag"]}'

    @torch.inference_mode()
    def __call__(self, inputs: List[torch.Tensor], topk: int = 5) -> List[List[Prediction]]:
        """ The `topk` likeliest classes, likeliest first, of each input (C, H, W) that `transform` made of an image."""
        logits = self.model(torch.stack(inputs).to(self.device))
        probabilities, indices = logits.float().softmax(-1).topk(min(topk, self.model.num_classes))
        return [
            [Prediction(i, self.labels[i] if self.labels else str(i), p) for p, i in zip(ps, js)]
            for ps, js in zip(probabilities.tolist(), indices.tolist())
        ]


def classify(
        classifier: Classifier,
        sources: Iterable[ImageSource],
        topk: int,
        batch_size: int,
) -> Iterator[Tuple[str, Union[List[Prediction], str]]]:
    """ Predictions, or what was wrong, for each source in order; a broken image does not stop the others."""
    # inputs are small where the images need not be, so it is they that wait for their batch
    pending: List[Tuple[str, Union[torch.Tensor, str]]] = []

    def flush() -> Iterator[Tuple[str, Union[List[Prediction], str]]]:
        inputs = [item for _, item in pending if not isinstance(item, str)]
        answers = iter(classifier(inputs, topk) if inputs else [])
        for name, item in pending:
            yield name, item if isinstance(item, str) else next(answers)
        pending.clear()

    for source in sources:
        name = '<stdin>' if isinstance(source, bytes) else str(source)
        try:
            pending.append((name, classifier.transform(load_image(source))))
        except FileNotFoundError:
            pending.append((name, 'no such file'))
        except OSError as e:
            pending.append((name, e.strerror or str(e)))
        if len(pending) >= batch_size:
            yield from flush()
    yield from flush()
