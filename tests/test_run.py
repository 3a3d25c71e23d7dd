""" `python -m splitmixer_timm.run`: scripts run as they are, with the models registered. """
import csv
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from splitmixer_timm.run import main

SCRIPTS = os.environ.get('SPLITMIXER_TIMM_SCRIPTS')
SCRIPT = """
import sys, timm, helper
print(__name__, sys.argv[1:], timm.is_model('splitmixer_i_256_8'), helper.VALUE)
if 'fail' in sys.argv:
    sys.exit(3)
"""


def run(*args, cwd=None, launcher=('-m', 'splitmixer_timm.run'), paths=(ROOT,)):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, paths))}
    command = [sys.executable, *launcher, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'helper.py').write_text('VALUE = "beside it"')
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return path


def test_runs_as_main_with_its_arguments(script):
    done = run(script, '--lr', 0.1, 'x y')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == "__main__ ['--lr', '0.1', 'x y'] True beside it\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason='Python has no safe mode')
def test_safe_path(script, monkeypatch):
    """ As in Python's own safe mode: no folder of the script's, and every other place."""
    monkeypatch.setenv('PYTHONSAFEPATH', '1')
    assert "No module named 'helper'" in run(script).stderr
    (script.parent / 'lib').mkdir()
    (script.parent / 'helper.py').rename(script.parent / 'lib' / 'helper.py')
    done = run(script, paths=[script.parent / 'lib', ROOT])
    assert (done.returncode, done.stderr) == (0, '')
    assert 'beside it' in done.stdout


def test_exit_status_is_the_scripts(script):
    assert run(script, 'fail').returncode == 3


def test_under_torchrun(script):
    done = run(script, '--epochs', 1, launcher=(
        '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '-m', 'splitmixer_timm.run'))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("__main__ ['--epochs', '1'] True beside it") == 2


@pytest.mark.skipif(
    not SCRIPTS or not os.path.isfile(os.path.join(SCRIPTS, 'bulk_runner.py')),
    reason="SPLITMIXER_TIMM_SCRIPTS does not name a folder with timm's bulk_runner.py")
def test_bulk_runner(tmp_path):
    """ Every process that it starts has the models, and its results are those of each."""
    done = run(
        os.path.join(SCRIPTS, 'bulk_runner.py'), '--model-list', 'splitmixer_ii*_256_8', '--results-file',
        'results.csv', '--module', 'yes', 'splitmixer_timm.run', os.path.join(SCRIPTS, 'benchmark.py'), '--bench',
        'inference', '--device', 'cpu', '--batch-size', 2, '--num-warm-iter', 1, '--num-bench-iter', 10, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / 'results.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [(row['model'], row['param_count']) for row in rows] == [
        ('splitmixer_ii_256_8', '0.18'), ('splitmixer_iii_256_8', '0.18')]
    assert all(float(row['infer_samples_per_sec']) > 0 for row in rows)


@pytest.mark.parametrize('content', [b'not python {', b'\x00\xff\xfe', None])
def test_no_script(tmp_path, content, capsys):
    path = tmp_path / 'script.py'
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('splitmixer_timm.run: error: ')
    assert str(path) in err
    assert err.count('\n') == 1


def test_folder_and_help(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert 'cannot read script' in capsys.readouterr().err
    assert main([]) == 2
    assert 'SCRIPT [ARGS...]' in capsys.readouterr().err
    assert main(['--help']) == 0
    assert 'SCRIPT [ARGS...]' in capsys.readouterr().out


def test_which_timm(tmp_path, script):
    """ The script's own folder does not put another timm before the installed one, the current folder does."""
    (tmp_path / 'elsewhere').mkdir()
    checkout = tmp_path / 'checkout'
    import timm
    shutil.copytree(os.path.dirname(timm.__file__), checkout / 'timm')
    (checkout / 'show.py').write_text('import timm; print(timm.__file__)')
    assert run(checkout / 'show.py', cwd=tmp_path / 'elsewhere').stdout.strip() == timm.__file__
    assert run('show.py', cwd=checkout).stdout.strip() == str(checkout / 'timm' / '__init__.py')
