"""Algorithms: pure and sync, with the time passed in."""
