"""The demo of grounding: where a shape is in a picture, and when it rests in a clip."""
