"""Features of a frozen vision tower in files: computed once, read in every later epoch. `docs/feature_cache.md`."""
