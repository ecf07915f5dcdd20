"""Packages of the wheel; everything else is in pyproject.toml.

The folder configs/ becomes the package `ppn_jax.configs`, which pyproject.toml cannot express
together with finding packages.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=['ppn_jax', 'ppn_jax.*']), 'ppn_jax.configs'],
      package_dir={'ppn_jax.configs': 'configs'})
