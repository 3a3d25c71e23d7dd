""" SplitMixer for timm: importing this package registers its models with `timm.create_model`."""
from . import convmixer  # noqa: F401, registers the baseline
from .splitmixer import SplitMixer, checkpoint_filter_fn

__all__ = ['SplitMixer', 'checkpoint_filter_fn']
__version__ = '0.1.0'
