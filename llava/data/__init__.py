"""Data: from files to batches.

data_files.py     what --data_path says -> data files, and how much of each
raw_samples.py    a data file           -> raw samples, one by one
records.py        a raw sample          -> Record, validated
record_store.py   Records of a file     -> a table that workers share
record_index.py   the tables and arrays -> a folder that the next start reads
mixture.py        chosen rows of tables -> one sequence of Records
media.py          a file                -> squares of an image or of sampled frames
  files.py          is it a file?
  frames.py         which frames, and their pixels
  containers.py     which container is it, by its content?
  truncation.py     is the file whole?
  video_index.py    which frames does it have, and where may decoding begin?
  packets.py        what a packet says of that; nal_units.py for H.264 and HEVC
  video_times.py    when frames are shown
  display.py        frames upright, with square pixels
  video_backends.py decord or PyAV
  decoder.py        frames.py as a process, decoder_process.py its client with a time limit
bad_samples.py    an error              -> BadSample
image_ops.py      pixels                -> uint8 squares for the tower
placeholders.py   turns                 -> text with visual spans, within the context
preprocess/       turns                 -> ids and labels, in one of the formats
time_instruction.py turns               -> turns that tell the times of frames
dataset.py        Record                -> Example
survey.py         all Records           -> their lengths, and what has something to learn
collator.py       Examples              -> Batch
localized_narratives/ rows of Localized Narratives -> data files, a command
"""
