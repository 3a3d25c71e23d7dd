""" The manifest's figures, measured again on the real test sets. """
import shutil

import pytest
import timm
import torch
from conftest import HAS_COMPILER, real_images
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import nn

from splitmixer_timm import SplitMixer, cli, manifest, optimize_for_inference
from splitmixer_timm.evaluate import Accuracy, evaluate
from splitmixer_timm.machine import has_bfloat16

pytestmark = pytest.mark.data
NAME = 'splitmixer_i_256_8.cifar10'


@pytest.fixture(scope='module')
def test_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'cifar10'
    return real_images('cifar10', folder, splits=('validation',)) / 'validation'


class Compared(nn.Module):
    """ A model that on its way compares its answers with those of its optimized forms."""

    def __init__(self, model):
        super().__init__()
        self.model, self.num_classes, self.pretrained_cfg = model, model.num_classes, model.pretrained_cfg
        forms = (False, True) if HAS_COMPILER else (False,)
        self.fast = [optimize_for_inference(model.eval(), compile=form) for form in forms]
        self.halves = [
            optimize_for_inference(model, dtype=torch.bfloat16, compile=form) for form in forms if has_bfloat16()]
        self.others = [0] * len(self.halves)
        self.seen = 0

    def forward(self, images):
        expected = self.model(images)
        for fast in self.fast:
            logits = fast(images)
            assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
            assert torch.equal(logits.argmax(1), expected.argmax(1))
        for i, half in enumerate(self.halves):
            self.others[i] += (half(images).argmax(1) != expected.argmax(1)).sum().item()
        self.seen += len(images)
        return expected


def test_whole_official_test_set(test_set, monkeypatch):
    """ The first weights' top-1 and top-5 on all 10,000 images are those of the manifest. `optimize_for_inference` has
    the same answers, compiled and not, and all but the same logits; in bf16, where the processor computes in it, 99.5 %
    of the same."""
    compared = []

    def create_model(name, pretrained):
        compared.append(Compared(timm.create_model(name, pretrained=pretrained)))
        return compared[0]

    monkeypatch.setattr('splitmixer_timm.evaluate.create_model', create_model)
    measured = evaluate(NAME, test_set)
    expected = manifest.entries()[NAME]['metrics']
    assert measured.images == expected['images'] == 10_000
    assert measured.top1 == pytest.approx(expected['top1'], abs=cli.TOLERANCE)
    assert measured.top5 == pytest.approx(expected['top5'], abs=cli.TOLERANCE)
    assert measured.top1 >= 80
    assert compared[0].seen == 10_000
    assert all(0 < other <= 50 for other in compared[0].others)


def test_full_precision(tmp_path, monkeypatch):
    """ No TF32, which torch allows convolutions on CUDA by itself; afterwards all is as it was."""
    def precisions():
        backends = torch.backends
        parts = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
        return tuple(part.fp32_precision for part in parts)

    def answer(self, x):
        seen.append(precisions())
        return torch.zeros(len(x), 10)

    images = real_images('cifar10', tmp_path / 'cifar10', 5, ('validation',)) / 'validation'
    monkeypatch.setattr(SplitMixer, 'forward', answer)
    before, asked = precisions(), torch.get_float32_matmul_precision()
    try:
        for precision in ('highest', 'high'):
            torch.set_float32_matmul_precision(precision)
            now, seen = precisions(), []
            evaluate(NAME, images, batch_size=25)
            assert set(seen) == {('ieee',) * 4}
            assert precisions() == now
            assert torch.get_float32_matmul_precision() == precision
        assert now != before
    finally:
        torch.set_float32_matmul_precision(asked)


class TestVerifyData:
    """ `splitmixer-timm verify --data`."""

    @pytest.fixture
    def metrics(self, tmp_path_factory, monkeypatch):
        """ The zoo with the first weights alone, whose figures can be set."""
        entry = {**manifest.entries()[NAME], 'metrics': {}}
        zoo = tmp_path_factory.mktemp('weights')
        shutil.copy(manifest.WEIGHTS_DIR / entry['file'], zoo)
        monkeypatch.setattr(manifest, 'WEIGHTS_DIR', zoo)
        monkeypatch.setattr(manifest, 'load_manifest', lambda: {'models': {NAME: entry}})
        return entry['metrics']

    def test_agrees_and_differs(self, tmp_path, metrics, capsys):
        folder = real_images('cifar10', tmp_path / 'cifar10', 5, ('validation',)).parent
        measured = evaluate(NAME, folder / 'cifar10' / 'validation')
        assert measured.images == 50
        metrics.update(top1=measured.top1, top5=measured.top5, images=50)
        assert cli.main(['verify', '--data', str(folder)]) == 0
        out = capsys.readouterr().out
        assert f'ok      {NAME}  top-1 {measured.top1:.2f} % of 50 images' in out
        assert out.endswith('1 of 1 models measured\n')
        metrics['top1'] = measured.top1 + 0.1
        assert cli.main(['verify', '--data', str(folder)]) == 1
        assert f'FAILED  {NAME}  top-1' in capsys.readouterr().out
        metrics.update(top1=measured.top1, images=51)
        assert cli.main(['verify', '--data', str(folder)]) == 1

    def test_no_data(self, tmp_path, capsys):
        assert cli.main(['verify', '--data', str(tmp_path)]) == 2
        assert str(tmp_path / 'cifar10' / 'validation') in capsys.readouterr().err

    @pytest.mark.parametrize('tag', ['', '.flowers102'])
    def test_classes_in_another_order(self, tmp_path, tag):
        for name in manifest.label_names('flowers102'):
            folder = tmp_path / 'flowers102' / 'validation' / name
            folder.mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(folder / '0.png')
        with pytest.raises(ValueError, match='name them by number'):
            evaluate(f'splitmixer_i_256_8_ks7_p7{tag}', tmp_path / 'flowers102' / 'validation')

    @pytest.mark.parametrize('damage', ['no image', 'a part', 'a link to nothing', 'too large'])
    def test_damaged_image(self, tmp_path, monkeypatch, damage):
        """ timm would take the next one once more in place of it."""
        for name in manifest.label_names('cifar10'):
            (tmp_path / name).mkdir()
            Image.effect_noise((32, 32), 50).save(tmp_path / name / '0.png')
        file = tmp_path / 'cat' / '0.png'
        if damage == 'a link to nothing':
            file.unlink()
            file.symlink_to(tmp_path / 'nothing')
        elif damage == 'too large':  # for which Pillow has an error of its own
            monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 32 * 32)
            Image.new('RGB', (64, 64)).save(file)
        else:
            file.write_bytes(b'none' if damage == 'no image' else file.read_bytes()[:400])
        for workers in (0, 1):
            with pytest.raises(RuntimeError) as error:
                evaluate(NAME, tmp_path, workers=workers)
            assert str(error.value).startswith(f'{file} cannot be read: ')
            assert '\n' not in str(error.value)

    def test_other_classes(self, tmp_path, metrics, capsys):
        folder = real_images('cifar100', tmp_path / 'cifar100', 1, ('validation',)).parent
        (folder / 'cifar100').rename(folder / 'cifar10')
        assert cli.main(['verify', '--data', str(folder)]) == 1
        out = capsys.readouterr().out
        assert f'FAILED  {NAME}  not measured: data_dir must have 10 class folders' in out
        assert out.endswith('0 of 1 models measured, 1 failed\n')

    @pytest.mark.parametrize('count', [9, 11])
    def test_number_of_classes(self, tmp_path, count):
        for n in range(count):
            (tmp_path / str(n)).mkdir()
            Image.new('RGB', (32, 32)).save(tmp_path / str(n) / '0.png')
        with pytest.raises(ValueError, match=f'must have 10 class folders for {NAME}, got {count}'):
            evaluate(NAME, tmp_path)

    def test_images_are_on_the_device(self, tmp_path, monkeypatch):
        seen = []

        def answer(self, x):
            seen.append(x.device.type)
            return torch.zeros(len(x), 10)

        monkeypatch.setattr(SplitMixer, 'forward', answer)
        for name in manifest.label_names('cifar10'):
            (tmp_path / name).mkdir()
            Image.new('RGB', (32, 32)).save(tmp_path / name / '0.png')
        evaluate(NAME, tmp_path, 'meta', workers=0)
        assert seen == ['meta']

    def test_little_shared_memory(self, tmp_path):
        """ A limit for files, which is one for it as well on Linux, stands for a container that has little of it."""
        resource = pytest.importorskip('resource')
        for name in manifest.label_names('cifar10'):
            (tmp_path / name).mkdir()
            for n in range(2):
                Image.new('RGB', (32, 32)).save(tmp_path / name / f'{n}.png')
        before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, most))
        try:
            assert evaluate(NAME, tmp_path).images == 20
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))

    def test_files_are_closed(self, tmp_path, monkeypatch):
        files = []
        read = ReaderImageFolder.__getitem__

        def recorded(self, index):
            file, target = read(self, index)
            files.append(file)
            return file, target

        monkeypatch.setattr(ReaderImageFolder, '__getitem__', recorded)
        for name in manifest.label_names('cifar10'):
            (tmp_path / name).mkdir()
            Image.new('RGB', (32, 32)).save(tmp_path / name / '0.png')
        assert evaluate(NAME, tmp_path, workers=0).images == 10
        assert [file.closed for file in files] == [True] * 10

    @pytest.mark.parametrize('batch_size', [30, 7])
    def test_a_constant_answer_is_chance(self, tmp_path, monkeypatch, batch_size):
        """ Counting is by label: a model that always says the same is right for one class in ten, whatever is left for
        the last batch."""
        class Constant(torch.nn.Module):
            num_classes = 10
            pretrained_cfg = dict(input_size=(3, 32, 32))

            def forward(self, x):
                assert not self.training
                assert not torch.is_grad_enabled()
                return torch.arange(10.).flip(0).expand(len(x), 10)

        monkeypatch.setattr('splitmixer_timm.evaluate.create_model', lambda *args, **kwargs: Constant())
        for name in manifest.label_names('cifar10'):
            (tmp_path / name).mkdir()
            for n in range(3):
                Image.new('RGB', (32, 32)).save(tmp_path / name / f'{n}.png')
        measured = evaluate('constant', tmp_path, batch_size=batch_size, workers=0)
        assert measured == Accuracy(top1=pytest.approx(10.), top5=pytest.approx(50.), images=30)
