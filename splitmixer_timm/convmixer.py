""" The baseline of the SplitMixer paper: ConvMixer-256/8 on timm's own class.

Paper: `Patches Are All You Need?` - https://arxiv.org/abs/2201.09792
"""
from timm.models import ConvMixer, register_model

from . import splitmixer
from .splitmixer import CIFAR, SQUASHED, create_variant, generate_variant_cfgs, resolve_act_layer

__all__ = []

VARIANTS = {
    'convmixer_256_8': (dict(dim=256, depth=8, kernel_size=5, patch_size=2), CIFAR),
    'convmixer_256_8_ks7_p7': (dict(dim=256, depth=8, kernel_size=7, patch_size=7), SQUASHED),
}
ARCHITECTURES = {**splitmixer.VARIANTS, **VARIANTS}  # all of this package

default_cfgs = generate_variant_cfgs(
    VARIANTS,
    paper_ids='arXiv:2201.09792',
    paper_name='Patches Are All You Need?',
    origin_url='https://arxiv.org/abs/2201.09792',
)


def _create(variant: str, pretrained: bool, **kwargs) -> ConvMixer:
    if 'act_layer' in kwargs:
        kwargs['act_layer'] = resolve_act_layer(kwargs['act_layer'])  # timm's class takes no names
    return create_variant(ConvMixer, variant, pretrained, **{**VARIANTS[variant][0], **kwargs})


@register_model
def convmixer_256_8(pretrained: bool = False, **kwargs) -> ConvMixer:
    """ ConvMixer-256/8, 5 x 5 kernels and 2 x 2 patches, for 32 x 32 images."""
    return _create('convmixer_256_8', pretrained, **kwargs)


@register_model
def convmixer_256_8_ks7_p7(pretrained: bool = False, **kwargs) -> ConvMixer:
    """ ConvMixer-256/8, 7 x 7 kernels and 7 x 7 patches, for 224 x 224 images."""
    return _create('convmixer_256_8_ks7_p7', pretrained, **kwargs)
