"""``python -m llava.data.localized_narratives``: Localized Narratives -> data files of text, images and boxes.

rows.py       a file of rows        -> Narratives: what was said when, and where the pointer was
boxes.py      points of a trace     -> Box
alignment.py  what was said         -> where it stands in the caption
grounding.py  a Narrative           -> its utterances, each with its box and its place
images.py     an image id           -> the image's file
samples.py    a grounded Narrative  -> its samples of the three files
prepare.py    all rows              -> the three files and the list of what was left out
preview.py    some of them          -> pictures with traces and boxes, to look at
"""
