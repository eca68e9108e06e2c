"""Data: from files to batches.

files.py          what --data_path says -> data files -> raw samples, one by one
spellings.py, records.py  a raw sample  -> Record, validated
index.py          Records of a file     -> a table that workers share, and a folder that the next start reads
mixture.py        chosen rows of tables -> one sequence of Records
media.py          a file                -> squares of an image or of sampled frames
  media_files.py    is it a file, where does it lie, how large may it be?
  images.py         pictures; image_structure.py whether their files are whole
  video.py          which frames, and their pixels; video_index.py which frames there are
  packets.py        containers and what a packet shows; nal_units.py for H.264 and HEVC
  truncation.py     is the file whole?
  decoding.py       video.py as a process with a time limit
placeholders.py   turns                 -> text with visual spans and the times of frames
formats/          turns                 -> ids and labels, in one of the formats
dataset.py        Record                -> Example
dataset_stats.py  all Records           -> their lengths, and what has something to learn
collator.py       Examples              -> Batch
localized_narratives/ rows of Localized Narratives -> data files, a command
"""
