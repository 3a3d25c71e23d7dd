""" The command line, run as people run it. """
import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import BASELINES, SPLITMIXERS
from PIL import Image, ImageOps

from splitmixer_timm import cli, manifest
from splitmixer_timm.convmixer import ARCHITECTURES
from splitmixer_timm.predict import Classifier, classify, load_image

EXAMPLE = Path(__file__).parent / 'assets' / 'airplane.png'
NAME = 'splitmixer_i_256_8.cifar10'


@pytest.fixture
def run(capsys, monkeypatch):
    def run(*args, stdin=None):
        if stdin is not None:
            monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            status = cli.main([str(arg) for arg in args])
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def folder(tmp_path):
    """ Three images of different kinds, one of them below another folder, a file that is none, and a folder
    that is called as one."""
    folder = tmp_path / 'images'
    (folder / 'below').mkdir(parents=True)
    shutil.copy(EXAMPLE, folder / 'a.png')
    Image.open(EXAMPLE).convert('L').save(folder / 'b.jpg')
    Image.open(EXAMPLE).convert('RGBA').save(folder / 'below' / 'c.WEBP')
    (folder / 'notes.txt').write_text('no image')
    (folder / 'd.png').mkdir()
    return folder


class TestEntryPoints:
    @pytest.mark.parametrize('command', [[sys.executable, '-m', 'splitmixer_timm'], ['splitmixer-timm']])
    def test_commands(self, command):
        if command[0] == 'splitmixer-timm':
            script = Path(sys.executable).with_name('splitmixer-timm')
            if not script.is_file():
                pytest.skip('splitmixer-timm is not installed beside this Python')
            command = [str(script)]
        done = subprocess.run([*command, 'list'], capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stdout.split() == [*ARCHITECTURES]
        done = subprocess.run([*command, 'predict'], capture_output=True, text=True)
        assert done.returncode == 2
        assert 'IMAGE' in done.stderr

    def test_reader_that_goes_away(self):
        """ `splitmixer-timm ... | head -0` ends without a traceback."""
        process = subprocess.Popen(
            [sys.executable, '-m', 'splitmixer_timm', 'list'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        with process.stderr:
            assert process.stderr.read() == b''
        assert process.wait() == 1

    @pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a device that is always full')
    def test_full_disk(self):
        """ Told in a line, and not again by the interpreter at its end."""
        env = {**os.environ, 'PYTHONUNBUFFERED': ''}
        with open('/dev/full', 'w') as full:
            done = subprocess.run(
                [sys.executable, '-m', 'splitmixer_timm', 'list'], env=env, stdout=full, stderr=subprocess.PIPE,
                text=True)
        assert (done.returncode, done.stderr) == (1, 'splitmixer-timm: error: [Errno 28] No space left on device\n')

    @pytest.mark.parametrize(('args', 'status', 'words'), [
        (['list'], 0, ''), (['predict', '-'], 2, 'splitmixer-timm: error: standard input is closed\n')])
    def test_streams_that_are_closed(self, run, monkeypatch, args, status, words):
        """ As `<&- >&-` leaves them: there are none."""
        for name in ('stdin', 'stdout'):
            monkeypatch.setattr(sys, name, None)
        assert run(*args) == (status, '', words)

    def test_output_in_ascii(self, run, tmp_path, monkeypatch):
        """ As with PYTHONIOENCODING=ascii; what it lacks is escaped, in the name of a file that was written too."""
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), 'ascii', write_through=True))
        assert run('recipe', 'cifar10', '--copy', tmp_path / 'é.yaml')[0] == 0
        assert sys.stdout.buffer.getvalue().endswith(b'\\xe9.yaml\n')

    def test_version(self, run):
        status, out, _ = run('--version')
        assert status == 0
        assert out.startswith('splitmixer-timm ')


class TestListAndInfo:
    def test_list(self, run):
        assert set(run('list')[1].split()) == {*SPLITMIXERS, *BASELINES}

    def test_list_pretrained(self, run):
        lines = run('list', '--pretrained')[1].splitlines()
        assert [line.split()[0] for line in lines] == sorted(manifest.entries())
        assert f'{manifest.entries()[NAME]["metrics"]["top1"]:.2f} %' in [x for x in lines if x.startswith(NAME)][0]

    def test_info(self, run):
        status, out, _ = run('info', 'splitmixer_i_256_8')
        assert status == 0
        for words in ('275,834', '65.219 M', '71.8 M', '3 x 32 x 32', 'cifar10: top-1', 'cifar100'):
            assert words in out

    def test_info_json(self, run):
        info = json.loads(run('info', 'splitmixer_iv_256_8_ks7_p7.food101', '--json')[1])
        assert (info['params'], info['num_classes']) == (373_605, 101)
        assert info['input_size'] == [3, 224, 224]
        assert info['arguments']['channel_mixing'] == 'iv'

    @pytest.mark.parametrize(('name', 'words'), [
        ('splitmixer_vi_256_8', 'unknown model'), ('splitmixer_i_256_8.mnist', 'it has cifar10, cifar100'),
        ('resnet18', 'unknown model'),
    ])
    def test_unknown(self, run, name, words):
        status, out, err = run('info', name)
        assert (status, out) == (2, '')
        assert words in err
        assert err.count('\n') == 1


class TestPredict:
    def test_image(self, run):
        status, out, err = run('predict', EXAMPLE)
        lines = out.splitlines()
        assert (status, lines[0], len(lines)) == (0, str(EXAMPLE), 4)
        assert lines[1].split()[1] == 'airplane'
        assert err == ''

    def test_json(self, run):
        status, out, _ = run('predict', EXAMPLE, '--json', '--topk', 99, '--model', NAME)
        answer = json.loads(out)
        assert (status, answer['model']) == (0, NAME)
        predictions = answer['images'][0]['predictions']
        assert [p['label'] for p in predictions][0] == 'airplane'
        assert len(predictions) == 10
        assert sum(p['probability'] for p in predictions) == pytest.approx(1, abs=1e-4)
        assert all(manifest.label_names('cifar10')[p['index']] == p['label'] for p in predictions)

    @pytest.mark.parametrize('batch_size', [1, 2, 64])
    def test_folder(self, run, folder, batch_size):
        _, out, _ = run('predict', folder, '--json', '--batch-size', batch_size)
        names = [Path(image['image']).name for image in json.loads(out)['images']]
        assert names == ['a.png', 'b.jpg', 'c.WEBP']

    def test_batches_do_not_mix(self, run, folder):
        alone = json.loads(run('predict', folder / 'b.jpg', '--json')[1])['images'][0]['predictions']
        among = json.loads(run('predict', folder, '--json')[1])['images'][1]['predictions']
        assert [p['label'] for p in among] == [p['label'] for p in alone]
        assert among[0]['probability'] == pytest.approx(alone[0]['probability'], abs=1e-4)

    def test_stdin_image(self, run):
        status, out, _ = run('predict', '-', stdin=EXAMPLE.read_bytes())
        assert (status, out.splitlines()[0]) == (0, '<stdin>')
        assert 'airplane' in out.splitlines()[1]

    def test_name_that_is_not_text(self, run, folder, monkeypatch):
        """ Any bytes are a name on Linux; the others are answered all the same."""
        path = os.fsencode(folder) + b'/\xff.png'
        try:
            shutil.copy(EXAMPLE, path)
        except OSError:
            pytest.skip('the file system takes no such name')
        monkeypatch.setattr('sys.stdout', io.TextIOWrapper(io.BytesIO(), 'utf-8', 'strict', write_through=True))
        for args, stdin in (([folder], None), (['-'], path + b'\n' + os.fsencode(EXAMPLE))):
            sys.stdout.seek(0)
            sys.stdout.truncate()
            status, _, err = run('predict', *args, '--topk', 1, stdin=stdin)
            assert (status, err) == (0, '')
            out = sys.stdout.buffer.getvalue().decode()
            assert '\\udcff.png\n' in out
            assert out.count('%') == (4 if stdin is None else 2)

    def test_stdin_paths(self, run, folder):
        status, out, _ = run('predict', '-', '--topk', 1, stdin=f'{folder / "a.png"}\n\n{folder / "below"}\n'.encode())
        assert status == 0
        assert out.splitlines()[::2] == [str(folder / 'a.png'), str(folder / 'below' / 'c.WEBP')]

    @pytest.mark.parametrize('character', ['\f', '\x85', '\u2028'], ids=ascii)
    def test_stdin_paths_with_what_ends_lines_of_text(self, run, tmp_path, character):
        image = shutil.copy(EXAMPLE, tmp_path / f'air{character}plane.png')
        status, out, err = run('predict', '-', '--topk', 1, stdin=os.fsencode(image) + b'\r\n')
        assert (status, out.count('%'), err) == (0, 1, '')

    def test_stdin_paths_that_begin_as_an_image(self, run, tmp_path, monkeypatch):
        """ BM are a bitmap's first bytes, of which Pillow says that it is cut off."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'BMW').mkdir()
        shutil.copy(EXAMPLE, 'BMW/photo_1.png')
        status, out, err = run('predict', '-', '--topk', 1, stdin=b'BMW/photo_1.png\nBMW/photo_2.png\n')
        assert (status, err) == (1, 'splitmixer-timm: BMW/photo_2.png: no such file\n')
        assert out.startswith('BMW/photo_1.png\n')

    @pytest.mark.parametrize('data', [b'', b'\x00\xff\x00', b'\x89PNG broken \xff', b'a.png\0b.png\0'])
    def test_stdin_neither(self, run, data):
        status, _, err = run('predict', '-', stdin=data)
        assert status == 2
        assert 'standard input must hold' in err

    def test_others_are_answered_all_the_same(self, run, folder):
        broken = folder / 'broken.png'
        broken.write_bytes(EXAMPLE.read_bytes()[:400])
        images = ['nowhere.png', folder / 'a.png', broken, folder / 'notes.txt', folder / 'b.jpg']
        status, out, err = run('predict', *images)
        assert status == 1
        assert [line for line in out.splitlines() if not line.startswith(' ')] == \
            [str(folder / 'a.png'), str(folder / 'b.jpg')]
        errors = err.splitlines()
        assert len(errors) == 3
        assert errors[0].endswith('nowhere.png: no such file')
        assert 'broken.png' in errors[1]
        assert errors[2].endswith('notes.txt: not a readable image')

    def test_paths_that_cannot_be_looked_at(self, run):
        images = ['x' * 300 + '.png', EXAMPLE]
        status, out, err = run('predict', *images)
        assert status == 1
        assert out.startswith(str(EXAMPLE))
        assert 'too long' in err
        assert err.startswith(f'splitmixer-timm: {images[0]}: ')
        assert err.count(images[0]) == 1

    def test_image_too_large_to_decode(self, run, monkeypatch):
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
        for args, stdin in (([EXAMPLE], None), (['-'], EXAMPLE.read_bytes())):
            status, out, err = run('predict', *args, stdin=stdin)
            assert (status, out) == (1, '')
            assert 'DecompressionBomb' in err

    def test_errors_in_json(self, run):
        status, out, _ = run('predict', 'nowhere.png', EXAMPLE, '--json')
        images = json.loads(out)['images']
        assert status == 1
        assert images[0] == {'image': 'nowhere.png', 'error': 'no such file'}
        assert images[1]['predictions'][0]['label'] == 'airplane'

    @pytest.mark.parametrize('orientation', range(1, 9))
    def test_turned_photo(self, orientation, tmp_path):
        """ A photo that its EXIF data says is turned is seen upright, as by Pillow's own function."""
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(EXAMPLE).convert('RGB').crop((0, 0, 20, 30)).save(tmp_path / 'turned.png', exif=exif)
        with Image.open(tmp_path / 'turned.png') as turned:
            expected = ImageOps.exif_transpose(turned)
        image = load_image(tmp_path / 'turned.png')
        assert (image.size, image.tobytes()) == (expected.size, expected.tobytes())

    def test_turned_photo_with_a_wrong_field(self, run, tmp_path):
        """ One whose EXIF data has a field that Pillow reads but cannot write, here text for a number."""
        upright = Image.open(EXAMPLE).convert('RGB')
        upright.save(tmp_path / 'a.png')
        fields = struct.pack('<HHHL4sHHLL', 2, 0x0100, 2, 4, b'abc', 0x0112, 3, 1, 6)
        upright.transpose(Image.Transpose.ROTATE_90).save(
            tmp_path / 'b.png', exif=b'Exif\0\0II*\0' + struct.pack('<L', 8) + fields + bytes(4))
        status, out, err = run('predict', tmp_path, '--json')
        expected, turned = json.loads(out)['images']
        assert (status, err) == (0, '')
        assert turned['predictions'] == expected['predictions']

    @pytest.mark.parametrize(('mode', 'suffix'), [('I;16', '.png'), ('I;16', '.tif'), ('I;16B', '.tif'), ('I', '.tif')])
    def test_more_than_8_bits(self, run, tmp_path, mode, suffix):
        """ Such an image has the answers of the same one in 8 bits."""
        gray = Image.open(EXAMPLE).convert('L')
        gray.save(tmp_path / 'a.png')
        numbers = np.asarray(gray).astype('>u2' if mode == 'I;16B' else '<i4' if mode == 'I' else '<u2') * 257
        deep = Image.frombytes(mode, gray.size, numbers.astype(numbers.dtype).tobytes())
        deep.save(tmp_path / f'b{suffix}')
        with Image.open(tmp_path / f'b{suffix}') as saved:
            assert saved.mode.startswith('I')
        expected, answers = json.loads(run('predict', tmp_path, '--json')[1])['images']
        assert answers['predictions'] == expected['predictions']

    def test_8_bits_in_32(self, tmp_path):
        gray = Image.open(EXAMPLE).convert('L')
        gray.convert('I').save(tmp_path / 'a.tif')
        assert load_image(tmp_path / 'a.tif').tobytes() == gray.convert('RGB').tobytes()

    def test_dark_16_bits(self, tmp_path):
        """ An image of 16 bits that is nearly black is not taken for one of 8."""
        Image.new('I;16', (8, 8), 200).save(tmp_path / 'a.tif')
        assert load_image(tmp_path / 'a.tif').getextrema() == ((0, 0),) * 3

    @pytest.mark.parametrize(('mode', 'value', 'words'), [
        ('F', 0.5, 'floating point'), ('I', 65_536, 'from 65536 to 65536'), ('I', -1, 'from -1 to -1')])
    def test_no_range_of_values(self, run, tmp_path, mode, value, words):
        Image.new(mode, (32, 32), value).save(tmp_path / 'a.tif')
        status, out, err = run('predict', tmp_path / 'a.tif')
        assert (status, out) == (1, '')
        assert words in err

    def test_model_without_classes(self, run, tmp_path):
        timm.models.save_for_hf(
            timm.create_model('splitmixer_i_256_8', depth=2, num_classes=0), tmp_path, safe_serialization=True)
        status, out, err = run('predict', EXAMPLE, '--model', f'local-dir:{tmp_path}')
        assert (status, out) == (2, '')
        assert 'has no classes' in err

    def test_model_from_elsewhere(self, run, tmp_path):
        """ A fine-tuned model is called by its own name, and its own classes by their number."""
        model = timm.create_model('splitmixer_i_256_8', depth=2, num_classes=4)
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        status, out, _ = run('predict', EXAMPLE, '--json', '--model', f'local-dir:{tmp_path}')
        answer = json.loads(out)
        assert (status, answer['model']) == (0, f'local-dir:{tmp_path}')
        assert {p['label'] for p in answer['images'][0]['predictions']} <= set('0123')
        weights = tmp_path / 'model.safetensors'
        weights.write_bytes(weights.read_bytes()[:-8])
        status, out, err = run('predict', EXAMPLE, '--model', f'local-dir:{tmp_path}')
        assert (status, out) == (2, '')
        assert 'cannot load local-dir' in err

    @pytest.mark.parametrize('names', [list('abc'), list('abcde'), 'abcd'])
    def test_names_of_other_classes(self, tmp_path, names):
        """ As the config of a model of timm's may keep them; ours are built without."""
        model = timm.create_model('test_resnet', num_classes=4)
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        config = json.loads((tmp_path / 'config.json').read_text())
        for given, labels in ((list('abcd'), tuple('abcd')), (names, None)):
            (tmp_path / 'config.json').write_text(json.dumps({**config, 'label_names': given}))
            assert Classifier(f'local-dir:{tmp_path}').labels == labels

    def test_batches(self):
        """ Of no more images than asked for, whatever there are, and nothing is kept for gradients."""
        classifier = Classifier(NAME)
        seen = []
        classifier.model.register_forward_pre_hook(
            lambda model, args: seen.append((len(args[0]), torch.is_grad_enabled())))
        assert len(list(classify(classifier, [EXAMPLE] * 5, topk=1, batch_size=2))) == 5
        assert seen == [(2, False), (2, False), (1, False)]

    def test_inputs_are_on_the_device(self):
        classifier = Classifier(NAME, 'meta')
        seen = []
        classifier.model.register_forward_pre_hook(lambda model, args: seen.append(args[0].device.type))
        with pytest.raises(RuntimeError):  # there are no answers on it
            list(classify(classifier, [EXAMPLE], topk=1, batch_size=1))
        assert seen == ['meta']

    def test_gray_model(self, run, tmp_path):
        timm.models.save_for_hf(
            timm.create_model('splitmixer_i_256_8', depth=2, in_chans=1), tmp_path, safe_serialization=True)
        status, _, err = run('predict', EXAMPLE, '--model', f'local-dir:{tmp_path}')
        assert status == 2
        assert '1 channels, not RGB' in err

    @pytest.mark.parametrize(('args', 'words'), [
        (['--model', 'splitmixer_3d_256_8'], 'splitmixer_3d_256_8.cifar10 has no weights; '),
        (['--model', 'nonesuch'], "unknown model 'nonesuch'"),
        (['--model', 'splitmixer_i_256_8.mnist'], "unknown tag 'mnist' of splitmixer_i_256_8; it has "),
        (['--model', 'local-dir:nowhere'], 'nowhere'),
        (['--topk', '0'], 'at least 1'),
        (['--device', 'warp'], "error: --device: device must be 'cuda', 'cuda:N', 'cpu' or 'mps', got 'warp'"),
        (['--device', 'cuda:99'], "error: --device: device 'cuda:99' asked for, but "),
        (['--device', 'meta'], 'failed on meta'),
        ([''], "IMAGE must be a file, a folder or -, got ''"),
        (['https://user:secret@example.org/a.png'], 'error: IMAGE must be a file, a folder or -, not a URL'),
    ])
    def test_bad_requests(self, run, args, words):
        status, out, err = run('predict', EXAMPLE, *args)
        assert (status, out) == (2, '')
        assert words in err
        assert 'Traceback' not in err

    def test_empty_folder(self, run, tmp_path):
        status, _, err = run('predict', tmp_path)
        assert status == 2
        assert 'no image found' in err


class TestVerify:
    def test_device_that_is_not_there(self, run, tmp_path):
        """ Told before anything is read."""
        status, out, err = run('verify', '--data', tmp_path, '--device', 'cuda:99')
        assert (status, out) == (2, '')
        assert "--device: device 'cuda:99' asked for, but " in err

    def test_bundled(self, run):
        status, out, _ = run('verify')
        assert status == 0
        assert [line.split()[:2] for line in out.splitlines()] == [['ok', name] for name in sorted(manifest.entries())]

    def test_output_that_fails(self, run, monkeypatch):
        """ A full disk under standard output is told as such, not as a damaged file."""
        class Full(io.StringIO):
            refused = 0

            def write(self, text):
                self.refused += 1
                if self.refused == 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(text)

        monkeypatch.setattr(sys, 'stdout', Full())
        status, _, err = run('verify')
        assert (status, sys.stdout.getvalue()) == (1, '')
        assert err == f'splitmixer-timm: error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n'

    def test_damage(self, run, tmp_path, monkeypatch):
        source = manifest.WEIGHTS_DIR
        monkeypatch.setattr(manifest, 'WEIGHTS_DIR', tmp_path)
        status, out, _ = run('verify')
        assert status == 1
        assert out.startswith('missing')
        monkeypatch.setitem(manifest.entries()[NAME], 'url', 'https://example.org/weights')
        status, out, _ = run('verify')
        assert f'absent  {NAME}  not bundled' in out
        file = manifest.entries()[NAME]['file']
        (tmp_path / file).write_bytes((source / file).read_bytes()[:-1])
        (tmp_path / 'stray.safetensors').write_bytes(b'')
        status, out, _ = run('verify')
        assert status == 1
        assert f'FAILED  {NAME}  Weights of {NAME} refused' in out
        assert 'stray.safetensors  not in the manifest' in out
        assert 'accuracy' not in out
        status, out, _ = run('verify', '--data', tmp_path)
        assert status == 1
        assert out.endswith('accuracy is not measured where files failed\n')
