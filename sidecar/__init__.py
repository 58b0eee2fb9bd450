"""The LLM sidecar: a reverse proxy for LLM APIs, built from filters configured in YAML."""

__version__ = "0.1.0"
