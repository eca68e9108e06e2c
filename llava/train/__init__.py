"""Training: arguments, trainable parts, the trainer and the command ``python -m llava.train.train``."""
