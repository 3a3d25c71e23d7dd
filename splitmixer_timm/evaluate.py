""" Accuracy of a pretrained model on a test set in image folders. """
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Tuple, Union

import numpy as np
import torch
from PIL import Image
from timm import create_model
from timm.data import ImageDataset, create_dataset, create_transform, resolve_model_data_config
from timm.utils import AverageMeter, accuracy
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import manifest
from .machine import full_precision
from .runs import sorted_classes

__all__ = ['Accuracy', 'evaluate']


@dataclass(frozen=True)
class Accuracy:
    """ Share of images, in percent, whose class is the likeliest (top1) or among the five likeliest (top5)."""
    top1: float
    top5: float
    images: int


class _Images(Dataset):
    """ Images and targets of one of timm's data sets, in place of which timm gives the next where one is damaged."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Union[torch.Tensor, str], int]:
        try:
            file, target = self.dataset.reader[index]
            with file, Image.open(file) as image:
                image = image.convert(self.dataset.input_img_mode)
        except Exception as e:  # a damaged file makes Pillow's decoders raise nearly anything
            reason = ' '.join(str(e).split()) or type(e).__name__
            return f'{self.dataset.filename(index, absolute=True)} cannot be read: {reason}', -1
        return self.dataset.transform(image), target


def _collate(samples: List[Tuple[Union[torch.Tensor, str], int]]) -> Tuple[Union[np.ndarray, str], Any]:
    """ A batch, or what is amiss with an image of it."""
    damaged = next((sample for sample in samples if isinstance(sample[0], str)), None)
    images, targets = zip(*samples)
    # arrays come through a pipe: of the shared memory that tensors come in containers have little, Docker's 64 MiB
    return damaged or (torch.stack(images).numpy(), np.array(targets))


@full_precision()
@torch.inference_mode()
def evaluate(
        model_name: str,
        data_dir: Union[str, Path],
        device: Union[str, torch.device] = 'cpu',
        batch_size: int = 200,
        workers: int = 1,
) -> Accuracy:
    """ Measure a pretrained model in fp32 with its own preprocessing.

    Args:
        model_name: Name for `timm.create_model`.
        data_dir: Folder of the test images, one folder a class, which in alphabetical order are in that of the labels.
        device: Device to run on.
        batch_size: Images a batch.
        workers: Processes that load images.

    Raises:
        ValueError: If the number of classes in the folder is not the model's, or their order is another.
        RuntimeError: If the model has no weights, or the folder no images or one that cannot be read.
    """
    device = torch.device(device)
    model = create_model(model_name, pretrained=True).to(device).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dataset = create_dataset('', root=str(data_dir), transform=transform)
    classes = len(dataset.reader.class_to_idx)
    if classes != model.num_classes:
        raise ValueError(f'data_dir must have {model.num_classes} class folders for {model_name}, got {classes}.')
    cfg = model.pretrained_cfg
    if entry := manifest.entries().get(f'{cfg.get("architecture")}.{cfg.get("tag")}'):
        manifest.check_class_order(sorted_classes(dataset.reader), entry['dataset'])
    top1, top5 = AverageMeter(), AverageMeter()
    loader = DataLoader(_Images(dataset), batch_size, num_workers=workers, collate_fn=_collate)
    for images, target in tqdm(loader, desc=model_name, disable=None):
        if isinstance(images, str):
            raise RuntimeError(images)
        images, target = torch.from_numpy(images).to(device), torch.from_numpy(target)
        for meter, percent in zip((top1, top5), accuracy(model(images).cpu(), target, topk=(1, 5))):
            meter.update(percent.item(), len(images))
    return Accuracy(top1=top1.avg, top5=top5.avg, images=len(dataset))
