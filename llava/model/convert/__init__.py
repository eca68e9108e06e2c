"""Checkpoints of other code as this library's: what a folder holds, told and translated, in memory or on the disk."""
