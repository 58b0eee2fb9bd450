"""A sidecar for each test."""

from tests.support.flow import flow, start

__all__ = ["flow", "start"]
