"""Data: from files to batches.

files.py, raw_samples.py  what --data_path says -> data files -> raw samples, one by one
spellings.py, records.py  a raw sample  -> Record, validated
index.py          Records of files      -> tables that workers share, chosen rows of them as one sequence
cache.py          the folder where the next start finds these tables
media.py          a file                -> squares of an image or of sampled frames
  media_files.py    is it a file, where does it lie, how large may it be?
  images.py         pictures; image_structure.py whether their files are whole
  decoding.py       which frames of a clip, here or in a process with a time limit
  video.py          a video and its frames; video_index.py which there are, nal_units.py for H.264 and HEVC
  containers.py     what kind of video a file is, and whether it is whole
placeholders.py   turns                 -> text with visual spans and the times of frames
formats/          turns                 -> ids and labels, in one of the formats
dataset.py        Record                -> Example
dataset_stats.py  all Records           -> their lengths, words, media, coordinates and targets
words.py          text                  -> how many words of it a sample presents
chunking.py       a long text           -> samples of the context's length
concatenation.py  the texts of a file   -> samples of the context's length
samplers.py       indices of samples    -> steps in order, and each rank's share of them
collator.py       Examples              -> Batch
module.py         the flags about data  -> data sets and collator
check.py          Records               -> which media are missing or cannot be decoded, also a command
localized_narratives/ rows of Localized Narratives -> data files, a command
"""
