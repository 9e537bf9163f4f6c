"""The only statement of the mathematics: plain torch, any floating dtype (float64 in tests). Every back end is tested against this file."""

from __future__ import annotations

# --- statistics -------------------------------------------------------------------------------------------------------

# --- credit -----------------------------------------------------------------------------------------------------------
