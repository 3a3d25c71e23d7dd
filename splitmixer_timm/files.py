""" Files written whole or not at all."""
import tempfile
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """ Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp', delete=False) as f:
        temporary = Path(f.name)
        try:
            f.write(content)
            f.close()
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            f.close()
            temporary.unlink()
            raise
