"""Exports: checkpoints as folders that load without this library."""
