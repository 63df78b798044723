"""Packages that only an extra of mmtx installs."""

import importlib
from typing import Any

from mmtx.errors import InputError


def require(package: str, extra: str, what: str) -> Any:
    """Import a package that only an extra installs. Raises InputError that names `what` needs it and how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"{what}: {package} is not installed, expected pip install 'mmtx[{extra}]'") from None
