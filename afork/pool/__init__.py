"""Pools of processes that serve calls."""

from ._pool import Pool as Pool
