"""The words that ask for a caption: what `kangaroo caption` sends, and what stands in for a missing question."""

CAPTION_QUESTION = "Describe this picture in one sentence."
