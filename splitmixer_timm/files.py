""" Files written whole or not at all."""
import tempfile
from pathlib import Path


def check_folder(folder: Path, what: str) -> None:
    """ Make the folder if it is not there, and see that files can be written to it.

    Args:
        folder: The folder.
        what: What is to be written, for the error.

    Raises:
        ValueError: If not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ValueError(f'{what} cannot be written to {folder}: {e.strerror}') from e


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
