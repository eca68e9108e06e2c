"""What the demo prints at its end."""

from __future__ import annotations

from collections.abc import Sequence

from llava.demo.evaluation import CaptionedClip, Scores

_HEADINGS = ("reference", "caption with the right video", "caption with another clip's video")


def caption_table(clips: Sequence[CaptionedClip]) -> str:
    """Reference and captions in aligned columns; `=` marks a caption that equals the reference."""
    rows = [_HEADINGS] + [
        (clip.reference, _marked(clip.caption, clip), _marked(clip.other_caption, clip)) for clip in clips
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-+-".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _marked(caption: str, clip: CaptionedClip) -> str:
    return f"{'=' if caption == clip.reference else ' '} {caption}"


def score_lines(scores: Scores, num_clips: int) -> str:
    """The two figures of the demo."""
    return (
        f"exact match on {num_clips} held-out clips, whose pairs of shape and colour training never saw:\n"
        f"  with the right video          {scores.right_video:6.1%}\n"
        f"  with another clip's video     {scores.other_video:6.1%}"
    )


def time_lines(seconds: dict[str, float]) -> str:
    """Seconds of each phase and of all of them."""
    phases = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    minutes, rest = divmod(round(sum(seconds.values())), 60)
    return f"elapsed: {minutes} min {rest:02d} s ({phases})"
