"""Data: from files to batches.

records.py        a line of a file      -> Record
media.py          a file                -> pixels of an image or of sampled frames
image_ops.py      pixels                -> uint8 squares for the tower
placeholders.py   turns                 -> text with visual spans, within the context
preprocess/       text                  -> ids and labels
dataset.py        Record                -> Example
collator.py       Examples              -> Batch
"""
