"""Optional dependencies: imported where they are used, with an error that names what to install."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Its import name, such as ``"scipy.optimize"``.
        extra: The extra of this package that brings it.

    Returns:
        The module.

    Raises:
        ImportError: It is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module} is not available ({error}). It comes with an extra: pip install "asga[{extra}]"'
        ) from error
