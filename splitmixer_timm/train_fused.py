""" Every SplitMixer that timm creates after the import of this trains by the kernels of `fuse_for_training`.

For timm's train.py: `--device-modules splitmixer_timm splitmixer_timm.train_fused`, and what else a recipe names there.
"""
import logging

import torch
from torch import nn

from . import splitmixer
from .fused import Unsupported
from .fused_training import fuse_for_training

__all__ = []

OPTIONS = {}  # arguments of `fuse_for_training`
_logger = logging.getLogger(__name__)
_create_variant = splitmixer.create_variant


def _create_fused(*args, **kwargs) -> nn.Module:
    model = _create_variant(*args, **kwargs)
    try:
        # train.py moves the model there later
        return fuse_for_training(model, torch.device('cuda') if torch.cuda.is_available() else None, **OPTIONS)
    except Unsupported as e:
        _logger.warning(f'The plain layers are trained: {e}')
        return model


splitmixer.create_variant = _create_fused
