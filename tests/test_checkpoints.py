""" `checkpoint_filter_fn`: public layouts in, strict loads and equal outputs out. """
import pytest
import reference
import timm
import torch
from reference import randomize

import splitmixer_timm
from splitmixer_timm import SplitMixer, checkpoint_filter_fn

LAYOUTS = {
    'package-i': (lambda: reference.Package('i', 24, 4), dict(channel_mixing='i')),
    'package-ii': (lambda: reference.Package('ii', 24, 4, s=3), dict(channel_mixing='ii', num_segments=3)),
    'package-iii': (lambda: reference.Package('iii', 24, 4), dict(channel_mixing='iii')),
    'package-iv': (lambda: reference.Package('iv', 24, 4, s=5), dict(channel_mixing='iv', num_segments=5)),
    'package-v': (lambda: reference.Package('v', 24, 4), dict(channel_mixing='v')),
    'package-convmixer': (
        lambda: reference.Package('full', 24, 4, two_d=True), dict(spatial_mixing='2d', channel_mixing='full')),
    'package-2d-i': (lambda: reference.Package('i', 24, 4, two_d=True), dict(spatial_mixing='2d')),
    'package-1d-full': (lambda: reference.Package('full', 24, 4), dict(channel_mixing='full')),
    'package-3d': (lambda: reference.Package3d(24, 4), dict(channel_mixing='3d')),
    'flat-i': (lambda: reference.flat('i', 24, 4), dict(channel_mixing='i')),
    'flat-ii': (lambda: reference.flat('ii', 24, 4), dict(channel_mixing='ii')),
    'flat-iii': (lambda: reference.flat('iii', 24, 4), dict(channel_mixing='iii')),
    'timm-convmixer': (
        lambda: timm.models.ConvMixer(24, 4, 5, 2, num_classes=10), dict(spatial_mixing='2d', channel_mixing='full')),
}
WRAPPINGS = {
    'bare': lambda sd: sd,
    'module': lambda sd: {f'module.{k}': v for k, v in sd.items()},
    'compiled': lambda sd: {f'_orig_mod.{k}': v for k, v in sd.items()},
    'train.py': lambda sd: {'epoch': 3, 'arch': 'x', 'state_dict': sd, 'optimizer': {}},
    'train.py, EMA': lambda sd: {
        'state_dict': {k: torch.zeros_like(v) for k, v in sd.items()},
        'state_dict_ema': {f'module.{k}': v for k, v in sd.items()}},
    'DeiT, EMA': lambda sd: {'model': {k: torch.zeros_like(v) for k, v in sd.items()}, 'model_ema': sd},
}


@pytest.mark.parametrize('wrapping', WRAPPINGS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_public_layouts(layout, wrapping, images):
    build, model_args = LAYOUTS[layout]
    expected = randomize(build())
    model = SplitMixer(24, 4, num_classes=10, **model_args).eval()
    state_dict = checkpoint_filter_fn(WRAPPINGS[wrapping](expected.state_dict()), model)
    model.load_state_dict(state_dict, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('layout', ['package-convmixer', 'timm-convmixer', 'own'])
def test_convmixer(layout, images):
    """ The baseline takes the same checkpoints as the SplitMixer that is a ConvMixer, and that one's."""
    model_args = LAYOUTS['package-convmixer'][1]
    expected = randomize(SplitMixer(24, 4, num_classes=10, **model_args) if layout == 'own' else LAYOUTS[layout][0]())
    model = timm.models.ConvMixer(24, 4, 5, 2, num_classes=10).eval()
    model.load_state_dict(checkpoint_filter_fn(expected.state_dict(), model), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match='does not fit ConvMixer'):
        checkpoint_filter_fn(reference.Package('i', 24, 4).state_dict(), model)


def test_convmixer_through_create_model(tmp_path, images):
    expected = randomize(reference.Package('full', 256, 8, two_d=True))
    torch.save(expected.state_dict(), tmp_path / 'published.pth')
    overlay = dict(file=str(tmp_path / 'published.pth'))
    model = timm.create_model('convmixer_256_8', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images), rtol=1e-4, atol=1e-4)


def test_public_key_names():
    """ The references that stand for public checkpoints name their modules as those do."""
    assert {'patch_emb.0.weight', 'patch_emb.2.running_mean', 'mixer_blocks.0.fn.5.bias', 'mixer_blocks.1.2.weight',
            'mixer_blocks.3.0.mixer.weight', 'head.weight'} <= reference.Package('i', 24, 2).state_dict().keys()
    assert 'mixer_blocks.1.0.mixer.1.weight' in reference.Package('iv', 24, 2).state_dict()
    assert 'mixer_blocks.3.0.mixer2.bias' in reference.Package('v', 24, 2).state_dict()
    assert {'mixer_blocks.0.fn.2.weight', 'mixer_blocks.1.0.weight', 'mixer_blocks.1.2.bias'} <= \
        reference.Package('full', 24, 1, two_d=True).state_dict().keys()
    sd = reference.Package3d(24, 2).state_dict()
    assert {'spatial_mixer.1.fn.3.weight', 'channel_mixer.1.3.bias', 'head.2.weight'} <= sd.keys()
    assert sd['channel_mixer.0.0.weight'].shape == (12, 1, 16, 1, 1)
    assert {'0.weight', '2.weight', '3.0.fn.0.weight', '4.1.mixer.bias', '4.3.running_var', '7.weight'} <= \
        reference.flat('i', 24, 2).state_dict().keys()


def test_own_names_pass_unchanged():
    model = SplitMixer(24, 2)
    state_dict = model.state_dict()
    filtered = checkpoint_filter_fn(state_dict, model)
    assert list(filtered) == list(state_dict)
    assert all(filtered[k] is state_dict[k] for k in filtered)


def test_activation_with_weights():
    model = SplitMixer(24, 2, act_layer='prelu')
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
    with pytest.raises(RuntimeError, match=r'without weights: .*blocks\.0\.spatial_mixing\.act1'):
        checkpoint_filter_fn(reference.Package('i', 24, 2).state_dict(), model)


def test_loads_through_create_model(tmp_path, images):
    """ A public checkpoint is a weights file like any other, in_chans and num_classes adapted."""
    expected = randomize(reference.Package('i', 256, 8))
    path = tmp_path / 'published.pth'
    torch.save({'state_dict': {f'module.{k}': v for k, v in expected.state_dict().items()}}, path)
    overlay = dict(file=str(path))
    model = timm.create_model('splitmixer_i_256_8', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images), rtol=1e-4, atol=1e-4)
    gray = timm.create_model(
        'splitmixer_i_256_8', pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=5)
    torch.testing.assert_close(gray.stem[0].weight, expected.patch_emb[0].weight.sum(1, keepdim=True))
    assert gray.head.out_features == 5
    # as train.py's --pretrained-path has it: a new head, for the classes of the model's own data set
    tuned = timm.create_model(
        'splitmixer_i_256_8', pretrained=True, pretrained_cfg_overlay=dict(overlay, num_classes=-1))
    assert tuned.head.out_features == tuned.num_classes == 10
    torch.testing.assert_close(tuned.stem[0].weight, expected.patch_emb[0].weight)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_without_classifier(layout, images):
    """ A model without a classifier takes a checkpoint with one, as timm's loader drops it after the renaming."""
    build, model_args = LAYOUTS[layout]
    expected = randomize(build())
    classifier = SplitMixer(24, 4, num_classes=10, **model_args).eval()
    classifier.load_state_dict(checkpoint_filter_fn(expected.state_dict(), classifier))
    model = SplitMixer(24, 4, num_classes=0, **model_args).eval()
    state_dict = checkpoint_filter_fn(expected.state_dict(), model)
    assert {'head.weight', 'head.bias'} <= state_dict.keys()
    features = {k: v for k, v in state_dict.items() if not k.startswith('head.')}
    model.load_state_dict(checkpoint_filter_fn(features, model), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(classifier.head(model(images)), expected(images), rtol=1e-5, atol=1e-5)


class TestOwnNames:
    """ Whether all must fit is up to whoever loads."""

    @pytest.mark.parametrize('depth', [1, 3])
    def test_other_depth(self, depth):
        theirs, model = SplitMixer(24, 2), SplitMixer(24, depth)
        state_dict = checkpoint_filter_fn(theirs.state_dict(), model)
        with pytest.raises(RuntimeError, match=r'blocks\.[12]\.'):
            model.load_state_dict(state_dict)
        model.load_state_dict(state_dict, strict=False)
        assert torch.equal(model.blocks[0].channel_mixing.mixer.conv.weight,
                           theirs.blocks[0].channel_mixing.mixer.conv.weight)

    def test_shallower_of_the_zoo(self):
        model = timm.create_model('splitmixer_i_256_8', pretrained=True, depth=4, pretrained_strict=False)
        whole = timm.create_model('splitmixer_i_256_8', pretrained=True)
        assert len(model.blocks) == 4
        assert torch.equal(model.blocks[3].spatial_mixing.conv1.weight, whole.blocks[3].spatial_mixing.conv1.weight)


    @pytest.mark.parametrize('kwargs', [
        dict(depth=12), dict(depth=4), dict(channel_mixing='v'), dict(channel_mixing='none'),
        dict(spatial_mixing='none')])
    def test_another_number_of_classes_hides_nothing(self, kwargs):
        """ timm loads no longer strictly then."""
        with pytest.raises(RuntimeError, match='Checkpoint does not fit SplitMixer'):
            timm.create_model('splitmixer_i_256_8', pretrained=True, num_classes=5, **kwargs)


class TestUnknown:
    def test_foreign_model(self):
        state_dict = timm.create_model('resnet18', device='meta').state_dict()
        with pytest.raises(RuntimeError, match='not recognised: bn1, conv1.*in all.*without weights: stem.0'):
            checkpoint_filter_fn(state_dict, SplitMixer(24, 2))

    def test_only_a_stem_in_common(self):
        state_dict = timm.create_model('convnext_atto', device='meta').state_dict()
        with pytest.raises(RuntimeError, match='Known layouts'):
            checkpoint_filter_fn(state_dict, SplitMixer(24, 2))

    def test_names_without_a_dot(self):
        state_dict = {'cls_token': torch.zeros(1), 'net': {'stem.0.weight': torch.zeros(1)}, 'epoch': 3}
        with pytest.raises(RuntimeError, match='not recognised: cls_token, epoch, net'):
            checkpoint_filter_fn(state_dict, SplitMixer(24, 2))

    def test_other_depth(self):
        with pytest.raises(RuntimeError, match=r'not recognised: mixer_blocks\.4\.fn\.0'):
            checkpoint_filter_fn(reference.Package('i', 24, 3).state_dict(), SplitMixer(24, 2))

    def test_missing_module(self):
        state_dict = {k: v for k, v in reference.Package('i', 24, 2).state_dict().items()
                      if not k.startswith('mixer_blocks.1.0')}
        with pytest.raises(RuntimeError, match=r'without weights: mixer_blocks\.1\.0\.mixer'):
            checkpoint_filter_fn(state_dict, SplitMixer(24, 2))

    def test_other_type(self):
        with pytest.raises(RuntimeError, match=r'mixer_blocks\.1\.0\.mixer1'):
            checkpoint_filter_fn(reference.Package('v', 24, 2).state_dict(), SplitMixer(24, 2))

    def test_other_width(self):
        model = SplitMixer(24, 2)
        with pytest.raises(RuntimeError, match='size mismatch for stem.0.weight'):
            model.load_state_dict(checkpoint_filter_fn(reference.Package('i', 30, 2).state_dict(), model))


def test_exported_at_top_level():
    assert splitmixer_timm.checkpoint_filter_fn is checkpoint_filter_fn
