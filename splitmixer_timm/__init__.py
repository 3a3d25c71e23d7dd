""" SplitMixer for timm: importing this package registers its models with `timm.create_model`."""
__version__ = '0.1.0'

from . import convmixer  # noqa: E402, F401, registers the baseline
from .fused_training import fuse_for_training  # noqa: E402
from .hub import HubError, pull_from_hub, push_to_hub  # noqa: E402
from .inference import optimize_for_inference  # noqa: E402
from .splitmixer import SplitMixer, checkpoint_filter_fn  # noqa: E402

__all__ = [
    'HubError', 'SplitMixer', 'checkpoint_filter_fn', 'fuse_for_training', 'optimize_for_inference', 'pull_from_hub',
    'push_to_hub']
