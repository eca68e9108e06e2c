"""Data: from files to batches.

records.py        a line of a file      -> Record
record_store.py   Records               -> a file that workers share
media.py          a file                -> squares of an image or of sampled frames
  files.py          is it a file?
  frames.py         which frames, and their pixels
  truncation.py     is the file whole?
  video_index.py    which frames does it have?
  video_backends.py decord or PyAV
  decoder.py        frames.py as a process, decoder_process.py its client with a time limit
bad_samples.py    an error              -> BadSample
image_ops.py      pixels                -> uint8 squares for the tower
placeholders.py   turns                 -> text with visual spans, within the context
preprocess/       turns                 -> ids and labels, in one of the formats
dataset.py        Record                -> Example
collator.py       Examples              -> Batch
"""
