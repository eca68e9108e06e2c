"""Data: from files to batches.

records.py        a line of a file      -> Record
record_store.py   Records               -> a file that workers share
media.py          a file                -> pixels of an image or of sampled frames
  truncation.py     is the file whole?
  video_index.py    which frames does it have?
  video_backends.py decord or PyAV
image_ops.py      pixels                -> uint8 squares for the tower
placeholders.py   turns                 -> text with visual spans, within the context
preprocess/       turns                 -> ids and labels, in one of the formats
dataset.py        Record                -> Example
collator.py       Examples              -> Batch
"""
