"""The trained model, and everything that knows about ranks or torchtitan."""

from .compat import install

install()  # before any module of this room imports torchtitan
