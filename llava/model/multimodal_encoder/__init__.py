"""Vision towers: from normalised frames to patch features."""
