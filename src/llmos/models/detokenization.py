"""Token ids to text while they arrive: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character


class Detokenizer:
    """Decodes one growing sequence; the parts it returns join to the text of the whole.

    A character may span several tokens, and a token's text may depend on its left neighbour, so
    each part is the difference of two decodings that share a short left context.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Begin an empty sequence."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context_from = 0  # ids[context_from:shown_to] are the left context
        self._shown_to = 0

    def push(self, token: int) -> str:
        """Append a token and return the text that is complete by now."""
        self._ids.append(token)
        part = self._pending()
        if not part or part.endswith(REPLACEMENT):
            return ""
        self._context_from, self._shown_to = self._shown_to, len(self._ids)
        return part

    def flush(self) -> str:
        """Return what is left, with replacement characters where bytes are missing."""
        part = self._pending()
        self._context_from = self._shown_to = len(self._ids)
        return part

    def _pending(self) -> str:
        context = self._decode(self._ids[self._context_from : self._shown_to])
        return self._decode(self._ids[self._context_from :])[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class StopScanner:
    """Passes text through until one of the stop strings appears; holds back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for these strings; none at all passes everything."""
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take more text and return what may be shown; sets `stopped` at the first stop string."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max(map(self._held_for, self._stops), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def flush(self) -> str:
        """Return what was held back, when the text ends without a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _held_for(self, stop: str) -> int:
        """Return the length of the longest end of the text that is a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
