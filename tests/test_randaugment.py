""" torchvision's RandAugment in timm's pipeline of training images."""
import importlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform
from torchvision import transforms

from splitmixer_timm import randaugment
from splitmixer_timm.run import environment


def _policy(aa):
    """ What timm makes of a policy."""
    pipeline = create_transform(32, is_training=True, auto_augment=aa, scale=(1., 1.), ratio=(1., 1.)).transforms
    return pipeline[2]  # after the crop and the flip


def test_images_are_torchvisions():
    """ Those of the same random numbers, whatever sizes take turns."""
    ours = randaugment.torchvision_rand_augment('torchvision-m12-n2')
    theirs = transforms.RandAugment(num_ops=2, magnitude=12)
    noise = np.random.default_rng(0)
    for seed, (width, height) in enumerate([(32, 32), (32, 24), (17, 32), (32, 32)] * 50):
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert ours(image) == expected


def test_tables():
    """ One is kept until images of another size come, so that sizes of any number take no memory."""
    ours = randaugment.torchvision_rand_augment('torchvision-m12-n2')
    first, again, other = (ours._augmentation_space(31, (size, 32)) for size in (32, 32, 64))
    assert first is again
    assert not torch.equal(first['TranslateY'][0], other['TranslateY'][0])
    assert ours._space == ((31, (64, 32)), other)


def test_of_timms_pipeline():
    policy = _policy('torchvision-m7-n3')
    assert type(policy) is randaugment.RandAugment
    assert (policy.num_ops, policy.magnitude, policy.num_magnitude_bins) == (3, 7, 31)
    assert (policy.interpolation, policy.fill) == (transforms.InterpolationMode.NEAREST, None)


@pytest.mark.parametrize(('aa', 'kind'), [
    ('rand-m9-mstd0.5-inc1', auto_augment.RandAugment), ('original-mstd0.5', auto_augment.AutoAugment),
    ('augmix-m5-w4-d2', auto_augment.AugMixAugment)])
def test_timms_policies_stay(aa, kind):
    assert type(_policy(aa)) is kind


def test_goes_to_other_processes(tmp_path):
    """ As to data loaders that are not forked, which have not imported anything."""
    file = tmp_path / 'policy'
    file.write_bytes(pickle.dumps(_policy('torchvision-m12-n2')))
    code = 'import pickle, sys; print(pickle.load(open(sys.argv[1], "rb")))'
    done = subprocess.run(
        [sys.executable, '-c', code, file], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == repr(transforms.RandAugment(num_ops=2, magnitude=12))


@pytest.mark.parametrize('aa', [
    'torchvision', 'torchvision-m12', 'torchvision-n2', 'torchvision-m31-n2', 'torchvision-m12-n0',
    'torchvision-m12-n2-p0.5', 'torchvision-m1.5-n2', 'torchvision-m\u0663-n2', 'torchvision-m-1-n2',
    'torchvision-n2-m12', 'torchvisionm12-n2'])
def test_unknown_policies(aa):
    with pytest.raises(ValueError, match=rf"aa must be 'torchvision-mM-nN', M from 0 to 30 .* got '{aa}'"):
        _policy(aa)


def test_only_where_it_is_asked_for():
    """ The package alone leaves timm as it is."""
    code = (
        'import splitmixer_timm; from timm.data import transforms_factory, auto_augment; '
        'assert transforms_factory.auto_augment_transform is auto_augment.auto_augment_transform; '
        'import splitmixer_timm.randaugment; '
        'assert transforms_factory.auto_augment_transform is not auto_augment.auto_augment_transform')
    subprocess.run([sys.executable, '-c', code], check=True, env=environment())


def test_again():
    """ A second import in a notebook does not lose timm's policies."""
    importlib.reload(randaugment)
    assert type(_policy('original')) is auto_augment.AutoAugment
    assert type(_policy('torchvision-m12-n2')) is randaugment.RandAugment
