"""What calls are given that expect something else, and how they are to say so."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

SENTENCE = re.compile(r"^(?P<op>\w+): (?P<argument>\w+): [^\n]*expected [^\n]+, got [^\n]+$")


def raised(call: Callable[[], object], *kinds: type[Exception]) -> re.Match:
    """One sentence, as an error of exactly one of these types."""
    with pytest.raises(kinds) as error:
        call()
    assert type(error.value) in kinds
    message = SENTENCE.match(str(error.value))
    assert message, f"not one sentence: {error.value}"
    return message


def freed(t: Tensor) -> Tensor:
    """As who shards parameters leaves them."""
    t = t.detach().clone(memory_format=torch.preserve_format)
    t.untyped_storage().resize_(0)
    return t


#: From a tensor that fits, others that no call takes in its place.
TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda t: t.detach().to_sparse(),
    "sparse CSR": lambda t: torch.eye(3).to_sparse_csr(),
    "oneDNN": lambda t: t.detach().to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.detach(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t[:1].detach(), t[:1].detach()]),
    "integers": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.detach() + 0j,
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "freed": freed,
    "a dimension more": lambda t: t[None],
    "no dimension": lambda t: t.new_tensor(1.0),
}
