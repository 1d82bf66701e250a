"""System calls that hang until a test lets them go on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest


class Gate:
    """A system call that hangs until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, when: Callable[..., bool]):
        self.opened = threading.Event()
        self.met = threading.Event()
        self.passed = threading.Event()
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.opened.is_set() or not when(*args, **kwargs):
                return original(*args, **kwargs)
            self.met.set()
            self.opened.wait()
            try:
                return original(*args, **kwargs)
            finally:
                self.passed.set()

        monkeypatch.setattr(os, name, call)
