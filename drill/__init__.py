"""The fault drill: real sidecars, a real Valkey, a provider that fails on purpose, a verdict."""
