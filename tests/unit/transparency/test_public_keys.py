from __future__ import annotations

import pytest

from llmos.errors import VerificationFailed
from llmos.transparency.public_keys import read_public_keys


@pytest.mark.parametrize("text", ["", "one line", "a\nb\nc\n", "not+a+key\nnot+a+key\n"])
def test_public_keys_must_be_two_verifier_keys(text: str) -> None:
    with pytest.raises(VerificationFailed):
        read_public_keys(text)
