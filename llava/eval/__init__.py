"""Scoring a trained model."""
