"""What a base model is called in a result that others get."""

from __future__ import annotations

import re
from pathlib import Path

from qhybrid.base.locate import PACKAGE_PREFIX

_HUB_ID = re.compile(r"[\w\-][\w.\-]*/[\w\-][\w.\-]*", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether it has the form of a repository's name on the hub, ORG/NAME."""
    return _HUB_ID.fullmatch(name) is not None


def public_name(model: str) -> str:
    """A base model's name for others: a hub id or a package's file as it is, of a path the last part."""
    if model.startswith(PACKAGE_PREFIX) or (is_hub_id(model) and not Path(model).exists()):
        return model
    return re.split(r"[\\/]", model.rstrip("\\/"))[-1] or "the base model"
