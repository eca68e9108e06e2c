"""A page in the browser and an OpenAI-compatible endpoint for one or two trained models."""
