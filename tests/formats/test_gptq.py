"""What a GPTQ label means, and which are not read."""

from __future__ import annotations

import pytest

from quantkit.errors import FormatError
from quantkit.formats.gptq import labelled


@pytest.mark.parametrize("label", ["gptq_p", "marlin"])
def test_a_third_layout_is_refused_by_name(label: str) -> None:
    with pytest.raises(FormatError, match=f"checkpoint_format '{label}' is not read yet; quantkit reads gptq and gptq_v2"):
        labelled({"bits": 4, "checkpoint_format": label})
