""" Accuracy of a pretrained model on a test set in image folders. """
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import torch
from timm import create_model
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch.utils.data import DataLoader
from tqdm import tqdm

__all__ = ['Accuracy', 'evaluate']


@dataclass(frozen=True)
class Accuracy:
    """ Share of images, in percent, whose class is the likeliest (top1) or among the five likeliest (top5)."""
    top1: float
    top5: float
    images: int


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
        data_dir: Folder of the test images, one folder a class, in the alphabetical order of the labels.
        device: Device to run on.
        batch_size: Images a batch.
        workers: Processes that load images.

    Raises:
        ValueError: If the number of classes in the folder is not the model's.
        RuntimeError: If the model has no weights, or the folder no images.
    """
    device = torch.device(device)
    model = create_model(model_name, pretrained=True).to(device).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dataset = create_dataset('', root=str(data_dir), transform=transform)
    classes = len(dataset.reader.class_to_idx)
    if classes != model.num_classes:
        raise ValueError(f'data_dir must have {model.num_classes} class folders for {model_name}, got {classes}.')
    top1 = top5 = 0
    for images, target in tqdm(DataLoader(dataset, batch_size, num_workers=workers), desc=model_name, disable=None):
        likeliest = model(images.to(device)).topk(min(5, model.num_classes)).indices.cpu()
        hits = likeliest == target[:, None]
        top1 += hits[:, 0].sum().item()
        top5 += hits.any(1).sum().item()
    return Accuracy(top1=100 * top1 / len(dataset), top5=100 * top5 / len(dataset), images=len(dataset))
