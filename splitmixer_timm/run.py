""" Run a script of timm's with this package's models registered.

    python -m splitmixer_timm.run SCRIPT [ARGS...]
    torchrun --nproc-per-node=2 -m splitmixer_timm.run SCRIPT [ARGS...]

`SCRIPT` (validate.py, benchmark.py, ... from github.com/huggingface/pytorch-image-models, or any other) runs as
`__main__` with its own arguments. timm is the installed one, or that of the current folder if it holds a `timm/`, as
for any `python -m`.
"""
import os
import runpy
import sys
import tokenize
from pathlib import Path
from typing import Dict, List, Optional


def environment(**variables: str) -> Dict[str, str]:
    """ This process's environment, in which other Python processes find this very package, installed or not."""
    places = [str(Path(__file__).resolve().parent.parent), os.environ.get('PYTHONPATH', '')]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, places)), **variables}


def main(argv: Optional[List[str]] = None) -> int:
    """ Run the script named first in `argv` with the rest as its arguments.

    Returns:
        2 if there is no such script or it is not Python; else 0, unless the script exits by itself.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ('-h', '--help'):
        print((__doc__ or '').strip(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    script = argv[0]
    try:
        with tokenize.open(script) as f:
            compile(f.read(), script, 'exec')
    except OSError as e:
        print(f'splitmixer_timm.run: error: cannot read script {script!r}: {e.strerror}', file=sys.stderr)
        return 2
    except (SyntaxError, ValueError) as e:
        print(f'splitmixer_timm.run: error: {script!r} is not a Python script: {e}', file=sys.stderr)
        return 2
    sys.argv = argv
    if not getattr(sys.flags, 'safe_path', False):  # by which Python has no folder of its own there
        sys.path[0] = os.path.dirname(os.path.abspath(script))  # as Python itself does for a script
    runpy.run_path(script, run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
