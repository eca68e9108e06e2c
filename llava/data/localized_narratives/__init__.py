"""``python -m llava.data.localized_narratives``: Localized Narratives -> data files of text, images and boxes.

rows.py     lines of files  -> Narratives: what was said when, and where the pointer was
boxes.py    a Narrative     -> its utterances, each with its box and its place in the caption, and samples of these
prepare.py  all lines       -> the three files and the list of what was left out
preview.py  some samples    -> pictures with traces and boxes, to look at
"""
