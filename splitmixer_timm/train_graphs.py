""" As `train_fused`, with the blocks as CUDA graphs, which take the place of Python in launching kernels.

For timm's train.py: `--device-modules splitmixer_timm splitmixer_timm.train_graphs`, and what else a recipe names.
"""
from . import train_fused

__all__ = []

train_fused.OPTIONS['cuda_graphs'] = True
