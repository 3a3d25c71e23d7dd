""" SplitMixer for timm: importing this package registers its models with `timm.create_model`."""
from typing import TYPE_CHECKING

__version__ = '0.1.0'

from . import convmixer  # noqa: E402, F401, registers the baseline
from .hub import HubError, pull_from_hub, push_to_hub  # noqa: E402
from .inference import optimize_for_inference  # noqa: E402
from .splitmixer import SplitMixer, checkpoint_filter_fn  # noqa: E402

if TYPE_CHECKING:
    from .fused_training import fuse_for_training


def __getattr__(name):
    if name == 'fuse_for_training':
        from .fused_training import fuse_for_training  # Triton takes its time to import

        return fuse_for_training
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted({*globals(), *__all__})


__all__ = [
    'HubError', 'SplitMixer', 'checkpoint_filter_fn', 'fuse_for_training', 'optimize_for_inference', 'pull_from_hub',
    'push_to_hub']
