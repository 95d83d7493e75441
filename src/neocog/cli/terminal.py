"""Rich's console for text that others wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from ..foreign import shown_lines


class SafeConsole(Console):
    """Spells out what a terminal would obey, and takes no text for markup, a code or an emoji.

    Names that may hold ends of lines, and those in aligned columns, are to be
    :func:`neocog.foreign.shown` before they come here.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as it is."""
        return super().render_str(shown_lines(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The pieces of whatever is shown, all but the console's own control codes checked."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else shown_lines(text), style, control)
