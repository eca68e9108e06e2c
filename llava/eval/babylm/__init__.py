"""The zero-shot tasks of BabyLM, and pairs of one's own: `python -m llava.eval.babylm`."""
