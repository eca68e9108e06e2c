"""Flags about coordinates: the stage of training, and what coordinates are to the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from llava.grounding.syntax import DEFAULT_BINS, GROUNDING_MODES, LAPE, NONE

CONTENT, COORDINATES, INSTRUCTIONS = "1", "2", "3"
STAGES = (CONTENT, COORDINATES, INSTRUCTIONS)


@dataclass(kw_only=True)
class GroundingArguments:
    """Stages build on one another: content, coordinates (tables join the model), instructions."""

    stage: str = field(
        default=CONTENT,
        metadata={
            "help": "1: content, images and videos without coordinates (default). 2: coordinates, whose tables join "
            "the model. 3: instructions, from a checkpoint of stage 2. Each trains --mm_tunable_parts, 2 and 3 the "
            "tables as well."
        },
    )
    grounding: str | None = field(
        default=None,
        metadata={
            "help": f"What coordinates are to the model: {', '.join(GROUNDING_MODES)}. lape (default from stage 2 on): "
            "tables that text and pictures share. placeholder: words that say nothing of where, an ablation. none: an "
            "error in the data (default in stage 1)."
        },
    )
    num_temporal_tokens: int | None = field(
        default=None, metadata={"help": f"Bins of time in new tables (default {DEFAULT_BINS})."}
    )
    num_spatial_tokens: int | None = field(
        default=None, metadata={"help": f"Bins of height, and of width, in new tables (default {DEFAULT_BINS})."}
    )
    freeze_coordinates: bool = field(
        default=False, metadata={"help": "Keep the tables of coordinates as they are (stages 2 and 3)."}
    )

    def check_grounding(self) -> None:
        """A ValueError for a stage that is none, or coordinates in a stage without them."""
        if self.stage not in STAGES:
            raise ValueError(f"--stage is {self.stage!r}; known: {', '.join(STAGES)}")
        if self.grounding is not None and self.grounding not in GROUNDING_MODES:
            raise ValueError(f"--grounding is {self.grounding!r}; known: {', '.join(GROUNDING_MODES)}")
        if self.stage == CONTENT and self.grounding not in (None, NONE):
            raise ValueError(f"--grounding {self.grounding} needs --stage 2: stage 1 trains content alone")
        if self.stage != CONTENT and self.grounding == NONE:
            raise ValueError(f"--stage {self.stage} trains coordinates, but --grounding is none; take --stage 1")

    def choose_grounding(self, trained: str | None) -> str | None:
        """What ``load_model`` is to make of coordinates.

        Args:
            trained: what they are to the checkpoint; None for one without them.

        Raises:
            ValueError: the stage does not fit the checkpoint.
        """
        if self.stage == CONTENT and trained is not None:
            raise ValueError(
                f"the checkpoint has coordinates ({trained}), and --stage 1 trains content alone; take --stage 2 or 3"
            )
        if self.stage == INSTRUCTIONS and trained is None:
            raise ValueError("--stage 3 starts from a checkpoint of stage 2, and this one has no coordinates")
        return self.grounding or (LAPE if self.stage != CONTENT and trained is None else None)
