"""What no certificate of this version covers; sentences point into the list by place."""

from __future__ import annotations

from typing import Final

NOT_PROTECTED: Final = (
    "Facts about the whole group: the model may learn them, and so does anyone who asks it.",
    "What follows about a person from other people's records; it would follow without their own.",
    "One person under several values of the unit column: each value is protected alone.",
    "The number of units in the dataset and its name, which are treated as public.",
    "What the base model's own pre-training data betray; they were not under this guarantee.",
    "What users type to the model, and what it answers, while it is in use.",
    "The training data where they are stored and used; encryption and access control guard them.",
    "Running times, memory and other side channels of the machine during training.",
    "Settings chosen after looking at the data by means that the budget ledger did not see.",
    "Figures of a leak report: they are taken from people's records without noise.",
)

TRUST_MODEL: Final = "central: the operator of this home sees the raw data"
