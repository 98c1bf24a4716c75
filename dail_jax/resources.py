"""What comes with the package: configurations, and the files of the embedded micro-world."""

from __future__ import annotations

import re
from pathlib import Path

from dail_jax import storage
from dail_jax.errors import UserError

PREFIX = "pkg:"
PACKAGE = Path(__file__).parent
# An installed package holds the configurations; in a checkout they lie beside it.
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"


def locate(path: str) -> str:
    """A path with `pkg:NAME` replaced by the place of that file: a configuration, or else a file of the package.

    Raises ValueError where nothing of that name comes with the package.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    for root in (CONFIGS, PACKAGE):
        if name and (root / name).resolve().is_relative_to(root.resolve()) and (root / name).exists():
            return str(root / name)
    raise ValueError(f"want a file that comes with the package: {', '.join(configurations())}, ...")


def model(path: str) -> str:
    """A model's folder, or where it is not here the package's config.json of that model, which is all that compiling needs.

    `models/Qwen3-8B` is `configs/models/qwen3_8b`; a longer name, such as `Qwen2.5-7B-Instruct`, is the longest that it
    begins with. A path that is neither is returned as it is.
    """
    name = re.sub(r"[^a-z0-9]+", "_", Path(path).name.lower())
    known = [folder for folder in (CONFIGS / "models").iterdir() if name.startswith(folder.name)]
    if Path(path).is_dir() or not known:
        return str(storage.model(path))
    return str(max(known, key=lambda folder: len(folder.name)))


def configurations() -> list[str]:
    """The names of the configurations, such as `demo` and `paper/tau`; those of benchmarks and models left out."""
    found = (path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
    return sorted(name for name in found if not name.startswith("benchmarks/"))


def configuration(name: str) -> str:
    """The file that a command line means: a path, `pkg:NAME`, or the bare name of a configuration of the package."""
    if name.startswith(PREFIX):
        try:
            return locate(name)
        except ValueError as error:
            raise UserError(str(error), file=name) from None
    if Path(name).is_file() or name not in configurations():
        return name
    return str(CONFIGS / f"{name}.yaml")
