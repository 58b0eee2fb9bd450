"""Measures what the sidecar costs beside other proxies: `python -m bench`. No product code."""
