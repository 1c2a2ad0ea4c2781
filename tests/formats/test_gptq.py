"""What a GPTQ label means, and which are not read."""

from __future__ import annotations

import pytest
import torch

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import FormatError
from quantkit.formats.gptq import labelled
from quantkit.formats.registry import FORMATS


@pytest.mark.parametrize("label", ["gptq_p", "marlin"])
def test_a_third_layout_is_refused_by_name(label: str) -> None:
    with pytest.raises(FormatError, match=f"checkpoint_format '{label}' is not read yet; quantkit reads gptq and gptq_v2"):
        labelled({"bits": 4, "checkpoint_format": label})


@pytest.mark.parametrize(("written", "read"), [("gptq", "gptq-v2"), ("gptq-v2", "gptq")])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_belong_to_another_label_are_refused_where_weights_are_symmetric(bits: int, written: str, read: str) -> None:
    scheme = parse_scheme(f"w{bits}a16-g32")
    q = QuantizedTensor(scheme.weight, torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32, 2, dtype=torch.float16))
    middle = 1 << (bits - 1)
    said = (middle, middle - 1) if read == "gptq-v2" else (middle - 1, middle)

    with pytest.raises(FormatError, match=f"{read} stores the zero point {said[0]}, and here is {said[1]}; checkpoint_format or sym is wrong"):
        FORMATS[read].decode(FORMATS[written].encode(q, scheme), scheme)
